"""The kinds of presets. Imports nothing heavy, so that a command's help does not wait for PyTorch."""

from __future__ import annotations

from typing import Literal, get_args

PresetKind = Literal["training-free", "few-step", "student"]
"""Kinds of presets: values for ordinary weights, for few-step students that were trained dense, and for weights that
were trained with them."""

PRESET_KINDS: tuple[PresetKind, ...] = get_args(PresetKind)
