"""Small random instances of every kind of transformer, by name."""

import diffusers
import small_cogvideox
import small_hunyuan_video
import small_kandinsky5
import small_ltx
import small_minimax_h3
import small_wan
from small_family import Family


def _wan_family(name):
    """Wan, or a class that is built as it is."""
    like_wan = {
        "chronoedit": "ChronoEditTransformer3DModel",
        "skyreels-v2": "SkyReelsV2Transformer3DModel",
        "skyreels-v2-forcing": "SkyReelsV2Transformer3DModel",
        "anyflow": "AnyFlowTransformer3DModel",
    }
    if name in like_wan:
        inputs = {
            "skyreels-v2-forcing": small_wan.forcing_inputs(small_wan.wan_inputs),
            "anyflow": small_wan.anyflow_inputs(small_wan.wan_inputs),
        }.get(name, small_wan.wan_inputs)
        kind = getattr(diffusers, like_wan[name])
        return Family(lambda: small_wan.make_like_wan(kind), inputs, frames_apart=name.endswith("forcing"))
    if name == "wan-animate":
        return small_wan.wan_animate()
    if name == "wan-animate-2":
        return small_wan.wan_animate_2()
    if name == "wan-vace":
        return Family(small_wan.make_wan_vace, small_wan.vace_inputs(small_wan.wan_inputs))
    return Family(small_wan.make_wan, small_wan.wan_inputs)


FAMILIES = {
    **dict.fromkeys(("wan", "wan-vace", "wan-animate", "wan-animate-2"), _wan_family),
    **dict.fromkeys(("chronoedit", "skyreels-v2", "skyreels-v2-forcing", "anyflow"), _wan_family),
    "cogvideox": lambda _: small_cogvideox.family(patch_size_t=None),
    "cogvideox-2b": lambda _: small_cogvideox.family(use_rotary_positional_embeddings=False),
    "cogvideox-1.5": lambda _: small_cogvideox.family(patch_size_t=2),
    "hunyuan-video": lambda _: small_hunyuan_video.family(None),
    "hunyuan-video-i2v": lambda _: small_hunyuan_video.family("token_replace"),
    "hunyuan-video-1.5": lambda _: small_hunyuan_video.family_15(),
    "framepack": lambda _: small_hunyuan_video.framepack(),
    "kandinsky5": lambda _: small_kandinsky5.family(),
    "ltx-video": lambda _: Family(small_ltx.make_ltx_video, small_ltx.ltx_video_inputs),
    "ltx-2": lambda _: Family(small_ltx.make_ltx2, small_ltx.ltx2_inputs),
    "ltx-2.3": lambda _: small_ltx.ltx2_3(),
    "minimax-h3": lambda _: small_minimax_h3.family(),
    "minimax-h3-references": lambda _: small_minimax_h3.family(references=True),
}
"""Functions that make each kind of transformer, of its name."""

NEWER = {
    "minimax-h3": "MiniMaxH3Transformer3DModel",
    "minimax-h3-references": "MiniMaxH3Transformer3DModel",
    "ltx-2": "LTX2VideoTransformer3DModel",
    "ltx-2.3": "LTX2VideoTransformer3DModel",
    "anyflow": "AnyFlowTransformer3DModel",
    "wan-animate-2": "WanAnimate2Transformer3DModel",
}
"""Classes that the oldest Diffusers does not have."""


def is_missing(name):
    """Return whether the installed Diffusers lacks a kind's class."""
    return not hasattr(diffusers, NEWER.get(name, "ModelMixin"))
