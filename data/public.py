"""DSRL's published datasets by name: the table of files, the download, the guard against mixing tasks, the scores.

    python -m data.public                       # the table
    python -m data.public SafetyAntRun          # download it and compare it with the table
    python algos/marvel.py --env bullet/SafetyAntRun --dataset dsrl/SafetyAntRun

Sources: Liu et al. 2023 (arXiv 2306.09303); file names and constants from `dsrl/infos.py` of liuzuxin/DSRL, the files from
the Hugging Face hub (dataset YYY-45/DSRL; the server in DSRL's releases is gone: issues 19 and 21 there). The data is
licensed CC BY 4.0. It was recorded with safety-gymnasium 0.4.0 and bullet-safety-gym 1.4.0.

Files lie in $DSRL_DATASET_DIR or ~/.dsrl/datasets, the folder that the `dsrl` package uses. DSRL publishes no checksums,
so a download is checked against the size and SHA-256 that the hub announces with the file, and its SHA-256 is kept beside
it as FILE.sha256, which every later use is compared with. The package huggingface_hub resumes and caches as well, but does not
compare what has arrived with its SHA-256 (its issues 2364 and 3643), so the download stands here.
"""

import argparse
import fcntl
import http.client
import os
import re
import sys
import urllib.error
import urllib.request
from contextlib import suppress
from difflib import get_close_matches
from pathlib import Path
from typing import IO, Any, NamedTuple

import h5py
import numpy as np
from tqdm import tqdm

import envs
from data import dsrl
from data.dsrl import Dataset, DatasetError

REPOSITORY = "datasets/YYY-45/DSRL/resolve/main"
TIMEOUT = 30.0  # s without an answer before a connection counts as dead
CHUNK = 2**20


def _unversioned(task: str) -> str:
    return re.sub(r"-v\d+$", "", task)


class Published(NamedTuple):
    """One published file, called TASK-VERSION-HIGHEST COST-TRAJECTORIES, with DSRL's constants."""

    name: str  # the file's name without .hdf5
    horizon: int  # steps until truncation
    min_return: float  # of the published trajectories; both are what DSRL's normalised return refers to
    max_return: float
    max_cost: float  # of the published trajectories

    @property
    def suite(self) -> str:
        if self.name.startswith("SafeMetaDrive"):
            return "MetaDrive"
        return "Safety-Gymnasium" if "Gymnasium-" in self.name else "Bullet-Safety-Gym"

    @property
    def env(self) -> str | None:
        """The environment's id here; None for MetaDrive, which this suite does not have."""
        if self.suite == "MetaDrive":
            return None
        task = self.name.rsplit("-", 2)[0]
        return task.replace("Gymnasium", "") if self.suite == "Safety-Gymnasium" else "bullet/" + _unversioned(task)

    @property
    def trajectories(self) -> int:
        return int(self.name.rsplit("-", 1)[1])

    @property
    def aliases(self) -> tuple[str, ...]:
        """What the file may be called: its name, with or without its counts, its version and `Gymnasium`, or DSRL's id."""
        task = self.name.rsplit("-", 2)[0]
        bare = _unversioned(task)
        offline = re.sub("^Safe(ty|(?=Meta))", "Offline", task)
        return (self.name, task, bare, task.replace("Gymnasium", ""), bare.replace("Gymnasium", ""), offline)


# fmt: off
TABLE = (
    Published("SafetyAntCircle-v0-200-5728", 500, 0.0177031010389328, 460.7091979980469, 200.0),
    Published("SafetyAntRun-v0-150-1816", 200, 0.001767391717990563, 955.4818725585938, 150.0),
    Published("SafetyBallCircle-v0-80-886", 200, 0.38312244415283203, 881.46337890625, 80.0),
    Published("SafetyBallRun-v0-80-940", 100, 26.339754104614258, 1327.445556640625, 80.0),
    Published("SafetyCarCircle-v0-100-1450", 300, 3.484419822692871, 534.3060913085938, 100.0),
    Published("SafetyCarRun-v0-40-651", 200, 204.28726196289062, 574.6533203125, 40.0),
    Published("SafetyDroneCircle-v0-100-1923", 300, 207.794189453125, 996.38916015625, 100.0),
    Published("SafetyDroneRun-v0-140-1990", 200, 10.557029724121094, 682.8330078125, 140.0),
    Published("SafetyCarButton1Gymnasium-v0-250-2656", 1000, 0.0028926206826067613, 44.420003345738984, 250.0),
    Published("SafetyCarButton2Gymnasium-v0-300-3755", 1000, 0.001767391717990563, 41.99513815522894, 300.0),
    Published("SafetyCarCircle1Gymnasium-v0-250-1271", 500, 8.037073135375977, 24.94155502319336, 250.0),
    Published("SafetyCarCircle2Gymnasium-v0-400-940", 500, 5.113386154174805, 25.950098037719727, 398.0),
    Published("SafetyCarGoal1Gymnasium-v0-120-1671", 1000, 0.012232819540852091, 39.907809198384705, 120.0),
    Published("SafetyCarGoal2Gymnasium-v0-200-4105", 1000, 0.001032874531954775, 28.902897990056502, 200.0),
    Published("SafetyCarPush1Gymnasium-v0-200-2871", 1000, 0.013700173533941762, 16.304467598905237, 200.0),
    Published("SafetyCarPush2Gymnasium-v0-250-4407", 1000, 0.00029391133526335267, 15.141648491514314, 250.0),
    Published("SafetyPointButton1Gymnasium-v0-200-2268", 1000, 0.008822109034937853, 41.19301568767707, 200.0),
    Published("SafetyPointButton2Gymnasium-v0-250-3288", 1000, 0.014114166087574098, 42.8985953616709, 250.0),
    Published("SafetyPointCircle1Gymnasium-v0-200-1098", 500, 20.067626953125, 61.72819519042969, 200.0),
    Published("SafetyPointCircle2Gymnasium-v0-300-895", 500, 20.478347778320312, 54.02184295654297, 299.0),
    Published("SafetyPointGoal1Gymnasium-v0-100-2022", 1000, 0.01196012764197707, 30.071114857340543, 100.0),
    Published("SafetyPointGoal2Gymnasium-v0-200-3442", 1000, 0.002616959830266108, 27.717709787852737, 200.0),
    Published("SafetyPointPush1Gymnasium-v0-150-2379", 1000, 0.0014001545292344209, 16.518654299293367, 150.0),
    Published("SafetyPointPush2Gymnasium-v0-200-3242", 1000, 0.0012438183001730607, 14.691039145644403, 200.0),
    Published("SafetyAntVelocityGymnasium-v1-250-2249", 1000, 6.1519012451171875, 2976.276611328125, 250.0),
    Published("SafetyHalfCheetahVelocityGymnasium-v1-250-2495", 1000, 5.7509765625, 2806.93310546875, 250.0),
    Published("SafetyHopperVelocityGymnasium-v1-250-2240", 1000, 37.05154800415039, 1911.396728515625, 250.0),
    Published("SafetySwimmerVelocityGymnasium-v1-200-1686", 1000, 0.07114458084106445, 238.95831298828125, 200.0),
    Published("SafetyWalker2dVelocityGymnasium-v1-300-2729", 1000, 18.668498992919922, 3418.223876953125, 300.0),
    Published("SafeMetaDrive-easysparse-v0-85-1000", 1000, 20.094310760498047, 425.8006286621094, 82.42418670654297),
    Published("SafeMetaDrive-easymean-v0-85-1000", 1000, 22.142553329467773, 425.82440185546875, 82.38601684570312),
    Published("SafeMetaDrive-easydense-v0-85-1000", 1000, 19.71139144897461, 425.81732177734375, 80.36358642578125),
    Published("SafeMetaDrive-mediumsparse-v0-50-1000", 1000, 17.446578979492188, 269.80084228515625, 46.46459197998047),
    Published("SafeMetaDrive-mediummean-v0-50-1000", 1000, 17.032529830932617, 269.8221435546875, 46.46154022216797),
    Published("SafeMetaDrive-mediumdense-v0-50-1000", 1000, 15.102348327636719, 269.7813415527344, 46.45858383178711),
    Published("SafeMetaDrive-hardsparse-v0-85-1000", 1000, 17.247974395751953, 486.80523681640625, 85.010009765625),
    Published("SafeMetaDrive-hardmean-v0-85-1000", 1000, 19.387981414794922, 486.9967956542969, 84.33995056152344),
    Published("SafeMetaDrive-harddense-v0-85-1000", 1000, 15.386894226074219, 486.63616943359375, 84.76679229736328),
)
# fmt: on
_BY_ALIAS = {alias: entry for entry in TABLE for alias in entry.aliases}


def find(name: str) -> Published:
    """The published file called `name` (any of its aliases, with or without .hdf5); DatasetError with near names if none is.

    DSRL publishes one file per task, so a task's name alone is enough.
    """
    name = name.removesuffix(".hdf5")
    if name not in _BY_ALIAS:
        near = get_close_matches(name, _BY_ALIAS, n=3, cutoff=0.6)
        hint = f"did you mean {' or '.join(near)}?" if near else "`python -m data.public` lists them"
        raise DatasetError(f"dsrl/{name}: DSRL publishes no dataset of that name; {hint}")
    return _BY_ALIAS[name]


def published(env: str) -> Published | None:
    """The published file of an environment of this suite, if there is one; of the same version, as others have other thresholds."""
    name = envs.recorded(env)
    name = envs.TASKS[name].reference_id if name in envs.TASKS else name
    return next((entry for entry in TABLE if entry.env == name), None)


def folder() -> Path:
    """Where DSRL's files lie: $DSRL_DATASET_DIR or ~/.dsrl/datasets."""
    return Path(os.environ.get("DSRL_DATASET_DIR") or "~/.dsrl/datasets").expanduser()


def url(entry: Published) -> str:
    """The file's address on the hub, or on the mirror that $HF_ENDPOINT names."""
    return f"{os.environ.get('HF_ENDPOINT') or 'https://huggingface.co'}/{REPOSITORY}/{entry.name}.hdf5"


def scores(entry: Published, returns, costs, cost_limit: float):
    """DSRL's normalised return and cost of undiscounted episode sums (any shape); safe means normalised cost <= 1.

    (R - min) / (max - min) over the published trajectories, and C / limit; (C + 1) / (limit + 1) where the limit is 0.
    """
    low, high, shift = entry.min_return, entry.max_return, float(cost_limit == 0)
    return (np.asarray(returns) - low) / (high - low), (np.asarray(costs) + shift) / (cost_limit + shift)


# ---------------------------------------------------------------- using


def load(
    dataset: str | os.PathLike, *, env: str, obs_size: int | None = None, action_size: int | None = None
) -> tuple[Dataset, dict[str, Any]]:
    """`dsrl.load` of what an algorithm's --dataset names, for the task `env`.

    Args:
      dataset: `dsrl/NAME` (downloaded if it is not there yet), or the path of a file.
      env, obs_size, action_size: the task's name and sizes, which the data must fit.

    Returns:
      Dataset and metadata as `dsrl.load` gives them. A published file has its actions clipped to [-1, 1], as its simulator
      did (some of Bullet's hold the unclipped ones: liuzuxin/DSRL issue 5), and `dsrl`, the entry of TABLE, in its metadata.

    Raises:
      DatasetError: unknown name; another task's data; a file that cannot be had or used. One line.
    """
    path = Path(dataset)
    named = path.parts[:1] == ("dsrl",) and not path.exists()
    entry = find(path.name) if named else next((e for e in TABLE if path.name == f"{e.name}.hdf5"), None)
    if entry is None:
        return dsrl.load(path, env=env, obs_size=obs_size, action_size=action_size)
    if published(env) != entry:
        recorded = f"recorded on {entry.suite}'s {entry.name.rsplit('-', 2)[0]}, not on {env}"
        here = f"use --env {entry.env}" if entry.env else "this suite has no such environment"
        raise DatasetError(f"{path}: {recorded}; {here}, or other data")
    if named:
        path = locate(entry)
    found, about = dsrl.load(path, obs_size=obs_size, action_size=action_size, clip_actions=True)
    _compare_with_record(path, about["sha256"])
    return found, about | {"dsrl": entry._asdict()}


def _complete_hdf5(path: str | os.PathLike) -> bool:
    """Whether the file opens as HDF5, whose header says how long it must be."""
    try:
        with h5py.File(path, "r", locking=False):
            return True
    except (OSError, RuntimeError):
        return False


def locate(entry: Published) -> Path:
    """The published file on this machine, downloaded first if need be; DatasetError if that cannot be done."""
    path = folder() / f"{entry.name}.hdf5"
    if not path.exists():
        try:
            download(url(entry), path)
        except (OSError, http.client.HTTPException) as error:
            reason = error.reason if type(error) is urllib.error.URLError else error
            reason = " ".join(str(reason).split()) or type(reason).__name__
            wrong = f"{path}: no such file, and it cannot be downloaded from {url(entry)} ({reason})"
            raise DatasetError(f"{wrong}; run again to go on, or fetch it elsewhere and put it there") from error
    elif not _complete_hdf5(path):
        raise DatasetError(f"{path}: truncated, damaged or not HDF5; delete it, and run again to download it")
    return path


def _record(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


def _recorded(path: Path) -> str | None:
    """The SHA-256 kept beside a file (in sha256sum's format), if there is one."""
    record = _record(path)
    return next(iter(record.read_text().split()), None) if record.is_file() else None


def _compare_with_record(path: Path, sha256: str) -> None:
    """Keeps the SHA-256 of a file in DSRL's folder the first time it is used; DatasetError if it has changed since."""
    recorded = _recorded(path)
    if recorded is None:
        if path.parent == folder():
            with suppress(OSError):  # a shared folder that others look after
                _record(path).write_text(f"{sha256}  {path.name}\n")
    elif recorded != sha256:
        raise DatasetError(
            f"{path}: its SHA-256 is {sha256[:12]}..., not the {recorded[:12]}... recorded in {_record(path).name}; "
            "delete both to download it again"
        )


# ---------------------------------------------------------------- downloading


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects and keeps their headers: the hub announces a file's SHA-256 where it redirects to its storage."""

    def __init__(self):
        self.seen = []

    def redirect_request(self, request, response, code, message, headers, target):
        self.seen.append(headers)
        return super().redirect_request(request, response, code, message, headers, target)


class _Damaged(Exception):
    """The bytes that were downloaded are not the file."""


def download(address: str, path: Path) -> None:
    """Downloads `address` to `path`, going on from an earlier attempt's FILE.part where the server can.

    The file appears whole or not at all: its length, its SHA-256 where the server announces one (or FILE.sha256 holds one)
    and HDF5's own end-of-file mark are checked first. Several processes may ask for one file: one downloads, the rest wait.

    Raises:
      OSError, http.client.HTTPException: the server or the disk failed; FILE.part keeps what has come.
      DatasetError: what came is not the file; nothing is kept.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_name(path.name + ".part"), "a+b") as part:
        fcntl.flock(part, fcntl.LOCK_EX)
        if path.exists():  # another process was faster
            return
        resumed = part.seek(0, os.SEEK_END) > 0
        try:
            try:
                sha256 = _complete(address, part, path)
            except _Damaged:
                if not resumed:
                    raise
                sha256 = _complete(address, part, path)  # the part that was there already may be to blame
        except _Damaged as error:
            raise DatasetError(f"{path}: {error}; run again, and if that repeats get {address} by other means") from None
        os.replace(part.name, path)
        _compare_with_record(path, sha256)


def _complete(address: str, part: IO[bytes], path: Path) -> str:
    """Fetches the rest of `part`, through dropped connections as long as each brings something; its SHA-256.

    _Damaged, with `part` emptied, if the result is not the file.
    """
    most = -1
    while True:
        try:
            announced = _fetch(address, part)
            break
        except (OSError, http.client.HTTPException) as error:
            size = part.seek(0, os.SEEK_END)
            if isinstance(error, urllib.error.HTTPError) or size <= max(most, 0):
                raise
            most = size
    part.flush()
    sha256 = dsrl.sha256(part.name)
    try:
        for source, wanted in (("the server announces", announced), (f"{_record(path).name} holds", _recorded(path))):
            if wanted and wanted != sha256:
                raise _Damaged(f"the download's SHA-256 is {sha256[:12]}..., {source} {wanted[:12]}...")
        if not _complete_hdf5(part.name):
            raise _Damaged("the download is not a complete HDF5 file")
    except _Damaged:
        part.truncate(0)
        raise
    return sha256


def _fetch(address: str, part: IO[bytes]) -> str | None:
    """One request for the bytes that `part` lacks, appended to it; the SHA-256 that the server announces, if any."""
    have = part.seek(0, os.SEEK_END)
    redirects = _Redirects()
    request = urllib.request.Request(address, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.build_opener(redirects).open(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code != 416:  # range not satisfiable: there is nothing behind what we have
            raise
        response = error
    with response:
        hashes = [headers["X-Linked-Etag"] for headers in (*redirects.seen, response.headers)]
        span = re.fullmatch(r"bytes (?:(\d+)-\d+|\*)/(\d+)", response.headers.get("Content-Range", ""))
        if response.status == 200:  # everything, whether asked for or not
            part.truncate(0)
            total = response.headers.get("Content-Length")
        elif span and int(span[1] or have) == have:
            total = span[2]
        else:
            raise OSError(f"unexpected answer {response.status} to a request for bytes {have}-")
        total = total and int(total)
        if response.status != 416:
            have = part.seek(0, os.SEEK_END)
            print(f"downloading {address} to {part.name}" + (f" from byte {have:,}" if have else ""), file=sys.stderr)
            with tqdm(total=total, initial=have, unit="B", unit_scale=True, disable=None) as bar:
                while block := response.read1(CHUNK):  # not read: what came before a broken connection counts
                    bar.update(part.write(block))
    size = part.seek(0, os.SEEK_END)
    if total and size > total:
        part.truncate(0)
        raise _Damaged(f"{Path(part.name).name} held {size} bytes, the file has {total}")
    if total and size < total:
        raise OSError(f"the connection closed after {size} of {total} bytes")
    found = [re.fullmatch(r'"?([0-9a-f]{64})"?', text) for text in hashes if text]
    return next((match[1] for match in found if match), None)


# ---------------------------------------------------------------- command


def _differences(entry: Published, dataset: Dataset) -> list[str]:
    """Where a file's trajectories are not what TABLE says of them."""
    split = dsrl.episodes(dataset)
    pairs = {
        "trajectories": (len(split.start), entry.trajectories),
        "longest": (split.lengths.max(), min(split.lengths.max(), entry.horizon)),
        "lowest return": (split.returns.min(), entry.min_return),
        "highest return": (split.returns.max(), entry.max_return),
        "highest cost": (split.costs.max(), entry.max_cost),
    }
    odd = {what: pair for what, pair in pairs.items() if not np.isclose(*pair, rtol=1e-4)}
    return [f"{what} {here:.8g}, not {there:.8g}" for what, (here, there) in odd.items()]


def main(words: list[str] | None = None) -> None:
    """Lists the published files, or downloads and checks those named."""
    parser = argparse.ArgumentParser(prog="python -m data.public", description=main.__doc__)
    parser.add_argument("names", metavar="NAME", nargs="*", help="published files, as listed without arguments")
    names = parser.parse_args(words).names
    if not names:
        print(f"{'file':50} {'environment here':28} {'T':>5} {'returns':>18} {'cost':>6}  in {folder()}")
        for e in TABLE:
            returns, here = f"{e.min_return:.2f} to {e.max_return:.1f}", (folder() / f"{e.name}.hdf5").exists()
            print(f"{e.name:50} {e.env or '-':28} {e.horizon:5} {returns:>18} {e.max_cost:6.1f}  {'yes' if here else 'no'}")
    for name in names:
        entry = find(name.removeprefix("dsrl/"))
        path = locate(entry)
        dataset, about = dsrl.load(path, clip_actions=True)
        _compare_with_record(path, about["sha256"])
        (n, obs), actions = dataset.observations.shape, dataset.actions.shape[1]
        found = _differences(entry, dataset)
        print(f"{path}: {n:,} transitions, {obs} observations, {actions} actions, sha256 {about['sha256']}")
        print("  " + (f"differs from DSRL's table: {', '.join(found)}" if found else "as DSRL's table says"))


if __name__ == "__main__":
    try:
        main()
    except DatasetError as error:
        sys.exit(print(f"error: {error}", file=sys.stderr) or 2)
