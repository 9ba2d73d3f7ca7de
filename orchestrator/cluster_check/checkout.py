"""The checkout on the nodes: mounted where the commands look for it, installed with what the head needs."""

from __future__ import annotations

import re
from collections.abc import Iterator

from orchestrator.cluster_check.commands import all_commands
from orchestrator.cluster_check.document import Document, Finding
from orchestrator.cluster_check.versions import INSTALLS

GOES_TO = re.compile(r"\bcd\s+['\"]?([^\s'\";&|]+)")
MAKES_A_FOLDER = re.compile(r"\b(?:git clone|mkdir|ln -s|tar|unzip|rsync|cp)\b")
EDITABLE_WITHOUT_EXTRAS = re.compile(r"(?:\s-e|\s--editable)[ =]['\"]?[\w~$./-]+['\"]?(?=\s|$)")


def checkout_findings(document: Document) -> Iterator[Finding]:
    """All that is to be said of it."""
    yield from _mounted(document)
    if document.at("provider", "type") == "aws":
        yield from _installed(document)


def _mounted(document: Document) -> Iterator[Finding]:
    """Folders below home that commands go to, and nothing brings there."""
    brought = {_below_home(document, target) for target in document.mapping("file_mounts")}
    commands = list(all_commands(document))
    made = " ".join(_below_home(document, command) for _, command in commands if MAKES_A_FOLDER.search(command))
    for place, command in commands:
        for folder in GOES_TO.findall(_below_home(document, command)):
            path = folder.rstrip("/")
            if not path.startswith("~/") or path in made:
                continue
            if not any(path == target or path.startswith(f"{target}/") for target in brought):
                yield document.error(
                    place, f"the command goes to {path}, to which file_mounts brings nothing; mount the project there"
                )


def _below_home(document: Document, text: str) -> str:
    """A text in which home is always ~."""
    user = re.escape(document.text_at("auth", "ssh_user") or "ubuntu")
    return re.sub(rf"\$HOME\b|\$\{{HOME\}}|/home/{user}(?=/)", "~", text).rstrip("/")


def _installed(document: Document) -> Iterator[Finding]:
    """boto3 on the head, which starts workers with it; Ray's default head_setup_commands and its images bring it."""
    commands = list(all_commands(document))
    if "head_setup_commands" not in document.mapping() or document.mapping("docker"):
        return
    if any("boto3" in command or "[aws" in command for _, command in commands):
        return
    for place, command in commands:
        if INSTALLS.search(command) and EDITABLE_WITHOUT_EXTRAS.search(command):
            yield document.error(
                place, "the project is installed without boto3, with which the head starts workers; write -e '.[aws]'"
            )
