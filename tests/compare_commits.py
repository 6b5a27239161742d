"""Do two commits compute the same numbers? `python tests/compare_commits.py OLD [NEW]` (default NEW: the working tree).

Runs every algorithm of both on SafetyPointRun, two seeds, short budgets, on one core, and compares progress.csv row by row, digit
for digit, in all columns but commit and config_hash. Exits 1 where something differs. Takes about ten minutes.
"""

import argparse
import csv
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
EVAL = "--eval-episodes 4 --final-eval-rounds 2"
OFFLINE = EVAL + " --offline-steps 1000 --offline-batch-size 64 --offline-evals 2"
ONLINE = OFFLINE + " --iterations 4 --actor-warmup 1 --updates-per-iter 20 --batch-size 32 --evals 2"
VPA = ONLINE + " --vpa-steps 1000 --vpa-batch-size 32 --rank-points 4"
JOBS = {
    "cpq": OFFLINE, "bear_lag": OFFLINE, "bc_safe": OFFLINE, "marvel": VPA, "naive_o2o": ONLINE, "jsrl": ONLINE, "pex": ONLINE,
    "so2": ONLINE, "sac_lag": EVAL + " --env-steps 6000 --evals 2 --batch-size 32",
    "wsrl": ONLINE, "cal": ONLINE, "cpq as released": "--preset release " + OFFLINE, "marvel as released": "--preset release " + VPA,
    "marvel from bear_lag": VPA + " --offline bear_lag --replay mixed --critics fresh",
}  # fmt: skip


def rows(tree: Path, runs: Path, job: str) -> list[dict]:
    """The rows of a run of `job` by the checkout `tree`."""
    algo = job.split()[0]
    before = set((runs / "SafetyPointRun" / algo).glob("*"))
    command = [sys.executable, f"algos/{algo}.py", "--env", "SafetyPointRun", "--seeds", "2", "--runs", str(runs), *JOBS[job].split()]
    one_core = lambda: os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # XLA splits work by the number of cores
    subprocess.run(command, cwd=tree, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, preexec_fn=one_core)
    (folder,) = set((runs / "SafetyPointRun" / algo).glob("*")) - before
    with open(folder / "progress.csv", newline="") as file:
        return [{k: v for k, v in row.items() if k not in ("commit", "config_hash")} for row in csv.DictReader(file)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("old", help="a commit")
    parser.add_argument("new", nargs="?", help="a commit (default: the working tree)")
    options = parser.parse_args()
    failed = False
    with tempfile.TemporaryDirectory() as place:
        trees = {}
        for side, commit in (("old", options.old), ("new", options.new)):
            trees[side] = Path(place) / side if commit else ROOT
            if commit:
                subprocess.run(["git", "-C", str(ROOT), "worktree", "add", "-f", "--detach", str(trees[side]), commit], check=True)
        try:
            for job in JOBS:
                old, new = (rows(tree, Path(place) / f"runs-{side}", job) for side, tree in trees.items())
                pairs = zip(old, new, strict=False)
                differ = [(i, k, a.get(k), b.get(k)) for i, (a, b) in enumerate(pairs) for k in a.keys() | b.keys() if a.get(k) != b.get(k)]
                same = not differ and len(old) == len(new)
                failed |= not same
                what = f"{len(new)} rows equal" if same else f"{len(old)} and {len(new)} rows, {len(differ)} values differ: {differ[:3]}"
                print(f"{job:22s} {what}", flush=True)
        finally:
            for side, commit in (("old", options.old), ("new", options.new)):
                if commit:
                    subprocess.run(["git", "-C", str(ROOT), "worktree", "remove", "--force", str(trees[side])], check=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
