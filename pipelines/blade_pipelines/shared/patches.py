"""Reordering of a latent's patches."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def permute_patches(latent: torch.Tensor, patch: Sequence[int], permutation: torch.Tensor) -> torch.Tensor:
    """Reorder the patches of a latent.

    Args:
        latent: (B, C, F, H, W). Incomplete patches at the far ends are cut off, as by the patch embedding.
        patch: size of a patch along (F, H, W).
        permutation: (patches,) int64; patch i of the result is patch `permutation[i]` of the latent, both in raster
            order.

    Returns:
        (B, C, F', H', W') where F', H', W' are rounded down to multiples of the patch size.
    """
    frames, height, width = (size // length for size, length in zip(latent.shape[2:], patch))
    latent = latent[:, :, : frames * patch[0], : height * patch[1], : width * patch[2]]
    pieces = latent.view(*latent.shape[:2], frames, patch[0], height, patch[1], width, patch[2])
    tokens = pieces.permute(0, 1, 2, 4, 6, 3, 5, 7).flatten(2, 4)  # (B, C, patches, *patch)
    tokens = tokens.index_select(2, permutation).view(*latent.shape[:2], frames, height, width, *patch)
    return tokens.permute(0, 1, 2, 5, 3, 6, 4, 7).flatten(6, 7).flatten(4, 5).flatten(2, 3)
