"""How the same training runs fast: precision, batch-norm folding, CUDA graphs, processes, cached logits."""
