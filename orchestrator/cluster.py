"""Check a cluster file for `ray up`, or a KubeRay manifest, before it costs anything.

python -m orchestrator.cluster check cluster.yaml

Prints FILE:LINE: error or warning: what is wrong and the fix. Needs no account, no network and no running Ray. Exit
status 0: no errors, though there may be warnings; 1: an error; 2: wrong usage, such as no such file.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from orchestrator import cli
from orchestrator.cluster_check import check
from results.schema import UsageError


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m orchestrator.cluster", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="check")
    checking = actions.add_parser("check", help="say what is wrong with cluster files")
    checking.add_argument("files", nargs="+", type=Path, metavar="FILE", help="such as cluster.yaml")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Check the files. Returns the exit status."""
    args = parse(sys.argv[1:] if arguments is None else arguments)
    for path in args.files:
        if not path.is_file():
            raise UsageError(f"{path}: there is no such file; give the path of a cluster file, such as cluster.yaml")
    errors = 0
    for path in args.files:
        findings = check(path)
        for finding in findings:
            print(f"{path}:{finding}")
        of_path = sum(finding.severity == "error" for finding in findings)
        print(f"{path}: {_counted(of_path, 'error')}, {_counted(len(findings) - of_path, 'warning')}")
        errors += of_path
    return cli.FAILED if errors else cli.DONE


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


if __name__ == "__main__":
    cli.run(main)
