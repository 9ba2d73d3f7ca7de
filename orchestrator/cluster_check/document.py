"""A YAML file with the line of each of its parts, and what is found wrong there."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import yaml

Severity = Literal["error", "warning"]
Place = tuple[Any, ...]  # keys and positions that lead to a part: ("available_node_types", "gpu", "max_workers")
FIRST_LINE = 1


@dataclass(frozen=True, order=True)
class Finding:
    """One mistake: where it is, whether `ray up` should wait for it, and a sentence with the fix."""

    line: int
    severity: Severity
    message: str

    def __str__(self) -> str:
        return f"{self.line}: {self.severity}: {self.message}"


@dataclass(frozen=True)
class Document:
    """One YAML document. Whatever its parts are, asking for them never fails: what is of another type is not there."""

    value: Any
    root: yaml.Node
    text: str = field(repr=False)

    def at(self, *place: Any) -> Any:
        """The part at a place, or None."""
        value = self.value
        for step in place:
            if not _has(value, step):
                return None
            value = value[step]
        return value

    def mapping(self, *place: Any) -> dict[str, Any]:
        """The mapping at a place; empty when there is none."""
        value = self.at(*place)
        return {key: part for key, part in value.items() if isinstance(key, str)} if isinstance(value, dict) else {}

    def sequence(self, *place: Any) -> list[Any]:
        """The list at a place; empty when there is none."""
        value = self.at(*place)
        return value if isinstance(value, list) else []

    def text_at(self, *place: Any) -> str:
        """The text at a place; empty when there is none."""
        value = self.at(*place)
        return value if isinstance(value, str) else ""

    def number(self, *place: Any) -> float | None:
        """The number at a place, or None."""
        value = self.at(*place)
        return value if isinstance(value, int | float) and not isinstance(value, bool) else None

    def line(self, *place: Any) -> int:
        """The line on which a part begins, or else the nearest part around it that exists.

        An alias whose anchor stands under another key is probably misplaced: then its own line, not the anchor's.
        """
        node, line = self.root, _line(self.root)
        for step in place:
            found = _child(node, step)
            if found is None:
                break
            node, line = found
            if isinstance(step, str) and self._keys.get(id(node), step) != step:
                break
        return line

    @cached_property
    def _keys(self) -> dict[int, str]:
        """The key under which each part of a mapping first stands, by the identity of its node."""
        first: dict[int, str] = {}
        for node in _walk(self.root):
            if isinstance(node, yaml.MappingNode):
                for key, value in node.value:
                    first.setdefault(id(value), str(key.value))
        return first

    def error(self, place: Place, message: str) -> Finding:
        """A mistake that keeps the cluster from working, or from being safe."""
        return Finding(self.line(*place), "error", message)

    def warning(self, place: Place, message: str) -> Finding:
        """Something that is probably not meant."""
        return Finding(self.line(*place), "warning", message)

    def scalars(self) -> Iterator[tuple[int, str]]:
        """Line and text of every scalar, keys included, each once however often an alias repeats it."""
        for node in _walk(self.root):
            if isinstance(node, yaml.ScalarNode):
                yield _line(node), node.value


def _has(value: Any, step: Any) -> bool:
    if isinstance(value, dict):
        return step in value
    return isinstance(value, list) and isinstance(step, int) and 0 <= step < len(value)


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1


def _child(node: yaml.Node, step: Any) -> tuple[yaml.Node, int] | None:
    """The node one step down and its line, which in a mapping is the key's."""
    if isinstance(node, yaml.MappingNode):
        for key, value in reversed(node.value):  # of two equal keys the last one counts
            if key.value == str(step):
                return value, _line(key)
    if isinstance(node, yaml.SequenceNode) and isinstance(step, int) and step < len(node.value):
        return node.value[step], _line(node.value[step])
    return None


def _children(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [part for pair in node.value for part in pair]
    return list(node.value) if isinstance(node, yaml.SequenceNode) else []


def _walk(root: yaml.Node) -> Iterator[yaml.Node]:
    """Every node once, in the order of the file."""
    seen: set[int] = set()
    waiting = [root]
    while waiting:
        node = waiting.pop()
        if id(node) not in seen:
            seen.add(id(node))
            yield node
            waiting.extend(reversed(_children(node)))


def read(text: str) -> tuple[list[Document], list[Finding]]:
    """The documents of a YAML text, and what is wrong with it as YAML. Without documents it could not be read."""
    try:
        loader = yaml.SafeLoader(text)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        return [], [Finding(line, "error", "there is a character that YAML does not allow; remove it")]
    try:
        return _read(loader, text)
    except yaml.MarkedYAMLError as error:
        return [], [_syntax_error(error, text)]
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date such as 2025-99-99
        return [], [Finding(FIRST_LINE, "error", f"this is not YAML: {error}")]
    except RecursionError:
        return [], [Finding(FIRST_LINE, "error", "parts stand within parts hundreds deep; flatten the file")]


def _read(loader: yaml.SafeLoader, text: str) -> tuple[list[Document], list[Finding]]:
    documents, findings = [], []
    while loader.check_node():
        root = loader.get_node()
        if _contains_itself(root):
            return [], [Finding(_line(root), "error", "an alias stands inside the part it names; write the part out")]
        findings += list(_keys_given_twice(root))
        documents.append(Document(loader.construct_document(root), root, text))
    return documents, findings


def _syntax_error(error: yaml.MarkedYAMLError, text: str) -> Finding:
    mark = error.problem_mark or error.context_mark
    line = mark.line + 1 if mark else FIRST_LINE
    given = text.splitlines()[line - 1] if line <= len(text.splitlines()) else ""
    if re.match(r" *\t", given):
        return Finding(line, "error", "a tab indents this line, and YAML wants spaces; replace it")
    context = f" {error.context}" if error.context else ""
    return Finding(line, "error", f"this is not YAML: {error.problem or 'unreadable'}{context}; mend the syntax")


def _contains_itself(root: yaml.Node) -> bool:
    done: set[int] = set()
    path: set[int] = set()
    waiting = [(root, False)]
    while waiting:
        node, leaving = waiting.pop()
        if leaving:
            path.discard(id(node))
            done.add(id(node))
        elif id(node) in path:
            return True
        elif id(node) not in done:
            path.add(id(node))
            waiting.append((node, True))
            waiting.extend((child, False) for child in _children(node))
    return False


def _keys_given_twice(root: yaml.Node) -> Iterator[Finding]:
    for node in _walk(root):
        if isinstance(node, yaml.MappingNode):
            first: dict[tuple[str, str], int] = {}
            for key, _ in node.value:
                if not isinstance(key, yaml.ScalarNode):
                    continue
                if (known := first.setdefault((key.tag, key.value), _line(key))) != _line(key):
                    yield Finding(
                        _line(key),
                        "error",
                        f"{key.value} is given twice, first on line {known}, of which the last one counts; remove one",
                    )


def did_you_mean(given: object, choices: Iterable[str]) -> str:
    """The closest choice as a question, or nothing: " (did you mean max_workers?)"."""
    names = list(choices)
    matches = difflib.get_close_matches(str(given), names, n=1)
    matches = matches or [name for name in names if name.lower() == str(given).lower()]
    return f"; did you mean {matches[0]}?" if matches else ""
