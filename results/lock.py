"""One process drives an experiment at a time, and each driver has a number.

On one machine the kernel's lock on a file says so. Where results lie in an object store a lease does, which its driver
renews: an object without news for a minute is that of a driver that is gone.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import platform
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from results.files import replace_file
from results.objects import ObjectStore, Refused, Unreachable
from results.schema import UsageError

LEASE, GENERATION, TOKEN = "lease.json", "generation", ".lease"
RENEWED_SECONDS = 10.0
LAPSED_SECONDS = 60.0
SETTLING_SECONDS = 0.5


class ExperimentLocked(UsageError):
    """Another process is writing to the experiment."""


@contextlib.contextmanager
def locked(root: Path) -> Iterator[int]:
    """Hold the experiment's lock; the kernel gives it back however the process ends. Yields the generation."""
    try:
        file = (root / "driver.lock").open("a+", encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot write to {root}: {error.strerror}; mend its permissions") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ExperimentLocked(
                f"experiment {root.name!r} is being written to by another process; "
                f"wait for it, stop it, or choose another --name"
            ) from error
        generation = read_generation(root) + 1
        replace_file(root / GENERATION, f"{generation}\n".encode(), sync=True)
        yield generation


def read_generation(root: Path) -> int:
    """The number of drivers that an experiment has had."""
    try:
        return int((root / GENERATION).read_text(encoding="ascii"))
    except FileNotFoundError:
        return 0


def generation_of(remote: ObjectStore) -> int:
    """The number of drivers that an experiment in an object store has had."""
    try:
        return int(remote.read(GENERATION))
    except FileNotFoundError:
        return 0


class Lease:
    """A driver's claim to an experiment in an object store, renewed by a thread until it is released.

    Stores that only put and read cannot exclude that two drivers claim it within the same half second: each looks again
    after that time, and before everything it sends.
    """

    def __init__(self, remote: ObjectStore, root: Path) -> None:
        """Claim it, for the copy in `root`, whose lock is held. Raises ExperimentLocked while another driver has it."""
        self._remote = remote
        self._name = root.name
        self._owner = {"token": uuid.uuid4().hex, "host": platform.node()}
        self._token_of_copy = root / TOKEN
        self._check_free()
        replace_file(self._token_of_copy, self._owner["token"].encode(), sync=False)
        remote.put(LEASE, self._content)
        time.sleep(SETTLING_SECONDS)
        self._remote = replace(remote, patience=0.0)  # from here on others try again
        self.check()
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)
        self._thread.start()

    @property
    def _content(self) -> bytes:
        return json.dumps(self._owner).encode()

    def _check_free(self) -> None:
        found, owner = self._remote.info(LEASE), self._read()
        # The lock of this copy is held here: whoever had its lease is gone. Names of hosts need not be unique.
        if found is None or owner.get("token") == self._last_token():
            return
        age = (self._now_ns() - found.modified_ns) / 1e9
        if age < LAPSED_SECONDS:
            raise ExperimentLocked(
                f"experiment {self._name!r} is being written to from {owner.get('host')}, last heard of {age:.0f} "
                f"seconds ago; wait for it, stop it, or choose another --name (after {LAPSED_SECONDS:.0f} seconds "
                f"without news it counts as gone)"
            )

    def _last_token(self) -> str:
        """Of the lease that this copy's last driver claimed."""
        return self._token_of_copy.read_text(encoding="ascii") if self._token_of_copy.exists() else ""

    def _now_ns(self) -> int:
        """The store's time: clocks of machines may differ by more than a minute."""
        name = f"{LEASE}.{self._owner['token']}"
        self._remote.put(name, b"")
        probe = self._remote.info(name)
        self._remote.remove(name)
        assert probe is not None
        return probe.modified_ns

    def _read(self) -> dict[str, str]:
        try:
            owner: dict[str, str] = json.loads(self._remote.read(LEASE))
        except (FileNotFoundError, ValueError):  # gone, or replaced by a longer one while it was read
            return {}
        return owner

    def check(self) -> None:
        """Raise ExperimentLocked when another driver has claimed it since."""
        owner = self._read()
        if owner.get("token") != self._owner["token"]:
            raise ExperimentLocked(
                f"experiment {self._name!r} has been taken over by a driver on {owner.get('host', 'another host')}; "
                f"this one writes no more"
            )

    def _renew(self) -> None:
        while not self._released.wait(RENEWED_SECONDS):
            try:
                self.check()
                if not self._released.is_set():
                    self._remote.put(LEASE, self._content)
            except ExperimentLocked:
                return
            except (Unreachable, Refused):
                continue  # it lapses if that lasts, and another driver may take over

    def release(self) -> None:
        """Give it back, unless it is another's by now. Where that fails it lapses."""
        self._released.set()
        self._thread.join()
        with contextlib.suppress(ExperimentLocked, Unreachable, Refused):
            self.check()
            self._remote.remove(LEASE)
