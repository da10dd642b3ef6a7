"""Entry point of `python -m rayllp`."""

from rayllp.cli import main

main()
