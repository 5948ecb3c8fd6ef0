"""Watch over a loaded student: what has switched it off since, or runs it as it was not trained, is said once."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import nn

from blade.common.terminal import logger
from blade.families.registry import find_family
from blade.families.transformers import Transformer
from blade.models.adapters import active_adapters, adapter_layers, adapter_weight
from blade.students.description import Student


class StudentWatch:
    """The hooks before the forward passes of a student's transformers."""

    def __init__(self, pipe: Any, student: Student, transformers: dict[str, Transformer], adapter: str) -> None:
        """Put the hooks in place.

        Args:
            pipe: the pipeline, which is not kept alive.
            student: the student.
            transformers: its transformers, by name.
            adapter: the name of its adapter, where it has one.
        """
        self._pipe = weakref.ref(pipe)
        self._student = student
        self._adapter = adapter
        self._names = {id(transformer): name for name, transformer in transformers.items()}
        self._layers = {id(one): adapter_layers(one, adapter) for one in transformers.values()}
        family = find_family(next(iter(transformers.values())))
        self._two_passes = family.guidance_takes_two_passes
        self._said: set[str] = set()
        self._handles = [one.register_forward_pre_hook(self._before_forward) for one in transformers.values()]

    def remove(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        """Refuse copies, whose student would be switched by the original's pipeline.

        Raises:
            TypeError: always.
        """
        raise TypeError(
            "A pipeline or transformer with a student cannot be copied or pickled: call `unload_student` first, and "
            "`load_student` again, on each copy."
        )

    def _before_forward(self, module: nn.Module, args: Any) -> None:
        pipe = self._pipe()
        if pipe is None or torch.compiler.is_compiling():
            return
        if self._layers[id(module)] and (mend := self._switched_off(pipe, module)) is not None:
            self._say("adapter", lambda: f"The student {self._student.source} is switched off: {mend}")
        if self._student.guidance_scale == 1.0 and self._has_guidance(pipe):
            self._say("guidance", lambda: self._guidance(pipe))

    def _switched_off(self, pipe: Any, module: Transformer) -> str | None:
        """Return what has switched the adapter off, and the call that mends it, or None if it is on."""
        adapter, name = self._adapter, self._names[id(module)]
        if adapter not in getattr(module, "peft_config", {}):
            if adapter in pipe.fused_loras:
                return None
            return (
                f"its LoRA is no longer in {name}, as after `unload_lora_weights`. "
                f"`load_student(pipe, {self._student.source!r})` loads it again."
            )
        layers: list[Any] = self._layers[id(module)]
        if any(layer.disable_adapters and adapter not in layer.merged_adapters for layer in layers):
            return f"`disable_lora` was called on {name}. `pipe.enable_lora()` switches it on again."
        if all(adapter in (*layer.active_adapters, *layer.merged_adapters) for layer in layers):
            return None
        names = [other for other in active_adapters(module) if other != adapter and adapter_layers(module, other)]
        weights = [round(adapter_weight(module, other), 4) for other in (*names, adapter)]
        return (
            f"its adapter is not active in {name}, as after `load_lora_weights` or `set_adapters`. "
            f"`pipe.set_adapters({[*names, adapter]}, {weights})` switches it on again, beside the others."
        )

    def _has_guidance(self, pipe: Any) -> bool:
        """Return whether a running pipeline uses classifier-free guidance."""
        guider = getattr(pipe, "guider", None)
        if guider is not None:
            return bool(guider.num_conditions > 1)
        # there is none before a pipeline's first call
        return self._two_passes and (getattr(pipe, "guidance_scale", None) or 0.0) > 1.0

    def _guidance(self, pipe: Any) -> str:
        by_guider = getattr(pipe, "guider", None) is not None
        call = "set `pipe.guider = pipe.guider.new(guidance_scale=1.0)`" if by_guider else "pass `guidance_scale=1.0`"
        return (
            f"The student {self._student.source} was trained without guidance, and this run has some, which takes "
            f"twice the passes and oversaturates: {call}, as the student's `guidance_scale` says."
        )

    def _say(self, subject: str, message: Callable[[], str]) -> None:
        if subject not in self._said:
            self._said.add(subject)
            logger.warning(message())
