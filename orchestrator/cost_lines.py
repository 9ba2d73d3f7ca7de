"""Lines that say what a run will cost, before it begins."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from orchestrator.cost import Estimate, Left
from orchestrator.plan import SearchPlan

MINUTE, HOUR, DAY = 60.0, 3600.0, 86400.0
LONG_SECONDS = DAY
Flags = dict[str, float]
LEAST_SAVING = 0.05
DECIDE_THE_COST = ("batch_size", "initial_image_size", "optimizer", "ema_decay", "test_time_augmentation")
FRACTIONS = (0.5, 0.3, 0.2, 0.1, 0.05, 0.03, 0.02, 0.01)
SHORTEST_SCHEDULE = 3


def roughly(seconds: float) -> str:
    """Write seconds as one number: `40 s`, `25 min`, `3.5 h`, `6 days`."""
    if seconds < 1.5 * MINUTE:
        return f"{max(1, round(seconds))} s"
    if seconds < 1.5 * HOUR:
        return f"{round(seconds / MINUTE)} min"
    if seconds < 2 * DAY:
        hours = seconds / HOUR
        return f"{hours:.1f} h".replace(".0 h", " h") if hours < 9.95 else f"{round(hours)} h"
    return f"{round(seconds / DAY)} days"


def between(seconds: Sequence[float]) -> str:
    """Write the least and the most of several durations, or the one there is."""
    least, most = roughly(min(seconds)), roughly(max(seconds))
    return least if least == most else f"{least} to {most}"


def cores(count: int) -> str:
    """Write `one core` or `4 cores`."""
    return "one core" if count == 1 else f"{count} cores"


def search_line(plan: SearchPlan, estimate: Estimate) -> str:
    """Say what the rest of a search is expected to take, and what that is made of."""
    on = f"about {roughly(estimate.wall_seconds)} on {cores(estimate.workers * estimate.cpus)}"
    each = f"{between(estimate.trial_seconds)} each on {cores(estimate.cpus)}"
    said = [f"{_trials(estimate.left)} of at most {plan.space.budget.max_epochs} epochs, {each}"]
    if len(estimate.trial_seconds) > 1:
        said[0] += ", by network"
    if estimate.left.new_trials and estimate.saved_share >= LEAST_SAVING:
        said.append(f"early stopping saves about {estimate.saved_share:.0%}")
    if fixed := [name for name in DECIDE_THE_COST if name in plan.space.dimensions]:
        said.append("measured with " + ", ".join(f"{name}={getattr(plan.space.base, name)}" for name in fixed))
    return f"{on} ({'; '.join(said)})"


def training_line(plan: SearchPlan, left: Left, seconds: float, *, cpus: int) -> str:
    """Say what a training, or several of one configuration, or the rest of them, is expected to take."""
    epochs = plan.space.budget.max_epochs
    trained = f"{epochs} epoch{'s' if epochs > 1 else ''}"
    if plan.space.budget.num_trials > 1:
        trained = f"{_trials(left)} of {trained}"
    elif left.begun:
        trained = f"{epochs - left.begun[0]} of {trained}"
    return f"about {roughly(seconds)} on {cores(cpus)} ({trained})"


def _trials(left: Left) -> str:
    counts = {"new trials" if left.begun else "trials": left.new_trials, "begun": len(left.begun)}
    counts["finalists"] = left.finalists
    parts = [f"{count} {what.removesuffix('s') if count == 1 else what}" for what, count in counts.items() if count]
    return ", ".join(parts[:-1]) + (" and " if len(parts) > 1 else "") + parts[-1]


def budget_line(estimate: Estimate, *, seconds: float | None, flag: str) -> str:
    """Say how many trials a time budget has room for; nothing where it has room for all of them."""
    if seconds is None or seconds >= estimate.wall_seconds:
        return ""
    fitting, all_of_them = estimate.num_ended_after(seconds), estimate.left.num_trials
    return f"{flag} {seconds:g} (seconds) is less: about {fitting} of {all_of_them} trials will have ended by then"


def cheaper_flags(
    *, train_fraction: float, max_epochs: int, wall_seconds: Callable[[Flags], float], fixed: Collection[str] = ()
) -> Flags:
    """Find flags under which a search takes less than a day: a share of the images, then fewer epochs as well.

    `wall_seconds`: what it takes with flags. Fields that are `fixed` are not changed. Empty where nothing is enough.
    """
    smaller = [] if "train_fraction" in fixed else [share for share in FRACTIONS if share < train_fraction]
    tried: list[Flags] = [{"train_fraction": share} for share in smaller]
    least: Flags = tried[-1] if tried else {}
    if "max_epochs" not in fixed:
        halves = (max_epochs >> times for times in range(1, max_epochs.bit_length()))
        tried += [{**least, "max_epochs": epochs} for epochs in halves if epochs >= SHORTEST_SCHEDULE]
    return next((flags for flags in tried if wall_seconds(flags) < LONG_SECONDS), {})


def cheaper_line(command: str, flags: Flags, *, name: str, wall_seconds: float) -> str:
    """Say which command takes less than a day, to copy."""
    said = " ".join(f"--{field.replace('_', '-')} {value:g}" for field, value in flags.items())
    return f"about {roughly(wall_seconds)} with:\n  {command} {said} --name {name}-short"
