"""A student's weights: LoRAs in every layout, and whole transformers, put onto a pipeline."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

import torch

from blade.common.errors import first_line
from blade.common.terminal import logger
from blade.families.transformers import Transformer
from blade.models.adapters import Reach, check_reach
from blade.models.loaded import LoadedModel
from blade.models.lora_files import LoraFile, read_lora_file
from blade.models.lora_layouts import Translation, translate
from blade.models.loras import Part, check_refused, load_part, shown_modules, translate_part
from blade.models.untrusted import read_json
from blade.students.lookup import FoundStudent
from blade.students.source import TRANSFORMER_FOLDER, StudentFiles, is_student_file

ADAPTER = "blade_student"
"""Name of the student's adapter."""

OTHER_PARTS = re.compile(
    r"(vae|audio_vae|vocoder|text_encoders?|text_embedding_projection|cond_stage_model|first_stage_model)\."
)
"""Beginnings of keys of other parts of a pipeline, in a file that holds all of them."""

BOTH_STUDENTS = (
    "Give a file for each transformer: `FIRST:SECOND`, or in Python `load_student(pipe, source, weight_name=FILE, "
    "weight_name_2=FILE_2)`, the second for transformer_2."
)
"""Advice for a student that is for one of two transformers."""


def load_weights(pipe: Any, found: FoundStudent) -> tuple[Reach, list[Part]]:
    """Load a student's weights, and return how many modules they change, and the changes that no adapter holds.

    Args:
        pipe: the pipeline; a file of whole weights puts another transformer in a transformer's place.
        found: the student.

    Raises:
        ValueError: if they do not fit.
    """
    model = LoadedModel(pipe)
    files = _read(model, found, values=True)
    what = f"`source` {found.files.source}"
    reach, parts = dict.fromkeys(model.transformers, 0), []
    for (name, transformer), file in zip(model.transformers.items(), files, strict=False):
        assert file is not None  # all were read
        if file.is_whole:
            made = make_whole(transformer, file, model, _named(what, file))
            setattr(pipe, name, made)
            reach[name] = sum(1 for part in made.modules() if part._parameters)
        else:
            parts.append(load_part(model, file, ADAPTER, name, _named(what, file)))
            reach[name] = len(parts[-1].translation.modules)
    check_reach(what, reach, BOTH_STUDENTS)
    return reach, parts


def peek_weights(pipe: Any, found: FoundStudent) -> None:
    """Check that a student's files exist, can be read and fit, as far as they are here; the pipeline may be empty.

    Args:
        pipe: the pipeline.
        found: the student.

    Raises:
        ValueError: see `load_weights`.
    """
    model = LoadedModel(pipe)
    files = _read(model, found, values=False)
    what, reach = f"`source` {found.files.source}", dict.fromkeys(model.transformers, 0)
    for (name, transformer), file in zip(model.transformers.items(), files, strict=False):
        if file is None:  # on the Hub
            reach[name] = 1
        elif file.is_whole:
            reach[name] = len(_check_whole(transformer, file, model, _named(what, file)).modules)
        else:
            reach[name] = len(translate_part(model, file, name, _named(what, file)).modules)
    check_reach(what, reach, BOTH_STUDENTS)


def make_whole(like: Transformer, file: LoraFile, model: LoadedModel, what: str) -> Transformer:
    """Return a transformer with the whole weights of a file, in the place and types of another one's.

    Args:
        like: the other one.
        file: the file.
        model: the model.
        what: the subject of the errors' messages.

    Raises:
        ValueError: if the file is of another model, or has weights that change the output and cannot be used.
    """
    from accelerate import init_empty_weights

    with init_empty_weights():
        made = type(like).from_config(like.config)
    translation = _check_whole(made, file, model, what)
    names = {id(parameter): name for name, parameter in made.named_parameters()}
    types = {  # without the layers around those that have adapters
        name.replace("base_layer.", ""): (parameter.device, parameter.dtype)
        for name, parameter in like.named_parameters()
    }
    weights: dict[str, torch.Tensor] = {}
    for parameter, tensor in translation.replacements:
        name = names[id(parameter)]
        device, dtype = types[name]
        weights[name] = tensor.to(device, dtype)
    made.load_state_dict(weights, assign=True)
    for name, buffer in like.named_buffers():
        made.get_buffer(name).data = made.get_buffer(name).to(buffer)
    return made.eval().requires_grad_(False)


def _named(what: str, file: LoraFile) -> str:
    """Return the subject of messages about a file."""
    return what if what.endswith(file.path.name) else f"{what}: {file.path.name}"


def _check_whole(transformer: Transformer, file: LoraFile, model: LoadedModel, what: str) -> Translation:
    """Return what a file of whole weights changes in a transformer: all of it."""
    tensors = {key: tensor for key, tensor in file.tensors.items() if not OTHER_PARTS.match(key)}
    if others := sorted({key.partition(".")[0] for key in file.tensors if key not in tensors}):
        logger.info(f"{what}: the weights of {' and '.join(others)} are left; the pipeline has its own.")
    translation = translate(LoraFile(file.path, tensors), transformer, model.family)
    check_refused(translation, what)
    if translation.unused:
        raise ValueError(
            f"{what} cannot be loaded onto this model: {len(translation.unused):,} of its modules do not fit: "
            f"{shown_modules(translation.unused)}. Take weights of this model."
        )
    replaced = {id(parameter) for parameter, _ in translation.replacements}
    missing = [name for name, parameter in transformer.named_parameters() if id(parameter) not in replaced]
    if missing:
        raise ValueError(f"{what} lacks {len(missing):,} of this model's weights, such as {missing[0]}.")
    return translation


def _read(model: LoadedModel, found: FoundStudent, *, values: bool) -> Sequence[LoraFile | None]:
    """Return the file of each transformer's weights."""
    files, subfolder = found.files, found.student.subfolder
    if files.pair is not None:
        return files.read_pair(values=values)
    if found.is_folder:
        return [_read_folder(model, files, subfolder, values=values)]
    names = [name for name in found.weight_names if name is not None]
    if len(found.weight_names) > 1 and found.weight_names[1] is not None and len(model.transformers) == 1:
        raise ValueError(
            f"`weight_name_2` must not be given: this model has one transformer, got {found.weight_names[1]!r}."
        )
    read = []
    for field, name in zip(("weight_name", "weight_name_2"), names, strict=False):
        if not files.has(subfolder, name):
            raise ValueError(f"`{field}` must be a file of {files.source}, got {name!r}.")
        read.append(files.read_weights(subfolder, name, values=values))
    return read


def _read_folder(model: LoadedModel, files: StudentFiles, subfolder: str | None, *, values: bool) -> LoraFile | None:
    """Return the weights of a folder in Diffusers' format, whose configuration must be the model's."""
    what = f"`source` {files.source}"
    path = files.fetch(subfolder, f"{TRANSFORMER_FOLDER}/config.json")
    assert path is not None  # that made it a folder
    _check_configuration(model.transformer, read_json(path, what), what)
    if not values and files.folder is None:
        return None
    folder = files.fetch_transformer(subfolder)
    assert folder is not None
    read = [
        read_lora_file(shard, f"{what}: {shard.name}", values=values)
        for shard in sorted(folder.glob("*.safetensors"))
        if is_student_file(f"{TRANSFORMER_FOLDER}/{shard.name}")
    ]
    return LoraFile(folder, {key: tensor for file in read for key, tensor in file.tensors.items()})


def _check_configuration(like: Transformer, values: dict[str, Any], what: str) -> None:
    """Check that a configuration is that of another transformer."""
    from accelerate import init_empty_weights

    try:
        with init_empty_weights():
            other = type(like).from_config(values)
    except Exception as error:  # whatever Diffusers raises for a broken configuration
        raise ValueError(f"{what}: the transformer cannot be loaded: {first_line(error)}") from error
    # as JSON: a model that was not read from a file may have tuples where the file has lists
    mine, theirs = (json.loads(transformer.to_json_string()) for transformer in (like, other))
    differing = [key for key, value in mine.items() if key[0] != "_" and theirs.get(key) != value]
    if differing:
        raise ValueError(
            f"{what} is a student of another model: its `{differing[0]}` is {theirs.get(differing[0])} instead of "
            f"{mine[differing[0]]}."
        )
