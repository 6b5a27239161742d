"""The environment interface: a task (what to observe, reward and constrain) over a physics (how bodies move).

An `Env` is a pair of pure functions on JAX arrays, usable under jit, scan and vmap, with any leading batch shape:

    state, obs = env.reset(key)                # key (...,)           -> obs (..., obs_size)
    state, transition = env.step(state, action)  # action (..., action_size)

Episodes restart by themselves: `transition.next_obs` is the observation that the action led to (bootstrap from it),
`transition.obs` is the one to act on next (the first of a new episode where the old one ended).
"""

import os
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.buffer_callback import buffer_callback

# Cores that this process may use: threads of C MuJoCo, processes of other simulators.
WORKERS: int = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def on_host(function: Callable, shapes: Any, *args: jax.Array) -> Any:
    """`function(*NumPy arrays)`, which returns arrays of `shapes`, as part of a JAX program; vmap adds axes in front.

    On a CPU the function reads XLA's own buffers. `jax.pure_callback` copies those above 100 kB in XLA's thread pool, in which
    the callback itself runs: where the pool has one thread, because the process has one core, each waits for the other forever.
    """
    if jax.default_backend() != "cpu":
        on_copies = lambda *args: function(*map(np.asarray, args))
        return jax.pure_callback(on_copies, shapes, *args, vmap_method="broadcast_all")

    def host(_, out, *args):
        for target, value in zip(jax.tree.leaves(out), jax.tree.leaves(function(*map(np.asarray, args))), strict=True):
            np.asarray(target)[...] = value

    return buffer_callback(host, shapes, vmap_method="broadcast_all")(*args)


class UnknownName(ValueError):
    """No such environment or backend, or a task that cannot be made; the message is one line."""


class Readings(NamedTuple):
    """What a task may know of the physics at a state, float32, any leading shape."""

    qpos: jax.Array  # (..., nq) generalised positions, m and rad
    qvel: jax.Array  # (..., nv) generalised velocities, m/s and rad/s
    dqpos: jax.Array  # (..., nq) change of qpos over the last environment step, differenced before rounding to float32
    sensors: jax.Array  # (..., nsensordata) the model's sensors at this state
    # (..., 3) m, how far the body `Task.tracked` went over the last environment step by the positions that the engine had last
    # computed, which belong to a moment inside the last substep; None without such a body, or from physics that has no such.
    dbody: jax.Array | None = None


class Physics(Protocol):
    """Moves bodies. `state` is opaque to tasks; its leading shape is the batch's."""

    def reset(self, qpos: jax.Array, qvel: jax.Array, where: jax.Array) -> tuple[Any, Readings]:
        """The state at (qpos, qvel), at rest controls. Rows where `where` is False may be left undefined."""

    def step(self, state: Any, control: jax.Array) -> tuple[Any, Readings]:
        """Holds `control` (..., nu) for one environment step."""


class Task:
    """A task: subclass it, fill in name, horizon and substeps, `model`, `initial`, `observe` and `evaluate` (see run.py and velocity.py).

    All methods but `model` are pure jnp and take any leading shape, except `initial`, which is for one key. What moves must be a MuJoCo
    model. Any other environment can be used as module:id (README.md, an environment of your own).
    """

    name: str
    horizon: int  # T: steps until truncation
    substeps: int  # physics steps per environment step
    reference_id: str = ""  # the id of the same task in Safety-Gymnasium, if it has one
    cost: str = "-"  # the cost in words, for listings
    forward: bool = True  # the reference evaluates sensors at the new state after the substeps
    tracked: str | None = None  # the body that Readings.dbody is about
    reward_scale: float = 0.1  # what learners multiply rewards by: a step of a good policy is then worth about 0.1 to 0.3
    touching: tuple[str, ...] | None = None  # geoms that can touch the floor, if nothing else ever touches (None: unknown)
    memory_size: int = 0  # numbers that `remember` keeps

    def model(self):
        """The compiled `mujoco.MjModel`, whose actuators have a ctrlrange of -1 to 1, the range of actions."""
        raise NotImplementedError

    def initial(self, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        """A draw (qpos (nq,), qvel (nv,)) of the reset distribution."""
        raise NotImplementedError

    def observe(self, r: Readings) -> jax.Array:
        """The observation (..., obs_size)."""
        raise NotImplementedError

    def evaluate(self, r: Readings, action: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """(reward, cost, terminated) of the step that led to `r`; reward and cost raw, cost in {0, 1}."""
        raise NotImplementedError

    def privileged(self, r: Readings) -> jax.Array:
        """(..., k) what the cost depends on but the observation lacks; for critics, never for policies."""
        return r.qpos[..., :0]

    def remember(self, memory: jax.Array, obs: jax.Array) -> jax.Array:
        """(..., memory_size) what an agent with a memory knows after `obs`, from what it knew before (zeros at the start of an
        episode); of observations alone, so that a policy may see it. For `Env(..., memory=True)`."""
        return memory


class EnvState(NamedTuple):
    physics: Any
    t: jax.Array  # (...,) int32, steps taken in the episode
    key: jax.Array  # (...,) PRNG key for the coming resets
    memory: jax.Array | None = None  # (..., memory_size)


class Transition(NamedTuple):
    obs: jax.Array  # (..., obs_size) to act on next: after a reset where the episode ended
    next_obs: jax.Array  # (..., obs_size) the outcome of the action, before any reset
    reward: jax.Array  # (...,) raw
    cost: jax.Array  # (...,) raw, 0 or 1
    terminated: jax.Array  # (...,) bool: a terminal state, do not bootstrap
    truncated: jax.Array  # (...,) bool: time is up, do bootstrap


def batched(function, key: jax.Array):
    """Applies `function`, written for one key, over all leading axes of `key`."""
    for _ in range(key.ndim):
        function = jax.vmap(function)
    return function(key)


class Env:
    """A task on a physics. With `memory=True` observations end with what the task remembers (Run: the odometer), if anything. With
    `privileged=True` they carry `task.privileged` behind their first `obs_size` entries (for critics only; policies must slice it off)."""

    def __init__(self, task: Task, physics: Physics, backend: str, privileged: bool = False, memory: bool = False):
        self.task, self.physics, self.backend = task, physics, backend
        self.name, self.horizon, self.reward_scale = task.name, task.horizon, task.reward_scale
        model = task.model()
        self.action_low, self.action_high = model.actuator_ctrlrange.T.astype("float32")
        if (self.action_low != -1).any() or (self.action_high != 1).any():
            found = ", ".join(f"[{low:g}, {high:g}]" for low, high in model.actuator_ctrlrange)
            raise UnknownName(f"{task.name}: ctrlrange of the model's actuators is {found}: make each -1 1, and scale by gear")
        self.action_bounds = self.action_low, self.action_high
        self.action_size = int(model.nu)
        shapes = Readings(*(jax.ShapeDtypeStruct((n,), jnp.float32) for n in (model.nq, model.nv, model.nq, model.nsensordata)))
        self.memory_size = task.memory_size if memory else 0
        self.obs_size = jax.eval_shape(task.observe, shapes).shape[-1] + self.memory_size
        self.privileged_size = jax.eval_shape(task.privileged, shapes).shape[-1] if privileged else 0
        self._privileged = self.privileged_size > 0

    def _observe(self, r: Readings, memory: jax.Array | None) -> tuple[jax.Array, jax.Array | None]:
        """(observation, memory after it), from the memory before it; None at the start of an episode."""
        obs, parts = self.task.observe(r), []
        if self.memory_size:
            blank = jnp.zeros((*obs.shape[:-1], self.memory_size))
            memory = blank if memory is None else self.task.remember(memory, obs)
            parts.append(memory)
        if self._privileged:
            parts.append(self.task.privileged(r))
        return (jnp.concatenate([obs, *parts], -1) if parts else obs), memory

    def _start(self, key: jax.Array, where: jax.Array):
        qpos, qvel = batched(self.task.initial, key)
        physics, readings = self.physics.reset(qpos, qvel, where)
        return physics, *self._observe(readings, None)

    def reset(self, key: jax.Array) -> tuple[EnvState, jax.Array]:
        """Starts an episode per key: key (...,) typed, or (..., 2) raw uint32."""
        if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
            key = jax.random.wrap_key_data(key)
        first, later = jnp.moveaxis(batched(jax.random.split, key), -1, 0)
        physics, obs, memory = self._start(first, jnp.ones(key.shape, bool))
        return EnvState(physics, jnp.zeros(key.shape, jnp.int32), later, memory), obs

    def step(self, state: EnvState, action: jax.Array) -> tuple[EnvState, Transition]:
        """One step; actions (..., action_size) outside the actuators' range are clipped to it."""
        action = jnp.clip(action, self.action_low, self.action_high)
        physics, readings = self.physics.step(state.physics, action)
        reward, cost, terminated = self.task.evaluate(readings, action)
        t = state.t + 1
        truncated = t >= self.horizon
        done = terminated | truncated
        next_obs, memory = self._observe(readings, state.memory)

        first, later = jnp.moveaxis(batched(jax.random.split, state.key), -1, 0)
        fresh, fresh_obs, blank = self._start(first, done)
        pick = lambda new, old: jnp.where(done.reshape(done.shape + (1,) * (old.ndim - done.ndim)), new, old)
        physics, memory = jax.tree.map(pick, (fresh, blank), (physics, memory))
        state = EnvState(physics, jnp.where(done, 0, t), jnp.where(done, later, state.key), memory)
        return state, Transition(pick(fresh_obs, next_obs), next_obs, reward, cost, terminated, truncated)
