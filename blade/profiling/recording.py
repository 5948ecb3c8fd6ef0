"""Recording of a model's attention while it generates, pass by pass, so that an interrupted run can resume."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from blade.attention.applied import AppliedBlade, applied_to
from blade.attention.config import BladeConfig
from blade.attention.parallelism import ranks_of
from blade.common.errors import first_line
from blade.common.files import replaced_whole
from blade.common.rollback import unchanged_on_error
from blade.common.terminal import logger
from blade.families.registry import find_family
from blade.profiling.measure import LayerMeasurement
from blade.profiling.recording_plan import Recording, RecordingMethod, RecordingPlan


@dataclass(frozen=True, kw_only=True)
class RecordedPass:
    """One forward pass of the transformer."""

    step: int
    """Step of the run, from 0."""
    layers: dict[int, LayerMeasurement]
    """Measurements by layer."""
    columns: dict[int, Tensor]
    """Attention weight that key blocks receive, by layer: (H, blocks)."""


OUTPUT = "output"
"""Name of a pass's output in its file; further ones, such as that of sound, have a digit at its end."""


@contextmanager
def saved_passes(
    transformer: nn.Module,
    folder: Path | None,
    look: Callable[[], dict[str, Tensor]] | None = None,
    on_pass: Callable[[int, bool, int | None], None] | None = None,
) -> Iterator[None]:
    """Save the output of every forward pass of a transformer inside a `with` block to a file.

    A pass whose file exists is read instead of computed, so that an interrupted generation, started again with the
    same noise, resumes bit-exactly. Of a transformer that is split, the first rank reads and writes the files, and
    sends the others what it read: they may be on other machines.

    Args:
        transformer: the transformer, after BLADE is applied to it.
        folder: the folder of the files, `pass-00000.safetensors` and so on; made if missing. None: a rank that is not
            the first, and has none.
        look: called after each computed pass; returns further tensors to save.
        on_pass: called after every pass with its number, true if it was read, and the `step` saved with it.

    Raises:
        OSError: if a file cannot be written.
    """
    parameters = tuple(inspect.signature(type(transformer).forward).parameters)[1:]
    inner, count = transformer.forward, 0

    @wraps(inner)  # a pipeline may ask for its arguments
    def forward(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        inputs = {**dict(zip(parameters, args)), **kwargs}
        number, path = count, None if folder is None else folder / f"pass-{count:05d}.safetensors"
        count += 1
        read = None if path is None else _read(path)
        ranks = ranks_of(transformer)  # now, as it may be split since this block began
        if ranks is not None:
            read = ranks.from_first(read)
        if read is not None:
            saved = read
            device = inputs["hidden_states"].device
            outputs = tuple(tensor.to(device) for name, tensor in sorted(saved.items()) if name.startswith(OUTPUT))
            applied = applied_to(transformer)
            if applied is not None:
                # which counts the steps if the scheduler does not
                applied.steps.resolve(applied.family.video_timestep(inputs))
        else:
            result = inner(**inputs)
            outputs = result if isinstance(result, tuple) else result.to_tuple()
            saved = {} if look is None else look()
            if path is not None:
                named = {f"{OUTPUT}{number or ''}": tensor for number, tensor in enumerate(outputs)}
                with replaced_whole(path) as temporary:
                    save_file({name: x.detach().cpu().contiguous() for name, x in named.items()} | saved, temporary)
        if on_pass is not None:
            on_pass(number, read is not None, int(saved["step"]) if "step" in saved else None)
        if kwargs.get("return_dict", True):
            from diffusers.models.modeling_outputs import Transformer2DModelOutput

            if len(outputs) > 1:
                raise ValueError("`return_dict` must be False for a transformer of several outputs that is recorded.")
            return Transformer2DModelOutput(sample=outputs[0])
        return outputs

    transformer.forward = forward
    try:
        yield
    finally:
        transformer.forward = inner


def _read(path: Path) -> dict[str, Tensor] | None:
    """Return output and step of a saved pass; None if there is none, or, with a warning, if it cannot be read."""
    try:
        saved = load_file(path) if path.is_file() else None
    except (SafetensorError, OSError) as error:
        logger.warning(f"{path} cannot be read, and is made again: {first_line(error)}")
        return None
    if saved is None:
        return None
    return {name: tensor for name, tensor in saved.items() if name == "step" or name.startswith(OUTPUT)}


@contextmanager
def recorded(
    transformer: nn.Module,
    recording: Recording,
    folder: Path | None,
    pipe: Any = None,
    on_pass: Callable[[int, bool, int | None], None] | None = None,
) -> Iterator[None]:
    """Measure and save every forward pass of a transformer inside a `with` block; see `saved_passes`.

    Args:
        transformer: a transformer of a known family. BLADE is removed from it inside the block.
        recording: the options of the recording.
        folder: the folder of the passes; see `saved_passes`.
        pipe: the transformer's pipeline, for its scheduler.
        on_pass: called after every pass with its number, true if it was read, and the `step` saved with it.

    Raises:
        ValueError: if a layer's attention cannot be measured; names the layer and the reason.
    """
    family, previous = find_family(transformer), applied_to(transformer)
    method = RecordingMethod(recording, family, transformer)
    with unchanged_on_error(transformer):
        if previous is not None:
            previous.uninstall(transformer)
        applied = AppliedBlade(transformer, family, BladeConfig(strict=True), pipe, method)
        applied.install(transformer)

    def look() -> dict[str, Tensor]:
        assert method.latest is not None
        return _measured(method.latest)

    try:
        with saved_passes(transformer, folder, look, on_pass):
            yield
    finally:
        applied.uninstall(transformer)
        if previous is not None:
            previous.install(transformer)


def read_pass(path: Path) -> RecordedPass:
    """Read a pass that `recorded` saved."""
    measurements: dict[int, dict[str, Tensor]] = {}
    columns, step = dict[int, Tensor](), 0
    for name, tensor in load_file(path).items():
        layer, _, quantity = name.partition(".")
        if name == "step":
            step = int(tensor)
        elif quantity == "columns":
            columns[int(layer)] = tensor
        elif not name.startswith(OUTPUT):
            measurements.setdefault(int(layer), {})[quantity] = tensor
    layers = {layer: LayerMeasurement.from_tensors(tensors) for layer, tensors in sorted(measurements.items())}
    return RecordedPass(step=step, layers=layers, columns=columns)


def _measured(plan: RecordingPlan) -> dict[str, Tensor]:
    """Take the measurements of the latest pass as tensors to save."""
    tensors = {"step": torch.tensor(plan.step)}
    for layer, measured in plan.measurements.items():
        tensors |= {f"{layer}.{name}": tensor.contiguous() for name, tensor in measured.tensors().items()}
        tensors[f"{layer}.columns"] = plan.columns[layer].cpu()
    plan.measurements.clear()
    plan.columns.clear()
    return tensors
