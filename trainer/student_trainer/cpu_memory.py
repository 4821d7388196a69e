"""Keeps the memory that one step frees for the next one, where a run computes on a CPU. Called by `device`.

Left to itself, glibc gives every large array back to the kernel as soon as it is freed, and the next array of that size
is made of new pages, each cleared by the kernel at its first touch: in a step of a model of 135M parameters 200,000 of
them, an eighth of its time. Every step needs what the last one needed, so nothing is gained by giving it back.
"""

from __future__ import annotations

import ctypes
import platform

# The names of <malloc.h>.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
# Arrays below this come from the heap, which keeps what is freed; those above are single, such as a checkpoint's.
HEAP_BELOW_BYTES = 2**30
NEVER = -1


def keep_freed_memory() -> bool:
    """Have malloc keep what is freed for later arrays, until the process ends; False where it can't be told to."""
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(M_TRIM_THRESHOLD, NEVER)) and bool(mallopt(M_MMAP_THRESHOLD, HEAP_BELOW_BYTES))
