"""The node types of an AWS cluster: how many, which is the head, what stands in for spot, who may write."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from orchestrator.cluster_check.document import Document, Finding, Place, did_you_mean
from orchestrator.cluster_check.instances import gpus_of


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


def types_of(document: Document) -> list[NodeType]:
    """All of a file, in its order."""
    head = document.at("head_node_type")
    return [NodeType(document, name, name == head) for name in document.mapping("available_node_types")]


def node_type_findings(document: Document) -> Iterator[Finding]:
    """All that is to be said of the node types."""
    types = types_of(document)
    yield from _head_is_named(document, document.at("head_node_type"), [node_type.name for node_type in types])
    yield from _counts(document, types)
    yield from _roles(document, types)
    yield from _images_are_one(document, types)
    yield from once_an_alias(types, lambda node_type: _of_one(node_type, types))


def once_an_alias(types: list[NodeType], rule: Callable[[NodeType], Iterator[Finding]]) -> Iterator[Finding]:
    """What a rule says of each type; once where an alias has brought the same part to several."""
    said: set[tuple[int, str]] = set()
    for node_type in types:
        for finding in rule(node_type):
            nameless = (finding.line, finding.message.replace(node_type.name, ""))
            if nameless not in said:
                said.add(nameless)
                yield finding


def _of_one(node_type: NodeType, types: list[NodeType]) -> Iterator[Finding]:
    yield from _limits(node_type)
    yield from _head(node_type) if node_type.is_head else _spot(node_type, types)
    yield from _priorities(node_type, types)


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
    if document.at("max_workers") is None:
        yield document.warning((), "max_workers is missing, and Ray then takes 2; say how many workers there may be")
    if most is None:
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
    kept = document.at("provider", "cache_stopped_nodes")
    if kept is None or kept is True:
        yield document.error(
            ("provider", "cache_stopped_nodes"),
            f"{node_type.name} is spot, which cannot be kept; write cache_stopped_nodes: false (default: true)",
        )


def _priorities(node_type: NodeType, types: list[NodeType]) -> Iterator[Finding]:
    """On demand is for when spot has nothing left."""
    document, place = node_type.document, (*node_type.place, "priority")
    mine = document.number(*place)
    same = [other for other in types if other.instance_type == node_type.instance_type and not other.is_head]
    for other in same:
        its = document.number(*other.place, "priority") or 0
        if mine is not None and other.is_spot and not node_type.is_spot and mine > its:
            yield document.warning(
                place,
                f"{node_type.name} is on demand with priority {mine:g}, above the {its:g} of {other.name}, the same on "
                "spot, which is then taken last; lower it",
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
