"""What stands between the equations and a run: which numbers reach which function, in the phases of every file, on probes with known answers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import envs
from algos import cal, cpq, diagnostics, finetuning, jsrl, marvel, naive_o2o, pex, so2, training, wsrl
from algos.lagrangian import init_multiplier
from algos.seeds import vmap_seeds
from algos.training import Learner, Run
from data import dsrl, replay
from envs.rollout import Batch, Episodes
from tests import probes
from tests.test_maths import GAMMA, SCALE, cloned, features, next_action, numbers, setting

ENV = "SafetyPointRun"
SMALL = dict(
    env="none", hidden=(8,), vae_hidden=(8,), iterations=2, episodes_per_iter=2, updates_per_iter=3, batch_size=8, evals=1,
    eval_episodes=4, final_eval_rounds=1, gamma=0.9, reward_scale=0.1, cost_limit=20.0,
)  # fmt: skip


class Log:
    """Stands in for a Logbook: rows are kept as they are logged, values (seeds,)."""

    def __init__(self):
        self.rows = []

    def steps_before(self, phase):
        return 0

    def log(self, phase, event, **values):
        self.rows.append({"phase": phase, "event": event} | {k: np.asarray(v) for k, v in values.items()})

    def check(self, phase, learner):
        pass

    def run(self, phase, blocks, carry, block, size=1, unit="steps", seeds=None):
        for n in range(blocks + 1):
            carry = block(n, carry)
        return carry


def a_run(algo, env, data=None, cloned=None, seeds=1, **changes):
    """(run, offline parameters) of an algorithm file on a probe; the offline policy's mean action is tanh(-3), its spread small."""
    args = algo.Args(**SMALL | changes)
    roots = jax.vmap(jax.random.key)(jnp.arange(seeds))
    run = Run(args, env, Log(), roots, data=data, cloned=cloned)
    networks = training.make_networks(args, env)
    params = vmap_seeds(lambda key: training.init_params(key, networks, run.critic_obs_size))(roots)
    return run, params | {"actor": doing(params["actor"], -3.0)}


def doing(actor, mean: float):
    """The actor's parameters (seeds, ...) with a mean of `mean` before tanh in every state, and the smallest spread."""
    named = {"".join(str(k) for k in path): x for path, x in jax.tree_util.tree_leaves_with_path(actor)}
    last = max(name for name in named if "kernel" in name)[: -len("['kernel']")]
    heads = named[last + "['bias']"].shape[-1] // 2

    def changed(path, x):
        name = "".join(str(k) for k in path)
        if not name.startswith(last):
            return x
        return jnp.zeros_like(x) if "kernel" in name else jnp.concatenate([jnp.full_like(x[..., :heads], mean), x[..., heads:] - 50], -1)

    return jax.tree_util.tree_map_with_path(changed, actor)


# ---------------------------------------------------------------- before the first step


def test_the_dataset_reaches_the_learner_as_it_is(tmp_path):
    """Time-outs do not stop the bootstrap, terminals do; what is cloned are the best safe trajectories."""
    run = training.prepare("cpq", cpq.Args(env=ENV, runs=tmp_path), cloned=cpq.gated)
    loaded, _ = dsrl.load(dsrl.default_path(ENV))
    assert loaded.timeouts.any() and run.data is not None and run.cloned is not None
    pairs = {"terminated": "terminals", "reward": "rewards", "cost": "costs", "action": "actions"}
    for ours, theirs in pairs.items():
        np.testing.assert_array_equal(getattr(run.data, ours), np.float32(getattr(loaded, theirs)))
    seen = envs.make(ENV).obs_size
    np.testing.assert_array_equal(run.data.obs[:, :seen], loaded.observations[:, :seen])
    np.testing.assert_array_equal(run.data.next_obs[:, :seen], loaded.next_observations[:, :seen])
    best = dsrl.in_safe_trajectories(loaded, 20.0, 0.75)
    assert 0 < best.sum() < len(best)
    np.testing.assert_array_equal(run.cloned.reward, loaded.rewards[best])


def test_data_that_do_not_fit_the_environment_are_told(tmp_path, capsys):
    loaded, about = dsrl.load(dsrl.default_path(ENV))
    odd = loaded._replace(observations=loaded.observations[:, ::-1], next_observations=loaded.next_observations[:, ::-1])
    dsrl.save(tmp_path / "odd.hdf5", odd, {"env": ENV})
    args = cpq.Args(env=ENV, dataset=tmp_path / "odd.hdf5")
    training.load_dataset(args, envs.make(ENV, memory=True))
    assert f"does not fit {ENV}" in capsys.readouterr().err


def test_step_sizes_reach_the_optimisers():
    """The actor's falls to zero over the steps that it takes, the critics' stay, and the cost critic has its own."""
    args = naive_o2o.Args(iterations=12, actor_warmup=2, updates_per_iter=3, actor_lr=0.1, critic_lr=0.02, cost_critic_lr=0.05)
    made = finetuning.make_optimizers(args)
    one = {"actor": jnp.zeros(1), "critics": {"reward": jnp.zeros(1), "cost": jnp.zeros(1)}}
    learner, steps = training.init_learner(one, made), []
    for _ in range(30):
        before = learner.params
        for name in ("actor", "critics"):
            learner = training.apply_gradient(learner, made, name, jax.tree.map(jnp.ones_like, one[name]))
        steps.append([float(before[k][j][0] - learner.params[k][j][0]) if j else float(before[k][0] - learner.params[k][0])
                      for k, j in (("actor", ""), ("critics", "reward"), ("critics", "cost"))])  # fmt: skip
    steps = np.array(steps)
    np.testing.assert_allclose(steps[:, 0], 0.05 * (1 + np.cos(np.pi * np.arange(30) / 30)), rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(steps[:, 1:], np.tile([0.02, 0.05], (30, 1)), rtol=1e-3)


# ---------------------------------------------------------------- one iteration


@pytest.mark.parametrize("freeze, critics", [(finetuning.freeze_actor, [3, 3, 3]), (finetuning.freeze_all, [0, 0, 3])])
def test_an_iteration_of_the_online_phase(freeze, critics):
    """A step that adds one to everything: the actor waits, the anchor weakens, half of each batch is the dataset's."""
    args = naive_o2o.Args(
        iterations=10, actor_warmup=2, updates_per_iter=3, batch_size=8, replay="mixed", anchor_weight=0.2, anchor_decay=0.5, anchor_floor=0.1,
        lagrangian="dual", ki=0.01, reserve=0.0, cost_clip=100.0, init_multiplier=0.3, cost_limit=20.0,
    )  # fmt: skip
    batch = lambda reward, *shape: Batch(*(jnp.full((*shape, *more), reward) for more in ((1,), (1,), (), (), (1,), ())))
    ended = Episodes(jnp.float32(2), jnp.float32(10), jnp.float32(60), jnp.float32(8))  # costs of 30 on average
    assert float(ended.means()["cost"]) == 30

    def step(learner, multiplier, anchor, batch, key):
        info = {"anchor": anchor, "data": batch.reward.mean(), "lambda": multiplier}
        return learner._replace(params={k: x + 1 for k, x in learner.params.items()}), info

    for n, anchor, critic in zip((1, 2, 3), (0.16, 0.12, 0.08), critics, strict=True):
        learner = Learner({"actor": jnp.zeros(()), "critics": jnp.zeros(())}, {}, {"actor": jnp.zeros(())})
        buffer = replay.empty_replay(8, 1, 1)
        after, multiplier, buffer, info = finetuning.train_online(
            learner, init_multiplier(args), buffer, batch(1.0, 20), batch(0.0, 2, 4), ended, jax.random.key(n), n, step, freeze, args
        )
        assert (after.params["actor"], after.params["critics"]) == (3.0 * (n > 2), critic)
        assert (info["anchor"], info["data"]) == (pytest.approx(anchor), 0.5) and buffer.inserted == 8
        assert [multiplier.value, info["lambda"]] == pytest.approx([0.4, 0.4])


def test_vpa_s_critics_keep_the_gate():
    """One step of phase 2 by hand: the gate is a quantile of Qc' over the cloned data, alpha_c h counts in what it compares, and what is
    behind it is worth nothing, its entropy neither."""
    fixed, batch, actor, critics, targets = setting(
        marvel, vpa_alpha_reward=0.3, vpa_alpha_cost=0.2, gate_quantile=0.5, termination_cost=0.0, tau=0.0
    )
    optimizers, key, safe = {"critics": optax.sgd(0.1)}, jax.random.key(5), cloned()
    learner = training.init_learner({"actor": actor, "critics": critics}, optimizers)._replace(targets=targets)
    after, _ = marvel.vpa_step(learner, (batch, safe), key, fixed.networks, optimizers, fixed.args, (0.1, 0.15))
    action, log_prob = next_action(actor, batch.next_obs, key)
    b, t = numbers(batch), numbers(targets)
    phi = features(b.next_obs, action)
    next_qc, h = phi @ t["cost"][0], -log_prob
    gate = max(0.1, np.quantile(features(*numbers((safe.obs, safe.action))) @ t["cost"][0], 0.5))
    open_, alive = next_qc + 0.2 * h <= gate, GAMMA * (1 - b.terminated)
    assert 0 < open_.sum() < len(open_) and (open_ != (next_qc <= gate)).any()
    y_r = SCALE * b.reward + alive * open_ * ((phi @ t["reward"].T).min(-1) + 0.3 * h)
    y_c = b.cost + alive * (next_qc + 0.2 * h)
    here = features(b.obs, b.action)
    for name, y in (("reward", y_r), ("cost", y_c)):
        w = np.float64(critics[name])
        gradient = 2 * (here @ w.T - y[:, None]).T @ here / len(y) / (len(w) if name == "reward" else 1)
        np.testing.assert_allclose(after.params["critics"][name], w - 0.1 * gradient, atol=1e-5)


# ---------------------------------------------------------------- evaluation


def test_the_last_evaluation_has_other_episodes_in_every_round(monkeypatch):
    def evaluate(policy, key, env, n):
        return dict.fromkeys(("return", "cost", "length"), jax.random.normal(key, (n,)))

    monkeypatch.setattr(training, "evaluate", evaluate)
    run, _ = a_run(naive_o2o, probes.Constant(1, 0.5, 10), seeds=2, final_eval_rounds=3)
    show = training.make_evaluator(run, lambda *_: None)
    show("online", (jnp.zeros(2),), 40, False)
    show("online", (jnp.zeros(2),), 60, True)
    for row, rounds in zip(run.log.rows, ([40], [60, 61, 62]), strict=True):
        drawn = [[np.asarray(jax.random.normal(run.keys("eval", n)[seed], (4,))) for n in rounds] for seed in range(2)]
        values = np.reshape(drawn, (2, -1))
        np.testing.assert_array_equal(row["episodes"], [4 * len(rounds)] * 2)
        np.testing.assert_allclose(row["cost"], values.mean(1), rtol=1e-5)
        np.testing.assert_allclose(row["cost_se"], values.std(1, ddof=1) / np.sqrt(values.shape[1]), rtol=1e-5)


def test_when_evaluations_come():
    assert training.evaluation_blocks(10, 5) == {2, 4, 6, 8, 10}
    assert training.evaluation_blocks(3, 5) == {1, 2, 3}
    assert max(training.evaluation_blocks(7, 2)) == 7


def test_the_rank_diagnostic_knows_its_own_points_from_random_ones(monkeypatch):
    seen = {}

    def correlations(critics, own, random, networks):
        seen.update(own=own.action, random=random.action)
        jax.debug.callback(lambda own, random: seen.update(own=own, random=random), own.action, random.action)
        return {}

    monkeypatch.setattr(diagnostics, "rank_correlations", correlations)
    run, params = a_run(marvel, probes.Constant(1, 0.5, 10), rank_points=32)
    diagnostics.rank_diagnostic(run, training.make_networks(run.args, run.env))("offline", params["actor"], params["critics"], 0)
    jax.effects_barrier()
    assert np.abs(seen["own"] - np.tanh(-3.0)).max() < 0.05
    assert 0.4 < np.std(seen["random"]) < 0.75 and np.abs(np.mean(seen["random"])) < 0.3


# ---------------------------------------------------------------- phase 3 of every file


@pytest.fixture
def iterations(monkeypatch):
    """algo, changes -> per iteration: the mean action of the first and the second half of the collected episodes, the buffer's capacity,
    whether everything waits; and the parameters that phase 3 starts from. Nothing is learned."""

    def get(algo, **changes):
        def train(learner, multiplier, buffer, data, new, ended, key, n, step, freeze, args):
            half = new.action.shape[0] // 2
            info = {"first": new.action[:half].mean(), "second": new.action[half:].mean()}
            info |= {"capacity": jnp.float32(buffer.data.reward.shape[0]), "all": jnp.float32(freeze is finetuning.freeze_all)}
            return learner, multiplier, buffer, info

        monkeypatch.setattr(finetuning, "train_online", train)
        run, params = a_run(algo, probes.Constant(1, 0.5, 10), **changes)
        end = algo.online_phase(run, params)
        return [row for row in run.log.rows if row["event"] == "train"], end, params

    return get


OFFLINE = np.tanh(-3.0)


@pytest.mark.parametrize("algo", [marvel, naive_o2o, so2, wsrl, cal], ids=lambda m: m.__name__)
def test_finetuning_starts_from_the_offline_policy(algo, iterations):
    rows, end, params = iterations(algo)
    for row in rows:
        np.testing.assert_allclose([row["first"], row["second"]], OFFLINE, atol=0.02)
        assert row["all"] == (algo is wsrl)
    for name, origin in (("actor", "actor"), ("prior", "actor"), ("critics", "critics")):
        jax.tree.map(np.testing.assert_array_equal, end[name], params[origin])


def test_the_guide_begins_and_the_learner_ends(iterations):
    """The guide is the offline policy; the learner is new, unless --learner pretrained. Episodes as good as the guide's hand over a share."""
    rows, end, params = iterations(jsrl, iterations=3, stages=2, handover=1.0)
    np.testing.assert_allclose([rows[0]["first"], rows[0]["second"]], OFFLINE, atol=0.02)  # share 1
    np.testing.assert_allclose(rows[1]["first"], OFFLINE, atol=0.02)  # share 1/2
    assert rows[1]["second"] > OFFLINE + 0.2
    assert rows[2]["first"] > OFFLINE + 0.2  # share 0
    jax.tree.map(np.testing.assert_array_equal, end["prior"], params["actor"])
    _, end, _ = iterations(jsrl, iterations=3, learner="pretrained")
    for name in ("actor", "critics"):
        jax.tree.map(np.testing.assert_array_equal, end[name], params[name])


def test_two_policies_collect_for_pex(iterations):
    rows, end, params = iterations(pex, temperature=1e6)  # either is as likely
    assert all(OFFLINE + 0.1 < row["first"] < 0.6 for row in rows)
    jax.tree.map(np.testing.assert_array_equal, end["prior"], params["actor"])
    jax.tree.map(np.testing.assert_array_equal, end["critics"], params["critics"])
    assert not all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(end["actor"]), jax.tree.leaves(params["actor"])))


@pytest.mark.parametrize("algo", [naive_o2o, marvel, jsrl, pex, so2, wsrl, cal], ids=lambda m: m.__name__)
def test_phase_3_begins_with_arrays_of_full_type(algo, monkeypatch):
    """After a block all are: if one is weakly typed before, the second block needs a program of its own, which takes a minute to compile."""
    begun = []
    monkeypatch.setattr(Log, "run", lambda self, phase, blocks, carry, *_, **__: begun.append(carry) or carry)
    run, params = a_run(algo, probes.Constant(1, 0.5, 10))
    algo.online_phase(run, params)
    weak = [jax.tree_util.keystr(path) for path, x in jax.tree_util.tree_leaves_with_path(begun) if x.aval.weak_type]
    assert not weak


@pytest.mark.parametrize("size, iterations_, capacity", [(1_000_000, 3, 60), (50, 3, 40), (1, 3, 20)])
def test_the_buffer_holds_whole_iterations(size, iterations_, capacity, iterations):
    rows, *_ = iterations(naive_o2o, buffer_size=size, iterations=iterations_)  # an iteration has 20 transitions
    assert rows[0]["capacity"] == capacity


def test_cal_s_multiplier_and_threshold(monkeypatch):
    """lambda starts per raw reward; the threshold is that of the limit less the reserve."""
    found = {}

    def finetune(run, start, step, *_, **__):
        found.update(start=np.exp(start["log_multiplier"]), threshold=step.keywords["threshold"])
        return start

    monkeypatch.setattr(finetuning, "finetune", finetune)
    run, params = a_run(cal, probes.Constant(1, 0.5, 10), reserve=0.25, init_multiplier=0.7)
    cal.online_phase(run, params)
    np.testing.assert_allclose(found["start"], 0.07, rtol=1e-6)
    assert found["threshold"] == pytest.approx(15 * (1 - 0.9**10) / 0.1 / 10)


@pytest.mark.parametrize("critics", ["pretrained", "fresh"])
def test_phase_2_starts_from_the_critics_that_it_is_told_to(critics, monkeypatch):
    monkeypatch.setattr(training, "train_on_dataset", lambda learner, data, key, **_: (learner, {}))
    flat = Batch(*(jnp.zeros((30, *more)) for more in ((1,), (1,), (), (), (1,), ())))
    run, params = a_run(marvel, probes.Constant(1, 0.5, 10), flat, flat, vpa_steps=training.CHUNK, critics=critics, rank_points=0)
    after = marvel.vpa_phase(run, params)
    same = [np.array_equal(a, b) for a, b in zip(jax.tree.leaves(after["critics"]), jax.tree.leaves(params["critics"]))]
    assert all(same) if critics == "pretrained" else not all(same)
    jax.tree.map(np.testing.assert_array_equal, after["actor"], params["actor"])
