"""The run folder that every algorithm leaves: runs/<env>/<algo>/<stamp>/ with progress.csv, config.json, checkpoints, curves.png.

Nothing here knows of any algorithm. Rows have fixed columns (absent values are empty), one per seed and event:

    event   `eval`: `episodes` fresh episodes of the policy (config.json: eval_policy); `train`: the stochastic training
            episodes that ended since the row before; `rank`: Spearman correlations of Q and Qc with Monte-Carlo returns;
            `diverged`: a loss or parameter of this seed was not finite here, and it has no rows after this one.
    return, cost, length: means over those episodes, raw and undiscounted.

A run that was killed goes on with `--resume`: `Logbook.run` saves the whole state between blocks, at most every
`checkpoint_seconds`, and what it saved ends in the same files, bit for bit, as a run that nothing interrupted. If other code
takes it up, one line says so, each row names the commit that wrote it, and config.json describes who began the run and, under
`resumed`, who went on. Rows of an offline checkpoint that was there name the commit that took it up; its header names its maker.
With each state the rows that it holds go to the tracker of `--track`, if there is one.
"""

import ast
import contextlib
import csv
import dataclasses
import datetime
import errno
import fcntl
import functools
import hashlib
import importlib.metadata
import inspect
import io
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
import time
import typing
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from tqdm import tqdm

from algos import checkpoint, curves, tracking
from algos.checkpoint import BadInput, load, write_atomically
from data import dsrl
from envs import UnknownName, folder, recorded, reference
from envs.render import RenderError

ROOT = Path(__file__).resolve().parents[1]
# Where, what to replay, and how often to save: the results do not depend on these. Dataset and --init count by their files' hashes.
NOT_CONFIGURATION = "runs eval episodes video trajectory export dataset init resume checkpoint_seconds track".split()
MAKER = ("commit", "versions", "python", "device")  # what config.json says of the process that made the rows
IF_GIVEN = ("horizon",)  # part of a configuration only where there is one
COLUMNS = (
    "env algo seed phase event gradient_steps env_steps episodes return cost length return_se cost_se share_above worst_tenth "
    "multiplier kp ki kd "
    "reward_critic_loss cost_critic_loss actor_loss q qc qc_ood ood_weight entropy "
    "rank_q_policy rank_qc_policy rank_q_random rank_qc_random "
    "cost_limit config_hash commit dataset_hash"
).split()
RESUME = "resume.safetensors"
ZERO_ALLOWED = set(  # numbers for which 0 means something: a limit of none, a part left out
    "cost_limit vpa_steps vpa_alpha_reward vpa_alpha_cost cloning_weight cloning_quantile entropy_weight anchor_weight anchor_floor "
    "actor_warmup reserve kp ki kd integral_fall gain_rates rank_points termination_cost checkpoint_seconds ood_states ood_quantile "
    "gate_quantile cost_pessimism rectification init_multiplier noise tolerance entropy_per_action".split()
)
INFINITE_ALLOWED = {"cost_limit", "cost_clip", "max_multiplier", "checkpoint_seconds"}
AT_MOST_ONE = set("tau ood_fraction ood_quantile gate_quantile cloning_quantile minimum_weight frontier anchor_floor handover".split())
AT_LEAST_ONE = {"gain_bound", "cost_clip"}  # below: gains that cannot be what they start from, a cost that is never above d'
BELOW_ONE = {"gamma", "reserve", "pid_decay"}  # at 1: sums without end, a limit of nothing, an average that never moves

jax.config.update("jax_compilation_cache_dir", os.environ.get("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "jax")))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


class AllDiverged(RuntimeError):
    """No seed is left to train."""


@functools.cache
def documented(cls) -> dict[str, str]:
    """{field: the docstring below it} of the fields that a dataclass itself declares."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(definition, ast.ClassDef)
    pairs = zip(definition.body, definition.body[1:], strict=False)
    return {
        field.target.id: ast.literal_eval(text.value)
        for field, text in pairs
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(text, ast.Expr)
    }


def grouped(args_class, defaults):
    """A dataclass for tyro with one group per class from which `args_class` inherits, so that --help shows them apart."""
    owner, types, groups = {}, typing.get_type_hints(args_class), {}
    classes = [cls for cls in reversed(args_class.__mro__) if dataclasses.is_dataclass(cls)]
    for cls in classes:  # a field that a subclass declares again is the subclass's
        owner |= {name: (cls, text) for name, text in documented(cls).items()}
    for cls in classes:
        for name, (declared, text) in owner.items():
            if declared is cls:
                annotated = typing.Annotated[types[name], tyro.conf.arg(help=text)]
                field = (name, annotated, dataclasses.field(default=getattr(defaults, name)))
                title = cls.__name__ if cls.__doc__.startswith(cls.__name__) else cls.__doc__  # dataclass makes one up
                groups.setdefault(re.sub(r"\W+", "_", title), []).append(field)
    first = next((i for i, title in enumerate(groups) if title.startswith("phase")), 0)
    place = {title: (first, title[:7]) if title.startswith("phase") else (i, "") for i, title in enumerate(groups)}
    titles = sorted(groups, key=lambda title: place[title])  # the phases one after another
    made = [(title, dataclasses.make_dataclass(title, groups[title], frozen=True)) for title in titles]
    return tyro.conf.OmitArgPrefixes[dataclasses.make_dataclass("Args", [(n, c, dataclasses.field(default=c())) for n, c in made])]


def parse(args_class, words: list[str] | None = None, presets: dict[str, dict[str, dict]] | None = None):
    """`args_class` from the command line (or `words`); BadInput with tyro's message on one line.

    Its defaults are those of the preset that `words` name: presets[NAME]["*"], then presets[NAME][TASK]. With --eval, task and cost
    limit are by default those that the checkpoint was trained for.
    """
    said = io.StringIO()
    described = (sys.modules[args_class.__module__].__doc__ or "").split("\n\n")[0]

    def read(defaults):
        args = tyro.cli(grouped(args_class, defaults), args=words, description=described)
        groups = (getattr(args, field.name) for field in dataclasses.fields(args))
        return args_class(**{k: getattr(group, k) for group in groups for k in group.__dataclass_fields__})

    try:
        with contextlib.redirect_stderr(said):
            args = read(args_class())
            preset = (presets or {}).get(getattr(args, "preset", "suite"), {})
            values = dict(preset.get("*", {}))
            values |= preset.get(recorded(args.env), {}) if preset else {}
            if getattr(args, "eval", None):
                _, meta = checkpoint.load_policy(args.eval)
                values |= {"env": meta["env"], "cost_limit": meta["config"].get("cost_limit", args.cost_limit)}
            return read(dataclasses.replace(args_class(), **values)) if values else args
    except SystemExit as stop:
        if not stop.code:  # --help
            raise
        lines = [line.strip("│╭╮╰╯─ ") for line in said.getvalue().splitlines()]
        line = " ".join(line for line in lines[1:] if line)
        raise BadInput(line.replace("see - --help", "see --help").replace("run - --help", "run --help")) from None


def command(main, args_class, presets: dict[str, dict[str, dict]] | None = None, words: list[str] | None = None) -> None:
    """Parses the command line (or `words`) and runs `main`; failures are one line on standard error.

    Exit code 2 for bad input, before anything is written; 1 if a file cannot be written, a simulator failed or every seed diverged.
    """
    try:
        main(parse(args_class, words, presets))
    except (BadInput, UnknownName, RenderError, dsrl.DatasetError, tracking.TrackerError) as error:
        sys.exit(print(f"error: {error}", file=sys.stderr) or 2)
    except AllDiverged as error:
        sys.exit(print(f"error: {error}", file=sys.stderr) or 1)
    except reference.RAISED:
        if not reference.failures:
            raise
        print(f"error: {reference.failures[0]}: mend it and go on with --resume", file=sys.stderr)
        sys.exit(1)
    except BrokenPipeError:  # --help | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        if not full and error.filename is None:
            raise
        mend = "free some space and go on with --resume" if full else "name a place that can be written"
        print(f"error: {error.filename or 'output'}: {error.strerror}: {mend}", file=sys.stderr)
        sys.exit(1)


def check_numbers(args, multiples: dict[str, int] | None = None) -> None:
    """BadInput unless every number that defaults to a positive one is positive (or zero where that is allowed), every share is
    one, and every integer fits JAX's 32 bits."""
    for field in dataclasses.fields(args):
        value, default = getattr(args, field.name), field.default
        flag = "--" + field.name.replace("_", "-")
        for x in value if isinstance(value, tuple) else (value,):
            if isinstance(x, bool) or not isinstance(x, (int, float)):
                continue
            if x != x or x < 0 and field.name != "entropy_per_action":
                raise BadInput(f"{flag} {x}: must not be negative or NaN")
            if isinstance(x, int) and x >= 2**31:
                raise BadInput(f"{flag} {x}: must be below 2147483648")
            if math.isinf(x) and field.name not in INFINITE_ALLOWED:
                raise BadInput(f"{flag} {x}: must be finite")
            if x == 0 and field.name not in ZERO_ALLOWED and default not in (0, 0.0):
                raise BadInput(f"{flag} {x}: must be positive")
            if x > 1 and field.name in AT_MOST_ONE:
                raise BadInput(f"{flag} {x}: must be at most 1")
            if x < 1 and field.name in AT_LEAST_ONE:
                raise BadInput(f"{flag} {x}: must be at least 1")
            if x >= 1 and field.name in BELOW_ONE:
                raise BadInput(f"{flag} {x}: must be below 1")
        if value == () and default != ():
            raise BadInput(f"{flag}: needs at least one number")
        if multiples and field.name in multiples and value % multiples[field.name]:
            raise BadInput(f"{flag} {value}: must be a multiple of {multiples[field.name]}")
    if args.seed + args.seeds > 2**31:
        raise BadInput(f"--seed {args.seed} --seeds {args.seeds}: the last seed must be below 2147483648")


def commit() -> str:
    """The repository's commit, with `+` if files differ from it; empty outside a checkout or without git."""
    if not shutil.which("git"):
        return ""
    git = lambda *words: subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True).stdout.strip()
    return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")


def digest(config: dict) -> str:
    """12 hex digits that name a configuration."""
    return hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest()[:12]


# ---------------------------------------------------------------- files of arrays


def flatten(tree) -> dict[str, np.ndarray]:
    """Arrays of a pytree by their path, as in `actor/params/Dense_0/kernel`; PRNG keys as their data."""
    raw = lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
    name = lambda path: jax.tree_util.keystr(path, simple=True, separator="/")
    return {name(path): np.array(raw(x), order="C") for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def save(path: Path, tree, meta: dict) -> None:
    """`checkpoint.save` of a pytree of arrays."""
    checkpoint.save(path, flatten(tree), meta)


def restore(template, arrays: dict[str, np.ndarray], source: str, prefix: str = ""):
    """The arrays below `prefix` (from `load`) in the structure of `template`; BadInput if names or shapes differ."""
    paths, structure = jax.tree_util.tree_flatten_with_path(template)
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in paths]
    found = {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}
    is_key = lambda x: jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    shape = lambda x: jax.eval_shape(jax.random.key_data, x).shape if is_key(x) else x.shape
    wanted = {name: shape(x) for name, (_, x) in zip(names, paths)}
    odd = sorted(wanted.keys() ^ found.keys()) or [k for k in wanted if wanted[k] != found[k].shape]
    if odd:
        raise BadInput(f"{source}: does not fit this configuration's networks ({len(odd)} arrays differ, first {odd[0]})")
    leaf = lambda name, x: jax.random.wrap_key_data(jnp.asarray(found[name])) if is_key(x) else jnp.asarray(found[name], x.dtype)
    return jax.tree.unflatten(structure, [leaf(name, x) for name, (_, x) in zip(names, paths)])


# ---------------------------------------------------------------- offline checkpoints


def offline_path(runs: Path, env: str, algo: str, recipe: dict, seed: int) -> Path:
    """Where the offline checkpoint of a seed lies; `recipe` is all that it depends on."""
    return runs / folder(env) / "offline" / algo / digest(recipe) / f"seed{seed}.safetensors"


def load_seed(path: Path, template: dict):
    """Of the checkpoint of a seed the entries that `template` has, in its structure."""
    arrays = {k: v for k, v in load(path)[0].items() if k.split("/")[0] in template}
    return restore(template, arrays, str(path))


# ---------------------------------------------------------------- the run


@jax.jit
def finite(tree) -> jax.Array:
    """(seeds,) bool: every number of the seed's slice of `tree` (leaves (seeds, ...)) is finite."""
    numbers = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)]
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(x.reshape(x.shape[0], -1)), 1) for x in numbers]), 0)


def portable(file: dict) -> dict:
    """`file` with a "path" that means the same on other machines, where that is in the repository."""
    path = Path(file["path"])
    return file | {"path": str(path.relative_to(ROOT))} if path.is_relative_to(ROOT) else file


class Logbook:
    """One run of one algorithm over several seeds: blocks, rows, progress, checkpoints; writes the folder.

    With `config["resume"]` it goes on in the newest unfinished folder of the same configuration, if there is one.
    """

    def __init__(
        self, algo: str, env: str, config: dict, seeds: list[int], dataset: dict | None = None, init: list[dict] | None = None
    ):  # fmt: skip
        """`dataset` and the files of `init` are described by their "path", "sha256" and whatever else there is to say."""
        self.seeds, self._every = seeds, config["checkpoint_seconds"]
        self._training = seeds  # those that arrays (seeds, ...) are of, in this order
        dataset, init = dataset and portable(dataset), init and [portable(file) for file in init]
        runs, wants_resume, track = config["runs"] / folder(env) / algo, config["resume"], config["track"]
        config = {k: v for k, v in config.items() if k not in NOT_CONFIGURATION and (k not in IF_GIVEN or v is not None)}
        if init:
            config["init"] = [file["sha256"] for file in init]
        packages = ("jax", "flax", "optax", "numpy", "mujoco", "gymnasium", "safety-gymnasium")
        self.config = {
            "algo": algo, "env": env, "config": config, "config_hash": digest(config), "commit": commit(), "dataset": dataset,
            "init": init,
            "command": shlex.join([f"algos/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
            "versions": {p: importlib.metadata.version(p) for p in packages},
            "python": sys.version.split()[0], "device": jax.devices()[0].device_kind,
        }  # fmt: skip
        made_by = self.config["commit"]  # config.json keeps the first one
        self.rows: list[dict] = []
        self._bar: typing.Any = None  # of tqdm
        self._latest: dict[str, float] = {}
        self._seconds, self._diverged = 0.0, set[int]()
        self._resumed: tuple[dict, dict] | None = None  # (arrays, meta) of the state to go on from, until the phase that it is of
        unfinished = self._unfinished(runs) if wants_resume else None
        if unfinished:
            self.folder = unfinished
            self._open("r+b")
            self._take_up()
        else:
            if wants_resume:
                print(f"--resume: {runs} has no unfinished run of these arguments: a new one begins", file=sys.stderr)
            self.folder = runs / f"{datetime.datetime.now():%Y%m%d-%H%M%S-%f}"
            self.folder.mkdir(parents=True)
            self._open("xb")
        self._write_config()
        self._constant = {
            "env": env, "algo": algo, "cost_limit": config.get("cost_limit"), "config_hash": self.config["config_hash"],
            "commit": made_by, "dataset_hash": (dataset or {}).get("sha256", "")[:12],
        }  # fmt: skip
        if self._resumed is None:
            self._file.truncate(0)
            self._end = 0
            self._append(",".join(COLUMNS) + "\r\n")
        self._tracker = tracking.Tracker(track, self.folder, self.config, seeds)
        self._started = self._saved = time.monotonic()

    # ------------------------------------------------------------ resuming

    def _unfinished(self, runs: Path) -> Path | None:
        """The newest folder in `runs` of this configuration and dataset whose run has not ended."""
        identity = lambda config: (config["config_hash"], (config["dataset"] or {}).get("sha256"))
        for path in sorted(runs.glob("*/config.json"), key=lambda p: p.stat().st_mtime, reverse=True):
            try:
                config = json.loads(path.read_text())
            except (OSError, ValueError):
                continue
            if identity(config) == identity(self.config) and "seconds" not in config and (path.parent / "progress.csv").exists():
                return path.parent
        return None

    def _open(self, mode: str) -> None:
        self._file = open(self.folder / "progress.csv", mode, buffering=0)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BadInput(f"{self.folder}: in use by another run: wait for it, or leave out --resume for a new folder") from None

    def _take_up(self) -> None:
        """Reads the newest intact state; a damaged one is one line, and the state before it is used."""
        for name in (RESUME, "previous-" + RESUME):
            path = self.folder / name
            if not path.exists():
                continue
            try:
                arrays, meta = load(path)
                if meta["config_hash"] != self.config["config_hash"] or meta["seeds"] != self.seeds:
                    raise BadInput(f"{path}: of another configuration")
                if meta["end"] > os.fstat(self._file.fileno()).st_size:
                    raise BadInput(f"{path}: {self.folder / 'progress.csv'} has lost rows that it knows of")
            except (BadInput, KeyError) as error:
                print(f"warning: {error}; using the one before", file=sys.stderr)
                continue
            self._resumed = arrays, meta
            self._end, self._seconds, self._diverged = meta["end"], meta["seconds"], set(meta["diverged"])
            self._file.truncate(self._end)
            self._file.seek(self._end)
            text = (self.folder / "progress.csv").read_text()
            self.rows = [{k: v for k, v in row.items() if v} for row in csv.DictReader(io.StringIO(text))]
            self.rows = [row | {"seed": int(row["seed"])} for row in self.rows]
            self._go_on()
            print(f"resuming {self.folder} after {meta['phase']} block {meta['block']}", file=sys.stderr)
            return
        print(f"resuming {self.folder} from its start: it has no saved state yet", file=sys.stderr)

    def _go_on(self) -> None:
        """config.json keeps the process that began this run, and lists this one if its code, packages or machine are others."""
        # The command stays this process's: it gives the same configuration, and a sweep finds its own runs by it.
        begun, mine = json.loads((self.folder / "config.json").read_text()), {k: self.config[k] for k in MAKER}
        later = begun.get("resumed", [])
        last = [begun, *later][-1]
        self.config |= {k: begun.get(k) for k in MAKER}
        if any(last.get(k) != mine[k] for k in MAKER):
            later = [*later, mine]
        if later:
            self.config["resumed"] = later
        before = list(dict.fromkeys(row.get("commit", "") for row in self.rows))
        if any(commit != mine["commit"] for commit in before):
            named = " and ".join(commit or "unknown" for commit in before)
            print(
                f"warning: {self.folder}: the rows so far are of commit {named}, those from here on of {mine['commit'] or 'unknown'}: "
                "for rows of one commit begin anew without --resume",
                file=sys.stderr,
            )

    def resumed_seeds(self, phase: str) -> list[int]:
        """The seeds that were being trained, if this run goes on in the middle of `phase`; else none."""
        meta = self._resumed[1] if self._resumed else {}
        return meta.get("training", self.seeds) if meta.get("phase") == phase else []

    def run(self, phase: str, blocks: int, carry, block, size: int = 1, unit: str = "steps", seeds: list[int] | None = None):
        """`carry = block(n, carry)` for n = 0 .. blocks, each of `size` units on the progress bar; block 0 trains nothing.

        `carry` is a tuple of pytrees with leaves (seeds, ...); the first is the learner, whose numbers must stay finite. A block that
        evaluates or saves what it trained calls `check` before. `seeds`: those that `carry` and the rows are of, if not all.
        """
        first = 0
        if self._resumed is not None:
            arrays, meta = self._resumed
            if meta["phase"] != phase:  # long past it
                return carry
            carry = restore(carry, arrays, str(self.folder / RESUME))
            first, self._resumed = meta["block"] + 1, None
        self._training = seeds or self.seeds
        width = shutil.get_terminal_size((110, 24)).columns  # tqdm's own guess is 0, an empty bar, on some pseudo-terminals
        self._bar = tqdm(
            total=blocks * size, initial=max(0, first - 1) * size, desc=phase, unit=f" {unit}", unit_scale=True, disable=None, ncols=width
        )
        for n in range(first, blocks + 1):
            carry = block(n, carry)
            self._bar.update(size if n else 0)
            self.check(phase, carry[0])
            if time.monotonic() - self._saved >= self._every or n == blocks:
                self._save(phase, n, carry)
        self._bar.close()
        self._training = self.seeds
        return carry

    def _save(self, phase: str, n: int, carry) -> None:
        path = self.folder / RESUME
        meta = {
            "phase": phase, "block": n, "end": self._end, "seconds": self._elapsed(), "diverged": sorted(self._diverged),
            "config_hash": self.config["config_hash"], "seeds": self.seeds, "training": self._training,
        }  # fmt: skip
        if path.exists():
            os.replace(path, self.folder / ("previous-" + RESUME))
        os.fsync(self._file.fileno())  # a state must not outlive the rows that it knows of
        save(path, carry, meta)
        self._tracker.send(self.rows)
        self._saved = time.monotonic()

    def _elapsed(self) -> float:
        return self._seconds + time.monotonic() - self._started

    def check(self, phase: str, learner) -> None:
        """Ends the seeds whose numbers in `learner` (leaves (seeds, ...)) are not finite: they get no rows and no files any more."""
        ok = np.asarray(finite(learner))
        for i, seed in enumerate(self._training):
            if not ok[i]:
                arrays = flatten(jax.tree.map(lambda x: x[i], learner))
                self._diverge(seed, phase, next(name for name, x in arrays.items() if not np.all(np.isfinite(x))))

    def _diverge(self, seed: int, phase: str, what: str) -> None:
        if seed in self._diverged:
            return
        own = [row for row in self.rows if row["seed"] == seed]
        at = {k: own[-1][k] if own else "0" for k in ("gradient_steps", "env_steps")}
        self._write({**self._constant, "seed": seed, "phase": phase, "event": "diverged", **at})
        self._diverged.add(seed)
        print(f"warning: seed {seed} diverged at {phase} gradient step {at['gradient_steps']}: {what} is not finite", file=sys.stderr)
        if len(self._diverged) == len(self.seeds):
            self.close()
            raise AllDiverged(f"{self.folder}: every seed diverged: try smaller step sizes")

    # ------------------------------------------------------------ rows

    def _append(self, text: str) -> None:
        """Appends to progress.csv; on failure (a full disk) it ends where it ended before."""
        content = text.encode()
        try:
            if self._file.write(content) != len(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.folder / "progress.csv"))
        except OSError as error:
            self._file.truncate(self._end)
            raise OSError(error.errno, error.strerror, str(self.folder / "progress.csv")) from None
        self._end += len(content)

    def _write(self, row: dict) -> None:
        line = io.StringIO()
        csv.DictWriter(line, COLUMNS).writerow(row)
        self._append(line.getvalue())
        self.rows.append(row)

    def log(self, phase: str, event: str, **values) -> None:
        """Appends one row per seed; values are scalars or arrays (seeds,). Rows with no episodes are left out."""
        values = {k: np.broadcast_to(np.asarray(v), len(self._training)) for k, v in values.items()}
        for i, seed in enumerate(self._training):
            row = {k: v[i].item() for k, v in values.items()}
            if seed in self._diverged or row.get("episodes") == 0:
                continue
            broken = next((k for k in row if k.endswith("_loss") and not np.isfinite(row[k])), None)
            row = {k: format(v, ".6g") if isinstance(v, float) else str(v) for k, v in row.items() if np.isfinite(v)}
            self._write({**self._constant, "seed": seed, "phase": phase, "event": event, **row})
            if broken:
                self._diverge(seed, phase, broken)
        alive = [i for i, seed in enumerate(self._training) if seed not in self._diverged]
        if event == "eval" and alive:
            self._latest |= {k: values[k][alive].mean() for k in ("return", "cost")}
        if "multiplier" in values and alive:
            self._latest["lambda"] = values["multiplier"][alive].mean()
        if self._bar is not None:
            self._bar.set_postfix({k: f"{v:.4g}" for k, v in self._latest.items()})

    def steps_before(self, phase: str) -> int:
        """Gradient steps of the phases before `phase`."""
        return max((int(row["gradient_steps"]) for row in self.rows if row["phase"] != phase), default=0)

    def repeat(self, checkpoints: dict[int, Path]) -> None:
        """Writes the rows that were logged when `checkpoints`, by seed, were made, as if they had just been made."""
        of = "" if len(checkpoints) == len(self.seeds) else f" for seeds {', '.join(map(str, checkpoints))}"
        print(f"offline phase from {next(iter(checkpoints.values())).parent}{of}", file=sys.stderr)
        if self._resumed is not None:  # they are there already
            return
        own = [load(path)[1]["rows"] for path in checkpoints.values()]
        for rows in zip(*own, strict=True):
            for seed, row in zip(checkpoints, rows):
                self._write({**self._constant, "seed": seed, **row})

    def save_seeds(self, paths: list[Path], tree, meta: dict | None = None, keep: bool = False) -> None:
        """Writes one file per seed: leaf [i] of every leaf (seeds, ...) of `tree`, with the rows logged so far for that seed.

        Seeds that diverged are left out. `keep`: a file that is there already stays as it is.
        """
        own = set(COLUMNS) - {*self._constant, "seed"}
        for i, (seed, path) in enumerate(zip(self._training, paths, strict=True)):
            if seed in self._diverged:
                continue
            rows = [{k: v for k, v in row.items() if k in own} for row in self.rows if row["seed"] == seed]
            if keep and path.exists():
                if load(path)[1]["rows"] != rows:  # or this run wrote it, and was killed before it could save its state
                    print(f"warning: {path}: made by another run meanwhile: kept, but the rows here are of this run's", file=sys.stderr)
                continue
            about = {**self._constant, "seed": seed, "config": self.config["config"], "rows": rows, **(meta or {})}
            save(path, jax.tree.map(lambda x: np.asarray(x[i]), tree), about)

    def _write_config(self) -> None:
        text = json.dumps(self.config, indent=2, default=str) + "\n"
        write_atomically(self.folder / "config.json", lambda path: path.write_text(text))

    def close(self) -> None:
        """Draws curves.png, marks the run as finished, prints per phase the mean and standard deviation over the seeds."""
        if self._bar is not None:
            self._bar.close()
        self._file.close()
        self.config |= {"seconds": round(self._elapsed(), 1), "diverged": sorted(self._diverged)}
        self._tracker.show(self.rows, curves.draw(self.folder))
        self._write_config()
        for name in (RESUME, "previous-" + RESUME):
            (self.folder / name).unlink(missing_ok=True)
        dataset, limit = self.config["dataset"] or {}, self._constant["cost_limit"]
        print(f"{self._constant['algo']} on {self._constant['env']}, {len(self.seeds)} seed(s), cost limit {limit:g}")
        if self._diverged:
            named = ", ".join(map(str, sorted(self._diverged)))
            print(f"  diverged: {len(self._diverged)} of {len(self.seeds)} seeds, left out below: {named}")
        if dataset.get("safe_return_p90") is not None:
            best, high = dataset["safe_return_best"], dataset["safe_return_p90"]
            print(f"  dataset's safe returns: best {best:.0f}, 90th percentile {high:.0f}")
        alive = [seed for seed in self.seeds if seed not in self._diverged]
        rows = [row for row in self.rows if row["seed"] in alive]
        evals = [row for row in rows if row["event"] == "eval"]
        for phase in dict.fromkeys(row["phase"] for row in evals):
            of_seed = lambda seed: [row for row in evals if (row["phase"], row["seed"]) == (phase, seed)]
            last = [of_seed(seed)[-1] for seed in alive if of_seed(seed)]
            value = lambda key: np.array([float(row.get(key, "nan")) for row in last])  # a simulator may give what is not finite
            spread = lambda key: f"{value(key).mean():8.1f}" + (f" +- {value(key).std():6.1f}" if value(key).size > 1 else "")
            print(f"  {phase + ':':9s} return {spread('return')}   cost {spread('cost')}")
        train = [row for row in rows if row["event"] == "train" and row["phase"] == "online"]
        if train:
            spent = sum(float(row["cost"]) * float(row["episodes"]) for row in train if "cost" in row) / len(alive)
            episodes = sum(float(row["episodes"]) for row in train if "episodes" in row) / len(alive)
            print(f"  online training: {episodes:.0f} episodes per seed, cost {spent / max(episodes, 1):.1f} per episode")
        print(f"  {self.folder}")
        self._tracker.finish()
