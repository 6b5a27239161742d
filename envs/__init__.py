"""Safety tasks as pure functions on JAX arrays: `envs.make(name)` gives an `Env` with `reset` and `step` (see core.py)."""

import difflib

import jax

from envs.core import Env, EnvState, Readings, Task, Transition
from envs.robots import Ant, Car, Point
from envs.run import Run
from envs.velocity import HalfCheetah

__all__ = ["BACKENDS", "TASKS", "Env", "EnvState", "Readings", "Task", "Transition", "UnknownName", "make", "resolve"]

TASKS: dict[str, Task] = {task.name: task for task in (Run(Point()), Run(Car()), Run(Ant()), HalfCheetah())}
BACKENDS = ("mujoco",)


class UnknownName(ValueError):
    """No such environment or backend; the message is one line with the known ones."""


def resolve(name: str) -> str:
    """The task's own name for `name` or for its Safety-Gymnasium id; UnknownName with the nearest names if there is none."""
    names = {**{n: n for n in TASKS}, **{task.reference_id: n for n, task in TASKS.items()}}
    if name in names:
        return names[name]
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    raise UnknownName(f"unknown environment {name!r}.{hint} Known: {', '.join(TASKS)}")


def make(name: str, backend: str | None = None, privileged: bool = False) -> Env:
    """The environment `name` (a key of TASKS or a Safety-Gymnasium id) on a physics backend (None: the fastest here)."""
    task = TASKS[resolve(name)]
    backend = backend or "mujoco"
    if backend not in BACKENDS:
        raise UnknownName(f"unknown backend {backend!r}. Known: {', '.join(BACKENDS)}")
    from envs.physics_mujoco import MujocoPhysics

    return Env(task, MujocoPhysics(task.model(), task.substeps, task.forward), backend, privileged)
