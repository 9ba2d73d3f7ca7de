"""The shell commands of a cluster file: what they start, whether they may run twice, who may talk to the cluster."""

from __future__ import annotations

import re
from collections.abc import Iterator

from orchestrator.cluster_check.document import Document, Finding, Place

SETUP = ("initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands")
START = ("head_start_ray_commands", "worker_start_ray_commands")
RAYS_DEFAULTS_ON_AWS = {
    "setup_commands": ("error", "a nightly build of Ray for another Python"),
    "head_setup_commands": ("warning", "an unpinned boto3"),
    "head_start_ray_commands": ("error", "a dashboard that listens to the whole network"),
}
LOOPBACK = ("127.0.0.1", "localhost", "::1")
TOKEN_FILE = ".ray/auth_token"


def command_findings(document: Document) -> Iterator[Finding]:
    """All that is to be said of the commands."""
    yield from _rays_defaults(document)
    for key in START:
        yield from _start(document, key)
    yield from _ports(document)
    for place, command in _commands(document):
        yield from _not_twice(document, place, command)
    yield from _authentication(document)


def _commands(document: Document) -> Iterator[tuple[Place, str]]:
    lists: list[Place] = [(key,) for key in SETUP]
    for name in document.mapping("available_node_types"):
        lists += [("available_node_types", name, key) for key in SETUP]
    for place in lists:
        for position, command in enumerate(document.sequence(*place)):
            if isinstance(command, str):
                yield (*place, position), command


def _rays_defaults(document: Document) -> Iterator[Finding]:
    if document.at("provider", "type") != "aws":
        return
    for key, (severity, default) in RAYS_DEFAULTS_ON_AWS.items():
        if key not in document.mapping():
            make = document.error if severity == "error" else document.warning
            yield make((), f"{key} is missing, and Ray's default brings {default}; write your own, [] for none")


def _start(document: Document, key: str) -> Iterator[Finding]:
    commands = [str(command) for command in document.sequence(key)]
    if not commands:
        return
    is_head = key.startswith("head")
    if not commands[0].strip().startswith("ray stop"):
        yield document.error(
            (key,),
            f"{key} does not begin with ray stop, so that a second ray up finds the old Ray running; put it first",
        )
    position = next((i for i, command in enumerate(commands) if "ray start" in command), None)
    if position is None:
        yield document.error((key,), f"{key} has no ray start; add one")
        return
    for fragment, why in _wanted(document, is_head=is_head):
        if fragment not in commands[position]:
            yield document.error((key, position), f"ray start lacks {fragment}, {why}; add it")
    if "ulimit -n" not in " ".join(commands):
        yield document.warning(
            (key, position),
            "ray start runs with the shell's limit of open files, often 1024; put ulimit -n 65536 before it",
        )
    yield from _dashboard(document, (key, position), commands[position])


def _wanted(document: Document, *, is_head: bool) -> list[tuple[str, str]]:
    if not is_head:
        return [("$RAY_HEAD_IP", "and so does not find the head")]
    scaling = ("--autoscaling-config=~/ray_bootstrap_config.yaml", "and so no worker is ever started")
    return [("--head", "and so starts no head"), scaling]


def _dashboard(document: Document, place: Place, command: str) -> Iterator[Finding]:
    host = re.search(r"--dashboard-host[= ]['\"]?([^\s'\"]+)", command)
    if host and host[1] not in LOOPBACK:
        yield document.error(
            place,
            f"the dashboard listens on {host[1]}, for others too; write --dashboard-host=127.0.0.1",
        )


def _ports(document: Document) -> Iterator[Finding]:
    head = re.search(r"--port[= ](\d+)", " ".join(map(str, document.sequence(START[0]))))
    for position, command in enumerate(document.sequence(START[1])):
        worker = re.search(r"\$RAY_HEAD_IP:(\d+)", str(command))
        if worker and worker[1] != (head[1] if head else "6379"):
            yield document.error(
                (START[1], position),
                f"workers look for port {worker[1]}, the head is at {head[1] if head else '6379'}; write that",
            )


def _not_twice(document: Document, place: Place, command: str) -> Iterator[Finding]:
    """What a second `ray up` would do again, or hang at."""
    guarded = any(guard in command for guard in ("||", "&&", "if ", "test "))
    if ">>" in command and not guarded:
        yield document.warning(place, "the command appends again each time it runs; put grep -q ... FILE || before it")
    if re.search(r"\bgit clone\b|\bmkdir (?!-p)", command) and not guarded:
        yield document.warning(place, "the command fails when it runs a second time; put test -e ... || before it")
    if re.search(r"\bapt(-get)? install (?!.*(-y|--yes|-qy))", command) and not re.search(r"-\w*y\b", command):
        yield document.warning(place, "apt waits for an answer that nobody gives; add -y")


def _authentication(document: Document) -> Iterator[Finding]:
    """Without a token whoever reaches the cluster's ports runs code on it."""
    texts = [text for _, text in document.scalars()]
    if not any(re.search(r"RAY_AUTH_MODE[=:]\s*['\"]?token", text) for text in texts):
        yield document.error(
            ("setup_commands",),
            "no token is asked for, so whoever reaches a port runs code; export RAY_AUTH_MODE=token in setup_commands",
        )
    if not any(target.endswith(TOKEN_FILE) for target in document.mapping("file_mounts")):
        yield document.error(
            ("file_mounts",),
            f"no token is mounted, so nodes cannot talk to each other; mount ~/{TOKEN_FILE} there",
        )
