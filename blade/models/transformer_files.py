"""Weights in place of a model's own: a transformer made of a file of any layout, in as few bits as the file has."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from blade.common.errors import first_line
from blade.families.transformers import Transformer
from blade.models.choices import SEPARATOR, parse_transformer
from blade.models.loaded import LoadedModel
from blade.models.modular import is_modular
from blade.models.outlines import pack_nf4
from blade.models.source import ModelError
from blade.models.stored_weights import Float8Linear, packed_layers
from blade.models.transformer_layouts import FLOAT8, Layout, translate_layout
from blade.models.transformer_sources import (
    CONFIG,
    Weights,
    find_source,
    read_quantization,
    read_state,
    read_tensors,
    require,
)
from blade.models.untrusted import read_json

PACKED_STATE = ".weight.quant_state.bitsandbytes__"
"""Middle of the key under which bitsandbytes says how a weight is packed."""


def load_transformers(
    model: LoadedModel, sources: str, *, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> dict[str, Transformer]:
    """Make the transformers of a model from files; whatever is stored in fewer bits stays so.

    Args:
        model: the model without its weights, whose configurations are taken.
        sources: a file, or FIRST:SECOND for a model of two transformers; see
            `blade.models.transformer_sources.find_source`.
        dtype: type that is multiplied in, and of all weights that are not quantised.
        device: where the model will run, where 4-bit weights of bitsandbytes are loaded; "meta" reads headers
            alone.

    Returns:
        The transformers by their component's name; all but those of bitsandbytes are on the CPU.

    Raises:
        ModelError: if a file cannot be read, does not fit, or needs a package that is not installed.
        ValueError: if there are more or fewer files than transformers.
    """
    parts, files = model.transformers, parse_transformer(sources)
    if len(files) != len(parts):
        wanted = "one file, for the only transformer of this model"
        if len(parts) > 1:
            wanted = (
                f"a file for each of this model's transformers, {SEPARATOR.join(('FIRST', 'SECOND'))} for "
                f"{' and '.join(parts)} (the folder of one in the model keeps its weights)"
            )
        raise ValueError(f"`transformer` must name {wanted}, got {sources}.")
    paths = [find_source(source) for source in files]  # before anything large is read
    return {
        name: _load(part, path, f"`transformer` {source}", dtype, torch.device(device))
        for (name, part), path, source in zip(parts.items(), paths, files, strict=True)
    }


def replace_transformers(model: LoadedModel, transformers: Mapping[str, Transformer]) -> None:
    """Put transformers into a model's pipeline, by their component's name."""
    register = model.pipe.update_components if is_modular(model.pipe) else model.pipe.register_modules
    register(**transformers)


def check_stored(transformers: Mapping[str, Transformer], *, quantize: str | None, offload: str) -> None:
    """Check that what a request says of weights goes together with how they are stored.

    Args:
        transformers: the transformers that were made of files.
        quantize: the request's.
        offload: the request's.

    Raises:
        ValueError: for weights in fewer bits that would be quantised again, or taken apart.
    """
    for name, transformer in transformers.items():
        if next(packed_layers(transformer), None) is None:
            continue
        if quantize is not None:
            raise ValueError(
                f"`quantize` must not be given with a `transformer` that is stored in fewer bits, as {name} is, got "
                f"{quantize!r}."
            )
        kinds = {type(layer).__module__.partition(".")[0] for _, layer in packed_layers(transformer)}
        # what bitsandbytes knows of a packed weight would stay behind
        refused = ("sequential", "group") if "bitsandbytes" in kinds else ("sequential",)
        if offload in refused:
            other = "model" if "group" in refused else "group"
            raise ValueError(
                f"`offload` must not be {offload} with a `transformer` that is stored as {name} is; take {other!r}."
            )


def _load(like: Transformer, path: Path, what: str, dtype: torch.dtype, device: torch.device) -> Transformer:
    """Make one transformer of the class and configuration of an empty one."""
    quantization = read_quantization(path, what)
    expected = _empty(like, buffers_too=True).state_dict()
    if path.is_dir():
        name = read_json(path / CONFIG, what).get("_class_name")
        if name != type(like).__name__:
            raise ModelError(f"{what} must hold a {type(like).__name__}, as this model has, got {name}.")
    tensors = read_tensors(path, what, meta=device.type == "meta" or quantization is not None)
    if quantization is not None:
        return _load_packed(like, path, tensors, expected, what, dtype, device)
    layout = translate_layout(type(like), like.config, expected, tensors, what)
    _check_fit(layout.weights, expected, type(like), what)
    return assemble(like, layout, dtype, meta=device.type == "meta")


def _empty(like: Transformer, *, buffers_too: bool) -> Transformer:
    """Return a transformer like another without weights, and with the buffers that its class computes or without."""
    from accelerate import init_empty_weights

    config = {key: value for key, value in like.config.items() if key != "quantization_config"}
    with init_empty_weights(include_buffers=buffers_too):
        return type(like).from_config(config)


def _check_fit(weights: Weights, expected: Mapping[str, torch.Tensor], kind: type, what: str) -> None:
    """Refuse weights that are not exactly a model's, by the key and the shapes."""
    shapes = {key: tuple(getattr(tensor, "quant_shape", tensor.shape)) for key, tensor in weights.items()}
    for key in (key for key in expected if key in shapes):
        if shapes[key] != tuple(expected[key].shape):
            raise ModelError(
                f"{what} does not fit this model's {kind.__name__}: {key} is {_size(shapes[key])} in the file and "
                f"{_size(expected[key].shape)} in the model."
            )
    if missing := [key for key in expected if key not in shapes]:
        raise ModelError(
            f"{what} does not fit this model's {kind.__name__}: it lacks {len(missing):,} of {len(expected):,} "
            f"weights, such as {missing[0]} of {_size(expected[missing[0]].shape)}."
        )
    if left := [key for key in shapes if key not in expected]:
        raise ModelError(
            f"{what} does not fit this model's {kind.__name__}: it holds {len(left):,} weights that the model lacks, "
            f"such as {left[0]} of {_size(shapes[left[0]])}."
        )


def assemble(like: Transformer, layout: Layout, dtype: torch.dtype, *, meta: bool) -> Transformer:
    """Make a transformer of tensors that fit it.

    Args:
        like: a transformer of its class and configuration.
        layout: the tensors, which are used up.
        dtype: see `load_transformers`.
        meta: make it of headers, on PyTorch's meta device.
    """
    model, weights = _empty(like, buffers_too=meta), layout.weights
    high = tuple(type(like)._keep_in_fp32_modules or ()) if dtype.itemsize == 2 else ()
    weights = {key: _unpacked(model, key, tensor) for key, tensor in weights.items()}
    if any(_is_gguf(tensor) for tensor in weights.values()):
        _prepare_gguf(model, weights, dtype)
    for key in list(weights):
        owner, _, last = key.rpartition(".")
        module, tensor = model.get_submodule(owner), weights.pop(key)
        if _is_gguf(tensor):
            module._parameters[last] = tensor
        elif tensor.dtype in FLOAT8 and last == "weight" and isinstance(module, nn.Linear):
            model.set_submodule(owner, Float8Linear(module, tensor, layout.scales.get(key)))
        else:
            if tensor.dtype in FLOAT8 and key in layout.scales:
                tensor = tensor.float() * layout.scales[key]
            if tensor.is_floating_point():
                tensor = tensor.to(torch.float32 if set(high) & set(key.split(".")) else dtype)
            if last in module._buffers:
                module._buffers[last] = tensor
            else:
                module._parameters[last] = nn.Parameter(tensor, requires_grad=tensor.is_floating_point())
    return model.eval()


def _is_gguf(tensor: torch.Tensor) -> bool:
    return hasattr(tensor, "quant_type")


def _unpacked(model: Transformer, key: str, tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor of a GGUF file as an ordinary one where no linear layer of Diffusers' multiplies it packed."""
    if not _is_gguf(tensor):
        return tensor
    from diffusers.quantizers.gguf.utils import dequantize_gguf_tensor

    owner, _, last = key.rpartition(".")
    high = set(type(model)._keep_in_fp32_modules or ())
    kind = tensor.quant_type  # type: ignore[attr-defined]  # Diffusers' own
    is_linear = last == "weight" and isinstance(model.get_submodule(owner), nn.Linear)
    if is_linear and kind.name != "BF16" and not high & set(key.split(".")):
        return tensor
    return dequantize_gguf_tensor(tensor)  # type: ignore[no-any-return]


def _prepare_gguf(model: Transformer, weights: Weights, dtype: torch.dtype) -> None:
    """Have Diffusers' quantizer replace the linear layers whose weights are packed."""
    from diffusers import GGUFQuantizationConfig
    from diffusers.quantizers import DiffusersAutoQuantizer

    quantizer = DiffusersAutoQuantizer.from_config(GGUFQuantizationConfig(compute_dtype=dtype))
    quantizer.validate_environment()
    quantizer.preprocess_model(model=model, device_map=None, state_dict=weights, keep_in_fp32_modules=[])
    quantizer.postprocess_model(model)
    model.hf_quantizer = quantizer


def _load_packed(
    like: Transformer,
    path: Path,
    tensors: Weights,
    expected: Mapping[str, torch.Tensor],
    what: str,
    dtype: torch.dtype,
    device: torch.device,
) -> Transformer:
    """Load a folder with bitsandbytes' 4-bit weights, as Diffusers saves it."""
    require("bitsandbytes", what)
    weights = {key: tensor for key, tensor in tensors.items() if ".weight." not in key}
    for key in (key for key in tensors if PACKED_STATE in key):
        shape = read_state(path, key)["shape"]
        weights[f"{key.partition(PACKED_STATE)[0]}.weight"] = torch.empty(shape, device="meta")
    _check_fit(weights, expected, type(like), what)
    if device.type == "meta":
        packed = {key.partition(PACKED_STATE)[0] for key in tensors if PACKED_STATE in key}
        return pack_nf4(_empty(like, buffers_too=True).to(dtype), packed)
    try:
        return type(like).from_pretrained(
            path, torch_dtype=dtype, use_safetensors=True, local_files_only=True, device_map={"": device}
        )
    except Exception as error:  # among others: bitsandbytes' quantizer in Diffusers wants a GPU
        raise ModelError(f"{what} cannot be loaded on {device}: {first_line(error)}") from error


def _size(shape: tuple[int, ...] | torch.Size) -> str:
    return "x".join(map(str, shape)) or "a number"
