"""algos/*.py from their command lines: a tiny run of each, what it leaves behind, and how bad input is refused."""

import csv
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from algos import load_policy, logbook
from data import dsrl
from tests.test_policy import jax_action

ROOT = Path(__file__).resolve().parents[1]
ENV = "SafetyPointRun"
OFFLINE = "--offline-steps 500 --offline-evals 1 --eval-episodes 2 --final-eval-rounds 1 --hidden 32 --dataset point.hdf5"
ONLINE = OFFLINE + " --vae-hidden 32 --iterations 2 --evals 1 --updates-per-iter 20 --actor-warmup 1"
TINY = {
    "cpq": OFFLINE + " --vae-hidden 32",  # first: the others start from its checkpoint
    "marvel": ONLINE + " --vpa-steps 500 --rank-points 8",
    "naive_o2o": ONLINE,
    "jsrl": ONLINE,
    "pex": ONLINE,
    "so2": ONLINE,
    "wsrl": ONLINE + " --num-critics 3",
    "cal": ONLINE,
    "bc_safe": OFFLINE,
    "bear_lag": OFFLINE + " --vae-hidden 32",
    "sac_lag": "--env-steps 3000 --num-envs 5 --steps-per-block 60 --updates-per-block 8 --evals 1 --eval-episodes 2 --final-eval-rounds 1 --hidden 32",
}
ENDS = {  # algo -> (phases, gradient steps, environment steps)
    "cpq": (["offline"], 500, 0),
    "bc_safe": (["offline"], 500, 0),
    "bear_lag": (["offline"], 500, 0),
    "marvel": (["offline", "vpa", "online"], 500 + 500 + 2 * 20, 2 * 5 * 500),
    "sac_lag": (["online"], 80, 3000),
} | {name: (["offline", "online"], 500 + 2 * 20, 2 * 5 * 500) for name in ("naive_o2o", "jsrl", "pex", "so2", "wsrl", "cal")}


def script(algo, words, runs, cwd, devices=1):
    """Runs a script in a foreign working directory, standard error not a terminal, on simulated CPU devices.

    XLA does not optimise: such short runs are mostly compilation."""
    command = [sys.executable, str(ROOT / "algos" / f"{algo}.py"), "--env", ENV, "--runs", str(runs), *words.split()]
    flags = f"--xla_backend_optimization_level=0 --xla_force_host_platform_device_count={devices}"
    environ = os.environ | {"XLA_FLAGS": flags}
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=400, env=environ)


def run_folder(runs, algo):
    """The newest run folder."""
    folders = sorted((runs / ENV / algo).iterdir(), key=lambda p: p.stat().st_mtime)
    return folders[-1]


def rows(folder):
    with open(folder / "progress.csv", newline="") as file:
        reader = csv.DictReader(file)
        assert reader.fieldnames == logbook.COLUMNS
        return list(reader)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """The working directory of all runs, with a dataset of its own: the repository's may be remade while tests run."""
    place = tmp_path_factory.mktemp("end_to_end")
    shutil.copy(dsrl.default_path(ENV), place / "point.hdf5")
    return place


@pytest.fixture(scope="module")
def finished(place):
    """algo -> (completed process, run folder); made once, on first use."""
    made = {}

    def get(algo):
        if algo not in made:
            if ENDS[algo][0][0] == "offline" and algo != "cpq":
                get("cpq")
            done = script(algo, TINY[algo], place / "runs", place)
            assert done.returncode == 0, done.stderr[-3000:]
            made[algo] = done, run_folder(place / "runs", algo)
        return made[algo]

    return get


@pytest.mark.parametrize("algo", TINY)
def test_run_leaves_a_whole_folder(algo, place, finished):
    done, folder = finished(algo)
    assert str(folder) in done.stdout
    config = json.loads((folder / "config.json").read_text())
    assert set(config["versions"]) >= {"jax", "flax", "optax", "numpy", "mujoco"}
    assert re.fullmatch(r"[0-9a-f]{12}\+?", config["commit"]) and re.fullmatch(r"[0-9a-f]{12}", config["config_hash"])
    assert config["seconds"] > 0 and config["diverged"] == []
    if algo != "sac_lag":
        assert config["dataset"]["sha256"] == dsrl.sha256(place / "point.hdf5")
    assert (folder / "curves.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    tree, meta = logbook.load(folder / "checkpoint-seed0.safetensors")
    assert meta["env"] == ENV and meta["config_hash"] == config["config_hash"]
    assert tree and all(np.all(np.isfinite(x)) for x in tree.values())


@pytest.mark.parametrize("algo", TINY)
def test_progress_rows(algo, finished):
    """Every row says what it is of; the phases come in order, steps never go back, numbers are finite."""
    _, folder = finished(algo)
    config = json.loads((folder / "config.json").read_text())
    table = rows(folder)
    for row in table:
        assert (row["env"], row["algo"], row["seed"], row["cost_limit"]) == (ENV, algo, "0", "20.0")
        assert row["config_hash"] == config["config_hash"] and row["commit"] == config["commit"]
        assert row["dataset_hash"] == (config["dataset"]["sha256"][:12] if algo != "sac_lag" else "")
        for key in logbook.COLUMNS[logbook.COLUMNS.index("gradient_steps") : logbook.COLUMNS.index("cost_limit")]:
            assert row[key] == "" or np.isfinite(float(row[key])), key
    phases, gradient_steps, env_steps = ENDS[algo]
    assert list(dict.fromkeys(row["phase"] for row in table)) == phases
    for key in ("gradient_steps", "env_steps"):
        steps = [int(row[key]) for row in table]
        assert steps == sorted(steps)
    last = [row for row in table if row["event"] == "eval"][-1]
    assert last["phase"] == phases[-1] and last["episodes"] and bool(last["multiplier"]) == (phases[-1] == "online")
    assert (int(last["gradient_steps"]), int(last["env_steps"])) == (gradient_steps, env_steps)
    if algo == "marvel":
        assert [row["phase"] for row in table if row["event"] == "rank"] == ["offline", "vpa"]
    online = [row for row in table if (row["phase"], row["event"]) == ("online", "train")]
    assert bool(online) == ("online" in phases)
    if algo == "cal":  # its multiplier is its own: nothing of the controller's is shown or kept
        arrays = logbook.load(folder / "checkpoint-seed0.safetensors")[0]
        assert arrays["multiplier"] == pytest.approx(np.exp(arrays["log_multiplier"])) and not any(row["kp"] for row in online)
    else:
        assert all(row["kp"] for row in online)


def shared_checkpoints(place):
    """Those of CPQ with the usual number of critics; wsrl and cal have others here."""
    found = (place / "runs" / ENV / "offline" / "cpq").rglob("*.safetensors")
    critics = lambda path: {name: logbook.load(path)[1]["recipe"][name] for name in ("num_critics", "cost_critics")}
    return [path for path in found if critics(path) == {"num_critics": 2, "cost_critics": 1}]


def test_the_offline_checkpoint_is_made_once_and_its_rows_are_repeated(place, finished):
    """cpq.py makes it, the others start from it; their rows of that phase are cpq.py's."""
    _, first = finished("cpq")
    offline = shared_checkpoints(place)
    assert len(offline) == 1
    drop = lambda table: [{k: v for k, v in row.items() if k not in ("algo", "commit", "config_hash")} for row in table]
    for algo in ("marvel", "naive_o2o", "jsrl", "pex", "so2"):
        done, folder = finished(algo)
        assert "offline phase from" in done.stderr
        assert drop(row for row in rows(folder) if row["phase"] == "offline" and row["event"] != "rank") == drop(rows(first))
    assert shared_checkpoints(place) == offline


def test_the_same_command_twice_gives_the_same_rows_and_parameters(place, finished):
    _, first = finished("naive_o2o")
    done = script("naive_o2o", TINY["naive_o2o"], place / "runs", place)
    assert done.returncode == 0, done.stderr[-3000:]
    second = run_folder(place / "runs", "naive_o2o")
    assert second != first
    # others may commit meanwhile
    drop = lambda table: [{k: v for k, v in row.items() if k != "commit"} for row in table]
    assert drop(rows(second)) == drop(rows(first))
    equal_checkpoints(first, second)


def equal_checkpoints(first, second):
    a, b = (logbook.load(folder / "checkpoint-seed0.safetensors")[0] for folder in (first, second))
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def test_naive_is_marvel_without_pre_alignment_to_the_bit(place, finished):
    _, naive = finished("naive_o2o")
    done = script("marvel", ONLINE + " --vpa-steps 0 --rank-points 0 --lagrangian dual", place / "runs", place)
    assert done.returncode == 0, done.stderr[-3000:]
    marvel = run_folder(place / "runs", "marvel")
    drop = lambda table: [{k: v for k, v in row.items() if k not in ("algo", "commit", "config_hash")} for row in table]
    assert drop(rows(naive)) == drop(rows(marvel))
    equal_checkpoints(naive, marvel)


@pytest.mark.parametrize("seeds, devices", [pytest.param(*n, marks=pytest.mark.slow) for n in ((3, 1), (2, 2), (8, 8))])
def test_a_seed_among_others_is_the_seed_alone(place, finished, seeds, devices):
    """Whether vmapped beside two others or on a device of its own: the rows of a run of that seed only, closely."""
    _, alone = finished("marvel")
    runs = place / f"runs-{seeds}-{devices}"
    done = script("marvel", f"{TINY['marvel']} --seeds {seeds}", runs, place, devices)
    assert done.returncode == 0, done.stderr[-3000:]
    table = rows(run_folder(runs, "marvel"))
    assert {row["seed"] for row in table} == {str(seed) for seed in range(seeds)}
    (folder,) = (runs / ENV / "marvel").iterdir()
    a, b = (logbook.load(path / "checkpoint-seed0.safetensors")[0] for path in (alone, folder))
    other = logbook.load(folder / "checkpoint-seed1.safetensors")[0]
    apart = lambda x, y: math.sqrt(sum(np.square(np.float64(x[name]) - y[name]).sum() for name in x))
    assert apart(a, b) < 0.05 * apart(b, other)  # 0.004; episodes blow rounding up
    compared = 0  # episodes of 500 steps blow a difference in the last digit up, so only the untrained policy's is compared
    for one, row in zip(rows(alone), (row for row in table if row["seed"] == "0"), strict=True):
        for key in ("reward_critic_loss", "cost_critic_loss", "q", "qc") if one["phase"] != "online" else ():
            compared += bool(one[key])
            np.testing.assert_allclose(float(row[key] or 0), float(one[key] or 0), rtol=1e-3, err_msg=key)
        if one["event"] == "eval" and one["gradient_steps"] == "0":
            compared += 1
            np.testing.assert_allclose(float(row["return"]), float(one["return"]), rtol=1e-3)
    assert compared == 9


@pytest.mark.parametrize("offline", ["bc_safe", pytest.param("bear_lag", marks=pytest.mark.slow)])
def test_finetuning_from_another_offline_algorithm(offline, place, finished):
    """Its checkpoint is taken up where it is, and made where it is not."""
    finished(offline)
    words = f"{ONLINE} --offline {offline}"
    done = script("naive_o2o", words, place / "runs", place)
    assert done.returncode == 0 and "offline phase from" in done.stderr, done.stderr[-3000:]
    made = rows(run_folder(place / "runs", "naive_o2o"))
    done = script("naive_o2o", words, place / f"runs-{offline}", place)
    assert done.returncode == 0 and "offline phase from" not in done.stderr, done.stderr[-3000:]
    drop = lambda table: [{k: v for k, v in row.items() if k != "commit"} for row in table]
    assert drop(rows(run_folder(place / f"runs-{offline}", "naive_o2o"))) == drop(made)


@pytest.mark.parametrize("algo", TINY)
def test_the_numpy_policy_is_the_evaluated_one(algo, place, finished):
    _, folder = finished(algo)
    path, (dataset, _) = folder / "checkpoint-seed0.safetensors", dsrl.load(place / "point.hdf5")
    policy, obs = load_policy(path), np.pad(dataset.observations[::100], ((0, 0), (0, 1)), constant_values=0.1)  # the odometer
    seen = dataset.privileged[::100, : policy.privileged_size]
    assert (policy.algo, policy.env, policy.privileged_size) == (algo, ENV, 1 if algo == "pex" else 0) and policy.odometer
    np.testing.assert_allclose(policy(obs, seen), jax_action(path, obs, seen), atol=1e-6)


def test_starting_from_a_checkpoint_is_the_offline_phase_to_the_bit(place, finished):
    """Marvel from CPQ's actor and critics by --init: what it learns from there on is what it learns after phase 1."""
    (_, cpq), (_, marvel) = finished("cpq"), finished("marvel")
    start = cpq / "checkpoint-seed0.safetensors"
    done = script("marvel", f"{TINY['marvel']} --init {start}", place / "runs-init", place)
    assert done.returncode == 0 and "start from the actor and the critics of" in done.stderr, done.stderr[-3000:]
    folder = run_folder(place / "runs-init", "marvel")
    equal_checkpoints(folder, marvel)
    first, *rest = rows(folder)
    assert (first["phase"], first["event"], first["gradient_steps"]) == ("offline", "eval", "0")
    assert [row["phase"] for row in rest if row["event"] != "rank"][0] == "vpa"
    assert json.loads((folder / "config.json").read_text())["init"] == [{"path": str(start), "sha256": dsrl.sha256(start)}]


def test_starting_from_an_actor_needs_neither_critics_nor_a_dataset(place, finished):
    """One actor for two seeds, of a task whose dataset is not asked for."""
    _, cloned = finished("bc_safe")
    words = "--eval-episodes 2 --final-eval-rounds 1 --hidden 32 --iterations 1 --evals 1 --updates-per-iter 20 --seeds 2"
    done = script("naive_o2o", f"{words} --init {cloned / 'checkpoint-seed0.safetensors'}", place / "runs-init", place)
    assert done.returncode == 0 and "new critics: it holds none" in done.stderr, done.stderr[-3000:]
    folder = run_folder(place / "runs-init", "naive_o2o")
    assert json.loads((folder / "config.json").read_text())["dataset"] is None
    start, *ends = (logbook.load(path)[0] for path in (cloned / "checkpoint-seed0.safetensors", *sorted(folder.glob("checkpoint-*"))))
    critic = "critics/cost/params/VmapCritic_0/Dense_0/kernel"
    for end in ends:
        for name in (name for name in start if name.startswith("actor/")):
            np.testing.assert_array_equal(end[name.replace("actor", "prior", 1)], start[name])
    assert len(ends) == 2 and (ends[0][critic] != ends[1][critic]).any()


@pytest.mark.parametrize("algo, how, said", [("marvel", "sample", "drawn from the stochastic policy"), ("pex", "mean", "mean actions")])
def test_eval_replays_a_checkpoint(algo, how, said, place, finished):
    _, folder = finished(algo)
    words = f"--eval {folder / 'checkpoint-seed0.safetensors'} --episodes 2 --eval-policy {how} --cost-limit 7"
    done = script(algo, words, place / "runs", place)
    assert done.returncode == 0 and "of the episodes above 7," in done.stdout, (done.stdout, done.stderr[-3000:])
    assert re.search(rf"{ENV}: 2 episodes, return -?\d+\.\d, cost \d+\.\d", done.stdout) and said in done.stdout


# ---------------------------------------------------------------- bad input


def refused(done, *texts):
    """Exit code 2 and one line on standard error that names what is wrong; no traceback."""
    assert done.returncode == 2, (done.returncode, done.stderr[-2000:])
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr[-2000:]
    assert all(text in lines[0] for text in texts), lines[0]


def test_critics_see_what_the_dataset_carries_and_policies_do_not(place, tmp_path):
    """PEX, whose policy asks its critics: trained with the extra column, and replayed from the checkpoint."""
    dataset, about = dsrl.load(place / "point.hdf5")
    column = np.linspace(-1, 1, len(dataset.rewards), dtype=np.float32)[:, None]
    dsrl.save(tmp_path / "wide.hdf5", dataset._replace(privileged=column, next_privileged=column), {"env": ENV})
    done = script("pex", TINY["pex"].replace("point.hdf5", "wide.hdf5"), tmp_path / "runs", tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    path = run_folder(tmp_path / "runs", "pex") / "checkpoint-seed0.safetensors"
    arrays, _ = logbook.load(path)
    first = lambda part: next(v for k, v in arrays.items() if k.startswith(part) and k.endswith("Dense_0/kernel")).shape[-2]
    obs_size = dataset.observations.shape[1] + 1  # the odometer
    assert (first("actor/"), first("critics/reward/"), first("critics/cost/")) == (obs_size, obs_size + 3, obs_size + 3)
    done = script("pex", f"--eval {path} --episodes 2", tmp_path / "runs", tmp_path)
    assert done.returncode == 0 and "2 episodes, return" in done.stdout, done.stderr[-3000:]


def test_damaged_checkpoint(place, finished):
    """Cut short, one that is no safetensors file, and one of another program."""
    _, folder = finished("marvel")
    content = (folder / "checkpoint-seed0.safetensors").read_bytes()
    for name, damaged in {"cut": content[: len(content) // 2], "text": b"hello", "empty": b""}.items():
        (place / name).write_bytes(damaged)
        refused(script("marvel", f"--eval {name}", place / "runs", place), name)
    foreign = ROOT / "data" / "policies" / f"{ENV}.safetensors"
    refused(script("marvel", f"--eval {foreign}", place / "runs", place), str(foreign))


def test_checkpoint_whose_networks_do_not_fit(place, finished):
    """The sizes in the header are not those of the arrays."""
    _, folder = finished("marvel")
    tree, meta = logbook.load(folder / "checkpoint-seed0.safetensors")
    meta["config"]["hidden"] = [64, 32]
    logbook.save(place / "other.safetensors", tree, meta)
    refused(script("marvel", "--eval other.safetensors", place / "runs", place), "other.safetensors", "does not fit")
    logbook.save(place / "actorless.safetensors", {k: v for k, v in tree.items() if k.startswith("critics/")}, meta)
    refused(script("marvel", "--eval actorless.safetensors", place / "runs", place), "actorless.safetensors")


def test_damaged_offline_checkpoint(place, finished):
    """A run that would start from it says so, and does not train on in silence."""
    finished("marvel")
    (path,) = shared_checkpoints(place)
    content = path.read_bytes()
    try:
        path.write_bytes(content[: len(content) // 2])
        refused(script("marvel", TINY["marvel"], place / "runs", place), path.name)
    finally:
        temporary = path.with_suffix(".tmp")
        temporary.write_bytes(content)
        os.replace(temporary, path)
