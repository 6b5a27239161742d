"""algos/: OSRL 0.1.0's own numbers (PyTorch; tests/goldens/record_osrl.py made the file) on the same weights, batch and noise.

Where OSRL is right, values and gradients of the losses are equal. Where it is not, a test shows the difference that matters. The functions are those
of every file that uses them.
"""

import json
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from algos import bear_lag, cpq, lagrangian, marvel, networks, training
from algos.networks import Networks
from envs.rollout import Batch


@pytest.fixture(scope="module")
def osrl():
    """Nested dictionaries of float32 arrays: osrl["actor"]["net.0.weight"]; osrl["meta"] is the configuration."""
    tree = {}
    with np.load(Path(__file__).parent / "goldens" / "osrl.npz") as file:
        for name in file.files:
            *path, last = name.split("/")
            node = tree
            for part in path:
                node = node.setdefault(part, {})
            node[last] = json.loads(str(file[name])) if name == "meta" else file[name]
    return tree


# ---------------------------------------------------------------- OSRL's networks; parameters keep their PyTorch names


def dense(params, name, x):
    return x @ params[f"{name}.weight"].T + params[f"{name}.bias"]


def layers(params, names, *inputs):
    """An MLP with ReLU between its layers."""
    x = jnp.concatenate(inputs, -1)
    for name in names[:-1]:
        x = jax.nn.relu(dense(params, name, x))
    return dense(params, names[-1], x)


def actor(params, obs):
    x = jax.nn.relu(layers(params, ["net.0", "net.2"], obs))
    return dense(params, "mu_layer", x), jnp.clip(dense(params, "log_std_layer", x), -20.0, 2.0)


def critics(params, obs, action):
    """All members of OSRL's ensembles (`q_nets.0`, or `q1_nets.0` and `q2_nets.0`)."""
    members = sorted({".".join(name.split(".")[:2]) for name in params})
    return jnp.stack([layers(params, [f"{m}.{i}" for i in (0, 2, 4)], obs, action)[..., 0] for m in members])


def vae(params, obs, *rest, method=None):
    if method == "decode":
        return jnp.tanh(layers(params, ["d1", "d2", "d3"], obs, *rest))
    x = jax.nn.relu(layers(params, ["e1", "e2"], obs, rest[0]))
    mean, log_std = dense(params, "mean", x), jnp.clip(dense(params, "log_std", x), -4.0, 15.0)
    if method == "encode":
        return mean, log_std
    return vae(params, obs, mean + jnp.exp(log_std) * jax.random.normal(rest[1], mean.shape), method="decode"), mean, log_std


def setting(algo, osrl, **changes):
    """(what losses need besides, batch, params, targets) on OSRL's networks and weights; alpha is 0."""
    meta = osrl["meta"]
    same = {name: meta[name] for name in ("gamma", "tau", "cost_limit", "reward_scale")}
    args = algo.Args(**same, vae_beta=meta["beta"], **changes)
    one = lambda *args: critics(*args)[:1]  # OSRL's cost critics are copies of one here
    nets = Networks(*(SimpleNamespace(apply=apply) for apply in (actor, critics, one, vae)))
    fixed = SimpleNamespace(args=args, networks=nets, limits=cpq.thresholds(args.cost_limit, args.gamma, meta["episode_len"]))
    fixed.max_qc, fixed.lr = 1.0 / (1.0 - args.gamma), meta["lr"]
    b = osrl["batch"]
    batch = Batch(b["obs"], b["action"], b["reward"], b["cost"], b["next_obs"], b["done"])
    trained, targets = ({"reward": osrl["critic" + old], "cost": osrl["cost_critic" + old]} for old in ("", "_old"))
    params = {"actor": osrl["actor"], "critics": trained, "vae": osrl["vae"], "log_dual": np.float32(-1e9)}
    return fixed, *jax.tree.map(jnp.asarray, (batch, params, targets))


def cpq_setting(osrl):
    """Nothing is cloned, and OOD actions are drawn for all 32 states, as in OSRL."""
    return setting(cpq, osrl, ood_states=32, ood_actions=10, cloning_weight=0.0, gate_quantile=0.0)


@pytest.fixture
def draw(monkeypatch):
    """draw(a, b): from now on `jax.random.normal` gives a, then b. What is left at the end was not drawn: a failure."""
    queue = []

    def normal(key, shape=(), dtype=float):
        noise = jnp.asarray(queue.pop(0))
        assert noise.shape == tuple(shape)
        return noise

    monkeypatch.setattr(jax.random, "normal", normal)
    yield lambda *noise: queue.extend(noise)
    assert not queue


KEY = jax.random.key(0)  # for what draws recorded noise


def close(found, expected, factor=1.0, rtol=2e-4):
    """Trees of arrays are equal, `found` times `factor`; tolerance relative to the largest entry of each array."""
    assert found.keys() == expected.keys()
    for name in expected:
        size = np.abs(expected[name]).max()
        np.testing.assert_allclose(factor * np.asarray(found[name]), expected[name], atol=rtol * size + 1e-7, err_msg=name)


# ---------------------------------------------------------------- policy, thresholds


@pytest.mark.parametrize("where", ["policy", "far"])
def test_sample_action(where, osrl, draw):
    """Actions and log-probabilities of the tanh-Gaussian; `far`: means beyond 10, where tanh is 1 in float32."""
    obs = osrl["batch"]["obs"] * (40 if where == "far" else 1)
    draw(osrl["noise"]["actor"])
    mean, log_std = actor(osrl["actor"], jnp.asarray(obs))
    action, log_prob = networks.sample_action(KEY, mean, log_std)
    np.testing.assert_allclose(action, osrl[where]["action"], atol=2e-5)
    np.testing.assert_allclose(log_prob, osrl[where]["log_prob"], rtol=1e-4, atol=1e-4)
    assert where == "policy" or np.abs(mean).max() > 10


def test_log_probability(osrl):
    known = {name: x[0] for name, x in osrl["likelihood"].items()}
    found = networks.log_probability(osrl["batch"]["action"], known["mean"], known["log_std"])
    np.testing.assert_allclose(found, known["log_prob"], rtol=1e-4, atol=1e-4)


def test_thresholds(osrl):
    for limit, gamma, horizon, q_thres, qc_thres in osrl["thresholds"]:
        found = cpq.thresholds(float(limit), round(float(gamma), 4), int(horizon))
        np.testing.assert_allclose(found, [q_thres, qc_thres], rtol=1e-6)


# ---------------------------------------------------------------- CPQ


def test_vae_loss(osrl, draw):
    """Reconstruction + beta KL, by value and by the gradient of every weight of encoder and decoder."""
    fixed, batch, params, _ = cpq_setting(osrl)
    draw(osrl["noise"]["vae"])
    loss, gradient = jax.jit(
        jax.value_and_grad(lambda v: networks.vae_loss(v, batch.obs, batch.action, KEY, fixed.networks.vae, fixed.args.vae_beta))
    )(params["vae"])
    assert float(loss) == pytest.approx(float(osrl["vae_loss"]), rel=1e-5)
    close(gradient, osrl["vae_gradient"])


def run_critics(setting, ood=None, log_dual=-1e9):
    """(info, gradients of both critics) of cpq_critic_loss."""
    fixed, batch, params, targets = setting
    params = params | {"log_dual": log_dual}
    ood = (batch.obs[:1], batch.action[:1], jnp.zeros(1)) if ood is None else ood
    loss = lambda c: cpq.cpq_critic_loss(c, params, targets, batch, ood, KEY, fixed.networks, fixed.args, fixed.limits, fixed.max_qc)
    gradient, info = jax.jit(jax.grad(loss, has_aux=True))(params["critics"])
    return info, gradient


def test_reward_backup_and_gate(osrl, draw):
    """r + gamma (1 - done) 1[Qc' <= q_thres] min Q'. OSRL adds the two members' errors up, here their mean counts."""
    draw(osrl["noise"]["next"])
    info, gradient = run_critics(cpq_setting(osrl))
    open_ = (osrl["critic_backup"] - 0.1 * osrl["batch"]["reward"])[osrl["batch"]["done"] == 0] != 0
    assert 5 < open_.sum() < 19  # of 24: both sides are met
    assert 2 * float(info["reward_critic_loss"]) == pytest.approx(float(osrl["critic_loss"]), rel=1e-4)
    close(gradient["reward"], osrl["critic_gradient"], 2.0)


def test_cost_target(osrl, draw):
    """c + gamma Qc' where the episode goes on; OSRL's whole batch is as if it always did."""
    draw(osrl["noise"]["next"])
    fixed, batch, params, targets = cpq_setting(osrl)
    info, gradient = run_critics((fixed, batch._replace(terminated=jnp.zeros(32)), params, targets))
    assert float(info["cost_critic_loss"]) == pytest.approx(float(osrl["cost_loss"]), rel=1e-4)
    close(gradient["cost"], osrl["cost_gradient"])


def test_terminal_states_end_the_cost(osrl, draw):
    """OSRL's cost target bootstraps through terminal states (a repair without a switch): for a batch of nothing else it is what it was, 3 to 5
    for costs of 0 or 1. Here it is the cost. In the mixed batch the rows that go on agree."""
    np.testing.assert_array_equal(osrl["cost_terminal_backup"], osrl["cost_backup"])
    close(osrl["cost_terminal_gradient"], osrl["cost_gradient"], rtol=0)
    assert osrl["cost_terminal_backup"].min() > 3
    fixed, batch, params, targets = cpq_setting(osrl)
    qc = critics(params["critics"]["cost"], batch.obs, batch.action)[0]
    for terminated in (jnp.ones(32), batch.terminated):
        draw(osrl["noise"]["next"])
        info, _ = run_critics((fixed, batch._replace(terminated=terminated), params, targets))
        target = jnp.where(terminated == 1, batch.cost, osrl["cost_backup"])
        assert float(info["cost_critic_loss"]) == pytest.approx(float(jnp.mean((qc - target) ** 2)), rel=1e-4)


def rows_of(x):
    """OSRL's (10, 32, ...) in the order of ours, a state's ten actions neighbours: (320, ...)."""
    return np.moveaxis(x, 0, 1).reshape(-1, *x.shape[2:])


def far_actions(setting, osrl, monkeypatch):
    """`ood_actions`, given the very actions that OSRL drew."""
    fixed, batch, params, _ = setting
    with monkeypatch.context() as patch:
        patch.setattr(cpq, "sample_action", lambda *_: (jnp.asarray(rows_of(osrl["ood"]["action"])), None))
        return jax.jit(lambda: cpq.ood_actions(params, batch, KEY, fixed.networks, fixed.args))()


def test_farthest_quarter(osrl, monkeypatch):
    """The same 80 of 320 actions have the largest KL of the encoder's latent."""
    ours = cpq_setting(osrl)
    _, batch, params, _ = ours
    obs, action, weight = far_actions(ours, osrl, monkeypatch)
    far = rows_of(osrl["ood"]["far"]) == 1
    expected = np.concatenate([np.repeat(batch.obs, 10, 0), rows_of(osrl["ood"]["action"])], -1)[far]
    found = np.concatenate([obs, action], -1)
    assert found.shape == (80, 7) and 0 < weight.sum() <= 80
    np.testing.assert_array_equal(sorted(map(tuple, found)), sorted(map(tuple, expected)))
    kl = jax.jit(lambda: networks.latent_kl(*vae(params["vae"], obs, action, method="encode")))()
    np.testing.assert_allclose(np.sort(kl), np.sort(rows_of(osrl["ood"]["kl"])[far]), rtol=1e-4)


def test_the_penalty_has_a_gradient(osrl, draw, monkeypatch):
    """OSRL's penalty changes its loss by 5 and its gradient by nothing: the values come from the target critic, without gradient.
    Here (deviation 1) descending raises the online critic's values of the same actions, by alpha = 1 times their gradient."""
    assert float(osrl["cost_penalty_loss"]) > float(osrl["cost_loss"]) + 4
    close(osrl["cost_penalty_gradient"], osrl["cost_gradient"], rtol=0)
    ours = cpq_setting(osrl)
    ood = far_actions(ours, osrl, monkeypatch)
    draw(osrl["noise"]["next"], osrl["noise"]["next"])
    (_, penalised), (_, plain) = (run_critics(ours, ood, log_dual) for log_dual in (0.0, -1e9))
    value = lambda cost: jnp.sum(ood[2] * critics(cost, *ood[:2])[0]) / ood[2].sum()
    raised = {name: np.asarray(x) - penalised["cost"][name] for name, x in plain["cost"].items()}
    close(raised, jax.jit(jax.grad(value))(ours[2]["critics"]["cost"]))
    close(penalised["reward"], plain["reward"], rtol=0)


def test_ood_value_is_the_far_actions_own(osrl, draw, monkeypatch):
    """OSRL averages over all actions, the near ones as zeros, and so compares a quarter of the far actions' value with qc_thres; and
    its actions are those before tanh, some beyond 1.5. Here it is the far actions' mean. Given one value, alpha moves alike."""
    values, far = osrl["ood"]["qc"], osrl["ood"]["far"] == 1
    fixed, batch, params, targets = ours = cpq_setting(osrl)
    qc_thres = fixed.limits[1]
    step = float(osrl["ood"]["log_alpha"]) / osrl["meta"]["alpha_lr"]  # from log alpha = 0
    assert qc_thres - step == pytest.approx(values[far].mean() / 4, rel=1e-4)
    assert float(-jax.grad(cpq.dual_loss)(0.0, values[far].mean() / 4, qc_thres)) == pytest.approx(step, rel=1e-4)
    assert np.abs(osrl["ood"]["action"]).max() > 1.5
    obs, action, _ = far_actions(ours, osrl, monkeypatch)
    draw(osrl["noise"]["next"])
    same = params | {"critics": {**params["critics"], "cost": targets["cost"]}}  # OSRL asks the target critic
    info, _ = run_critics((fixed, batch, same, targets), (obs, action, jnp.ones(80)))
    assert float(info["qc_ood"]) == pytest.approx(values[far].mean(), rel=1e-5)


def test_actor_loss(osrl, draw):
    """-1[Qc <= q_thres] min Q; here also divided by the mean of |min Q|, which Adam does not see."""
    fixed, batch, params, _ = cpq_setting(osrl)
    draw(*[osrl["noise"]["actor"]] * 2)
    loss = lambda a: cpq.cpq_actor_loss(a, params["critics"], batch, batch, KEY, fixed.networks, fixed.args, fixed.limits[0])[0]
    value, gradient = jax.jit(jax.value_and_grad(loss))(params["actor"])
    action = networks.sample_action(KEY, *actor(params["actor"], batch.obs))[0]
    scale = float(jnp.abs(critics(params["critics"]["reward"], batch.obs, action).min(0)).mean()) + 1e-3
    assert scale * float(value) == pytest.approx(float(osrl["actor_loss"]), rel=1e-4)
    close(gradient, osrl["actor_gradient"], scale)


def test_four_training_steps(osrl, draw):
    """VAE, critics, actor and targets after four whole steps, in their order, by Adam, on rows that do not end and without penalty:
    within 0.1% of the way that they went; the actor, whose loss is divided by something that changes on the way, within 3%."""
    fixed, batch, params, targets = cpq_setting(osrl)
    going = jax.tree.map(lambda x: x[batch.terminated == 0], batch)
    rows, known = going.reward.shape[0], osrl["steps"]
    optimizers = {name: optax.adam(fixed.lr) for name in ("actor", "critics", "vae", "log_dual")}

    @jax.jit
    def step(learner, noise):
        draw(noise["vae"], jnp.zeros((10 * rows, 2)), noise["next"], noise["actor"])
        return cpq.cpq_step(learner, (going, going), KEY, fixed.networks, optimizers, fixed.args, fixed.limits, fixed.max_qc)[0]

    learner = start = training.init_learner(params, optimizers)._replace(targets=targets)
    for i in range(4):
        learner = step(learner, {name: x[i] for name, x in known["noise"].items()})
        learner.params["log_dual"] = params["log_dual"]

    def by_name(learner):
        new, old = learner.params["critics"], learner.targets
        critics = {"critic": new["reward"], "cost_critic": new["cost"], "critic_old": old["reward"], "cost_critic_old": old["cost"]}
        return critics | {"actor": learner.params["actor"], "vae": learner.params["vae"]}

    for network, before in by_name(start).items():
        for name, theirs in known[network].items():
            way = np.linalg.norm(theirs - before[name])
            off = np.linalg.norm(theirs - by_name(learner)[network][name])
            assert off < (0.03 if network == "actor" else 0.001) * way, (network, name, off / way)


# ---------------------------------------------------------------- the controller


def test_pid_terms(osrl):
    """OSRL's controller is this one without averages, reserve and bound, and with a delay of 1. Each term alone is the same
    throughout; together they are while the cost is above its limit. Below, OSRL's proportional term is 0 and ours lowers lambda."""
    costs, limit, known = osrl["pid"]["cost"], osrl["meta"]["pid_thres"], osrl["pid"]

    def run(*on):
        kp, ki, kd = (k * x for k, x in zip(osrl["meta"]["pid"], on))
        plain = dict(lagrangian="pid", cost_limit=limit, reserve=0.0, pid_decay=0.0, pid_delay=1, max_multiplier=1e6)
        plain |= dict(cost_clip=np.inf, integral_fall=1.0, init_multiplier=0.0)
        args = marvel.Args(**plain, kp=kp, ki=ki, kd=kd)
        update = lambda m, cost: (lagrangian.update_multiplier(m, cost, args),) * 2
        return np.asarray(jax.jit(lambda: jax.lax.scan(update, lagrangian.init_multiplier(args), jnp.asarray(costs))[1].value)())

    for name, on in {"p": (1, 0, 0), "i": (0, 1, 0), "d": (0, 0, 1)}.items():
        np.testing.assert_allclose(run(*on), known[name], rtol=1e-5, atol=1e-6, err_msg=name)
    above = costs >= limit
    assert 5 < above.sum() < len(costs) - 4
    lowered = known["all"] + osrl["meta"]["pid"][0] * np.minimum(costs - limit, 0)
    np.testing.assert_allclose(run(1, 1, 1), np.where(above, known["all"], np.maximum(lowered, 0)), rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------- BEAR


def test_mmd(osrl):
    """Gaussian kernels; OSRL returns the root of MMD^2 + 1e-6."""
    found = bear_lag.mmd_squared(jnp.asarray(osrl["mmd"]["x"]), jnp.asarray(osrl["mmd"]["y"]), osrl["meta"]["sigma"])
    np.testing.assert_allclose(found, osrl["mmd"]["value"] ** 2 - 1e-6, rtol=1e-4)


def bear_setting(osrl, **changes):
    fixed, batch, params, _ = setting(bear_lag, osrl, minimum_weight=osrl["meta"]["lmbda"], **changes)
    of = lambda old: {"reward": osrl["bear"]["critic" + old], "cost": osrl["bear"]["cost_critic" + old]}
    duals = jnp.array([-100.0, np.log(osrl["meta"]["multiplier"])])  # beta = 0
    return fixed, batch, *jax.tree.map(jnp.asarray, (params | {"critics": of(""), "log_duals": duals}, of("_old")))


def run_bear(fixed, batch, params, targets):
    loss = lambda c: bear_lag.bear_critic_loss(c, params, targets, batch, KEY, fixed.networks, fixed.args, fixed.max_qc)
    gradient, info = jax.jit(jax.grad(loss, has_aux=True))(params["critics"])
    return info, gradient


def by_sample(noise):
    """OSRL's noise, a state's ten samples neighbours, as (10, 32, a)."""
    return np.moveaxis(noise.reshape(32, 10, 2), 1, 0)


def test_bear_reward_target(osrl, draw):
    """max over ten actions of 0.75 min Q' + 0.25 max Q', with (1 - done); gradients of both members."""
    draw(by_sample(osrl["bear"]["noise"]))
    info, gradient = run_bear(*bear_setting(osrl))
    assert 2 * float(info["reward_critic_loss"]) == pytest.approx(float(osrl["bear"]["critic_loss"]), rel=1e-4)
    close(gradient["reward"], osrl["bear"]["critic_gradient"], 2.0)


def test_bear_cost_target(osrl, draw):
    """With one action, of which mean (deviation 3) and maximum are the same. OSRL ignores `done`, and its two cost critics are copies
    of one here: its loss is twice ours, its gradient that of either."""
    draw(osrl["noise"]["next"][None])
    fixed, batch, params, targets = bear_setting(osrl, mmd_samples=1)
    info, gradient = run_bear(fixed, batch._replace(terminated=jnp.zeros(32)), params, targets)
    assert 2 * float(info["cost_critic_loss"]) == pytest.approx(float(osrl["bear"]["cost_loss"]), rel=1e-4)
    first = lambda tree: {name: x for name, x in tree.items() if name.startswith("q1")}
    close(first(gradient["cost"]), first(osrl["bear"]["cost_gradient"]))


def test_bear_actor_gradient(osrl, draw):
    """-min Q + lambda Qc of the first of ten actions. beta is 0: OSRL's MMD is between actions before tanh (deviation 2)."""
    fixed, batch, params, _ = bear_setting(osrl)
    draw(by_sample(osrl["bear"]["noise"]), np.zeros((10, 32, 4), np.float32))
    gradient = jax.jit(jax.grad(lambda a: bear_lag.bear_actor_loss(a, params, batch, KEY, fixed.networks, fixed.args)[0]))(params["actor"])
    close(gradient, osrl["bear"]["actor_gradient"])
