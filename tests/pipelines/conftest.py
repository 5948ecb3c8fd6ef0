"""Small random instances of every model family, with attention that is peaked, as fixtures."""

import diffusers
import pytest
import small_cogvideox
import small_hunyuan_video
import small_kandinsky5
import small_ltx
import small_minimax_h3
import small_wan
import torch
from small_family import Family


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


def _wan_family(name, make_wan, wan_inputs):
    """Wan, or a class that is built as it is."""
    like_wan = {
        "chronoedit": "ChronoEditTransformer3DModel",
        "skyreels-v2": "SkyReelsV2Transformer3DModel",
        "skyreels-v2-forcing": "SkyReelsV2Transformer3DModel",
        "anyflow": "AnyFlowTransformer3DModel",
    }
    if name in like_wan:
        inputs = {
            "skyreels-v2-forcing": small_wan.forcing_inputs(wan_inputs),
            "anyflow": small_wan.anyflow_inputs(wan_inputs),
        }.get(name, wan_inputs)
        kind = getattr(diffusers, like_wan[name])
        return Family(lambda: small_wan.make_like_wan(kind), inputs, frames_apart=name.endswith("forcing"))
    if name == "wan-animate":
        return small_wan.wan_animate()
    if name == "wan-animate-2":
        return small_wan.wan_animate_2()
    if name == "wan-vace":
        return Family(small_wan.make_wan_vace, small_wan.vace_inputs(wan_inputs))
    return Family(make_wan, wan_inputs)


FAMILIES = {
    **dict.fromkeys(("wan", "wan-vace", "wan-animate", "wan-animate-2"), _wan_family),
    **dict.fromkeys(("chronoedit", "skyreels-v2", "skyreels-v2-forcing", "anyflow"), _wan_family),
    "cogvideox": lambda *_: small_cogvideox.family(patch_size_t=None),
    "cogvideox-2b": lambda *_: small_cogvideox.family(use_rotary_positional_embeddings=False),
    "cogvideox-1.5": lambda *_: small_cogvideox.family(patch_size_t=2),
    "hunyuan-video": lambda *_: small_hunyuan_video.family(None),
    "hunyuan-video-i2v": lambda *_: small_hunyuan_video.family("token_replace"),
    "hunyuan-video-1.5": lambda *_: small_hunyuan_video.family_15(),
    "framepack": lambda *_: small_hunyuan_video.framepack(),
    "kandinsky5": lambda *_: small_kandinsky5.family(),
    "ltx-video": lambda *_: Family(small_ltx.make_ltx_video, small_ltx.ltx_video_inputs),
    "ltx-2": lambda *_: Family(small_ltx.make_ltx2, small_ltx.ltx2_inputs),
    "ltx-2.3": lambda *_: small_ltx.ltx2_3(),
    "minimax-h3": lambda *_: small_minimax_h3.family(),
    "minimax-h3-references": lambda *_: small_minimax_h3.family(references=True),
}
"""Functions that make each kind of transformer, of its name and Wan's fixtures."""

NEWER = {
    "minimax-h3": "MiniMaxH3Transformer3DModel",
    "minimax-h3-references": "MiniMaxH3Transformer3DModel",
    "ltx-2": "LTX2VideoTransformer3DModel",
    "ltx-2.3": "LTX2VideoTransformer3DModel",
    "anyflow": "AnyFlowTransformer3DModel",
    "wan-animate-2": "WanAnimate2Transformer3DModel",
}
"""Classes that the oldest Diffusers does not have."""


@pytest.fixture(params=FAMILIES)
def family(request, make_wan, wan_inputs, monkeypatch):
    """Every kind of transformer in turn."""
    if not hasattr(diffusers, NEWER.get(request.param, "ModelMixin")):
        pytest.skip("this Diffusers lacks the class")
    if request.param == "kandinsky5":
        # it rounds rotated queries and keys to this dtype, which hides errors; `test_kandinsky5.py` tests the rounding
        monkeypatch.setattr(torch, "bfloat16", torch.float32)
    return FAMILIES[request.param](request.param, make_wan, wan_inputs)
