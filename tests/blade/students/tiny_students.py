"""A student of a tiny model, and a run of it."""

import torch

from blade import BladeConfig
from blade.attention.config import AdaptiveConfig

PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")
CONFIG = BladeConfig(sparsity=0.5, asa=AdaptiveConfig(block_size=8, probe_tokens=4), kind="student")
TIMES = (999.0, 749.0, 499.0, 249.0)


def lora(transformer, seed=0, rank=64, scale=0.02):
    """Weights in the format that `save_lora_weights` writes: every attention's projections."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, module in transformer.named_modules():
        if name.endswith(PROJECTIONS) and isinstance(module, torch.nn.Linear):
            rows, columns = module.weight.shape
            state[f"transformer.{name}.lora_A.weight"] = torch.randn(rank, columns, generator=generator) * scale
            state[f"transformer.{name}.lora_B.weight"] = torch.randn(rows, rank, generator=generator)
    return state


def run(pipe, steps=4, guidance_scale=1.0):
    """Latents of a small video."""
    embeds = torch.randn(1, 6, 8, generator=torch.Generator().manual_seed(3))
    return pipe(
        prompt_embeds=embeds, negative_prompt_embeds=embeds, height=80, width=112, num_frames=9,
        num_inference_steps=steps, guidance_scale=guidance_scale, generator=torch.Generator().manual_seed(4),
        output_type="latent",
    ).frames  # fmt: skip
