"""The shell commands of a cluster file: what Ray puts where they are left out, and whether they may run twice."""

from __future__ import annotations

import re
from collections.abc import Iterator

from orchestrator.cluster_check.document import Document, Finding, Place
from orchestrator.cluster_check.ray_start import START

SETUP = ("initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands")
RAYS_DEFAULTS_ON_AWS = {
    "setup_commands": ("error", "a nightly build of Ray for another Python"),
    "head_setup_commands": ("warning", "an unpinned boto3"),
    "head_start_ray_commands": ("error", "a dashboard that listens to the whole network"),
}


def command_findings(document: Document) -> Iterator[Finding]:
    """All that is to be said of the commands."""
    yield from _rays_defaults(document)
    yield from _left_out_on_local(document)
    for place, command in setup_commands(document):
        yield from _not_twice(document, place, command)


def setup_commands(document: Document) -> Iterator[tuple[Place, str]]:
    """Place and text of every command that prepares a node, those of single node types too."""
    lists: list[Place] = [(key,) for key in SETUP]
    for name in document.mapping("available_node_types"):
        lists += [("available_node_types", name, key) for key in SETUP]
    yield from _in_lists(document, lists)


def all_commands(document: Document) -> Iterator[tuple[Place, str]]:
    """Place and text of every command, those that start Ray too."""
    yield from setup_commands(document)
    yield from _in_lists(document, [(key,) for key in START])


def _in_lists(document: Document, lists: list[Place]) -> Iterator[tuple[Place, str]]:
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


def _left_out_on_local(document: Document) -> Iterator[Finding]:
    if document.at("provider", "type") != "local":
        return
    for key in START:
        if key not in document.mapping():
            yield document.warning(
                (), f"{key} is missing, and Ray's default keeps the shell's limit of open files; write your own"
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
