"""How fast the environments are: `python results/speed/envs.py`. Prints a table and writes envs.csv beside this file (--out).

Whole: N environments in one jitted lax.scan with random actions, observations, rewards, costs and restarts.
Physics: the same steps from the same states through the physics' host function alone, without JAX and without restarts,
threads included.
Gymnasium: for the Velocity tasks, the environment of gymnasium that they are made of, one of it in this process.
Reference: safety-gymnasium 1.0.0, one environment in one process; measured in the same run with --reference PYTHON, an
interpreter that has it as published (Python 3.10: `pip install safety-gymnasium==1.0.0`), else as measured elsewhere.
Both with random actions and with restarts.
"""

import csv
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import gymnasium
import jax
import mujoco
import numpy as np
import tyro
from gymnasium.envs.mujoco import MujocoEnv

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository is not installed
# A script's own folder comes first on the path, where this file would be taken for the package `envs`.
sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != Path(__file__).resolve().parent]

import envs  # noqa: E402
from envs.velocity import Velocity  # noqa: E402

# Steps per second of safety-gymnasium 1.0.0 with its own pins (Python 3.10, mujoco 2.3.3), one environment, random
# policy, resets included (Ant's rebuilds its model, 1.65 s); measured on another 2-core machine.
REFERENCE = {
    "SafetyPointRun": 295,
    "SafetyAntRun": 30,
    "SafetyPointCircle1": 319,
    "SafetyAntCircle1": 15,
    "SafetyHalfCheetahVelocity": 6800,
    "SafetyHopperVelocity": 2800,
    "SafetySwimmerVelocity": 5200,
    "SafetyAntVelocity": 1780,
}
WANTED = {"reference": 10, "gymnasium": 2}  # navigation tasks against the reference, Velocity tasks against gymnasium

# Runs under another interpreter, which has no JAX and none of this repository.
REFERENCE_PROGRAM = """
import sys, time
import safety_gymnasium
env, seconds = safety_gymnasium.make(sys.argv[1]), float(sys.argv[2])
env.reset(seed=0)
env.action_space.seed(0)
steps, began = 0, time.perf_counter()
while time.perf_counter() - began < seconds:
    _, _, _, terminated, truncated, _ = env.step(env.action_space.sample())
    steps += 1
    if terminated or truncated:
        env.reset()
print("steps per second:", steps / (time.perf_counter() - began))
"""


@dataclass
class Args:
    """Measure the speed of every task."""

    num_envs: int = 64
    """environments side by side"""
    steps: int = 200
    """steps of each in one repeat"""
    repeats: int = 5
    """repeats of which the median counts"""
    tasks: tuple[str, ...] = ()
    """only these tasks, leaving the others' rows in the file as they are (default: all)"""
    reference: str | None = None
    """an interpreter that has safety-gymnasium 1.0.0 as published, to measure it in the same run"""
    out: Path = Path(__file__).with_suffix(".csv")
    """where to write the table"""
    seconds: float = 10.0
    """how long gymnasium and the reference are measured on each task, s"""

    def __post_init__(self):
        if min(self.num_envs, self.steps, self.repeats) < 1 or not self.seconds > 0:
            sys.exit("--num-envs, --steps and --repeats must be at least 1, --seconds above 0")
        try:
            self.tasks = tuple(envs.resolve(name) for name in self.tasks)
        except envs.UnknownName as e:
            sys.exit(str(e))


def gymnasium_speed(task: envs.Task, seconds: float) -> float:
    """Steps per second of the gymnasium environment under a Velocity task."""
    model = task.model()
    name = f"{type(task).__name__}-v4"
    # With this suite's model: gymnasium's own reading of swimmer.xml fails in MuJoCo 3.
    own = mock.patch.object(MujocoEnv, "_initialize_simulation", lambda _: (model, mujoco.MjData(model)))
    with own:
        env = gymnasium.make(name, disable_env_checker=True)
    env.reset(seed=0)
    env.action_space.seed(0)
    steps, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        _, _, terminated, truncated, _ = env.step(env.action_space.sample())
        steps += 1
        if terminated or truncated:
            env.reset()
    return steps / (time.perf_counter() - began)


def reference_speed(task: envs.Task, python: str, seconds: float) -> float:
    """Steps per second of the reference under another interpreter."""
    command = [python, "-c", REFERENCE_PROGRAM, task.reference_id, str(seconds)]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as e:
        sys.exit(f"--reference {python}: {e.strerror}")
    if done.returncode:
        sys.exit(f"--reference {python} cannot run {task.reference_id}: {done.stderr.strip().splitlines()[-1]}")
    return float(done.stdout.rpartition(":")[2])


def measure(name: str, args: Args) -> dict:
    """One row of the table."""
    env = envs.make(name, "mujoco")

    @jax.jit
    def start(key):
        return env.reset(jax.random.split(key, args.num_envs))[0]

    @jax.jit
    def run(state, key):
        def step(state, key):
            shape = (args.num_envs, env.action_size)
            action = jax.random.uniform(key, shape, minval=env.action_low, maxval=env.action_high)
            before = state.physics
            state, transition = env.step(state, action)
            # Everything is carried out of the scan, so nothing can be optimised away.
            return state, (transition, before, action)

        return jax.lax.scan(step, state, jax.random.split(key, args.steps))

    state, _ = jax.block_until_ready(run(start(jax.random.key(0)), jax.random.key(1)))  # compiles, fills thread pools
    whole, physics = [], []
    for i in range(args.repeats):
        began = time.perf_counter()
        state, (_, before, action) = jax.block_until_ready(run(state, jax.random.key(2 + i)))
        whole.append(time.perf_counter() - began)
        # Right after, so that both see the same load of the machine.
        before, action = np.asarray(before), np.asarray(action)
        began = time.perf_counter()
        for bits, control in zip(before, action):
            env.physics._on_host(env.physics._step_rows, bits, control)
        physics.append(time.perf_counter() - began)

    total = args.num_envs * args.steps
    seconds, alone = float(np.median(whole)), float(np.median(physics))
    speed = total / seconds
    row = {
        "task": name,
        "num_envs": args.num_envs,
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "steps_per_second": round(speed),
        "physics_alone_steps_per_second": round(total / alone),
        "share_outside_physics": round(max(0.0, 1 - alone / seconds), 3),
    }
    others = {"gymnasium": gymnasium_speed(env.task, args.seconds) if isinstance(env.task, Velocity) else None}
    others["reference"] = reference_speed(env.task, args.reference, args.seconds) if args.reference else REFERENCE.get(name)
    for other, steps in others.items():
        row[f"{other}_steps_per_second"] = round(steps) if steps else ""
        row[f"times_{other}"] = round(speed / steps, 1) if steps else ""
    row["reference_measured"] = "here" if args.reference else "elsewhere" if others["reference"] else ""
    return row


def write(path: Path, rows: dict[str, dict]) -> None:
    """The table, tasks in their usual order."""
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(next(reversed(rows.values()))), extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows[name] for name in envs.TASKS if name in rows)


def main(args: Args) -> None:
    kept = {}
    if args.tasks and args.out.exists():
        with open(args.out, newline="") as file:
            kept = {row["task"]: row for row in csv.DictReader(file)}
    columns = ("task", "steps/s", "physics alone", "outside physics", "gymnasium", "times", "reference *", "times")
    form = "{:28s}{:>10}{:>15}{:>17}{:>11}{:>8}{:>13}{:>8}"
    print(f"{args.num_envs} environments, {args.steps} steps, median of {args.repeats}; {jax.devices()[0].platform}\n")
    print(form.format(*columns))
    rows = {}
    for name in args.tasks or envs.TASKS:
        row = rows[name] = measure(name, args)
        task, _, _, whole, alone, share, *others, _ = row.values()
        print(form.format(task, f"{whole:,}", f"{alone:,}", f"{share:.1%}", *(x or "-" for x in others)), flush=True)
        write(args.out, kept | rows)  # as they come: the table takes ten minutes
    where = "measured in this run" if args.reference else "measured elsewhere (another 2-core machine)"
    print(f"\n* safety-gymnasium 1.0.0, one environment, with resets; {where}")
    for name, row in rows.items():
        other = "gymnasium" if row["gymnasium_steps_per_second"] else "reference"
        times = row[f"times_{other}"]
        if times and times < WANTED[other]:
            print(f"{name} is {times} times as fast as {other}, not {WANTED[other]}")


if __name__ == "__main__":
    main(tyro.cli(Args))
