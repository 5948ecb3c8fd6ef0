"""The two libraries of CuTe kernels behind one contract, imported when first used.

They compile a kernel for a new kind of call in seconds, and keep it while the process lives.
"""

from __future__ import annotations

import functools
import importlib.util
import warnings
from typing import Any, Protocol

import torch
from torch import Tensor

from blade_kernels.block_mask import BlockMask

EXTRA = 'pip install "blade-video[cute]"'
_MODULES = {"cudnn": ("cudnn", "cutlass"), "flash": ("flash_attn.cute", "cutlass", "quack")}


class Library(Protocol):
    """Block-sparse attention without pooled tokens, forward and backward.

    Tensors are as in `Arguments`: q, k and v of (B, S, H, D), D contiguous and rows aligned to 16 bytes. The mask's
    lists are contiguous and of the full shape (B, H, query blocks, capacity); lists ascend. `valid_keys` holds the
    number of valid keys in each key block, at least 1, int32 of shape (key blocks,) or (B, key blocks); None if all
    blocks are full but the last. The log-sum-exp is float32 of (B, H, S), natural, and -inf for rows without blocks.
    """

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, valid_keys: Tensor | None, scale: float
    ) -> tuple[Tensor, Tensor]:
        """Return the output, (B, S, H, D), and the log-sum-exp."""

    def backward(
        self, q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, valid_keys: Tensor | None, scale: float,
        out: Tensor, lse: Tensor, grad_out: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """Return the gradients of q, k and v; rows and key blocks without pairs may hold anything."""


@functools.cache  # asked in every layer
def missing_library(name: str) -> str | None:
    """Return why a library cannot be used, or None if it can.

    Args:
        name: "cudnn" or "flash".
    """
    for module in _MODULES[name]:
        try:
            installed = importlib.util.find_spec(module) is not None
        except ModuleNotFoundError:  # of the package above it
            installed = False
        if not installed:
            return f"its kernels are not installed ({EXTRA})"
    return None


@functools.cache
def library(name: str) -> Library:
    """Import a library, which takes seconds.

    Args:
        name: "cudnn" or "flash".

    Raises:
        ImportError: it is not installed, or not as `EXTRA` installs it.
    """
    return _Cudnn() if name == "cudnn" else _Flash()


class _Cudnn:
    """Kernels of nvidia-cudnn-frontend."""

    def __init__(self) -> None:
        from cudnn.block_sparse_attention import (
            block_sparse_attention_backward,
            block_sparse_attention_forward,
        )

        self._forward, self._backward = block_sparse_attention_forward, block_sparse_attention_backward

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, valid_keys: Tensor | None, scale: float
    ) -> tuple[Tensor, Tensor]:
        result = self._forward(
            q, k, v, mask.indices, allow_empty_block_nums=True, **self._common(mask, valid_keys, scale)
        )
        return result["o_tensor"], result["lse_tensor"]

    def backward(
        self, q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, valid_keys: Tensor | None, scale: float,
        out: Tensor, lse: Tensor, grad_out: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        result = self._backward(grad_out, q, k, v, out, lse, mask.indices, **self._common(mask, valid_keys, scale))
        return result["dq_tensor"], result["dk_tensor"], result["dv_tensor"]

    @staticmethod
    def _common(mask: BlockMask, valid_keys: Tensor | None, scale: float) -> dict[str, Any]:
        return {
            "q2k_block_nums": mask.counts,
            "block_sizes": valid_keys,
            "sparse_block_size": mask.block_size[1],
            "softmax_scale": scale,
            "layout": "bshd",
        }


class _Flash:
    """Kernels of flash-attn-4."""

    def __init__(self) -> None:
        with warnings.catch_warnings():  # of its own deprecated calls
            warnings.simplefilter("ignore")
            from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch
            from flash_attn.cute.interface import _flash_attn_bwd, _flash_attn_fwd

        # the public function takes no gradient of one output without the other, and hides the log-sum-exp from us
        self._forward, self._backward, self._lists = _flash_attn_fwd, _flash_attn_bwd, BlockSparseTensorsTorch

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, valid_keys: Tensor | None, scale: float
    ) -> tuple[Tensor, Tensor]:
        lists = self._blocks(mask.counts, mask.indices, mask.block_size)
        out, lse, *_ = self._forward(q, k, v, softmax_scale=scale, block_sparse_tensors=lists, return_lse=True)
        return out, lse

    def backward(
        self, q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, valid_keys: Tensor | None, scale: float,
        out: Tensor, lse: Tensor, grad_out: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        columns = BlockMask.from_dense(mask.keep.transpose(2, 3).contiguous())
        lists = self._blocks(columns.counts, columns.indices, mask.block_size)
        dq, dk, dv = self._backward(q, k, v, out, grad_out, lse, softmax_scale=scale, block_sparse_tensors=lists)
        return dq, dk, dv

    def _blocks(self, counts: Tensor, indices: Tensor, block_size: tuple[int, int]) -> Any:
        """Make its lists: all blocks are full ones, which need no mask; those to be masked are none."""
        none = torch.zeros_like(counts)
        return self._lists(none, none.unsqueeze(-1), counts, indices, block_size=block_size)
