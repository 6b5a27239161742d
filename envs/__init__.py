"""Safety tasks as pure functions on JAX arrays: `envs.make(name)` gives an `Env` with `reset` and `step` (see core.py)."""

import difflib
import importlib
import sys
from functools import cache
from typing import Any

import jax

from envs import reference, velocity
from envs.circle import Circle
from envs.core import Env, EnvState, Readings, Task, Transition, UnknownName
from envs.robots import Ant, Car, Point
from envs.run import Run

__all__ = ["BACKENDS", "TASKS", "Env", "EnvState", "Readings", "Recorder", "Task", "Transition", "UnknownName"]
__all__ += ["folder", "gym_make", "make", "resolve"]

ROBOTS = (Point(), Car(), Ant())
TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        *(Run(robot) for robot in ROBOTS),
        *(Circle(robot, level) for level in (1, 2) for robot in ROBOTS),
        velocity.HalfCheetah(),
        velocity.Hopper(),
        velocity.Swimmer(),
        velocity.Walker2d(),
        velocity.Ant(),
    )
}
BACKENDS = ("mujoco", "mjx", "warp", reference.BACKEND)
# Where JAX computes on a GPU, C MuJoCo on the host's cores, behind a callback, is the default from so many cores on, by robot: with the
# 160 environments from which 32 seeds collect it is then about as fast as what else would be the default, on an H100. The numbers are the
# GPU's steps/s divided by a sixteenth of those of 16 cores (results/speed/gpu.csv; measured earlier, MJX at 160: Point 91,149, Ant 786).
# Car's MJX was not measured at 160.
CORES_ENOUGH = {"Point": 16, "HalfCheetah": 4, "Ant": 1}
# The tasks whose default on an NVIDIA GPU is else Warp; the others' is MJX. A task is here if Warp was faster on an H100 (steps/s of 4,096
# environments on MJX and Warp: HalfCheetahVelocity 262,387 and 513,407) and one step lands as near to C MuJoCo as on MJX
# (`python -m envs.deviation --backend warp`). AntRun is faster, too (9,486, measured earlier, and 71,988), and 200 episodes of random
# actions agree (results/speed/gpu_episodes.csv), but it is not here: whether trained policies fare the same was not compared yet.
FASTER_ON_WARP = ("SafetyHalfCheetahVelocity",)


def resolve(name: str) -> str:
    """The task's own name for `name` or for its Safety-Gymnasium id; UnknownName with the nearest names if there is none."""
    names = {**{n: n for n in TASKS}, **{task.reference_id: n for n, task in TASKS.items()}}
    if name in names:
        return names[name]
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    raise UnknownName(f"unknown environment {name!r}.{hint} Known: {', '.join(TASKS)}; one of your own: module:id (envs/README.md)")


def recorded(name: str) -> str:
    """The name that runs of `name` are recorded under: ids of Safety-Gymnasium and of Bullet-Safety-Gym mean a task, too."""
    by_id = {task.reference_id: task.name for task in TASKS.values()}
    return name.removesuffix("-v0") if name.startswith(reference.BULLET) else by_id.get(name, name)


def folder(name: str) -> str:
    """An environment's name as a relative path: `module:id` as module/id, as a colon is not a file name's everywhere."""
    return name.replace(":", "/")


def fastest(name: str) -> str:
    """The backend that `make` takes for a task where none is named."""
    if jax.default_backend() == "cpu":
        return "mujoco"
    enough = next((n for robot, n in CORES_ENOUGH.items() if name.startswith(f"Safety{robot}")), None)
    if enough and jax.default_backend() != "tpu":
        from envs.physics_mujoco import WORKERS

        if enough <= WORKERS:
            return "mujoco"
    if name not in FASTER_ON_WARP or jax.default_backend() == "tpu":
        return "mjx"
    from envs import physics_warp

    try:
        physics_warp.check()
    except physics_warp.Unavailable as e:
        warn_once(f"{name} runs on MJX, slower than on MuJoCo Warp: {e}")
        return "mjx"
    return "warp"


@cache
def warn_once(line: str) -> None:
    print(line, file=sys.stderr)


def make(name: str, backend: str | None = None, privileged: bool = False, memory: bool = False, horizon: int | None = None) -> Any:
    """The `Env` of `name` (a key of TASKS or a Safety-Gymnasium id) on a physics backend (None: the fastest here for
    the few environments of a training run: `mujoco` where JAX computes on a CPU, and beside a GPU where the host has CORES_ENOUGH; else
    `mjx`, or `warp` for FASTER_ON_WARP on an NVIDIA GPU).

    `bullet/` names and Safety-Gymnasium ids without a native task give the package's own simulator (reference/env.py), and `module:id`
    (or `gym:id`) gives an environment registered with gymnasium, cut off after `horizon` steps (None: as it is registered).

    Raises:
      UnknownName: no such environment or backend, it cannot run here, or a horizon for one that has its own. One line.
    """
    native = {*TASKS, *(task.reference_id for task in TASKS.values() if task.reference_id)}
    if reference.wanted(name, backend, native):
        from envs.reference.env import make as make_reference

        return make_reference(name, backend, horizon)
    if reference.wanted(name, None, native):
        raise UnknownName(f"{name} has no backend {backend!r}: leave the backend out")
    task = TASKS[resolve(name)]
    if horizon is not None:
        raise UnknownName(f"{task.name} ends after {task.horizon} steps: --horizon is for environments named module:id (envs/README.md)")
    backend = backend or fastest(task.name)
    if backend not in BACKENDS:
        raise UnknownName(f"unknown backend {backend!r}. Known: {', '.join(BACKENDS)}")
    if backend == "mjx":
        from envs.physics_mjx import MjxPhysics

        return Env(task, MjxPhysics(task.model(), task.substeps, task.forward, task.touching), backend, privileged, memory)
    if backend == "warp":
        from envs import physics_warp

        try:
            physics = physics_warp.WarpPhysics(task.model(), task.substeps, task.forward, task.touching)
        except physics_warp.Unavailable as e:
            raise UnknownName(str(e)) from None
        return Env(task, physics, backend, privileged, memory)
    from envs.physics_mujoco import MujocoPhysics

    return Env(task, MujocoPhysics(task.model(), task.substeps, task.forward, task.tracked), backend, privileged, memory)


def gym_make(name: str, num_envs: int | None = None, backend: str | None = None, memory: bool = False, horizon: int | None = None):
    """The same as a `gymnasium.Env`, or with `num_envs` as a `gymnasium.vector.VectorEnv`, with the cost in info["cost"] (gym.py).

    `memory`: observations end with what the task remembers (Run: the odometer), as this suite's policies see them by default.
    `horizon`: as of `make`.
    """
    from envs import gym

    return gym.make(name, num_envs, backend, memory, horizon)


def __getattr__(name: str) -> Any:
    if name == "Recorder":  # a name for users. It stands in data/, on which nothing here depends, and is imported when it is asked for
        return importlib.import_module("data.recorder").Recorder
    raise AttributeError(f"module 'envs' has no attribute {name!r}")
