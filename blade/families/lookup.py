"""Look-up of the family that recognises a transformer."""

from __future__ import annotations

from torch import nn

from blade.families.protocol import ModelFamily


def find_family(transformer: nn.Module) -> ModelFamily:
    """Return the family that recognises a transformer.

    Raises:
        ValueError: if none does; the message lists the families that there are.
    """
    from blade.families.registry import model_families

    families = model_families()
    for family in families:
        if family.recognises(transformer):
            return family
    listed = ", ".join(family.name for family in families)
    raise ValueError(
        f"`{type(transformer).__name__}` is of no model family that BLADE knows; it must be one of: {listed}."
    )
