"""A selector of one's own, beside two of the project's: key blocks by the angle between the means of blocks."""

import sys
from dataclasses import replace

import torch
from diffusers import WanPipeline
from torch import Tensor
from torch.nn.functional import normalize, pad

from blade import BladeConfig, use_blade
from blade.attention.selectors import Selector, SelectorContext, register_selector
from blade.metrics.similarity import psnr
from blade.models.source import bundled_model_path

# For a real model: its Hub id, its preset, such as "wan2.1-t2v-1.3b", and its own settings.
MODEL, PRESET = str(bundled_model_path()), "shapes"
SETTINGS = {"prompt": "a red ball moving right", "height": 96, "width": 96, "num_frames": 33, "num_inference_steps": 8}


def score(query: Tensor, key: Tensor, context: SelectorContext, drawn: Tensor, key_lengths: Tensor | None) -> Tensor:
    """Return (B, H, blocks, blocks) in [0, 2]: 1 + the cosine of the angle."""
    padding = (0, 0, 0, 0, 0, context.blocks * context.options.block_size - query.shape[1])
    blocks = [pad(tokens.float(), padding).unflatten(1, (context.blocks, -1)) for tokens in (query, key)]
    return 1 + torch.einsum("bqhd,bkhd->bhqk", *(normalize(block.mean(2), dim=-1) for block in blocks))


def main(model: str = MODEL) -> None:
    """Print how near each selector's video is to that of dense attention."""
    register_selector(Selector(name="cosine", description="the angle between the means of blocks", score=score))
    pipe, preset = WanPipeline.from_pretrained(model), BladeConfig.from_preset(PRESET)
    dense = pipe(**SETTINGS, generator=torch.manual_seed(0), output_type="pt").frames[0]
    for selector in ("cosine", "sampled", "random"):
        with use_blade(pipe, preset, asa=replace(preset.asa, selector=selector)):
            video = pipe(**SETTINGS, generator=torch.manual_seed(0), output_type="pt").frames[0]
        print(f"{selector:10} PSNR to dense {psnr(video, dense):.1f} dB")


if __name__ == "__main__":
    main(*sys.argv[1:])
