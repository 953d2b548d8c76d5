"""Step-time measurements: the engine beside the single file, technique by technique."""
