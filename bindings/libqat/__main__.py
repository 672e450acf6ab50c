"""`python -m libqat` is the command line."""

from .cli import main

main()
