"""Bytes and memory of several processes are those of the code that they run, on PyTorch's meta device.

Collective operations are those of a process group without other processes, which brings shapes and no values.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import nn

from blade import BladeConfig, apply_blade
from blade.attention import sequence_parallel
from blade.common.machine import GIB
from blade.generation.parallel_plan import rank_activations_gib
from blade.generation.parallel_traffic import PassShape, Traffic
from blade.models.costs import forward_cost, run_cost
from blade.models.loaded import LoadedModel
from blade.models.loading import load_empty_model
from blade.models.memory_use import peak_bytes
from blade.models.parallel import make_mesh, split_transformer

FAKE = "torch.testing._internal.distributed.fake_pg"

CASES = [
    ("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", (21, 60, 104), 8),
    ("zai-org/CogVideoX-2b", (13, 60, 90), 4),
    ("hunyuanvideo-community/HunyuanVideo", (33, 90, 160), 5),
    ("Lightricks/LTX-Video", (21, 16, 22), 3),
    ("Lightricks/LTX-2", (16, 16, 24), 3),
    ("MiniMaxAI/MiniMax-H3", (37, 48, 84), 3),
]
"""Models, sizes of latents, and numbers of processes, of which few divide heads or tokens."""

BLOCKS = 3
"""Blocks of each kind that are left in a model: others would be the same."""


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes that the first process sends the others in each collective operation, in turn."""
    noted: list[int] = []
    functions = sequence_parallel.collectives
    name = "all_gather_single" if hasattr(functions, "all_gather_single") else "all_gather_tensor"  # before 2.13
    exchange, gather, reduce = functions.all_to_all_single_autograd, getattr(functions, name), dist.all_reduce

    def note_exchange(tensor, received, given, group):
        noted.append(sum(given[1:]) * tensor.element_size())
        return exchange(tensor, received, given, group)

    def note_gather(tensor, dim, group):
        noted.append((dist.get_world_size(group) - 1) * tensor.numel() * tensor.element_size())
        return gather(tensor, dim, group)

    def note_reduce(tensor, group):
        noted.append((dist.get_world_size(group) - 1) * tensor.numel() * tensor.element_size())
        return reduce(tensor, group=group)

    monkeypatch.setattr(functions, "all_to_all_single_autograd", note_exchange)
    monkeypatch.setattr(functions, name, note_gather)
    monkeypatch.setattr(dist, "all_reduce", note_reduce)
    return noted


@pytest.fixture
def join() -> Iterator[object]:
    """Return a function that makes this process the first of several, of which there are no others."""
    fake = pytest.importorskip(FAKE)

    def start(ranks: int) -> None:
        dist.init_process_group("fake", store=fake.FakeStore(), rank=0, world_size=ranks)

    yield start
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize(("name", "latent", "ranks"), CASES, ids=[name for name, *_ in CASES])
def test_bytes_and_memory_are_those_of_the_code(name, latent, ranks, sent, join) -> None:
    model: LoadedModel = load_empty_model(name, dtype=torch.bfloat16)
    transformer, family = model.transformer, model.family
    for kind, blocks in list(transformer.named_children()):
        if isinstance(blocks, nn.ModuleList):
            setattr(transformer, kind, blocks[:BLOCKS])
    forward = forward_cost(transformer, latent)
    shape = PassShape.of(model, latent, forward, steps=1, skipped_steps=0, batches=(1,))
    traffic = Traffic.of(run_cost(forward, 1, guidance=False), None, shape, ranks)
    inputs = family.example_inputs(transformer, latent)

    def run() -> None:
        with family.without_values():
            transformer(**inputs)

    whole = peak_bytes(run) / GIB
    join(ranks)
    apply_blade(transformer, BladeConfig(attention="dense"))
    split_transformer(transformer, make_mesh(torch.device("cpu"), ranks))
    own = peak_bytes(run) / GIB
    assert sum(sent) == traffic.sent()[0]
    assert len(sent) - len(traffic.largest.collectives()) == name.startswith("MiniMax")  # which gathers sound apart
    predicted = rank_activations_gib(whole, traffic.largest, shape)
    assert 0.9 < predicted / own < 1.15  # 0.95 to 1.12 was seen
