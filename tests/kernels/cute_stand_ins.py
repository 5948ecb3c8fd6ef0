"""Plain PyTorch in place of the CuTe kernels, with the contracts of their libraries, traps included.

What a library's documentation or source leaves open is NaN here: rows and blocks without pairs in gradients, and
whatever a weight of 0 is multiplied by.
"""

from types import SimpleNamespace

import torch
from blade_kernels.block_sparse import cute_libraries


def _rows(q, k, indices, counts, query_block, key_block, valid, scale):
    """The logits of every row's blocks as the kernels see them: (B, H, S, T), -inf where there is no pair."""
    batch, queries, heads, _ = q.shape
    keys, blocks = k.shape[1], -(-k.shape[1] // key_block)
    listed = torch.arange(indices.shape[-1]) < counts.unsqueeze(-1)
    keep = torch.zeros(batch, heads, counts.shape[-1], blocks, dtype=torch.bool)
    for b, h, row, slot in listed.nonzero().tolist():
        block = int(indices[b, h, row, slot])
        assert 0 <= block < blocks and not keep[b, h, row, block]
        keep[b, h, row, block] = True
    pairs = keep.repeat_interleave(query_block, 2)[:, :, :queries].repeat_interleave(key_block, 3)[..., :keys]
    places = torch.arange(keys)
    ends = places // key_block * key_block + valid.expand(batch, heads, -1).repeat_interleave(key_block, 2)[..., :keys]
    pairs = pairs & (places < ends).unsqueeze(2)
    logits = torch.einsum("bshd,bthd->bhst", q.float(), k.float()) * scale
    return logits.masked_fill(~pairs, -torch.inf), keep


def _attend(q, k, v, logits):
    lse = logits.logsumexp(-1)
    weights = (logits - lse.unsqueeze(-1)).exp().nan_to_num(0.0)
    return torch.einsum("bhst,bthd->bshd", weights, v.float()).to(q.dtype), lse


def _differentiate(q, k, v, logits, keep, scale, out, lse, grad_out, query_block, key_block):
    weights = (logits - lse.unsqueeze(-1)).exp().masked_fill(logits == -torch.inf, 0.0)
    delta = torch.einsum("bshd,bshd->bhs", out, grad_out)
    ds = weights * (torch.einsum("bshd,bthd->bhst", grad_out, v) - delta.unsqueeze(-1))
    dq = torch.einsum("bhst,bthd->bshd", ds, k) * scale
    dk = torch.einsum("bhst,bshd->bthd", ds, q) * scale
    dv = torch.einsum("bhst,bshd->bthd", weights, grad_out)
    for x, computed, block in (
        (dq, keep.any(3), query_block),
        (dk, keep.any(2), key_block),
        (dv, keep.any(2), key_block),
    ):
        tokens = computed.repeat_interleave(block, 2)[..., : x.shape[1]]
        x[~tokens.transpose(1, 2)] = float("nan")
    return dq, dk, dv


def _check_tensors(*tensors):
    for x in tensors:
        assert x.stride(-1) == 1 and all(stride * x.element_size() % 16 == 0 for stride in x.stride()[:3])


class StandInCudnn(cute_libraries._Cudnn):
    """cuDNN's kernels for an architecture."""

    def __init__(self, architecture):
        self.architecture, self.calls = architecture, []

    def _read(self, backward, q, k, v, indices, options):
        counts, sizes, block = options["q2k_block_nums"], options["block_sizes"], options["sparse_block_size"]
        self.calls.append(SimpleNamespace(backward=backward, block=block, batch=q.shape[0], sizes=sizes))
        batch, queries, heads, _ = q.shape
        blocks = -(-k.shape[1] // block)
        _check_tensors(q, k, v)
        assert options["layout"] == "bshd" and options["softmax_scale"] >= 0
        assert counts.dtype == indices.dtype == torch.int32 and counts.is_contiguous() and indices.is_contiguous()
        assert indices.shape[:3] == counts.shape == (batch, heads, -(-queries // block))
        assert indices.shape[3] >= 1 and counts.min() >= 0 and counts.max() <= indices.shape[3]
        if self.architecture == 90 and block == 64:
            assert queries % 64 == 0
        if sizes is None:
            valid = torch.full((1, 1, blocks), block)
            assert k.shape[1] % block == 0
        else:
            ranks = (1,) if self.architecture in (100, 103) else (1, 2) if backward else (1, 2, 3)
            assert sizes.dtype == torch.int32 and sizes.ndim in ranks
            assert sizes.shape == ((blocks,) if sizes.ndim == 1 else (batch, blocks))
            assert sizes.min() >= 1 and sizes.max() <= block
            valid = sizes.view(-1, 1, blocks)
        scale = options["softmax_scale"]
        return *_rows(q, k, indices, counts, block, block, valid, scale), scale, block

    def _forward(self, q, k, v, indices, *, allow_empty_block_nums, **options):
        logits, keep, *_ = self._read(False, q, k, v, indices, options)
        assert allow_empty_block_nums or keep.any(-1).all()
        out, lse = _attend(q, k, v, logits)
        return {"o_tensor": out, "lse_tensor": lse}

    def _backward(self, grad_out, q, k, v, out, lse, indices, **options):
        logits, keep, scale, block = self._read(True, q, k, v, indices, options)
        assert out.shape == grad_out.shape == q.shape and lse.shape == logits.shape[:3] and lse.is_contiguous()
        dq, dk, dv = _differentiate(q, k, v, logits, keep, scale, out, lse, grad_out, block, block)
        return {"dq_tensor": dq, "dk_tensor": dk, "dv_tensor": dv}


class StandInFlash(cute_libraries._Flash):
    """FlashAttention-4's kernels."""

    def __init__(self):
        self.calls = []

    def _lists(self, mask_counts, mask_indices, counts, indices, *, block_size):
        assert not mask_counts.any() and mask_indices.shape == (*counts.shape, 1)
        assert counts.dtype == indices.dtype == torch.int32
        return SimpleNamespace(counts=counts, indices=indices, block_size=block_size)

    def _forward(self, q, k, v, *, softmax_scale, block_sparse_tensors, return_lse):
        lists = block_sparse_tensors
        self.calls.append(SimpleNamespace(backward=False, block=lists.block_size))
        _check_tensors(q, k, v)
        _check_ascending(lists)
        assert return_lse and softmax_scale >= 0
        return *_attend(q, k, v, self._read(q, k, lists.indices, lists.counts, lists, softmax_scale)[0]), None

    def _backward(self, q, k, v, out, grad_out, lse, *, softmax_scale, block_sparse_tensors):
        lists = block_sparse_tensors
        self.calls.append(SimpleNamespace(backward=True, block=lists.block_size))
        _check_ascending(lists)
        rows = -(-q.shape[1] // lists.block_size[0])
        keep = torch.zeros(*lists.counts.shape, rows, dtype=torch.bool)
        for b, h, column, slot in (
            (torch.arange(lists.indices.shape[-1]) < lists.counts.unsqueeze(-1)).nonzero().tolist()
        ):
            keep[b, h, column, lists.indices[b, h, column, slot]] = True
        keep = keep.transpose(2, 3)
        by_row = (~keep).to(torch.int8).argsort(dim=-1, stable=True).to(torch.int32)
        logits, found = self._read(q, k, by_row, keep.sum(-1, dtype=torch.int32), lists, softmax_scale)
        return _differentiate(q, k, v, logits, found, softmax_scale, out, lse, grad_out, *lists.block_size)

    @staticmethod
    def _read(q, k, indices, counts, lists, scale):
        query_block, key_block = lists.block_size
        valid = torch.full((1, 1, -(-k.shape[1] // key_block)), key_block)
        return _rows(q, k, indices, counts, query_block, key_block, valid, scale)


def _check_ascending(lists):
    listed = torch.arange(1, lists.indices.shape[-1]) < lists.counts.unsqueeze(-1)
    assert (lists.indices.diff(dim=-1)[listed] > 0).all()  # only the last of a list is cut where the sequence ends
