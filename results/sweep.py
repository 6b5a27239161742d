"""Runs every algorithm on every task that has not been run: `make sweep`, or `python results/sweep.py --help`.

A job is one command line of one file in algos/, all its missing seeds at once. It is done when finished run folders of the
same arguments and dataset hold its seeds; there is no other record, so a sweep may be interrupted at any moment, and runs made
by hand or by Slurm count. A job that was cut off goes on where it was (--resume); one that outlives a killed sweep keeps its
lock, and the next sweep waits for it. Of the jobs that start from the same offline checkpoints, one makes them while the others
wait.

    make sweep ENVS='SafetyPointRun SafetyCarRun' ALGOS='marvel marvel+fqe' SEEDS=5 LIMITS='10 20'
    make sweep STUDY=results/study.args              # arguments from a file, one a line
    python results/sweep.py --dry-run                # jobs and an estimate of the time
    python results/sweep.py --print-jobs > jobs.txt  # sbatch --array=1-N --wrap 'sed -n ${SLURM_ARRAY_TASK_ID}p jobs.txt | sh'
    make sweep LAUNCHER=ray ADDRESS=head:6379 GPUS=0.5

Ray (pip install -r requirements-ray.txt) needs this folder and the runs at the same path on every node, on a shared disk.
Jobs of a node that dies are retried on others.
"""

import concurrent.futures
import fcntl
import functools
import hashlib
import shlex
import signal
import statistics
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from results import csvs
from results.arms import ALGOS, COMPARED
from results.csvs import ROOT

NOT_ARGUMENTS = ("--env", "--seed", "--seeds", *csvs.NO_MATTER)  # compared otherwise, or of no consequence
OWN = {  # what the sweep says to every job: how it is told
    "--env": "--envs", "--seed": "--first-seed", "--seeds": "--seeds", "--runs": "--runs", "--cost-limit": "--limits",
    "--resume": "no argument, it always does", "--no-resume": "--runs and a new folder",
}  # fmt: skip
POLL = 0.2  # seconds between two looks at what runs


@dataclass(frozen=True)
class Job:
    """Seeds of one algorithm on one task at one cost limit, and the command that trains them."""

    env: str
    name: str
    limit: float
    seeds: tuple[int, ...]  # consecutive
    arguments: tuple[tuple[str, str], ...]  # flags and values, without seeds and runs
    scripts: Path
    runs: Path

    @property
    def label(self) -> str:
        seeds = f"seed {self.seeds[0]}" if len(self.seeds) == 1 else f"seeds {self.seeds[0]}-{self.seeds[-1]}"
        return f"{self.env} {csvs.stem(self.name, self.limit)} {seeds}"

    @property
    def file(self) -> str:
        """A name for the log that no other job has."""
        return self.label.replace(" ", "-").replace("/", "-") + "-" + digest(self.arguments)

    @property
    def locks(self) -> list[str]:
        """A name per seed, the same in every job that makes the same run of it, however many seeds it has."""
        place, arguments = self.env.replace("/", "-"), tuple(pair for pair in self.arguments if pair[0] not in NOT_ARGUMENTS)
        return [f"{place}-{csvs.stem(self.name, self.limit)}-{seed}-{digest(arguments)}.lock" for seed in sorted(self.seeds)]

    @property
    def offline(self) -> frozenset:
        """Names of the offline checkpoints, one per seed, that this job starts from, or makes if they are missing."""
        return offline(self.env, self.name, self.limit, self.seeds)

    def command(self, python: str) -> list[str]:
        words = {"--env": shlex.quote(self.env), "--seed": str(self.seeds[0]), "--seeds": str(len(self.seeds)), **dict(self.arguments)}
        if self.runs != ROOT / "runs":
            words["--runs"] = shlex.quote(relative(self.runs))
        script = relative(self.scripts / f"{ALGOS[self.name].script}.py")
        return [python, script, "--resume", *(token for flag, value in words.items() for token in (flag, *shlex.split(value)))]


def digest(arguments: tuple) -> str:
    return hashlib.sha256(repr(arguments).encode()).hexdigest()[:8]


def offline(env: str, name: str, limit: float, seeds) -> frozenset:
    kind = ALGOS[name].offline
    return frozenset((kind, env, limit, seed) for seed in seeds) if kind else frozenset()


def relative(path: Path) -> str:
    """Under the repository, a path from there: what config.json records must not name a machine's folders."""
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


# ---------------------------------------------------------------- what there is to do


def done_seeds(env: str, name: str, arguments: dict[str, str], runs: Path) -> set[int]:
    """Seeds that finished runs of exactly these arguments, on the dataset as it is now, hold."""
    arguments, found = {k: v for k, v in arguments.items() if k not in NOT_ARGUMENTS}, set()
    for _, config in csvs.folders(runs):
        if (config.get("env"), config.get("algo")) != (env, ALGOS[name].script):
            continue
        dataset = config.get("dataset") or {}
        if dataset and sha256(ROOT / dataset.get("path", "")) not in (None, dataset.get("sha256")):
            continue
        own = csvs.words(config.get("command") or "")
        own = {"--cost-limit": str(config["config"].get("cost_limit"))} | {k: v for k, v in own.items() if k not in NOT_ARGUMENTS}
        if own.keys() == arguments.keys() and all(csvs.same_value(own[k], arguments[k]) for k in own):
            first = config["config"].get("seed", 0)
            found |= set(range(first, first + config["config"].get("seeds", 1)))
    return found


@functools.cache
def sha256(path: Path) -> str | None:
    """Of a file's content; None if there is no such file."""
    if not path.is_file():
        return None
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def plan(options) -> tuple[list[Job], int, set]:
    """(jobs to run, makers of offline checkpoints first; number of experiments already done; checkpoints already made)."""
    jobs, done, made = [], 0, set()
    for env in options.envs:
        for limit in options.limits:
            for name in options.algos:
                words = {"--cost-limit": f"{limit:g}"} | csvs.words(options.args)
                for entry in options.args_for:
                    if fits(entry, env, name):
                        words |= csvs.words(entry.partition("=")[2])
                words |= csvs.words(ALGOS[name].arguments)  # last: they are what the name means
                have = done_seeds(env, name, words, options.runs)
                made |= offline(env, name, limit, have)
                missing = [seed for seed in range(options.first_seed, options.first_seed + options.seeds) if seed not in have]
                done += not missing
                for seeds in _consecutive(missing, options.seeds_per_job or options.seeds):
                    jobs.append(Job(env, name, limit, seeds, tuple(words.items()), options.scripts, options.runs))
    first, later, making = [], [], set(made)
    for job in jobs:
        (later if job.offline & making and not job.offline <= made else first).append(job)
        making |= job.offline
    return first + later, done, made


def fits(entry: str, env: str, name: str) -> bool:
    """Whether an entry of --args-for, PATTERN=ARGS, is for this job."""
    place, slash, algo = entry.partition("=")[0].rpartition("/")
    return fnmatch(f"{env}/{name}", csvs.task(place) + slash + algo)


def _consecutive(seeds: list[int], most: int) -> list[tuple[int, ...]]:
    """Splits sorted seeds at gaps, and after `most`."""
    parts: list[list[int]] = []
    for seed in seeds:
        if parts and parts[-1][-1] == seed - 1 and len(parts[-1]) < most:
            parts[-1].append(seed)
        else:
            parts.append([seed])
    return [tuple(part) for part in parts]


def seconds_per_seed(options) -> dict[tuple[str, str], float]:
    """(folder of the environment, name) -> median measured seconds per seed of finished runs, else of committed results."""
    found: dict[tuple[str, str], list[float]] = {}
    committed: dict[tuple[str, str], list[float]] = {}
    for _, config in csvs.folders(options.runs):
        if isinstance(config.get("seconds"), (int, float)):
            key = (csvs.folder(config.get("env", "")), csvs.variant(config.get("algo", ""), config["config"]))
            found.setdefault(key, []).append(config["seconds"] / config["config"].get("seeds", 1))
    for path in (ROOT / "results").glob("*/**/*.json"):
        key = (path.parent.relative_to(ROOT / "results").as_posix(), path.stem.split("@")[0])
        for part in csvs.read_json(path).get("runs", ()):
            if part.get("seconds"):
                committed.setdefault(key, []).append(part["seconds"] / len(part["seeds"]))
    return {key: statistics.median(values) for key, values in (committed | found).items()}


def show_plan(jobs: list[Job], done: int, options) -> None:
    """--dry-run."""
    known, total, unknown = seconds_per_seed(options), 0.0, 0
    for job in jobs:
        seconds = known.get((csvs.folder(job.env), job.name))
        total += len(job.seeds) * (seconds or 0)
        unknown += seconds is None
        print(f"{job.label:60s} {duration(len(job.seeds) * seconds) if seconds else 'unknown':>10s}")
    more = f", and {unknown} job(s) never measured" if unknown else ""
    print(f"{len(jobs)} job(s) to run, {done} done; one after another {duration(total)}{more}")


def duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


# ---------------------------------------------------------------- running


def attempt(job: Job, stop: threading.Event | None = None) -> tuple[str, float]:
    """Runs a job unless its seeds are done, under the locks of its seeds; (`done...` or what failed, seconds).

    The locks are inherited by the training process: while that lives, even orphaned, nobody starts one of its seeds a second time.
    """
    place = job.runs / "sweep"
    place.mkdir(parents=True, exist_ok=True)
    stopped = lambda: stop is not None and stop.is_set()
    with ExitStack() as files:
        log = files.enter_context(open(place / f"{job.file}.log", "a"))
        locks = [files.enter_context(open(place / name, "a")) for name in job.locks]
        for lock in locks:  # all jobs take them in the order of the seeds
            while True:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:  # held by a job of another sweep, or one that outlived its sweep
                    time.sleep(POLL)
                    if stopped():
                        return "stopped", 0.0
        if set(job.seeds) <= done_seeds(job.env, job.name, dict(job.arguments), job.runs):
            return "done already", 0.0
        command = job.command(sys.executable)
        log.write(f"# {shlex.join(command)}\n")
        log.flush()
        start = time.monotonic()
        child = subprocess.Popen(
            command,
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            pass_fds=[lock.fileno() for lock in locks],
        )
        try:
            while child.poll() is None and not stopped():
                time.sleep(POLL)
        finally:
            if child.poll() is None:
                child.terminate()
                try:
                    child.wait(10)
                except subprocess.TimeoutExpired:
                    child.kill()
                    child.wait()
        seconds = time.monotonic() - start
        if stopped():
            return "stopped", seconds
        if set(job.seeds) <= done_seeds(job.env, job.name, dict(job.arguments), job.runs):
            return "done" if child.returncode == 0 else "done, but every seed diverged", seconds
        return f"exit code {child.returncode}" + ("" if child.returncode else " without a finished run folder"), seconds


class Local:
    """Runs up to `parallel` jobs at once on this machine."""

    def __init__(self, options):
        self.free = options.parallel
        self.pool = concurrent.futures.ThreadPoolExecutor(options.parallel)
        self.stop = threading.Event()

    def start(self, job: Job):
        self.free -= 1
        return self.pool.submit(attempt, job, self.stop)

    def result(self, handle) -> tuple[str, float] | None:
        """None while it runs."""
        if not handle.done():
            return None
        self.free += 1
        return handle.result()

    def close(self) -> None:
        self.stop.set()
        self.pool.shutdown()


class Ray:
    """Hands all jobs to a Ray cluster, which queues them and retries those whose node died."""

    def __init__(self, options):
        try:
            import ray
        except ImportError:
            raise csvs.BadInput("--launcher ray: Ray is not installed: pip install -r requirements-ray.txt") from None
        from results import sweep  # by name, so that the workers import it too

        self.ray, self.free, self.running = ray, 1_000_000, []
        env = {"PYTHONPATH": str(ROOT)}
        if 0 < options.gpus < 1:
            env["XLA_PYTHON_CLIENT_MEM_FRACTION"] = f"{0.9 * options.gpus:.2f}"  # JAX would take three quarters each
        try:
            ray.init(options.address, runtime_env={"env_vars": env}, log_to_driver=False, logging_level="ERROR")
        except ConnectionError as error:
            raise csvs.BadInput(f"--address {options.address}: no Ray cluster there: start one with `ray start --head`") from error
        resources = dict(num_cpus=options.cpus, num_gpus=options.gpus)
        self.task = ray.remote(max_retries=options.retries, **resources)(sweep.attempt)
        self.job = sweep.Job

    def start(self, job: Job):
        handle = self.task.remote(self.job(**vars(job)))
        self.running.append(handle)
        return handle

    def result(self, handle) -> tuple[str, float] | None:
        """None while it waits or runs."""
        if not self.ray.wait([handle], timeout=0)[0]:
            return None
        self.running.remove(handle)
        try:
            return self.ray.get(handle)
        except self.ray.exceptions.RayError as error:
            return f"given up by Ray ({type(error).__name__})", 0.0

    def close(self) -> None:
        for handle in self.running:
            self.ray.cancel(handle)  # interrupts `attempt`, which ends the training
        if self.running:
            self.ray.wait(self.running, num_returns=len(self.running), timeout=15)
        self.ray.shutdown()


def run(jobs: list[Job], launcher, made: set) -> list[tuple[Job, str]]:
    """Runs all jobs and prints a line for each; returns those that failed, and how. `made`: offline checkpoints there are."""
    waiting, running, failed, made, ended = list(jobs), {}, [], set(made), 0
    try:
        while waiting or running:
            for job in list(waiting):
                maker_runs = any((job.offline & other.offline) - made for other in running)
                if launcher.free > 0 and not maker_runs:
                    waiting.remove(job)
                    running[job] = launcher.start(job)
            for job, handle in list(running.items()):
                result = launcher.result(handle)
                if result is None:
                    continue
                del running[job]
                ended += 1
                how, seconds = result
                if how.startswith("done"):
                    made |= job.offline
                else:
                    failed.append((job, how))
                    how = f"FAILED ({how})"
                took = f" in {duration(seconds)}" if seconds else ""
                print(f"[{ended}/{len(jobs)}] {job.label}: {how}{took}", flush=True)
            time.sleep(POLL)
    finally:
        launcher.close()
    return failed


def log_path(job: Job) -> Path:
    return job.runs / "sweep" / f"{job.file}.log"


def last_line(path: Path) -> str:
    try:
        lines = [line for line in path.read_text(errors="replace").splitlines() if line.strip()]
    except OSError:
        return ""
    return lines[-1].strip()[:160] if lines else ""


# ---------------------------------------------------------------- command line


def parse(arguments: list[str]):
    parser = csvs.Parser("Runs what is missing. @FILE reads arguments from a file, one a line.")
    parser.add_argument("--envs", nargs="+", type=csvs.task, default=csvs.ENVS, help="tasks (default: the core suite)")
    parser.add_argument(
        "--algos", nargs="+", default=COMPARED, metavar="ALGO", help=f"of {' '.join(ALGOS)} (default: the first {len(COMPARED)})"
    )
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds (default 5)")
    parser.add_argument("--first-seed", type=int, default=csvs.UNSEEN, help=f"the first of them (default {csvs.UNSEEN}; below: for tuning)")
    parser.add_argument("--limits", nargs="+", type=float, default=[csvs.LIMIT], metavar="LIMIT", help="cost limits (default 20)")
    parser.add_argument("--args", default="", help="further arguments of every job, as one string")
    parser.add_argument(
        "--args-for", action="append", default=[], metavar="PATTERN=ARGS",
        help="further arguments of the jobs whose ENV/ALGO fits a shell pattern: '*/marvel*=--iterations 100'",
    )  # fmt: skip
    parser.add_argument("--runs", type=Path, default=ROOT / "runs", help="where run folders are looked for and made")
    parser.add_argument("--scripts", type=Path, default=ROOT / "algos", help="folder of the algorithms' files")
    parser.add_argument("--seeds-per-job", type=int, default=0, help="split seeds over jobs (default: all in one program)")
    parser.add_argument("--dry-run", action="store_true", help="print the jobs and an estimate of the time, run nothing")
    parser.add_argument("--print-jobs", action="store_true", help="print one command per line, run nothing")
    parser.add_argument("--launcher", choices=("local", "ray"), default="local")
    parser.add_argument("--parallel", type=int, default=1, help="local: jobs at once (default 1)")
    parser.add_argument("--address", default="auto", help="Ray: address of the cluster (default: the one running here)")
    parser.add_argument("--cpus", type=float, default=1, help="Ray: CPUs per job (default 1)")
    parser.add_argument("--gpus", type=float, default=0, help="Ray: GPU share per job, 0.25 puts four on one (default 0)")
    parser.add_argument("--retries", type=int, default=3, help="Ray: retries of a job whose node died (default 3)")
    options = parser.parse_args(arguments)
    options.runs, options.scripts = options.runs.resolve(), options.scripts.resolve()
    for env in options.envs:
        if not csvs.can_be_task(env):
            parser.error(f"--envs {env}: unknown; known are {' '.join(csvs.IDS.values())}, and other packages' (envs/README.md)")
    for name in options.algos:
        if name not in ALGOS:
            parser.error(f"--algos {name}: unknown; known are {' '.join(ALGOS)}")
        if not (options.scripts / f"{ALGOS[name].script}.py").exists():
            parser.error(f"--algos {name}: there is no {relative(options.scripts / ALGOS[name].script)}.py")
    for flag in ("seeds", "parallel"):
        if getattr(options, flag) < 1:
            parser.error(f"--{flag} {getattr(options, flag)}: must be positive")
    for flag in ("first_seed", "seeds_per_job", "cpus", "gpus", "retries", "limits"):
        value = getattr(options, flag)
        for x in value if isinstance(value, list) else [value]:
            if not x >= 0:
                parser.error(f"--{flag.replace('_', '-')} {x}: must not be negative or NaN")
    for x in options.limits:
        if float(f"{x:g}") != x:  # of commands and file names
            parser.error(f"--limits {x}: has more than six digits, which results are not told apart by: use {x:g}")
    if options.first_seed + options.seeds > 2**31:
        parser.error(f"--first-seed {options.first_seed} --seeds {options.seeds}: the last seed must be below 2147483648")
    for entry in options.args_for:
        if "=" not in entry:
            parser.error(f"--args-for {entry}: must be PATTERN=ARGS")
        if not any(fits(entry, env, name) for env in options.envs for name in options.algos):
            print(f"note: --args-for {entry}: fits no ENV/ALGO of --envs and --algos", file=sys.stderr)
    for where, text in (("--args", options.args), *(("--args-for", entry.partition("=")[2]) for entry in options.args_for)):
        try:
            first = shlex.split(text)[:1]
        except ValueError as error:
            parser.error(f"{where} {text}: {str(error).lower()}: close the quotes")
        if first and not first[0].startswith("--"):
            parser.error(f"{where} {text}: must begin with an argument's name, --NAME")
        for flag in csvs.words(text):
            if flag in OWN:
                parser.error(f"{where} {flag}: the sweep's own: use {OWN[flag]}")
    for flag in ("envs", "algos", "limits"):  # each once
        setattr(options, flag, list(dict.fromkeys(getattr(options, flag))))
    return options


def warn_of_other_commits(options) -> None:
    """Runs that count as done may be of older code; says so, for only the user knows whether that matters."""
    git = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True)
    configs = [config for _, config in csvs.folders(options.runs) if config.get("env") in options.envs]
    others = sum(any(made.get("commit") != git.stdout.strip() for made in (config, *config.get("resumed", ()))) for config in configs)
    if git.returncode == 0 and others:
        print(
            f"note: {others} finished run(s) in {relative(options.runs)} are of other code than this commit; "
            "to repeat them name a new folder with --runs"
        )


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code: 1 if a job failed, 130 if interrupted; raises csvs.BadInput."""
    options = parse(sys.argv[1:] if arguments is None else arguments)
    jobs, done, made = plan(options)
    if options.print_jobs:
        python = relative(Path(sys.executable).absolute())
        print(*(shlex.join(job.command(python)) for job in jobs), sep="\n" if jobs else "")
        later = sum(any(job.offline & earlier.offline - made for earlier in jobs[:i]) for i, job in enumerate(jobs))
        print(
            f"{len(jobs)} job(s); the last {later} start from checkpoints that earlier ones make: run them after those",
            file=sys.stderr,
        )
        return 0
    warn_of_other_commits(options)
    if options.dry_run:
        show_plan(jobs, done, options)
        return 0
    print(f"{len(jobs)} job(s) to run, {done} done; logs in {relative(options.runs / 'sweep')}", flush=True)
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Control-C
    try:
        failed = run(jobs, Ray(options) if options.launcher == "ray" else Local(options), made)
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from here", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, previous)
    if failed:
        print(f"{len(failed)} of {len(jobs)} job(s) failed:", file=sys.stderr)
        for job, how in failed:
            print(f"  {job.label}: {how}: {last_line(log_path(job))}\n    {relative(log_path(job))}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    csvs.command(main)
