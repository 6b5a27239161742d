"""Writes results/README.md, its figures, and the tables in README.md and algos/README.md, from the CSV and JSON files: `make report`."""

import math
import os
import sys
from functools import partial
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from results import csvs, figures, measures
from results.arms import ALGOS, BUDGETS, CLAIMS, COMPARED, CONTROLS, LADDER, OFFLINE, PLAIN, RELEASE, RUNGS, title
from results.comparisons import Task, alive, best_safe_return, comparable, compared, on_common_seeds, rank_changes, within
from results.csvs import ENVS, ROOT, Run
from results.measures import RANKS

PROFILES = (
    "Performance profiles: the share of runs, each a seed on a task, whose score is above a value; mean over tasks. Bands: 95% bootstrap "
    "over seeds, stratified by task. Left, the normalised final return: higher is better. Right, the final cost / limit: lower is "
    "better, and at 1 stands the share of unsafe runs. A diverged run has the lowest return and the highest cost."
)

COLUMNS = {  # measure: its column, where the two differ
    "share_above": "episodes above it", "auc": "AUC", "train_cost": "cost per training episode",
    "early_cost": "of the first fifth", "regret": "violation regret", "episodes_to_safe": "episodes to safe",
    "episodes_to_stay": "to stay safe", "training_cost": "training cost (only in `make diff`)",
}  # fmt: skip

# ---------------------------------------------------------------- numbers as text


def number(x: float) -> str:
    if math.isnan(x):
        return "-"
    if math.isinf(x):
        return "never"
    return f"{x:,.0f}" if abs(x) >= 999.5 else f"{x:.3g}"


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


def estimate(found: tuple[float, float, float]) -> str:
    return "-" if math.isnan(found[1]) else "{:.2f} [{:.2f}, {:.2f}]".format(*found)


def markdown(header: list[str], rows: list[list[str]]) -> list[str]:
    line = lambda cells: "| " + " | ".join(cells) + " |"
    return [line(header), "|" + "---|" * len(header), *map(line, rows), ""]


def missing(present) -> list[str]:
    """A line that names the algorithms that are not in `present`, where any of them is."""
    if not any(name in COMPARED for name in present):
        return []
    names = [title(name) for name in COMPARED if name not in present]
    return [f"Missing: {'; '.join(names)}.", ""] if names else []


# ---------------------------------------------------------------- sections


SEEDS_TO_TELL = 5  # with fewer, no interval keeps its 95%


def verdict(low: float, high: float, null: float, seeds_per_task: float) -> str:
    if seeds_per_task < SEEDS_TO_TELL:
        return f"undecided (fewer than {SEEDS_TO_TELL} seeds)"
    return "supported" if low > null else "contradicted" if high < null else "undecided"


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
        against = f"P(better than {title(other)})"
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
        seeds = sum(len(run.seeds) for _, run in own.values())
        safe = sum(within(run)[0] for _, run in own.values())
        soon = sum(int((m["episodes_to_stay"] <= 100).sum()) for m, _ in own.values())
        for claim, kept in (("Marvel ends safe", safe), ("... and stays safe after at most 100 online episodes", soon)):
            rows.append([claim, "share of seeds", f"{len(own)} ({seeds})", f"**{ratio(kept, seeds)}**", "-", "-", "-"])
    return [
        "## What the numbers say about the paper's claims",
        "",
        "Each line compares the runs below. A claim is *supported* if the 95% interval of the bold number lies above "
        "chance (0.5; 0 for correlations), *contradicted* if below, else *undecided*. final: a seed beats another if it ends "
        "safe and the other does not; two safe seeds are compared by return, two unsafe ones by cost. A claim without its "
        "control proves nothing, so the controls are lines of their own. Even without any difference, 5 to 8% of the lines get a "
        "verdict. Two algorithms are compared on the seeds that both have. † the environment steps of the two differ. ‡ on some task, "
        "the two start from different offline checkpoints, because phase 1 was run twice (see `algos/README.md`, Reading a run). Shares "
        "of seeds get no verdict.",
        "",
        *markdown(["claim", "number", "tasks (seeds)", "final", "return", "violation regret", "verdict"], rows),
        "Data: the commands under each task below; table: `make report`.",
        "",
    ]


def over_tasks(tasks: dict[str, Task], folder: Path, suffix: str) -> list[str]:
    rows, shown, alike = [], [], comparable(tasks)
    best_of = {env: best_safe_return(task) for env, task in tasks.items()}
    for name in COMPARED:
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
        rows.append([title(name), seeds, estimate(middle) if middle else "-", f"{safe} of {len(runs)}", *cells])
    drawn = figures.draw_aggregate(shown, folder / f"aggregate{suffix}.png")
    profiles = figures.draw_profiles(alike, best_of, folder / f"profiles{suffix}.png")
    counts = ", ".join(f"{env} ({len(next(iter(task.values())).seeds)})" for env, task in alike.items())
    return [
        "## Over all tasks",
        "",
        "Interquartile mean of the normalised final return and share of tasks with a mean final cost within the limit; "
        "probability that a seed of Marvel is better than one of the line's algorithm (final, as above; by return; by less "
        'violation regret), mean over tasks. 95% intervals: by the seeds of these tasks; "other tasks": by the spread between the tasks as '
        "well, as for the mean over many tasks of this kind. Do not compare two lines that cover different tasks. The tables per task "
        "follow below.",
        "",
        *markdown(
            [
                "algorithm",
                "tasks (seeds)",
                "normalised return",
                "tasks safe",
                "P(Marvel better), final",
                "other tasks",
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
        published = [name.format(budget) for budget in BUDGETS for name, arm in RELEASE.items() if arm.script == "marvel"]
        for name in ("marvel", "marvel+fqe", "marvel+fresh", *published):
            if name not in task:
                continue
            cells = []
            for column in RANKS:
                before, after = measures.ranks(task[name], column).T
                change, seeds = spread(after - before), measures.finite(after - before).size
                cells.append("-" if change == "-" else f"{np.nanmean(before):.2f} → {np.nanmean(after):.2f}; {change} ({seeds})")
            rows.append([env, title(name), *cells])
    if not rows:
        return []
    drawn = figures.draw_alignment(tasks, folder / f"alignment{suffix}.png")
    return [
        "## Does pre-alignment improve the critics?",
        "",
        "Spearman rank correlation of Q and Qc with Monte-Carlo returns and costs of the policy, on states of its own and of "
        "random rollouts: before → after pre-alignment (means over seeds); mean change with its 95% interval over seeds, and (seeds). A "
        "correlation needs costs or returns that differ, so some seeds have none.",
        "",
        *markdown(["task", "algorithm", *RANKS.values()], rows),
        *([f"![Rank correlations before and after](alignment{suffix}.png)", ""] if drawn else []),
        "Data: the commands under each task below; table and figure: `make report`.",
        "",
    ]


def ladder(tasks: dict[str, Task], folder: Path, suffix: str) -> list[str]:
    """What carries the results: one table of LADDER's rungs on the tasks that have any but the suite itself, and a figure."""
    lines, shown = [], {}
    for env, task in tasks.items():
        steps = {f"{base}+{rung}".rstrip("+"): (rung, base) for rung in LADDER for base in RUNGS}
        steps = {name: step for name, step in steps.items() if name in task}
        if len({rung for rung, _ in steps.values()}) < 2:
            continue
        runs, rows = on_common_seeds(task, list(steps)), []
        if not runs:
            lines += [f"**{env}**: the rungs have no seed in common.", ""]
            continue
        for name, (rung, base) in steps.items():
            found = alive(runs[name])
            rows.append([
                LADDER[rung][0], RUNGS[base].title, str(len(runs[name].seeds)),
                " / ".join(number(measures.finite(found[f"offline_{key}"]).mean()) for key in ("return", "cost")),
                ratio(*within(runs[name])), spread(found["return"]),
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
        limit = next(iter(next(iter(tasks.values())).values())).cost_limit
        figures.draw_ladder(shown, folder / f"ladder{suffix}.png", limit)
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
    """The paper's own configuration: its arms (arms.RELEASE), by task and offline budget."""
    rows = []
    for env, task in tasks.items():
        for budget, (what, _) in BUDGETS.items():
            for name, arm in RELEASE.items():
                run, naive = task.get(name.format(budget)), f"naive_o2o+{budget}"
                if run is None:
                    continue
                found, row = alive(run), [env, what, arm.title, str(len(run.seeds))]
                row += [spread(found["offline_return"]), cost_spread(found["offline_cost"]), ratio(*within(run))]
                if run.name in OFFLINE:
                    rows.append(row + ["-"] * 5)
                    continue
                better = compared({env: task}, run.name, naive) if run.name != naive else {}
                costs = [cost_spread(found[key]) for key in ("cost", "early_cost", "train_cost")]
                rows.append([*row, spread(found["return"]), *costs, estimate(better["final"]) if better else "-"])
    if not rows:
        return []
    header = "task, offline phase, algorithm, seeds, offline return, offline cost, within the limit, return, cost, "
    header += "cost per training episode of the first fifth, of all, P(better than naive)"
    return [
        "## The paper's own configuration",
        "",
        "`--preset release`: no anchor, warm-up, reserve or cloning; the release's step sizes and update counts; at most 500 episodes. All "
        "arms of a task start from the same offline checkpoints. P: as *final* above.",
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
            costs = [cost_spread(found[key]) for key in ("cost", "early_cost", "train_cost")]
            offline = cost_spread(found["offline_cost"])
            rows.append([env, title(name), limit, str(len(run.seeds)), offline, ratio(*within(run)), spread(found["return"]), *costs])
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
            rows.append([title(name), seeds, f"diverged ({first['phase']}, step {first['gradient_steps']:,})", *[""] * 13])
            continue
        soon = " / ".join(number(measures.median(found[key])) for key in ("episodes_to_safe", "episodes_to_stay"))
        episodes = measures.finite(found["training_episodes"])
        script = ALGOS[name].script if name in ALGOS else name
        rows.append([
            title(name), seeds, spread(found["offline_return"]), cost_spread(found["offline_cost"]), spread(found["return"]),
            f"**{cost_spread(found['cost'])}**" if found["cost"].mean() <= run.cost_limit else cost_spread(found["cost"]),
            ratio(*within(run)), percent(found["share_above"]), cost_spread(found["worst_tenth"]),
            cost_spread(found["train_cost"]), cost_spread(found["early_cost"]), cost_spread(found["regret"]),
            f"{soon} of {number(episodes.max())}" if episodes.size else "-", spread(found["auc"]), spread(found["return"] / best),
            f"{' '.join(commit[:8] + '+' * commit.endswith('+') for commit in run.commits) or '?'}; {tried.get((script, env), 0)}",
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
    place, controls = folder / csvs.folder(env), [name for name in CONTROLS[1:] if name in task]
    for kind, what, drawn in (
        (
            "learning",
            "Evaluations over online environment steps",
            figures.draw_curves(task, PLAIN, place / f"learning{suffix}.png", best),
        ),
        (
            "controls",
            "Marvel and its controls",
            controls and figures.draw_curves(task, ["marvel", *controls], place / f"controls{suffix}.png", best),
        ),
        ("multiplier", "Training cost, multiplier and gains", figures.draw_multipliers(task, place / f"multiplier{suffix}.png")),
    ):
        if drawn:
            lines += [f"![{what} on {env}]({csvs.folder(env)}/{kind}{suffix}.png)", "", f"{what}. {data}; figure: `make report`.", ""]
    return lines + commands(task)


def commands(task: Task) -> list[str]:
    lines = ["<details><summary>Commands</summary>", ""]
    for name, run in task.items():
        lines.append(f"- {title(name)}, dataset {' and '.join(h or 'none' for h in run.dataset_hashes)}:")
        for part in run.about.get("runs", []):
            commits = ", resumed at ".join(maker.get("commit") or "?" for maker in (part, *part.get("resumed", ())))
            made = f"seeds {' '.join(map(str, part['seeds']))}; commit {commits}; {part.get('device')}"
            took = f"; {part['seconds']:,.0f} s" if part.get("seconds") else ""
            lines.append(f"  - `python {part.get('command')}` ({made}{took})")
        if not run.about:
            lines.append(f"  - unknown: no JSON beside {run.path.name}; configuration {run.rows[0]['config_hash']}")
    return [*lines, "", "</details>", ""]


def settings_tried(folder: Path) -> list[str]:
    """All rows of tried.csv, by task and script, in the order in which they were tried."""
    rows = sorted(csvs.tried(folder / "tried.csv"), key=lambda row: (row["env"], row["algo"]))
    if not rows:
        return []
    value = lambda row, key: number(float(row[key])) if row.get(key) else "-"
    keys = "return cost worst_cost train_cost first_fifth offline_return offline_cost diverged".split()
    share = lambda row: f"{float(row['share_safe']):.0%}" if row.get("share_safe") else "-"
    cells = [
        [row["env"], f"`{row['algo']} {row['arguments']}`", row["seeds"], share(row), *(value(row, key) for key in keys)] for row in rows
    ]
    header = "task, script and arguments, seeds, within the limit, return, cost, largest cost of a seed, cost per training episode, "
    header += "of the first fifth, offline return, offline cost, diverged"
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
        "Intervals are of 95%: of means over seeds the studentised bootstrap, of shares of seeds Wilson's, of probabilities of improvement",
        "Newcombe's (`results/measures.py`, which says how often they hold). Interquartile means and profiles have the percentile",
        "bootstrap, which is too narrow for few seeds. Intervals of costs are cut off at 0. Per seed:", "",
        *(f"- **{COLUMNS.get(key, key.replace('_', ' '))}**: {text}" for key, text in measures.MEANING.items()),
        "- **normalised return**: return / best return of a trajectory of the dataset whose cost is within the limit",
        "- **diverged**: seeds whose losses or parameters became non-finite; left out of means, but neither safe nor better than any other",
        "",
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
    """One line per algorithm: by task, return / cost at the end (number of seeds), and the cost per training episode."""
    runs, note = reported(folder)
    tasks = [env for env in ENVS if (env, "marvel", csvs.LIMIT) in runs]
    header, rows = ["algorithm"], []
    for env in tasks:
        header += [env, "per training episode"]
    for name in (name for name in COMPARED if any((env, name, csvs.LIMIT) in runs for env in tasks)):
        rows.append([title(name)])
        for env in tasks:
            found = alive(runs[env, name, csvs.LIMIT]) if (env, name, csvs.LIMIT) in runs else None
            ends = found and " / ".join(number(found[key].mean()) for key in ("return", "cost"))
            rows[-1] += [f"{ends} ({len(found['return'])})" if found else "-"]
            rows[-1] += [number(found["train_cost"].mean()) if found else "-"]
    return note + "\n".join(markdown(header, rows))


def overview(folder: Path) -> str:
    """By task, for the offline policy, Marvel and naive finetuning: share of seeds within the limit, mean return, cost of training.

    Of the seeds that all three have.
    """
    runs, note = reported(folder)
    names = ["cpq", "marvel", "naive_o2o"]
    rows = []
    for env in ENVS:
        if not all((env, name, csvs.LIMIT) in runs for name in names):
            continue
        row = [env]
        for name, run in on_common_seeds({name: runs[env, name, csvs.LIMIT] for name in names}, names).items():
            found = alive(run)
            row += [ratio(*within(run)), number(found["return"].mean())]
            row += [number(found["train_cost"].mean())] if name not in OFFLINE else []
        rows += [row] if len(row) > 1 else []
    header = ["task", "offline: safe", "return"]
    for name in names[1:]:
        header += [f"{title(name)}: safe", "return", "per training episode"]
    return note + "\n".join(markdown(header, rows))


MARKS = "<!-- made by `make report` -->\n", "<!-- until here -->\n"


def put_between_marks(text: str, table: str) -> str:
    """`text` with `table` instead of what stands between the MARKS."""
    before, _, rest = text.partition(MARKS[0])
    return before + MARKS[0] + table + MARKS[1] + rest.partition(MARKS[1])[2]


def main(arguments: list[str] | None = None) -> int:
    parser = csvs.Parser(__doc__)
    parser.add_argument("--results", type=Path, default=ROOT / "results", help="folder of ENV/ALGO.csv, where README.md is written")
    folder = parser.parse_args(arguments).results.resolve()
    text = report(folder)
    (folder / "README.md").write_text(text, encoding="utf-8")
    print(f"{folder / 'README.md'}: {text.count(chr(10))} lines")
    if folder == ROOT / "results":
        for page, table in ((ROOT / "algos" / "README.md", summary(folder)), (ROOT / "README.md", overview(folder))):
            page.write_text(put_between_marks(page.read_text(encoding="utf-8"), table), encoding="utf-8")
    return 0


if __name__ == "__main__":
    csvs.command(main)
