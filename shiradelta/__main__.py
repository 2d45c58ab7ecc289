"""`python -m shiradelta`: the command line."""

from shiradelta.cli import main

main(prog_name="shiradelta")
