"""What a cluster that grows by itself may grow to: `ray up` leaves it in a file, a Kubernetes manifest says it."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import Any

import yaml

from results.schema import UsageError

# `ray up` leaves there, on the head and nowhere else, what its autoscaler goes by. Ray 2.60 itself cannot be asked:
# its autoscaler does not report its configuration to the cluster.
BOOTSTRAP_FILE = Path("~/ray_bootstrap_config.yaml")
# On Kubernetes there is no such file: cluster.kuberay.yaml sets this on the head, and the check compares it.
VARIABLE = "HYPERPARAMETER_ENSEMBLES_MAX_RESOURCES"
NODE_TYPE_LABEL = "ray.io/node-group"


def most_resources(node_types: Collection[str]) -> dict[str, float]:
    """How much of each resource the workers of this head's cluster may come to have; nothing where no head is.

    `node_types`: of the nodes of the cluster that one is connected to, by their labels. When the file does not know
    them it is that of another cluster. Raises UsageError when the variable says nothing that can be read.
    """
    if declared := os.environ.get(VARIABLE):
        return _declared(declared)
    path = BOOTSTRAP_FILE.expanduser()
    if not node_types or not path.is_file():
        return {}
    config: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    workers = {name: of for name, of in config["available_node_types"].items() if name != config["head_node_type"]}
    if not set(node_types) <= {config["head_node_type"], *workers}:
        return {}
    names = {name for node_type in workers.values() for name in node_type["resources"]}
    return {name: _most_of(name, list(workers.values()), most_workers=config["max_workers"]) for name in names}


def _declared(text: str) -> dict[str, float]:
    try:
        return {str(name): float(amount) for name, amount in json.loads(text).items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise UsageError(
            f"""{VARIABLE} is {text!r}; wanted the most that the cluster may have, such as '{{"CPU": 32, "GPU": 8}}'"""
        ) from error


def _most_of(resource: str, node_types: list[dict[str, Any]], *, most_workers: int) -> float:
    """The sum over so many workers, as many as there may be of the types that have most of it."""
    counted = Counter[float]()
    for node_type in node_types:
        counted[float(node_type["resources"].get(resource, 0))] += node_type.get("max_workers", most_workers)
    total = 0.0
    for amount, count in sorted(counted.items(), reverse=True):
        taken = min(count, most_workers)
        total, most_workers = total + amount * taken, most_workers - taken
    return total
