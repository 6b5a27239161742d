"""Records the steps of any gymnasium environment as an offline dataset in DSRL's format (data/dsrl.py): `envs.Recorder`.

    with envs.Recorder(gymnasium.make("Own-v0"), "own.hdf5") as env:
        for _ in range(100):
            obs, info = env.reset()
            done = False
            while not done:
                obs, reward, terminated, truncated, info = env.step(policy(obs))
                done = terminated or truncated

Works with gymnasium 0.29 and 1.x.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from gymnasium.error import ResetNeeded

import envs
from data import dsrl
from envs.gym import GymEnv

LIMIT = "give the Recorder an environment that ends: Recorder(TimeLimit(env, STEPS), path), TimeLimit of gymnasium.wrappers"


class Recorder(gymnasium.Wrapper):
    """An environment that remembers what was done in it, and writes it to one file.

    It needs Box spaces, bounded ones for actions, and the cost of a step: info["cost"], or the third of Safety-Gymnasium's six values
    (obs, reward, cost, terminated, truncated, info). `reset` and `step` return what the environment does.

    - Observations are kept as float32, flat where their space has more axes. The next observation is what the step returned.
    - The odometer that `envs.gym_make(..., memory=True)` adds is left out of the file: whoever trains on it computes it anew.
    - Actions beyond the space's bounds are clipped before the environment sees them. In the file, these bounds are -1 and 1.
    - `terminated` becomes a terminal, and `truncated` a time-out, unless the step also terminated.
    - Only whole episodes are written: one that nobody finished has a low cost and would pass for safe. So the environment needs a time
      limit, if it does not always terminate (`gymnasium.wrappers.TimeLimit`). `close` warns of what `reset` cut off.
    - A step with a number that no dataset may hold (NaN, a negative cost) is refused at once, and its episode dropped. The whole ones stay.
    - Attributes of the file: `env` (the id, for tasks of this suite their name), `horizon` (steps until truncation, where the id's
      registration says so), `action_low` and `action_high` (per action, in the environment's units).

    `save` writes all episodes since the beginning; `close`, and so the end of a `with` block, does it too. The file appears whole or not
    at all: a recording that is killed leaves none, or the last one saved.
    """

    def __init__(self, env: Any, path: str | os.PathLike):
        """
        Args:
          env: a gymnasium environment, not a vector of them. Wrappers that reset by themselves belong around the Recorder, not inside.
          path: the HDF5 file to write, .hdf5 or .h5; one that exists is replaced.

        Raises:
          DatasetError: an environment that cannot be recorded, or a file that cannot be written.
        """
        single = isinstance(env, gymnasium.Env) and not isinstance(env, gymnasium.vector.VectorEnv)
        if not single and hasattr(env, "single_action_space"):  # gymnasium 0.29 has two types of vectors
            raise dsrl.DatasetError(f"{env}: a vector of environments; record one environment at a time")
        if not single:
            raise dsrl.DatasetError(f"{env}: no gymnasium environment; a task of this suite is one as envs.gym_make(NAME)")
        super().__init__(env)
        inner: Any = env
        while inner is not inner.unwrapped:
            if "autoreset" in type(inner).__name__.lower():
                raise dsrl.DatasetError(f"{env}: resets by itself, which hides an episode's last observation; wrap the Recorder with it")
            inner = inner.env
        for what, space in (("observation", self.observation_space), ("action", self.action_space)):
            if not isinstance(space, gymnasium.spaces.Box):
                mend = "wrap it with FlattenObservation" if what == "observation" else "only continuous actions can be recorded"
                raise dsrl.DatasetError(f"{env}: its {what} space is {space}, not a Box; {mend}")
        box: Any = self.action_space
        low, high = (np.asarray(x, np.float64).reshape(-1) for x in (box.low, box.high))
        if not (np.isfinite(low) & np.isfinite(high) & (low < high)).all():
            raise dsrl.DatasetError(f"{env}: its actions are not bounded; give its action space finite bounds")
        dsrl.check_output(path)
        self.path = Path(path)
        self._low, self._high, self._size = low, high, int(np.prod(self.observation_space.shape))
        ours, shape = env.unwrapped, self.observation_space.shape
        remembered = ours.memory_size if isinstance(ours, GymEnv) and ours.observation_space.shape == shape else 0
        self._kept = self._size - remembered  # columns of an observation that the file gets
        self._episodes: list[dict[str, np.ndarray]] = []  # whole ones
        self._steps: list[tuple] = []  # of the running one
        self._obs: np.ndarray | None = None  # to act on; None: no episode is running
        self._saved = 0  # episodes in the file
        self._acted = False
        self._dropped = [0, 0]  # episodes that reset() cut off, their steps

    def reset(self, **kwargs):
        if self._steps and self._obs is not None:  # else a step failed, which has been told
            self._dropped = [self._dropped[0] + 1, self._dropped[1] + len(self._steps)]
        self._steps, self._obs = [], None
        obs, info = self.env.reset(**kwargs)
        self._obs = self._checked("the reset's observation", obs, self._size)
        return obs, info

    def step(self, action):
        if self._obs is None:
            raise ResetNeeded("call reset() first: no episode has begun, or the last one has ended")
        space: Any = self.action_space
        action = np.asarray(action)
        if action.shape != space.shape:
            raise ValueError(f"an action of shape {action.shape}: must be {space.shape}")
        if np.isnan(action.astype(np.float64)).any():  # inf is clipped as what else is beyond the bounds
            raise ValueError(f"an action with NaN: {' '.join(str(action).split()):.60}; mend the policy")
        before, self._obs = self._obs, None  # until the step is in: an episode that lacks one cannot go on
        acted = np.clip(action.astype(space.dtype), space.low, space.high)
        out = self.env.step(acted)
        if len(out) == 6:
            obs, reward, cost, terminated, truncated, _ = out
        else:
            obs, reward, terminated, truncated, info = out
            if "cost" not in info:
                raise dsrl.DatasetError(f"{self.env}: a step has no cost; let step() put it into info['cost'], 0 where there is none")
            cost = info["cost"]
        unit = np.clip(2 * (acted.astype(np.float64).reshape(-1) - self._low) / (self._high - self._low) - 1, -1, 1)
        step = f"step {len(self._steps) + 1}"
        following = self._checked(f"{step}'s observation", obs, self._size)
        numbers = self._checked(f"{step}'s reward", reward)[0], self._checked(f"{step}'s cost", cost, low=0)[0]
        self._steps.append((before[: self._kept], following[: self._kept], unit.astype(np.float32), *numbers, bool(terminated)))
        if terminated or truncated:
            rows = [np.array(column) for column in zip(*self._steps)]
            episode = dict(zip(("observations", "next_observations", "actions", "rewards", "costs", "terminals"), rows))
            episode["timeouts"] = np.zeros(len(self._steps), bool)
            episode["timeouts"][-1] = not terminated
            self._episodes.append(episode)
            self._steps = []
        else:
            self._obs = following
        self._acted = True  # not by a step that failed: that has been told
        return out

    def save(self) -> Path:
        """Writes all whole episodes so far to `path` and returns it.

        Raises:
          DatasetError: no episode has ended.
        """
        if not self._episodes:
            raise dsrl.DatasetError(self._none())
        arrays = {key: np.concatenate([episode[key] for episode in self._episodes]) for key in self._episodes[0]}
        dsrl.save(self.path, dsrl.Dataset(**arrays), self._about())
        self._saved = len(self._episodes)
        return self.path

    def close(self) -> None:
        """Saves the whole episodes that are not saved yet, and closes the environment. Warns if `reset` came before an episode's end."""
        try:
            if len(self._episodes) > self._saved:
                self.save()
            elif self._acted and not self._episodes:
                print(f"warning: {self._none()}", file=sys.stderr)
            if self._dropped[0] and self._episodes:
                episodes, steps = self._dropped
                share = f"{episodes} of {episodes + len(self._episodes)} episodes ({steps} steps)"
                print(f"warning: {self.path}: {share} had not ended at reset() and are left out; {LIMIT}", file=sys.stderr)
        finally:
            super().close()

    def _none(self) -> str:
        return f"{self.path}: no episode has ended, and only whole ones are kept; {LIMIT}"

    def _checked(self, what: str, value: Any, size: int = 1, low: float = -np.inf) -> np.ndarray:
        """`value` as (size,) float32; a DatasetError unless it is so many finite numbers, each at least `low`."""
        try:
            with np.errstate(all="ignore"):  # what is beyond float32's range becomes inf
                flat = np.array(value, np.float32).reshape(-1)
        except (TypeError, ValueError):
            flat = np.empty(0, np.float32)
        bad = ~np.isfinite(flat) | (flat < low)
        if flat.size == size and not bad.any():
            return flat
        found = f"{flat[bad][0]} in column {bad.argmax()}" if flat.size == size > 1 else f"{' '.join(str(value).split()):.60}"
        wanted = f"{'a finite number' if size == 1 else f'{size} finite numbers'} (float32){'' if low else ' >= 0'}"
        mend = f"mend the environment (this episode is dropped, whole ones kept: {len(self._episodes)})"
        raise dsrl.DatasetError(" ".join(f"{self.env}: {what} is {found}, not {wanted}; {mend}".split()))

    def _about(self) -> dict[str, Any]:
        about: dict[str, Any] = {"action_low": self._low.tolist(), "action_high": self._high.tolist()}
        spec = self.env.spec
        if spec is not None:
            about["env"] = envs.recorded(spec.kwargs["name"] if isinstance(self.env.unwrapped, GymEnv) else spec.id)
            if spec.max_episode_steps:
                about["horizon"] = spec.max_episode_steps
        return about
