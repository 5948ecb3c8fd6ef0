"""Training for a given time: the schedule follows the clock, runs resume, and the model is an ordinary pipeline."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import WanPipeline
from torch.utils._python_dispatch import TorchDispatchMode

from blade.generation.fingerprint import model_fingerprint
from blade.models.loading import load_model
from blade.models.source import ModelError
from blade.moving_shapes.training import timed
from blade.moving_shapes.training.components import (
    DECODER_WIDTHS,
    LARGER_SIZE,
    TransformerSize,
    build_pipeline,
    build_text_encoder,
    build_tokenizer,
    build_transformer,
    build_vae,
)
from blade.moving_shapes.training.latent_pool import LatentPool
from blade.moving_shapes.training.shapes_model import train_shapes_model, write_card

TINY = TransformerSize(layers=2, heads=1, ffn_dim=64)
CONFIG = timed.TimedTraining(
    minutes=1.0,
    reserve_seconds=10.0,
    size=TINY,
    batch_size=2,
    frames=5,
    canvas=56,
    capacity=8,
    first_videos=4,
    warmup_steps=1,
    log_seconds=0.0,
    seed=1,
)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder of random weights, whose log says that it was trained for 7 steps."""
    folder = tmp_path_factory.mktemp("start")
    torch.manual_seed(0)
    pipe = build_pipeline(build_vae(DECODER_WIDTHS[1]), build_text_encoder(), build_transformer(TINY))
    pipe.save_pretrained(folder)
    (folder / "training_log.jsonl").write_text(json.dumps({"stage": "transformer", "step": 7, "loss": 1.0}) + "\n")
    return folder


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that pass from one look at the clock to the next."""
    tick, now = [1.0], [0.0]

    def look() -> float:
        now[0] += tick[0]
        return now[0]

    monkeypatch.setattr(timed, "monotonic", look)
    return tick


@pytest.fixture
def rates(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Learning rates of the steps, as shares of the whole one."""
    seen: list[float] = []
    original = timed.set_learning_rate
    monkeypatch.setattr(timed, "set_learning_rate", lambda opt, rate: (seen.append(rate), original(opt, rate)))
    return seen


def train(run: Path, start: Path, config: timed.TimedTraining = CONFIG) -> timed.TextConditionedTransformer:
    pipe = WanPipeline.from_pretrained(start)
    return timed.train_in_time(run, pipe.vae.eval().requires_grad_(False), config, CPU, (pipe, 7), timed.monotonic())


def records(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def test_the_rate_is_steady_and_then_falls_to_nothing_as_the_time_ends() -> None:
    assert [timed.timed_rate(share, 0.2) for share in (0.0, 0.2, 0.6, 1.0, 1.1)] == pytest.approx([1, 1, 0.5, 0, 0])
    assert dataclasses.replace(CONFIG, minutes=5).seconds == 290
    assert dataclasses.replace(CONFIG, minutes=0.5).seconds == 27
    with pytest.raises(ValueError, match="`minutes` must be more than 0, got 0"):
        dataclasses.replace(CONFIG, minutes=0)


@pytest.mark.parametrize("seconds", [3.0, 6.0])
def test_the_rate_ends_near_nothing_at_any_speed(
    start: Path, tmp_path: Path, clock: list[float], rates: list[float], seconds: float
) -> None:
    clock[0] = seconds
    train(tmp_path, start, dataclasses.replace(CONFIG, steady=0.5))
    assert len(rates) == pytest.approx(CONFIG.seconds / seconds - 5, abs=1)
    assert rates[0] == 1.0 and rates == sorted(rates, reverse=True)
    assert 0 < rates[-1] <= 2 * seconds / (0.5 * CONFIG.seconds) + 1e-9  # the last step ends in time
    assert [record["step"] for record in records(tmp_path)][-1] == 7 + len(rates)


def test_a_killed_run_goes_on_at_its_step_and_time(
    start: Path, tmp_path: Path, clock: list[float], rates: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock[0] = 3.0
    original, calls = timed.velocity_loss, []

    def dies_at_fifth_call(*args: object) -> torch.Tensor:
        calls.append(None)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(timed, "velocity_loss", dies_at_fifth_call)
    config = dataclasses.replace(CONFIG, checkpoint_seconds=0.0)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, start, config)
    state = torch.load(tmp_path / timed.CHECKPOINT)
    assert state["step"] == 7 + 4 and state["elapsed"] >= 4 * 3.0 and state["drawn"] >= 4
    before = len(rates)
    model = train(tmp_path, start, config)
    after = len(rates) - before
    assert [record["step"] for record in records(tmp_path)] == list(range(8, 7 + 4 + after + 1))
    assert after <= (CONFIG.seconds - state["elapsed"]) / 3.0  # the time before counts
    assert rates[before] < rates[0] and rates[-1] < 0.2
    ended = torch.load(tmp_path / timed.CHECKPOINT)
    assert ended["step"] == 7 + 4 + after and ended["drawn"] > state["drawn"]
    again = train(tmp_path, start, config)
    assert len(rates) == before + after
    for weight, same in zip(model.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(weight, same)
    with pytest.raises(ValueError, match=r"`size` must be that of the checkpoint .*, 2 layers, 1 heads of 64, FFN 64"):
        train(tmp_path, start, dataclasses.replace(config, size=TransformerSize(layers=1, heads=1, ffn_dim=64)))


def test_a_loss_that_is_not_finite_ends_the_run(
    start: Path, tmp_path: Path, clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = timed.velocity_loss
    monkeypatch.setattr(timed, "velocity_loss", lambda *args: original(*args) * torch.nan)
    with pytest.raises(FloatingPointError, match="The loss is nan at step 8"):
        train(tmp_path, start)


def test_a_transformer_of_another_size_starts_anew(start: Path, tmp_path: Path, clock: list[float]) -> None:
    clock[0] = 9.0
    other = TransformerSize(layers=1, heads=1, ffn_dim=64)
    model = train(tmp_path, start, dataclasses.replace(CONFIG, size=other))
    assert len(model.transformer.blocks) == 1 and records(tmp_path)[0]["step"] == 1


class HostReads(TorchDispatchMode):
    """Notes operations that wait for the device of their tensor, but for tensors that are on the host by design."""

    WAITING = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique")

    def __init__(self, on_host: list[torch.Tensor]) -> None:
        super().__init__()
        self.seen: list[str] = []
        self.on_host = {id(tensor) for tensor in on_host}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in self.WAITING and id(args[0]) not in self.on_host:
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def small_pool(drawn: int = 0, **changes: int) -> LatentPool:
    torch.manual_seed(0)
    options = {"capacity": 4, "added_together": 2, "frames": 5, "size": 56} | changes
    return LatentPool(
        build_vae().eval().requires_grad_(False),
        build_tokenizer(),
        two_objects=0.5,
        striped=0.4,
        seed=0,
        drawn=drawn,
        device=CPU,
        **options,
    )


def test_no_step_waits_for_the_device(start: Path, tmp_path: Path) -> None:
    pool, config = small_pool(), dataclasses.replace(CONFIG, reuse=1, autocast=True)
    training = timed._Training(tmp_path, config, CPU, (WanPipeline.from_pretrained(start), 7))
    pool.add()
    training.take_step(pool, 0.0)  # makes the optimizers' states
    _, adamw = training.optimizers
    with HostReads([state["step"] for state in adamw.state.values()]) as reads:
        training.take_step(pool, 0.5)
        assert reads.seen == []
        training.mean_loss()
    assert reads.seen == ["aten._local_scalar_dense.default"]


def test_the_blocks_are_compiled_once_for_all(start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten blocks would exceed the limit of recompilations, if each had its own graph."""
    from torch._dynamo.testing import CompileCounter

    counter, original = CompileCounter(), torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda module, **options: original(module, backend=counter, **options)
    )
    torch.compiler.reset()
    config = dataclasses.replace(
        CONFIG, compile=True, autocast=True, size=TransformerSize(layers=10, heads=1, ffn_dim=64)
    )
    training = timed._Training(tmp_path, config, CPU, (WanPipeline.from_pretrained(start), 7))
    pool = small_pool()
    pool.add()
    for share in (0.0, 0.5):
        training.take_step(pool, share)
    assert 1 <= counter.frame_count <= 2


def test_the_pool_holds_the_latest_videos_of_the_world() -> None:
    pool = small_pool()
    for _ in range(3):
        pool.add()
    assert pool.held == 4 and pool.drawn == 6
    later = small_pool(drawn=4, added_together=1)
    later.add()
    torch.testing.assert_close(pool._latents[:1], later._latents[:1], atol=2e-3, rtol=2e-3)
    latents, ids = pool.sample(64, torch.Generator().manual_seed(0))
    assert latents.shape == (64, 32, 2, 7, 7) and latents.dtype == torch.float32 and ids.shape == (64, 24)
    assert len(latents.flatten(1).unique(dim=0)) == 4
    with pytest.raises(ValueError, match="`capacity` must be a multiple of `added_together`, 2, got 5"):
        small_pool(capacity=5)


def test_a_few_seconds_of_training_make_an_ordinary_pipeline(start: Path, tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, minutes=0.03)
    train_shapes_model(tmp_path / "run", tmp_path / "model", timed=config, start_from=start)
    pipe = WanPipeline.from_pretrained(tmp_path / "model")
    assert pipe.transformer.dtype == pipe.vae.dtype == torch.float32
    video = pipe("a red ball moving right", height=32, width=32, num_frames=5, num_inference_steps=2, output_type="np")
    assert video.frames.shape == (1, 5, 32, 32, 3) and np.isfinite(video.frames).all()
    card = (tmp_path / "model" / "README.md").read_text()
    assert "2 layers, 1 heads of 64, FFN 64, a token a latent; stored in float16" in card
    assert "for 0.03 minutes in all" in card and "were not scored" in card
    write_card(tmp_path / "model", TINY, config, [{"name": "one object", "videos": 16, "right": 15, "steps": 30}])
    assert "one object: 15 of 16." in (tmp_path / "model" / "README.md").read_text()
    with pytest.raises(ValueError, match="`start_from` must be given with `timed`"):
        train_shapes_model(tmp_path / "run", tmp_path / "other", timed=config)


def test_the_larger_model_is_in_files_of_at_most_15_megabytes(start: Path, tmp_path: Path) -> None:
    """And all of the assets, with students of its size, in at most 60."""
    source = tmp_path / "source"
    torch.manual_seed(0)
    parts = WanPipeline.from_pretrained(start)
    build_pipeline(parts.vae, parts.text_encoder, build_transformer(LARGER_SIZE)).save_pretrained(source)
    (source / "training_log.jsonl").write_text("")
    config = dataclasses.replace(CONFIG, minutes=1e-4, size=LARGER_SIZE, first_videos=0)
    train_shapes_model(tmp_path / "run", tmp_path / "model", timed=config, start_from=source)
    shards = list((tmp_path / "model" / "transformer").glob("*.safetensors"))
    files = [path.stat().st_size for path in (tmp_path / "model").rglob("*") if path.is_file()]
    assert len(shards) > 1 and max(files) <= 15_000_000
    pipe = load_model(tmp_path / "model").pipe
    linears = [it for it in pipe.transformer.blocks.modules() if isinstance(it, torch.nn.Linear)]
    student = 2 * 64 * sum(it.in_features + it.out_features for it in linears)  # of rank 64, in float16
    assert sum(files) + 2 * student <= 60_000_000
    before = model_fingerprint(str(tmp_path / "model"))
    content = bytearray(shards[-1].read_bytes())
    content[-1] ^= 1
    shards[-1].write_bytes(content)
    assert model_fingerprint(str(tmp_path / "model")) != before
    shards[-1].write_bytes(content[:100])
    with pytest.raises(ModelError, match=rf"transformer/{shards[-1].name} is damaged or incomplete"):
        load_model(tmp_path / "model")


def test_a_size_is_read_from_text() -> None:
    assert TransformerSize.parse("8x5x960") == TransformerSize(layers=8, heads=5, ffn_dim=960)
    for text in ("8x5", "8x5xlarge", "0x5x960"):
        with pytest.raises(ValueError, match="`size` must be layers x heads x FFN width"):
            TransformerSize.parse(text)
