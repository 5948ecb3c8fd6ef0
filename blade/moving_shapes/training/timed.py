"""Training of text encoder and transformer for a given time, such as a few minutes of a GPU."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from time import monotonic
from typing import Any

import torch
from diffusers import AutoencoderKLWan, WanPipeline, WanTransformer3DModel
from diffusers.training_utils import EMAModel

from blade.common.training_log import TrainingLog, load_checkpoint, save_checkpoint, torch_rng

from .components import LARGER_SIZE, TransformerSize, build_tokenizer
from .conditioned import TextConditionedTransformer, descend, shifted_sigmas, tokenise, velocity_loss
from .latent_pool import LatentPool
from .muon import muon_and_adamw, set_learning_rate

STEP_STREAM = 7
CHECKPOINT = "timed.pt"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TimedTraining:
    """Settings of a training that ends when its time does."""

    minutes: float
    """From the first call to the last step and the writing of the model; all runs that resume each other together."""
    reserve_seconds: float = 10.0
    """Last part of the time, kept for the writing of the model; at most a tenth of the time."""
    size: TransformerSize = LARGER_SIZE
    batch_size: int = 128
    frames: int = 33
    canvas: int = 96
    """Edge in pixels."""
    capacity: int = 65536
    """Most videos kept on the device."""
    first_videos: int = 2048
    """Videos before the first step, unless they take more than a twentieth of the time."""
    reuse: int = 4
    """Steps between additions of as many videos as a batch has: how often one is seen on average."""
    two_objects: float = 0.5
    """Share of captions with two objects."""
    striped: float = 0.4
    """Share of objects that are striped."""
    shifts: tuple[float, float] = (2.0, 20.0)
    """Least and greatest shift of the noise levels trained on; the logarithm of a sample's is uniform."""
    learning_rate: float = 2e-3
    """Of Muon (matrices of the blocks) and, halved, of AdamW (the rest)."""
    warmup_steps: int = 100
    steady: float = 0.3
    """Share of the time after which the learning rate falls, linearly to 0."""
    caption_dropout: float = 0.1
    """Fraction of captions replaced by the empty one, so that classifier-free guidance works."""
    ema_decay: float = 0.998
    seed: int = 0
    checkpoint_seconds: float = 60.0
    log_seconds: float = 5.0
    compile: bool = False
    """Compile the blocks, once for all of them."""
    autocast: bool = False
    """Compute in bfloat16 where autocast does."""

    def __post_init__(self) -> None:
        if self.minutes <= 0:
            raise ValueError(f"`minutes` must be more than 0, got {self.minutes}.")

    @property
    def seconds(self) -> float:
        """Time for training, without the reserve."""
        return 60 * self.minutes - min(self.reserve_seconds, 6 * self.minutes)


def timed_rate(share: float, steady: float) -> float:
    """Learning rate after a share of the time, as a share of the whole one: 1, then falling to 0 when the time ends.

    Args:
        share: Elapsed time over all time.
        steady: Share of the time until which it is 1.
    """
    return min(1.0, max(0.0, (1 - share) / (1 - steady)))


def transformer_size(transformer: WanTransformer3DModel) -> TransformerSize:
    """Size of a transformer."""
    config = transformer.config
    return TransformerSize(layers=config.num_layers, heads=config.num_attention_heads, ffn_dim=config.ffn_dim)


class _Clock:
    """Seconds of training, those of the runs before included."""

    def __init__(self, began: float) -> None:
        self.before, self._began = 0.0, began

    def elapsed(self) -> float:
        return self.before + monotonic() - self._began


def train_in_time(
    run: Path,
    vae: AutoencoderKLWan,
    config: TimedTraining,
    device: torch.device,
    start_from: tuple[WanPipeline, int],
    began: float,
) -> TextConditionedTransformer:
    """Train, or go on training, until the time ends; returns text encoder and transformer with averaged weights.

    Training that resumes counts the time until its last checkpoint, and goes on with new videos.

    Args:
        run: Folder of the run; `timed.pt` and `log.jsonl` are written there.
        vae: The trained VAE, on `device`.
        config: How to train.
        device: Where to train.
        start_from: Where the run has no checkpoint: a pipeline, and the number of steps that it has been trained for.
            Its text encoder and a transformer of the same size go on from their weights; one of another size starts
            anew, at step 0.
        began: When the time began, by `time.monotonic`.

    Raises:
        ValueError: If the checkpoint is of another size.
        FloatingPointError: If the loss is not finite.
    """
    clock = _Clock(began)
    torch.manual_seed(config.seed)
    if device.type == "cuda":  # shapes never change; TensorFloat-32 is exact enough where bfloat16 is
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")
    training = _Training(run, config, device, start_from)
    clock.before = training.elapsed
    pool = LatentPool(
        vae,
        training.model.tokenizer,
        capacity=-(-config.capacity // config.batch_size) * config.batch_size,
        added_together=config.batch_size,
        frames=config.frames,
        size=config.canvas,
        two_objects=config.two_objects,
        striped=config.striped,
        seed=config.seed,
        drawn=training.drawn,
        device=device,
    )
    filled_by = clock.elapsed() + config.seconds / 20
    pool.add()
    while pool.held < config.first_videos and clock.elapsed() < filled_by:
        pool.add()
    log = TrainingLog(run / "log.jsonl", stage="transformer", start=training.step, total=None)
    logged = saved = before = clock.elapsed()
    while 2 * (elapsed := clock.elapsed()) - before < config.seconds:  # there is time for a step like the last one
        before = elapsed
        training.take_step(pool, elapsed / config.seconds)
        if elapsed - logged > config.log_seconds:
            log.write(training.step, share=elapsed / config.seconds, loss=training.mean_loss(), videos=pool.drawn)
            logged = elapsed
        if elapsed - saved > config.checkpoint_seconds:
            training.save(pool.drawn, elapsed)
            saved = elapsed
    if training.since_mean:
        log.write(training.step, share=1.0, loss=training.mean_loss(), videos=pool.drawn)
    training.save(pool.drawn, clock.elapsed())
    return training.finish()


class _Training:
    """Everything that a step changes."""

    def __init__(
        self, run: Path, config: TimedTraining, device: torch.device, start_from: tuple[WanPipeline, int]
    ) -> None:
        self.config, self.device, self.checkpoint = config, device, run / CHECKPOINT
        tokenizer = build_tokenizer()
        self.model = TextConditionedTransformer(tokenizer, config.size).to(device)
        matrices = [weight for weight in self.model.transformer.blocks.parameters() if weight.ndim == 2]
        self.step = self.restarted = self.drawn = self.since_mean = 0
        self.elapsed = 0.0
        state = load_checkpoint(self.checkpoint)
        if state is None:
            self._start_from(*start_from)
        elif state["size"] != dataclasses.asdict(config.size):
            raise ValueError(
                f"`size` must be that of the checkpoint {self.checkpoint}, {TransformerSize(**state['size'])}, got "
                f"{config.size}."
            )
        self.optimizers = muon_and_adamw(self.model, matrices, config.learning_rate, 0.5 * config.learning_rate)
        self.ema = EMAModel(
            self.model.parameters(), decay=config.ema_decay, use_ema_warmup=True, power=0.75, foreach=True
        )
        if state is not None:
            self._resume(state)
        self.ema.to(device)
        self._loss = torch.zeros((), device=device)
        self._no_caption = tokenise(tokenizer, [""]).to(device)
        if config.compile:
            for block in self.model.transformer.blocks:
                block.compile(dynamic=False)

    def _start_from(self, pipe: WanPipeline, steps: int) -> None:
        self.model.text_encoder.load_state_dict(pipe.text_encoder.state_dict())
        if transformer_size(pipe.transformer) == self.config.size:
            self.model.transformer.load_state_dict(pipe.transformer.state_dict())
            self.step = self.restarted = steps

    def _resume(self, state: dict[str, Any]) -> None:
        self.step, self.restarted, self.drawn = state["step"], state["restarted"], state["drawn"]
        self.elapsed = state["elapsed"]
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.ema.load_state_dict(state["ema"])

    def save(self, drawn: int, elapsed: float) -> None:
        """Write a checkpoint."""
        save_checkpoint(
            self.checkpoint,
            {
                "size": dataclasses.asdict(self.config.size),
                "step": self.step,
                "restarted": self.restarted,
                "drawn": drawn,
                "elapsed": elapsed,
                "model": self.model.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
                "ema": self.ema.state_dict(),
            },
        )

    def take_step(self, pool: LatentPool, share: float) -> None:
        """Take a step; nothing in it waits for the device.

        Args:
            pool: The videos.
            share: Elapsed time over all time.
        """
        config = self.config
        if (self.step - self.restarted) % config.reuse == config.reuse - 1:
            pool.add()
        warmup = min((self.step - self.restarted + 1) / config.warmup_steps, 1.0)
        set_learning_rate(self.optimizers, warmup * timed_rate(share, config.steady))
        generator = torch_rng(config.seed, STEP_STREAM, self.step, device=str(self.device))
        latents, ids = pool.sample(config.batch_size, generator)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=config.autocast):
            loss = self._draw_loss(latents, ids, generator)
        descend(self.model, loss, self.optimizers)
        self.ema.step(self.model.parameters())
        self._loss += loss.detach()
        self.since_mean += 1
        self.step += 1

    def _draw_loss(self, latents: torch.Tensor, ids: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Loss at noise levels that are spread evenly, each sample with a shift of its own."""
        count = len(ids)
        u, place, dropped = torch.rand(3, count, generator=generator, device=self.device)
        u = (torch.arange(count, device=self.device) + u) / count
        low, high = (math.log(shift) for shift in self.config.shifts)
        sigma = shifted_sigmas(u, torch.exp(low + (high - low) * place))
        noise = torch.randn(latents.shape, generator=generator, device=self.device)
        kept = torch.where((dropped < self.config.caption_dropout)[:, None], self._no_caption, ids)
        return velocity_loss(self.model, latents, kept, sigma, noise)

    def mean_loss(self) -> float:
        """Mean loss since the last call; waits for the device."""
        mean = self._loss.item() / self.since_mean
        if not math.isfinite(mean):
            raise FloatingPointError(f"The loss is {mean} at step {self.step}; a lower `learning_rate` may help.")
        self._loss.zero_()
        self.since_mean = 0
        return mean

    def finish(self) -> TextConditionedTransformer:
        """Return the model with averaged weights."""
        self.ema.copy_to(self.model.parameters())
        return self.model.eval().requires_grad_(False)
