"""Networks by name, and networks from files."""
