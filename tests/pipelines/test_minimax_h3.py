"""MiniMax-H3 under BLADE: rows of text, conditions and sound, steps at several noise levels, videos with sound."""

import json
import re
from dataclasses import replace

import av
import numpy as np
import pytest
import torch
from PIL import Image

from blade import BladeConfig, PatternTable, apply_blade, blade_summary, remove_blade
from blade.attention.applied import applied_to
from blade.attention.budget import BlockBudget
from blade.attention.config import AdaptiveConfig
from blade.attention.patterns import HeadPattern
from blade.benchmarks.generation import GenerationBenchmark, run_generation_benchmark
from blade.distillation.conditioning import check_text_alone
from blade.families.registry import find_family
from blade.generation.outputs import generate_files
from blade.generation.request import GenerationRequest
from blade.generation.resolve import resolve_request
from blade.generation.run import run_request
from blade.models.acceleration import place
from blade.models.loaded import LoadedModel
from blade.models.loading import load_empty_model, load_model
from blade.models.source import ModelError
from blade.profiling.recording import saved_passes
from blade.token_grid import TokenGrid

GRID = (4, 6, 8)
VIDEO = 192
DETAILS = AdaptiveConfig(block_size=8, probe_tokens=4, pooled_window=4)
SPARSE = BladeConfig(sparsity=0.8, asa=DETAILS)
METHODS = {
    "none": SPARSE,
    "all": replace(SPARSE, pooled_tokens="all"),
    "dropped": replace(SPARSE, pooled_tokens="dropped"),
    "8 bits": replace(SPARSE, pooled_tokens="dropped", precision="int8"),
    "patterns": BladeConfig(
        attention="patterns",
        asa=DETAILS,
        patterns=PatternTable(
            patterns=(
                HeadPattern(kind="diagonal", frames=0.5),
                HeadPattern(kind="diagonal", frames=0.5, order="token-major"),
            ),
            assignment=np.array([[[0, 1]] * 3]),
            block_size=8,
        ),
    ),
}
"""At 0.8, and patterns of about as much."""


def run(transformer, inputs):
    with torch.no_grad():
        return transformer(**inputs)


@pytest.fixture(params=["text", "first and last", "references"])
def inputs(request, minimax_h3_inputs, minimax_h3_references):
    """Inputs of every task."""
    if request.param == "references":
        return minimax_h3_references(GRID)
    return minimax_h3_inputs(GRID, keyframes=("first", "last") if "first" in request.param else ())


@pytest.mark.parametrize("method", METHODS)
def test_rows_that_are_no_video_are_dense_in_every_layer(make_minimax_h3, inputs, method):
    """Given the same inputs, text, conditions and sound come out as Diffusers' processor has them, to rounding."""
    transformer = apply_blade(make_minimax_h3(), METHODS[method], dense_steps=0)
    calls = []
    for attention in applied_to(transformer).attentions:
        attention.register_forward_hook(lambda module, args, output: calls.append((module, args, output)))
    run(transformer, inputs)
    assert len(calls) == 3
    for layer, (attention, args, output) in zip(applied_to(transformer).layers, calls):
        assert layer.sparse and layer.tally[0] < 0.9  # a third of these rows is no video
        exact = run_dense(attention, args)
        torch.testing.assert_close(output[:, VIDEO:], exact[:, VIDEO:])
        assert (output - exact)[:, :VIDEO].abs().max() > 1e-3


def run_dense(attention, args):
    with torch.no_grad():
        return attention.processor.previous(attention, *args)


def test_video_and_sound_stay_in_their_own_order(make_minimax_h3, inputs, monkeypatch):
    """With every block kept, both outputs are the plain model's."""
    monkeypatch.setattr(BlockBudget, "is_full", False)
    transformer = make_minimax_h3()
    plain = run(transformer, inputs)
    kept = run(apply_blade(transformer, BladeConfig(sparsity=0.0, asa=DETAILS), dense_steps=0), inputs)
    torch.testing.assert_close(kept.sample, plain.sample, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(kept.audio_sample, plain.audio_sample, rtol=1e-4, atol=1e-5)
    assert blade_summary(transformer).transformers[0].layers[0].sparse_calls == 1
    for output in (plain.sample, plain.audio_sample):  # an order would show
        assert (output - output.roll(1, 1)).abs().max() > 1e-2


def test_the_grid_is_that_of_the_video_that_is_made(make_minimax_h3, inputs):
    transformer = make_minimax_h3()
    grid = find_family(transformer).token_grid(transformer, inputs)
    others = len(inputs["position_ids"]) - VIDEO
    assert grid == TokenGrid(*GRID, text_after=others, dense_text=True)


@pytest.mark.parametrize("keyframes", [("first",), ("last",), ("first", "last")])
def test_conditions_are_told_apart_when_all_timesteps_are_the_same(make_minimax_h3, minimax_h3_inputs, keyframes):
    transformer, inputs = make_minimax_h3(), minimax_h3_inputs((1, 3, 5), timestep=0.9995, keyframes=keyframes)
    inputs["timestep_indices"] = torch.zeros_like(inputs["timestep_indices"])
    assert find_family(transformer).token_grid(transformer, inputs).video_tokens == 15


def test_conditions_beside_the_video_are_told_apart_by_their_timestep(make_minimax_h3, minimax_h3_inputs):
    transformer, inputs = make_minimax_h3(), minimax_h3_inputs((4, 3, 5))
    condition = inputs["video_indices"][:30]  # its first two frames
    inputs["timestep_indices"][condition] = len(inputs["timestep"])
    inputs["timestep"] = torch.cat((inputs["timestep"], torch.tensor([0.999])))
    assert find_family(transformer).token_grid(transformer, inputs).frames == 2


@pytest.mark.parametrize("change", ["shuffled", "short", "backwards"])
def test_rows_on_no_grid_are_refused(make_minimax_h3, minimax_h3_inputs, change):
    transformer, inputs = apply_blade(make_minimax_h3(), SPARSE, dense_steps=0), minimax_h3_inputs()
    positions, video = inputs["position_ids"], inputs["video_indices"]
    if change == "shuffled":
        positions[video] = positions[video[torch.randperm(len(video), generator=torch.Generator().manual_seed(0))]]
    elif change == "short":
        inputs["video_indices"] = video[3:]
        inputs["hidden_states"] = inputs["hidden_states"][:, 3:]
    else:
        positions[video, 0] = positions[video, 0].flip(0)
    with pytest.raises(ValueError, match=r"`position_ids` of the 10[25] rows of the video that is made.* on a grid"):
        run(transformer, inputs)


def test_masks_are_refused(make_minimax_h3):
    transformer = apply_blade(make_minimax_h3(), SPARSE, dense_steps=0)
    attention = transformer.transformer_blocks[0].attn
    attention.processor.layer.sparse = True
    with pytest.raises(ValueError, match="takes no `attention_mask`"):
        attention(torch.zeros(1, 4, 24), attention_mask=torch.ones(1, 1, 4, 4))


def test_steps_are_counted_by_the_noise_of_the_video(make_minimax_h3, minimax_h3_inputs):
    """Timesteps rise, and those of conditions stay at 0.999."""
    transformer = apply_blade(make_minimax_h3(), SPARSE, dense_steps=2)
    for _ in range(2):
        for timestep in (0.0, 0.1, 0.3, 0.7):
            run(transformer, minimax_h3_inputs(GRID, timestep=timestep, keyframes=("first",)))
    layer = blade_summary(transformer).transformers[0].layers[0]
    assert (layer.dense_calls, layer.sparse_calls) == (4, 4)


def test_names_are_those_of_the_authors(make_minimax_h3):
    """As Diffusers' conversion script has them; a fused projection's parts share one."""
    names = {}
    transformer = make_minimax_h3()
    for name, module in transformer.named_modules():
        if hasattr(module, "weight"):
            original = name
            for pattern, replacement in find_family(transformer).original_names:
                original = re.sub(pattern, replacement, original)
            names.setdefault(original, []).append(name)
    assert names["blocks.0.attn.qkv_proj"] == [f"transformer_blocks.0.attn.to_{part}" for part in "qkv"]
    expected = {
        "video_patch_proj", "audio_patch_proj", "condition_proj", "time_embedder.proj_in", "time_embedder.proj_out",
        "token_refiner.final_norm", "final_layer.norm", "final_layer.adaln_proj.linear", "final_layer.video_out",
        "final_layer.audio_out", "blocks.2.norm1", "blocks.2.attn.q_norm", "blocks.2.attn.k_norm",
        "blocks.2.attn.out_proj", "blocks.2.mlp.fc2", "blocks.2.adaln_proj.linear",
        "token_refiner.blocks.0.attn.qkv_proj", "token_refiner.blocks.0.mlp.fc2",
    }  # fmt: skip
    assert expected <= set(names)


REQUEST = GenerationRequest(
    prompt="a cat that purrs",
    model="tiny/minimax-h3",
    steps=4,
    height=128,
    width=128,
    blade_config=BladeConfig(sparsity=0.5, dense_steps=1, asa=AdaptiveConfig(block_size=32)),
)
"""At 37 x 4 x 4 tokens, in three evaluations."""


@pytest.fixture
def pipe(make_minimax_h3_pipeline):
    return make_minimax_h3_pipeline()


def test_a_video_with_sound_is_made(pipe, tmp_path):
    model = LoadedModel(pipe)
    resolved = resolve_request(REQUEST, model)
    assert (resolved.frames, resolved.fps, resolved.guidance_scale) == (124, 24, 1.0)
    made = run_request(model, resolved)
    assert made.video.shape == (124, 3, 128, 128) and made.video.isfinite().all()
    assert made.sound.samples.shape == (2, 207 * 200) and made.sound.rate == 8000
    for layer in made.summary.transformers[0].layers:
        assert (layer.dense_calls, layer.sparse_calls) == (1, 2)
    assert made.layer_density < 0.75  # text and sound alone are 0.69
    again = run_request(model, resolved)
    assert torch.equal(again.video, made.video) and torch.equal(again.sound.samples, made.sound.samples)
    dense = run_request(model, resolved.dense())
    assert not torch.equal(dense.video, made.video)
    assert "step" not in vars(pipe.scheduler)


def test_first_and_last_frames_are_taken(pipe, tmp_path):
    Image.effect_mandelbrot((96, 128), (-2, -1.5, 1, 1.5), 50).convert("RGB").save(tmp_path / "image.png")
    image = str(tmp_path / "image.png")
    model, seen = LoadedModel(pipe), []
    pipe.transformer.register_forward_pre_hook(
        lambda module, args, inputs: seen.append(inputs["hidden_states"].shape[1]), with_kwargs=True
    )
    alone = run_request(model, resolve_request(REQUEST, model)).video
    first = run_request(model, resolve_request(replace(REQUEST, image=image), model)).video
    both = run_request(model, resolve_request(replace(REQUEST, image=image, last_image=image), model)).video
    assert [seen[0], seen[3], seen[6]] == [592, 592 + 16, 592 + 32]
    assert not torch.equal(alone, first) and not torch.equal(first, both)


def test_references_are_made_sparse_too(pipe):
    """In Python: the command line takes no references."""
    from diffusers.modular_pipelines.minimax_h3 import MiniMaxH3AudioReference, MiniMaxH3ImageReference

    pipe.update_components(transformer_ref=pipe.transformer, reference_image_short_edge=64)
    apply_blade(pipe, REQUEST.blade_config, dense_steps=1)
    references = [
        MiniMaxH3ImageReference(image=Image.new("RGB", (64, 64), "red")),
        MiniMaxH3AudioReference(audio=torch.zeros(2, 8000), sample_rate=8000),
    ]
    made = pipe(
        prompt="a cat", references=references, height=128, width=128, num_frames=124, num_inference_steps=4,
        output_type="pt", output=["videos", "audio"],
    )  # fmt: skip
    assert made["videos"].shape == (1, 124, 3, 128, 128) and made["audio"].shape == (1, 2, 41_400)
    layer = blade_summary(pipe).transformers[0].layers[0]
    assert (layer.dense_calls, layer.sparse_calls) == (1, 2)


@pytest.mark.parametrize("offload", ["model", "sequential", "group"])
def test_offloaded_parts_make_the_same_video(make_minimax_h3_pipeline, offload):
    """On the CPU, to which parts are brought as they would be to another device."""
    made = []
    for kind in ("none", offload):
        model = LoadedModel(make_minimax_h3_pipeline())
        place(model, torch.device("cpu"), kind)
        assert model.device.type == "cpu"
        made.append(run_request(model, resolve_request(REQUEST, model)))
    assert torch.equal(made[0].video, made[1].video) and torch.equal(made[0].sound.samples, made[1].sound.samples)
    assert made[1].summary.transformers[0].layers[0].sparse_calls == 2


def test_distillation_is_refused(pipe):
    with pytest.raises(ValueError, match="a MiniMaxH3ModularPipeline makes sound beside it, which cannot be dist"):
        check_text_alone(LoadedModel(pipe))


def test_a_recorded_run_resumes_with_both_outputs(pipe, tmp_path):
    def made():
        torch.manual_seed(0)
        outputs = ["latents", "audio_latents"]
        return pipe(prompt="a cat", height=128, width=128, num_inference_steps=3, output=outputs)

    with saved_passes(pipe.transformer, tmp_path):
        first = made()
    (tmp_path / "pass-00001.safetensors").unlink()
    with saved_passes(pipe.transformer, tmp_path):
        again = made()
    assert len(list(tmp_path.iterdir())) == 2
    for name, plain in made().items():
        assert torch.equal(first[name], plain) and torch.equal(again[name], plain)
    with saved_passes(pipe.transformer, tmp_path), pytest.raises(ValueError, match="`return_dict` must be False"):
        pipe.transformer(**find_family(pipe.transformer).example_inputs(pipe.transformer, (37, 8, 8)))


def test_removal_from_a_pipeline_is_exact(pipe):
    def latents():
        torch.manual_seed(0)
        return pipe(prompt="a cat", height=128, width=128, num_inference_steps=3, output="latents")

    plain = latents()
    assert not torch.equal(apply_blade(pipe, sparsity=0.5, dense_steps=0) and latents(), plain)
    assert torch.equal(remove_blade(pipe) and latents(), plain)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"frames": 81}, "`frames` must be 17n [+] 5, of 5 to 15 seconds.*got 81; the nearest is 124"),
        ({"frames": 130}, "got 130; the nearest is 124 or 141"),
        ({"frames": 362}, "got 362; the nearest is 345"),
        ({"height": 144}, "`height` must be a multiple of 32"),
        ({"guidance_scale": 5.0}, "`guidance_scale` must not be given: a MiniMaxH3ModularPipeline does not take it"),
        ({"negative_prompt": "blur"}, "`negative_prompt` must not be given"),
    ],
)
def test_what_the_pipeline_cannot_make_is_refused(pipe, changes, message):
    with pytest.raises(ValueError, match=message):
        resolve_request(replace(REQUEST, **changes), LoadedModel(pipe))


@pytest.fixture
def folder(make_minimax_h3_pipeline, tmp_path, monkeypatch):
    """A small pipeline in a folder. Its processor is read by Transformers, but for video, which needs torchvision."""
    import transformers

    pipe = make_minimax_h3_pipeline()
    pipe.save_pretrained(str(tmp_path / "model"), overwrite_modular_index=True)
    index = tmp_path / "model" / "modular_model_index.json"
    values = json.loads(index.read_text())
    values["processor"][:2] = values["processor"][2]["type_hint"] = ["transformers", "Qwen3VLProcessor"]
    values["processor"][2] = {**values["processor"][2], "type_hint": ["transformers", "Qwen3VLProcessor"]}
    index.write_text(json.dumps(values))
    monkeypatch.setattr(
        transformers.Qwen3VLProcessor, "from_pretrained", classmethod(lambda cls, *_, **__: pipe.processor)
    )
    return tmp_path / "model"


def test_the_mp4_of_a_folders_model_has_its_sound(folder, tmp_path):
    report = generate_files(replace(REQUEST, model=str(folder), device="cpu"), tmp_path / "cat.mp4")
    with av.open(str(report.video_path)) as container:
        assert container.streams.video[0].frames == 124
        sound = container.streams.audio[0]
        assert sound.codec_context.channels == 2
        assert float(sound.duration * sound.time_base) == pytest.approx(124 / 24, abs=0.2)
    assert report.record["frames"] == 124 and report.record["sound"]["rate"] == 8000
    assert "stereo sound" in str(report)


def test_a_folder_is_loaded_without_what_its_tasks_do_not_need(folder):
    model = load_model(folder, dtype=torch.bfloat16)
    assert model.pipe.transformer_ref is None and type(model.pipe).__name__ == "MiniMaxH3ModularPipeline"
    dtypes = {name: getattr(model.pipe, name).dtype for name in ("transformer", "text_encoder", "vae", "audio_vae")}
    assert dtypes == {
        "transformer": torch.bfloat16, "text_encoder": torch.bfloat16, "vae": torch.float32,
        "audio_vae": torch.float32,
    }  # fmt: skip
    assert model.pipe.scheduler.shift == 12.0 and model.pipe.audio_scheduler.shift == 3.0
    assert {"prompt", "image", "last_image", "num_frames"} <= set(model.parameters)
    assert not {"references", "guidance_scale", "negative_prompt"} & set(model.parameters)
    empty = load_empty_model(folder)
    assert empty.transformer.device.type == "meta" and empty.latent_size(128, 128, 141) == (42, 8, 8)


def test_random_weights_are_measured(folder):
    """Text, sound and positions are those of the request; the schedule's last point is no pass."""
    settings = GenerationBenchmark(
        model=str(folder), random_weights=True, height=128, width=128, sparsity=0.5, steps=3, student_steps=(2,),
        repeats=1, measured_passes=1, device="cpu",
    )  # fmt: skip
    report = run_generation_benchmark(settings)
    assert report["tokens"] == 592 + 256 + 414
    assert [(run["run"], run["passes"]) for run in report["runs"]] == [
        ("dense, guidance", 2), ("sparse, guidance", 2), ("sparse", 1),
    ]  # fmt: skip
    assert report["parts_ms"]["token permutation"] > 0


def test_an_index_of_a_pipeline_that_diffusers_lacks_gives_way(folder):
    """As in the published repository, which has both."""
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "MiniMaxH3Pipeline"}))
    assert load_empty_model(folder).preset_name == "minimax-h3"


HOSTILE = {
    "a class of its own": (lambda index: index.update(_class_name="Evil"), "names 'Evil' as its pipeline"),
    "an ordinary class": (
        lambda index: index.update(_class_name="WanPipeline"),
        "must be one of .* modular pipelines",
    ),
    "the base class": (lambda index: index.update(_class_name="ModularPipeline"), "'ModularPipeline' as its pipeline"),
    "a component's library": (
        lambda index: index["vae"].__setitem__(0, "os"),
        "names 'os' .* nothing else is imported",
    ),
    "a component elsewhere": (lambda index: index["vae"][2].update(subfolder="../vae"), r"got '../vae'; parts from"),
    "a component without a place": (lambda index: index.update(vae=["diffusers", "X"]), "library, class and place"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_indices_are_refused(folder, name):
    change, message = HOSTILE[name]
    path = folder / "modular_model_index.json"
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))
    for load in (load_model, load_empty_model):
        with pytest.raises(ModelError, match=message):
            load(folder)


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("transformer/model.py", "Python code for one of its parts, transformer/model.py"),
        ("None.py", "Python code, None.py"),
    ],
)
def test_code_is_refused(folder, file, message):
    (folder / file).write_text("raise SystemExit")
    for load in (load_model, load_empty_model):
        with pytest.raises(ModelError, match=message):
            load(folder)


def test_blocks_of_a_folders_own_are_never_loaded(folder):
    """Diffusers would import them where `trust_remote_code` is given, and ask otherwise."""
    (folder / "config.json").write_text(json.dumps({"auto_map": {"ModularPipelineBlocks": "block.Block"}}))
    (folder / "block.py").write_text("raise SystemExit")
    assert type(load_model(folder).pipe.blocks).__name__ == "MiniMaxH3Blocks"


def test_pickled_weights_are_refused(folder):
    weights = folder / "vae" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(ModelError, match=r"vae/diffusion_pytorch_model.bin, a pickle"):
        load_model(folder)
