"""Keeps freed memory in the process for the next step, where glibc would return it to the system."""

import ctypes
import os
import platform


# Parameters of glibc's `mallopt`, numbered as in malloc.h
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
# The largest value of a parameter, and the largest that older releases accept for `MMAP_THRESHOLD`
MAX_THRESHOLD, OLD_MAX_MMAP_THRESHOLD = 2**31 - 1, 2**25
# Each of these variables selects or configures an allocator
ALLOCATOR_VARIABLES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES", "LD_PRELOAD")


def keep_freed_memory() -> bool:
    """
    Let this process keep up to 2 GiB of freed memory and reuse it for blocks of up to 2 GiB (32 MiB with older
    releases of glibc).

    Every training step allocates tensors of the same sizes. On a CPU they come from glibc, which by default maps every
    block above 32 MiB anew and returns freed memory above 64 MiB to the system. The kernel then clears the same pages
    in every step, which can take longer than the computation itself. Values do not change.

    Returns:
        `bool`: Whether the thresholds were set. They are not set if the C library is not glibc, or if the environment
        configures the allocator (`MALLOC_TRIM_THRESHOLD_`, `MALLOC_MMAP_THRESHOLD_`, `GLIBC_TUNABLES`, `LD_PRELOAD`).
    """
    if platform.libc_ver()[0] != "glibc" or any(os.environ.get(name) for name in ALLOCATOR_VARIABLES):
        return False
    mallopt = ctypes.CDLL(None).mallopt
    reuses_blocks = mallopt(MMAP_THRESHOLD, MAX_THRESHOLD) or mallopt(MMAP_THRESHOLD, OLD_MAX_MMAP_THRESHOLD)
    return bool(reuses_blocks and mallopt(TRIM_THRESHOLD, MAX_THRESHOLD))
