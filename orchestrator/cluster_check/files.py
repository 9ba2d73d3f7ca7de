"""What a cluster file takes along: sources that must exist, secrets that must not be in it, names to fill in."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from orchestrator.cluster_check.document import Document, Finding

SECRETS = {
    re.compile(r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b"): "an AWS access key",
    re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----"): "a private key",
    re.compile(r"(?i)aws_?secret_?access_?key['\"]?\s*[:=]\s*['\"]?[A-Za-z0-9/+]{30,}"): "an AWS secret key",
    re.compile(r"\b(?:gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,})"): "a token of GitHub",
    re.compile(r"\bhf_[A-Za-z0-9]{20,}"): "a token of Hugging Face",
    re.compile(r"\bwandb login\b[^;&|]*\b[0-9a-f]{40}\b"): "a key of Weights & Biases",
}
CREDENTIALS = re.compile(r"(?:^|/)\.aws(?:/|$)")
NAMED_SECRET = re.compile(
    r"(?i)(?<![/\w.-])(?!secret(?:KeyRef|Name|Ref)\b)([\w-]*(?:password|passwd|secret|token|api_?key)\w*)['\"]?\s*[:=]\s*['\"]?([^\s'\"#,}]{6,})"
)
NOT_SECRET = re.compile(r"^(?:[$~/<{[]|YOUR|required$|optional$|https?://)")
PLACEHOLDER = re.compile(
    r"YOUR-[A-Z-]*[A-Z]|(?:sg|ami|subnet|vpc)-0123456789abcdef0|\b(?:192\.0\.2|198\.51\.100|203\.0\.113)\.\d+"
)
GIT_PATTERNS = ("**/.git", "**/.git/**")


def file_findings(document: Document, folder: Path) -> Iterator[Finding]:
    """Mounts whose source is missing. Paths are taken from the file's folder, where `ray up` is meant to run."""
    for target in document.mapping("file_mounts"):
        if CREDENTIALS.search(target) or CREDENTIALS.search(document.text_at("file_mounts", target)):
            message = "~/.aws gives every node the keys of your own account; remove it, IamInstanceProfile is enough"
            yield document.error(("file_mounts", target), message)
        source = document.text_at("file_mounts", target)
        if source:
            yield from _source(document, ("file_mounts", target), source, folder)
        else:
            yield document.error(("file_mounts", target), f"{target} has no path to be copied from; write one")
    if key := document.text_at("auth", "ssh_private_key"):
        yield from _source(document, ("auth", "ssh_private_key"), key, folder)
    yield from _git_stays(document, folder)


def _source(document: Document, place: tuple[str, str], source: str, folder: Path) -> Iterator[Finding]:
    if "\0" in source or (folder / _at_home(source)).exists():
        return
    if source.endswith(".ray/auth_token"):
        message = f"there is no {source} here yet; make one with ray get-auth-token --generate"
    else:
        message = f"there is no {source} to copy; mend the path, or make it"
    # What lies at home is each user's own, and may be missing just where the check runs.
    yield document.warning(place, message) if source.startswith("~") else document.error(place, message)


def _at_home(source: str) -> str:
    return source.replace("~", str(Path.home()), 1) if source == "~" or source.startswith("~/") else source


def _git_stays(document: Document, folder: Path) -> Iterator[Finding]:
    sources = [source for source in document.mapping("file_mounts").values() if isinstance(source, str)]
    if not any((folder / _at_home(source)).is_dir() for source in sources if "\0" not in source):
        return
    excluded = document.sequence("rsync_exclude")
    missing = [pattern for pattern in GIT_PATTERNS if pattern not in excluded]
    if missing:
        yield document.warning(
            ("rsync_exclude",), f"rsync_exclude lacks {' and '.join(missing)}, so the whole history travels; add both"
        )


def secret_findings(text: str) -> Iterator[Finding]:
    """Secrets in any line, comments included: the file is committed, and copied to every node."""
    for line, content in enumerate(text.splitlines(), start=1):
        for pattern, what in SECRETS.items():
            if pattern.search(content):
                yield _secret(line, what)
        for name, value in NAMED_SECRET.findall(content):
            if not NOT_SECRET.match(value) and not any(pattern.search(content) for pattern in SECRETS):
                yield _secret(line, f"a value for {name.lstrip('-')}")


def _secret(line: int, what: str) -> Finding:
    advice = "revoke it, remove it, and use a role or a mounted file"
    return Finding(line, "error", f"this looks like {what}, which this file must not hold; {advice}")


def placeholder_findings(document: Document) -> Iterator[Finding]:
    """Names that each account has its own of, still as they were shipped."""
    for line, text in document.scalars():
        for placeholder in dict.fromkeys(PLACEHOLDER.findall(text)):
            yield Finding(line, "warning", f"{placeholder} is still a placeholder; put yours")
