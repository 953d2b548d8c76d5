"""`python -m absld`."""

from absld.cli import main

main()
