"""What a worker writes of one trial: on a disk, or straight to an object store, wherever the worker runs."""

from __future__ import annotations

import io
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from results.files import replace_file
from results.lock import generation_of, read_generation
from results.objects import ObjectStore, within
from results.predictions import SEEN_FROM_VIEWS, predictions_bytes
from results.schema import Predictions, UsageError


class Superseded(RuntimeError):
    """A worker outlived its driver and another one has taken over: it must not write any more."""


@dataclass(frozen=True)
class TrialFiles:
    """Where a worker puts what it makes of one trial, as long as its driver is the current one.

    `remote`: the experiment's URI, whose objects then take the place of the files under `root`.
    """

    root: str
    trial_id: str
    generation: int
    remote: str = field(default="", kw_only=True)

    @property
    def resume(self) -> Path:
        """What going on needs; read with `torch.load(weights_only=True)`."""
        return Path(self.root, "checkpoints", self.trial_id, "resume.pt")

    @property
    def progress(self) -> Path | None:
        """How far the epoch in progress is, see trainables/progress.py; None in an object store."""
        return None if self.remote else self.resume.with_name("progress.txt")

    @property
    def best(self) -> Path:
        """The best epoch's weights."""
        return self.weights("best")

    def weights(self, variant: str) -> Path:
        """The weights behind a variant's predictions."""
        name = SEEN_FROM_VIEWS.get(variant, variant)
        return Path(self.root, "checkpoints", self.trial_id, f"{name}.safetensors")

    @property
    def predictions(self) -> Path:
        """Logits by variant and split."""
        return Path(self.root, "predictions", f"{self.trial_id}.parquet")

    @property
    def _store(self) -> ObjectStore:
        return ObjectStore(self.remote)

    def _name(self, path: Path) -> str:
        return path.relative_to(self.root).as_posix()

    def check_current(self) -> None:
        """Raise Superseded when another driver has taken over the experiment, UsageError where it cannot be seen."""
        if not self.remote and not Path(self.root).is_dir():
            raise UsageError(
                f"{self.root} is not there on {platform.node()}, where a worker of {self.trial_id} runs; give a "
                f"--results-dir that all hosts share, such as a network file system, or s3://BUCKET/PREFIX"
            )
        current = generation_of(self._store) if self.remote else read_generation(Path(self.root))
        if current != self.generation:
            raise Superseded(f"{self.trial_id} belongs to driver {self.generation}; driver {current} has taken over")

    def where(self, path: Path) -> str:
        """What people call the place of a file of the trial."""
        return within(self.remote, self._name(path)) if self.remote else str(path)

    def exists(self, path: Path) -> bool:
        """Whether a file of the trial is there."""
        return self._store.info(self._name(path)) is not None if self.remote else path.exists()

    def open(self, path: Path) -> BinaryIO:
        """A file of the trial, to be read. Raises FileNotFoundError when there is none."""
        return io.BytesIO(self._store.read(self._name(path))) if self.remote else path.open("rb")

    def replace(self, path: Path, content: bytes) -> None:
        """Write a file of the trial, synced, unless the driver has been superseded."""
        if self.remote:
            self._store.put(self._name(path), content, permitted=self.check_current)
        else:
            self.check_current()  # before the folder is made that is missing where this machine does not see it
            replace_file(path, content, sync=True, permitted=self.check_current)

    def remove(self, path: Path) -> None:
        """Remove a file of the trial, if it is there, unless the driver has been superseded."""
        self.check_current()
        if self.remote:
            self._store.remove(self._name(path))
        else:
            path.unlink(missing_ok=True)

    def write_predictions(self, variants: Mapping[str, Sequence[Predictions]]) -> None:
        """Store each variant's predictions for several splits."""
        self.replace(self.predictions, predictions_bytes(variants))
