"""Memory that a step has freed, kept for the next one, where the C library would hand it back to the system."""

import ctypes
import os
import platform


# Parameters of glibc's `mallopt`, as malloc.h numbers them, the largest value it takes, and the largest that older
# releases take for the second
TRIM_THRESHOLD, MMAP_THRESHOLD, MOST, ONCE_MOST = -1, -3, 2**31 - 1, 2**25
# Whoever sets one of these has chosen an allocator, or how it is to behave
CHOICES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES", "LD_PRELOAD")


def keep_freed_memory() -> bool:
    """
    Let this process keep up to 2 GiB of memory that it has freed, and take blocks of up to 2 GiB from there (of up to
    32 MiB with a glibc that accepts no more).

    Each step of training allocates tensors of the same sizes. On a CPU they come from glibc, which by itself maps
    blocks of more than 32 MiB anew and returns whatever exceeds 64 MiB when it is free, so that the kernel clears the
    same pages again in every step, which can take longer than what is computed in them. Values do not change.

    Returns:
        `bool`: Whether it was set: not where the C library is another one, nor where the environment has chosen
        (`MALLOC_TRIM_THRESHOLD_`, `MALLOC_MMAP_THRESHOLD_`, `GLIBC_TUNABLES`, `LD_PRELOAD`).
    """
    if platform.libc_ver()[0] != "glibc" or any(os.environ.get(name) for name in CHOICES):
        return False
    mallopt = ctypes.CDLL(None).mallopt
    mapped = mallopt(MMAP_THRESHOLD, MOST) or mallopt(MMAP_THRESHOLD, ONCE_MOST)
    return bool(mapped and mallopt(TRIM_THRESHOLD, MOST))
