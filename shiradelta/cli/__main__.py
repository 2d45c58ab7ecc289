"""`python -m shiradelta.cli`, the same as `python -m shiradelta`."""

from shiradelta.cli import main

main(prog_name="shiradelta")
