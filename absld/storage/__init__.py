"""Files that survive interruption: atomic writes, checkpoints, run directories."""
