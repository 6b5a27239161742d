"""Tries settings on the seeds that settings may be chosen on, 0 to 9: `python results/tune.py TRIES.txt`; appends to results/tried.csv.

A line of TRIES.txt is a try: `ALGO ENV [ARGUMENTS...]`, for example `marvel SafetyPointRun --reserve 0.5`; `#` begins a comment.
A try that stands in tried.csv already, with the same seeds, is not run again, so that a list may be interrupted and go on.

    algo, env, arguments, seeds   what was run
    share_safe                    share of the seeds whose last evaluation costs at most the limit; a diverged one is not among them
    return, cost, worst_cost      of that evaluation: means over the seeds, and the largest cost of a seed
    train_cost, first_fifth       `train_cost` and `early_cost` of measures.py; where a fifth of the iterations is not a whole number,
                                  rows of commits before 2026-11-29 rounded it down
    offline_return, offline_cost  of the last evaluation before online training
    diverged                      seeds; the means are over the others
    minutes, commit               what it took (offline checkpoints that were there are not counted), and of which commit
"""

import argparse
import csv
import fcntl
import shlex
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from results import csvs
from results.comparisons import alive, within
from results.csvs import CHOSEN_ON, ROOT, BadInput, Run

TRIED = ROOT / "results" / "tried.csv"
MEASURED = {  # column: measure
    "return": "return", "cost": "cost", "train_cost": "train_cost", "first_fifth": "early_cost",
    "offline_return": "offline_return", "offline_cost": "offline_cost",
}  # fmt: skip


def outcome(run: Run) -> dict[str, float]:
    """The measured columns of a try (see above)."""
    found, kept = alive(run), len(run.seeds) - len(run.diverged)
    means = {column: found[key] for column, key in MEASURED.items() if not np.isnan(found[key]).any()} if kept else {}
    safe, seeds = within(run)
    shown = {"share_safe": safe / seeds} | ({"worst_cost": found["cost"].max()} if kept else {})
    return {k: round(float(np.mean(v)), 3) for k, v in (means | shown).items()} | {"diverged": len(run.diverged)}


def split(line: str, where: str) -> list[str]:
    """The words of a command line; BadInput for a quote that does not end."""
    try:
        return shlex.split(line, comments=True)
    except ValueError as error:
        raise BadInput(f"{where}: {line.strip()} ({error}): close it") from None


def attempt(algo: str, env: str, arguments: list[str], seeds: range, runs: Path) -> dict:
    """Runs a try; its row."""
    own = [word for word in arguments if word.partition("=")[0] in ("--env", "--seed", "--seeds", "--runs")]
    if own:
        raise BadInput(f"{algo} {env} {' '.join(arguments)}: {own[0]} is this script's to set, so that tries are on the seeds to choose on")
    words = ["--env", env, "--seed", str(seeds.start), "--seeds", str(len(seeds)), "--runs", str(runs), *arguments]
    start = time.monotonic()
    done = subprocess.run([sys.executable, ROOT / "algos" / f"{algo}.py", *words], capture_output=True, text=True)
    folder = Path(*(line.strip() for line in done.stdout.splitlines()[-1:]))  # a run's last line; also where every seed diverged
    run = csvs.load(folder) if (folder / "progress.csv").exists() else None
    if run is None or (done.returncode and len(run.diverged) < len(run.seeds)):
        said = " ".join(done.stderr.strip().splitlines()[-1:])
        raise BadInput(f"{algo} {env} {' '.join(arguments)}: exit code {done.returncode}: {said}")
    minutes = round((time.monotonic() - start) / 60, 2)
    return outcome(run) | {"minutes": minutes, "commit": run.about["runs"][0]["commit"]}


def main() -> int:
    parser = csvs.Parser(__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("tries", type=Path)
    parser.add_argument("--common", default="", help="arguments of all tries, e.g. '--final-eval-rounds 10'")
    parser.add_argument("--seeds", type=int, default=len(CHOSEN_ON), help="the first so many of the seeds to choose on")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / csvs.TRIES)
    parser.add_argument("--out", type=Path, default=TRIED)
    options = parser.parse_args()
    if not 0 < options.seeds <= len(CHOSEN_ON):
        raise BadInput(f"--seeds {options.seeds}: settings are chosen on 1 to {len(CHOSEN_ON)} seeds, {CHOSEN_ON[0]} to {CHOSEN_ON[-1]}")
    seeds = CHOSEN_ON[: options.seeds]
    try:
        lines = options.tries.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{options.tries}: not readable ({error}): name a text file with a try a line") from None
    failed = False
    for number, line in enumerate(lines, 1):
        try:
            words = split(line, f"{options.tries}, line {number}")
            if not words:
                continue
            if len(words) < 2:
                raise BadInput(f"{options.tries}, line {number}: {line.strip()}: must be ALGO ENV [ARGUMENTS...]")
            algo, env, *arguments = words + split(options.common, "--common")
            env = csvs.task(env)
            key = (algo, env, shlex.join(arguments), f"{seeds[0]}-{seeds[-1]}")
            if key in {tuple(row[c] for c in csvs.TRIED_KEY) for row in csvs.tried(options.out)}:
                continue
            row = dict(zip(csvs.TRIED_KEY, key)) | attempt(algo, env, arguments, seeds, options.runs)
        except BadInput as error:  # the others can still be tried
            print(f"error: {error}", file=sys.stderr)
            failed = True
            continue
        with open(options.out, "a", newline="") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # several lists may run at once
            writer = csv.DictWriter(file, csvs.TRIED)
            if not file.tell():
                writer.writeheader()
            writer.writerow(row)
        print({k: v for k, v in row.items() if k != "commit"}, flush=True)
    return int(failed)


if __name__ == "__main__":
    csvs.command(main)
