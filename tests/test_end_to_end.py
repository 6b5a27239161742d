"""algos/*.py from their command lines: a tiny run of each, what it leaves behind, and how bad input is refused."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from algos import logbook
from data import dsrl

ROOT = Path(__file__).resolve().parents[1]
ENV = "SafetyPointRun"
TINY = {
    "marvel": "--offline-steps 500 --vpa-steps 500 --iterations 2 --evals 1 --offline-evals 1 --eval-episodes 2 "
    "--rank-points 8 --dataset point.hdf5 --updates-per-iter 20 --hidden 32 32 --vae-hidden 32 32 --buffer-size 10000",
    "sac_lag": "--env-steps 2560 --num-envs 16 --steps-per-block 16 --updates-per-block 8 --evals 1 --eval-episodes 2 "
    "--hidden 32 32 --buffer-size 10000",
}


def script(algo, words, runs, cwd):
    """Runs a script in a foreign working directory, standard error not a terminal."""
    command = [sys.executable, str(ROOT / "algos" / f"{algo}.py"), "--env", ENV, "--runs", str(runs), *words.split()]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=170)


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
    if algo == "marvel":
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
        assert row["dataset_hash"] == (config["dataset"]["sha256"][:12] if algo == "marvel" else "")
        for key in logbook.COLUMNS[logbook.COLUMNS.index("gradient_steps") : logbook.COLUMNS.index("cost_limit")]:
            assert row[key] == "" or np.isfinite(float(row[key])), key
    phases = ["offline", "vpa", "online"] if algo == "marvel" else ["online"]
    assert list(dict.fromkeys(row["phase"] for row in table)) == phases
    for key in ("gradient_steps", "env_steps"):
        steps = [int(row[key]) for row in table]
        assert steps == sorted(steps)
    last = [row for row in table if row["event"] == "eval"][-1]
    assert last["phase"] == "online" and last["episodes"] and last["multiplier"]
    expected = {"marvel": (500 + 500 + 2 * 20, 2 * 5 * 500), "sac_lag": (80, 2560)}[algo]
    assert (int(last["gradient_steps"]), int(last["env_steps"])) == expected
    if algo == "marvel":
        assert [row["phase"] for row in table if row["event"] == "rank"] == ["offline", "vpa"]


def test_a_second_run_reuses_the_offline_checkpoint_and_repeats_every_row(place, finished):
    _, first = finished("marvel")
    offline = list((place / "runs" / ENV / "offline").rglob("*.safetensors"))
    assert len(offline) == 1
    before = offline[0].stat().st_mtime_ns
    done = script("marvel", TINY["marvel"], place / "runs", place)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "offline phase from" in done.stderr and offline[0].stat().st_mtime_ns == before
    second = run_folder(place / "runs", "marvel")
    assert second != first
    # others may commit meanwhile
    drop = lambda table: [{k: v for k, v in row.items() if k != "commit"} for row in table]
    assert drop(rows(second)) == drop(rows(first))


def test_eval_replays_a_checkpoint(place, finished):
    _, folder = finished("marvel")
    done = script("marvel", f"--eval {folder / 'checkpoint-seed0.safetensors'} --episodes 2", place / "runs", place)
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.search(rf"{ENV}: 2 episodes, return -?\d+\.\d, cost \d+\.\d", done.stdout)


# ---------------------------------------------------------------- bad input


def refused(done, *texts):
    """Exit code 2 and one line on standard error that names what is wrong; no traceback."""
    assert done.returncode == 2, (done.returncode, done.stderr[-2000:])
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr[-2000:]
    assert all(text in lines[0] for text in texts), lines[0]


BAD = {
    "unknown environment": ("marvel", "--env SafetyPontRun", ("SafetyPontRun", "SafetyPointRun")),
    "unknown environment, sac_lag": ("sac_lag", "--env Nothing", ("Nothing",)),
    "unknown backend": ("sac_lag", "--backend cuda", ("cuda", "mujoco")),
    "dataset of another task": ("marvel", f"--dataset {dsrl.default_path('SafetyAntRun')}", ("SafetyAntRun",)),
    "missing dataset": ("marvel", "--dataset nowhere.hdf5", ("nowhere.hdf5",)),
    "dataset that is a folder": ("marvel", "--dataset .", (".",)),
    "missing checkpoint": ("marvel", "--eval nowhere.safetensors", ("nowhere.safetensors",)),
    "checkpoint that is a folder": ("marvel", "--eval .", (".",)),
    "zero seeds": ("marvel", "--seeds 0", ("--seeds",)),
    "negative batch": ("marvel", "--batch-size -1", ("--batch-size",)),
    "zero iterations": ("marvel", "--iterations 0", ("--iterations",)),
    "empty layer": ("marvel", "--hidden 32 0", ("--hidden",)),
    "steps that are no multiple": ("marvel", "--offline-steps 750", ("--offline-steps",)),
    "zero environments": ("sac_lag", "--num-envs 0", ("--num-envs",)),
    "negative limit": ("sac_lag", "--cost-limit -1", ("--cost-limit",)),
    "NaN rate": ("sac_lag", "--actor-lr nan", ("--actor-lr",)),
    "budget below one block": ("sac_lag", "--env-steps 10", ("--env-steps",)),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case, place):
    algo, words, texts = BAD[case]
    if case == "dataset of another task" and not dsrl.default_path("SafetyAntRun").exists():
        pytest.skip("no second dataset here")
    before = set((place / "runs").rglob("*"))
    refused(script(algo, words, place / "runs", place), *texts)
    assert set((place / "runs").rglob("*")) == before  # refused before anything is written


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
    (path,) = (place / "runs" / ENV / "offline").rglob("*.safetensors")
    content = path.read_bytes()
    try:
        path.write_bytes(content[: len(content) // 2])
        refused(script("marvel", TINY["marvel"], place / "runs", place), path.name)
    finally:
        temporary = path.with_suffix(".tmp")
        temporary.write_bytes(content)
        os.replace(temporary, path)
