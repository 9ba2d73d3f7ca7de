"""The documents say what is there: their code runs, their columns, files and commands exist."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator import ensemble
from results.schema import (
    ClassAccuracyRecord,
    DistillationRecord,
    EpochRecord,
    ScoreRecord,
    TrialRecord,
    arrow_schema,
    predictions_schema,
)
from tests.conftest import ROOT, command_environment
from tests.simulation import new_experiment, run_with_predictions

RESULTS_README = (ROOT / "results" / "README.md").read_text()
README = (ROOT / "README.md").read_text()


@pytest.fixture(scope="module")
def folder_with_results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("user")
    experiment = new_experiment(folder / "results" / "runs", name="digits")
    run_with_predictions(experiment, num_trials=10)
    ensemble.main(["--results-dir", str(folder / "results" / "runs"), "--top-k", "2"])
    return folder


@pytest.mark.parametrize("code", re.findall(r"```python\n(.*?)```", RESULTS_README, re.DOTALL))
def test_every_snippet_of_the_results_readme_runs(code: str, folder_with_results: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder_with_results,
        env=command_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


@pytest.mark.parametrize(
    ("heading", "names"),
    [
        ("trials", arrow_schema(TrialRecord).names),
        ("epochs", arrow_schema(EpochRecord).names),
        ("scores", arrow_schema(ScoreRecord).names),
        ("classes", arrow_schema(ClassAccuracyRecord).names),
        ("distillation", arrow_schema(DistillationRecord).names),
        ("predictions", predictions_schema(2).names),
    ],
)
def test_every_column_is_documented_and_no_other(heading: str, names: list[str]) -> None:
    section = RESULTS_README.split(f"## Columns of `{heading}`")[1].split("\n## ")[0]
    first_cells = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    documented = re.findall(r"`([a-z0-9_]+)`", " ".join(first_cells))
    assert sorted(documented) == sorted(names)


def test_the_annotated_tree_names_what_exists() -> None:
    tree = README.split("```text")[1].split("```")[0]
    names = re.findall(r"^ *([\w./-]+(?:\.py|\.md|\.yaml|\.toml|\.txt|/|Makefile))", tree, re.MULTILINE)
    assert len(names) > 20
    folder = ""
    for line in tree.splitlines():
        match = re.match(r"^( *)([\w./-]+)", line)
        if not match:
            continue
        indent, name = match.groups()
        if not indent:
            folder = name if name.endswith("/") else ""
        path = ROOT / (folder if indent else "") / name
        assert path.exists() or name == "runs/", path


def test_commands_in_the_readme_are_modules_that_exist() -> None:
    for module in re.findall(r"python -m ([\w.]+)", README + RESULTS_README):
        assert (ROOT / (module.replace(".", "/") + ".py")).is_file() or module == "venv", module


def test_no_absolute_path_of_a_machine_is_written_down() -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()
    for name in tracked:
        if name.endswith((".py", ".md", ".toml", ".txt", ".yaml", ".yml")) and name != "tests/test_documents.py":
            assert not re.search(r"(?<![\w.])/(root|home|work)/(?!ubuntu\b)[a-z]", (ROOT / name).read_text()), name
