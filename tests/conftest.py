"""Fixtures that more than one part of the suite uses."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before a kernel is imported: on the CPU they are interpreted


@pytest.fixture
def make_wan():
    """Return a function that makes a tiny `WanTransformer3DModel` with random weights.

    Its attention is peaked: the norms of queries and keys are scaled up, so that it matters which token attends to
    which, and where they are.
    """
    from diffusers import WanTransformer3DModel

    def make(layers=3, heads=2, seed=0, peak=4.0, **config):
        torch.manual_seed(seed)
        transformer = WanTransformer3DModel(
            **{
                "patch_size": (1, 2, 2),
                "num_attention_heads": heads,
                "attention_head_dim": 16,
                "in_channels": 4,
                "out_channels": 4,
                "text_dim": 8,
                "freq_dim": 16,
                "ffn_dim": 24,
                "num_layers": layers,
                "rope_max_seq_len": 32,
                **config,
            }
        ).eval()
        for block in transformer.blocks:
            for norm in (block.attn1.norm_q, block.attn1.norm_k):
                norm.weight.data.mul_(peak)
        return transformer

    return make


@pytest.fixture
def wan_inputs():
    """Return a function that makes the inputs of a tiny Wan transformer for a grid of tokens."""

    def make(grid=(3, 5, 7), batch=1, seed=0, timestep=500.0, channels=4):
        generator = torch.Generator().manual_seed(seed)
        frames, height, width = grid
        return {
            "hidden_states": torch.randn(batch, channels, frames, 2 * height, 2 * width, generator=generator),
            "timestep": torch.full((batch,), timestep),
            "encoder_hidden_states": torch.randn(batch, 6, 8, generator=generator),
        }

    return make
