"""algos/: every piece of maths against values worked out independently (numpy float64, scipy), plain, jitted and
vmapped."""

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.integrate
import scipy.stats

from algos import bear_lag, diagnostics, finetuning, logbook, marvel, networks, sac_lag, training
from algos import cpq as offline
from algos.lagrangian import init_multiplier, update_multiplier
from algos.networks import Ensemble, Networks, symlog
from data import replay as buffer
from envs import rollout
from envs.rollout import Batch
from tests import probes

BOTH = pytest.mark.parametrize("algo", [marvel, sac_lag], ids=["marvel", "sac_lag"])


def _other(x, lane):
    """Another argument of the same shape, so that lanes that leak into each other under vmap are seen."""
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return jax.vmap(lambda k: jax.random.fold_in(k, lane))(x.reshape(-1)).reshape(x.shape)
    return (x * (0.5 + lane)).astype(x.dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x


def _vmapped(f):
    def run(*args):
        args = jax.tree.map(jnp.asarray, args)
        lanes = jax.tree.map(lambda x: jnp.stack([_other(x, 0), x, _other(x, 2)]), args)
        return jax.tree.map(lambda x: x[1], jax.jit(jax.vmap(f))(*lanes))

    return run


VARIANTS = {"plain": lambda f: f, "jit": jax.jit, "vmap": _vmapped}


@pytest.fixture(params=VARIANTS)
def variant(request):
    """Turns a function of arrays into itself, its jitted and its vmapped form (the middle one of three lanes)."""
    return VARIANTS[request.param]


# ---------------------------------------------------------------- the policy's distribution

MEAN, LOG_STD = 0.3, -0.4


def density(a, mean=MEAN, log_std=LOG_STD):
    """p(a) of tanh(u), u ~ N: the normal's density times |du/da|."""
    return scipy.stats.norm.pdf(np.arctanh(a), mean, np.exp(log_std)) / (1 - np.square(a))


def draw(n, mean=MEAN, log_std=LOG_STD, wrap=lambda f: f):
    action, log_prob = wrap(networks.sample_action)(jax.random.key(1), jnp.full((n, 1), mean), jnp.full((n, 1), log_std))
    return np.float64(action[:, 0]), np.float64(log_prob)


def test_sample_action_log_probability(variant):
    action, log_prob = draw(1000, wrap=variant)
    np.testing.assert_allclose(log_prob, np.log(density(action)), atol=2e-3)


def test_sample_action_density_integrates_to_one():
    """The mean of 1/p over samples in an interval is its length; wrong signs of any term give another number. No
    scipy here."""
    action, log_prob = draw(400_000)
    for low, high in ((-0.5, 0.5), (0.0, 0.9)):
        assert np.mean(np.exp(-log_prob) * ((action > low) & (action < high))) == pytest.approx(high - low, rel=0.01)


def test_sample_action_distribution_and_entropy():
    action, log_prob = draw(100_000)
    assert scipy.stats.kstest(np.arctanh(action), scipy.stats.norm(MEAN, np.exp(LOG_STD)).cdf).pvalue > 0.01
    entropy = scipy.integrate.quad(lambda a: -density(a) * np.log(density(a)), -1 + 1e-9, 1 - 1e-9, limit=200)[0]
    assert -log_prob.mean() == pytest.approx(entropy, abs=0.01)


def test_sample_action_sums_over_action_dimensions(variant):
    mean, log_std = jnp.array([[0.1, -0.6, 0.4]]), jnp.array([[-1.0, -0.5, -2.0]])
    action, log_prob = variant(networks.sample_action)(jax.random.key(3), mean, log_std)
    assert action.shape == (1, 3) and log_prob.shape == (1,)
    expected = sum(np.log(density(np.float64(action[0, i]), float(mean[0, i]), float(log_std[0, i]))) for i in range(3))
    assert log_prob[0] == pytest.approx(expected, abs=2e-3)


@pytest.mark.parametrize("mean", [-15.0, 15.0, 40.0])
def test_sample_action_saturated(mean):
    """tanh(15) is 1 in float32: the naive log(1 - a^2) is -inf. E log p = -1/2 - log std - log(2 pi)/2 - 2 (log 2 -
    |u|)."""
    action, log_prob = draw(4096, mean, -5.0)
    assert np.all(np.abs(action) == 1)
    expected = -0.5 + 5.0 - 0.5 * math.log(2 * math.pi) - 2 * (math.log(2) - abs(mean))
    assert log_prob.mean() == pytest.approx(expected, abs=0.05)
    gradient = jax.grad(lambda m: networks.sample_action(jax.random.key(0), m, jnp.array([-5.0]))[1])(jnp.array([mean]))
    assert gradient[0] == pytest.approx(2 * np.sign(mean), rel=1e-3)  # d|u|/du, twice


def test_log_probability_against_scipy_and_samples(variant):
    action, log_prob = draw(1000)
    inside = np.abs(action) < 0.999
    at = lambda a: variant(networks.log_probability)(jnp.float32(a)[:, None], jnp.full((a.size, 1), MEAN), jnp.full((a.size, 1), LOG_STD))
    np.testing.assert_allclose(at(action[inside]), log_prob[inside], atol=2e-3)
    grid = np.linspace(-0.9999, 0.9999, 20_001)
    np.testing.assert_allclose(at(grid), np.log(density(grid)), rtol=1e-3, atol=2e-3)
    assert np.trapezoid(np.exp(np.float64(at(grid))), grid) == pytest.approx(1.0, abs=1e-3)


def test_log_probability_at_the_bounds_is_finite_and_that_of_a_point_inside():
    f = lambda a: networks.log_probability(jnp.array([a]), jnp.array([0.2]), jnp.array([-1.0]))
    assert float(f(1.0)) == pytest.approx(np.log(density(1 - 1e-4, 0.2, -1.0)), rel=1e-3)
    assert float(f(-1.0)) == pytest.approx(np.log(density(-1 + 1e-4, 0.2, -1.0)), rel=1e-3)


def test_actor_log_std_stays_in_its_range():
    """[-5, 2], however far the network's outputs go."""
    actor = networks.Actor((8,), 3, 2)
    params = actor.init(jax.random.key(0), jnp.zeros(3))
    obs = 1e6 * jax.random.normal(jax.random.key(1), (50, 3))
    for factor in (-1e3, 1e3):
        _, log_std = actor.apply(jax.tree.map(lambda x: factor * x, params), obs)
        assert log_std.min() >= -5 and log_std.max() <= 2
    assert float(actor.apply(jax.tree.map(jnp.zeros_like, params), obs)[1][0, 0]) == -1.5


def test_actor_is_blind_to_what_only_critics_see(variant):
    actor = networks.Actor((8,), 3, 2)
    params, obs = actor.init(jax.random.key(0), jnp.zeros(3)), jnp.ones((5, 3))
    seen = jnp.concatenate([obs, 9 * jax.random.normal(jax.random.key(1), (5, 2))], -1)
    for a, b in zip(variant(actor.apply)(params, obs), variant(actor.apply)(params, seen), strict=True):
        np.testing.assert_array_equal(a, b)


# ---------------------------------------------------------------- divergence, thresholds, ranks


def test_latent_kl_against_numerical_integration(variant):
    mean, log_std = np.array([[0.0, 1.3, -0.7]]), np.array([[0.0, -1.1, 0.4]])

    def kl(m, s):
        p, q = scipy.stats.norm(m, s), scipy.stats.norm(0, 1)
        return scipy.integrate.quad(lambda z: p.pdf(z) * (p.logpdf(z) - q.logpdf(z)), m - 12 * s, m + 12 * s)[0]

    expected = np.mean([kl(m, np.exp(s)) for m, s in zip(mean[0], log_std[0])])  # per latent dimension
    found = variant(networks.latent_kl)(jnp.float32(mean), jnp.float32(log_std))
    np.testing.assert_allclose(found, [expected], rtol=1e-5)


@pytest.mark.parametrize("limit, horizon, expected", [(20, 500, 3.97372), (20, 1000, 1.99991), (10, 1, 10.0), (0, 500, 0.0)])
def test_thresholds(limit, horizon, expected):
    """The limit spread evenly over the episode, discounted: sum_t gamma^t d / T."""
    q_thres, qc_thres = offline.thresholds(limit, 0.99, horizon)
    assert q_thres == pytest.approx(expected, abs=1e-5)
    assert q_thres == pytest.approx(sum(0.99**t * limit / horizon for t in range(horizon)), rel=1e-9)
    assert qc_thres == pytest.approx(1.5 * expected, abs=2e-5)


def test_spearman_against_scipy(variant):
    rng = np.random.default_rng(0)
    x = rng.normal(size=60)
    pairs = {
        "noise": (x, rng.normal(size=60)),
        "monotone": (x, np.exp(x)),
        "reversed": (x, -(x**3)),
        "ties": (np.round(x), np.round(x + rng.normal(size=60))),
        "sparse": (x, (rng.uniform(size=60) < 0.1).astype(float)),  # as costs are: nearly all equal
    }
    for name, (a, b) in pairs.items():
        found = variant(diagnostics.spearman)(jnp.float32(a), jnp.float32(b))
        assert float(found) == pytest.approx(scipy.stats.spearmanr(np.float32(a), np.float32(b))[0], abs=1e-5), name


@pytest.mark.parametrize("n", [10, 16, 49, 60, 64])
def test_spearman_of_a_constant_is_nan(n):
    """As for a policy that never costs anything: there is no rank, and no number may stand for one, whatever n is."""
    x = jnp.float32(np.random.default_rng(0).normal(size=n))
    assert np.isnan(diagnostics.spearman(x, jnp.ones(n))) and np.isnan(diagnostics.spearman(jnp.zeros(n), x))


def test_symlog_and_ensemble():
    x = np.array([-100.0, -1.0, 0.0, 2.5])
    np.testing.assert_allclose(symlog(jnp.float32(x)), [-math.log(101), -math.log(2), 0, math.log(3.5)], rtol=1e-6)
    ensemble = Ensemble(3, (8,))
    obs, action = jnp.ones((5, 4)), jnp.ones((5, 2))
    params = ensemble.init(jax.random.key(0), obs, action)
    out = ensemble.apply(params, obs, action)
    assert out.shape == (3, 5) and len(np.unique(out[:, 0])) == 3  # members start at parameters of their own
    gradient = jax.grad(lambda p: ensemble.apply(p, obs, action)[1].sum())(params)
    assert all(np.all(g[0] == 0) and np.all(g[2] == 0) for g in jax.tree.leaves(gradient))  # ... and do not share any


# ---------------------------------------------------------------- the multiplier

SCRIPT = np.concatenate([
    [60, 55, 70, 30, 10, 0, 0, 25, 90, 100, 15, 20],
    np.full(40, 500.0),  # drives lambda to its maximum, Kp and Ki to 10 K0
    np.zeros(250),  # ... and both down to K0 / 10 and lambda to zero
    np.random.default_rng(0).uniform(0, 60, 40),
    np.tile([0.0, 300.0], 60),  # drives Kd to 10 K0
    [5, 5, 5, 200, 5, 5],
])  # fmt: skip


class Controller:
    """The multiplier as the docstring's equations and method.md have it, in plain Python floats."""

    def __init__(self, args):
        factor = {"dual": (0, 1, 0), "pid": (1, 1, 1), "pid10": (10, 10, 10), "apid": (1, 1, 1)}[args.lagrangian]
        self.args, self.first = args, [f * k for f, k in zip(factor, (args.kp, args.ki, args.kd))]
        self.gains, self.integral = list(self.first), args.init_multiplier
        self.error_ema, self.emas, self.costs = None, [], []

    def update(self, cost):
        a, d = self.args, (1 - self.args.reserve) * self.args.cost_limit
        cost = min(cost, a.cost_clip * d)
        average = lambda old, new: new if old is None else a.pid_decay * old + (1 - a.pid_decay) * new
        self.error_ema = average(self.error_ema, cost - d)
        self.emas.append(average(self.emas[-1] if self.emas else None, cost))
        self.costs.append(cost)
        kp, ki, kd = self.gains
        speed = ki if cost >= d else ki * a.integral_fall
        self.integral = min(max(0.0, self.integral + speed * (cost - d)), a.max_multiplier)
        late = len(self.emas) > a.pid_delay  # there is an average of `pid_delay` updates ago
        rise = max(0.0, self.emas[-1] - self.emas[-1 - a.pid_delay]) if late else 0.0
        value = min(max(0.0, kp * self.error_ema + self.integral + kd * rise), a.max_multiplier)
        if a.lagrangian == "apid":
            recent = self.costs[-a.gain_window :]
            m = sum(recent) / len(recent)
            s = math.sqrt(sum((c - m) ** 2 for c in recent) / len(recent))
            ra, rb, rc = a.gain_rates
            scale = (1 + ra * math.tanh((m - d) / d), 1 + rb * (m - d) / d, 1 + rc * s / d)
            self.gains = [min(max(k * f, k0 / 10), 10 * k0) for k, f, k0 in zip(self.gains, scale, self.first)]
        return value, self.gains


@pytest.mark.parametrize("lagrangian", ["dual", "pid", "pid10", "apid"])
@pytest.mark.parametrize("start, clip, fall", [(0.0, math.inf, 1.0), (0.7, math.inf, 1.0), (0.0, 2.0, 0.25)])
def test_update_multiplier_against_plain_python(lagrangian, start, clip, fall, variant):
    gains = dict(kp=0.02, ki=0.0005, kd=0.01, max_multiplier=2.0, init_multiplier=start, cost_clip=clip, integral_fall=fall)
    args = marvel.Args(lagrangian=lagrangian, cost_limit=25.0, reserve=0.2, **gains)  # aims at 20
    update = lambda m, cost: (update_multiplier(m, cost, args),) * 2
    m, reference = init_multiplier(args), Controller(args)
    if variant is VARIANTS["plain"]:  # op by op is slow: the beginning only
        costs, found = SCRIPT[:15], []
        for cost in costs:
            m, _ = update(m, jnp.float32(cost))
            found.append(m)
        found = jax.tree.map(lambda *x: jnp.stack(x), *found)
    else:
        costs = SCRIPT
        found = variant(lambda m, costs: jax.lax.scan(update, m, costs)[1])(m, jnp.float32(costs))
    values, gains = np.float64(found.value), np.float64(found.gains)
    expected, expected_gains = [], []
    for cost in costs:
        value, gain = reference.update(float(cost))
        expected.append(value), expected_gains.append(list(gain))
    np.testing.assert_allclose(values, expected, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(gains, expected_gains, rtol=1e-3)
    if len(costs) == len(SCRIPT) and clip == math.inf:  # the script meets every bound
        assert values.min() == 0 and values.max() == 2.0
        if lagrangian == "apid":
            reached = gains / reference.first
            assert np.allclose(reached.max(0), 10) and np.allclose(reached.min(0)[:2], 0.1, rtol=1e-3)


def test_clipped_costs_and_slow_forgetting_by_hand():
    """Costs of at most twice the limit of 20, an integral that falls at half its speed."""
    gains = dict(kp=0.0, ki=0.01, kd=0.0, reserve=0.0, init_multiplier=0.0, max_multiplier=10.0, lagrangian="pid")
    args = marvel.Args(**gains, cost_limit=20.0, integral_fall=0.5, cost_clip=2.0)
    m, integrals = init_multiplier(args), []
    for cost in (30, 900, 20, 0):  # errors 10, 20, 0, -20
        m = update_multiplier(m, jnp.float32(cost), args)
        integrals.append(float(m.integral))
    np.testing.assert_allclose(integrals, [0.1, 0.3, 0.3, 0.2], rtol=1e-6)


def test_update_multiplier_first_step_by_hand():
    """Averages start at the first value, and there is no derivative yet: 0.01 * 10 + 0.001 * 10 = 0.11."""
    gains = dict(kp=0.01, ki=0.001, kd=5.0, init_multiplier=0.0, pid_delay=2, cost_clip=math.inf)
    args = marvel.Args(lagrangian="pid", cost_limit=25, reserve=0.2, **gains)  # aims at 20
    m = init_multiplier(args)
    for cost, expected in (
        (30.0, 0.11),  # e = 10: P = 0.1, I = 0.01
        (40.0, 0.15),  # e = 20: P = 0.01 (0.8 * 10 + 0.2 * 20) = 0.12, I = 0.03; D not before the third update
    ):
        m = update_multiplier(m, jnp.float32(cost), args)
        assert float(m.value) == pytest.approx(expected, rel=1e-5)
    m = update_multiplier(m, jnp.float32(40), args)
    # P = 0.01 (0.8 * 12 + 0.2 * 20) = 0.136, I = 0.05, cost averages 30, 32, 33.6: D = 3.6, Kd D = 18: beyond the bound
    assert float(m.value) == args.max_multiplier
    assert float(m.cost_emas[0] - m.cost_emas[2]) == pytest.approx(3.6, rel=1e-5)


def test_the_integral_does_not_wind_up():
    """However long the limit was missed, the integral leaves its bound with the first update below the limit."""
    args = marvel.Args(lagrangian="dual", ki=0.01, reserve=0.0, integral_fall=1.0)
    m = init_multiplier(args)
    for _ in range(100):
        m = update_multiplier(m, jnp.float32(500), args)
    assert float(update_multiplier(m, jnp.float32(0), args).value) == pytest.approx(args.max_multiplier - 0.2)


@BOTH
@pytest.mark.parametrize("lagrangian", ["dual", "pid", "pid10", "apid"])
@pytest.mark.parametrize("limit", [0.0, math.inf])
def test_extreme_limits(algo, limit, lagrangian):
    """No cost allowed, and no constraint (wherever lambda would start): lambda and gains stay finite; a cost raises the one's lambda."""
    args = algo.Args(lagrangian=lagrangian, cost_limit=limit)
    m = start = init_multiplier(args)
    for cost in (0.0, 50.0, 20.0, 0.0, 80.0, 80.0, 3.0):
        m = update_multiplier(m, jnp.float32(cost), args)
        if (limit, cost) == (0, 50):
            assert m.integral > start.integral and m.value > 0
        assert np.isfinite(m.value) and np.all(np.isfinite(m.gains)), cost
        if limit == math.inf:
            assert m.value == 0


# ---------------------------------------------------------------- losses, on linear networks

OBS, ACTION, N = 3, 2, 40
GAMMA, SCALE, DYING = 0.9, 0.5, 7.0


class Linear:
    """Stands in for a critic ensemble: params (size, 1 + OBS + ACTION), Q_i = params[i] . (1, obs, action)."""

    def apply(self, params, obs, action):
        return jnp.moveaxis(jnp.concatenate([jnp.ones((*obs.shape[:-1], 1)), obs, action], -1) @ params.T, -1, 0)


class Policy:
    """Stands in for an actor: mean = obs . params["w"] + params["b"], a constant log standard deviation."""

    action_size = ACTION

    def apply(self, params, obs):
        mean = obs @ params["w"] + params["b"]
        return mean, jnp.broadcast_to(params["s"], mean.shape)


class Fixed(NamedTuple):
    args: Any
    networks: Any
    horizon: int = 50


def thresholds(fixed):
    return offline.thresholds(fixed.args.cost_limit, fixed.args.gamma, fixed.horizon)


def setting(algo, **changes):
    """(fixed, batch, actor, critics, targets) on linear networks; 8 of 40 transitions are terminal."""
    rng = np.random.default_rng(7)
    args = replace(algo.Args(gamma=GAMMA, reward_scale=SCALE), **{"termination_cost": DYING} | changes)
    fixed = Fixed(args, Networks(Policy(), Linear(), Linear(), None))
    normal = lambda *shape: jnp.float32(rng.normal(size=shape))
    batch = Batch(
        normal(N, OBS), jnp.tanh(normal(N, ACTION)), normal(N), jnp.float32(rng.integers(0, 2, N)), normal(N, OBS),
        jnp.float32(np.arange(N) % 5 == 0),
    )  # fmt: skip
    actor = {"w": 0.3 * normal(OBS, ACTION), "b": 0.2 * normal(ACTION), "s": jnp.float32(-0.8)}
    linear = lambda: {"reward": normal(2, 1 + OBS + ACTION), "cost": normal(1, 1 + OBS + ACTION)}
    return fixed, batch, actor, linear(), linear()


def numbers(tree):
    return jax.tree.map(np.float64, tree)


def features(obs, action):
    return np.concatenate([np.ones((len(obs), 1)), obs, action], -1)


def next_action(actor, obs, key):
    """What the losses draw at next_obs with `key`: (action, log-probability by change of variables)."""
    mean, log_std = Policy().apply(actor, obs)
    action = np.float64(networks.sample_action(key, mean, log_std)[0])
    mean, log_std = np.float64(mean), np.float64(log_std)
    log_prob = scipy.stats.norm.logpdf(np.arctanh(action), mean, np.exp(log_std)) - np.log(1 - action**2)
    return action, log_prob.sum(-1)


def soft_targets(batch, actor, targets, key, alpha_r, alpha_c):
    batch, targets = numbers(batch), numbers(targets)
    action, log_prob = next_action(actor, jnp.float32(batch.next_obs), key)
    phi, h = features(batch.next_obs, action), -log_prob
    going_on = batch.terminated == 0
    y_r = SCALE * batch.reward + np.where(going_on, GAMMA * ((phi @ targets["reward"].T).min(-1) + alpha_r * h), 0)
    y_c = batch.cost + np.where(going_on, GAMMA * (phi @ targets["cost"][0] + alpha_c * h), DYING)
    return y_r, y_c


def check_regression(loss, gradient, batch, critics, y_r, y_c, extra=0.0):
    """Value and gradient of mean((Q_i - y_r)^2) + mean((Qc - y_c)^2): through Q only, not through the targets."""
    batch, critics = numbers(batch), numbers(critics)
    phi = features(batch.obs, batch.action)
    error, cost_error = phi @ critics["reward"].T - y_r[:, None], phi @ critics["cost"][0] - y_c
    assert float(loss) == pytest.approx(np.mean(error**2) + np.mean(cost_error**2) + extra, rel=1e-3)
    np.testing.assert_allclose(gradient["reward"], error.T @ phi / N, rtol=1e-2, atol=2e-3)  # 2 / (2 N): two members
    np.testing.assert_allclose(gradient["cost"][0], 2 * cost_error @ phi / N, rtol=1e-2, atol=2e-3)


@pytest.mark.parametrize("weights", [(0.0, 0.0), (0.3, 0.2), (0.3, 0.0)])
def test_marvel_critic_targets(weights, variant):
    """Both entropy terms are plus; time-outs (terminated = 0) bootstrap, terminal states do not."""
    fixed, batch, actor, critics, targets = setting(marvel)
    key = jax.random.key(5)
    loss = lambda c, a, t, b, k: marvel.critic_loss(c, a, t, weights, b, k, fixed.networks, fixed.args)[0]
    value, gradient = variant(jax.value_and_grad(loss))(critics, actor, targets, batch, key)
    y_r, y_c = soft_targets(batch, actor, targets, key, *weights)
    check_regression(value, gradient, batch, critics, y_r, y_c)
    for argument in (1, 2):  # neither the policy nor the target critics are moved by it
        other = jax.grad(loss, argument)(critics, actor, targets, batch, key)
        assert all(np.all(g == 0) for g in jax.tree.leaves(other))


@pytest.mark.parametrize("alpha", [0.4, 1e-6])
def test_sac_critic_targets(alpha, variant):
    """Entropy in the reward's target, with plus; none in the cost's."""
    fixed, batch, actor, critics, targets = setting(sac_lag)
    key = jax.random.key(5)

    def loss(c, a, log_alpha, t, b, k):
        return sac_lag.critic_loss(c, {"actor": a, "log_alpha": log_alpha}, t, b, k, fixed.networks, fixed.args)[0]

    log_alpha = jnp.log(jnp.float32(alpha))
    value, gradient = variant(jax.value_and_grad(loss))(critics, actor, log_alpha, targets, batch, key)
    check_regression(value, gradient, batch, critics, *soft_targets(batch, actor, targets, key, alpha, 0.0))


def run_actor_loss(algo, actor, critics, multiplier, batch, key, fixed, alpha):
    if algo is marvel:
        fixed = fixed._replace(args=replace(fixed.args, entropy_weight=alpha))
        return marvel.actor_loss(actor, critics, actor, multiplier, 0.2, batch, key, fixed.networks, fixed.args)
    params = {"critics": critics, "log_alpha": jnp.log(jnp.float32(alpha))}
    return sac_lag.actor_loss(actor, params, multiplier, batch, key, fixed.networks)


@BOTH
@pytest.mark.parametrize("multiplier", [0.0, 1.5])
def test_actor_loss_value(algo, multiplier, variant):
    fixed, batch, actor, critics, _ = setting(algo)
    key, alpha = jax.random.key(2), 0.3
    loss = lambda a, c, m, b, k: run_actor_loss(algo, a, c, m, b, k, fixed, alpha)
    value, info = variant(loss)(actor, critics, jnp.float32(multiplier), batch, key)
    action, log_prob = next_action(actor, batch.obs, key)
    phi = features(np.float64(batch.obs), action)
    q, qc = (phi @ numbers(critics)["reward"].T).min(-1), phi @ numbers(critics)["cost"][0]
    assert float(value) == pytest.approx(np.mean(-q + multiplier * qc + alpha * log_prob), rel=1e-4)
    assert float(info["entropy"]) == pytest.approx(-log_prob.mean(), rel=1e-3)


@BOTH
def test_actor_loss_direction(algo):
    """Q rises with the first action, Qc with the second: a descent step raises the mean of one and, with lambda,
    lowers the
    other; the entropy weight widens the policy."""
    fixed, batch, actor, *_ = setting(algo)
    axis = lambda i: jnp.zeros((1, 1 + OBS + ACTION)).at[0, 1 + OBS + i].set(1.0)
    critics = {"reward": jnp.repeat(axis(0), 2, 0), "cost": axis(1)}
    gradient = lambda m, alpha: jax.grad(lambda a: run_actor_loss(algo, a, critics, m, batch, jax.random.key(0), fixed, alpha)[0])(actor)
    free, bound = gradient(0.0, 1e-9), gradient(2.0, 1e-9)
    assert free["b"][0] < 0 and abs(free["b"][1]) < 1e-6
    assert bound["b"][1] > 0 and float(bound["b"][0]) == pytest.approx(float(free["b"][0]), rel=1e-5)
    narrow = {**actor, "s": jnp.float32(-3.0)}
    flat, key = jax.tree.map(jnp.zeros_like, critics), jax.random.key(0)
    widened = jax.grad(lambda a: run_actor_loss(algo, a, flat, 0.0, batch, key, fixed, 1.0)[0])
    assert widened(narrow)["s"] < 0


def test_temperature_direction():
    """Descending raises alpha while the entropy is below its target, lowers it above."""
    gradient = lambda entropy: jax.grad(sac_lag.temperature_loss)(jnp.float32(-1.0), jnp.float32(entropy), -1.0)
    assert gradient(-3.0) == -2 and gradient(0.5) == 1.5


def test_target_entropy_counts_the_action_dimensions():
    """-0.5 for each of two: a step of 0.1 on log alpha is of the entropy's distance from -1."""
    fixed, batch, actor, critics, _ = setting(sac_lag, entropy_per_action=-0.5)
    optimizers = {"actor": optax.sgd(0.0), "critics": optax.sgd(0.0), "log_alpha": optax.sgd(0.1)}
    learner = training.init_learner({"actor": actor, "critics": critics, "log_alpha": jnp.float32(-2.0)}, optimizers)
    step = jax.jit(lambda learner, key: sac_lag.online_step(learner, 0.0, batch, key, fixed.networks, optimizers, fixed.args))
    after, info = step(learner, jax.random.key(0))
    assert float(after.params["log_alpha"]) == pytest.approx(-2.0 - 0.1 * (float(info["entropy"]) + 1.0), rel=1e-5)


def test_the_multiplier_waits_for_enough_episodes():
    """Three episodes of cost 40 do not move it; three more of 70 do, by the mean of all six, and the count starts anew."""
    args = sac_lag.Args(episodes_per_iter=5, updates_per_block=2, batch_size=4, ki=0.01, reserve=0.0)
    start, rows = init_multiplier(args), jax.tree.map(lambda x: x[:, None], numbered(0, 6))
    step = lambda learner, multiplier, batch, key: (learner + 1, {"multiplier": multiplier})
    train = jax.jit(lambda *state: sac_lag.train_online(jnp.float32(0), *state, jax.random.key(0), step, args)[1:])
    ended = lambda cost: rollout.Episodes(*jnp.float32([3, 3, 3 * cost, 30]))
    multiplier, replay, pending, info = train(start, buffer.empty_replay(12, 2, 1), rollout.Episodes(*jnp.zeros(4)), rows, ended(40.0))
    assert float(pending.number) == 3 and jax.tree.all(jax.tree.map(lambda x, y: np.array_equal(x, y, equal_nan=True), multiplier, start))
    multiplier, replay, pending, info = train(multiplier, replay, pending, rows, ended(70.0))
    assert float(multiplier.integral) == pytest.approx(0.01 * ((3 * 40 + 3 * 70) / 6 - 20), rel=1e-5)
    assert info["multiplier"] == multiplier.value > 0 and pending == (0, 0, 0, 0)


# ---------------------------------------------------------------- CPQ


def ood_sample():
    rng = np.random.default_rng(11)
    weight = jnp.float32(np.arange(12) < 9)  # the last three are no farther out than the data
    return jnp.float32(rng.normal(size=(12, OBS))), jnp.float32(np.tanh(rng.normal(size=(12, ACTION)))), weight


def cpq(critics, actor, targets, batch, log_dual, key, fixed, ood=None):
    ood = ood_sample() if ood is None else ood
    return cpq_loss(critics, {"actor": actor, "log_dual": log_dual}, targets, batch, ood, key, fixed)[0]


def cpq_loss(critics, params, targets, batch, ood, key, fixed):
    bound = 1.0 / (1.0 - fixed.args.gamma)  # costs are at most 1
    return offline.cpq_critic_loss(critics, params, targets, batch, ood, key, fixed.networks, fixed.args, thresholds(fixed), bound)


def cloned(seed=13):
    """Transitions of safe trajectories to clone."""
    rng = np.random.default_rng(seed)
    normal = lambda *shape: jnp.float32(rng.normal(size=shape))
    return Batch(normal(9, OBS), jnp.tanh(normal(9, ACTION)), normal(9), normal(9), normal(9, OBS), normal(9))


def cpq_targets(batch, actor, targets, key, q_thres):
    batch, targets = numbers(batch), numbers(targets)
    phi = features(batch.next_obs, next_action(actor, jnp.float32(batch.next_obs), key)[0])
    next_q, next_qc = (phi @ targets["reward"].T).min(-1), phi @ targets["cost"][0]
    safe, alive = next_qc <= q_thres, GAMMA * (1 - batch.terminated)
    # The cost of a step is at most 1, so Qc lies in [0, 1 / (1 - gamma)].
    y_c = batch.cost + DYING * batch.terminated + alive * np.clip(next_qc, 0, 1 / (1 - GAMMA))
    return SCALE * batch.reward + alive * safe * next_q, y_c, safe


def test_cpq_critic_targets(variant):
    """Unsafe next actions take the bootstrap from the reward's target and leave the cost's alone."""
    fixed, batch, actor, critics, targets = setting(marvel, cost_limit=1.0)
    q_thres = sum(GAMMA**t * 1.0 / 50 for t in range(50))
    key = jax.random.key(9)
    value, gradient = variant(jax.value_and_grad(lambda c, a, t, b, k: cpq(c, a, t, b, -100.0, k, fixed)))(
        critics, actor, targets, batch, key
    )
    y_r, y_c, safe = cpq_targets(batch, actor, targets, key, q_thres)
    assert 3 < safe.sum() < N - 3  # both sides are met
    check_regression(value, gradient, batch, critics, y_r, y_c)


def test_cpq_unsafe_actions_have_no_reward_backup():
    """All next actions unsafe: the reward's targets are the rewards, the cost's still bootstrap."""
    fixed, batch, actor, critics, targets = setting(marvel, cost_limit=1.0, termination_cost=0.0)
    # Qc' = 5 everywhere, threshold 0.2
    targets = {**targets, "cost": jnp.zeros((1, 1 + OBS + ACTION)).at[0, 0].set(5.0)}
    value, gradient = jax.value_and_grad(cpq)(critics, actor, targets, batch, -100.0, jax.random.key(0), fixed)
    y_c = np.float64(batch.cost) + GAMMA * (1 - np.float64(batch.terminated)) * 5.0
    check_regression(value, gradient, batch, critics, SCALE * np.float64(batch.reward), y_c)


@pytest.mark.parametrize("level", [-3.0, 30.0])
def test_cpq_ood_penalty_moves_the_online_cost_critic(level, variant):
    """Below qc_thres the penalty's gradient is -alpha times the mean feature of the OOD actions: descending raises
    their Qc.
    Above, nothing is left to raise. It never touches the reward critics, and its targets never count."""
    fixed, batch, actor, critics, targets = setting(marvel, cost_limit=1.0)
    critics = {**critics, "cost": critics["cost"].at[0, 0].set(level)}
    key, alpha = jax.random.key(0), 1.7
    gradient = lambda log_dual: variant(jax.grad(lambda c, a, t, b, k: cpq(c, a, t, b, log_dual, k, fixed)))(
        critics, actor, targets, batch, key
    )
    gradient_with, gradient_without = gradient(math.log(alpha)), gradient(-100.0)
    ood_obs, ood_action, weight = numbers(ood_sample())
    phi = features(ood_obs, ood_action)[weight == 1].mean(0)
    below = phi @ np.float64(critics["cost"][0]) < thresholds(fixed)[1]
    assert below == (level < 0)
    difference = np.float64(gradient_with["cost"][0]) - np.float64(gradient_without["cost"][0])
    np.testing.assert_allclose(difference, -alpha * phi * below, atol=1e-3)
    np.testing.assert_allclose(gradient_with["reward"], gradient_without["reward"], atol=1e-6)
    by_targets = jax.grad(lambda t: cpq(critics, actor, t, batch, math.log(alpha), key, fixed))(targets)
    assert all(np.all(g == 0) for g in jax.tree.leaves(by_targets))


def test_cpq_without_far_actions_has_no_penalty():
    """No action farther out than the data: no gradient, and the dual stands still (qc_ood is reported at the
    threshold)."""
    fixed, batch, actor, critics, targets = setting(marvel, cost_limit=1.0)
    critics = {**critics, "cost": critics["cost"].at[0, 0].set(-3.0)}
    none = (*ood_sample()[:2], jnp.zeros(12))
    gradient = lambda log_dual: jax.grad(cpq)(critics, actor, targets, batch, log_dual, jax.random.key(0), fixed, none)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), gradient(1.0), gradient(-100.0))
    params = {"actor": actor, "log_dual": 1.0}
    info = cpq_loss(critics, params, targets, batch, none, jax.random.key(0), fixed)[1]
    assert float(info["qc_ood"]) == pytest.approx(thresholds(fixed)[1])


def test_dual_direction():
    """alpha rises while the OOD actions' Qc is below qc_thres, falls above; the loss does not move Qc itself."""
    gradient = lambda qc, which=0: float(jax.grad(offline.dual_loss, which)(jnp.float32(0.5), jnp.float32(qc), 6.0))
    assert gradient(2.0) == pytest.approx(-4 * math.exp(0.5), rel=1e-5)
    assert gradient(7.0) == pytest.approx(math.exp(0.5), rel=1e-5)
    assert gradient(2.0, 1) == 0


def real_networks():
    """Marvel's own networks on 3 observations and 2 actions, and 48 transitions."""
    env = SimpleNamespace(obs_size=OBS, action_size=ACTION)
    args = marvel.Args(reward_scale=0.1, hidden=(16,), vae_hidden=(16,), ood_states=32, ood_actions=10, gamma=GAMMA)
    fixed = Fixed(args, training.make_networks(args, env))
    params = training.init_params(jax.random.key(0), fixed.networks, OBS) | {"log_dual": jnp.log(jnp.float32(args.init_dual))}
    # At their first values all actions are about as far out; stronger encoder weights tell them apart.
    params["vae"] = jax.tree.map(lambda x: 2.0 * x, params["vae"])
    rng = np.random.default_rng(1)
    normal = lambda *shape: jnp.float32(rng.normal(size=shape))
    action = 0.5 * jnp.tanh(normal(48, ACTION))
    return fixed, params, Batch(normal(48, OBS), action, normal(48), normal(48), normal(48, OBS), jnp.zeros(48))


def all_policy_actions(params, batch, key, fixed):
    """(obs, action, KL) of all 320 policy actions, and the KL of the batch's own, the divergence in float64."""

    def divergence(obs, action):
        mean, log_std = numbers(fixed.networks.vae.apply(params["vae"], obs, action, method="encode"))
        return 0.5 * (mean**2 + np.exp(2 * log_std) - 1 - 2 * log_std).mean(-1)

    obs = jnp.repeat(batch.obs[:32], 10, 0)
    action, _ = networks.sample_action(key, *fixed.networks.actor.apply(params["actor"], obs))
    return obs, action, divergence(obs, action), divergence(batch.obs, batch.action)


def test_ood_actions_are_the_top_quarter(variant):
    """The 80 of 320 with the largest KL, as a full sort has them; weight 1 where beyond 99% of the data's own."""
    fixed, params, batch = real_networks()
    key = jax.random.key(4)
    ood_obs, ood_action, weight = variant(lambda p, b, k: offline.ood_actions(p, b, k, fixed.networks, fixed.args))(params, batch, key)
    obs, action, kl, own = all_policy_actions(params, batch, key, fixed)
    top = np.argsort(-kl)[:80]
    assert ood_obs.shape == (80, OBS) and ood_action.shape == (80, ACTION)
    far = (kl[top] > np.quantile(own, 0.99)).astype(float)
    assert 0 < far.sum() < 80
    table = lambda *columns: np.concatenate([np.float64(c).reshape(80, -1) for c in columns], -1)
    rows = lambda *columns: np.array(sorted(map(tuple, table(*columns))))
    np.testing.assert_allclose(rows(ood_obs, ood_action, weight), rows(obs[top], action[top], far), atol=1e-4)


def test_gathered_penalty_equals_the_full_one():
    """Gathering the top quarter first gives the loss and gradient of running all 320 actions and masking the others."""
    fixed, params, batch = real_networks()
    key = jax.random.key(4)
    obs, action, kl, own = all_policy_actions(params, batch, key, fixed)
    mask = (kl >= np.sort(kl)[-80]) & (kl > np.quantile(own, 0.99))
    gathered = offline.ood_actions(params, batch, key, fixed.networks, fixed.args)
    full = (obs, action, jnp.float32(mask))
    loss = lambda critics, ood: cpq_loss(critics, params, params["critics"], batch, ood, key, fixed)[0]
    (a, a_gradient), (b, b_gradient) = (jax.value_and_grad(loss)(params["critics"], ood) for ood in (gathered, full))
    assert float(a) == pytest.approx(float(b), rel=1e-5)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-5), a_gradient, b_gradient)


def test_cpq_actor_loss_value(variant):
    """-mean(1[Qc <= q_thres] min Q) / mean|min Q| + cloning weight * mean(-log pi) of safe trajectories' actions."""
    fixed, batch, actor, critics, _ = setting(marvel, cost_limit=1.0, cloning_weight=0.2)
    key = jax.random.key(3)
    loss = lambda a, c, b, safe, k: offline.cpq_actor_loss(a, c, b, safe, k, fixed.networks, fixed.args, thresholds(fixed)[0])[0]
    value = variant(loss)(actor, critics, batch, cloned(), key)
    phi = features(np.float64(batch.obs), next_action(actor, batch.obs, key)[0])
    q, qc = (phi @ numbers(critics)["reward"].T).min(-1), phi @ numbers(critics)["cost"][0]
    safe = qc <= thresholds(fixed)[0]
    assert 3 < safe.sum() < N - 3
    mean, log_std = numbers(Policy().apply(actor, cloned().obs))
    a = np.float64(cloned().action)
    log_prob = (scipy.stats.norm.logpdf(np.arctanh(a), mean, np.exp(log_std)) - np.log(1 - a**2)).sum(-1)
    expected = -np.mean(safe * q) / (np.abs(q).mean() + 1e-3) - 0.2 * log_prob.mean()
    assert float(value) == pytest.approx(expected, rel=1e-3)


def test_cpq_actor_ignores_unsafe_actions():
    """Where every action is unsafe, Q has no say: without cloning the gradient is zero."""
    fixed, batch, actor, critics, _ = setting(marvel, cost_limit=1.0, cloning_weight=0.0)
    unsafe = {**critics, "cost": jnp.zeros((1, 1 + OBS + ACTION)).at[0, 0].set(50.0)}
    loss = lambda a, c: offline.cpq_actor_loss(a, c, batch, cloned(), jax.random.key(0), fixed.networks, fixed.args, thresholds(fixed)[0])[
        0
    ]
    gradient = lambda c: jax.grad(loss)(actor, c)
    assert all(np.all(g == 0) for g in jax.tree.leaves(gradient(unsafe)))
    assert any(np.any(g != 0) for g in jax.tree.leaves(gradient(critics)))


def test_vae_loss_value():
    _, batch, *_ = setting(marvel)
    rng = np.random.default_rng(0)
    out = rng.normal(size=(N, ACTION)), rng.normal(size=(N, 4)), rng.normal(size=(N, 4))
    vae = SimpleNamespace(apply=lambda params, obs, action, key: tuple(map(jnp.float32, out)))
    loss = networks.vae_loss(None, batch.obs, batch.action, None, vae, 0.5)
    kl = 0.5 * (out[1] ** 2 + np.exp(2 * out[2]) - 1 - 2 * out[2])
    assert float(loss) == pytest.approx(np.mean((out[0] - np.float64(batch.action)) ** 2) + 0.5 * kl.mean(), rel=1e-5)


# ---------------------------------------------------------------- targets, optimisers


def test_update_targets_and_apply_gradient():
    """Targets move by tau; one Adam step of one entry is its rate against the gradient's sign, and nothing else
    moves."""
    args, env = marvel.Args(hidden=(8,), vae_hidden=(8,)), probes.OneStep()
    optimizers = {"actor": optax.adam(0.01), "critics": training.critic_adam(0.02)}
    params = training.init_params(jax.random.key(0), training.make_networks(args, env), env.obs_size)
    learner = training.init_learner(params, optimizers)
    ones = jax.tree.map(jnp.ones_like, learner.params["critics"])
    moved = training.apply_gradient(learner, optimizers, "critics", ones)
    lower = lambda by: lambda a, b: np.testing.assert_allclose(a, b - by, atol=1e-5)
    jax.tree.map(lower(0.02), moved.params["critics"], learner.params["critics"])
    assert moved.params["actor"] is learner.params["actor"] and moved.targets is learner.targets
    assert moved.optimizers["actor"] is learner.optimizers["actor"]
    followed = training.update_targets(moved, 0.1)
    jax.tree.map(
        lambda t, old, new: np.testing.assert_allclose(t, 0.9 * old + 0.1 * new, atol=1e-6),
        followed.targets, learner.targets, moved.params["critics"],
    )  # fmt: skip


def test_the_cost_critic_can_have_a_step_size_of_its_own():
    params = {"critics": {"reward": jnp.ones(3), "cost": jnp.ones(3)}}
    optimizers = {"critics": training.critic_adam(0.02, 0.05)}
    moved = training.apply_gradient(training.init_learner(params, optimizers), optimizers, "critics", params["critics"])
    np.testing.assert_allclose(moved.params["critics"]["reward"], 0.98, atol=1e-5)
    np.testing.assert_allclose(moved.params["critics"]["cost"], 0.95, atol=1e-5)


# ---------------------------------------------------------------- replay


def numbered(first, n):
    """Transitions that carry their number in every field."""
    i = jnp.arange(first, first + n, dtype=jnp.float32)
    return Batch(jnp.stack([i, -i], -1), i[:, None] / 2, i, 2 * i, jnp.stack([i, i], -1), i % 2)


def test_insert_wraps_around(variant):
    empty = jax.tree.map(lambda x: jnp.full_like(x, -1.0), numbered(0, 12))
    replay, held = buffer.Replay(empty, jnp.int32(0)), [-1] * 12
    insert = variant(buffer.insert)
    for block in range(8):
        replay = insert(replay, numbered(4 * block, 4))
        for i in range(4 * block, 4 * block + 4):
            held[i % 12] = i
        assert int(replay.inserted) == 4 * block + 4
        np.testing.assert_array_equal(replay.data.reward, held)
        np.testing.assert_array_equal(replay.data.cost, [2 * i if i >= 0 else -1 for i in held])
        np.testing.assert_array_equal(replay.data.obs[:, 1], [-i if i >= 0 else -1 for i in held])


def test_sample_takes_whole_rows_of_the_filled_part():
    batch = buffer.sample(jax.random.key(0), numbered(0, 100), 5000, jnp.int32(10))
    np.testing.assert_array_equal(np.unique(batch.reward), np.arange(10))
    assert scipy.stats.chisquare(np.bincount(np.int64(batch.reward))).pvalue > 0.01
    np.testing.assert_array_equal(batch.next_obs[:, 0], batch.reward)
    np.testing.assert_array_equal(batch.action[:, 0], batch.reward / 2)


# ---------------------------------------------------------------- episodes

ZERO = lambda obs, key: jnp.zeros((*obs.shape[:-1], 1))
PASSIVE = lambda obs, key, elapsed: ZERO(obs, key)


def test_collect_counts_every_episode_once(variant):
    """Blocks shorter than, and out of step with, episodes: what they add up to is what an own count over the
    transitions has."""
    env, envs_, steps, blocks = probes.Staggered(6), 7, 5, 9
    actors = rollout.start_rollout(jax.random.key(0), env, envs_)
    run = variant(lambda actors, key: rollout.collect(actors, PASSIVE, key, env, steps))
    total, batches = np.zeros(4), []
    for block in range(blocks):
        actors, batch, ended = run(actors, jax.random.key(block))
        assert batch.reward.shape == (steps, envs_)
        total += np.array(ended)
        batches.append(batch)
    obs, reward, cost, next_obs, terminated = (
        np.concatenate([np.asarray(getattr(b, k)) for b in batches]) for k in ("obs", "reward", "cost", "next_obs", "terminated")
    )
    expected, some_time_out = np.zeros(4), False
    for i in range(envs_):
        t = 0  # steps taken in the episode, counted here
        for k in range(steps * blocks):
            n = obs[k, i, 0]
            # next_obs is before the reset
            assert obs[k, i, 1] == t and next_obs[k, i, 1] == t + 1 and next_obs[k, i, 0] == n
            assert (reward[k, i], cost[k, i]) == (n, t)
            t += 1
            assert terminated[k, i] == (t >= n)  # a time-out alone is not terminal: critics bootstrap through it
            if t == min(n, 6):
                some_time_out |= n == 7
                expected += [1, n * t, t * (t - 1) / 2, t]
                t = 0
    assert some_time_out
    np.testing.assert_allclose(total, expected)
    means = rollout.Episodes(*map(jnp.float32, total)).means()
    assert float(means["return"]) == pytest.approx(expected[1] / expected[0], rel=1e-6)


def test_no_episode_ended():
    """Means are zero and not NaN."""
    actors = rollout.start_rollout(jax.random.key(0), probes.Constant(1.0, 1.0, 10), 3)
    _, _, ended = rollout.collect(actors, PASSIVE, jax.random.key(0), probes.Constant(1.0, 1.0, 10), 9)
    assert [float(x) for x in ended.means().values()] == [0, 0, 0, 0]


@pytest.mark.parametrize(
    "env, expected",
    [
        (probes.Constant(2.0, 1.0, 10), {"return": 20, "cost": 10, "length": 10}),  # time-out
        (probes.Constant(2.0, 1.0, 10, terminal_at=4), {"return": 8, "cost": 4, "length": 4}),  # terminal state
        (probes.Constant(2.0, 1.0, 10, terminal_at=10), {"return": 20, "cost": 10, "length": 10}),  # both at once
    ],
    ids=["time-out", "terminal", "both"],
)
def test_evaluate_known_episodes(env, expected, variant):
    found = variant(lambda key: rollout.evaluate(ZERO, key, env, 6))(jax.random.key(0))
    assert {k: v.tolist() for k, v in found.items()} == {k: [v] * 6 for k, v in expected.items()}


def test_evaluate_stops_at_the_first_end():
    """Of each row only the first episode counts, however many restarts follow; lengths are drawn from 1..7, at most
    6."""
    env, key = probes.Staggered(6), jax.random.key(3)
    found = rollout.evaluate(ZERO, key, env, 500)
    n = np.asarray(env.reset(jax.random.split(jax.random.split(key)[0], 500))[1][:, 0])
    t = np.minimum(n, 6)
    np.testing.assert_allclose(np.array([found["return"], found["cost"], found["length"]]), [n * t, t * (t - 1) / 2, t])


def test_evaluate_passes_the_policy_what_it_sees():
    """Cost of DelayedCost: 1 exactly if the first action is positive; reward is the last action."""
    policy = lambda obs, key: jnp.where(obs[..., :1] == 0, 0.5, -0.25)
    found = rollout.evaluate(policy, jax.random.key(0), probes.DelayedCost(), 4)
    assert {k: v.tolist() for k, v in found.items()} == {"return": [-0.25] * 4, "cost": [1] * 4, "length": [3] * 4}


def test_statistics_of_evaluated_episodes():
    """Of two seeds: twenty episodes that cost 0 to 19, and twenty that cost 7 each."""
    cost = np.stack([np.arange(20.0)[::-1], np.full(20, 7.0)])
    found = training.episode_statistics({"return": -cost, "cost": cost, "length": np.full((2, 20), 5.0)}, 7)
    assert {k: v.tolist() for k, v in found.items() if not k.endswith("_se")} == {
        "episodes": [20, 20], "return": [-9.5, -7], "cost": [9.5, 7], "length": [5, 5], "share_above": [0.6, 0], "worst_tenth": [18.5, 7]
    }  # fmt: skip
    np.testing.assert_allclose(found["cost_se"], [np.sqrt(35 / 20), 0])  # variance of 0, ..., n-1: n (n+1) / 12
    np.testing.assert_array_equal(found["return_se"], found["cost_se"])
    one = training.episode_statistics({k: np.array([3.0]) for k in ("return", "cost", "length")}, 2)
    assert np.isnan(one["cost_se"]) and one["share_above"] == 1 and one["worst_tenth"] == 3


def test_actors_episode_sums_restart():
    env = probes.Constant(2.0, 1.0, 4)
    actors = rollout.start_rollout(jax.random.key(0), env, 2)
    actors, _, ended = rollout.collect(actors, PASSIVE, jax.random.key(0), env, 6)
    np.testing.assert_array_equal(actors.sums, [[4, 2, 2]] * 2)
    np.testing.assert_array_equal(np.array(ended), [2, 16, 8, 8])


# ---------------------------------------------------------------- Monte-Carlo returns


DISCOUNT = 0.9, 0.1, 0.0  # gamma, reward scale, cost of a terminal step


def geometric(gamma, steps):
    return (1 - gamma**steps) / (1 - gamma)


def test_monte_carlo_through_time_outs(variant):
    """Half a horizon of discounted rewards (scaled) and costs from every point, although episodes would time out on
    the way."""
    env = probes.Constant(3.0, 0.5, 20)
    points = variant(lambda key: rollout.monte_carlo_points(ZERO, ZERO, key, env, 16, *DISCOUNT))(jax.random.key(0))
    np.testing.assert_allclose(points.returns, np.full(16, 0.3 * geometric(0.9, 10)), rtol=1e-5)
    np.testing.assert_allclose(points.costs, np.full(16, 0.5 * geometric(0.9, 10)), rtol=1e-5)


def test_monte_carlo_stops_at_terminal_states(variant):
    """From clock k of 12 there are 12 - k steps, of which half a horizon (10) counts at most; points lie at many
    clocks."""
    env = probes.Constant(3.0, 0.5, 20, terminal_at=12)
    points = variant(lambda key: rollout.monte_carlo_points(ZERO, ZERO, key, env, 64, *DISCOUNT))(jax.random.key(0))
    clock = np.argmax(points.obs, -1)
    assert clock.min() == 0 and clock.max() == 9
    np.testing.assert_allclose(points.returns, 0.3 * geometric(0.9, np.minimum(12 - clock, 10)), rtol=1e-5)
    np.testing.assert_allclose(points.costs, 0.5 * geometric(0.9, np.minimum(12 - clock, 10)), rtol=1e-5)


def test_monte_carlo_charges_for_dying():
    """7 in the terminal step, discounted as its cost is; points from which it is more than half a horizon away see none of it."""
    env = probes.Constant(3.0, 0.5, 20, terminal_at=12)
    points = rollout.monte_carlo_points(ZERO, ZERO, jax.random.key(0), env, 64, 0.9, 0.1, 7.0)
    steps = 12 - np.argmax(points.obs, -1)
    charge = np.where(steps <= 10, 7 * 0.9 ** (steps - 1.0), 0)
    assert steps.min() < 10 < steps.max()
    np.testing.assert_allclose(points.costs, 0.5 * geometric(0.9, np.minimum(steps, 10)) + charge, rtol=1e-5)
    np.testing.assert_allclose(points.returns, 0.3 * geometric(0.9, np.minimum(steps, 10)), rtol=1e-5)


def test_monte_carlo_takes_the_recorded_action_first():
    """The return starts with the recorded action, which is `explore`'s and not `policy`'s."""
    env = probes.OneStep()
    env.horizon = 2
    explore = lambda obs, key: jax.random.uniform(key, (*obs.shape[:-1], 1), minval=-1.0)
    policy = lambda obs, key: jnp.full((*obs.shape[:-1], 1), 0.77)
    points = rollout.monte_carlo_points(explore, policy, jax.random.key(0), env, 50, *DISCOUNT)
    a = np.float64(points.action[:, 0])
    assert a.std() > 0.3
    np.testing.assert_allclose(points.returns, 0.1 * a, atol=1e-6)  # terminal after it: the policy's 0.77 never counts
    np.testing.assert_allclose(points.costs, np.maximum(a, 0) ** 2, atol=1e-6)


def test_monte_carlo_of_episodes_of_one_step():
    """The point is where the episode begins, and the one step from it counts."""
    points = rollout.monte_carlo_points(ZERO, ZERO, jax.random.key(0), probes.Constant(3.0, 0.5, 1), 4, *DISCOUNT)
    assert (np.argmax(points.obs, -1) == 0).all()
    np.testing.assert_allclose([points.returns, points.costs], [[0.3] * 4, [0.5] * 4], rtol=1e-6)


def test_rank_correlations_see_the_order():
    """Critics equal to the Monte-Carlo sums rank perfectly; a reversed cost critic ranks in reverse."""
    rng = np.random.default_rng(0)
    obs, action = jnp.float32(rng.normal(size=(30, OBS))), jnp.float32(rng.normal(size=(30, ACTION)))
    first, second = jnp.zeros((1, 6)).at[0, 1].set(1.0), jnp.zeros((1, 6)).at[0, 4].set(1.0)
    points = rollout.Points(obs, action, obs[:, 0], -action[:, 0])
    # the minimum is the first
    critics = {"reward": jnp.concatenate([first, first + 5.0 * jnp.eye(1, 6)]), "cost": second}
    found = diagnostics.rank_correlations(critics, points, points, Networks(None, Linear(), Linear(), None))
    for key, value in {"rank_q_policy": 1, "rank_q_random": 1, "rank_qc_policy": -1, "rank_qc_random": -1}.items():
        assert float(found[key]) == pytest.approx(value, abs=1e-5)


def test_kl_divergence_against_numerical_integration(variant):
    """KL of two tanh-Gaussians, worked out on the actions' own densities, summed over two dimensions."""
    pairs = [(0.3, -0.4, -0.2, 0.1), (-0.5, -1.0, 0.0, -0.6)]
    expected = 0.0
    for mean, log_std, prior_mean, prior_log_std in pairs:
        p, q = (lambda a, m=m, s=s: density(a, m, s) for m, s in ((mean, log_std), (prior_mean, prior_log_std)))
        expected += scipy.integrate.quad(lambda a: p(a) * np.log(p(a) / q(a)), -0.99999, 0.99999, limit=400)[0]
    columns = [jnp.float32(x)[None] for x in zip(*pairs)]
    assert float(variant(networks.kl_divergence)(*columns)[0]) == pytest.approx(expected, rel=2e-3)


def test_anchor_pulls_the_policy_back():
    fixed, batch, actor, critics, _ = setting(marvel)
    flat, prior = jax.tree.map(jnp.zeros_like, critics), jax.tree.map(lambda x: x + 0.5, actor)
    fixed = fixed._replace(args=replace(fixed.args, entropy_weight=0.0))
    rest = (batch, jax.random.key(0), fixed.networks, fixed.args)
    loss = lambda a, anchor=1.0: marvel.actor_loss(a, flat, prior, 0.0, anchor, *rest)[0]
    step = jax.tree.map(lambda a, g: a - 1e-3 * g, actor, jax.grad(loss)(actor))
    assert loss(step) < loss(actor)
    assert float(loss(prior)) == pytest.approx(0.0, abs=1e-5)
    assert float(loss(actor, 0.5)) == pytest.approx(0.5 * float(loss(actor)), rel=1e-4) and loss(actor, 0.0) == 0


def test_anchor_fades():
    """0.2 over half of 10 iterations: 4/5 of it after the first, a tenth, its floor, from the fifth on."""
    args = marvel.Args(anchor_weight=0.2, anchor_decay=0.5, anchor_floor=0.1, iterations=10)
    np.testing.assert_allclose([finetuning.anchor_weight(n, args) for n in (0, 1, 4, 5, 9)], [0.2, 0.16, 0.04, 0.02, 0.02], atol=1e-7)


def test_freeze_actor():
    old = training.Learner({"actor": 1.0, "critics": 2.0}, 3.0, {"actor": 4.0, "critics": 5.0})
    new = training.Learner({"actor": 10.0, "critics": 20.0}, 30.0, {"actor": 40.0, "critics": 50.0})
    held = finetuning.freeze_actor(new, old, True)
    assert jax.tree.map(float, held) == training.Learner({"actor": 1.0, "critics": 20.0}, 30.0, {"actor": 4.0, "critics": 50.0})
    assert jax.tree.map(float, finetuning.freeze_actor(new, old, False)) == new


# ---------------------------------------------------------------- switches: the paper's or the release's value of each


def test_ood_penalty_as_published(variant):
    """Two-sided: above qc_thres it pushes down. OSRL's has no gradient: alpha then has no say."""
    fixed, batch, actor, critics, targets = setting(marvel, cost_limit=1.0, one_sided_penalty=False)
    critics = {**critics, "cost": critics["cost"].at[0, 0].set(30.0)}
    key, alpha = jax.random.key(0), 1.7
    ood_obs, ood_action, weight = numbers(ood_sample())
    phi = features(ood_obs, ood_action)[weight == 1].mean(0)
    value = lambda fixed, log_dual: variant(jax.value_and_grad(lambda c, a, t, b, k: cpq(c, a, t, b, log_dual, k, fixed)))(
        critics, actor, targets, batch, key
    )
    (_, on), (_, off) = value(fixed, math.log(alpha)), value(fixed, -100.0)
    np.testing.assert_allclose(np.float64(on["cost"][0]) - off["cost"][0], -alpha * phi, atol=2e-3)
    blind = fixed._replace(args=replace(fixed.args, ood_gradient=False))
    (on_loss, on), (off_loss, off) = value(blind, math.log(alpha)), value(blind, -100.0)
    np.testing.assert_array_equal(on["cost"], off["cost"])
    assert float(off_loss) == float(on_loss)


@pytest.mark.parametrize("module", [offline, bear_lag])
def test_what_costs_can_add_up_to(module, monkeypatch):
    """C in every step, or the charge of one terminal step. The settings of every task keep the bound that their results were made with."""
    env = SimpleNamespace(name="probe", obs_size=3, privileged_size=0, action_size=2, horizon=50)
    monkeypatch.setattr(training, "pretrain", lambda run, algo, version, recipe, init, step, data, actor: step.keywords["max_qc"])

    def bound(max_cost, **settings):
        run = training.Run(replace(module.Args(), **settings), env, None, None, data=(), cloned=(), max_cost=max_cost)
        return np.float32(module.pretrain(run))

    assert bound(1.0) == 100 and bound(2.0, gamma=0.9) == 20
    assert bound(1.0, termination_cost=500.0) == 500 and bound(0.0, termination_cost=5.0) == 5
    for task in offline.SUITE.values():
        assert bound(1.0, termination_cost=task.get("termination_cost", 0.0)) == np.float32(1.0 / (1.0 - 0.99))


def test_cost_target_bound(variant):
    """Clipped to what the largest cost of a step can add up to, which may be more than 1; or not at all."""
    fixed, batch, actor, critics, targets = setting(marvel, cost_limit=1e6, termination_cost=0.0)
    targets = {**targets, "cost": jnp.zeros((1, 1 + OBS + ACTION)).at[0, 0].set(70.0)}
    params, alive = {"actor": actor, "log_dual": -100.0}, GAMMA * (1 - np.float64(batch.terminated))
    for bound, clip, backup in ((40.0, True, 40.0), (400.0, True, 70.0), (40.0, False, 70.0)):
        args = replace(fixed.args, clip_cost_target=clip)
        limits, nets = thresholds(fixed), fixed.networks
        loss = lambda c, b, k: offline.cpq_critic_loss(c, params, targets, b, ood_sample(), k, nets, args, limits, bound)[1]
        found = variant(loss)(critics, batch, jax.random.key(0))["cost_critic_loss"]
        qc = features(*numbers((batch.obs, batch.action))) @ np.float64(critics["cost"][0])
        assert float(found) == pytest.approx(np.mean((qc - np.float64(batch.cost) - alive * backup) ** 2), rel=1e-4)


def test_ood_actions_as_published():
    """All states of the batch, a chosen share of the actions, no gate."""
    fixed, params, batch = real_networks()
    args = replace(fixed.args, ood_states=0, ood_quantile=0.0, ood_fraction=0.1)
    obs, action, weight = offline.ood_actions(params, batch, jax.random.key(4), fixed.networks, args)
    assert obs.shape == (48, OBS) and action.shape == (48, ACTION) and np.all(weight == 1)


def test_no_constraint_is_no_penalty():
    fixed, batch, actor, critics, targets = setting(marvel, cost_limit=math.inf)
    value, gradient = jax.value_and_grad(cpq)(critics, actor, targets, batch, 5.0, jax.random.key(0), fixed)
    assert np.isfinite(value) and all(np.isfinite(g).all() for g in jax.tree.leaves(gradient))


def test_vpa_entropy_of_the_batch(variant):
    """h as one number for all: the mean over the batch."""
    fixed, batch, actor, critics, targets = setting(marvel)
    key, weights = jax.random.key(5), (0.3, 0.2)
    loss = lambda c, a, t, b, k: marvel.critic_loss(c, a, t, weights, b, k, fixed.networks, fixed.args, "batch_mean")[0]
    value = variant(loss)(critics, actor, targets, batch, key)
    y_r, y_c = soft_targets(batch, actor, targets, key, 0.0, 0.0)
    h, alive = -next_action(actor, batch.next_obs, key)[1].mean(), GAMMA * (1 - np.float64(batch.terminated))
    errors = [features(*numbers((batch.obs, batch.action))) @ numbers(critics)[k].T for k in ("reward", "cost")]
    expected = np.mean((errors[0] - (y_r + 0.3 * alive * h)[:, None]) ** 2) + np.mean((errors[1][:, 0] - y_c - 0.2 * alive * h) ** 2)
    assert float(value) == pytest.approx(expected, rel=1e-3)


def test_the_released_controller():
    """Against plain numbers: all averages start at 0; gains follow mean + 0.1 and deviation of the last `pid_delay` averages of the cost."""
    args = logbook.parse(marvel.Args, ["--preset", "release", "--env", "bullet/SafetyBallCircle"], marvel.PRESETS)
    assert (args.kp, args.ki, args.kd, args.multiplier_updates) == (5e-6, 5e-6, 5e-6, 20)
    m, gains, integral, p, averages = init_multiplier(args), np.full(3, 5e-6), 0.0, 0.0, [0.0]
    for cost in (0.0, 250.0, 30.0, 5.0):
        m = update_multiplier(m, jnp.float32(cost), args)
        for _ in range(20):
            integral = max(0.0, integral + gains[1] * (cost - 20))
            p = 0.9 * p + 0.1 * (cost - 20)
            averages.append(0.9 * averages[-1] + 0.1 * cost)
            before = averages[-11] if len(averages) > 10 else 0.0
            value = max(0.0, gains[0] * p + integral + gains[2] * max(0.0, averages[-1] - before))
            mean, std = np.mean(averages[-10:]) + 0.1, np.std(averages[-10:])
            gains = np.clip(gains * (1 + 0.05 * np.array([mean - 20, mean - 20, std]) / mean), 5e-7, 5e-5)
        np.testing.assert_allclose([m.value, m.integral, *m.gains], [value, integral, *gains], rtol=2e-3, atol=1e-9)
    assert value > 0
    args = replace(args, lagrangian="dual", ki=0.002)
    m = update_multiplier(init_multiplier(args), jnp.float32(50.0), args)
    assert float(m.value) == pytest.approx(20 * 0.002 * 30, rel=1e-5)


@pytest.mark.parametrize("which", ["online", "target"])
def test_the_actor_follows_the_chosen_critics(which):
    """Online critics want the first action larger, the targets smaller."""
    fixed, batch, actor, critics, _ = setting(marvel, actor_critics=which, entropy_weight=0.0)
    axis = lambda way: jnp.zeros((1, 1 + OBS + ACTION)).at[0, 1 + OBS].set(way)
    up, down = ({"reward": jnp.repeat(axis(way), 2, 0), "cost": 0 * axis(way)} for way in (1.0, -1.0))
    optimizers = {"actor": optax.sgd(0.1), "critics": optax.sgd(0.0)}
    learner = training.init_learner({"actor": actor, "critics": up, "prior": actor}, optimizers)._replace(targets=down)
    after, _ = marvel.online_step(learner, 0.0, 0.0, batch, jax.random.key(0), fixed.networks, optimizers, fixed.args)
    assert (after.params["actor"]["b"][0] > actor["b"][0]) == (which == "online")


def test_networks_without_symlog_and_layer_norm():
    obs, action = 100 * jnp.ones((5, 4)), jnp.ones((5, 2))
    for flags in ({}, {"symlog": False}, {"layer_norm": False}, {"symlog": False, "layer_norm": False}):
        critic = networks.Critic((8,), **flags)
        params = critic.init(jax.random.key(0), obs, action)
        dense, last = params["params"]["Dense_0"], params["params"]["Dense_1"]
        x = np.concatenate([np.float64(obs if not flags.get("symlog", True) else symlog(obs)), action], -1)
        x = x @ np.float64(dense["kernel"]) + dense["bias"]
        if flags.get("layer_norm", True):
            x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
        np.testing.assert_allclose(
            critic.apply(params, obs, action), np.maximum(x, 0) @ last["kernel"][:, 0] + last["bias"], rtol=1e-3, atol=1e-3
        )
    raw, squashed = (networks.Actor((8,), 4, 2, symlog=flag) for flag in (False, True))
    params = raw.init(jax.random.key(0), obs)
    np.testing.assert_allclose(raw.apply(params, symlog(obs))[0], squashed.apply(params, obs)[0], rtol=1e-5)


def test_ood_quantile_decides_what_is_far():
    """Of actions the data has too, few are beyond its 99%: 0 takes them all, whatever their KL."""
    fixed, params, batch = real_networks()
    key = jax.random.key(4)
    weight = lambda q: np.asarray(
        offline.ood_actions(params, batch, key, fixed.networks, replace(fixed.args, ood_fraction=1.0, ood_quantile=q))[2]
    )
    _, _, kl, own = all_policy_actions(params, batch, key, fixed)
    assert kl.min() < own.min() and np.all(weight(0.0) == 1)
    for q in (0.5, 0.99):
        assert weight(q).sum() == (kl > np.quantile(own, q)).sum()


@pytest.mark.parametrize("bound", [2.0, 10.0, math.inf])
def test_gain_bound(bound):
    """Costs of nothing for long: gains shrink to K0 / bound and no further; without a bound towards 0, and stay numbers."""
    args = marvel.Args(cost_limit=20.0, reserve=0.0, gain_rates=(0.5, 0.5, 0.5), gain_bound=bound)
    m = init_multiplier(args)
    for cost in [0.0] * 12:
        m = update_multiplier(m, jnp.float32(cost), args)
    free = np.array([1 - 0.5 * math.tanh(1.0), 0.5, 1.0]) ** 12
    np.testing.assert_allclose(m.gains / init_multiplier(args).gains, np.maximum(free, 1 / bound), rtol=1e-4)


def test_vpa_step_passes_its_entropy_on():
    """The whole step, not only its loss: per-sample and batch-mean entropy move the critics differently."""
    moved = {}
    for entropy in ("sample", "batch_mean"):
        fixed, batch, actor, critics, _ = setting(marvel, vpa_entropy=entropy, vpa_alpha_reward=0.3, vpa_alpha_cost=0.2)
        optimizers = {"critics": optax.sgd(0.1)}
        learner = training.init_learner({"actor": actor, "critics": critics}, optimizers)
        key = jax.random.key(5)
        after, _ = marvel.vpa_step(learner, (batch,), key, fixed.networks, optimizers, fixed.args)
        loss = lambda c, e=entropy: marvel.critic_loss(c, actor, critics, (0.3, 0.2), batch, key, fixed.networks, fixed.args, e)[0]
        expected = jax.tree.map(lambda p, g: p - 0.1 * g, critics, jax.grad(loss)(critics))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), after.params["critics"], expected)
        moved[entropy] = after.params["critics"]["reward"]
    assert not np.allclose(moved["sample"], moved["batch_mean"], atol=1e-4)


@pytest.mark.parametrize("flags", [{"symlog": False}, {"layer_norm": False}, {"symlog": False, "layer_norm": False}], ids=str)
def test_every_network_gets_its_flags(flags):
    """What make_networks builds computes what a single critic, actor or encoder with these flags does."""
    env, args = SimpleNamespace(obs_size=3, action_size=2), marvel.Args(hidden=(8,), vae_hidden=(8,), **flags)
    nets = training.make_networks(args, env)
    params = training.init_params(jax.random.key(0), nets, 3)
    obs, action = 50 * jax.random.normal(jax.random.key(1), (5, 3)), jnp.ones((5, 2))
    critic = networks.Critic((8,), **flags)
    for part, ensemble in (("reward", nets.reward), ("cost", nets.cost)):
        found = ensemble.apply(params["critics"][part], obs, action)
        (stacked,) = params["critics"][part]["params"].values()
        for i in range(len(found)):
            member = {"params": jax.tree.map(lambda x, i=i: x[i], stacked)}
            np.testing.assert_allclose(found[i], critic.apply(member, obs, action), rtol=1e-4, atol=1e-4)
    if "symlog" not in flags:
        return
    # A network that squashes sees of `obs` what one that does not sees of symlog(obs).
    squashing = training.make_networks(marvel.Args(hidden=(8,), vae_hidden=(8,)), env)
    mean = lambda nets, obs: nets.actor.apply(params["actor"], obs)[0]
    code = lambda nets, obs: nets.vae.apply(params["vae"], obs, action, method="encode")[0]
    for output in (mean, code):
        np.testing.assert_allclose(output(nets, symlog(obs)), output(squashing, obs), rtol=1e-4, atol=1e-4)
        assert not np.allclose(output(nets, obs), output(squashing, obs), atol=0.1)
