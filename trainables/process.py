"""What a process that trains sets up once: how it keeps memory, and how many threads it uses."""

from __future__ import annotations

import ctypes
import os
import platform
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

# From glibc's malloc.h.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
GLIBC_DEFAULTS = ((M_MMAP_MAX, 65536), (M_TRIM_THRESHOLD, 128 * 1024), (M_TOP_PAD, 128 * 1024))
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
    if libc := _glibc():
        for option, value in (
            (M_MMAP_MAX, 0),
            (M_TRIM_THRESHOLD, MOST_KEPT_BYTES),
            (M_TOP_PAD, GROWTH_BYTES),
        ):
            libc.mallopt(option, value)


@contextmanager
def prepared_for_a_while(*, threads: int) -> Iterator[None]:
    """Be set up as `prepare_process` does inside the block; then return to the former threads and glibc's defaults.

    Memory that was kept is given back at the end.
    """
    before = torch.get_num_threads()
    prepare_process(threads=threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
        if libc := _glibc():
            for option, value in GLIBC_DEFAULTS:
                libc.mallopt(option, value)
            libc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None


def processor() -> str:
    """Return what tells a machine's processors from those of another model, or with other instructions."""
    told = ("vendor_id", "cpu family", "model", "model name", "stepping", "flags", "Features", "CPU part")
    try:
        first = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0].splitlines()
    except OSError:  # not Linux
        return f"{platform.machine()} {platform.processor()}"
    return "\n".join(line for line in first if line.split(":")[0].strip() in told)


def computes_bfloat16() -> bool:
    """Whether the processor has instructions for bfloat16; without them it takes several times as long as float32."""
    return not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(processor().split())


def die_with_parent() -> None:
    """Have the kernel kill this process, a worker, when Ray's daemon, its parent, is killed (Linux)."""
    if platform.system() == "Linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() == 1:
            os._exit(1)
