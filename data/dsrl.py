"""DSRL datasets: the HDF5 schema of Liu et al. 2023 (arXiv 2306.09303), checked on the way in and on the way out.

A file holds seven flat arrays over N transitions in time order, trajectory after trajectory:

    observations, next_observations  (N, obs)     task units, not normalised
    actions                          (N, action)  within [-1, 1]
    rewards, costs                   (N,)         per step, raw; costs >= 0
    terminals, timeouts              (N,)         0/1; a trajectory ends on the row where either is set

This suite's own files may hold two more, which DSRL does not know: `privileged` and `next_privileged` (N, k), what the cost
depends on but the observations lack (Run: x), for critics only.

Every failure is one `DatasetError`: a single line with the file, what is wrong with it, and the mend.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np

import envs
from envs import files

# Rounding left over from rescaling is tolerated. More is refused rather than clipped here: it is another action space,
# or an unsquashed policy's raw actions, as in some published BulletSafetyGym files (liuzuxin/DSRL issue 5).
ACTION_TOLERANCE = 1e-3
CHUNK_BYTES = 2**18  # whole rows per chunk: large enough to compress well, small enough to stay in HDF5's cache
MAX_RATIO = 2000  # deflate tops out near 1030:1, so a file that declares more than this has a damaged header
QUANTILES = (0, 10, 25, 50, 75, 90, 100)

# What h5py raises on damaged or foreign content. Only blocks made of h5py calls are guarded with this, so that
# the same types raised by a bug in this module still surface as themselves.
_H5PY_ERRORS = (OSError, RuntimeError, KeyError, ValueError, TypeError, OverflowError, MemoryError, SystemError)


class DatasetError(ValueError):
    """A dataset that cannot be used; the message is one line: file, what is wrong, mend."""


class Dataset(NamedTuple):
    """N transitions as numpy arrays: the first five float32, the two flags bool."""

    observations: np.ndarray  # (N, obs)
    next_observations: np.ndarray  # (N, obs); the true successor, also on the last row of a trajectory
    actions: np.ndarray  # (N, action), within [-1, 1]
    rewards: np.ndarray  # (N,)
    costs: np.ndarray  # (N,), >= 0
    terminals: np.ndarray  # (N,) bool; the task ended: do not bootstrap
    timeouts: np.ndarray  # (N,) bool; cut off by the time limit: bootstrap
    privileged: np.ndarray | None = None  # (N, k) float32
    next_privileged: np.ndarray | None = None  # (N, k) float32


class Episodes(NamedTuple):
    """The E trajectories of a dataset; trajectory i is rows start[i]:stop[i]."""

    start: np.ndarray  # (E,) int64
    stop: np.ndarray  # (E,) int64, exclusive
    complete: np.ndarray  # (E,) bool; only the last can be False: the file stops in the middle of it
    returns: np.ndarray  # (E,) float64; sum of raw rewards, undiscounted
    costs: np.ndarray  # (E,) float64; sum of raw costs, undiscounted
    lengths: np.ndarray  # (E,) int64, transitions

    def safe(self, cost_limit: float) -> np.ndarray:
        """(E,) bool: complete, and of a cost of at most `cost_limit`; what a cut-off one would have cost is not known."""
        return self.complete & (self.costs <= cost_limit)


_OPTIONAL = ("privileged", "next_privileged")
_REQUIRED = tuple(key for key in Dataset._fields if key not in _OPTIONAL)
MATRICES = ("observations", "next_observations", "actions", *_OPTIONAL)
_FLAGS = ("terminals", "timeouts")
# Accepted numpy kinds (float, int, unsigned, bool). Costs are often 0/1 indicators, so integers are no loss there;
# integer observations or actions are another task's encoding.
_KINDS = {key: "f" if key in MATRICES else "fiub" for key in Dataset._fields}


def _error(path: str | os.PathLike, wrong: str, mend: str) -> DatasetError:
    # File content (h5py messages, attributes, names) can hold line breaks; the promise is one line.
    return DatasetError(" ".join(f"{path}: {wrong}; {mend}".splitlines()))


@contextmanager
def h5py_errors(path: Path) -> Iterator[None]:
    """Turns whatever h5py raises on bad content into a DatasetError."""
    try:
        yield
    except PermissionError as error:
        raise _error(path, "permission denied", "make the file readable for this user") from error
    except _H5PY_ERRORS as error:
        wrong = f"not readable as HDF5 ({type(error).__name__}: {str(error)[:200]})"
        mend = f"the file is truncated or damaged: download it again, or of another format: convert it {CONVERT}"
        raise _error(path, wrong, mend) from error


def plain(value: Any) -> Any:
    """An HDF5 attribute as something `json.dumps` takes."""
    if isinstance(value, (np.ndarray, np.generic)):
        value = value.tolist()
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, list):
        return [plain(item) for item in value]
    return value if isinstance(value, (str, int, float, bool)) else str(value)


def _stored(value: Any) -> Any:
    """A metadata value as an HDF5 attribute."""
    value = value.item() if isinstance(value, np.generic) else value
    if isinstance(value, (bool, int, float)):
        return value
    text = (value if isinstance(value, str) else json.dumps(value, sort_keys=True)).encode()
    # Fixed length: HDF5's variable-length strings lie outside its checksums, and damage there can hang the library.
    return np.array(text, h5py.string_dtype("utf-8", max(1, len(text))))


CONVERT = "by `python -m data.convert FILE OUT.hdf5`"
Layout = Mapping[str, tuple[tuple[int, ...] | None, np.dtype]]


def _check_layout(path: str | os.PathLike, layout: Layout) -> None:
    """Checks keys, dtypes and shapes; needs no data, so nothing of a damaged file's claimed size is allocated."""
    wanted = Dataset._fields if any(key in layout for key in _OPTIONAL) else _REQUIRED
    missing = [key for key in wanted if key not in layout]
    if missing:
        raise _error(path, f"missing {', '.join(missing)}", f"add them as top-level arrays, or convert another format {CONVERT}")
    for key, (shape, dtype) in layout.items():
        matrix = key in MATRICES
        if dtype.kind not in _KINDS[key]:
            raise _error(path, f"{key} have dtype {dtype}", f"store them as {'bool' if key in _FLAGS else 'float32'}")
        # Some published files keep the 1-D columns as (N, 1). shape is None for HDF5's null dataspace.
        if not shape or not (len(shape) == 2 and shape[1] > 0 if matrix else shape[1:] in ((), (1,))):
            raise _error(path, f"{key} have shape {shape}", f"store them as {'(N, size >= 1)' if matrix else '(N,)'}")
    shapes = {key: shape for key, (shape, _) in layout.items() if shape}
    lengths = {key: shape[0] for key, shape in shapes.items()}
    if len(set(lengths.values())) > 1:
        found = ", ".join(f"{key} {length}" for key, length in lengths.items())
        raise _error(path, f"lengths differ: {found}", "export the file again, one row per transition in each")
    if not lengths["observations"]:
        raise _error(path, "zero transitions", "collect the dataset again, or download it again")
    for key in {"observations", "privileged"} & layout.keys():
        sizes = [shapes[k][1] for k in (key, f"next_{key}")]
        if sizes[0] != sizes[1]:
            raise _error(path, f"{key} have {sizes[0]} columns but next_{key} {sizes[1]}", "export both from one task")


def _check_sizes(path: str | os.PathLike, layout: Layout, env: str | None, obs_size: int | None, action_size: int | None) -> None:
    """Checks the numbers of columns against the task's, where they are given."""
    for key, wanted in (("observations", obs_size), ("actions", action_size)):
        shape = layout[key][0]
        if wanted is not None and shape and shape[1] != wanted:
            task = env or "the task"
            raise _error(path, f"wrong task: {key} have {shape[1]} columns, {task} has {wanted}", f"use a dataset of {task}")


def _clean(path: str | os.PathLike, arrays: Mapping[str, np.ndarray], clip_actions: bool = False) -> Dataset:
    """Checks the values and converts to Dataset's shapes and dtypes."""
    columns = {}
    for key in arrays:
        column = arrays[key] if key in MATRICES else arrays[key].reshape(-1)
        with np.errstate(all="ignore"):  # float64 beyond float32's range becomes inf, reported just below
            number = column.astype(np.float32)
        bad = ~np.isfinite(number)
        if bad.any():
            raise _error(path, f"{key} have NaN or inf (float32), first in row {_first(bad)}", "drop that trajectory")
        if key in _FLAGS:
            bad = (column != 0) & (column != 1)
            if bad.any():
                wrong = f"{key} hold {column[bad][0]} in row {_first(bad)}"
                raise _error(path, wrong, "flags must be 0 or 1: set them so")
            number = column.astype(bool)
        columns[key] = number
    if clip_actions:  # only now: clipping would hide an inf
        columns["actions"] = np.clip(columns["actions"], -1.0, 1.0)
    actions, costs = columns["actions"], columns["costs"]
    low, high = actions.min(), actions.max()
    if low < -1 - ACTION_TOLERANCE or high > 1 + ACTION_TOLERANCE:
        wrong = f"actions range over [{low:.6g}, {high:.6g}], beyond [-1, 1]"
        raise _error(path, wrong, "rescale them, or clip them if the simulator clips, and save again")
    if (costs < 0).any():
        wrong = f"negative costs, first {costs[costs < 0][0]:.6g} in row {_first(costs < 0)}"
        raise _error(path, wrong, "costs must be >= 0: fix the sign, or drop that trajectory")
    return Dataset(**columns)


def _first(bad: np.ndarray) -> int:
    """Row of the first True."""
    return int(bad.reshape(len(bad), -1).any(axis=1).argmax())


def check(
    path: str | os.PathLike,
    arrays: Mapping[str, np.ndarray],
    *,
    env: str | None = None,
    obs_size: int | None = None,
    action_size: int | None = None,
) -> Dataset:
    """The dataset of `arrays`, checked as `load` checks a file; a DatasetError names `path`."""
    layout = {key: (value.shape, value.dtype) for key, value in arrays.items()}
    _check_layout(path, layout)
    _check_sizes(path, layout, env, obs_size, action_size)
    return _clean(path, arrays)


def default_path(env: str) -> Path:
    """The dataset that comes with the repository for a task; `python -m data.collect --env ENV` makes it anew."""
    return Path(__file__).parent / f"{env}.hdf5"


def check_output(path: str | os.PathLike, suffixes: tuple[str, ...] = (".hdf5", ".h5")) -> None:
    """For those who write a file after long work: a DatasetError, one line, unless one of these suffixes can be written at `path`.

    Nothing is left behind, and no folder made.
    """
    path = Path(path)
    if path.is_dir():
        raise _error(path, "is a folder", f"name a file in it, {path / f'NAME{suffixes[0]}'}")
    if path.suffix.lower() not in suffixes:
        raise _error(path, f"its suffix is {path.suffix!r}", f"name a file that ends in {' or '.join(suffixes)}")
    if obstacle := files.obstacle(path):
        raise _error(path, f"cannot be written ({obstacle})", "name a file in a folder that can be")


def load(
    path: str | os.PathLike,
    *,
    env: str | None = None,
    obs_size: int | None = None,
    action_size: int | None = None,
    clip_actions: bool = False,
) -> tuple[Dataset, dict[str, Any]]:
    """Reads and validates a DSRL file.

    Args:
      path: the HDF5 file. Floats of any width, bool, integer or float flags, and (N, 1) columns are accepted.
      env: task the data must be of; compared with the file attribute `env` where the file has one.
      obs_size, action_size: sizes of the task's spaces; None skips the check.
      clip_actions: clip actions to [-1, 1], as the simulator does, instead of refusing those beyond.

    Returns:
      The dataset (raw: nothing is normalised or scaled, and nothing clipped unless asked for) and JSON-able metadata:
      the file's attributes (nested ones as the JSON text that `save` wrote) plus `path` and `sha256`.

    Raises:
      DatasetError: missing or unreadable file; missing key; wrong dtype, shape or length; no transitions; NaN or
        inf; flags other than 0/1; negative costs; actions beyond [-1, 1]; another task's sizes or `env`.
    """
    path = Path(path)
    if path.is_dir():
        raise _error(path, "is a folder", f"name an HDF5 file, or convert a Minari dataset {CONVERT}")
    if not path.is_file():
        raise _error(path, f"no file at {path.absolute()}", "download it from DSRL, collect it, or correct the path")
    # locking=False: published files sit on read-only and network mounts, and `save` replaces files whole.
    with h5py_errors(path), h5py.File(path, "r", locking=False) as file:
        items = {key: file[key] for key in Dataset._fields if key in file}
        layout = {key: (item.shape, item.dtype) for key, item in items.items() if isinstance(item, h5py.Dataset)}
        attributes = {str(key): plain(value) for key, value in file.attrs.items()}
    _check_layout(path, layout)
    # gymnasium's ids may carry the module that registers them, as in `own_env:OwnPoint-v0`.
    if env is not None and envs.recorded(str(attributes.get("env", env))).rpartition(":")[2] != env.rpartition(":")[2]:
        mend = f"use a dataset of {env} (if this one fits, `python -m data.convert {path} OUT.hdf5 --env {env}` makes it one)"
        raise _error(path, f"wrong task: collected on {attributes['env']}, wanted {env}", mend)
    _check_sizes(path, layout, env, obs_size, action_size)
    declared = sum(int(np.prod(shape, dtype=object)) * dtype.itemsize for shape, dtype in layout.values())
    if declared > MAX_RATIO * path.stat().st_size:
        wrong = f"declares {declared} bytes of arrays, more than the file can hold"
        raise _error(path, wrong, "the file is damaged: download it again")
    with h5py_errors(path), h5py.File(path, "r", locking=False) as file:
        arrays = {key: file[key][()] for key in layout}
    return _clean(path, arrays, clip_actions), attributes | {"path": str(path), "sha256": sha256(path)}


def save(path: str | os.PathLike, dataset: Dataset, attrs: Mapping[str, Any]) -> None:
    """Writes a dataset, atomically and compressed; the same content always gives the same bytes.

    Args:
      path: where to; an existing file is replaced, folders are made.
      dataset: N transitions; validated exactly as `load` does.
      attrs: file attributes. str, int, float and bool are stored as they are, anything else as JSON text. `path`
        and `sha256`, which `load` adds, are left out: a file cannot hold its own hash.

    Raises:
      DatasetError: the dataset would not load again, or the disk is full; nothing is written.
    """
    path = Path(path)
    arrays = {key: np.asarray(value) for key, value in dataset._asdict().items() if value is not None}
    dataset = check(path, arrays)
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}")  # same folder: os.replace stays on one file system
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # v110 (any HDF5 since 2016 reads it) checksums the metadata, as gzip does the data: damage is refused. The file is made in memory,
        # because h5py on a full disk ends the process.
        with h5py.File(part, "w", driver="core", backing_store=False, libver=("v110", "v110")) as file:
            for key in arrays:
                value = getattr(dataset, key)
                rows = max(1, CHUNK_BYTES // value[0].nbytes)
                chunks = (min(rows, len(value)), *value.shape[1:])
                file.create_dataset(key, data=value, chunks=chunks, compression="gzip", shuffle=True, track_times=False)
            for key in sorted(attrs.keys() - {"path", "sha256"}):  # sorted: the order shows in the bytes
                file.attrs[key] = _stored(attrs[key])
            file.flush()
            image = file.id.get_file_image()
        part.write_bytes(image)
        os.replace(part, path)
    except OSError as error:
        raise _error(path, f"cannot be written ({os.strerror(error.errno or 0)})", "free some space, or name another place") from error
    finally:
        part.unlink(missing_ok=True)


def sha256(path: str | os.PathLike) -> str:
    """SHA-256 of a file's bytes as 64 hex digits; raises DatasetError if it cannot be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise _error(Path(path), f"cannot be read ({error})", "check that the file exists and is readable") from error


def episodes(dataset: Dataset) -> Episodes:
    """Splits a dataset into trajectories at terminals and timeouts; needs at least one transition."""
    done = dataset.terminals | dataset.timeouts
    stop = np.flatnonzero(done) + 1
    if not done[-1]:
        stop = np.append(stop, len(done))
    start = np.append(0, stop[:-1])
    # float64: float32 sums drift over long trajectories of small costs.
    returns, costs = (np.add.reduceat(x.astype(np.float64), start) for x in (dataset.rewards, dataset.costs))
    return Episodes(start, stop, done[stop - 1], returns, costs, stop - start)


def check_episodes(dataset: Dataset, path: str | os.PathLike, horizon: int | None = None) -> None:
    """Looks at how the episodes of the dataset of `path` end.

    `horizon` is the task's number of steps until a time-out. None: unknown, and taken to be the length of the longest episode if there
    are at least two.

    Prints a warning where every terminal episode is exactly `horizon` steps long: those are time-outs stored as terminals, through
    which critics would not bootstrap.

    Raises:
      DatasetError: no row ends an episode.
    """
    found = episodes(dataset)
    if not found.complete.any():
        mend = "set terminals or timeouts to 1 in the last row of each, or let `python -m data.convert` do it with --horizon N"
        raise _error(path, "no row ends an episode", mend)
    terminal = dataset.terminals[found.stop - 1]
    limit = horizon or (int(found.lengths.max()) if terminal.sum() > 1 else 0)
    if terminal.any() and (found.lengths[terminal] == limit).all():
        whose = "the task's time limit" if horizon else "as long as the longest"
        print(
            f"warning: {path}: all {terminal.sum()} terminal episodes are {limit} steps long, {whose}: if these are "
            "time-outs, --terminals-are-timeouts reads them so",
            file=sys.stderr,
        )


def as_timeouts(dataset: Dataset) -> Dataset:
    """The dataset with its terminals read as time-outs: critics bootstrap through them."""
    return dataset._replace(terminals=np.zeros_like(dataset.terminals), timeouts=dataset.timeouts | dataset.terminals)


def widened(dataset: Dataset, size: int, path: str | os.PathLike) -> Dataset:
    """The dataset of `path` with `size` privileged columns behind its observations, as `envs.make(..., privileged=True)` observes.

    Raises:
      DatasetError: it holds another number of them.
    """
    if not size:
        return dataset
    assert dataset.privileged is not None and dataset.next_privileged is not None
    found = dataset.privileged.shape[1]
    if found != size:
        raise _error(path, f"privileged have {found} columns, the task has {size}", "use a dataset of this task")
    wide = lambda *parts: np.concatenate(parts, 1)
    return dataset._replace(
        observations=wide(dataset.observations, dataset.privileged),
        next_observations=wide(dataset.next_observations, dataset.next_privileged),
    )


def in_safe_trajectories(dataset: Dataset, cost_limit: float, quantile: float = 0.0) -> np.ndarray:
    """(N,) bool: the transition belongs to a complete trajectory whose cost is at most `cost_limit`, and whose return is
    at least the `quantile` (0 to 1) of such trajectories' returns, each counted by its length: where episodes end early, most
    trajectories are short and poor, and hold few of the transitions."""
    found = episodes(dataset)
    safe, lengths = found.safe(cost_limit), found.lengths.astype(np.int64)
    if safe.any():
        safe &= found.returns >= np.quantile(np.repeat(found.returns[safe], lengths[safe]), quantile)
    return np.repeat(safe, lengths)


def describe(dataset: Dataset, cost_limit: float) -> dict[str, Any]:
    """Summarises a dataset against a cost limit per trajectory; JSON-able.

    Statistics are over complete trajectories: a cut-off one has lower sums than its policy earns and would pass for
    safe. They are None where no trajectory qualifies. "Safe" means undiscounted cost <= cost_limit.

    Returns:
      transitions, trajectories, complete (counts); cost_limit; return_quantiles, cost_quantiles ({"0": minimum, ...,
      "100": maximum}); safe_share (in [0, 1]); safe_return_best, safe_return_p90, safe_return_mean;
      safe_return_range ([lowest, highest]).
    """
    split = episodes(dataset)
    returns, costs = split.returns[split.complete], split.costs[split.complete]
    safe = returns[costs <= cost_limit]

    def quantiles(values: np.ndarray) -> dict[str, float] | None:
        return {str(q): float(np.percentile(values, q)) for q in QUANTILES} if values.size else None

    return {
        "transitions": len(dataset.rewards),
        "trajectories": len(split.start),
        "complete": int(split.complete.sum()),
        "cost_limit": float(cost_limit),
        "return_quantiles": quantiles(returns),
        "cost_quantiles": quantiles(costs),
        "safe_share": safe.size / returns.size if returns.size else None,
        "safe_return_best": float(safe.max()) if safe.size else None,
        "safe_return_p90": float(np.percentile(safe, 90)) if safe.size else None,
        "safe_return_mean": float(safe.mean()) if safe.size else None,
        "safe_return_range": [float(safe.min()), float(safe.max())] if safe.size else None,
    }
