"""The kernel of dense attention is seen as it runs, and the model is left as it was."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.attention_dispatch import AttentionBackendName, attention_backend
from torch.utils._python_dispatch import _get_current_dispatch_mode

from blade.models.dense_kernel import watch_dense_kernel
from blade.models.loaded import LoadedModel


@pytest.fixture
def model(small_pipelines):
    """A small Wan pipeline."""
    return LoadedModel(small_pipelines["WanPipeline"]())


def forward(model):
    inputs = model.example_inputs(model.latent_size(64, 64, 5))
    with torch.no_grad():
        model.transformer(**inputs)


def test_it_is_the_active_backend_and_what_pytorch_chose(model):
    with watch_dense_kernel(model) as kernel:
        assert str(kernel) == "native"  # nothing has run yet
        forward(model)
    assert str(kernel) == "native (flash)"
    layer = model.family.attention_layers(model.transformer)[0]
    assert not layer._forward_pre_hooks and not layer._forward_hooks


def test_a_backend_of_ones_own_is_named(model):
    # choosing a transformer's backend also changes Diffusers' default for all others; the context restores it
    with attention_backend(AttentionBackendName.NATIVE):
        model.transformer.set_attention_backend("_native_math")
        with watch_dense_kernel(model) as kernel:
            forward(model)
    assert str(kernel) == "_native_math"  # PyTorch's plain attention has no fused kernel


def test_a_model_without_backends_has_pytorchs(small_pipelines):
    cogvideox = LoadedModel(small_pipelines["CogVideoXPipeline"]())
    with watch_dense_kernel(cogvideox) as kernel:
        pass
    assert kernel.backend == "sdpa"


def test_nothing_stays_after_an_error(model, monkeypatch):
    layer = model.family.attention_layers(model.transformer)[0]

    def fail(*args, **kwargs):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(layer, "forward", fail)
    with pytest.raises(RuntimeError, match="out of memory"), watch_dense_kernel(model):
        forward(model)
    assert _get_current_dispatch_mode() is None
    assert not layer._forward_pre_hooks and not layer._forward_hooks
