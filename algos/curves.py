"""Curves of runs, from their progress.csv and config.json alone, also while they train: `python -m algos.curves FOLDER...`.

One run folder gives the curves.png that training leaves in it; several of one task are drawn beside each other.
"""

import argparse
import csv
import io
import json
import sys
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from algos.checkpoint import write_atomically

PHASES = {"offline": "#d9d9d9", "vpa": "#cfe3f5", "online": "#ffffff"}
TITLES = {"offline": "offline", "vpa": "pre-alignment", "online": "online"}
SHARES = {"offline": 1.0, "vpa": 0.6, "online": 2.4}  # of the figure's width
TEXT = ("env", "algo", "phase", "event", "config_hash", "commit", "dataset_hash")
COLOURS = [f"C{i}" for i in (0, 1, 2, 4, 5, 6, 8, 9, 7)]  # without the limit's red


class CurvesError(ValueError):
    """A folder or file of which no curves can be drawn; the message is one line that names the mend."""


def clock(row: dict) -> float:
    """Thousand steps: environment steps of the online phase, gradient steps of the others, which have none."""
    return row["env_steps" if row["phase"] == "online" else "gradient_steps"] / 1000


class RunFolder(NamedTuple):
    """What a run has left so far."""

    folder: Path
    config: dict  # config.json
    rows: list[dict]  # of progress.csv: numbers as floats, absent values as NaN

    @property
    def diverged(self) -> set[int]:
        return {int(row["seed"]) for row in self.rows if row["event"] == "diverged"}

    def curves(self, phase: str, event: str, column: str) -> dict[int, np.ndarray]:
        """{seed: (n, 2)}: thousand steps and values."""
        found = {}
        for row in self.rows:
            if row["phase"] == phase and row["event"] == event and np.isfinite(row[column]):
                found.setdefault(int(row["seed"]), []).append((clock(row), row[column]))
        return {seed: np.array(points) for seed, points in found.items()}

    def running_cost(self, phase: str) -> dict[int, np.ndarray]:
        """{seed: (n, 2)}: thousand steps and the mean cost of all training episodes of the phase until then."""
        costs, episodes = self.curves(phase, "train", "cost"), self.curves(phase, "train", "episodes")
        spent = {seed: np.cumsum(costs[seed][:, 1] * episodes[seed][:, 1]) / np.cumsum(episodes[seed][:, 1]) for seed in costs}
        return {seed: np.stack([costs[seed][:, 0], mean], 1) for seed, mean in spent.items()}


def read(folder: Path) -> RunFolder:
    """The rows and config.json of a run folder; CurvesError if it is none. A last line that is being written is left out."""

    def value(column, x):
        return x if column in TEXT else float(x) if x else float("nan")

    path = Path(folder) / "progress.csv"
    try:
        text = path.read_bytes().decode()
        lines = list(csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1], newline="")))
        rows = [{k: value(k, v) for k, v in line.items()} for line in lines]
        config = json.loads((path.parent / "config.json").read_text())
        config["algo"], config["env"], config["config"]["cost_limit"], config["config"]["eval_policy"]
        if not all({"seed", "phase", "event", "return", "cost", "multiplier"} <= row.keys() for row in rows):
            raise KeyError
    except OSError as error:
        raise CurvesError(f"{error.filename}: {error.strerror}: name run folders, as in runs/ENV/ALGO/STAMP") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise CurvesError(f"{folder}: its progress.csv or config.json is not one of this suite, or damaged: leave it out") from None
    return RunFolder(path.parent, config, rows)


def mean(curves: list[np.ndarray]) -> np.ndarray:
    """(m, 2): the mean of curves (n, 2) at the steps that all of them have."""
    values = [dict(curve) for curve in curves]
    steps = sorted(set.intersection(*(set(curve) for curve in values)))
    return np.array([(step, np.mean([curve[step] for curve in values])) for step in steps]).reshape(-1, 2)


def plot_seeds(axis, curves: dict[int, np.ndarray], diverged: set[int], **style) -> None:
    """One line; of several seeds thin lines, and the mean of those that did not diverge."""
    for curve in curves.values():
        axis.plot(*curve.T, **(style | {"alpha": 0.35, "lw": 0.8, "ms": 2} if len(curves) > 1 else style))
    alive = [curve for seed, curve in curves.items() if seed not in diverged]
    if len(curves) > 1 and alive:
        axis.plot(*mean(alive).T, **style)


def panels(runs: list[RunFolder], labels: list[str], heights: list[float], costs: list[int]):
    """(figure, {phase: its axes}): a column for each phase, a row for each label; the cost limits are lines in the rows `costs`."""
    rows = [row for run in runs for row in run.rows]
    phases = [phase for phase in PHASES if any(row["phase"] == phase for row in rows)]
    if not phases:
        raise CurvesError(f"{runs[0].folder}: has no rows yet: wait for the first evaluation")
    figure, axes = plt.subplots(
        len(labels), len(phases), figsize=(10, 1 + sum(heights)), sharex="col", sharey="row", squeeze=False,
        width_ratios=[SHARES[phase] for phase in phases], height_ratios=heights,
    )  # fmt: skip
    for column, phase in zip(axes.T, phases):
        for axis in column:
            axis.set_facecolor(PHASES[phase])
        for limit in cost_limits(runs):
            for row in costs:
                column[row].axhline(limit, color="C3", lw=1.2, ls="--")
        steps = [clock(row) for row in rows if row["phase"] == phase]
        margin = 0.04 * (max(steps) - min(steps)) or 1.0
        column[0].set_xlim(min(steps) - margin, max(steps) + margin)
        column[0].locator_params(axis="x", nbins=max(2, round(8 * SHARES[phase] / sum(SHARES[p] for p in phases))))
        column[0].set_title(TITLES[phase])
        column[-1].set_xlabel(f"thousand\n{'environment' if phase == 'online' else 'gradient'} steps")
    for axis, label in zip(axes[:, 0], labels):
        axis.set_ylabel(label)
    return figure, dict(zip(phases, axes.T))


def cost_limits(runs: list[RunFolder]) -> list[float]:
    """Those that are finite, in order."""
    return sorted({limit for run in runs if np.isfinite(limit := run.config["config"]["cost_limit"])})


def limit_handles(runs: list[RunFolder]) -> list:
    return [plt.Line2D([], [], color="C3", ls="--", label=f"cost limit {limit:g}") for limit in cost_limits(runs)]


def save(figure, title: str, handles: list, path: Path) -> Path:
    """Legend and title; writes the picture atomically."""
    figure.suptitle(title)
    rows = -(-len(handles) // 2)
    figure.legend(handles=handles, loc="lower center", ncol=2, fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, (0.1 + 0.18 * rows) / figure.get_figheight(), 1, 1))
    figure.align_ylabels()
    try:
        write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=110, format=path.suffix[1:]))
    finally:
        plt.close(figure)
    return path


def draw(folder: Path, path: Path | None = None) -> Path:
    """Return, cost and multiplier of one run over all phases, to FOLDER/curves.png or `path`; the path."""
    run = read(folder)
    dataset = run.config["dataset"] or {}
    evaluated = {"sample": "stochastic policy", "mean": "mean action"}[run.config["config"]["eval_policy"]]
    figure, axes = panels([run], ["episode return", "episode cost", "multiplier"], [2.4, 2.4, 1.2], [1])
    styles = {"train": dict(color="C7", lw=0.8, alpha=0.7), "eval": dict(color="C0", lw=1.8, marker="o", ms=3)}
    for phase, column in axes.items():
        for axis, key in zip(column, ("return", "cost", "multiplier")):
            for event, style in styles.items():
                if key != "multiplier" or event == "train":
                    plot_seeds(axis, run.curves(phase, event, key), run.diverged, **style)
        if dataset.get("safe_return_range"):
            column[0].axhspan(*dataset["safe_return_range"], color="C2", alpha=0.12, lw=0)
            column[0].axhline(dataset["safe_return_p90"], color="C2", lw=1, ls=":")
    handles = [
        plt.Line2D([], [], color="C0", marker="o", ms=3, label=f"evaluation ({evaluated})"),
        plt.Line2D([], [], color="C7", label="training episodes (stochastic policy)"),
        *limit_handles([run]),
    ]
    if dataset.get("safe_return_range"):
        label = "returns of the dataset's safe trajectories, 90th percentile dotted"
        handles.append(plt.Rectangle((0, 0), 1, 1, color="C2", alpha=0.2, label=label))
    return save(figure, f"{run.config['algo']} on {run.config['env']}", handles, path or run.folder / "curves.png")


def compare(folders: list[Path], path: Path) -> Path:
    """Evaluations, cost of the training episodes, and multiplier of several runs of one task, each in a colour of its own."""
    runs = [read(folder) for folder in folders]
    tasks = sorted({run.config["env"] for run in runs})
    if len(tasks) > 1:
        raise CurvesError(f"runs of {' and '.join(tasks)}: name runs of one task only, returns of several do not compare")
    if len(runs) > len(COLOURS):
        raise CurvesError(f"{len(runs)} runs: name at most {len(COLOURS)}, or nobody can tell their colours apart")
    labels = ["return,\nevaluations", "cost,\nevaluations", "mean cost of the\ntraining episodes", "multiplier"]
    figure, axes = panels(runs, labels, [2.2, 2.2, 1.8, 1.2], [1, 2])
    for phase, column in axes.items():
        for run, colour in zip(runs, COLOURS):
            for axis, key in zip(column, ("return", "cost")):
                plot_seeds(axis, run.curves(phase, "eval", key), run.diverged, color=colour, lw=1.6, marker="o", ms=3)
            plot_seeds(column[2], run.running_cost(phase), run.diverged, color=colour, lw=1.6)
            plot_seeds(column[3], run.curves(phase, "train", "multiplier"), run.diverged, color=colour, lw=1.6)
    for column in axes.values():
        for axis in column[1:3]:  # some cost twenty times the limit
            axis.set_yscale("symlog", linthresh=max([1.0, *cost_limits(runs)]))
            axis.yaxis.set_major_formatter("{x:g}")
            axis.set_ylim(bottom=0)
    handles = [plt.Line2D([], [], color=colour, marker="o", ms=3, label=label) for colour, label in zip(COLOURS, names(runs))]
    return save(figure, tasks[0], handles + limit_handles(runs), path)


def names(runs: list[RunFolder]) -> list[str]:
    """A label for each run: its algorithm and number of seeds, and its folder where several are of one algorithm."""
    algos = [run.config["algo"] for run in runs]
    labels = []
    for run, algo in zip(runs, algos):
        seeds = len({row["seed"] for row in run.rows})
        stamp = f" {run.folder.resolve().name}" if algos.count(algo) > 1 else ""
        ending = "" if "seconds" in run.config else ", not finished"
        labels.append(f"{algo}{stamp} ({seeds} seed{'' if seeds == 1 else 's'}{ending})")
    return labels


class Parser(argparse.ArgumentParser):
    """Command lines whose errors are one line."""

    def error(self, message: str):
        raise CurvesError(message)


def main(words: list[str] | None = None) -> None:
    parser = Parser(prog="python -m algos.curves", description=(__doc__ or "").strip())
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="run folders, runs/ENV/ALGO/STAMP")
    help = "picture to write: .png, .pdf or .svg (default: curves.png in the run folder, or of several runs in this one)"
    parser.add_argument("--out", type=Path, help=help)
    try:
        args = parser.parse_args(words)
        out = args.out or (Path("curves.png") if len(args.folders) > 1 else None)
        if out and out.suffix not in (".png", ".pdf", ".svg"):
            raise CurvesError(f"--out {out}: must end in .png, .pdf or .svg")
        if out and not out.parent.is_dir():
            raise CurvesError(f"--out {out}: there is no folder {out.parent}: make it first")
        print(compare(args.folders, out) if out and len(args.folders) > 1 else draw(args.folders[0], out))
    except CurvesError as error:
        sys.exit(print(f"error: {error}", file=sys.stderr) or 2)
    except OSError as error:
        sys.exit(
            print(f"error: {error.filename2 or error.filename or out}: {error.strerror}: name a place that can be written", file=sys.stderr)
            or 2
        )


if __name__ == "__main__":
    main()
