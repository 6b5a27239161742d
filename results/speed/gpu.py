"""The physics backends on one GPU: `python results/speed/gpu.py --minutes 6`; writes gpu.csv and gpu_episodes.csv beside this file.

gpu.csv           environment steps per second inside env.step (observations, rewards, costs and restarts), random actions, a jitted
                  scan: the best of the calls that fit into --seconds. compile_s is XLA's tracing and compiling, first_s the first
                  call, in which Warp compiles or loads its kernels. `options` names Warp's graph mode and the compiler options
                  that are not the defaults.
gpu_episodes.csv  AntRun's first episodes under random actions on Warp and on C MuJoCo: means with 95% intervals (1.96 standard
                  errors), each backend with the same keys.

Each backend and task is measured in a process of its own, which is ended when its share of the time is over; rows are written as
they come, the most important first. A row without `steps_per_s` says in `note` why.
"""

import argparse
import csv
import importlib.metadata
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT))
# A script's own folder comes first on the path, where the neighbouring envs.py would be taken for the package `envs`.
sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != HERE]

ANT, CHEETAH, POINT, CAR = "SafetyAntRun", "SafetyHalfCheetahVelocity", "SafetyPointRun", "SafetyCarRun"
# (backend, task, numbers of environments or None for --envs, the most seconds), the most important first; "episodes" compares.
JOBS = (
    ("warp", ANT, None, 150),
    ("warp", CHEETAH, None, 90),
    ("episodes-warp", ANT, None, 90),
    ("episodes-mujoco", ANT, None, 60),
    ("mjx", CHEETAH, None, 60),
    ("mjx", POINT, None, 60),
    ("warp", POINT, None, 60),
    ("warp", CAR, None, 90),
    ("mujoco", ANT, 160, 30),
    ("mujoco", CHEETAH, 160, 25),
    ("mujoco", POINT, 160, 25),
    ("mujoco", CAR, 160, 25),
    ("mjx", CAR, None, 90),
    ("mjx", ANT, None, 180),
)
COLUMNS = ("task", "backend", "envs", "options", "steps_per_s", "ms_per_step", "compile_s", "first_s", "device", "versions", "note")
EPISODES = ("task", "backend", "episodes", "quantity", "mean", "low", "high", "device", "versions")
STEPS = 20  # environment steps in a call


def versions() -> str:
    names = ("jax", "mujoco", "mujoco-mjx", "warp-lang")
    found = []
    for name in names:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"{name} absent")
    return ", ".join([*found, f"Python {platform.python_version()}"])


def steps_of(env, steps: int):
    """A function of (state, key) that takes `steps` random steps and sums what came of them."""
    import jax
    import jax.numpy as jnp

    def call(state, key):
        def step(state, key):
            shape = (*state.t.shape, env.action_size)
            action = jax.random.uniform(key, shape, minval=env.action_low, maxval=env.action_high)
            state, t = env.step(state, action)
            return state, jnp.stack([t.reward.sum(), t.cost.sum(), t.obs.sum()])

        return jax.lax.scan(step, state, jax.random.split(key, steps))

    return call


def measure(backend: str, task: str, n: int, seconds: float, steps: int, options: dict) -> dict:
    import jax

    import envs

    env = envs.make(task, backend)
    state, _ = jax.jit(env.reset)(jax.random.split(jax.random.key(0), n))
    key = jax.random.key(1)
    began = time.perf_counter()
    compiled = jax.jit(steps_of(env, steps)).lower(state, key).compile(compiler_options=options or None)
    compile_s = time.perf_counter() - began
    began = time.perf_counter()
    state, _ = jax.block_until_ready(compiled(state, key))
    first_s = time.perf_counter() - began
    best, ends = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < ends or best == float("inf"):
        began = time.perf_counter()
        key, use = jax.random.split(key)
        state, sums = jax.block_until_ready(compiled(state, use))
        best = min(best, time.perf_counter() - began)
    mode = [f"graph_mode={env.physics.graph_mode}"] if backend == "warp" else []
    return {
        "options": " ".join([*mode, *(f"{k}={v}" for k, v in options.items())]),
        "steps_per_s": round(n * steps / best),
        "ms_per_step": round(1e3 * best / steps, 3),
        "compile_s": round(compile_s, 1),
        "first_s": round(first_s, 1),
        "note": "" if bool(jax.numpy.isfinite(sums).all()) else "not finite",
    }


def episodes(backend: str, task: str, n: int, steps: int) -> list[dict]:
    """Means and intervals of the return, cost and length of the first episode of `n` environments."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    import envs

    env = envs.make(task, backend)

    def step(carry, key):
        state, alive = carry
        action = jax.random.uniform(key, (n, env.action_size), minval=env.action_low, maxval=env.action_high)
        state, t = env.step(state, action)
        return (state, alive & ~(t.terminated | t.truncated)), jnp.stack([t.reward, t.cost, jnp.ones(n)]) * alive

    @jax.jit
    def roll(key):
        first, key = jax.random.split(key)
        state, _ = env.reset(jax.random.split(first, n))
        return jax.lax.scan(step, (state, jnp.ones(n, bool)), jax.random.split(key, steps))[1].sum(0)

    rows = []
    for quantity, x in zip(("return", "cost", "length"), np.asarray(roll(jax.random.key(0)), np.float64)):
        half = 1.96 * x.std(ddof=1) / n**0.5
        rows.append({"quantity": quantity, "mean": round(x.mean(), 2), "low": round(x.mean() - half, 2), "high": round(x.mean() + half, 2)})
    return rows


def child(args) -> None:
    """Prints a JSON line per row."""
    import jax

    device = jax.devices()[0].device_kind
    kind, _, backend = args.job.rpartition("-")
    common = {"task": args.task, "backend": backend, "device": device, "versions": versions()}
    say = lambda row: print("ROW " + json.dumps({**common, **row}), flush=True)
    if kind:
        for row in episodes(backend, args.task, args.episodes, args.horizon):
            say({"episodes": args.episodes, **row})
        return
    if backend == "mujoco":
        common["device"] = f"{len(os.sched_getaffinity(0))} cores; {device}"
    steps = 4 if (backend, args.task) == ("mjx", ANT) else STEPS
    # The last one asks whether XLA's own graphs help around Warp's.
    jobs = [(n, {}) for n in args.envs]
    if (backend, args.task) == ("warp", ANT) and device != "cpu":
        jobs.append((args.envs[0], {"xla_gpu_graph_min_graph_size": 1}))
    for n, options in jobs:
        row = {"envs": n, "options": " ".join(f"{k}={v}" for k, v in options.items())}
        try:
            say({**row, **measure(backend, args.task, n, args.seconds, steps, options)})
        except Exception as e:  # the others may still be measured
            say({**row, "note": f"{type(e).__name__}: {e}".splitlines()[0][:200]})


def run(command: list[str], limit: float, got) -> str:
    """Calls `got(row)` for each row that the command prints; why it ended early, or nothing."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout and process.stderr
    errors: list[str] = []
    reader = threading.Thread(target=errors.extend, args=(process.stderr,), daemon=True)
    reader.start()
    late = threading.Event()

    def end():
        late.set()
        os.killpg(process.pid, signal.SIGKILL)

    timer = threading.Timer(limit, end)
    timer.start()
    try:
        for line in process.stdout:
            if line.startswith("ROW "):
                got(json.loads(line[4:]))
        status = process.wait()
    finally:  # interrupted, too: else the child keeps the GPU
        timer.cancel()
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    reader.join(5)
    if late.is_set():
        return f"ended after {limit:.0f} s"
    return "" if status == 0 else f"exit {status}: {(errors or [''])[-1].strip()[:200]}"


class Table:
    """A CSV file, written anew with each row that is added. The old rows of a job go when its first new one comes, and not before."""

    def __init__(self, path: Path, columns: tuple[str, ...]):
        self.path, self.columns, self.old, self.new = path, columns, [], []
        if path.exists():
            with open(path, newline="") as file:
                self.old = list(csv.DictReader(file))

    def add(self, row: dict) -> None:
        self.new.append(row)
        measured = {(row["backend"], row["task"]) for row in self.new}
        with open(self.path, "w", newline="") as file:
            table = csv.DictWriter(file, self.columns)
            table.writeheader()
            table.writerows([*(row for row in self.old if (row["backend"], row["task"]) not in measured), *self.new])


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--minutes", type=float, default=6)
    p.add_argument("--seconds", type=float, default=2, help="of measuring, after compiling")
    p.add_argument("--envs", type=int, nargs="+", default=[4096, 16384, 160])
    p.add_argument("--episodes", type=int, default=200)
    p.add_argument("--horizon", type=int, default=500, help="steps of an episode at most")
    p.add_argument("--only", nargs="+", help="jobs by backend, e.g. warp episodes-warp")
    p.add_argument("--tasks", nargs="+", help="tasks to measure")
    p.add_argument("--out", type=Path, default=HERE)
    p.add_argument("--job", help=argparse.SUPPRESS)
    p.add_argument("--task", help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.job:
        return child(args)
    if args.out == HERE and not shutil.which("nvidia-smi"):
        p.error("no NVIDIA GPU here, and these are the tables of one: name another folder with --out to rehearse")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    ends = time.monotonic() + 60 * args.minutes
    args.out.mkdir(parents=True, exist_ok=True)
    tables = {False: Table(args.out / "gpu.csv", COLUMNS), True: Table(args.out / "gpu_episodes.csv", EPISODES)}
    for job, task, n, most in JOBS:
        if job not in (args.only or [job]) or task not in (args.tasks or [task]):
            continue
        kind, _, backend = job.rpartition("-")
        left = ends - time.monotonic()
        if left <= 10:
            print(f"{job} {task}: no time left", flush=True)
            continue
        sizes = [str(x) for x in ([n] if n and not args.tasks else args.envs)]
        command = [sys.executable, __file__, "--job", job, "--task", task, "--envs", *sizes, "--seconds", str(args.seconds)]
        command += ["--episodes", str(args.episodes), "--horizon", str(args.horizon)]

        def got(row, table=tables[bool(kind)]):
            table.add(row)
            print({k: v for k, v in row.items() if k not in ("versions",)}, flush=True)

        why = run(command, min(most, left), got)
        if why:
            print(f"{job} {task}: {why}", flush=True)
            if not kind:
                got({"task": task, "backend": backend, "note": why, "versions": versions()})


if __name__ == "__main__":
    main()
