"""The node types of an AWS cluster: how many, which is the head, what spot needs, image, disk, role and firewall."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from orchestrator.cluster_check.document import Document, Finding, Place, did_you_mean
from orchestrator.cluster_check.instances import gpus_of

LEAST_DISK_GB = 150  # the image, the CUDA wheels and their cache take about 100
IMAGE = re.compile(r"^(ami-([0-9a-f]{8}|[0-9a-f]{17})|resolve:ssm:[\w./-]+(:\w+)?)$")
WHOLE_WORLD = ("0.0.0.0/0", "::/0")


@dataclass(frozen=True)
class NodeType:
    """One entry of available_node_types."""

    document: Document
    name: str
    is_head: bool

    @property
    def place(self) -> Place:
        return ("available_node_types", self.name)

    @property
    def config(self) -> Place:
        return (*self.place, "node_config")

    @property
    def instance_type(self) -> str:
        return self.document.text_at(*self.config, "InstanceType")

    @property
    def is_spot(self) -> bool:
        return self.document.at(*self.config, "InstanceMarketOptions", "MarketType") == "spot"

    @property
    def has_template(self) -> bool:
        return "LaunchTemplate" in self.document.mapping(*self.config)  # which may set what is missing here

    @property
    def gpus(self) -> float:
        declared = self.document.number(*self.place, "resources", "GPU")
        return (gpus_of(self.instance_type) or 0) if declared is None else declared

    def lacks(self, key: str) -> bool:
        """Whether neither the node_config nor, possibly, a launch template has a key."""
        return not self.has_template and not self.document.at(*self.config, key)


def node_type_findings(document: Document) -> Iterator[Finding]:
    """All that is to be said of the node types."""
    head = document.at("head_node_type")
    names = document.mapping("available_node_types")
    types = [NodeType(document, name, name == head) for name in names]
    yield from _head_is_named(document, head, list(names))
    yield from _counts(document, types)
    yield from _roles(document, types)
    yield from _images_are_one(document, types)
    said: set[tuple[int, str]] = set()
    for node_type in types:
        for finding in _of_one(node_type, types):
            nameless = (finding.line, finding.message.replace(node_type.name, ""))
            if nameless not in said:  # else an alias has brought the same part here
                said.add(nameless)
                yield finding


def _of_one(node_type: NodeType, types: list[NodeType]) -> Iterator[Finding]:
    yield from _limits(node_type)
    yield from _image(node_type)
    yield from _disk(node_type)
    yield from _firewall(node_type)
    yield from _key(node_type)
    yield from _head(node_type) if node_type.is_head else _spot(node_type, types)


def _head_is_named(document: Document, head: object, names: list[str]) -> Iterator[Finding]:
    if not names:
        yield document.error(
            ("available_node_types",), "available_node_types names no node type; add a head and workers"
        )
    elif head is None:
        yield document.error((), f"head_node_type is missing; add one of {', '.join(names)}")
    elif head not in names:
        hint = did_you_mean(head, names) or f"; it may be {', '.join(names)}"
        yield document.error(("head_node_type",), f"head_node_type {head} is not among available_node_types{hint}")


def _counts(document: Document, types: list[NodeType]) -> Iterator[Finding]:
    most = document.number("max_workers")
    if most is None:
        yield document.warning((), "max_workers is missing, and Ray then takes 2; say how many workers there may be")
        return
    least = sum(document.number(*node_type.place, "min_workers") or 0 for node_type in types)
    if least > most:
        yield document.error(
            ("max_workers",), f"max_workers {most:g} is below the sum of all min_workers, {least:g}; raise it"
        )
    workers = [node_type for node_type in types if not node_type.is_head]
    if most == 0 or all(document.number(*worker.place, "max_workers") == 0 for worker in workers):
        yield document.warning(("max_workers",), "no worker can ever start, so no trial can; raise max_workers")
    for worker in workers:
        if (document.number(*worker.place, "max_workers") or 0) > most:
            place = (*worker.place, "max_workers")
            yield document.warning(place, f"max_workers of {worker.name} is above the cluster's {most:g}, which counts")


def _limits(node_type: NodeType) -> Iterator[Finding]:
    document, place = node_type.document, node_type.place
    least, most = document.number(*place, "min_workers"), document.number(*place, "max_workers")
    for key, value in (("min_workers", least), ("max_workers", most)):
        if value is not None and value < 0:
            yield document.error((*place, key), f"{key} of {node_type.name} is {value:g}; write 0 or more")
        if node_type.is_head and value:
            yield document.error((*place, key), f"{node_type.name} is the head, of which there is one; remove {key}")
    if least is not None and most is not None and least > most:
        yield document.error(
            (*place, "min_workers"),
            f"min_workers {least:g} of {node_type.name} is above its max_workers {most:g}; lower it or raise the other",
        )
    if least and not node_type.is_head:
        yield document.warning(
            (*place, "min_workers"), f"{least:g} of {node_type.name} run and cost even when idle; write min_workers: 0"
        )


def _head(node_type: NodeType) -> Iterator[Finding]:
    document, place = node_type.document, node_type.place
    if document.number(*place, "resources", "CPU") != 0:
        yield document.warning(
            (*place, "resources"), "the head would run trials beside the driver; write resources: {CPU: 0}"
        )
    if node_type.gpus:
        yield document.warning(
            (*node_type.config, "InstanceType"),
            f"the head {node_type.instance_type} has GPUs and costs for them all the time; take one without",
        )
    if node_type.is_spot:
        yield document.error(
            (*node_type.config, "InstanceMarketOptions"),
            "the head is a spot instance, and with it everything ends; take it on demand",
        )


def _spot(node_type: NodeType, types: list[NodeType]) -> Iterator[Finding]:
    if not node_type.is_spot:
        return
    document, options = node_type.document, (*node_type.config, "InstanceMarketOptions")
    fallback = [
        other
        for other in types
        if not (other.is_spot or other.is_head) and other.gpus == node_type.gpus and _may_start(other)
    ]
    if not fallback:
        yield document.warning(
            options,
            f"{node_type.name} is spot and no on-demand type has its {node_type.gpus:g} GPUs, so all waits for "
            "capacity; add one with a lower priority",
        )
    if document.at(*options, "SpotOptions", "SpotInstanceType") == "persistent":
        yield document.error(
            options, "a persistent spot request starts an instance again that Ray has replaced; write one-time"
        )
    if document.at("provider", "cache_stopped_nodes") is not False:
        yield document.error(
            ("provider", "cache_stopped_nodes"),
            f"{node_type.name} is spot, which cannot be kept; write cache_stopped_nodes: false (default: true)",
        )


def _may_start(node_type: NodeType) -> bool:
    return node_type.document.number(*node_type.place, "max_workers") != 0


def _roles(document: Document, types: list[NodeType]) -> Iterator[Finding]:
    """Profiles where results go to S3; Ray makes one for the head alone, which may not pass on others."""
    to_s3 = any(text.find("s3://") >= 0 for _, text in document.scalars())
    for node_type in types:
        if not node_type.lacks("IamInstanceProfile"):
            continue
        if node_type.is_head and any(not other.lacks("IamInstanceProfile") for other in types):
            yield document.error(
                node_type.config,
                f"the head {node_type.name} has no IamInstanceProfile, and the role that Ray makes for it may not pass "
                "the workers theirs (iam:PassRole); give it one",
            )
        elif to_s3 and not node_type.is_head:
            yield document.error(
                node_type.config,
                f"{node_type.name} has no IamInstanceProfile, so its trials cannot write to S3; give it one",
            )


def _images_are_one(document: Document, types: list[NodeType]) -> Iterator[Finding]:
    images: dict[str, str] = {}
    for node_type in types:
        if image := document.text_at(*node_type.config, "ImageId"):
            images.setdefault(image, node_type.name)
            if len(images) > 1 and images[image] == node_type.name:
                yield document.warning(
                    (*node_type.config, "ImageId"),
                    f"the image of {node_type.name} is not that of {next(iter(images.values()))}; use one for all",
                )


def _image(node_type: NodeType) -> Iterator[Finding]:
    document, place = node_type.document, (*node_type.config, "ImageId")
    image = document.at(*place)
    if node_type.lacks("ImageId") or str(image).lower() == "latest_dlami":
        yield document.error(
            place,
            f"{node_type.name} has no ImageId, and Ray then takes an Ubuntu 18.04 image of 2022; give ami-... or "
            "resolve:ssm:PARAMETER",
        )
    elif isinstance(image, str) and not IMAGE.match(image):
        yield document.error(
            place, f"ImageId {image} of {node_type.name} is no image; wanted is ami-... or resolve:ssm:PARAMETER"
        )


def _disk(node_type: NodeType) -> Iterator[Finding]:
    document, place = node_type.document, (*node_type.config, "BlockDeviceMappings")
    if node_type.lacks("BlockDeviceMappings"):
        yield document.error(
            place,
            f"{node_type.name} keeps the image's small root disk, which fills up; add one of {LEAST_DISK_GB} GB, gp3",
        )
    elif document.sequence(*place):
        disk = (*place, 0, "Ebs")
        size, kind = document.number(*disk, "VolumeSize"), document.at(*disk, "VolumeType")
        if size is None or size < LEAST_DISK_GB:
            given = "no size" if size is None else f"{size:g} GB"
            yield document.error(
                (*disk, "VolumeSize"),
                f"the root disk of {node_type.name} has {given} and fills up; write VolumeSize: {LEAST_DISK_GB}",
            )
        if kind != "gp3":
            yield document.warning(
                (*disk, "VolumeType"),
                f"the root disk of {node_type.name} is {kind or 'of the default type'}; write VolumeType: gp3",
            )
        if document.at(*disk, "DeleteOnTermination") is False:
            yield document.warning(
                (*disk, "DeleteOnTermination"), f"disks of {node_type.name} stay and cost when it ends; write true"
            )


def _firewall(node_type: NodeType) -> Iterator[Finding]:
    if node_type.lacks("SecurityGroupIds") and node_type.lacks("NetworkInterfaces"):
        yield node_type.document.warning(
            node_type.config,
            f"{node_type.name} has no SecurityGroupIds, and Ray then opens port 22 to the whole world; give your own",
        )


def _key(node_type: NodeType) -> Iterator[Finding]:
    document = node_type.document
    if document.at("auth", "ssh_private_key") and node_type.lacks("KeyName") and node_type.lacks("UserData"):
        yield document.error(
            node_type.config,
            f"auth has an ssh_private_key, so {node_type.name} needs the KeyName that AWS knows it by; add it",
        )


def open_port_findings(document: Document) -> Iterator[Finding]:
    """Firewall rules for the whole world, wherever they stand."""
    for line, text in document.scalars():
        if text in WHOLE_WORLD:
            message = f"{text} opens ports to the whole world; write your own address, such as 203.0.113.7/32"
            yield Finding(line, "error", message)
