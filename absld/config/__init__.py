"""Every setting once: defaults, meanings, sources, recipes, parsing and files."""
