"""`python -m lmd3`: the command line."""

from lmd3.cli import run

# Worker processes import this module too.
if __name__ == "__main__":
    run()
