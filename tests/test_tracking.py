"""--track: what trackers get is progress.csv, each point once, also after kills; what fails costs a line. Real trackers where installed."""

import csv
import json
import os
import signal
import struct
import subprocess
import sys
import types
from importlib.machinery import ModuleSpec
from pathlib import Path

import jax.numpy as jnp
import pytest

from algos import logbook, sac_lag, tracking

ROOT = Path(__file__).resolve().parents[1]
CONFIG = {"cost_limit": 20.0, "eval_policy": "sample", "resume": False, "checkpoint_seconds": 0.0, "track": "fake"}
BLOCKS = 5


def train(runs, stop_at=None, stop=None, **changes):
    """A run of two seeds and two phases that trains nothing: rows of two events, two of them at one gradient step in two phases."""
    log = logbook.Logbook("algo", "task", {**CONFIG, "runs": runs, **changes}, [3, 4])

    def block(phase, before, n, carry):
        (x,) = carry
        if (phase, n) == stop_at:
            stop(log)
        steps = {"gradient_steps": before + 10 * n, "env_steps": 100 * n if phase == "online" else 0}
        value = x["a"] * jnp.array([1.0, 10.0])
        if n == 0:
            log.log(phase, "rank", **steps, rank_q_policy=value)
        else:
            log.log(phase, "train", **steps, episodes=1, cost=value, q=jnp.array([jnp.nan, 1.5]))
        if n in (2, BLOCKS):
            log.log(phase, "eval", **steps, episodes=20, cost=value, **{"return": -value})
        return ({"a": x["a"] + 1.0},)

    for phase, before in (("offline", 0), ("online", 10 * BLOCKS)):
        log.run(phase, BLOCKS, ({"a": jnp.zeros(2)},), lambda n, carry, p=phase, b=before: block(p, b, n, carry))
    log.close()
    return log.folder


def expected(folder):
    """{seed: {gradient step: scalars}} of progress.csv, worked out on its own."""
    points = {}
    with open(folder / "progress.csv", newline="") as file:
        for row in csv.DictReader(file):
            point = points.setdefault(int(row["seed"]), {}).setdefault(int(row["gradient_steps"]), {})
            for column in ("episodes", "return", "cost", "q", "rank_q_policy"):
                if row[column]:
                    point[f"{row['event']}/{column}"] = float(row[column])
            point["env_steps"] = float(row["env_steps"])
    assert {len(of_seed) for of_seed in points.values()} == {2 * BLOCKS + 1}
    return points


def interrupt(log):
    log._file.close()
    raise KeyboardInterrupt


# ---------------------------------------------------------------- a tracker that keeps what it gets


@pytest.fixture
def server(monkeypatch):
    """{run: [(step, scalars)]} of a tracker that outlives the processes, and "pictures"."""
    kept = {"pictures": []}

    class Fake:
        def __init__(self, about):
            self.name, self.where, self.about = about.name, "nowhere", about
            points = kept.setdefault(about.name, [])
            self.first = points[-1][0] + 1 if points else 0

        def log(self, points):
            kept[self.name] += points

        def picture(self, path, step):
            assert path.read_bytes()[:4] == b"\x89PNG"
            kept["pictures"].append((self.name, step))

        def finish(self):
            kept.setdefault("finished", []).append(self.name)

    monkeypatch.setitem(tracking.TRACKERS, "fake", Fake)
    return kept


def once(server, folder):
    """Each seed's points are those of progress.csv, once and in order."""
    for seed, points in expected(folder).items():
        found = server[f"task-algo-{folder.name}-seed{seed}"]
        assert found == sorted(points.items())


def test_every_row_is_sent_once(tmp_path, server):
    folder = train(tmp_path)
    once(server, folder)
    ours = [f"task-algo-{folder.name}-seed{seed}" for seed in (3, 4)]
    assert server["pictures"] == [(name, 20 * BLOCKS) for name in ours] and server["finished"] == ours
    point = dict(server[ours[1]])[20]  # train and eval rows of one gradient step
    assert point == {
        "env_steps": 0,
        "train/episodes": 1,
        "train/cost": 20,
        "train/q": 1.5,
        "eval/episodes": 20,
        "eval/cost": 20,
        "eval/return": -20,
    }
    assert "train/q" not in dict(server[ours[0]])[20]  # not finite
    assert dict(server[ours[0]])[10 * BLOCKS].keys() == {
        "env_steps",
        "train/episodes",
        "train/cost",
        "eval/episodes",
        "eval/cost",
        "eval/return",
        "rank/rank_q_policy",
    }


@pytest.mark.parametrize("every", [0.0, 3600.0])
@pytest.mark.parametrize("stop_at", [("offline", 0), ("offline", 2), ("online", 0), ("online", 3)])
def test_nothing_is_doubled_after_a_kill(stop_at, every, tmp_path, server):
    """Whether states are saved after each block or at the ends of phases: only what a state holds was sent."""
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, stop_at, interrupt, checkpoint_seconds=every)
    before = {name: list(points) for name, points in server.items()}
    (folder,) = (tmp_path / "task" / "algo").iterdir()
    state = folder / logbook.RESUME
    saved = logbook.load(state)[1]["end"] if state.exists() else 0
    held = (folder / "progress.csv").read_bytes()[:saved].decode().splitlines()[1:]
    steps = {int(line.split(",")[5]) for line in held}
    assert {step for name in before if name.startswith("task") for step, _ in before[name]} == steps - {max(steps, default=0)}
    assert train(tmp_path, resume=True, checkpoint_seconds=every) == folder
    once(server, folder)


def test_nothing_is_doubled_when_the_newest_state_is_damaged(tmp_path, server, capsys):
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, ("online", 4), interrupt)
    (folder,) = (tmp_path / "task" / "algo").iterdir()
    (folder / logbook.RESUME).write_bytes(b"torn")
    train(tmp_path, resume=True)
    assert "damaged" in capsys.readouterr().err
    once(server, folder)


def test_the_tracker_is_no_part_of_the_configuration(tmp_path, server):
    """A run that was begun without one goes on with one, which gets all rows."""
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, ("online", 2), interrupt, track="none")
    folder = train(tmp_path, resume=True)
    once(server, folder)
    assert "track" not in json.loads((folder / "config.json").read_text())["config"]


@pytest.mark.parametrize("method", ["__init__", "log", "picture", "finish"])
def test_a_tracker_that_fails_costs_one_line(method, tmp_path, server, monkeypatch, capsys):
    def fail(*_):
        raise ConnectionError("the network\nis gone")

    monkeypatch.setattr(tracking.TRACKERS["fake"], method, fail)
    folder = train(tmp_path)
    lines = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert (
        len(lines) == 1 and "fake failed" in lines[0] and "the network is gone" in lines[0] and f"algos.tracking fake {folder}" in lines[0]
    )
    assert "seconds" in json.loads((folder / "config.json").read_text())
    expected(folder)  # all rows
    monkeypatch.undo()


def test_a_seed_that_diverged_is_named():
    row = {"event": "diverged", "seed": 0, "gradient_steps": "10", "env_steps": "5", "cost_limit": 20.0, "commit": "abc", "phase": "online"}
    assert tracking.scalars(row) == {"env_steps": 5.0, "diverged": 1.0}


def test_rows_are_sent_later(tmp_path, server, monkeypatch, capsys):
    folder = train(tmp_path, track="none")
    send = lambda *words: tracking.main(["fake", *map(str, words)])
    monkeypatch.setattr(tracking.TRACKERS["fake"], "package", "json", raising=False)
    for _ in range(2):  # a second time adds nothing
        with pytest.raises(SystemExit) as stop:
            send(folder)
        assert stop.value.code == 0
        once(server, folder)
    with pytest.raises(SystemExit) as stop:
        send(tmp_path)
    assert stop.value.code == 2 and "name run folders" in capsys.readouterr().err
    with open(folder / "progress.csv", "rb") as file:
        tracking.fcntl.flock(file, tracking.fcntl.LOCK_EX)
        with pytest.raises(SystemExit) as stop:
            send(folder)
        assert stop.value.code == 2 and "in use by a run" in capsys.readouterr().err


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize("name, package", [("tensorboard", "tensorboardX"), ("wandb", "wandb"), ("trackio", "trackio")])
def test_a_missing_package_is_one_line_before_anything_is_written(name, package, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tracking.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stop:
        logbook.command(sac_lag.main, sac_lag.Args, words=["--env", "SafetyPointRun", "--runs", str(tmp_path / "runs"), "--track", name])
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err == f"error: --track {name}: needs a package that is not installed: pip install {package}\n"
    assert not (tmp_path / "runs").exists()


# ---------------------------------------------------------------- Weights & Biases, without its server


@pytest.fixture
def wandb(monkeypatch):
    """A stand-in for the package in online mode: it keeps histories by id, merges one step's calls, refuses steps that go back."""
    histories = {}

    class Run:
        offline, url = False, "https://example.org/run"

        def __init__(self, id, **options):
            assert options["resume"] == "allow" and options["reinit"] == "create_new" and options["dir"].is_dir()
            self.history = histories.setdefault(id, {})
            self.starting_step = max(self.history, default=-1) + 1

        def log(self, values, step):
            assert step >= max(self.history, default=0)
            self.history.setdefault(step, {}).update(values)

        def finish(self):
            pass

    class UsageError(Exception):
        pass

    module = types.ModuleType("wandb")
    module.__spec__ = ModuleSpec("wandb", None)
    module.init, module.Settings, module.Image = Run, dict, lambda path: path
    module.errors = types.SimpleNamespace(UsageError=UsageError)
    module.settings = types.SimpleNamespace(mode="online")
    module.setup = lambda: module
    module.histories = histories
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_wandb_goes_on_after_the_last_step_that_its_server_has(tmp_path, wandb):
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, ("online", 3), interrupt, track="wandb")
    folder = train(tmp_path, resume=True, track="wandb")
    for seed, points in expected(folder).items():
        history = wandb.histories[f"task-algo-{folder.name}-seed{seed}"]
        assert history[20 * BLOCKS].pop("curves") == str(folder / "curves.png")
        assert history == points


def test_wandb_without_a_key_is_one_line_before_anything_is_written(tmp_path, wandb, monkeypatch, capsys):
    def login(verify):
        raise wandb.errors.UsageError("No API key configured.")

    monkeypatch.setattr(wandb, "login", login, raising=False)
    words = ["--env", "SafetyPointRun", "--runs", str(tmp_path / "runs"), "--track", "wandb"]
    with pytest.raises(SystemExit) as stop:
        logbook.command(sac_lag.main, sac_lag.Args, words=words)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1 and "`wandb login`" in err and "WANDB_MODE=offline" in err
    assert not (tmp_path / "runs").exists()
    wandb.settings.mode = "offline"  # needs no key
    tracking.check("wandb")


# ---------------------------------------------------------------- the real ones


def from_tensorboard(folder, seed):
    """[(step, scalars)] and the pictures' tags of a seed's only event file: TFRecords of Event."""
    event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2")
    (path,) = (folder / "tensorboard" / f"seed{seed}").iterdir()
    content, at, points, pictures = path.read_bytes(), 0, [], []
    while at < len(content):
        (length,) = struct.unpack_from("<Q", content, at)
        event = event_pb2.Event.FromString(content[at + 12 : at + 12 + length])
        at += length + 16
        values = {value.tag: value.simple_value for value in event.summary.value if value.WhichOneof("value") == "simple_value"}
        points += [(event.step, values)] if values else []
        pictures += [value.image.encoded_image_string for value in event.summary.value if value.HasField("image")]
    return points, pictures


def from_wandb(folder, seed):
    """The same from the only offline file of a seed: LevelDB's log format, of Record."""
    internal_pb2 = pytest.importorskip("wandb.proto.wandb_internal_pb2")
    (path,) = (folder / "wandb").glob(f"offline-run-*-seed{seed}/*.wandb")
    content, at, record, points, pictures = path.read_bytes(), 7, b"", [], []
    while at + 7 <= len(content):
        if 32768 - at % 32768 < 7:  # the end of a block is empty
            at += 32768 - at % 32768
        length, kind = struct.unpack_from("<HB", content, at + 4)
        record += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or its last part
            found = internal_pb2.Record.FromString(record)
            record = b""
            if found.HasField("history"):
                values = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in found.history.item}
                pictures += [(path.parent / "files" / values["curves/path"]).read_bytes()] if "curves/path" in values else []
                kept = {k: v for k, v in values.items() if not k.startswith(("_", "curves/"))}  # W&B's clocks, and what the picture is
                points.append((found.history.step.num, kept))
    return points, pictures


def from_trackio(folder, seed):
    """The same from Trackio's database."""
    program = "import json, sys; from trackio.sqlite_storage import SQLiteStorage as s; print(json.dumps(s.get_logs(*sys.argv[1:])))"
    words = [sys.executable, "-c", program, tracking.PROJECT, f"task-algo-{folder.name}-seed{seed}"]
    logs = json.loads(subprocess.run(words, capture_output=True, text=True, check=True, cwd=ROOT).stdout.splitlines()[-1])
    pictures = [
        next(Path(os.environ["TRACKIO_DIR"]).rglob(Path(entry["curves"]["file_path"]).name)).read_bytes()
        for entry in logs
        if "curves" in entry
    ]
    return [
        (entry["step"], {k: v for k, v in entry.items() if k not in ("step", "timestamp")}) for entry in logs if "curves" not in entry
    ], pictures


REAL = {"tensorboard": ("tensorboardX", from_tensorboard), "wandb": ("wandb", from_wandb), "trackio": ("trackio", from_trackio)}


def train_in_a_process(runs, track, stop_at=None, **changes):
    """`train` as a program of its own, which kills itself at `stop_at`."""
    kill = "lambda log: os.kill(os.getpid(), signal.SIGKILL)"
    program = f"import os, signal; from pathlib import Path; from tests.test_tracking import train; train(Path({str(runs)!r}), {stop_at}, {kill}, track={track!r}, **{changes})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == (0 if stop_at is None else -signal.SIGKILL), done.stderr[-3000:]
    return done.stderr


@pytest.mark.parametrize("track", REAL)
def test_a_real_tracker_holds_progress_csv_after_two_kills(track, tmp_path, monkeypatch):
    package, read = REAL[track]
    pytest.importorskip(package, reason=f"pip install {package}")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    train_in_a_process(tmp_path / "runs", track, ("offline", 3))
    train_in_a_process(tmp_path / "runs", track, ("online", 3), resume=True)
    err = train_in_a_process(tmp_path / "runs", track, resume=True)
    assert "warning" not in err and f"{track}: " in err
    (folder,) = (tmp_path / "runs" / "task" / "algo").iterdir()
    for seed, points in expected(folder).items():
        found, pictures = read(folder, seed)
        assert [(step, pytest.approx(values)) for step, values in found if values] == sorted(points.items())
        assert pictures == [(folder / "curves.png").read_bytes()]


def test_an_event_file_on_a_full_disk_costs_one_line(tmp_path):
    """The files of the process may not grow past 8 kB: training ends, and does not wait for the writer."""
    pytest.importorskip("tensorboardX", reason="pip install tensorboardX")
    config = {"algo": "algo", "env": "task", "config": {}}
    program = (
        "import resource; from pathlib import Path; from algos import tracking; resource.setrlimit(resource.RLIMIT_FSIZE, (8000, 8000));"
        f"tracker = tracking.Tracker('tensorboard', Path({str(tmp_path)!r}), {config}, [0]);"
        "rows = [dict(seed=0, event='train', gradient_steps=n, env_steps=0, q=1.0) for n in range(1000)];"
        "[tracker.send(rows[:n]) for n in (500, 1000)]; tracker.finish(); print(tracker.failed)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0 and done.stdout == "True\n" and done.stderr.count("warning: tensorboard failed") == 1, done.stderr
