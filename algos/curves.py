"""curves.png of a run folder, from its progress.csv and config.json alone: `python algos/curves.py RUN_FOLDER`."""

import csv
import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

PHASES = {"offline": "#d9d9d9", "vpa": "#cfe3f5", "online": "#ffffff"}


def read(path: Path) -> list[dict]:
    """The rows of a progress.csv, numbers as floats, absent values as NaN."""

    def value(column, x):
        if column in ("env", "algo", "phase", "event", "config_hash", "commit", "dataset_hash"):
            return x
        return float(x) if x else float("nan")

    with open(path, newline="") as file:
        return [{k: value(k, v) for k, v in row.items()} for row in csv.DictReader(file)]


def draw(folder: Path) -> Path:
    """Return, cost and multiplier over all phases; offline phases by gradient step, the online phase by environment step."""
    rows, config = read(folder / "progress.csv"), json.loads((folder / "config.json").read_text())
    limit, dataset = config["config"]["cost_limit"], config["dataset"] or {}
    phases = [p for p in PHASES if any(r["phase"] == p for r in rows)]
    share = {"offline": 1.0, "vpa": 0.6, "online": 2.4}
    clock = lambda r: r["env_steps" if r["phase"] == "online" else "gradient_steps"] / 1000
    evaluated = {"sample": "stochastic policy", "mean": "mean action"}[config["config"]["eval_policy"]]
    figure, axes = plt.subplots(
        3, len(phases), figsize=(10, 7), sharex="col", sharey="row", squeeze=False,
        width_ratios=[share[p] for p in phases], height_ratios=[3, 3, 1.5],
    )  # fmt: skip
    for column, phase in enumerate(phases):
        for axis, key in zip(axes[:, column], ("return", "cost", "multiplier")):
            axis.set_facecolor(PHASES[phase])
            for event, style in (("train", dict(color="C7", lw=0.8, alpha=0.7)), ("eval", dict(color="C0", lw=1.8, marker="o", ms=3))):
                if key == "multiplier" and event == "eval":
                    continue
                curves = {}
                for r in rows:
                    if r["phase"] == phase and r["event"] == event and np.isfinite(r[key]):
                        curves.setdefault(r["seed"], []).append((clock(r), r[key]))
                for curve in curves.values():
                    axis.plot(*zip(*curve), **(style | {"alpha": 0.35, "lw": 0.8, "ms": 2} if len(curves) > 1 else style))
                if len(curves) > 1 and len({len(c) for c in curves.values()}) == 1:
                    stacked = np.array(list(curves.values()))
                    axis.plot(stacked[0, :, 0], stacked[:, :, 1].mean(0), **style)
        axes[0, column].set_title({"offline": "offline", "vpa": "pre-alignment", "online": "online"}.get(phase, phase))
        axes[-1, column].set_xlabel(f"thousand {'environment' if phase == 'online' else 'gradient'} steps")
        if dataset.get("safe_return_range"):
            axes[0, column].axhspan(*dataset["safe_return_range"], color="C2", alpha=0.12, lw=0)
            axes[0, column].axhline(dataset["safe_return_p90"], color="C2", lw=1, ls=":")
        if np.isfinite(limit):
            axes[1, column].axhline(limit, color="C3", lw=1.2, ls="--")
    for axis, label in zip(axes[:, 0], ("episode return", "episode cost", "multiplier")):
        axis.set_ylabel(label)
    handles = [
        plt.Line2D([], [], color="C0", marker="o", ms=3, label=f"evaluation ({evaluated})"),
        plt.Line2D([], [], color="C7", label="training episodes (stochastic policy)"),
        plt.Line2D([], [], color="C3", ls="--", label=f"cost limit {limit:g}"),
    ]
    if dataset.get("safe_return_range"):
        label = "returns of the dataset's safe trajectories, 90th percentile dotted"
        handles.append(plt.Rectangle((0, 0), 1, 1, color="C2", alpha=0.2, label=label))
    figure.suptitle(f"{config['algo']} on {config['env']}")
    figure.legend(handles=handles, loc="lower center", ncol=2, fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    path = folder / "curves.png"
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


if __name__ == "__main__":
    print(draw(Path(sys.argv[1])))
