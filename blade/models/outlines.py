"""Outlines: transformers without weights whose layers are as those of weights in fewer bits, for their memory."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from blade.families.protocol import ModelFamily
from blade.families.transformers import Transformer
from blade.models.stored_weights import Float8Linear

NF4_BLOCK = 64
"""Weights of a block of NF4 that share a scale, of 32 bits. Source: `BitsAndBytesConfig` of Diffusers, its defaults;
with `bnb_4bit_use_double_quant` the scales take a quarter."""

AS_IT_IS = "as it is"
"""Name of the storage of a transformer that is left alone."""

EVERY_WAY: tuple[str, ...] = ("none", "model", "group", "sequential")
"""Ways of offloading that weights in full go together with."""

LAYERWISE = EVERY_WAY[:-1]
"""Those that leave a layer's weights together."""

WHOLE_PARTS = EVERY_WAY[:2]
"""Those that leave a part's weights together: what bitsandbytes knows of a packed weight stays with the layer."""


@dataclass(frozen=True, kw_only=True)
class Storage:
    """A way of storing the weights of a transformer's blocks."""

    name: str
    """`AS_IT_IS`, a quantization of torchao, a type of GGUF, ..."""
    bits: int
    """Bits that a weight is rounded to; 16: none."""
    option: str | None
    """The option that asks for it; None: nothing is to be asked for."""
    package: str | None = None
    """Package that it needs, if any."""
    extra: str | None = None
    """BLADE's extra that brings the package."""
    offloads: tuple[str, ...] = LAYERWISE
    """The ways of offloading that it goes together with."""


STORAGES = (
    Storage(name=AS_IT_IS, bits=16, option=None, offloads=EVERY_WAY),
    Storage(name="int8", bits=8, option="--quantize int8", package="torchao", extra="quantize"),
    Storage(name="fp8", bits=8, option="--quantize fp8", package="torchao", extra="quantize"),
    Storage(name="fp8 file", bits=8, option="--transformer FILE of 8-bit floats"),
    Storage(name="Q8_0", bits=8, option="--transformer FILE.gguf of Q8_0", package="gguf", extra="gguf"),
    Storage(name="Q4_K", bits=4, option="--transformer FILE.gguf of Q4_K", package="gguf", extra="gguf"),
    Storage(
        name="NF4",
        bits=4,
        option="--transformer FOLDER of NF4",
        package="bitsandbytes",
        extra="nf4",
        offloads=WHOLE_PARTS,
    ),
)
"""All ways, in the order in which they are tried: the most bits first, then those that need no other file."""


class PackedNf4Linear(nn.Linear):
    """A linear layer of bitsandbytes' NF4 on the meta device: its bytes, and what a product of many rows unpacks."""

    def __init__(self, plain: nn.Linear) -> None:
        """Make the outline of a layer."""
        with torch.device("meta"):
            super().__init__(plain.in_features, plain.out_features, bias=plain.bias is not None)
        count = plain.in_features * plain.out_features
        self.weight = nn.Parameter(_bytes(-(-count // 2)), requires_grad=False)
        self.bias = plain.bias
        self.register_buffer("absmax", _bytes(4 * -(-count // NF4_BLOCK)))

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return a tensor of the result's shape, holding the unpacked weights meanwhile."""
        weight = input.new_empty(self.out_features, self.in_features)
        return nn.functional.linear(input, weight, self.bias)


def pack_nf4(transformer: Transformer, layers: set[str]) -> Transformer:
    """Replace linear layers of an empty transformer by outlines of NF4.

    Args:
        transformer: the transformer, on the meta device.
        layers: the names of the layers.
    """
    for name in layers:
        transformer.set_submodule(name, PackedNf4Linear(transformer.get_submodule(name)))
    return transformer


def outline(transformer: Transformer, family: ModelFamily, storage: Storage) -> Transformer:
    """Return an outline of a transformer whose blocks are stored in a way.

    Args:
        transformer: an empty one, on the meta device; it stays as it is.
        family: its family.
        storage: one of `STORAGES`, whose package is installed.
    """
    if storage.name == AS_IT_IS:
        return transformer
    made: Transformer = copy.deepcopy(transformer)
    if storage.package == "torchao":
        from blade.models.acceleration import quantize_blocks

        quantize_blocks(made, family, storage.name)
    for name, layer in list(_block_layers(made, family)) if storage.package != "torchao" else ():
        if storage.name == "fp8 file":
            weight = torch.empty_like(layer.weight, dtype=torch.float8_e4m3fn)
            made.set_submodule(name, Float8Linear(layer, weight, torch.empty((), device="meta")))
        elif storage.name == "NF4":
            pack_nf4(made, {name})
        elif storage.package == "gguf":
            _pack_gguf(made, name, layer, storage.name)
    return made


def _block_layers(transformer: Transformer, family: ModelFamily) -> Iterator[tuple[str, nn.Linear]]:
    """Yield the linear layers of a transformer's blocks, with their names."""
    inside = {id(module) for block in family.blocks(transformer) for module in block.modules()}
    for name, module in transformer.named_modules():
        if id(module) in inside and isinstance(module, nn.Linear):
            yield name, module


def _pack_gguf(transformer: Transformer, name: str, layer: nn.Linear, kind: str) -> None:
    """Replace a layer by one of Diffusers' for GGUF, unless its rows are no whole blocks."""
    from diffusers.quantizers.gguf.utils import GGML_QUANT_SIZES, GGUFLinear, GGUFParameter
    from gguf import GGMLQuantizationType

    quant_type: Any = GGMLQuantizationType[kind]
    block, size = GGML_QUANT_SIZES[quant_type]
    if layer.in_features % block:
        return
    with torch.device("meta"):
        packed = GGUFLinear(layer.in_features, layer.out_features, layer.bias is not None, layer.weight.dtype)
        data = torch.empty(layer.out_features, layer.in_features // block * size, dtype=torch.uint8)
    packed.weight, packed.bias = GGUFParameter(data, quant_type=quant_type), layer.bias
    transformer.set_submodule(name, packed)


def _bytes(count: int) -> torch.Tensor:
    return torch.empty(count, dtype=torch.uint8, device="meta")
