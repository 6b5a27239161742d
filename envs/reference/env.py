"""Environments of other packages, and of the user's own, behind the interface of `envs.Env`."""

import difflib
import os
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import envs
from envs.core import Transition, batched, on_host
from envs.reference import BACKEND, BULLET, GYMNASIUM, failures, own
from envs.reference.pool import Pool, WorkerError

ROOT = Path(__file__).resolve().parents[2]


class HistoryState(NamedTuple):
    """A state as what led to it (pool.py); entries of `actions` from `n` on mean nothing."""

    seed: jax.Array  # (...,) uint32, of the episode
    actions: jax.Array  # (..., horizon, action_size)
    n: jax.Array  # (...,) int32, actions since the seed
    t: jax.Array  # (...,) int32, steps taken in the episode: n, unless the caller has set the clock back
    key: jax.Array  # (...,) PRNG key for the coming resets


class ReferenceEnv:
    """A task of another package as pure functions, like `envs.Env`: reset(key), step(state, action).

    Simulators run in worker processes. The same key and actions give the same episodes, whatever else the pool has done; an
    old state may be stepped again at the price of replaying its episode. Actions are in [-1, 1], scaled to the package's range
    where that differs (Racecar, Humanoid); costs are the package's own. An episode is also cut off after `horizon` steps since
    its seed, for a caller that sets the clock back.
    """

    privileged_size = memory_size = 0

    def __init__(self, name: str, backend: str, pool: Pool, horizon: int | None = None):
        self.name, self.backend, self._pool = name, backend, pool
        self.horizon, self.obs_size, self.action_size = (pool.about[k] for k in ("horizon", "obs_size", "action_size"))
        self.horizon = horizon or self.horizon
        self.frame_rate: float = pool.about["frame_rate"]  # pictures per second, one a step
        # Goal (Fading too), Button and Push reward the metres moved towards the goal, 0.03 a step at best; Run sixty times these.
        scales = {BULLET: 0.1, "Goal": 5.0, "Fading": 5.0, "Button": 5.0, "Push": 5.0, "Circle": 1.0}
        known = next((scale for part, scale in scales.items() if part in name and not own(name)), envs.Task.reward_scale)
        self.reward_scale = envs.TASKS[name].reward_scale if name in envs.TASKS else known
        self.action_high = np.ones(self.action_size, np.float32)
        self.action_low = -self.action_high
        self.action_bounds: tuple[np.ndarray, np.ndarray] = pool.about["action_bounds"]  # in the package's units

    def reset(self, key: jax.Array) -> tuple[HistoryState, jax.Array]:
        """Starts an episode per key: key (...,) typed, or (..., 2) raw uint32."""
        if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
            key = jax.random.wrap_key_data(key)
        seed, later = _draw(key)
        shape = jax.ShapeDtypeStruct((*key.shape, self.obs_size), jnp.float32)
        obs = on_host(self._reset_on_host, shape, seed)
        zero = jnp.zeros(key.shape, jnp.int32)
        return HistoryState(seed, jnp.zeros((*key.shape, self.horizon, self.action_size)), zero, zero, later), obs

    def step(self, state: HistoryState, action: jax.Array) -> tuple[HistoryState, Transition]:
        """One step; actions (..., action_size) are clipped to [-1, 1]."""
        next_seed, later = _draw(state.key)
        t, n = state.t + 1, state.n + 1
        last = (t >= self.horizon) | (n >= self.horizon)
        vector, scalar = jax.ShapeDtypeStruct((*t.shape, self.obs_size), jnp.float32), jax.ShapeDtypeStruct(t.shape, jnp.float32)
        shapes = (jax.ShapeDtypeStruct((*t.shape, self.action_size), jnp.float32), vector, vector, *[scalar] * 4)
        # The action comes back because XLA may compute it once for the callback and, not bit by bit the same, for the history.
        action, obs, next_obs, reward, cost, terminated, truncated = on_host(
            self._step_on_host, shapes, state.seed, state.actions, state.n, jnp.clip(action, -1.0, 1.0), last, next_seed
        )
        terminated, truncated = terminated > 0, truncated > 0
        done = terminated | truncated
        now = jnp.arange(self.horizon) == state.n[..., None]
        state = HistoryState(
            jnp.where(done, next_seed, state.seed),
            jnp.where(now[..., None], action[..., None, :], state.actions),
            jnp.where(done, 0, n),
            jnp.where(done, 0, t),
            jnp.where(done, later, state.key),
        )
        return state, Transition(obs, next_obs, reward, cost, terminated, truncated)

    def pictures(self, seed, actions: np.ndarray, shown: set[int]) -> list[np.ndarray]:
        """The environment's own pictures (height, width, 3), uint8, after the steps numbered `shown` of the episode of `seed` with
        `actions` (steps, action_size). WorkerError, one line, if it draws none."""
        return self._pool.ask("film", int(seed), actions, shown)

    def _reset_on_host(self, seed):
        with _remembered():
            return self._pool.reset(seed.ravel()).reshape((*seed.shape, self.obs_size))

    def _step_on_host(self, *args):
        batch = args[0].shape
        rows = [a.reshape((-1, *a.shape[len(batch) :])) for a in args]
        with _remembered():
            out = (rows[3].astype(np.float32), *self._pool.step(*rows))
        return tuple(x.reshape((*batch, *x.shape[1:])) for x in out)


@contextmanager
def _remembered():
    try:
        yield
    except WorkerError as error:
        failures.append(error)
        raise


def _draw(key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(seed, key for later) of keys (...,)."""
    first, later = jnp.moveaxis(batched(jax.random.split, key), -1, 0)
    return batched(lambda key: jax.random.bits(key, dtype=jnp.uint32), first), later


def bullet_python() -> str:
    """The interpreter that has Bullet-Safety-Gym, which has an environment of its own (requirements-bullet.txt says why)."""
    folder = ROOT / ".venv-bullet"
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if not python.exists():
        raise envs.UnknownName(f"Bullet-Safety-Gym is not installed ({folder} is missing): run `make setup-bullet` (Python 3.11)")
    return str(python)


def make(name: str, backend: str | None, horizon: int | None = None) -> ReferenceEnv:
    """The environment of a Safety-Gymnasium id or native task's name, of `bullet/` and a Bullet-Safety-Gym name, or of gymnasium's
    `module:id` (`gym:id`), for which `horizon` replaces the number of steps that it is registered with.

    UnknownName, one line, if there is none or it cannot run here.
    """
    if own(name) or name.startswith(BULLET):
        if backend not in (None, GYMNASIUM if own(name) else None):
            raise envs.UnknownName(f"{name} has no backend {backend!r}: leave the backend out")
    if own(name):
        return _make_own(name, horizon)
    if horizon is not None:
        raise envs.UnknownName(f"{name} has a horizon of its own: --horizon is for environments named module:id (envs/README.md)")
    if name.startswith(BULLET):
        backend, python, mend = "bullet", bullet_python(), "make setup-bullet"
        task, wanted = envs.recorded(name), name.removeprefix(BULLET).removesuffix("-v0") + "-v0"
    else:
        backend, python, mend = BACKEND, sys.executable, "make setup"
        task = envs.recorded(name)
        wanted = envs.TASKS[task].reference_id if task in envs.TASKS else name
    try:
        pool = Pool(backend, wanted, python)
    except WorkerError as error:
        lacking = "died" in error.what or "No module" in error.what
        raise envs.UnknownName(f"{name} cannot be made ({error.what})" + f"; perhaps `{mend}` mends it" * lacking) from error
    _check_known(name, wanted, backend, pool)
    return ReferenceEnv(task, backend, pool)


def _make_own(name: str, horizon: int | None) -> ReferenceEnv:
    """The environment of gymnasium's `name`, after a few steps that show whether it can be used."""
    if horizon is not None and horizon < 1:
        raise envs.UnknownName(f"{name} cannot end after {horizon} steps: the horizon must be positive")
    try:
        # Where Python looks for modules here, behind the working directory, which a script's path lacks.
        pool = Pool(GYMNASIUM, name, path=[os.getcwd(), *filter(None, sys.path)])
        _check_known(name, name, GYMNASIUM, pool)
        pool.ask("check")
    except WorkerError as error:
        raise envs.UnknownName(str(error)) from error
    if not (horizon or pool.about["horizon"]):
        raise envs.UnknownName(
            f"{name}: nothing says how long its episodes are: add --horizon N (in Python: horizon=N), or max_episode_steps where it is "
            "registered"
        )
    return ReferenceEnv(name, GYMNASIUM, pool, horizon)


def _check_known(name: str, wanted: str, package: str, pool: Pool) -> None:
    """UnknownName with the nearest names if the package has none called `wanted`."""
    if isinstance(pool.about, list):
        pool.close()
        id = wanted.rpartition(":")[2]
        near = difflib.get_close_matches(id, [known.rpartition(":")[2] for known in pool.about], n=3, cutoff=0.0)
        nearest = ", ".join(BULLET * (package == "bullet") + wanted.removesuffix(id) + known for known in near)
        hint = ". What a module registers is named module:id" if wanted.startswith("gym:") else ""
        raise envs.UnknownName(f"unknown environment {name!r} of {package}. Its nearest: {nearest}{hint}")
