"""Lists the tasks: `python -m envs`."""

from pathlib import Path

import envs

DATA = Path(__file__).resolve().parents[1] / "data"


def dataset(name: str) -> str:
    """Where the task's dataset is and its size in MB, or "-"."""
    path = DATA / f"{name}.hdf5"
    return f"data/{path.name} ({path.stat().st_size / 1e6:.1f} MB)" if path.exists() else "-"


def table() -> list[tuple[str, ...]]:
    """A header and one row per task, all cells text."""
    rows: list[tuple[str, ...]] = [("task", "Safety-Gymnasium id", "obs", "actions", "T", "backends", "cost is 1 where", "dataset")]
    for name, task in envs.TASKS.items():
        env = envs.make(name, backend="mujoco")
        sizes = (str(n) for n in (env.obs_size, env.action_size, env.horizon))
        rows.append((name, task.reference_id, *sizes, ", ".join(envs.BACKENDS), task.cost, dataset(name)))
    return rows


def main() -> None:
    rows = table()
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())


if __name__ == "__main__":
    main()
