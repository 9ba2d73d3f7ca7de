"""The shipped cluster.yaml, made to run on test hosts: what is each user's own filled in, two fields changed."""

from __future__ import annotations

# What a user fills in, as docs/cluster.md says.
YOUR_RESULTS = "s3://YOUR-BUCKET/runs"
YOUR_SECURITY_GROUP = "sg-0123456789abcdef0"


def patched(text: str, *, results: str, security_group: str) -> str:
    """The text of cluster.yaml with a user's names, and with what differs between AWS and test hosts.

    `results`: a folder or URI for results.
    """
    for old, new in (
        (YOUR_RESULTS, results),
        (YOUR_SECURITY_GROUP, security_group),
        # Test hosts have no public addresses.
        ("cache_stopped_nodes: false", "cache_stopped_nodes: false\n  use_internal_ips: true"),
        # They boot in a second; nobody waits 20 minutes to see them go.
        ("idle_timeout_minutes: 20", "idle_timeout_minutes: 1"),
    ):
        assert old in text, old
        text = text.replace(old, new)
    return text
