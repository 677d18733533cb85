"""`python -m guardbake`."""

from guardbake.cli import main

main()
