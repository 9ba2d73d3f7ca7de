"""A test's hand on the fake AWS: commands on the laptop, waiting, and how long each step took."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from results.store import Experiment
from tests.cluster.cloud import CREDENTIALS, LAPTOP, LIVE, instances
from tests.cluster.hosts import SYSTEM_PATH, Lab
from tests.conftest import ROOT
from tests.object_storage.server import Gate

PATIENCE = 600.0  # for anything that is waited for; on a quiet machine the longest is a minute and a half
POLL_SECONDS = 0.3
CLUSTER_FILE = "/mnt/shared/cluster.yaml"
LINES_SHOWN = 60
STATE_OF_HEAD = (
    "tail -n 25 /tmp/ray/session_latest/logs/monitor.log; ps axo pcpu,rss,args --sort=-pcpu | cut -c1-99 | head"
)


@dataclass
class Session:
    """`results` is where this process finds results; hosts reach the same through the gate, which is theirs alone."""

    lab: Lab
    results: str
    gate: Gate
    started: float = field(default_factory=time.monotonic)
    commands: int = 0

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Time a step, and say that it has been taken."""
        begin = time.monotonic()
        yield
        print(f"{time.monotonic() - begin:6.1f} s  {name}", flush=True)

    def on_laptop(self, command: str) -> list[str]:
        """The command line that runs a shell command in the checkout, where a user would."""
        path = f"{Path(sys.executable).parent}:{SYSTEM_PATH}"
        profile = {**CREDENTIALS, "PATH": path, "PYTHONDONTWRITEBYTECODE": "1"}
        return self.lab.inside(LAPTOP, ["bash", "-c", f"cd {ROOT} && {command}"], profile=profile)

    def run(self, command: str) -> str:
        """What a shell command on the laptop prints. Raises AssertionError when it fails."""
        with self.running(command) as running:
            status = running.wait()
            assert status == 0, f"{command}\n{running.printed()}\n{self.logs()}"
            return running.output.read_text(errors="replace")

    @contextlib.contextmanager
    def running(self, command: str) -> Iterator[Running]:
        """A shell command on the laptop while it runs; ended when the block is left."""
        self.commands += 1
        output = self.lab.folder.parent / f"output-{self.commands}"
        with output.open("wb") as log:
            process = subprocess.Popen(
                self.on_laptop(command),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            yield Running(self, process, output)
        finally:
            process.kill()
            process.wait()

    def experiment(self, name: str) -> Experiment:
        """An experiment as it stands."""
        return Experiment.open(self.results, name)

    def head(self) -> str:
        """The instance that is the head."""
        return next(instance["InstanceId"] for instance in instances(*LIVE) if _node_kind(instance) == "head")

    def wait_until(self, happened: Callable[[], bool], *, told: Callable[[], str] = lambda: "") -> None:
        """Wait for something. Raises AssertionError, with `told` and the autoscaler's log, when it does not happen."""
        deadline = time.monotonic() + PATIENCE
        while not happened():
            assert time.monotonic() < deadline, f"{told()}\n{self.logs()}"
            time.sleep(POLL_SECONDS)

    def logs(self) -> str:
        """What EC2 has done, what Ray's autoscaler says, and who uses what."""
        parts = [(self.lab.folder.parent / "cloud.log").read_text()]
        with contextlib.suppress(StopIteration, OSError):
            parts.append(self.lab.run(self.head(), ["bash", "-c", STATE_OF_HEAD]).stdout)
        return "\n".join(parts)


@dataclass
class Running:
    """A command that runs on the laptop."""

    session: Session
    process: subprocess.Popen[bytes]
    output: Path

    def printed(self) -> str:
        """The end of what it has printed."""
        return _last_lines(self.output.read_text(errors="replace"))

    def wait_until(self, happened: Callable[[], bool]) -> None:
        """Wait for something that the command brings about. Raises AssertionError when it ends before."""

        def going_on() -> bool:
            ended = self.process.poll() is not None
            if happened():
                return True
            assert not ended, f"it has ended\n{self.printed()}\n{self.session.logs()}"
            return False

        self.session.wait_until(going_on, told=self.printed)

    def wait(self) -> int:
        """Its exit status."""
        self.session.wait_until(lambda: self.process.poll() is not None, told=self.printed)
        return int(self.process.returncode)


def _node_kind(instance: dict[str, Any]) -> str:
    tags = {tag["Key"]: tag["Value"] for tag in instance.get("Tags", [])}
    return tags.get("ray-node-type", "")


def _last_lines(text: str) -> str:
    return "\n".join(text.splitlines()[-LINES_SHOWN:])
