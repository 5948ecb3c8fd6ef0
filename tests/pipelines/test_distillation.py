"""Every family can be distilled: its conditions are found, and gradients reach the adapters under checkpointing."""

import pytest
import torch
from small_families import is_missing
from small_ltx import make_ltx2

from blade import BladeConfig
from blade.attention.apply import install_blade
from blade.attention.config import AdaptiveConfig
from blade.distillation import workflow
from blade.distillation.conditioning import PromptEmbeddings, capture, check_text_alone, encode_prompts
from blade.distillation.parallel import Processes
from blade.distillation.recipes import load_config
from blade.distillation.roles import FAKE, STUDENT, TARGETS, TEACHER, Lora, adapter_roles
from blade.families.registry import find_family
from blade.generation.request import GenerationRequest
from blade.generation.resolve import resolve_request
from blade.models.loaded import LoadedModel
from blade.models.parallel import check_splits

CONFIG = BladeConfig(
    sparsity=0.6,
    pooled_tokens="all",
    kind="student",
    asa=AdaptiveConfig(block_size=8, probe_tokens=4, pooled_window=8),
)
PIPELINES = ("WanPipeline", "CogVideoXPipeline", "HunyuanVideoPipeline", "HunyuanVideo15Pipeline")


def test_gradients_reach_the_student_and_no_other(family):
    inputs, transformer = family.inputs(batch=2), family.make()
    names = [name for name, _ in transformer.named_modules()]
    targets = TARGETS if any(name.endswith(".to_q") for name in names) else ("to_query", "to_key", "to_value")
    roles = adapter_roles(transformer, Lora(rank=2, alpha=2, targets=list(targets)), (STUDENT,))
    install_blade(transformer, CONFIG)
    if family.checkpoints:  # Diffusers' own fails otherwise
        roles.networks[STUDENT].enable_gradient_checkpointing()
    numbers = torch.zeros(2, dtype=torch.int64)
    roles.add_step_conditions(find_family(transformer), {STUDENT: 2})
    with roles.acting(STUDENT, (2, None)):
        output = roles.predict(STUDENT, inputs, numbers)
        for other in (TEACHER, FAKE):
            with torch.no_grad(), roles.acting(other):
                roles.predict(other, inputs, numbers)
        output = torch.stack(output) if isinstance(output, list) else output
        output.square().mean().backward()
    found = {name: one.grad for name, one in roles.named_parameters(STUDENT).items()}
    assert "step_condition" in next(reversed([name for name in found if "lora" not in name]))
    # what only text makes use of has no part in the last block's output
    missing = [name for name, gradient in found.items() if gradient is None]
    assert len(missing) <= len(found) // 3
    assert all(one.grad is None for one in roles.named_parameters(FAKE).values())


@pytest.mark.parametrize("name", PIPELINES)
def test_what_a_pipeline_gives_its_transformer_is_found_and_kept(small_pipelines, name, tmp_path):
    pipe = small_pipelines[name]()
    transformer = LoadedModel(pipe).transformer
    request = GenerationRequest(prompt="x", height=128, width=128, frames=13, steps=3, attention="dense")
    request = resolve_request(request, LoadedModel(pipe))
    found = capture(LoadedModel(pipe), request, "a prompt")
    assert len(found.latent_shape) == 4
    encode_prompts(LoadedModel(pipe), request, ["one", "two", "three"], tmp_path)
    rows = PromptEmbeddings(tmp_path, ["one", "two", "three"]).rows([2, 0])
    assert {key: value.shape[1:] for key, value in rows.prompts.items()} == {
        key: value.shape[1:] for key, value in found.prompts.items()
    }
    latents = torch.randn(2, *found.latent_shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        output = transformer(**rows.inputs(latents, torch.tensor([500.0, 300.0])), return_dict=False)[0]
    assert output.shape == latents.shape
    assert output.isfinite().all()


def test_a_pipeline_that_needs_an_image_is_refused(small_pipelines):
    for name in PIPELINES:
        check_text_alone(LoadedModel(small_pipelines[name]()))
    for name, needed in (("WanImageToVideoPipeline", "image"), ("CogVideoXImageToVideoPipeline", "image")):
        with pytest.raises(ValueError, match=f"from text alone, but a Small needs `{needed}`"):
            check_text_alone(LoadedModel(small_pipelines[name]()))


def test_a_model_that_cannot_be_split_is_refused_before_it_is_loaded(configurations, tmp_path, monkeypatch):
    (tmp_path / "prompts.txt").write_text("a prompt", encoding="utf-8")
    model, output = configurations("SkyReelsV2Pipeline"), tmp_path / "out"
    # several processes, as far as the check can see
    monkeypatch.setattr(workflow, "Processes", lambda state, *others: Processes(state, "fsdp"))
    monkeypatch.setattr(workflow, "load_model", lambda *args, **options: pytest.fail("it was loaded"))
    options = [f"model={model}", f"output={output}", f"prompts={tmp_path / 'prompts.txt'}", "run.sequence_parallel=2"]
    with pytest.raises(ValueError, match=r"`run\.sequence_parallel` must be 1 for a SkyReelsV2Transformer3DModel, as"):
        workflow.distill(load_config("shapes", options))


@pytest.mark.skipif(is_missing("ltx-2"), reason="the installed Diffusers lacks it")
def test_a_model_with_cut_keys_is_split_but_not_trained():
    transformer = make_ltx2()
    check_splits(transformer)
    with pytest.raises(ValueError, match=r"`run\.sequence_parallel` must be 1 for a LTX2\w+, which cannot be trained"):
        check_splits(transformer, "run.sequence_parallel", trained=True)
