"""Lists the tasks, `python -m envs`, or measures this machine's backends on one: `python -m envs --speed SafetyAntRun --seeds 32`."""

import argparse
import sys
import time
from pathlib import Path

import jax

import envs
from envs import physics_warp, reference

DATA = Path(__file__).resolve().parents[1] / "data"


def dataset(name: str) -> str:
    """Where the task's dataset is and its size in MB, whether a training run makes it, or "-"."""
    path = DATA / f"{name}.hdf5"
    if path.exists():
        return f"data/{path.name} ({path.stat().st_size / 1e6:.1f} MB)"
    return "made at first use" if (DATA / "policies" / f"{name}.safetensors").exists() else "-"


def table() -> list[tuple[str, ...]]:
    """A header and one row per task, all cells text."""
    rows: list[tuple[str, ...]] = [("task", "Safety-Gymnasium id", "obs", "actions", "T", "backends", "cost is 1 where", "dataset")]
    for name, task in envs.TASKS.items():
        env = envs.make(name, backend="mujoco")
        sizes = (str(n) for n in (env.obs_size, env.action_size, env.horizon))
        rows.append((name, task.reference_id or "-", *sizes, ", ".join(envs.BACKENDS), task.cost, dataset(name)))
    return rows


STEPS, PATIENCE = 10, 60.0  # environment steps of a call; seconds that one may take


def available() -> list[str]:
    """The backends of native tasks that can run here."""
    try:
        physics_warp.check()
    except physics_warp.Unavailable as error:
        print(f"without warp: {error}", file=sys.stderr)
        return [b for b in envs.BACKENDS if b not in ("warp", reference.BACKEND)]
    return [b for b in envs.BACKENDS if b != reference.BACKEND]


def speed(env: envs.Env, n: int, seconds: float = 2.0) -> float:
    """Environment steps per second of `n` environments under random actions, in a jitted scan: the best call of `seconds`."""

    @jax.jit
    def call(state, key):
        def step(state, key):
            action = jax.random.uniform(key, (n, env.action_size), minval=env.action_low, maxval=env.action_high)
            state, t = env.step(state, action)
            return state, t.reward.sum()

        return jax.lax.scan(step, state, jax.random.split(key, STEPS))

    state = jax.jit(env.reset)(jax.random.split(jax.random.key(0), n))[0]
    state = jax.block_until_ready(call(state, jax.random.key(1)))[0]  # compiles
    best, ends = float("inf"), time.perf_counter() + seconds
    while best == float("inf") or time.perf_counter() < ends:
        start = time.perf_counter()
        state = jax.block_until_ready(call(state, jax.random.key(2)))[0]
        best = min(best, time.perf_counter() - start)
    return n * STEPS / best


def show_speed(name: str, seeds: int) -> None:
    """A line per backend and number of environments: what Marvel collects with, and a large batch."""
    if reference.wanted(name, None, {task.reference_id for task in envs.TASKS.values()}):
        raise envs.UnknownName(f"{name} has one backend, its own package: name a native task, {', '.join(envs.TASKS)}")
    name = envs.resolve(name)
    print(f"{name}, environment steps/s on {jax.devices()[0].device_kind}")
    for backend in available():
        env, rate = envs.make(name, backend), float("inf")
        for n in (5 * seeds, 4096):
            if n * STEPS / rate > PATIENCE:
                print(f"{backend:8s} {n:6d} environments  not measured: a call of {STEPS} steps would take over {PATIENCE:.0f} s")
                continue
            rate = speed(env, n)
            print(f"{backend:8s} {n:6d} environments  {rate:12,.0f}", flush=True)
    print(f"without --backend: {envs.fastest(name)}")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m envs", description=__doc__)
    parser.add_argument("--speed", metavar="TASK", help="steps/s of each backend that runs here, and which of them is the default")
    parser.add_argument("--seeds", type=int, default=1, help="seeds for --speed; each collects with 5 environments")
    options = parser.parse_args(arguments)
    if options.seeds < 1:
        parser.error(f"--seeds {options.seeds}: must be positive")
    if options.speed:
        try:
            return show_speed(options.speed, options.seeds)
        except envs.UnknownName as error:
            parser.error(str(error))
    rows = table()
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())
    print("An environment of your own, registered with gymnasium: --env module:id. envs/README.md says what it must do.")


if __name__ == "__main__":
    main()
