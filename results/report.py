"""Writes results/README.md, its figures, and the tables in README.md and algos/README.md, from the CSV and JSON files: `make report`."""

import math
import os
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from results import csvs, measures
from results.csvs import ALGOS, ENVS, ROOT, Run

NAMES = {
    "cpq": "CPQ (offline)", "bc_safe": "BC-Safe (offline)", "bear_lag": "BEAR-Lag (offline)", "marvel": "Marvel",
    "bc_safe+best": "the clone of what CPQ clones (offline)",
    "sac_lag": "SAC-Lag from scratch", "naive_o2o": "naive finetuning", "jsrl": "JSRL", "pex": "PEX", "so2": "SO2",
    "wsrl": "WSRL", "cal": "CAL",
    "marvel+fqe": "Marvel, plain fitted Q", "marvel+fresh": "Marvel, fresh critics",
    "marvel+dual": "Marvel, dual ascent", "marvel+pid": "Marvel, fixed PID", "marvel+pid10": "Marvel, fixed PID, gains x10",
    "marvel+mixed": "Marvel, mixed replay", "marvel+bear_lag": "Marvel from BEAR-Lag",
    "naive_o2o+bear_lag": "naive from BEAR-Lag", "naive_o2o+apid": "naive finetuning, adaptive PID",
}  # fmt: skip
RUNGS = {"marvel": "Marvel", "naive_o2o+apid": "naive finetuning, adaptive PID"}  # of which csvs.LADDER has variants
for base, title in RUNGS.items():
    NAMES |= {f"{base}+{rung}": f"{title}; {what}" for rung, (what, *_) in csvs.LADDER.items() if rung}
ARMS = {
    "naive_o2o+{}": "naive finetuning, adaptive PID", "marvel+{}": "Marvel", "marvel+{}+fqe": "Marvel without entropy terms",
    "naive_o2o+{}+bounded": "naive finetuning, bounded multiplier", "marvel+{}+bounded": "Marvel, bounded multiplier",
}  # fmt: skip
BUDGETS = {"release": "10,000 steps of 256", "published": "100,000 steps of 512, the release's"}  # offline, of csvs.RELEASE
for arm, title in ARMS.items():
    NAMES |= {arm.format(budget): f"{title}; release, offline {what}" for budget, what in BUDGETS.items()}
OFFLINE = ("cpq", "bc_safe", "bc_safe+best", "bear_lag")
PLAIN = [name for name in ALGOS if "+" not in name]
CONTROLS = ["marvel", *(name for name in csvs.COMPARED if "+" in name and name not in OFFLINE)]
MULTIPLIERS = ["marvel", "marvel+pid", "marvel+pid10", "marvel+dual"]
HUES = "C0 C1 C2 C4 C5 C6 C8 C9 navy tan teal plum".split()  # without the limit's red
COLOURS = {name: hue for names in (PLAIN, CONTROLS) for name, hue in zip([n for n in names if n != "marvel"], HUES, strict=False)}
COLOURS |= {"marvel": "black", "bc_safe+best": "grey"}
RANKS = {"rank_q_policy": "Q, own", "rank_q_random": "Q, random", "rank_qc_policy": "Qc, own", "rank_qc_random": "Qc, random"}
CLAIMS = [  # (claim, what is said to be better, than what[, by which number if not by "final"])
    ("Pre-alignment helps finetuning: Marvel without it is naive finetuning with its controller", "marvel", "naive_o2o+apid"),
    ("... from a clone, which has no critics", "marvel+bc", "naive_o2o+apid+bc"),
    ("... from CPQ without cloning", "marvel+nocloning", "naive_o2o+apid+nocloning"),
    ("Its entropy terms help: plain fitted Q is not enough", "marvel", "marvel+fqe"),
    ("The pretrained critics help: fresh ones are not enough", "marvel", "marvel+fresh"),
    ("Adaptive gains are better than fixed ones", "marvel", "marvel+pid"),
    ("... and not merely larger: than fixed gains ten times as high", "marvel", "marvel+pid10"),
    ("... than dual ascent", "marvel", "marvel+dual"),
    ("Finetuning improves on the offline policy", "marvel", "cpq"),
    ("Marvel is better than naive finetuning", "marvel", "naive_o2o"),
    ("... and neither has anchor, warm-up or reserve", "marvel+bare", "naive_o2o+apid+bare"),
    ("... in the paper's own configuration", "marvel+release", "naive_o2o+release"),
    ("... as released, without entropy terms", "marvel+release+fqe", "naive_o2o+release"),
    ("Anchor, warm-up and reserve make Marvel's training safer", "marvel", "marvel+bare", "regret"),
    ("... and that of naive finetuning", "naive_o2o+apid", "naive_o2o+apid+bare", "regret"),
    ("The warm-up alone makes Marvel's training safer", "marvel+warmup", "marvel+bare", "regret"),
    ("... and the anchor alone", "marvel+anchor", "marvel+bare", "regret"),
    ("... and the reserve alone", "marvel+reserve", "marvel+bare", "regret"),
    ("All three together make it safer than the warm-up alone", "marvel", "marvel+warmup", "regret"),
    ("The cloning in CPQ helps Marvel", "marvel", "marvel+nocloning"),
    ("Marvel is better from CPQ than from a clone", "marvel", "marvel+bc"),
    ("The odometer helps Marvel", "marvel", "marvel+lost"),
    ("Critics that see x help Marvel", "marvel", "marvel+blind"),
    ("Marvel is better than JSRL", "marvel", "jsrl"),
    ("... than PEX", "marvel", "pex"),
    ("... than SO2", "marvel", "so2"),
    ("... than WSRL", "marvel", "wsrl"),
    ("... than CAL", "marvel", "cal"),
    ("... than SAC-Lagrangian from scratch", "marvel", "sac_lag"),
    ("... than behaviour cloning of the safe data", "marvel", "bc_safe"),
    ("CPQ is better than a clone of the trajectories that it clones", "cpq", "bc_safe+best"),
]

PROFILES = (
    "Performance profiles: the share of runs, each a seed on a task, whose score is above a value; mean over tasks. Bands: 95% bootstrap "
    "over seeds, stratified by task. Left, the normalised final return: higher is better. Right, the final cost / limit: lower is "
    "better, and at 1 stands the share of unsafe runs. A diverged run has the lowest return and the highest cost."
)

Task = dict[str, Run]  # name -> run, all of one environment and cost limit


# ---------------------------------------------------------------- numbers as text


def number(x: float) -> str:
    if math.isnan(x):
        return "-"
    if math.isinf(x):
        return "never"
    return f"{x:,.0f}" if abs(x) >= 1000 else f"{x:.3g}"


def spread(values, least: float = -math.inf) -> str:
    """Mean and interval over seeds; `least`: no mean can be below it."""
    low, high = measures.interval(values)
    low = max(low, least) if not math.isnan(low) else low
    finite = measures.finite(values)
    if not finite.size:
        return "-"
    return number(finite.mean()) + ("" if math.isnan(low) else f" [{number(low)}, {number(high)}]")


cost_spread = partial(spread, least=0.0)


def ratio(successes: int, n: int) -> str:
    """A share of seeds with its Wilson interval."""
    low, high = measures.share(successes, n)
    return f"{successes} of {n}" + ("" if math.isnan(low) else f" [{low:.2f}, {high:.2f}]")


def percent(values) -> str:
    found = measures.finite(values)
    return f"{found.mean():.0%}" if found.size else "-"


def median(values) -> str:
    """Median over seeds, of which some may be infinite."""
    values = values[~np.isnan(values)]
    return number(np.sort(values)[values.size // 2]) if values.size else "-"


def estimate(found: tuple[float, float, float]) -> str:
    return "{:.2f} [{:.2f}, {:.2f}]".format(*found)


def markdown(header: list[str], rows: list[list[str]]) -> list[str]:
    line = lambda cells: "| " + " | ".join(cells) + " |"
    return [line(header), "|" + "---|" * len(header), *map(line, rows), ""]


def missing(present) -> list[str]:
    """A line that names the algorithms that are not in `present`, where any of them is."""
    if not any(name in csvs.COMPARED for name in present):
        return []
    names = [NAMES[name] for name in csvs.COMPARED if name not in present]
    return [f"Missing: {'; '.join(names)}.", ""] if names else []


# ---------------------------------------------------------------- what the runs say


def best_safe_return(task: Task) -> float:
    """The highest return of a safe trajectory in the task's dataset; NaN if no run says."""
    found = [(run.about.get("dataset") or {}).get("safe_return_best") for run in task.values()]
    return next((x for x in found if x), math.nan)


def alive(run: Run) -> dict[str, np.ndarray]:
    """The measures of the seeds that did not diverge."""
    kept = np.array([seed not in run.diverged for seed in run.seeds])
    return {key: values[kept] for key, values in measures.per_seed(run).items()}


def budget(run: Run) -> int:
    return max(row["env_steps"] for row in run.rows)


def compared(tasks: dict[str, Task], a: str, b: str) -> dict:
    """Probabilities of improvement of a over b on the tasks that have both; {} if there are none.

    Of each task the seeds that both have; all seeds if they have none in common. A diverged seed counts as worse than any other: it
    stands at the bottom of the constrained order.
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
            regrets.append((-measures.finite(mx["regret"]), -measures.finite(my["regret"])))
        equal &= b in OFFLINE or budget(x) == budget(y)
    return {
        "tasks": len(both),
        "seeds": sum(len(x.seeds) for x, _ in both.values()),
        "final": measures.improvement(final),
        "over_tasks": measures.improvement(final, resample_tasks=True),
        "return": measures.improvement(returns),
        "regret": measures.improvement(regrets) if regrets else None,
        "equal": equal,
        "paired": paired,
    }


def same_start(x: Run, y: Run) -> bool:
    """Whether no seed tells that the two, which take up offline checkpoints of the same kind, took up different ones."""
    kinds = {ALGOS[run.name][2] if run.name in ALGOS else None for run in (x, y)}
    found = [dict(zip(run.seeds, measures.per_seed(run)["offline_return"])) for run in (x, y)]
    return None in kinds or len(kinds) > 1 or all(found[0][seed] == found[1][seed] for seed in found[0].keys() & found[1].keys())


def verdict(low: float, high: float, null: float, seeds_per_task: float) -> str:
    if seeds_per_task < 3:
        return "undecided (fewer than 3 seeds)"
    return "supported" if low > null else "contradicted" if high < null else "undecided"


def rank_changes(tasks: dict[str, Task], column: str, name: str = "marvel") -> list[np.ndarray]:
    """Per task: the change of a rank correlation by pre-alignment, of each seed that has it."""
    found = [measures.ranks(task[name], column) for task in tasks.values() if name in task]
    changes = [measures.finite(pairs[:, 1] - pairs[:, 0]) for pairs in found]
    return [change for change in changes if change.size]


# ---------------------------------------------------------------- sections


def claims(tasks: dict[str, Task]) -> list[str]:
    rows = []
    for column, label in RANKS.items():
        where = "the policy's own" if column.endswith("policy") else "random"
        claim = f"Pre-alignment makes {label.split(',')[0]} rank actions as Monte-Carlo rollouts do, on {where} states"
        changes = rank_changes(tasks, column)
        if not changes:
            rows.append([claim, "correlation after - before", "-", "-", "-", "-", "no data"])
            continue
        found = measures.stratified_mean(changes)
        count = f"{len(changes)} ({sum(c.size for c in changes)})"
        rows.append(
            [
                claim,
                "correlation after - before",
                count,
                f"**{estimate(found)}**",
                "-",
                "-",
                verdict(*found[1:], 0, float(np.mean([c.size for c in changes]))),
            ]
        )
    for claim, name, other, *judge in CLAIMS:
        result, key = compared(tasks, name, other), judge[0] if judge else "final"
        against = f"P(better than {NAMES[other]})"
        if not result or not result[key]:
            rows.append([claim, against, "-", "-", "-", "-", "no data"])
            continue
        cells = {k: estimate(result[k]) if result[k] else "-" for k in ("final", "return", "regret")}
        _, low, high = result[key]
        judged = verdict(low, high, 0.5, result["seeds"] / result["tasks"])
        count = f"{result['tasks']} ({result['seeds']})" + ("" if result["equal"] else " †") + ("" if result["paired"] else " ‡")
        rows.append([claim, against, count, *(f"**{text}**" if k == key else text for k, text in cells.items()), judged])
    own = {env: (alive(task["marvel"]), task["marvel"]) for env, task in tasks.items() if "marvel" in task}
    if own:
        safe = [env for env, (m, run) in own.items() if m["cost"].size and m["cost"].mean() <= run.cost_limit]
        soon = [env for env, (m, _) in own.items() if np.median(m["episodes_to_stay"]) <= 100]
        for claim, kept in (("Marvel ends safe", safe), ("... and stays safe after at most 100 online episodes", soon)):
            judged = "supported" if len(kept) == len(own) else "contradicted" if not kept else f"supported on {', '.join(kept)} only"
            rows.append([claim, "tasks where it holds", str(len(own)), f"{len(kept)} of {len(own)}", "-", "-", judged])
    return [
        "## What the numbers say about the paper's claims",
        "",
        "Each line compares the runs below. A claim is *supported* if the 95% interval of the bold number lies above "
        "chance (0.5; 0 for correlations), *contradicted* if below, else *undecided*. final: a seed beats another if it ends "
        "safe and the other does not; two safe seeds are compared by return, two unsafe ones by cost. A claim without its "
        "control proves nothing, so the controls are lines of their own. Two algorithms are compared on the seeds that both have. "
        "† the environment steps of the two differ. ‡ on a task, they start from offline checkpoints of the same seeds, but of two runs "
        "of phase 1 (see `algos/README.md`, Reading a run).",
        "",
        *markdown(["claim", "number", "tasks (seeds)", "final", "return", "violation regret", "verdict"], rows),
        "Data: the commands under each task below; table: `make report`.",
        "",
    ]


def on_common_seeds(task: Task, names: list[str]) -> Task:
    """These runs, of each the seeds that all of them have; {} if there are none."""
    seeds = set.intersection(*(set(task[name].seeds) for name in names))
    rows = lambda run: [row for row in run.rows if row["seed"] in seeds]
    return {name: replace(task[name], rows=rows(task[name])) for name in names} if seeds else {}


def comparable(tasks: dict[str, Task]) -> dict[str, Task]:
    """What figures over tasks may compare: algorithms that ran on the same tasks, on each task the seeds that all of them have. Of the
    sets of tasks that an algorithm ran on, the one with the most cells (tasks times the algorithms that have all of these), or else the
    larger one. {} if nothing is left."""
    ran = {name: frozenset(env for env, task in tasks.items() if name in task) for name in csvs.COMPARED}
    having = {common: [name for name in ran if common <= ran[name]] for common in ran.values() if common}
    common = max(having, key=lambda common: (len(common) * len(having[common]), len(common)), default=frozenset())
    names = having.get(common, [])
    kept: dict[str, Task] = {}
    for env in (env for env in tasks if env in common):
        found = on_common_seeds(tasks[env], names)
        if found and not math.isnan(best_safe_return(tasks[env])):
            kept[env] = found
    return kept


def over_tasks(tasks: dict[str, Task], folder: Path, suffix: str) -> list[str]:
    rows, shown, alike = [], [], comparable(tasks)
    best_of = {env: best_safe_return(task) for env, task in tasks.items()}
    for name in csvs.COMPARED:
        runs = {env: task[name] for env, task in tasks.items() if name in task}
        if not runs:
            continue
        scores, safe = {}, 0
        for env, run in runs.items():
            found = alive(run)
            safe += bool(found["cost"].size and found["cost"].mean() <= run.cost_limit)
            if found["return"].size and not math.isnan(best_of[env]):
                scores[env] = found["return"] / best_of[env]
        middle = measures.iqm(list(scores.values())) if scores else None
        better = compared(tasks, "marvel", name) if name != "marvel" else {}
        among = [alive(task[name])["return"] / best_of[env] for env, task in alike.items() if name in task]
        if among and all(values.size for values in among):
            final = compared(alike, "marvel", name).get("final") if name != "marvel" else None
            shown.append((name, measures.iqm(among), final))
        cells = [estimate(better[key]) if better.get(key) else "-" for key in ("final", "over_tasks", "return", "regret")]
        lost = sum(len(run.diverged) for run in runs.values())
        seeds = f"{len(runs)} ({sum(len(run.seeds) for run in runs.values())}{f', {lost} diverged' if lost else ''})"
        rows.append([NAMES[name], seeds, estimate(middle) if middle else "-", f"{safe} of {len(runs)}", *cells])
    drawn = draw_aggregate(shown, folder / f"aggregate{suffix}.png")
    profiles = draw_profiles(alike, best_of, folder / f"profiles{suffix}.png")
    counts = ", ".join(f"{env} ({len(next(iter(task.values())).seeds)})" for env, task in alike.items())
    return [
        "## Over all tasks",
        "",
        "Interquartile mean of the normalised final return and share of tasks with a mean final cost within the limit; "
        "probability that a seed of Marvel is better than one of the line's algorithm (final, as above; by return; by less "
        'violation regret), mean over tasks. 95% intervals: seeds resampled within each task; "tasks resampled": the tasks as '
        "well. Lines over other tasks are not comparable; the tables per task follow below.",
        "",
        *markdown(
            [
                "algorithm",
                "tasks (seeds)",
                "normalised return",
                "tasks safe",
                "P(Marvel better), final",
                "tasks resampled",
                "return",
                "violation regret",
            ],
            rows,
        ),
        *missing({name for task in tasks.values() for name in task}),
        *([f"The figures compare the same tasks and seeds only. Tasks (seeds): {counts}.", ""] if drawn or profiles else []),
        *([f"![Interquartile means and probabilities of improvement](aggregate{suffix}.png)", ""] if drawn else []),
        *([PROFILES, "", f"![Performance profiles](profiles{suffix}.png)", ""] if profiles else []),
        "Data: the commands under each task below; table and figures: `make report`.",
        "",
    ]


def alignment(tasks: dict[str, Task], folder: Path, suffix: str) -> list[str]:
    rows = []
    for env, task in tasks.items():
        published = [arm.format(budget) for budget in BUDGETS for arm in ARMS if arm.startswith("marvel")]
        for name in ("marvel", "marvel+fqe", "marvel+fresh", *published):
            if name not in task:
                continue
            cells = []
            for column in RANKS:
                before, after = measures.ranks(task[name], column).T
                change = spread(after - before)
                cells.append("-" if change == "-" else f"{np.nanmean(before):.2f} → {np.nanmean(after):.2f}; {change}")
            rows.append([env, NAMES[name], *cells])
    if not rows:
        return []
    drawn = draw_alignment(tasks, folder / f"alignment{suffix}.png")
    return [
        "## Does pre-alignment mend the critics?",
        "",
        "Spearman rank correlation of Q and Qc with Monte-Carlo returns and costs of the policy, on states of its own and of "
        "random rollouts: before → after pre-alignment (means over seeds); mean change with its 95% interval over seeds.",
        "",
        *markdown(["task", "algorithm", *RANKS.values()], rows),
        *([f"![Rank correlations before and after](alignment{suffix}.png)", ""] if drawn else []),
        "Data: the commands under each task below; table and figure: `make report`.",
        "",
    ]


def ladder(tasks: dict[str, Task], folder: Path, suffix: str) -> list[str]:
    """What carries the results: one table of csvs.LADDER's rungs on the tasks that have any but the suite itself, and a figure."""
    lines, shown = [], {}
    for env, task in tasks.items():
        steps = {f"{base}+{rung}".rstrip("+"): (rung, base) for rung in csvs.LADDER for base in RUNGS}
        steps = {name: step for name, step in steps.items() if name in task}
        if len({rung for rung, _ in steps.values()}) < 2:
            continue
        runs, rows = on_common_seeds(task, list(steps)), []
        if not runs:
            lines += [f"**{env}**: the rungs have no seed in common.", ""]
            continue
        for name, (rung, base) in steps.items():
            found = alive(runs[name])
            within = found["cost"] <= runs[name].cost_limit
            rows.append([
                csvs.LADDER[rung][0], RUNGS[base], str(within.size),
                " / ".join(number(measures.finite(found[f"offline_{key}"]).mean()) for key in ("return", "cost")),
                ratio(int(within.sum()), within.size), spread(found["return"]),
                cost_spread(found["cost"]), cost_spread(found["early_cost"]), cost_spread(found["train_cost"]),
            ])  # fmt: skip
            shown.setdefault(env, {})[rung, base] = found
        header = "rung, algorithm, seeds, offline return / cost, within the limit, return, cost, "
        header += "cost per training episode of the first fifth, of all"
        lines += [f"**{env}**", "", *markdown(header.split(", "), rows)]
    if not lines:
        return []
    figure = f"![Cost of the first training episodes by rung](ladder{suffix}.png)"
    if shown:
        draw_ladder(shown, folder / f"ladder{suffix}.png")
    return [
        "## What carries the results",
        "",
        "Rungs: what the suite adds to the paper's online phase, each alone and together, and four changes of what it starts from or sees. "
        "The rungs of a task are compared on the seeds that all of them have. Where the offline return differs, they start from offline "
        "checkpoints of two runs of phase 1.",
        "",
        *lines,
        *([figure, ""] if shown else []),
        "Data: the commands under each task below; table and figure: `make report`.",
        "",
    ]


def release(tasks: dict[str, Task]) -> list[str]:
    """The paper's own configuration: its arms (csvs.RELEASE), by task and offline budget."""
    rows = []
    for env, task in tasks.items():
        for budget, what in BUDGETS.items():
            for arm, title in ARMS.items():
                run, naive = task.get(arm.format(budget)), f"naive_o2o+{budget}" + ("+bounded" if "bounded" in arm else "")
                if run is None:
                    continue
                found, better = alive(run), {}
                if run.name != naive:
                    better = compared({env: task}, run.name, naive)
                within = found["cost"] <= run.cost_limit
                rows.append([
                    env, what, title, str(within.size), spread(found["offline_return"]), cost_spread(found["offline_cost"]),
                    ratio(int(within.sum()), within.size), spread(found["return"]), cost_spread(found["cost"]),
                    cost_spread(found["early_cost"]), cost_spread(found["train_cost"]), estimate(better["final"]) if better else "-",
                ])  # fmt: skip
    if not rows:
        return []
    header = "task, offline phase, algorithm, seeds, offline return, offline cost, within the limit, return, cost, "
    header += "cost per training episode of the first fifth, of all, P(better than naive)"
    return [
        "## The paper's own configuration",
        "",
        "`--preset release`: no anchor, warm-up, reserve or cloning; the release's step sizes and update counts; at most 500 episodes. All "
        "arms of a task start from the same offline checkpoints. Bounded: lambda moves once per iteration, by the paper's rule, and is at "
        "most 2. P: as *final* above; with a bounded multiplier, both have it.",
        "",
        *markdown(header.split(", "), rows),
        "Data: the commands under each task below; table: `make report`.",
        "",
    ]


def other_limits(runs: list[Run]) -> list[str]:
    """Does the controller follow the limit? The algorithms that ran at another limit too, by task, on the seeds that all limits have."""
    by: dict[tuple[str, str], Task] = {}
    for run in sorted(runs, key=lambda run: run.cost_limit):
        if run.name not in OFFLINE:
            by.setdefault((run.env, run.name), {})[f"{run.cost_limit:g}"] = run
    rows, envs = [], list(dict.fromkeys(ENVS) | dict.fromkeys(sorted(run.env for run in runs)))
    for env, name in sorted((key for key in by if len(by[key]) > 1), key=lambda key: (envs.index(key[0]), [*ALGOS, key[1]].index(key[1]))):
        for limit, run in on_common_seeds(by[env, name], list(by[env, name])).items():
            found = alive(run)
            within = found["cost"] <= run.cost_limit
            costs = [cost_spread(found[key]) for key in ("cost", "early_cost", "train_cost")]
            share = ratio(int(within.sum()), within.size)
            offline = cost_spread(found["offline_cost"])
            rows.append([env, NAMES.get(name, name), limit, str(within.size), offline, share, spread(found["return"]), *costs])
    if not rows:
        return []
    header = (
        "task, algorithm, limit, seeds, offline cost, within the limit, return, cost, cost per training episode of the first fifth, of all"
    )
    return [
        "## Other cost limits",
        "",
        "The offline phase has the limit too. So each limit has offline policies of its own.",
        "",
        *markdown(header.split(", "), rows),
        "Data: the commands under each task, of this limit and the others; table: `make report`.",
        "",
    ]


def section(env: str, task: Task, folder: Path, suffix: str) -> list[str]:
    rows, best, tried = [], best_safe_return(task), csvs.tries(folder)
    for name in [*ALGOS, *sorted(task.keys() - ALGOS.keys())]:
        run = task.get(name)
        if run is None:
            continue
        found = alive(run)
        seeds = str(len(run.seeds) - len(run.diverged)) + (f" + {len(run.diverged)} diverged" if run.diverged else "")
        if not found["return"].size:
            first = min(run.diverged.values(), key=lambda row: row["gradient_steps"])
            rows.append([NAMES.get(name, name), seeds, f"diverged ({first['phase']}, step {first['gradient_steps']:,})", *[""] * 13])
            continue
        within = found["cost"] <= run.cost_limit
        soon = " / ".join(median(found[key]) for key in ("episodes_to_safe", "episodes_to_stay"))
        episodes = measures.finite(found["training_episodes"])
        rows.append([
            NAMES.get(name, name), seeds, spread(found["offline_return"]), cost_spread(found["offline_cost"]), spread(found["return"]),
            f"**{cost_spread(found['cost'])}**" if found["cost"].mean() <= run.cost_limit else cost_spread(found["cost"]),
            ratio(int(within.sum()), within.size), percent(found["share_above"]), cost_spread(found["worst_tenth"]),
            cost_spread(found["train_cost"]), cost_spread(found["early_cost"]), cost_spread(found["regret"]),
            f"{soon} of {number(episodes.max())}" if episodes.size else "-", spread(found["auc"]), spread(found["return"] / best),
            f"{' '.join(commit[:8] for commit in run.commits) or '?'}; {tried.get((ALGOS.get(name, (name,))[0], env), 0)}",
        ])  # fmt: skip
    any_run = next(iter(task.values()))
    limit = any_run.cost_limit
    example = next((r["command"] for run in task.values() for r in run.about.get("runs", ()) if r.get("command")), None)
    data = f"Data: `python {example}` and the like, all listed under Commands" if example else "Data: the CSVs in this folder"
    header = "algorithm, seeds, offline return, offline cost, return, cost, seeds within the limit, episodes above it, worst tenth, "
    header += "cost per training episode, of the first fifth, violation regret, episodes to safe / to stay safe, AUC, normalised return, "
    header += "commit; settings tried"
    lines = [
        f"## {env}",
        "",
        f"Cost limit {limit:g}; best safe return of the dataset {number(best)}. Bold: mean final cost within the limit.",
        "",
    ]
    lines += markdown(header.split(", "), rows) + (missing(task) if limit == csvs.LIMIT else []) + [f"{data}; table: `make report`.", ""]
    place, controls = folder / env, [name for name in CONTROLS[1:] if name in task]
    for kind, title, drawn in (
        (
            "learning",
            "Evaluations over online environment steps",
            draw_curves(task, PLAIN, place / f"learning{suffix}.png", best),
        ),
        (
            "controls",
            "Marvel and its controls",
            controls and draw_curves(task, ["marvel", *controls], place / f"controls{suffix}.png", best),
        ),
        ("multiplier", "Training cost, multiplier and gains", draw_multipliers(task, place / f"multiplier{suffix}.png")),
    ):
        if drawn:
            lines += [f"![{title} on {env}]({env}/{kind}{suffix}.png)", "", f"{title}. {data}; figure: `make report`.", ""]
    return lines + commands(task)


def commands(task: Task) -> list[str]:
    lines = ["<details><summary>Commands</summary>", ""]
    for name, run in task.items():
        lines.append(f"- {NAMES.get(name, name)}, dataset {' and '.join(h or 'none' for h in run.dataset_hashes)}:")
        for part in run.about.get("runs", []):
            made = f"seeds {' '.join(map(str, part['seeds']))}; commit {part.get('commit') or '?'}; {part.get('device')}"
            took = f"; {part['seconds']:,.0f} s" if part.get("seconds") else ""
            lines.append(f"  - `python {part.get('command')}` ({made}{took})")
        if not run.about:
            lines.append(f"  - unknown: no JSON beside {run.path.name}; configuration {run.rows[0]['config_hash']}")
    return [*lines, "", "</details>", ""]


def settings_tried(folder: Path) -> list[str]:
    """All rows of tried.csv, by task and script, in the order in which they were tried."""
    rows = sorted(csvs.tried(folder), key=lambda row: (row["env"], row["algo"]))
    if not rows:
        return []
    value = lambda row, key: number(float(row[key])) if row.get(key) else "-"
    keys = "return cost worst_cost train_cost first_fifth offline_return offline_cost".split()
    share = lambda row: f"{float(row['share_safe']):.0%}" if row.get("share_safe") else "-"
    cells = [
        [row["env"], f"`{row['algo']} {row['arguments']}`", row["seeds"], share(row), *(value(row, key) for key in keys)] for row in rows
    ]
    header = "task, script and arguments, seeds, within the limit, return, cost, largest cost of a seed, cost per training episode, "
    header += "of the first fifth, offline return, offline cost"
    return [
        "# Settings tried",
        "",
        "On the seeds that settings are chosen on. Means over seeds of the last evaluation. What is not named is the default of that time: "
        "`tried.csv` has the commits; a `+` means that files differed from it.",
        "",
        *markdown(header.split(", "), cells),
        "Data: `python results/tune.py TRIES.txt`; table: `make report`.",
        "",
    ]


# ---------------------------------------------------------------- figures


def save(figure, path: Path, top: float = 1.0) -> bool:
    figure.tight_layout(rect=(0, 0, 1, top))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90, metadata={"Software": None}, pil_kwargs={"optimize": True})
    plt.close(figure)
    return True


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
                axis.axhline(alive(run)[key].mean(), color=colour, lw=1.2, ls="--", label=NAMES[name])
                continue
            axis.plot(steps, values.mean(0), color=colour, lw=2 if name == "marvel" else 1.3, label=NAMES[name])
            if len(values) > 1:
                low, high = np.array([measures.interval(column) for column in values.T]).T
                axis.fill_between(steps, low, high, color=colour, alpha=0.1, lw=0)
    if not math.isnan(best):
        axes[0].axhline(best, color="grey", lw=1, ls=":", label="best safe return of the dataset")
    axes[1].axhline(limit, color="red", lw=1.2, ls="--", label=f"cost limit {limit:g}")
    axes[1].set_yscale("symlog", linthresh=max(limit, 1.0))
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
                axis.plot(steps, values.mean(0), color=COLOURS[name], lw=1.3, label=NAMES[name])
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
    axes[0].set_yscale("symlog", linthresh=max(limit, 1.0))
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
    axes[0].set_yticks(range(len(shown)), [NAMES[entry[0]] for entry in shown])
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
                taus, share, color=COLOURS[name], lw=2 if name == "marvel" else 1.3, ls="--" if name in OFFLINE else "-", label=NAMES[name]
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


def draw_ladder(shown: dict[str, dict], path: Path) -> bool:
    """Per task and rung: cost per training episode in the first fifth, means and intervals over seeds."""
    figure, axes = plt.subplots(1, len(shown), figsize=(1.5 + 2.8 * len(shown), 3.6), sharey=True, squeeze=False)
    rungs = [rung for rung in csvs.LADDER if any((rung, base) in found for found in shown.values() for base in RUNGS)]
    for axis, (env, found) in zip(axes[0], shown.items()):
        for i, (base, title) in enumerate(RUNGS.items()):
            for rung in rungs:
                if (rung, base) not in found:
                    continue
                values, row = found[rung, base]["early_cost"], rungs.index(rung) + 0.2 * (2 * i - 1)
                low, high = measures.interval(values)
                axis.plot([low, high], [row, row], color=f"C{i}", lw=4, alpha=0.35, solid_capstyle="butt")
                axis.plot([np.mean(values)], [row], "o", color=f"C{i}", ms=4, label=title if rung == "" else None)
        axis.axvline(csvs.LIMIT, color="red", lw=1, ls="--")
        axis.set_xscale("symlog", linthresh=csvs.LIMIT)
        axis.set_xlim(left=0)
        axis.set_title(env, fontsize=8)
        axis.set_xlabel("cost per training episode,\nfirst fifth", fontsize=8)
    axes[0, 0].set_yticks(range(len(rungs)), [csvs.LADDER[rung][0] for rung in rungs], fontsize=8)
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
        for i, column in enumerate(RANKS):
            pairs = measures.ranks(run, column)
            for pair in pairs:
                axis.plot([i - 0.2, i + 0.2], pair, color="grey", lw=0.7, alpha=0.7)
            axis.plot([i - 0.2, i + 0.2], np.nanmean(pairs, 0), "-o", color="C3" if "qc" in column else "C0", ms=4)
        axis.axhline(0, color="grey", lw=0.6)
        axis.set_xticks(range(len(RANKS)), [label.replace(", ", "\n") for label in RANKS.values()], fontsize=7)
        axis.set_title(env, fontsize=8)
    axes[0, 0].set_ylabel("rank correlation,\nbefore → after")
    return save(figure, path)


# ---------------------------------------------------------------- scores


def write_scores(tasks: dict[str, Task], folder: Path, suffix: str) -> set[Path]:
    """Writes scores/NAME.npz of each algorithm, atomically; their paths.

    Arrays (seeds, tasks), NaN where a seed was not run or diverged: "return", "cost", "train_cost" (see measures.MEANING); bool
    "diverged". "seeds" (seeds,); "tasks" and "best_safe_return" (tasks,); "cost_limit" ().
    """
    written = set()
    for name in {name: None for task in tasks.values() for name in task}:
        runs = {env: task[name] for env, task in tasks.items() if name in task}
        seeds = sorted(set().union(*(run.seeds for run in runs.values())))
        measured = {env: measures.per_seed(run) for env, run in runs.items()}
        of = lambda env, key: dict(zip(runs[env].seeds, measured[env][key]))
        column = lambda key: np.array([[of(env, key).get(seed, math.nan) for env in runs] for seed in seeds])
        arrays = {key: column(key) for key in ("return", "cost", "train_cost")} | {
            "diverged": np.array([[seed in run.diverged for run in runs.values()] for seed in seeds]),
            "seeds": np.array(seeds),
            "tasks": np.array(list(runs)),
            "best_safe_return": np.array([best_safe_return(tasks[env]) for env in runs]),
            "cost_limit": np.array(next(iter(runs.values())).cost_limit),
        }
        path = folder / "scores" / f"{name}{suffix}.npz"
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        with open(temporary, "wb") as file:
            np.savez(file, **arrays)
        os.replace(temporary, path)
        written.add(path)
    return written


# ---------------------------------------------------------------- the whole


def report(folder: Path) -> str:
    """The text of README.md; draws the figures and writes scores/ on the way. Raises csvs.BadInput."""
    runs = csvs.baselines(folder)
    if not runs:
        raise csvs.BadInput(f"{folder}: no ENV/ALGO.csv: make some with `make sweep` and `make accept`")
    lines = [
        "# Results", "",
        "Written by `make report` from the CSV and JSON files in these folders; edit nothing here. `make sweep` runs what is",
        "missing, `make diff` compares fresh runs with these, `make accept` puts them here.", "",
        f"Settings are chosen on seeds 0 to {csvs.CHOSEN_ON[-1]} (`results/tune.py`; each try is a line of `tried.csv`) and reported on",
        f"seeds from {csvs.UNSEEN} on. The two never share a table. The last column names the commit that a row was run with, which froze",
        "its settings, and the number of settings that were tried for this script on this task.", "",
        "Intervals are 95% studentised bootstraps over seeds (`results/measures.py`), of shares of seeds Wilson's. Those of costs are cut",
        "off at 0. Per seed:", "",
        *(f"- **{key.replace('_', ' ')}**: {text}" for key, text in measures.MEANING.items()),
        "- **normalised return**: return / best return of a trajectory of the dataset whose cost is within the limit",
        "- **diverged**: seeds whose losses or parameters became non-finite; left out of means, and losing every comparison", "",
        "For statistics of your own, `scores/NAME.npz` has the last evaluations of an algorithm as arrays (seeds, tasks), NaN where a seed",
        "was not run or diverged; `write_scores` in `results/report.py` says what else. [rliable](https://github.com/google-research/rliable)",
        "takes them where no NaN is left:", "",
        "```python",
        'found = {name: np.load(f"results/scores/{name}.npz") for name in ("marvel", "pex")}',
        'scores = {name: x["return"] / x["best_safe_return"] for name, x in found.items()}  # of x["seeds"] on x["tasks"]',
        "```", "",
    ]  # fmt: skip
    limits = sorted({run.cost_limit for run in runs.values()}, key=lambda limit: (limit != csvs.LIMIT, limit))
    any_unseen, scores = any(run.unseen for run in runs.values()), set()
    if not any_unseen:
        lines += [f"There are no results of seeds from {csvs.UNSEEN} on yet.", ""]
    for limit, unseen in [(limit, unseen) for unseen in (True, False) for limit in limits]:
        suffix = csvs.stem("", limit) + ("" if unseen or not any_unseen else "-chosen")
        chosen = {key: run for key, run in runs.items() if run.cost_limit == limit and run.unseen == unseen}
        present = {run.env for run in chosen.values()}
        if not present:
            continue
        envs = [env for env in ENVS if env in present] + sorted(present - set(ENVS))
        order = {name: i for i, name in enumerate(ALGOS)}
        of_env = lambda env: sorted((r for r in chosen.values() if r.env == env), key=lambda r: order.get(r.name, 99))
        tasks = {env: {run.name: run for run in of_env(env)} for env in envs}
        if limit != csvs.LIMIT or not unseen:
            lines += [f"# Cost limit {limit:g}" + ("" if unseen else ", seeds on which settings may have been chosen"), ""]
        absent = [env for env in ENVS if env not in present]
        if absent:
            lines += [f"Of the core suite, there are no results of {', '.join(absent)} at limit {limit:g}.", ""]
        if limit == csvs.LIMIT or not absent:  # else there is little to say over tasks
            lines += claims(tasks) + over_tasks(tasks, folder, suffix) + release(tasks) + ladder(tasks, folder, suffix)
            lines += other_limits([run for run in runs.values() if run.unseen == unseen]) if limit == csvs.LIMIT else []
            lines += alignment(tasks, folder, suffix)
        for env, task in tasks.items():
            lines += section(env, task, folder, suffix)
        scores |= write_scores(tasks, folder, suffix)
    for path in set((folder / "scores").glob("*.npz")) - scores:  # of results that are gone
        path.unlink()
    return "\n".join(lines + settings_tried(folder)).rstrip() + "\n"


def reported(folder: Path) -> tuple[dict[tuple, Run], str]:
    """Runs at the usual limit on unseen seeds, or else on those that settings may have been chosen on, with a line that says so."""
    runs = {key: run for key, run in csvs.baselines(folder).items() if run.cost_limit == csvs.LIMIT}
    unseen = {key: run for key, run in runs.items() if run.unseen}
    warning = "On seeds on which settings may have been chosen:\n\n"
    return (unseen, "") if unseen else (runs, warning if runs else "")


def summary(folder: Path) -> str:
    """One line per algorithm: by task, return / cost at the end, and the cost per training episode."""
    runs, note = reported(folder)
    tasks = [env for env in ENVS if (env, "marvel", csvs.LIMIT) in runs]
    header, rows = ["algorithm"], []
    for env in tasks:
        header += [env, "per training episode"]
    for name in (name for name in csvs.COMPARED if any((env, name, csvs.LIMIT) in runs for env in tasks)):
        rows.append([NAMES[name]])
        for env in tasks:
            found = alive(runs[env, name, csvs.LIMIT]) if (env, name, csvs.LIMIT) in runs else None
            rows[-1] += [" / ".join(number(found[key].mean()) for key in ("return", "cost")) if found else "-"]
            rows[-1] += [number(found["train_cost"].mean()) if found else "-"]
    return note + "\n".join(markdown(header, rows))


def overview(folder: Path) -> str:
    """By task, for the offline policy, Marvel and naive finetuning: share of seeds within the limit, mean return, cost of training."""
    runs, note = reported(folder)
    names = ("cpq", "marvel", "naive_o2o")
    rows = []
    for env in ENVS:
        if not all((env, name, csvs.LIMIT) in runs for name in names):
            continue
        row = [env]
        for name in names:
            found = alive(runs[env, name, csvs.LIMIT])
            row += [ratio((found["cost"] <= csvs.LIMIT).sum(), found["cost"].size), number(found["return"].mean())]
            row += [number(found["train_cost"].mean())] if name not in OFFLINE else []
        rows.append(row)
    header = ["task", "offline: safe", "return"]
    for title in ("Marvel", "naive finetuning"):
        header += [f"{title}: safe", "return", "per training episode"]
    return note + "\n".join(markdown(header, rows))


MARKS = "<!-- made by `make report` -->\n", "<!-- until here -->\n"


def put_between_marks(text: str, table: str) -> str:
    """`text` with `table` instead of what stands between the MARKS."""
    before, _, rest = text.partition(MARKS[0])
    return before + MARKS[0] + table + MARKS[1] + rest.partition(MARKS[1])[2]


def main(arguments: list[str] | None = None) -> int:
    parser = csvs.Parser(__doc__)
    parser.add_argument("--results", type=Path, default=ROOT / "results", help="folder of ENV/ALGO.csv, where README.md is written")
    folder = parser.parse_args(arguments).results
    text = report(folder)
    (folder / "README.md").write_text(text, encoding="utf-8")
    print(f"{folder / 'README.md'}: {text.count(chr(10))} lines")
    if folder == ROOT / "results":
        for page, table in ((ROOT / "algos" / "README.md", summary(folder)), (ROOT / "README.md", overview(folder))):
            page.write_text(put_between_marks(page.read_text(encoding="utf-8"), table), encoding="utf-8")
    return 0


if __name__ == "__main__":
    csvs.command(main)
