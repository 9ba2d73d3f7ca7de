"""The commands that start Ray on the head and on workers: they begin afresh, find the head, and come back."""

from __future__ import annotations

import re
from collections.abc import Iterator

from orchestrator.cluster_check.document import Document, Finding, Place

HEAD, WORKERS = "head_start_ray_commands", "worker_start_ray_commands"
START = (HEAD, WORKERS)
LOOPBACK = ("127.0.0.1", "localhost", "::1")
RAY_START = re.compile(r"\bray start\b")
RAY_COMMAND = re.compile(r"\bray (start|stop)\b")
HEAD_ADDRESS = re.compile(r"\$(?:RAY_HEAD_IP\b|\{RAY_HEAD_IP\})")
HEAD_PORT = re.compile(r"\$(?:RAY_HEAD_IP|\{RAY_HEAD_IP\}):(\d+)")
# Where Ray puts it. A ~ may stand in quotes, since ray start expands it; in single quotes nobody expands a variable.
SCALING = re.compile(
    r"--autoscaling-config[= ](?:['\"]?(?:~|/root|/home/[\w.-]+)|\"?\$(?:HOME|\{HOME\}))/ray_bootstrap_config\.yaml\b"
)
RAYS_PORT = "6379"


def start_findings(document: Document) -> Iterator[Finding]:
    """All that is to be said of them."""
    for key in START:
        if document.at(key) == []:
            node = "the head" if key == HEAD else "workers"
            yield document.error(
                (key,), f"{key} is empty, so that no Ray is started on {node}; write ray stop and ray start"
            )
        yield from _start(document, key)
    yield from _ports(document)


def _start(document: Document, key: str) -> Iterator[Finding]:
    commands = [str(command) for command in document.sequence(key)]
    if not commands:
        return
    first = RAY_COMMAND.search("\n".join(commands))
    if first is None or first[1] != "stop":
        yield document.error(
            (key,),
            f"{key} does not begin with ray stop, so that a second ray up finds the old Ray running; put it first",
        )
    position = next((i for i, command in enumerate(commands) if RAY_START.search(command)), None)
    if position is None:
        yield document.error((key,), f"{key} has no ray start; add one")
        return
    yield from _options(document, (key, position), commands[position])
    if "ulimit -n" not in " ".join(commands):
        yield document.warning(
            (key, position),
            "ray start runs with the shell's limit of open files, often 1024; put ulimit -n 65536 before it",
        )


def _options(document: Document, place: Place, command: str) -> Iterator[Finding]:
    """Of ray start."""
    if place[0] == HEAD:
        yield from _of_the_head(document, place, command)
    else:
        yield from _of_a_worker(document, place, command)
    if re.search(r"--block\b", command):
        yield document.error(
            place, "ray start --block never returns, and ray up waits for the command to end; remove --block"
        )
    host = re.search(r"--dashboard-host[= ]['\"]?([^\s'\"]+)", command)
    if host and host[1] not in LOOPBACK:
        yield document.error(
            place, f"the dashboard listens on {host[1]}, for others too; write --dashboard-host=127.0.0.1"
        )


def _of_the_head(document: Document, place: Place, command: str) -> Iterator[Finding]:
    if "--head" not in command:
        yield document.error(place, "ray start lacks --head, and so starts no head; add it")
    if not SCALING.search(command):
        wanted = "--autoscaling-config=~/ray_bootstrap_config.yaml"
        yield document.error(place, f"ray start lacks {wanted}, and so no worker is ever started; add it")


def _of_a_worker(document: Document, place: Place, command: str) -> Iterator[Finding]:
    if not HEAD_ADDRESS.search(command):
        yield document.error(place, "ray start lacks $RAY_HEAD_IP, and so does not find the head; add it")
    elif any(HEAD_ADDRESS.search(part) for part in _single_quoted(command)):
        yield document.error(
            place, "$RAY_HEAD_IP stands in single quotes, in which the shell leaves it as it is; remove the quotes"
        )
    elif not re.search(HEAD_ADDRESS.pattern + r"['\"]?:", command):
        yield document.error(
            place, f"ray start has $RAY_HEAD_IP without the head's port; write $RAY_HEAD_IP:{_port(document)}"
        )


def _single_quoted(command: str) -> Iterator[str]:
    for quoted in re.findall(r"\"[^\"]*\"|'[^']*'", command):
        if quoted[0] == "'" and not RAY_START.search(quoted):  # bash -c '...' has a shell of its own
            yield quoted


def _port(document: Document) -> str:
    """The head's, as its commands have it."""
    given = re.search(r"--port[= ](\d+)", " ".join(map(str, document.sequence(HEAD))))
    return given[1] if given else RAYS_PORT


def _ports(document: Document) -> Iterator[Finding]:
    head = _port(document)
    for position, command in enumerate(document.sequence(WORKERS)):
        worker = HEAD_PORT.search(str(command))
        if worker and worker[1] != head:
            message = f"workers look for port {worker[1]}, the head is at {head}; write that"
            yield document.error((WORKERS, position), message)
