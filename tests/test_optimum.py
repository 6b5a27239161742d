"""algos/: every file that learns a critic, on probe environments whose values, constrained optimum and multiplier are known."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from algos import bear_lag, cal, cpq, finetuning, jsrl, marvel, naive_o2o, pex, sac_lag, so2, training, wsrl
from algos.lagrangian import init_multiplier
from algos.networks import Networks, sample_action
from data.replay import Replay, empty_replay
from envs.rollout import Batch, Episodes, collect, start_rollout
from tests import probes

STEP = {  # what takes a gradient step
    marvel: marvel.online_step, naive_o2o: naive_o2o.online_step, jsrl: jsrl.online_step, pex: pex.pex_step, so2: so2.so2_step,
    wsrl: wsrl.wsrl_step, cal: cal.cal_step, sac_lag: sac_lag.online_step, cpq: cpq.cpq_step, bear_lag: bear_lag.bear_step,
}  # fmt: skip


class Made(NamedTuple):
    """An algorithm on a probe: its step, bound to networks, optimisers and arguments."""

    args: Any
    networks: Networks
    optimizers: dict
    step: Callable


def bound(algo, networks, optimizers, args, horizon):
    """The algorithm's step as a function of what changes."""
    step = partial(STEP[algo], networks=networks, optimizers=optimizers, args=args)
    if algo is cpq:
        return partial(step, limits=cpq.thresholds(args.cost_limit, args.gamma, horizon), max_qc=1.0 / (1.0 - args.gamma))
    if algo is cal:
        return partial(step, threshold=cpq.thresholds((1 - args.reserve) * args.cost_limit, args.gamma, horizon)[0])
    if algo is bear_lag:
        return partial(step, q_thres=training.cost_threshold(args.cost_limit, args.gamma, horizon), max_qc=1.0 / (1.0 - args.gamma))
    return step


def files(left_out, quick):
    """The files to test: `quick` in `make test`, the others, whose steps are mostly the same text, in `make test-all`."""
    name = lambda algo: algo.__name__.rsplit(".", 1)[-1]
    chosen = [algo for algo in STEP if algo not in left_out]
    return [pytest.param(algo, id=name(algo), marks=() if algo in quick else pytest.mark.slow) for algo in chosen]


def made(algo, env, rates, critics=None, **wanted):
    """(fixed, learner) with those of the `wanted` arguments that the algorithm has, and Adam steps of size 0 for what has no rate.

    The first parameters are NumPy's, as the files' own take longer to compile than all else here."""
    args = algo.Args(**{k: v for k, v in wanted.items() if k in algo.Args.__dataclass_fields__})
    networks = training.make_networks(args, env)._replace(**(critics or {}))
    starts = {cpq: ("log_dual", "init_dual"), bear_lag: ("log_duals", "init_duals"), sac_lag: ("log_alpha", "init_temperature")}
    starts[cal] = ("log_multiplier", "init_multiplier")
    shapes, rng = jax.eval_shape(lambda: training.init_params(jax.random.key(0), networks, env.obs_size)), np.random.default_rng(0)
    weight = lambda path, x: np.float32(rng.normal(size=x.shape) / np.sqrt(x.shape[-2]) if path[-1].key == "kernel" else np.zeros(x.shape))
    params = jax.tree_util.tree_map_with_path(weight, shapes)
    if algo in starts:
        name, start = starts[algo]
        params[name] = np.log(np.float32(getattr(args, start)))
    params = jax.tree.map(jnp.asarray, params)
    optimizers = {name: optax.adam(rates.get(name, 0.0)) for name in params}
    learner = training.init_learner(params | {"prior": params["actor"]}, optimizers)
    return Made(args, networks, optimizers, bound(algo, networks, optimizers, args, env.horizon)), learner


def uniform(obs, key, elapsed):
    return jax.random.uniform(key, (*obs.shape[:-1], 1), minval=-1.0)


def random_data(env, steps, num_envs=16):
    """Transitions of a random policy, leaves (steps, num_envs, ...)."""
    return jax.jit(lambda: collect(start_rollout(jax.random.key(0), env, num_envs), uniform, jax.random.key(1), env, steps))()[1]


def flat(batch):
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), batch)


# ---------------------------------------------------------------- values

GAMMA, WIDTH = 0.9, 5
PROBES = (probes.Constant(2.0, 0.5, 5), probes.Constant(2.0, 0.5, 50, terminal_at=4), probes.DelayedCost())


def wide(obs):
    """Observations filled up with zeros, so that one program serves all probes."""
    return jnp.pad(obs, [(0, 0)] * (obs.ndim - 1) + [(0, WIDTH - obs.shape[-1])])


@pytest.fixture(scope="module")
def data():
    """A random policy's transitions in all three probes, leaves (3, 64, 16, ...)."""
    found = [random_data(env, 64) for env in PROBES]
    return jax.tree.map(lambda *x: jnp.stack(x), *[b._replace(obs=wide(b.obs), next_obs=wide(b.next_obs)) for b in found])


def fitted(algo, data, steps=1000, **changes):
    """A function that gives a probe's (Q (members, rows), Qc (rows,)) after the algorithm's own gradient steps on its data.

    What the files have in common is set alike, so that equal programs are compiled once."""
    rates = {"actor": 1e-3, "critics": 3e-3, "vae": 1e-3, "log_duals": 1e-3}
    small = dict(gamma=GAMMA, tau=0.05, hidden=(32, 32), vae_hidden=(8,), batch_size=64, ood_states=16, mmd_samples=4, reward_scale=0.1)
    plain = dict(entropy_weight=0.0, init_temperature=1e-9, anchor_weight=0.0, actor_warmup=0, lagrangian="pid")
    counts = dict(updates_per_iter=steps, updates_per_block=steps)
    fixed, learner = made(algo, probes.Probe(5, WIDTH), rates, **{**small, **plain, **counts, **changes})

    def learn(learner, new):
        new, key = Batch(*new), jax.random.key(3)
        rows = flat(new)
        if algo in (cpq, bear_lag):
            batches = (rows, rows) if algo is cpq else (rows,)
            return training.train_on_dataset(learner, batches, key, fixed.step, 64, steps)[0]
        multiplier, ended = init_multiplier(fixed.args), Episodes(*jnp.zeros(4))
        replay = Replay(jax.tree.map(jnp.zeros_like, rows), jnp.int32(0))
        if algo is sac_lag:
            return algo.train_online(learner, multiplier, replay, ended, new, ended, key, fixed.step, fixed.args)[0]
        freeze = finetuning.freeze_actor
        return finetuning.train_online(learner, multiplier, replay, rows, new, ended, key, 1, fixed.step, freeze, fixed.args)[0]

    critics = jax.jit(jax.vmap(learn, (None, 0)))(learner, data).params["critics"]
    apply = jax.jit(lambda c, *x: (fixed.networks.reward.apply(c["reward"], *x), fixed.networks.qc(c, *x)))

    def values(probe, obs, action):
        obs, action = jnp.asarray(obs, jnp.float32), jnp.float32(action)[:, None]
        return jax.tree.map(np.asarray, apply(jax.tree.map(lambda x: x[probe], critics), wide(obs), action))

    return values


LEFT = (1 - GAMMA ** np.arange(4, 0, -1)) / (1 - GAMMA)  # the discounted number of steps left at clock 0, 1, 2, 3 of 4
ACTIONS = np.linspace(-0.6, 0.6, 8)


def check_costs(values):
    """Qc of all three probes: a cost of 0.5 for ever, one that ends after four steps, one that comes two steps later or not."""
    np.testing.assert_allclose(values(0, np.ones((8, 1)), ACTIONS)[1], np.full(8, 5.0), atol=0.1)
    clock = np.repeat(np.arange(4), 2)
    np.testing.assert_allclose(values(1, np.eye(5)[clock], ACTIONS)[1], 0.5 * LEFT[clock], atol=0.05)
    first = np.array([-0.9, -0.6, -0.3, 0.3, 0.6, 0.9, -0.2, 0.2])
    np.testing.assert_allclose(values(2, np.zeros((8, 2)), first)[1], GAMMA**2 * (first > 0), atol=0.1)


@pytest.mark.parametrize("algo", files([cpq], quick=[pex, bear_lag]))
def test_known_values(algo, data):
    """Reward 2 (scaled 0.2) and cost 0.5 per step. Through time-outs r / (1 - gamma); up to a terminal state r times the discounted
    number of steps left; whatever the policy does, and although it learns at the same time."""
    values = fitted(algo, data, 3000 if algo is wsrl else 1000)  # where its cost critic starts, 2,000 leave 0.11 to go
    check_costs(values)
    np.testing.assert_allclose(values(0, np.ones((8, 1)), ACTIONS)[0], np.full((2, 8), 2.0), atol=0.06)
    clock = np.repeat(np.arange(4), 2)
    np.testing.assert_allclose(values(1, np.eye(5)[clock], ACTIONS)[0], np.tile(0.2 * LEFT[clock], (2, 1)), atol=0.03)


def test_known_values_behind_the_gate(data):
    """CPQ with q_thres = 1.15, costs as above. Time-outs: Qc = 5, the gate is shut, Q is the step's own reward. Before the terminal
    state Qc is 1.72, 1.36, 0.95, 0.5: only the first step leads to where the gate is shut, and ends there."""
    limit = 1.15 * 5 * (1 - GAMMA) / (1 - GAMMA**5)
    values = fitted(cpq, data, cost_limit=limit, gate_quantile=0.0)
    check_costs(values)
    np.testing.assert_allclose(values(0, np.ones((8, 1)), ACTIONS)[0], np.full((2, 8), 0.2), atol=0.03)
    clock = np.repeat(np.arange(4), 2)
    gated = 0.2 * np.array([1.0, *LEFT[1:]])
    np.testing.assert_allclose(values(1, np.eye(5)[clock], ACTIONS)[0], np.tile(gated[clock], (2, 1)), atol=0.03)


# ---------------------------------------------------------------- the constrained optimum


class Weighted(probes.Probe):
    """One step: the observation x is 1/2 or 1, the reward x a, the cost a^2, then a terminal state.

    One limit d on the expected cost couples both observations through one multiplier: x a - lambda a^2 is largest at a = x / (2 lambda),
    whose expected cost is E[x^2] / (4 lambda^2) = d: lambda = sqrt(E[x^2] / (4 d)). With entropy weight e the best policy has variance
    e / (2 lambda) besides (tanh apart), which costs as well: E[x^2] / (4 lambda^2) + e / (2 lambda) = d."""

    def __init__(self):
        super().__init__(1, 1)

    def start(self, key):
        return {"clock": jnp.int32(0), "x": jax.random.choice(key, jnp.asarray(X))}

    def observe(self, physics):
        return physics["x"][..., None]

    def outcome(self, physics, action):
        a = action[..., 0]
        return physics, physics["x"] * a, jnp.square(a), jnp.ones(a.shape, bool)


X = np.array([0.5, 1.0], np.float32)
LIMIT = 0.15
ENTROPY = 0.01  # weight of the online phase
multiplier_of = lambda entropy: float(entropy / 2 + np.sqrt(entropy**2 / 4 + LIMIT * np.mean(X**2))) / (2 * LIMIT)  # 1.02 for 0
best = lambda multiplier: np.asarray(X) / (2 * multiplier)  # 0.24, 0.49
COMMON = dict(
    cost_limit=LIMIT, reserve=0.0, hidden=(32, 32), vae_hidden=(16,), reward_scale=1.0, tau=0.05, batch_size=64, episodes_per_iter=64,
    updates_per_iter=4, updates_per_block=4, lagrangian="apid", kp=0.5, ki=0.05, kd=0.1, max_multiplier=10.0, entropy_weight=ENTROPY,
    anchor_weight=0.0, actor_warmup=0, init_temperature=ENTROPY, rectification=1.0,
)  # fmt: skip
RATES = {"actor": 3e-3, "critics": 2e-2, "vae": 3e-3, "log_duals": 1e-2, "log_multiplier": 1e-2}


class Quadratic:
    """Stands in for a critic ensemble and can represent this problem's values exactly: linear in 1, x, a, x a, a^2. (MLPs fitted to
    data that the policy does not choose are some percent off in slope, and the optimum with them.)"""

    def __init__(self, size):
        self.size = size

    def init(self, key, obs, action):
        return {"weights": jnp.zeros((self.size, 5))}

    def apply(self, params, obs, action):
        x, a = jnp.broadcast_arrays(obs[..., 0], action[..., 0])
        return jnp.moveaxis(jnp.stack([jnp.ones_like(a), x, a, x * a, a**2], -1) @ params["weights"].T, -1, 0)


EXACT = {"reward": Quadratic(2), "cost": Quadratic(1)}


def run_online(algo, iterations=500, seed=2, **changes):
    """Episodes, multiplier and gradient steps in turn, as in the file's online_phase: (mean actions at X, cost, lambda) per iteration.

    The offline policy is of no use, whatever it sees: JSRL's guide does about 0 (nothing), PEX's other half about -0.96."""
    env = Weighted()
    fixed, learner = made(algo, env, RATES, EXACT, **{**COMMON, "iterations": iterations, "handover": 0.1, **changes})
    args = fixed.args
    prior = jax.tree.map(jnp.zeros_like, learner.params["actor"])
    prior["params"]["Dense_2"]["bias"] = jnp.array([0.0 if algo is jsrl else -2.0, -1.0])
    learner = learner._replace(params=learner.params | {"prior": prior})
    # CAL's lambda follows the mean Qc of replayed actions: of recent ones only is that the policy's own cost
    replay = empty_replay((4 if algo is cal else iterations) * 64, 1, 1)
    extra = jsrl.Curriculum(jnp.float32(1.0), jnp.full(2, jnp.nan)) if algo is jsrl else Episodes(*jnp.zeros(4))
    policy = lambda actor: lambda obs, key: sample_action(key, *fixed.networks.actor.apply(actor, obs))[0]

    def block(carry, step):
        (learner, multiplier, replay, rollout, extra), (n, key) = carry, step
        key_collect, key_learn = jax.random.split(key)
        params, own = learner.params, policy(learner.params["actor"])
        if algo is jsrl:
            act = jsrl.jump_start(policy(params["prior"]), own, extra.share, env.horizon)
        elif algo is pex:
            choose = partial(pex.expanded_policy, networks=fixed.networks, temperature=args.temperature)
            act = lambda obs, key, elapsed: choose(params, params["critics"], multiplier.value, obs, key)[0]
        else:
            act = lambda obs, key, elapsed: own(obs, key)
        rollout, new, ended = collect(rollout, act, key_collect, env, 1)
        extra = jsrl.advance(extra, ended.means(), n, args) if algo is jsrl else extra
        if algo is sac_lag:
            learner, multiplier, replay, extra, _ = algo.train_online(
                learner, multiplier, replay, extra, new, ended, key_learn, fixed.step, args
            )
        else:
            learner, multiplier, replay, _ = finetuning.train_online(
                learner, multiplier, replay, replay.data, new, ended, key_learn, n, fixed.step, finetuning.freeze_actor, args
            )
        means = jnp.tanh(fixed.networks.actor.apply(learner.params["actor"], X[:, None])[0][:, 0])
        own = jnp.exp(learner.params["log_multiplier"]) if algo is cal else multiplier.value
        return (learner, multiplier, replay, rollout, extra), (means, ended.means()["cost"], own)

    carry = (learner, init_multiplier(args), replay, start_rollout(jax.random.key(1), env, 64), extra)
    steps = (jnp.arange(1, iterations + 1), jax.random.split(jax.random.key(seed), iterations))
    return jax.tree.map(np.asarray, jax.jit(lambda carry: jax.lax.scan(block, carry, steps)[1])(carry))


@pytest.mark.parametrize("algo", files([cpq, bear_lag], quick=[marvel, naive_o2o, jsrl, pex]))
def test_online_optimum(algo):
    """The mean actions become those of the constrained optimum, the cost the limit, lambda the dual solution. (SO2 does here what
    Marvel does: it perturbs the actions of next states, of which there are none.)"""
    actions, cost, multiplier = (x[-60:].mean(0) for x in run_online(algo))
    known = multiplier_of(ENTROPY)
    np.testing.assert_allclose(actions, best(known), atol=0.025)
    assert cost == pytest.approx(LIMIT, rel=0.05)
    assert multiplier == pytest.approx(known, rel=0.05)


def run_offline(algo, steps, name, values, **changes):
    """Gradient steps on a random policy's data (and its safe episodes, to clone), for several values of an argument at once: a dictionary
    of (values, 10, ...) arrays, one entry per tenth of the steps."""
    env = Weighted()
    rows = flat(random_data(env, 128))
    fixed, learner = made(algo, env, RATES, EXACT, **{**COMMON, **changes})
    safe = jax.tree.map(lambda x: x[np.asarray(rows.cost) <= LIMIT], rows)
    batches = (rows, safe) if algo is cpq else (rows,)

    def learn(learner, value):
        args = replace(fixed.args, **{name: value})
        step = bound(algo, fixed.networks, fixed.optimizers, args, env.horizon)

        def tenth(learner, key):
            learner, info = training.train_on_dataset(learner, batches, key, step, 64, steps // 10)
            mean, log_std = fixed.networks.actor.apply(learner.params["actor"], jnp.asarray(X)[:, None])
            action = sample_action(key, *(jnp.broadcast_to(v, (500, 2, 1)) for v in (mean, log_std)))[0][..., 0]
            found = {"mean": jnp.tanh(mean[:, 0]), "return": jnp.mean(X * action), "cost": jnp.mean(action**2)}
            if algo is bear_lag:
                loss = partial(bear_lag.bear_actor_loss, networks=fixed.networks, args=args)
                found["mmd"] = loss(learner.params["actor"], learner.params, batches[0], key)[1]["mmd"]
            return learner, info | found

        return jax.lax.scan(tenth, learner, jax.random.split(jax.random.key(1), 10))[1]

    return jax.tree.map(np.asarray, jax.jit(jax.vmap(learn, (None, 0)))(learner, jnp.array(values)))


def test_bear_lag_optimum():
    """MMD limits of 2, which nothing reaches, and 0.3. The first: the constrained optimum and its lambda. The second: the policy keeps
    to its distance from the data, where the cost is below its limit; the price of distance is positive and lambda falls."""
    found = run_offline(
        bear_lag, 1200, "mmd_limit", [2.0, 0.3], init_duals=(0.1, 0.5), offline_max_multiplier=10.0, mmd_samples=8, mmd_sigma=1.0
    )
    free, near = ({k: x[i, -4:].mean(0) for k, x in found.items()} for i in (0, 1))
    np.testing.assert_allclose(free["mean"], best(multiplier_of(0.0)), atol=0.03)
    assert free["cost"] == pytest.approx(LIMIT, rel=0.08)
    assert free["multiplier"] == pytest.approx(multiplier_of(0.0), rel=0.06)
    assert free["ood_weight"] < 0.02 and free["mmd"] < 1.0
    assert near["mmd"] == pytest.approx(0.3, abs=0.03) and near["ood_weight"] > 0.5
    assert near["cost"] < LIMIT and near["return"] > 0.05 and near["multiplier"] < 0.5 * free["multiplier"]


def test_cpq_optimum():
    """Limits of 0.15 and 5: safe data is cloned (return 0 on average), and the gate lets the reward pull as far as the limit allows; where
    the gate is always open, farther than that."""
    found = run_offline(cpq, 1000, "cost_limit", [LIMIT, 5.0])
    gated, open_ = ({k: x[i, -4:].mean(0) for k, x in found.items()} for i in (0, 1))
    assert gated["cost"] < 0.9 * LIMIT and gated["return"] > 0.11
    assert open_["cost"] > LIMIT and open_["return"] > 1.3 * gated["return"]
