"""How often the 95% intervals of an ensemble's figures cover the truth, where the truth is known.

    python benchmarks/interval_coverage.py --estimate 117 --select 176 --output FILE    # scikit-learn's digits
    python benchmarks/interval_coverage.py --estimate 2000 --select 3000 --output FILE  # CIFAR-100
    python benchmarks/interval_coverage.py --read FILE ... --summary FILE               # one table of them all

An invented population of 10,000 examples has logits of 60 models, which differ in skill and calibration, and share
errors. Each pool draws `select` and `estimate` from it with replacement, so what a fitted ensemble is worth is its
figure on the whole population, exactly. A simulated search keeps the 15 models that are most accurate on select; then
the project's own functions choose, fit and score. Every 10 pools have a new population, of another difficulty: true
accuracies lie between about 0.5 and 0.99. 1,000 pools take one and a half to three minutes of one core.

Standard errors are those of independent pools, or of independent populations where these are larger.
Shape suffixes: M models, P examples of the population, N examples of a split, C classes.
"""

from __future__ import annotations

import argparse
import platform
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa

from orchestrator.candidates import Candidate
from orchestrator.combination import COMBINERS
from orchestrator.ensembling import BEST_SINGLE, Ensemble, Row
from orchestrator.pool import EstimatePool, Pool, SelectPool, StoredLogits
from orchestrator.scoring import Figures, gain, score_rows
from orchestrator.selection import SELECTORS, by_rank, uniform
from results.files import parquet_bytes, replace_file
from results.schema import FloatArray, IntArray

EXAMPLES = 10_000
MODELS = 60
KEPT = 15
MEMBERS = 5
POOLS_PER_POPULATION = 10
POINTS = 100
METRICS = ("accuracy", "nll", "brier")
GAINS = ("accuracy", "nll")


@dataclass(frozen=True, eq=False)
class Population:
    """All examples there are."""

    logits_MPC: FloatArray
    labels_P: IntArray

    def logits(self, models: IntArray, examples: IntArray | slice) -> StoredLogits:
        """Of some models on some examples, gathered when they are asked for."""
        return StoredLogits(lambda place: self.logits_MPC[models[place]][examples], len(models))


def invent(rng: np.random.Generator, *, mislabelled: float) -> Population:
    """A population of 10 to 20 classes: some examples are hard for every model.

    `mislabelled`: the largest share of examples with another label, which no model can know.
    """
    models, examples = MODELS, EXAMPLES
    classes = int(rng.integers(10, 21))
    labels_P = rng.integers(0, classes, examples)
    ease_P = rng.lognormal(0.0, 0.35, examples)
    skill_M = rng.uniform(2.0, 8.0) * rng.uniform(0.7, 1.0, models)
    sharpness_M = rng.lognormal(0.0, 0.4, models)
    own_error = rng.uniform(0.6, 1.2)
    common_PC = rng.standard_normal((examples, classes), dtype=np.float32)
    logits_MPC = own_error * rng.standard_normal((models, examples, classes), dtype=np.float32) + common_PC
    logits_MPC[:, np.arange(examples), labels_P] += skill_M[:, None] * ease_P
    logits_MPC *= sharpness_M[:, None, None]
    is_wrong_P = rng.random(examples) < rng.uniform(0.0, mislabelled)
    labels_P = np.where(is_wrong_P, rng.integers(0, classes, examples), labels_P)
    return Population(logits_MPC.astype(np.float32), labels_P)


@dataclass(frozen=True)
class Setting:
    """Of one simulation. `estimate`, `select`: how many examples each has. `draws`: of estimate, for each choice."""

    estimate: int
    select: int
    selection: str = "diverse"
    combiner: str = "mean"
    mislabelled: float = 0.02
    draws: int = 1


@dataclass(frozen=True)
class Outcome:
    """A figure of one pool, and what it is on the whole population."""

    population: int
    pool: int
    split: str
    num_examples: int
    quantity: str
    truth: float
    value: float
    ci_low: float
    ci_high: float


def search(population: Population, size: int, rng: np.random.Generator) -> tuple[SelectPool, IntArray]:
    """The most accurate models on a drawn `select`, as a pool, and which of all models they are."""
    examples = rng.integers(0, len(population.labels_P), size)
    everyone = np.arange(len(population.logits_MPC))
    searched = SelectPool.of(population.logits(everyone, examples), population.labels_P[examples])
    kept = by_rank(searched)[:KEPT]
    return searched.among(kept), kept


def estimated(population: Population, models: IntArray, size: int, rng: np.random.Generator) -> EstimatePool:
    """A drawn `estimate`."""
    examples = rng.integers(0, len(population.labels_P), size)
    return EstimatePool(population.logits(models, examples), population.labels_P[examples])


def chosen_and_single(select: SelectPool, setting: Setting, rng: np.random.Generator) -> tuple[Row, Row]:
    """Of what `choose` gives the chosen ensemble and the best single model, without the rest, which takes ten times
    as long."""
    selected = SELECTORS[setting.selection].choose(select, MEMBERS, rng)
    chosen = Ensemble.fit(selected, setting.combiner, select)
    single = Ensemble.fit(uniform(by_rank(select)[:1].tolist()), "mean", select)
    return (
        Row("ensemble", setting.selection, (chosen,), "chosen", chosen=True),
        Row("single", "all", (single,), BEST_SINGLE, baseline=True),
    )


def outcomes(population: Population, setting: Setting, seeds: tuple[int, int, int]) -> Iterator[Outcome]:
    """Every figure of one pool on both splits. `seeds`: of the simulation, the population and the pool."""
    rng = np.random.default_rng(seeds)
    select, models = search(population, setting.select, rng)
    rows = chosen_and_single(select, setting, rng)
    estimates = [estimated(population, models, setting.estimate, rng) for _ in range(setting.draws)]
    whole = EstimatePool(population.logits(models, slice(None)), population.labels_P)
    truth = true_figures(rows, whole)
    for pool in (select, *estimates):
        for quantity, (value, low, high) in measured(rows, pool, rng):
            where = (seeds[1], seeds[2], "select" if pool is select else "estimate", len(pool.labels_N))
            yield Outcome(*where, quantity, truth[quantity], value, low, high)


def measured(rows: Sequence[Row], pool: Pool, rng: np.random.Generator) -> Iterator[tuple[str, list[float]]]:
    """What a user would read: each quantity, its value and the ends of its interval."""
    records = score_rows(rows, pool, ensemble_id="simulated", candidates=[SIMULATED] * KEPT, rng=rng)
    for record in records:
        single = record.kind == "single"
        if single and record.metric == "accuracy":
            yield "single accuracy", numbers(record.value, record.ci_low, record.ci_high)
        elif not single and record.metric in METRICS and record.value is not None:
            yield record.metric, numbers(record.value, record.ci_low, record.ci_high)
        if not single and record.metric in GAINS and record.gain is not None:
            yield f"gain in {record.metric}", numbers(record.gain, record.gain_ci_low, record.gain_ci_high)


def numbers(*values: float | None) -> list[float]:
    """The values, none of which is missing."""
    return [value for value in values if value is not None]


def true_figures(rows: Sequence[Row], whole: Pool) -> dict[str, float]:
    """Each quantity on the whole population."""
    chosen, single = (exact_figures(row.ensembles[0], whole) for row in rows)
    values = {metric: chosen.values[metric] for metric in METRICS if metric in chosen.values}
    gains = {f"gain in {metric}": gain(metric, chosen, single).value for metric in GAINS}
    found = {"single accuracy": single.values["accuracy"], **values, **gains}
    return {quantity: value for quantity, value in found.items() if value is not None}


def exact_figures(ensemble: Ensemble, whole: Pool) -> Figures:
    """Without resamples."""
    scored = ensemble.score(whole)
    means = scored.metrics(scored.columns_NK.mean(0))
    return Figures({metric: float(value) for metric, value in means.items()}, {}, None)


SIMULATED = Candidate(
    experiment="simulated",
    trial_id="t00000",
    variant="best",
    configuration="",
    stage="search",
    backbone="small_cnn",
    status="completed",
    averaged=False,
    train_seconds=1.0,
    train_cost=1.0,
    num_parameters=1,
    multiply_adds=1,
    images_per_second=None,
)


def simulate(setting: Setting, *, pools: int, seed: int, per_population: int = POOLS_PER_POPULATION) -> pd.DataFrame:
    """A row for every pool, split and quantity. Pools count from 1: NumPy takes the seeds (0, 0) and (0, 0, 0) for the
    same."""
    found: list[Outcome] = []
    for pool in range(pools):
        number = pool // per_population
        if pool % per_population == 0:
            population = invent(np.random.default_rng([seed, number]), mislabelled=setting.mislabelled)
        found += outcomes(population, setting, (seed, number, pool + 1))
    return pd.DataFrame([asdict(outcome) for outcome in found])


def mean_with_error(values: pd.Series, populations: pd.Series) -> tuple[float, float]:
    """The mean of pools and its standard error, by pools or by populations, whichever is larger."""
    of_each = values.groupby(populations).mean()
    by_pool = values.std() / np.sqrt(len(values))
    by_population = of_each.std() / np.sqrt(len(of_each)) if len(of_each) > 1 else 0.0
    return float(values.mean()), float(max(by_pool, by_population))


def summarize(table: pd.DataFrame) -> pd.DataFrame:
    """Coverage and bias of every quantity, by split and size, with their standard errors; bias is value less truth."""
    rows = []
    for (quantity, split, size), part in table.groupby(["quantity", "split", "num_examples"], sort=False):
        inside = ((part["ci_low"] <= part["truth"]) & (part["truth"] <= part["ci_high"])).astype(float)
        coverage, coverage_se = mean_with_error(inside, part["population"])
        bias, bias_se = mean_with_error(part["value"] - part["truth"], part["population"])
        rows.append(
            {
                "quantity": quantity,
                "split": split,
                "num_examples": size,
                "pools": len(part),
                "populations": part["population"].nunique(),
                "coverage": coverage,
                "coverage_se": coverage_se,
                "bias": bias,
                "bias_se": bias_se,
                "mean_truth": part["truth"].mean(),
                "mean_width": (part["ci_high"] - part["ci_low"]).mean(),
                "versions": versions(),
            }
        )
    return pd.DataFrame(rows)


def versions() -> str:
    """What the figures depend on."""
    return f"Python {platform.python_version()}, numpy {version('numpy')}, scipy {version('scipy')}"


def print_table(summary: pd.DataFrame) -> None:
    """As Markdown: coverage in percent, bias in points, which of NLL are hundredths of a nat."""
    print("| quantity | split | examples | pools | coverage, % | bias, points | truth, mean |")
    print("|---|---|---:|---:|---:|---:|---:|")
    for row in summary.itertuples():
        coverage = f"{POINTS * row.coverage:.1f} ± {POINTS * row.coverage_se:.1f}"
        bias = f"{POINTS * row.bias:+.3f} ± {POINTS * row.bias_se:.3f}"
        print(
            f"| {row.quantity} | {row.split} | {row.num_examples:,} | {row.pools:,} "
            f"| {coverage} | {bias} | {row.mean_truth:.3f} |"
        )


def write(table: pd.DataFrame, path: Path) -> None:
    """As zstd-compressed parquet."""
    replace_file(path, parquet_bytes(pa.Table.from_pandas(table, preserve_index=False)), sync=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pools", type=int, default=1000)
    parser.add_argument("--estimate", type=int, default=500)
    parser.add_argument("--select", type=int, default=750)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--selection", choices=SELECTORS, default="diverse")
    parser.add_argument("--combiner", choices=COMBINERS, default="mean")
    parser.add_argument("--mislabelled", type=float, default=0.02, help="largest share of wrong labels in a population")
    parser.add_argument("--output", type=Path, help="a row for every pool, split and quantity")
    parser.add_argument("--read", type=Path, nargs="+", help="what --output wrote, instead of a simulation")
    parser.add_argument("--summary", type=Path, help="a row for every size, split and quantity")
    args = parser.parse_args()
    if args.read:
        table = pd.concat([pd.read_parquet(path) for path in args.read])
    else:
        setting = Setting(args.estimate, args.select, args.selection, args.combiner, args.mislabelled)
        table = simulate(setting, pools=args.pools, seed=args.seed)
    if args.output:
        write(table, args.output)
    summary = summarize(table)
    if args.summary:
        write(summary, args.summary)
    print_table(summary)


if __name__ == "__main__":
    main()
