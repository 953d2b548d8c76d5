"""Fast training: precision, batch-norm folding, CUDA graphs, processes, cached logits."""
