"""A call of block-sparse attention where kernels run: on a CUDA device, or interpreted on the CPU."""

import torch
from blade_kernels.block_sparse import block_sparse_attention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def attend(inputs, implementation="triton", **arguments):
    """Output and log-sum-exp of a `Case`, on the CPU."""
    pooled, lengths = inputs.pooled(), inputs.key_lengths
    if pooled is not None:
        moved = (x if x is None else x.to(DEVICE) for x in (pooled.k, pooled.v, pooled.log_weight, pooled.key_block))
        pooled = type(pooled)(*moved)
    out, lse = block_sparse_attention(
        *(x.to(DEVICE) for x in (inputs.q, inputs.k, inputs.v)),
        inputs.mask.to(DEVICE),
        pooled=pooled,
        key_lengths=lengths if lengths is None else lengths.to(DEVICE),
        return_lse=True,
        implementation=implementation,
        **arguments,
    )
    return out.cpu(), lse.cpu()
