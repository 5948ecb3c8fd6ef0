"""Training of the shapes model: resumes exactly, and trains on what `WanPipeline` will compute."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import WanPipeline
from diffusers.models.transformers.transformer_wan import WanAttnProcessor

from blade.common.files import OutputError
from blade.moving_shapes.captions import HELD_OUT, parse_caption
from blade.moving_shapes.training import conditioned, decoder, latents, shapes_model, transformer, vae
from blade.moving_shapes.training.components import build_tokenizer
from blade.moving_shapes.training.muon import orthogonalise
from blade.moving_shapes.training.padding import TEXT_LENGTH

VAE = vae.VAETraining(
    steps=4,
    full_size_steps=1,
    batch_size=1,
    frames=5,
    size=56,
    full_frames=9,
    full_size=64,
    checkpoint_every=2,
    log_every=1,
)
DECODER = decoder.DecoderTraining(**dataclasses.asdict(VAE))
STAGES = ("vae", "decoder", "transformer")
TRANSFORMER = transformer.TransformerTraining(
    phases=(
        transformer.Phase(steps=2, batch_size=2, frames=5, size=56, videos=3, first_videos=2),
        transformer.Phase(steps=2, batch_size=1, frames=9, size=64, videos=2, first_videos=1),
    ),
    checkpoint_every=1,
    log_every=1,
    score_every=0,
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes")
    shapes_model.train_shapes_model(
        folder / "run", folder / "model", vae=VAE, decoder=DECODER, transformer=TRANSFORMER
    )
    return folder


@pytest.mark.slow
def test_finished_folder_is_an_ordinary_pipeline(finished):
    pipe = WanPipeline.from_pretrained(finished / "model")
    video = pipe("a red ball moving right", height=32, width=32, num_frames=5, num_inference_steps=2, output_type="pt")
    assert video.frames.shape == (1, 5, 3, 32, 32)
    assert video.frames.isfinite().all()
    assert (finished / "model" / "README.md").exists()


@pytest.mark.slow
def test_log_has_every_step_once_and_in_order(finished):
    records = [json.loads(line) for line in (finished / "model" / "training_log.jsonl").read_text().splitlines()]
    assert [(r["stage"], r["step"]) for r in records] == [(s, n) for s in STAGES for n in (1, 2, 3, 4)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "function"), [(vae, "_losses"), (decoder, "_losses"), (transformer, "flow_matching_loss")]
)
def test_killed_run_resumes_to_the_same_weights(finished, tmp_path, monkeypatch, module, function):
    original, calls = getattr(module, function), []

    def dies_at_fourth_call(*args, **kwargs):
        calls.append(None)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(module, function, dies_at_fourth_call)
    train = lambda: shapes_model.train_shapes_model(  # noqa: E731
        tmp_path / "run", tmp_path / "model", vae=VAE, decoder=DECODER, transformer=TRANSFORMER
    )
    with pytest.raises(KeyboardInterrupt):
        train()
    assert not (tmp_path / "model").exists()
    train()
    for part in ("vae", "transformer"):
        name = f"{part}/diffusion_pytorch_model.safetensors"
        assert (tmp_path / "model" / name).read_bytes() == (finished / "model" / name).read_bytes()
    assert _steps(tmp_path / "model") == _steps(finished / "model")


@pytest.mark.slow
def test_training_goes_on_from_a_finished_model(finished, tmp_path):
    """With the same VAE, at the next step, and again after a kill."""
    longer = dataclasses.replace(TRANSFORMER, phases=(*TRANSFORMER.phases, TRANSFORMER.phases[1]))
    for name in ("first", "second"):
        shapes_model.train_shapes_model(
            tmp_path / "run", tmp_path / name, transformer=longer, start_from=finished / "model"
        )
    files = {
        part: [
            folder / part / "diffusion_pytorch_model.safetensors"
            for folder in (finished / "model", tmp_path / "first", tmp_path / "second")
        ]
        for part in ("vae", "transformer")
    }
    vae_before, *vae_after = (path.read_bytes() for path in files["vae"])
    before, first, second = (path.read_bytes() for path in files["transformer"])
    assert vae_after == [vae_before] * 2
    assert before != first == second
    assert [(stage, step) for stage, step, _ in _steps(tmp_path / "first")] == [
        *((stage, step) for stage in ("vae", "decoder") for step in range(1, 5)),
        *(("transformer", step) for step in range(1, 7)),
    ]
    with pytest.raises(ValueError, match="`steps` must be more than the 4 that the model has been trained for, got 4"):
        shapes_model.train_shapes_model(
            tmp_path / "other", tmp_path / "no", transformer=TRANSFORMER, start_from=finished / "model"
        )
    assert not (tmp_path / "no").exists()


@pytest.mark.slow
def test_a_wider_decoder_takes_the_place_of_the_narrow_one_on_the_same_latents(finished, tmp_path):
    narrow = vae.train_vae(tmp_path / "run", VAE)
    wide = decoder.train_decoder(tmp_path / "run", narrow, DECODER)
    assert decoder.needs_wider_decoder(narrow) and not decoder.needs_wider_decoder(wide)
    video = vae.video_batch(np.random.default_rng(0), batch_size=1, frames=5, size=56)
    torch.testing.assert_close(wide.encode(video).latent_dist.mean, narrow.encode(video).latent_dist.mean)
    assert wide.config.latents_mean == narrow.config.latents_mean
    assert wide.decode(wide.encode(video).latent_dist.mean).sample.shape == video.shape
    saved = WanPipeline.from_pretrained(finished / "model").vae
    assert saved.dtype == torch.float32 and not decoder.needs_wider_decoder(saved)


@pytest.mark.slow
def test_the_learning_rate_of_a_phase_is_linear_and_warms_up_where_training_goes_on(finished, tmp_path, monkeypatch):
    rates = []
    original = transformer.set_learning_rate
    monkeypatch.setattr(transformer, "set_learning_rate", lambda opt, rate: (rates.append(rate), original(opt, rate)))
    phases = (*TRANSFORMER.phases, dataclasses.replace(TRANSFORMER.phases[1], steps=4, rate=(0.8, 0.0)))
    longer = dataclasses.replace(TRANSFORMER, phases=phases, warmup_steps=2)
    shapes_model.train_shapes_model(
        tmp_path / "run", tmp_path / "out", transformer=longer, start_from=finished / "model"
    )
    assert rates == pytest.approx([0.8 / 2, 0.6, 0.4, 0.2])


def test_a_small_canvas_draws_what_has_room(tmp_path):
    """On 56 pixels nothing large is fast, and the videos stay the same when a store is filled anew."""
    drawn = []
    for name in ("one", "two"):
        store = latents.LatentStore(
            tmp_path / name,
            vae.build_vae().eval(),
            capacity=8,
            frames=33,
            size=56,
            two_objects=0.5,
            striped=0.3,
            seed=0,
        )
        drawn.append([store._draw(index) for index in range(40)])
    assert drawn[0] == drawn[1]
    for caption, scene in drawn[0]:
        for described, shown in zip(caption.objects, scene.objects):
            assert (described.size, described.speed) != ("large", "fast")
            assert max(abs(side) for side in shown.velocity) * 32 < 56


def test_short_padding_equals_the_pipelines(finished):
    torch.manual_seed(0)
    model = conditioned.TextConditionedTransformer(build_tokenizer()).eval()
    for parameter in model.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    pipe = model.pipeline(vae.build_vae())
    for module in (model, pipe.text_encoder, pipe.transformer):
        module.double()
    captions = [
        "a red ball moving right",
        "",
        "a small white square moving up and a striped blue ball moving left fast",
    ]
    noisy, timestep = torch.randn(3, 32, 2, 4, 4).double(), torch.tensor([900.0, 500.0, 100.0])
    with torch.no_grad():
        text, _ = pipe.encode_prompt(captions, do_classifier_free_guidance=False, max_sequence_length=TEXT_LENGTH)
        expected = pipe.transformer(noisy, timestep, text, return_dict=False)[0]
        actual = model(noisy, timestep, conditioned.tokenise(model.tokenizer, captions))
    assert isinstance(pipe.transformer.blocks[0].attn2.processor, WanAttnProcessor)
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(actual, expected, atol=1e-6, rtol=1e-6)


def test_training_never_draws_held_out_combinations():
    drawn = set()
    for index in range(3000):
        rng = vae.numpy_rng(0, 3, 33, index)
        caption = transformer.sample_caption(rng, objects=1 + index % 2)
        assert parse_caption(str(caption)) == caption
        drawn |= {described.combination for described in caption.objects}
    assert len(drawn) == 60
    assert not drawn & HELD_OUT


def test_orthogonalise_brings_singular_values_near_one():
    matrices = torch.randn(2, 12, 40, generator=torch.Generator().manual_seed(0))
    for shape in (matrices, matrices.mT):
        values = torch.linalg.svdvals(orthogonalise(shape))
        assert values.min() > 0.6
        assert values.max() < 1.3


def _steps(model):
    lines = (model / "training_log.jsonl").read_text().splitlines()
    return [(record["stage"], record["step"], record["loss"]) for record in map(json.loads, lines)]


def test_a_store_takes_its_room_at_once(small_disk):
    """Filling it on a full disk would end in a bus error."""
    disk = small_disk(1024)
    options = {"frames": 33, "size": 64, "two_objects": 0.5, "striped": 0.3, "seed": 0}
    with pytest.raises(OutputError, match=r"^No space left: the disk of .*store\.npy is full\.$"):
        latents.LatentStore(disk / "store.npy", vae.build_vae().eval(), capacity=100_000, **options)
    assert list(disk.iterdir()) == []
    store = latents.LatentStore(disk / "store.npy", vae.build_vae().eval(), capacity=2, **options)
    assert (disk / "store.npy").stat().st_blocks * 512 >= store._latents.nbytes


def test_what_cannot_be_written_is_found_before_anything_is_trained(tmp_path, monkeypatch):
    monkeypatch.setattr(shapes_model, "train_vae", lambda *args: pytest.fail("training began first"))
    (tmp_path / "file").touch()
    for run, output in (("file/run", "out"), ("run", "file/out"), ("run", "x" * 300), ("y" * 300, "out")):
        with pytest.raises(OutputError, match="cannot be written"):
            shapes_model.train_shapes_model(tmp_path / run, tmp_path / output)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(OutputError, match="free on its disk, but the training needs about"):
        shapes_model.train_shapes_model(tmp_path / "run", tmp_path / "out")
