"""Seeded mutants: small changes of our source, each of which some test should notice.

python -m tests.mutants --seed 13 --count 30 --list
python -m tests.mutants --seed 13 --count 30                                  # test files that import what is changed
python -m tests.mutants --seed 13 --count 30 --only 4 17 --tests tests/test_search_on_ray.py --marker ray

Mutants are drawn from the modules given, each equally often, and tried one after the other in a copy of the tree.
"""

from __future__ import annotations

import argparse
import ast
import copy
import importlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
OURS = ("benchmarks", "orchestrator", "results", "search_spaces", "tests", "trainables")
# Half of them are modules whose work is seen by tests with Ray alone.
FILES = (
    *("orchestrator/searcher.py", "orchestrator/search.py", "orchestrator/workers.py", "orchestrator/ray_cluster.py"),
    *("orchestrator/driver.py", "trainables/tune_trial.py", "trainables/large_batch.py"),
    *("orchestrator/ledger.py", "orchestrator/halving.py", "orchestrator/selection.py", "orchestrator/plan.py"),
    *("trainables/loop.py", "trainables/trial.py", "trainables/evaluation.py"),
)
# Imported once, here: what the tests import and we have not written takes ten seconds.
IMPORTED_ONCE = (
    "torch",
    "torchvision",
    "ray.tune",
    "ray.train.torch",
    "optuna",
    "sklearn",
    "scipy.stats",
    "hypothesis",
)
OPPOSITES: dict[type[ast.AST], type[ast.AST]] = {
    ast.Lt: ast.GtE,
    ast.GtE: ast.Lt,
    ast.Gt: ast.LtE,
    ast.LtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.And: ast.Or,
    ast.Or: ast.And,
}


@dataclass(frozen=True)
class Mutant:
    """One change of one file: the bytes from `start` to `end` become `after`."""

    file: str
    line: int
    start: int
    end: int
    before: str
    after: str

    def applied_to(self, source: bytes) -> bytes:
        """The changed source."""
        assert source[self.start : self.end].decode() == self.before, f"{self.file} has changed"
        return source[: self.start] + self.after.encode() + source[self.end :]

    def __str__(self) -> str:
        shown = (" ".join(text.split())[:70] for text in (self.before, self.after))
        return f"{self.file}:{self.line}  {'  ->  '.join(shown)}"


def changed(node: ast.AST) -> ast.AST | None:
    """Another node in the place of one, or None where there is nothing to change."""
    other = copy.deepcopy(node)
    match other:
        case ast.Compare(ops=[only]):
            other.ops = [OPPOSITES[type(only)]()]  # type: ignore[list-item]
        case ast.BinOp() | ast.BoolOp() if type(other.op) in OPPOSITES:
            other.op = OPPOSITES[type(other.op)]()  # type: ignore[assignment]
        case ast.UnaryOp(op=ast.Not()):
            return other.operand
        case ast.Constant(value=bool(value)):
            other.value = not value
        case ast.Constant(value=int(value)) | ast.Constant(value=float(value)):
            other.value = value + 1
        case ast.Return(value=value) if value is not None and not _is_none(value):
            other.value = ast.Constant(None)
        case ast.Expr(value=ast.Call()):
            return ast.Pass()
        case _:
            return None
    return other


def _is_none(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and node.value is None


def mutants_of(file: str, source: bytes) -> list[Mutant]:
    """All mutants of the functions in a file. Annotations, decorators and the parts of f-strings stay as they are."""
    line_starts = np.cumsum([0, *(len(line) for line in source.splitlines(keepends=True))])
    found = []
    for node in _nodes_in_functions(ast.parse(source)):
        if (other := changed(node)) is not None:
            start = int(line_starts[node.lineno - 1]) + node.col_offset  # type: ignore[attr-defined]
            end = int(line_starts[node.end_lineno - 1]) + node.end_col_offset  # type: ignore[attr-defined]
            text = ast.unparse(other)
            after = f"({text})" if isinstance(other, ast.expr) and not isinstance(other, ast.Constant) else text
            before = source[start:end].decode()
            found.append(Mutant(file, node.lineno, start, end, before, after))  # type: ignore[attr-defined]
    return found


def _nodes_in_functions(tree: ast.AST) -> Iterator[ast.AST]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            for statement in node.body:
                yield from _nodes_below(statement)


def _nodes_below(node: ast.AST) -> Iterator[ast.AST]:
    if isinstance(node, ast.JoinedStr | ast.FunctionDef):
        return  # a function within a function comes by itself
    yield node
    for name, value in ast.iter_fields(node):
        if name != "annotation":
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    yield from _nodes_below(child)


def drawn(tree: Path, files: tuple[str, ...], *, seed: int, count: int) -> list[Mutant]:
    """As many mutants, of each file as many as of the others."""
    rng = np.random.default_rng(seed)
    of_files = [mutants_of(file, (tree / file).read_bytes()) for file in files]
    for mutants in of_files:
        rng.shuffle(mutants)  # type: ignore[arg-type]
    return [of_files[number % len(files)].pop() for number in range(count)]


def importers(tree: Path, file: str) -> list[str]:
    """The test files that import a module by its name, shortest first."""
    package, _, module = file.removesuffix(".py").replace("/", ".").rpartition(".")
    found = []
    for path in sorted((tree / "tests").rglob("test_*.py"), key=lambda path: path.stat().st_size):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (
                node.module == f"{package}.{module}"
                or (node.module == package and module in [alias.name for alias in node.names])
            ):
                found.append(str(path.relative_to(tree)))
                break
    return found


@contextmanager
def copied(tree: Path) -> Iterator[Path]:
    """A copy of the files in a tree that git knows or would add."""
    listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listing, cwd=tree, capture_output=True, text=True, check=True).stdout.splitlines()
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        for name in names:
            if (tree / name).is_file():
                (Path(folder) / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(tree / name, Path(folder) / name)
        yield Path(folder)


def in_a_process(run: Callable[[], int], output: Path) -> int:
    """The status of a function that runs in a copy of this process, with its output in a file."""
    sys.stdout.flush()
    if process := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    status = 1
    try:
        descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        status = run()
    except BaseException:
        traceback.print_exc()
        raise
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def tested(tree: Path, tests: list[str], marker: str) -> int:
    """The status of pytest in a tree, in a process that has imported nothing of ours from elsewhere."""
    for name in list(sys.modules):
        if name.partition(".")[0] in OURS:
            del sys.modules[name]
    os.chdir(tree)
    os.environ["PYTHONPATH"] = str(tree)
    sys.path[:] = [str(tree), *(path for path in sys.path if path not in ("", str(ROOT)))]
    options = ["-x", "-q", "-m", marker, "-p", "no:cacheprovider", "-W", "ignore::pytest.PytestAssertRewriteWarning"]
    return int(pytest.main([*tests, *options]))


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument("--seed", type=int, default=13)
    parser.add_argument("--count", type=int, default=30)
    parser.add_argument("--files", nargs="+", default=FILES)
    parser.add_argument("--tree", type=Path, default=ROOT, help="whose source and tests (default: this one)")
    parser.add_argument("--only", nargs="+", type=int, help="numbers of mutants")
    parser.add_argument("--tests", nargs="+", help="default: the files that import the changed module")
    parser.add_argument("--marker", default="not ray and not soak and not cluster")
    parser.add_argument("--list", action="store_true", help="show the mutants only")
    parser.add_argument("--logs", type=Path, default=Path(tempfile.gettempdir()), help="for what pytest prints")
    return parser.parse_args()


def main() -> None:
    """Try mutants, a line for each."""
    args = parsed()
    mutants = drawn(args.tree, tuple(args.files), seed=args.seed, count=args.count)
    chosen = args.only or range(len(mutants))
    if args.list:
        print("\n".join(f"{number:3d}  {mutants[number]}" for number in chosen))
        return
    for name in IMPORTED_ONCE:
        importlib.import_module(name)
    with copied(args.tree.resolve()) as tree:
        for number in chosen:
            print(f"{number:3d}  {tried(tree, mutants[number], args, number)}", flush=True)


def tried(tree: Path, mutant: Mutant, args: argparse.Namespace, number: int) -> str:
    """A line on what tests made of a mutant."""
    tests, begin = args.tests or importers(tree, mutant.file), time.monotonic()
    if not tests:
        return f"no tests        {mutant}"
    file, log = tree / mutant.file, args.logs / f"mutant-{number}.log"
    source = file.read_bytes()
    try:
        file.write_bytes(mutant.applied_to(source))
        status = in_a_process(lambda: tested(tree, tests, args.marker), log)
    finally:
        file.write_bytes(source)
    return f"{verdict(status, log):8} {time.monotonic() - begin:5.0f} s  {mutant}  {noticed_by(log)}"


def verdict(status: int, log: Path) -> str:
    """What a status of pytest says of a mutant. A run in which no test failed kills nothing."""
    if status in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        return "survived" if status == pytest.ExitCode.OK else "no tests"
    return "killed" if noticed_by(log) else "broken"


def noticed_by(log: Path) -> str:
    """The test that failed, or the file that could not be imported."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.startswith(("FAILED ", "ERROR "))]
    return lines[-1].split(" - ")[0] if lines else ""


if __name__ == "__main__":
    main()
