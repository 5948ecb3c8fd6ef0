"""The C library's allocator."""

from __future__ import annotations

import ctypes

GLIBC_SIZES = {-3: 2**30, -1: 2**31 - 1, -2: 2**26}
"""Of glibc's allocator, in bytes: M_MMAP_THRESHOLD, from which on memory comes from the kernel by itself,
M_TRIM_THRESHOLD, how much free memory is kept, and M_TOP_PAD, how much is asked for at a time."""


def keep_freed_memory() -> None:
    """Let glibc keep the memory of tensors that are gone for those to come; elsewhere nothing happens.

    It would return large ones to the kernel at once, and touching new pages takes up to a third of a CPU's time.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, TypeError, AttributeError):  # another C library
        return
    for option, size in GLIBC_SIZES.items():
        mallopt(option, size)
