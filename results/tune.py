"""Tries settings on the seeds that settings may be chosen on, 0 to 9: `python results/tune.py TRIES.txt`; appends to results/tried.csv.

A line of TRIES.txt is a try: `ALGO ENV [ARGUMENTS...]`, for example `marvel SafetyPointRun --reserve 0.5`; `#` begins a comment.
A try that stands in tried.csv already, with the same seeds, is not run again, so that a list may be interrupted and go on.

    algo, env, arguments, seeds   what was run
    share_safe                    share of the seeds whose last evaluation costs at most the limit
    return, cost, worst_cost      of that evaluation: means over the seeds, and the largest cost of a seed
    train_cost, first_fifth       cost per online training episode: of all of them, and of the first fifth
    offline_return, offline_cost  of the last evaluation before online training
    diverged                      seeds
    minutes, commit               what it took (offline checkpoints that were there are not counted), and of which commit
"""

import argparse
import csv
import fcntl
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from results import csvs
from results.csvs import CHOSEN_ON, ROOT, BadInput, Run

TRIED = ROOT / "results" / "tried.csv"
COLUMNS = (
    "algo env arguments seeds share_safe return cost worst_cost train_cost first_fifth offline_return offline_cost diverged minutes commit"
).split()


def outcome(run: Run) -> dict[str, float]:
    """The measured columns of a try (see above), over the seeds that did not diverge."""
    finals, offline, costs = [], [], []
    for seed in (seed for seed in run.seeds if seed not in run.diverged):
        evals = run.of(seed, "eval")
        finals.append((evals[-1]["return"], evals[-1]["cost"]))
        before = [row for row in evals if row["phase"] != "online"][-1:]
        offline += [(row["return"], row["cost"]) for row in before]
        costs.append([row["cost"] for row in run.of(seed, "train") if row["phase"] == "online" and row["episodes"] > 0])
    if not finals:
        return {"diverged": len(run.diverged)}
    returns, ends = np.array(finals).T
    first = [c[: max(1, len(c) // 5)] for c in costs if c]
    found = {"share_safe": float(np.mean(ends <= run.cost_limit)), "return": returns.mean(), "cost": ends.mean(), "worst_cost": ends.max()}
    if first:
        found |= {"train_cost": np.mean(np.concatenate(costs)), "first_fifth": np.mean(np.concatenate(first))}
    if offline:
        found |= dict(zip(("offline_return", "offline_cost"), np.mean(offline, 0), strict=True))
    return {k: round(float(v), 3) for k, v in found.items()} | {"diverged": len(run.diverged)}


def tried(path: Path) -> set[tuple[str, ...]]:
    """(algo, env, arguments, seeds) of the tries in `path`."""
    if not path.exists():
        return set()
    with open(path, newline="") as file:
        return {tuple(row[c] for c in COLUMNS[:4]) for row in csv.DictReader(file)}


def attempt(algo: str, env: str, arguments: list[str], seeds: range, runs: Path) -> dict:
    """Runs a try; its row."""
    words = ["--env", env, "--seed", str(seeds.start), "--seeds", str(len(seeds)), "--runs", str(runs), *arguments]
    start = time.monotonic()
    with tempfile.TemporaryFile("w+") as errors:
        code = subprocess.run([sys.executable, ROOT / "algos" / f"{algo}.py", *words], stdout=subprocess.DEVNULL, stderr=errors).returncode
        errors.seek(0)
        said = errors.read().strip().splitlines()[-1:]
    if code:
        raise BadInput(f"{algo} {env} {' '.join(arguments)}: exit code {code}: {' '.join(said)}")
    folder = max((runs / csvs.folder(env) / algo).glob("*/config.json"), key=lambda path: path.stat().st_mtime).parent
    run = csvs.load(folder)
    minutes = round((time.monotonic() - start) / 60, 2)
    return outcome(run) | {"minutes": minutes, "commit": run.about["runs"][0]["commit"]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tries", type=Path)
    parser.add_argument("--common", default="", help="arguments of all tries, e.g. '--final-eval-rounds 10'")
    parser.add_argument("--seeds", type=int, default=len(CHOSEN_ON), help="the first so many of the seeds to choose on")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "tried")
    parser.add_argument("--out", type=Path, default=TRIED)
    options = parser.parse_args()
    if not 0 < options.seeds <= len(CHOSEN_ON):
        raise BadInput(f"--seeds {options.seeds}: settings are chosen on 1 to {len(CHOSEN_ON)} seeds, {CHOSEN_ON[0]} to {CHOSEN_ON[-1]}")
    seeds = CHOSEN_ON[: options.seeds]
    failed = False
    for line in options.tries.read_text().splitlines():
        words = shlex.split(line, comments=True)
        if not words:
            continue
        algo, env, *arguments = words + shlex.split(options.common)
        key = (algo, env, " ".join(arguments), f"{seeds[0]}-{seeds[-1]}")
        if key in tried(options.out):
            continue
        try:
            row = dict(zip(COLUMNS, key)) | attempt(algo, env, arguments, seeds, options.runs)
        except BadInput as error:  # the others can still be tried
            print(f"error: {error}", file=sys.stderr)
            failed = True
            continue
        with open(options.out, "a", newline="") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # several lists may run at once
            writer = csv.DictWriter(file, COLUMNS)
            if not file.tell():
                writer.writeheader()
            writer.writerow(row)
        print({k: v for k, v in row.items() if k != "commit"}, flush=True)
    return int(failed)


if __name__ == "__main__":
    csvs.command(main)
