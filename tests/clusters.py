"""Ray clusters for tests."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from ray.cluster_utils import Cluster

from tests.background import ON_A_BUSY_MACHINE


@contextmanager
def cluster_of(num_cpus: int) -> Iterator[Cluster]:
    """A cluster whose head has so many CPUs."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ON_A_BUSY_MACHINE.items():
            patch.setenv(name, value)
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": num_cpus, "include_dashboard": False})
        try:
            yield cluster
        finally:
            cluster.shutdown()
