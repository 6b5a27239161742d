"""What a week of computing needs: killed runs go on bit for bit, bad input is refused before anything is written, a full disk or
a diverged seed costs nothing else."""

import csv
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import h5py
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import envs
from algos import bc_safe, bear_lag, cal, checkpoint, cpq, finetuning, jsrl, logbook, marvel, naive_o2o, pex, sac_lag, so2, training, wsrl
from data import collect, dsrl

ROOT = Path(__file__).resolve().parents[1]
ENV = "SafetyPointRun"
TINY = {
    "marvel": "--seeds 2 --offline-steps 1000 --vpa-steps 1000 --iterations 4 --evals 2 --offline-evals 1 --eval-episodes 2 --final-eval-rounds 1 "
    "--rank-points 4 --updates-per-iter 10 --hidden 16 --vae-hidden 16 --dataset point.hdf5",
    "sac_lag": "--seeds 2 --env-steps 10240 --num-envs 16 --steps-per-block 64 --updates-per-block 8 --evals 2 --eval-episodes 2 --final-eval-rounds 1 --hidden 16",
}
OFFLINE = "--seeds 2 --offline-steps 500 --offline-evals 1 --eval-episodes 2 --final-eval-rounds 1 --hidden 16 --vae-hidden 16"
SHORT = {"cpq": OFFLINE, "naive_o2o": OFFLINE + " --iterations 1 --evals 1 --updates-per-iter 10 --dataset point.hdf5"}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("trust")
    shutil.copy(dsrl.default_path(ENV), place / "point.hdf5")
    return place


def start(algo, runs, cwd, words="", environment=None, **options):
    command = [sys.executable, str(ROOT / "algos" / f"{algo}.py"), "--env", ENV, "--runs", str(runs), *(TINY | SHORT)[algo].split()]
    command += words.split()
    environ = os.environ | {"XLA_FLAGS": "--xla_backend_optimization_level=0"} | (environment or {})  # short runs are mostly compilation
    return subprocess.Popen(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environ, **options)


def folder_of(runs, algo):
    (folder,) = (runs / ENV / algo).iterdir()
    return folder


def outcome(runs, algo):
    """(progress.csv without the commit, arrays of both checkpoints) of the only run there."""
    folder = folder_of(runs, algo)
    with open(folder / "progress.csv", newline="") as file:
        rows = [{k: v for k, v in row.items() if k != "commit"} for row in csv.DictReader(file)]
    return rows, [logbook.load(folder / f"checkpoint-seed{seed}.safetensors")[0] for seed in (0, 1)]


def same(a, b):
    assert a[0] == b[0]
    for x, y in zip(a[1], b[1], strict=True):
        assert x.keys() == y.keys()
        for name in x:
            np.testing.assert_array_equal(x[name], y[name])


def killed_and_resumed(algo, runs, cwd, kill_after: list[int], total: int, between=lambda folder: None):
    """Kills the run each time progress.csv has that many lines, then lets it end; the last process's standard error."""
    for lines in kill_after:
        process = start(algo, runs, cwd, "--resume --checkpoint-seconds 0")
        deadline = time.monotonic() + 170
        while process.poll() is None and time.monotonic() < deadline:
            folders = list((runs / ENV / algo).glob("*/progress.csv"))
            if folders and len(folders[0].read_bytes().splitlines()) > min(lines, total - 1):
                time.sleep(random.random() * 0.2)
                break
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        between(folder_of(runs, algo))
    process = start(algo, runs, cwd, "--resume --checkpoint-seconds 0")
    _, err = process.communicate(timeout=170)
    assert process.returncode == 0, err[-2000:]
    return err


@pytest.fixture(scope="module")
def undisturbed(place):
    """algo -> outcome of a run that nobody interrupted."""
    made = {}

    def get(algo):
        if algo not in made:
            runs = place / f"{algo}-undisturbed"
            process = start(algo, runs, place)
            _, err = process.communicate(timeout=280)
            assert process.returncode == 0, err[-2000:]
            made[algo] = outcome(runs, algo)
        return made[algo]

    return get


def test_killed_once_and_resumed(place, undisturbed):
    """Killed in the middle of phase 3, its newest saved state torn: the one before is used, and the end is the same."""

    def tear(folder):
        path, before = folder / logbook.RESUME, folder / f"previous-{logbook.RESUME}"
        whole = path if path.exists() else before  # killed while the newest was being written
        path.write_bytes(whole.read_bytes()[:-100])

    expected = undisturbed("sac_lag")
    err = killed_and_resumed("sac_lag", place / "torn", place, [len(expected[0]) // 2], len(expected[0]), tear)
    assert err.count("damaged") == 1 and "resuming" in err
    same(outcome(place / "torn", "sac_lag"), expected)


@pytest.mark.slow
@pytest.mark.parametrize("algo", TINY)
def test_killed_at_twenty_points(algo, place, undisturbed):
    """Every phase of marvel is hit: the points are spread over the whole of progress.csv."""
    expected = undisturbed(algo)
    random.seed(0)
    points = sorted(random.randrange(1, len(expected[0]) + 1) for _ in range(20))
    killed_and_resumed(algo, place / f"{algo}-killed", place, points, len(expected[0]))
    same(outcome(place / f"{algo}-killed", algo), expected)


# ---------------------------------------------------------------- the logbook alone

CONFIG = {"cost_limit": 20.0, "resume": False, "checkpoint_seconds": 0.0, "track": "none", "rate": 1.0}


def book(runs, seeds=(0, 1), **changes):
    return logbook.Logbook("algo", "env", {**CONFIG, "runs": runs, **changes}, list(seeds))


def counting(log, phase="online", blocks=4, fail_at=None, poison=None):
    """A run whose carry counts blocks; `fail_at`: raise there; `poison` = (block, seed index): a NaN there."""

    def block(n, carry):
        (x,) = carry
        if n == fail_at:
            raise KeyboardInterrupt
        if n:
            x = {"a": x["a"] + 1.0}
            log.log(phase, "train", gradient_steps=10 * n, env_steps=n, episodes=1, cost=x["a"], actor_loss=x["a"])
        if poison and n == poison[0]:
            x = {"a": x["a"].at[poison[1]].set(jnp.nan)}
        return (x,)

    return log.run(phase, blocks, ({"a": jnp.zeros(len(log.seeds))},), block)[0]["a"]


def table(log):
    with open(log.folder / "progress.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_resume_goes_on_after_the_last_block(tmp_path):
    log = book(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        counting(log, fail_at=3)
    log._file.close()
    again = book(tmp_path, resume=True)
    assert again.folder == log.folder and again.resumed_seeds("online") and not again.resumed_seeds("vpa")
    assert counting(again).tolist() == [4.0, 4.0]
    assert [row["cost"] for row in table(again)] == ["1", "1", "2", "2", "3", "3", "4", "4"]


def test_resume_passes_over_finished_phases(tmp_path):
    log = book(tmp_path)
    counting(log, "offline", 2)
    with pytest.raises(KeyboardInterrupt):
        counting(log, "vpa", fail_at=2)
    log._file.close()
    again = book(tmp_path, resume=True)
    assert counting(again, "offline", 2, fail_at=0).tolist() == [0.0, 0.0]  # not run: fail_at would raise
    assert counting(again, "vpa").tolist() == [4.0, 4.0]
    assert again.steps_before("online") == 40 and again.steps_before("vpa") == 20


@pytest.mark.parametrize("change", [{"rate": 2.0}, {"cost_limit": 10.0}])
def test_resume_never_takes_another_configuration(change, tmp_path):
    log = book(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        counting(log, fail_at=3)
    log._file.close()
    other = book(tmp_path, resume=True, **change)
    assert other.folder != log.folder and not other.resumed_seeds("online")


def interrupted(runs, commit, monkeypatch, fail_at=3, **changes):
    """A run of that code which stops in the middle."""
    monkeypatch.setattr(logbook, "commit", lambda: commit)
    log = book(runs, **changes)
    with pytest.raises(KeyboardInterrupt):
        counting(log, fail_at=fail_at)
    log._file.close()
    return log


def test_other_code_that_takes_up_a_run_says_so(tmp_path, monkeypatch, capsys):
    """Rows name the code that made them, config.json names all, and once more resumed it forgets none."""
    interrupted(tmp_path, "old+", monkeypatch, 2)
    assert "warning" not in capsys.readouterr().err
    monkeypatch.setattr(logbook.importlib.metadata, "version", lambda package: "9")
    interrupted(tmp_path, "new", monkeypatch, 3, resume=True)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert "commit old+," in line and "of new:" in line and "without --resume" in line
    log = interrupted(tmp_path, "new", monkeypatch, 4, resume=True)
    assert [row["commit"] for row in table(log)] == ["old+"] * 2 + ["new"] * 4
    config = json.loads((log.folder / "config.json").read_text())
    assert config["commit"] == "old+" and config["versions"]["jax"] != "9"
    assert [(maker["commit"], maker["versions"]["jax"]) for maker in config["resumed"]] == [("new", "9")]


def test_the_same_code_takes_up_a_run_without_a_word(tmp_path, monkeypatch, capsys):
    interrupted(tmp_path, "old", monkeypatch)
    log = interrupted(tmp_path, "old", monkeypatch, 4, resume=True)
    assert "warning" not in capsys.readouterr().err and "resumed" not in json.loads((log.folder / "config.json").read_text())


def test_a_run_begun_again_by_other_code_is_that_codes_alone(tmp_path, monkeypatch, capsys):
    """There was no saved state yet."""
    interrupted(tmp_path, "old", monkeypatch, 2, checkpoint_seconds=float("inf"))
    log = interrupted(tmp_path, "new", monkeypatch, 3, resume=True)
    assert "warning" not in capsys.readouterr().err
    config = json.loads((log.folder / "config.json").read_text())
    assert (config["commit"], config.get("resumed")) == ("new", None) and {row["commit"] for row in table(log)} == {"new"}


def test_a_folder_in_use_is_refused(tmp_path):
    log = book(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        counting(log, fail_at=2)
    before = (log.folder / "progress.csv").read_bytes()
    with pytest.raises(logbook.BadInput, match="in use"):
        book(tmp_path, resume=True)
    assert (log.folder / "progress.csv").read_bytes() == before


def test_lost_rows_are_made_again_from_the_state_before(tmp_path, capsys):
    """What a power cut can do to progress.csv; without it, a new run begins."""
    log = book(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        counting(log, fail_at=3)
    log._file.close()
    path = log.folder / "progress.csv"
    os.truncate(path, path.stat().st_size - 5)
    again = book(tmp_path, resume=True)
    err = capsys.readouterr().err
    assert err.count("has lost rows") == 1 and "block 1" in err
    assert counting(again).tolist() == [4.0, 4.0] and [row["cost"] for row in table(again)] == ["1", "1", "2", "2", "3", "3", "4", "4"]
    other = book(tmp_path / "other")
    other._file.close()
    (other.folder / "progress.csv").unlink()
    assert book(tmp_path / "other", resume=True).folder != other.folder


def test_an_actor_that_only_waits_is_told(monkeypatch, capsys):
    monkeypatch.setattr(training, "prepare", lambda *_, **__: None)
    finetuning.prepare("naive_o2o", naive_o2o.Args(iterations=2))
    assert capsys.readouterr().err.count("--actor-warmup 2: the actor waits all the time") == 1
    finetuning.prepare("naive_o2o", naive_o2o.Args(iterations=3))
    assert not capsys.readouterr().err


@pytest.mark.parametrize("runs", ["file/x", "file"])
def test_a_place_that_cannot_be_written_is_one_line(runs, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as stop:
        logbook.command(lambda args: book(args.runs), cpq.Args, words=["--runs", str(tmp_path / runs)])
    err = capsys.readouterr().err
    assert stop.value.code == 1 and err.count("\n") == 1 and str(tmp_path / "file") in err and "a place that can be written" in err


def test_a_damaged_state_falls_back_to_the_one_before(tmp_path, capsys):
    log = book(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        counting(log, fail_at=3)
    log._file.close()
    state = log.folder / logbook.RESUME
    content = bytearray(state.read_bytes())
    content[-1] ^= 1  # one flipped bit
    state.write_bytes(content)
    again = book(tmp_path, resume=True)
    err = capsys.readouterr().err
    assert "damaged" in err and "block 1" in err
    assert counting(again).tolist() == [4.0, 4.0]
    assert [row["cost"] for row in table(again)] == ["1", "1", "2", "2", "3", "3", "4", "4"]


def test_a_diverged_seed_stops_alone(tmp_path, capsys):
    log = book(tmp_path)
    final = counting(log, poison=(2, 1))
    rows = table(log)
    assert [row["cost"] for row in rows if row["seed"] == "0"] == ["1", "2", "3", "4"]
    ours = [row for row in rows if row["seed"] == "1"]
    assert [row["event"] for row in ours] == ["train", "train", "diverged"]
    assert (ours[-1]["phase"], ours[-1]["gradient_steps"]) == ("online", "20")
    assert "seed 1 diverged at online gradient step 20: a is not finite" in capsys.readouterr().err
    log.save_seeds([tmp_path / "0", tmp_path / "1"], {"a": final})
    assert (tmp_path / "0").exists() and not (tmp_path / "1").exists()
    assert logbook.load(tmp_path / "0")[0]["a"] == 4.0


def poisoned(seed):
    """Instead of `training.train_on_dataset`: leaves the parameters as they are, but those of `seed` not finite; the loss shows nothing."""
    stream = training.STREAMS.index("offline")
    of_seed = jax.random.key_data(jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), stream), 1))

    def train(learner, data, key, **_):
        bad = jnp.all(jax.random.key_data(key) == of_seed)
        return learner._replace(params=jax.tree.map(lambda x: jnp.where(bad, jnp.nan, x), learner.params)), {"actor_loss": jnp.zeros(())}

    return train


def test_a_seed_that_diverges_in_the_last_step_of_a_phase_leaves_no_checkpoint(tmp_path, monkeypatch, capsys):
    """It is not evaluated either (HalfCheetah's returns would not be finite) and is left out of the closing means."""
    monkeypatch.setattr(training, "train_on_dataset", poisoned(seed=1))
    task = "SafetyHalfCheetahVelocity"
    words = (
        f"--env {task} --runs {tmp_path} --seeds 2 --offline-steps 500 --offline-evals 1 --eval-episodes 1 --final-eval-rounds 1 --hidden 8"
    )
    bc_safe.main(logbook.parse(bc_safe.Args, words.split()))
    assert [path.name for path in (tmp_path / task / "offline").rglob("*.safetensors")] == ["seed0.safetensors"]
    (folder,) = (tmp_path / task / "bc_safe").iterdir()
    with open(folder / "progress.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["event"] for row in rows if row["seed"] == "1"] == ["eval", "train", "diverged"]
    said, last = capsys.readouterr().out, [float(row["return"]) for row in rows if row["seed"] == "0" and row["event"] == "eval"][-1]
    assert "diverged: 1 of 2 seeds, left out below: 1\n" in said and f"return {last:8.1f}   cost " in said


@pytest.fixture
def cloned(tmp_path, monkeypatch):
    """words -> (rows by seed, arrays of each seed's checkpoint, the offline files) of a run of bc_safe.py that only pretends to train:
    each block moves a seed's parameters by a number of its own."""

    def train(learner, data, key, **_):
        return learner._replace(params=jax.tree.map(lambda x: x + jax.random.normal(key), learner.params)), {"actor_loss": jnp.zeros(())}

    monkeypatch.setattr(training, "train_on_dataset", train)
    monkeypatch.setattr(
        training, "evaluate", lambda policy, key, env, n: dict.fromkeys(("return", "cost", "length"), jax.random.normal(key, (n,)))
    )
    small = f"--env {ENV} --runs {tmp_path} --offline-steps 1000 --offline-evals 1 --final-eval-rounds 1 --hidden 8 --checkpoint-seconds 0"

    def get(words):
        bc_safe.main(logbook.parse(bc_safe.Args, [*small.split(), *words.split()]))
        folder = max((tmp_path / ENV / "bc_safe").iterdir())
        with open(folder / "progress.csv", newline="") as file:
            table = [{k: v for k, v in row.items() if k not in ("commit", "config_hash")} for row in csv.DictReader(file)]
        seeds = {int(row["seed"]) for row in table}
        files = {int(path.stem.removeprefix("seed")): path for path in (tmp_path / ENV / "offline").rglob("*.safetensors")}
        arrays = {seed: logbook.load(folder / f"checkpoint-seed{seed}.safetensors")[0] for seed in seeds}
        return {seed: [row for row in table if row["seed"] == str(seed)] for seed in seeds}, arrays, files

    return get


def test_an_offline_checkpoint_that_is_there_is_kept(cloned, capsys):
    """Of three seeds the middle one lacks its: it alone is trained, and becomes what it would be among others."""
    rows, arrays, files = cloned("--seeds 3")
    before = {seed: path.read_bytes() for seed, path in files.items()}
    files[1].unlink()
    capsys.readouterr()
    again = cloned("--seeds 3")
    assert "for seeds 0, 2\n" in capsys.readouterr().err
    assert {seed: again[2][seed].read_bytes() for seed in (0, 2)} == {seed: before[seed] for seed in (0, 2)} and again[0] == rows
    same((0, [again[1][seed] for seed in range(3)]), (0, [arrays[seed] for seed in range(3)]))
    same((0, [logbook.load(again[2][1])[0]]), (0, [again[1][1]]))
    cloned("--seeds 4")
    assert again[2][0].read_bytes() == before[0]


def test_a_killed_run_trains_on_the_seeds_that_it_trained(cloned, monkeypatch, capsys):
    """Seed 0 had its checkpoint when it began. Another run makes seed 2's meanwhile: that is kept, and one line says so."""
    rows, arrays, files = cloned("--seeds 3")
    other, meta = logbook.load(files[2])
    files[1].unlink(), files[2].unlink()
    save = logbook.Logbook._save

    def killed(self, phase, n, carry):
        save(self, phase, n, carry)
        if n == 1:
            self._file.close()
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(logbook.Logbook, "_save", killed)
        cloned("--seeds 3")
    logbook.save(files[2], {k: x + 1 for k, x in other.items()}, meta | {"rows": meta["rows"][:-1]})
    capsys.readouterr()
    again = cloned("--seeds 3 --resume")
    err = capsys.readouterr().err
    assert "after offline block 1" in err and err.count("made by another run meanwhile") == 1 and str(files[2]) in err
    assert again[0] == rows and files[1].exists()
    same((0, [again[1][seed] for seed in range(3)]), (0, [arrays[0], arrays[1], {k: x + 1 for k, x in other.items()}]))


def test_when_every_seed_diverges_the_run_ends(tmp_path):
    words = "--env SafetyPointRun --env-steps 2560 --num-envs 16 --steps-per-block 16 --updates-per-block 8 --evals 1 --eval-episodes 1 --final-eval-rounds 1 --hidden 8"
    with pytest.raises(SystemExit) as stop:
        words = [*words.split(), "--runs", str(tmp_path), "--actor-lr", "1e30", "--critic-lr", "1e30"]
        logbook.command(sac_lag.main, sac_lag.Args, words=words)
    assert stop.value.code == 1
    folder = folder_of(tmp_path, "sac_lag")
    assert json.loads((folder / "config.json").read_text())["diverged"] == [0]
    assert not list(folder.glob("checkpoint*"))


def test_a_full_disk_stops_the_run_and_keeps_its_rows(place):
    """The files of the process may not grow past 60 kB: one line, exit code 1, whole rows only."""
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
    environment = {"JAX_ENABLE_COMPILATION_CACHE": "false"}
    process = start("sac_lag", place / "full", place, "--checkpoint-seconds 0", environment, preexec_fn=limit)
    _, err = process.communicate(timeout=170)
    lines = [line for line in err.splitlines() if line.strip()]
    assert process.returncode == 1 and len(lines) == 1 and "--resume" in lines[0], err[-2000:]
    content = (folder_of(place / "full", "sac_lag") / "progress.csv").read_bytes()
    assert content.endswith(b"\r\n") and len({line.count(b",") for line in content.splitlines()}) == 1


def test_rows_that_do_not_fit_are_taken_back(tmp_path):
    log = book(tmp_path)
    log.log("online", "train", gradient_steps=1, env_steps=1)
    whole = (log.folder / "progress.csv").read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + 10, hard))
    try:
        with pytest.raises(OSError):
            log.log("online", "train", gradient_steps=2, env_steps=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (log.folder / "progress.csv").read_bytes() == whole


def test_checkpoints_hold_no_code():
    """safetensors, HDF5, CSV and JSON only: what reads files never unpickles."""
    for folder in ("algos", "data", "results"):
        for path in (ROOT / folder).rglob("*.py"):
            text = path.read_text()
            assert "import pickle" not in text and "allow_pickle=True" not in text, path


# ---------------------------------------------------------------- bad input

ALGOS = {m.__name__.rsplit(".", 1)[-1]: m for m in (marvel, cpq, bc_safe, sac_lag, naive_o2o, jsrl, pex, so2, wsrl, cal, bear_lag)}
OFFLINE = [name for name in ALGOS if name != "sac_lag"]
ONLINE = ["marvel", "naive_o2o", "jsrl", "pex", "so2", "wsrl", "cal"]


def cases():
    """(id, algo, words, what the line must name)"""
    for name in ALGOS:
        yield name, "--env SafetyPontRun", ("SafetyPontRun", "SafetyPointRun")
        yield name, "--backend cuda", ("cuda", "mujoco")
        yield name, "--seeds 0", ("--seeds",)
        yield name, "--cost-limit -1", ("--cost-limit",)
        yield name, "--eval nowhere.safetensors", ("nowhere.safetensors",)
        yield name, "--eval .", (".",)
        yield name, "--hidden 32 0", ("--hidden",)
        yield name, "--eval-episodes 0", ("--eval-episodes",)
        yield name, "--nonsense 3", ("--nonsense",)
        yield name, "--seeds many", ("--seeds", "many")
        yield name, "--seed 4294967296", ("--seed", "2147483648")
        yield name, "--seed 2147483640 --seeds 9", ("--seed", "2147483648")
    for name in OFFLINE:
        yield name, "--dataset nowhere.hdf5", ("nowhere.hdf5",)
        yield name, "--offline-steps 750", ("--offline-steps", "500")
        yield name, "--offline-steps -500", ("--offline-steps",)
        yield name, "--cost-limit nan", ("--cost-limit",)
    for name in ONLINE:
        yield name, "--iterations 0", ("--iterations",)
        yield name, "--batch-size -1", ("--batch-size",)
        yield name, "--lagrangian none", ("--lagrangian", "apid")
        yield name, "--offline sarsa", ("--offline", "bc_safe")
        yield name, "--preset paper", ("--preset", "release")
        yield name, "--batch-size 4294967296", ("--batch-size", "2147483648")
    yield "marvel", "--dataset .", (".",)
    yield "marvel", "--dataset broken.hdf5", ("broken.hdf5",)
    yield "marvel", "--dataset cut.hdf5", ("cut.hdf5",)
    yield "marvel", "--dataset nan.hdf5", ("nan.hdf5", "NaN")
    yield "marvel", "--dataset cheetah.hdf5", ("cheetah.hdf5",)
    yield "marvel", "--dataset endless.hdf5", ("endless.hdf5", "episode", "timeouts")
    yield "marvel", "--dataset unsafe.hdf5", ("unsafe.hdf5", "--cloning-weight 0")
    yield "bc_safe", "--dataset unsafe.hdf5", ("unsafe.hdf5", "--cost-limit")
    yield "marvel", "--actor-lr inf", ("--actor-lr", "finite")
    yield "marvel", "--dataset dsrl/NoSuchData", ("NoSuchData",)
    yield "marvel", "--dataset point.hdf5 --cost-limit 0.0 --env SafetyAntRun", ("point.hdf5",)
    yield "marvel", "--vpa-steps 750", ("--vpa-steps",)
    yield "marvel", "--critics old", ("--critics", "fresh")
    yield "cal", "--init-multiplier 0", ("--init-multiplier", "logarithm")
    yield "marvel", "--replay offline", ("--replay", "mixed")
    yield "marvel", "--gain-rates 0.1", ("--gain-rates",)
    yield "sac_lag", "--num-envs 0", ("--num-envs",)
    yield "sac_lag", "--env-steps 10", ("--env-steps",)
    yield "sac_lag", "--actor-lr nan", ("--actor-lr",)
    yield "sac_lag", "--entropy-per-action -inf", ("--entropy-per-action", "finite")
    yield "marvel", "--dataset unsafe.hdf5 --init naive.safetensors", ("unsafe.hdf5", "--no-vpa-gate")
    yield "marvel", "--reward-scale 0", ("--reward-scale",)
    yield "bc_safe", "--data some", ("--data", "frontier")
    yield "jsrl", "--stages 0", ("--stages",)
    yield "pex", "--temperature 0", ("--temperature",)
    yield "so2", "--noise -1", ("--noise",)
    yield "marvel", "--gain-bound 0.5", ("--gain-bound", "at least 1")
    yield "marvel", "--cost-clip 0.5", ("--cost-clip", "at least 1")
    for field in sorted(logbook.AT_MOST_ONE | logbook.BELOW_ONE):
        flag, name = f"--{field.replace('_', '-')}", next(name for name in ALGOS if hasattr(ALGOS[name].Args, field))
        yield (name, f"{flag} 1", (flag, "below 1")) if field in logbook.BELOW_ONE else (name, f"{flag} 1.5", (flag, "at most 1"))


CASES = list(cases())


@pytest.fixture(scope="module")
def bad_files(place):
    (place / "broken.hdf5").write_bytes(b"no HDF5")
    content = (place / "point.hdf5").read_bytes()
    (place / "cut.hdf5").write_bytes(content[: len(content) // 2])
    dataset, _ = dsrl.load(place / "point.hdf5", env=ENV)
    broken = dataset.rewards.copy()
    broken[5] = np.nan
    import h5py

    shutil.copy(place / "point.hdf5", place / "nan.hdf5")
    with h5py.File(place / "nan.hdf5", "r+") as file:
        del file["rewards"]
        file["rewards"] = broken
    shutil.copy(dsrl.default_path("SafetyHalfCheetahVelocity"), place / "cheetah.hdf5")
    few = dataset._replace(**{k: v[:2000] for k, v in dataset._asdict().items() if v is not None})
    dsrl.save(place / "endless.hdf5", few._replace(terminals=0 * few.terminals, timeouts=0 * few.timeouts), {"env": ENV})
    dsrl.save(place / "unsafe.hdf5", few._replace(costs=np.ones_like(few.costs)), {"env": ENV})
    return place


def test_a_task_has_its_own_defaults_and_the_command_line_goes_before():
    parsed = lambda words: logbook.parse(marvel.Args, words.split(), marvel.PRESETS)
    own = finetuning.SUITE["SafetyAntRun"]
    assert own and all(getattr(marvel.Args(), name) != value for name, value in own.items())
    for name in ("SafetyAntRun", "SafetyAntRun0-v0"):
        assert parsed(f"--env {name}") == replace(marvel.Args(env=name), **own)
    assert parsed("") == replace(marvel.Args(), **own)  # AntRun is the default task
    assert parsed("--env SafetyHalfCheetahVelocity") == marvel.Args(env="SafetyHalfCheetahVelocity")
    assert parsed("--actor-lr 0.3 --seeds 2") == replace(marvel.Args(seeds=2), **own | {"actor_lr": 0.3})


@pytest.mark.parametrize("module", [cpq, naive_o2o, jsrl, pex, so2, wsrl], ids=lambda m: m.__name__)
@pytest.mark.parametrize("task", finetuning.SUITE)
@pytest.mark.parametrize("preset", ["suite", "release"])
def test_baselines_start_from_the_same_offline_settings(module, task, preset):
    offline = lambda args: {field: getattr(args, field) for field in cpq.RECIPE}
    parsed = lambda m: offline(logbook.parse(m.Args, ["--env", task, "--preset", preset], m.PRESETS))
    assert parsed(module) == parsed(marvel)


@pytest.mark.parametrize("module", [bc_safe, bear_lag], ids=lambda m: m.__name__)
@pytest.mark.parametrize("task", [*finetuning.SUITE, "SafetyPointRun"])
def test_an_offline_file_has_the_settings_of_the_phase_that_it_names(module, task):
    offline = lambda args: {field: getattr(args, field) for field in [*module.RECIPE, "final_eval_rounds"]}
    alone = logbook.parse(module.Args, ["--env", task], module.PRESETS)
    phase = logbook.parse(marvel.Args, ["--env", task, "--offline", module.__name__.rpartition(".")[2]], marvel.PRESETS)
    assert offline(alone) == offline(phase)


def test_the_release_preset_is_what_the_docstrings_say():
    """Value by value: the tables of marvel.py and cpq.py against the arguments that --preset release resolves to."""
    words = ["--preset", "release", "--env", "bullet/SafetyCarRun"]
    args = logbook.parse(marvel.Args, words, marvel.PRESETS)
    written = {
        "vpa_entropy": "batch_mean", "vpa_steps": 20_000, "vpa_batch_size": 64, "tau": 0.005, "multiplier_updates": 20,
        "gain_rule": "release", "max_multiplier": float("inf"), "reserve": 0.0, "anchor_weight": 0.0, "actor_warmup": 0, "init_multiplier": 0.0,
        "updates_per_iter": 20, "batch_size": 64, "actor_schedule": "constant", "actor_critics": "target", "symlog": False,
        "layer_norm": False, "hidden": (256, 256), "privileged_critic": False, "odometer": False, "termination_cost": 0.0, "eval_policy": "mean",
        "ood_gradient": False, "ood_states": 0, "ood_quantile": 0.0, "one_sided_penalty": False, "clip_cost_target": False,
        "cloning_weight": 0.0, "vae_hidden": (400, 400), "offline_steps": 100_000, "offline_batch_size": 512,
        "offline_actor_lr": 1e-4, "offline_actor_schedule": "constant", "lagrangian": "apid", "vpa_alpha_reward": 0.0,
        "vpa_alpha_cost": 0.0, "vpa_gate": False, "gate_quantile": 0.0, "reward_scale": 0.1, "cost_clip": float("inf"), "integral_fall": 1.0,
        "kp": 5e-6, "ki": 5e-6, "kd": 5e-6, "pid_decay": 0.9, "pid_delay": 10, "gain_rates": (0.05, 0.05, 0.05), "vpa_lr": 5e-3, "vpa_cost_lr": 8e-3,
        # the release's row of this task
        "actor_lr": 5e-5, "critic_lr": 5e-3, "cost_critic_lr": 8e-3, "entropy_weight": 5e-3, "iterations": 100,
    }  # fmt: skip
    assert {name: getattr(args, name) for name in written} == written
    text = marvel.__doc__ + cpq.__doc__
    for name in written.keys() - {
        "offline_batch_size",
        "lagrangian",
        "vpa_alpha_reward",
        "vpa_alpha_cost",
        "actor_lr",
        "critic_lr",
        "entropy_weight",
        "batch_size",
    }:
        flag = name.replace("_", "-")
        assert f"--{flag}" in text or f"--no-{flag}" in text, name
    assert logbook.parse(marvel.Args, [*words, "--reserve", "0.2"], marvel.PRESETS).reserve == 0.2


def test_an_id_of_bullet_has_the_settings_of_its_task():
    parsed = lambda name: logbook.parse(marvel.Args, ["--preset", "release", "--env", name], marvel.PRESETS)
    assert parsed("bullet/SafetyCarCircle-v0") == replace(parsed("bullet/SafetyCarCircle"), env="bullet/SafetyCarCircle-v0")
    assert parsed("bullet/SafetyCarCircle").actor_lr == 5e-4


def test_a_replayed_checkpoint_brings_task_and_limit(tmp_path):
    """Whatever the defaults of the script are; the command line goes before."""
    path = tmp_path / "checkpoint-seed0.safetensors"
    checkpoint.save(path, {"actor/x": np.zeros(1)}, {"env": "SafetyCarRun", "config": {"cost_limit": 40.0, "odometer": True}})
    parsed = lambda module, *words: logbook.parse(module.Args, ["--eval", str(path), *words], getattr(module, "PRESETS", None))
    for module in (marvel, sac_lag):
        assert (parsed(module).env, parsed(module).cost_limit) == ("SafetyCarRun", 40.0)
        assert parsed(module, "--cost-limit", "20").cost_limit == 20.0
    for name in ("SafetyCarRun", "SafetyCarRun0-v0"):
        assert training.replayed_env(parsed(sac_lag, "--env", name), checkpoint.load(path)[1]).name == "SafetyCarRun"
    with pytest.raises(logbook.BadInput, match="its policy is of SafetyCarRun: leave --env out"):
        training.replayed_env(parsed(marvel, "--env", "SafetyAntRun"), checkpoint.load(path)[1])


def test_cals_numbers_are_per_raw_reward():
    """Whatever the reward scale, of whichever environment: w / reward_scale is lambda + 10 (E Qc - q_d), per raw reward."""
    parsed = lambda *words: logbook.parse(cal.Args, ["--env", *words], cal.PRESETS)
    for words in (["SafetyPointRun"], ["SafetyPointCircle1"], ["SafetyPointGoal1-v0"], ["SafetyPointRun", "--preset", "release"]):
        assert (parsed(*words).rectification, parsed(*words).init_multiplier) == (10.0, 0.7)
    for scale in (0.1, 1.0, 5.0):
        args = cal.Args(reward_scale=scale)
        assert float(cal.rectified(0.7 * scale, 3.5, 3.0, args)) / scale == pytest.approx(5.7)
    assert parsed("SafetyAntRun").iterations == finetuning.SUITE["SafetyAntRun"]["iterations"]
    assert parsed("SafetyPointCircle1", "--rectification", "0").rectification == 0


def test_what_the_package_s_own_environment_lacks_is_not_recorded_as_seen(tmp_path):
    """It has neither x nor an odometer: its networks are others, and so are its checkpoints."""
    args = naive_o2o.Args(env=ENV, backend="safety-gymnasium", runs=tmp_path, offline="cpq")
    run = training.prepare("naive_o2o", args)
    assert not run.args.odometer and not run.args.privileged_critic and not run.log.config["config"]["odometer"]
    assert run.critic_obs_size == run.env.obs_size == envs.make(ENV).obs_size


def test_the_gate_is_not_calibrated_on_what_breaks_the_limit(bad_files, tmp_path, capsys):
    args = cpq.Args(env=ENV, runs=tmp_path, dataset=bad_files / "unsafe.hdf5", cloning_weight=0.0)
    assert training.prepare("cpq", args, cloned=cpq.gated).args.gate_quantile == 0
    assert "the gate stays at q_thres" in capsys.readouterr().err
    for data, kept in (("all", 0.0), ("best", 0.9)):
        args = marvel.Args(env=ENV, runs=tmp_path, offline="bc_safe", data=data)
        assert finetuning.prepare("marvel", args, dataset=True).args.gate_quantile == kept


def test_arguments_of_an_offline_algorithm_that_does_not_run_are_named(tmp_path, capsys):
    """And what the run resolves is what config.json says: BEAR-Lag leaves no gate to keep."""
    prepared = lambda *words: finetuning.prepare("marvel", logbook.parse(marvel.Args, [*words, "--runs", str(tmp_path)], marvel.PRESETS))
    run = prepared("--env", "SafetyPointRun0-v0", "--offline", "bear_lag", "--data", "best", "--cloning-weight", "7")
    assert "note: no effect with --offline bear_lag: --cloning-weight 7.0 --data best\n" in capsys.readouterr().err
    assert run.args.vpa_gate is run.log.config["config"]["vpa_gate"] is False and run.cloned is None
    for words in ("--env SafetyAntRun", "--preset release --env SafetyPointRun", "--env SafetyCarRun --offline bc_safe --data best"):
        assert prepared(*words.split()).args.vpa_gate is ("release" not in words)
        assert "no effect" not in capsys.readouterr().err


def test_critics_that_cannot_see_x_are_not_recorded_as_seeing_it(tmp_path, capsys):
    provided = collect.provided(ENV)
    with h5py.File(provided) as old, h5py.File(tmp_path / "blind.hdf5", "w") as new:
        for name in old:
            if "privileged" not in name:
                old.copy(name, new)
        new.attrs.update(old.attrs)
    run = training.prepare("naive_o2o", naive_o2o.Args(env=ENV, runs=tmp_path, offline="cpq", dataset=tmp_path / "blind.hdf5"))
    assert not run.args.privileged_critic and run.critic_obs_size == run.env.obs_size
    assert "note: the dataset lacks x" in capsys.readouterr().err


def test_the_release_preset_leaves_a_baseline_what_it_is():
    parsed = lambda m: logbook.parse(m.Args, ["--preset", "release", "--env", "bullet/SafetyCarRun"], m.PRESETS)
    assert parsed(wsrl).actor_warmup == wsrl.Args.actor_warmup > 0 and parsed(wsrl).updates_per_iter == parsed(naive_o2o).updates_per_iter
    assert parsed(so2).updates_per_iter == 3 * parsed(naive_o2o).updates_per_iter > 0


@pytest.mark.parametrize("algo, words, texts", CASES, ids=[f"{algo} {words}" for algo, words, _ in CASES])
def test_bad_input(algo, words, texts, bad_files, monkeypatch, capsys):
    monkeypatch.chdir(bad_files)
    module, runs = ALGOS[algo], bad_files / "refused"
    with pytest.raises(SystemExit) as stop:
        logbook.command(module.main, module.Args, words=["--env", ENV, "--runs", str(runs), *words.split()])
    err = capsys.readouterr().err
    assert stop.value.code == 2 and len(err.strip().splitlines()) == 1, err
    assert err.startswith("error: ") and all(text in err for text in texts), err
    assert not runs.exists()  # refused before anything was written


def test_numbers_at_their_bound_are_taken():
    for module in ALGOS.values():
        logbook.check_numbers(module.Args(**dict.fromkeys(logbook.AT_MOST_ONE & module.Args.__dataclass_fields__.keys(), 1.0)))


# ---------------------------------------------------------------- odd input that is met


def tiny(algo, place, tmp_path, words):
    """The rows of a tiny run, and what it said."""
    process = start(algo, tmp_path / "runs", place, words)
    _, err = process.communicate(timeout=280)
    assert process.returncode == 0, err[-2000:]
    with open(folder_of(tmp_path / "runs", algo) / "progress.csv", newline="") as file:
        return list(csv.DictReader(file)), err


@pytest.mark.parametrize(
    ("algo", "offline"),
    [("naive_o2o", "cpq"), *(pytest.param("marvel", offline, marks=pytest.mark.slow) for offline in ("cpq", "bear_lag"))],
)
def test_without_a_constraint(place, tmp_path, algo, offline):
    rows, _ = tiny(algo, place, tmp_path, f"--cost-limit inf --offline {offline}")
    assert rows[-1]["phase"] == "online" and rows[-1]["cost_limit"] == "inf"
    assert {float(row["multiplier"]) for row in rows if row["phase"] == "online"} == {0.0}
    assert all(float(row["q"]) == float(row["q"]) for row in rows if row["event"] == "train")
    assert (folder_of(tmp_path / "runs", algo) / "curves.png").exists()


def test_a_dataset_without_a_safe_trajectory_trains_without_cloning(bad_files, tmp_path):
    rows, _ = tiny("cpq", bad_files, tmp_path, "--dataset unsafe.hdf5 --cloning-weight 0")
    assert rows[-1]["gradient_steps"] == "500"


def test_time_outs_stored_as_terminals_are_named(bad_files, tmp_path, capsys):
    dataset, _ = dsrl.load(bad_files / "point.hdf5")
    path = tmp_path / "t.hdf5"
    dsrl.save(path, dataset._replace(terminals=dataset.timeouts, timeouts=0 * dataset.timeouts), {"env": ENV})
    args = cpq.Args(env=ENV, dataset=str(path))
    _, stored, _ = training.load_dataset(args, envs.make(ENV, memory=True))
    assert sum("--terminals-are-timeouts" in line for line in capsys.readouterr().err.splitlines()) == 1
    _, read, _ = training.load_dataset(replace(args, terminals_are_timeouts=True), envs.make(ENV, memory=True))
    assert "--terminals-are-timeouts" not in capsys.readouterr().err
    np.testing.assert_array_equal(read.timeouts, dataset.timeouts)
    assert stored.terminals.any() and not read.terminals.any()
    dsrl.check_episodes(read, path, 500)
    dsrl.check_episodes(stored, path, 499)  # another horizon: these are no time-outs
    assert capsys.readouterr().err == ""
