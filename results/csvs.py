"""Reads what training leaves, checked: progress.csv (or results/ENV/ALGO.csv) and the JSON beside it.

Everything in results/ but arms.py starts from here, and knows of training only these files. A run folder is RUNS/ENV/ALGO/STAMP/ with
progress.csv and config.json; a committed baseline is results/ENV/NAME.csv with NAME.json, where NAME is an algorithm of
arms.ALGOS, followed by @LIMIT if the cost limit is not 20. Both become a `Run`.
"""

import argparse
import collections
import csv
import json
import math
import os
import re
import shlex
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from results.arms import ALGOS

ROOT = Path(__file__).resolve().parents[1]
ENVS = "SafetyPointRun SafetyCarRun SafetyHalfCheetahVelocity SafetyPointCircle1 SafetyAntRun".split()  # the core suite
IDS = {  # Safety-Gymnasium's id: the task's own name. All of envs.TASKS, without importing JAX; a test compares
    f"Safety{robot}{task}{end}": f"Safety{robot}{task}"
    for robots, tasks, end in (
        ("Point Car Ant", "Run", "0-v0"),
        ("Point Car Ant", "Circle1 Circle2", "-v0"),
        ("HalfCheetah Hopper Swimmer Walker2d Ant", "Velocity", "-v1"),
    )
    for robot in robots.split()
    for task in tasks.split()
}
LIMIT = 20.0  # of the files without @LIMIT in their names
CHOSEN_ON = range(10)  # seeds that settings are chosen on (results/tune.py)
TRIES = "tried"  # the folder in runs/ where tune.py's runs lie
NO_MATTER = ("--runs", "--checkpoint-seconds", "--track", "--resume")  # arguments that no result depends on
UNSEEN = 100  # results are reported on seeds from here on

COLUMNS = (  # those of algos/logbook.py; a test compares
    "env algo seed phase event gradient_steps env_steps episodes return cost length return_se cost_se share_above worst_tenth "
    "multiplier kp ki kd "
    "reward_critic_loss cost_critic_loss actor_loss q qc qc_ood ood_weight entropy "
    "rank_q_policy rank_qc_policy rank_q_random rank_qc_random "
    "cost_limit config_hash commit dataset_hash"
).split()
LATER = frozenset("return_se cost_se share_above worst_tenth".split())  # columns that older files lack
TRIED_KEY = ("algo", "env", "arguments", "seeds")  # of tried.csv (tune.py)
TRIED_NUMBERS = tuple("share_safe return cost worst_cost train_cost first_fifth offline_return offline_cost diverged minutes".split())
TRIED = (*TRIED_KEY, *TRIED_NUMBERS, "commit")
TEXT = frozenset("env algo phase event config_hash commit dataset_hash".split())
COUNTS = frozenset("seed gradient_steps env_steps".split())
EVENTS = ("eval", "train", "rank", "diverged")
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?|[+-]?inf|nan", re.ASCII)


class BadInput(ValueError):
    """An argument, or a file that is no results file of this suite; the message is one line that names place and mend."""


def folder(env: str) -> str:
    """Where an environment's files lie below runs/ and results/: an own one's name, module:id, is no file name everywhere."""
    return env.replace(":", "/")


def task(name: str) -> str:
    """The name that runs of `name` are recorded under: ids of Safety-Gymnasium and of Bullet-Safety-Gym mean a task, too."""
    return name.removesuffix("-v0") if name.startswith("bullet/") else IDS.get(name, name)


def can_be_task(name: str) -> bool:
    """False for what envs.make is sure to refuse: neither a task of this suite nor written as a name of another package's."""
    return name in IDS.values() or bool(re.fullmatch(r"bullet/.+|.+:.+|Safety\w+-v\d", name))


class Parser(argparse.ArgumentParser):
    """Command lines whose errors are one line; @FILE reads arguments from a file, # starts a comment."""

    def __init__(self, description: str):
        super().__init__(description=description, fromfile_prefix_chars="@", allow_abbrev=False)

    def convert_arg_line_to_args(self, line: str) -> list[str]:
        line = line.split("#")[0].strip()
        if line.startswith("-") and "=" in line.split()[0]:  # --flag=VALUE, with all that follows
            return [line]
        return split(line)

    def error(self, message: str):
        raise BadInput(message)


def command(main) -> None:
    """Exits with main()'s exit code; bad input is one line on standard error and exit code 2."""
    try:
        sys.exit(main())
    except BadInput as error:
        sys.exit(print(f"error: {error}", file=sys.stderr) or 2)
    except BrokenPipeError:  # | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def read(path: Path) -> list[dict]:
    """The rows of a results CSV: text, int (seed, steps) or float, NaN where absent.

    Raises:
      BadInput: not a CSV, a column missing, a value of the wrong kind, a repeated row, no rows, rows of several
        environments, algorithms or cost limits, or seeds that end at different steps.
    """
    try:
        with open(path, newline="", encoding="utf-8") as file:
            lines = list(csv.reader(file, strict=True))
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise BadInput(f"{path}: not a readable CSV file ({' '.join(str(error).split())}): restore it or run again") from None
    header = lines[0] if lines else []
    absent = [column for column in COLUMNS if header.count(column) != 1 and not (column in LATER and column not in header)]
    if absent:
        raise BadInput(f"{path}: column {absent[0]} is missing or repeated: not a progress.csv of this suite")
    rows, seen = [], {}
    for number, line in enumerate(lines[1:], 2):
        if len(line) != len(header):
            raise BadInput(f"{path}: row {number} has {len(line)} fields instead of {len(header)}: cut off? run again")
        row = {column: _value(x, column, f"{path}: row {number}") for column, x in zip(header, line) if column in COLUMNS}
        row |= {column: math.nan for column in LATER - row.keys()}
        if row["event"] not in EVENTS:
            raise BadInput(f"{path}: row {number}: event {row['event'][:30]!r} is none of {', '.join(EVENTS)}")
        key = tuple(row[c] for c in ("seed", "phase", "event", "gradient_steps", "env_steps"))
        if key in seen:
            raise BadInput(f"{path}: row {number} repeats row {seen[key]}: the file was merged or appended to twice")
        seen[key] = number
        rows.append(row)
    diverged = {row["seed"] for row in rows if row["event"] == "diverged"}
    for row in rows:
        if row["event"] == "eval" and row["seed"] not in diverged and math.isnan(row["return"] + row["cost"]):
            raise BadInput(f"{path}: seed {row['seed']} has an eval row without return or cost: damaged? run again")
    if not rows:
        raise BadInput(f"{path}: has no rows: the run ended before its first evaluation")
    for column in ("env", "algo", "cost_limit"):
        found = sorted({str(row[column]) for row in rows})
        if len(found) > 1:
            raise BadInput(f"{path}: holds several values of {column} ({', '.join(found[:3])}): split it into one file each")
    ends: dict[int, int] = {}
    for row in rows:
        ends[row["seed"]] = max(ends.get(row["seed"], 0), row["env_steps"])
    kept = {seed: end for seed, end in ends.items() if seed not in diverged}
    for seed, end in kept.items():
        if end < max(kept.values()):
            raise BadInput(f"{path}: seed {seed} ends at env_steps {end}, others at {max(kept.values())}: cut off? run again")
    return rows


def _value(text: str, column: str, where: str):
    if column in TEXT:
        if not text and column in ("env", "algo", "phase", "event"):
            raise BadInput(f"{where}: {column} is empty")
        return text
    if column in COUNTS:
        if not re.fullmatch(r"\d{1,15}", text, re.ASCII):
            raise BadInput(f"{where}: {column} is {text[:30]!r}, not a whole number")
        return int(text)
    if text and not NUMBER.fullmatch(text):
        raise BadInput(f"{where}: {column} is {text[:30]!r}, not a number")
    value = float(text) if text else math.nan
    if text and column in ("return", "cost", "length", "episodes") and not math.isfinite(value):
        raise BadInput(f"{where}: {column} is {text[:30]}, not finite")
    return value


@dataclass(frozen=True, eq=False)  # by identity: measures are cached
class Run:
    """All rows of one algorithm on one task at one cost limit, over its seeds, and how they were made."""

    path: Path
    name: str  # of ALGOS, or the script's
    rows: list[dict]
    about: dict  # {"config", "dataset", "runs": [{"seeds", "command", "commit", "seconds", ...}]}; {} where unknown

    env = property(lambda self: self.rows[0]["env"])
    cost_limit = property(lambda self: self.rows[0]["cost_limit"])
    key = property(lambda self: (self.env, self.name, self.cost_limit))
    seeds = property(lambda self: sorted({row["seed"] for row in self.rows}))
    diverged = property(lambda self: {row["seed"]: row for row in self.rows if row["event"] == "diverged"})
    dataset_hashes = property(lambda self: sorted({row["dataset_hash"] for row in self.rows}))
    commits = property(lambda self: sorted({row["commit"] for row in self.rows if row["commit"]}))

    @property
    def mixed(self) -> dict[int, list[str]]:
        """{seed: commits in order} of the seeds whose rows are of several: --resume with other code than before."""
        found = {seed: list(dict.fromkeys(row["commit"] or "unknown" for row in self.of(seed))) for seed in self.seeds}
        return {seed: commits for seed, commits in found.items() if len(commits) > 1}

    @property
    def unseen(self) -> bool:
        """Whether its seeds are ones that no setting was chosen on; BadInput if only some of them are."""
        unseen = [seed >= UNSEEN for seed in self.seeds]
        if any(unseen) and not all(unseen):
            mend = f"report seeds from {UNSEEN} on apart from the others"
            raise BadInput(f"{self.path}: seeds {self.seeds[0]} to {self.seeds[-1]}: {mend}, on which settings may have been chosen")
        return all(unseen)

    def of(self, seed: int, *events: str) -> list[dict]:
        """The rows of a seed, in order; of these events only, if any are named."""
        return [row for row in self.rows if row["seed"] == seed and (not events or row["event"] in events)]


def stem(name: str, cost_limit: float) -> str:
    """The file name, without ending, of an algorithm's results at a cost limit."""
    return name if cost_limit == LIMIT else f"{name}@{cost_limit:g}"


def load(path: Path) -> Run:
    """A results CSV, or the run folder that holds one."""
    path = Path(path)
    if path.is_dir():
        path = path / "progress.csv"
    rows = read(path)
    beside = path.with_name("config.json") if path.name == "progress.csv" else path.with_suffix(".json")
    about = _normal(read_json(beside)) if beside.exists() else {}
    name = path.stem.split("@")[0]
    if name.split("+")[0] != rows[0]["algo"]:
        name = variant(rows[0]["algo"], about.get("config", {}))
    return Run(path, name, rows, about)


def read_json(path: Path) -> dict:
    """A JSON object; BadInput if the file is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or not isinstance(found.get("config"), dict):
        raise BadInput(f"{path}: not the JSON that a run leaves beside its CSV: restore it, or delete both")
    return found


def _normal(config: dict) -> dict:
    """The JSON of a baseline from the config.json of a run; unchanged if it is one already."""
    if "runs" in config:
        return config
    own = config["config"]
    seeds = list(range(own.get("seed", 0), own.get("seed", 0) + own.get("seeds", 1)))
    facts = {k: config.get(k) for k in ("command", "config_hash", "commit", "seconds", "device", "python", "versions")}
    facts |= {"resumed": config["resumed"]} if config.get("resumed") else {}
    facts["command"] = _that_matters(facts["command"] or "")
    return {"config": without_seeds(own), "dataset": config.get("dataset"), "runs": [{"seeds": seeds, **facts}]}


def _that_matters(command: str) -> str:
    """The command without the arguments of NO_MATTER."""
    kept, dropped = [], False
    for token in split(command):
        dropped = token.partition("=")[0].replace("_", "-") in NO_MATTER or dropped and not token.startswith("--")
        kept += [] if dropped else [token]
    return shlex.join(kept)


def without_seeds(config: dict) -> dict:
    """What two runs must share to be seeds of one experiment."""
    return {k: v for k, v in config.items() if k not in ("seed", "seeds")}


def split(text: str) -> list[str]:
    """The words of a command line; runs of commits before 2026-11-29 recorded theirs without quotes."""
    try:
        return shlex.split(text)
    except ValueError:
        return text.split()


def words(arguments: str) -> dict[str, str]:
    """Command-line arguments as {"--flag": "value value"}, quoted as for a shell; the last of a repeated flag counts."""
    out, flag = {}, ""
    for token in split(arguments):
        if token.startswith("--"):
            flag, equals, value = token.partition("=")
            flag = flag.replace("_", "-")
            out[flag] = shlex.quote(value) if equals else ""
        elif flag:
            out[flag] = f"{out[flag]} {shlex.quote(token)}".strip()
    return out


def same_value(a: str, b: str) -> bool:
    """Whether two values of an argument mean the same: 20 and 20.0 do, and a path with spaces that was recorded without quotes."""
    left, right = (" ".join(split(text)).split() for text in (a, b))
    return len(left) == len(right) and all(x == y or _number(x) == _number(y) is not None for x, y in zip(left, right))


def _number(text: str) -> float | None:
    return float(text) if NUMBER.fullmatch(text) else None


def variant(script: str, config: dict) -> str:
    """The name in ALGOS of a run of algos/SCRIPT.py with this configuration: that with the most arguments which all hold.

    A run of another preset, or one that starts from somebody's actor, has a name of its own.
    """
    text = lambda value: " ".join(map(str, value)) if isinstance(value, list) else str(value)

    def holds(flag: str, wanted: str) -> bool:
        field = flag[2:].replace("-", "_")
        if not wanted:  # --flag or --no-flag
            return config.get(field[3:]) is False if field.startswith("no_") else config.get(field) is True
        return same_value(text(config.get(field)), wanted)

    preset = config.get("preset", "suite")
    best, most = script + (f"+{preset}+other" if preset != "suite" else "") + ("+init" if config.get("init") else ""), 0
    for name, arm in ALGOS.items():
        wanted = words(arm.arguments)
        if wanted.get("--preset", "suite") != preset or config.get("init"):
            continue
        if arm.script == script and len(wanted) > most and all(holds(*item) for item in wanted.items()):
            best, most = name, len(wanted)
    return best


def folders(runs: Path) -> list[tuple[Path, dict]]:
    """(folder, config.json) of all finished runs, oldest first; folders without a readable config.json are passed over, and so are
    the tries of tune.py, which are no results."""
    found = []
    for path in runs.glob("**/config.json"):
        if path.relative_to(runs).parts[0] == TRIES:
            continue
        try:
            config = read_json(path)
        except BadInput:  # of a run that was killed in its first moment
            continue
        if "seconds" in config:  # written at a run's end
            found.append((path.parent, config))
    return sorted(found, key=lambda item: item[0].name)


def fresh(runs: Path, envs: list[str] | None = None, algos: list[str] | None = None) -> dict[tuple, Run]:
    """(env, name, limit) -> the newest finished experiment: all seeds of the newest run's configuration and dataset.

    Of unseen seeds, where there are such: a later run of the seeds that settings are chosen on does not hide them.
    """
    out: dict[tuple, Run] = {}
    for folder, config in reversed(folders(runs)):
        if envs and config.get("env") not in envs or algos and variant(config.get("algo"), config["config"]) not in algos:
            continue
        run = load(folder)
        newest = out.get(run.key)
        if newest is None or run.unseen and not newest.unseen:
            out[run.key] = run
        elif same_experiment(newest, run):
            out[run.key] = merge(newest, run)
    return out


def baselines(results: Path, envs: list[str] | None = None, algos: list[str] | None = None) -> dict[tuple, Run]:
    """(env, name, limit) -> committed run; BadInput if two files are of one key."""
    found: dict[tuple, Run] = {}
    for path in sorted(results.glob("*/**/*.csv")):
        if path.relative_to(results).parts[0] == "speed":
            continue
        run = load(path)
        if run.key in found:
            raise BadInput(f"{path}: of the same task, algorithm and cost limit as {found[run.key].path}: move one of them away")
        found[run.key] = run
    return {key: run for key, run in found.items() if (not envs or run.env in envs) and (not algos or run.name in algos)}


def tried(path: Path) -> list[dict[str, str]]:
    """The rows of a tried.csv, which tune.py writes; [] without that file, BadInput if it is damaged."""
    if not path.exists():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for number, row in enumerate(rows, 2):
        bad = [c for c in TRIED if row.get(c) is None or c in ("algo", "env", "seeds") and not row[c]]
        bad += [c for c in TRIED_NUMBERS if row.get(c) and not NUMBER.fullmatch(row[c])]
        if bad or None in row:
            what = f"column {bad[0]}" if bad else "number of fields"
            raise BadInput(f"{path}: row {number}: {what} is not as results/tune.py writes it: restore the file")
    return rows


def tries(results: Path) -> dict[tuple[str, str], int]:
    """(script, task) -> number of settings of it that were tried there."""
    return dict(collections.Counter((row["algo"], row["env"]) for row in tried(results / "tried.csv")))


# Arguments of BEAR-Lag alone, which every finetuner's configuration lists: elsewhere a new default changes nothing.
BEAR = set("mmd_samples mmd_sigma mmd_limit mmd_dual_lr minimum_weight init_duals offline_max_multiplier".split())


def effective(run: Run) -> dict[str, Any]:
    """The arguments of a run that it makes use of."""
    config = run.about.get("config") or {}
    unused = set() if run.name == "bear_lag" or config.get("offline") == "bear_lag" else BEAR
    return {name: value for name, value in config.items() if name not in unused}


def same_experiment(a: Run, b: Run) -> bool:
    """Whether the two are seeds of one kind, chosen on or unseen, of one configuration on one dataset."""
    return effective(a) == effective(b) and a.dataset_hashes == b.dataset_hashes and a.unseen == b.unseen


def merge(first: Run, second: Run) -> Run:
    """`first` with the seeds that only `second` has; both of one configuration."""
    added = set(second.seeds) - set(first.seeds)
    if not added:
        return first
    rows = first.rows + [row for row in second.rows if row["seed"] in added]
    kept = [run | {"seeds": [s for s in run["seeds"] if s in added]} for run in second.about["runs"]]
    about = first.about | {"runs": first.about["runs"] + [run for run in kept if run["seeds"]]}
    return replace(first, rows=rows, about=about)


def write(run: Run, results: Path) -> Path:
    """Writes results/ENV/NAME.csv and .json, each atomically; returns the CSV's path."""
    path = results / folder(run.env) / f"{stem(run.name, run.cost_limit)}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)

    def text(column, value):
        if column in TEXT or column in COUNTS:
            return value
        return "" if math.isnan(value) else str(value) if column == "cost_limit" else format(value, ".6g")

    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for row in sorted(run.rows, key=lambda row: row["seed"]):
            writer.writerow([text(column, row[column]) for column in COLUMNS])
    beside = temporary.with_suffix(".json")
    beside.write_text(json.dumps(run.about, indent=1) + "\n")
    os.replace(beside, path.with_suffix(".json"))
    os.replace(temporary, path)
    return path
