"""data/dsrl.py: what it reads, what it refuses (and how it says so), and that damage never gets past it."""

import errno
import json
import os
import time

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import dsrl

N, OBS, ACTION = 24, 3, 2
FUZZ = settings(derandomize=True, max_examples=60, deadline=None, database=None)


def arrays(n=N):
    """A valid dataset as a dict; trajectories of 7, 1, 8 and n - 16 rows, the last one unfinished."""
    rng = np.random.default_rng(0)
    out = {
        "observations": 5 * rng.normal(size=(n, OBS)),
        "next_observations": 5 * rng.normal(size=(n, OBS)),
        "actions": rng.uniform(-1, 1, (n, ACTION)),
        "rewards": rng.normal(size=n),
        "costs": rng.integers(0, 2, n),
    }
    out = {key: value.astype(np.float32) for key, value in out.items()}
    terminals, timeouts = np.zeros(n, bool), np.zeros(n, bool)
    terminals[[6, 15]] = timeouts[[7]] = True
    return out | {"terminals": terminals, "timeouts": timeouts}


def with_privileged():
    """The same with two columns that only critics see."""
    rows = np.arange(2 * N, dtype=np.float32).reshape(N, 2)
    return arrays() | {"privileged": rows, "next_privileged": rows + 2}


def write(path, content, attrs=None, **options):
    """Writes arrays with plain h5py, as published files are, without any check."""
    with h5py.File(path, "w") as file:
        for key, value in content.items():
            file.create_dataset(key, data=value, **options)
        file.attrs.update(attrs or {})
    return path


def refused(path, wrong, mend, **wanted):
    """Asserts that load refuses the file with one line holding the file's name and the given texts."""
    with pytest.raises(dsrl.DatasetError) as caught:
        dsrl.load(path, **wanted)
    check_message(str(caught.value), path, wrong, mend)


def check_message(message, path, wrong, mend):
    assert len(message.splitlines()) == 1
    assert str(path) in message
    found, _, advice = message.rpartition("; ")
    assert wrong in found and mend in advice, message


def check_valid(dataset):
    n = len(dataset.rewards)
    assert n > 0
    for key, value in dataset._asdict().items():
        if value is None:
            assert key in ("privileged", "next_privileged")
            continue
        assert value.shape == (n, *value.shape[1:])
        assert value.ndim == (2 if key in dsrl.MATRICES else 1)
        assert value.dtype == (bool if key in ("terminals", "timeouts") else np.float32)
        assert np.isfinite(value).all()
    assert dataset.observations.shape == dataset.next_observations.shape
    assert dataset.costs.min() >= 0 and np.abs(dataset.actions).max() <= np.float32(1.001)


def equal(left, right):
    same = lambda a, b: a is b is None or a.dtype == b.dtype and np.array_equal(a, b)
    return all(same(a, b) for a, b in zip(left, right, strict=True))


def put(key, index, value):
    """An edit that sets one entry."""

    def edit(content):
        content[key] = content[key].copy()
        content[key][index] = value

    return edit


def swap(key, convert):
    """An edit that replaces one array."""
    return lambda content: content.update({key: convert(content[key])})


def every(convert):
    return lambda content: content.update({key: convert(value) for key, value in content.items()})


# name: (edit of valid arrays, what must be said to be wrong, mend)
INVALID = {
    "rank of a matrix": (swap("observations", lambda x: x[:, 0]), "observations have shape (24,)", "(N, size"),
    "rank of a column": (swap("rewards", lambda x: np.stack([x, x], 1)), "rewards have shape (24, 2)", "as (N,)"),
    "three axes": (swap("costs", lambda x: x[:, None, None]), "costs have shape (24, 1, 1)", "as (N,)"),
    "scalar": (swap("rewards", lambda x: x[0]), "rewards have shape ()", "as (N,)"),
    "no columns": (swap("actions", lambda x: x[:, :0]), "actions have shape (24, 0)", "(N, size >= 1)"),
    "short": (swap("costs", lambda x: x[1:]), "lengths differ: observations 24", "one row per transition"),
    "zero transitions": (every(lambda x: x[:0]), "zero transitions", "collect the dataset again"),
    "sizes of the two observations": (swap("next_observations", lambda x: x[:, 1:]), "3 columns but", "one task"),
    "integer observations": (swap("observations", lambda x: x.astype(int)), "dtype int64", "float32"),
    "boolean actions": (swap("actions", lambda x: x > 0), "actions have dtype bool", "float32"),
    "byte strings": (swap("rewards", lambda x: x.astype("S8")), "rewards have dtype |S8", "float32"),
    "complex": (swap("costs", lambda x: x.astype(complex)), "costs have dtype complex128", "float32"),
    "complex flags": (swap("timeouts", lambda x: x.astype(complex)), "timeouts have dtype complex128", "as bool"),
    "NaN observation": (put("observations", (4, 2), np.nan), "have NaN or inf (float32), first in row 4", "drop"),
    "inf next observation": (put("next_observations", (5, 0), np.inf), "next_observations have NaN or inf", "drop"),
    "NaN action": (put("actions", (23, 1), np.nan), "actions have NaN or inf (float32), first in row 23", "drop"),
    "-inf reward": (put("rewards", 0, -np.inf), "rewards have NaN or inf (float32), first in row 0", "drop"),
    "NaN costs": (put("costs", slice(9, 12), np.nan), "costs have NaN or inf (float32), first in row 9", "drop"),
    "beyond float32": (swap("rewards", lambda x: x.astype(float) * 1e300), "rewards have NaN or inf", "drop"),
    "NaN flag": (swap("terminals", lambda x: np.where(x, np.nan, 0)), "terminals have NaN or inf", "drop"),
    "flag of 2": (swap("terminals", lambda x: 2 * x.astype(int)), "terminals hold 2 in row 6", "0 or 1"),
    "flag of 0.5": (swap("timeouts", lambda x: x / 2), "timeouts hold 0.5 in row 7", "0 or 1"),
    "flag of -1": (swap("timeouts", lambda x: -x.astype(np.int8)), "timeouts hold -1 in row 7", "0 or 1"),
    "negative cost": (put("costs", 3, -0.25), "negative costs, first -0.25 in row 3", "fix the sign"),
    "action above 1": (put("actions", (3, 1), 1.5), "1.5], beyond [-1, 1]", "rescale"),
    "action below -1": (put("actions", (3, 1), -1.002), "range over [-1.002, ", "rescale"),
}


@pytest.mark.parametrize("name", INVALID)
def test_invalid_content_is_refused_by_load_and_save(tmp_path, name):
    edit, wrong, mend = INVALID[name]
    content = arrays()
    edit(content)
    refused(write(tmp_path / "bad.hdf5", content), wrong, mend)

    target = tmp_path / "out" / "good.hdf5"
    dsrl.save(target, dsrl.Dataset(**arrays()), {})
    before = dsrl.sha256(target)
    with pytest.raises(dsrl.DatasetError) as caught:
        dsrl.save(target, dsrl.Dataset(**content), {})
    check_message(str(caught.value), target, wrong, mend)
    assert dsrl.sha256(target) == before and os.listdir(target.parent) == ["good.hdf5"]


def test_privileged_columns_come_in_pairs_and_go_behind_the_observations(tmp_path):
    dataset = dsrl.Dataset(**with_privileged())
    dsrl.save(tmp_path / "wide.hdf5", dataset, {})
    loaded = dsrl.load(tmp_path / "wide.hdf5", obs_size=OBS, action_size=ACTION)[0]
    assert equal(loaded, dataset)
    path = tmp_path / "wide.hdf5"
    wide = dsrl.widened(loaded, 2, path)
    np.testing.assert_array_equal(wide.observations, np.c_[dataset.observations, dataset.privileged])
    np.testing.assert_array_equal(wide.next_observations, np.c_[dataset.next_observations, dataset.next_privileged])
    assert equal(dsrl.widened(loaded, 0, path), loaded)  # a simulator that does not tell
    with pytest.raises(dsrl.DatasetError, match="wide.hdf5: privileged have 2 columns, the task has 1; use a dataset"):
        dsrl.widened(loaded, 1, path)
    half = with_privileged()
    del half["next_privileged"]
    refused(write(tmp_path / "half.hdf5", half), "missing next_privileged", "add them")
    uneven = with_privileged() | {"next_privileged": np.zeros((N, 3), np.float32)}
    refused(write(tmp_path / "uneven.hdf5", uneven), "privileged have 2 columns but next_privileged 3", "export both")
    holed = with_privileged()
    holed["privileged"][3, 1] = np.nan
    refused(write(tmp_path / "holed.hdf5", holed), "privileged have NaN or inf", "drop that trajectory")


def test_content_only_a_file_can_hold_is_refused(tmp_path):
    path = tmp_path / "bad.hdf5"
    some = {key: value for key, value in arrays().items() if key not in ("costs", "timeouts")}
    refused(write(path, some), "missing costs, timeouts", "add them")
    every_key = "observations, next_observations, actions, rewards, costs, terminals, timeouts"
    refused(write(path, {}), f"missing {every_key}", "add them")

    def rewrite(change):
        write(path, some | {"timeouts": np.zeros(N)})
        with h5py.File(path, "a") as file:
            change(file)
        return path

    refused(rewrite(lambda f: f.create_group("costs")), "missing costs", "top-level arrays")
    refused(rewrite(lambda f: f.update(costs=h5py.SoftLink("/nowhere"))), "not readable as HDF5", "download it again")
    refused(rewrite(lambda f: f.update(costs=h5py.Empty("f4"))), "costs have shape None", "(N,)")
    text = ["a"] * N
    refused(rewrite(lambda f: f.update(costs=text)), "costs have dtype object", "float32")
    pair = np.zeros(N, [("a", "f4"), ("b", "f4")])
    refused(rewrite(lambda f: f.update(costs=pair)), "costs have dtype [(", "float32")


def test_a_header_that_claims_more_than_the_file_holds_is_refused_without_allocating_it(tmp_path):
    path = tmp_path / "bomb.hdf5"
    with h5py.File(path, "w") as file:
        for key, value in arrays().items():
            file.create_dataset(key, shape=(10**13, *value.shape[1:]), dtype=value.dtype, chunks=True)
    refused(path, "more than the file can hold", "download it again")


def test_files_that_are_not_hdf5_are_refused(tmp_path):
    refused(tmp_path / "none.hdf5", f"no file at {tmp_path / 'none.hdf5'}", "download it from DSRL")
    refused(tmp_path, "is a folder", "name an HDF5 file, or convert a Minari dataset")
    for name, content in {"empty": b"", "text": b"<html>404</html>", "signature": b"\x89HDF\r\n\x1a\n"}.items():
        path = tmp_path / f"{name}.hdf5"
        path.write_bytes(content)
        refused(path, "not readable as HDF5", "download it again")


def test_a_relative_path_says_where_the_file_was_expected(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused("none.hdf5", f"no file at {tmp_path / 'none.hdf5'}", "correct the path")


def test_a_file_this_user_may_not_read_is_refused(tmp_path, monkeypatch):
    path = write(tmp_path / "a.hdf5", arrays())

    def deny(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(h5py, "File", deny)  # chmod would not stop root
    refused(path, "permission denied", "readable")


def test_a_file_of_another_task_is_refused(tmp_path):
    path = write(tmp_path / "a.hdf5", arrays(), {"env": "SafetyAntRun"})
    refused(path, "wrong task: observations have 3 columns, the task has 4", "use a dataset of", obs_size=4)
    refused(path, "actions have 2 columns, SafetyAntRun has 8", "use a dataset of", env="SafetyAntRun", action_size=8)
    refused(path, "collected on SafetyAntRun, wanted SafetyCarRun", "use a dataset of SafetyCarRun", env="SafetyCarRun")
    assert dsrl.load(path, env="SafetyAntRun", obs_size=OBS, action_size=ACTION)[1]["env"] == "SafetyAntRun"
    # Published files have no such attribute; then the sizes have to do.
    assert "env" not in dsrl.load(write(path, arrays()), env="SafetyCarRun")[1]
    # Attributes are arbitrary content: of any type, and with line breaks.
    refused(write(path, arrays(), {"env": 3}), "collected on 3", "SafetyCarRun", env="SafetyCarRun")
    refused(write(path, arrays(), {"env": "a\nb"}), "collected on a b", "SafetyCarRun", env="SafetyCarRun")


def test_bugs_in_this_module_are_not_reported_as_damaged_files(tmp_path, monkeypatch):
    def bug(*_):
        raise KeyError("bug")

    path = write(tmp_path / "a.hdf5", arrays())
    for name in ("_check_layout", "_clean"):
        with monkeypatch.context() as patch:
            patch.setattr(dsrl, name, bug)
            with pytest.raises(KeyError, match="bug"):
                dsrl.load(path)


# name: (edit that keeps the meaning, options of the HDF5 arrays)
SAME = {
    "float64": (lambda c: c.update({k: c[k].astype(float) for k in c if k not in ("terminals", "timeouts")}), {}),
    "big endian": (swap("observations", lambda x: x.astype(">f4")), {}),
    "columns": (lambda c: c.update({k: c[k][:, None] for k in ("rewards", "costs", "terminals", "timeouts")}), {}),
    "integer flags": (lambda c: c.update({k: c[k].astype(np.int64) for k in ("terminals", "timeouts")}), {}),
    "unsigned flags": (lambda c: c.update({k: c[k].astype(np.uint8)[:, None] for k in ("terminals", "timeouts")}), {}),
    "float flags": (lambda c: c.update({k: c[k].astype(np.float32) for k in ("terminals", "timeouts")}), {}),
    "integer costs": (swap("costs", lambda x: x.astype(np.int32)), {}),
    "extra array": (lambda c: c.update(infos=np.zeros(3)), {}),
    "gzip": (lambda c: None, {"compression": "gzip"}),
    "lzf": (lambda c: None, {"compression": "lzf", "chunks": True}),
}


@pytest.mark.parametrize("name", SAME)
def test_variants_found_in_published_files_load_as_the_same_dataset(tmp_path, name):
    edit, options = SAME[name]
    content = arrays()
    edit(content)
    dataset, _ = dsrl.load(write(tmp_path / "a.hdf5", content, **options))
    check_valid(dataset)
    assert equal(dataset, dsrl.Dataset(**arrays()))


def test_actions_within_the_tolerance_load_unclipped(tmp_path):
    content = arrays()
    content["actions"][:2, 0] = 1.001, -1.001
    dataset, _ = dsrl.load(write(tmp_path / "a.hdf5", content))
    assert dataset.actions[:2, 0].tolist() == [np.float32(1.001), np.float32(-1.001)]


def test_save_and_load_round_trip_with_identical_bytes(tmp_path):
    dataset = dsrl.Dataset(**arrays())
    attrs = {"env": "Täsk", "seed": 7, "rate": 0.5, "ok": True, "note": "", "steps": np.int64(3)}
    attrs["config"] = {"b": [1], "a": None}
    first, second = tmp_path / "a.hdf5", tmp_path / "deep" / "b.hdf5"
    dsrl.save(first, dataset, attrs)
    loaded, metadata = dsrl.load(first)
    assert equal(loaded, dataset)
    config = metadata.pop("config")
    assert json.loads(config) == attrs["config"]
    expected = {key: value for key, value in attrs.items() if key != "config"}
    assert metadata == expected | {"path": str(first), "sha256": dsrl.sha256(first)}
    assert json.loads(json.dumps(metadata)) == metadata

    time.sleep(1.1)  # HDF5's timestamps count whole seconds
    # Other order of attributes; what load added is not stored, so a file can be saved again as loaded.
    dsrl.save(second, loaded, dict(reversed(metadata.items())) | {"config": config})
    assert dsrl.sha256(second) == dsrl.sha256(first)
    dsrl.save(second, loaded, {})
    assert dsrl.sha256(second) != dsrl.sha256(first)


def test_an_output_that_cannot_be_written_is_told_before(tmp_path):
    """The last two as root, too, whom access rights do not stop."""
    (tmp_path / "file").touch()
    (tmp_path / "folder.hdf5").mkdir()
    for good in ("a.hdf5", "a.H5", "new/folder/a.h5"):
        dsrl.check_output(tmp_path / good)
    dsrl.check_output(tmp_path / "a.png", (".png",))
    for path, said in (
        (tmp_path / "a.txt", "its suffix is '.txt'; name a file that ends in .hdf5 or .h5"),
        (tmp_path / "a", "its suffix is ''; name"),
        (tmp_path / "folder.hdf5", f"is a folder; name a file in it, {tmp_path}/folder.hdf5/NAME.hdf5"),
        (tmp_path / "file" / "a.hdf5", "cannot be written (Not a directory); name a file in a folder that can be"),
        ("/proc/a.hdf5", "cannot be written ("),
    ):
        with pytest.raises(dsrl.DatasetError) as caught:
            dsrl.check_output(path)
        assert str(caught.value).startswith(f"{path}: {said}") and len(str(caught.value).splitlines()) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.hdf5"]


def test_sha256_of_known_bytes_and_of_no_file(tmp_path):
    path = tmp_path / "abc"
    path.write_bytes(b"abc")
    assert dsrl.sha256(path) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    with pytest.raises(dsrl.DatasetError) as caught:
        dsrl.sha256(tmp_path / "none")
    check_message(str(caught.value), tmp_path / "none", "cannot be read", "check that")


def test_any_attribute_type_becomes_json_able(tmp_path):
    attrs = {"text": np.bytes_(b"a\xff"), "list": [1, 2], "names": ["a", "b"], "none": h5py.Empty("f4"), "c": 1 + 2j}
    _, metadata = dsrl.load(write(tmp_path / "a.hdf5", arrays(), attrs))
    assert json.loads(json.dumps(metadata)) == metadata
    assert (metadata["list"], metadata["names"], metadata["text"]) == ([1, 2], ["a", "b"], "a\ufffd")


def test_save_leaves_the_old_file_and_no_other_when_it_fails(tmp_path):
    path = tmp_path / "a.hdf5"
    dsrl.save(path, dsrl.Dataset(**arrays()), {})
    before = dsrl.sha256(path)
    with pytest.raises(TypeError):
        dsrl.save(path, dsrl.Dataset(**arrays()), {"config": {"function": print}})
    assert dsrl.sha256(path) == before and os.listdir(tmp_path) == ["a.hdf5"]


def test_a_full_disk_is_told_and_costs_nothing(tmp_path, monkeypatch):
    path = tmp_path / "a.hdf5"
    dsrl.save(path, dsrl.Dataset(**arrays()), {})
    before = dsrl.sha256(path)

    def full(self, data):
        self.touch()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(type(path), "write_bytes", full)
    with pytest.raises(dsrl.DatasetError, match=f"^{path}: cannot be written .No space left on device.; free some space"):
        dsrl.save(path, dsrl.Dataset(**arrays()), {"new": 1})
    assert dsrl.sha256(path) == before and os.listdir(tmp_path) == ["a.hdf5"]


def test_save_compresses_and_spans_several_chunks(tmp_path):
    n = 60_000
    big = dsrl.Dataset(**{key: np.resize(value, (n, *value.shape[1:])) for key, value in arrays().items()})
    dsrl.save(tmp_path / "a.hdf5", big, {})
    assert equal(dsrl.load(tmp_path / "a.hdf5")[0], big)
    assert (tmp_path / "a.hdf5").stat().st_size < 0.1 * sum(value.nbytes for value in big if value is not None)
    with h5py.File(tmp_path / "a.hdf5") as file:
        assert file["observations"].id.get_num_chunks() > 1 and file["observations"].shuffle


def loop(dataset):
    """Trajectories by a plain loop: (start, stop, complete, return, cost, length) of each."""
    rows, start, total, cost = [], 0, 0.0, 0.0
    for i in range(len(dataset.rewards)):
        total += float(dataset.rewards[i])
        cost += float(dataset.costs[i])
        done = bool(dataset.terminals[i] or dataset.timeouts[i])
        if done or i == len(dataset.rewards) - 1:
            rows.append((start, i + 1, done, total, cost, i + 1 - start))
            start, total, cost = i + 1, 0.0, 0.0
    return rows


@FUZZ
@given(st.lists(st.sampled_from([(0, 0), (0, 0), (1, 0), (0, 1), (1, 1)]), min_size=1, max_size=50), st.integers(0, 99))
def test_episodes_match_a_plain_loop(flags, seed):
    rng, n = np.random.default_rng(seed), len(flags)
    column, matrix = rng.normal(size=n).astype(np.float32), np.zeros((n, 1), np.float32)
    terminals, timeouts = np.array(flags, bool).T
    dataset = dsrl.Dataset(matrix, matrix, matrix, column, np.abs(column), terminals, timeouts)
    split, rows = dsrl.episodes(dataset), list(zip(*loop(dataset), strict=True))
    for field, value, expected in zip(split._fields, split, rows, strict=True):
        if field in ("returns", "costs"):
            assert value.dtype == np.float64
            np.testing.assert_allclose(value, expected, rtol=1e-12, atol=1e-12)
        else:
            assert value.dtype == (bool if field == "complete" else np.int64)
            assert value.tolist() == list(expected)


def test_episodes_by_hand():
    split = dsrl.episodes(dsrl.Dataset(**arrays()))
    assert split.start.tolist() == [0, 7, 8, 16] and split.stop.tolist() == [7, 8, 16, 24]
    assert split.lengths.tolist() == [7, 1, 8, 8] and split.complete.tolist() == [True, True, True, False]


def test_sums_are_exact_where_float32_drifts():
    n = 200_000
    matrix, tenth, no = np.zeros((n, 1), np.float32), np.full(n, 0.1, np.float32), np.zeros(n, bool)
    split = dsrl.episodes(dsrl.Dataset(matrix, matrix, matrix, tenth, tenth, no, no))
    assert abs(split.costs[0] - n * float(np.float32(0.1))) < 1e-6


def described(returns, costs, cost_limit, last_complete=True):
    """describe() of single-transition trajectories."""
    n = len(returns)
    flags = np.ones(n, bool)
    flags[-1] = last_complete
    column, matrix = np.array([returns, costs], np.float32), np.zeros((n, 1), np.float32)
    return dsrl.describe(dsrl.Dataset(matrix, matrix, matrix, *column, flags, np.zeros(n, bool)), cost_limit)


def test_describe_by_hand():
    summary = described(range(11), [0] * 5 + [25] + [30] * 5, 25)
    assert json.loads(json.dumps(summary)) == summary
    assert summary == {
        "transitions": 11,
        "trajectories": 11,
        "complete": 11,
        "cost_limit": 25.0,
        "return_quantiles": {"0": 0, "10": 1, "25": 2.5, "50": 5, "75": 7.5, "90": 9, "100": 10},
        "cost_quantiles": {"0": 0, "10": 0, "25": 0, "50": 25, "75": 30, "90": 30, "100": 30},
        "safe_share": 6 / 11,
        "safe_return_best": 5,
        "safe_return_p90": 4.5,
        "safe_return_mean": 2.5,
        "safe_return_range": [0, 5],
    }


def test_describe_leaves_the_unfinished_trajectory_out():
    summary = described([1, 2, 99], [0, 50, 0], 25, last_complete=False)
    assert (summary["trajectories"], summary["complete"], summary["safe_share"]) == (3, 2, 0.5)
    assert summary["return_quantiles"]["100"] == 2 and summary["safe_return_best"] == 1


def test_describe_with_nothing_safe_or_nothing_complete():
    summary = described([1, 2], [30, 50], 25)
    assert summary["safe_share"] == 0 and summary["safe_return_best"] is None and summary["safe_return_range"] is None
    summary = described([1], [0], 25, last_complete=False)
    assert summary["safe_share"] is None and summary["return_quantiles"] is None


def test_the_best_safe_trajectories_are_counted_by_their_length():
    """Ten short ones of return 0 or 1, long ones of returns 6, 12 and (unsafe) 99, and an unfinished one."""
    lengths, returns, costs = [1] * 10 + [6, 6, 6, 6], [0, 1] * 5 + [6, 12, 99, 50], [0] * 12 + [30, 0]
    spread = lambda sums: np.repeat(np.divide(sums, lengths), lengths).astype(np.float32)
    ends = np.zeros(sum(lengths), bool)
    ends[np.cumsum(lengths[:-1]) - 1] = True
    matrix = np.zeros((len(ends), 1), np.float32)
    dataset = dsrl.Dataset(matrix, matrix, matrix, spread(returns), spread(costs), ends, np.zeros_like(ends))
    chosen = lambda q: np.add.reduceat(dsrl.in_safe_trajectories(dataset, 25, q), np.cumsum([0, *lengths[:-1]])).tolist()
    assert chosen(0.0) == [1] * 10 + [6, 6, 0, 0]
    assert chosen(0.5) == [0] * 10 + [6, 6, 0, 0]  # half of the 22 safe steps are of return 6 or 12, and 2 of 12 trajectories
    assert chosen(0.75) == [0] * 10 + [0, 6, 0, 0]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The bytes of a valid file: as save writes it, and in the older format without checksums of published files."""
    path = tmp_path_factory.mktemp("files") / "a.hdf5"
    dsrl.save(path, dsrl.Dataset(**arrays()), {"env": "SafetyAntRun", "seed": 1})
    saved = path.read_bytes()
    published = write(path, arrays(), compression="gzip").read_bytes()
    return {"saved": saved, "published": published, "plain": write(path, arrays()).read_bytes()}


def load_bytes(path, content):
    """Loads a file of these bytes: a valid Dataset, or None where it is refused in one line; nothing else."""
    path.write_bytes(content)
    return load_or_none(path)


def load_or_none(path):
    try:
        dataset, metadata = dsrl.load(path)
    except dsrl.DatasetError as error:
        assert len(str(error).splitlines()) == 1 and str(path) in str(error) and "; " in str(error)
        return None
    check_valid(dataset)
    json.dumps(metadata)
    return dataset


@pytest.mark.parametrize("kind", ["saved", "published", "plain"])
def test_a_truncated_file_is_always_refused(tmp_path, files, kind):
    content, path = files[kind], tmp_path / "cut.hdf5"
    assert load_bytes(path, content) is not None
    for size in [*range(0, len(content), len(content) // 80), len(content) - 1]:
        path.write_bytes(content[:size])
        refused(path, "not readable as HDF5", "truncated")


def test_no_damaged_byte_of_a_saved_file_changes_what_is_loaded(tmp_path, files):
    original, seen = dsrl.Dataset(**arrays()), []
    for place in range(0, len(files["saved"]), 29):
        content = bytearray(files["saved"])
        content[place] ^= 0xFF
        dataset = load_bytes(tmp_path / "flipped.hdf5", content)
        assert dataset is None or equal(dataset, original), f"byte {place}"
        seen.append(dataset is None)
    assert sum(seen) > len(seen) / 4  # the rest is padding


def test_fuzz_random_bytes(tmp_path):
    @FUZZ
    @given(st.sampled_from([b"", b"\x89HDF\r\n\x1a\n", b"\x89HDF\r\n\x1a\n\x03\x08\x08\x00"]), st.binary(max_size=600))
    def run(start, rest):
        assert load_bytes(tmp_path / "random.hdf5", start + rest) is None

    run()


def test_fuzz_flipped_bytes(tmp_path, files):
    outcomes = set()
    flip = st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255))  # relative place, bits

    @FUZZ
    @given(st.sampled_from(sorted(files)), st.lists(flip, max_size=6))
    def run(kind, flips):
        content = bytearray(files[kind])
        for where, bits in flips:
            content[int(where * len(content))] ^= bits
        outcomes.add(load_bytes(tmp_path / "flipped.hdf5", content) is None)

    run()
    assert outcomes == {True, False}


KEYS = st.sampled_from(dsrl.Dataset._fields)
DTYPES = ["f2", "f4", "f8", ">f4", "i1", "i8", "u2", "?", "c8", "S4"]
SHAPES = [(-1,), (-1, 1), (1, -1), (-1, 2), (-1, 3), (2, -1, 1)]
VALUES = [np.nan, np.inf, -1, 0, 0.5, 2, 1e30]
EDITS = st.one_of(
    st.tuples(st.just("drop"), KEYS, st.none()),
    st.tuples(st.just("dtype"), KEYS, st.sampled_from(DTYPES)),
    st.tuples(st.just("reshape"), KEYS, st.sampled_from(SHAPES)),
    st.tuples(st.just("value"), KEYS, st.sampled_from(VALUES)),
    st.tuples(st.just("rows"), KEYS, st.integers(0, N)),
)


def mutate(content, kind, key, argument):
    """One random edit; an edit that numpy itself cannot make (a value the dtype lacks) leaves the array as it is."""
    if key not in content:
        return
    value = content[key]
    if kind == "drop":
        del content[key]
    elif kind == "rows":
        content[key] = value[:argument]
    elif kind == "dtype":
        try:
            content[key] = value.astype(argument)
        except ValueError:  # bytes that are no number, back to a number
            pass
    elif kind == "reshape" and value.size and value.size % int(abs(np.prod(argument))) == 0:
        content[key] = value.reshape(argument)
    elif kind == "value" and value.size and value.dtype.kind in "fc":
        content[key] = value.copy()
        content[key].flat[value.size // 2] = argument


@pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::numpy.exceptions.ComplexWarning")
def test_fuzz_mutated_arrays(tmp_path):
    outcomes = set()

    @FUZZ
    @given(st.lists(EDITS, min_size=1, max_size=3))
    def run(edits):
        content = with_privileged()
        for edit in edits:
            mutate(content, *edit)
        outcomes.add(load_or_none(write(tmp_path / "mutated.hdf5", content)) is None)

    run()
    assert outcomes == {True, False}
