"""The figures of the report: one function each, which writes a PNG and says whether there was anything to draw."""

import itertools
import math
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from results import measures
from results.arms import ALGOS, CONTROLS, LADDER, MULTIPLIERS, OFFLINE, PLAIN, RUNGS
from results.comparisons import Task, alive, rank_changes
from results.csvs import Run

# Without the limit's red; as many as there are arms to compare, so that no two in a figure look the same.
HUES = "C0 C1 C2 C4 C5 C6 C8 C9 navy tan teal plum gold darkgreen indigo slategray peru lime deepskyblue".split()
OTHERS = [name for name in (*PLAIN, *CONTROLS) if name not in ("marvel", "bc_safe+best")]
COLOURS = dict(zip(OTHERS, itertools.cycle(HUES)))
COLOURS |= {"marvel": "black", "bc_safe+best": "grey"}


def save(figure, path: Path, top: float = 1.0) -> bool:
    figure.tight_layout(rect=(0, 0, 1, top))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90, metadata={"Software": None}, pil_kwargs={"optimize": True})
    plt.close(figure)
    return True


def linear_part(limit: float) -> float:
    """Up to where an axis of costs is linear: to the limit, if that is a place on it."""
    return max(limit, 1.0) if math.isfinite(limit) else 1.0


def traces(run: Run, event: str, key: str) -> tuple[np.ndarray, np.ndarray]:
    """(steps,) and (seeds, steps): online values at the steps that every seed which did not diverge has."""
    curves = []
    for seed in run.seeds:
        if seed in run.diverged:
            continue
        rows = run.of(seed, event)
        before = [row for row in rows if row["phase"] != "online"] if event == "eval" else []
        online = [row for row in rows if row["phase"] == "online"]
        if online and online[0]["env_steps"] > 0:
            online = before[-1:] + online
        curves.append({row["env_steps"]: row[key] for row in online if not math.isnan(row[key])})
    steps = sorted(set.intersection(*map(set, curves))) if curves else []
    return np.array(steps), np.array([[curve[step] for step in steps] for curve in curves])


def draw_curves(task: Task, names: list[str], path: Path, best: float) -> bool:
    """Return and cost of evaluations over online steps: mean and 95% interval; offline algorithms as a dashed line."""
    names = [name for name in names if name in task and alive(task[name])["return"].size]
    if not names:
        return False
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.8))
    limit = task[names[0]].cost_limit
    for name in names:
        colour, run = COLOURS[name], task[name]
        for axis, key in zip(axes, ("return", "cost")):
            steps, values = traces(run, "eval", key)
            if not steps.size:
                axis.axhline(alive(run)[key].mean(), color=colour, lw=1.2, ls="--", label=ALGOS[name].title)
                continue
            axis.plot(steps, values.mean(0), color=colour, lw=2 if name == "marvel" else 1.3, label=ALGOS[name].title)
            if len(values) > 1:
                low, high = np.array([measures.interval(column) for column in values.T]).T
                axis.fill_between(steps, low, high, color=colour, alpha=0.1, lw=0)
    if not math.isnan(best):
        axes[0].axhline(best, color="grey", lw=1, ls=":", label="best safe return of the dataset")
    axes[1].axhline(limit, color="red", lw=1.2, ls="--", label=f"cost limit {limit:g}")
    axes[1].set_yscale("symlog", linthresh=linear_part(limit))
    axes[1].set_ylim(bottom=0)
    for axis, label in zip(axes, ("return", "cost")):
        axis.set_xlabel("online environment steps")
        axis.set_ylabel(f"episode {label}")
        axis.ticklabel_format(axis="x", style="sci", scilimits=(0, 3))
    handles = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels())}
    figure.legend(handles.values(), handles.keys(), loc="upper center", ncol=4, fontsize=8, frameon=False)
    return save(figure, path, top=0.98 - 0.055 * math.ceil(len(handles) / 4))


def draw_multipliers(task: Task, path: Path) -> bool:
    """Training cost, lambda, and aPID's gains relative to their initial values, over online steps: means, ranges over seeds."""
    names = [name for name in MULTIPLIERS if name in task and traces(task[name], "train", "multiplier")[0].size]
    if not names:
        return False
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.4))
    for name in names:
        for axis, key in zip(axes, ("cost", "multiplier")):
            steps, values = traces(task[name], "train", key)
            if steps.size:
                axis.plot(steps, values.mean(0), color=COLOURS[name], lw=1.3, label=ALGOS[name].title)
                axis.fill_between(steps, values.min(0), values.max(0), color=COLOURS[name], alpha=0.1, lw=0)
    if "marvel" in names:
        for key, style in (("kp", "-"), ("ki", "--"), ("kd", ":")):
            steps, values = traces(task["marvel"], "train", key)
            initial = (task["marvel"].about.get("config") or {}).get(key) or (values[:, 0].mean() if steps.size else 0)
            if steps.size and initial:
                axes[2].plot(steps, (values / initial).mean(0), color="black", ls=style, lw=1.3, label=f"K{key[1]} of aPID / initial")
        axes[2].set_yscale("log")
    limit = task[names[0]].cost_limit
    axes[0].axhline(limit, color="red", lw=1.2, ls="--")
    axes[0].set_yscale("symlog", linthresh=linear_part(limit))
    axes[0].set_ylim(bottom=0)
    for axis, label in zip(axes, ("training episode cost", "multiplier λ", "gain / initial gain")):
        axis.set_ylabel(label)
        axis.set_xlabel("online environment steps")
        axis.ticklabel_format(axis="x", style="sci", scilimits=(0, 3))
    axes[1].legend(fontsize=7, frameon=False)
    if "marvel" in names:
        axes[2].legend(fontsize=7, frameon=False)
    return save(figure, path)


def draw_aggregate(shown: list[tuple], path: Path) -> bool:
    """Interquartile means, and probabilities that Marvel is better, with intervals."""
    if not shown:
        return False
    figure, axes = plt.subplots(1, 2, figsize=(10, 1.2 + 0.28 * len(shown)), sharey=True)
    for axis, which in zip(axes, (1, 2)):
        for row, entry in enumerate(shown):
            if entry[which]:
                middle, low, high = entry[which]
                axis.plot([low, high], [row, row], color=COLOURS[entry[0]], lw=5, alpha=0.35, solid_capstyle="butt")
                axis.plot([middle], [row], "o", color=COLOURS[entry[0]], ms=5)
    axes[0].set_yticks(range(len(shown)), [ALGOS[entry[0]].title for entry in shown])
    axes[0].invert_yaxis()
    axes[0].set_xlabel("IQM of final return / best safe return of the data")
    axes[1].set_xlabel("P(Marvel ends better: safe first, then return)")
    axes[1].axvline(0.5, color="grey", lw=1, ls="--")
    axes[1].set_xlim(0, 1)
    return save(figure, path)


def draw_profiles(tasks: dict[str, Task], best_of: dict[str, float], path: Path) -> bool:
    """Performance profiles of the normalised final return and of the final cost / limit, with bands; offline algorithms dashed."""
    names = [name for name in PLAIN if all(name in task for task in tasks.values())] if tasks else []
    limit = next(run.cost_limit for task in tasks.values() for run in task.values()) if names else math.nan
    if not names or not 0 < limit < math.inf:
        return False
    found = {name: {env: measures.per_seed(task[name]) for env, task in tasks.items()} for name in names}
    returns = {name: [np.nan_to_num(m["return"] / best_of[env], nan=-np.inf) for env, m in of.items()] for name, of in found.items()}
    costs = {name: [np.nan_to_num(m["cost"] / limit, nan=np.inf) for m in of.values()] for name, of in found.items()}
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.2), sharey=True)
    for axis, scores in zip(axes, (returns, costs)):
        values = measures.finite(np.concatenate([task for of in scores.values() for task in of]))
        taus = np.unique([0.0, *values, *(values - 1e-9)])  # a profile is a staircase: its value on each step
        for name in names:
            share, low, high = measures.profile(scores[name], taus)
            axis.plot(
                taus,
                share,
                color=COLOURS[name],
                lw=2 if name == "marvel" else 1.3,
                ls="--" if name in OFFLINE else "-",
                label=ALGOS[name].title,
            )
            axis.fill_between(taus, low, high, color=COLOURS[name], alpha=0.08, lw=0)
    axes[0].set_xlabel("final return / best safe return of the data")
    axes[0].set_ylabel("share of runs above it")
    axes[1].set_xlabel("final cost / limit")
    axes[1].axvline(1, color="red", lw=1.2, ls="--", label="cost limit")
    axes[1].set_xscale("symlog", linthresh=1)
    axes[1].xaxis.set_major_formatter("{x:g}")
    axes[1].set_xlim(left=0)
    handles = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels())}
    figure.legend(handles.values(), handles.keys(), loc="upper center", ncol=4, fontsize=8, frameon=False)
    return save(figure, path, top=0.98 - 0.04 * math.ceil(len(handles) / 4))


def draw_ladder(shown: dict[str, dict], path: Path, limit: float) -> bool:
    """Per task and rung: cost per training episode in the first fifth, means and intervals over seeds."""
    figure, axes = plt.subplots(1, len(shown), figsize=(1.5 + 2.8 * len(shown), 3.6), sharey=True, squeeze=False)
    rungs = [rung for rung in LADDER if any((rung, base) in found for found in shown.values() for base in RUNGS)]
    for axis, (env, found) in zip(axes[0], shown.items()):
        for i, (base, arm) in enumerate(RUNGS.items()):
            for rung in rungs:
                if (rung, base) not in found:
                    continue
                values, row = found[rung, base]["early_cost"], rungs.index(rung) + 0.2 * (2 * i - 1)
                low, high = measures.interval(values)
                axis.plot([low, high], [row, row], color=f"C{i}", lw=4, alpha=0.35, solid_capstyle="butt")
                axis.plot([np.mean(values)], [row], "o", color=f"C{i}", ms=4, label=arm.title if rung == "" else None)
        axis.axvline(limit, color="red", lw=1, ls="--")
        axis.set_xscale("symlog", linthresh=linear_part(limit))
        axis.set_xlim(left=0)
        axis.set_title(env, fontsize=8)
        axis.set_xlabel("cost per training episode,\nfirst fifth", fontsize=8)
    axes[0, 0].set_yticks(range(len(rungs)), [LADDER[rung][0] for rung in rungs], fontsize=8)
    axes[0, 0].invert_yaxis()
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="upper center", ncol=2, fontsize=8, frameon=False)
    return save(figure, path, top=0.93)


def draw_alignment(tasks: dict[str, Task], path: Path) -> bool:
    """Rank correlations before and after pre-alignment of every seed of Marvel, and their means."""
    shown = {env: task["marvel"] for env, task in tasks.items() if "marvel" in task and rank_changes({env: task}, "rank_q_policy")}
    if not shown:
        return False
    figure, axes = plt.subplots(1, len(shown), figsize=(1 + 2.6 * len(shown), 3), sharey=True, squeeze=False)
    for axis, (env, run) in zip(axes[0], shown.items()):
        for i, column in enumerate(measures.RANKS):
            pairs = measures.ranks(run, column)
            for pair in pairs:
                axis.plot([i - 0.2, i + 0.2], pair, color="grey", lw=0.7, alpha=0.7)
            axis.plot([i - 0.2, i + 0.2], np.nanmean(pairs, 0), "-o", color="C3" if "qc" in column else "C0", ms=4)
        axis.axhline(0, color="grey", lw=0.6)
        axis.set_xticks(range(len(measures.RANKS)), [label.replace(", ", "\n") for label in measures.RANKS.values()], fontsize=7)
        axis.set_title(env, fontsize=8)
    axes[0, 0].set_ylabel("rank correlation,\nbefore → after")
    return save(figure, path)
