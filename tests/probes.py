"""Probe environments: so small that returns, costs, values and optima are known in closed form.

They have what algos use of `envs.Env`: the same attributes, pure batched `reset` and `step`, episodes that restart by
themselves.
A probe's clock lies in its physics and not in `EnvState.t`, as a robot's does: who resets `t` postpones the time-out
only.
"""

import jax
import jax.numpy as jnp

import envs


class Probe:
    """Subclasses give `start` (key () -> physics, a dict), `observe` and `outcome` (both batched)."""

    privileged_size, reward_scale = 0, 0.1

    def __init__(self, horizon: int, obs_size: int, action_size: int = 1):
        self.name, self.horizon, self.obs_size, self.action_size = type(self).__name__, horizon, obs_size, action_size
        self.action_low, self.action_high = -jnp.ones(action_size), jnp.ones(action_size)

    def start(self, key) -> dict:
        return {"clock": jnp.int32(0)}

    def observe(self, physics) -> jax.Array:
        raise NotImplementedError

    def outcome(self, physics, action):
        """(physics, reward, cost, terminated) of a step; `physics` comes with its clock already advanced."""
        raise NotImplementedError

    def reset(self, key):
        def one(key):
            first, later = jax.random.split(key)
            return self.start(first), later

        for _ in range(key.ndim):
            one = jax.vmap(one)
        physics, later = one(key)
        return envs.EnvState(physics, jnp.zeros(key.shape, jnp.int32), later), self.observe(physics)

    def step(self, state, action):
        action = jnp.clip(action, self.action_low, self.action_high)
        physics, reward, cost, terminated = self.outcome({**state.physics, "clock": state.physics["clock"] + 1}, action)
        truncated = state.t + 1 >= self.horizon
        done = terminated | truncated
        next_obs = self.observe(physics)
        fresh, fresh_obs = self.reset(state.key)
        pick = lambda new, old: jnp.where(done.reshape(done.shape + (1,) * (old.ndim - done.ndim)), new, old)
        after = envs.EnvState(
            jax.tree.map(pick, fresh.physics, physics),
            jnp.where(done, 0, state.t + 1),
            jnp.where(done, fresh.key, state.key),
        )
        return after, envs.Transition(pick(fresh_obs, next_obs), next_obs, reward, cost, terminated, truncated)


class Constant(Probe):
    """The same reward and cost in every step. Episodes end by time-out after `horizon` steps, or, with `terminal_at`,
    in a
    terminal state after that many. The observation is the clock, one-hot (a single 1 without `terminal_at`: nothing
    changes)."""

    def __init__(self, reward: float, cost: float, horizon: int, terminal_at: int | None = None):
        super().__init__(horizon, 1 if terminal_at is None else terminal_at + 1)
        self.reward, self.cost, self.terminal_at = reward, cost, terminal_at

    def observe(self, physics):
        clock = physics["clock"]
        return jnp.ones((*clock.shape, 1)) if self.terminal_at is None else jax.nn.one_hot(clock, self.obs_size)

    def outcome(self, physics, action):
        clock = physics["clock"]
        terminated = jnp.zeros(clock.shape, bool) if self.terminal_at is None else clock >= self.terminal_at
        return physics, jnp.full(clock.shape, self.reward), jnp.full(clock.shape, self.cost), terminated


class DelayedCost(Probe):
    """Three steps to a terminal state; the last costs 1 if the first action was positive. Reward: the last action.
    Observation: (clock, whether the first action was positive)."""

    def __init__(self):
        super().__init__(3, 2)

    def start(self, key):
        return {"clock": jnp.int32(0), "guilty": jnp.float32(0)}

    def observe(self, physics):
        return jnp.stack([physics["clock"].astype(jnp.float32), physics["guilty"]], -1)

    def outcome(self, physics, action):
        guilty = jnp.where(physics["clock"] == 1, (action[..., 0] > 0).astype(jnp.float32), physics["guilty"])
        last = physics["clock"] >= 3
        return {**physics, "guilty": guilty}, last * action[..., 0], last * guilty, last


class OneStep(Probe):
    """A constrained bandit: reward a, cost max(a, 0)^2, then a terminal state.

    The squared cost makes the Lagrangian a - lambda a^2 strictly concave: under E[cost] <= d the best action is
    sqrt(d), with
    multiplier 1 / (2 sqrt(d)). (With a linear cost every action is as good as any other at the optimal multiplier.)"""

    def __init__(self):
        super().__init__(1, 1)

    def observe(self, physics):
        return jnp.ones((*physics["clock"].shape, 1))

    def outcome(self, physics, action):
        a = action[..., 0]
        return physics, a, jnp.square(jnp.maximum(a, 0.0)), jnp.ones(a.shape, bool)


class Staggered(Probe):
    """An episode's length n is drawn from 1..horizon+1, so that some end in a terminal state after n steps, some by
    time-out
    after `horizon`, some (n = horizon) by both. Reward n per step, cost the number of steps before. Observation: (n,
    clock)."""

    def __init__(self, horizon: int):
        super().__init__(horizon, 2)

    def start(self, key):
        return {"clock": jnp.int32(0), "length": jax.random.randint(key, (), 1, self.horizon + 2)}

    def observe(self, physics):
        return jnp.stack([physics["length"], physics["clock"]], -1).astype(jnp.float32)

    def outcome(self, physics, action):
        n, clock = physics["length"], physics["clock"]
        return physics, n.astype(jnp.float32), (clock - 1).astype(jnp.float32), clock >= n
