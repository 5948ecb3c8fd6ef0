"""Run by several processes at once: a transformer with what else Diffusers does to it, alone and then split.

Takes the folder of a tiny pipeline and the path of a JSON for what rank 0 has: by case, the relative error of the
split passes, the change by what is tried, or the message of a refusal.
"""

import importlib.util
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from cache_settings import CACHES, STEPS, context, enable_unchecked, run_steps, steps_of
from diffusers import DiffusionPipeline
from diffusers.hooks import apply_group_offloading
from ranks import join_ranks, leave_ranks
from small_families import FAMILIES
from small_wan import make_wan, wan_inputs

from blade import BladeConfig, apply_blade, blade_summary, use_blade
from blade.attention.applied import applied_to
from blade.attention.config import AdaptiveConfig
from blade.families.registry import find_family
from blade.models.acceleration import quantize_blocks
from blade.models.parallel import make_mesh, split_transformer

GRID = (3, 5, 7)  # 105 tokens: no multiple of 2
ASA = AdaptiveConfig(block_size=8, probe_tokens=4, pooled_window=4, budget="layer")
CONFIG = BladeConfig(sparsity=0.5, pooled_tokens="dropped", dense_layers=[0], asa=ASA)
CACHED = BladeConfig(sparsity=0.5, dense_steps=1, asa=ASA)
BY_VALUE = ("first-block", "sea")
CACHED_KINDS = ("wan", "cogvideox", "hunyuan-video")


def relative_error(found, expected):
    return float((found - expected).abs().max() / expected.abs().max())


def is_split(transformer):
    """Whether ranks shared the heads of the latest pass."""
    return len(applied_to(transformer).state.shares) == len(applied_to(transformer).layers)


@torch.no_grad()
def forward(transformer):
    return transformer(**wan_inputs(GRID)).sample


def compare(transformer, mesh, before=None):
    """Error of a split pass, and the relative change against another output."""
    apply_blade(transformer, CONFIG)
    alone = forward(transformer)
    split_transformer(transformer, mesh)
    result = {"error": relative_error(forward(transformer), alone)}
    assert is_split(transformer)
    return result if before is None else {**result, "change": relative_error(alone, before)}


def plain():
    """What the transformer makes with BLADE alone."""
    return forward(apply_blade(make_wan(), CONFIG))


def add_lora(transformer):
    """Load a LoRA of random weights as Diffusers does."""
    generator = torch.Generator().manual_seed(3)
    state = {}
    for name in ("attn1.to_q", "attn1.to_k", "attn1.to_out.0", "attn2.to_v", "ffn.net.2"):
        for block in range(len(transformer.blocks)):
            weight = transformer.get_submodule(f"blocks.{block}.{name}").weight
            for part, shape in (("A", (4, weight.shape[1])), ("B", (weight.shape[0], 4))):
                drawn = torch.randn(shape, generator=generator)
                state[f"blocks.{block}.{name}.lora_{part}.weight"] = 0.2 * drawn
    transformer.load_lora_adapter(state, prefix=None)
    return transformer


def lora(mesh):
    return compare(add_lora(make_wan()), mesh, plain())


def merged_lora(mesh):
    transformer = add_lora(make_wan())
    transformer.fuse_lora()
    transformer.unload_lora()
    return compare(transformer, mesh, plain())


def lora_after(mesh):
    """A LoRA that is loaded when the transformer is split already."""
    transformer = apply_blade(make_wan(), CONFIG)
    split_transformer(transformer, mesh)
    forward(transformer)
    add_lora(transformer)
    alone = forward(apply_blade(add_lora(make_wan()), CONFIG))
    return {"error": relative_error(forward(transformer), alone), "change": relative_error(alone, plain())}


def put_back(mesh):
    """BLADE that another has stood in for while the transformer was split."""
    transformer = apply_blade(make_wan(), CONFIG)
    alone = forward(transformer)
    split_transformer(transformer, mesh)
    forward(transformer)
    with use_blade(transformer, BladeConfig(attention="dense")):
        dense = forward(transformer)
    result = {"error": relative_error(forward(transformer), alone), "change": relative_error(alone, dense)}
    assert is_split(transformer)
    return result


def quantized(mesh, kind):
    transformer = make_wan()
    quantize_blocks(transformer, find_family(transformer), kind)
    return compare(transformer, mesh, plain())


def compiled(mesh):
    """Blocks that are compiled, whose graphs hold the exchanges between ranks."""
    torch._dynamo.reset()
    eager = apply_blade(make_wan(layers=2), CONFIG)
    split_transformer(eager, mesh)
    expected = forward(eager)
    transformer = apply_blade(make_wan(layers=2), CONFIG)
    split_transformer(transformer, mesh)
    transformer.compile_repeated_blocks(backend="aot_eager")
    torch._dynamo.utils.counters.clear()
    result = {"error": relative_error(forward(transformer), expected)}
    result["again"] = relative_error(forward(transformer), expected)
    result["graphs"] = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    return result


def cached(mesh, kind, cache):
    """Four steps with a cache that skips some, and the calls of attention that it has left."""
    family = FAMILIES[kind](kind)
    results, calls = [], []
    for splits in (False, True):
        transformer = enable_unchecked(apply_blade(family.make(), CACHED), cache, True)
        if splits:
            split_transformer(transformer, mesh)
        results.append(run_steps(transformer, steps_of(family)))
        assert is_split(transformer) == splits
        layers = blade_summary(transformer).transformers[0].layers
        calls.append(sum(layer.dense_calls + layer.sparse_calls for layer in layers))
    assert calls[0] == calls[1]
    alone, split = results
    return {"error": relative_error(split, alone), "skipped": calls[0] < STEPS * len(layers)}


def refused(mesh, cache, cache_first):
    """The message of a pass with a cache that decides by what tensors hold."""
    family = FAMILIES["wan"]("wan")
    transformer = apply_blade(family.make(), CACHED)
    steps = steps_of(family)
    if cache_first:
        enable_unchecked(transformer, cache, True)
        split_transformer(transformer, mesh)
    else:
        split_transformer(transformer, mesh)
        transformer(**steps[0])
        enable_unchecked(transformer, cache, True)
    try:
        with context(transformer, "cond", 0):
            transformer(**steps[0])
    except ValueError as error:
        return {"message": str(error)}
    return {}


def cached_by_cache_dit(mesh, folder):
    """The message of a pass with cache-dit."""
    import cache_dit

    pipe = DiffusionPipeline.from_pretrained(folder)
    cache_dit.enable_cache(pipe, cache_config=cache_dit.DBCacheConfig(Fn_compute_blocks=1))
    apply_blade(pipe, CACHED)
    split_transformer(pipe.transformer, mesh)
    try:
        run_pipeline(pipe)
    except ValueError as error:
        return {"message": str(error)}
    return {}


def run_pipeline(pipe):
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    size = {"height": 64, "width": 64, "num_frames": 9, "num_inference_steps": 2}
    return pipe("a red ball moving right", output_type="latent", generator=generator, **size).frames


def offloaded(mesh, folder, kind):
    """A pipeline whose text encoder is offloaded, group by group or whole."""
    pipe = DiffusionPipeline.from_pretrained(folder)
    apply_blade(pipe, CACHED)
    alone = run_pipeline(pipe)
    if kind == "groups":
        device = torch.device("cpu")
        apply_group_offloading(pipe.text_encoder, device, offload_type="leaf_level", offload_device=device)
    else:
        pipe.enable_model_cpu_offload(device="cpu")
    split_transformer(pipe.transformer, mesh)
    result = {"error": relative_error(run_pipeline(pipe), alone)}
    assert is_split(pipe.transformer)
    return result


def cases(mesh, folder):
    """Functions of all cases, by their names."""
    result = {
        "lora": lambda: lora(mesh),
        "merged lora": lambda: merged_lora(mesh),
        "late lora": lambda: lora_after(mesh),
        "put back": lambda: put_back(mesh),
    }
    if importlib.util.find_spec("torchao"):
        for kind in ("int8", "int8-dynamic"):
            result[kind] = lambda kind=kind: quantized(mesh, kind)
    for cache in CACHES:
        if cache in BY_VALUE:
            for first in (True, False):
                result[f"{cache}, first: {first}"] = lambda cache=cache, first=first: refused(mesh, cache, first)
            continue
        for kind in CACHED_KINDS:
            result[f"{cache}/{kind}"] = lambda kind=kind, cache=cache: cached(mesh, kind, cache)
    if importlib.util.find_spec("cache_dit"):
        result["cache-dit"] = lambda: cached_by_cache_dit(mesh, folder)
    for kind in ("groups", "whole"):
        result[f"offloaded {kind}"] = lambda kind=kind: offloaded(mesh, folder, kind)
    result["compiled"] = lambda: compiled(mesh)
    return result


def main(folder, path):
    rank, count = join_ranks()
    mesh = make_mesh(torch.device("cpu"), count)
    results = {name: run() for name, run in cases(mesh, folder).items()}
    if rank == 0:
        path.write_text(json.dumps(results), encoding="utf-8")
    dist.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
    leave_ranks()
