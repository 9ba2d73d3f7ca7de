"""Which provider, where, how long a worker may idle; and what Ray's local provider needs."""

from __future__ import annotations

import re
from collections.abc import Iterator

from orchestrator.cluster_check import node_config
from orchestrator.cluster_check.document import Document, Finding, did_you_mean

CHECKED = ("aws", "local")
KNOWN = (*CHECKED, "azure", "gcp", "vsphere", "aliyun", "external")
BOOT_MINUTES = 10  # the machine, its driver and several GB of wheels
ZONE = re.compile(r"[a-f]|(?:-[a-z0-9]+)+-\d[a-f]|(?:-[a-z0-9]+)+-wlz-\d")  # of a region, local, of a carrier
NOT_FOR_LOCAL = ("available_node_types", "head_node_type", "head_node", "worker_nodes")


def provider_findings(document: Document) -> Iterator[Finding]:
    """Whether the provider is one of Ray's, and of those checked here."""
    kind = document.at("provider", "type")
    if isinstance(kind, str) and kind not in KNOWN:
        hint = did_you_mean(kind, KNOWN) or f"; it has {', '.join(KNOWN)}"
        yield document.error(("provider", "type"), f"Ray has no provider {kind}{hint}")
    elif isinstance(kind, str) and kind not in CHECKED:
        yield document.warning(
            ("provider", "type"),
            f"provider {kind} is not checked beyond Ray's schema, commands and secrets; {' and '.join(CHECKED)} are",
        )


def idle_findings(document: Document) -> Iterator[Finding]:
    """Workers that leave before their work has come."""
    minutes = document.number("idle_timeout_minutes")
    if minutes is None and document.at("idle_timeout_minutes") is not None:
        return  # Ray's schema says what it must be
    if minutes is None or minutes < BOOT_MINUTES:
        given = "missing, and Ray then takes 5" if minutes is None else f"{minutes:g}"
        yield document.warning(
            ("idle_timeout_minutes",),
            f"idle_timeout_minutes is {given}, and a boot takes about {BOOT_MINUTES}: workers come and go; raise it",
        )


def aws_findings(document: Document) -> Iterator[Finding]:
    """Region and zones."""
    region = document.text_at("provider", "region")
    if not region:
        yield document.error(("provider",), "provider has no region; add one, such as region: us-west-2")
        return
    if node_config.has_botocore() and region not in (regions := node_config.known_regions()):
        yield document.error(("provider", "region"), f"AWS has no region {region}{did_you_mean(region, regions)}")
    for zone in map(str.strip, document.text_at("provider", "availability_zone").split(",")):
        place = ("provider", "availability_zone")
        if zone and not zone.startswith(region):
            message = f"availability zone {zone} is not in region {region}; write {region}a, for instance"
            yield document.error(place, message)
        elif zone and not ZONE.fullmatch(zone.removeprefix(region)):
            message = f"AWS has no zone {zone}, since letters go from a to f; write {region}a, for instance"
            yield document.error(place, message)


def local_findings(document: Document) -> Iterator[Finding]:
    """Machines named by address: which, and how many of them."""
    for key in NOT_FOR_LOCAL:
        if document.at(key):
            yield document.error(
                (key,), f"{key} is not for provider local, whose machines are what they are; remove it"
            )
    if document.at("provider", "coordinator_address"):
        return
    for key in ("head_ip", "worker_ips"):
        if not document.at("provider", key):
            yield document.error(("provider",), f"provider local needs {key}; add it")
    if not document.at("auth", "ssh_user"):
        yield document.error(("auth",), "auth has no ssh_user to log in as; add it")
    yield from _addresses(document)
    yield from _reachable(document)
    yield from _number_of_workers(document)


def _addresses(document: Document) -> Iterator[Finding]:
    seen = {str(document.at("provider", "head_ip"))}
    for position, address in enumerate(document.sequence("provider", "worker_ips")):
        if str(address) in seen:
            yield document.error(
                ("provider", "worker_ips", position), f"{address} is listed twice, as head or worker; remove one"
            )
        seen.add(str(address))


def _reachable(document: Document) -> Iterator[Finding]:
    """Addresses alone: ssh's user and port are said elsewhere, and Ray would take them for a part of the name."""
    workers = range(len(document.sequence("provider", "worker_ips")))
    for step in [("head_ip",), ("external_head_ip",), *(("worker_ips", position) for position in workers)]:
        address = document.text_at("provider", *step)
        if "@" in address:
            wanted = address.rpartition("@")[2]
            message = f"{address} has a user in it, who is auth.ssh_user for all; write {wanted}"
            yield document.error(("provider", *step), message)
        elif address.count(":") == 1:  # more of them are an address of IPv6
            wanted = address.partition(":")[0]
            message = f"{address} has a port in it, and Ray uses ssh's; write {wanted}, and the port in ~/.ssh/config"
            yield document.error(("provider", *step), message)


def _number_of_workers(document: Document) -> Iterator[Finding]:
    there = len(document.sequence("provider", "worker_ips"))
    for key in ("min_workers", "max_workers"):
        number = document.number(key)
        if number is not None and number > there:
            yield document.error((key,), f"{key} {number:g} is more than the {there} worker_ips; write {there}")
    least, most = document.number("min_workers"), document.number("max_workers")
    if most is not None and most < there:
        yield document.warning(
            ("max_workers",), f"max_workers {most:g} leaves out some of the {there} worker_ips; raise it"
        )
    if least is not None and most is not None and least > most:
        yield document.error(("min_workers",), f"min_workers {least:g} is above max_workers {most:g}; lower it")
