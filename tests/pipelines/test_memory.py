"""A forward pass under BLADE takes hardly more memory than without it."""

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch.profiler import ProfilerActivity, profile

from blade import BladeConfig, apply_blade
from blade.attention.config import AdaptiveConfig

MOST = 1.05
"""Peak memory under BLADE over that of plain Diffusers."""


def peak_bytes(transformer, inputs) -> int:
    """Most that PyTorch's CPU allocator held at once in a forward pass, beside what it held before."""
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        transformer(**inputs)
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


@pytest.mark.parametrize("pooled_tokens", ["none", "all"])
def test_peak_memory_at_8192_tokens(pooled_tokens):
    torch.manual_seed(0)
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=4,
        attention_head_dim=64,
        in_channels=16,
        out_channels=16,
        text_dim=64,
        freq_dim=64,
        ffn_dim=1024,
        num_layers=2,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
    ).eval()
    inputs = {
        "hidden_states": torch.randn(1, 16, 8, 64, 64),  # 8 x 32 x 32 tokens
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": torch.randn(1, 64, 64),
    }
    plain = peak_bytes(transformer, inputs)
    assert plain > 8 * 32 * 32 * 256 * 4  # the tokens themselves at the least
    details = AdaptiveConfig(block_size=128)
    apply_blade(
        transformer,
        BladeConfig(sparsity=0.8, dense_steps=0, dense_layers=(), pooled_tokens=pooled_tokens, asa=details),
    )
    sparse = peak_bytes(transformer, inputs)
    print(f"peak memory at 8,192 tokens: plain {plain / 2**20:.1f} MiB, BLADE {sparse / 2**20:.1f} MiB")
    assert sparse <= MOST * plain
