"""The run folder that every algorithm leaves: runs/<env>/<algo>/<stamp>/ with progress.csv, config.json, checkpoints, curves.png.

Nothing here knows of any algorithm. Rows have fixed columns (absent values are empty), one per seed and event:

    event   `eval`: `episodes` fresh episodes of the policy (config.json: eval_policy); `train`: the stochastic training
            episodes that ended since the row before; `rank`: Spearman correlations of Q and Qc with Monte-Carlo returns.
    return, cost, length: means over those episodes, raw and undiscounted.
"""

import csv
import dataclasses
import datetime
import hashlib
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import flax.serialization
import flax.traverse_util
import jax
import numpy as np
import safetensors
import safetensors.numpy
import tyro
from tqdm import tqdm

from algos import curves
from data import dsrl
from envs import UnknownName

ROOT = Path(__file__).resolve().parents[1]
NOT_CONFIGURATION = ("runs", "eval", "episodes", "dataset")  # where and what to replay; the dataset counts by its hash
COLUMNS = (
    "env algo seed phase event gradient_steps env_steps episodes return cost length multiplier kp ki kd "
    "reward_critic_loss cost_critic_loss actor_loss q qc qc_ood ood_weight entropy "
    "rank_q_policy rank_qc_policy rank_q_random rank_qc_random "
    "cost_limit config_hash commit dataset_hash"
).split()

jax.config.update("jax_compilation_cache_dir", os.environ.get("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "jax")))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


class BadInput(ValueError):
    """An argument or a file that cannot be used; the message is one line that names the mend."""


def command(main, args_class) -> None:
    """Parses the command line and runs `main`; bad input is one line on standard error and exit code 2."""
    try:
        main(tyro.cli(args_class))
    except (BadInput, UnknownName, dsrl.DatasetError) as error:
        sys.exit(print(f"error: {error}", file=sys.stderr) or 2)


def check_numbers(args, zero_allowed: set[str], multiples: dict[str, int] = {}) -> None:
    """BadInput unless every number that defaults to a positive one is positive (or zero where that is allowed)."""
    for field in dataclasses.fields(args):
        value, default = getattr(args, field.name), field.default
        flag = "--" + field.name.replace("_", "-")
        for x in value if isinstance(value, tuple) else (value,):
            if isinstance(x, bool) or not isinstance(x, (int, float)):
                continue
            if x != x or x < 0 and field.name != "entropy_per_action":
                raise BadInput(f"{flag} {x}: must not be negative or NaN")
            if x == 0 and field.name not in zero_allowed and default not in (0, 0.0):
                raise BadInput(f"{flag} {x}: must be positive")
        if field.name in multiples and value % multiples[field.name]:
            raise BadInput(f"{flag} {value}: must be a multiple of {multiples[field.name]}")


def commit() -> str:
    """The repository's commit, with `+` if files differ from it; empty outside a checkout or without git."""
    if not shutil.which("git"):
        return ""
    git = lambda *words: subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True).stdout.strip()
    return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")


def digest(config: dict) -> str:
    """12 hex digits that name a configuration."""
    return hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest()[:12]


def save(path: Path, tree, meta: dict) -> None:
    """Writes a pytree of arrays as safetensors (no code runs when it is opened), atomically, with `meta` as JSON in its header."""
    flat = flax.traverse_util.flatten_dict(flax.serialization.to_state_dict(tree), sep="/")
    arrays = {k: np.array(v, order="C") for k, v in flat.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    safetensors.numpy.save_file(arrays, temporary, {"meta": json.dumps(meta, default=str)})
    os.replace(temporary, path)


def load(path: Path) -> tuple[dict, dict]:
    """(nested dict of arrays, meta) of a file that `save` wrote; BadInput if it is not one."""
    try:
        with safetensors.safe_open(path, "numpy") as file:
            meta = json.loads(file.metadata()["meta"])
            flat = {k: file.get_tensor(k) for k in file.keys()}
    except FileNotFoundError:
        raise BadInput(f"{path}: no such checkpoint; runs leave theirs in runs/ENV/ALGO/STAMP/") from None
    except (safetensors.SafetensorError, OSError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise BadInput(f"{path}: not a checkpoint of this suite, or damaged: name another") from None
    return flax.traverse_util.unflatten_dict(flat, sep="/"), meta


def restore(template, tree: dict, source: str):
    """`tree` (from `load`) in the structure of `template`; BadInput if shapes or names differ."""
    wanted = flax.traverse_util.flatten_dict(flax.serialization.to_state_dict(template), sep="/")
    found = flax.traverse_util.flatten_dict(tree, sep="/")
    odd = sorted(wanted.keys() ^ found.keys()) or [k for k in wanted if np.shape(wanted[k]) != np.shape(found[k])]
    if odd:
        raise BadInput(f"{source}: does not fit this configuration's networks ({len(odd)} arrays differ, first {odd[0]})")
    return flax.serialization.from_state_dict(template, tree)


def offline_path(runs: Path, env: str, algo: str, recipe: dict, seed: int) -> Path:
    """Where the offline checkpoint of a seed lies; `recipe` is all that it depends on."""
    return runs / env / "offline" / algo / digest(recipe) / f"seed{seed}.safetensors"


def load_seeds(paths: list[Path], template):
    """The trees of one checkpoint per seed, stacked to the shape of `template` (leaves (seeds, ...))."""
    one = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), template)
    trees = [restore(one, load(path)[0], str(path)) for path in paths]
    return jax.tree.map(lambda *x: jax.numpy.stack(x), *trees)


class Logbook:
    """One run of one algorithm over several seeds: collects rows, shows progress, writes the folder."""

    def __init__(self, algo: str, env: str, config: dict, seeds: list[int], dataset: dict | None = None):
        stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
        self.folder = config["runs"] / env / algo / f"{stamp}-{os.getpid()}"
        self.folder.mkdir(parents=True)
        config = {k: v for k, v in config.items() if k not in NOT_CONFIGURATION}
        self.seeds = seeds
        if dataset and Path(dataset["path"]).is_relative_to(ROOT):  # a path that means the same on other machines
            dataset = dataset | {"path": str(Path(dataset["path"]).relative_to(ROOT))}
        packages = ("jax", "flax", "optax", "numpy", "mujoco", "gymnasium", "safety-gymnasium")
        self.config = {
            "algo": algo, "env": env, "config": config, "config_hash": digest(config), "commit": commit(), "dataset": dataset,
            "command": " ".join([f"algos/{Path(sys.argv[0]).name}", *sys.argv[1:]]), "versions": {p: importlib.metadata.version(p) for p in packages},
            "python": sys.version.split()[0], "device": jax.devices()[0].device_kind,
        }  # fmt: skip
        (self.folder / "config.json").write_text(json.dumps(self.config, indent=2, default=str) + "\n")
        self._constant = {
            "env": env, "algo": algo, "cost_limit": config.get("cost_limit"), "config_hash": self.config["config_hash"],
            "commit": self.config["commit"], "dataset_hash": (dataset or {}).get("sha256", "")[:12],
        }  # fmt: skip
        self._file = open(self.folder / "progress.csv", "w", newline="")
        self._writer = csv.DictWriter(self._file, COLUMNS)
        self._writer.writeheader()
        self.rows: list[dict] = []
        self._bar, self._latest = None, {}

    def phase(self, name: str, total: int, unit: str) -> None:
        """Starts a phase of `total` units on the progress bar (no bar where standard error is not a terminal)."""
        if self._bar is not None:
            self._bar.close()
        width = shutil.get_terminal_size((110, 24)).columns  # tqdm's own guess is 0, an empty bar, on some pseudo-terminals
        self._bar = tqdm(total=total, desc=name, unit=f" {unit}", unit_scale=True, disable=None, ncols=width)

    def advance(self, n: int) -> None:
        self._bar.update(n)

    def _write(self, row: dict) -> None:
        self._writer.writerow(row)
        self.rows.append(row)

    def log(self, phase: str, event: str, **values) -> None:
        """Appends one row per seed; values are scalars or arrays (seeds,). Rows with no episodes are left out."""
        values = {k: np.broadcast_to(np.asarray(v), len(self.seeds)) for k, v in values.items()}
        for i, seed in enumerate(self.seeds):
            row = {k: v[i].item() for k, v in values.items()}
            if row.get("episodes") == 0:
                continue
            row = {k: format(v, ".6g") if isinstance(v, float) else v for k, v in row.items() if v == v}
            row = {**self._constant, "seed": seed, "phase": phase, "event": event, **row}
            self._write(row)
        self._file.flush()
        if event == "eval":
            self._latest |= {"return": values["return"].mean(), "cost": values["cost"].mean()}
        if "multiplier" in values:
            self._latest["lambda"] = values["multiplier"].mean()
        if self._bar is not None:
            self._bar.set_postfix({k: f"{v:.4g}" for k, v in self._latest.items()})

    def repeat(self, checkpoints: list[Path]) -> None:
        """Writes the rows that were logged when `checkpoints` (one per seed) were made, as if they had just been made."""
        own = [load(path)[1]["rows"] for path in checkpoints]
        for rows in zip(*own, strict=True):
            for seed, row in zip(self.seeds, rows):
                self._write({**self._constant, "seed": seed, **row})
        self._file.flush()
        print(f"offline phase from {checkpoints[0].parent}", file=sys.stderr)

    def save_seeds(self, paths: list[Path], tree, meta: dict | None = None) -> None:
        """Writes one file per seed: leaf [i] of every leaf (seeds, ...) of `tree`, with the rows logged so far for that seed."""
        own = set(COLUMNS) - {*self._constant, "seed"}
        for i, (seed, path) in enumerate(zip(self.seeds, paths)):
            rows = [{k: v for k, v in row.items() if k in own} for row in self.rows if row["seed"] == seed]
            about = {**self._constant, "seed": seed, "config": self.config["config"], "rows": rows, **(meta or {})}
            save(path, jax.tree.map(lambda x: np.asarray(x[i]), tree), about)

    def close(self) -> None:
        """Draws curves.png and prints what came out, per phase: mean and standard deviation over the seeds."""
        if self._bar is not None:
            self._bar.close()
        self._file.close()
        curves.draw(self.folder)
        dataset, limit = self.config["dataset"] or {}, self._constant["cost_limit"]
        print(f"{self._constant['algo']} on {self._constant['env']}, {len(self.seeds)} seed(s), cost limit {limit:g}")
        if dataset.get("safe_return_p90") is not None:
            print(f"  dataset: best safe return {dataset['safe_return_best']:.0f}, 90th percentile {dataset['safe_return_p90']:.0f}")
        evals = [row for row in self.rows if row["event"] == "eval"]
        for phase in dict.fromkeys(row["phase"] for row in evals):
            last = [[row for row in evals if (row["phase"], row["seed"]) == (phase, seed)][-1] for seed in self.seeds]
            value = lambda key: np.array([float(row[key]) for row in last])
            spread = lambda key: f"{value(key).mean():8.1f} +- {value(key).std():6.1f}"
            print(f"  {phase + ':':9s} return {spread('return')}   cost {spread('cost')}")
        train = [row for row in self.rows if row["event"] == "train" and row["phase"] == "online"]
        if train:
            spent = sum(float(row["cost"]) * float(row["episodes"]) for row in train if "cost" in row) / len(self.seeds)
            episodes = sum(float(row["episodes"]) for row in train if "episodes" in row) / len(self.seeds)
            print(f"  online training: {episodes:.0f} episodes per seed, cost {spent / max(episodes, 1):.1f} per episode")
        print(f"  {self.folder}")
