"""draft"""
from __future__ import annotations

import math
import numpy as np
from scipy.stats import t as student

from orchestrator.halving import HALVINGS, Candidate, Halving, Judgement, Ladder, Verdict, BANDS


class Rung:
    def __init__(self) -> None:
        self.index: dict[str, int] = {}
        self.scores: list[float] = []
        self.strengths: list[float] = []
        self.finals: list[float] = []
        self.counted: list[bool] = []

    def add(self, cand: Candidate, score: float, counts: bool) -> None:
        self.index[cand.trial_id] = len(self.scores)
        self.scores.append(score); self.strengths.append(cand.strength); self.finals.append(math.nan); self.counted.append(counts)


class Forecasting(Halving):
    needs_average = True
    def __init__(self, ladder: Ladder, *, optimism=1.0, least=5, rule="top", quad=True, fallback="stratified", smooth="max", slope_sd=0.5, s_sd=1.0, delta=0.1, quantile=None) -> None:
        super().__init__(ladder)
        self.__dict__.update(optimism=optimism, least=least, rule=rule, quad=quad, fallback=fallback, smooth=smooth, slope_sd=slope_sd, s_sd=s_sd, delta=delta,quantile=quantile)
        self.rung_epochs = ladder.rungs
        self.rungs = [Rung() for _ in self.rung_epochs]
        self.recent: dict[str, list[float]] = {}

    def judge(self, candidate: Candidate, *, epoch: int, score: float, counts: bool = True) -> Judgement:
        h = self.recent.setdefault(candidate.trial_id, []); h.append(score)
        if epoch == self.ladder.max_epochs:
            for r in self.rungs:
                i = r.index.get(candidate.trial_id)
                if i is not None: r.finals[i] = max(h)
            return Judgement("continue")
        if epoch not in self.rung_epochs:
            return Judgement("continue")
        k = self.rung_epochs.index(epoch)
        v = {"max": max(h), "last": score, "mean3": float(np.mean(h[-3:]))}[self.smooth]
        r = self.rungs[k]
        verdict = self._compare(k, candidate, v)
        r.add(candidate, v, counts)
        return Judgement(verdict, k + 1)

    def features(self, v, s):
        c = [np.ones_like(v), v - self.v0, (s - .5) * 2]
        if self.quad: c.append(((s - .5) * 2) ** 2)
        return np.stack(c, 1)

    def fit(self, k):
        r = self.rungs[k]
        v, s, y = np.array(r.scores), np.array(r.strengths), np.array(r.finals)
        done = ~np.isnan(y)
        n = done.sum()
        if n < max(self.least, 1): return None
        self.v0 = v[done].mean()
        spread = max(float(np.std(v)), 1e-9)
        g = y[done] - v[done]
        X = self.features(v[done], s[done])
        noise0 = 0.3 * spread  # prior noise sd
        prior_sd = np.array([10 * (abs(g.mean())+spread), self.slope_sd, self.s_sd * spread, self.s_sd * spread][: X.shape[1]])
        # conjugate: noise var unknown, prior in units of noise0
        P = np.diag((noise0 / prior_sd) ** 2)
        A = X.T @ X + P
        m = np.linalg.solve(A, X.T @ g)
        nu0 = 4.0
        rss = float(((g - X @ m) ** 2).sum() + m @ P @ m)
        nu = nu0 + n
        s2 = (nu0 * noise0**2 + rss) / nu
        return m, np.linalg.inv(A), s2, nu, done

    def predict(self, f, v, s):
        m, C, s2, nu, _ = f
        X = self.features(v, s)
        return v + X @ m, np.sqrt(s2 * np.einsum("ij,jk,ik->i", X, C, X)), math.sqrt(s2)

    def _compare(self, k, cand, score) -> Verdict:
        r = self.rungs[k]
        f = self.fit(k)
        if f is None:
            return self._early(k, cand, score)
        mean, sd, noise = self.predict(f, np.array([score]), np.array([cand.strength]))
        v, s, y = np.array(r.scores), np.array(r.strengths), np.array(r.finals)
        done = f[-1]
        if self.rule == "top":
            others, _, _ = self.predict(f, v, s)
            others = np.where(done, .0 * y + 1. * others, others)
            others = others[np.array(r.counted)]
            q = self.quantile or (1 - 1 / self.ladder.factor)
            return "continue" if mean[0] + self.optimism * sd[0] >= np.quantile(others, q) else "stop"
        best = np.nanmax(y)
        if self.rule == "third": best = np.sort(y[done])[-min(3, done.sum())]
        if self.rule == "mean_best":
            fit, _, _ = self.predict(f, v[done], s[done])
            best = fit.max()
        p = student.sf((best - mean[0]) / math.hypot(sd[0], noise), f[3])
        return "continue" if p >= self.delta else "stop"

    def _early(self, k, cand, score):
        if self.fallback == "none": return "continue"
        r = self.rungs[k]
        s, v = np.array(r.strengths), np.array(r.scores)
        if self.fallback == "asha": same = np.ones(len(s), bool)
        else:
            if len(s) < BANDS: return "continue"
            lim = np.quantile(s, np.arange(1, BANDS) / BANDS)
            same = np.searchsorted(lim, s) == np.searchsorted(lim, cand.strength)
        if not same.any(): return "continue"
        return "continue" if score >= np.quantile(v[same], 1 - 1 / self.ladder.factor) else "stop"

    def forecast(self, trial_id: str) -> float | None:
        for k in reversed(range(len(self.rungs))):
            i = self.rungs[k].index.get(trial_id)
            if i is None: continue
            f = self.fit(k)
            if f is None: continue
            r = self.rungs[k]
            mean, _, _ = self.predict(f, np.array([r.scores[i]]), np.array([r.strengths[i]]))
            return float(mean[0])
        return None


HALVINGS["forecast"] = Forecasting
