"""`python -m absld`."""

from absld.cli.app import main

main()
