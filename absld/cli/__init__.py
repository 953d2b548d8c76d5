"""The command line `absld`."""
