"""Compares fresh runs with the committed baselines: `make diff`; `make accept` makes them the baselines.

    python results/diff.py                      # newest finished runs in runs/ against results/ENV/ALGO.csv
    python results/diff.py A.csv B.csv          # any two, of baselines or run folders: is B the same as A?
    python results/diff.py --accept --envs ENV  # runs/ becomes results/; seeds of the same configuration are merged

Four measures (results/measures.py): return, auc, cost, training_cost. `worse` and `better`: the bootstrap interval over seeds
of the difference of means excludes 0 and the difference exceeds --margin; of costs, only what exceeds the limit can be worse.
`unclear`: one seed on a side. Exit code 1 if anything is worse or more seeds diverged.
"""

import math
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from results import csvs, measures
from results.csvs import ROOT, Run

MEASURES = ("return", "auc", "cost", "training_cost")


def compare(baseline: Run, fresh: Run, confidence: float, margin: float) -> list[tuple]:
    """(measure, baseline mean, fresh mean, low, high, verdict) for each measure that either has."""
    old, new = measures.per_seed(baseline), measures.per_seed(fresh)
    out = []
    for key in MEASURES:
        a, b = measures.finite(old[key]), measures.finite(new[key])
        if not a.size and not b.size:
            continue
        low, high = measures.difference(a, b, confidence)
        if not a.size or not b.size:
            verdict = "missing" if a.size else "new"
        elif a.size == b.size and np.array_equal(a, b):
            verdict, low, high = "same", 0.0, 0.0
        elif math.isnan(low):
            verdict = "unclear"
        else:
            allowed = {"cost": fresh.cost_limit, "training_cost": fresh.cost_limit * _mean(new["training_episodes"])}.get(key)
            verdict = judge(a.mean(), b.mean(), low, high, allowed, margin)
        out.append((key, _mean(a), _mean(b), low, high, verdict))
    return out


def judge(old: float, new: float, low: float, high: float, allowed: float | None, margin: float) -> str:
    """same, better or worse. `allowed`: the cost that may be incurred; None for returns, of which more is better."""
    if low <= 0 <= high or abs(new - old) <= margin * max(abs(old), allowed or 0):
        return "same"
    if allowed is None:
        return "better" if new > old else "worse"
    if new > old:
        return "worse" if new > allowed else "same"
    return "better" if old > allowed else "same"


def _mean(values) -> float:
    values = measures.finite(values)
    return values.mean() if values.size else math.nan


def cautions(baseline: Run, fresh: Run) -> list[str]:
    """What is not alike between the two, so that nothing is compared silently."""
    out = []
    if (baseline.env, baseline.name) != (fresh.env, fresh.name):
        out.append(f"other experiment: {baseline.env} {baseline.name} -> {fresh.env} {fresh.name}")
    if baseline.cost_limit != fresh.cost_limit:
        out.append(f"other cost limit: {baseline.cost_limit:g} -> {fresh.cost_limit:g}")
    if baseline.dataset_hashes != fresh.dataset_hashes:
        named = lambda run: " and ".join(h or "none" for h in run.dataset_hashes)
        out.append(f"other dataset: {named(baseline)} -> {named(fresh)}")
    a, b = baseline.about.get("config"), fresh.about.get("config")
    if a is not None and b is not None:
        changed = [f"{k} {a.get(k, 'absent')} -> {b.get(k, 'absent')}" for k in sorted(a.keys() | b.keys()) if a.get(k) != b.get(k)]
        if changed:
            out.append(f"other configuration: {', '.join(changed[:6])}{f' and {len(changed) - 6} more' if len(changed) > 6 else ''}")
    elif {r["config_hash"] for r in baseline.rows} != {r["config_hash"] for r in fresh.rows}:
        out.append("other configuration: the hashes differ and there is no JSON beside one of them to say how")
    if baseline.unseen != fresh.unseen:
        kind = lambda run: "unseen" if run.unseen else "for choosing settings"
        out.append(f"other kind of seeds: {kind(baseline)} -> {kind(fresh)}")
    if len(fresh.seeds) < len(baseline.seeds):
        out.append(f"fewer seeds in the fresh run: {len(baseline.seeds)} -> {len(fresh.seeds)}")
    elif len(baseline.seeds) < len(fresh.seeds):
        out.append(f"fewer seeds in the baseline: {len(baseline.seeds)} -> {len(fresh.seeds)}")
    elif set(baseline.seeds) != set(fresh.seeds):
        out.append(f"other seeds: {_listed(baseline.seeds)} -> {_listed(fresh.seeds)}")
    for label, run in (("baseline", baseline), ("fresh run", fresh)):
        if run.diverged:
            where = ", ".join(f"{s} ({row['phase']}, step {row['gradient_steps']})" for s, row in sorted(run.diverged.items()))
            out.append(f"diverged in the {label}: seed {where}")
        out += [f"in the {label} {line}" for line in mixtures(run)]
    return out


def mixtures(run: Run) -> list[str]:
    """A line for each sequence of commits that went on with one another's seeds."""
    found: dict[str, list[int]] = {}
    for seed, commits in run.mixed.items():
        found.setdefault(" -> ".join(commits), []).append(seed)
    return [f"seeds {_listed(seeds)} are of several commits, resumed in between: {commits}" for commits, seeds in found.items()]


def number(x: float) -> str:
    return "-" if math.isnan(x) else f"{x:.4g}" if abs(x) < 1e4 else f"{x:.0f}"


def table(pairs: list[tuple[str, Run | None, Run | None]], confidence: float, margin: float) -> tuple[list[str], int]:
    """(lines, number of verdicts `worse`) for (label, baseline, fresh) triples; either may be None."""
    lines = [("experiment", "seeds", "measure", "baseline", "fresh", f"difference, {confidence:.0%}", "verdict")]
    notes, worse, compared = [], 0, 0
    for label, baseline, fresh in pairs:
        if baseline is None or fresh is None:
            there = baseline or fresh
            assert there is not None
            verdict = "missing" if fresh is None else "new (no baseline)"
            seeds = f"{len(there.seeds)} -> -" if fresh is None else f"- -> {len(there.seeds)}"
            lines.append((label, seeds, "", "", "", "", verdict))
            continue
        odd = cautions(baseline, fresh)
        notes += [f"{label}: {note}" for note in odd]
        verdicts = compare(baseline, fresh, confidence, margin)
        if len(fresh.diverged) > len(baseline.diverged):
            verdicts.append(("diverged seeds", len(baseline.diverged), len(fresh.diverged), math.nan, math.nan, "worse"))
        for i, (key, old, new, low, high, verdict) in enumerate(verdicts):
            between = "" if math.isnan(low) else f"{number(low)} to {number(high)}"
            first = (label, f"{len(baseline.seeds)} -> {len(fresh.seeds)}") if i == 0 else ("", "")
            lines.append((*first, key, number(old), number(new), between, verdict + (" *" if odd else "")))
            worse += verdict == "worse"
            compared += not math.isnan(low)
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines]
    if notes:
        text += ["", "* not made alike:", *(f"  {note}" for note in notes)]
    chance = compared * (1 - confidence) / 2
    return text + ["", f"{worse} worse of {compared} compared; about {chance:.1f} by chance alone if nothing had changed"], worse


def accept(fresh: dict[tuple, Run], baselines: dict[tuple, Run], results: Path, replace: bool = False) -> None:
    """Writes fresh runs as baselines; keeps a baseline's further seeds if configuration, dataset and kind of seeds are the same.

    BadInput, before anything is written, where they are not; with `replace` the baseline is replaced.
    """
    for key, run in fresh.items():
        old = baselines.get(key)
        if old and old.unseen and not run.unseen:
            raise csvs.BadInput(
                f"{run.path}: seeds that settings may be chosen on do not replace the unseen ones of {old.path}: "
                f"run seeds from {csvs.UNSEEN} on (make sweep), or name other --envs or --algos"
            )
        if old and not csvs.same_experiment(old, run) and not replace:
            raise csvs.BadInput(
                f"{run.path}: of another configuration or dataset than {old.path}, whose seeds {_listed(old.seeds)} would be lost: "
                "`make diff` says what differs; name other --envs or --algos, or add --replace"
            )
    for key, run in sorted(fresh.items()):
        old = baselines.get(key)
        if old and csvs.same_experiment(old, run):
            merged = csvs.merge(run, old)
            what = f"seeds {_listed(run.seeds)}" + (f", kept {_listed(set(merged.seeds) - set(run.seeds))}" if merged is not run else "")
        else:
            merged, what = (
                run,
                f"seeds {_listed(run.seeds)}" + (", replaces another configuration, dataset or kind of seeds" if old else ", new"),
            )
        print(f"{csvs.write(merged, results).relative_to(results)}: {what}", *mixtures(run), sep="\n  warning: ")


def _listed(seeds) -> str:
    return " ".join(map(str, sorted(seeds)))


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code: 1 if something is worse; raises csvs.BadInput."""
    parser = csvs.Parser(__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", type=Path, metavar="CSV", help="two CSVs or run folders to compare, the baseline first")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs", help="where the fresh runs are")
    parser.add_argument("--results", type=Path, default=ROOT / "results", help="where the baselines are")
    parser.add_argument("--envs", nargs="+", type=csvs.task, help="only these tasks")
    parser.add_argument("--algos", nargs="+", help="only these algorithms")
    parser.add_argument("--confidence", type=float, default=0.99, help="of the intervals (default 0.99: many are compared at once)")
    parser.add_argument("--margin", type=float, default=0.02, help="relative difference that is never worse nor better (default 0.02)")
    parser.add_argument("--accept", action="store_true", help="write the fresh runs to --results instead of comparing")
    parser.add_argument("--replace", action="store_true", help="with --accept: also replace baselines of another configuration")
    options = parser.parse_args(arguments)
    if not 0 < options.confidence < 1 or not options.margin >= 0:
        parser.error("--confidence must be between 0 and 1 and --margin not negative")
    if options.files:
        if len(options.files) != 2 or options.accept:
            parser.error("name two files to compare, or none (and none with --accept)")
        baseline, fresh = map(csvs.load, options.files)
        pairs: list[tuple[str, Run | None, Run | None]]
        pairs = [(f"{fresh.env} {csvs.stem(fresh.name, fresh.cost_limit)}", baseline, fresh)]
    else:
        new = csvs.fresh(options.runs, options.envs, options.algos)
        old = csvs.baselines(options.results, options.envs, options.algos)
        if not new:
            of = " of " + ", ".join([*(options.envs or []), *(options.algos or [])]) if options.envs or options.algos else ""
            parser.error(f"{options.runs}: no finished run{of}: make some with `make sweep` or `make run`, or name the folder with --runs")
        for place, flag, names in ((0, "--envs", options.envs), (1, "--algos", options.algos)):
            for name in set(names or ()) - {key[place] for key in new.keys() | old.keys()}:
                parser.error(f"{flag} {name}: neither a finished run in {options.runs} nor a baseline in {options.results} is of it")
        if options.accept:
            accept(new, old, options.results, options.replace)
            return 0
        pairs = [(f"{key[0]} {csvs.stem(*key[1:])}", old.get(key), new.get(key)) for key in sorted(old.keys() | new.keys())]
    lines, worse = table(pairs, options.confidence, options.margin)
    print(*lines, sep="\n")
    return 1 if worse else 0


if __name__ == "__main__":
    csvs.command(main)
