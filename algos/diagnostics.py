"""How well critics rank actions: Spearman correlation with Monte-Carlo returns (Marvel, arXiv 2412.04426, Table 1)."""

from collections.abc import Callable
from functools import partial

import chex
import jax
import jax.numpy as jnp

from algos.networks import Networks
from algos.seeds import vmap_seeds
from algos.training import Run, evaluated_policy
from envs.core import Env
from envs.rollout import Points, monte_carlo_points


def spearman(x: jax.Array, y: jax.Array) -> jax.Array:
    """Spearman's rank correlation of x and y (n,), ties at their mean rank; NaN if either is constant."""
    chex.assert_equal_shape([x, y])
    rank = lambda v: jnp.sum(v[:, None] > v, 1) + 0.5 * jnp.sum(v[:, None] == v, 1)
    constant = jnp.all(x == x[0]) | jnp.all(y == y[0])  # corrcoef's rounding would make something of it
    return jnp.where(constant, jnp.nan, jnp.corrcoef(rank(x), rank(y))[0, 1])


def rank_correlations(critics: dict, own: Points, random: Points, networks: Networks) -> dict[str, jax.Array]:
    """Correlations of Q and Qc with Monte-Carlo returns on the policy's own and on random-policy rollouts."""
    out: dict[str, jax.Array] = {}
    for name, points in {"policy": own, "random": random}.items():
        q, qc = (f(critics, points.obs, points.action) for f in (networks.q, networks.qc))
        out |= {f"rank_q_{name}": spearman(q, points.returns), f"rank_qc_{name}": spearman(qc, points.costs)}
    return out


def rank_diagnostic(run: Run, networks: Networks) -> Callable:
    """A function (phase, actor, critics, gradient_steps) that logs the correlations of every seed, at `rank_points` points each.

    The actor is taken to be frozen: its Monte-Carlo returns are measured at the first call only.
    """
    args, env = run.args, run.env
    points: list[Points] = []
    policy = lambda actor: evaluated_policy(networks.actor, actor, "sample")
    uniform = lambda obs, key: jax.random.uniform(key, (*obs.shape[:-1], env.action_size), minval=-1.0)
    # Simulators of another package are one per row, and a batch of points is the largest: one batch after another shares them.
    native = isinstance(env, Env)
    several = jax.vmap if native else lambda function: partial(jax.lax.map, function)
    options = (env, args.rank_points, args.gamma, args.reward_scale, args.termination_cost)

    def of_both(actor, key) -> tuple[Points, Points]:
        """Points that the policy meets, and points that a uniformly random one does."""

        def measure(random):
            explore = lambda obs, key: jnp.where(random, uniform(obs, key), policy(actor)(obs, key))
            return monte_carlo_points(explore, policy(actor), key, *options)

        points = several(measure)(jnp.array([False, True]))
        own, random = (jax.tree.map(lambda x, i=i: x[i], points) for i in (0, 1))
        return own, random

    measure = vmap_seeds(of_both) if native else jax.jit(lambda *seeds: jax.lax.map(lambda seed: of_both(*seed), seeds))
    correlations = vmap_seeds(partial(rank_correlations, networks=networks))

    def log(phase: str, actor, critics, gradient_steps: int) -> None:
        if args.rank_points:
            points[:] = points or measure(actor, run.keys("rank"))
            run.log.log(phase, "rank", gradient_steps=gradient_steps, env_steps=0, **correlations(critics, *points))

    return log
