"""Keys and values in a RayCluster that Kubernetes or KubeRay refuses, drops without a word, or shows to everyone."""

from __future__ import annotations

import re
from collections.abc import Iterator

from orchestrator.cluster_check.document import Document, Finding, Place, did_you_mean

# https://ray-project.github.io/kuberay/reference/api/ of 1.5, the names that the ones used here may be mistaken for.
SPEC_KEYS = (
    "authOptions",
    "autoscalerOptions",
    "enableInTreeAutoscaling",
    "gcsFaultToleranceOptions",
    "headGroupSpec",
    "headServiceAnnotations",
    "managedBy",
    "networkPolicy",
    "rayVersion",
    "suspend",
    "upgradeStrategy",
    "workerGroupSpecs",
)
GROUP_KEYS = (
    "enableIngress",
    "groupName",
    "headService",
    "idleTimeoutSeconds",
    "labels",
    "maxReplicas",
    "minReplicas",
    "numOfHosts",
    "rayStartParams",
    "replicas",
    "resources",
    "scaleStrategy",
    "serviceType",
    "suspend",
    "template",
)
QUANTITY = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+|[numkMGTPE]|[KMGTPE]i)?")
SECRET_NAME = re.compile(r"(?i)(?:SECRET(?:_ACCESS)?(?:_KEY)?|PASSWORD|PASSWD|TOKEN|API_?KEY)$")


def misspelt_findings(document: Document, spec: Place, groups: list[Place]) -> Iterator[Finding]:
    """Keys that are nearly one of KubeRay's; one that is like none may be of a newer KubeRay."""
    for place, known in [(spec, SPEC_KEYS), *((group, GROUP_KEYS) for group in groups)]:
        for key in document.mapping(*place):
            if key not in known and (hint := did_you_mean(key, known)):
                yield document.error((*place, key), f"{key} is no setting of {_named(place)}{hint}")


def _named(place: Place) -> str:
    return next(str(step) for step in reversed(place) if isinstance(step, str))


def value_findings(document: Document, spec: Place, head: Place, workers: list[Place]) -> Iterator[Finding]:
    """All that is to be said of the values."""
    scaling = document.at(*spec, "enableInTreeAutoscaling")
    if scaling is not None and not isinstance(scaling, bool):
        yield document.error(
            (*spec, "enableInTreeAutoscaling"), f'enableInTreeAutoscaling is "{scaling}", but wanted is true or false'
        )
    yield from _names_given_twice(document, workers)
    for group in [head, *workers]:
        yield from _start_parameters(document, (*group, "rayStartParams"))
        containers = (*group, "template", "spec", "containers")
        for position in range(len(document.sequence(*containers))):
            yield from _quantities(document, (*containers, position, "resources"))
            yield from _secrets(document, (*containers, position, "env"))


def _names_given_twice(document: Document, workers: list[Place]) -> Iterator[Finding]:
    seen: dict[str, int] = {}
    for group in workers:
        name, line = document.text_at(*group, "groupName"), document.line(*group, "groupName")
        if name and seen.setdefault(name, line) != line:
            yield document.error(
                (*group, "groupName"), f"groupName {name} is that of line {seen[name]} too; give each group its own"
            )


def _start_parameters(document: Document, place: Place) -> Iterator[Finding]:
    for name, value in document.mapping(*place).items():
        if not isinstance(value, str):
            shown = str(value).lower() if isinstance(value, bool) else value
            yield document.error(
                (*place, name), f'{name} of rayStartParams is {shown}, and Kubernetes wants text; write "{shown}"'
            )


def _quantities(document: Document, resources: Place) -> Iterator[Finding]:
    for key in ("limits", "requests"):
        for name, value in document.mapping(*resources, key).items():
            if isinstance(value, str) and not QUANTITY.fullmatch(value):
                yield document.error(
                    (*resources, key, name),
                    f"{name} is {value}, which is no quantity of Kubernetes; write it as 16Gi",
                )


def _secrets(document: Document, env: Place) -> Iterator[Finding]:
    for position in range(len(document.sequence(*env))):
        name, value = (document.text_at(*env, position, key) for key in ("name", "value"))
        if SECRET_NAME.search(name) and value and value[0] not in "$/":
            yield document.error(
                (*env, position, "value"),
                f"{name} is a secret in plain text; revoke it, and write valueFrom: {{secretKeyRef: ...}}",
            )
