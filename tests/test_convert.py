"""data/convert.py and data/inspect.py: what they read, what they refuse and how they say so, and data of another environment."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import jax
import numpy as np
import pytest

import envs
from data import convert, dsrl, inspect, report

ROOT = Path(__file__).resolve().parents[1]
N, OBS, ACTION = 30, 3, 2


def d4rl(n=N):
    """Columns as D4RL names them: an episode that terminates in row 9, one that is cut off in row 19, one without an end."""
    rng = np.random.default_rng(0)
    terminals, timeouts = np.zeros(n, bool), np.zeros(n, bool)
    terminals[9] = timeouts[19] = True
    columns = {"observations": rng.normal(size=(n, OBS)), "actions": rng.uniform(-0.9, 0.9, (n, ACTION)), "rewards": rng.normal(size=n)}
    columns = {key: value.astype(np.float32) for key, value in columns.items()}
    return columns | {"infos/cost": rng.integers(0, 2, n).astype(np.float32), "terminals": terminals, "timeouts": timeouts}


def table(columns, flags=("terminal", "timeout")):
    """The same as columns of a CSV file."""
    named = {"reward": columns["rewards"], "cost": columns["infos/cost"]}
    named |= {f"obs_{i}": x for i, x in enumerate(columns["observations"].T)} | {
        f"action_{i}": x for i, x in enumerate(columns["actions"].T)
    }
    named |= {f"next_obs_{i}": x for i, x in enumerate(columns.get("next_observations", np.zeros((0, 0))).T)}
    return named | {name: columns[name + "s"] for name in flags if name + "s" in columns}


def write(path, columns):
    """Writes columns in the format of the path's ending."""
    if path.suffix == ".hdf5":
        with h5py.File(path, "w") as file:
            for key, value in columns.items():
                file[key] = value
    elif path.suffix == ".npz":
        np.savez(path, **columns)
    else:
        with open(path, "w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(columns)
            rows.writerows(zip(*columns.values()))
    return path


def run(module, *words):
    """Runs a command in this process: its output, or the error line."""
    try:
        module.main([str(word) for word in words])
    except dsrl.DatasetError as e:
        assert len(str(e).splitlines()) == 1
        return str(e)


def converted(tmp_path, columns, *words, ending=".hdf5", capsys=None):
    source, out = write(tmp_path / f"in{ending}", columns), tmp_path / "out" / "made.hdf5"
    assert run(convert, source, out, *words) is None
    assert sorted(os.listdir(out.parent)) == ["made.hdf5", "made.png"]
    assert (out.with_suffix(".png")).read_bytes().startswith(b"\x89PNG")
    return dsrl.load(out)


# ---------------------------------------------------------------- formats


@pytest.mark.parametrize("ending", [".hdf5", ".npz", ".csv"])
def test_next_observations_are_made_from_the_following_rows(tmp_path, ending, capsys):
    columns = d4rl()
    made, about = converted(tmp_path, table(columns) if ending == ".csv" else columns, ending=ending)
    kept = [*range(19), *range(20, 29)]  # the cut off episode's last row and the file's last row have no successor
    following = np.array(kept) + 1
    following[9] = 9  # the terminal row's own
    for key, name in (("observations", "observations"), ("actions", "actions"), ("rewards", "rewards"), ("costs", "infos/cost")):
        np.testing.assert_allclose(getattr(made, key), columns[name][kept], rtol=1e-6)
    np.testing.assert_allclose(made.next_observations, columns["observations"][following], rtol=1e-6)
    assert np.flatnonzero(made.terminals).tolist() == [9] and np.flatnonzero(made.timeouts).tolist() == [18]
    assert dsrl.episodes(made).complete.tolist() == [True, True, False]
    assert about["source"] == f"in{ending}"
    out, err = capsys.readouterr()
    assert "2 rows without one dropped" in out and ("costs from cost" in out or "costs from infos/cost" in out)
    assert "1 end in a terminal state, 1 by time-out, 1 not at all" in out and "safe (cost at most 20): 100%" in out


@pytest.mark.parametrize("ending", [".hdf5", ".npz", ".csv"])
def test_next_observations_that_are_there_are_kept(tmp_path, ending):
    columns = d4rl() | {"next_observations": np.random.default_rng(1).normal(size=(N, OBS)).astype(np.float32)}
    made, _ = converted(tmp_path, table(columns) if ending == ".csv" else columns, ending=ending)
    assert len(made.rewards) == N
    np.testing.assert_allclose(made.next_observations, columns["next_observations"], rtol=1e-6)


def test_a_file_in_dsrls_format_stays_what_it_is(tmp_path):
    dataset, about = dsrl.load(ROOT / "data" / "SafetyPointRun.hdf5")
    part = dsrl.Dataset._make(x[:2000] for x in dataset)  # with its privileged columns
    dsrl.save(tmp_path / "in.hdf5", part, about)
    out = tmp_path / "out.hdf5"
    assert run(convert, tmp_path / "in.hdf5", out) is None
    again, attributes = dsrl.load(out)
    for before, after in zip(part, again, strict=True):
        np.testing.assert_array_equal(before, after)
    assert attributes["env"] == "SafetyPointRun" and attributes["policies"] == about["policies"]


def test_an_episode_of_one_row_that_is_cut_off_disappears(tmp_path):
    columns = d4rl()
    columns["timeouts"][10] = True  # the row after the terminal one
    made, _ = converted(tmp_path, columns)
    assert len(made.rewards) == N - 3
    assert not (made.terminals & made.timeouts).any() and dsrl.episodes(made).lengths.tolist() == [10, 8, 9]


def test_names_can_be_given_and_put_together(tmp_path):
    columns = table(d4rl())
    columns = {"x": columns["obs_0"], "y": columns["obs_2"], "hazard": columns["cost"], "cost": 0 * columns["cost"], "fall": columns["cost"],
               "gain": columns["reward"], "u_0": columns["action_0"], "u_1": columns["action_1"], "end": columns["terminal"], "cut": columns["timeout"]}  # fmt: skip
    words = "--obs x y --cost hazard fall --reward gain --action u --terminal end --timeout cut".split()
    made, about = converted(tmp_path, columns, *words, ending=".csv")
    assert made.observations.shape[1] == 2 and made.actions.shape[1] == 2
    assert set(np.unique(made.costs)) == {0, 2}  # both costs added up
    assert '"cost": ["hazard", "fall"]' in about["converted_with"]


@pytest.mark.parametrize("kind, size", [(bool, 1), (np.uint8, 200)])
def test_costs_of_small_types_are_added_as_numbers(tmp_path, kind, size):
    """Two flags add up to 2, not to one flag, and two bytes of 200 to 400."""
    cost = np.full(N, size).astype(kind)
    columns = {k: v for k, v in d4rl().items() if k != "infos/cost"} | {"costs_a": cost, "costs_b": cost}
    made, _ = converted(tmp_path, columns, "--cost", "costs_a", "costs_b", ending=".npz")
    assert set(np.unique(made.costs)) == {2 * size}


def test_a_file_of_another_task_is_told(tmp_path, capsys):
    dataset, _ = dsrl.load(dsrl.default_path("SafetyPointCircle1"))
    dsrl.save(tmp_path / "a.hdf5", dsrl.Dataset._make(None if x is None else x[:1000] for x in dataset), {"env": "SafetyPointCircle1"})
    said = "says that it is of SafetyPointCircle1, not of SafetyPointCircle2"
    for module, words in ((inspect, ()), (convert, (tmp_path / "b.hdf5",))):
        assert run(module, tmp_path / "a.hdf5", *words, "--env", "SafetyPointCircle2") is None
        assert said in capsys.readouterr().err
    assert run(inspect, tmp_path / "a.hdf5", "--env", "SafetyPointCircle1") is None and said not in capsys.readouterr().err


def test_a_table_as_pandas_writes_it(tmp_path):
    columns = table(d4rl())
    words = {name: np.where(columns[name], "True", "False") for name in ("terminal", "timeout")}
    with_index = {"": np.arange(N), "note": ["a, b"] * N} | columns | words
    made, _ = converted(tmp_path, with_index, ending=".csv")
    assert made.terminals.sum() == made.timeouts.sum() == 1


def test_ten_columns_keep_their_order(tmp_path):
    columns = table(d4rl() | {"observations": np.tile(np.arange(12.0), (N, 1))})
    made, _ = converted(tmp_path, dict(reversed(columns.items())), ending=".csv")
    np.testing.assert_array_equal(made.observations[0], np.arange(12))


# ---------------------------------------------------------------- ends of episodes, actions


def test_a_horizon_marks_and_cuts(tmp_path, capsys):
    columns = d4rl() | {"next_observations": d4rl()["observations"]}
    del columns["terminals"], columns["timeouts"]
    made, _ = converted(tmp_path, columns, "--horizon", 10)
    assert np.flatnonzero(made.timeouts).tolist() == [9, 19, 29] and not made.terminals.any()
    assert "3 time-outs set, every 10 steps within an episode" in capsys.readouterr().out
    columns["terminals"] = np.arange(N) == 13
    made, _ = converted(tmp_path, columns, "--horizon", 8)  # episodes of 14 and of 16 rows
    assert np.flatnonzero(made.timeouts).tolist() == [7, 21, 29] and np.flatnonzero(made.terminals).tolist() == [13]
    assert dsrl.episodes(made).lengths.tolist() == [8, 6, 8, 8]


def test_done_needs_to_be_told_apart(tmp_path):
    columns = d4rl() | {"next_observations": d4rl()["observations"], "dones": np.isin(np.arange(N), (9, 16, 29))}
    ends = {key: columns.pop(key) for key in ("terminals", "timeouts")}
    source = write(tmp_path / "done.npz", columns)
    message = run(convert, source, tmp_path / "out.hdf5")
    for mend in ("--horizon N", "--terminals-are-timeouts", "--terminal dones"):
        assert mend in message
    flags = lambda *words: [np.flatnonzero(x).tolist() for x in converted(tmp_path, columns, *words, ending=".npz")[0][5:7]]
    assert flags("--horizon", 10) == [[16, 29], [9, 26]]  # 17 to 26 are ten rows, 27 to 29 the end of the next
    assert flags("--terminals-are-timeouts") == [[], [9, 16, 29]]
    assert flags("--terminal", "dones") == [[9, 16, 29], []]
    columns |= {"terminals": ends["terminals"]}
    assert flags() == [[9], [16, 29]]
    del columns["terminals"]
    columns |= {"timeouts": np.arange(N) == 16}
    assert flags() == [[9, 29], [16]]


def test_time_outs_stored_as_terminals_are_named_and_read(tmp_path, capsys):
    columns = d4rl() | {"terminals": np.arange(N) % 10 == 9}
    del columns["timeouts"]
    made, _ = converted(tmp_path, columns)
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1 and "all 3 terminal episodes are 10 steps long" in err and "--terminals-are-timeouts" in err
    made, _ = converted(tmp_path, columns, "--terminals-are-timeouts")
    assert not made.terminals.any() and np.flatnonzero(made.timeouts).tolist() == [8, 17, 26]
    assert "--terminals-are-timeouts" not in capsys.readouterr().err


def test_actions_are_rescaled(tmp_path):
    columns = d4rl()
    unit = columns["actions"]
    made, _ = converted(tmp_path, columns | {"actions": 2 * unit}, "--action-low", -2, "--action-high", 2)
    np.testing.assert_allclose(made.actions[:19], unit[:19], atol=1e-6)
    made, _ = converted(tmp_path, columns | {"actions": 2 * unit}, "--action-low", "-2.", "--action-high", "2e0")
    np.testing.assert_allclose(made.actions[:19], unit[:19], atol=1e-6)
    wide = columns | {"actions": np.stack([5 * unit[:, 0] + 3, unit[:, 1]], 1)}
    made, _ = converted(tmp_path, wide, "--action-low", -2, -1, "--action-high", 8, 1)
    np.testing.assert_allclose(made.actions[:19], unit[:19], atol=1e-6)


def test_actions_that_the_simulator_clipped(tmp_path):
    columns = d4rl()
    unit, wide = columns["actions"], 3 * columns["actions"]
    made, about = converted(tmp_path, columns | {"actions": wide}, "--clip-actions")
    np.testing.assert_allclose(made.actions[:19], np.clip(wide, -1, 1)[:19], atol=1e-6)
    assert json.loads(about["converted_with"]) == {"clip_actions": True}
    made, _ = converted(tmp_path, columns | {"actions": 2 * wide}, "--clip-actions", "--action-low", -2, "--action-high", 2)
    np.testing.assert_allclose(made.actions[:19], np.clip(3 * unit, -1, 1)[:19], atol=1e-6)


# ---------------------------------------------------------------- what is refused


def without(*names):
    return lambda columns: [columns.pop(name) for name in names]


def put(name, value):
    return lambda columns: columns.update({name: value(columns[name]) if callable(value) else value})


def poke(name, row, value):
    def edit(columns):
        columns[name] = columns[name].astype(float)
        columns[name][row] = value

    return edit


# name: (edit of the columns, arguments, what must be said)
REFUSED = {
    "no cost": (without("infos/cost"), "", "no cost among its columns: observations, actions, rewards, terminals, timeouts; name it with --cost"),
    "wrong cost": (lambda c: None, "--cost infos/costly", "no column infos/costly; there are observations, actions"),
    "no observations": (without("observations"), "", "no observations among its columns: actions"),
    "no rewards": (without("rewards"), "", "name it with --reward NAME"),
    "no ends": (without("terminals", "timeouts"), "", "nothing says where episodes end; its columns are observations"),
    "ends nowhere": (lambda c: c.update(terminals=np.zeros(N), timeouts=np.zeros(N)), "", "no row ends an episode; "),
    "large actions": (put("actions", lambda x: 2 * x), "", "beyond [-1, 1]; name the environment's bounds with --action-low LOW --action-high"),
    "larger than said": (put("actions", lambda x: 3 * x), "--action-low -2 --action-high 2", "beyond --action-low and --action-high"),
    "one bound": (lambda c: None, "--action-low -2", "give both --action-low and --action-high"),
    "three bounds": (lambda c: None, "--action-low -2 -2 -2 --action-high 2", "3 bounds for 2 actions"),
    "bounds crossed": (lambda c: None, "--action-low 2 --action-high -2", "--action-low is not below --action-high"),
    "short column": (put("rewards", lambda x: x[1:]), "", "lengths differ: observations 30"),
    "a number": (put("rewards", 1.0), "", "rewards a single number"),
    "no rows": (lambda c: c.update({key: value[:0] for key, value in c.items()}), "", "zero transitions"),
    "NaN observation": (poke("observations", (4, 1), np.nan), "", "observations have NaN or inf (float32), first in row 4"),
    "NaN action": (poke("actions", (5, 1), np.nan), "--action-low -2 --action-high 2", "actions have NaN or inf (float32), first in row 5"),
    "inf reward": (poke("rewards", 6, np.inf), "", "rewards have NaN or inf (float32), first in row 6"),
    "negative cost": (poke("infos/cost", 7, -1), "", "negative costs, first -1 in row 7"),
    "flag of 2": (poke("terminals", 8, 2), "", "terminals holds 2.0 in row 8; flags must be 0 or 1"),
    "NaN flag": (poke("timeouts", 8, np.nan), "", "timeouts holds nan in row 8; flags must be 0 or 1"),
    "images": (put("observations", np.zeros((N, 2, 2))), "", "observations have shape (30, 2, 2)"),
    "flags of two columns": (put("terminals", lambda x: np.stack([x, x], 1)), "", "terminals has the shape (30, 2), not one number per"),
    "costs of two columns": (put("infos/cost", np.zeros((N, 2))), "--cost infos/cost rewards", "infos/cost has the shape (30, 2)"),
    "costs in words": (put("infos/cost", np.array(["no"] * N)), "--cost infos/cost rewards", "infos/cost holds <U2, not numbers"),
    "images beside numbers": (put("observations", np.zeros((N, 2, 2))), "--obs observations rewards", "(30, 2, 2), not a row of numbers"),
    "every row a time-out": (put("timeouts", np.ones(N)), "", "no row has a successor in its episode; export next observations"),
    "other task": (lambda c: None, "--env SafetyPointRun", "wrong task: observations have 3 columns, SafetyPointRun has 12"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input_is_refused_and_nothing_written(tmp_path, name):
    edit, words, said = REFUSED[name]
    columns = d4rl()
    if name == "every row a time-out":
        del columns["terminals"]
    edit(columns)
    source = write(tmp_path / "in.npz", columns)
    message = run(convert, source, tmp_path / "out.hdf5", *words.split())
    assert message and message.startswith(f"{source}: ") and said in message, message
    assert os.listdir(tmp_path) == ["in.npz"]


def test_files_that_cannot_be_read_are_refused(tmp_path):
    def refused(name, content, said):
        (tmp_path / name).write_bytes(content)
        message = run(convert, tmp_path / name, tmp_path / "out.hdf5")
        assert message and name in message and said in message, message
        assert not (tmp_path / "out.hdf5").exists()

    refused("a.txt", b"1", "unknown format '.txt'; known are .hdf5, .h5, .npz, .csv, minari:NAME")
    refused("a.hdf5", b"no", "not readable as HDF5")
    refused("a.npz", b"no", "not readable as a NumPy archive")
    refused("b.npz", b"PK\x03\x04" + bytes(60), "not readable as a NumPy archive")
    with open(tmp_path / "c.npz", "wb") as file:
        np.save(file, np.zeros(3))
    refused("c.npz", (tmp_path / "c.npz").read_bytes(), "it holds one array without a name); write it again with np.savez")
    refused("a.csv", b"", "its columns: none")
    refused("b.csv", b"obs_0,obs_0\n1,2\n", "two columns of one name")
    refused("c.csv", b"\xff\xfe\x00", "not readable as CSV")
    head = b"obs_0,action_0,reward,cost,terminal\n"
    refused("d.csv", head, "zero transitions")
    refused("e.csv", head + b"1,0,0,0,0\n2,0,zero,0,1\n", "could not convert string 'zero'")
    refused("f.csv", head + b"1,0,0,0,0\n2,0,0\n", "each row as long as the first")
    refused("h.csv", head + b"1,0,0,0,0\nno, no,2,0,0,0,1\n", "line 3 has 7 cells, the first 5; each cell must be")
    refused("i.csv", b"note," + head + b"a,1,0,0,0,0\nb,2,0,0,0,0,1\n", "line 3 has 7 cells, the first 6")  # else read one column on
    refused("g.csv", b"obs_0,obs_2,action_0,reward,cost,terminal\n", "obs_1 is missing; number the columns from obs_0 on")
    message = run(convert, tmp_path / "nothing.hdf5", tmp_path / "out.hdf5")
    assert "no file at" in message


def command(*words, **options):
    """A command as a user runs it: (exit code, standard output, standard error)."""
    done = subprocess.run([sys.executable, "-m", *map(str, words)], capture_output=True, text=True, cwd=ROOT, **options)
    return done.returncode, done.stdout, done.stderr


def test_the_commands_leave_exit_code_2_and_one_line(tmp_path):
    source = write(tmp_path / "in.npz", d4rl())
    code, out, err = command("data.convert", source, tmp_path / "out.hdf5", "--cost", "hazard")
    assert (code, out) == (2, "") and err.startswith(f"error: {source}: no column hazard") and len(err.splitlines()) == 1
    for module, words in (
        (convert, [source]), (convert, [source, tmp_path / "a.hdf5", "--to", "minari/a-v0"]), (convert, [source, "--to", "a-v0"]),
        (convert, [source, tmp_path / "a.hdf5", "--horizon", "0"]), (inspect, [source, "--what"]),
    ):  # fmt: skip
        with pytest.raises(SystemExit) as stop:
            module.main([str(word) for word in words])
        assert stop.value.code == 2
    assert os.listdir(tmp_path) == ["in.npz"]


def test_outputs_that_cannot_be_written_are_refused_before_anything_is_read(tmp_path):
    (tmp_path / "a.png").mkdir()
    (tmp_path / "file").touch()
    for module, *words, out, named in (
        (convert, "a.npz", "a.npz"), (convert, "a.hdf5", "a.png"), (convert, "file/a.hdf5", "file/a.hdf5"), (convert, ".", ""),
        (inspect, "--plot", ".", ""), (inspect, "--plot", "file/b.png", "file/b.png"), (inspect, "--plot", "b.foo", "b.foo"),
    ):  # fmt: skip
        message = run(module, tmp_path / "nothing.npz", *words, tmp_path / out)
        assert message and message.startswith(f"{tmp_path / named}: ") and "; name a file" in message
    assert sorted(os.listdir(tmp_path)) == ["a.png", "file"]


def test_a_killed_conversion_leaves_no_half_file(tmp_path):
    n = 400_000
    rng = np.random.default_rng(0)
    columns = {"observations": rng.normal(size=(n, 20)), "actions": rng.uniform(-1, 1, (n, 2)), "rewards": rng.normal(size=n)}
    columns |= {"costs": np.zeros(n), "terminals": np.arange(n) % 100 == 99}
    source, out = write(tmp_path / "in.npz", columns), tmp_path / "out" / "made.hdf5"
    process = subprocess.Popen([sys.executable, "-m", "data.convert", source, out], cwd=ROOT, stderr=subprocess.PIPE)
    deadline = time.time() + 300
    while not (part := [p for p in out.parent.glob(".made*") if p.stat().st_size > 0]):  # it is being written
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert part and not out.exists() and not out.with_suffix(".png").exists()


# ---------------------------------------------------------------- Minari


@pytest.fixture
def minari(tmp_path, monkeypatch):
    """The package, with its datasets under tmp_path."""
    package = pytest.importorskip("minari", reason="pip install minari")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    return package


def test_minari_there_and_back(tmp_path, minari, capsys):
    dataset = dsrl.Dataset._make(None if x is None else x[:1200] for x in dsrl.load(ROOT / "data" / "SafetyPointRun.hdf5")[0])
    dsrl.save(tmp_path / "in.hdf5", dataset, {"env": "SafetyPointRun"})  # two whole episodes and one that is not
    assert run(convert, tmp_path / "in.hdf5", "--to", "minari/own/x-v0") is None
    assert "left out: privileged, next_privileged, for which Minari has no place" in capsys.readouterr().out
    minari.delete_dataset("own/x-v0")
    dataset = dataset._replace(privileged=None, next_privileged=None)
    dsrl.save(tmp_path / "in.hdf5", dataset, {"env": "SafetyPointRun"})
    assert run(convert, tmp_path / "in.hdf5", "--to", "minari/own/point-v0") is None
    made = minari.load_dataset("own/point-v0")
    assert made.total_episodes == 3 and made.total_steps == 1200
    np.testing.assert_array_equal(made[0].infos["cost"][1:], dataset.costs[:500])
    assert os.listdir(tmp_path / "minari") == ["own"] and os.listdir(tmp_path / "minari" / "own") == ["point-v0"]
    for source in ("minari:own/point-v0", tmp_path / "minari" / "own" / "point-v0", tmp_path / "minari" / "own" / "point-v0" / "data"):
        assert run(convert, source, tmp_path / "out.hdf5") is None
        again, about = dsrl.load(tmp_path / "out.hdf5")
        assert about["env"] == "SafetyPointRun"
        for before, after in zip(dataset, again, strict=True):
            assert before is after is None or np.array_equal(before, after)
    assert "costs from infos/cost" in capsys.readouterr().out
    assert run(inspect, "minari:own/point-v0") is None
    assert "compared with SafetyPointRun" in capsys.readouterr().out
    # what is refused
    assert "exists; take another name" in run(convert, tmp_path / "in.hdf5", "--to", "minari/own/point-v0")
    assert "name it minari/NAME-v0" in run(convert, tmp_path / "in.hdf5", "--to", "minari/own/point")
    assert "no such Minari dataset" in run(convert, "minari:own/other-v0", tmp_path / "no.hdf5")
    assert "not readable as a Minari dataset" in run(convert, tmp_path, tmp_path / "no.hdf5")
    broken = dataset._replace(next_observations=dataset.next_observations + 1)
    dsrl.save(tmp_path / "in.hdf5", broken, {})
    assert "trajectory 0: next observations are not those" in run(convert, tmp_path / "in.hdf5", "--to", "minari/own/b-v0")
    assert os.listdir(tmp_path / "minari" / "own") == ["point-v0"] and not (tmp_path / "no.hdf5").exists()


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_minaris_own_collector(tmp_path, minari):
    """Episodes as minari.DataCollector writes them: the first of infos is the reset's, an unfinished episode is cut off."""
    import gymnasium

    gymnasium.register("Registered-v0", entry_point="own_env:OwnPoint", max_episode_steps=50)
    env = minari.DataCollector(gymnasium.make("Registered-v0"), record_infos=True)
    rng, costs = np.random.default_rng(0), []
    for steps in (50, 30, 50):
        env.reset(seed=steps)
        costs += [env.step(np.array([2.0, 0.0]) * rng.uniform())[4]["cost"] for _ in range(steps)]
    env.create_dataset("collected-v0", eval_env="CartPole-v1")
    env.close()
    assert "beyond [-1, 1]" in run(convert, "minari:collected-v0", tmp_path / "out.hdf5")
    assert run(convert, "minari:collected-v0", tmp_path / "out.hdf5", "--action-low", -2, "--action-high", 2) is None
    made, about = dsrl.load(tmp_path / "out.hdf5")
    assert about["env"] == "Registered-v0" and np.flatnonzero(made.timeouts).tolist() == [49, 79, 129]
    np.testing.assert_array_equal(made.costs, costs)
    assert sum(costs) > 0


def test_without_minari_one_line_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "minari", None)
    source = write(tmp_path / "in.npz", d4rl())
    for words in (("minari:own-v0", tmp_path / "out.hdf5"), (source, "--to", "minari/own-v0")):
        assert "; pip install minari" in run(convert, *words)


# ---------------------------------------------------------------- does it belong to the environment


def changed(dataset, change):
    return dataset._replace(observations=change(dataset.observations), next_observations=change(dataset.next_observations))


def changes(dataset):
    mean, std = dataset.observations.mean(0), dataset.observations.std(0) + 1e-3
    order = np.random.default_rng(1).permutation(len(mean))
    return {
        "permuted": lambda x: x[:, order],
        "backwards": lambda x: x[:, ::-1],
        "times ten": lambda x: 10 * x,
        "a tenth": lambda x: x / 10,
        "normalised": lambda x: (x - mean) / std,
    }


TASKS = "SafetyAntRun SafetyCarRun SafetyHalfCheetahVelocity SafetyPointCircle1 SafetyPointRun SafetySwimmerVelocity".split()
HERE = [dsrl.default_path(name) for name in TASKS]  # not what runs have made there since


QUICK = "SafetyPointRun", "SafetyHalfCheetahVelocity"


@pytest.mark.parametrize(
    "path", [p if p.stem in QUICK else pytest.param(p, marks=pytest.mark.slow) for p in HERE], ids=lambda path: path.stem
)
def test_the_datasets_here_fit_their_tasks_and_no_other_columns_do(path, capsys):
    dataset, _ = dsrl.load(path)
    env = envs.make(path.stem)
    inspect.check_env(dataset, path, env)
    assert capsys.readouterr().err == ""
    for name, change in changes(dataset).items():
        inspect.check_env(changed(dataset, change), path, env)
        err = capsys.readouterr().err
        assert len(err.splitlines()) == 1 and err.startswith(f"warning: {path}: does not fit {path.stem}: ") and "column " in err, (
            name,
            err,
        )


def test_a_velocity_task_replays_transitions():
    dataset, _ = dsrl.load(ROOT / "data" / "SafetyHalfCheetahVelocity.hdf5")
    env = envs.make("SafetyHalfCheetahVelocity")
    swapped = list(range(17))
    swapped[2], swapped[5] = 5, 2  # two joints that look alike when an episode begins
    found = inspect._replayed(env, changed(dataset, lambda x: x[:, swapped]))
    assert "replayed transitions differ" in found and "column " in found
    assert inspect._replayed(env, dataset) is None
    assert "rewards of 64 replayed" in inspect._replayed(env, dataset._replace(rewards=dataset.rewards * 10))
    assert "costs of 64 replayed" in inspect._replayed(env, dataset._replace(costs=1 - dataset.costs))
    assert "replayed transitions differ" in inspect._replayed(env, dataset._replace(actions=-dataset.actions))


@pytest.mark.slow
def test_a_simulator_is_compared_by_few_resets():
    dataset, _ = dsrl.load(ROOT / "data" / "SafetyPointRun.hdf5")
    env = envs.make("SafetyPointRun", "safety-gymnasium")
    assert inspect.mismatch(dataset, env) is None
    for name in ("permuted", "times ten", "normalised"):
        assert "first observations differ" in inspect.mismatch(changed(dataset, changes(dataset)[name]), env)


def test_inspect_prints_compares_and_draws(tmp_path, capsys):
    path = ROOT / "data" / "SafetySwimmerVelocity.hdf5"
    assert run(inspect, path, "--plot", tmp_path / "plot.png", "--cost-limit", 10) is None
    out, err = capsys.readouterr()
    assert (
        err == "" and "compared with SafetySwimmerVelocity" in out and "60 trajectories: 0 end in a terminal state, 60 by time-out" in out
    )
    assert "safe (cost at most 10)" in out and os.listdir(tmp_path) == ["plot.png"]
    source = write(tmp_path / "in.npz", d4rl())
    assert run(inspect, source) is None
    assert "3 trajectories" in capsys.readouterr().out and sorted(os.listdir(tmp_path)) == ["in.npz", "plot.png"]


def test_an_unfinished_trajectory_is_not_drawn_as_safe(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(report.plt, "close", figures.append)  # keeps them
    split = dsrl.episodes(dsrl.Dataset(*[np.zeros((N, 1))] * 3, np.zeros(N), np.ones(N), np.zeros(N, bool), np.arange(N) == 19))
    assert split.costs.tolist() == [20, 10] and split.safe(20).tolist() == [True, False]
    for limit, whole in ((20, "safe"), (5, "unsafe")):
        report.scatter("", split, limit, tmp_path / "plot.png")
        drawn = {points.get_label(): points.get_offsets().tolist() for points in figures[-1].axes[0].collections}
        assert {label: points for label, points in drawn.items() if points} == {whole: [[20, 0]], "unfinished": [[10, 0]]}


def test_inspect_warns_of_odd_numbers(tmp_path, capsys):
    columns = d4rl() | {"infos/cost": np.zeros(N), "timeouts": np.isin(np.arange(N), (13, 29))}
    columns["actions"] = columns["actions"] / 3
    assert run(inspect, write(tmp_path / "in.npz", columns)) is None
    err = capsys.readouterr().err
    assert "actions stay within 0.29" in err and "all costs are zero" in err and "time-outs after 3 to 15 steps" in err
    assert len(err.splitlines()) == 3


def test_an_environment_that_is_not_here_is_no_error(tmp_path, capsys):
    dataset, _ = dsrl.load(HERE[-1])
    dsrl.save(tmp_path / "own.hdf5", dsrl.Dataset._make(None if x is None else x[:1000] for x in dataset), {"env": "NotHere-v7"})
    assert run(inspect, tmp_path / "own.hdf5") is None
    assert "not compared with NotHere-v7: unknown environment" in capsys.readouterr().out
    dsrl.save(tmp_path / "other.hdf5", dsrl.load(tmp_path / "own.hdf5")[0], {"env": "SafetyPointRun"})
    assert "wrong task: observations have 8 columns, SafetyPointRun has 12" in run(inspect, tmp_path / "other.hdf5")
    with pytest.raises(envs.UnknownName):
        run(inspect, tmp_path / "own.hdf5", "--env", "NotHere-v7")


def test_the_check_is_quick():
    """Measured: 1.2 to 1.8 s of one core with everything compiled anew, Ant 2.5 s."""
    dataset, _ = dsrl.load(ROOT / "data" / "SafetyPointRun.hdf5")
    env = envs.make("SafetyPointRun")
    jax.clear_caches()
    inspect._native.cache_clear()
    start = time.process_time()
    assert inspect.mismatch(dataset, env) is None
    assert time.process_time() - start < 6
