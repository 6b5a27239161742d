"""Prints the README's results table from results/ENV/ALGO/progress.csv and config.json: `python results/summary.py`."""

import csv
import json
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent


def cell(rows: list[dict], key: str) -> str:
    """Mean +- standard deviation over the seeds of each seed's last value."""
    last = {row["seed"]: float(row[key]) for row in rows if row[key]}
    return f"{np.mean(list(last.values())):.4g} +- {np.std(list(last.values())):.2g}" if last else "-"


def main() -> None:
    print("| task | algorithm | seeds | env steps | safe P90 of data | phase | return | cost | rank Q own / random | rank Qc own / random |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for path in sorted(HERE.glob("*/*/progress.csv")):
        with open(path, newline="") as file:
            rows = list(csv.DictReader(file))
        about = json.loads(path.with_name("config.json").read_text())
        p90 = (about["dataset"] or {}).get("safe_return_p90")
        for phase in dict.fromkeys(row["phase"] for row in rows):
            evals = [row for row in rows if (row["phase"], row["event"]) == (phase, "eval")]
            ranks = [row for row in rows if (row["phase"], row["event"]) == (phase, "rank")]
            pair = lambda q: " / ".join(cell(ranks, f"rank_{q}_{where}") for where in ("policy", "random")) if ranks else "-"
            steps = max((int(row["env_steps"]) for row in evals), default=0)
            print(
                f"| {about['env']} | {about['algo']} | {len({row['seed'] for row in rows})} | {steps:,} | {p90:.0f} | {phase} "
                f"| {cell(evals, 'return')} | {cell(evals, 'cost')} | {pair('q')} | {pair('qc')} |"
            )


if __name__ == "__main__":
    main()
