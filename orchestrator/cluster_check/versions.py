"""Ray and Python: the same on every node and in the project, or they refuse to work together."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from orchestrator.cluster_check.document import Document, Finding

PINNED_RAY = re.compile(r"\bray(?:\[[\w,\s-]*\])?\s*==\s*([\w.]+)")
UNPINNED_RAY = re.compile(r"^ray(?:\[[\w,\s-]*\])?(?:$|\s*(?:>=|~=|>|<|!=|@))")
RAY_WHEEL = re.compile(r"\bray-([\w.]+)-cp(\d)(\d+)-")
PYTHON = re.compile(r"(?:--python[ =]|\bpython==?|\bpython(?=3\.\d))(\d+\.\d+(?:\.\d+)?)")
IMAGE_TAG = re.compile(r"[:-](\d+\.\d+\.\d+)(?=-|$)")
IMAGE_PYTHON = re.compile(r"-py(\d)(\d+)\b")
INSTALLS = re.compile(r"\b(?:pip3?|uv) .*install\b|\bpip3? install\b")


@dataclass(frozen=True)
class Versions:
    """What the project was tested with: Ray, and Python to the minor version."""

    ray: str
    python: str


def project_versions(constraints: Path) -> Versions:
    """From constraints.txt: its line for Ray, and the Python its heading names."""
    text = constraints.read_text()
    ray = re.search(r"^ray==(\S+)$", text, re.MULTILINE)
    python = re.search(r"Python (\d+\.\d+)", text)
    if ray is None or python is None:
        raise OSError(f"{constraints}: wanted a line ray==VERSION, and 'Python 3.x' in its heading")
    return Versions(ray[1], python[1])


def version_findings(document: Document, project: Versions) -> Iterator[Finding]:
    """Every version named anywhere in the file, and Rays without one."""
    pythons: dict[str, int] = {}
    for line, text in document.scalars():
        for ray in [*PINNED_RAY.findall(text), *(match[0] for match in RAY_WHEEL.findall(text))]:
            yield from _ray(line, ray, project)
        for python in [*PYTHON.findall(text), *(f"{major}.{minor}" for _, major, minor in RAY_WHEEL.findall(text))]:
            yield from _python(line, python, project)
            if python.count(".") == 2:
                pythons.setdefault(python, line)
        if INSTALLS.search(text):
            yield from _unpinned(line, text)
    for python, line in list(pythons.items())[1:]:
        first = next(iter(pythons))
        yield Finding(
            line, "error", f"Python {python} here, but {first} on line {pythons[first]}; use one to the patch"
        )


def _ray(line: int, version: str, project: Versions) -> Iterator[Finding]:
    if version != project.ray:
        yield Finding(
            line,
            "error",
            f"Ray {version} is not the {project.ray} of constraints.txt, and both must be equal; write that",
        )


def _python(line: int, version: str, project: Versions) -> Iterator[Finding]:
    if ".".join(version.split(".")[:2]) != project.python:
        yield Finding(
            line,
            "error",
            f"Python {version} is not the {project.python} the project is pinned for; write {project.python}",
        )


def _unpinned(line: int, command: str) -> Iterator[Finding]:
    if "constraints.txt" in command:
        return
    words = _words(command)
    if any(UNPINNED_RAY.match(word) for word in words):
        yield Finding(line, "error", "Ray is installed without a version; write ray==... or add -c constraints.txt")
    elif "-e" in words or "--editable" in words:
        yield Finding(
            line, "error", "the project is installed without its pinned versions; add -c constraints.txt to the install"
        )


def _words(command: str) -> list[str]:
    try:
        return shlex.split(command, comments=True)
    except ValueError:  # a quotation that does not end
        return command.split()


def image_findings(line: int, image: str, project: Versions) -> Iterator[Finding]:
    """A container image's tag: some version of Ray, the right one."""
    tag = IMAGE_TAG.search(image)
    if tag is None:
        yield Finding(
            line,
            "error",
            f"image {image} does not say its version of Ray; use a tag with {project.ray}, not one that moves",
        )
    else:
        yield from _ray(line, tag[1], project)
    if python := IMAGE_PYTHON.search(image):
        yield from _python(line, f"{python[1]}.{python[2]}", project)


def docker_findings(document: Document, project: Versions) -> Iterator[Finding]:
    """Images, each with a name for its container."""
    names = ("image", "head_image", "worker_image")
    images = [name for name in names if document.at("docker", name)]
    for name in images:
        yield from image_findings(document.line("docker", name), str(document.at("docker", name)), project)
    if images and not document.at("docker", "container_name"):
        yield document.error(("docker",), "docker has an image and no container_name; add one, such as ray_container")
    if not images and document.at("docker", "container_name"):
        yield document.error(("docker",), "docker has a container_name and no image; add one")
