"""Training of a few-step student from prompts alone.

An update consists of a rollout of the student, the updates of the fake score, which learns the student's current
distribution, and one update of the student, guided by teacher and fake score. All random draws are keyed by update and
sample, so that an interrupted run resumes bit-exactly, and neither the number of processes nor accumulation changes
the samples.

Source: TDM, arXiv 2503.06674, and BLADE, arXiv 2508.10774.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from torch import nn

from blade.attention.config import BladeConfig
from blade.distillation.conditioning import Conditions, ExampleConditions, PromptEmbeddings
from blade.distillation.config import DistillationConfig
from blade.distillation.draws import COUNT, Draws, prompt_numbers
from blade.distillation.optimizers import RoleOptimizer, learning_rate_share
from blade.distillation.parallel import Processes, copy_weights, sharded_like, unsharded
from blade.distillation.role_attention import RoleAttention
from blade.distillation.roles import FAKE, STUDENT, TRAINED, Lora, Roles, adapter_roles, separate_roles
from blade.distillation.teacher_trajectories import ExampleTrajectories, TeacherTrajectories
from blade.distillation.trajectory import Trajectory
from blade.distillation.updates import Batch, Start, Updates
from blade.families.registry import find_family
from blade.models.loaded import LoadedModel
from blade.students.scheduler import FewStepScheduler
from blade.students.step_condition import ATTRIBUTE

ROLLOUT_PART = 0
"""Index of the rollout among the parts of an update, as a key of random draws; those of the updates follow."""


class Trainer:
    """The state of a training, advanced update by update."""

    def __init__(
        self,
        model: LoadedModel,
        config: DistillationConfig,
        embeddings: PromptEmbeddings | ExampleConditions,
        sampler: FewStepScheduler,
        attention: BladeConfig | None,
        processes: Processes,
        *,
        guidance_scale: float,
        dtype: torch.dtype,
    ) -> None:
        """Set everything up for the first update.

        Args:
            model: the model; its transformer, without BLADE, becomes the base for good.
            config: the configuration of the training.
            embeddings: embeddings of the prompts.
            sampler: the student's sampler.
            attention: the student's attention; None: dense.
            processes: the processes of the training.
            guidance_scale: guidance scale of the teacher.
            dtype: type of the computation.
        """
        self.model, self.config, self.embeddings = model, config, embeddings
        self.sampler, self.attention, self.processes = sampler, attention, processes
        self.update = 0
        self.trajectories: TeacherTrajectories | ExampleTrajectories | None = None
        transformer = model.transformer
        self._family = find_family(transformer)
        self.roles = self._make_roles(transformer)
        self._attention = RoleAttention(self.roles, attention, config.attention, model.pipe, processes)
        self._sparsity = self._attention.install(self.update)
        networks = self.roles.distinct()
        if config.run.gradient_checkpointing:
            for network in networks:
                network.enable_gradient_checkpointing()
        processes.wrap(networks, self._family)
        rates = {STUDENT: config.generator.learning_rate, FAKE: config.fake.learning_rate}
        self.optimizers = {
            role: RoleOptimizer(self._parameters(role), config.optimizer, rates[role], config.run.skip_factor)
            for role in TRAINED
        }
        self.ema = self._make_ema()
        self.updates = self._make_updates(guidance_scale, dtype)

    @property
    def batch_size(self) -> int:
        """Number of samples of an update, over all processes."""
        run = self.config.run
        return run.batch_size * run.accumulation * self.processes.groups

    def trajectory_number(self, steps: int) -> int:
        """Return the index of the trajectory with a number of steps."""
        return self.config.trajectory.steps.index(steps)

    def train_update(self) -> dict[str, float]:
        """Run one update of all trained roles.

        Returns:
            The values to log, the same on all processes.

        Raises:
            ArithmeticError: if training has diverged.
        """
        began, config, number = time.perf_counter(), self.config, self.update
        self._sparsity = self._attention.install(number)
        updates = self.updates[Draws(config.run.seed, number, ROLLOUT_PART).integer(COUNT, len(self.updates))]
        draws = [Draws(config.run.seed, number, 1 + part) for part in range(config.fake.updates + 1)]
        if number < config.generator.ode_updates:
            log = self._regress(updates.ode_loss, updates, *self._teacher_batches(updates), draws[-1])
        elif config.generator.objective == "imitation":
            log = self._regress(updates.imitation_loss, updates, *self._teacher_batches(updates), draws[-1])
        else:
            log = self._match(updates, *self._student_batches(updates), draws)
        if self.ema is not None:
            self.ema.step(self._parameters(STUDENT))
        self.update += 1
        return {
            **log,
            "sparsity": self._sparsity,
            "update_seconds": time.perf_counter() - began,
        }

    def make_trajectories(
        self, trajectories: TeacherTrajectories, facts: Mapping[str, Any], on_progress: Callable[[str], None]
    ) -> None:
        """Make the teacher's trajectories that are still missing.

        Args:
            trajectories: the folder of trajectories.
            facts: the settings that they depend on besides the student's times and the substeps.
            on_progress: called with the progress as text.

        Raises:
            ValueError: if the folder has trajectories that were made with other settings.
        """
        substeps, times = self.config.generator.substeps, self.trajectory_times()

        def run(conditions: Conditions, noise: torch.Tensor) -> torch.Tensor:
            return self.updates[0].teacher_trajectory(conditions, noise, times)

        settings = {**facts, "times": times, "substeps": substeps}
        trajectories.make(run, self.embeddings, settings, self.processes, self.config.run.batch_size, on_progress)
        self.trajectories = trajectories

    def trajectory_times(self) -> list[float]:
        """Return the times of the teacher's trajectories: those of all numbers of steps, and 0."""
        return [*sorted({time for grid in self.sampler.config.grids for time in grid}, reverse=True), 0.0]

    def _teacher_batches(self, updates: Updates) -> tuple[list[Batch], list[Start]]:
        """Return this process's batches of the update, at points of the teacher's trajectories."""
        assert self.trajectories is not None
        draws = Draws(self.config.run.seed, self.update, ROLLOUT_PART)
        times, trajectory = self.trajectory_times(), updates.trajectory
        batches, starts = [], []
        for samples in self._samples():
            numbers = self._numbers(samples, len(self.trajectories))
            conditions = self.embeddings.rows(self.trajectories.prompt_numbers(numbers)).on(self.processes.device)
            steps = updates.steps(samples, draws)
            starting = [times.index(trajectory.times[step]) for step in steps]
            ending = [times.index(trajectory.next_time(step)) for step in steps]
            if self.update >= self.config.generator.ode_updates:  # imitation
                ending = [len(times) - 1] * len(steps)
            noisy = self.trajectories.points(numbers, starting).to(self.processes.device)
            end = self.trajectories.points(numbers, ending).to(self.processes.device)
            batches.append(Batch(samples=samples, conditions=conditions))
            starts.append(Start(noisy=noisy, steps=steps, end=end))
        return batches, starts

    def _student_batches(self, updates: Updates) -> tuple[list[Batch], list[Start]]:
        """Return this process's batches of the update, and the ends of their rollouts."""
        run, processes = self.config.run, self.processes
        draws, share = Draws(run.seed, self.update, ROLLOUT_PART), run.batch_size * processes.groups
        batches, starts = [], []
        for number, samples in enumerate(self._samples()):
            conditions = self.embeddings.rows(self._numbers(samples, len(self.embeddings))).on(processes.device)
            batch = Batch(samples=samples, conditions=conditions)
            passes = None
            if processes.shards_weights:  # all processes must run the same number of passes
                passes = max(updates.steps(range(number * share, (number + 1) * share), draws))
            batches.append(batch)
            starts.append(updates.rollout(batch, draws, passes))
        return batches, starts

    def _match(
        self, updates: Updates, batches: Sequence[Batch], starts: Sequence[Start], draws: Sequence[Draws]
    ) -> dict[str, float]:
        """Update the fake score toward the student, then the student toward the teacher; return the values to log."""
        log: dict[str, float] = {}
        for fake_draws in draws[:-1]:
            losses = []
            for number, (batch, start) in enumerate(zip(batches, starts)):
                with updates.acting(FAKE, start, fake_draws), self._accumulating(FAKE, number, batches):
                    loss = updates.fake_loss(batch, start, fake_draws) / len(batches)
                    self.processes.backward(loss)
                losses.append(loss.detach())
            log |= self._step(FAKE, losses)
        estimates = []
        for number, (batch, start) in enumerate(zip(batches, starts)):
            with updates.acting(STUDENT, start, draws[-1]), self._accumulating(STUDENT, number, batches):
                estimate = updates.generator_loss(batch, start, draws[-1])
                self.processes.backward(estimate.loss / len(batches))
            estimates.append(estimate)
        log |= self._step(STUDENT, [estimate.loss.detach() / len(batches) for estimate in estimates])
        sums = [
            sum(float(getattr(estimate, name)) for estimate in estimates) / len(estimates)
            for name in ("difference", "fake_error", "teacher_error")
        ]
        difference, fake_error, teacher_error = self.processes.mean(sums)
        return {**log, "difference": difference, "critic_ratio": fake_error / teacher_error}

    def _regress(
        self,
        loss_of: Callable[[Batch, Start, Draws], torch.Tensor],
        updates: Updates,
        batches: Sequence[Batch],
        starts: Sequence[Start],
        draws: Draws,
    ) -> dict[str, float]:
        """Update the student by a regression onto the teacher; return the values to log."""
        losses = []
        for number, (batch, start) in enumerate(zip(batches, starts)):
            with updates.acting(STUDENT, start, draws), self._accumulating(STUDENT, number, batches):
                loss = loss_of(batch, start, draws) / len(batches)
                self.processes.backward(loss)
            losses.append(loss.detach())
        return self._step(STUDENT, losses)

    def student_weights(self, *, averaged: bool = True) -> dict[str, torch.Tensor]:
        """Return the student's unsharded weights on the CPU, averaged by default; all processes must call it."""
        named = self.roles.named_parameters(STUDENT)
        trained = named.values() if self.ema is None or not averaged else self.ema.shadow_params
        weights: dict[str, torch.Tensor] = unsharded(dict(zip(named, trained)))
        return weights

    def use_averaged(self) -> None:
        """Use averaged weights until `restore_weights`."""
        if self.ema is not None:
            self.ema.store(self._parameters(STUDENT))
            self.ema.copy_to(self._parameters(STUDENT))

    def restore_weights(self) -> None:
        """Restore the student's trained weights after `use_averaged`."""
        if self.ema is not None:
            self.ema.restore(self._parameters(STUDENT))

    def start_from(self, weights: dict[str, torch.Tensor]) -> None:
        """Initialize student and fake score with the weights of another student."""
        for role in TRAINED:
            named = self.roles.named_parameters(role)
            copy_weights({name: weight for name, weight in named.items() if f".{ATTRIBUTE}." not in name}, weights)
        self.ema = self._make_ema()

    def state_dict(self) -> dict[str, Any]:
        """Return everything that the next update depends on, unsharded; all processes must call it."""
        return {
            "update": self.update,
            "weights": {role: unsharded(dict(self.roles.named_parameters(role))) for role in TRAINED},
            "optimizers": {role: optimizer.state_dict() for role, optimizer in self.optimizers.items()},
            "ema": None if self.ema is None else unsharded(self.ema.state_dict()),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state that `state_dict` returned."""
        self.update = state["update"]
        for role in TRAINED:
            copy_weights(self.roles.named_parameters(role), state["weights"][role])
            self.optimizers[role].load_state_dict(state["optimizers"][role])
        ema = self.ema = self._make_ema()
        if ema is not None:
            shadows = [sharded_like(*pair) for pair in zip(state["ema"]["shadow_params"], ema.shadow_params)]
            ema.load_state_dict({**state["ema"], "shadow_params": shadows})
            ema.to(self.processes.device)

    def _samples(self) -> list[range]:
        """Return the indices of this group's samples in the whole batch, for each forward pass of the update."""
        run, processes = self.config.run, self.processes
        firsts = [(number * processes.groups + processes.group) * run.batch_size for number in range(run.accumulation)]
        return [range(first, first + run.batch_size) for first in firsts]

    def _numbers(self, samples: range, count: int) -> list[int]:
        """Return the indices of the prompts, or of the trajectories, of samples of the update."""
        return prompt_numbers(self.config.run.seed, self.update * self.batch_size + samples.start, len(samples), count)

    def _accumulating(self, role: str, number: int, batches: Sequence[Batch]) -> AbstractContextManager[None]:
        return self.processes.accumulating(self.roles.networks[role], number == len(batches) - 1)

    def _step(self, role: str, losses: Sequence[torch.Tensor]) -> dict[str, float]:
        optimizer, config, ode_updates = self.optimizers[role], self.config, self.config.generator.ode_updates
        first, last, rate = ode_updates, config.run.updates, optimizer.learning_rate
        if self.update < ode_updates:
            first, last, rate = 0, ode_updates, config.generator.ode_learning_rate or rate
        share = learning_rate_share(config.optimizer, self.update - first, last - first, decays=role == STUDENT)
        optimizer.set_rate(rate * share)
        (loss,) = self.processes.mean([sum(float(loss) for loss in losses)])
        norm, _ = optimizer.step(loss)
        name = "student" if role == STUDENT else "fake"
        return {f"{name}_loss": loss, f"{name}_norm": norm, f"{name}_skipped": float(optimizer.skipped)}

    def _parameters(self, role: str) -> list[torch.nn.Parameter]:
        return list(self.roles.named_parameters(role).values())

    def _make_ema(self) -> EMAModel | None:
        decay = self.config.weights.ema_decay
        return EMAModel(self._parameters(STUDENT), decay=decay, use_ema_warmup=True, power=0.75) if decay else None

    def _make_roles(self, transformer: nn.Module) -> Roles:
        """Make the roles, and condition them on the step where the time alone does not determine it."""
        config, weights = self.config, self.config.weights
        sparse = [] if self.attention is None else [STUDENT]
        if self.attention is not None and config.attention.fake == "student":
            sparse.append(FAKE)
        torch.manual_seed(config.run.seed)  # the adapters' initial weights must be the same on all processes
        if weights.full:
            roles = separate_roles(transformer, sparse)
        else:
            lora = Lora(rank=weights.rank, alpha=weights.alpha, targets=tuple(weights.targets))
            roles = adapter_roles(transformer, lora, sparse)
        counts, sizes = config.trajectory.steps, dict[str, int]()
        if len(counts) > 1:
            sizes = dict.fromkeys(TRAINED, len(counts))
        if config.trajectory.intervals == "shared":
            sizes[FAKE] = sum(counts)
        roles.add_step_conditions(self._family, sizes)
        return roles

    def _make_updates(self, guidance_scale: float, dtype: torch.dtype) -> list[Updates]:
        """Make the losses for each number of steps."""
        config, attention, device = self.config, self.attention, self.processes.device
        negative = self.embeddings.negative().on(device) if self._family.guidance_takes_two_passes else None
        all_updates = []
        for number, steps in enumerate(config.trajectory.steps):
            trajectory = Trajectory(
                sampler=self.sampler,
                steps=steps,
                intervals=config.trajectory.intervals,
                lowest_time=config.trajectory.lowest_time,
                highest_time=config.trajectory.highest_time,
            )
            updates = Updates(
                self.roles,
                trajectory,
                negative,
                config.fake,
                config.generator,
                guidance_scale=guidance_scale,
                device=device,
                dtype=dtype,
                together=attention is not None and (attention.dense_steps > 0 or attention.attention == "patterns"),
                trajectory_number=number,
                first_step_number=sum(config.trajectory.steps[:number]),
            )
            all_updates.append(updates)
        return all_updates
