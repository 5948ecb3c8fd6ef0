"""A video with structure at every place."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F


@pytest.fixture
def pattern() -> torch.Tensor:
    """Five equal frames of smooth noise, (5, 3, 88, 88) in [0, 1]."""
    noise = torch.rand(1, 3, 88, 88, generator=torch.Generator().manual_seed(0))
    smooth = F.avg_pool2d(F.avg_pool2d(noise, 7, 1, 3), 7, 1, 3)
    smooth = (smooth - smooth.min()) / (smooth.max() - smooth.min())
    return smooth.expand(5, -1, -1, -1)
