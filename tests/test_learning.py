"""algos/: the scripts' own steps learn what is known in closed form on probe environments, in seconds."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from algos import finetuning, marvel, sac_lag, training
from algos.lagrangian import init_multiplier
from algos.networks import sample_action
from data.replay import empty_replay
from envs.rollout import Episodes, collect, start_rollout
from tests import probes

BOTH = pytest.mark.parametrize("algo", [marvel, sac_lag], ids=["marvel", "sac_lag"])


def uniform(obs, key, elapsed):
    return jax.random.uniform(key, (*obs.shape[:-1], 1), minval=-1.0)


def random_data(env, steps=64, num_envs=16):
    """Transitions of a uniformly random policy, as one flat Batch."""
    actors = start_rollout(jax.random.key(0), env, num_envs)
    _, batch, _ = collect(actors, uniform, jax.random.key(1), env, steps)
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), batch)


def fit_critics(env, steps, weights=(0.0, 0.0), **changes):
    """Marvel's phase 2 on random data: (networks, learner) after `steps` gradient steps."""
    args = marvel.Args(
        hidden=(32, 32),
        vae_hidden=(8,),
        reward_scale=0.1,
        vpa_alpha_reward=weights[0],
        vpa_alpha_cost=weights[1],
        **changes,
    )
    networks, optimizers = training.make_networks(args, env), {"critics": training.critic_adam(3e-3)}
    learner = training.init_learner(training.init_params(jax.random.key(2), networks, env.obs_size), optimizers)
    step = partial(marvel.vpa_step, networks=networks, optimizers=optimizers, args=args)
    run = jax.jit(partial(training.train_on_dataset, step=step, batch_size=64, steps=steps))
    return networks, run(learner, (random_data(env),), jax.random.key(3))[0]


def values(networks, learner, obs, action):
    critics = learner.params["critics"]
    return np.asarray(networks.reward.apply(critics["reward"], obs, action)), np.asarray(networks.qc(critics, obs, action))


ACTIONS = jnp.linspace(-0.9, 0.9, 7)[:, None]


def test_critics_bootstrap_through_time_outs():
    """Reward 2 (scaled 0.2) and cost 0.5 for ever, although episodes time out after 5 steps: r / (1 - gamma)."""
    networks, learner = fit_critics(probes.Constant(2.0, 0.5, 5), 2000, gamma=0.9, tau=0.05)
    q, qc = values(networks, learner, jnp.ones((7, 1)), ACTIONS)
    np.testing.assert_allclose(q, np.full((2, 7), 2.0), atol=0.06)
    np.testing.assert_allclose(qc, np.full(7, 5.0), atol=0.15)


def test_critics_stop_at_terminal_states():
    """The same rewards up to a terminal state after 4 steps: r (1 - gamma^(4-k)) / (1 - gamma) from clock k."""
    networks, learner = fit_critics(probes.Constant(2.0, 0.5, 50, terminal_at=4), 2000, gamma=0.9, tau=0.05)
    left = (1 - 0.9 ** np.arange(4, 0, -1)) / 0.1
    for action in (-0.5, 0.5):
        q, qc = values(networks, learner, jnp.eye(5)[:4], jnp.full((4, 1), action))
        np.testing.assert_allclose(q, np.tile(0.2 * left, (2, 1)), atol=0.04)
        np.testing.assert_allclose(qc, 0.5 * left, atol=0.1)


def test_cost_critic_finds_a_delayed_cost():
    """The first action's sign decides a cost two steps later: gamma^2 or 0 from the start, whatever follows."""
    networks, learner = fit_critics(probes.DelayedCost(), 2000, gamma=0.9, tau=0.05)
    _, guilty = values(networks, learner, jnp.zeros((3, 2)), jnp.array([[0.3], [0.6], [0.9]]))
    _, innocent = values(networks, learner, jnp.zeros((3, 2)), jnp.array([[-0.3], [-0.6], [-0.9]]))
    np.testing.assert_allclose(guilty, np.full(3, 0.81), atol=0.12)
    np.testing.assert_allclose(innocent, np.zeros(3), atol=0.12)


def test_entropy_raises_both_values():
    """VPA's bonuses: with a policy of entropy H, both values rise by alpha gamma H / (1 - gamma)."""
    env = probes.Constant(0.0, 0.0, 5)
    networks, learner = fit_critics(env, 2000, (0.2, 0.1), gamma=0.9, tau=0.05)
    mean, log_std = networks.actor.apply(learner.params["actor"], jnp.ones((20_000, 1)))
    entropy = -float(sample_action(jax.random.key(0), mean, log_std)[1].mean())
    assert abs(entropy) > 0.3
    q, qc = values(networks, learner, jnp.ones((7, 1)), ACTIONS)
    assert q.mean() == pytest.approx(0.2 * 9 * entropy, abs=0.25)
    assert qc.mean() == pytest.approx(0.1 * 9 * entropy, abs=0.15)


# ---------------------------------------------------------------- the constrained optimum

LIMIT, ENVS = 0.25, 64  # under E[max(a, 0)^2] <= 0.25 the best mean action is 0.5, at lambda 1


def solve(algo, blocks=600, limit=LIMIT, **changes):
    """collect and train_online on the constrained bandit: (mean action, mean cost, lambda), each over the last
    quarter."""
    env = probes.OneStep()
    common = dict(
        reserve=0.0, cost_limit=limit, hidden=(32, 32), reward_scale=1.0, batch_size=64, actor_lr=3e-3, critic_lr=3e-3, tau=0.05,
        episodes_per_iter=ENVS, kp=0.5, ki=0.03, kd=0.0, max_multiplier=10.0, gain_rates=(0.0, 0.0, 0.0),
    )  # fmt: skip
    if algo is marvel:
        args = algo.Args(**common, vae_hidden=(8,), updates_per_iter=4, entropy_weight=0.01, anchor_weight=0.0, actor_warmup=0, **changes)
    else:
        entropy = dict(temperature_lr=3e-3, entropy_per_action=-1.0, init_temperature=0.05)
        args = algo.Args(**common, **entropy, updates_per_block=4, **changes)
    networks = training.make_networks(args, env)
    optimizers = {"actor": optax.adam(3e-3), "critics": optax.adam(3e-3), "log_alpha": optax.adam(3e-3)}
    optimizers = {name: optimizers[name] for name in ("actor", "critics", *(["log_alpha"] if algo is sac_lag else []))}
    step = partial(algo.online_step, networks=networks, optimizers=optimizers, args=args)
    params = training.init_params(jax.random.key(0), networks, env.obs_size)
    params |= {"prior": params["actor"], "log_alpha": jnp.log(jnp.float32(0.05))}
    learner, replay = training.init_learner(params, optimizers), empty_replay(40 * ENVS, 1, 1)
    pending = Episodes(*jnp.zeros(4))

    def block(carry, key):
        learner, multiplier, replay, rollout, pending = carry
        key_collect, key_learn = jax.random.split(key)
        actor = partial(networks.actor.apply, learner.params["actor"])
        policy = lambda obs, key, elapsed: sample_action(key, *actor(obs))[0]
        rollout, new, ended = collect(rollout, policy, key_collect, env, 1)
        if algo is marvel:
            learner, multiplier, replay, _ = finetuning.train_online(
                learner, multiplier, replay, replay.data, new, ended, key_learn, 1, step, finetuning.freeze_actor, args
            )
        else:
            learner, multiplier, replay, pending, _ = sac_lag.train_online(
                learner, multiplier, replay, pending, new, ended, key_learn, step, args
            )
        found = jnp.stack([new.action.mean(), ended.means()["cost"], multiplier.value])
        return (learner, multiplier, replay, rollout, pending), found

    start = (learner, init_multiplier(args), replay, start_rollout(jax.random.key(1), env, ENVS), pending)
    trace = jax.jit(lambda: jax.lax.scan(block, start, jax.random.split(jax.random.key(2), blocks))[1])()
    return np.asarray(trace)[-blocks // 4 :].mean(0)


@BOTH
def test_constrained_optimum(algo):
    """Cost within 10% of the limit, mean action within 0.08 of the optimum (a stochastic policy spends some cost on
    its variance),
    lambda within 20% of the known dual solution."""
    action, cost, multiplier = solve(algo, lagrangian="pid")
    assert cost == pytest.approx(LIMIT, rel=0.1)
    assert action == pytest.approx(0.5, abs=0.08)
    assert multiplier == pytest.approx(1.0, rel=0.2)


@BOTH
def test_slack_constraint_leaves_the_multiplier_at_zero(algo):
    """A limit that no policy can break: lambda stays 0 and the action goes to its bound."""
    action, _, multiplier = solve(algo, blocks=300, limit=2.0, lagrangian="pid")
    assert multiplier == 0
    assert action > 0.8
