"""algos/{bear_lag,bc_safe,jsrl,pex,so2,wsrl,cal,naive_o2o}.py, and switches of finetuning.py: what they have of their own, against values worked out independently."""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats

from algos import bc_safe, bear_lag, cal, cpq, finetuning, jsrl, marvel, pex, so2, training, wsrl
from algos.networks import Actor, sample_action
from data import dsrl
from envs.rollout import Batch, collect, start_rollout
from tests import probes
from tests.test_maths import variant  # noqa: F401  (a fixture)

ENV = SimpleNamespace(obs_size=3, privileged_size=0, action_size=2, horizon=10, name="none")
SMALL = dict(hidden=(8,), gamma=0.9, reward_scale=0.1)


def built(algo, **changes):
    """(arguments, networks, parameters) of small networks."""
    args = algo.Args(**{**SMALL, "vae_hidden": (8,), **changes})
    networks = training.make_networks(args, ENV)
    params = training.init_params(jax.random.key(0), networks, ENV.obs_size)
    if algo is bear_lag:
        params["log_duals"] = jnp.log(jnp.array(args.init_duals))
    return args, networks, params


def some_batch(n=6):
    keys = jax.random.split(jax.random.key(5), 6)
    normal = lambda k, *shape: jax.random.normal(k, shape)
    terminated = jnp.array([0, 1, 0, 0, 1, 0.0])[:n]
    return Batch(
        normal(keys[0], n, 3),
        jnp.tanh(normal(keys[1], n, 2)),
        normal(keys[2], n),
        jnp.abs(normal(keys[3], n)),
        normal(keys[4], n, 3),
        terminated,
    )


# ---------------------------------------------------------------- BEAR


def test_mmd_against_a_double_loop(variant):  # noqa: F811
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(4, 3, 2)), rng.normal(size=(4, 5, 2)) + 0.5
    kernel = lambda a, b: np.exp(-((a - b) ** 2).sum() / 1.4)
    mean = lambda u, v: np.mean([kernel(a, b) for a in u for b in v])
    expected = [mean(u, u) - 2 * mean(u, v) + mean(v, v) for u, v in zip(x, y)]
    found = variant(lambda x, y: bear_lag.mmd_squared(x, y, 0.7))(jnp.float32(x), jnp.float32(y))
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_mmd_is_zero_only_for_equal_samples():
    x = jax.random.normal(jax.random.key(0), (6, 2))
    assert float(bear_lag.mmd_squared(x, x[::-1], 1.0)) == pytest.approx(0.0, abs=1e-6)
    assert float(bear_lag.mmd_squared(x, x + 1.0, 1.0)) > 0.1


@pytest.mark.parametrize("actions, std", [(2, 0.1), (2, 0.3), (6, 0.3), (8, 0.3)])
def test_a_policy_that_is_the_behaviour_keeps_its_mmd_limit(actions, std):
    """Ten samples of one distribution twice: their MMD is not zero, but below the limit that beta enforces; half an action away it is above."""
    args, keys = bear_lag.Args(), jax.random.split(jax.random.key(0))
    x, y = (jnp.tanh(std * jax.random.normal(key, (1000, args.mmd_samples, actions))) for key in keys)
    mmd = lambda x, y: float(jnp.sqrt(jnp.maximum(bear_lag.mmd_squared(x, y, args.mmd_sigma), 0)).mean())  # rounding
    assert mmd(x, y) < args.mmd_limit < mmd(x, y + 0.5)


def test_bear_critic_targets():
    """Loss of critics that output known constants: targets are w min + (1-w) max of the targets' two critics, the mean for cost."""
    args, networks, params = built(bear_lag, mmd_samples=4, termination_cost=7.0)
    batch = some_batch()
    constant = lambda critic, value: jax.tree.map(jnp.zeros_like, critic) | {"params": _with_bias(critic["params"], value)}
    targets = {"reward": constant(params["critics"]["reward"], [2.0, 6.0]), "cost": constant(params["critics"]["cost"], [3.0])}
    critics = {"reward": constant(params["critics"]["reward"], [0.5, -0.5]), "cost": constant(params["critics"]["cost"], [1.0])}
    loss, info = bear_lag.bear_critic_loss(critics, params, targets, batch, jax.random.key(1), networks, args, 10.0)
    alive = 0.9 * (1 - np.asarray(batch.terminated))
    target = 0.1 * np.asarray(batch.reward) + alive * (0.75 * 2 + 0.25 * 6)
    cost_target = np.asarray(batch.cost) + 7.0 * np.asarray(batch.terminated) + alive * 3.0
    expected = np.mean((np.array([[0.5], [-0.5]]) - target) ** 2) + np.mean((1.0 - cost_target) ** 2)
    assert float(loss) == pytest.approx(expected, rel=1e-4)
    assert float(info["q"]) == pytest.approx(0.0, abs=1e-6)


def _with_bias(params, values):
    """All weights zero, the last layer's bias of each member as given."""
    zero = jax.tree.map(jnp.zeros_like, params)
    (name,) = zero
    last = sorted(k for k in zero[name] if k.startswith("Dense"))[-1]
    zero[name][last]["bias"] = jnp.array(values)[:, None]
    return zero


def test_dual_losses_move_both_the_right_way():
    gradient = jax.grad(bear_lag.dual_losses)
    high = gradient(jnp.zeros(2), 0.2, 9.0, 0.05, 4.0)
    low = gradient(jnp.zeros(2), 0.01, 1.0, 0.05, 4.0)
    np.testing.assert_allclose(high, [-0.15, -5.0], rtol=1e-5)  # descent raises both
    np.testing.assert_allclose(low, [0.04, 3.0], rtol=1e-5)


@pytest.mark.parametrize("limit", [20.0, np.inf])
def test_bear_s_actor_pays_for_cost_only_where_there_is_a_limit(limit):
    args, networks, params = built(bear_lag, cost_limit=limit)
    loss = lambda critics: bear_lag.bear_actor_loss(
        params["actor"], params | {"critics": critics}, some_batch(), jax.random.key(1), networks, args
    )[0]
    slopes = jax.tree.map(lambda x: float(jnp.abs(x).max()), jax.grad(loss)(params["critics"]))
    assert max(jax.tree.leaves(slopes["reward"])) > 0 and (max(jax.tree.leaves(slopes["cost"])) > 0) == np.isfinite(limit)


def test_bear_actor_comes_back_to_the_behaviour():
    """With no value to gain, descending the actor's loss brings the MMD down."""
    args, networks, params = built(bear_lag)
    params["critics"] = jax.tree.map(jnp.zeros_like, params["critics"])
    params["actor"] = jax.tree.map(lambda x: 3 * x, params["actor"])
    batch = some_batch()
    loss = lambda actor, key: bear_lag.bear_actor_loss(actor, params, batch, key, networks, args)

    @jax.jit
    def step(actor, key):
        gradient, info = jax.grad(loss, has_aux=True)(actor, key)
        return jax.tree.map(lambda p, g: p - 0.3 * g, actor, gradient), info["mmd"]

    actor, found = params["actor"], []
    for key in jax.random.split(jax.random.key(3), 300):
        actor, mmd = step(actor, key)
        found.append(float(mmd))
    assert np.mean(found[-20:]) < 0.6 * np.mean(found[:20])


# ---------------------------------------------------------------- BC-Safe


def trajectories(*episodes):
    """A dataset of (length, total return, total cost, finished) episodes, all paid in the last step."""
    rows = []
    for length, total, cost, finished in episodes:
        for i in range(length):
            last = i == length - 1
            rows.append((total * last, cost * last, last and finished))
    rewards, costs, ends = (np.array(x, np.float32) for x in zip(*rows))
    obs = np.zeros((len(rows), 3), np.float32)
    return dsrl.Dataset(obs, obs, np.zeros((len(rows), 2), np.float32), rewards, costs, np.zeros(len(rows), bool), ends > 0)


def test_cloned_trajectories():
    data = trajectories((2, 10.0, 5.0, True), (3, 50.0, 30.0, True), (1, 48.0, 40.0, True), (2, 2.0, 0.0, True), (4, 99.0, 0.0, False))
    chosen = lambda **changes: bc_safe.cloned(data, bc_safe.Args(**changes), "a file")
    runs = [slice(0, 2), slice(2, 5), slice(5, 6), slice(6, 8), slice(8, 12)]
    of = lambda mask: [bool(mask[r].all()) for r in runs if mask[r].all() == mask[r].any()]
    assert of(chosen()) == [True, False, False, True, False]  # the unfinished one costs nothing yet, and does not count
    assert of(chosen(cost_limit=35.0)) == [True, True, False, True, False]
    assert of(chosen(data="all")) == [True] * 5
    assert of(chosen(data="best", cost_limit=40.0)) == [False, True, False, False, False]
    np.testing.assert_array_equal(chosen(data="best", cost_limit=40.0), cpq.cloned(data, cpq.Args(cost_limit=40.0), "a file"))
    assert of(chosen(data="frontier", frontier=0.9)) == [True, True, True, True, False]
    assert of(chosen(data="frontier", frontier=0.97)) == [True, True, False, True, False]


def test_bc_recovers_a_known_policy():
    """Data drawn from tanh(N(obs_0, 0.3)): cloned to the same mean and spread."""
    actor, optimizers = Actor((32,), 3, 2), {"actor": optax.adam(3e-3)}
    obs = jax.random.uniform(jax.random.key(0), (4096, 3), minval=-1.0)
    u = obs[:, :1] + 0.3 * jax.random.normal(jax.random.key(1), (4096, 2))
    zero = jnp.zeros(4096)
    data = Batch(obs, jnp.tanh(u), zero, zero, obs, zero)
    learner = training.init_learner({"actor": actor.init(jax.random.key(0), obs)}, optimizers)
    step = partial(bc_safe.bc_step, actor=actor, optimizers=optimizers)
    train = jax.jit(partial(training.train_on_dataset, step=step, batch_size=256, steps=1500))
    learner, _ = train(learner, (data,), jax.random.key(2))
    mean, log_std = actor.apply(learner.params["actor"], obs)
    assert float(jnp.abs(mean - obs[:, :1]).mean()) < 0.06
    assert float(jnp.exp(log_std).mean()) == pytest.approx(0.3, abs=0.03)


# ---------------------------------------------------------------- JSRL


def test_advance():
    args = jsrl.Args(stages=4, tolerance=0.1, handover=0.5, iterations=100, cost_limit=20.0)
    start = jsrl.Curriculum(jnp.float32(1.0), jnp.full(2, jnp.nan))
    episodes = lambda ret, cost: {"return": jnp.float32(ret), "cost": jnp.float32(cost)}
    first = jsrl.advance(start, episodes(100.0, 30.0), 1, args)
    assert float(first.share) == pytest.approx(0.75) and first.guide.tolist() == [100.0, 30.0]
    worse = jsrl.advance(first, episodes(80.0, 0.0), 2, args)  # a fifth below the guide's return
    assert float(worse.share) == pytest.approx(0.75)
    dear = jsrl.advance(first, episodes(120.0, 34.0), 2, args)  # above both the limit and 1.1 times the guide's cost
    assert float(dear.share) == pytest.approx(0.75)
    good = jsrl.advance(first, episodes(91.0, 32.0), 2, args)
    assert float(good.share) == pytest.approx(0.5) and good.guide.tolist() == [100.0, 30.0]
    assert float(jsrl.advance(first, episodes(0.0, 99.0), 25, args).share) == pytest.approx(0.5)  # the schedule's line
    assert float(jsrl.advance(first, episodes(0.0, 99.0), 60, args).share) == 0.0
    share = lambda guide, ret, cost: float(
        jsrl.advance(jsrl.Curriculum(jnp.float32(1.0), jnp.array(guide)), episodes(ret, cost), 1, args).share
    )
    assert share((100.0, 5.0), 100.0, 19.0) == 0.75 and share((100.0, 5.0), 100.0, 21.0) > 0.75  # up to the limit, whatever the guide costs
    assert share((-100.0, 5.0), -105.0, 5.0) == 0.75 and share((-100.0, 5.0), -115.0, 5.0) > 0.75


def test_the_guide_plays_first():
    env = probes.Constant(1.0, 0.0, horizon=8)
    rollout = start_rollout(jax.random.key(0), env, 3)
    guide, policy = (
        (lambda v: lambda obs, key: jnp.full((*obs.shape[:-1], 1), v))(-0.5),
        lambda obs, key: jnp.full((*obs.shape[:-1], 1), 0.5),
    )
    _, batch, ended = collect(rollout, jsrl.jump_start(guide, policy, 0.5, env.horizon), jax.random.key(1), env, 16)
    expected = np.where(np.arange(16) % 8 < 4, -0.5, 0.5)
    np.testing.assert_array_equal(batch.action[..., 0], np.tile(expected[:, None], (1, 3)))
    assert float(ended.number) == 6


# ---------------------------------------------------------------- PEX


def test_the_critics_choose_between_the_policies():
    """Softmax of (Q - lambda Qc) / T over the two policies' actions, seen in how often either is chosen."""
    args, networks, params = built(pex)
    other = training.init_params(jax.random.key(9), networks, ENV.obs_size)["actor"]
    both = {"prior": params["actor"], "actor": other}
    obs = jnp.broadcast_to(jnp.array([0.3, -1.0, 0.7]), (4000, 3))
    action, log_prob = pex.expanded_policy(both, params["critics"], 0.8, obs, jax.random.key(2), networks, 0.5)
    keys = jax.random.split(jax.random.key(2), 3)
    drawn = [sample_action(k, *networks.actor.apply(both[name], obs)) for k, name in zip(keys, ("prior", "actor"))]
    from_prior = np.all(np.asarray(action == drawn[0][0]), 1)
    from_new = np.all(np.asarray(action == drawn[1][0]), 1)
    assert np.all(from_prior ^ from_new)
    np.testing.assert_allclose(log_prob, np.where(from_prior, drawn[0][1], drawn[1][1]), rtol=1e-6)
    score = [networks.q(params["critics"], obs, a) - 0.8 * networks.qc(params["critics"], obs, a) for a, _ in drawn]
    expected = jax.nn.sigmoid((score[0] - score[1]) / 0.5)
    assert from_prior.mean() == pytest.approx(float(expected.mean()), abs=0.03)
    assert 0.05 < from_prior.mean() < 0.95


def test_pex_critic_targets():
    """The targets choose and value the next action, with entropy in the reward's target only, and dying costs 7."""
    args, networks, params = built(pex, entropy_weight=0.3, termination_cost=7.0)
    other, batch, key = training.init_params(jax.random.key(9), networks, ENV.obs_size), some_batch(), jax.random.key(10)
    params, targets = {"prior": params["actor"], "actor": other["actor"], "critics": params["critics"]}, other["critics"]
    draw = jax.jit(lambda critics, m: pex.expanded_policy(params, critics, m, batch.next_obs, key, networks, args.temperature))
    a, log_prob = map(np.asarray, draw(targets, 0.8))
    assert all((a != draw(*others)[0]).any() for others in ((params["critics"], 0.8), (targets, 0.0)))  # the choice tells them apart
    values = jax.jit(
        lambda critics, obs, action: (networks.reward.apply(critics["reward"], obs, action), networks.qcs(critics, obs, action))
    )
    (next_q, next_qc), (q, qc) = values(targets, batch.next_obs, a), values(params["critics"], batch.obs, batch.action)
    reward, cost, terminated = (np.asarray(x) for x in (batch.reward, batch.cost, batch.terminated))
    target = 0.1 * reward + 0.9 * (1 - terminated) * (np.min(next_q, 0) - 0.3 * log_prob)
    cost_target = cost + 7 * terminated + 0.9 * (1 - terminated) * np.asarray(next_qc[0])
    loss = jax.jit(lambda critics: pex.pex_critic_loss(critics, params, targets, 0.8, batch, key, networks, args)[0])
    expected = np.mean((q - target) ** 2), np.mean((qc - cost_target) ** 2)
    assert float(loss(params["critics"])) == pytest.approx(float(sum(expected)), rel=1e-5)


# ---------------------------------------------------------------- SO2


def test_perturbed_actions():
    args = so2.Args(noise=0.5, noise_clip=0.6)
    action = jnp.zeros((20_000, 1))
    moved = np.asarray(so2.perturbed(jax.random.key(0), action, args))[:, 0]
    assert np.abs(moved).max() == pytest.approx(0.6)
    assert np.mean(np.abs(moved) > 0.5999) == pytest.approx(2 * (1 - 0.8849), abs=0.02)  # P(|N(0, 0.5)| > 0.6)
    inside = scipy.stats.truncnorm(-0.59 / 0.5, 0.59 / 0.5, scale=0.5).std()
    assert moved[np.abs(moved) < 0.59].std() == pytest.approx(inside, abs=0.01)
    at_bound = np.asarray(so2.perturbed(jax.random.key(1), jnp.ones((1000, 2)), args))
    assert at_bound.max() == 1.0 and at_bound.min() >= 0.4 - 1e-6


def test_so2_without_noise_is_the_plain_critic_loss():
    args, networks, params = built(so2, noise=0.3, entropy_weight=0.01, termination_cost=7.0)
    batch, critics = some_batch(), params["critics"]
    loss = lambda args: so2.so2_critic_loss(critics, params["actor"], critics, batch, jax.random.key(4), networks, args)[0]
    key_action, _ = jax.random.split(jax.random.key(4))
    plain = marvel.critic_loss(critics, params["actor"], critics, (0.01, 0.0), batch, key_action, networks, args)[0]
    assert float(loss(replace(args, noise=0.0))) == pytest.approx(float(plain), rel=1e-6)
    assert float(loss(args)) != pytest.approx(float(plain), rel=1e-4)


# ---------------------------------------------------------------- WSRL


def test_wsrl_bootstraps_from_the_minimum_of_a_random_subset():
    """With as many critics as the subset it is the plain loss without entropy; with more, the target is of a pair that varies."""
    args, networks, params = built(wsrl, num_critics=2, termination_cost=7.0)
    batch, critics = some_batch(), params["critics"]
    key_action, _ = jax.random.split(jax.random.key(4))
    found = wsrl.wsrl_critic_loss(critics, params["actor"], critics, batch, jax.random.key(4), networks, args)[0]
    plain = marvel.critic_loss(critics, params["actor"], critics, (0.0, 0.0), batch, key_action, networks, args)[0]
    assert float(found) == pytest.approx(float(plain), rel=1e-6)

    args, networks, params = built(wsrl, num_critics=5)
    critics, seen = params["critics"], set()
    q = np.asarray(networks.reward.apply(critics["reward"], batch.obs, batch.action))
    for key in jax.random.split(jax.random.key(4), 12):
        action, _ = sample_action(jax.random.split(key)[0], *networks.actor.apply(params["actor"], batch.next_obs))
        qs = np.asarray(networks.reward.apply(critics["reward"], batch.next_obs, action))
        target = lambda i, j: 0.1 * np.asarray(batch.reward) + 0.9 * (1 - np.asarray(batch.terminated)) * np.minimum(qs[i], qs[j])
        info = wsrl.wsrl_critic_loss(critics, params["actor"], critics, batch, key, networks, args)[1]
        off = {(i, j): abs(float(info["reward_critic_loss"]) - np.mean((q - target(i, j)) ** 2)) for i in range(5) for j in range(i)}
        seen.add(min(off, key=off.get))
        assert min(off.values()) < 1e-6
    assert len(seen) > 3


def test_wsrl_s_actor_takes_the_minimum_of_all_critics():
    args, networks, params = built(wsrl, num_critics=5)
    batch, critics, key = some_batch(), params["critics"], jax.random.key(4)
    action, log_prob = sample_action(key, *networks.actor.apply(params["actor"], batch.obs))
    q = np.asarray(networks.reward.apply(critics["reward"], batch.obs, action)).min(0)
    qc = np.asarray(networks.cost.apply(critics["cost"], batch.obs, action))[0]
    found = wsrl.wsrl_actor_loss(params["actor"], critics, params["actor"], 0.7, 0.3, batch, key, networks, args)[0]  # KL is 0
    assert float(found) == pytest.approx(float(np.mean(args.entropy_weight * np.asarray(log_prob) - q + 0.7 * qc)), rel=1e-5)


def test_the_smallest_q_s_gradient_is_the_smallest_member_s():
    """No reduction over the members: its gradient counts those that equal the minimum, which was none after another rounding (NaN)."""
    args, networks, params = built(wsrl, num_critics=5)
    batch, critics = some_batch(), params["critics"]
    qs = networks.reward.apply(critics["reward"], batch.obs, batch.action)
    smallest = lambda a: jnp.take_along_axis(networks.reward.apply(critics["reward"], batch.obs, a), qs.argmin(0)[None], 0).sum()
    q = lambda a: networks.q(critics, batch.obs, a).sum()
    np.testing.assert_allclose(jax.grad(q)(batch.action), jax.grad(smallest)(batch.action), rtol=1e-5, atol=1e-7)
    assert "reduce_min" not in str(jax.make_jaxpr(jax.grad(q))(batch.action))


def test_nothing_learns_while_everything_is_frozen():
    old = training.Learner({"actor": jnp.zeros(2), "critics": jnp.ones(3)}, {"cost": jnp.ones(1)}, {"actor": jnp.int32(4)})
    new = jax.tree.map(lambda x: x + 1, old)
    for frozen, kept in ((True, old), (False, new)):
        found = finetuning.freeze_all(new, old, jnp.array(frozen))
        assert jax.tree.all(jax.tree.map(np.array_equal, found, kept))


# ---------------------------------------------------------------- CAL


def test_pessimistic_cost_is_mean_plus_standard_deviations():
    """Of 1, 2, 3, 6: mean 3, unbiased standard deviation sqrt(14/3); of one critic the critic itself; finite gradients if all agree."""
    args, networks, _ = built(cal, cost_critics=4, cost_pessimism=0.5)
    qcs = jnp.array([1.0, 2.0, 3.0, 6.0])[:, None]
    assert float(networks.pessimistic(qcs)[0]) == pytest.approx(3 + 0.5 * np.sqrt(14 / 3))
    assert np.isfinite(jax.grad(lambda x: networks.pessimistic(x)[0])(jnp.ones((4, 1)))).all()
    _, alone, _ = built(marvel)
    assert alone.pessimistic(qcs[:1]).tolist() == [1.0]


def test_cost_critics_of_an_ensemble_follow_their_own_targets():
    args, networks, params = built(cal, entropy_weight=0.0, termination_cost=7.0)
    batch, critics = some_batch(), params["critics"]
    found = cal.critic_loss(critics, params["actor"], critics, (0.0, 0.0), batch, jax.random.key(4), networks, args)[1]
    action, _ = sample_action(jax.random.key(4), *networks.actor.apply(params["actor"], batch.next_obs))
    after, now = networks.qcs(critics, batch.next_obs, action), networks.qcs(critics, batch.obs, batch.action)
    assert after.shape == (4, 6)
    errors = [now[i] - (batch.cost + 7 * batch.terminated + 0.9 * (1 - batch.terminated) * after[i]) for i in range(4)]
    assert float(found["cost_critic_loss"]) == pytest.approx(float(np.mean(np.square(errors))), rel=1e-5)


def test_rectified_multiplier_and_its_ascent():
    """kappa 2, q_d 3: far below the threshold the constraint does not act; above it weighs more than lambda."""
    args = cal.Args(rectification=20.0, reward_scale=0.1)
    found = [float(cal.rectified(0.5, qc, 3.0, args)) for qc in (1.0, 2.9, 3.0, 4.0)]
    assert found == pytest.approx([0.0, 0.3, 0.5, 2.5])
    slope = jax.grad(cal.multiplier_loss)
    assert float(slope(jnp.log(0.5), 4.0, 3.0)) == pytest.approx(-0.5)  # descends: lambda rises
    assert float(slope(jnp.log(0.5), 1.0, 3.0)) == pytest.approx(1.0)


@pytest.mark.parametrize("limit", [20.0, np.inf])
def test_cal_step_moves_the_multiplier_only_where_there_is_a_limit(limit):
    args, networks, params = built(cal, cost_limit=limit, reserve=0.0)
    params = {"actor": params["actor"], "critics": params["critics"], "prior": params["actor"], "log_multiplier": jnp.log(0.07)}
    optimizers = {name: optax.adam(1e-3) for name in ("actor", "critics", "log_multiplier")}
    learner = training.init_learner(params, optimizers)
    threshold = cpq.thresholds(args.cost_limit, args.gamma, ENV.horizon)[0]
    after, info = cal.cal_step(learner, 9.0, 0.0, some_batch(), jax.random.key(0), networks, optimizers, args, threshold)
    assert jax.tree.all(jax.tree.map(lambda x: bool(jnp.all(jnp.isfinite(x))), after.params))
    moved = float(after.params["log_multiplier"] - params["log_multiplier"])
    assert moved == pytest.approx(0.0 if np.isinf(limit) else -1e-3, abs=1e-6)  # Qc is about 0, below the threshold: lambda falls
    assert float(info["multiplier"]) == 0.0  # and far below it the constraint does not act


# ---------------------------------------------------------------- the gate of CPQ and of pre-alignment


@pytest.mark.parametrize("highest, expected", [(8.0, 7.2), (2.0, 4.0)], ids=["raised", "as it is"])
def test_the_gate_lets_through_what_is_known_to_be_safe(highest, expected, variant):  # noqa: F811
    """Qc of safe trajectories 0 to `highest` in ten equal steps: the 90% quantile is 0.9 `highest`; q_thres 4."""
    networks = SimpleNamespace(qc=lambda critics, obs, action: critics * obs[:, 0])
    safe = some_batch()._replace(obs=jnp.linspace(0, 1, 11)[:, None])
    args = cpq.Args(gate_quantile=0.9)
    found = variant(lambda c: cpq.calibrated((4.0, 6.0), c, safe, networks, args))(jnp.float32(highest))
    np.testing.assert_allclose(found, [expected, 1.5 * expected], rtol=1e-6)
    assert cpq.calibrated((4.0, 6.0), 1.0, safe, networks, cpq.Args(gate_quantile=0.0)) == (4.0, 6.0)
    assert cpq.calibrated((np.inf, np.inf), 1.0, safe, networks, args) == (np.inf, np.inf)


def test_a_gated_state_is_worth_nothing_to_the_pre_aligned_critic():
    args, networks, params = built(marvel, vpa_alpha_reward=0.0)
    batch, critics, key = some_batch(), params["critics"], jax.random.key(4)
    action, _ = sample_action(key, *networks.actor.apply(params["actor"], batch.next_obs))
    q, qc = networks.q(critics, batch.next_obs, action), networks.qc(critics, batch.next_obs, action)
    gate = float(jnp.median(qc))
    loss = lambda gate: marvel.critic_loss(critics, params["actor"], critics, (0.0, 0.0), batch, key, networks, args, gate=gate)[1]
    now = np.asarray(networks.reward.apply(critics["reward"], batch.obs, batch.action))
    target = 0.1 * batch.reward + 0.9 * (1 - batch.terminated) * np.where(qc <= gate, q, 0.0)
    assert float(loss(gate)["reward_critic_loss"]) == pytest.approx(float(np.mean((now - target) ** 2)), rel=1e-5)
    assert float(loss(gate)["cost_critic_loss"]) == float(loss(None)["cost_critic_loss"])
    assert float(loss(None)["reward_critic_loss"]) == pytest.approx(float(loss(np.inf)["reward_critic_loss"]), rel=1e-6)
