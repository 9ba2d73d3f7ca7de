"""`python -m orchestrator.cluster check` finds mistakes in cluster files without an account, and says where."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from botocore.session import Session
from botocore.validate import ParamValidator
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from orchestrator import cluster
from orchestrator.cluster_check import check, versions
from orchestrator.cluster_check.document import Finding
from tests.cluster_edits import Edit, replaced, top_level
from tests.cluster_mistakes import LOCAL_MISTAKES, MISTAKES
from tests.cluster_variants import KUBERAY_VARIANTS, LOCAL_VARIANTS, VARIANTS
from tests.command_mistakes import COMMAND_MISTAKES
from tests.conftest import ROOT, CommandLine
from tests.launch_mistakes import LAUNCH_MISTAKES
from tests.manifest_mistakes import KUBERAY_MISTAKES
from tests.node_type_mistakes import NODE_TYPE_MISTAKES

AWS = (ROOT / "cluster.yaml").read_text()
LOCAL = (ROOT / "cluster.local.yaml").read_text()
KUBERAY = (ROOT / "cluster.kuberay.yaml").read_text()
SHIPPED = {"cluster.yaml": AWS, "cluster.local.yaml": LOCAL, "cluster.kuberay.yaml": KUBERAY}
UNFILLED = re.compile(r"is still a placeholder|there is no ~/")  # each user's own: his names, his key, his token

ALL_MISTAKES = [
    pytest.param(base, *mistake, id=f"{kind}: {name}")
    for kind, base, table in (
        ("aws", AWS, NODE_TYPE_MISTAKES | LAUNCH_MISTAKES | COMMAND_MISTAKES | MISTAKES),
        ("local", LOCAL, LOCAL_MISTAKES),
        ("kuberay", KUBERAY, KUBERAY_MISTAKES),
    )
    for name, mistake in table.items()
]


ALL_VARIANTS = [
    pytest.param(base, edit, id=f"{kind}: {name}")
    for kind, base, table in (
        ("aws", AWS, VARIANTS),
        ("local", LOCAL, LOCAL_VARIANTS),
        ("kuberay", KUBERAY, KUBERAY_VARIANTS),
    )
    for name, edit in table.items()
]


def findings_in(folder: Path, text: str) -> list[Finding]:
    path = folder / "cluster.yaml"
    path.write_text(text)
    return check(path)


@pytest.mark.parametrize("name", SHIPPED)
def test_the_shipped_files_lack_only_what_is_each_users_own(name: str) -> None:
    for finding in check(ROOT / name):
        assert finding.severity == "warning", finding
        assert UNFILLED.search(finding.message), finding


def test_filled_in_the_shipped_file_is_clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("0" * 64)
    text = AWS.replace("YOUR-BUCKET", "cats").replace("sg-0123456789abcdef0", "sg-0f3e5d7c9b1a24680")
    assert findings_in(tmp_path, text) == []


@pytest.mark.parametrize(("base", "edit", "line", "severity", "sentence"), ALL_MISTAKES)
def test_a_mistake_is_named_on_its_line(
    base: str, edit: Edit, line: Callable[[str], int], severity: str, sentence: str, tmp_path: Path
) -> None:
    text = edit(base)
    findings = findings_in(tmp_path, text)
    about_it = [finding for finding in findings if sentence in finding.message]
    assert about_it, f"not found: {sentence}\n" + "\n".join(map(str, findings))
    assert (line(text), severity) in [(finding.line, finding.severity) for finding in about_it]
    assert not any(sentence in finding.message for finding in findings_in(tmp_path, base))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("max_workers: 10", 'max_workers: "10"'),
        ("idle_timeout_minutes: 20", "idle_timeout_minutes: 20m"),
        ("cache_stopped_nodes: false", 'cache_stopped_nodes: "false"'),
    ],
)
def test_what_is_of_another_type_is_not_said_to_be_missing_too(old: str, new: str, tmp_path: Path) -> None:
    about_it = [
        finding.message for finding in findings_in(tmp_path, replaced(old, new)(AWS)) if old[:10] in str(finding)
    ]
    assert len(about_it) == 1
    assert "is the text" in about_it[0]


@pytest.mark.parametrize(("base", "edit"), ALL_VARIANTS)
def test_what_is_written_in_another_way_is_no_mistake(base: str, edit: Edit, tmp_path: Path) -> None:
    text = edit(base)
    assert text != base
    known = {finding.message for finding in findings_in(tmp_path, base)}
    assert [finding for finding in findings_in(tmp_path, text) if finding.message not in known] == []


def test_a_file_named_like_a_secret_is_none(tmp_path: Path) -> None:
    (tmp_path / "auth_token").write_text("0" * 64)
    text = replaced("auth_token: ~/.ray/auth_token", "auth_token: ./auth_token")(AWS)
    assert not any("looks like" in finding.message for finding in findings_in(tmp_path, text))


def test_botocore_itself_accepts_every_node_config() -> None:
    shape = Session().get_service_model("ec2").operation_model("RunInstances").input_shape
    for node_type in yaml.safe_load(AWS)["available_node_types"].values():
        numbers = {"MinCount": 1, "MaxCount": 1}  # which Ray adds
        report = ParamValidator().validate({**node_type["node_config"], **numbers}, shape)
        assert not report.has_errors(), report.generate_report()


def paths_in(value: object, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where every part of a value lies, the whole too."""
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(inner for key, part in parts for inner in paths_in(part, (*path, key)))]


def changed(value: Any, path: tuple[Any, ...], new: object) -> object:
    """A copy with another part at a path; none there if `new` is ..."""
    if not path:
        return None if new is ... else new
    copy = value.copy()
    if len(path) == 1 and new is ...:
        del copy[path[0]]
    else:
        copy[path[0]] = changed(value[path[0]], path[1:], new)
    return copy


LOADED = [next(yaml.safe_load_all(text)) for text in SHIPPED.values()]
JUNK = st.one_of(
    st.just(...),
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(allow_nan=False),
    st.dates(),
    st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), max_size=8),
    st.lists(st.one_of(st.none(), st.integers(), st.just("x")), max_size=2),
    st.dictionaries(st.one_of(st.text("ab", max_size=2), st.integers()), st.none(), max_size=2),
)


@settings(
    max_examples=200, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data(), junk=JUNK)
def test_no_part_left_out_or_of_another_type_ends_in_a_traceback(
    data: st.DataObject, junk: object, tmp_path: Path
) -> None:
    value = data.draw(st.sampled_from(LOADED), label="file")
    path = data.draw(st.sampled_from(paths_in(value)), label="path")
    assert all(
        finding.line >= 1 and finding.message
        for finding in findings_in(tmp_path, yaml.dump(changed(value, path, junk)))
    )


@settings(max_examples=50, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(st.sampled_from("ab: -[]{}&*!?|>%@'\"#\n\t,0~\x00\u00e9"), max_size=40))
@example(text="a: &x [*x]")
@example(text="? [a]\n: b")
@example(text="a: 2025-99-99")
@example(text="!!python/object:os.system x")
@example(text="[" * 2000)
@example(text="")
def test_no_text_ends_in_a_traceback(text: str, tmp_path: Path) -> None:
    assert any(finding.severity == "error" for finding in findings_in(tmp_path, text))


def test_a_file_that_is_not_text_is_said_to_be_so(tmp_path: Path) -> None:
    (tmp_path / "cluster.yaml").write_bytes(b"cluster_name: \xff")
    assert "not text in UTF-8" in check(tmp_path / "cluster.yaml")[0].message


@pytest.mark.parametrize("name", SHIPPED)
def test_versions_in_the_files_are_those_of_the_constraints(name: str) -> None:
    project = versions.project_versions(ROOT / "constraints.txt")
    code = "\n".join(line for line in SHIPPED[name].splitlines())
    rays = re.findall(r"\]==([\d.]+\d)|rayVersion: \"([\d.]+)\"|ray[:-]([\d.]+)-py311", code)
    pythons = re.findall(r"--python (\d+\.\d+)\.\d+|-py(3)(\d+)", code)
    assert {"".join(groups) for groups in rays} == {project.ray}
    assert {groups[0] or ".".join(groups[1:]) for groups in pythons} == {project.python}


def test_without_boto3_the_rest_is_checked_and_one_line_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "botocore", None)  # as if it were not installed
    findings = findings_in(tmp_path, replaced("MarketType: spot", "MarketType: spotty")(AWS))
    about_it = [finding for finding in findings if "boto3" in finding.message]
    assert [finding.severity for finding in about_it] == ["warning"]
    assert "pip install -c constraints.txt -e '.[aws]'" in about_it[0].message
    assert any("placeholder" in finding.message for finding in findings)


def test_the_users_own_aws_configuration_is_never_read(
    command: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".aws").mkdir()
    for name in ("config", "credentials"):
        (tmp_path / ".aws" / name).write_text("this is no [section\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_PROFILE", "nosuch")
    done = command("orchestrator.cluster", "check", str(ROOT / "cluster.yaml"))
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_command_prints_file_and_line_and_exits_by_severity(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("good.yaml").write_text(AWS)
    Path("bad.yaml").write_text(AWS.replace("max_workers: 10", "max_workers: -1"))
    assert cluster.main(["check", "good.yaml"]) == 0
    assert "good.yaml: 0 errors" in capsys.readouterr().out
    assert cluster.main(["check", "good.yaml", "bad.yaml"]) == 1
    line = top_level("max_workers")(AWS)
    assert f"\nbad.yaml:{line}: error: max_workers: -1 is less than the minimum" in capsys.readouterr().out


def test_a_file_that_is_not_there_is_wrong_usage(command: CommandLine) -> None:
    done = command("orchestrator.cluster", "check", "nowhere.yaml")
    assert (done.returncode, done.stdout) == (2, "")
    assert "nowhere.yaml: there is no such file" in done.stderr
    assert command("orchestrator.cluster").returncode == 2


def test_from_another_folder_the_shipped_file_passes_silently_and_soon(command: CommandLine) -> None:
    done = command("orchestrator.cluster", "check", str(ROOT / "cluster.yaml"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""


GUIDE = (ROOT / "docs" / "cluster.md").read_text()


def test_what_the_guide_shows_is_what_the_check_prints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = re.search(r"```console\n\$ python -m orchestrator\.(.*)\n((?:.*\n)*?)```", GUIDE)
    assert shown is not None
    token = tmp_path / ".ray" / "auth_token"
    token.parent.mkdir()
    token.write_text("0" * 64)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    filled_in = AWS.replace("YOUR-BUCKET", "cats").replace("sg-0123456789abcdef0", "sg-0f3e5d7c9b1a24680")
    Path("cluster.yaml").write_text(replaced("VolumeSize", "VolumeSzie")(filled_in))
    cluster.main(shown[1].split()[1:])
    printed = capsys.readouterr().out.splitlines()
    assert set(shown[2].splitlines()) <= set(printed)
    assert shown[2].splitlines()[-1] == printed[-1]


@pytest.mark.slow
@pytest.mark.parametrize("module", sorted(set(re.findall(r"python -m (orchestrator\.\w+) [a-z0-9_]*(?: ?--)", GUIDE))))
def test_flags_of_the_guides_commands_exist(module: str, command: CommandLine) -> None:
    commands = re.findall(rf"python -m {re.escape(module)} ([^'\n]*)", GUIDE)
    flags = {flag for arguments in commands for flag in re.findall(r"--[a-z-]+", arguments)}
    known = set(re.findall(r"--[a-z-]+", command(module, "--help").stdout))
    assert flags <= known


def test_commands_and_files_of_the_guide_exist() -> None:
    for module in re.findall(r"python -m (orchestrator\.\w+)", GUIDE):
        assert (ROOT / (module.replace(".", "/") + ".py")).is_file(), module
    for name in re.findall(r"`([\w.]+\.(?:yaml|txt))`", GUIDE):
        assert (ROOT / name).is_file(), name
