"""What happens in a search, turned into events: the one place where a driver decides and writes. Knows no Ray."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from optuna.distributions import distribution_to_json

from orchestrator.halving import Halving
from orchestrator.proposals import Proposer
from results.events import (
    CheckpointRemoved,
    Decided,
    EpochReported,
    Event,
    TrialEnded,
    TrialRetried,
    TrialStarted,
)
from results.history import TrialHistory
from results.schema import EpochResult, Scalar, Stage, Status
from results.store import Experiment
from search_spaces.space import SearchSpace

Ending = tuple[Status, str]


@dataclass(frozen=True)
class Assignment:
    """A trial for a worker to train, or to go on with from its checkpoint."""

    trial_id: str
    config: dict[str, Scalar]
    epochs_recorded: int


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
        seed: int,
        keep_checkpoints: int,
        notify: Callable[[], None] = lambda: None,
    ) -> None:
        """`notify` is called after anything has changed."""
        self.experiment = experiment
        self.space = space
        self._stage: Stage = stage
        self.halving = halving
        self._proposer = proposer
        self._seed = seed
        self._keep_checkpoints = keep_checkpoints
        self._notify = notify
        self._to_resume: deque[str] = deque()
        self.running: set[str] = set()
        self._replay()

    def _replay(self) -> None:
        """Restore the rungs, decide what was left undecided, clear away what ended trials left behind."""
        history = self.experiment.history
        for event in history.decisions:
            if event.decision == "continue" or event.rung is not None:  # the others ended without being judged
                result = history.trials[event.trial_id].epochs[event.epoch - 1].result
                self.halving.judge(event.trial_id, epoch=event.epoch, value=self._value(result))
        for trial in history.ended:
            self.experiment.tidy(trial)
        for trial in history.unfinished:
            self._record(*self._left_unsaid(trial))
            if trial.ended is None:
                self._to_resume.append(trial.trial_id)
            else:
                self._after_end(trial)

    def _left_unsaid(self, trial: TrialHistory) -> list[Event]:
        """What a crash kept from the log after a trial's last epoch: its decision, or the end that follows from it."""
        if not trial.epochs:
            return []
        result, decided = trial.epochs[-1].result, trial.decisions.get(trial.last_epoch)
        if decided is None:
            return self._conclusions(trial.trial_id, result)
        if decided.decision == "continue":
            return []
        status, reason = self._own_ending(result) or ("pruned", f"rung {decided.rung}")
        return [self._ended(trial.trial_id, status, reason)]

    @property
    def num_started(self) -> int:
        """Trials of the ledger's stage that have started, whatever became of them."""
        return sum(trial.started.stage == self._stage for trial in self.experiment.history.trials.values())

    @property
    def finished(self) -> bool:
        """Whether every trial asked for has ended."""
        return self.num_started >= self.space.budget.num_trials and not self.experiment.history.unfinished

    def next_trial(self) -> Assignment | None:
        """The next trial to run, unfinished ones of an earlier driver first; None when there are no more."""
        if self._to_resume:
            trial = self.experiment.history.trials[self._to_resume.popleft()]
        elif self.num_started < self.space.budget.num_trials:
            trial = self._start()
        else:
            return None
        self.running.add(trial.trial_id)
        self._notify()
        return Assignment(trial.trial_id, trial.started.config, trial.last_epoch)

    def _start(self) -> TrialHistory:
        proposal = self._proposer.ask()
        seed = self._seed + proposal.number
        config = self.space.base.having({**proposal.params, "seed": seed})
        trial_id = f"t{proposal.number:05d}"
        self._record(
            TrialStarted(
                at=time.time(),
                trial_id=trial_id,
                stage=self._stage,
                origin=proposal.origin,
                seed=seed,
                config=config.to_dict(),
                params=proposal.params,
                distributions={name: distribution_to_json(d) for name, d in proposal.distributions.items()},
            )
        )
        return self.experiment.history.trials[trial_id]

    def report(self, trial_id: str, result: EpochResult, *, node: str) -> bool:
        """Record an epoch and what follows from it; whether the trial goes on.

        An epoch that is in the log already (a worker went on from its checkpoint) changes nothing.
        """
        trial = self.experiment.history.trials[trial_id]
        if trial.ended is not None:
            return False
        if result.epoch > trial.last_epoch:
            reported = EpochReported(at=time.time(), trial_id=trial_id, node=node, result=result)
            self._record(reported, *self._conclusions(trial_id, result))
        if trial.ended is not None:
            self._after_end(trial)
        self._notify()
        return trial.ended is None

    def _conclusions(self, trial_id: str, result: EpochResult) -> list[Event]:
        """The decision after an epoch, and the end of the trial if it ends there."""
        rung: int | None = None
        ending = self._own_ending(result)
        if ending is None:
            judgement = self.halving.judge(trial_id, epoch=result.epoch, value=self._value(result))
            rung = judgement.rung
            ending = None if judgement.go_on else ("pruned", f"rung {rung}")
        decision = "stop" if ending else "continue"
        decided = Decided(at=time.time(), trial_id=trial_id, epoch=result.epoch, rung=rung, decision=decision)
        return [decided, self._ended(trial_id, *ending)] if ending else [decided]

    def _own_ending(self, result: EpochResult) -> Ending | None:
        """Status and stop reason of a trial that ends with this epoch whatever others do."""
        if result.diverged:
            return "failed", f"diverged at epoch {result.epoch}"
        if result.epoch >= self.space.budget.max_epochs:
            return "completed", ""
        return ("completed", "patience") if result.out_of_patience else None

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
        self._proposer.tell(trial)
        self._remove_surplus_checkpoints()
        self.experiment.tidy(trial)

    def _remove_surplus_checkpoints(self) -> None:
        kept = [
            t for t in self.experiment.history.ended if t.ended and t.ended.has_checkpoint and not t.checkpoint_removed
        ]
        for trial in self.ranked(kept)[self._keep_checkpoints :]:
            # The event comes first: a crash in between leaves a file too many, never a row that names a missing one.
            self._record(CheckpointRemoved(at=time.time(), trial_id=trial.trial_id))
            self.experiment.tidy(trial)

    def ranked(self, trials: list[TrialHistory]) -> list[TrialHistory]:
        """The best first: completed ones before all others, then by the metric at the best epoch."""
        sign = -1.0 if self.space.mode == "max" else 1.0

        def key(trial: TrialHistory) -> tuple[bool, float]:
            completed = trial.ended is not None and trial.ended.status == "completed"
            return (not completed, sign * self._value(trial.best) if trial.best else float("inf"))

        return sorted(trials, key=key)
