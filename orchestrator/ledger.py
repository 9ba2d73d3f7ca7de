"""What happens in a search, turned into events: the one place where a driver decides and writes. Knows no Ray."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from optuna.distributions import distribution_to_json

from orchestrator.audit import is_control
from orchestrator.finalists import lacking
from orchestrator.halving import Candidate, Halving, Judgement, Verdict
from orchestrator.plan import Rules
from orchestrator.proposals import Proposal, Proposer
from orchestrator.retention import Rank, Retention
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
MEDIUM = 0.5


@dataclass(frozen=True)
class Assignment:
    """A trial for a worker to train on its course, or to go on with from its checkpoint."""

    trial_id: str
    config: dict[str, Scalar]
    epochs_recorded: int
    course: tuple[Leg, ...]
    rung_epochs: list[int]


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
        strength_of: Callable[[Mapping[str, Scalar]], float | None],
        notify: Callable[[], None] = lambda: None,
    ) -> None:
        """`strength_of`: of a configuration's regularization. `notify` is called after anything has changed."""
        self.experiment = experiment
        self.space = space
        self._stage: Stage = stage
        self.halving = halving
        self._proposer = proposer
        self.rules = rules
        self._strength_of = strength_of
        self._notify = notify
        self._to_resume: deque[str] = deque()
        self._spared: set[str] = set()
        self._began = math.inf  # nothing is late before the log has been replayed
        self.running: set[str] = set()
        self._retention = Retention(keep=rules.keep_checkpoints)
        self._replay()
        self._began = time.monotonic()

    def _replay(self) -> None:
        """Restore the rungs, decide what was left undecided, clear away what ended trials left behind."""
        history = self.experiment.history
        for event in history.decisions:
            trial = history.trials[event.trial_id]
            self._replay_decision(trial, event)
        self._proposer.recall(history.trials.values(), extrapolate=self._extrapolated)
        for trial in history.ended:
            self.experiment.tidy(trial)
            self._retention.note(trial, rank=self.rank(trial))
        for trial in history.unfinished:
            self._record(*self._left_unsaid(trial))
            if trial.ended is not None:
                self._after_end(trial)
            elif not self.halving.is_waiting(trial.trial_id):
                self._to_resume.append(trial.trial_id)
        self._remove(self._retention.surplus())

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
        return self.experiment.history.num_started[self._stage]

    @property
    def finished(self) -> bool:
        """Whether every trial asked for has ended, or the epochs are spent and what had begun has ended."""
        return self._searched and not self._finalists_to_start() and not self.experiment.history.unfinished

    @property
    def _searched(self) -> bool:
        """Whether no more trials of the search are to begin."""
        most = self.space.budget.max_total_epochs
        spent = most is not None and self.experiment.history.num_epochs >= most
        return spent or self.num_started >= self.space.budget.num_trials

    @property
    def out_of_time(self) -> bool:
        """Whether this driver's time is up. A later one goes on with what is left."""
        return self.rules.max_seconds is not None and time.monotonic() - self._began >= self.rules.max_seconds

    def next_trial(self) -> Assignment | None:
        """The next trial to run, unfinished ones of an earlier driver first; None when there are none (for now)."""
        if self.out_of_time:
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
        number, proposal = self.num_started, self._proposer.ask()
        # Baselines are no sample of what a search proposes.
        chosen = is_control(number, share=self.rules.control_fraction, seed=self.rules.seed)
        may_be = proposal.origin in {"startup", "model"} and bool(self.halving.rung_epochs)
        return self._start(proposal, control=chosen and may_be)

    def _start_finalist(self, of: TrialHistory) -> TrialHistory:
        return self._start(self._proposer.repeat(of), finalist_of=of.trial_id)

    def _finalists_to_start(self) -> list[TrialHistory]:
        """The best configurations that lack trainings with other seeds, one entry for each that is to come."""
        if not self.rules.finalists:
            return []
        history = self.experiment.history
        completed = [trial for trial in history.endings if trial.completed and trial.started.stage == self._stage]
        return lacking(
            self.ranked(completed),
            history.trials.values(),
            finalists=self.rules.finalists,
            seeds=self.rules.seeds,
        )

    def _start(self, proposal: Proposal, *, control: bool = False, finalist_of: str = "") -> TrialHistory:
        seed = self.rules.seed + proposal.number
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
                strength=self._strength_of(config.to_dict()),
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
        if ending is None and self.out_of_time:
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
            last=self._own_ending(trial, result) is not None,
            counts=trial.trial_id not in self._spared,
        )

    def _spare(self, trial_id: str, verdict: Verdict) -> Decision:
        """What becomes of a control that a strategy has judged: it goes on in any case.

        What would have waited is not called spared: whether it would have been promoted is not known yet.
        """
        if verdict == "pause":
            self.halving.release(trial_id)
        if verdict == "stop":
            self._spared.add(trial_id)
        return "spared" if verdict == "stop" else "continue"

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
            has_predictions=files.exists(files.predictions),
            has_checkpoint=files.exists(files.best),
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
        """Record events and, where trials end with them, the removal of weights that are surplus then.

        The event comes first: a crash in between leaves a file too many, never a row that names a missing one.
        """
        if events:
            self._remove(self._surplus_after(events), after=events)

    def _remove(self, surplus: Sequence[str], *, after: Sequence[Event] = ()) -> None:
        """Record events, and that the weights of these trials are not kept; then remove them."""
        events = [*after, *(CheckpointRemoved(at=time.time(), trial_id=trial_id) for trial_id in surplus)]
        if events:
            self.experiment.record(*events)
        for trial_id in surplus:
            self.experiment.tidy(self.experiment.history.trials[trial_id])

    def _surplus_after(self, events: Sequence[Event]) -> list[str]:
        """The trials whose weights need not be kept any longer once these events have happened."""
        ends = [event for event in events if isinstance(event, TrialEnded)]
        for end in ends:
            trial = self.experiment.history.trials[end.trial_id]
            reported = [e for e in events if isinstance(e, EpochReported) and e.trial_id == end.trial_id]
            ended = replace(trial, epochs=[*trial.epochs, *reported], ended=end)
            self._retention.note(ended, rank=self.rank(ended))
        return self._retention.surplus() if ends else []

    def _value(self, result: EpochResult) -> float:
        value = getattr(result, self.space.metric)
        return float("nan") if value is None else float(value)

    def _after_end(self, trial: TrialHistory) -> None:
        self.running.discard(trial.trial_id)
        self._proposer.tell(trial, extrapolated=self._extrapolated(trial))
        self.experiment.tidy(trial)

    def _extrapolated(self, trial: TrialHistory) -> float | None:
        """The metric that a stopped trial would have ended with, if the strategy can tell."""
        pruned = trial.ended is not None and trial.ended.status == "pruned"
        score = self.halving.forecast(trial.trial_id) if pruned else None
        return None if score is None else score if self.space.mode == "max" else -score

    def ranked(self, trials: list[TrialHistory]) -> list[TrialHistory]:
        """The best first."""
        return sorted(trials, key=self.rank)

    def rank(self, trial: TrialHistory) -> Rank:
        """Lower is better: completed trials before all others, then by the metric at the best epoch, then by number."""
        sign = -1.0 if self.space.mode == "max" else 1.0
        return not trial.completed, sign * self._value(trial.best) if trial.best else float("inf"), trial.number
