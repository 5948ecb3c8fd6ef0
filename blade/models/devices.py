"""Devices and dtypes by name."""

from __future__ import annotations

import os

import torch

from blade.models.choices import DTYPE_NAMES

DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in DTYPE_NAMES}
"""Dtypes by name that the transformer and the text encoder can run in. The VAE always runs in float32."""


def resolve_device(device: str | None = None) -> torch.device:
    """Return a device that is there.

    Args:
        device: "cpu", "cuda", "cuda:1", ...; None takes CUDA if there is one, and in processes that accelerate or
            torchrun launched on a machine the GPU of this one.

    Raises:
        ValueError: if it is no device, or isn't there.
    """
    if device is None:
        if not torch.cuda.is_available():
            return torch.device("cpu")
        local = os.environ.get("LOCAL_RANK")
        return torch.device("cuda") if local is None else torch.device("cuda", int(local) % torch.cuda.device_count())
    try:
        resolved = torch.device(device)
    except RuntimeError:
        raise ValueError(f'`device` must be "cpu", "cuda" or a device such as "cuda:1", got {device!r}.') from None
    if resolved.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if not count:
            raise ValueError(f'`device` is "{device}", but PyTorch finds no CUDA device here; take "cpu".')
        if resolved.index is not None and resolved.index >= count:
            raise ValueError(f"`device` must be one of the {count} CUDA devices here, from cuda:0, got {device!r}.")
    else:
        try:
            torch.empty(1, device=resolved).cpu()
        except (RuntimeError, NotImplementedError, AssertionError):
            raise ValueError(f'`device` is "{device}", which this PyTorch cannot use; take "cpu".') from None
    return resolved


def resolve_dtype(dtype: str | None, device: torch.device) -> torch.dtype:
    """Return the dtype of a name; None takes bfloat16 on CUDA and float32 elsewhere.

    Raises:
        ValueError: if the models cannot run in it there.
    """
    if dtype is None:
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if dtype not in DTYPES:
        raise ValueError(f"`dtype` must be one of {', '.join(DTYPES)}, got {dtype!r}.")
    if dtype == "float16" and device.type == "cpu":
        raise ValueError("`dtype` must be float32 or bfloat16 on the CPU, got 'float16', which is for GPUs.")
    return DTYPES[dtype]
