"""Manifests for KubeRay: versions, numbers of workers, authentication. The rest is the operator's to check."""

from __future__ import annotations

from collections.abc import Iterator

from orchestrator.cluster_check import versions
from orchestrator.cluster_check.document import Document, Finding, Place, did_you_mean
from orchestrator.cluster_check.versions import Versions

KINDS = ("RayCluster", "RayJob", "RayService")


def is_manifest(document: Document) -> bool:
    """Whether a document is Kubernetes', which none of Ray's cluster files is."""
    return "apiVersion" in document.mapping() or "kind" in document.mapping()


def manifest_findings(document: Document, project: Versions) -> Iterator[Finding]:
    """What is to be said of one manifest."""
    kind = document.at("kind")
    if document.text_at("apiVersion").startswith("ray.io/") and kind not in KINDS:
        yield document.error(("kind",), f"KubeRay has no kind {kind}{did_you_mean(kind, KINDS)}")
    for spec in _cluster_specs(document):
        yield from _cluster(document, spec, project)


def _cluster_specs(document: Document) -> list[Place]:
    inside = "rayClusterConfig" if document.at("kind") == "RayService" else "rayClusterSpec"
    places: list[Place] = [("spec",)] if document.at("kind") == "RayCluster" else [("spec", inside)]
    return [place for place in places if document.mapping(*place)]


def _cluster(document: Document, spec: Place, project: Versions) -> Iterator[Finding]:
    version = document.at(*spec, "rayVersion")
    if version != project.ray:
        place = (*spec, "rayVersion")
        yield document.error(place, f"rayVersion is {version}, but constraints.txt has {project.ray}; write that")
    if document.at(*spec, "authOptions", "mode") != "token":
        yield document.error(
            spec, "no token is asked for, so whoever reaches a port runs code; add authOptions: {mode: token}"
        )
    head = (*spec, "headGroupSpec")
    if str(document.at(*head, "rayStartParams", "num-cpus")) != "0":
        yield document.warning(head, 'the head would run trials beside the driver; add num-cpus: "0" to rayStartParams')
    groups = [(*spec, "workerGroupSpecs", i) for i in range(len(document.sequence(*spec, "workerGroupSpecs")))]
    for group in [head, *groups]:
        yield from _images(document, group, project)
    for group in groups:
        yield from _replicas(document, group)


def _images(document: Document, group: Place, project: Versions) -> Iterator[Finding]:
    containers = (*group, "template", "spec", "containers")
    if not document.sequence(*containers):
        yield document.error(group, "the group has no containers in its template; add one with an image")
    for position in range(len(document.sequence(*containers))):
        place = (*containers, position, "image")
        yield from versions.image_findings(document.line(*place), str(document.at(*place)), project)


def _replicas(document: Document, group: Place) -> Iterator[Finding]:
    least, most = document.number(*group, "minReplicas"), document.number(*group, "maxReplicas")
    if least is not None and most is not None and least > most:
        yield document.error(
            (*group, "minReplicas"), f"minReplicas {least:g} is above maxReplicas {most:g}; lower it or raise the other"
        )
