"""How fast the environments are: `python results/speed/envs.py`. Prints a table and writes envs.csv beside this file.

Whole: N environments in one jitted lax.scan with random actions, observations, rewards, costs and restarts.
Physics: the same steps from the same states through the physics' host function alone, without JAX and without restarts,
threads included.
"""

import csv
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository is not installed
# A script's own folder comes first on the path, where this file would be taken for the package `envs`.
sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != Path(__file__).resolve().parent]

import envs  # noqa: E402

# Steps per second of safety-gymnasium 1.0.0 with its own pins (Python 3.10, mujoco 2.3.3), one environment, random
# policy, resets included (Ant's rebuilds its model, 1.65 s); measured on another 2-core machine.
REFERENCE = {"SafetyPointRun": 295, "SafetyAntRun": 30, "SafetyHalfCheetahVelocity": 6800}


@dataclass
class Args:
    """Measure the speed of every task."""

    num_envs: int = 64
    """environments side by side"""
    steps: int = 200
    """steps of each in one repeat"""
    repeats: int = 5
    """repeats of which the median counts"""

    def __post_init__(self):
        if min(self.num_envs, self.steps, self.repeats) < 1:
            sys.exit("--num-envs, --steps and --repeats must be at least 1")


def measure(name: str, args: Args) -> dict:
    """One row of the table."""
    env = envs.make(name)

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
    seconds, reference = float(np.median(whole)), REFERENCE.get(name)
    alone = float(np.median(physics))
    return {
        "task": name,
        "num_envs": args.num_envs,
        "steps_per_second": round(total / seconds),
        "physics_alone_steps_per_second": round(total / alone),
        "share_outside_physics": round(max(0.0, 1 - alone / seconds), 3),
        "reference_steps_per_second": reference or "",
        "ratio": round(total / seconds / reference, 1) if reference else "",
    }


def main(args: Args) -> None:
    columns = ("task", "steps/s", "physics alone", "outside physics", "reference *", "ratio")
    form = "{:28s}{:>10}{:>15}{:>17}{:>13}{:>8}"
    print(f"{args.num_envs} environments, {args.steps} steps, median of {args.repeats}; {jax.devices()[0].platform}\n")
    print(form.format(*columns))
    rows = []
    for name in envs.TASKS:
        row = measure(name, args)
        rows.append(row)
        task, _, whole, alone, share, reference, ratio = row.values()
        cells = (f"{whole:,}", f"{alone:,}", f"{share:.1%}", reference or "-", ratio or "-")
        print(form.format(task, *cells), flush=True)
    print("\n* safety-gymnasium 1.0.0, one environment, with resets; measured elsewhere (another 2-core machine)")
    with open(Path(__file__).with_suffix(".csv"), "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main(tyro.cli(Args))
