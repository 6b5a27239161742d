"""Which runs can be compared, and the outcome: runs of several arms on several tasks."""

import math
from dataclasses import replace

import numpy as np

from results import measures
from results.arms import ALGOS, COMPARED, OFFLINE
from results.csvs import Run

Task = dict[str, Run]  # name -> run, all of one environment and cost limit


def best_safe_return(task: Task) -> float:
    """The highest return of a safe trajectory in the task's dataset; NaN if no run says."""
    found = [(run.about.get("dataset") or {}).get("safe_return_best") for run in task.values()]
    return next((x for x in found if x), math.nan)


def alive(run: Run) -> dict[str, np.ndarray]:
    """The measures of the seeds that did not diverge."""
    kept = np.array([seed not in run.diverged for seed in run.seeds])
    return {key: values[kept] for key, values in measures.per_seed(run).items()}


def within(run: Run) -> tuple[int, int]:
    """Seeds whose final cost is within the limit, and all seeds; a diverged seed is not within it."""
    return int((measures.per_seed(run)["cost"] <= run.cost_limit).sum()), len(run.seeds)


def budget(run: Run) -> int:
    return max(row["env_steps"] for row in run.rows)


def compared(tasks: dict[str, Task], a: str, b: str) -> dict:
    """Probabilities of improvement of a over b on the tasks that have both; {} if there are none.

    Of each task the seeds that both have; all seeds if they have none in common. A diverged seed counts as worse than any other.
    """
    both, paired = {}, True
    for env, task in tasks.items():
        if a in task and b in task:
            alike = on_common_seeds(task, [a, b]) or task
            both[env] = (alike[a], alike[b])
            paired &= same_start(alike[a], alike[b])
    if not both:
        return {}
    final, returns, regrets, equal = [], [], [], True
    for x, y in both.values():
        mx, my = measures.per_seed(x), measures.per_seed(y)
        keys = []
        for m, run in ((mx, x), (my, y)):
            order = measures.constrained_order(m["return"], m["cost"], run.cost_limit)
            keys.append([(-1, 0.0) if math.isnan(value) else key for value, key in zip(m["return"], order)])
        mine, theirs = measures.as_numbers(*keys)
        final.append((mine, theirs))
        returns.append((np.nan_to_num(mx["return"], nan=-np.inf), np.nan_to_num(my["return"], nan=-np.inf)))
        if measures.finite(mx["regret"]).size and measures.finite(my["regret"]).size:
            regrets.append((-np.nan_to_num(mx["regret"], nan=np.inf), -np.nan_to_num(my["regret"], nan=np.inf)))
        equal &= b in OFFLINE or budget(x) == budget(y)
    return {
        "tasks": len(both),
        "seeds": sum(min(len(x.seeds), len(y.seeds)) for x, y in both.values()),
        "final": measures.improvement(final),
        "over_tasks": measures.improvement(final, other_tasks=True),
        "return": measures.improvement(returns),
        "regret": measures.improvement(regrets) if regrets else None,
        "equal": equal,
        "paired": paired,
    }


def same_start(x: Run, y: Run) -> bool:
    """Whether no seed tells that the two, which take up offline checkpoints of the same kind, took up different ones."""
    kinds = {ALGOS[run.name].offline if run.name in ALGOS else None for run in (x, y)}
    found = [dict(zip(run.seeds, measures.per_seed(run)["offline_return"])) for run in (x, y)]
    told = [(a, found[1][seed]) for seed, a in found[0].items() if seed in found[1]]
    return None in kinds or len(kinds) > 1 or all(a == b for a, b in told if not math.isnan(a + b))  # a diverged seed does not tell


def rank_changes(tasks: dict[str, Task], column: str, name: str = "marvel") -> list[np.ndarray]:
    """Per task: the change of a rank correlation by pre-alignment, of each seed that has it."""
    found = [measures.ranks(task[name], column) for task in tasks.values() if name in task]
    changes = [measures.finite(pairs[:, 1] - pairs[:, 0]) for pairs in found]
    return [change for change in changes if change.size]


def on_common_seeds(task: Task, names: list[str]) -> Task:
    """These runs, of each the seeds that all of them have; {} if there are none."""
    seeds = set.intersection(*(set(task[name].seeds) for name in names))
    rows = lambda run: [row for row in run.rows if row["seed"] in seeds]
    return {name: replace(task[name], rows=rows(task[name])) for name in names} if seeds else {}


def comparable(tasks: dict[str, Task]) -> dict[str, Task]:
    """What figures over tasks may compare: algorithms that ran on the same tasks, on each task the seeds that all of them have. Of the
    sets of tasks that an algorithm ran on, the one with the most cells (tasks times the algorithms that have all of these), or else the
    larger one. {} if nothing is left."""
    ran = {name: frozenset(env for env, task in tasks.items() if name in task) for name in COMPARED}
    having = {common: [name for name in ran if common <= ran[name]] for common in ran.values() if common}
    common = max(having, key=lambda common: (len(common) * len(having[common]), len(common)), default=frozenset())
    names = having.get(common, [])
    kept: dict[str, Task] = {}
    for env in (env for env in tasks if env in common):
        found = on_common_seeds(tasks[env], names)
        if found and not math.isnan(best_safe_return(tasks[env])):
            kept[env] = found
    return kept
