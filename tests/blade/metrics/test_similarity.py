import math
import sys
from types import SimpleNamespace

import pytest
import torch

from blade.metrics import similarity as metrics
from blade.metrics.similarity import MAX_PSNR, lpips, psnr, psnr_by_frame, ssim, ssim_by_frame


def test_psnr_is_that_of_eight_bit_frames():
    reference = torch.full((4, 3, 16, 16), 100 / 255)
    video = reference + 10.2 / 255
    assert psnr(video, reference) == pytest.approx(10 * math.log10(255**2 / 10**2), abs=1e-3)


def test_psnr_takes_the_error_of_the_whole_video():
    reference = torch.zeros(4, 3, 16, 16)
    video = reference.clone()
    video[0] = 20 / 255
    assert psnr(video, reference) == pytest.approx(10 * math.log10(255**2 / (20**2 / 4)), abs=1e-3)


def test_identical_videos(pattern):
    assert psnr(pattern, pattern) == MAX_PSNR
    assert ssim(pattern, pattern) == pytest.approx(1, abs=1e-6)


def test_ssim_against_its_definition():
    # constant images have no structure: (2 a b + c) / (a^2 + b^2 + c) with c = (0.01 * 255)^2
    first, second, constant = 60.0, 120.0, (0.01 * 255) ** 2
    expected = (2 * first * second + constant) / (first**2 + second**2 + constant)
    videos = [torch.full((2, 3, 16, 16), value / 255) for value in (first, second)]
    assert ssim(*videos) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("measure", [psnr, ssim])
def test_quality_falls_with_noise(measure, pattern):
    noise = torch.randn(pattern.shape, generator=torch.Generator().manual_seed(1))
    values = [measure(pattern + sigma * noise, pattern) for sigma in (0.01, 0.05, 0.2)]
    assert values[0] > values[1] > values[2]


def test_each_frame_counts_for_itself(pattern):
    reference, video = pattern, pattern.clone()
    video[1] = (reference[1] + 10 / 255).clamp(0, 1)
    values = psnr_by_frame(video, reference)
    assert [value == MAX_PSNR for value in values] == [True, False, True, True, True]
    assert values[1] == psnr(video[1:2], reference[1:2])
    similarities = ssim_by_frame(video, reference)
    assert similarities[1] < 0.999 < similarities[0]
    assert ssim(video, reference) == pytest.approx(sum(similarities) / 5)


@pytest.fixture
def fresh_lpips():
    metrics._lpips_network.cache_clear()
    yield
    metrics._lpips_network.cache_clear()


def test_lpips_is_none_where_it_is_not_installed(fresh_lpips, monkeypatch, pattern):
    monkeypatch.setitem(sys.modules, "lpips", None)
    assert lpips(pattern, pattern) is None


def test_lpips_gives_its_network_pairs_of_frames_from_minus_one_to_one(fresh_lpips, monkeypatch):
    seen, devices = [], []

    class Network(torch.nn.Module):
        def __init__(self, net, verbose):
            super().__init__()
            assert net == "alex"

        def to(self, device):
            devices.append(device)
            return super().to(device)

        def forward(self, first, second):
            seen.append((first.shape, float(first.min()), float(second.max())))
            return (first - second).abs().mean().reshape(1, 1, 1, 1)

    monkeypatch.setitem(sys.modules, "lpips", SimpleNamespace(LPIPS=Network))
    video, reference = torch.zeros(3, 3, 64, 64), torch.zeros(3, 3, 64, 64)
    video[0] = 1
    assert lpips(video, reference) == pytest.approx(2 / 3)
    assert seen == [((1, 3, 64, 64), 1, -1), ((1, 3, 64, 64), -1, -1), ((1, 3, 64, 64), -1, -1)]
    assert devices == [video.device]


@pytest.mark.parametrize("measure", [psnr, ssim, lpips, psnr_by_frame, ssim_by_frame])
def test_shapes_must_agree(measure):
    with pytest.raises(ValueError, match="must both be"):
        measure(torch.zeros(4, 3, 16, 16), torch.zeros(5, 3, 16, 16))
