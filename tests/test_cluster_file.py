"""cluster.yaml passes the validation that `ray up` begins with."""

from __future__ import annotations

import copy

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from tests.conftest import ROOT


def load() -> dict[str, object]:
    config = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    assert isinstance(config, dict)
    return config


def test_ray_accepts_the_cluster_file() -> None:
    validate_config(prepare_config(load()))


@pytest.mark.parametrize("mistake", [{"idle_timeout": 5}, {"max_workers": -1}])
def test_ray_would_not_accept_a_mistake(mistake: dict[str, object]) -> None:
    config = {**copy.deepcopy(load()), **mistake}
    with pytest.raises(Exception, match=r"idle_timeout|minimum"):
        validate_config(prepare_config(config))
