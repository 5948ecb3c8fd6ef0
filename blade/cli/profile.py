"""`blade-profile`: a pattern for every attention head, found offline."""

from __future__ import annotations

import functools
import inspect
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from blade.cli.command import progress_line, run_command
from blade.profiling.objectives import OBJECTIVES, Budget


def _option(help: str, *names: str) -> Any:
    return typer.Option(*names, help=help, show_default=False)


def profile(
    *,
    prompts: Annotated[
        Path | None,
        _option("A text file of a few prompts, one a line; by default 8 of the bundled model's own world."),
    ] = None,
    model: Annotated[
        str | None, _option("A folder in Diffusers format or a Hub id; by default the bundled model of moving shapes.")
    ] = None,
    revision: Annotated[str | None, _option("Branch, tag or commit of a Hub id.")] = None,
    student: Annotated[str | None, _option("A few-step student: a folder or Hub id.")] = None,
    lora: Annotated[list[str] | None, _option("A LoRA, with =STRENGTH or without; repeatable.")] = None,
    steps: Annotated[int | None, _option("Denoising steps; the table is for runs of so many.")] = None,
    guidance_scale: Annotated[float | None, _option("Weight of classifier-free guidance; at most 1: none.")] = None,
    height: Annotated[int | None, _option("Pixels.")] = None,
    width: Annotated[int | None, _option("Pixels.")] = None,
    frames: Annotated[int | None, _option("Number of frames.")] = None,
    seed: Annotated[int | None, _option("Seed of the first prompt's noise; by default 0. The others' follow.")] = None,
    method: Annotated[
        str, _option("budgeted (the default: least error for all heads together) or published (each by itself).")
    ] = "budgeted",
    epsilon: Annotated[float, _option("Of the published method without --target-density: its threshold; 1.")] = 1.0,
    lambda_: Annotated[float, _option("Of the published method: its weight of the cost; 0.5.", "--lambda")] = 0.5,
    groups: Annotated[
        int | None, _option("Groups of steps with a pattern each; 1: one for all. By default every step has its own.")
    ] = None,
    own_orders: Annotated[
        bool, _option("Whether heads may have token orders of their own.", "--own-orders/--no-own-orders")
    ] = True,
    sampled_blocks: Annotated[
        int, _option("Query blocks that are looked at in a layer, others every step; 0: all. By default 8.")
    ] = 8,
    costs: Annotated[str, _option("operations, time (on this device), or auto: time on CUDA.")] = "auto",
    influence_prompts: Annotated[
        int, _option("Prompts with which it is measured how much each step and layer matters; by default 1, 0: none.")
    ] = 1,
    verify_prompts: Annotated[
        int, _option("Prompts that are generated with the result and compared with dense attention; by default 1.")
    ] = 1,
    output: Annotated[Path, _option("Folder of the results; what is stopped goes on there.")] = Path(
        "outputs/profile"
    ),
    device: Annotated[str | None, _option("cpu, cuda, cuda:1, ...; by default CUDA if there is one.")] = None,
    dtype: Annotated[str | None, _option("float32, bfloat16 or float16.")] = None,
    offload: Annotated[str | None, _option("Where weights wait: none, model, sequential, group, or auto.")] = None,
    vae_tiling: Annotated[bool, _option("Decode in tiles, which takes less memory.", "--vae-tiling")] = False,
    debug: Annotated[bool, _option("Show the traceback of an error.", "--debug")] = False,
    **budgets: float | None,
) -> None:
    """Find a pattern for every attention head, within exactly one budget, and report what attention looks like."""
    generation = {
        "model": model,
        "revision": revision,
        "student": student,
        "loras": tuple(lora) if lora else None,
        "steps": steps,
        "guidance_scale": guidance_scale,
        "height": height,
        "width": width,
        "frames": frames,
        "seed": seed,
        "device": device,
        "dtype": dtype,
        "offload": offload,
        "vae_tiling": vae_tiling or None,
    }
    # imported here, so that --help and usage errors don't wait for PyTorch
    from accelerate import PartialState

    from blade.models.devices import resolve_device
    from blade.profiling.assignment import GreedyRule
    from blade.profiling.prompts import profile_prompts
    from blade.profiling.report_data import write_attention_report
    from blade.profiling.workflow import ProfileRequest, profile_attention

    given = {name: value for name, value in generation.items() if value is not None}
    by_threshold = method == "published" and not any(value is not None for value in budgets.values())
    request = ProfileRequest.of(
        given,
        prompts=profile_prompts(prompts, model),
        output=output,
        budget=None if by_threshold else Budget(**budgets),
        method=method,
        rule=GreedyRule(weight=lambda_, threshold=epsilon),
        groups=groups,
        own_orders=own_orders,
        sampled_blocks=sampled_blocks or None,
        costs=costs,
        influence_prompts=influence_prompts,
        verify_prompts=verify_prompts,
    )
    state = PartialState(cpu=resolve_device(device).type == "cpu")
    with progress_line() as say:
        if state.num_processes > 1:  # started by `accelerate launch`
            share = (state.process_index + 1, state.num_processes)
            own = request.generation
            if own.device is None and state.device.type == "cuda":
                own = replace(own, device=str(state.device))
            profile_attention(replace(request, generation=own, share=share), on_progress=say)
            state.wait_for_everyone()
            if not state.is_main_process:
                return
        report = profile_attention(request, on_progress=say)
    assert report is not None
    path = write_attention_report(report, command=shlex.join(["blade-profile", *sys.argv[1:]]))
    print(report)
    print(f"report      {path}")


def _with_budgets(command: Callable[..., None]) -> Callable[..., None]:
    """Return the command with an option for every objective in place of its `budgets`."""
    signature = inspect.signature(command, eval_str=True)
    options = [
        inspect.Parameter(
            objective.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=Annotated[float | None, _option(objective.help, objective.option)],
        )
        for objective in OBJECTIVES.values()
    ]
    parameters = list(signature.parameters.values())[:-1]
    place = list(signature.parameters).index("method")

    @functools.wraps(command)
    def with_budgets(**values: Any) -> None:
        command(**values)

    parameters[place:place] = options
    with_budgets.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return with_budgets


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run `blade-profile` and exit.

    Args:
        arguments: the command line without the program's name; None takes the process's own.
    """
    run_command(_with_budgets(profile), arguments)
