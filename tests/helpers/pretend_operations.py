"""Operations of torch by what they do on a CUDA device."""

import torch

aten = torch.ops.aten

# Operations whose result the host has to know: a Python value or a shape.
WAITS = {
    aten._local_scalar_dense: 1, aten.nonzero: 1, aten.masked_select: 1, aten.equal: 1,
    aten.bincount: 2, aten._unique2: 1, aten.unique_dim: 1, aten.unique_consecutive: 1,
    aten.repeat_interleave: 1, aten.histc: 1, aten.histogram: 1,
}  # fmt: skip
# Floating-point sums by atomic additions, as torch's use_deterministic_algorithms lists them.
UNREPEATABLE = {
    aten.index_add, aten.index_add_, aten.scatter_add, aten.scatter_add_, aten.scatter_reduce,
    aten.put_, aten.histc, aten.nll_loss2d_forward, aten._adaptive_avg_pool2d_backward,
    aten.adaptive_max_pool2d_backward, aten.upsample_bilinear2d_backward,
    aten.upsample_nearest2d_backward, aten.reflection_pad2d_backward, aten.kthvalue,
    aten.replication_pad2d_backward, aten.grid_sampler_2d_backward, aten.cumsum,
    aten.embedding_dense_backward, aten.max_pool3d_with_indices_backward,
}  # fmt: skip
RANDOM = {
    aten.rand, aten.randn, aten.randint, aten.randperm, aten.uniform_, aten.normal_, aten.normal,
    aten.bernoulli, aten.bernoulli_, aten.random_, aten.native_dropout, aten.multinomial,
    aten.exponential_, aten.rand_like, aten.randn_like, aten.randint_like,
}  # fmt: skip
INDEXED = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}
# They take a CPU tensor of no dimension beside CUDA tensors, as pointwise operations do.
TAKE_CPU_SCALAR = {aten.fill_, aten.masked_fill, aten.masked_fill_, aten.where, *INDEXED}
NO_WORK = {
    aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided,
    aten._unsafe_view, aten.is_same_size,
}  # fmt: skip


def batch_norm(x, weight, bias, mean, var, training, momentum, eps):
    """Compute cuDNN's batch norm by that of the CPU."""
    out, *saved = torch.native_batch_norm(x, weight, bias, mean, var, training, momentum, eps)
    return (out, *saved, torch.empty(0, dtype=torch.uint8))


def batch_norm_backward(x, grad, weight, mean, var, save_mean, save_var, eps, reserve):
    return aten.native_batch_norm_backward(
        grad.contiguous(), x, weight, mean, var, save_mean, save_var, True, eps, [True] * 3
    )


ON_CPU = {
    aten.cudnn_batch_norm: batch_norm,
    aten.cudnn_batch_norm_backward: batch_norm_backward,
}


def takes_cpu_scalar(func):
    return torch.Tag.pointwise in func.tags or func.overloadpacket in TAKE_CPU_SCALAR
