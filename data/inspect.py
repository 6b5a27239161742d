"""Says what is in a dataset, and whether it belongs to an environment: `python -m data.inspect FILE [--env NAME] [--plot out.png]`.

FILE may have any format that `data.convert` reads, with the same options. Nothing is written but the plot.

`check_env` is what every training run calls before it starts: a dataset whose observations are in another order, in other units, or
normalised has the right shape and trains, but its policy fails in the environment.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import envs
from data import convert, dsrl
from data.dsrl import Dataset
from envs.velocity import Velocity

RESETS, SLOW_RESETS = 256, 16  # of native tasks; of simulators
LATER, ROLLED = 5, 64  # steps after which native tasks are compared again, and environments that take them
REPLAYED = 64  # transitions
SHOWN = 4  # columns in a warning, the worst ones

# ---------------------------------------------------------------- what is in it


def _spread(x: np.ndarray) -> str:
    return " / ".join(f"{q:.4g}" for q in np.percentile(x, [0, 10, 50, 90, 100])) if len(x) else "none"


def show(path: str | os.PathLike, dataset: Dataset, cost_limit: float, notes: list[str] | None = None, horizon: int | None = None) -> None:
    """Prints the summary of the dataset of `path`, with a line for each of `notes`, and what `check_rows` warns of."""
    found, told = dsrl.episodes(dataset), dsrl.describe(dataset, cost_limit)
    whole, (n, obs) = found.complete, dataset.observations.shape
    terminal = dataset.terminals[found.stop - 1]
    timed = found.lengths[whole & ~terminal]
    print(f"{path}: {n:,} transitions, {obs} observations, {dataset.actions.shape[1]} actions")
    for note in notes or ():
        print(f"  {note}")
    ends = f"{terminal.sum()} end in a terminal state, {len(timed)} by time-out, {(~whole).sum()} not at all"
    print(f"  {len(whole)} trajectories: {ends}")
    print("           lowest / 10th percentile / median / 90th percentile / highest")
    for name, values in (("return", found.returns[whole]), ("cost", found.costs[whole]), ("length", found.lengths[whole])):
        print(f"  {name:7}  {_spread(values)}")
    if told["safe_share"]:
        best = f"their best return {told['safe_return_best']:.4g}, 90th percentile {told['safe_return_p90']:.4g}"
        print(f"  safe (cost at most {cost_limit:g}): {told['safe_share']:.0%} of the trajectories, {best}")
    else:
        print(f"  safe (cost at most {cost_limit:g}): none of the trajectories")
    low, high = dataset.actions.min(), dataset.actions.max()
    print(f"  actions in [{low:.3g}, {high:.3g}], costs of a step in [{dataset.costs.min():.3g}, {dataset.costs.max():.3g}]")
    check_rows(path, dataset, horizon)


def check_rows(path: str | os.PathLike, dataset: Dataset, horizon: int | None = None) -> None:
    """Prints warnings where actions use a small part of [-1, 1], where all costs are zero, where an episode is longer than the `horizon`
    (steps until a time-out; None: unknown), where time-outs come after different numbers of steps, and where a next observation is not
    that of the next row."""
    found, extent = dsrl.episodes(dataset), np.abs(dataset.actions).max()
    timed = found.lengths[found.complete & ~dataset.terminals[found.stop - 1]]
    if extent < 0.5:
        _warn(path, f"actions stay within {extent:.3g}: if the environment's bounds are that, --action-low and --action-high rescale")
    if not dataset.costs.any():
        _warn(path, "all costs are zero: if the cost has another name, --cost NAME names it")
    longest = found.lengths.max()
    if horizon and longest > horizon:
        _warn(path, f"an episode of {longest} steps, longer than the time limit of {horizon}: --horizon {horizon} cuts it")
    # One step less: the last row had no successor.
    if len(timed) and timed.min() < (horizon or timed.max()) - 1:
        where = f"after {timed.min()} to {timed.max()} steps" + (f", the limit is {horizon}" if horizon else "")
        _warn(path, f"time-outs {where}: sums of a short episode are low, and its cost passes for safe; --horizon N cuts at one length")
    inside = np.setdiff1d(np.arange(len(dataset.rewards) - 1), found.stop - 1)
    reached, following = dataset.next_observations[inside], dataset.observations[inside + 1]
    apart = np.abs(reached - following) > 1e-3 * (1 + np.abs(following))
    share = apart.any(1).mean() if len(inside) else 0.0
    if share > 0.1:
        mend = "are the two swapped, or the ends of episodes misplaced?"
        _warn(path, f"in {share:.0%} of the rows, the next observation is not that of the next row: {mend}")


def _warn(path: str | os.PathLike, what: str) -> None:
    print(f"warning: {path}: {what}", file=sys.stderr)


def draw(path: Path, title: str, dataset: Dataset, cost_limit: float) -> None:
    """Draws returns against costs of the trajectories to the PNG `path`."""
    from data import report  # matplotlib is not needed by those who only check

    path.parent.mkdir(parents=True, exist_ok=True)
    report.scatter(title, dsrl.episodes(dataset), cost_limit, path)


# ---------------------------------------------------------------- does it belong to the environment


def _ranges(what: str, found: np.ndarray, wanted: np.ndarray, typical: np.ndarray, margin: float) -> str | None:
    """Compares the ranges of the columns of `found` (n, obs), of the file, with those of `wanted` (m, obs), of the environment.

    A column does not fit if a tenth of its values lie outside the environment's range, which is widened by `margin` times itself and
    a thousandth of the column's `typical` size (obs,), or if it varies five times less.
    """
    low, high = wanted.min(0), wanted.max(0)
    slack = margin * (high - low) + 1e-3 * typical + 1e-6
    outside = ((found < low - slack) | (found > high + slack)).mean(0)
    # Of a file with few starts, or with one seed for all, one cannot say.
    spread, enough = found.std(0), len(found) >= 20 and (found != found[0]).any()
    narrow = enough & (spread < wanted.std(0) / 5) & (wanted.std(0) > 1e-3 * typical)
    bad = (outside > 0.1) | narrow
    if not bad.any():
        return None
    far = np.maximum(low - found, found - high).max(0) / (high - low + slack)
    worst = [i for i in np.argsort(-np.where(bad, far, -np.inf)) if bad[i]][:SHOWN]
    columns = "; ".join(
        f"column {i} in [{found[:, i].min():.3g}, {found[:, i].max():.3g}], not [{low[i]:.3g}, {high[i]:.3g}]" for i in worst
    )
    return f"{what} differ in {bad.sum()} of {len(bad)} columns: {columns}"


def _jit(function: Callable) -> Callable:
    """jax.jit for what runs once: XLA's optimisations would cost more than they save."""
    quick = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    return jax.jit(function, compiler_options=quick if jax.default_backend() == "cpu" else None)


def _later(env: envs.Env, dataset: Dataset, found: dsrl.Episodes, physics: Any) -> tuple[np.ndarray, np.ndarray]:
    """Observations LATER steps after the start: the file's (n, obs), and the environment's (ROLLED, obs), from the states `physics`
    after a reset and under the same actions, of which each environment takes those of one trajectory."""
    start = found.start[found.lengths >= LATER]
    rows = np.random.default_rng(0).choice(start, ROLLED)
    actions = np.clip(dataset.actions[rows[None] + np.arange(LATER)[:, None]], env.action_low, env.action_high)  # (LATER, ROLLED, action)

    def roll(physics, actions):
        physics, readings = jax.lax.scan(env.physics.step, physics, actions)
        return env.task.observe(jax.tree.map(lambda x: x[-1], readings))

    return dataset.next_observations[start + LATER - 1], np.asarray(_jit(roll)(physics, actions))


def _replayed(env: envs.Env, dataset: Dataset) -> str | None:
    """Replays transitions of a Velocity task: sets its state from the observation, takes the action, compares what comes out.

    Errors are medians over the transitions, and too large above half of what a step changes (rewards: half of their standard deviation).
    """
    task = env.task
    assert isinstance(task, Velocity)
    speed = np.abs(dataset.observations[:, task.model().nq - task.unseen :]).max(1)
    rows = np.flatnonzero(speed < task.top_speed)  # a clipped speed is not known
    if not len(rows):
        return None
    rows = np.random.default_rng(0).choice(rows, REPLAYED)
    obs, wanted = dataset.observations[rows], dataset.next_observations[rows]

    def step(obs, action):
        qpos, qvel = task.state(obs)
        state, _ = env.physics.reset(qpos, qvel, jnp.ones(len(obs), bool))
        _, readings = env.physics.step(state, jnp.clip(action, env.action_low, env.action_high))
        return task.observe(readings), *task.evaluate(readings, action)[:2]

    reached, reward, cost = (np.asarray(x) for x in _jit(step)(obs, dataset.actions[rows]))
    off, change = np.median(np.abs(reached - wanted), 0), np.median(np.abs(wanted - obs), 0)
    bad = ~(off <= 0.5 * change + 1e-6)  # NaN is bad
    if bad.any():
        worst = [i for i in np.argsort(-off / (change + 1e-6)) if bad[i]][:SHOWN]
        columns = "; ".join(f"column {i} is off by {off[i]:.3g}, a step changes it by {change[i]:.3g}" for i in worst)
        return f"{REPLAYED} replayed transitions differ in {bad.sum()} of {len(bad)} columns: {columns}"
    off_reward = np.median(np.abs(reward - dataset.rewards[rows]))
    if not off_reward <= 0.5 * dataset.rewards.std() + 1e-6:
        return f"the rewards of {REPLAYED} replayed transitions are off by {off_reward:.3g}, they spread by {dataset.rewards.std():.3g}"
    same = np.mean(cost == dataset.costs[rows])
    return None if same >= 0.9 else f"the costs of {REPLAYED} replayed transitions agree in {same:.0%}"


@cache
def _native(name: str) -> tuple[envs.Env, Any, np.ndarray]:
    """A native task on C MuJoCo, which compiles in no time; the physics' states and the observations of RESETS resets."""
    env = envs.make(name, "mujoco")
    state, obs = _jit(env.reset)(jax.random.split(jax.random.key(0), RESETS))
    return env, state.physics, np.asarray(obs)


def mismatch(dataset: Dataset, env: Any) -> str | None:
    """What of a dataset does not fit an environment, with the worst columns and their numbers; None if nothing is found.

    Compared are the first observations of the trajectories with those of resets, and for native tasks the observations a few steps
    later, after resets and the recorded actions. Nothing is compared exactly: recorded numbers may be rounded.

    Of Velocity tasks transitions are replayed, too: the observation holds qpos (without x) and qvel, so that the state can be set.
    The other native tasks observe sensors, not positions, and simulators of other packages cannot be set.
    """
    found, observations = dsrl.episodes(dataset), dataset.observations
    typical = np.quantile(np.abs(observations[:: max(1, len(observations) // 10_000)]), 0.9, axis=0)
    starts = observations[found.start]
    if not isinstance(env, envs.Env):
        resets = _jit(env.reset)(jax.random.split(jax.random.key(0), SLOW_RESETS))[1]
        return _ranges("first observations", starts, np.asarray(resets), typical, 2.0)
    env, physics, resets = _native(env.name)
    wrong = _ranges("first observations", starts, resets, typical, 0.5)
    if not wrong and (found.lengths >= LATER).any():
        wrong = _ranges(f"observations after {LATER} steps", *_later(env, dataset, found, physics[:ROLLED]), typical, 0.5)
    return _replayed(env, dataset) if not wrong and isinstance(env.task, Velocity) else wrong


def check_env(dataset: Dataset, path: str | os.PathLike, env: Any) -> None:
    """Prints a warning if the dataset of `path` does not seem to be of `env` (`envs.make`)."""
    wrong = mismatch(dataset, env)
    if wrong:
        _warn(path, f"does not fit {env.name}: {wrong}. Are columns in another order or unit, or normalised?")


def check_about(path: str | os.PathLike, about: dict[str, Any], env: Any) -> None:
    """Prints a warning where the attributes of the dataset of `path` name another task, time limit or range of actions than that of `env`
    (`envs.make`), or no range where that is not [-1, 1]."""
    named = envs.recorded(str(about.get("env", env.name)))
    if named.rpartition(":")[2] != env.name.rpartition(":")[2]:
        _warn(path, f"says that it is of {named}, not of {env.name}: rewards and costs may be another task's")
    if about.get("horizon", env.horizon) != env.horizon:
        _warn(path, f"its episodes were cut off after {about['horizon']} steps, those of {env.name} end after {env.horizon} (--horizon)")
    told = [about[key] for key in ("action_low", "action_high") if key in about]
    bounds = [np.broadcast_to(np.asarray(json.loads(x) if isinstance(x, str) else x, np.float64), env.action_size) for x in told]
    text = lambda low, high: ", ".join(f"[{a:g}, {b:g}]" for a, b in dict.fromkeys(zip(map(float, low), map(float, high))))
    if len(bounds) == 2 and not np.allclose(bounds, env.action_bounds, rtol=1e-4):
        _warn(path, f"its actions were scaled from {text(*bounds)}, {env.name} takes {text(*env.action_bounds)}")
    elif len(bounds) < 2 and not np.allclose(np.abs(env.action_bounds), 1):
        mend = "python -m data.convert IN OUT --env ENV --action-low LOW --action-high HIGH rescales them (-1 and 1: they are scaled)"
        _warn(path, f"-1 and 1 among its actions are read as the ends of {text(*env.action_bounds)}; if they are not: {mend}")


# ---------------------------------------------------------------- command


def main(words: list[str] | None = None) -> None:
    parser = convert.parser(__doc__, "data.inspect")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw returns against costs")
    args = parser.parse_args(words)
    if args.plot:
        dsrl.check_output(args.plot, (".png",))
    env, options = convert.environment(args.env, args.horizon) if args.env else None, convert.options_of(args)
    dataset, about, notes = convert.read(args.source, options, env)
    if env is None and "env" in about:
        try:
            env = convert.environment(str(about["env"]), args.horizon)
        except envs.UnknownName as e:
            notes.append(f"not compared with {about['env']}: {e}; of an environment of your own: --env MODULE:{about['env']}")
        else:
            arrays = {key: value for key, value in dataset._asdict().items() if value is not None}
            dsrl.check(args.source, arrays, env=env.name, obs_size=env.obs_size, action_size=env.action_size)
    dsrl.check_episodes(dataset, args.source, env.horizon if env else None)
    show(args.source, dataset, args.cost_limit, notes, env.horizon if env else options.horizon)
    if args.plot:
        draw(args.plot, Path(args.source).stem, dataset, args.cost_limit)
        print(f"  {args.plot}")
    if env:
        check_about(args.source, about, env)
        check_env(dataset, args.source, env)
        print(f"  compared with {env.name}")


if __name__ == "__main__":
    convert.command(main)
