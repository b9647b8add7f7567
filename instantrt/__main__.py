"""`python -m instantrt` is the command `instantrt`."""

from instantrt.tools.cli.start import main

main()
