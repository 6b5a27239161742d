"""Policies in environments: collecting transitions, evaluating, Monte-Carlo returns. Everything is pure and jittable.

A policy is a function of a batch of observations (n, o) and a key; it returns actions (n, a).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from envs.core import Env


class Batch(NamedTuple):
    """Transitions."""

    obs: jax.Array  # (..., o)
    action: jax.Array  # (..., a)
    reward: jax.Array  # (...,) raw
    cost: jax.Array  # (...,) raw
    next_obs: jax.Array  # (..., o)
    terminated: jax.Array  # (...,) float, 1: do not bootstrap


class Episodes(NamedTuple):
    """Sums over episodes that ended: number, return, cost, length."""

    number: jax.Array
    returns: jax.Array
    costs: jax.Array
    lengths: jax.Array

    def means(self) -> dict[str, jax.Array]:
        n = jnp.maximum(self.number, 1)
        return {"episodes": self.number, "return": self.returns / n, "cost": self.costs / n, "length": self.lengths / n}


class Rollout(NamedTuple):
    """The environments between two calls of `collect`."""

    state: Any
    obs: jax.Array  # (num_envs, o) to act on next
    sums: jax.Array  # (num_envs, 3) return, cost and length of the running episodes


def start_rollout(key: jax.Array, env: Env, num_envs: int) -> Rollout:
    state, obs = env.reset(jax.random.split(key, num_envs))
    return Rollout(state, obs, jnp.zeros((num_envs, 3)))


def collect(rollout: Rollout, policy: Callable, key: jax.Array, env: Env, steps: int) -> tuple[Rollout, Batch, Episodes]:
    """`steps` steps of `policy(obs, key, elapsed)` in every environment, `elapsed` (num_envs,) steps into their episodes.

    Transitions have leaves (steps, num_envs, ...).
    """

    def step(carry, key):
        rollout, ended = carry
        action = policy(rollout.obs, key, rollout.sums[:, 2])
        state, t = env.step(rollout.state, action)
        sums = rollout.sums + jnp.stack([t.reward, t.cost, jnp.ones_like(t.reward)], -1)
        done = (t.terminated | t.truncated).astype(jnp.float32)
        new = jnp.sum(sums * done[:, None], 0)
        ended = Episodes(ended.number + done.sum(), ended.returns + new[0], ended.costs + new[1], ended.lengths + new[2])
        batch = Batch(rollout.obs, action, t.reward, t.cost, t.next_obs, t.terminated.astype(jnp.float32))
        return (Rollout(state, t.obs, sums * (1 - done[:, None])), ended), batch

    start = (rollout, Episodes(*jnp.zeros(4)))
    (rollout, ended), batch = jax.lax.scan(step, start, jax.random.split(key, steps))
    return rollout, batch, ended


def evaluate(policy: Callable, key: jax.Array, env: Env, episodes: int) -> dict[str, jax.Array]:
    """{"return", "cost", "length"}, each (episodes,), of fresh episodes of `policy(obs, key)`, each counted up to its first end."""
    key_reset, key_steps = jax.random.split(key)
    state, obs = env.reset(jax.random.split(key_reset, episodes))

    def step(carry, key):
        state, obs, alive, sums = carry
        state, t = env.step(state, policy(obs, key))
        sums = sums + alive * jnp.stack([t.reward, t.cost, jnp.ones_like(t.reward)])
        return (state, t.obs, alive * (1.0 - (t.terminated | t.truncated)), sums), None

    start = (state, obs, jnp.ones(episodes), jnp.zeros((3, episodes)))
    sums = jax.lax.scan(step, start, jax.random.split(key_steps, env.horizon))[0][3]
    return dict(zip(("return", "cost", "length"), sums, strict=True))


class Points(NamedTuple):
    """State-action pairs with the Monte-Carlo returns of a policy from them."""

    obs: jax.Array  # (n, o)
    action: jax.Array  # (n, a)
    returns: jax.Array  # (n,) discounted reward
    costs: jax.Array  # (n,) discounted cost


def monte_carlo_points(
    explore: Callable, policy: Callable, key: jax.Array, env: Env, n: int, gamma: float, reward_scale: float, termination_cost: float
) -> Points:
    """n points met by `explore(obs, key)` in the first half of an episode, each followed by `policy` for half an episode.

    Rewards are multiplied by `reward_scale`; a terminal step costs `termination_cost` more. The remaining gamma^(T/2) is
    dropped; the clock restarts at the point, so that time-outs, which Q bootstraps through, do not cut returns short.
    """
    keys = jax.random.split(key, 5)
    state, obs = env.reset(jax.random.split(keys[0], n))
    half = max(1, env.horizon // 2)  # an episode may be one step
    leave = jax.random.randint(keys[1], (n,), 0, half)
    select = lambda where, new, old: jax.tree.map(lambda x, y: jnp.where(where.reshape((-1,) + (1,) * (x.ndim - 1)), x, y), new, old)

    def step(carry, step):  # one scan for both halves: a program with one environment step compiles in half the time
        i, key = step
        state, obs, action, point, weight, sums = carry
        point = select(i == leave, (state, obs), point)
        state, obs = select(jnp.array([i == half]), (point[0]._replace(t=jnp.zeros_like(state.t)), point[1]), (state, obs))
        action = jnp.where(i <= half, explore(obs, jnp.where(i == half, keys[3], key)), action)
        first = action
        state, t = env.step(state, action)
        counts = (i >= half) * weight
        sums = sums + counts[:, None] * jnp.stack([reward_scale * t.reward, t.cost + termination_cost * t.terminated], -1)
        weight = jnp.where(i >= half, weight * gamma * (1.0 - t.terminated), weight)
        return (state, t.obs, policy(t.obs, key), point, weight, sums), first

    carry = (state, obs, jnp.zeros((n, env.action_size)), (state, obs), jnp.ones(n), jnp.zeros((n, 2)))
    steps = (jnp.arange(2 * half), jnp.concatenate([jax.random.split(keys[2], half), jax.random.split(keys[4], half)]))
    (*_, (_, start), _, sums), actions = jax.lax.scan(step, carry, steps)
    return Points(start, actions[half], sums[:, 0], sums[:, 1])
