"""One case of `compare_revisions.py`, run inside one worktree: python compare_revisions_work.py CASE RESULTS WORKTREE.

The modules of the package move between the revisions that are compared. Only what stays is used here: the `main` of
each command, the names of `import blade`, the files that commands write, and Diffusers' own classes.
"""

from __future__ import annotations

import importlib
import json
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import av
import diffusers
import numpy as np
import torch
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from safetensors.torch import load_file

Arrays = dict[str, np.ndarray]
"""Results of a case, by name."""

PROMPTS = ("a red ball moving right", "a small striped green square moving up over a checkered background")

ASA_DETAILS = {"block_size": 16, "probe_tokens": 8, "pooled_window": 8}
"""The `asa` part of written configurations. Values have the spelling of older files, which still loads."""

DROPPED = {"attention": "asa", "pooled_tokens": "dropped", "sparsity": 0.6, "asa": ASA_DETAILS}

SMALL = ("--height", "64", "--width", "64", "--frames", "13")
"""Size of the profiled videos."""

NOT_COMPARED = ("seconds", "memory")
"""Parts of the names of figures that differ from run to run."""


def generate() -> Arrays:
    """Latents and frames of two prompts: the bundled students, and the bundled model with each sparse method."""
    config = write_json("dropped-config/blade_config.json", {**DROPPED, "dense_steps": 0.2, "dense_layers": [0]})
    teacher = ("--student", "none", "--steps", "6", "--frames", "17")
    runs = {
        "student of 4 steps": ("--student", "shapes-4-steps"),
        "student of 8 steps": ("--student", "shapes-8-steps", "--frames", "17"),
        "asa": (*teacher, "--attention", "asa"),
        "asa-gt": (*teacher, "--attention", "asa-gt"),
        "dropped": (*teacher, "--config", str(config.parent)),
    }
    arrays: Arrays = {}
    for name, options in runs.items():
        arrays |= generated(name, options)
    return arrays


def profile() -> Arrays:
    """A table of head patterns, what was measured for it, and the videos that are generated with it."""
    prompts = write_text("one-prompt.txt", PROMPTS[0])
    budget = ("--steps", "6", "--target-density", "0.4", "--sampled-blocks", "4")
    run_command(
        "profile", *budget, *SMALL, "--prompts", prompts, "--influence-prompts", 1, "--verify-prompts", 0,
        "--output", "profile",
    )  # fmt: skip
    folder = Path("profile")
    table = read_json(folder / "pattern_table.json")
    patterns = np.array([json.dumps(pattern, sort_keys=True) for pattern in table["patterns"]])
    arrays = {
        "table/heads": patterns[np.array(table["assignment"])],
        "table/token order": np.array(table["token-order"]),
        **figures({name: table[name] for name in ("block-size", "steps", "group-starts", "grid")}, "table"),
        **figures(read_json(folder / "asa" / "blade_config.json")["sparsity"], "asa/sparsity"),
        **tensors(folder / "attention_profile.safetensors", "measured"),
    }
    return arrays | generated("patterns", ("--student", "none", "--steps", "6", *SMALL, "--config", "profile"))


def evaluate() -> Arrays:
    """The figures of an evaluation's report: dense, the preset, and a student."""
    run_command(
        "evaluate", "--shapes", "--single", 2, "--two", 0, "--repeats", 2, "--frames", 9, "--steps", 4,
        "--guidance", 1, "--run", "dense", "--run", "preset", "--run", "few=student=shapes-4-steps",
        "--output", "evaluation",
    )  # fmt: skip
    runs = read_json(Path("evaluation/report.json"))["runs"]
    return figures({run["name"]: {part: run[part] for part in ("groups", "by-frame", "differences")} for run in runs})


def distill() -> Arrays:
    """The student and the losses of ten updates: four of ODE initialization, six of distribution matching."""
    prompts = write_text("prompts.txt", *PROMPTS)
    run_command(
        "distill", "shapes", "output=student", f"prompts={prompts}", "video.height=64", "video.width=64",
        "video.frames=9", "weights.saved_as=float32", "generator.ode_updates=4", "generator.trajectories=4",
        "attention.warmup_updates=3", "run.updates=10", "run.batch_size=2", "run.precision=fp32",
        "validation.every=0",
    )  # fmt: skip
    (weights,), (log,) = (list(Path("student").glob(f"*.{suffix}")) for suffix in ("safetensors", "jsonl"))
    return figures(read_json_lines(log), "log") | tensors(weights, "student")


def families() -> Arrays:
    """Outputs and gradients of a small random transformer of every family, with every method."""
    import blade

    patterns = {"attention": "patterns", "patterns": "pattern_table.json", "asa": ASA_DETAILS}
    methods: dict[str, dict[str, Any]] = {
        "dense": {"attention": "dense"},
        "asa": {"attention": "asa", "asa": ASA_DETAILS},
        "asa-gt": {"attention": "asa-gt", "asa": {**ASA_DETAILS, "token_order": "token_major"}},
        "dropped": {**DROPPED, "dense_steps": 1, "dense_layers": [0]},
        "patterns": {**patterns, "sparsity": 0.5},
    }
    arrays: Arrays = {}
    for method, config in methods.items():
        file = write_json(f"{method}/blade_config.json", config)
        if method == "patterns":
            write_json(f"{method}/pattern_table.json", PATTERN_TABLE)
        for family in FAMILIES:
            transformer, inputs = make_family(family)
            blade.apply_blade(transformer, blade.BladeConfig.from_pretrained(file.parent))
            arrays |= passes(transformer, inputs, f"{family}/{method}")
    return arrays


CASES: dict[str, Callable[[], Arrays]] = {
    function.__name__: function for function in (generate, profile, evaluate, distill, families)
}

FRAMES, HEIGHT, WIDTH = 4, 6, 7
"""Tokens of the small transformers' videos: ten and a half blocks."""

BATCH, TEXT_TOKENS = 2, 6

HEADS = {"num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4}
WAN = {"patch_size": (1, 2, 2), "text_dim": 8, "freq_dim": 16, "ffn_dim": 24, "rope_max_seq_len": 32}
HUNYUAN_VIDEO = {"num_refiner_layers": 1, "text_embed_dim": 8, "rope_axes_dim": (4, 6, 6)}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "wan": ("WanTransformer3DModel", {**WAN, "num_layers": 3}),
    "wan-vace": ("WanVACETransformer3DModel", {**WAN, "num_layers": 2, "vace_layers": [0], "vace_in_channels": 6}),
    "cogvideox": (
        "CogVideoXTransformer3DModel",
        {
            "num_layers": 3,
            "time_embed_dim": 8,
            "text_embed_dim": 8,
            "max_text_seq_length": TEXT_TOKENS,
            "use_rotary_positional_embeddings": True,
        },
    ),
    "hunyuan-video": (
        "HunyuanVideoTransformer3DModel",
        {
            **HUNYUAN_VIDEO,
            "num_layers": 1,
            "num_single_layers": 2,
            "guidance_embeds": False,
            "pooled_projection_dim": 8,
        },
    ),
    "hunyuan-video-1.5": (
        "HunyuanVideo15Transformer3DModel",
        {**HUNYUAN_VIDEO, "num_layers": 3, "patch_size": 2, "text_embed_2_dim": 8, "image_embed_dim": 8},
    ),
    "ltx-video": ("LTXVideoTransformer3DModel", {"num_layers": 3, "cross_attention_dim": 32, "caption_channels": 8}),
}
"""Diffusers' class and the small configuration of every family: three layers of two heads that BLADE makes sparse."""

PATTERN_TABLE = {
    "format": 1,
    "block_size": 16,
    "token_order": "raster",
    "group_starts": [0],
    "patterns": [
        {"kind": "full"},
        {"kind": "diagonal", "frames": 0.6},
        {"kind": "multi_diagonal", "frames": 0.6, "order": "token_major"},
        {"kind": "vertical", "share": 0.4},
        {"kind": "window", "windows": {"frame": {"width": 2}, "place": {"width": 3, "stride": 7}}},
        {"kind": "asa"},
        {"kind": "skip"},
    ],
    "assignment": [[[0, 1], [2, 3], [4, 5]]],
}


def make_family(family: str) -> tuple[Any, dict[str, Any]]:
    """Return a random transformer of a family, whose attention is peaked, and the inputs of a forward pass."""
    name, config = FAMILIES[family]
    torch.manual_seed(0)
    transformer = getattr(diffusers, name)(**HEADS, **config).eval()
    with torch.no_grad():
        for parameter_name, parameter in transformer.named_parameters():
            if parameter_name.endswith(("norm_q.weight", "norm_k.weight")):
                parameter.mul_(3.0)
    latent = (4, FRAMES, 2 * HEIGHT, 2 * WIDTH)
    inputs: dict[str, Any] = {
        "hidden_states": torch.randn(BATCH, *latent),
        "encoder_hidden_states": torch.randn(BATCH, TEXT_TOKENS, 8),
    }
    mask = torch.ones(BATCH, TEXT_TOKENS, dtype=torch.int64)
    if family == "wan-vace":
        inputs["control_hidden_states"] = torch.randn(BATCH, 6, *latent[1:])
    elif family == "cogvideox":
        inputs["hidden_states"] = inputs["hidden_states"].transpose(1, 2).contiguous()
        size = (HEIGHT, WIDTH)
        inputs["image_rotary_emb"] = get_3d_rotary_pos_embed(16, ((0, 0), size), size, FRAMES)
    elif family == "ltx-video":
        inputs["hidden_states"] = torch.randn(BATCH, FRAMES * HEIGHT * WIDTH, 4)
        inputs |= {"num_frames": FRAMES, "height": HEIGHT, "width": WIDTH, "rope_interpolation_scale": (0.32, 32, 32)}
        inputs["encoder_attention_mask"] = mask.float()
    elif family.startswith("hunyuan-video"):
        mask[0, 4:] = 0  # the first text ends before its padding
        inputs["encoder_attention_mask"] = mask
        if family == "hunyuan-video":
            inputs["pooled_projections"] = torch.randn(BATCH, 8)
        else:
            inputs["encoder_hidden_states_2"] = torch.randn(BATCH, 3, 8)
            inputs["encoder_attention_mask_2"] = torch.tensor([[1, 1, 1], [1, 0, 0]])
            inputs["image_embeds"] = torch.randn(BATCH, 2, 8)
    return transformer, inputs


def passes(transformer: Any, inputs: dict[str, Any], name: str) -> Arrays:
    """Return the outputs of two denoising steps, and the gradients of a third."""
    arrays: Arrays = {}
    for step, time in enumerate((900.0, 600.0)):
        with torch.no_grad():
            output = transformer(**inputs, timestep=torch.full((BATCH,), time), return_dict=False)[0]
        arrays[f"{name}/step {step}"] = output.numpy()
    latent = inputs["hidden_states"].clone().requires_grad_()
    timestep = torch.full((BATCH,), 300.0)
    output = transformer(**{**inputs, "hidden_states": latent}, timestep=timestep, return_dict=False)[0]
    output.square().mean().backward()
    gradients = [parameter.grad.flatten() for parameter in transformer.parameters() if parameter.grad is not None]
    assert latent.grad is not None
    return arrays | {
        f"{name}/gradient of the latent": latent.grad.numpy(),
        f"{name}/gradients of the weights": torch.cat(gradients).numpy(),
    }


def generated(name: str, options: Sequence[str]) -> Arrays:
    """Generate a video of each prompt; return latents and frames before they are encoded, the MP4 and densities."""
    prompts = write_text("prompts.txt", *PROMPTS)
    folder = Path(name.replace(" ", "-"))
    with recorded_decodings() as decodings:
        run_command("generate", "--prompts", prompts, "--output", folder, *options)
    records = sorted(folder.glob("*.json"))
    assert len(decodings) == len(records) == len(PROMPTS), f"{len(decodings)} decodings, {len(records)} records"
    arrays: Arrays = {}
    for number, (latents, frames) in enumerate(decodings):
        arrays |= {f"{name}/decoding {number}/latents": latents, f"{name}/decoding {number}/frames": frames}
    for path in records:
        record, prompt = read_json(path), f"{name}/{path.stem}"
        arrays |= figures({key: record[key] for key in ("layer-density", "run-density", "score")}, prompt)
        with av.open(str(path.with_suffix(".mp4"))) as container:
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        arrays[f"{prompt}/mp4"] = np.stack(frames)
    return arrays


@contextmanager
def recorded_decodings() -> Iterator[list[tuple[np.ndarray, np.ndarray]]]:
    """Yield a list that receives the latents and the frames of everything that a Wan VAE decodes."""
    decodings: list[tuple[np.ndarray, np.ndarray]] = []
    decode = diffusers.AutoencoderKLWan.decode

    def recording(vae: Any, z: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        decoded = decode(vae, z, *arguments, **options)
        decodings.append((z.detach().numpy().copy(), decoded[0].detach().numpy().copy()))
        return decoded

    diffusers.AutoencoderKLWan.decode = recording
    try:
        yield decodings
    finally:
        diffusers.AutoencoderKLWan.decode = decode


def run_command(name: str, *arguments: object) -> None:
    """Run a command of the worktree, such as `blade-generate`, in this process.

    Raises:
        RuntimeError: if it fails; it has said why on stderr.
    """
    words = [str(argument) for argument in arguments]
    try:
        importlib.import_module(f"blade.cli.{name}").main(words)
    except SystemExit as ended:
        if ended.code:
            raise RuntimeError(f"blade-{name} {shlex.join(words)} ended with {ended.code}") from ended


def figures(values: Any, name: str = "") -> Arrays:
    """Return the numbers of JSON values by their path, in float64, without those of `NOT_COMPARED`."""
    if isinstance(values, bool | int | float):
        return {name: np.array(float(values))}
    arrays: Arrays = {}
    if isinstance(values, Mapping | list):
        items = values.items() if isinstance(values, Mapping) else enumerate(values)
        for key, value in items:
            if not any(part in str(key) for part in NOT_COMPARED):
                arrays |= figures(value, f"{name}/{key}" if name else str(key))
    return arrays


def tensors(path: Path, name: str) -> Arrays:
    """Return the tensors of a safetensors file."""
    return {f"{name}/{key}": tensor.numpy() for key, tensor in load_file(path).items()}


def read_json(path: Path) -> Any:
    """Return JSON with "-" for each "_", as revisions differ in their spelling: `token_major` or `token-major`."""
    return json.loads(path.read_text(encoding="utf-8").replace("_", "-"))


def read_json_lines(path: Path) -> list[Any]:
    """Return a JSON value for each line, spelled as by `read_json`."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").replace("_", "-").splitlines()]


def write_text(path: str, *lines: str) -> Path:
    """Write lines to a file."""
    Path(path).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return Path(path)


def write_json(path: str, values: Mapping[str, Any]) -> Path:
    """Write JSON to a file, whose folder is made if missing."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    return write_text(path, json.dumps(values, indent=2))


def main(case: str, results: str, worktree: str) -> None:
    """Run a case in the present folder.

    Args:
        case: a name of `CASES`.
        results: the .npz that receives its arrays.
        worktree: the folder that BLADE must come from.
    """
    for package in ("blade", "blade_kernels", "blade_pipelines"):
        origin = Path(str(importlib.import_module(package).__file__)).resolve()
        assert origin.is_relative_to(Path(worktree).resolve()), f"{package} comes from {origin}, not from {worktree}"
    torch.set_num_threads(1)
    torch.set_num_interop_threads(1)
    np.savez(results, **CASES[case]())


if __name__ == "__main__":
    main(*sys.argv[1:])
