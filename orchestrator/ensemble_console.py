"""What making an ensemble shows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from rich.console import Console
from rich.table import Table

from orchestrator.candidates import Candidate, Candidates
from orchestrator.diversity import Diversity, disagreement
from orchestrator.ensembling import Row, shown_on_test
from orchestrator.pool import SelectPool
from orchestrator.returns import Stability
from results.schema import ScoreRecord
from results.store import Experiment

ROUNDING = 1e-6
"""Gains that copies of one model show."""
MOST_COLUMNS = 8
"""Members between whom the table of disagreement is shown."""
WIDEST = 1000
"""Columns of characters of a table at most."""


@dataclass(frozen=True, eq=False)
class Report:
    """Everything that is known of an ensemble once it has been made. `on_front`: of each row of the curve."""

    experiment: Experiment
    ensemble_id: str
    candidates: Candidates
    select: SelectPool
    rows: list[Row]
    curve: list[Row]
    on_front: list[bool]
    scores: list[ScoreRecord]
    stability: Stability
    diversity: Diversity | None
    comparisons: int
    num_trials: int
    search_seconds: float
    """Of all trials of the experiments, whatever became of them."""
    lacking: list[str] = field(default_factory=list)
    """Members whose weights have been removed."""

    @property
    def members(self) -> list[Candidate]:
        """The chosen ensemble's members."""
        return [self.candidates.rows[member] for member in self.rows[0].ensembles[0].members]

    @property
    def tested(self) -> bool:
        """Whether the test split was scored."""
        return any(score.split == "test" for score in self.scores)

    def score(self, row: Row, split: str, metric: str) -> ScoreRecord:
        """A row's record of a metric on a split."""
        key = (row.kind, row.label, split, metric)
        return next(s for s in self.scores if (s.kind, s.label, s.split, s.metric) == key)

    def optimism(self, metric: str) -> float | None:
        """How much better the chosen ensemble looked on select than it is on estimate."""
        chosen, estimate = (self.score(self.rows[0], split, metric).value for split in ("select", "estimate"))
        if chosen is None or estimate is None:
            return None
        return chosen - estimate if metric == "accuracy" else estimate - chosen


def show(console: Console, report: Report) -> None:
    """Print the members, the tables of estimate and test, what the controls say, and what more members bring."""
    ensemble, name = report.rows[0].ensembles[0], report.experiment.name
    temperature = ensemble.combination.temperature
    shown = "" if temperature is None else f", temperature {temperature:.2f}"
    console.print(
        f"{name}: {len(report.members)} of {len(report.candidates.rows)} candidates, chosen by "
        f"{report.rows[0].selection!r} on {len(report.select.labels_N):,} select images{shown}",
        highlight=False,
        soft_wrap=True,
    )
    _print_whole(console, _members_table(report))
    if report.diversity is not None and report.diversity.disagreement is not None:
        console.print(_diversity_line(report.diversity), highlight=False, soft_wrap=True)
    _print_whole(console, _score_table(report, "estimate", "estimate: read once, after choosing", report.rows))
    if report.tested:
        on_test = _score_table(report, "test", "test: scored once, never chosen on", shown_on_test(report.rows))
        _print_whole(console, on_test)
    else:
        console.print("test: left alone (--no-test)", highlight=False)
    _print_whole(console, _curve_table(report))
    for line in [*verdicts(report), *_caveats(report)]:
        console.print(line, highlight=False, soft_wrap=True)
    folder = report.experiment.ensemble_folder(report.ensemble_id)
    console.print(f"stored in {folder}", highlight=False, soft_wrap=True)
    if report.lacking:
        console.print(
            f"{', '.join(report.lacking)}: the weights are no longer there, so that this ensemble cannot predict; "
            f"choose with --candidates \"checkpoint != ''\", or search with a larger --keep-checkpoints",
            highlight=False,
            soft_wrap=True,
        )


def _print_whole(console: Console, table: Table) -> None:
    """Print a table with every figure whole: a terminal that is too narrow folds its lines."""
    table.width = console.measure(table, options=console.options.update(max_width=WIDEST)).maximum
    console.print(table, crop=False)


def verdicts(report: Report) -> list[str]:
    """What estimate says of the chosen ensemble against the best single model, then against each other control."""
    controls = [row for row in report.rows if row.kind == "control" or (row.kind == "single" and row.baseline)]
    controls += [row for row in report.rows if row.selection == "whole budget"]
    return [_verdict(report, row) for row in controls]


def _verdict(report: Report, row: Row) -> str:
    parts = []
    for name, metric in (("accuracy", "accuracy"), ("NLL", "nll")):
        score = report.score(row, "estimate", metric)
        gain, low, high = score.chosen_gain, score.chosen_gain_ci_low, score.chosen_gain_ci_high
        if gain is None or low is None or high is None:
            continue
        p_value = score.chosen_p_value
        # Of few examples an interval may exclude zero where the test does not.
        shown = p_value is None or p_value < 0.05
        better, worse = low > ROUNDING and shown, high < -ROUNDING and shown
        word = "better" if better else "worse" if worse else "no difference shown"
        tested = "" if score.chosen_p_value is None else f", p {score.chosen_p_value:.2g}"
        parts.append(f"{name} {word} (gain {_gain(gain, low, high)}{tested})")
    names = {"random": "random members", "top": "the most accurate", "seeds": "seeds of one configuration"}
    what = f"the {row.label}" if row.kind == "single" else f"{score.k} {names[row.selection]}"
    return f"against {what}, on {score.num_examples:,} estimate images: {'; '.join(parts)}"


def _caveats(report: Report) -> list[str]:
    """How much better select made it look, how stable the choice is, and how many intervals were shown."""
    accuracy, nll = report.optimism("accuracy"), report.optimism("nll")
    nll_text = "" if nll is None else f", NLL {nll:+.4f} nats better"
    stability = report.stability
    repeated = any(row.selection == "seeds" for row in report.rows)
    no_seeds = "no control of other seeds: no configuration was trained twice (search with --finalists 1 --seeds 4)"
    cross = "" if stability.nll is None else f", NLL {stability.nll:.4f}"
    return [
        *([] if repeated else [no_seeds]),
        f"optimism, select's figures less estimate's (above zero: it flattered): accuracy {accuracy:+.4f}{nll_text}",
        f"stability: chosen on four fifths of select and scored on the fifth, accuracy {stability.accuracy:.4f}"
        f"{cross}; two such choices share {stability.overlap:.0%} of their members",
        f"the time trained is the members' alone; finding them took {report.num_trials} trials, "
        f"{_duration(report.search_seconds)}",
        f"{report.comparisons} gains with 95% intervals in accuracy and NLL were computed on estimate; were there "
        f"none, about {report.comparisons / 20:.0f} would exclude zero all the same: quote the first line, above",
    ]


def _diversity_line(diversity: Diversity) -> str:
    figures = (
        ("disagreement", diversity.disagreement),
        ("Q-statistic", diversity.q_statistic),
        ("correlation of errors", diversity.error_correlation),
        ("KL", diversity.kl),
    )
    shown = ", ".join(f"{name} {value:.3f}" for name, value in figures if value is not None)
    return (
        f"between members, on select: {shown}; averaging takes {diversity.ambiguity:.4f} nats off their mean NLL of "
        f"{diversity.mean_member_nll:.4f}"
    )


def _members_table(report: Report) -> Table:
    ensemble, members = report.rows[0].ensembles[0], report.members
    wide = 1 < len(members) <= MOST_COLUMNS
    title = "members" + (", and how often two of them disagree on select" if wide else "")
    table = Table(title=title, title_justify="left", box=None)
    names = [_name(member, report.candidates) for member in members]
    for heading in ("trial", "weight", "temperature", *(names if wide else [])):
        table.add_column(heading, justify="left" if heading == "trial" else "right")
    disagreement_MM = disagreement(report.select.log_probs(ensemble.members)) if wide else None
    temperatures_M = ensemble.combination.temperatures_M
    for index, name in enumerate(names):
        cells = []
        if disagreement_MM is not None:
            cells = ["-" if i == index else f"{value:.3f}" for i, value in enumerate(disagreement_MM[index])]
        table.add_row(name, f"{ensemble.weights_M[index]:.2f}", f"{temperatures_M[index]:.2f}", *cells)
    return table


def _name(member: Candidate, candidates: Candidates) -> str:
    return f"{member.experiment}/{member.name}" if len(candidates.experiments) > 1 else member.name


def _score_table(report: Report, split: str, title: str, rows: Sequence[Row]) -> Table:
    examples = report.score(rows[0], split, "accuracy").num_examples
    table = Table(title=f"{title} ({examples:,} images; gains with 95% intervals)", title_justify="left", box=None)
    table.add_column("")
    headings = ("k", "accuracy", "gain over best single", "NLL", "gain", "ECE (floor)", "trained", "mult-adds")
    for heading in headings:
        table.add_column(heading, justify="right")
    (single,) = (row.ensembles[0].members for row in rows if row.baseline)
    for row in rows:
        is_single = row.ensembles[0].members == single
        of = {metric: report.score(row, split, metric) for metric in ("accuracy", "nll", "ece", "ece_floor")}
        floor = of["ece_floor"].value
        trained, adds, _ = _costs(of["accuracy"])
        table.add_row(
            row.label + (" *" if row.chosen else ""),
            str(of["accuracy"].k),
            _figure(of["accuracy"].value),
            "" if is_single else _gain_of(of["accuracy"]),
            _figure(of["nll"].value),
            "" if is_single else _gain_of(of["nll"]),
            _figure(of["ece"].value) + ("" if floor is None else f" ({floor:.4f})"),
            trained,
            adds,
        )
    return table


def _costs(score: ScoreRecord) -> tuple[str, str, str]:
    """Time of training, multiply-adds and images a second of predicting."""
    speed = "-" if score.images_per_second is None else f"{score.images_per_second:,.0f}"
    return _duration(score.training_seconds), _amount(score.multiply_adds), speed


def _duration(seconds: float) -> str:
    return (
        f"{seconds:.0f} s"
        if seconds < 600
        else f"{seconds / 60:.0f} min"
        if seconds < 36000
        else f"{seconds / 3600:.0f} h"
    )


def _amount(multiply_adds: int) -> str:
    return f"{multiply_adds / 1e6:,.1f} M" if multiply_adds >= 1e5 else f"{multiply_adds:,}"


def _curve_table(report: Report) -> Table:
    nll_of = {row.label: report.score(row, "select", "nll").value for row in report.curve}
    known = {label: value for label, value in nll_of.items() if value is not None}
    best = min(known, key=lambda label: known[label], default="")
    title = "more members, on estimate (select: + front of accuracy and cost, < lowest NLL)"
    table = Table(title=title, title_justify="left", box=None)
    table.add_column("k", justify="right")
    for heading in ("accuracy (95%)", "NLL (95%)", "mult-adds", "images/s", ""):
        table.add_column(heading, justify="right")
    for row, on_front in zip(report.curve, report.on_front, strict=True):
        accuracy, nll = (report.score(row, "estimate", metric) for metric in ("accuracy", "nll"))
        _, adds, speed = _costs(accuracy)
        cells = [
            str(accuracy.k),
            _with_interval(accuracy),
            _with_interval(nll),
            adds,
            speed,
            ("+" if on_front else " ") + ("<" if row.label == best else " "),
        ]
        table.add_row(*cells)
    return table


def _with_interval(score: ScoreRecord) -> str:
    if score.value is None:
        return "-"
    return f"{score.value:.4f} [{score.ci_low:.4f}, {score.ci_high:.4f}]"


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:z.4f}"


def _gain_of(score: ScoreRecord) -> str:
    if score.gain is None or score.gain_ci_low is None or score.gain_ci_high is None:
        return "-"
    return _gain(score.gain, score.gain_ci_low, score.gain_ci_high)


def _gain(value: float, low: float, high: float) -> str:
    return f"{value:+z.4f} [{low:+z.4f}, {high:+z.4f}]"
