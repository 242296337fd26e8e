"""`python -m lmd3`: the command line."""

from lmd3.cli import run

run()
