"""What can be known of a cluster file without a cloud, an account or a network. See orchestrator/cluster.py."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from orchestrator.cluster_check import (
    authentication,
    checkout,
    commands,
    document,
    files,
    firewall,
    instances,
    kubernetes,
    launch,
    node_config,
    node_types,
    provider,
    ray_schema,
    ray_start,
    results_place,
    versions,
)
from orchestrator.cluster_check.document import Document, Finding

CHECKOUT = Path(__file__).resolve().parents[2]


def check(path: Path) -> list[Finding]:
    """Everything found wrong with the file at `path`, in the order of its lines, each once.

    Relative paths in it count from its folder. Raises OSError when it, or the constraints.txt beside it (or else the
    project's), cannot be read.
    """
    constraints = path.parent / "constraints.txt"
    project = versions.project_versions(constraints if constraints.is_file() else CHECKOUT / "constraints.txt")
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        return [
            Finding(document.FIRST_LINE, "error", f"the file is not text in UTF-8 (byte {error.start}); save it so")
        ]
    documents, findings = document.read(text)
    findings += files.secret_findings(text)
    if not documents and not findings:
        findings.append(Finding(document.FIRST_LINE, "error", "the file is empty; start from cluster.yaml"))
    findings += _checked(documents, path.parent, project)
    return sorted(set(findings))


def _checked(documents: list[Document], folder: Path, project: versions.Versions) -> Iterator[Finding]:
    if len(documents) > 1 and not all(map(kubernetes.is_manifest, documents)):
        second = documents[1]
        yield second.error((), "a cluster file is one document, and a second one begins here; remove the --- and it")
        documents = documents[:1]
    for one in documents:
        yield from files.placeholder_findings(one)
        if not isinstance(one.value, dict):
            yield one.error((), f"the file is {type(one.value).__name__}, not a mapping; start from cluster.yaml")
        elif kubernetes.is_manifest(one):
            yield from kubernetes.manifest_findings(one, project)
        else:
            yield from _cluster_file(one, folder, project)
    yield from kubernetes.between_findings(documents)


def _cluster_file(one: Document, folder: Path, project: versions.Versions) -> Iterator[Finding]:
    findings = list(_rules(one, folder, project))
    yield from findings
    if not any(finding.severity == "error" for finding in findings):
        yield from ray_schema.preparation_findings(one)


def _rules(one: Document, folder: Path, project: versions.Versions) -> Iterator[Finding]:
    strange = list(_keys_that_are_not_text(one, ()))
    yield from strange
    if not strange:
        yield from ray_schema.schema_findings(one)
    yield from provider.provider_findings(one)
    if one.at("provider", "type") == "aws":
        yield from provider.aws_findings(one)
        yield from provider.idle_findings(one)
        yield from node_types.node_type_findings(one)
        yield from launch.launch_findings(one)
        yield from instances.resource_findings(one)
        yield from node_config.node_config_findings(one)
    elif one.at("provider", "type") == "local":
        yield from provider.local_findings(one)
    yield from firewall.open_port_findings(one)
    yield from commands.command_findings(one)
    yield from ray_start.start_findings(one)
    yield from authentication.authentication_findings(one)
    yield from checkout.checkout_findings(one)
    yield from results_place.results_findings(one)
    yield from versions.version_findings(one, project)
    yield from versions.docker_findings(one, project)
    yield from files.file_findings(one, folder)


def _keys_that_are_not_text(one: Document, place: document.Place) -> Iterator[Finding]:
    value = one.at(*place) if place else one.value
    for key, part in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        if isinstance(value, dict) and not isinstance(key, str):
            yield one.error((*place, key), f"the key {key} is not text; put it in quotes")
        elif isinstance(part, dict | list):
            yield from _keys_that_are_not_text(one, (*place, key))
