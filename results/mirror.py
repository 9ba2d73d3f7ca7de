"""The copy of an experiment that lies in an object store: fetched to this machine, and sent back as it changes.

A driver works in a folder of this machine as it would anywhere; a thread sends what has changed, so that nothing waits
for the network. Workers' files (`predictions/`, `checkpoints/`) go to the store without this detour, and are fetched
when they are wanted.

What the store has is consistent whenever it is looked at: an ensemble is sent before the event that tells of it, events
in their order and whole, tables after the events that they are made from, and what events made superfluous is removed
last. A file fetched gets the store's time of its last change, by which it is known to be the same later on. While a
driver's changes have not all been sent, `.unsent` lies in the folder.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import threading
import time
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from results.files import CACHE_VARIABLE as CACHE_VARIABLE
from results.files import cache_folder, replace_file
from results.lock import GENERATION, ExperimentLocked, Lease, generation_of
from results.objects import FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS, Info, ObjectStore, Refused, Unreachable, canonical
from results.schema import DataWarning

UNSENT = ".unsent"
ON_DEMAND = re.compile(r"predictions/|checkpoints/|tensorboard/|ensembles/[^/]+/members/")
NOT_SENT = re.compile(r"predictions/|checkpoints/|driver\.lock$|generation$|lease\.json|study\.journal\.|(.*/)?\.")
EVENTS_SECONDS = 2.0
TABLES_SECONDS = 15.0
SECONDS_UNTIL_SAID = 20.0
THREADS = 16
SETTLED_SECONDS = 2.0
SEGMENT_BYTES = 65_536
"""After so many a segment of the log is closed: every few seconds the last one is put anew."""

Stamp = tuple[int, int, int]


def copies_folder(uri: str) -> Path:
    """Where this machine keeps copies of the experiments at a URI."""
    place = canonical(uri)
    readable = re.sub(r"[^A-Za-z0-9.-]+", "-", place.partition("?")[0])[:60]
    return cache_folder() / f"{readable}-{hashlib.sha256(place.encode()).hexdigest()[:8]}"


def in_parallel(function: Callable[[str], object], names: Iterable[str]) -> None:
    """Call it for each name, several at a time. Raises what one of them raises."""
    with ThreadPoolExecutor(THREADS) as threads:
        for _ in threads.map(function, names):
            pass


def pull(remote: ObjectStore, root: Path, *, to_drive: bool = False) -> None:
    """Bring the copy of an experiment up to date, but for what is fetched when it is wanted.

    A copy whose driver could not send everything stays as it is if the log in the store is the beginning of its own.
    `to_drive`: from here on it is changed by this process, and its driver has not sent everything.
    """
    with _alone(root):
        _pull(remote, root)
        if to_drive:
            mark_unsent(root)


@contextlib.contextmanager
def _alone(root: Path) -> Iterator[None]:
    """While no other process of this machine brings the copy up to date."""
    root.mkdir(parents=True, exist_ok=True)
    with (root / ".pulling").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _pull(remote: ObjectStore, root: Path) -> None:
    there = {name: info for name, info in remote.objects().items() if not ON_DEMAND.match(name)}
    if is_unsent(root) and _is_ahead(remote, root, [name for name in there if name.startswith("events/")]):
        return
    (root / UNSENT).unlink(missing_ok=True)  # first: what is half fetched is ahead of nothing
    stale = [name for name in _present(root) if name not in there and not ON_DEMAND.match(name)]
    for name in stale:
        (root / name).unlink()
    sent = [name for name in there if not NOT_SENT.match(name)]
    # The log comes last: a copy with the whole log has all that is made from it.
    for names in ([n for n in sent if not n.startswith("events/")], [n for n in sent if n.startswith("events/")]):
        in_parallel(lambda name: _fetch(remote, root / name, name, there[name]), names)
    (root / "events").mkdir(exist_ok=True)


def mark_unsent(root: Path) -> None:
    """Note that a copy has what the store has not."""
    (root / UNSENT).touch()


def is_unsent(root: Path) -> bool:
    """Whether a copy has, or had when its driver was killed, what the store has not."""
    return (root / UNSENT).exists()


def _is_ahead(remote: ObjectStore, root: Path, segments: Collection[str]) -> bool:
    """Whether each segment of the log in the store is the beginning of the copy's."""

    def is_beginning(name: str) -> bool:
        path = root / name
        return path.exists() and path.read_bytes().startswith(remote.read(name))

    return all(is_beginning(name) for name in segments)


def fetch(remote: ObjectStore, root: Path, names: Iterable[str]) -> None:
    """Bring files of the copy up to date; one that the store has not is removed."""
    in_parallel(lambda name: _fetch(remote, root / name, name, remote.info(name)), names)


def _fetch(remote: ObjectStore, path: Path, name: str, info: Info | None) -> None:
    while info is not None and not _is_same(path, info):
        try:
            content = remote.read(name)
        except FileNotFoundError:
            info = None
            break
        if len(content) == info.size:
            replace_file(path, content, sync=False)
            stamp = info.modified_ns - (not _is_settled(info))
            os.utime(path, ns=(stamp, stamp))
            return
        info = remote.info(name)  # replaced while it was read
    if info is None:
        path.unlink(missing_ok=True)


def _is_settled(info: Info) -> bool:
    """Whether another put would have another time: stores count in seconds. What is newer is fetched once more."""
    return time.time() - info.modified_ns / 1e9 > SETTLED_SECONDS


def _is_same(path: Path, info: Info) -> bool:
    try:
        found = path.stat()
    except FileNotFoundError:
        return False
    return (found.st_size, found.st_mtime_ns) == (info.size, info.modified_ns)


def _present(root: Path) -> dict[str, Stamp]:
    """The files of a copy that are sent, and how each is known to have changed."""
    found: dict[str, Stamp] = {}
    # All are listed before one is looked at: a segment of the log that has a successor has its last event.
    for path in list(root.rglob("*")):
        name = path.relative_to(root).as_posix()
        if NOT_SENT.match(name) or not path.is_file():
            continue
        try:
            stat = path.stat()
        except FileNotFoundError:
            continue
        found[name] = (stat.st_mtime_ns, stat.st_size, stat.st_ino)
    return found


class Mirror:
    """Sends what a driver changes in its copy, from a thread of its own, while it holds the lease.

    Raises ExperimentLocked while another driver has it. The copy is brought up to date once the lease is held.
    """

    def __init__(self, root: Path, remote: ObjectStore, *, generation: int) -> None:
        self._root = root
        self._remote = replace(remote, patience=0.0)  # what fails is tried again with the next turn
        self._patience = remote.patience
        self._lease = Lease(remote, root)
        try:
            pull(remote, root, to_drive=True)
            self.generation = max(generation, generation_of(remote) + 1)
            number = f"{self.generation}\n".encode()
            replace_file(root / GENERATION, number, sync=True)
            remote.put(GENERATION, number)
            self._sent = self._already_sent(remote)
        except BaseException:
            self._lease.release()
            raise
        self._superfluous: dict[str, Callable[[str], bool]] = {}
        self._taken_over: ExperimentLocked | None = None
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="mirror", daemon=True)
        self._thread.start()

    def _already_sent(self, remote: ObjectStore) -> dict[str, Stamp | None]:
        """What the store has, with the stamps of the files that are the same here."""
        present = _present(self._root)
        there = {name: info for name, info in remote.objects().items() if not NOT_SENT.match(name)}
        return {
            name: present.get(name) if _is_same(self._root / name, info) else None
            for name, info in there.items()
            if name in present or not ON_DEMAND.match(name)
        }

    def check(self) -> None:
        """Raise ExperimentLocked once another driver has taken over."""
        if self._taken_over is not None:
            raise self._taken_over

    def remove_checkpoints(self, trial_id: str, is_superfluous: Callable[[str], bool]) -> None:
        """Have the files of a trial removed whose names are superfluous, once the events until now are in the store."""
        self._superfluous[trial_id] = is_superfluous

    def _run(self) -> None:
        sent_at = time.monotonic()
        tables_at, said = sent_at + TABLES_SECONDS, False
        while not self._closing.wait(EVENTS_SECONDS):
            due = time.monotonic() >= tables_at
            try:
                self.send(tables=due)
            except ExperimentLocked as error:
                self._taken_over = error
                return
            except (OSError, Refused) as error:  # the store does not answer, or a file has been replaced meanwhile
                if not said and time.monotonic() - sent_at > SECONDS_UNTIL_SAID:
                    said = True
                    warnings.warn(f"{error}; going on without it, and trying again", DataWarning, stacklevel=2)
                continue
            sent_at, said = time.monotonic(), False
            if due:
                tables_at = time.monotonic() + TABLES_SECONDS

    def send(self, *, tables: bool) -> None:
        """Send what has changed. Raises Unreachable, Refused, or ExperimentLocked if another driver has taken over."""
        self._lease.check()
        superfluous = dict(self._superfluous)
        # Read before the log is: an event is in the log before a table has its row.
        of_tables = self._changed(lambda name: not name.startswith(("events/", "ensembles/"))) if tables else []
        contents = [(name, stamp, self._content(name)) for name, stamp in of_tables]
        if tables:
            for name, stamp in self._changed(lambda name: name.startswith("ensembles/")):
                self._put(name, stamp, self._content(name))
        for name, stamp in self._changed(lambda name: name.startswith("events/")):
            content = self._content(name)
            self._put(name, stamp, content[: content.rfind(b"\n") + 1])
        if tables:
            self._remove_vanished()
        for name, stamp, content in contents:
            self._put(name, stamp, content)
        self._remove_superfluous(superfluous)

    def _changed(self, wanted: Callable[[str], bool]) -> list[tuple[str, Stamp]]:
        """What is to be put, in order; `ensemble.json` after the other files of its folder, which it completes."""
        present = _present(self._root)
        names = [name for name in present if wanted(name) and self._sent.get(name) != present[name]]
        names.sort(key=lambda name: (name.rpartition("/")[2] == "ensemble.json", name))
        return [(name, present[name]) for name in names]

    def _content(self, name: str) -> bytes:
        return (self._root / name).read_bytes()

    def _put(self, name: str, stamp: Stamp, content: bytes) -> None:
        # A machine may have slept since the last one, and another driver begun.
        self._remote.put(name, content, permitted=self._lease.check)
        self._sent[name] = stamp

    def _remove_vanished(self) -> None:
        """Remove parts of tables that have been replaced by others; nothing else ever is."""
        gone = set(self._sent) - set(_present(self._root))
        for name in sorted(name for name in gone if name.startswith(("trials/", "epochs/"))):
            self._remote.remove(name)
            del self._sent[name]

    def _remove_superfluous(self, of_trials: dict[str, Callable[[str], bool]]) -> None:
        if not of_trials:
            return
        for name in self._remote.objects("checkpoints"):
            _, trial_id, file = name.split("/", 2)
            if trial_id in of_trials and of_trials[trial_id](file):
                self._remote.remove(name)
        for trial_id in of_trials:
            if self._superfluous[trial_id] is of_trials[trial_id]:
                del self._superfluous[trial_id]

    def remove_unknown(self, trial_ids: Collection[str]) -> None:
        """Remove what workers have stored of other trials than these.

        A driver that was killed may have started trials that its log in the store does not tell of: their numbers are
        going to be given to others, which must not go on from these checkpoints.
        """
        remote = replace(self._remote, patience=self._patience)
        for folder in ("checkpoints", "predictions"):
            for name in remote.objects(folder):
                if name.split("/")[1].removesuffix(".parquet") not in trial_ids:
                    remote.remove(name)

    def close(self, *, fix: str) -> None:
        """Send everything and give the lease back. Raises Unreachable or Refused, with the `fix`, when that fails."""
        self._closing.set()
        self._thread.join()
        try:
            if self._taken_over is None:
                self._send_patiently(fix)
                with contextlib.suppress(Unreachable, Refused):  # then they are fetched once more
                    self._mark_same()
                (self._root / UNSENT).unlink(missing_ok=True)
        finally:
            self._lease.release()
        self.check()

    def _send_patiently(self, fix: str) -> None:
        deadline, wait = time.monotonic() + self._patience, FIRST_WAIT_SECONDS
        while True:
            try:
                self.send(tables=True)
                return
            except (Unreachable, Refused) as error:
                if isinstance(error, Refused) or time.monotonic() + wait > deadline:
                    raise type(error)(f"{error}; what was not sent is safe in {self._root}. {fix}") from error
                if wait == FIRST_WAIT_SECONDS:
                    warnings.warn(f"{error}; trying again for {self._patience:g} seconds", DataWarning, stacklevel=2)
            time.sleep(wait)
            wait = min(2 * wait, LONGEST_WAIT_SECONDS)

    def _mark_same(self) -> None:
        """Give files the store's time of what was sent, so that they need not be fetched."""
        present, there = _present(self._root), replace(self._remote, patience=FIRST_WAIT_SECONDS).objects()
        for name, stamp in present.items():
            if name in there and self._sent.get(name) == stamp and there[name].size == stamp[1]:
                os.utime(self._root / name, ns=(there[name].modified_ns,) * 2)
