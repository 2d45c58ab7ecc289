"""`python -m shiradelta.cli`, as `python -m shiradelta`."""

from shiradelta.cli import main

main()
