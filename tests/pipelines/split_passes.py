"""Run by several processes at once: forward passes that each computes alone, and then its part of.

Takes a file of cases and writes a JSON beside it with what rank 0 has.
"""

import contextlib
import copy
import json
import sys
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig
from ranks import join_ranks, leave_ranks

from blade import apply_blade, blade_summary, remove_blade
from blade.attention.applied import applied_to
from blade.attention.sequence_parallel import HeadShare, Ranks, TokenShards


def sent_bytes():
    """Bytes that this process has written so far, to sockets too."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text(encoding="utf-8").splitlines())
    return int(fields["wchar"])


def forward(transformer, inputs):
    output = transformer(**inputs, return_dict=False)
    return [tensor for tensor in output if tensor is not None]


def gradients(transformer, inputs):
    """Gradients of every parameter, of the same loss on every rank."""
    transformer.zero_grad(set_to_none=True)
    sum(output.square().mean() for output in forward(transformer, inputs)).backward()
    return {name: parameter.grad for name, parameter in transformer.named_parameters() if parameter.grad is not None}


def relative_error(found, expected):
    return max(float((one - other).abs().max() / other.abs().max()) for one, other in zip(found, expected))


def run_case(case, degree):
    transformer, inputs, config = case["transformer"], case["inputs"], case["config"]
    result = {}
    if case["checkpointing"]:
        transformer.train().enable_gradient_checkpointing()
    apply_blade(transformer, config)
    trained = case["gradients"]
    with contextlib.nullcontext() if trained else torch.no_grad():
        alone = gradients(transformer, inputs) if trained else forward(transformer, inputs)
        result["density_alone"] = blade_summary(transformer).run_density
        remove_blade(transformer)
        apply_blade(transformer, config)
        transformer.enable_parallelism(config=ContextParallelConfig(ulysses_degree=degree, ulysses_anything=True))
        if not trained:
            forward(transformer, inputs)  # so that the plan is there, and the processes are connected
            before = sent_bytes()
            split = forward(transformer, inputs)
            result["bytes"] = sent_bytes() - before  # rank 0's, headers of gloo's messages included
        else:
            split = gradients(transformer, inputs)
            for gradient in split.values():
                dist.all_reduce(gradient)
            assert split.keys() == alone.keys()
            split, alone = ([named[name] for name in sorted(alone)] for named in (split, alone))
    applied = applied_to(transformer)
    shares = applied.state.shares
    result["heads"] = [list(map(len, share.deal)) for share in shares]
    result["tokens"] = [list(shares[0].shards.video_parts), list(shares[0].shards.text_parts)]
    result["error"] = relative_error(split, alone)
    result["density_split"] = blade_summary(transformer).run_density
    return result


@torch.no_grad()
def run_other_ways(case, degree):
    """Errors where parallelism is enabled before BLADE is applied, and of Diffusers' own after it is removed."""
    inputs, config = case["inputs"], case["config"]
    make = partial(copy.deepcopy, case["transformer"])
    parallel = {"config": ContextParallelConfig(ulysses_degree=degree)}
    if case["own_plan"] is None:
        parallel["cp_plan"] = {}
    plain, transformer = forward(make(), inputs), make()
    alone = forward(apply_blade(transformer, config), inputs)
    remove_blade(transformer)
    transformer.enable_parallelism(**parallel)
    hooks = sorted(name for module in transformer.modules() for name in hook_names(module))
    apply_blade(transformer, config)
    errors = {"enabled before": relative_error(forward(transformer, inputs), alone)}
    remove_blade(transformer)
    assert sorted(name for module in transformer.modules() for name in hook_names(module)) == hooks
    errors["removed"] = relative_error(forward(transformer, inputs), plain)
    transformer = make()
    apply_blade(transformer, config)
    transformer.enable_parallelism(config=ContextParallelConfig(ulysses_degree=degree))
    errors["enabled after"] = relative_error(forward(transformer, inputs), alone)
    remove_blade(transformer)
    assert sorted(name for module in transformer.modules() for name in hook_names(module)) == hooks
    errors["removed again"] = relative_error(forward(transformer, inputs), plain)
    return errors


def run_exchange(case, degree):
    """Largest difference on any rank after each exchange, of heads that are dealt out in no order."""
    shards = TokenShards(Ranks(dist.group.WORLD, dist.get_rank(), degree), 7, 5)
    shuffled = (3, 0, 4, 1, 2)
    share = HeadShare(shards, tuple(shuffled[rank::degree] for rank in range(degree)), torch.device("cpu"))
    whole = torch.randn(2, 12, 5, 3, generator=torch.Generator().manual_seed(0))
    video, text = whole.split([shards.video, shards.text], dim=1)
    tokens = torch.cat((shards.cut(video, 1), shards.cut(text, 1)), dim=1)
    (heads,) = share.to_heads(tokens)
    differences = {
        "to heads": heads - whole.index_select(2, share.heads),
        "to tokens": share.to_tokens(heads) - tokens,
        "gathered heads": share.gather_heads(heads.transpose(1, 2)) - whole.transpose(1, 2),
        "gathered tokens": shards.gather(shards.cut(video, 1), 1) - video,
    }
    largest = torch.stack([difference.abs().max() for difference in differences.values()])
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return dict(zip(differences, largest.tolist()))


def hook_names(module):
    registry = vars(module).get("_diffusers_hook")
    return () if registry is None else tuple(registry.hooks)


def main(path):
    rank, count = join_ranks()
    results = {}
    for case in torch.load(path, weights_only=False):
        run = {"other ways": run_other_ways, "exchange": run_exchange}.get(case["name"].partition("/")[0], run_case)
        results[case["name"]] = run(case, count)
    if rank == 0:
        path.with_suffix(".json").write_text(json.dumps(results), encoding="utf-8")
    dist.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    leave_ranks()
