"""Measure the magnitude ratios that MagCache skips by: python scripts/calibrate_mag_cache.py --model FOLDER.

MagCache skips a step where what all blocks add together has hardly changed its magnitude since the step before. How
it changes belongs to a model's weights rather than to the prompt (arXiv 2506.09045). This makes one dense video, and
prints a ratio for every step, as `MagCacheConfig(mag_ratios=...)` and a family's `magnitude_ratios` take them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from statistics import fmean
from typing import Annotated, Any

import torch
import typer
from diffusers.hooks._helpers import TransformerBlockRegistry
from torch import Tensor, nn

from blade.cli.command import run_command
from blade.generation.prepare import prepare_model
from blade.generation.request import GenerationRequest
from blade.generation.run import run_request


@contextmanager
def magnitude_ratios(first: nn.Module, last: nn.Module, passes: int) -> Iterator[list[float]]:
    """Collect the mean ratio of tokens' magnitudes in what the blocks add, from a step to the next one.

    Args:
        first: the first block.
        last: the last block.
        passes: passes of a step, which run one after the other and are told apart.

    Yields:
        A ratio for every pass, 1 in those of the first step.
    """
    metadata = TransformerBlockRegistry.get(type(last))
    begun: list[Tensor] = []
    magnitudes: list[Tensor] = []
    ratios: list[float] = []

    def begin(module: nn.Module, args: Any, kwargs: Any) -> None:
        begun[:] = [metadata._get_parameter_from_args_kwargs(metadata.hidden_states_argument_name, args, kwargs)]

    def end(module: nn.Module, args: Any, output: Any) -> None:
        states = output[metadata.return_hidden_states_index] if isinstance(output, tuple) else output
        magnitudes.append((states - begun[0]).float().norm(dim=-1))
        before = magnitudes[-1 - passes] if len(magnitudes) > passes else None
        ratios.append(1.0 if before is None else float((magnitudes[-1] / before.clamp_min(1e-8)).mean()))

    handles = [first.register_forward_pre_hook(begin, with_kwargs=True), last.register_forward_hook(end)]
    try:
        yield ratios
    finally:
        for handle in handles:
            handle.remove()


def main(
    model: Annotated[str | None, typer.Option(help="A folder or Hub id; by default the bundled model.")] = None,
    prompt: Annotated[str, typer.Option(help="The prompt of the video.")] = "a red ball moving right",
    steps: Annotated[int | None, typer.Option(help="Denoising steps; by default the model's.")] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Print the ratios of a model's transformer, the mean of guidance's passes."""
    given = {"model": model, "steps": steps}
    request = GenerationRequest(
        prompt=prompt, attention="dense", **{name: value for name, value in given.items() if value is not None}
    )
    loaded, resolved = prepare_model(request)
    if len(loaded.transformers) > 1:
        raise ValueError("`model` must have one transformer: of two, each runs a part of the steps.")
    guidance = loaded.family.guidance_takes_two_passes and resolved.guidance_scale > 1
    passes = 2 if guidance and loaded.family.batched_guidance is None else 1
    blocks = loaded.family.blocks(loaded.transformer)
    with torch.no_grad(), magnitude_ratios(blocks[0], blocks[-1], passes) as ratios:
        run_request(loaded, resolved)
    print([round(fmean(ratios[begin : begin + passes]), 4) for begin in range(0, len(ratios), passes)])


if __name__ == "__main__":
    run_command(main)
