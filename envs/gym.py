"""Environments of this suite as gymnasium's (`envs.gym_make`), for other suites to train on; the cost is in info["cost"].

Written for gymnasium 0.29 and 1.x, which differ in vector environments.
"""

import operator
from functools import cache

import gymnasium
import jax
import numpy as np
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec
from gymnasium.error import ResetNeeded
from gymnasium.vector import VectorEnv
from gymnasium.vector.utils import batch_space

import envs

OLD_GYMNASIUM = hasattr(VectorEnv, "step_wait")  # below 1.0
FINAL_OBS = "final_observation" if OLD_GYMNASIUM else "final_obs"


@cache
def _made(name: str, backend: str | None, memory: bool, horizon: int | None):
    """(environment, jitted reset, jitted step): instances share what is compiled."""
    env = envs.make(name, backend, memory=memory, horizon=horizon)
    return env, _reporting(jax.jit(env.reset), env), _reporting(jax.jit(env.step), env)


def _reporting(function, env):
    """`function`, whose error is the simulator's own where that fails: one line."""
    if isinstance(env, envs.Env):
        return function

    def call(*args):
        try:
            return jax.block_until_ready(function(*args))
        except envs.reference.RAISED:
            if not envs.reference.failures:
                raise
            raise envs.reference.failures.pop() from None

    return call


def _spaces(env) -> tuple[spaces.Box, spaces.Box]:
    return spaces.Box(-np.inf, np.inf, (env.obs_size,), np.float32), spaces.Box(env.action_low, env.action_high, dtype=np.float32)


def _checked(action, space: spaces.Box) -> np.ndarray:
    action = np.asarray(action, np.float32)
    if action.shape != space.shape:
        raise ValueError(f"an action of shape {action.shape}: must be {space.shape}")
    if np.isnan(action).any():
        raise ValueError(f"an action with NaN: {' '.join(str(action).split()):.60}; mend the policy")
    return action


def _spec(env, name: str, **arguments) -> EnvSpec:
    arguments = {"name": name, **arguments}
    id = name.replace(".", "_")  # gymnasium's pattern has no dots, as those in the name of a module
    return EnvSpec(id, entry_point="envs.gym:GymEnv", max_episode_steps=env.horizon, kwargs=arguments)


class GymEnv(gymnasium.Env):
    """One environment. Observations and actions are float32, info is {"cost": float}; episodes are cut off after the task's T.

    Several at once are `envs.gym_make(NAME, num_envs=N)`. Gymnasium's AsyncVectorEnv needs context="spawn", as JAX does not survive a
    fork. `close` leaves the simulators of a real package running, for the next environment of that name.
    """

    metadata = {"render_modes": []}

    def __init__(self, name: str, backend: str | None = None, memory: bool = False, horizon: int | None = None):
        self._env, self._reset, self._step = _made(name, backend, memory, horizon)
        self.memory_size = self._env.memory_size  # last columns of an observation that `memory` has added
        self.observation_space, self.action_space = _spaces(self._env)
        self.spec = _spec(self._env, name, backend=backend, memory=memory, horizon=horizon)
        self._state = None

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        super().reset(seed=seed)
        self._state, obs = self._reset(jax.random.key(int(self.np_random.integers(2**31))))
        return np.array(obs), {"cost": 0.0}

    def step(self, action):
        if self._state is None:
            raise ResetNeeded("call reset() first: no episode has begun, or the last one has ended")
        state, t = self._step(self._state, _checked(action, self.action_space))
        terminated, truncated = bool(t.terminated), bool(t.truncated)
        self._state = None if terminated or truncated else state
        return np.array(t.next_obs), float(t.reward), terminated, truncated, {"cost": float(t.cost)}


class GymVectorEnv(VectorEnv):
    """`num_envs` environments stepped as one batch, which start again by themselves, in the step that ended an episode.

    info["cost"] (num_envs,) holds every environment's cost, also where an episode ended. There info["final_obs"] (gymnasium 0.29:
    "final_observation") and info["final_info"] hold what the last step gave, as in gymnasium's own vector environments.
    """

    metadata: dict = {"render_modes": []}
    if not OLD_GYMNASIUM:
        metadata["autoreset_mode"] = gymnasium.vector.AutoresetMode.SAME_STEP  # type: ignore[attr-defined]

    def __init__(self, name: str, num_envs: int, backend: str | None = None, memory: bool = False, horizon: int | None = None):
        if num_envs < 1:
            raise ValueError(f"num_envs {num_envs}: must be positive")
        self._env, self._reset, self._step = _made(name, backend, memory, horizon)
        observation, action = _spaces(self._env)
        if OLD_GYMNASIUM:
            super().__init__(num_envs, observation, action)
        self.num_envs, self.single_observation_space, self.single_action_space = num_envs, observation, action
        self.observation_space, self.action_space = batch_space(observation, num_envs), batch_space(action, num_envs)
        self.spec = _spec(self._env, name, backend=backend, memory=memory, horizon=horizon)
        self._state = None

    def reset(self, *, seed: int | list[int] | None = None, options: dict | None = None):
        """`seed`: one per environment, each for the episode that `GymEnv` begins with it; a number n stands for n, n + 1, ..."""
        if seed is None:
            seeds: list = [None] * self.num_envs if self._state is None else self._generators
        else:
            # gymnasium takes Python's integers only, others draw theirs from NumPy
            seeds = [operator.index(seed) + i for i in range(self.num_envs)] if np.ndim(seed) == 0 else list(seed)  # type: ignore[arg-type]
            if len(seeds) != self.num_envs:
                raise ValueError(f"{len(seeds)} seeds for {self.num_envs} environments: give one each, or one number")
            seeds = [x if x is None else operator.index(x) for x in seeds]
        self._generators = [x if isinstance(x, np.random.Generator) else gymnasium.utils.seeding.np_random(x)[0] for x in seeds]
        keys = jax.vmap(jax.random.key)(np.array([g.integers(2**31) for g in self._generators]))
        self._state, obs = self._reset(keys)
        return np.array(obs), self._info(np.zeros(self.num_envs, np.float32))

    def _info(self, cost: np.ndarray) -> dict:
        return {"cost": cost, "_cost": np.ones(self.num_envs, bool)}

    def step_async(self, actions):
        if self._state is None:
            raise ResetNeeded("call reset() first")
        self._actions = _checked(actions, self.action_space)

    def step_wait(self):
        self._state, t = self._step(self._state, self._actions)
        terminated, truncated, info = np.array(t.terminated), np.array(t.truncated), self._info(np.array(t.cost))
        for i in np.flatnonzero(terminated | truncated):
            info = self._add_info(info, {FINAL_OBS: np.array(t.next_obs[i]), "final_info": {"cost": float(t.cost[i])}}, i)
        return np.array(t.obs), np.array(t.reward), terminated, truncated, info

    def step(self, actions):
        """obs, reward, terminated, truncated, info; actions (num_envs, action_size)."""
        self.step_async(actions)
        return self.step_wait()


def make(name: str, num_envs: int | None, backend: str | None, memory: bool, horizon: int | None) -> GymEnv | GymVectorEnv:
    task = envs.TASKS.get(envs.recorded(name))
    if memory and backend == envs.reference.BACKEND and task is not None and task.memory_size:
        raise envs.UnknownName(f"{name} on the backend {backend} remembers nothing: leave memory out, or the backend")
    arguments = backend, memory, horizon
    return GymEnv(name, *arguments) if num_envs is None else GymVectorEnv(name, num_envs, *arguments)
