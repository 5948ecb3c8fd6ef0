"""What the attention processors of all families have in common."""

from __future__ import annotations

from typing import Any

from blade.attention.layer import SparseLayer


class SparseProcessor:
    """Self-attention of one layer through BLADE; a dense layer or step goes to the processor it stands in for."""

    def __init__(self, layer: SparseLayer, previous: Any) -> None:
        """Make a processor.

        Args:
            layer: what the method has set up for this layer.
            previous: the processor before it, the dense fallback.
        """
        self.layer = layer
        self.previous = previous

    @property
    def _attention_backend(self) -> Any:
        """Diffusers' attention backend, which serves the dense fallback."""
        return self.previous._attention_backend

    @_attention_backend.setter
    def _attention_backend(self, backend: Any) -> None:
        self.previous._attention_backend = backend

    @property
    def _parallel_config(self) -> None:
        """Always None: context parallelism is refused."""
        return None

    @_parallel_config.setter
    def _parallel_config(self, config: Any) -> None:
        if config is not None:
            raise ValueError(
                "BLADE's attention cannot be split by context parallelism; call `remove_blade` before "
                "`enable_parallelism`."
            )
