"""Commands as processes of their own that need no start-up: forked from a server that has imported torch and Ray.

Each process gets its own arguments, folder, environment, output and signals, as from a shell. Only the imports, which
take ten CPU-seconds a command, happen once for all commands of a test session.
"""

from __future__ import annotations

import atexit
import functools
import importlib
import json
import os
import random
import runpy
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
IMPORTED_ONCE = (
    *("orchestrator.search", "orchestrator.workers", "orchestrator.ensemble", "orchestrator.distill"),
    "tests.simulation",
)
# What libraries read when they are loaded has to be in the server's environment.
SERVER_SETTINGS = {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "OMP_WAIT_POLICY": "passive"}
NUMBER = struct.Struct("q")
NUM_DESCRIPTORS = 3  # standard output, standard error, and the socket for answers


class Command:
    """A process that runs a module as `python -m` does. Its methods are those of subprocess.Popen."""

    def __init__(
        self,
        module: str,
        *arguments: str,
        folder: Path,
        stdout: int,
        stderr: int,
        environment: dict[str, str] | None = None,
    ) -> None:
        """`environment`: by default that of this process. `stdout`, `stderr`: file descriptors."""
        self.args = [sys.executable, "-m", module, *arguments]
        self.returncode: int | None = None
        self._answers, theirs = socket.socketpair()
        request = {
            "module": module,
            "arguments": arguments,
            "folder": str(folder),
            "environment": {**(os.environ if environment is None else environment), **SERVER_SETTINGS},
        }
        with theirs:
            _send(_server(), json.dumps(request).encode(), [stdout, stderr, theirs.fileno()])
        self.pid = self._number()

    def _number(self) -> int:
        (number,) = NUMBER.unpack(_received(self._answers, NUMBER.size))
        return int(number)

    def wait(self, timeout: float | None = None) -> int:
        """The exit status, negative for a signal. Raises subprocess.TimeoutExpired."""
        if self.returncode is None:
            self._answers.settimeout(timeout)
            try:
                self.returncode = self._number()
            except (TimeoutError, BlockingIOError) as error:
                raise subprocess.TimeoutExpired(self.args, timeout or 0.0) from error
            self._answers.close()
        return self.returncode

    def poll(self) -> int | None:
        """The exit status, None while the process runs."""
        try:
            return self.wait(timeout=0)
        except subprocess.TimeoutExpired:
            return None

    def send_signal(self, number: int) -> None:
        """Send a signal, unless the process has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Send SIGKILL."""
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        """Send SIGTERM."""
        self.send_signal(signal.SIGTERM)


def _send(server: socket.socket, content: bytes, descriptors: Sequence[int]) -> None:
    socket.send_fds(server, [NUMBER.pack(len(content))], descriptors)
    server.sendall(content)


def _received(connection: socket.socket, size: int) -> bytes:
    content = b""
    while len(content) < size:
        part = connection.recv(size - len(content))
        if not part:
            raise ConnectionError("the command server has ended")
        content += part
    return content


@functools.cache
def _server() -> socket.socket:
    """Start the server of this process, which ends with it. Returns the socket for requests."""
    ours, theirs = socket.socketpair()
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.commands"], cwd=ROOT, env={**os.environ, **SERVER_SETTINGS}, stdin=theirs
    )
    theirs.close()

    def end() -> None:
        ours.close()
        server.wait()

    atexit.register(end)
    return ours


def _serve() -> dict[str, Any]:
    """Answer requests until nobody can send any. Returns in every process that is to run a command: its request."""
    server = socket.socket(fileno=sys.stdin.fileno())
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        header, descriptors, *_ = socket.recv_fds(server, NUMBER.size, NUM_DESCRIPTORS)
        if not header:
            os._exit(0)
        content = _received(server, *NUMBER.unpack(header))
        if not os.fork():
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            _run_below(descriptors)
            return dict(json.loads(content))
        for descriptor in descriptors:
            os.close(descriptor)


def _run_below(descriptors: list[int]) -> None:
    """Return in a child process, with its output set; this process waits for the child, says how it ended, and ends."""
    stdout, stderr, answers = descriptors
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if child := os.fork():
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        os.write(answers, NUMBER.pack(child))
        status = os.waitpid(child, 0)[1]
        os.write(answers, NUMBER.pack(os.waitstatus_to_exitcode(status)))
        os._exit(0)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((nothing, 0), (stdout, 1), (stderr, 2)):
        os.dup2(source, target)
    for descriptor in (nothing, stdout, stderr, answers):
        os.close(descriptor)


def _run(module: str, arguments: Sequence[str], folder: str, environment: dict[str, str]) -> None:
    """Run a module in this process as `python -m` does."""
    random.seed()
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.path[0] = folder
    sys.argv = [module, *arguments]
    sys.modules.pop(module, None)
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the tests, which then end this process
    for name in IMPORTED_ONCE:
        importlib.import_module(name)
    _run(**_serve())
