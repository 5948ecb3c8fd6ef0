"""The sampler of few-step students: an explicit grid of times, from each prediction to the next level of noise."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import SchedulerMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor

from blade.common.checks import check_choice, check_integer, check_number, shortened
from blade.common.fields import check_type
from blade.students.noise_schedule import cumulative_alphas
from blade.students.prediction import PREDICTION_TYPES, mix, renew_noise, split_prediction

MOST_TIMES = 100_000
"""Most times that a model may know; there is a table of them."""

_HASHED = 4096  # numbers of the first sample that the noise is drawn from


def set_flow_shift(scheduler: Any, shift: float) -> Any:
    """Return a flow-matching scheduler like another one, with a shift toward high noise.

    Args:
        scheduler: a Diffusers scheduler whose configuration has a `flow_shift` or a `shift`.
        shift: the shift; 1 is none.

    Raises:
        ValueError: if it is no such scheduler.
    """
    name = next((name for name in ("flow_shift", "shift") if name in scheduler.config), None)
    if name is None or (name == "flow_shift" and not scheduler.config.get("use_flow_sigmas", True)):
        raise ValueError(
            f"`flow_shift` must not be given: a {type(scheduler).__name__} here is not for flow matching."
        )
    return type(scheduler).from_config(scheduler.config, **{name: shift})


@dataclass
class FewStepOutput(BaseOutput):  # type: ignore[misc]  # Diffusers has no types
    """Output of a step."""

    prev_sample: torch.Tensor
    """The sample at the next time, in its own type."""
    pred_original_sample: torch.Tensor
    """The clean sample as the model predicts it, in float32."""


class FewStepScheduler(SchedulerMixin, ConfigMixin):  # type: ignore[misc]  # Diffusers has no types
    """Samples at the times that a student was trained at, and at no others.

    At a time with signal alpha and noise sigma the prediction is taken apart into the clean sample x0 and the noise
    eps; the next sample is alpha' x0 + sigma' (r eps + sqrt(1 - r^2) z), with fresh noise z and the share r of noise
    that is kept. With r = 1 it is deterministic (DDIM), with r = 0 the noise is all new. After the last time x0 is
    returned.

    - `flow_prediction` (Wan, HunyuanVideo): alpha = 1 - sigma, sigma = t / 1000, and the model predicts eps - x0.
    - `v_prediction` (CogVideoX): alpha^2 + sigma^2 = 1, and the model predicts alpha eps - sigma x0.

    Pipelines that hand generators to `step` (CogVideoX) draw z from them. For the others z is drawn from generators of
    the scheduler's own, one for each sample, seeded by what that sample begins with: the same seed gives the same
    video, alone and in a batch. (One generator for a whole batch draws one sample after the other, as everywhere in
    Diffusers; give a list of them instead.)

    Source: BLADE, arXiv 2508.10774, and TDM, arXiv 2503.06674: the rollout that students are trained on.
    """

    order = 1
    init_noise_sigma = 1.0
    _step_index: int | None
    _begin_index: int | None
    _generators: list[torch.Generator] | None

    @register_to_config  # type: ignore[untyped-decorator]  # Diffusers has no types
    def __init__(
        self,
        grids: Sequence[Sequence[float]] = ((999.0, 749.0, 499.0, 249.0),),
        prediction_type: str = "flow_prediction",
        noise_kept: float = 1.0,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.00085,
        beta_end: float = 0.0120,
        beta_schedule: str = "scaled_linear",
        rescale_betas_zero_snr: bool = True,
        snr_shift_scale: float = 1.0,
    ) -> None:
        """Make a scheduler.

        Args:
            grids: the times of a run, descending, in (0, `num_train_timesteps`]; one grid for every number of steps
                that there are weights for.
            prediction_type: "flow_prediction" or "v_prediction", whose times are whole numbers below
                `num_train_timesteps`.
            noise_kept: the share r of the noise that a step keeps, in [0, 1].
            num_train_timesteps: times that the model knows.
            beta_start: of the noise schedule of "v_prediction", as `CogVideoXDDIMScheduler` takes it; so are the rest.
            beta_end: likewise.
            beta_schedule: likewise.
            rescale_betas_zero_snr: likewise.
            snr_shift_scale: likewise.

        Raises:
            ValueError: if a value is out of range.
        """
        check_choice("prediction_type", prediction_type, PREDICTION_TYPES)
        check_number("noise_kept", noise_kept, "in [0, 1]", lambda x: 0 <= x <= 1)
        check_integer("num_train_timesteps", num_train_timesteps, least=1, most=MOST_TIMES)
        check_type("grids", grids, list[list[float]])
        if not grids or not all(grids):
            raise ValueError(f"`grids` must hold at least one grid of times, none of them empty, got {grids!r}.")
        for grid in grids:
            falling = all(earlier > later for earlier, later in itertools.pairwise(grid))
            whole = prediction_type == "flow_prediction" or all(float(time).is_integer() for time in grid)
            highest = num_train_timesteps - (prediction_type == "v_prediction")
            if not (falling and whole and min(grid) > 0 and max(grid) <= highest):
                kind = "numbers" if prediction_type == "flow_prediction" else "whole numbers"
                raise ValueError(f"`grids` must hold descending {kind} up to {highest}, got {shortened(grid)}.")
        lengths = [len(grid) for grid in grids]
        if len(set(lengths)) < len(lengths):
            raise ValueError(f"`grids` must hold one grid for each number of steps, got lengths {lengths}.")
        if prediction_type == "v_prediction":
            self._alphas_cumprod = cumulative_alphas(
                num_train_timesteps,
                beta_start=beta_start,
                beta_end=beta_end,
                beta_schedule=beta_schedule,
                rescale_betas_zero_snr=rescale_betas_zero_snr,
                snr_shift_scale=snr_shift_scale,
            )
        self._take(max(grids, key=len), None)
        self.num_inference_steps: int | None = None

    @classmethod
    def like(cls, scheduler: Any, grids: Sequence[Sequence[float]], *, noise_kept: float = 1.0) -> FewStepScheduler:
        """Make one for the model that another scheduler samples.

        Args:
            scheduler: the model's own.
            grids: see above.
            noise_kept: see above.

        Raises:
            ValueError: if the model predicts something else than a flow or v.
        """
        # by name: of what is given by place, Diffusers' `from_config` takes the defaults instead
        config = scheduler.config
        kind = config.get("prediction_type", "flow_prediction" if "FlowMatch" in type(scheduler).__name__ else None)
        if kind == "v_prediction":
            names = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule")
            options = {name: config[name] for name in (*names, "rescale_betas_zero_snr", "snr_shift_scale")}
        elif kind == "flow_prediction":
            options = {"num_train_timesteps": config["num_train_timesteps"]}
        else:
            raise ValueError(
                f"`scheduler` must be of a model that predicts a flow or v, got a {type(scheduler).__name__} with "
                f"`prediction_type` {kind!r}."
            )
        made: FewStepScheduler = cls(grids=grids, prediction_type=kind, noise_kept=noise_kept, **options)
        return made

    @property
    def step_counts(self) -> tuple[int, ...]:
        """The numbers of steps that there are grids for."""
        return tuple(sorted(len(grid) for grid in self.config.grids))

    @property
    def step_index(self) -> int | None:
        """The next step; None before the first."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """The first step of the run, if it was set."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Begin the run with a later step."""
        self._begin_index = begin_index

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
    ) -> None:
        """Take the grid of a number of steps.

        Args:
            num_inference_steps: how many.
            device: where `timesteps` shall be.
            sigmas: the even levels of noise that some pipelines ask for by themselves, of which only the number
                counts, or those of the grid.
            mu: a shift that some pipelines work out by themselves; the times are trained, and have theirs.

        Raises:
            ValueError: if there is no grid of so many steps, or `sigmas` are others than those.
        """
        if sigmas is not None:
            count = len(sigmas)
            trained = [[self._levels(time)[1] for time in grid] for grid in self.config.grids if len(grid) == count]
            known = [*trained, list(np.linspace(1.0, 0.0, count + 1)[:-1])]
            if not any(np.allclose(sigmas, levels, atol=1e-4) for levels in known):
                raise ValueError(
                    f"`sigmas` must be left to the scheduler, whose times are trained, got {list(sigmas)}."
                )
            num_inference_steps = count
        grid = next((grid for grid in self.config.grids if len(grid) == num_inference_steps), None)
        if grid is None:
            counts = " or ".join(str(count) for count in self.step_counts)
            raise ValueError(f"`num_inference_steps` must be {counts}, as trained, got {num_inference_steps}.")
        self._take(grid, device)
        self.num_inference_steps = num_inference_steps

    def scale_model_input(self, sample: torch.Tensor, timestep: Any = None) -> torch.Tensor:
        """Return the sample as it is."""
        return sample

    def step(
        self,
        model_output: torch.Tensor,
        timestep: float | torch.Tensor,
        sample: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> FewStepOutput | tuple[torch.Tensor, torch.Tensor]:
        """Go to the next time.

        Args:
            model_output: the prediction.
            timestep: one of `timesteps`, at which it was made.
            sample: what it was made from.
            generator: of the fresh noise, or a list of one for each sample.
            return_dict: return a `FewStepOutput` instead of a tuple.

        Returns:
            The next sample, and the clean one that was predicted.

        Raises:
            ValueError: if `timestep` is none of the run's, or the run is over.
        """
        index = self._index(timestep)
        if index == len(self.timesteps):
            raise ValueError("The run is over; call `set_timesteps` before another one.")
        alpha, sigma = self._levels(self._grid()[index])
        clean, noise = split_prediction(self.config.prediction_type, model_output, sample, alpha, sigma)
        next_sample = clean
        if index + 1 < len(self.timesteps):
            alpha, sigma = self._levels(self._grid()[index + 1])
            kept = self.config.noise_kept
            if kept < 1:
                if generator is None and self._generators is None:
                    self._generators = [_generator_from(one) for one in sample]
                fresh = randn_tensor(
                    noise.shape, generator=generator or self._generators, device=noise.device, dtype=noise.dtype
                )
                noise = renew_noise(noise, fresh, kept)
            next_sample = mix(clean, noise, alpha, sigma)
        self._step_index = index + 1
        next_sample = next_sample.to(sample.dtype)
        if not return_dict:
            return next_sample, clean
        return FewStepOutput(prev_sample=next_sample, pred_original_sample=clean)

    def add_noise(self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Bring clean samples to the noise of a time, one for each."""
        alpha, sigma = self.levels(timesteps, original_samples.ndim)
        return mix(original_samples, noise, *(level.to(original_samples) for level in (alpha, sigma)))

    def levels(self, times: torch.Tensor, dimensions: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
        """Return signal and noise at times.

        Args:
            times: (B,), whole numbers with `v_prediction`.
            dimensions: of the samples.

        Returns:
            Alpha and sigma, each (B, 1, ...) float32 of `dimensions` dimensions, on the device of `times`.
        """
        pairs = torch.tensor([self._levels(float(time)) for time in times])
        alpha, sigma = pairs.T.to(times.device).reshape(2, -1, *(1,) * (dimensions - 1))
        return alpha, sigma

    def _grid(self) -> Sequence[float]:
        """The grid in force, as Python's numbers."""
        return next(grid for grid in self.config.grids if len(grid) == len(self.timesteps))

    def _levels(self, time: float) -> tuple[float, float]:
        """Alpha and sigma at a time."""
        if self.config.prediction_type == "flow_prediction":
            sigma = time / self.config.num_train_timesteps
            return 1 - sigma, sigma
        squared = float(self._alphas_cumprod[int(time)])
        return squared**0.5, (1 - squared) ** 0.5

    def _index(self, timestep: float | torch.Tensor) -> int:
        """The step of a time: counted, once the run has begun."""
        if self._step_index is not None:
            return self._step_index
        if self._begin_index is not None:
            return self._begin_index
        time = float(timestep)
        places = [index for index, other in enumerate(self._grid()) if abs(other - time) < 1e-3]
        if not places:
            raise ValueError(f"`timestep` must be one of {list(self._grid())}, got {time}.")
        return places[0]

    def _take(self, grid: Sequence[float], device: torch.device | str | None) -> None:
        """Put a grid in force and begin a run."""
        whole = self.config.prediction_type == "v_prediction"
        self.timesteps = torch.tensor(grid, dtype=torch.int64 if whole else torch.float32, device=device)
        self.sigmas = torch.tensor([*(self._levels(time)[1] for time in grid), 0.0])
        self._step_index = None
        self._begin_index = None
        self._generators = None

    def __len__(self) -> int:
        return int(self.config.num_train_timesteps)


def _generator_from(sample: torch.Tensor) -> torch.Generator:
    """A generator on the CPU whose seed is what one sample holds."""
    values = sample.detach().flatten()[:_HASHED].float().cpu().numpy()
    seed = int.from_bytes(hashlib.sha256(values.tobytes()).digest()[:8], "little") % 2**63
    return torch.Generator().manual_seed(seed)
