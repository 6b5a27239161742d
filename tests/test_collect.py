"""Datasets made on the spot from the kept behaviour policies (data/collect.py)."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import h5py
import jax
import numpy as np
import pytest
import safetensors.numpy

import envs
from data import collect, dsrl, report

ROOT = Path(__file__).resolve().parents[1]
NAME = "SafetyPointRun"


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """An empty folder in place of data/, and collections of an episode per policy."""
    monkeypatch.setattr(dsrl, "default_path", lambda name: tmp_path / f"{name}.hdf5")
    monkeypatch.setitem(collect.TRANSITIONS, NAME, 1)
    return tmp_path


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_missing_dataset_is_made_once_and_is_the_committed_ones_kind(elsewhere, monkeypatch, capsys):
    """Threads stand for processes: each opens the lock by itself. What is there already is not made again."""
    made, own = [], collect.collect
    monkeypatch.setattr(collect, "collect", lambda *args: made.append(args[1].name) or own(*args))
    found = []
    asked = [threading.Thread(target=lambda: found.append(collect.provided(NAME))) for _ in range(2)]
    for thread in asked:
        thread.start()
    for thread in asked:
        thread.join()
    assert found == [elsewhere / f"{NAME}.hdf5"] * 2 and made == [f"{NAME}.hdf5"] and left(elsewhere) == [f"{NAME}.hdf5"]
    assert f"python -m data.collect --env {NAME}" in capsys.readouterr().err
    dataset, about = dsrl.load(found[0], env=NAME, obs_size=12, action_size=2)
    split, policies = dsrl.episodes(dataset), sum(len(behaviour.stages) for behaviour in collect.RECIPES[NAME])
    assert list(split.lengths) == [500] * policies and split.complete.all() and not dataset.terminals.any()
    assert dataset.privileged is not None and about["sha256"] == dsrl.sha256(found[0])
    # from poor to good, as the behaviours are (their order is that of training)
    assert split.returns[0] < 400 < 700 < split.returns.max()
    assert collect.provided(NAME) == found[0] and len(made) == 1


def test_rollouts_in_pieces_are_the_rollouts_in_one(monkeypatch):
    """The progress bar splits a collection into calls; the episodes do not change by it."""
    env = envs.make(NAME)
    params = {"Dense_0/kernel": np.full((2, env.obs_size, 2 * env.action_size), 0.01), "Dense_0/bias": np.zeros((2, 2 * env.action_size))}
    out = []
    for pieces in (20, 1):
        monkeypatch.setattr(collect, "PIECES", pieces)
        out.append(collect.rollouts(env, params, 1, jax.random.key(3)))
    assert out[0]["rewards"].shape == (2, 1, 500) and out[0]["observations"].shape == (2, 1, 500, env.obs_size)
    for key in out[0]:
        np.testing.assert_array_equal(out[0][key], out[1][key], key)
    assert out[0]["timeouts"][..., -1].all() and out[0]["timeouts"].sum() == 2


def test_only_whole_episodes_are_kept_and_all_of_those():
    """Two rows of five steps: one dies in the third, one is stopped in the second and the fifth."""
    steps, ends = np.arange(10.0, dtype=np.float32).reshape(1, 2, 5), np.zeros((2, 1, 2, 5), bool)
    ends[0, 0, 0, 2] = ends[1, 0, 1, 1] = ends[1, 0, 1, 4] = True
    kept = dict(rewards=steps, costs=-steps, terminals=ends[0], timeouts=ends[1], actions=steps[..., None] / 3)
    found = collect.whole_episodes(kept | dict(observations=steps[..., None], next_observations=steps[..., None] + 1))
    numbers = [0, 1, 2, 5, 6, 7, 8, 9]
    assert found.rewards.tolist() == found.observations[:, 0].tolist() == numbers and found.actions.shape == (8, 1)
    assert np.flatnonzero(found.terminals).tolist() == [2] and np.flatnonzero(found.timeouts).tolist() == [4, 7]


def test_observations_are_rounded_to_14_bits():
    """Of the mantissa's 23, to the nearest: a relative error of at most 2^-15."""
    x = np.random.default_rng(0).lognormal(sigma=5, size=1000).astype(np.float32) * np.float32([1, -1] * 500)
    obs = x.reshape(1, 1, 1000, 1)
    rest = dict.fromkeys(("rewards", "costs"), obs[..., 0]) | dict.fromkeys(("terminals", "timeouts"), np.ones((1, 1, 1000), bool))
    found = collect.whole_episodes(rest | dict(observations=obs, next_observations=obs, actions=obs))
    for rounded in (found.observations[:, 0], found.next_observations[:, 0]):
        assert np.abs(rounded / x - 1).max() <= 2**-15 * 1.001 and not (rounded.view(np.uint32) & 0x1FF).any()
    np.testing.assert_array_equal(found.actions[:, 0], x)  # of which a density may be asked


def test_a_collection_that_stops_leaves_no_file(elsewhere, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "replace", full)  # the disk is full at the very end
    with pytest.raises(dsrl.DatasetError, match=rf"No space left.*data.collect --env {NAME} --out FILE.*--dataset FILE"):
        collect.provided(NAME)
    assert not [name for name in left(elsewhere) if name.endswith("hdf5")]


def test_the_page_leaves_out_files_of_the_users_own(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(report, "HERE", tmp_path)
    (tmp_path / "README.md").write_text("before\n" + "old\n".join(report.MARKS) + "after\n")
    rows = [x if x is None else x[:1000] for x in dsrl.load(dsrl.default_path(NAME))[0]]
    for name, about in (("Own", {}), (NAME, {"policies": json.dumps([{"cost_limit": "10.0", "env_steps": 5000}])})):
        dsrl.save(tmp_path / f"{name}.hdf5", dsrl.Dataset(*rows), about)
    with h5py.File(tmp_path / "Other.hdf5", "w") as file:
        file["observations"] = np.zeros((3, 2))
    report.main(report.Args())
    other, line = capsys.readouterr().err.splitlines()
    assert f"{tmp_path / 'Own.hdf5'}: left out" in line and f"{tmp_path / 'Other.hdf5'}: left out" in other
    assert left(tmp_path) == ["Other.hdf5", "Own.hdf5", "README.md", f"{NAME}.hdf5", f"{NAME}.png"]
    page = (tmp_path / "README.md").read_text()
    assert f"| {NAME} |" in page and "limit 10.0 at 5k steps" in page and "Own" not in page and "old" not in page
    assert page.startswith("before\n") and page.endswith("after\n")


MENDS = [
    ("SafetyAntRun", "data.collect --env SafetyAntRun --train` makes one, in hours$"),
    ("SafetyAntCircle2", "data.collect --env SafetyAntCircle2 --train.*--dataset FILE"),
    ("bullet/SafetyDroneRun", "--dataset dsrl/SafetyDroneRun-v0"),
    ("SafetyPointGoal2-v0", "--dataset dsrl/SafetyPointGoal2Gymnasium-v0"),
    ("own_env:Own-v0", "--dataset FILE.*data.convert"),
]


@pytest.mark.parametrize(("name", "mend"), MENDS)
def test_what_cannot_be_made_names_the_mend(elsewhere, monkeypatch, name, mend):
    monkeypatch.setattr(collect, "policies_path", lambda name: elsewhere / "nowhere")
    with pytest.raises(dsrl.DatasetError, match=mend) as error:
        collect.provided(name)
    assert len(str(error.value).splitlines()) == 1 and not left(elsewhere)


@pytest.mark.parametrize(("words", "mend"), [("--env SafetyPointRum", "SafetyPointRun"), ("--env bullet/SafetyDroneRun", "")])
def test_the_command_says_what_is_wrong_in_one_line(words, mend, tmp_path):
    command = [sys.executable, "-m", "data.collect", *words.split(), "--out", str(tmp_path / "x.hdf5")]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 2 and run.stderr.startswith("error: ") and len(run.stderr.splitlines()) == 1 and mend in run.stderr
    assert not left(tmp_path)


def test_a_file_that_cannot_be_written_is_told_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr(collect, "train", None)
    monkeypatch.setattr(collect, "collect", None)
    for out in (tmp_path, tmp_path / "x.txt", Path("/proc/x.hdf5")):
        with pytest.raises(dsrl.DatasetError, match=f"^{out}: .*; name a file"):
            collect.main(collect.Args(NAME, train=True, out=out))
    assert not left(tmp_path)


def test_run_folders_that_cannot_be_taken_are_told_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr(collect, "train", None)
    folder, out = tmp_path / "run", tmp_path / "x.hdf5"
    for words, said in (({}, "only with --train"), ({"train": True}, "holds no snapshot-seed0-")):
        with pytest.raises(dsrl.DatasetError, match=f"^--runs {folder}: {said}"):
            collect.main(collect.Args(NAME, out=out, runs=(folder,), **words))
    folder.mkdir()
    (folder / "snapshot-seed0-00000001.safetensors").touch()
    with pytest.raises(dsrl.DatasetError, match="^--runs: 9 given; name . folders"):
        collect.main(collect.Args(NAME, out=out, train=True, runs=(folder,) * 9))
    assert not out.exists()


@pytest.mark.parametrize("transitions", [0, -5])
def test_a_size_that_is_none_is_refused(tmp_path, monkeypatch, transitions):
    monkeypatch.setattr(collect, "collect", None)
    with pytest.raises(dsrl.DatasetError, match=f"^--transitions {transitions}: must be positive$"):
        collect.main(collect.Args(NAME, transitions, out=tmp_path / "x.hdf5"))


@pytest.mark.parametrize("name", sorted({*envs.TASKS, "SafetyPointGoal1-v0"} - collect.FALLING))
def test_every_native_task_has_the_policies_that_make_its_dataset(name):
    """As many as the recipe has stages, for the task's observations and actions."""
    arrays, recipe = safetensors.numpy.load_file(collect.policies_path(name)), collect.RECIPES[name]
    kernels = [x for key, x in sorted(arrays.items()) if key.endswith("kernel")]
    assert {len(x) for x in arrays.values()} == {sum(len(behaviour.stages) for behaviour in recipe)}
    if name in envs.TASKS:
        env = envs.make(name)
        assert (kernels[0].shape[1], kernels[-1].shape[2]) == (env.obs_size, 2 * env.action_size)
