"""How far one environment step on MJX lands from the same step on C MuJoCo: `python -m envs.deviation [TASK ...]`.

`--backend warp` asks the same of MuJoCo Warp; without an NVIDIA GPU, with ENVS_WARP_ON_CPU=1.

Both backends step from the same states, met by C MuJoCo under random actions in the first steps of episodes (the very first
are left out: see below), with the same actions; differences are absolute, or relative where C MuJoCo's value exceeds 1, the
largest over a row's entries. Prints the median and the 95th percentile over the rows and exits 1 where one is past its bound.
"""

import argparse
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import envs
from envs.physics_mjx import MjxState

ROWS, STEPS, HELD = 16, 24, 4  # environments, steps of each, steps for which an action is held


class Bound(NamedTuple):
    """The largest deviation allowed, (median, 95th percentile) over steps; flags: the share of steps that disagree."""

    qpos: tuple[float, float]
    qvel: tuple[float, float]
    obs: tuple[float, float]
    reward: tuple[float, float]
    flags: float = 0.0  # cost or terminated


# Three to five times what was measured on a CPU (Circle, with the robots of Run, has the bounds of Run). The algorithm is
# the same: in float64, with the contacts' frames turned (physics_mjx.py), accelerations agree to 4e-12. What remains is
# float32, in two sizes: where nothing touches, its rounding over the substeps; where something does, a solver that ends once
# float32 shows it no more improvement, and contacts that begin a substep sooner or later. At the very first step of an
# episode Car's wheels stand at a distance of 0 from the floor, and which of them touch is decided by the last digit of
# either engine: those steps are left out.
POINT = Bound((2e-7, 8e-7), (4e-6, 3e-4), (2e-4, 4e-3), (6e-8, 6e-7))  # the observation: its accelerometer
CAR = Bound((5e-7, 6e-5), (4e-6, 2e-3), (1e-4, 4e-3), (3e-7, 6e-5))
# Contacts with three kinds of friction, of which rolling is 1e-4 of sliding: hard to solve in float32.
ANT = Bound((3e-4, 9e-3), (9e-3, 0.9), (3e-2, 4.0), (2e-3, 5e-2), 0.02)
BOUNDS: dict[str, Bound] = {
    "SafetyPointRun": POINT,
    "SafetyCarRun": CAR,
    "SafetyAntRun": ANT,
    "SafetyPointCircle1": POINT,
    "SafetyPointCircle2": POINT,
    "SafetyCarCircle1": CAR,
    "SafetyCarCircle2": CAR,
    "SafetyAntCircle1": ANT,
    "SafetyAntCircle2": ANT,
    "SafetyHalfCheetahVelocity": Bound((4e-7, 5e-6), (2e-5, 2e-4), (2e-5, 2e-4), (4e-7, 3e-6)),
    "SafetyHopperVelocity": Bound((2e-7, 6e-7), (2e-6, 3e-5), (2e-6, 3e-5), (3e-7, 4e-6)),
    "SafetySwimmerVelocity": Bound((2e-7, 5e-7), (1e-6, 8e-6), (1e-6, 8e-6), (2e-7, 8e-7)),
    "SafetyWalker2dVelocity": Bound((4e-7, 1e-6), (1e-5, 1e-4), (1e-5, 1e-4), (1e-6, 5e-6)),
    # Its reward differs because MJX gives no Readings.dbody.
    "SafetyAntVelocity": Bound((4e-7, 8e-7), (6e-6, 4e-5), (6e-6, 4e-5), (1e-2, 0.1), 0.02),
}


# The same of Warp, which solves to the models' own limits (robots of Circle have the bounds of Run).
WARP_POINT = Bound((2e-7, 8e-7), (4e-6, 3e-4), (2e-4, 4e-3), (6e-8, 6e-7))
WARP_CAR = Bound((5e-7, 1e-6), (3e-6, 1e-5), (1e-4, 6e-4), (3e-7, 2e-6))
WARP_ANT = Bound((4e-7, 1e-6), (8e-6, 2e-5), (9e-5, 5e-4), (1e-6, 8e-6))
WARP_BOUNDS: dict[str, Bound] = {
    **{name: {POINT: WARP_POINT, CAR: WARP_CAR, ANT: WARP_ANT}[bound] for name, bound in BOUNDS.items() if "Velocity" not in name},
    "SafetyHalfCheetahVelocity": Bound((5e-7, 5e-6), (2e-5, 2e-4), (2e-5, 2e-4), (4e-7, 3e-6)),
    "SafetyHopperVelocity": Bound((2e-7, 6e-7), (2e-6, 3e-5), (2e-6, 3e-5), (3e-7, 4e-6)),
    "SafetySwimmerVelocity": Bound((2e-7, 5e-7), (1e-6, 8e-6), (1e-6, 8e-6), (2e-7, 8e-7)),
    "SafetyWalker2dVelocity": Bound((4e-7, 1e-6), (1e-5, 1e-4), (1e-5, 1e-4), (1e-6, 5e-6)),
    "SafetyAntVelocity": Bound((4e-7, 8e-7), (6e-6, 2e-5), (6e-6, 2e-5), (1e-2, 0.1), 0.02),
}


def states(env: envs.Env, seed: int = 0):
    """(before, control, after, readings) of `ROWS * (STEPS - 1)` steps on C MuJoCo, states as float64 (N, nq + nv + ...)."""
    key_reset, key_act = jax.random.split(jax.random.key(seed))
    shape = (-(-STEPS // HELD), ROWS, env.action_size)
    control = jax.random.uniform(key_act, shape, minval=env.action_low, maxval=env.action_high).repeat(HELD, 0)[:STEPS]

    def step(state, action):
        after, readings = env.physics.step(state.physics, action)
        following, _ = env.step(state, action)
        return following, (state.t, state.physics, after, readings)

    state, _ = env.reset(jax.random.split(key_reset, ROWS))
    _, (t, before, after, readings) = jax.jit(lambda s: jax.lax.scan(step, s, control))(state)
    rows = np.asarray(t).ravel() > 0
    flat = lambda x: np.ascontiguousarray(x).reshape(len(rows), -1)[rows]
    return flat(before).view(np.float64), flat(control), flat(after).view(np.float64), jax.tree.map(flat, readings)


def measure(name: str, seed: int = 0, backend: str = "mjx") -> dict[str, Any]:
    """The deviations of a task, as `Bound` has them."""
    c, mjx = envs.make(name, "mujoco"), envs.make(name, backend)
    task, (nq, nv) = c.task, c.physics.sizes[:2]
    before, control, after, expected = states(c, seed)
    qpos, qvel, warm = before[:, :nq], before[:, nq : nq + nv], before[:, nq + nv : nq + 2 * nv]
    high = qpos.astype(np.float32)
    rest = np.where(mjx.physics.shifted, qpos - high, 0)
    start = MjxState(*(jnp.asarray(x, jnp.float32) for x in (high, rest, qvel, warm)))
    _, found = jax.jit(mjx.physics.step)(start, control)

    def spread(a, b) -> tuple[float, float]:
        a, b = (np.asarray(x, np.float64).reshape(len(control), -1) for x in (a, b))
        worst = np.max(np.abs(a - b) / np.maximum(1, np.abs(b)), axis=1)
        return float(np.median(worst)), float(np.quantile(worst, 0.95))

    (reward, *flags), (expected_reward, *expected_flags) = task.evaluate(found, control), task.evaluate(expected, control)
    disagree = np.any([np.asarray(a) != np.asarray(b) for a, b in zip(flags, expected_flags)], axis=0)
    return {
        "qpos": spread(found.qpos, after[:, :nq]),
        "qvel": spread(found.qvel, after[:, nq : nq + nv]),
        "obs": spread(task.observe(found), task.observe(expected)),
        "reward": spread(reward, expected_reward),
        "flags": float(disagree.mean()),
    }


def past(found: dict, bound: Bound) -> list[str]:
    """The names of the quantities that are past their bounds (or not numbers)."""
    return [k for k, v in found.items() if not np.all(np.asarray(v) <= np.asarray(getattr(bound, k)))]


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", metavar="TASK", nargs="*")
    parser.add_argument("--backend", choices=("mjx", "warp"), default="mjx")
    args = parser.parse_args(arguments)
    bounds = {"mjx": BOUNDS, "warp": WARP_BOUNDS}[args.backend]
    try:
        names = [envs.resolve(name) for name in args.names] or list(envs.TASKS)
        envs.make(names[0], args.backend)
    except envs.UnknownName as e:
        print(e, file=sys.stderr)
        return 2
    failed = False
    print(f"{'task':28s}{'qpos':>18s}{'qvel':>18s}{'obs':>18s}{'reward':>18s}{'flags':>9s}   median, 95th percentile")
    for name in names:
        found = measure(name, backend=args.backend)
        wrong = past(found, bounds[name])
        failed |= bool(wrong)
        cells = "".join(f"{v[0]:9.0e}{v[1]:9.0e}" for v in list(found.values())[:4])
        print(f"{name:28s}{cells}{found['flags']:9.1%}   {'PAST: ' + ', '.join(wrong) if wrong else 'ok'}", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
