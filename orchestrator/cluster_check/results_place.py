"""Where a cluster's results go: one place that every node reaches, and that outlives the cluster."""

from __future__ import annotations

import re
from collections.abc import Iterator

from orchestrator.cluster_check.commands import all_commands
from orchestrator.cluster_check.document import Document, Finding, Place

GIVEN = re.compile(r"(?:(?<!/)\bRESULTS_DIR=|--results-dir[= ])['\"]?([^\s'\";&|]+)")
OBJECTS = re.compile(r"(\w+):(/*)([^/?]*)")
SCHEMES = ("s3", "gs")
BUCKET = re.compile(r"[a-z0-9][a-z0-9._-]{1,61}[a-z0-9]")  # Google's, which allows _
BUCKET_OF_S3 = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
OWN_DISK = re.compile(r"^(?:~|\$HOME|\$\{HOME\}|/home/|/root/|/tmp/|[\w.])")
MOUNTED = re.compile(r"\bmount\b|\bnfs|\befs|\blustre|s3fs|/etc/fstab")
YOURS = re.compile(r"\$|YOUR-")  # what is filled in later


def results_findings(document: Document) -> Iterator[Finding]:
    """Results of a cluster file: no mistyped URI, no disk that only one node has."""
    commands = list(all_commands(document))
    mounted = any(MOUNTED.search(command) for _, command in commands)
    for place, command in commands:
        for given in places_in(command):
            yield from uri_findings(document, place, given)
            if not is_objects(given):
                yield from _folder(document, place, given, mounted=mounted)


def places_in(command: str) -> list[str]:
    """What a command gives as the place of results."""
    return [str(given) for given in GIVEN.findall(command)]


def is_objects(given: str) -> bool:
    """Whether it is, or was meant to be, in an object store."""
    return OBJECTS.match(given) is not None


def uri_findings(document: Document, place: Place, given: str) -> Iterator[Finding]:
    """What is wrong with the URI of an object store."""
    found = OBJECTS.match(given)
    if found is None:
        return
    scheme, slashes, bucket = found.groups()
    pattern = BUCKET_OF_S3 if scheme == "s3" else BUCKET
    if scheme not in SCHEMES or len(slashes) < 2:
        yield document.error(place, f"{given} is no place for results; write s3://BUCKET/PREFIX")
    elif not bucket or len(slashes) > 2:
        yield document.error(place, f"{given} names no bucket; write s3://BUCKET/PREFIX")
    elif not YOURS.search(bucket) and not pattern.fullmatch(bucket):
        yield document.error(
            place, f"{bucket} can be no bucket's name, which has 3 to 63 small letters, digits, - and .; correct it"
        )


def _folder(document: Document, place: Place, given: str, *, mounted: bool) -> Iterator[Finding]:
    own_disk = OWN_DISK.match(given) is not None
    if given.startswith("$") and not own_disk:
        return
    kind = document.at("provider", "type")
    message = f"results go to {given} on each node's own disk, where others cannot read them"
    if kind == "aws" and document.number("max_workers") != 0 and (own_disk or not mounted):
        yield document.error(place, f"{message} and which goes with the node; write s3://BUCKET/PREFIX")
    elif kind == "local" and own_disk and document.sequence("provider", "worker_ips"):
        advice = "give a folder that all machines share, or s3://BUCKET/PREFIX"
        at_home = not given.startswith("/tmp/")  # homes may be shared
        make = document.warning if at_home else document.error
        yield make(place, f"{message}{', unless all share it' if at_home else ''}; {advice}")
