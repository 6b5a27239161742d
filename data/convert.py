"""Makes a DSRL-format file (dsrl.py) of a dataset in another format, checks it, and says what is in it.

    python -m data.convert hopper.hdf5 out.hdf5 --env SafetyHopperVelocity   # HDF5 with D4RL's or DSRL's names
    python -m data.convert steps.npz out.hdf5 --cost infos/cost             # NumPy archive, the same names
    python -m data.convert steps.csv out.hdf5 --obs x y vx vy               # table: obs_0.., action_0.., reward, cost, done
    python -m data.convert minari:NAME-v0 out.hdf5                          # Minari dataset, or its folder's path
    python -m data.convert in.hdf5 --to minari/NAME-v0                      # and back

Beside OUT.hdf5 it draws OUT.png, the trajectories' returns against their costs. Both appear whole or not at all.

Next observations, where they are missing, are those of the next row in the episode. A time-out's last row has no such successor: it is
left out, and the row before becomes the time-out. The last row of a terminal episode stays: its next observation, from which nothing
bootstraps, is its own.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import os
import re
import secrets
import shutil
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, NoReturn

import h5py
import numpy as np

import envs
from data import dsrl
from data.dsrl import Dataset, DatasetError
from envs import reference

# What a column may be called; the first that is there is taken. In a table, NAME_0, NAME_1, ... together are NAME.
ROLES = {
    "obs": ("observations", "obs", "observation"),
    "next_obs": ("next_observations", "next_obs", "next_observation"),
    "action": ("actions", "action"),
    "reward": ("rewards", "reward"),
    "cost": ("costs", "cost", "infos/cost", "infos/costs", "info/cost"),
    "terminal": ("terminals", "terminal", "terminated", "terminations"),
    "timeout": ("timeouts", "timeout", "truncated", "truncations"),
    "done": ("dones", "done"),
}
PRIVILEGED = ("privileged", "next_privileged")
SHOWN = 40  # column names in an error message, at most


@dataclass(frozen=True)
class Options:
    """How to read a source. The first eight name its columns; of several, matrices are put side by side, the others added up."""

    obs: tuple[str, ...] = ()
    next_obs: tuple[str, ...] = ()
    action: tuple[str, ...] = ()
    reward: tuple[str, ...] = ()
    cost: tuple[str, ...] = ()
    terminal: tuple[str, ...] = ()
    timeout: tuple[str, ...] = ()
    done: tuple[str, ...] = ()
    horizon: int | None = None  # steps after which a time limit ends each episode
    terminals_are_timeouts: bool = False
    clip_actions: bool = False  # of what is beyond the bounds, as the simulator did, where the data holds what the policy asked for
    action_low: tuple[float, ...] = ()  # the environment's bounds: one number, or one per action
    action_high: tuple[float, ...] = ()


class Source(NamedTuple):
    """A dataset that is read when it is asked for."""

    names: list[str]  # of its columns
    read: Callable[[list[str]], dict[str, np.ndarray]]
    about: dict[str, Any]  # its attributes


def error(path: str | os.PathLike, wrong: object, mend: str) -> NoReturn:
    # What other packages say can hold line breaks; the promise is one line.
    raise DatasetError(" ".join(f"{path}: {wrong}; {mend}".split()))


# ---------------------------------------------------------------- the formats


def _hdf5(path: Path) -> Source:
    names: list[str] = []

    def note(name, item):
        if isinstance(item, h5py.Dataset):
            names.append(name)

    with dsrl.h5py_errors(path), h5py.File(path, "r", locking=False) as file:
        file.visititems(note)
        about = {str(key): dsrl.plain(value) for key, value in file.attrs.items()}

    def read(wanted):
        with dsrl.h5py_errors(path), h5py.File(path, "r", locking=False) as file:
            return {name: np.asarray(file[name][()]) for name in wanted}

    return Source(names, read, about)


def _npz(path: Path) -> Source:
    mend = "write it again with np.savez, arrays of numbers only"

    @contextlib.contextmanager
    def opened():
        try:
            file = np.load(path)
            if not isinstance(file, np.lib.npyio.NpzFile):  # np.save writes such a file, whatever it is called
                raise ValueError("it holds one array without a name")
            with file:
                yield file
        except DatasetError:
            raise
        except Exception as e:  # damage can raise any, of zipfile, zlib and the reader of NumPy's headers
            error(path, f"not readable as a NumPy archive ({type(e).__name__}: {e})", mend)

    with opened() as file:
        names = list(file.files)

    def read(wanted):
        with opened() as file:
            return {name: file[name] for name in wanted}

    return Source(names, read, {})


def _csv(path: Path) -> Source:
    mend = "each cell must be a number, or true or false, and each row as long as the first, which holds the names"
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = csv.reader(file)
            names, first = [name.strip() for name in next(rows, [])], next(rows, [])
    except (OSError, UnicodeDecodeError, csv.Error) as e:
        error(path, f"not readable as CSV ({e})", mend)
    if len(set(names)) < len(names):
        error(path, "two columns of one name", "name them apart")

    def truth(text: str) -> float:
        return float({"true": 1, "false": 0}.get(text.strip().lower(), text))

    def read(wanted):
        try:
            with open(path, newline="", encoding="utf-8-sig") as file:  # loadtxt takes a row that is too long, and shifts it
                for row in (rows := csv.reader(file)):
                    if row and len(row) != len(names):
                        error(path, f"line {rows.line_num} has {len(row)} cells, the first {len(names)}", mend)
        except (OSError, UnicodeDecodeError, csv.Error) as e:
            error(path, f"not readable as CSV ({e})", mend)
        columns = [names.index(name) for name in wanted]
        words = {i: truth for i in columns if i < len(first) and first[i].strip().lower() in ("true", "false")}
        try:
            with warnings.catch_warnings(action="ignore"):  # of a table without rows, which is said to be one below
                table = np.loadtxt(
                    path, delimiter=",", skiprows=1, usecols=columns, ndmin=2, quotechar='"', comments=None,
                    converters=words or None, encoding="utf-8-sig",
                )  # fmt: skip
        except ValueError as e:
            error(path, e, mend)
        return {name: table[:, i] for i, name in enumerate(wanted)}

    return Source(names, read, {})


def minari(source: str | os.PathLike) -> ModuleType:
    """The package, or one line that names it."""
    try:
        import minari as package
        import minari.data_collector  # noqa: F401
    except ImportError as e:
        error(source, f"the package minari cannot be imported ({e})", "pip install minari")
    return package


def _scalars(infos: Mapping, steps: int, prefix: str = "infos") -> dict[str, np.ndarray]:
    """{infos/NAME: (steps,)} of an episode's infos; the first of steps + 1 entries is the reset's."""
    found = {}
    for key, value in infos.items():
        name = f"{prefix}/{key}"
        if isinstance(value, Mapping):
            found |= _scalars(value, steps, name)
        elif (column := np.asarray(value)).dtype.kind in "fiub" and column.size in (steps, steps + 1):
            found[name] = column.reshape(-1)[-steps:]
    return found


def _minari(name: str) -> Source:
    package = minari(name)
    folder = Path(name.removeprefix("minari:"))
    try:
        if name.startswith("minari:"):
            dataset = package.load_dataset(name.removeprefix("minari:"))
        else:
            dataset = package.MinariDataset(folder / "data" if (folder / "data").is_dir() else folder)
        episodes = list(dataset.iterate_episodes())
        env = dataset.spec.env_spec.id if dataset.spec.env_spec else dataset.storage.metadata.get("dsrl_env")
    except FileNotFoundError as e:
        error(name, f"no such Minari dataset ({e})", "`minari list local` lists those that are here, `minari download NAME` gets others")
    except (OSError, ValueError, KeyError, TypeError, AssertionError, ImportError) as e:
        error(name, f"not readable as a Minari dataset ({type(e).__name__}: {e})", "make it again, or install what is missing")
    if not episodes:
        error(name, "no episodes", "collect the dataset again")
    if not all(isinstance(x, np.ndarray) for episode in episodes for x in (episode.observations, episode.actions)):
        error(name, "observations or actions are not one Box space", "flatten them before collecting (FlattenObservation)")
    columns: dict[str, list[np.ndarray]] = {}
    for i, episode in enumerate(episodes):
        steps, timeouts = len(episode.rewards), np.array(episode.truncations, bool)
        if i < len(episodes) - 1 and not episode.terminations[-1]:  # an episode that was not finished is cut off
            timeouts[-1] = True
        flat = lambda x: x.reshape(len(x), -1)
        own = {
            "observations": flat(episode.observations)[:-1],
            "next_observations": flat(episode.observations)[1:],
            "actions": flat(episode.actions),
        }
        own |= {"rewards": episode.rewards, "terminals": episode.terminations, "timeouts": timeouts}
        for key, value in {**_scalars(episode.infos or {}, steps), **own}.items():
            columns.setdefault(key, []).append(np.asarray(value))
    whole = {key: np.concatenate(parts) for key, parts in columns.items() if len(parts) == len(episodes)}
    return Source(list(whole), lambda wanted: {key: whole[key] for key in wanted}, {"env": env} if env else {})


FORMATS = {".hdf5": _hdf5, ".h5": _hdf5, ".npz": _npz, ".csv": _csv}


def opened(source: str) -> Source:
    """What a path, or minari:NAME, holds."""
    path = Path(source)
    if source.startswith("minari:") or path.is_dir():
        return _minari(source)
    if not path.is_file():
        error(source, f"no file at {path.absolute()}", "correct the path")
    if path.suffix.lower() not in FORMATS:
        error(source, f"unknown format {path.suffix!r}", f"known are {', '.join(FORMATS)}, minari:NAME and a Minari dataset's folder")
    return FORMATS[path.suffix.lower()](path)


# ---------------------------------------------------------------- from columns to transitions


def _numbered(source: str, names: Sequence[str], name: str) -> list[str]:
    """NAME, or NAME_0, NAME_1, ..., as far as they are there."""
    if name in names:
        return [name]
    of_number = {int(n[len(name) + 1 :]): n for n in names if re.fullmatch(re.escape(name) + r"_\d+", n)}
    if missing := set(range(len(of_number))) - of_number.keys():
        error(source, f"{name}_{min(missing)} is missing", f"number the columns from {name}_0 on")
    return [of_number[i] for i in sorted(of_number)]


def _find(source: str, names: Sequence[str], role: str, given: Sequence[str]) -> list[str]:
    """The columns that hold `role`; empty if nothing is called so."""
    for name in given:
        if not _numbered(source, names, name):
            error(source, f"no column {name}", f"there are {_listed(names)}")
    if given:
        return [n for name in given for n in _numbered(source, names, name)]
    return next((found for name in ROLES[role] if (found := _numbered(source, names, name))), [])


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "") if names else "none"


def _rescaled(source: str, actions: np.ndarray, options: Options) -> np.ndarray:
    """Actions in [-1, 1], from the bounds that the options give; refused if they are not inside."""
    finite = actions.dtype.kind in "fiu" and actions.ndim == 2 and actions.size and np.isfinite(actions).all()
    if not finite:  # dsrl.check says what is wrong
        return actions
    low, high = (np.array(x, float) for x in (options.action_low, options.action_high))
    text = f"actions range over [{actions.min():.6g}, {actions.max():.6g}]"
    clip = "--clip-actions if the simulator clipped them"
    if not low.size and not high.size:
        if options.clip_actions:
            return np.clip(actions, -1.0, 1.0)
        if np.abs(actions).max() > 1 + dsrl.ACTION_TOLERANCE:
            error(source, f"{text}, beyond [-1, 1]", f"name the environment's bounds with --action-low LOW --action-high HIGH, or {clip}")
        return actions
    for bound in (low, high):
        if bound.size not in (1, actions.shape[1]):
            error(
                source, f"{bound.size} bounds for {actions.shape[1]} actions", "give both --action-low and --action-high, one or one each"
            )
    if not (np.isfinite(low).all() and np.isfinite(high).all() and (low < high).all()):
        error(source, "--action-low is not below --action-high", "give the bounds of the environment's actions")
    scaled = 2 * (actions - low) / (high - low) - 1
    if np.abs(scaled).max() > 1 + dsrl.ACTION_TOLERANCE and not options.clip_actions:
        error(source, f"{text}, beyond --action-low and --action-high", f"give the bounds of the environment's actions, and {clip}")
    return np.clip(scaled, -1.0, 1.0)


def _flags(source: str, columns: Sequence[str], parts: Mapping[str, np.ndarray], n: int) -> np.ndarray:
    """(n,) bool: one of the columns is set."""
    found = np.zeros(n, bool)
    for name in columns:
        column = parts[name].reshape(-1)
        odd = ~np.isin(column, (0, 1)) if column.dtype.kind in "fiub" else np.ones(n, bool)
        if odd.any():
            error(source, f"{name} holds {column[odd][0]} in row {odd.argmax()}", "flags must be 0 or 1: set them so")
        found |= column.astype(bool)
    return found


def _step(ends: np.ndarray) -> np.ndarray:
    """(N,) steps since the first row of its episode, where `ends` (N,) is True on the last rows."""
    start = np.append(0, np.flatnonzero(ends[:-1]) + 1)
    return np.arange(len(ends)) - np.repeat(start, np.diff(np.append(start, len(ends))))


def _with_successors(source: str, dataset: Dataset) -> tuple[Dataset, int]:
    """The dataset with next observations from the next rows, and how many rows without one were left out."""
    ends = dataset.terminals | dataset.timeouts
    lost = ends & ~dataset.terminals
    lost[-1] |= not ends[-1]
    kept = ~lost
    if not kept.any():
        error(source, "no row has a successor in its episode", "export next observations too, or name them with --next-obs")
    following = np.append(dataset.observations[1:], dataset.observations[-1:], 0)
    own = (dataset.terminals | lost)[:, None]
    timeouts = dataset.timeouts.copy()
    # A time-out moves to the row before, if that is of the same episode.
    moved = np.flatnonzero(lost & dataset.timeouts)
    moved = moved[moved > 0] - 1
    timeouts[moved[~ends[moved]]] = True
    full = dataset._replace(next_observations=np.where(own, dataset.observations, following), timeouts=timeouts)
    return Dataset._make(None if x is None else x[kept] for x in full), int(lost.sum())


def read(source: str, options: Options = Options(), env: Any = None) -> tuple[Dataset, dict[str, Any], list[str]]:
    """Reads a dataset of any format that this module knows.

    Args:
      source: a path, or minari:NAME.
      options: how to read it.
      env: the environment it must be of (`envs.make`); None skips that check.

    Returns:
      The dataset, checked as `dsrl.load` does; the source's attributes; and what was done to it, a line each.

    Raises:
      DatasetError: one line that names the mend.
    """
    found = opened(source)
    columns = {role: _find(source, found.names, role, getattr(options, role)) for role in ROLES}
    for role in ("obs", "action", "reward", "cost"):
        if not columns[role]:
            what = f"no {'observations' if role == 'obs' else role} among its columns: {_listed(found.names)}"
            error(source, what, f"name {'them' if role == 'obs' else 'it'} with --{role} NAME")
    if not any(columns[role] for role in ("terminal", "timeout", "done")) and not options.horizon:
        what = f"nothing says where episodes end; its columns are {_listed(found.names)}"
        error(source, what, "name a column with --terminal, --timeout or --done, or cut every N rows with --horizon N")
    privileged = [key for key in PRIVILEGED if all(key in found.names for key in PRIVILEGED)]
    parts = found.read(list(dict.fromkeys([*(name for names in columns.values() for name in names), *privileged])))
    lengths = {name: part.shape[:1] for name, part in parts.items()}
    if len(set(lengths.values())) > 1 or () in lengths.values():
        told = ", ".join(f"{name} {part.shape[0] if part.shape else 'a single number'}" for name, part in parts.items())
        error(source, f"lengths differ: {told}", "export it again, one row per transition in each")
    n = len(next(iter(parts.values())))
    if not n:
        error(source, "zero transitions", "collect the dataset again")

    for role, names in columns.items():
        several, rows = len(names) > 1, role in ("obs", "next_obs", "action")
        for part, name in ((parts[name], name) for name in names):
            if several and part.dtype.kind not in "fiub":
                error(source, f"{name} holds {part.dtype}, not numbers", f"name other columns with --{role.replace('_', '-')}")
            fits = part.ndim <= 2 if rows else part.size == n
            if not fits and (several or role in ("terminal", "timeout", "done")):  # dsrl.check looks at a single matrix, reward or cost
                wanted = "a row of numbers" if rows else "one number"
                error(source, f"{name} has the shape {part.shape}, not {wanted} per transition", "reshape it to one row per transition")

    def matrix(role):
        stacked = [part[:, None] if part.ndim == 1 else part for part in (parts[name] for name in columns[role])]
        return stacked[0] if len(stacked) == 1 else np.concatenate(stacked, 1)

    def total(role):
        first, *others = (parts[name] for name in columns[role])  # added as floats: two flags would be one, two bytes run over
        return sum(part.reshape(n).astype(np.float64) for part in (first, *others)) if others else first

    terminals, timeouts, dones = (_flags(source, columns[role], parts, n) for role in ("terminal", "timeout", "done"))
    notes, horizon = [f"costs from {', '.join(columns['cost'])}"], options.horizon
    ends = terminals | timeouts | dones
    if horizon:
        at_limit = _step(ends) % horizon == horizon - 1
        marked = at_limit & ~ends
        if marked.any():
            notes.append(f"{marked.sum()} time-outs set, every {horizon} steps within an episode")
        timeouts |= at_limit & ~terminals
    if columns["done"]:
        unknown = dones & ~terminals & ~timeouts
        if columns["timeout"] or horizon or options.terminals_are_timeouts:
            terminals |= unknown
        elif columns["terminal"]:
            timeouts |= unknown
        else:
            name = columns["done"][0]
            mend = f"--horizon N for a time limit of N steps, --terminals-are-timeouts for time-outs only, --terminal {name} for none"
            error(source, f"{name} does not tell terminal states from time-outs", mend)
    arrays = {"observations": matrix("obs"), "next_observations": matrix("next_obs" if columns["next_obs"] else "obs")}
    arrays |= {"actions": _rescaled(source, matrix("action"), options), "rewards": total("reward"), "costs": total("cost")}
    arrays |= {"terminals": terminals, "timeouts": timeouts} | {key: parts[key] for key in privileged}
    sizes = {} if env is None else {"env": env.name, "obs_size": env.obs_size, "action_size": env.action_size}
    dataset = dsrl.check(source, arrays, **sizes)
    if options.terminals_are_timeouts:
        notes.append(f"{dataset.terminals.sum()} terminals read as time-outs")
        dataset = dsrl.as_timeouts(dataset)
    if not columns["next_obs"]:
        costs = dataset.costs.sum(dtype=np.float64)
        dataset, dropped = _with_successors(source, dataset)
        lost = costs - dataset.costs.sum(dtype=np.float64)
        notes.append(f"next observations made from the following rows; {dropped} rows without one dropped, with a cost of {lost:.6g}")
    return dataset, found.about, notes


# ---------------------------------------------------------------- Minari, the way back


def to_minari(name: str, dataset: Dataset, about: Mapping[str, Any]) -> Path:
    """Writes a Minari dataset (HDF5 storage, costs in infos["cost"]) and returns its folder, which appears whole or not at all.

    Raises:
      DatasetError: the name is no Minari name or taken; an episode's rows do not follow from one another.
    """
    package = minari(f"minari/{name}")
    try:
        package.dataset.minari_dataset.parse_dataset_id(name)
    except (ValueError, TypeError):  # TypeError: no version
        error(f"minari/{name}", "no name of a Minari dataset", "name it minari/NAME-v0")
    folder = Path(package.storage.get_dataset_path(name))
    if folder.exists():
        error(folder, "exists", "take another name or version, or `minari delete` it")
    split, buffers = dsrl.episodes(dataset), []
    for i, (start, stop) in enumerate(zip(split.start, split.stop)):
        observations, following = dataset.observations[start:stop], dataset.next_observations[start:stop]
        if not np.array_equal(observations[1:], following[:-1]):
            error(f"minari/{name}", f"trajectory {i}: next observations are not those of the next row", "Minari cannot hold that")
        rows = slice(start, stop)
        buffers.append(
            package.data_collector.EpisodeBuffer(
                id=i,
                observations=np.append(observations, following[-1:], 0),
                actions=dataset.actions[rows],
                rewards=dataset.rewards[rows],
                terminations=dataset.terminals[rows],
                truncations=dataset.timeouts[rows],
                infos={"cost": np.append(np.float32(0), dataset.costs[rows])},  # the first is the reset's
            )
        )
    import gymnasium

    box = lambda bound, x: gymnasium.spaces.Box(-bound, bound, x.shape[1:], np.float32)
    root = Path(package.storage.get_dataset_path())
    part = root / f".{secrets.token_hex(4)}"  # hidden: Minari does not list it
    before = os.environ.get("MINARI_DATASETS_PATH")
    os.environ["MINARI_DATASETS_PATH"] = str(part)
    try:
        with warnings.catch_warnings(action="ignore"):  # that no author and no code is named
            made = package.create_dataset_from_buffers(
                name, buffers, observation_space=box(np.inf, dataset.observations), action_space=box(1.0, dataset.actions),
                data_format="hdf5", description=f"converted from {about.get('source', 'a DSRL file')}",
            )  # fmt: skip
        if about.get("env"):
            made.storage.update_metadata({"dsrl_env": about["env"]})
        folder.parent.mkdir(parents=True, exist_ok=True)
        os.replace(part / name, folder)
    finally:
        if before is None:
            del os.environ["MINARI_DATASETS_PATH"]
        else:
            os.environ["MINARI_DATASETS_PATH"] = before
        shutil.rmtree(part, ignore_errors=True)
    return folder


# ---------------------------------------------------------------- command


class Parser(argparse.ArgumentParser):
    """Says what is wrong with the arguments in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {' '.join(message.split())}; see --help\n")


def positive(text: str) -> int:
    number = int(text)
    if not 0 < number < 2**31:
        raise argparse.ArgumentTypeError("must be positive, and below 2^31")
    return number


def parser(description: str | None, module: str) -> Parser:
    """A parser with the arguments of Options, --env and --cost-limit."""
    made = Parser(
        prog=f"python -m {module}", description=description, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made._negative_number_matcher = re.compile(r"^-(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?$")  # argparse's takes -1e0 and -2. for options
    made.add_argument("source", metavar="FILE", help="an .hdf5, .npz or .csv file, a Minari dataset's folder, or minari:NAME")
    made.add_argument("--env", help="the environment that the data is of; compared with it")
    made.add_argument("--cost-limit", type=float, default=20.0, help="trajectories up to this cost count as safe (default: 20)")
    columns = made.add_argument_group("columns", "their names in FILE, where they are not the usual ones")
    for role, names in ROLES.items():
        columns.add_argument(f"--{role.replace('_', '-')}", nargs="+", default=(), metavar="NAME", help=f"default: {', '.join(names)}")
    reading = made.add_argument_group("reading")
    reading.add_argument("--horizon", type=positive, metavar="N", help="a time limit: set a time-out every N steps within an episode")
    reading.add_argument("--terminals-are-timeouts", action="store_true", help="read terminals as time-outs, for files that store them so")
    text = "clip what is beyond the actions' bounds, as the simulator did, where FILE holds the policy's own actions"
    reading.add_argument("--clip-actions", action="store_true", help=text)
    for side in ("low", "high"):
        text = f"the actions' {side}est value in the environment, one or one each; the range is rescaled to [-1, 1]"
        reading.add_argument(f"--action-{side}", type=float, nargs="+", default=(), metavar="X", help=text)
    return made


def options_of(args: argparse.Namespace) -> Options:
    hashable = lambda value: tuple(value) if isinstance(value, list) else value
    values: dict[str, Any] = {key: hashable(getattr(args, key)) for key in Options.__dataclass_fields__}
    return Options(**values)


def environment(name: str, horizon: int | None) -> Any:
    """The environment that the data is of. One of the user's own ends after `horizon` steps too; the others have their own limit."""
    return envs.make(name, horizon=horizon if reference.own(name) else None)


def command(main: Callable[[], None]) -> None:
    """Runs `main`; bad input is one line on standard error and exit code 2."""
    try:
        with reference.reported():
            main()
    except (DatasetError, envs.UnknownName) as e:
        sys.exit(print(f"error: {e}", file=sys.stderr) or 2)


def main(words: list[str] | None = None) -> None:
    """Converts, then prints the summary."""
    from data import inspect  # which imports this module

    words_of = parser(__doc__, "data.convert")
    words_of.add_argument("out", metavar="OUT", nargs="?", type=Path, help="the DSRL-format file to write; one that exists is replaced")
    words_of.add_argument("--to", metavar="minari/NAME", help="write a Minari dataset, not OUT")
    args = words_of.parse_args(words)
    if (args.out is None) == (args.to is None):
        words_of.error("name one output: OUT.hdf5 or --to minari/NAME-v0")
    if args.to and not args.to.startswith("minari/"):
        words_of.error(f"--to {args.to}: must be minari/NAME-v0")
    if args.out:
        if Path(args.source).exists() and args.out.exists() and args.out.samefile(args.source):
            words_of.error(f"{args.out}: is the file to convert, which would be lost: name another for the output")
        dsrl.check_output(args.out)
        dsrl.check_output(args.out.with_suffix(".png"), (".png",))
    env, options = environment(args.env, args.horizon) if args.env else None, options_of(args)
    dataset, found, notes = read(args.source, options, env)
    changed = {key: value for key, value in asdict(options).items() if value}
    about = found | {"source": Path(args.source).name} | ({"converted_with": json.dumps(changed)} if changed else {})
    about |= {"env": env.name} if env else {}
    if options.action_low:  # -1 and 1: they were scaled before
        bounds = [np.asarray(x, float).tolist() for x in (options.action_low, options.action_high)]
        if env and np.allclose(np.abs(np.concatenate([np.ravel(x) for x in bounds])), 1):
            bounds = [np.asarray(x).tolist() for x in env.action_bounds]
        low, high = bounds
        about |= {"action_low": low, "action_high": high}
    horizon = env.horizon if env else options.horizon
    dsrl.check_episodes(dataset, args.source, horizon)
    if args.to:
        if dataset.privileged is not None:
            notes.append(f"left out: {', '.join(PRIVILEGED)}, for which Minari has no place")
        print(f"{to_minari(args.to.removeprefix('minari/'), dataset, about)}: written")
    else:
        dsrl.save(args.out, dataset, about)
        inspect.draw(args.out.with_suffix(".png"), args.out.stem, dataset, args.cost_limit)
    inspect.show(args.to or args.out, dataset, args.cost_limit, notes, horizon)
    if env:
        inspect.check_about(args.source, about | ({"env": found["env"]} if "env" in found else {}), env)
        inspect.check_env(dataset, args.source, env)


if __name__ == "__main__":
    command(main)
