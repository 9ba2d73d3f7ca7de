"""Edits of a cluster file, and where their effects stand in it."""

from __future__ import annotations

import re
from collections.abc import Callable

Edit = Callable[[str], str]


def replaced(old: str, new: str) -> Edit:
    """The first `old` becomes `new`."""

    def edit(text: str) -> str:
        assert old in text, old
        return text.replace(old, new, 1)

    return edit


def without(*words: str) -> Edit:
    """The first line that holds all the words goes."""

    def edit(text: str) -> str:
        lines = text.splitlines(keepends=True)
        position = next(i for i, line in enumerate(lines) if all(word in line for word in words))
        return "".join(lines[:position] + lines[position + 1 :])

    return edit


def without_block(key: str) -> Edit:
    """A top-level key goes, with what is indented under it."""
    return lambda text: re.sub(rf"^{key}:.*\n(?:[ ].*\n|\n(?=[ ]))*", "", text, count=1, flags=re.MULTILINE)


def in_type(name: str, edit: Edit) -> Edit:
    """An edit that begins at a node type."""

    def edit_there(text: str) -> str:
        start = text.index(f"\n  {name}:\n")
        return text[:start] + edit(text[start:])

    return edit_there


def first_line_with(*words: str) -> Callable[[str], int]:
    """Where all the words first stand on one line."""
    return lambda text: next(i for i, line in enumerate(text.splitlines(), 1) if all(word in line for word in words))


def line_in_type(name: str, words: str) -> Callable[[str], int]:
    """Where words first stand from a node type on."""

    def find(text: str) -> int:
        start = text.index(f"\n  {name}:\n") + 1
        return text.count("\n", 0, text.index(words, start)) + 1

    return find


def top_level(key: str) -> Callable[[str], int]:
    return lambda text: next(i for i, line in enumerate(text.splitlines(), 1) if line.startswith(f"{key}:"))


def first_key(text: str) -> int:
    return top_level("cluster_name")(text)


Mistake = tuple[Edit, Callable[[str], int], str, str]  # edit, line, severity, part of the sentence
