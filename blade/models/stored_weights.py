"""Weights that are stored in fewer bits than they are multiplied in: 8-bit floats, and what all such layers share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn


class Float8Linear(nn.Linear):
    """A linear layer whose weights are 8-bit floats, with scales or without, and are multiplied in the input's type.

    Diffusers' layerwise casting knows no scales, and would round biases and layers that a file has in 16 bits too.
    """

    def __init__(self, plain: nn.Linear, weight: torch.Tensor, scale: torch.Tensor | None) -> None:
        """Make the layer that stands in for a plain one.

        Args:
            plain: the layer, whose bias is taken over.
            weight: (out_features, in_features) in a type of 8-bit floats.
            scale: what the weights are to be multiplied with, one number or (out_features, 1), float32. None: 1.
        """
        with torch.device("meta"):
            super().__init__(plain.in_features, plain.out_features, bias=plain.bias is not None)
        self.storage_dtype = weight.dtype
        # as bytes: a cast of the whole model must not change them, and adapters must not take their type
        self.weight = nn.Parameter(weight.view(torch.uint8), requires_grad=False)
        self.bias = plain.bias
        self.scale: torch.Tensor | None
        self.register_buffer("scale", scale)

    def full_weight(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the weights, (out_features, in_features), in a type that can be multiplied."""
        weight = self.weight.view(self.storage_dtype).to(dtype)
        return weight if self.scale is None else weight * self.scale.to(dtype)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Multiply; (..., in_features) to (..., out_features)."""
        bias = None if self.bias is None else self.bias.to(input.dtype)
        return nn.functional.linear(input, self.full_weight(input.dtype), bias)


def is_packed(layer: nn.Module) -> bool:
    """Return whether a layer's weights are integers that only the layer itself can multiply."""
    weight = getattr(layer, "weight", None)
    return isinstance(layer, nn.Linear) and isinstance(weight, torch.Tensor) and not weight.is_floating_point()


def packed_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the layers of a model whose weights are stored in fewer bits, with their names."""
    return ((name, module) for name, module in model.named_modules() if is_packed(module))


def weight_shape(layer: Any) -> torch.Size:
    """Return the shape that a layer's weights have when they are multiplied, however they are stored."""
    shape: torch.Size = layer.weight.shape
    return torch.Size((layer.out_features, layer.in_features)) if is_packed(layer) else shape
