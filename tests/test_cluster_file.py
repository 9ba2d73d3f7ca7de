"""The cluster files pass what `ray up` begins with, and Ray's scheduler picks from them what is meant."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.autoscaler.v2.event_logger import AutoscalerEventLogger
from ray.autoscaler.v2.instance_manager.config import NodeTypeConfig
from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
from ray.autoscaler.v2.utils import ResourceRequestUtil
from ray.core.generated.autoscaler_pb2 import ClusterResourceConstraint, GangResourceRequest

from tests.conftest import ROOT

Bundle = dict[str, int]
TRIAL = {"CPU": 1, "GPU": 1}
# What Ray adds to the declared resources, as AWS describes the types: they take part in how it scores one.
ADDED = {
    "g6.xlarge": {"memory": 12025908428, "accelerator_type:L4": 1.0},
    "g5.xlarge": {"memory": 12025908428, "accelerator_type:A10G": 1.0},
    "p4d.24xlarge": {"memory": 865865406873, "accelerator_type:A100": 1.0},
    "p4de.24xlarge": {"memory": 865865406873, "accelerator_type:A100": 1.0},
}


def load(name: str = "cluster.yaml") -> dict:
    config = yaml.safe_load((ROOT / name).read_text())
    assert isinstance(config, dict)
    return config


@pytest.mark.parametrize("name", ["cluster.yaml", "cluster.local.yaml"])
def test_ray_accepts_the_cluster_file(name: str) -> None:
    validate_config(prepare_config(load(name)))


@pytest.mark.parametrize("mistake", [{"idle_timeout": 5}, {"max_workers": -1}])
def test_ray_would_not_accept_a_mistake(mistake: dict[str, object]) -> None:
    config = {**copy.deepcopy(load()), **mistake}
    with pytest.raises(Exception, match=r"idle_timeout|minimum"):
        validate_config(prepare_config(config))


def worker_types() -> dict[str, NodeTypeConfig]:
    config = load()
    return {
        name: NodeTypeConfig(
            name=name,
            min_worker_nodes=node_type.get("min_workers", 0),
            max_worker_nodes=node_type["max_workers"],
            priority=node_type["priority"],
            resources={**node_type["resources"], **ADDED[node_type["node_config"]["InstanceType"]]},
        )
        for name, node_type in config["available_node_types"].items()
        if name != config["head_node_type"]
    }


def launched(
    *, gangs: Sequence[Sequence[Bundle]] = (), asked: Sequence[Bundle] = (), without: Sequence[str] = ()
) -> dict[str, int]:
    """What the autoscaler launches for placement groups and for what was asked ahead, where some types had no room."""
    make = ResourceRequestUtil.make
    counted = ResourceRequestUtil.group_by_count([make(bundle) for bundle in asked])
    request = SchedulingRequest(
        disable_launch_config_check=True,
        node_type_configs=worker_types(),
        max_num_nodes=load()["max_workers"],
        gang_resource_requests=[GangResourceRequest(requests=[make(bundle) for bundle in gang]) for gang in gangs],
        cluster_resource_constraints=[ClusterResourceConstraint(resource_requests=counted)] if asked else [],
        recoverable_resource_availabilities=dict.fromkeys(without, 0.0),
    )
    reply = ResourceDemandScheduler(AutoscalerEventLogger(_Silent())).schedule(request)
    return {launch.instance_type: launch.count for launch in reply.to_launch}


class _Silent:
    """A log that nobody reads."""

    def info(self, message: str) -> None: ...
    def warning(self, message: str) -> None: ...
    def error(self, message: str) -> None: ...
    def debug(self, message: str) -> None: ...


def test_a_trial_gets_a_single_gpu_on_spot() -> None:
    machines = launched(gangs=[[TRIAL]] * 8)
    assert sum(machines.values()) == 8
    assert set(machines) <= {"g6.spot", "g5.spot"}


def test_trials_fall_back_to_on_demand_where_spot_has_no_room() -> None:
    assert launched(gangs=[[TRIAL]] * 4, without=["g6.spot", "g5.spot"]) == {"g6.ondemand": 4}
    assert set(launched(gangs=[[TRIAL]] * 4, without=["g6.spot"])) == {"g5.spot"}


def test_eight_workers_get_one_machine_of_eight() -> None:
    assert launched(gangs=[[TRIAL] * 8]) == {"a100.spot": 1}
    no_spot = ["a100.spot", "a100-80gb.spot"]
    assert launched(gangs=[[TRIAL] * 8], without=no_spot) == {"a100.ondemand": 1}


def test_what_the_guide_asks_for_ahead_is_what_comes() -> None:
    ahead = launched(asked=[{"GPU": 1, "one_gpu": 1}] * 8)
    assert sum(ahead.values()) == 8
    assert set(ahead) <= {"g6.spot", "g5.spot"}
    assert launched(asked=[{"GPU": 8}]) == {"a100.spot": 1}


def test_without_one_gpu_eight_gpus_asked_for_would_be_a_machine_of_eight() -> None:
    assert launched(asked=[{"GPU": 1}] * 8) == {"a100.spot": 1}


def test_no_more_machines_than_max_workers() -> None:
    assert sum(launched(gangs=[[TRIAL]] * 50).values()) == load()["max_workers"]
