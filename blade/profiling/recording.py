"""Looking into a model's attention while it generates, pass by pass, so that what is stopped can go on."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from blade.attention.applied import AppliedBlade, applied_to
from blade.attention.config import BladeConfig
from blade.common.files import replaced_whole
from blade.families.registry import find_family
from blade.profiling.measure import LayerMeasurement
from blade.profiling.recording_plan import Recording, RecordingMethod, RecordingPlan


@dataclass(frozen=True, kw_only=True)
class RecordedPass:
    """One forward pass of the transformer."""

    step: int
    """Of the run, from 0."""
    layers: dict[int, LayerMeasurement]
    """What was measured, by layer."""
    columns: dict[int, Tensor]
    """By layer: (H, blocks), attention weight that key blocks receive."""


@contextmanager
def kept_passes(
    transformer: nn.Module,
    folder: Path,
    look: Callable[[], dict[str, Tensor]] | None = None,
    on_pass: Callable[[int, bool, int | None], None] | None = None,
) -> Iterator[None]:
    """Keep the output of every forward pass of a transformer inside a `with` block in a file.

    A pass whose file is there is not computed again: its output is read, so that a generation that is started anew
    with the same noise comes quickly to where it was stopped.

    Args:
        transformer: the transformer, with what is applied to it in place.
        folder: where the files lie, `pass-00000.safetensors` and so on; made if missing.
        look: called after each pass that was computed; returns what else to keep.
        on_pass: called after every pass with its number, whether it was read, and the `step` that was kept with it.

    Raises:
        OSError: if a file cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    parameters = tuple(inspect.signature(type(transformer).forward).parameters)[1:]
    inner, count = transformer.forward, 0

    def forward(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        inputs = {**dict(zip(parameters, args)), **kwargs}
        number, path = count, folder / f"pass-{count:05d}.safetensors"
        count += 1
        known = path.is_file()
        if known:
            kept = load_file(path)
            output = kept["output"].to(inputs["hidden_states"].device)
            applied = applied_to(transformer)
            if applied is not None:
                applied.steps.resolve(inputs["timestep"])  # which counts, where the scheduler does not
        else:
            result = inner(**inputs)
            output = result[0] if isinstance(result, tuple) else result.sample
            kept = {} if look is None else look()
            with replaced_whole(path) as temporary:
                save_file({"output": output.detach().cpu().contiguous(), **kept}, temporary)
        if on_pass is not None:
            on_pass(number, known, int(kept["step"]) if "step" in kept else None)
        if kwargs.get("return_dict", True):
            from diffusers.models.modeling_outputs import Transformer2DModelOutput

            return Transformer2DModelOutput(sample=output)
        return (output,)

    transformer.forward = forward
    try:
        yield
    finally:
        transformer.forward = inner


@contextmanager
def recorded(
    transformer: nn.Module,
    recording: Recording,
    folder: Path,
    pipe: Any = None,
    on_pass: Callable[[int, bool, int | None], None] | None = None,
) -> Iterator[None]:
    """Measure every forward pass of a transformer inside a `with` block, and keep it. See `kept_passes`.

    Args:
        transformer: of a family that BLADE knows. BLADE is taken off it for the time.
        recording: what is measured.
        folder: where the passes are kept.
        pipe: the pipeline that drives it, for its scheduler.
        on_pass: called after every pass with its number, whether it was read, and the `step` that was kept with it.

    Raises:
        ValueError: if a layer's attention cannot be looked into; says which and why.
    """
    family, before = find_family(transformer), applied_to(transformer)
    method = RecordingMethod(recording, family, transformer)
    if before is not None:
        before.uninstall(transformer)
    try:
        applied = AppliedBlade(transformer, family, BladeConfig(strict=True), pipe, method)
    except ValueError:
        if before is not None:
            before.install(transformer)
        raise
    applied.install(transformer)

    def look() -> dict[str, Tensor]:
        assert method.latest is not None
        return _measured(method.latest)

    try:
        with kept_passes(transformer, folder, look, on_pass):
            yield
    finally:
        applied.uninstall(transformer)
        if before is not None:
            before.install(transformer)


def read_pass(path: Path) -> RecordedPass:
    """Read a pass that `recorded` kept."""
    measurements: dict[int, dict[str, Tensor]] = {}
    columns, step = dict[int, Tensor](), 0
    for name, tensor in load_file(path).items():
        layer, _, what = name.partition(".")
        if name == "step":
            step = int(tensor)
        elif what == "columns":
            columns[int(layer)] = tensor
        elif name != "output":
            measurements.setdefault(int(layer), {})[what] = tensor
    layers = {layer: LayerMeasurement.from_tensors(found) for layer, found in sorted(measurements.items())}
    return RecordedPass(step=step, layers=layers, columns=columns)


def _measured(plan: RecordingPlan) -> dict[str, Tensor]:
    """What was measured in the pass, as it is kept."""
    tensors = {"step": torch.tensor(plan.step)}
    for layer, measured in plan.measurements.items():
        tensors |= {f"{layer}.{name}": tensor.contiguous() for name, tensor in measured.tensors().items()}
        tensors[f"{layer}.columns"] = plan.columns[layer].cpu()
    plan.measurements.clear()
    plan.columns.clear()
    return tensors
