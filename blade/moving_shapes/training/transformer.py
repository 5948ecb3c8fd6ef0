"""Second stage: text encoder and transformer, by flow matching on the VAE's latents."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLWan, WanPipeline
from diffusers.training_utils import EMAModel

from blade.common.training_log import TrainingLog, load_checkpoint, numpy_rng, save_checkpoint, torch_rng

from ..captions import OPTIONAL, sample_caption
from ..realism import realism_error
from ..scoring import score
from .components import FLOW_SHIFT, build_tokenizer
from .conditioned import TextConditionedTransformer, descend, flow_matching_loss
from .latents import LatentStore
from .muon import muon_and_adamw, set_learning_rate

BATCH_STREAM, NOISE_STREAM, SCORE_STREAM = 4, 5, 6


@dataclasses.dataclass(frozen=True, kw_only=True)
class Phase:
    """Some steps on videos of one size."""

    steps: int
    batch_size: int
    frames: int
    size: int
    """Canvas edge in pixels."""
    videos: int
    """Distinct training videos at the end of the phase."""
    first_videos: int
    """Videos encoded before the first step; the rest are encoded evenly as the phase goes on."""
    shift: float = FLOW_SHIFT
    """Shift of the noise levels trained on. Where an object is, frame after frame, is decided at levels near 1: it is
    seen in many tokens and channels, so that their noise averages out."""
    rate: tuple[float, float] = (1.0, 1.0)
    """Learning rate at the phase's start and end, as shares of the whole one; linear in between."""
    two_objects: float = 0.5
    """Share of captions with two objects."""
    striped: float = OPTIONAL
    """Share of objects that are striped."""

    @property
    def store(self) -> tuple[int, int, float, float]:
        """Key of the phases that draw from the same videos: frames, size, fractions of two objects and of stripes."""
        return self.frames, self.size, self.two_objects, self.striped


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerTraining:
    """Settings of the training of text encoder and transformer: small, short videos first, whole ones last."""

    phases: tuple[Phase, ...] = (
        Phase(steps=900, batch_size=24, frames=17, size=64, videos=6000, first_videos=600, shift=3.0),
        Phase(steps=600, batch_size=8, frames=33, size=96, videos=2240, first_videos=800, shift=3.0),
        Phase(steps=700, batch_size=8, frames=33, size=96, videos=3920, first_videos=2240, shift=6.0),
        Phase(steps=300, batch_size=8, frames=33, size=96, videos=4226, first_videos=3920, shift=20.0),
        Phase(steps=1500, batch_size=16, frames=33, size=64, videos=6800, first_videos=800, shift=20.0),
        Phase(steps=1800, batch_size=8, frames=33, size=96, videos=6490, first_videos=4226),
        Phase(steps=1200, batch_size=8, frames=33, size=96, videos=8000, first_videos=6490, rate=(1.0, 0.0)),
        Phase(steps=800, batch_size=16, frames=33, size=64, videos=6800, first_videos=6800, rate=(0.6, 0.4)),
        Phase(steps=800, batch_size=8, frames=33, size=96, videos=8000, first_videos=8000, shift=6.0, rate=(0.4, 0.0)),
        Phase(
            steps=2400, batch_size=8, frames=33, size=96, videos=6000, first_videos=1600, shift=6.0, rate=(0.7, 0.0)
        ),
        Phase(
            steps=850,
            batch_size=8,
            frames=33,
            size=96,
            videos=2600,
            first_videos=800,
            shift=20.0,
            rate=(0.7, 0.45),
            two_objects=0.2,
        ),
        Phase(
            steps=550,
            batch_size=8,
            frames=33,
            size=96,
            videos=3200,
            first_videos=2600,
            shift=8.0,
            rate=(0.45, 0.0),
            two_objects=0.2,
        ),
        Phase(
            steps=1400,
            batch_size=8,
            frames=33,
            size=96,
            videos=2000,
            first_videos=800,
            rate=(0.7, 0.45),
            two_objects=0.2,
            striped=0.5,
        ),
        Phase(
            steps=1000,
            batch_size=8,
            frames=33,
            size=96,
            videos=2600,
            first_videos=2000,
            shift=6.0,
            rate=(0.45, 0.0),
            two_objects=0.2,
            striped=0.5,
        ),
        Phase(
            steps=1500,
            batch_size=8,
            frames=33,
            size=96,
            videos=2600,
            first_videos=800,
            rate=(0.7, 0.45),
            two_objects=0.2,
            striped=0.5,
        ),
        Phase(
            steps=1100,
            batch_size=8,
            frames=33,
            size=96,
            videos=2600,
            first_videos=800,
            shift=6.0,
            rate=(0.45, 0.0),
            two_objects=0.2,
            striped=0.5,
        ),
    )
    learning_rate: float = 2e-3
    """Of Muon (matrices of the blocks) and, halved, of AdamW (the rest)."""
    warmup_steps: int = 100
    """Of the learning rate, from the first step and from one at which the optimizers start anew."""
    caption_dropout: float = 0.1
    """Fraction of captions replaced by the empty one, so that classifier-free guidance works."""
    ema_decay: float = 0.9985
    seed: int = 0
    checkpoint_every: int = 100
    log_every: int = 20
    score_every: int = 400
    """Steps between generated clips whose scores are logged; they choose nothing."""
    score_prompts: int = 4
    compile: bool = False
    """Compile the blocks: 1.5 times as fast on a CPU, after two minutes."""
    autocast: bool = False
    """Compute in bfloat16 where autocast does: 1.6 times as fast on a CPU that has AVX-512 BF16."""

    @property
    def steps(self) -> int:
        """Steps of all phases together."""
        return sum(phase.steps for phase in self.phases)


def phase_rate(phase: Phase, step: int) -> float:
    """Learning rate at a step of a phase, as a share of the whole one."""
    start, end = phase.rate
    return start + (end - start) * step / phase.steps


def _start_from(model: TextConditionedTransformer, pipe: WanPipeline, start: int, steps: int) -> int:
    """Load the weights of a pipeline, and return the number of steps that they have been trained for."""
    if start >= steps:
        raise ValueError(f"`steps` must be more than the {start} that the model has been trained for, got {steps}.")
    model.text_encoder.load_state_dict(pipe.text_encoder.state_dict())
    model.transformer.load_state_dict(pipe.transformer.state_dict())
    return start


def _open_store(run: Path, vae: AutoencoderKLWan, phase: Phase, capacity: int, seed: int, device: str) -> LatentStore:
    """Open the encoded videos that a phase draws from."""
    return LatentStore(
        run / "latents_{}x{}_{:g}_{:g}.npy".format(*phase.store),
        vae,
        capacity=capacity,
        frames=phase.frames,
        size=phase.size,
        two_objects=phase.two_objects,
        striped=phase.striped,
        seed=seed,
        device=device,
    )


def train_transformer(
    run: Path,
    vae: AutoencoderKLWan,
    config: TransformerTraining,
    device: str = "cpu",
    start_from: tuple[WanPipeline, int] | None = None,
) -> TextConditionedTransformer:
    """Train, or go on training, the transformer of a run; returns it with averaged weights.

    Args:
        run: Folder of the run; `transformer.pt`, `log.jsonl` and the encoded videos are written there.
        vae: The trained VAE.
        config: How to train.
        device: Where to train.
        start_from: Where the run has no checkpoint: a pipeline whose weights it goes on with, and the number of steps
            that they have been trained for. The optimizers start anew.

    Raises:
        ValueError: If `start_from` has been trained for all of the steps already.
    """
    torch.manual_seed(config.seed)
    model = TextConditionedTransformer(build_tokenizer()).to(device)
    state = load_checkpoint(run / "transformer.pt")
    start = restarted = 0
    if state is None and start_from is not None:
        start = restarted = _start_from(model, *start_from, config.steps)
    matrices = [weight for weight in model.transformer.blocks.parameters() if weight.ndim == 2]
    optimizers = muon_and_adamw(model, matrices, config.learning_rate, 0.5 * config.learning_rate)
    ema = EMAModel(model.parameters(), decay=config.ema_decay, use_ema_warmup=True, power=0.75)
    if state is not None:
        start, restarted = state["step"], state["restarted"]
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        ema.load_state_dict(state["ema"])
    ema.to(device)
    if config.compile:
        for block in model.transformer.blocks:
            block.compile()
    log = TrainingLog(run / "log.jsonl", stage="transformer", start=start, total=config.steps)
    recent: list[float] = []
    first, capacity = 0, dict[tuple[int, int, float, float], int]()
    for phase in config.phases:
        capacity[phase.store] = max(phase.videos, capacity.get(phase.store, 0))
    for number, phase in enumerate(config.phases):
        steps = range(max(start, first), first + phase.steps)
        if steps:
            store = _open_store(run, vae, phase, capacity[phase.store], config.seed, device)
        for step in steps:
            store.fill(phase.first_videos + (phase.videos - phase.first_videos) * (step - first) // phase.steps)
            warmup = min((step - restarted + 1) / config.warmup_steps, 1.0)
            set_learning_rate(optimizers, warmup * phase_rate(phase, step - first))
            rng = numpy_rng(config.seed, BATCH_STREAM, step)
            latents, captions = store.sample(rng, phase.batch_size)
            noise = torch_rng(config.seed, NOISE_STREAM, step)
            with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=config.autocast):
                loss = flow_matching_loss(model, latents, captions, rng, noise, config.caption_dropout, phase.shift)
            descend(model, loss, optimizers)
            ema.step(model.parameters())
            recent.append(loss.item())
            done = step + 1
            if done % config.checkpoint_every == 0 or done == config.steps:
                save_checkpoint(
                    run / "transformer.pt",
                    {
                        "step": done,
                        "restarted": restarted,
                        "model": model.state_dict(),
                        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                        "ema": ema.state_dict(),
                    },
                )
            if done % config.log_every == 0 or done == config.steps:
                log.write(done, phase=number, loss=float(np.mean(recent)))
                recent.clear()
            if config.score_every and done % config.score_every == 0:
                ema.store(model.parameters())
                ema.copy_to(model.parameters())
                pipe = model.pipeline(vae)
                ema.restore(model.parameters())
                log.write(
                    done, **sample_scores(pipe, phase, numpy_rng(config.seed, SCORE_STREAM), config.score_prompts)
                )
        first += phase.steps
    ema.copy_to(model.parameters())
    return model.eval().requires_grad_(False)


@torch.no_grad()
def sample_scores(pipe: WanPipeline, phase: Phase, rng: np.random.Generator, prompts: int) -> dict[str, float]:
    """Generate clips of training captions and score them: how training goes, not how good the model is."""
    pipe.set_progress_bar_config(disable=True)
    scores, errors = [], []
    for number in range(prompts):
        prompt = str(sample_caption(rng, objects=1 + number % 2))
        video = pipe(
            prompt,
            negative_prompt="",
            height=phase.size,
            width=phase.size,
            num_frames=phase.frames,
            num_inference_steps=12,
            guidance_scale=2.0,
            generator=torch.Generator().manual_seed(number),
            output_type="pt",
        ).frames[0]
        scores.append(score(video, prompt).fraction)
        errors.append(realism_error(video, prompt))
    return {"score": float(np.mean(scores)), "realism_error": float(np.mean(errors))}
