"""data/public.py: the table's names, the guard against mixing tasks, the download through bad servers, the scores."""

import hashlib
import re
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import h5py
import numpy as np
import pytest

from data import collect, dsrl, public

NAME = "SafetyBallRun-v0-80-940"
ENTRY = public.find(NAME)


def write(path, n=200, obs=7, action=2, column=False, flags=np.int64, **replaced):
    """A file as DSRL writes them: float32, gzip, 0/1 flags, no attributes; (N, 1) columns if `column`."""
    rng = np.random.default_rng(0)
    ends = np.arange(1, n + 1) % 100 == 0
    arrays = {
        "observations": rng.normal(size=(n, obs)).astype(np.float32),
        "next_observations": rng.normal(size=(n, obs)).astype(np.float32),
        "actions": rng.uniform(-1, 1, (n, action)).astype(np.float32),
        "rewards": rng.normal(size=n).astype(np.float32),
        "costs": rng.integers(0, 2, n).astype(np.float32),
        "terminals": np.zeros(n, flags),
        "timeouts": ends.astype(flags),
    } | replaced
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        for key, value in arrays.items():
            value = value[:, None] if column and value.ndim == 1 else value
            file.create_dataset(key, data=value, compression="gzip")
    return arrays


class Hub(BaseHTTPRequestHandler):
    """Serves one file as the hub does: a redirect that announces the SHA-256, then the bytes, in ranges if asked for.

    The class attributes make it misbehave; `log` keeps the Range header of each request for bytes.
    """

    content, sha256, ranges, cut, log = b"", None, True, None, []

    def log_message(self, *_):
        pass

    def do_GET(self):
        if self.path.startswith("/datasets/"):
            self.send_response(302)
            self.send_header("Location", "/storage" + self.path)
            self.send_header("ETag", '"' + 64 * "0" + '"')  # the storage's own mark, not a SHA-256 of the file
            if self.sha256:
                self.send_header("X-Linked-Etag", f'"{self.sha256}"')
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        wanted = self.headers.get("Range")
        self.log.append(wanted)
        start = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1]) if wanted and self.ranges else 0
        total = len(self.content)
        if start >= total:
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{total}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        body = self.content[start:]
        self.send_response(206 if wanted and self.ranges else 200)
        if wanted and self.ranges:
            self.send_header("Content-Range", f"bytes {start}-{total - 1}/{total}")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: self.cut])  # the connection closes behind it: a dropped download if `cut` is short
        self.close_connection = True


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DSRL_DATASET_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    return tmp_path / "cache"


@pytest.fixture
def hub(tmp_path, cache, monkeypatch):
    """A hub that serves a small valid BallRun file; the handler class, to misconfigure and to read the log of."""
    write(tmp_path / "remote.hdf5")
    content = (tmp_path / "remote.hdf5").read_bytes()
    handler = type("Handler", (Hub,), {"content": content, "sha256": hashlib.sha256(content).hexdigest(), "log": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    yield handler
    server.shutdown()
    server.server_close()


def part(cache):
    path = cache / f"{NAME}.hdf5.part"
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def refused(*texts, run=lambda: public.locate(ENTRY)):
    with pytest.raises(dsrl.DatasetError) as caught:
        run()
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert all(text in message for text in texts), message
    return message


# ---------------------------------------------------------------- names


def test_table():
    assert len(public.TABLE) == 38  # the paper's number of datasets
    aliases = [alias for entry in public.TABLE for alias in set(entry.aliases)]
    assert len(aliases) == len(set(aliases)), "an alias means two files"
    for entry in public.TABLE:
        # The name repeats the highest cost, rounded to fives or tens.
        assert abs(int(entry.name.split("-")[-2]) - entry.max_cost) < 5
        assert entry.min_return < entry.max_return and entry.trajectories > 600


@pytest.mark.parametrize(
    "name, file, env",
    [
        ("SafetyAntRun", "SafetyAntRun-v0-150-1816", "bullet/SafetyAntRun"),
        ("OfflineAntRun-v0", "SafetyAntRun-v0-150-1816", "bullet/SafetyAntRun"),
        ("SafetyCarCircle", "SafetyCarCircle-v0-100-1450", "bullet/SafetyCarCircle"),
        ("SafetyCarCircle1", "SafetyCarCircle1Gymnasium-v0-250-1271", "SafetyCarCircle1-v0"),
        ("SafetyHopperVelocity-v1", "SafetyHopperVelocityGymnasium-v1-250-2240", "SafetyHopperVelocity-v1"),
        ("OfflinePointGoal1Gymnasium-v0", "SafetyPointGoal1Gymnasium-v0-100-2022", "SafetyPointGoal1-v0"),
        ("SafetyPointGoal1Gymnasium-v0-100-2022.hdf5", "SafetyPointGoal1Gymnasium-v0-100-2022", "SafetyPointGoal1-v0"),
        ("OfflineMetaDrive-easymean-v0", "SafeMetaDrive-easymean-v0-85-1000", None),
    ],
)
def test_names(name, file, env):
    assert (public.find(name).name, public.find(name).env) == (file, env)


def test_unknown_name():
    refused("dsrl/SafetyAntRum", "did you mean SafetyAntRun", run=lambda: public.find("SafetyAntRum"))
    refused("dsrl/xyz", "python -m data.public", run=lambda: public.find("xyz"))


def test_scores():
    low, high = 26.339754104614258, 1327.445556640625  # DSRL's constants of BallRun
    returns, costs = public.scores(ENTRY, np.array([low, high, (low + high) / 2]), np.array([0, 20, 60]), 20)
    np.testing.assert_allclose(returns, [0, 1, 0.5], atol=1e-12)
    np.testing.assert_allclose(costs, [0, 1, 3])
    np.testing.assert_allclose(public.scores(ENTRY, low, np.array([0, 3]), 0)[1], [1, 4])  # DSRL's epsilon for limit 0


# ---------------------------------------------------------------- using


def test_path_and_default_work_as_before(tmp_path):
    dataset, about = public.load(collect.provided("SafetyPointRun"), env="SafetyPointRun", obs_size=12, action_size=2)
    assert len(dataset.rewards) == 100_000 and about["env"] == "SafetyPointRun" and "dsrl" not in about
    write(tmp_path / "mine.hdf5")
    dataset, about = public.load(tmp_path / "mine.hdf5", env="anything", obs_size=7, action_size=2)
    assert len(dataset.rewards) == 200 and not (tmp_path / "mine.hdf5.sha256").exists()


@pytest.mark.parametrize("column", [False, True])
@pytest.mark.parametrize("flags", [bool, np.int64, np.uint8, np.float32])
def test_load_by_name(cache, column, flags):
    arrays = write(cache / f"{NAME}.hdf5", column=column, flags=flags)
    for name in ("dsrl/SafetyBallRun", f"dsrl/{NAME}", f"dsrl/{NAME}.hdf5"):
        dataset, about = public.load(Path(name), env="bullet/SafetyBallRun", obs_size=7, action_size=2)
        assert dataset.costs.shape == (200,) and dataset.timeouts.dtype == bool
        np.testing.assert_array_equal(dataset.costs, arrays["costs"])
        assert dataset.timeouts.sum() == 2 and about["dsrl"]["max_return"] == ENTRY.max_return
    assert dsrl.describe(dataset, 80)["trajectories"] == 2


def test_actions_beyond_the_range_are_clipped_in_published_files_only(cache, tmp_path):
    raw = np.full((200, 2), 1.75, np.float32)
    write(cache / f"{NAME}.hdf5", actions=raw)
    dataset, _ = public.load("dsrl/SafetyBallRun", env="bullet/SafetyBallRun")
    np.testing.assert_array_equal(dataset.actions, 1.0)
    write(tmp_path / "other.hdf5", actions=raw)
    refused("beyond [-1, 1]", run=lambda: public.load(tmp_path / "other.hdf5", env="bullet/SafetyBallRun"))
    raw[3, 0] = np.inf
    write(cache / f"{NAME}.hdf5", actions=raw)
    refused("actions have NaN or inf", run=lambda: public.load("dsrl/SafetyBallRun", env="bullet/SafetyBallRun"))


def test_tasks_are_never_mixed(cache, tmp_path, hub):
    # Bullet's AntRun is another task than Safety-Gymnasium's: refused by name, before anything is downloaded.
    for dataset in ("dsrl/SafetyAntRun", tmp_path / "SafetyAntRun-v0-150-1816.hdf5"):
        message = refused("Bullet-Safety-Gym's SafetyAntRun-v0", run=lambda: public.load(dataset, env="SafetyAntRun"))
        assert "use --env bullet/SafetyAntRun" in message
    refused("use --env SafetyCarCircle1-v0", run=lambda: public.load("dsrl/SafetyCarCircle1", env="bullet/SafetyCarCircle"))
    refused("no such environment", run=lambda: public.load("dsrl/SafeMetaDrive-easymean", env="SafetyAntRun"))
    assert hub.log == []
    # Under another name the sizes tell.
    write(tmp_path / "renamed.hdf5", obs=33, action=8)
    mine = lambda: public.load(tmp_path / "renamed.hdf5", env="SafetyAntRun", obs_size=40)
    refused("33 columns, SafetyAntRun has 40", run=mine)
    # A version of other thresholds is another task.
    other = lambda: public.load("dsrl/SafetyHopperVelocity", env="SafetyHopperVelocity-v0")
    assert "use --env SafetyHopperVelocity-v1" in refused("not on SafetyHopperVelocity-v0", run=other)
    # A native task's name, with and without version, is the published one's.
    write(cache / "SafetyHalfCheetahVelocityGymnasium-v1-250-2495.hdf5", obs=17, action=6)
    for env in ("SafetyHalfCheetahVelocity", "SafetyHalfCheetahVelocity-v1"):
        public.load("dsrl/SafetyHalfCheetahVelocity", env=env, obs_size=17, action_size=6)


def test_change_of_a_file_is_noticed(cache):
    load = lambda: public.load("dsrl/SafetyBallRun", env="bullet/SafetyBallRun")
    write(cache / f"{NAME}.hdf5")
    sha256 = load()[1]["sha256"]
    assert (cache / f"{NAME}.hdf5.sha256").read_text() == f"{sha256}  {NAME}.hdf5\n"
    write(cache / f"{NAME}.hdf5", n=300)
    refused("recorded in", "delete both", run=load)


def test_truncated_file_in_the_cache(cache):
    path = cache / f"{NAME}.hdf5"
    write(path)
    path.write_bytes(path.read_bytes()[:-500])
    refused(str(path), "truncated", "delete it")


# ---------------------------------------------------------------- downloading


def test_download(cache, hub, capsys):
    dataset, about = public.load("dsrl/SafetyBallRun", env="bullet/SafetyBallRun", obs_size=7, action_size=2)
    assert len(dataset.rewards) == 200 and about["sha256"] == hub.sha256 and hub.log == [None]
    assert sorted(p.name for p in cache.iterdir()) == [f"{NAME}.hdf5", f"{NAME}.hdf5.sha256"]
    assert capsys.readouterr().err.count("\n") == 1
    public.load("dsrl/SafetyBallRun", env="bullet/SafetyBallRun")
    assert len(hub.log) == 1, "downloaded twice"


def test_dropped_connection_is_resumed_at_once(cache, hub):
    hub.cut = 3000
    path = public.locate(ENTRY)
    assert path.read_bytes() == hub.content
    n = -(-len(hub.content) // 3000)
    assert n > 2 and hub.log == [None] + [f"bytes={3000 * i}-" for i in range(1, n)]


def test_earlier_download_is_resumed(cache, hub):
    part(cache).write_bytes(hub.content[:5000])
    assert public.locate(ENTRY).read_bytes() == hub.content and hub.log == ["bytes=5000-"]


def test_complete_part_is_used(cache, hub):
    part(cache).write_bytes(hub.content)
    assert public.locate(ENTRY).read_bytes() == hub.content and hub.log == [f"bytes={len(hub.content)}-"]


@pytest.mark.parametrize("foreign", [b"x" * 5000, b"x" * 10**6])
def test_foreign_part_is_given_up(cache, hub, foreign):
    part(cache).write_bytes(foreign)
    assert public.locate(ENTRY).read_bytes() == hub.content and hub.log == [f"bytes={len(foreign)}-", None]


def test_server_without_ranges(cache, hub):
    hub.ranges = False
    part(cache).write_bytes(hub.content[:5000])
    assert public.locate(ENTRY).read_bytes() == hub.content
    (cache / f"{NAME}.hdf5").unlink()
    hub.cut = 3000  # nothing to be gained by trying for ever
    refused("cannot be downloaded", "closed after 3000 of", "run again")
    assert not (cache / f"{NAME}.hdf5").exists() and len(hub.log) == 3


def test_python_s_own_server(cache, tmp_path, monkeypatch):
    """http.server knows neither ranges nor checksums; the record made at the first download is checked at the next."""
    root = tmp_path / "www"
    write(root / public.REPOSITORY / f"{NAME}.hdf5")
    quiet = type("Quiet", (SimpleHTTPRequestHandler,), {"log_message": lambda *_: None})
    server = ThreadingHTTPServer(("127.0.0.1", 0), lambda *args: quiet(*args, directory=str(root)))
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    part(cache).write_bytes(b"foreign")
    path = public.locate(ENTRY)
    assert dsrl.sha256(path) == public._recorded(path)
    path.unlink()
    write(root / public.REPOSITORY / f"{NAME}.hdf5", n=300)
    refused("SHA-256", "hdf5.sha256 holds")
    refused("HTTP Error 404", run=lambda: public.locate(public.find("SafetyCarRun")))
    server.shutdown()
    server.server_close()


def test_wrong_checksum(cache, hub):
    hub.sha256 = "0" * 64
    refused("SHA-256", "the server announces 000000000000", public.url(ENTRY))
    assert not (cache / f"{NAME}.hdf5").exists() and part(cache).stat().st_size == 0


def test_something_else_than_the_file(cache, hub):
    hub.content, hub.sha256 = b"<html>log in to this network</html>", None
    refused("not a complete HDF5 file")
    assert not (cache / f"{NAME}.hdf5").exists() and part(cache).stat().st_size == 0


def test_truncated_upload_is_noticed_without_a_checksum(cache, hub):
    hub.content, hub.sha256 = hub.content[:-500], None
    refused("not a complete HDF5 file")
    assert part(cache).stat().st_size == 0


def test_no_network(cache, monkeypatch, capsys):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{unused.getsockname()[1]}")
        refused(str(cache / f"{NAME}.hdf5"), public.url(ENTRY), "refused", "put it there")
    assert capsys.readouterr().err == ""


def test_concurrent_downloads(cache, hub):
    hub.cut = 3000
    command = [sys.executable, "-c", f"from data import public; public.locate(public.find({NAME!r}))"]
    root = Path(public.__file__).parents[1]
    running = [subprocess.Popen(command, cwd=root, stderr=subprocess.PIPE) for _ in range(3)]
    assert [process.wait(60) for process in running] == [0, 0, 0]
    for process in running:
        process.stderr.close()
    assert (cache / f"{NAME}.hdf5").read_bytes() == hub.content
    assert len(hub.log) == -(-len(hub.content) // 3000), "more than one of them downloaded"


def test_command(cache, capsys, monkeypatch):
    public.main([])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 39 and NAME in lines[4] and lines[4].endswith("no")
    write(cache / f"{NAME}.hdf5")
    public.main(["SafetyBallRun"])
    out = capsys.readouterr().out
    assert "200 transitions, 7 observations, 2 actions" in out and "trajectories 2, not 940" in out
