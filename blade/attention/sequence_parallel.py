"""One video on several ranks: Ulysses sequence parallelism for sparse and dense self-attention.

Every rank holds a part of the tokens. In each self-attention layer an all-to-all gathers all tokens for a share of the
heads, so that selection, masks and pooled tokens, which are local to a head, stay what they are on one rank; another
brings the outputs back.

Source: DeepSpeed-Ulysses, arXiv 2309.14509; here parts of the sequence and shares of the heads may be unequal.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import _functional_collectives as collectives

from blade.attention.head_deal import Deal, equal_deal, shares
from blade.families.protocol import Inputs
from blade.families.sequence_split import SequenceSplit, SplitModule


@dataclass(frozen=True, eq=False)
class Ranks:
    """The ranks that compute one video together."""

    group: dist.ProcessGroup
    """Their process group."""
    index: int
    """This one."""
    count: int
    """Their number."""

    def parts(self, tokens: int) -> tuple[int, ...]:
        """Return how many of so many tokens each has: as `torch.tensor_split` cuts them."""
        return shares(tokens, self.count)

    def all_gather(self, tensor: torch.Tensor, dim: int, sizes: Sequence[int]) -> torch.Tensor:
        """Put the tensors of all ranks together along a dimension, of which each has another size. Not differentiable.

        Args:
            tensor: this rank's.
            dim: the dimension.
            sizes: size of each rank's along it.
        """
        missing = max(sizes) - tensor.shape[dim]
        if missing:
            padding = tensor.new_zeros(*tensor.shape[:dim], missing, *tensor.shape[dim + 1 :])
            tensor = torch.cat((tensor, padding), dim=dim)
        gather = getattr(collectives, "all_gather_single", collectives.all_gather_tensor)  # its name before 2.13
        gathered = collectives.wait_tensor(gather(tensor.unsqueeze(0), 0, self.group))
        return torch.cat([part.narrow(dim, 0, size) for part, size in zip(gathered.unbind(), sizes)], dim=dim)

    def from_first(self, value: Any) -> Any:
        """Return what the first rank gives, anything that can be pickled, such as what it read from a file."""
        values = [value]
        dist.broadcast_object_list(values, group=self.group, group_src=0)
        return values[0]


@dataclass(frozen=True, eq=False)
class TokenShards:
    """The tokens of one forward pass as they are split among ranks."""

    ranks: Ranks
    """The ranks."""
    video: int
    """Video tokens in all, or all tokens of the one sequence."""
    text: int
    """Tokens of a text that is split by itself."""

    @cached_property
    def video_parts(self) -> tuple[int, ...]:
        """Video tokens of each rank."""
        return self.ranks.parts(self.video)

    @cached_property
    def text_parts(self) -> tuple[int, ...]:
        """Text tokens of each rank."""
        return self.ranks.parts(self.text)

    @cached_property
    def parts(self) -> tuple[int, ...]:
        """Tokens of each rank, the video's first."""
        return tuple(video + text for video, text in zip(self.video_parts, self.text_parts))

    def local_count(self, count: int) -> int:
        """Return how many of the first `count` video tokens, in token order, this rank has."""
        index, parts = self.ranks.index, self.video_parts
        return min(max(count - sum(parts[:index]), 0), parts[index])

    def cut(self, value: Any, dim: int) -> Any:
        """Return this rank's part of a tensor, or of each of several; one that counts no tokens there is whole."""
        if isinstance(value, list | tuple):
            return type(value)(self.cut(item, dim) for item in value)
        if not isinstance(value, torch.Tensor) or value.ndim <= dim or value.shape[dim] not in (self.video, self.text):
            return value
        # a copy, as a view would keep the whole in memory
        return value.tensor_split(self.ranks.count, dim)[self.ranks.index].clone(memory_format=torch.contiguous_format)

    def gather(self, value: Any, dim: int) -> Any:
        """Put together a tensor of all video tokens, or each of several. Differentiable.

        The backward pass returns this rank's part of the gradient, so that gradients of parameters have to be summed
        over the ranks.
        """
        if isinstance(value, list | tuple):
            return type(value)(self.gather(item, dim) for item in value)
        result: torch.Tensor = _Gather.apply(value, self, dim)  # type: ignore[no-untyped-call]
        return result


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, shards: TokenShards, dim: int) -> torch.Tensor:
        ctx.shards, ctx.dim = shards, dim
        return shards.ranks.all_gather(value, dim, shards.video_parts)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        ranks = ctx.shards.ranks
        return gradient.tensor_split(ranks.count, ctx.dim)[ranks.index], None, None


@dataclass(frozen=True, eq=False)
class HeadShare:
    """The heads of one layer that each rank computes in one forward pass."""

    shards: TokenShards
    """The tokens."""
    deal: Deal
    """Numbers of the heads of each rank."""
    device: torch.device
    """The device of the tokens."""

    def __post_init__(self) -> None:
        with torch.inference_mode(False):  # before a layer, perhaps compiled, asks: Dynamo breaks at their lock
            for name in ("counts", "heads", "_order", "_inverse"):
                getattr(self, name)
            for name in ("video_parts", "text_parts", "parts"):
                getattr(self.shards, name)

    @classmethod
    def equal(cls, shards: TokenShards, heads: int, device: torch.device) -> HeadShare:
        """Deal heads that cost the same."""
        return cls(shards, equal_deal(heads, shards.ranks.count), device)

    @cached_property
    def counts(self) -> tuple[int, ...]:
        """Number of heads of each rank."""
        return tuple(map(len, self.deal))

    @cached_property
    def heads(self) -> torch.Tensor:
        """Numbers of this rank's heads, (heads,) int64."""
        return torch.tensor(self.deal[self.shards.ranks.index], dtype=torch.int64, device=self.device)

    @cached_property
    def _order(self) -> torch.Tensor | None:
        """All heads, rank by rank; None where that is their own order."""
        order = [head for heads in self.deal for head in heads]
        return None if order == sorted(order) else torch.tensor(order, device=self.device)

    @cached_property
    def _inverse(self) -> torch.Tensor | None:
        return None if self._order is None else self._order.argsort()

    def gather_heads(self, tensor: torch.Tensor) -> torch.Tensor:
        """Put together what ranks have of their heads, (B, this rank's heads, ...), in the heads' own order."""
        return _ordered(self.shards.ranks.all_gather(tensor, 1, self.counts), 1, self._inverse)

    def to_heads(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Gather all tokens for this rank's heads, in one all-to-all. Differentiable.

        Args:
            tensors: (B, this rank's tokens, H, D) each, the video's first.

        Returns:
            (B, S, this rank's heads, D) each, all video tokens first.

        Raises:
            ValueError: if there are other tokens than the pass was split into.
        """
        ranks, parts = self.shards.ranks, self.shards.parts
        batch, tokens, heads, size = tensors[0].shape
        if tokens != parts[ranks.index] or heads != sum(self.counts):
            raise ValueError(
                f"Rank {ranks.index} of {ranks.count} must have {parts[ranks.index]} tokens of {sum(self.counts)} "
                f"heads here, got {tokens} of {heads}."
            )
        own, each = self.counts[ranks.index], len(tensors) * batch * size
        by_rank = zip(*(_ordered(tensor, 2, self._order).split(self.counts, dim=2) for tensor in tensors))
        received = self._exchange(
            _packed([part for parts_of_rank in by_rank for part in parts_of_rank]),
            [each * tokens * count for count in self.counts],
            [each * part * own for part in parts],
        )
        pieces = [
            piece.view(len(tensors), batch, part, own, size)
            for piece, part in zip(received.split([each * part * own for part in parts]), parts)
        ]
        video = [piece[:, :, :count] for piece, count in zip(pieces, self.shards.video_parts)]
        text = [piece[:, :, count:] for piece, count in zip(pieces, self.shards.video_parts)]
        return torch.cat((*video, *text), dim=2).unbind()

    def to_tokens(self, output: torch.Tensor) -> torch.Tensor:
        """Bring the outputs of all heads back to the tokens of this rank, in one all-to-all. Differentiable.

        Args:
            output: (B, S, this rank's heads, D), all video tokens first.

        Returns:
            (B, this rank's tokens, H, D), the video's first.
        """
        ranks, parts = self.shards.ranks, self.shards.parts
        batch, _, own, size = output.shape
        video, text = output.split([self.shards.video, self.shards.text], dim=1)
        streams = zip(video.split(self.shards.video_parts, dim=1), text.split(self.shards.text_parts, dim=1))
        sent = _packed([torch.cat(both, dim=1) if self.shards.text else both[0] for both in streams])
        tokens = parts[ranks.index]
        sizes = [batch * tokens * count * size for count in self.counts]
        received = self._exchange(sent, [batch * part * own * size for part in parts], sizes)
        pieces = [piece.view(batch, tokens, count, size) for piece, count in zip(received.split(sizes), self.counts)]
        return _ordered(torch.cat(pieces, dim=2), 2, self._inverse)

    def _exchange(self, sent: torch.Tensor, sent_sizes: list[int], received_sizes: list[int]) -> torch.Tensor:
        received: torch.Tensor = collectives.all_to_all_single_autograd(
            sent, received_sizes, sent_sizes, self.shards.ranks.group
        )
        return received


def _packed(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the numbers of tensors one after the other; where no gradient is wanted, copied once."""
    if torch.is_grad_enabled():
        return torch.cat([part.flatten() for part in parts])
    sizes = [part.numel() for part in parts]
    packed = parts[0].new_empty(sum(sizes))
    for piece, part in zip(packed.split(sizes), parts):
        piece.view(part.shape).copy_(part)
    return packed


def _ordered(tensor: torch.Tensor, dim: int, order: torch.Tensor | None) -> torch.Tensor:
    return tensor if order is None else tensor.index_select(dim, order)


class CutKeys:
    """Attention of queries that every rank has to keys and values that are cut; see `CutKeyAttention`."""

    def __init__(self, shards: Callable[[], TokenShards | None]) -> None:
        """Take what answers with the split of the pass that runs."""
        self._shards = shards

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attend: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
    ) -> torch.Tensor:
        """Attend, every rank for its heads.

        Raises:
            ValueError: in training.
        """
        shards = self._shards()
        assert shards is not None
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, key, value)):
            raise ValueError("This model cannot be trained while it is split: a part of it is whole on every GPU.")
        share = HeadShare.equal(shards, query.shape[2], query.device)
        query = query.index_select(2, share.heads)
        key, value = share.to_heads(key, value)
        output = attend(query, key, value) if len(share.heads) else query
        return share.gather_heads(output.transpose(1, 2)).transpose(1, 2)


class SplitHooks:
    """Hooks on a transformer's modules that cut and put together what a family's plan says."""

    def __init__(self, transformer: nn.Module, plan: SequenceSplit, shards: Callable[[], TokenShards | None]) -> None:
        """Put the hooks in place.

        Args:
            transformer: the transformer.
            plan: its family's plan.
            shards: answers with the split of the pass that runs; None outside of one.
        """
        self._shards = shards
        self._root: SplitModule | None = None
        self._handles: list[Any] = []
        for split in plan.modules:
            if not split.name:
                self._root = split
                continue
            for module in modules_of_name(transformer, split.name):
                self._hook(module, split)

    def split_inputs(self, inputs: Inputs) -> Inputs:
        """Return the transformer's own inputs as this rank has them."""
        shards = self._shards()
        return inputs if self._root is None or shards is None else _cut_inputs(self._root, inputs, shards)

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()

    def _hook(self, module: nn.Module, split: SplitModule) -> None:
        parameters = tuple(inspect.signature(type(module).forward).parameters)[1:]

        def cut_inputs(module: nn.Module, args: tuple[Any, ...], kwargs: Inputs) -> Any:
            shards = self._shards()
            if shards is None:
                return args, kwargs
            named = _cut_inputs(split, {**dict(zip(parameters, args)), **kwargs}, shards)
            by_place = tuple(named[name] for name in parameters[: len(args)])
            return (*by_place, *args[len(parameters) :]), {name: named[name] for name in kwargs}

        def change_output(module: nn.Module, args: Any, output: Any) -> Any:
            shards = self._shards()
            if shards is None:
                return output
            if split.cut_output is not None:
                return shards.cut(output, split.cut_output)
            assert split.gathered_output is not None
            return shards.gather(output, split.gathered_output)

        if split.inputs:
            self._handles.append(module.register_forward_pre_hook(cut_inputs, with_kwargs=True))
        if split.cut_output is not None or split.gathered_output is not None:
            self._handles.append(module.register_forward_hook(change_output))


def _cut_inputs(split: SplitModule, inputs: Inputs, shards: TokenShards) -> Inputs:
    changed = {}
    for name, how in split.inputs.items():
        if inputs.get(name) is not None:
            changed[name] = how(inputs[name], shards) if callable(how) else shards.cut(inputs[name], how)
    return {**inputs, **changed}


def modules_of_name(transformer: nn.Module, name: str) -> list[Any]:
    """Return the modules of a name in which `*` stands for any number."""
    before, star, after = name.partition(".*")
    if not star:
        return [transformer.get_submodule(name)]
    return [module.get_submodule(after[1:]) for module in transformer.get_submodule(before).children()]
