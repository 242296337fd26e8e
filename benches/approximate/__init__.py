"""The parts of benches/approx.py."""
