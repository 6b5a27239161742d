"""What a run achieved, per seed, and what can be said of it: intervals and comparisons.

Intervals of means are studentised bootstraps over seeds (bootstrap-t; Efron and Tibshirani 1993, chapter 12), never narrower than
Student's t. Costs are skewed. For lognormal costs, the percentile bootstrap and Student's t contain the mean in only 80% of the
cases; these do in 90% (`test_intervals_cover_the_mean`). Shares of seeds have Wilson's interval.
Probabilities of improvement have Newcombe's (2006, method 5), which is wider than a point also where every seed of one beats every
seed of the other. Intervals of means over tasks are put together from those of the tasks (MOVER; Zou and Donner 2008). Without a
difference, one comparison in twenty to twelve gets a verdict; of percentile bootstraps of five seeds it was one in nine
(`test_verdicts_without_a_difference_are_rare`). Interquartile means and performance profiles have the percentile bootstrap, stratified
by task, of Agarwal et al. (arXiv 2108.13264), as in other papers: no verdict rests on it.
"""

import functools
import math

import numpy as np
import scipy.optimize
import scipy.stats

from results.csvs import Run

BLOCK = 5  # training episodes, at least, over which a mean cost is compared with the limit
WINDOW = 20  # training episodes whose mean cost must keep the limit for `episodes_to_safe`
DRAWS = 4000
ERROR_FLOOR = 0.2  # of the bootstrap-t, see `_studentised`

MEANING = {
    "offline_return": "mean undiscounted return of the last evaluation of the offline phase",
    "offline_cost": "mean undiscounted cost of that evaluation",
    "return": "mean undiscounted return of the last evaluation of the run",
    "cost": "mean undiscounted cost of that evaluation",
    "share_above": "share of those episodes whose cost is above the limit",
    "worst_tenth": "mean cost of the most costly tenth of those episodes",
    "auc": "area under the curve of evaluation returns over environment steps, divided by their number: the mean return "
    "during online training; the curve starts with the last evaluation before it",
    "training_cost": "cost of all online training episodes, summed",
    "train_cost": "that sum per episode",
    "early_cost": "the same of the first fifth of the online training",
    "regret": f"violation regret: the cost above the limit of the online training episodes, summed: max(0, mean cost - limit) "
    f"times episodes, over consecutive blocks of at least {BLOCK} episodes",
    "episodes_to_safe": f"online training episodes before the first {WINDOW} whose mean cost is at most the limit; a median",
    "episodes_to_stay": f"online training episodes after which every {WINDOW} have a mean cost of at most the limit; a median",
    "training_episodes": "online training episodes",
}
# Columns of the rank diagnostic: which critic, on the states of whose rollouts.
RANKS = {"rank_q_policy": "Q, own", "rank_q_random": "Q, random", "rank_qc_policy": "Qc, own", "rank_qc_random": "Qc, random"}


@functools.lru_cache(1024)
def per_seed(run: Run) -> dict[str, np.ndarray]:
    """Each measure of MEANING as an array (seeds,); NaN where it does not apply and for diverged seeds."""
    diverged = run.diverged
    rows = [{} if seed in diverged else _measure(run, seed) for seed in run.seeds]
    return {key: np.array([row.get(key, math.nan) for row in rows]) for key in MEANING}


def _measure(run: Run, seed: int) -> dict:
    out = {}
    evals = run.of(seed, "eval")
    offline = [row for row in evals if row["phase"] == "offline"]
    online = sorted((row for row in evals if row["phase"] == "online"), key=lambda row: row["env_steps"])
    if offline:
        out |= {"offline_return": offline[-1]["return"], "offline_cost": offline[-1]["cost"]}
    if evals:
        out |= {key: evals[-1][key] for key in ("return", "cost", "share_above", "worst_tenth")}
    before = [row for row in evals if row["phase"] != "online"]
    curve = (before[-1:] if online and online[0]["env_steps"] > 0 else []) + online
    steps, returns = [row["env_steps"] for row in curve], [row["return"] for row in curve]
    if online and steps[-1] > steps[0]:
        out["auc"] = np.trapezoid(returns, steps) / (steps[-1] - steps[0])
    train = [row for row in run.of(seed, "train") if row["phase"] == "online" and row["episodes"] > 0 and not math.isnan(row["cost"])]
    if not train:
        return out
    episodes = np.array([row["episodes"] for row in train])
    costs = np.array([row["cost"] for row in train]) * episodes
    blocks = np.array(_blocks(episodes, costs))
    early = max(1, math.ceil(len(train) / 5))
    return out | {
        "training_episodes": episodes.sum(),
        "training_cost": costs.sum(),
        "train_cost": costs.sum() / episodes.sum(),
        "early_cost": costs[:early].sum() / episodes[:early].sum(),
        "regret": np.maximum(0, blocks[:, 1] - run.cost_limit * blocks[:, 0]).sum(),
        **_episodes_to_safe(blocks, run.cost_limit),
    }


def _blocks(episodes, costs) -> list[tuple[float, float]]:
    """(episodes, summed cost) of consecutive rows put together until they hold BLOCK episodes; the rest joins the last."""
    blocks = [(0.0, 0.0)]
    for n, cost in zip(episodes, costs):
        if blocks[-1][0] >= BLOCK:
            blocks.append((0.0, 0.0))
        blocks[-1] = (blocks[-1][0] + n, blocks[-1][1] + cost)
    if len(blocks) > 1 and blocks[-1][0] < BLOCK:
        rest = blocks.pop()
        blocks[-1] = (blocks[-1][0] + rest[0], blocks[-1][1] + rest[1])
    return blocks


def _episodes_to_safe(blocks, limit: float) -> dict:
    """`episodes_to_safe` and `episodes_to_stay`; absent if there were fewer than WINDOW episodes."""
    ended = np.cumsum(blocks[:, 0])  # episodes up to and with each block
    before, safe = [], []  # of every window of whole blocks: the episodes before it, and whether it keeps the limit
    for start, done in enumerate(np.append(0, ended[:-1])):
        last = np.searchsorted(ended, done + WINDOW)
        if last < len(blocks):
            episodes, cost = blocks[start : last + 1].sum(0)
            before.append(done)
            safe.append(cost <= limit * episodes)
    if not safe:
        return {}
    last_unsafe = max((i for i, kept in enumerate(safe) if not kept), default=-1)
    return {
        "episodes_to_safe": before[safe.index(True)] if any(safe) else math.inf,
        "episodes_to_stay": before[last_unsafe + 1] if last_unsafe + 1 < len(safe) else math.inf,
    }


def ranks(run: Run, column: str) -> np.ndarray:
    """(seeds, 2): the rank correlation before and after pre-alignment; NaN where it was not measured."""
    rows = {(row["seed"], row["phase"]): row[column] for row in run.rows if row["event"] == "rank"}
    return np.array([[rows.get((seed, phase), math.nan) for phase in ("offline", "vpa")] for seed in run.seeds])


# ---------------------------------------------------------------- intervals


def _resampled(rng, values: np.ndarray, draws: int = DRAWS) -> np.ndarray:
    return values[rng.integers(values.size, size=(draws, values.size))]


def median(values) -> float:
    """Median over seeds, of which some may be infinite; NaN if none is a number."""
    values = np.asarray(values, float)
    return float(np.median(values[~np.isnan(values)])) if not np.isnan(values).all() else math.nan


def finite(values) -> np.ndarray:
    values = np.asarray(values, float)
    return values[np.isfinite(values)]


def _studentised(estimate: float, error: float, drawn, errors, n: int, confidence: float) -> tuple[float, float]:
    """Bootstrap-t interval of an estimate with a standard error, from resampled estimates and their standard errors.

    The tails are smaller by (n-1)/n. Resamples of one value only have no standard error and are left out; because they can be all
    of one kind (zeros among rare costs), the interval is never narrower, at either end, than Student's. A resample of few seeds can
    hold nearly equal values: its standard error counts as at least ERROR_FLOOR of the sample's. Without, seeds of two kinds, some
    that learned and some that did not, have intervals a hundred times as wide as their spread, and no better coverage.
    """
    if error == 0:
        return float(estimate), float(estimate)
    varied = errors > 1e-9 * error
    t = (drawn[varied] - estimate) / np.maximum(errors[varied], ERROR_FLOOR * error)
    tail = (1 - confidence) / 2 * (n - 1) / n
    low, high = np.quantile(t, [tail, 1 - tail])
    student = scipy.stats.t.ppf((1 + confidence) / 2, n - 1)
    return float(estimate - max(high, student) * error), float(estimate - min(low, -student) * error)


def _standard_error(values, axis: int = -1):
    return np.std(values, axis, ddof=1) / math.sqrt(values.shape[axis])


def interval(values, confidence: float = 0.95) -> tuple[float, float]:
    """Bootstrap-t interval of the mean over seeds; (nan, nan) for fewer than two finite values."""
    values = finite(values)
    if values.size < 2:
        return math.nan, math.nan
    drawn = _resampled(np.random.default_rng(0), values)
    error = _standard_error(values) if np.ptp(values) else 0.0
    return _studentised(values.mean(), error, drawn.mean(1), _standard_error(drawn), values.size, confidence)


def difference(a, b, confidence: float = 0.95) -> tuple[float, float]:
    """Bootstrap-t interval of mean(b) - mean(a), seeds drawn independently; (nan, nan) if either has fewer than two."""
    a, b = finite(a), finite(b)
    if min(a.size, b.size) < 2:
        return math.nan, math.nan
    rng = np.random.default_rng(0)
    x, y = _resampled(rng, a), _resampled(rng, b)
    error = math.hypot(*(_standard_error(v) if np.ptp(v) else 0.0 for v in (a, b)))
    errors = np.hypot(_standard_error(x), _standard_error(y))
    return _studentised(b.mean() - a.mean(), error, y.mean(1) - x.mean(1), errors, min(a.size, b.size), confidence)


def share(successes: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's interval of a share; (nan, nan) for n = 0."""
    if not n:
        return math.nan, math.nan
    found = scipy.stats.binomtest(int(successes), int(n)).proportion_ci(confidence, "wilson")
    return float(found.low), float(found.high)


# ---------------------------------------------------------------- over tasks


def iqm(tasks: list[np.ndarray], confidence: float = 0.95) -> tuple[float, float, float]:
    """Interquartile mean of the seeds of all tasks, which count the same, and its interval by a bootstrap stratified by task."""
    rng, weights = np.random.default_rng(0), np.concatenate([np.full(len(task), 1 / len(task)) for task in tasks]) / len(tasks)

    def mean(found: list[np.ndarray]) -> np.ndarray:
        scores = np.concatenate(found, -1)
        order = np.argsort(scores, -1)
        sorted_weights = weights[order]
        upper = np.cumsum(sorted_weights, -1)
        inside = np.clip(np.minimum(upper, 0.75) - np.maximum(upper - sorted_weights, 0.25), 0, None)  # of each score's weight
        return (np.take_along_axis(scores, order, -1) * inside).sum(-1) / inside.sum(-1)

    drawn = mean([_resampled(rng, task) for task in tasks])
    return float(mean(tasks)), *np.quantile(drawn, [(1 - confidence) / 2, (1 + confidence) / 2])


def over_tasks(found: list[tuple[float, float, float]]) -> tuple[float, float, float]:
    """Mean over tasks of (estimate, low, high), and its interval (MOVER: each side adds up the squared distances of the tasks)."""
    estimates, low, high = np.transpose(found)
    mean, reach = estimates.mean(), lambda side: np.linalg.norm(side - estimates) / len(found)
    return float(mean), float(mean - reach(low)), float(mean + reach(high))


def stratified_mean(tasks: list[np.ndarray]) -> tuple[float, float, float]:
    """Mean over tasks of the means over seeds, and its 95% interval; that is NaN if a task has fewer than two finite values."""
    return over_tasks([(finite(task).mean(), *interval(task)) for task in tasks])


def profile(tasks: list[np.ndarray], taus, confidence: float = 0.95) -> np.ndarray:
    """(3, T): the share of runs whose score is above each of `taus` (T,), and its pointwise interval (Agarwal et al., section 4.3).

    `tasks` holds the scores (seeds,) of each task, which count the same; the bootstrap is stratified by task. A score of -inf is
    above no tau.
    """
    rng = np.random.default_rng(0)
    above = [task[:, None] > np.asarray(taus) for task in tasks]
    draw = lambda x: rng.multinomial(len(x), np.full(len(x), 1 / len(x)), DRAWS) @ x / len(x)  # how often each seed is drawn
    low, high = np.quantile(np.mean([draw(x) for x in above], 0), [(1 - confidence) / 2, (1 + confidence) / 2], axis=0)
    return np.stack([np.mean([x.mean(0) for x in above], 0), low, high])


def superiority(x: np.ndarray, y: np.ndarray, confidence: float = 0.95) -> tuple[float, float, float]:
    """Probability that a seed of x beats one of y (ties count half), and its interval (Newcombe 2006, part 2, method 5).

    The limits are where the estimate is z standard errors away, by Hanley and McNeil's formula for the standard error there.
    """
    p = float(((x[:, None] > y) + 0.5 * (x[:, None] == y)).mean())
    more, z = (x.size + y.size) / 2 - 1, scipy.stats.norm.ppf((1 + confidence) / 2)
    variance = lambda q: q * (1 - q) * (1 + more * (1 - q) / (2 - q) + more * q / (1 + q)) / (x.size * y.size)
    outside = lambda q: (p - q) ** 2 - z**2 * variance(q)  # below zero within the interval
    near = lambda q: min(max(q, 1e-9), 1 - 1e-9)  # at 0 and 1 the variance is zero
    limit = lambda end: end if p == end else scipy.optimize.brentq(outside, *sorted((near(p), near(end))))
    return p, float(limit(0.0)), float(limit(1.0))


def improvement(tasks: list[tuple[np.ndarray, np.ndarray]], other_tasks: bool = False) -> tuple[float, float, float]:
    """Mean over tasks [(x, y), ...] of `superiority`, and its 95% interval.

    With `other_tasks` the interval is that of the mean over a population of tasks, of which these are a sample: the spread between
    the tasks counts, which that of the seeds is a part of. It is NaN for one task.
    """
    found = [superiority(x, y) for x, y in tasks]
    mean, low, high = over_tasks(found)
    if other_tasks:
        if len(tasks) < 2:
            return mean, math.nan, math.nan
        # Student's t: probabilities are bounded and not skewed as costs are, and the bootstrap-t is much wider for so few.
        reach = scipy.stats.t.ppf(0.975, len(tasks) - 1) * _standard_error(np.array([p for p, _, _ in found]))
        low, high = max(0.0, min(low, mean - reach)), min(1.0, max(high, mean + reach))
    return mean, low, high


def constrained_order(returns, costs, limit: float) -> list[tuple]:
    """Sort keys: safe above unsafe; among safe ones by return, among unsafe ones by (lower) cost."""
    return [(1, r) if c <= limit else (0, -c) for r, c in zip(returns, costs)]


def as_numbers(*groups: list[tuple]) -> list[np.ndarray]:
    """Sort keys of several groups as numbers in the same order, equal where the keys are."""
    place = {key: i for i, key in enumerate(sorted({key for group in groups for key in group}))}
    return [np.array([place[key] for key in group], float) for group in groups]
