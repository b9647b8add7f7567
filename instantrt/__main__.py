"""`python -m instantrt` is the command `instantrt`."""

from instantrt.tools.cli.app import main

main()
