"""Decoded images on disk, so that the next run need not decode them again.

They are in `pixels/` in the cache folder (HYPERPARAMETER_ENSEMBLES_CACHE, or `hyperparameter-ensembles` in
XDG_CACHE_HOME or ~/.cache); HYPERPARAMETER_ENSEMBLES_PIXEL_CACHE=off turns that off. An entry is a folder with
`pixels.npy`, `labels.npy` and `about.json`, named by what decides the pixels: the files that are read (path, size,
modification time, inode), the side of an image, and the versions of what decodes. An entry appears complete or not at
all, and never changes. Where nothing can be written there is no cache, and no error.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import time
import uuid
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from results.files import cache_folder
from results.schema import DataWarning, IntArray

SWITCH = "HYPERPARAMETER_ENSEMBLES_PIXEL_CACHE"
DECODING_VERSION = 1
"""To be raised when the code makes other pixels of the same files."""
DECODERS = ("pillow", "pyarrow", "numpy")
LEAST_SOURCE_BYTES = 20 * 10**6  # about a second of decoding
MOST_BYTES = 10 * 10**9
UNFINISHED_SECONDS = 86_400.0
"""Age from which an entry that is not finished is what a killed process left."""
Pixels = npt.NDArray[np.uint8]
_heard: ContextVar[list[str] | None] = ContextVar("heard", default=None)


@dataclass(frozen=True, eq=False)
class Decoded:
    """What is made of a folder of images: pixels [N, C, S, S], labels [N], and the rest as JSON has it."""

    pixels_NCHW: Pixels
    labels_N: IntArray
    about: dict[str, Any]


def warn_of_data(message: str, *, stacklevel: int) -> None:
    """Issue a DataWarning that an entry of the cache repeats."""
    heard = _heard.get()
    if heard is not None:
        heard.append(message)
    warnings.warn(message, DataWarning, stacklevel=stacklevel + 1)


def default_folder() -> Path | None:
    """Return the cache's folder; None when the user wants no cache, or has no home."""
    if os.environ.get(SWITCH) == "off":
        return None
    try:
        return cache_folder() / "pixels"
    except RuntimeError:
        return None


@dataclass(frozen=True)
class PixelCache:
    """The entries in a folder, `most_bytes` in all: those that were not used for longest are removed.

    Sources that have fewer bytes than `least_source_bytes` are decoded every time.
    """

    folder: Path | None
    most_bytes: int = MOST_BYTES
    least_source_bytes: int = LEAST_SOURCE_BYTES

    def get(
        self, paths: Callable[[], Iterable[Path]], *, image_size: int | None, decode: Callable[[], Decoded]
    ) -> Decoded:
        """Return what `decode` makes of the files and folders at `paths`, from the cache if it is there.

        Warnings of `warn_of_data` are repeated.
        """
        files = _facts(paths())
        if self.folder is None or sum(size for _, size, *_ in files) < self.least_source_bytes:
            return decode()
        wanted = [DECODING_VERSION, [version(name) for name in DECODERS], image_size, files]
        entry = self.folder / hashlib.sha256(json.dumps(wanted).encode()).hexdigest()[:32]
        found = _read(entry)
        if found is not None:
            for message in found.about["warnings"]:
                warn_of_data(message, stacklevel=3)
            return found
        with _hearing() as heard:
            decoded = decode()
        if _facts(paths()) == files:  # else somebody changes them meanwhile
            self._write(entry, Decoded(decoded.pixels_NCHW, decoded.labels_N, {**decoded.about, "warnings": heard}))
        return decoded

    def _write(self, entry: Path, decoded: Decoded) -> None:
        """Add an entry, or none where that is not possible."""
        num_bytes = decoded.pixels_NCHW.nbytes + decoded.labels_N.nbytes
        unfinished = entry.with_name(f".{entry.name}.{uuid.uuid4().hex[:8]}.tmp")
        try:
            if num_bytes > self.most_bytes:
                return
            unfinished.mkdir(parents=True)
            self._make_room(num_bytes)
            np.save(unfinished / "pixels.npy", decoded.pixels_NCHW, allow_pickle=False)
            np.save(unfinished / "labels.npy", decoded.labels_N, allow_pickle=False)
            (unfinished / "about.json").write_text(json.dumps(decoded.about), encoding="utf-8")
            shutil.rmtree(entry, ignore_errors=True)  # a damaged one
            unfinished.rename(entry)
        except OSError:  # read-only, full, or another process was faster
            shutil.rmtree(unfinished, ignore_errors=True)

    def _make_room(self, num_bytes: int) -> None:
        """Remove what killed processes left, then the entries unused for longest until so many bytes fit."""
        assert self.folder is not None
        for path in self.folder.glob(".*.tmp"):
            if time.time() - path.stat().st_mtime > UNFINISHED_SECONDS:
                shutil.rmtree(path, ignore_errors=True)
        entries = [path for path in self.folder.iterdir() if path.is_dir() and not path.name.startswith(".")]
        sizes = {path: sum(file.stat().st_size for file in path.iterdir()) for path in entries}
        for path in sorted(entries, key=lambda path: path.stat().st_mtime_ns):
            if sum(sizes.values()) + num_bytes <= self.most_bytes:
                return
            shutil.rmtree(path, ignore_errors=True)
            del sizes[path]


def _facts(paths: Iterable[Path]) -> list[list[Any]]:
    """Path, size, modification time and inode of files; of folders and of links that lead nowhere the path alone."""
    facts: list[list[Any]] = []
    for path in sorted(paths):
        status = path.stat() if path.is_file() else None
        known = [0] if status is None else [status.st_size, status.st_mtime_ns, status.st_ino]
        facts.append([str(path.absolute()), *known])
    return facts


def _read(entry: Path) -> Decoded | None:
    """Return an entry, its pixels mapped into memory; None when there is none, or it is damaged."""
    try:
        pixels_NCHW = np.asarray(np.load(entry / "pixels.npy", mmap_mode="r", allow_pickle=False))
        labels_N = np.load(entry / "labels.npy", allow_pickle=False)
        about = json.loads((entry / "about.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, EOFError):
        return None
    if pixels_NCHW.dtype != np.uint8 or pixels_NCHW.ndim != 4 or labels_N.shape != (len(pixels_NCHW),):
        return None
    if not isinstance(about, dict) or "warnings" not in about:
        return None
    with contextlib.suppress(OSError):
        os.utime(entry)  # used now
    return Decoded(pixels_NCHW, labels_N, about)


@contextlib.contextmanager
def _hearing() -> Iterator[list[str]]:
    """Within the block, note what is warned of."""
    heard: list[str] = []
    token = _heard.set(heard)
    try:
        yield heard
    finally:
        _heard.reset(token)
