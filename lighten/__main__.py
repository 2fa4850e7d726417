"""`python -m lighten` is the command `lighten`."""

from lighten.cli import main

main()
