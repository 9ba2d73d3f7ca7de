"""What a process that trains sets up once: how it keeps memory, and how many threads it uses."""

from __future__ import annotations

import ctypes
import os
import platform
import signal

import torch

# Of glibc's malloc.h.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
PR_SET_PDEATHSIG = 1  # of Linux's prctl.h
MOST_KEPT_BYTES = 2**31 - 1
GROWTH_BYTES = 256 * 2**20


def prepare_process(*, threads: int) -> None:
    """Use so many threads for arithmetic, have cuDNN try its kernels out once a shape, and keep freed memory.

    glibc gives a step's activations back to the kernel after every step, which then clears the pages again for the
    next one. (With musl or on other systems nothing is changed.)
    """
    torch.set_num_threads(threads)
    torch.backends.cudnn.benchmark = True
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        for option, value in (
            (M_MMAP_MAX, 0),
            (M_TRIM_THRESHOLD, MOST_KEPT_BYTES),
            (M_TOP_PAD, GROWTH_BYTES),
        ):
            libc.mallopt(option, value)


def die_with_parent() -> None:
    """Have the kernel kill this process, a worker, when Ray's daemon, its parent, is killed (Linux)."""
    if platform.system() == "Linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() == 1:
            os._exit(1)
