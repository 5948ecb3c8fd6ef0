"""BLADE as applied to one transformer: its layers, and the hook around the transformer's forward pass."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from blade_kernels.block_sparse import IMPLEMENTATIONS
from blade_kernels.compiler import uncompiled
from blade_kernels.implementations import check_implementation
from diffusers.hooks import ModelHook
from torch import nn

from blade.attention.adaptive import AdaptivePlan
from blade.attention.config import BladeConfig
from blade.attention.hook_order import register_innermost, remove_innermost
from blade.attention.layer import Plan, SparseLayer
from blade.attention.methods import Method, method_of
from blade.attention.parallelism import Parallelism
from blade.attention.reuse import KeptChoices
from blade.attention.sequence_parallel import HeadShare
from blade.attention.steps import ASSUMED_STEPS, SHARED_TRANSFORMER, StepResolver
from blade.common.rollback import unchanged_on_error
from blade.common.terminal import logger
from blade.common.turns import Turn
from blade.families.protocol import Inputs, ModelFamily
from blade.families.transformers import Transformer
from blade.token_grid import TokenGrid

HOOK_NAME = "blade"
"""Name of BLADE's hook in the transformer's registry of Diffusers hooks."""


@dataclass(frozen=True)
class PassState:
    """State of a transformer's layers in one forward pass."""

    plan: Plan | None
    """Plan that they share; None in a dense pass."""
    row: int
    """The row of their tables that they read."""
    sparse: tuple[bool, ...]
    """True for each sparse one."""
    shares: tuple[HeadShare | None, ...] = ()
    """The heads of each that ranks compute; empty on one rank."""


class AppliedBlade(ModelHook):  # type: ignore[misc]  # Diffusers has no types
    """The hook around a transformer's forward pass, and everything that belongs to it.

    Before the transformer runs, it works out the token grid and the step, tells every layer whether it is sparse, and
    permutes the latent's patches; afterwards it puts the output's patches back. The token order is the same in all
    steps of a run, dense ones included, so that caches that carry hidden states from step to step see one order.

    What the host works out is done in hooks around the transformer's call, which PyTorch runs outside of the graph
    where the whole transformer is compiled. The graph holds the permutations.
    """

    _is_stateful = True  # so that Diffusers hands the cache context to `self.context` and resets the hook after a run

    def __init__(
        self,
        transformer: nn.Module,
        family: ModelFamily,
        config: BladeConfig,
        pipe: Any = None,
        method: Method | None = None,
    ) -> None:
        """Work out the layers; nothing is changed yet.

        Args:
            transformer: the transformer to apply BLADE to.
            family: its family.
            config: the configuration.
            pipe: the pipeline that drives it, for its scheduler.
            method: how attention is made sparse; None: as the configuration says.

        Raises:
            ValueError: if there is no such implementation, `dense_layers` names a layer that isn't there, the
                transformer is split by another parallelism than Ulysses, a table of patterns is another model's, or,
                with `strict`, a layer cannot be made sparse.
        """
        super().__init__()
        self.family = family
        self.config = config
        self.steps = StepResolver(pipe, rising=family.timesteps_rise)
        self.context = self.steps.context
        self.grid: TokenGrid | None = None
        self.notes: list[str] = []
        self.permutation: torch.Tensor | None = None
        self._inverse: torch.Tensor | None = None
        self.plan: Plan | None = None
        self.state = PassState(None, 0, ())
        """State of the layers in the latest pass."""
        self.method = method_of(config) if method is None else method
        self.paused = False
        """True while everything is dense."""
        self._begun_with: tuple[Any, ...] | None = None  # inputs of the pass that has begun
        self._plans: dict[tuple[TokenGrid, torch.device], Plan] = {}
        self._rows = 0
        self._choices = KeptChoices(1 if config.patterns is not None else config.asa.reselect_every)
        self._parameters = tuple(inspect.signature(type(transformer).forward).parameters)[1:]
        self._handles: Sequence[Any] = ()
        self._innermost: Any = None  # the forward that runs this hook
        self._turn = Turn(SHARED_TRANSFORMER)

        self.parallelism = Parallelism(family)
        check_implementation(config.implementation, IMPLEMENTATIONS)
        self.attentions: tuple[Any, ...] = tuple(family.attention_layers(transformer))
        beyond = [layer for layer in config.dense_layers if layer >= len(self.attentions)]
        if beyond:
            raise ValueError(
                f"`dense_layers` must be from 0 to {len(self.attentions) - 1}, the last layer here, got {beyond}."
            )
        self.step = torch.zeros(1, dtype=torch.int64)
        self.layers = tuple(
            SparseLayer(index, self.step, self._dense_reason(index, attention))
            for index, attention in enumerate(self.attentions)
        )
        self.method.check(len(self.attentions), family.heads(self.attentions[0]))

    def install(self, transformer: Transformer) -> None:
        """Put the processors and hooks in place, all of them or, if that fails, none."""
        with unchanged_on_error(transformer):
            self.parallelism.prepare(transformer)
            for layer, attention in zip(self.layers, self.attentions):
                attention.set_processor(self.family.make_processor(layer, attention.processor))
            self._handles = (
                *self.family.hook_positions(transformer, lambda: self.permutation),
                transformer.register_forward_pre_hook(self._before_forward, with_kwargs=True),
                transformer.register_forward_hook(self._after_forward, always_call=True),
            )
            self._innermost = register_innermost(transformer, self, HOOK_NAME)
            self.parallelism.follow(transformer)
            _forget_cached(transformer)

    def uninstall(self, transformer: Transformer) -> None:
        """Put the previous processors back and take the hooks away.

        Raises:
            ValueError: if cache-dit was enabled since.
        """
        remove_innermost(transformer, HOOK_NAME, self._innermost)
        self.parallelism.release(transformer)
        _forget_cached(transformer)
        for layer, attention in zip(self.layers, self.attentions):
            # somebody else's processor, set since, stays
            if getattr(attention.processor, "layer", None) is layer:
                attention.set_processor(attention.processor.previous)
        for handle in self._handles:
            handle.remove()

    # Two halves instead of one `new_forward`, which Diffusers loses when it takes off a hook beneath it, such as
    # the one that group offloading with streams needs in its first pass.

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], Inputs]:
        """Put the tokens in order."""
        inputs = self._named(args, kwargs)
        if not self._has_begun(inputs):  # called as `forward`, or other hooks have changed the inputs
            self._begin_pass(module, inputs)
        for layer in self.layers:
            layer.running = True
        if self.permutation is not None:
            inputs = self.family.permute_inputs(module, inputs, self.permutation)
        return (), self.parallelism.split_inputs(inputs)

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        """Put the output's patches back."""
        inverse = self._inverse
        self.parallelism.sum_densities(self.layers)
        if not torch.compiler.is_compiling():  # a graph leaves that to `_after_forward`
            self._end_pass()
        return output if inverse is None else self.family.restore_output(module, output, inverse)

    @uncompiled
    def _before_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: Inputs) -> None:
        self._begin_pass(module, self._named(args, kwargs))

    @uncompiled
    def _after_forward(self, module: nn.Module, args: Any, output: Any) -> None:
        """End the pass, after an error too; not that of another thread, which was the error."""
        if self._turn.leave():
            self._end_pass()

    def _named(self, args: tuple[Any, ...], kwargs: Inputs) -> Inputs:
        return {**dict(zip(self._parameters, args)), **kwargs}

    def _has_begun(self, inputs: Inputs) -> bool:
        """Return whether the pass has begun with these inputs."""
        begun = self._begun_with
        return begun is not None and begun[0] is inputs["hidden_states"] and begun[1] is inputs["timestep"]

    def _begin_pass(self, module: nn.Module, inputs: Inputs) -> None:
        """Tell the layers what to do, and find the token order; a second time for the same pass changes nothing."""
        if not torch.compiler.is_compiling():
            self._turn.take()
        self._end_pass()  # which an error may have left open
        self.parallelism.follow(module)
        _refuse_skipped_scores(self.attentions)
        plan = self._prepare(module, inputs)
        if plan is not None:
            order, device = plan.token_order, self.step.device
            whole = self.family.whole_sequence
            self.permutation = plan.grid.order(order, device, whole=whole)
            self._inverse = plan.grid.inverse_order(order, device, whole=whole)
        self._begun_with = inputs["hidden_states"], inputs["timestep"]

    def _end_pass(self) -> None:
        self.permutation = self._inverse = self._begun_with = None
        for layer in self.layers:
            layer.running = False

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        """Refuse copies: Diffusers' hooks, and those of the positions, would go on running the original.

        Raises:
            TypeError: always.
        """
        raise TypeError(
            "A transformer with BLADE cannot be copied or pickled: call `remove_blade` first, and `apply_blade` "
            "again, on each copy."
        )

    def reset_state(self, module: nn.Module) -> nn.Module:
        """Forget where the last run stood; Diffusers calls it when a pipeline ends."""
        self.steps.reset()
        self._choices.clear()
        return module

    def _dense_reason(self, index: int, attention: nn.Module) -> str | None:
        if self.config.attention == "dense":
            return 'the configuration says `attention="dense"`'
        if index in self.config.dense_layers:
            return "it is one of `dense_layers`"
        reason = self.family.dense_reason(attention)
        if reason is not None:
            self._stays_dense(f"Layer {index} stays dense: {reason}.")
        return reason

    def _stays_dense(self, message: str) -> None:
        """Say once that something which should be sparse is not."""
        if self.config.strict:
            raise ValueError(f"{message} (`strict=True`)")
        self._note(message)

    def _note(self, message: str) -> None:
        if message not in self.notes:
            self.notes.append(message)
            logger.warning(message)

    def _prepare(self, module: nn.Module, inputs: Inputs) -> Plan | None:
        """Tell every layer what it is in this forward pass; return the plan, or None if no step ever is sparse."""
        for layer, attention in zip(self.layers, self.attentions):
            if getattr(attention.processor, "layer", None) is not layer:
                raise ValueError(
                    f"The attention processor of layer {layer.index} was replaced by a "
                    f"{type(attention.processor).__name__} after `apply_blade`, as `fuse_qkv_projections` and "
                    "`set_attn_processor` do. Call `apply_blade` again."
                )
        plan, step, dense_steps, row = None, 0, 0, 0
        if self._may_be_sparse(module, inputs):
            step, total = self.steps.resolve(
                self.family.video_timestep(inputs), counts_itself=self.family.scheduler_counts_steps(inputs)
            )
            dense_steps = self._dense_steps(total)
            if total is None or dense_steps < total:
                plan = self._plan(module, inputs)
                plan = None if plan.is_full else plan
                self._fill_tables(total)
                row = step % self._rows
        device = _device(inputs)
        if self.step.device != device:
            with torch.inference_mode(False):
                self.step = self.step.to(device)
        sparse = []
        for layer in self.layers:
            layer.move(device, self.step)
            sparse.append(
                plan is not None
                and layer.dense_reason is None
                and step >= dense_steps
                and self.method.is_sparse(layer.index, row, self._rows)
            )
        self.put_back(PassState(plan, row, tuple(sparse), self._share_heads(module, inputs, plan, row, sparse)))
        self._keep_choices(plan if any(sparse) else None, step, inputs)
        return plan

    def _share_heads(
        self, module: nn.Module, inputs: Inputs, plan: Plan | None, row: int, sparse: Sequence[bool]
    ) -> tuple[HeadShare | None, ...]:
        """Deal the heads of every layer to the ranks; return nothing on one rank."""
        if not self.parallelism.is_split:
            return ()
        self.parallelism.begin(self.family.token_grid(module, inputs))
        shares, device = [], _device(inputs)
        for layer, attention, is_sparse in zip(self.layers, self.attentions, sparse):
            costs = None
            if is_sparse:
                assert plan is not None
                costs = self.method.head_costs(layer.index, row, self._rows, plan)
            shares.append(self.parallelism.share(self.family.heads(attention), costs, device))
        return tuple(shares)

    def _may_be_sparse(self, module: nn.Module, inputs: Inputs) -> bool:
        """Return whether a layer can be sparse in a forward pass with these inputs, and say once why none can."""
        if self.paused or all(layer.dense_reason is not None for layer in self.layers):
            return False
        reason = self.family.pass_dense_reason(module, inputs)
        if reason is not None:
            self._stays_dense(f"All layers stay dense in this forward pass: {reason}.")
        return reason is None

    def _keep_choices(self, plan: Plan | None, step: int, inputs: Inputs) -> None:
        """Tell every layer where its choice of blocks is kept; `plan` is None where none is sparse."""
        choices = None
        if not torch.compiler.is_compiling():
            self._choices.begin_step(step)
            if plan is not None and not torch.is_grad_enabled():  # a backward pass may recompute a layer
                choices = self._choices.of_pass(
                    _condition(inputs),
                    self.steps.schedule(),
                    plan,
                    batch=len(inputs["hidden_states"]),
                    step=step,
                )
        for layer in self.layers:
            layer.choices = choices

    def put_back(self, state: PassState) -> None:
        """Tell the layers what they were told before, such as for the forward pass that a backward pass recomputes."""
        self.state = state
        for number, (layer, sparse) in enumerate(zip(self.layers, state.sparse)):
            layer.plan, layer.sparse = state.plan, sparse
            layer.share = state.shares[number] if state.shares else None
        if state.shares and state.shares[0] is not None:
            self.parallelism.shards = state.shares[0].shards
        self.step.fill_(state.row)

    def _fill_tables(self, total: int | None) -> None:
        """Give the layers what they read at the steps of such a run."""
        rows = self.method.rows(total)
        if rows == self._rows:
            return
        self._rows = rows
        for layer, attention in zip(self.layers, self.attentions):
            if layer.dense_reason is None:
                layer.tables = self.method.tables(layer.index, self.family.heads(attention), rows)

    def _dense_steps(self, total: int | None) -> int:
        if total is not None:
            return self.config.dense_step_count(total)
        if isinstance(self.config.dense_steps, int):
            return self.config.dense_steps
        self._note(
            f"The number of steps is unknown, so that `dense_steps` {self.config.dense_steps} is taken of "
            f"{ASSUMED_STEPS}. Give a count, or apply BLADE to the pipeline instead of the transformer."
        )
        return self.config.dense_step_count(ASSUMED_STEPS)

    def _plan(self, module: nn.Module, inputs: Inputs) -> Plan:
        grid, device = self.family.token_grid(module, inputs), _device(inputs)
        plan = self._plans.get((grid, device))
        if plan is None:
            plan = self.method.plan(grid, device)
            self.judge(plan)
            self._plans[grid, device] = plan
        self.grid, self.plan = grid, plan
        return plan

    def judge(self, plan: Plan) -> None:
        """Say where a budget doesn't come to what was asked for.

        Raises:
            ValueError: with `strict`, if no block can be left out.
        """
        if not isinstance(plan, AdaptivePlan):
            return
        grid, budget = plan.grid, plan.budget
        where = f"{grid.frames} x {grid.height} x {grid.width} tokens in {budget.blocks} blocks"
        if budget.is_full and self.config.sparsity > 0:
            self._stays_dense(
                f"All layers stay dense at {where}: a row keeps at least one block of video, and all text."
            )
        elif budget.is_exceeded:
            self._note(
                f"At {where}, text, pooled tokens and the one block that each row keeps take a density of "
                f"{budget.density:.3f}, more than the {budget.requested_density:.3f} that was requested."
            )


def _condition(inputs: Inputs) -> torch.Tensor | None:
    """Return the condition of a pass, which some transformers take as a list."""
    condition = inputs.get("encoder_hidden_states")
    return condition[0] if isinstance(condition, list) else condition


def _device(inputs: Inputs) -> torch.device:
    """Return the device of the latents, which some transformers take as a list."""
    latents = inputs["hidden_states"]
    device: torch.device = (latents if isinstance(latents, torch.Tensor) else latents[0]).device
    return device


def applied_to(transformer: nn.Module) -> AppliedBlade | None:
    """Return BLADE's hook on a transformer, or None if it isn't applied."""
    registry = getattr(transformer, "_diffusers_hook", None)
    return registry.get_hook(HOOK_NAME) if registry is not None else None


def _forget_cached(transformer: Transformer) -> None:
    """Have Diffusers' caches start over: what they keep is in another token order now."""
    for module in transformer.modules():
        registry = vars(module).get("_diffusers_hook")
        for hook in () if registry is None else registry.hooks.values():
            if hook._is_stateful and not isinstance(hook, AppliedBlade):
                hook.reset_state(module)


def _refuse_skipped_scores(attentions: Sequence[nn.Module]) -> None:
    """Refuse a layer-skipping hook that acts inside PyTorch's attention, which a sparse layer never calls."""
    for index, attention in enumerate(attentions):
        registry = getattr(attention, "_diffusers_hook", None)
        if any(getattr(hook, "skip_attention_scores", False) for hook in getattr(registry, "hooks", {}).values()):
            raise ValueError(
                f"Layer {index} skips its attention scores (`LayerSkipConfig(skip_attention_scores=True)`), which "
                "BLADE cannot do; skip whole layers (`skip_attention=True, skip_ff=True`), or call `remove_blade`."
            )
