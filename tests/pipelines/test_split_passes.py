"""One video on several ranks: every family's forward pass, split by Diffusers' context parallelism, is what it was."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from ranks import run_ranks
from small_families import FAMILIES, is_missing
from small_wan import make_wan, wan_inputs

from blade import BladeConfig
from blade.attention.config import AdaptiveConfig
from blade.attention.pattern_table import uniform_table
from blade.attention.patterns import HeadPattern, Window
from blade.families.registry import find_family
from blade.models.communication import SplitPass

SCRIPT = Path(__file__).parent / "split_passes.py"
GRID = (3, 5, 7)  # 105 tokens: no multiple of 2 or 4
ASA = AdaptiveConfig(block_size=8, probe_tokens=4, pooled_window=4)
LAYER = replace(ASA, budget="layer", token_order="gilbert")
PATTERNS = (
    HeadPattern(kind="full"),
    HeadPattern(kind="skip"),
    HeadPattern(kind="diagonal", frames=0.4),
    HeadPattern(kind="multi-diagonal", frames=0.3, order="token-major"),
    HeadPattern(kind="vertical", share=0.3),
    HeadPattern(kind="asa"),
    HeadPattern(kind="window", windows={"frame": Window(width=1)}, order="bricks(1,2,2)"),
)
CONFIGS = {
    "dense": BladeConfig(attention="dense"),
    "row": BladeConfig(sparsity=0.5, asa=ASA),
    "layer": BladeConfig(sparsity=0.5, asa=LAYER),
    "dropped": BladeConfig(sparsity=0.5, pooled_tokens="dropped", asa=LAYER),
    "all": BladeConfig(sparsity=0.5, pooled_tokens="all", asa=ASA),
    "mean-pooled": BladeConfig(sparsity=0.5, asa=replace(LAYER, selector="mean-pooled", value_weighting=True)),
    "random": BladeConfig(sparsity=0.5, asa=replace(LAYER, selector="random")),
    "local": BladeConfig(sparsity=0.5, asa=replace(LAYER, selector="local")),
    "patterns": None,
}
SELECTORS = ("mean-pooled", "random", "local")
KINDS = [
    "wan", "wan-vace", "chronoedit", "cogvideox", "cogvideox-2b", "cogvideox-1.5", "hunyuan-video",
    "hunyuan-video-i2v", "hunyuan-video-1.5", "ltx-video", "ltx-2", "ltx-2.3", "minimax-h3", "minimax-h3-references",
]  # fmt: skip
MEASURED = ("dense", "row", "layer", "dropped", "all", "patterns")
HEADER_BYTES = 400
"""At most, of the messages that gloo sends another rank in one collective operation."""
OTHER_WAYS = ("wan", "cogvideox", "hunyuan-video", "minimax-h3")


def mixed_patterns(transformer):
    """A table of patterns that differ from head to head and layer to layer."""
    family = find_family(transformer)
    layers = family.attention_layers(transformer)
    table = uniform_table(PATTERNS[0], len(layers), family.heads(layers[0]), block_size=8, token_order="raster")
    drawn = np.random.default_rng(0).integers(1, len(PATTERNS), table.assignment.shape)
    drawn[..., 0, -1] = [pattern.kind for pattern in PATTERNS].index("asa")  # of a head that is not a rank's first
    table = replace(table, patterns=PATTERNS, assignment=drawn.astype(table.assignment.dtype))
    # few of a block's tokens are sampled, so that it matters which
    asa = replace(ASA, probe_tokens=2)
    return BladeConfig(attention="patterns", patterns=table, adapt_patterns=True, asa=asa)


def three_heads():
    """A Wan transformer whose heads do not divide by two, and inputs: timesteps of single tokens, two videos."""
    return make_wan(heads=3), {**wan_inputs(GRID, batch=2), "timestep": torch.linspace(1, 999, 210).view(2, 105)}


def make_case(name, transformer, inputs, config, *, gradients=False, checkpointing=False):
    """One pass that alone and split are compared."""
    config = mixed_patterns(transformer) if config is None else config
    return {
        "name": name,
        "transformer": transformer,
        "inputs": inputs,
        "config": config,
        "gradients": gradients,
        "checkpointing": checkpointing,
    }


def names_of_cases(ranks):
    """Names of the passes of so many ranks; four have those of fewer configurations."""
    configs = [name for name in CONFIGS if ranks == 2 or name in ("dense", "layer", "dropped", "patterns")]
    names = [f"{kind}/{name}" for kind in KINDS for name in configs if kind == "wan" or name not in SELECTORS]
    names.append("exchange/heads in no order")
    kinds = ("three-heads", "gradients", "checkpointed")
    if ranks == 2:
        names += [f"other ways/{kind}" for kind in OTHER_WAYS]
    return names + [f"{kind}/{name}" for kind in kinds for name in ("dense", "layer", "dropped", "patterns")]


def case_of(name):
    """The pass of a name."""
    kind, config = name.split("/")
    if kind == "exchange":
        return {"name": name}
    if kind == "other ways":
        family = FAMILIES[config](config)
        transformer = family.make()
        case = make_case(name, transformer, family.inputs((2, 4, 6)), CONFIGS["layer"])
        return {**case, "own_plan": type(transformer)._cp_plan}
    if kind in FAMILIES:
        family = FAMILIES[kind](kind)
        return make_case(name, family.make(), family.inputs(family.grid(GRID)), CONFIGS[config])
    trained = {"gradients": kind != "three-heads", "checkpointing": kind == "checkpointed"}
    return make_case(name, *three_heads(), CONFIGS[config], **trained)


def planned_bytes(name, result):
    """Bytes that rank 0 sends in a pass by the formula of the documents, and the number of collective operations."""
    (kind, config), (video, text) = name.split("/"), result["tokens"]
    tokens = sum(video) + sum(text)
    scored = config == "layer" or config == "dropped"  # by a budget that all heads of a layer share
    split = SplitPass(
        batch=2 if kind == "three-heads" else 1,
        tokens=tuple(map(sum, zip(video, text))),
        output_tokens=tuple(video),
        heads=tuple(map(tuple, result["heads"])),
        head_dim=16,
        element_size=4,
        out_channels=16,
        score_blocks=-(-tokens // 8) if scored else None,
        scored_layers=tuple(range(len(result["heads"]))) if scored else (),
    )
    return split.sent()[0], len(split.collectives())


def run_cases(ranks, folder):
    """Results of so many ranks, by the name of the pass."""
    names = [name for name in names_of_cases(ranks) if not any(map(is_missing, name.split("/")))]
    torch.save([case_of(name) for name in names], folder / "cases.pt")
    run_ranks(SCRIPT, ranks, folder, folder / "cases.pt")
    results = json.loads((folder / "cases.json").read_text(encoding="utf-8"))
    assert list(results) == names
    return results


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_a_split_pass_equals_one_alone(ranks, tmp_path):
    headers = {}
    for name, result in run_cases(ranks, tmp_path).items():
        if name.startswith(("other ways", "exchange")):
            assert len(result) == 4 and max(result.values()) < 2e-6, (name, result)
            continue
        bound = 2e-5 if name.startswith(("gradients", "checkpointed")) else 2e-6
        assert result["error"] < bound, (name, result)
        assert result["density_split"] == pytest.approx(result["density_alone"], abs=1e-6), name
        assert (result["density_split"] == 1) == name.endswith("dense"), name
        assert sum(result["tokens"][0]) % 2 and len(set(result["tokens"][0])) > 1, name  # unequal parts
        if (
            name.startswith(("wan/", "three-heads/", "hunyuan-video/", "cogvideox/"))
            and name.split("/")[1] in MEASURED
        ):
            planned, collectives = planned_bytes(name, result)
            headers.setdefault(collectives, set()).add(result["bytes"] - planned)
    # what is beside the plan are headers, which depend on the number of messages alone
    assert len(headers) == 2 and all(len(beside) == 1 for beside in headers.values()), headers
    assert all(0 < min(beside) <= HEADER_BYTES * count * (ranks - 1) for count, beside in headers.items()), headers
