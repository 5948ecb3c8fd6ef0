"""Small random instances of every model family, with attention that is peaked, as fixtures."""

import pytest
import small_hunyuan_video
import small_kandinsky5
import small_ltx
import small_minimax_h3
import small_wan
import torch
from small_families import FAMILIES, is_missing


@pytest.fixture
def make_ltx2():
    """Return a function that makes a tiny LTX-2 transformer of a version: "2", "2.3" or "2.5"."""
    return lambda version="2", **config: small_ltx.make_ltx2(
        **{"2": {}, "2.3": small_ltx.LTX2_3, "2.5": small_ltx.LTX2_5}[version], **config
    )


@pytest.fixture
def ltx2_inputs():
    """Return a function that makes its inputs for a grid of tokens."""
    return small_ltx.ltx2_inputs


@pytest.fixture
def make_minimax_h3():
    """Return a function that makes a tiny MiniMax-H3 transformer."""
    return small_minimax_h3.make_minimax_h3


@pytest.fixture
def minimax_h3_inputs():
    """Return a function that makes its inputs for a grid of tokens, with keyframes or without."""
    return small_minimax_h3.minimax_h3_inputs


@pytest.fixture
def minimax_h3_references():
    """Return a function that makes its inputs for a grid of tokens, with references."""
    return small_minimax_h3.minimax_h3_references


@pytest.fixture
def make_kandinsky5():
    """Return a function that makes a tiny Kandinsky 5 transformer."""
    return small_kandinsky5.make_kandinsky5


@pytest.fixture
def kandinsky5_inputs():
    """Return a function that makes its inputs for a grid of tokens."""
    return small_kandinsky5.kandinsky5_inputs


@pytest.fixture
def make_wan_animate_2():
    """Return a function that makes a tiny Wan-Animate-2 transformer."""
    return small_wan.make_wan_animate_2


@pytest.fixture
def wan_animate():
    """A tiny Wan-Animate transformer, and its inputs."""
    return small_wan.wan_animate()


@pytest.fixture
def framepack():
    """A tiny FramePack transformer, and its inputs."""
    return small_hunyuan_video.framepack()


@pytest.fixture
def make_like_wan():
    """Return a function that makes a tiny transformer of a class that is built as Wan's."""
    return small_wan.make_like_wan


@pytest.fixture
def forcing_inputs(wan_inputs):
    """Return a function that makes inputs of diffusion forcing for a grid of tokens."""
    return small_wan.forcing_inputs(wan_inputs)


@pytest.fixture
def anyflow_inputs(wan_inputs):
    """Return a function that makes inputs of AnyFlow for a grid of tokens."""
    return small_wan.anyflow_inputs(wan_inputs)


@pytest.fixture
def make_hunyuan_video():
    """Return a function that makes a tiny HunyuanVideo transformer, with a kind of image condition."""
    return small_hunyuan_video.make_hunyuan_video


@pytest.fixture
def hunyuan_video_inputs():
    """Return a function that makes its inputs for a grid of tokens."""
    return small_hunyuan_video.hunyuan_video_inputs


@pytest.fixture(params=FAMILIES)
def family(request, monkeypatch):
    """Every kind of transformer in turn."""
    if is_missing(request.param):
        pytest.skip("this Diffusers lacks the class")
    if request.param == "kandinsky5":
        # it rounds rotated queries and keys to this dtype, which hides errors; `test_kandinsky5.py` tests the rounding
        monkeypatch.setattr(torch, "bfloat16", torch.float32)
    return FAMILIES[request.param](request.param)
