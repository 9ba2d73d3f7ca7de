"""What AWS instance types have: GPUs and vCPUs, as far as the families trained on go.

From https://aws.amazon.com/ec2/instance-types/ (accelerated computing), pages g4dn, g5, g6, g6e, p3, p4, p5 and p6.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from orchestrator.cluster_check.document import Document, Finding, Place

_FAMILIES_OF_ONE_PATTERN = ("g5", "g6", "g6e")
_GPUS_BY_SIZE = {
    "xlarge": 1,
    "2xlarge": 1,
    "4xlarge": 1,
    "8xlarge": 1,
    "12xlarge": 4,
    "16xlarge": 1,
    "24xlarge": 4,
    "48xlarge": 8,
}
GPUS = {
    **{f"{family}.{size}": gpus for family in _FAMILIES_OF_ONE_PATTERN for size, gpus in _GPUS_BY_SIZE.items()},
    **{f"g4dn.{size}": 1 for size in ("xlarge", "2xlarge", "4xlarge", "8xlarge", "16xlarge")},
    "g4dn.12xlarge": 4,
    "g4dn.metal": 8,
    "gr6.4xlarge": 1,
    "gr6.8xlarge": 1,
    "p3.2xlarge": 1,
    "p3.8xlarge": 4,
    "p3.16xlarge": 8,
    "p3dn.24xlarge": 8,
    "p4d.24xlarge": 8,
    "p4de.24xlarge": 8,
    "p5.4xlarge": 1,
    "p5.48xlarge": 8,
    "p5e.48xlarge": 8,
    "p5en.48xlarge": 8,
    "p6-b200.48xlarge": 8,
}
_FAMILIES_WITHOUT_GPU = re.compile(r"^(?:c|m|r|t|x|i|z|d|h)\d")


def gpus_of(instance_type: str) -> int | None:
    """How many GPUs an instance type has; None when that is not known here."""
    if instance_type in GPUS:
        return GPUS[instance_type]
    return 0 if _FAMILIES_WITHOUT_GPU.match(instance_type) else None


def is_arm(instance_type: str) -> bool:
    """Whether its processor is AWS's own, Graviton: a g after the generation, as in m6g, c7gn and g5g."""
    return re.match(r"^(?:[a-z]+\d+g|a1\.)", instance_type) is not None


def lacks_cuda(instance_type: str) -> bool:
    """Whether it is sold for its accelerator, which is AMD's, Intel's, Qualcomm's or AWS's own."""
    return re.match(r"^(?:g4ad|inf\d|trn\d|dl\d)", instance_type) is not None


def vcpus_of(instance_type: str) -> int | None:
    """How many vCPUs: 4 for xlarge, 4 n for n-xlarge; None for metal and the smaller sizes, which differ."""
    match = re.search(r"\.(\d*)xlarge$", instance_type)
    return 4 * int(match[1] or 1) if match else None


def resource_findings(document: Document) -> Iterator[Finding]:
    """Resources that a node type declares and its instance type has not: Ray believes what is declared."""
    for name in document.mapping("available_node_types"):
        place = ("available_node_types", name)
        instance_type = document.text_at(*place, "node_config", "InstanceType")
        declared, there = document.number(*place, "resources", "GPU"), gpus_of(instance_type)
        if declared is not None and there is not None and declared != there:
            yield document.error(
                (*place, "resources", "GPU"),
                f"{name} declares {declared:g} GPUs, but {instance_type} has {there}; write GPU: {there}",
            )
        yield from _misspelt(document, (*place, "resources"))
        cpus, vcpus = document.number(*place, "resources", "CPU"), vcpus_of(instance_type)
        if cpus is not None and vcpus is not None and cpus > vcpus:
            yield document.error(
                (*place, "resources", "CPU"),
                f"{name} declares {cpus:g} CPUs, but {instance_type} has {vcpus} vCPUs; write CPU: {vcpus} or less",
            )


def _misspelt(document: Document, resources: Place) -> Iterator[Finding]:
    for key in document.mapping(*resources):
        meant = key.upper().removesuffix("S")
        if meant in ("CPU", "GPU") and key != meant:
            yield document.error(
                (*resources, key), f"{key} is a resource of your own, not what Ray calls {meant}; write {meant}"
            )
