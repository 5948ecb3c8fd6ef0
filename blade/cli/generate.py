"""`blade-generate`: a video from a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from blade.cli.command import run_command

FAILED_EXIT_CODE = 1
"""Where a prompt of a list failed."""


def _option(help: str, *names: str) -> Any:
    return typer.Option(*names, help=help, show_default=False)


def generate(
    *,
    prompt: Annotated[str | None, _option("What the video shows.")] = None,
    negative_prompt: Annotated[str | None, _option("What it should not show.")] = None,
    model: Annotated[
        str | None, _option("A folder in Diffusers format or a Hub id; by default the bundled model of moving shapes.")
    ] = None,
    revision: Annotated[str | None, _option("Branch, tag or commit of a Hub id.")] = None,
    attention: Annotated[
        str | None, _option("dense, asa (adaptive block-sparse, the default) or asa-gt (asa with all pooled tokens).")
    ] = None,
    config: Annotated[
        str | None, _option("A folder or Hub id with a blade_config.json; by default the model's preset.")
    ] = None,
    sparsity: Annotated[
        float | None, _option("Share of query-key pairs that sparse layers leave out, in [0, 1).")
    ] = None,
    dense_steps: Annotated[
        float | None, _option("Steps from the start that stay dense: a count, or a fraction below 1.")
    ] = None,
    dense_layers: Annotated[str | None, _option('Layers that stay dense, such as "0-1,39".')] = None,
    steps: Annotated[int | None, _option("Denoising steps.")] = None,
    guidance_scale: Annotated[float | None, _option("Weight of classifier-free guidance; at most 1: none.")] = None,
    height: Annotated[int | None, _option("Pixels.")] = None,
    width: Annotated[int | None, _option("Pixels.")] = None,
    frames: Annotated[int | None, _option("Number of frames.")] = None,
    fps: Annotated[int | None, _option("Frames a second.")] = None,
    seed: Annotated[int | None, _option("Seed of the noise; by default 0.")] = None,
    device: Annotated[str | None, _option("cpu, cuda, cuda:1, ...; by default CUDA if there is one.")] = None,
    dtype: Annotated[
        str | None, _option("float32, bfloat16 or float16; by default bfloat16 on CUDA and float32 elsewhere.")
    ] = None,
    student: Annotated[
        str | None,
        _option(
            "A few-step student: a folder or Hub id, such as GYP666/VIDEO-BLADE. Of the bundled model "
            "shapes-4-steps (the default) or shapes-8-steps; none: the model itself."
        ),
    ] = None,
    student_weight: Annotated[float | None, _option("Strength of the student's LoRA; by default 1.")] = None,
    scheduler: Annotated[
        str | None, _option("Times that the student was trained at, such as 999,856,665,399, if it brings none.")
    ] = None,
    noise_kept: Annotated[
        float | None, _option("Share of the noise that the student's steps keep, 0 to 1; by default its own.")
    ] = None,
    image: Annotated[str | None, _option("The first frame: an image file or its address.")] = None,
    last_image: Annotated[str | None, _option("The last frame, beside --image.")] = None,
    video: Annotated[str | None, _option("A video to change.")] = None,
    strength: Annotated[float | None, _option("How far --video is changed, above 0 and at most 1.")] = None,
    guidance_scale_2: Annotated[float | None, _option("--guidance-scale of a second transformer.")] = None,
    flow_shift: Annotated[float | None, _option("Shift of a flow-matching scheduler toward high noise.")] = None,
    lora: Annotated[
        list[str] | None, _option("A LoRA: folder, file or Hub id, with =STRENGTH or without; repeatable.")
    ] = None,
    offload: Annotated[
        str | None, _option("Where weights wait: none, model, sequential, group, or auto for the fastest that fits.")
    ] = None,
    vae_tiling: Annotated[bool, _option("Decode in tiles, which takes less memory.", "--vae-tiling")] = False,
    quantize: Annotated[str | None, _option("Store the transformer's weights as int8 or fp8 (torchao).")] = None,
    compile: Annotated[bool, _option("Compile the transformer's blocks and the decoder.", "--compile")] = False,
    cache: Annotated[
        str | None, _option("One of Diffusers' caches: first-block or pyramid, with =NUMBER or without.")
    ] = None,
    prompts: Annotated[
        Path | None,
        _option("A text file, one prompt a line; --output is then a folder. Videos that exist are skipped."),
    ] = None,
    output: Annotated[
        Path | None, _option("The MP4; a JSON goes beside it. By default outputs/PROMPT-SEED.mp4.")
    ] = None,
    compare: Annotated[
        bool,
        _option("Also generate with dense attention, and write both side by side with PSNR and SSIM.", "--compare"),
    ] = False,
    from_json: Annotated[
        Path | None, _option("Make the video of this JSON again; options given beside it change it.")
    ] = None,
    dry_run: Annotated[
        bool,
        _option("Make nothing: print tokens, operations and memory, from configuration files alone.", "--dry-run"),
    ] = False,
    debug: Annotated[bool, _option("Show the traceback of an error.", "--debug")] = False,
) -> None:
    """Generate a video from a prompt with adaptive block-sparse attention."""
    options: dict[str, Any] = {
        "prompt": prompt,
        "negative_prompt": negative_prompt,
        "model": model,
        "revision": revision,
        "attention": attention,
        "config": config,
        "sparsity": sparsity,
        "dense_steps": dense_steps,
        "dense_layers": dense_layers,
        "steps": steps,
        "guidance_scale": guidance_scale,
        "height": height,
        "width": width,
        "frames": frames,
        "fps": fps,
        "seed": seed,
        "device": device,
        "dtype": dtype,
        "student": student,
        "student_weight": student_weight,
        "scheduler": scheduler,
        "noise_kept": noise_kept,
        "image": image,
        "last_image": last_image,
        "video": video,
        "strength": strength,
        "guidance_scale_2": guidance_scale_2,
        "flow_shift": flow_shift,
        "loras": lora or None,
        "offload": offload,
        "vae_tiling": vae_tiling or None,
        "quantize": quantize,
        "compile": compile or None,
        "cache": cache,
    }
    # imported here, so that --help and usage errors don't wait for PyTorch
    import diffusers
    import transformers

    from blade.generation.outputs import OUTPUT_FOLDER, generate_files, generate_list
    from blade.generation.prompts import read_prompts
    from blade.generation.record import read_request
    from blade.generation.request import NO_STUDENT, GenerationRequest, default_student
    from blade.models.source import BUNDLED

    given = {name: value for name, value in options.items() if value is not None}
    listed = [] if prompts is None else read_prompts(prompts)
    if prompts is not None:
        for name, value in (("prompt", prompt), ("from-json", from_json), ("dry-run", dry_run or None)):
            if value is not None:
                raise ValueError(f"`--{name}` must not be given with `--prompts`.")
        given["prompt"] = listed[0]
    if from_json is None and "prompt" not in given:
        raise ValueError('`--prompt` must be given, such as --prompt "a red ball moving right".')
    if student == NO_STUDENT:
        given["student"] = None
    elif student is None and from_json is None:
        given["student"] = default_student(given)
    request = GenerationRequest(**given) if from_json is None else read_request(from_json, given)
    if dry_run:
        from blade.generation.plan import plan_run

        print(plan_run(request))
        return
    if request.model == BUNDLED:
        # loaded in a moment, so that progress bars would only hide what follows
        diffusers.utils.logging.disable_progress_bar()
        transformers.utils.logging.disable_progress_bar()
    if prompts is not None:
        report = generate_list(request, listed, OUTPUT_FOLDER if output is None else output, compare=compare)
        print(report)
        if report.failed:
            raise typer.Exit(FAILED_EXIT_CODE)
        return
    print(generate_files(request, output, compare=compare))


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run `blade-generate` and exit.

    Args:
        arguments: the command line without the program's name; None takes the process's own.
    """
    run_command(generate, arguments)
