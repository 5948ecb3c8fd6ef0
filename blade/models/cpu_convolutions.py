"""Convolutions of a VAE on the CPU by oneDNN, which PyTorch leaves out for a single video of few channels."""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType

import torch
from torch import nn


def use_onednn_conv3d(vae: nn.Module) -> None:
    """Let a VAE's 3D convolutions run on oneDNN wherever they can; the results are the same but for rounding.

    With PyTorch's own choice, a plain loop, the bundled model decodes half as fast.
    """
    for module in vae.modules():
        if isinstance(module, nn.Conv3d) and module.padding_mode == "zeros":
            module._conv_forward = MethodType(_convolve, module)  # type: ignore[method-assign]


def _convolve(layer: nn.Conv3d, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    suited = (
        x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32 and torch.backends.mkldnn.is_available()
    )
    if not suited or torch.is_grad_enabled() or torch.compiler.is_compiling() or isinstance(layer.padding, str):
        plain: torch.Tensor = nn.Conv3d._conv_forward(layer, x, weight, bias)
        return plain
    convolve: Callable[..., torch.Tensor] = torch.mkldnn_convolution
    return convolve(x, weight, bias, layer.padding, layer.stride, layer.dilation, layer.groups)
