"""Who may talk to the cluster: a token, asked for by every process and mounted on every node."""

from __future__ import annotations

import re
from collections.abc import Iterator

from orchestrator.cluster_check.commands import all_commands
from orchestrator.cluster_check.document import Document, Finding, Place

TOKEN_FILE = ".ray/auth_token"
MODE = re.compile(r"(?<![/${])\bRAY_AUTH_MODE['\"]?[=:]\s*['\"]?([^\s'\";&|]*)")
COMMENT = re.compile(r"(?:^|\s)#.*")
PROFILE = re.compile(r"\.(?:bashrc|profile|bash_profile|bash_login)\b")
EXPORTED = re.compile(r"(?:\bexport\b|\bdeclare -x\b)[^;&|]*\bRAY_AUTH_MODE=")
WRITTEN = re.compile(r">>|>|\btee\b|\bsed\b|\bray start\b")
FIX = "write export RAY_AUTH_MODE=token to ~/.bashrc in setup_commands"


def authentication_findings(document: Document) -> Iterator[Finding]:
    """Without a token whoever reaches the cluster's ports runs code on it."""
    commands = [(place, COMMENT.sub("", command)) for place, command in all_commands(document)]
    setting = [(place, command) for place, command in commands if MODE.search(command)]
    for place, command in setting:
        yield from _mode(document, place, command)
    told = {node for place, _ in setting for node in _nodes(place)}
    if not told and not _outside_commands(document):
        yield document.error(("setup_commands",), f"no token is asked for, so whoever reaches a port runs code; {FIX}")
    elif told and told != {"head", "workers"}:
        left = "workers ask" if told == {"head"} else "the head asks"
        yield document.error(setting[0][0], f"{left} for no token, since only the others have RAY_AUTH_MODE; {FIX}")
    if not any(target.endswith(TOKEN_FILE) for target in document.mapping("file_mounts")):
        yield document.error(
            ("file_mounts",),
            f"no token is mounted, so nodes cannot talk to each other; mount ~/{TOKEN_FILE} there",
        )


def _mode(document: Document, place: Place, command: str) -> Iterator[Finding]:
    for mode in MODE.findall(command):
        if mode != "token" and not mode.startswith("$"):
            yield document.error(
                place, f"RAY_AUTH_MODE is {mode or 'empty'}, so whoever reaches a port runs code; write token"
            )
    if PROFILE.search(command) and not EXPORTED.search(command):
        yield document.error(place, f"RAY_AUTH_MODE is set without export, so that Ray does not see it; {FIX}")
    elif not WRITTEN.search(command):
        yield document.error(place, f"RAY_AUTH_MODE is set for this command alone, not where Ray starts; {FIX}")


def _nodes(place: Place) -> tuple[str, ...]:
    """Which nodes run a command."""
    key = str(place[-2])
    return ("head",) if key.startswith("head") else ("workers",) if key.startswith("worker") else ("head", "workers")


def _outside_commands(document: Document) -> bool:
    """Whether something else asks for a token, such as an option of docker."""
    options = [text for key in ("run_options", "head_run_options") for text in document.sequence("docker", key)]
    user_data = [
        document.at("available_node_types", name, "node_config", "UserData")
        for name in document.mapping("available_node_types")
    ]
    return any((mode := MODE.search(str(text))) and mode[1] == "token" for text in [*options, *user_data])
