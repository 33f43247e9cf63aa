"""The reward that the labels fit: Eq. 7 with other weights, and when it may be trusted.

Eq. 7 is one point of a family: `r(x, y) = w . f(y)` with the features `f = [log pi_{t-1},
log pi_{t-2}, (log pi_{t-3}), |y|]`, of which the paper's has `w = (1, -1, 0)` at t = 2. Everything
in it is known of each pair that was held out, and so is which of its answers is the chosen one.
Under Bradley-Terry, which DPO assumes of the labels too,

    P(chosen before rejected) = sigmoid(w . d),   d = f(chosen) - f(rejected),

so w is that of a logistic regression without intercept, and a margin under it is the log-odds, in
nats, that the label is right. Few labels must not turn Eq. 7 round, so w is the mode of

    sum over pairs of log sigmoid(w . d) - |u - m|^2 / 2,   u_j = s_j w_j,

where s_j is the root mean square of d_j: in u a weight says by how much a typical difference in
its feature moves the log-odds, whatever its unit. The prior's mean m is the paper's direction p,
u = c s p, at the scale c that fits best, found in the same way along that one line from a prior of
one nat for a typical margin, and not below 0. Without labels w is the paper's; with many it is the
maximum of the likelihood. Both problems are strictly concave, so Newton's method finds the mode.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from sera_plugin.algorithm.rewards import FloatArray, implicit_reward

#: Of a fit's accuracy: each fold of pairs is ranked by the weights that the others give.
_FOLDS = 10
#: Newton's method: most steps, and what a step would gain where it is close and where it ends.
_STEPS, _NEAR, _CLOSE = 100, 1e-6, 1e-20
#: Candidates are ranked within these quantiles of the offline answers' length, and of their
#: likelihood per token: beyond, a fit extrapolates.
LONGEST, UNLIKELIEST = 0.95, 0.05
#: A reward ranks better than a coin if a coin's margins would be as high less often than this.
CHANCE = 0.05
#: Where a policy no longer ranks its own samples, they outrank the data's good answers by more than
#: this many standard deviations. In two worlds whose truth is known it was 1.2 to 2.0 in iterations
#: that sampled pairs harmed, and 0.9 or less in all others but one.
OUTRANKING = 1.0


@dataclass(frozen=True)
class Reward:
    """Iteration t's implicit reward, and how it ranks held-out pairs as they are labelled."""

    weights: Sequence[float]  # of log pi_{t-1}, log pi_{t-2}, ..., per token where the loss is
    length: float = 0.0  # nats per token of the answer
    errors: Sequence[float] = ()  # standard errors of the weights and of `length`, if fitted
    pairs: int = 0  # how many were held out
    accuracy: float | None = None  # of these weights, each pair ranked by a fit to others
    paper_accuracy: float | None = None  # of Eq. 7
    by_chance: float | None = None  # how often a coin is as good, see `by_chance`
    labelers: Sequence[str] = ()  # whose scores are features too
    scores: Sequence[float] = ()  # the weight of each one's

    def __call__(
        self, logps: Sequence[npt.ArrayLike], lengths: npt.ArrayLike, per_token: bool
    ) -> FloatArray:
        """(n,) nats of completions of (n,) tokens, from (n,) log-probabilities per policy.

        Without what labelers' scores add.
        """
        tokens = np.asarray(lengths, dtype=np.float64)
        found = implicit_reward(np.stack(logps), tuple(self.weights), tokens if per_token else None)
        return found + self.length * tokens if self.length else found

    @property
    def beats_coin(self) -> bool:
        """Whether it ranks held-out pairs better than a coin; True where nothing is held out."""
        return self.by_chance is None or self.by_chance < CHANCE

    def record(self, policies: Sequence[int]) -> dict[str, Any]:
        """As summary.json has it, with a name for each weight."""
        names = [*(f"theta_{one}" for one in policies), "length", *self.labelers]
        weights = zip(names, (*self.weights, self.length, *self.scores), strict=True)
        found: dict[str, Any] = {"weights": dict(weights), "pairs": self.pairs}
        if self.errors:
            found["errors"] = dict(zip(names, self.errors, strict=True))
        if self.accuracy is not None:
            found |= {"accuracy": self.accuracy, "paper_accuracy": self.paper_accuracy}
            found["by_chance"] = self.by_chance
        return found


def judged(
    paper: tuple[float, ...],
    differences: FloatArray,
    fitted: bool,
    labelers: Sequence[str] = (),
) -> Reward:
    """Eq. 7's reward, or with `fitted` that of the labels, and how it ranks the held-out pairs.

    `paper` are Eq. 7's weights. `differences` are (n, policies + 1 + labelers): features of chosen
    less those of rejected, log-probabilities newest policy first (nats), lengths (tokens), then the
    scores of `labelers`, whose weights have 0 for a prior mean.
    """
    direction, pairs = np.array([*paper, 0.0, *(0.0 for _ in labelers)]), len(differences)
    margin = differences @ direction
    by_paper = _accuracy(margin)
    if not fitted:
        return Reward(paper, 0.0, (), pairs, by_paper, by_paper, by_chance(margin))
    weights, errors = (one.tolist() for one in fit_weights(differences, direction))
    margin, fold = np.empty(pairs), np.arange(pairs) % _FOLDS
    for one in range(min(_FOLDS, pairs)):
        others, _ = fit_weights(differences[fold != one], direction)
        margin[fold == one] = differences[fold == one] @ others
    found = errors, pairs, _accuracy(margin), by_paper, by_chance(margin)
    at = len(paper)
    return Reward(weights[:at], weights[at], *found, tuple(labelers), weights[at + 1 :])


def fit_weights(differences: FloatArray, paper: FloatArray) -> tuple[FloatArray, FloatArray]:
    """(k,) weights of (n, k) differences in features, and their standard errors.

    `paper` is the (k,) direction that few labels leave them in. A feature in which no pair differs
    has the paper's weight and no error.
    """
    scale = np.sqrt(np.mean(differences**2, axis=0)) if len(differences) else np.zeros(len(paper))
    typical = float(np.sqrt(np.mean((differences @ paper) ** 2))) if len(differences) else 0.0
    if not typical:  # pairs say nothing of the paper's scale
        mean = scale * paper
    else:
        along, _ = _mode(differences @ paper[:, None] / typical, np.ones(1))
        mean = scale * paper * max(float(along[0]), 0.0) / typical
    known = scale > 0
    weights, errors = paper.astype(np.float64), np.zeros(len(paper))
    found, covariance = _mode(differences[:, known] / scale[known], mean[known])
    weights[known] = found / scale[known]
    errors[known] = np.sqrt(np.diag(covariance)) / scale[known]
    return weights, errors


def _mode(features: FloatArray, mean: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Mode of a logistic regression's (k,) weights under a N(mean, 1) prior, and Laplace's (k, k)
    covariance there."""

    def loss(weights: FloatArray) -> float:
        fit = float(np.logaddexp(0.0, -(features @ weights)).sum())
        return fit + float(((weights - mean) ** 2).sum()) / 2

    weights = mean
    for _ in range(_STEPS):
        wrong = 0.5 * (1 - np.tanh(features @ weights / 2))  # sigmoid that does not overflow
        gradient = weights - mean - features.T @ wrong
        hessian = np.eye(len(mean)) + (features.T * (wrong * (1 - wrong))) @ features
        step = np.linalg.solve(hessian, gradient)
        gain = float(gradient @ step)
        if gain < _CLOSE:
            break
        # Halved until the loss falls as it should; close to the mode a whole step is right, and
        # the loss too coarse to tell.
        size = 1.0
        while gain > _NEAR and loss(weights - size * step) > loss(weights) - size * gain / 4:
            size /= 2
        weights = weights - size * step
    return weights, np.linalg.inv(hessian).astype(np.float64)


def _accuracy(margin: FloatArray) -> float:
    """The share of pairs ranked as labelled; a tie is half right."""
    return float(((margin > 0) + (margin == 0) / 2).mean()) if len(margin) else math.nan


def within_support(
    lengths: FloatArray, logps: FloatArray, offline_lengths: FloatArray, offline_logps: FloatArray
) -> npt.NDArray[np.bool_]:
    """(n,) whether completions of (n,) tokens and nats are as the (m,) offline answers mostly are.

    No longer than `LONGEST` of them, and no less likely per token than `UNLIKELIEST`.
    """
    longest = np.quantile(offline_lengths, LONGEST)
    least = np.quantile(offline_logps / offline_lengths, UNLIKELIEST)
    found: npt.NDArray[np.bool_] = (lengths <= longest) & (logps / lengths >= least)
    return found


def by_chance(margin: FloatArray) -> float:
    """How often (n,) margins of random sign would be as high on average, as a normal says.

    Margins and not signs alone: labels are wrong most where margins are small, so these tell a
    good reward from a coin with fewer pairs.
    """
    error = math.sqrt(float(np.mean(margin**2)) / len(margin)) if len(margin) else 0.0
    return 0.5 * math.erfc(float(margin.mean()) / error / math.sqrt(2)) if error else 0.5
