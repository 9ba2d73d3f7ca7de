"""Manifests for KubeRay: versions, numbers of workers, authentication. The rest is the operator's to check."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterator

from orchestrator.cluster_check import manifest_values, results_place, versions
from orchestrator.cluster_check.document import Document, Finding, Place, did_you_mean
from orchestrator.cluster_check.versions import Versions
from orchestrator.growth import VARIABLE

NAMED_AFTER_RAY = re.compile(r"\bray\b")
KINDS = ("RayCluster", "RayJob", "RayService")


def is_manifest(document: Document) -> bool:
    """Whether a document is Kubernetes', which none of Ray's cluster files is."""
    return "apiVersion" in document.mapping() or "kind" in document.mapping()


def manifest_findings(document: Document, project: Versions) -> Iterator[Finding]:
    """What is to be said of one manifest."""
    kind = document.at("kind")
    if kind is None:
        yield document.error((), "the manifest has no kind; add one, such as kind: RayCluster")
    elif kind in KINDS and not document.text_at("apiVersion").startswith("ray.io/"):
        given = document.at("apiVersion")
        yield document.error(("apiVersion",), f"apiVersion is {given}, of which there is no {kind}; write ray.io/v1")
    elif document.text_at("apiVersion").startswith("ray.io/") and kind not in KINDS:
        yield document.error(("kind",), f"KubeRay has no kind {kind}{did_you_mean(kind, KINDS)}")
    for spec in _cluster_specs(document):
        yield from _cluster(document, spec, project)


def _cluster_specs(document: Document) -> list[Place]:
    inside = "rayClusterConfig" if document.at("kind") == "RayService" else "rayClusterSpec"
    places: list[Place] = [("spec",)] if document.at("kind") == "RayCluster" else [("spec", inside)]
    return [place for place in places if document.mapping(*place)]


def between_findings(documents: list[Document]) -> Iterator[Finding]:
    """What one manifest of a file says of another: jobs, of their cluster and of the disks it has."""
    names = {document.text_at("metadata", "name") for document in documents if document.at("kind") == "RayCluster"}
    mounts = {
        str(text)
        for document in documents
        for spec in _cluster_specs(document)
        for group in _groups(document, spec)
        for text in _mounts(document, group)
    }
    for document in documents:
        if document.at("kind") == "RayJob":
            yield from _cluster_of_job(document, names)
            yield from _results_of_job(document, mounts)


def _mounts(document: Document, group: Place) -> Iterator[str]:
    containers = (*group, "template", "spec", "containers")
    for position in range(len(document.sequence(*containers))):
        for mount in range(len(document.sequence(*containers, position, "volumeMounts"))):
            yield document.text_at(*containers, position, "volumeMounts", mount, "mountPath")


def _cluster_of_job(document: Document, names: set[str]) -> Iterator[Finding]:
    place = ("spec", "clusterSelector", "ray.io/cluster")
    name = document.text_at(*place)
    if name and names and name not in names:
        wanted = " or ".join(sorted(names))
        yield document.error(place, f"the job waits for a cluster {name}, but the one here is {wanted}; write that")


def _results_of_job(document: Document, mounts: set[str]) -> Iterator[Finding]:
    place = ("spec", "entrypoint")
    for given in results_place.places_in(document.text_at(*place)):
        yield from results_place.uri_findings(document, place, given)
        mounted = any(mount and f"{given}/".startswith(f"{mount.rstrip('/')}/") for mount in mounts)
        if not (results_place.is_objects(given) or given.startswith("$") or mounted):
            yield document.error(
                place, f"results go to {given} in each pod, where others cannot read them; write s3://BUCKET/PREFIX"
            )


def _groups(document: Document, spec: Place) -> list[Place]:
    """The head's and the workers'."""
    number = len(document.sequence(*spec, "workerGroupSpecs"))
    return [(*spec, "headGroupSpec"), *((*spec, "workerGroupSpecs", i) for i in range(number))]


def _cluster(document: Document, spec: Place, project: Versions) -> Iterator[Finding]:
    head, *groups = _groups(document, spec)
    misspelt = list(manifest_values.misspelt_findings(document, spec, [head, *groups]))
    yield from misspelt
    yield from manifest_values.value_findings(document, spec, head, groups)
    yield from _cluster_wide(document, spec, project)
    if not misspelt:  # else what is missing is there, under the other name
        yield from _of_groups(document, spec, project)


def _cluster_wide(document: Document, spec: Place, project: Versions) -> Iterator[Finding]:
    version = document.at(*spec, "rayVersion")
    if version != project.ray:
        place = (*spec, "rayVersion")
        yield document.error(place, f"rayVersion is {version}, but constraints.txt has {project.ray}; write that")
    if document.at(*spec, "authOptions", "mode") != "token":
        yield document.error(
            spec, "no token is asked for, so whoever reaches a port runs code; add authOptions: {mode: token}"
        )


def _of_groups(document: Document, spec: Place, project: Versions) -> Iterator[Finding]:
    head, *groups = _groups(document, spec)
    if str(document.at(*head, "rayStartParams", "num-cpus")) != "0":
        yield document.warning(head, 'the head would run trials beside the driver; add num-cpus: "0" to rayStartParams')
    for group in [head, *groups]:
        yield from _images(document, group, project)
    for group in groups:
        yield from _replicas(document, group)
    if document.at(*spec, "enableInTreeAutoscaling") is True:
        yield from _growth(document, head, groups)


def _images(document: Document, group: Place, project: Versions) -> Iterator[Finding]:
    containers = (*group, "template", "spec", "containers")
    if not document.sequence(*containers):
        yield document.error(group, "the group has no containers in its template; add one with an image")
    for position in range(len(document.sequence(*containers))):  # KubeRay starts Ray in the first one
        place = (*containers, position, "image")
        image = str(document.at(*place))
        if position == 0 or NAMED_AFTER_RAY.search(image):
            yield from versions.image_findings(document.line(*place), image, project)


def _replicas(document: Document, group: Place) -> Iterator[Finding]:
    least, most = document.number(*group, "minReplicas"), document.number(*group, "maxReplicas")
    if least is not None and most is not None and least > most:
        yield document.error(
            (*group, "minReplicas"), f"minReplicas {least:g} is above maxReplicas {most:g}; lower it or raise the other"
        )


def _growth(document: Document, head: Place, groups: list[Place]) -> Iterator[Finding]:
    """A search must know what the cluster may grow to, and Ray does not tell it."""
    most = Counter[str]()
    for group in groups:
        for name, amount in _resources(document, group).items():
            most[name] += math.floor((document.number(*group, "maxReplicas") or 0) * amount)
    wanted = {name: most[name] for name in ("CPU", "GPU") if most[name]}
    place = (*head, "template", "spec", "containers", 0, "env")
    for position, variable in enumerate(document.sequence(*place)):
        if isinstance(variable, dict) and variable.get("name") == VARIABLE:
            yield from _declared(document, (*place, position, "value"), wanted)
            return
    yield document.error(
        head,
        f"a search cannot know what the cluster grows to and refuses what there is no room for yet; add "
        f"{{name: {VARIABLE}, value: '{json.dumps(wanted)}'}} to env of the head's container",
    )


def _declared(document: Document, place: Place, wanted: dict[str, int]) -> Iterator[Finding]:
    given = document.at(*place)
    try:
        amounts = json.loads(given) if isinstance(given, str) else None
    except (ValueError, RecursionError):
        amounts = None
    if not isinstance(amounts, dict):
        yield document.error(place, f"{VARIABLE} is {given}, which is no JSON of amounts; write '{json.dumps(wanted)}'")
    elif {name: amounts[name] for name in ("CPU", "GPU") if amounts.get(name)} != wanted:
        yield document.error(
            place, f"{VARIABLE} is {given}, but the worker groups grow to {json.dumps(wanted)}; write that"
        )


def _resources(document: Document, group: Place) -> dict[str, float]:
    """What Ray takes a worker to have: its start parameters, else the limits of its first container."""
    limits = document.mapping(*group, "template", "spec", "containers", 0, "resources", "limits")
    gpus = [amount for name, amount in limits.items() if str(name).endswith("/gpu")]
    given = document.mapping(*group, "rayStartParams")
    cpus, gpu = given.get("num-cpus", limits.get("cpu")), given.get("num-gpus", gpus[0] if gpus else 0)
    return {"CPU": math.ceil(_quantity(cpus)), "GPU": _quantity(gpu)}


def _quantity(value: object) -> float:
    """A Kubernetes quantity such as 4 or 500m; nothing where it is none."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(m?)", str(value))
    if found is None:
        return 0.0
    return float(found[1]) / (1000 if found[2] else 1)
