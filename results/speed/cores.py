"""How C MuJoCo scales with the cores: `python results/speed/cores.py --cores 1 2`; renews this machine's rows of results/speed/cores.csv.

Environment steps per second of each task, random actions, measured in a process of its own per number of cores:

step      one call of the host's step for all environments, as XLA's callback makes it
row       the same, one row after another through MuJoCo's bindings, as where numba is missing
scan      inside a jitted scan, with observations, rewards, costs and restarts
rollout   `mujoco.rollout` with as many threads and as many physics steps: the bound (it gives no warm start back)
lock_us   microseconds per row for which `step` holds Python's interpreter lock: its time with the physics left out
"""

import argparse
import csv
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT))
# A script's own folder comes first on the path, where the neighbouring envs.py would be taken for the package `envs`.
sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != HERE]

TASKS = ("SafetyPointRun", "SafetyCarRun", "SafetyHalfCheetahVelocity", "SafetyAntRun")
COLUMNS = ("task", "cores", "envs", "step", "row", "scan", "rollout", "lock_us", "machine")


def rates(calls: dict, rows: int, seconds: float, rounds: int = 5) -> dict[str, float]:
    """Rows per second of each of `calls`, which do `rows` each: the best of `rounds`, taken in turns, as the machine is not quiet."""
    best = dict.fromkeys(calls, 0.0)
    for call in calls.values():  # compile, load
        call()
    for _ in range(rounds):
        for name, call in calls.items():
            done, start = 0, time.perf_counter()
            while time.perf_counter() - start < seconds / rounds:
                call()
                done += 1
            best[name] = max(best[name], done * rows / (time.perf_counter() - start))
    return best


def measure(task: str, n: int, cores: int, seconds: float) -> dict[str, float]:
    import jax
    import mujoco
    import mujoco.rollout
    import numpy as np

    import envs
    from envs import physics_mujoco

    env = envs.make(task, "mujoco")
    physics, rng = env.physics, np.random.default_rng(0)
    state, _ = env.reset(jax.random.split(jax.random.key(0), n))
    control = rng.uniform(-1, 1, (n, env.action_size)).astype(np.float32)
    bits = np.asarray(state.physics)
    for _ in range(20):  # away from the start, where nothing touches
        bits, _ = physics._on_host(physics._step_rows, bits, control)
    step = lambda: physics._on_host(physics._step_rows, bits, control)
    compiled = physics_mujoco.step_rows()

    def without(stand_in):
        """`step` with another function in the compiled one's place."""

        def call():
            physics_mujoco._loaded[:] = [stand_in]
            try:
                with np.errstate(all="ignore"):  # what was not computed is whatever lay in memory
                    step()
            finally:
                physics_mujoco._loaded[:] = [compiled]

        return call

    length = max(1, 2000 // n)

    @jax.jit
    def scan(state, key):
        def one(state, key):
            return env.step(state, jax.random.uniform(key, (n, env.action_size), minval=-1.0))[0], None

        return jax.lax.scan(one, state, jax.random.split(key, length))[0]

    full = np.zeros((n, mujoco.mj_stateSize(physics.model, mujoco.mjtState.mjSTATE_FULLPHYSICS)))
    data = mujoco.MjData(physics.model)
    for row, before in zip(full, np.ascontiguousarray(bits).view(np.float64), strict=True):
        mujoco.mj_setState(physics.model, data, before[: physics.engine_size], physics_mujoco.STATE)
        mujoco.mj_getState(physics.model, data, row, mujoco.mjtState.mjSTATE_FULLPHYSICS)
    held = np.repeat(control[:, None].astype(float), physics.substeps + physics.forward, 1)
    workspaces = [mujoco.MjData(physics.model) for _ in range(cores)]
    with mujoco.rollout.Rollout(nthread=cores) as pool:
        bound = lambda: pool.rollout(physics.model, workspaces, full, held)
        found = rates({"step": step, "row": without(None), "rollout": bound}, n, seconds)
    found |= rates({"scan": lambda: jax.block_until_ready(scan(state, jax.random.key(1)))}, n * length, seconds)
    return found | {"lock_us": 1e6 / rates({"lock": without(lambda *args: None)}, n, seconds / 3)["lock"]}


def add(row: dict, path: Path) -> None:
    """Writes a row behind those of the file, in the place of the old one of the same measurement."""
    same, rows = lambda other: all(str(other[c]) == str(row[c]) for c in ("task", "envs", "cores", "machine")), []
    if path.exists():
        with open(path, newline="") as file:
            rows = [other for other in csv.DictReader(file) if not same(other)]
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows([*rows, row])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=TASKS)
    parser.add_argument("--cores", nargs="+", type=int, default=[1, len(os.sched_getaffinity(0))])
    parser.add_argument("--envs", nargs="+", type=int, default=[64, 320])
    parser.add_argument("--seconds", type=float, default=2, help="of each measurement")
    parser.add_argument("--out", type=Path, default=HERE / "cores.csv")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        for task in options.tasks:
            for n in options.envs:
                row = {"task": task, "envs": n} | measure(task, n, options.cores[0], options.seconds)
                print("row " + json.dumps(row), flush=True)
        return
    mine = sorted(os.sched_getaffinity(0))
    if max(options.cores) > len(mine):
        parser.error(f"--cores {max(options.cores)}: this process may use {len(mine)}")
    model = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), platform.processor())
    print(*(f"{c:>12s}" for c in COLUMNS[:-1]))
    for cores in options.cores:
        words = ["--worker", "--cores", str(cores), "--seconds", str(options.seconds), "--tasks", *options.tasks]
        command = [sys.executable, __file__, *words, "--envs", *map(str, options.envs)]
        own = set(mine[:cores])
        environ = os.environ | {"JAX_PLATFORMS": "cpu"}
        pinned = lambda own=own: os.sched_setaffinity(0, own)
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environ, preexec_fn=pinned) as process:
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith("row "):
                    row = {k: round(v, 2) if isinstance(v, float) else v for k, v in json.loads(line[4:]).items()}
                    row |= {"cores": cores, "machine": model}
                    add(row, options.out)
                    print(*(f"{str(row[c])[-12:]:>12s}" for c in COLUMNS[:-1]), flush=True)
        if process.returncode:
            sys.exit(process.returncode)


if __name__ == "__main__":
    main()
