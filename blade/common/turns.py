"""One thread at a time: what two would mix up is noticed, and refused."""

from __future__ import annotations

import threading


class Turn:
    """A turn that one thread takes at a time, as often as it likes."""

    def __init__(self, refusal: str) -> None:
        """Leave the turn to whoever comes first.

        Args:
            refusal: the sentence for those that come while another thread has the turn.
        """
        self.refusal = refusal
        self._holder: threading.Thread | None = None
        self._changing = threading.Lock()

    def take(self) -> None:
        """Take the turn.

        Raises:
            RuntimeError: if another thread has it; one that has ended, has not.
        """
        thread = threading.current_thread()
        with self._changing:
            if self._holder is not None and self._holder is not thread and self._holder.is_alive():
                raise RuntimeError(self.refusal)
            self._holder = thread

    def leave(self) -> bool:
        """Leave the turn and return True, or return False if this thread does not have it."""
        with self._changing:
            if self._holder is not threading.current_thread():
                return False
            self._holder = None
            return True
