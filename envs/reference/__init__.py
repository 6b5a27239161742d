"""The real packages, and environments of the user's own, behind this suite's interface: env.py over pool.py over worker.py;
compat.py lets the oldest package run today.

`bullet/` before a name asks for Bullet-Safety-Gym (`bullet/SafetyBallRun`), the backend `safety-gymnasium` for Safety-Gymnasium.
A colon asks for an environment registered with gymnasium: `module:id` by a module of the user's, `gym:id` otherwise.
"""

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import jax

BACKEND, BULLET, GYMNASIUM = "safety-gymnasium", "bullet/", "gymnasium"
failures: list[Exception] = []  # of steps: where JAX runs them, it raises an error of its own in their place, `RAISED`
RAISED = jax.errors.JaxRuntimeError, ValueError  # the first from a program's first call, the second from later ones


@contextmanager
def reported() -> Iterator[None]:
    """Around a command: a simulator that fails in it is one line on standard error and exit code 1."""
    try:
        yield
    except RAISED:
        if not failures:
            raise
        sys.exit(print(f"error: {failures[0]}", file=sys.stderr) or 1)


def own(name: str) -> bool:
    """Whether the name is that of an environment registered with gymnasium."""
    return ":" in name


def wanted(name: str, backend: str | None, native: set[str]) -> bool:
    """Whether `name` is to be made here: asked for by backend, prefix or colon, or an id that is not among the native names."""
    foreign = bool(re.fullmatch(r"Safety\w+-v\d", name)) and name not in native
    return name.startswith(BULLET) or own(name) or backend == BACKEND or (backend is None and foreign)
