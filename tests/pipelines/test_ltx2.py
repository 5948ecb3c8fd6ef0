"""LTX-2 under BLADE: perturbed and gated attention, conditions in the sequence, and audio that is left alone."""

from types import SimpleNamespace

import pytest
import torch
import transformers
from blade_pipelines.ltx2 import UNGUIDED, LTX2Family
from diffusers import FlowMatchEulerDiscreteScheduler
from PIL import Image

from blade import BladeConfig, TokenGrid, apply_blade, blade_summary, remove_blade
from blade.attention import adaptive
from blade.attention.applied import applied_to
from blade.attention.budget import BlockBudget
from blade.attention.config import AdaptiveConfig
from blade.generation.outputs import generate_files
from blade.generation.request import GenerationRequest
from blade.generation.run import run_request
from blade.models.conditions import model_for
from blade.models.loaded import LoadedModel
from blade.models.lora_layouts import ModuleNames
from blade.students.scheduler import FewStepScheduler

DETAILS = AdaptiveConfig(block_size=8, probe_tokens=4, pooled_window=4)
HALF = BladeConfig(sparsity=0.5, asa=DETAILS)
GRID = (3, 5, 7)
VIDEO = 105


def run(transformer, inputs):
    """Video and audio."""
    with torch.no_grad():
        return transformer(**inputs, return_dict=False)


@pytest.fixture
def recorded(monkeypatch):
    """The blocks that sparse layers keep, (B, H, S, S), in the order in which the layers run."""
    masks, attend = [], adaptive.block_sparse_attention

    def spy(query, key, value, mask, **options):
        masks.append(mask.keep.repeat_interleave(8, -1).repeat_interleave(8, -2))
        return attend(query, key, value, mask, **options)

    monkeypatch.setattr(adaptive, "block_sparse_attention", spy)
    return masks


def run_masked(transformer, inputs, grid, masks, monkeypatch):
    """Diffusers' own transformer with the kept blocks as masks of its video self-attention."""
    places = grid.order("gilbert", whole=True).argsort()
    waiting, dense = iter(masks), torch.nn.functional.scaled_dot_product_attention

    def masked(query, key, value, attn_mask=None, **options):
        if query.shape[-2] == key.shape[-2] == grid.sequence_length:
            assert attn_mask is None
            attn_mask = next(waiting)[..., places, :][..., places]
        return dense(query, key, value, attn_mask=attn_mask, **options)

    with monkeypatch.context() as patched:
        patched.setattr(torch.nn.functional, "scaled_dot_product_attention", masked)
        outputs = run(transformer, inputs)
    assert next(waiting, None) is None
    return outputs


def assert_equal_to_masked(transformer, inputs, masks, monkeypatch, *, grid=None, layers=3):
    """Check that a sparse pass is Diffusers' own with the kept blocks as masks, and no dense one."""
    sparse = run(apply_blade(transformer, HALF, dense_steps=0), inputs)
    assert len(masks) == layers
    remove_blade(transformer)
    expected = run_masked(transformer, inputs, grid or TokenGrid(*GRID), masks, monkeypatch)
    for output, masked, plain in zip(sparse, expected, run(transformer, inputs)):
        torch.testing.assert_close(output, masked, rtol=1e-4, atol=2e-5)
        assert (masked - plain).abs().max() > 1e-3


@pytest.mark.parametrize("version", ["2", "2.3", "2.5"])
def test_video_and_audio_are_diffusers_own_with_the_blocks_as_a_mask(
    version, make_ltx2, ltx2_inputs, recorded, monkeypatch
):
    inputs = ltx2_inputs(GRID, batch=2, projected=version != "2")
    assert_equal_to_masked(make_ltx2(version), inputs, recorded, monkeypatch)


@pytest.mark.parametrize("mask", [None, (0.0, 0.0), (0.0, 1.0), (0.25, 1.0)], ids=str)
def test_perturbed_layers_take_the_values(mask, make_ltx2, ltx2_inputs, recorded, monkeypatch):
    """Spatio-temporal guidance: a layer in which all are perturbed has no attention."""
    transformer, inputs = make_ltx2("2.3"), ltx2_inputs(GRID, batch=2, projected=True)
    plain = run(transformer, inputs)[0]
    inputs |= {"spatio_temporal_guidance_blocks": [1]}
    if mask is not None:
        inputs["perturbation_mask"] = torch.tensor(mask)
    assert (run(transformer, inputs)[0] - plain).abs().max() > 1e-2
    attends = 3 if mask is not None and any(mask) else 2
    assert_equal_to_masked(transformer, inputs, recorded, monkeypatch, layers=attends)


def test_a_layer_in_which_all_is_perturbed_is_counted_neither_sparse_nor_dense(make_ltx2, ltx2_inputs):
    transformer = apply_blade(make_ltx2("2.3"), HALF, dense_layers=[0])
    run(transformer, ltx2_inputs(projected=True) | {"spatio_temporal_guidance_blocks": [1]})
    layers = blade_summary(transformer).transformers[0].layers
    assert [(layer.sparse_calls, layer.dense_calls) for layer in layers] == [(0, 1), (0, 0), (1, 0)]


def test_dense_layers_are_perturbed_bitwise_as_without(make_ltx2, ltx2_inputs):
    transformer = make_ltx2("2.3")
    inputs = ltx2_inputs(batch=2, projected=True)
    inputs |= {"spatio_temporal_guidance_blocks": [0, 2], "perturbation_mask": torch.tensor([0.0, 1.0])}
    plain = run(transformer, inputs)
    for output, expected in zip(run(apply_blade(transformer, HALF, sparsity=0.0), inputs), plain):
        assert torch.equal(output, expected)


def test_gates_are_of_the_tokens_before_attention(make_ltx2, ltx2_inputs, recorded, monkeypatch):
    """Closed gates leave nothing of a head, and open ones twice of it."""
    transformer, inputs = make_ltx2("2.3"), ltx2_inputs(GRID, projected=True)
    gate = transformer.transformer_blocks[1].attn1.to_gate_logits
    gate.bias.data = torch.tensor([-2.0, 3.0])
    assert_equal_to_masked(transformer, inputs, recorded, monkeypatch)


def with_conditions(inputs, *, frames=2, sized=True):
    """Append frames of conditions: their tokens, coordinates, noise levels and, of the last, a mark."""
    batch, extra = len(inputs["hidden_states"]), frames * GRID[1] * GRID[2]
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randn(batch, extra, 4, generator=generator)
    times = torch.arange(GRID[0]) * 8.0
    coordinates = torch.stack(
        torch.meshgrid(times, torch.arange(GRID[1]) * 32.0, torch.arange(GRID[2]) * 32.0, indexing="ij")
    ).flatten(1)
    coordinates = torch.stack((coordinates, coordinates + torch.tensor([8.0, 32.0, 32.0])[:, None]), dim=-1)
    conditions = coordinates[:, : GRID[1] * GRID[2]].repeat(1, frames, 1)
    conditions[0, :, 0] = torch.arange(frames).repeat_interleave(GRID[1] * GRID[2]) * 3.0 + 4.0
    conditions[0, :, 1] = conditions[0, :, 0] + 1.0
    timestep = torch.full((batch, VIDEO + extra), 500.0)
    timestep[:, VIDEO:] = 100.0
    timestep[:, : GRID[1] * GRID[2]] = 0.0
    mark = torch.zeros(batch, VIDEO + extra, 1)
    mark[:, : GRID[1] * GRID[2]] = mark[:, -GRID[1] * GRID[2] :] = 1.0
    coordinates = torch.cat((coordinates, conditions), dim=1)
    coordinates[0] /= 24.0
    made = inputs | {
        "hidden_states": torch.cat((inputs["hidden_states"], tokens), dim=1),
        "timestep": timestep,
        "audio_timestep": torch.full((batch,), 500.0),
        "video_coords": coordinates.expand(batch, -1, -1, -1),
        "video_keyframes_mask": mark,
    }
    return made if sized else {**made, "num_frames": None, "height": None, "width": None}


@pytest.mark.parametrize("sized", [True, False], ids=["by its size", "by coordinates"])
def test_conditions_behind_the_video_are_kept_exactly(sized, make_ltx2, ltx2_inputs, recorded, monkeypatch):
    """With noise levels and marks of single tokens, which follow them."""
    transformer = make_ltx2("2.5")
    transformer.keyframes_abs_pos_embedding.data.normal_(generator=torch.Generator().manual_seed(3))
    inputs = with_conditions(ltx2_inputs(GRID, batch=2, projected=True), sized=sized)
    grid = TokenGrid(*GRID, text_after=70)
    assert_equal_to_masked(transformer, inputs, recorded, monkeypatch, grid=grid)
    first = -(-VIDEO // 8) * 8  # of the blocks that hold conditions alone
    for mask in recorded:
        assert mask[..., VIDEO : grid.sequence_length, : grid.sequence_length].all()
        assert mask[..., : grid.sequence_length, VIDEO : grid.sequence_length].all()
        assert not mask[..., :first, :first].all()


def test_what_belongs_to_single_tokens_matters(make_ltx2, ltx2_inputs):
    """Otherwise the test above would pass with noise levels and marks that stayed where they were."""
    transformer = make_ltx2("2.5")
    transformer.keyframes_abs_pos_embedding.data.fill_(1.0)
    inputs = with_conditions(ltx2_inputs(GRID, projected=True))
    plain = run(transformer, inputs)[0]
    for name in ("timestep", "video_keyframes_mask"):
        others = inputs | {name: inputs[name].roll(40, dims=1)}
        assert (run(transformer, others)[0] - plain).abs().max() > 1e-2


@pytest.mark.parametrize("version", ["2", "2.3", "2.5"])
@pytest.mark.parametrize("conditions", [False, True])
def test_with_every_block_kept_video_and_audio_are_dense_but_for_rounding(
    version, conditions, make_ltx2, ltx2_inputs, monkeypatch
):
    """The audio sees the video's tokens in another order, at the positions that they have."""
    monkeypatch.setattr(BlockBudget, "is_full", False)
    transformer, inputs = make_ltx2(version), ltx2_inputs(GRID, projected=version != "2")
    if conditions:
        inputs = with_conditions(inputs)
    inputs["use_cross_timestep"] = version != "2"
    sparse = run(apply_blade(transformer, HALF, sparsity=0.0), inputs)
    assert blade_summary(transformer).layer_density == 1.0
    for output, plain in zip(sparse, run(remove_blade(transformer), inputs)):
        torch.testing.assert_close(output, plain, rtol=1e-4, atol=2e-5)


def test_the_audio_depends_on_where_the_videos_tokens_are(make_ltx2, ltx2_inputs):
    """Or the test above could not fail: positions in the wrong order show in the audio."""
    transformer, inputs = make_ltx2("2.3"), ltx2_inputs(GRID, projected=True)
    plain = run(transformer, inputs)[1]
    hooks = [transformer.cross_attn_rope.register_forward_hook(lambda *args: tuple(x.flip(2) for x in args[-1]))]
    moved = run(transformer, inputs)[1]
    hooks[0].remove()
    assert (moved - plain).abs().max() > 1e-2


def test_modalities_apart(make_ltx2, ltx2_inputs, recorded, monkeypatch):
    """Modality guidance: the audio is then exactly that of dense attention, which it does not see."""
    transformer, inputs = make_ltx2("2.3"), ltx2_inputs(GRID, projected=True) | {"isolate_modalities": True}
    video, audio = run(apply_blade(transformer, HALF), inputs)
    remove_blade(transformer)
    plain_video, plain_audio = run(transformer, inputs)
    assert torch.equal(audio, plain_audio) and not torch.equal(video, plain_video)
    masked_video, _ = run_masked(transformer, inputs, TokenGrid(*GRID), recorded, monkeypatch)
    torch.testing.assert_close(video, masked_video, rtol=1e-4, atol=2e-5)


def test_only_the_videos_self_attention_gets_a_processor(make_ltx2):
    transformer = make_ltx2("2.3")
    before = {name: id(processor) for name, processor in transformer.attn_processors.items()}
    apply_blade(transformer, HALF)
    changed = [name for name, processor in transformer.attn_processors.items() if id(processor) != before[name]]
    assert changed == [f"transformer_blocks.{number}.attn1.processor" for number in range(3)]


def test_a_mask_of_single_pairs_keeps_the_pass_dense(make_ltx2, ltx2_inputs, caplog):
    """References of less than full strength: as without BLADE, said once, and refused where that is asked for."""
    transformer, inputs = make_ltx2("2.3"), with_conditions(ltx2_inputs(GRID, projected=True))
    mask = torch.ones(1, 175, 175)
    mask[:, :VIDEO, VIDEO:] = mask[:, VIDEO:, :VIDEO] = 0.9999
    inputs["video_self_attention_mask"] = mask
    plain = run(transformer, inputs)
    apply_blade(transformer, HALF)
    for _ in range(2):
        for output, expected in zip(run(transformer, inputs), plain):
            assert torch.equal(output, expected)
    assert caplog.text.count("All layers stay dense in this forward pass: `video_self_attention_mask`") == 1
    assert blade_summary(transformer).run_density == 1.0
    del inputs["video_self_attention_mask"]
    run(transformer, inputs)
    assert [layer.sparse_calls for layer in blade_summary(transformer).transformers[0].layers] == [1, 1, 1]
    apply_blade(transformer, HALF, strict=True)
    with pytest.raises(ValueError, match=r"`video_self_attention_mask`.*`strict=True`"):
        run(transformer, inputs | {"video_self_attention_mask": mask})


@pytest.mark.parametrize("changes", [{"num_frames": None}, {"width": 8}])
def test_tokens_that_no_grid_explains_are_refused(changes, make_ltx2, ltx2_inputs):
    transformer = apply_blade(make_ltx2(), HALF)
    with pytest.raises(ValueError, match="or `video_coords`, must say how 105 tokens lie, got"):
        run(transformer, ltx2_inputs(GRID) | changes)


def test_patches_of_more_than_one_latent_are_counted(make_ltx2, ltx2_inputs):
    transformer = make_ltx2(patch_size=2, patch_size_t=2)
    inputs = ltx2_inputs((2, 3, 4)) | {"num_frames": 3, "height": 6, "width": 7}
    plain = run(transformer, inputs)[0]
    sparse = run(apply_blade(transformer, HALF), inputs)[0]
    assert applied_to(transformer).grid == TokenGrid(2, 3, 4) and not torch.equal(sparse, plain)


def test_the_preset_is_found(make_ltx2):
    assert applied_to(apply_blade(make_ltx2())).config == BladeConfig.from_preset("ltx-2")


@pytest.mark.parametrize("version", ["2", "2.5"])
def test_diffusers_translates_the_names_of_lightricks_code_back(version, make_ltx2):
    """Of every module, in the keys of a LoRA."""
    from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_ltx2_lora_to_diffusers as translate

    names = ModuleNames(make_ltx2(version), LTX2Family()).originals
    assert {"patchify_proj", "audio_patchify_proj", "adaln_single.linear", "av_ca_a2v_gate_adaln_single.linear"} < set(
        names
    )
    for original, (name,) in names.items():
        assert list(translate({f"diffusion_model.{original}.lora_A.weight": None})) == [
            f"transformer.{name}.lora_A.weight"
        ]


def pipe_with(**scheduler):
    return SimpleNamespace(scheduler=FlowMatchEulerDiscreteScheduler(**scheduler))


FULL = {"use_dynamic_shifting": True, "shift_terminal": 0.1}


def test_defaults_and_arguments_of_full_and_distilled_models():
    from diffusers.pipelines.ltx2.utils import DEFAULT_NEGATIVE_PROMPT, DISTILLED_SIGMA_VALUES

    family, full, distilled = LTX2Family(), pipe_with(**FULL), pipe_with()
    values = family.sampling_defaults(full, None, None)
    assert (values.frames, values.fps, values.steps, values.guidance_scale) == (121, 24, 30, 3.0)
    assert values.negative_prompt == DEFAULT_NEGATIVE_PROMPT
    values = family.sampling_defaults(distilled, None, None)
    assert (values.frames, values.steps, values.guidance_scale, values.negative_prompt) == (121, 8, 1.0, None)
    request = SimpleNamespace(guidance_scale=3.0, steps=30)
    assert family.call_options(full, request) == {}
    assert family.call_options(full, SimpleNamespace(guidance_scale=1.0, steps=30)) == UNGUIDED
    options = family.call_options(distilled, SimpleNamespace(guidance_scale=1.0, steps=8))
    assert options == {**UNGUIDED, "sigmas": DISTILLED_SIGMA_VALUES}
    student = SimpleNamespace(scheduler=FewStepScheduler())
    assert family.call_options(student, SimpleNamespace(guidance_scale=1.0, steps=4)) == UNGUIDED
    with pytest.raises(ValueError, match="`steps` must be 8 for a distilled LTX-2 model, whose noise levels"):
        family.call_options(distilled, SimpleNamespace(guidance_scale=1.0, steps=4))


REQUEST = {"prompt": "a cat", "height": 128, "width": 128, "frames": 13, "seed": 3}


def test_without_guidance_a_step_is_one_pass(small_pipelines):
    config = BladeConfig(sparsity=0.5, dense_steps=1, asa=AdaptiveConfig(block_size=16))
    request = GenerationRequest(**REQUEST, steps=3, guidance_scale=1.0, blade_config=config)
    made = run_request(LoadedModel(small_pipelines["LTX2Pipeline"]()), request)
    layers = made.summary.transformers[0].layers
    assert [(layer.sparse_calls, layer.dense_calls) for layer in layers] == [(2, 1), (2, 1)]


def test_a_distilled_model_takes_its_noise_levels(small_pipelines):
    pipe = small_pipelines["LTX2Pipeline"]()
    pipe.scheduler = FlowMatchEulerDiscreteScheduler()
    run_request(LoadedModel(pipe), GenerationRequest(**REQUEST, steps=8, guidance_scale=1.0, attention="dense"))
    levels = LTX2Family().call_options(pipe, SimpleNamespace(guidance_scale=1.0, steps=8))["sigmas"]
    assert pipe.scheduler.sigmas.tolist() == pytest.approx([*levels, 0.0])


def test_an_image_is_taken_by_the_same_weights(small_pipelines):
    model = LoadedModel(small_pipelines["LTX2Pipeline"]())
    type(model.pipe).__name__ = "LTX2Pipeline"
    other = model_for(model, "image")
    assert type(other.pipe).__name__ == "LTX2ImageToVideoPipeline"
    assert other.pipe.transformer is model.transformer and other.pipe.vocoder is model.pipe.vocoder
    with pytest.raises(ValueError, match="`video` must not be given: this model is a LTX2Pipeline"):
        model_for(model, "video")


@pytest.fixture
def model_folder(small_pipelines, tmp_path):
    """A small LTX-2 pipeline in Diffusers' format, with a Gemma 3 of one layer and a tokenizer of three words."""
    from diffusers import LTX2Pipeline
    from tokenizers import Tokenizer, models, pre_tokenizers

    special = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>", "unk_token": "<unk>"}
    words = {word: number for number, word in enumerate([*special.values(), "a", "red", "cat"])}
    text = {
        "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 4, "vocab_size": 16, "sliding_window": 16,
    }  # fmt: skip
    vision = {
        "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
        "patch_size": 14,
    }  # fmt: skip
    rules = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    rules.pre_tokenizer = pre_tokenizers.Whitespace()
    parts = dict(small_pipelines["LTX2Pipeline"]().components)
    # the embeddings and the layer
    connectors = type(parts["connectors"]).from_config(parts["connectors"].config, text_proj_in_factor=2)
    parts |= {
        "connectors": connectors,
        "text_encoder": transformers.Gemma3ForConditionalGeneration(
            transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
        ),
        "tokenizer": transformers.PreTrainedTokenizerFast(
            tokenizer_object=rules, padding_side="left", model_max_length=1024, **special
        ),
    }
    LTX2Pipeline(**parts).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.slow
@pytest.mark.parametrize("with_image", [False, True], ids=["text", "image"])
def test_a_folder_makes_a_video_with_a_sound_track(with_image, model_folder, tmp_path):
    av = pytest.importorskip("av")
    given = {}
    if with_image:
        given["image"] = str(tmp_path / "image.png")
        Image.new("RGB", (64, 64), (200, 30, 30)).save(given["image"])
    request = GenerationRequest(
        **REQUEST | {"prompt": "a red cat"}, steps=3, model=str(model_folder), device="cpu", **given
    )
    report = generate_files(request, tmp_path / "cat.mp4")
    assert "13 frames of 128x128, 24 a second; stereo sound of 8000 Hz" in str(report)
    assert report.record["layer_density"] < 1
    with av.open(str(tmp_path / "cat.mp4")) as file:
        assert [stream.type for stream in file.streams] == ["video", "audio"]
        lengths = [float(stream.duration * stream.time_base) for stream in file.streams]
    assert lengths == pytest.approx([13 / 24] * 2, abs=1 / 25)
