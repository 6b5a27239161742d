"""algos/policy.py and export.py against the networks in JAX; --init; --eval and its --export. Checkpoints are made here, untrained."""

import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import algos
from algos import checkpoint, export, finetuning, logbook, marvel, naive_o2o, pex, training
from data import collect
from tests import probes

ROOT = Path(__file__).resolve().parents[1]
ENV = SimpleNamespace(name="SafetyPointRun", obs_size=5, action_size=2, privileged_size=0, memory_size=0, horizon=10)
SMALL = dict(env=ENV.name, hidden=(16, 8), vae_hidden=(8,), reward_scale=0.1)


def made(path: Path, module=naive_o2o, seed=0, privileged=0, parts=("actor", "critics", "prior", "multiplier"), **changes) -> Path:
    """A checkpoint as `module` leaves it, of random networks."""
    args, rng = replace(module.Args(**SMALL), **changes), np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: training.init_params(jax.random.key(0), training.make_networks(args, ENV), ENV.obs_size + privileged))
    shapes |= {"prior": shapes["actor"], "multiplier": jnp.float32(0)}
    scaled = lambda x: rng.standard_normal(x.shape) / np.sqrt(x.shape[-2] if len(x.shape) > 1 else 1)
    tree = jax.tree.map(lambda x: scaled(x).astype(np.float32), {name: shapes[name] for name in parts})
    config = {k: v for k, v in asdict(args).items() if k not in logbook.NOT_CONFIGURATION}
    about = {"env": ENV.name, "algo": module.__name__.split(".")[-1], "seed": seed, "config": config}
    logbook.save(path, tree, about)
    return path


def jax_action(path: Path, obs: np.ndarray, privileged: np.ndarray) -> np.ndarray:
    """(n, action_size) the mean action as evaluations show it in JAX."""
    arrays, meta = checkpoint.load_policy(path)
    known = pex.Args.__dataclass_fields__.keys() & meta["config"].keys()
    args = pex.Args(**{k: tuple(v) if isinstance(v := meta["config"][k], list) else v for k in known})
    env = SimpleNamespace(obs_size=obs.shape[-1], action_size=arrays[f"actor/params/Dense_{len(args.hidden)}/bias"].size // 2)
    networks, args = training.make_networks(args, env), replace(args, eval_policy="mean")
    shapes = jax.eval_shape(lambda: training.init_params(jax.random.key(0), networks, env.obs_size + privileged.shape[-1]))
    shapes |= {"prior": shapes["actor"]}
    parts = ("actor", "critics", "prior") if meta["algo"] == "pex" else ("actor",)
    tree = {name: logbook.restore(shapes[name], arrays, str(path), f"{name}/") for name in parts}
    if meta["algo"] == "pex":
        policy = pex.evaluated_policy(tree, arrays["multiplier"], networks, args)
    else:
        policy = training.evaluated_policy(networks.actor, tree["actor"], "mean")
    return np.asarray(jax.jit(policy)(jnp.concatenate([obs, privileged], -1), jax.random.key(0)))


def some(n: int, size: int, seed: int = 0) -> np.ndarray:
    return (3 * np.random.default_rng(seed).standard_normal((n, size))).astype(np.float32)


def one_line(error) -> str:
    text = str(error.value)
    assert text and "\n" not in text
    return text


# ---------------------------------------------------------------- the policy in NumPy


@pytest.mark.parametrize("changes", [{}, {"symlog": False}, {"hidden": (7,)}, {"hidden": (9, 8, 7)}], ids=str)
def test_it_acts_as_the_network_does(changes, tmp_path):
    path, obs = made(tmp_path / "c.safetensors", **changes), some(200, 5)
    policy = algos.load_policy(path)
    np.testing.assert_allclose(policy(obs), jax_action(path, obs, obs[:, :0]), atol=1e-6)
    np.testing.assert_allclose(policy(obs[3]), policy(obs)[3], atol=1e-6)
    assert policy(obs).shape == (200, 2) and policy(obs[3]).shape == (2,) and policy(obs[:0]).shape == (0, 2)
    assert policy(obs.astype(float).tolist()).dtype == np.float32
    assert (policy.obs_size, policy.action_size, policy.env, policy.algo, policy.seed) == (5, 2, "SafetyPointRun", "naive_o2o", 0)
    assert (policy.cost_limit, policy.eval_policy, policy.privileged_size) == (20.0, "sample", 0)
    assert policy.action_low.tolist() == [-1, -1] and policy.action_high.tolist() == [1, 1]


EXPANDED = [
    {},
    {"cost_critics": 4, "num_critics": 3},
    {"symlog": False, "layer_norm": False},
    {"privileged": 1},
    {"privileged": 2, "cost_critics": 2},
]


@pytest.mark.parametrize("changes", EXPANDED, ids=str)
def test_the_expanded_policy_chooses_as_pex_does(changes, tmp_path):
    path, size = made(tmp_path / "c.safetensors", pex, **changes), changes.get("privileged", 0)
    obs, seen = some(500, 5), some(500, size, 1)
    policy = algos.load_policy(path)
    assert isinstance(policy, algos.ExpandedPolicy) and policy.privileged_size == size
    action = policy(obs, seen)
    np.testing.assert_allclose(action, jax_action(path, obs, seen), atol=1e-6)
    shares = [(part(obs) == action).all(1).mean() for part in (policy.offline, policy.learned)]
    assert min(shares) > 0.02 and sum(shares) == 1.0
    assert policy(obs[0], seen[0]).shape == policy.sample(obs[0], seen[0]).shape == (2,)


def test_samples_have_the_networks_distribution(tmp_path):
    path, obs = made(tmp_path / "c.safetensors"), some(1, 5)
    arrays, meta = checkpoint.load_policy(path)
    networks = training.make_networks(naive_o2o.Args(**SMALL), ENV)
    shape = jax.eval_shape(networks.actor.init, jax.random.key(0), obs)
    mean, log_std = jax.jit(networks.actor.apply)(logbook.restore(shape, arrays, "", "actor/"), obs[0])
    draws = np.arctanh(algos.load_policy(path, rng=1).sample(np.repeat(obs, 20_000, 0)).astype(float))
    assert (np.abs(draws.mean(0) - mean) < 5 * np.exp(log_std) / np.sqrt(20_000)).all()
    np.testing.assert_allclose(draws.std(0), np.exp(log_std), rtol=0.03)


def test_the_expanded_policy_draws_by_its_scores(tmp_path):
    """Two policies that hardly scatter, so that the choice is seen: its frequency is the softmax of the scores."""
    path = made(tmp_path / "c.safetensors", pex)
    arrays, meta = checkpoint.load(path)
    for part in ("actor", "prior"):
        arrays[f"{part}/params/Dense_2/bias"][2:] = -50.0  # log sigma -5
    meta["config"]["temperature"] = 2.0
    checkpoint.save(path, arrays, meta)
    policy, obs = algos.load_policy(path, rng=2), np.repeat(some(1, 5, 4), 20_000, 0)
    means = np.stack([policy.offline(obs), policy.learned(obs)])
    score = policy.scores(obs[:1], obs[:1, :0], means[:, :1])[:, 0] / 2.0
    expected = np.exp(score[0]) / np.exp(score).sum()
    assert 0.1 < expected < 0.9 and abs(means[0] - means[1]).max() > 0.3
    offline = np.square(policy.sample(obs) - means).sum(-1).argmin(0) == 0
    assert offline.mean() == pytest.approx(expected, abs=0.02)


@pytest.mark.parametrize("module", [naive_o2o, pex])
def test_draws_follow_from_the_seed(module, tmp_path):
    path, obs = made(tmp_path / "c.safetensors", module), some(10, 5)
    first, again, other = (algos.load_policy(path, rng=n).sample(obs) for n in (3, 3, 4))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    np.testing.assert_array_equal(algos.load_policy(path, rng=np.random.default_rng(3)).sample(obs), first)


def test_neither_jax_nor_mujoco_is_imported(tmp_path):
    path = made(tmp_path / "c.safetensors", pex)
    program = f"""
import sys, numpy, algos
policy = algos.load_policy({str(path)!r})
assert policy(numpy.zeros((3, 5))).shape == policy.sample(numpy.zeros((3, 5))).shape == (3, 2)
heavy = {{"jax", "jaxlib", "flax", "mujoco", "tyro", "matplotlib", "h5py"}} & sys.modules.keys()
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_files_that_hold_no_policy(tmp_path):
    whole = made(tmp_path / "c.safetensors").read_bytes()
    for name, content in {"cut": whole[:-100], "text": b"hello", "empty": b"", "flipped": whole[:-1] + bytes([whole[-1] ^ 1])}.items():
        (tmp_path / name).write_bytes(content)
    made(tmp_path / "critics", parts=("critics",))
    arrays, meta = checkpoint.load(tmp_path / "c.safetensors")
    checkpoint.save(tmp_path / "sizes", arrays, meta | {"config": meta["config"] | {"hidden": [64]}})
    checkpoint.save(tmp_path / "nan", arrays | {"actor/params/Dense_0/bias": np.full(16, np.nan, np.float32)}, meta)
    checkpoint.save(tmp_path / "unchained", arrays | {"actor/params/Dense_1/kernel": np.zeros((15, 8), np.float32)}, meta)
    checkpoint.save(tmp_path / "gap", {k: v for k, v in arrays.items() if not k.startswith("actor/params/Dense_1")}, meta)
    checkpoint.save(
        tmp_path / "critical", arrays | {"critics/cost/params/VmapCritic_0/Dense_0/kernel": np.zeros((1, 3, 16))}, meta | {"algo": "pex"}
    )
    files = ("cut", "text", "empty", "flipped", "critics", "sizes", "nan", "unchained", "gap", "critical", "missing", ".")
    for path in (*(tmp_path / name for name in files), ROOT / "data" / "policies" / "SafetyPointRun.safetensors"):
        with pytest.raises(logbook.BadInput) as error:
            algos.load_policy(path)
        assert str(path) in one_line(error)


BAD = {
    "size": np.zeros(4), "rows": np.zeros((3, 6)), "three axes": np.zeros((1, 1, 5)), "number": 1.0, "ragged": [[1.0], [1.0, 2.0]],
    "text": ["a"] * 5, "nan": np.full(5, np.nan), "inf": np.full(5, np.inf), "none": None,
}  # fmt: skip


@pytest.mark.parametrize("obs", BAD.values(), ids=BAD)
def test_observations_that_cannot_be_used(obs, tmp_path):
    policy = algos.load_policy(made(tmp_path / "c.safetensors"))
    for act in (policy, policy.sample):
        with pytest.raises(logbook.BadInput) as error:
            act(obs)
        assert "observation" in one_line(error)


def test_what_critics_see_must_be_given(tmp_path):
    policy, obs = algos.load_policy(made(tmp_path / "c.safetensors", pex, privileged=1)), some(3, 5)
    for privileged in (None, some(3, 2), some(2, 1), some(1, 1)[0], np.full((3, 1), np.nan)):
        with pytest.raises(logbook.BadInput) as error:
            policy(obs, privileged)
        assert "privileged" in one_line(error)
    assert policy.learned(obs).shape == policy.offline(obs).shape == (3, 2)
    with pytest.raises(logbook.BadInput):
        policy.learned(obs, some(3, 1))


# ---------------------------------------------------------------- ONNX


@pytest.mark.parametrize(
    "module, changes", [(naive_o2o, {}), (naive_o2o, {"symlog": False}), *((pex, changes) for changes in EXPANDED)], ids=str
)
def test_the_model_acts_as_the_policy_does(module, changes, tmp_path):
    onnx = pytest.importorskip("onnx")
    policy = algos.load_policy(made(tmp_path / "c.safetensors", module, **changes))
    path = export.onnx_file(policy, tmp_path / "new" / "policy.onnx")
    assert [p.name for p in path.parent.iterdir()] == ["policy.onnx"]
    model = onnx.load(path)
    assert {p.key: p.value for p in model.metadata_props} == {
        "env": "SafetyPointRun",
        "algo": policy.algo,
        "seed": "0",
        "cost_limit": "20.0",
        "env_low": "[-1.0, -1.0]",
        "env_high": "[1.0, 1.0]",
    }
    session = onnx.reference.ReferenceEvaluator(model)
    for n in (1, 50):  # the number of rows is free
        given = {"obs": some(n, 5, 7)} | ({"privileged": some(n, policy.privileged_size, 8)} if policy.privileged_size else {})
        np.testing.assert_allclose(session.run(None, given)[0], policy(*given.values()), atol=1e-5)


def test_a_model_that_differs_is_not_written(tmp_path, monkeypatch):
    pytest.importorskip("onnx")
    policy = algos.load_policy(made(tmp_path / "c.safetensors"))
    monkeypatch.setattr(export.Graph, "symlog", lambda graph, x: x)
    with pytest.raises(logbook.BadInput) as error:
        export.onnx_file(policy, tmp_path / "p.onnx")
    assert "differ" in one_line(error) and [p.name for p in tmp_path.iterdir()] == ["c.safetensors"]
    (tmp_path / "folder.onnx").mkdir()
    monkeypatch.undo()
    with pytest.raises(logbook.BadInput) as error:
        export.onnx_file(policy, tmp_path / "folder.onnx")
    assert "folder.onnx" in one_line(error)


# ---------------------------------------------------------------- --eval


def test_episodes_are_replayed_some_at_a_time():
    """As many as asked for; the first ones do not depend on how many there are."""
    env, key = probes.Staggered(7), jax.random.key(0)
    policy = lambda obs, key: jnp.zeros((obs.shape[0], 1))
    found = training.replayed(env, policy, key, 45)
    assert {k: x.shape for k, x in found.items()} == {"return": (45,), "cost": (45,), "length": (45,)}
    np.testing.assert_array_equal(found["return"][:20], training.replayed(env, policy, key, 20)["return"])
    assert (found["return"][:20] != found["return"][20:40]).any()  # other episodes, not the same again


# ---------------------------------------------------------------- --init


def started(seeds=(0,), env=ENV, module=naive_o2o, **changes):
    return finetuning.start(replace(module.Args(**SMALL), **changes), env, list(seeds))


def same(tree, path: Path, prefix: str, row: int = 0):
    arrays = checkpoint.load(path, foreign=True)[0]
    for name, x in logbook.flatten(tree).items():
        np.testing.assert_array_equal(x[row], arrays[f"{prefix}/{name}"])


def test_actor_and_critics_are_taken(tmp_path):
    path = made(tmp_path / "c.safetensors")
    start = started(init=path, seeds=(4, 5))
    assert (
        start.params.keys() == {"actor", "critics"}
        and "the actor and the critics" in start.said
        and "naive_o2o on SafetyPointRun" in start.said
        and "taken to see" not in start.said
    )
    for row in (0, 1):
        same(start.params["actor"], path, "actor", row), same(start.params["critics"], path, "critics", row)
    assert [file["path"] for file in start.files] == [str(path)]


def test_of_pex_the_learned_policy_is_taken(tmp_path):
    path = made(tmp_path / "c.safetensors", pex)
    start = started(init=path)
    same(start.params["actor"], path, "actor")
    assert "its learned policy alone" in start.said


def test_a_file_for_each_seed(tmp_path):
    paths = [made(tmp_path / f"c{seed}.safetensors", seed=seed) for seed in (4, 5)]
    start = started(init=tmp_path / "c{seed}.safetensors", seeds=(4, 5))
    for row, path in enumerate(paths):
        same(start.params["actor"], path, "actor", row)
    assert [file["path"] for file in start.files] == list(map(str, paths)) and start.files[0]["sha256"] != start.files[1]["sha256"]
    with pytest.raises(logbook.BadInput, match="c6.safetensors"):
        started(init=tmp_path / "c{seed}.safetensors", seeds=(4, 5, 6))


def test_a_plain_file_of_somebody_else(tmp_path):
    arrays, _ = checkpoint.load(made(tmp_path / "c.safetensors"))
    plain = {name: x.astype(np.float64) for name, x in arrays.items() if name.startswith("actor/")}
    safetensors.numpy.save_file(plain, tmp_path / "plain.safetensors")
    start = started(init=tmp_path / "plain.safetensors")
    assert start.params.keys() == {"actor"} and "new critics: it holds none" in start.said
    assert "taken to see sign(x) log(1 + |x|) of each observation x (else --no-symlog)" in start.said
    same(start.params["actor"], tmp_path / "c.safetensors", "actor")
    env = SimpleNamespace(**vars(ENV) | {"obs_size": 6, "memory_size": 1})
    with pytest.raises(logbook.BadInput, match="does not see the odometer: add --no-odometer"):
        started(init=tmp_path / "plain.safetensors", env=env)


NEW_CRITICS = {
    "--num-critics": dict(num_critics=3), "--privileged-critic": dict(privileged=1), "--gamma 0.9": dict(gamma=0.9),
    "--reward-scale 1": dict(reward_scale=1.0), "--no-layer-norm": dict(layer_norm=False), "holds none": dict(parts=("actor",)),
}  # fmt: skip


@pytest.mark.parametrize("text", NEW_CRITICS)
def test_critics_that_do_not_fit_are_new(text, tmp_path):
    start = started(init=made(tmp_path / "c.safetensors", **NEW_CRITICS[text]))
    assert start.params.keys() == {"actor"} and text in start.said and "\n" not in start.said


ODD = {"--hidden 32 32": dict(hidden=(32, 32)), "--no-symlog": dict(symlog=False), "actor/params/Dense_0/kernel": dict(parts=("critics",))}


@pytest.mark.parametrize("text", ODD)
def test_actors_that_do_not_fit_are_refused(text, tmp_path):
    path = made(tmp_path / "c.safetensors", **ODD[text])
    with pytest.raises(logbook.BadInput) as error:
        started(init=path)
    assert text in one_line(error) and str(path) in str(error.value)


def test_an_actor_of_another_task_is_refused(tmp_path):
    other = SimpleNamespace(**vars(ENV) | {"obs_size": 6, "name": "SafetyCarRun"})
    with pytest.raises(logbook.BadInput) as error:
        started(init=made(tmp_path / "c.safetensors"), env=other)
    assert "takes 5 numbers" in one_line(error) and "SafetyCarRun has 6 and 2" in str(error.value)


def test_the_configuration_counts_the_files_content(tmp_path):
    def hashed(name: str, sha256: str | None):
        config = {"runs": tmp_path, "cost_limit": 20.0, "resume": False, "checkpoint_seconds": 0.0, "track": "none", "init": name}
        init = [{"path": name, "sha256": sha256}] if sha256 else None
        log = logbook.Logbook("algo", "env", config, [0], init=init)
        written = json.loads((log.folder / "config.json").read_text())
        assert written["init"] == init and written["config"].get("init") == ([sha256] if sha256 else None)
        return written["config_hash"]

    assert hashed("a", "1") == hashed("b", "1") != hashed("a", "2")
    assert hashed("a", "1") != hashed("a", None)


# ---------------------------------------------------------------- the command line


def refused(module, words, place, capsys) -> str:
    with pytest.raises(SystemExit) as stop:
        logbook.command(module.main, module.Args, module.PRESETS, words=[*words.split(), "--runs", str(place / "runs")])
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.startswith("error: ") and len(err.strip().splitlines()) == 1, err
    assert not (place / "runs").exists()
    return err


def test_refused_command_lines(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    made(tmp_path / "pex.safetensors", pex), made(tmp_path / "naive.safetensors")
    run = "--env SafetyPointRun"
    assert "leave one of them out" in refused(marvel, f"{run} --init naive.safetensors --offline bc_safe", tmp_path, capsys)
    assert "leave one of them out" in refused(naive_o2o, f"{run} --init naive.safetensors --offline cpq", tmp_path, capsys)
    assert "SafetyPointRun has 13 and 2" in refused(marvel, f"{run} --init naive.safetensors", tmp_path, capsys)
    assert "no such checkpoint" in refused(marvel, f"{run} --init nowhere.safetensors", tmp_path, capsys)
    hopper = "--env SafetyHopperVelocity --init naive.safetensors"
    with monkeypatch.context() as patch:  # no dataset, and nothing to make one from
        patch.setattr(collect, "policies_path", lambda name: tmp_path / name)
        patch.setattr(collect.dsrl, "default_path", lambda name: tmp_path / f"{name}.hdf5")
        assert "--vpa-steps 0" in refused(marvel, hopper, tmp_path, capsys)
        assert "--replay online" in refused(naive_o2o, f"{hopper} --replay mixed", tmp_path, capsys)
        assert "SafetyHopperVelocity has 11 and 3" in refused(naive_o2o, hopper, tmp_path, capsys)  # got past the dataset
    for flag in ("--video v.gif", "--trajectory t.png", "--export p.onnx"):
        assert "--eval" in refused(naive_o2o, f"{run} {flag}", tmp_path, capsys)
    assert "algos/pex.py" in refused(naive_o2o, "--eval pex.safetensors", tmp_path, capsys)
    assert "run of pex.py" in refused(pex, "--eval naive.safetensors", tmp_path, capsys)
    assert "leave --env out" in refused(naive_o2o, "--eval naive.safetensors --env SafetyCarRun", tmp_path, capsys)
    assert "--episodes 0" in refused(naive_o2o, "--eval naive.safetensors --episodes 0", tmp_path, capsys)
    assert "--horizon -5" in refused(naive_o2o, "--eval naive.safetensors --horizon -5", tmp_path, capsys)


@pytest.mark.parametrize("words, text", [("--export p.txt", ".onnx"), ("--export p.onnx", "pip install onnx")])
def test_exports_that_cannot_be_are_refused_before_episodes_are_played(words, text, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "onnx", None)
    monkeypatch.setattr(training, "replayed", lambda *_: pytest.fail("played"))
    monkeypatch.setattr(training.envs, "make", lambda *_, **__: ENV)
    made(tmp_path / "naive.safetensors")
    assert text in refused(naive_o2o, f"--eval naive.safetensors {words}", tmp_path, capsys)
    assert not list(tmp_path.glob("p.*"))
