"""Diffusers' parallelism that BLADE cannot take over."""

from types import SimpleNamespace

import pytest
import torch
from small_families import FAMILIES, is_missing

from blade import BladeConfig, apply_blade, remove_blade
from blade.attention.config import AdaptiveConfig
from blade.attention.sequence_parallel import Ranks, TokenShards

CONFIG = BladeConfig(asa=AdaptiveConfig(block_size=8, probe_tokens=4, pooled_window=4))


def parallel_config(ring=1, ulysses=2):
    """Diffusers' configuration of context parallelism, as it is on a transformer."""
    mesh = SimpleNamespace(get_group=lambda: None, get_local_rank=lambda: 0)
    context = SimpleNamespace(ring_degree=ring, ulysses_degree=ulysses, _ulysses_mesh=mesh)
    return SimpleNamespace(context_parallel_config=context, tensor_parallel_config=None)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (parallel_config(ring=2), "`ring_degree` must be 1 with BLADE, got 2: a ring shows a rank a part of the keys"),
        (SimpleNamespace(context_parallel_config=None), "got tensor parallelism"),
    ],
)
def test_other_parallelism_is_refused_before_and_after(make_wan, wan_inputs, config, message):
    transformer = make_wan()
    processors = dict(transformer.attn_processors)
    transformer._parallel_config = config
    with pytest.raises(ValueError, match=message):
        apply_blade(transformer, CONFIG)
    assert transformer.attn_processors == processors and "_cp_plan" not in vars(transformer)
    transformer._parallel_config = None
    apply_blade(transformer, CONFIG)
    transformer._parallel_config = config
    with pytest.raises(ValueError, match=message):
        transformer(**wan_inputs())
    transformer._parallel_config = None
    remove_blade(transformer)
    assert transformer.attn_processors == processors and "_cp_plan" not in vars(transformer)


@pytest.mark.parametrize("kind", ["skyreels-v2", "anyflow", "wan-animate", "wan-animate-2", "framepack", "kandinsky5"])
def test_a_model_without_a_plan_is_refused_by_name(kind):
    if is_missing(kind):
        pytest.skip("this Diffusers lacks the class")
    transformer = FAMILIES[kind](kind).make()
    transformer._parallel_config = parallel_config()
    with pytest.raises(ValueError, match=f"a {type(transformer).__name__} cannot be split among GPUs"):
        apply_blade(transformer, CONFIG)


def test_fewer_tokens_than_ranks_are_refused(make_wan, wan_inputs):
    transformer = make_wan()
    transformer._parallel_config = parallel_config(ulysses=8)
    apply_blade(transformer, CONFIG)
    with pytest.raises(ValueError, match="`ulysses_degree` must be at most the number of tokens, 6 here, got 8"):
        transformer(**wan_inputs((1, 2, 3)))


def test_parts_are_those_of_tensor_split():
    ranks = Ranks(None, 2, 4)
    shards = TokenShards(ranks, 10, 3)
    assert shards.video_parts == (3, 3, 2, 2) and shards.text_parts == (1, 1, 1, 0) and shards.parts == (4, 4, 3, 2)
    tokens = torch.arange(10).expand(2, 10)
    assert shards.cut(tokens, 1).tolist() == [[6, 7]] * 2
    assert shards.cut((tokens, None, tokens[:, :1]), 1)[2].shape == (2, 1)  # counts no tokens: whole
    # of the first 7 tokens, 3 and 3 are on the ranks before, and one here
    assert [TokenShards(Ranks(None, index, 4), 10, 0).local_count(7) for index in range(4)] == [3, 3, 1, 0]
