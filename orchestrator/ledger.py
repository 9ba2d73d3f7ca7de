"""What happens in a search, turned into events: the one place where a driver decides and writes. Knows no Ray."""

from __future__ import annotations

import math
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from optuna.distributions import distribution_to_json

from orchestrator.halving import Candidate, Halving, Judgement, Verdict
from orchestrator.proposals import Proposal, Proposer
from orchestrator.strength import strength
from results.events import (
    CheckpointRemoved,
    Decided,
    EpochReported,
    Event,
    TrialEnded,
    TrialRetried,
    TrialStarted,
)
from results.history import TIME_BUDGET, TrialHistory
from results.schema import EpochResult, Scalar, Stage, Status
from results.store import Experiment
from search_spaces.space import SearchSpace
from trainables.course import Leg, num_epochs, whole

Ending = tuple[Status, str]
Decision = Literal["continue", "stop", "pause", "spared"]
CONTROLS = 4  # the stream of randomness that chooses controls
MEDIUM = 0.5


@dataclass(frozen=True)
class Assignment:
    """A trial for a worker to train on its course, or to go on with from its checkpoint."""

    trial_id: str
    config: dict[str, Scalar]
    epochs_recorded: int
    course: tuple[Leg, ...]
    rung_epochs: list[int]


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What a search does beside asking and judging.

    `control_fraction`: share of the trials that is never stopped early. `max_seconds`: of this driver, from now on.
    `finalists`: how many of the best configurations are trained anew at the end, each with `seeds` other seeds.
    """

    seed: int
    keep_checkpoints: int
    control_fraction: float = 0.0
    max_seconds: float | None = None
    finalists: int = 0
    seeds: int = 1


class Ledger:
    """The state of one search. Made from the event log alone, so a resumed driver stands where the last one fell."""

    def __init__(
        self,
        experiment: Experiment,
        *,
        space: SearchSpace,
        stage: Stage,
        proposer: Proposer,
        halving: Halving,
        rules: Rules,
        notify: Callable[[], None] = lambda: None,
    ) -> None:
        """`notify` is called after anything has changed."""
        self.experiment = experiment
        self.space = space
        self._stage: Stage = stage
        self.halving = halving
        self._proposer = proposer
        self._rules = rules
        self._notify = notify
        self._to_resume: deque[str] = deque()
        self._spared: set[str] = set()
        self._began = time.monotonic()
        self._epochs_trained = sum(trial.last_epoch for trial in experiment.history.trials.values())
        self.running: set[str] = set()
        self._replay()

    def _replay(self) -> None:
        """Restore the rungs, decide what was left undecided, clear away what ended trials left behind."""
        history = self.experiment.history
        for event in history.decisions:
            trial = history.trials[event.trial_id]
            self._replay_decision(trial, event)
        for trial in history.ended:
            self.experiment.tidy(trial)
        for trial in history.unfinished:
            self._record(*self._left_unsaid(trial))
            if trial.ended is not None:
                self._after_end(trial)
            elif not self.halving.is_waiting(trial.trial_id):
                self._to_resume.append(trial.trial_id)

    def _replay_decision(self, trial: TrialHistory, event: Decided) -> None:
        result = trial.epochs[event.epoch - 1].result
        if trial.started.stage == "finalist" or result.diverged:
            return
        if not self.halving.is_waiting(trial.trial_id):
            self._judge(trial, result)
        if event.decision != "pause" and self.halving.is_waiting(trial.trial_id):
            self.halving.release(trial.trial_id)
        if event.decision == "spared":
            self._spared.add(trial.trial_id)

    def _left_unsaid(self, trial: TrialHistory) -> list[Event]:
        """What a crash kept from the log after a trial's last epoch: its decision, or the end that follows from it."""
        if not trial.epochs:
            return []
        result, decided = trial.epochs[-1].result, trial.decisions.get(trial.last_epoch)
        if decided is None:
            return self._conclusions(trial, result)
        if decided.decision != "stop":
            return []
        stopped: Ending = ("pruned", f"rung {decided.rung}" if decided.rung else TIME_BUDGET)
        return [self._ended(trial.trial_id, *(self._own_ending(trial, result) or stopped))]

    @property
    def num_started(self) -> int:
        """Trials of the ledger's stage that have started, whatever became of them."""
        return sum(trial.started.stage == self._stage for trial in self.experiment.history.trials.values())

    @property
    def finished(self) -> bool:
        """Whether every trial asked for has ended, or the budget is spent and what had begun has ended."""
        return self._searched and not self._finalists_to_start() and not self.experiment.history.unfinished

    @property
    def _searched(self) -> bool:
        """Whether no more trials of the search are to begin."""
        return self.num_started >= self.space.budget.num_trials or self._budget_spent

    @property
    def _budget_spent(self) -> bool:
        most = self.space.budget.max_total_epochs
        return self._out_of_time or (most is not None and self._epochs_trained >= most)

    @property
    def _out_of_time(self) -> bool:
        return self._rules.max_seconds is not None and time.monotonic() - self._began >= self._rules.max_seconds

    def next_trial(self) -> Assignment | None:
        """The next trial to run, unfinished ones of an earlier driver first; None when there are none (for now)."""
        if self._out_of_time:
            self._end_waiting()
            return None
        trial = self._next()
        if trial is None:
            return None
        self.running.add(trial.trial_id)
        self._notify()
        final = trial.started.stage == "finalist"
        return Assignment(
            trial.trial_id,
            trial.started.config,
            trial.last_epoch,
            course=whole(self.space.budget.max_epochs) if final else self.halving.course,
            rung_epochs=[] if final else self.halving.rung_epochs,
        )

    def _next(self) -> TrialHistory | None:
        if self._to_resume:
            return self.experiment.history.trials[self._to_resume.popleft()]
        if (promoted := self.halving.next_promotion()) is not None:
            return self._promote(promoted)
        if not self._searched:
            return self._start_proposed()
        if not self.running:
            self._end_waiting()
        if any(trial.started.stage == self._stage for trial in self.experiment.history.unfinished):
            return None  # which configurations are the best is known when the last trial has ended
        finalists = self._finalists_to_start()
        return self._start_finalist(finalists[0]) if finalists else None

    def _promote(self, trial_id: str) -> TrialHistory:
        trial = self.experiment.history.trials[trial_id]
        self.halving.release(trial_id)
        rung = trial.decisions[trial.last_epoch].rung
        self._record(self._decided(trial, epoch=trial.last_epoch, rung=rung, decision="continue"))
        return trial

    def _end_waiting(self) -> None:
        """End the trials that wait for a promotion which cannot come any more."""
        for trial in self.experiment.history.unfinished:
            if self.halving.is_waiting(trial.trial_id):
                self.halving.release(trial.trial_id)
                rung = trial.decisions[trial.last_epoch].rung
                decided = self._decided(trial, epoch=trial.last_epoch, rung=rung, decision="stop")
                self._record(decided, self._ended(trial.trial_id, "pruned", f"rung {rung}"))
                self._after_end(trial)
                self._notify()

    def _start_proposed(self) -> TrialHistory:
        proposal = self._proposer.ask()
        return self._start(proposal, control=self._is_control(self.num_started, proposal.origin))

    def _is_control(self, number: int, origin: str) -> bool:
        """Every so-many-th trial, beginning at a place that the seed decides; baselines are no sample of anything."""
        share = self._rules.control_fraction
        offset = float(np.random.default_rng([self._rules.seed, CONTROLS]).random())
        chosen = math.floor((number + 1) * share + offset) > math.floor(number * share + offset)
        return chosen and origin in {"startup", "model"} and bool(self.halving.rung_epochs)

    def _start_finalist(self, of: TrialHistory) -> TrialHistory:
        return self._start(self._proposer.repeat(of), finalist_of=of.trial_id)

    def _finalists_to_start(self) -> list[TrialHistory]:
        """The best configurations that lack trainings with other seeds, one entry for each that is to come."""
        if not self._rules.finalists or self._out_of_time:
            return []
        trials = self.experiment.history.trials.values()
        started = Counter(t.started.finalist_of for t in trials if t.started.finalist_of)
        completed = [t for t in self.experiment.history.ended if is_completed(t) and t.started.stage == self._stage]
        best = self.ranked(completed)[: self._rules.finalists]
        return [trial for trial in best for _ in range(self._rules.seeds - started[trial.trial_id])]

    def _start(self, proposal: Proposal, *, control: bool = False, finalist_of: str = "") -> TrialHistory:
        seed = self._rules.seed + proposal.number
        config = self.space.base.having({**proposal.params, "seed": seed})
        trial_id = f"t{proposal.number:05d}"
        self._record(
            TrialStarted(
                at=time.time(),
                trial_id=trial_id,
                stage="finalist" if finalist_of else self._stage,
                origin=proposal.origin,
                seed=seed,
                config=config.to_dict(),
                params=proposal.params,
                distributions={name: distribution_to_json(d) for name, d in proposal.distributions.items()},
                control=control,
                finalist_of=finalist_of,
                strength=strength(proposal.params, self.space.dimensions),
            )
        )
        return self.experiment.history.trials[trial_id]

    def report(self, trial_id: str, result: EpochResult, *, node: str) -> bool:
        """Record an epoch and what follows from it; whether the trial goes on at once.

        An epoch that is in the log already (a worker went on from its checkpoint) changes nothing.
        """
        trial = self.experiment.history.trials[trial_id]
        if trial.ended is not None:
            return False
        if result.epoch > trial.last_epoch:
            self._epochs_trained += 1
            reported = EpochReported(at=time.time(), trial_id=trial_id, node=node, result=result)
            self._record(reported, *self._conclusions(trial, result))
        waiting = self.halving.is_waiting(trial_id)
        if trial.ended is not None:
            self._after_end(trial)
        elif waiting:
            self.running.discard(trial_id)
        self._notify()
        return trial.ended is None and not waiting

    def _conclusions(self, trial: TrialHistory, result: EpochResult) -> list[Event]:
        """The decision after an epoch, and the end of the trial if it ends there."""
        rung: int | None = None
        decision: Decision = "continue"
        if not result.diverged and trial.started.stage != "finalist":
            judgement = self._judge(trial, result)
            rung, decision = judgement.rung, judgement.verdict
            if trial.started.control:
                decision = self._spare(trial.trial_id, decision)
        ending = self._own_ending(trial, result)
        if ending is None and self._out_of_time:
            ending = ("pruned", TIME_BUDGET)
        if ending is None and decision == "stop":
            ending = ("pruned", f"rung {rung}")
        if ending is None:
            return [self._decided(trial, epoch=result.epoch, rung=rung, decision=decision)]
        if self.halving.is_waiting(trial.trial_id):
            self.halving.release(trial.trial_id)
        decided = self._decided(trial, epoch=result.epoch, rung=rung, decision="stop")
        return [decided, self._ended(trial.trial_id, *ending)]

    def _judge(self, trial: TrialHistory, result: EpochResult) -> Judgement:
        known = trial.started.strength
        return self.halving.judge(
            Candidate(trial.trial_id, MEDIUM if known is None else known),
            epoch=result.epoch,
            score=self._score(result),
            counts=trial.trial_id not in self._spared,
        )

    def _spare(self, trial_id: str, verdict: Verdict) -> Decision:
        """What becomes of a control that a strategy has judged: it goes on in any case."""
        would_go_on = verdict == "continue" or self.halving.may_go_on(trial_id)
        if verdict == "pause":
            self.halving.release(trial_id)
        if not would_go_on:
            self._spared.add(trial_id)
        return "continue" if would_go_on else "spared"

    def _score(self, result: EpochResult) -> float:
        """What is compared at rungs: the metric, negated where lower is better."""
        name = self.space.metric if self.halving.judges_average else f"raw_{self.space.metric}"
        value = getattr(result, name)
        sign = 1.0 if self.space.mode == "max" else -1.0
        return float("nan") if value is None else sign * float(value)

    def _own_ending(self, trial: TrialHistory, result: EpochResult) -> Ending | None:
        """Status and stop reason of a trial that ends with this epoch whatever others do."""
        if result.diverged:
            return "failed", f"diverged at epoch {result.epoch}"
        final = trial.started.stage == "finalist"
        if result.epoch >= (self.space.budget.max_epochs if final else num_epochs(self.halving.course)):
            return "completed", ""
        return ("completed", "patience") if result.out_of_patience else None

    def _decided(self, trial: TrialHistory, *, epoch: int, rung: int | None, decision: Decision) -> Decided:
        return Decided(at=time.time(), trial_id=trial.trial_id, epoch=epoch, rung=rung, decision=decision)

    def _ended(self, trial_id: str, status: Status, reason: str, *, error: str = "") -> TrialEnded:
        files = self.experiment.files(trial_id)
        return TrialEnded(
            at=time.time(),
            trial_id=trial_id,
            status=status,
            stop_reason=reason,
            has_predictions=files.predictions.exists(),
            has_checkpoint=files.best.exists(),
            error=error,
        )

    def retried(self, trial_id: str, error: str) -> None:
        """A trial's worker died or raised, and the trial is going to be tried again."""
        self._record(TrialRetried(at=time.time(), trial_id=trial_id, error=error))
        self._notify()

    def failed(self, trial_id: str, error: str) -> None:
        """A trial has crashed more often than retries allow."""
        trial = self.experiment.history.trials[trial_id]
        if trial.ended is not None:
            return
        self._record(self._ended(trial_id, "failed", "error", error=error))
        self._after_end(trial)
        self._notify()

    def _record(self, *events: Event) -> None:
        if events:
            self.experiment.record(*events)

    def _value(self, result: EpochResult) -> float:
        value = getattr(result, self.space.metric)
        return float("nan") if value is None else float(value)

    def _after_end(self, trial: TrialHistory) -> None:
        self.running.discard(trial.trial_id)
        self._proposer.tell(trial, extrapolated=self._extrapolated(trial))
        self._remove_surplus_checkpoints()
        self.experiment.tidy(trial)

    def _extrapolated(self, trial: TrialHistory) -> float | None:
        """The metric that a stopped trial would have ended with, if the strategy can tell."""
        assert trial.ended is not None
        score = self.halving.forecast(trial.trial_id) if trial.ended.status == "pruned" else None
        return None if score is None else score if self.space.mode == "max" else -score

    def _remove_surplus_checkpoints(self) -> None:
        kept = [
            t for t in self.experiment.history.ended if t.ended and t.ended.has_checkpoint and not t.checkpoint_removed
        ]
        for trial in self.ranked(kept)[self._rules.keep_checkpoints :]:
            # The event comes first: a crash in between leaves a file too many, never a row that names a missing one.
            self._record(CheckpointRemoved(at=time.time(), trial_id=trial.trial_id))
            self.experiment.tidy(trial)

    def ranked(self, trials: list[TrialHistory]) -> list[TrialHistory]:
        """The best first: completed ones before all others, then by the metric at the best epoch."""
        sign = -1.0 if self.space.mode == "max" else 1.0

        def key(trial: TrialHistory) -> tuple[bool, float]:
            return (not is_completed(trial), sign * self._value(trial.best) if trial.best else float("inf"))

        return sorted(trials, key=key)


def is_completed(trial: TrialHistory) -> bool:
    """Whether a trial was trained to its end."""
    return trial.ended is not None and trial.ended.status == "completed"
