"""Ports that are open to the whole world."""

from __future__ import annotations

from collections.abc import Iterator

from orchestrator.cluster_check.document import Document, Finding

WHOLE_WORLD = ("0.0.0.0/0", "::/0")


def open_port_findings(document: Document) -> Iterator[Finding]:
    """Firewall rules for the whole world, wherever they stand."""
    for line, text in document.scalars():
        if text in WHOLE_WORLD:
            message = f"{text} opens ports to the whole world; write your own address, such as 203.0.113.7/32"
            yield Finding(line, "error", message)
