"""Where the experiments of a results folder lie, on a disk or in an object store, and which there are."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

from results.mirror import copies_folder, in_parallel, is_unsent
from results.objects import ObjectStore, connected, is_remote, within


def place(results_dir: str | Path, name: str) -> tuple[Path, ObjectStore | None]:
    """Where an experiment is read and written; in an object store its copy, and where it comes from."""
    if not is_remote(results_dir):
        return Path(results_dir, name), None
    uri = connected(str(results_dir)).uri
    return copies_folder(uri) / name, ObjectStore(within(uri, name))


def exists(results_dir: str | Path, name: str) -> bool:
    """Whether there is something of that name, be it a copy of which nothing could be sent yet."""
    root, remote = place(results_dir, name)
    return root.exists() if remote is None else is_unsent(root) or bool(remote.objects("events"))


def names(results_dir: str | Path) -> list[str]:
    """The experiments of a results folder, the newest last."""
    started: dict[str, str] = {}
    if is_remote(results_dir):
        store = connected(str(results_dir))

        def note(name: str) -> None:
            with contextlib.suppress(FileNotFoundError, ValueError, KeyError):
                started[name] = json.loads(store.read(f"{name}/experiment.json"))["started_at"]

        in_parallel(note, (name for name in store.folders() if not name.startswith(".")))
    else:
        for path in Path(results_dir).glob("[!.]*/experiment.json"):
            with contextlib.suppress(OSError, ValueError, KeyError):
                started[path.parent.name] = json.loads(path.read_text(encoding="utf-8"))["started_at"]
    return sorted(started, key=lambda name: started[name])
