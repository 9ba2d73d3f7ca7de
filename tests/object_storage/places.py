"""What a test does with a place in an object store: look into it, change hosts, come by way of a gate."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from results import mirror
from results.events import encode, read_events
from results.objects import ObjectStore, canonical, within
from tests.background import PATIENCE
from tests.object_storage.server import Gate


def be_on(host: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Go on as another machine would: it has a name and copies of its own."""
    monkeypatch.setenv(mirror.CACHE_VARIABLE, str(tmp_path / host))
    monkeypatch.setattr("platform.node", lambda: host)


def stored(results: str, name: str = "sim") -> ObjectStore:
    return ObjectStore(within(canonical(results), name))


def log_in(store: ObjectStore, folder: Path) -> list[str]:
    """The events of the log as it is in the store, as lines: NaN is not equal to itself."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name in store.objects("events"):
        (folder / name.split("/")[1]).write_bytes(store.read(name))
    return lines_in(folder)


def lines_in(folder: Path) -> list[str]:
    return [encode(event) for event in read_events(folder)]


def eventually(condition: Callable[[], object]) -> None:
    """Wait until something is the case."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.05)


def through(gate: Gate, results: str) -> str:
    """The same place, by way of a gate."""
    place, _, query = results.partition("?")
    return f"{place}?{query.replace(f':{gate.behind[1]}', f':{gate.port}')}"
