"""How fast training and environments are beside others, in one run: `make bench`, or `python results/speed/bench.py`.

Prints one table and writes bench.csv beside this file (--out). Every number is the median of repeats that alternate with
those of its peer, so that both see the same load of the machine; what stands in one row was measured within seconds. Only
safety-gymnasium's number in `envs` is one run of --seconds after the others, or was measured elsewhere (envs.py).

cpq      one gradient step of CPQ at OSRL's sizes (batch 512, hidden 256, VAE 400, 10 actions per state), beside OSRL's CPQ in
         PyTorch; with the OOD penalty on all 512 states, the same work; on 64, the default here; and as released, where the penalty
         has no gradient, so that it is left out.
online   one gradient step of SAC-Lagrangian at the sizes of Marvel's release (batch 64, hidden 256), beside eager PyTorch
         (peers.py); of one seed, and per seed of five in one program.
envs     environment steps per second in a jitted scan with random actions and restarts, beside safety-gymnasium 1.0.0
         (one environment, one process) and CRAX's Point task.
startup  from the start of `python algos/marvel.py` to its first gradient step, compiling everything and with a filled cache.
floor    beside cpq and online: the step's matrix products alone at the highest rate at which this machine multiplies matrices.
         The rates that it reaches in several shapes are rows of their own: a hidden layer of `online`'s four critics is 4x64x256.
whole    a run of Marvel: as results/<env>/marvel.json recorded it, without phase 1 where its seeds' offline checkpoints were there
         already; or from nothing, measured now (--whole ENV).
gpu      only when asked for: the physics backends on the GPU (gpu.py, with its own table; at most 7 minutes).

Peers run under interpreters of their own (--torch, --crax, --reference; peers.py says what they must have), on the same cores,
with as many threads as they choose. A peer that is missing or fails is one line, and its columns are empty.
"""

import csv
import importlib.util
import json
import math
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Literal, get_args

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT))  # the repository is not installed
# A script's own folder comes first on the path, where the neighbouring envs.py would be taken for the package `envs`.
sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != HERE]

import jax
import jax.numpy as jnp
import optax
from jax.extend import core

import envs
from algos import cpq as offline
from algos import finetuning, logbook, marvel, training
from algos.lagrangian import init_multiplier
from algos.seeds import vmap_seeds
from data.replay import Replay
from envs.rollout import Batch, Episodes

Part = Literal["cpq", "online", "envs", "startup", "floor", "whole", "gpu"]
CPQ = {"obs": 33, "act": 8, "horizon": 500, "rows": 100_000, "batch": 512, "hidden": (256, 256), "vae": 400, "ood_actions": 10}
ONLINE = {"obs": 33, "act": 8, "horizon": 500, "rows": 100_000, "batch": 64, "hidden": (256, 256)}
SEEDS = 5
ENVS = 64
TASKS = (("SafetyPointRun", "mujoco"), ("SafetyAntRun", "mujoco"), ("SafetyHalfCheetahVelocity", "mujoco"),
         ("SafetyPointRun", "mjx"), ("SafetyHalfCheetahVelocity", "mjx"))  # fmt: skip
CRAX_TASK = "safe_circle_point"
CRAX_OURS = (("SafetyPointCircle1", "mujoco"), ("SafetyPointCircle1", "mjx"))  # of ours the nearest to it


@dataclass
class Args:
    """Measure gradient steps, environments and start-up beside their peers."""

    only: tuple[Part, ...] = get_args(Part)[:-1]
    """parts to measure"""
    torch: str | None = None
    """a Python interpreter that has torch and osrl-lib"""
    crax: str | None = None
    """a Python interpreter that has crax-bench"""
    reference: str | None = None
    """a Python interpreter that has safety-gymnasium 1.0.0 as published (default: the numbers in envs.py, measured elsewhere)"""
    repeats: int = 7
    """repeats of which the median counts"""
    steps: int = 30
    """gradient steps in one repeat"""
    env_steps: int = 100
    """steps of each of the 64 environments in one repeat"""
    seconds: float = 10.0
    """how long the reference is measured on each task, s"""
    startups: int = 1
    """starts with an empty and with a filled cache, of which the median counts"""
    whole: str | None = None
    """train Marvel on this task from start to end and time it (tens of minutes)"""
    patience: float = 1800.0
    """how long a peer may take to get ready or to make one repeat, s"""
    out: Path = Path(__file__).with_suffix(".csv")
    """where to write the table"""

    def __post_init__(self):
        for name in ("repeats", "steps", "env_steps", "seconds", "startups", "patience"):
            if not getattr(self, name) > 0:
                raise logbook.BadInput(f"--{name.replace('_', '-')} {getattr(self, name)}: must be positive")
        if self.whole:
            self.whole = envs.resolve(self.whole)
        if not self.out.resolve().parent.is_dir():
            raise logbook.BadInput(f"--out {self.out}: no such folder")


# ---------------------------------------------------------------- the table


@dataclass
class Row:
    """One measurement beside a peer's."""

    what: str
    ours: float
    unit: str  # "ms", "s": less is faster; ".../s": more is
    peer: float | None = None
    peer_name: str = ""
    floor: float | None = None  # ms
    note: str = ""

    @property
    def ratio(self) -> float | None:
        """How many times as fast as the peer."""
        if self.peer is None:
            return None
        return self.ours / self.peer if self.unit.endswith("/s") else self.peer / self.ours

    @property
    def times_floor(self) -> float | None:
        return None if self.floor is None else self.ours / self.floor


WHOLE = "whole run"
RELEASED = ("ood_gradient", "cloning_weight", "gate_quantile", "symlog", "layer_norm", "clip_cost_target")  # what changes a step's work
COLUMNS = "what ours unit peer peer_name ratio floor times_floor note".split()


def cells(row: Row) -> dict[str, str]:
    """A row's columns as text, numbers with three significant digits or more."""
    number = lambda x: f"{x:,.0f}" if x >= 100 else f"{x:.3g}"
    text = lambda x: "" if x is None else number(x) if isinstance(x, float | int) else x
    return {column: text(getattr(row, column)) for column in COLUMNS}


def show(rows: list[Row]) -> str:
    """The table for a terminal."""
    table = [COLUMNS] + [[*cells(row).values()] for row in rows]
    widths = [max(len(line[i]) for line in table) for i in range(len(COLUMNS))]
    left = {COLUMNS.index(name) for name in ("what", "unit", "peer_name", "note")}
    pad = lambda i, cell: cell.ljust(widths[i]) if i in left else cell.rjust(widths[i])
    return "\n".join("  ".join(pad(i, cell) for i, cell in enumerate(line)).rstrip() for line in table)


def write(rows: list[Row], path: Path) -> None:
    """Rows that stand in the file and were not measured now are kept, behind the new ones; of whole runs only where none is new."""
    kept, new = [], {cells(row)[COLUMNS[0]] for row in rows}
    whole = any(what.startswith(WHOLE) for what in new)
    if path.exists():
        with open(path, newline="") as file:
            kept = [row for row in csv.DictReader(file) if row["what"] not in new and not (whole and row["what"].startswith(WHOLE))]
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        numbers = ("ours", "peer", "ratio", "floor", "times_floor")
        plain = lambda k, v: v.replace(",", "") if k in numbers else v
        writer.writerows({k: plain(k, v) for k, v in cells(row).items()} for row in rows)
        writer.writerows(kept)


# ---------------------------------------------------------------- measuring


def alternate(measures: dict[str, Callable[[], float]], repeats: int) -> dict[str, float]:
    """Medians of `repeats` rounds, each of which calls every measure once; a measure that fails is left out, and said."""
    found = {name: [] for name in measures}
    for _ in range(repeats):
        for name in list(found):
            try:
                found[name].append(measures[name]())
            except NotMeasured as error:
                print(error, flush=True)
                del found[name]
    return {name: statistics.median(values) for name, values in found.items()}


def repeated(program, carry: tuple, steps: int) -> Callable[[], float]:
    """Seconds per step of `carry = program(carry, n)`, which makes `steps` steps; compiled and warm."""
    state, n = jax.block_until_ready(program(carry, 0)), 0

    def once() -> float:
        nonlocal state, n
        n += 1
        began = time.perf_counter()
        state = jax.block_until_ready(program(state, n))
        return (time.perf_counter() - began) / steps

    return once


class NotMeasured(RuntimeError):
    """A peer that cannot be measured; the message is one line."""


class Peer:
    """A program of peers.py under another interpreter; calling it gives the seconds of one step."""

    def __init__(self, name: str, variable: str, python: str | None, program: str, sizes: dict, patience: float):
        self.name, self.steps, self.patience = name, sizes["steps"], patience
        if not python:
            raise NotMeasured(f"{name}: not measured: name an interpreter with {variable}=/path/to/python")
        self.said = tempfile.TemporaryFile("w+")
        command = [python, "-I", str(HERE / "peers.py"), program, json.dumps(sizes)]
        # What XLA compiles for a peer is kept too: CRAX takes minutes.
        environment = {"JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir or ""} | os.environ
        try:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.said, text=True, env=environment
            )
        except OSError as error:
            raise NotMeasured(f"{name}: not measured: {python}: {error.strerror}") from None
        self._answer()

    def _answer(self) -> str:
        late, began = threading.Timer(self.patience, self.process.kill), time.monotonic()
        late.start()
        line = self.process.stdout.readline()
        late.cancel()
        if not line:
            self.process.wait()
            self.said.seek(0)
            lines = self.said.read().strip().splitlines() or [f"exit code {self.process.returncode}"]
            why = lines[-1] if time.monotonic() - began < self.patience else f"no answer within {self.patience:g} s"
            raise NotMeasured(f"{self.name}: not measured: {why}")
        return line

    def __call__(self) -> float:
        try:
            self.process.stdin.write("\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # its last words follow
        return float(self._answer()) / self.steps

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


def beside(peers: list[tuple], measures: dict, args: Args) -> dict[str, float]:
    """`alternate` of our measures and those of `peers` (arguments of Peer) that can be had."""
    open_peers = []
    for peer in peers:
        try:
            open_peers.append(Peer(*peer, args.patience))
        except NotMeasured as error:
            print(error, flush=True)
    try:
        return alternate({**measures, **{peer.name: peer for peer in open_peers}}, args.repeats)
    finally:
        for peer in open_peers:
            peer.close()


# ---------------------------------------------------------------- the arithmetic floor


def matmul_flops(jaxpr) -> int:
    """Floating-point operations of all matrix products of a program: scans count by their length, the costlier branch of a condition."""
    if isinstance(jaxpr, core.ClosedJaxpr):
        jaxpr = jaxpr.jaxpr
    total = 0
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            terms = math.prod(equation.invars[0].aval.shape[i] for i in contracted)
            total += 2 * math.prod(equation.outvars[0].aval.shape) * terms
        is_program = lambda x: isinstance(x, core.Jaxpr | core.ClosedJaxpr)
        inner = [matmul_flops(x) for x in jax.tree.leaves(list(params.values()), is_leaf=is_program) if is_program(x)]
        total += max(inner, default=0) if name == "cond" else params.get("length", 1) * sum(inner) if name == "scan" else sum(inner)
    return total


def matmul_rates() -> dict[str, tuple[Callable[[], float], float]]:
    """{shape: (seconds of one product, its operations)} of products like those of the networks here and of one large one."""
    found = {}
    shapes = (
        ((4, 64, 256), 256, 40), ((512, 256), 256, 40), ((3, 512, 256), 256, 20), ((5120, 400), 400, 4), ((2048, 2048), 2048, 1),
    )  # fmt: skip
    for shape, width, times in shapes:
        x = jax.random.normal(jax.random.key(0), shape)
        w = jax.random.normal(jax.random.key(1), (*shape[:-2], width, width)) / math.sqrt(width)

        @jax.jit
        def program(x, n, w=w, times=times):
            return jax.lax.fori_loop(0, times, lambda _, x: x @ w, x)

        found["x".join(map(str, shape))] = repeated(program, x, times), 2 * math.prod(shape) * width
    return found


class Floor:
    """How fast this machine multiplies matrices, measured among whatever else is measured."""

    def __init__(self, args: Args):
        self.rates = matmul_rates() if "floor" in args.only else {}
        self.seen: dict[str, float] = {}

    def measures(self) -> dict[str, Callable[[], float]]:
        return {f"matmul {name}": measure for name, (measure, _) in self.rates.items()}

    def rate(self, found: dict[str, float]) -> float | None:
        """Operations per second of the fastest shape among these medians."""
        rates = {name: flops / found[f"matmul {name}"] for name, (_, flops) in self.rates.items()}
        self.seen = self.seen or rates
        return max(rates.values(), default=None)

    def rows(self, args: Args) -> list[Row]:
        if not self.seen and self.rates:  # nothing else was measured
            self.rate(alternate(self.measures(), args.repeats))
        return [Row(f"matrix products, {name}", rate / 1e9, "GFLOP/s", note="float32") for name, rate in self.seen.items()]


def step_row(what: str, name: str, peer: str, found: dict, flops: float, rate: float | None, note: str) -> Row:
    """A gradient step's row, in ms."""
    theirs = found[peer] * 1e3 if peer in found else None
    floor = flops / rate * 1e3 if rate else None
    return Row(what, found[name] * 1e3, "ms", theirs, peer if theirs else "", floor, f"{flops / 1e6:,.0f} MFLOP; {note}")


# ---------------------------------------------------------------- gradient steps


def random_batch(sizes: dict, key) -> Batch:
    """`rows` transitions of noise."""
    keys, n = jax.random.split(key, 5), sizes["rows"]
    obs, next_obs = (jax.random.normal(k, (n, sizes["obs"])) for k in keys[:2])
    action = jnp.tanh(jax.random.normal(keys[2], (n, sizes["act"])))
    cost = jax.random.bernoulli(keys[4], shape=(n,)).astype(jnp.float32)
    return Batch(obs, action, jax.random.normal(keys[3], (n,)), cost, next_obs, jnp.zeros(n))


def bare_env(sizes: dict) -> SimpleNamespace:
    """As much of an environment as gradient steps need."""
    return SimpleNamespace(name="", obs_size=sizes["obs"], privileged_size=0, action_size=sizes["act"], horizon=sizes["horizon"])


def root_keys(seeds: int):
    return jax.vmap(jax.random.key)(jnp.arange(seeds))


@partial(vmap_seeds, in_axes=(0, None))
def fold_in(root, n):
    return jax.random.fold_in(root, n)


def cpq_program(sizes: dict, steps: int, **options):
    """(program(learner, n), learner): `steps` steps of phase 1 of one seed, as algos/cpq.py runs them with these arguments."""
    options |= {"hidden": sizes["hidden"], "vae_hidden": (sizes["vae"],) * 2, "ood_actions": sizes["ood_actions"]}
    args = offline.Args(reward_scale=0.1, offline_batch_size=sizes["batch"], offline_critic_lr=1e-3, offline_actor_lr=1e-4, **options)
    args = replace(args, offline_actor_schedule="constant")
    networks, optimizers = training.make_networks(args, bare_env(sizes)), offline.make_optimizers(args)
    limits, max_qc = offline.thresholds(args.cost_limit, args.gamma, sizes["horizon"]), 1.0 / (1.0 - args.gamma)
    step = partial(offline.cpq_step, networks=networks, optimizers=optimizers, args=args, limits=limits, max_qc=max_qc)
    train = partial(training.train_on_dataset, step=step, batch_size=sizes["batch"], steps=steps)
    train = vmap_seeds(train, (0, None, 0), donate_argnums=0)
    data, roots = random_batch(sizes, jax.random.key(0)), root_keys(1)

    def start(key):
        params = training.init_params(key, networks, sizes["obs"])
        return training.init_learner(params | {"log_dual": jnp.log(jnp.float32(args.init_dual))}, optimizers)

    return lambda learner, n: train(learner, (data, data), fold_in(roots, n))[0], vmap_seeds(start)(roots)


def online_program(sizes: dict, seeds: int, steps: int):
    """(program((learner, multiplier, replay), n), its start): `steps` steps of phase 3 from a full replay of each seed."""
    args = marvel.Args(reward_scale=0.1, hidden=sizes["hidden"], batch_size=sizes["batch"], updates_per_iter=steps)
    networks, optimizers = training.make_networks(args, bare_env(sizes)), {"actor": optax.adam(3e-5), "critics": optax.adam(5e-4)}
    roots, rows = root_keys(seeds), sizes["rows"]
    # One transition a repeat is inserted, so that inserting does not count.
    new = jax.tree.map(lambda x: jnp.broadcast_to(x[:1, None], (seeds, 1, 1, *x.shape[1:])), random_batch(sizes | {"rows": 1}, roots[0]))
    ended = Episodes(*(jnp.ones(seeds) for _ in Episodes._fields))
    step = partial(marvel.online_step, networks=networks, optimizers=optimizers, args=args)
    train = partial(finetuning.train_online, step=step, freeze=finetuning.freeze_actor, args=args)
    train = vmap_seeds(train, (0, 0, 0, None, 0, 0, 0, None), donate_argnums=(0, 2))

    def start(key):
        params = training.init_params(key, networks, sizes["obs"])
        params = {"actor": params["actor"], "critics": params["critics"], "prior": params["actor"]}
        return training.init_learner(params, optimizers), init_multiplier(args), Replay(random_batch(sizes, key), jnp.int32(rows))

    def program(carry, n):
        learner, multiplier, replay = carry
        n = jnp.int32(args.actor_warmup + 1 + n)  # the actor moves
        return train(learner, multiplier, replay, None, new, ended, fold_in(roots, n), n)[:3]

    return program, vmap_seeds(start)(roots)


def flops_per_step(program, start, steps: int) -> float:
    return matmul_flops(jax.make_jaxpr(lambda start: program(start, 0))(start)) / steps


def cpq(args: Args, floor: Floor) -> list[Row]:
    kinds = {"all": {"ood_states": CPQ["batch"]}, "64": {}, "released": {k: offline.RELEASE[k] for k in RELEASED}}
    programs = {name: cpq_program(CPQ, args.steps, **options) for name, options in kinds.items()}
    flops = {name: flops_per_step(*program, args.steps) for name, program in programs.items()}
    measures = {name: repeated(*program, args.steps) for name, program in programs.items()}
    found = beside([("OSRL", "TORCH", args.torch, "osrl", CPQ | {"steps": args.steps})], measures | floor.measures(), args)
    rate, row = floor.rate(found), "CPQ gradient step, batch 512"
    times = found["all"] / found["released"]
    faster = f"the release's networks, no penalty, no cloning; {times:.2f} times as fast as with the penalty on all"
    return [
        step_row(f"{row}, OOD penalty on all 512 states", "all", "OSRL", found, flops["all"], rate, "equal work"),
        step_row(f"{row}, OOD penalty on {offline.Args.ood_states} states", "64", "OSRL", found, flops["64"], rate, "the default here"),
        step_row(f"{row}, as released", "released", "OSRL", found, flops["released"], rate, faster),
    ]


def online(args: Args, floor: Floor) -> list[Row]:
    programs = {seeds: online_program(ONLINE, seeds, args.steps) for seeds in (1, SEEDS)}
    flops = {seeds: flops_per_step(*program, args.steps * seeds) for seeds, program in programs.items()}
    measures = {str(seeds): repeated(*program, args.steps * seeds) for seeds, program in programs.items()}
    found = beside([("PyTorch", "TORCH", args.torch, "torch", ONLINE | {"steps": args.steps})], measures | floor.measures(), args)
    rate, row = floor.rate(found), "SAC-Lagrangian gradient step, batch 64"
    return [
        step_row(f"{row}, 1 seed", "1", "PyTorch", found, flops[1], rate, "as Marvel's phase 3 runs it, with LayerNorm and anchor"),
        step_row(f"{row}, per seed of {SEEDS}", str(SEEDS), "PyTorch", found, flops[SEEDS], rate, "one program"),
    ]


# ---------------------------------------------------------------- environments


def neighbour():
    """results/speed/envs.py as a module of another name."""
    spec = importlib.util.spec_from_file_location("speed_envs", HERE / "envs.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def env_program(name: str, backend: str, num_envs: int, steps: int):
    """(program(state, n), state): `steps` steps of `num_envs` environments, random actions."""
    env = envs.make(name, backend)

    @jax.jit
    def run(state, key):
        def step(state, key):
            action = jax.random.uniform(key, (num_envs, env.action_size), minval=env.action_low, maxval=env.action_high)
            state, transition = env.step(state, action)
            return state, transition  # carried out of the scan, so that nothing can be optimised away

        return jax.lax.scan(step, state, jax.random.split(key, steps))

    start = jax.jit(lambda key: env.reset(jax.random.split(key, num_envs))[0])
    keep = SimpleNamespace(last=None)

    def program(state, n):
        state, keep.last = jax.block_until_ready(run(state, jax.random.key(n)))
        return state

    return program, start(jax.random.key(0))


def environments(args: Args, _) -> list[Row]:
    speed = neighbour()
    steps = args.env_steps * ENVS
    measures = {(name, backend): repeated(*env_program(name, backend, ENVS, args.env_steps), steps) for name, backend in TASKS + CRAX_OURS}
    sizes = {"task": CRAX_TASK, "num_envs": ENVS, "steps": args.env_steps}
    found = beside([("CRAX", "CRAX", args.crax, "crax", sizes)], measures, args)
    if "CRAX" in found:
        found["CRAX"] /= ENVS
    reference, name = dict(speed.REFERENCE), "safety-gymnasium, measured elsewhere"
    if args.reference:
        reference, name = {}, "safety-gymnasium"
        for task in dict.fromkeys(task for task, _ in TASKS):
            try:
                reference[task] = speed.reference_speed(envs.TASKS[task], args.reference, args.seconds)
            except SystemExit as error:  # one line
                print(f"safety-gymnasium: not measured: {error}", flush=True)
    else:
        print("safety-gymnasium: not measured: name an interpreter with REFERENCE=/path/to/python", flush=True)
    rows = []
    for task, backend in TASKS:
        peer = reference.get(task)
        rows.append(Row(f"{task}, {backend}", 1 / found[task, backend], "steps/s", peer, name if peer else "", note=f"{ENVS} environments"))
    for task, backend in CRAX_OURS:
        theirs = 1 / found["CRAX"] if "CRAX" in found else None
        note = f"{ENVS} environments; {envs.TASKS[task].substeps} physics steps in each of ours, 5 of CRAX's"
        peer = f"CRAX {CRAX_TASK}" if theirs else ""
        rows.append(Row(f"{task}, {backend}", 1 / found[task, backend], "steps/s", theirs, peer, note=note))
    return rows


# ---------------------------------------------------------------- start-up and whole runs

COMPILES = {"tracing": "tracing", "lowering": "jaxpr to MLIR", "compiling": "XLA compilation"}  # words of JAX_LOG_COMPILES


def train_rows(runs: Path) -> int:
    """Rows of the event `train` that the run in this folder has written."""
    for path in runs.glob("*/*/*/progress.csv"):
        with open(path, newline="") as file:
            return sum(row["event"] == "train" for row in csv.DictReader(file))
    return 0


def start_up(cache: Path) -> tuple[float, dict[str, float]]:
    """Seconds from a run's start to its first gradient step, and those that JAX says it spent on tracing, lowering and compiling."""
    folder = Path(tempfile.mkdtemp())
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(cache), "JAX_LOG_COMPILES": "1"}
    command = [sys.executable, str(ROOT / "algos" / "marvel.py"), "--env", "SafetyPointRun", "--runs", str(folder / "runs")]
    try:
        with open(folder / "said", "w+") as said:
            began = time.perf_counter()
            process = subprocess.Popen(command, stdout=said, stderr=said, env=environment)
            times = []
            try:
                while len(times) < 2 and process.poll() is None:
                    time.sleep(0.01)
                    if train_rows(folder / "runs") > len(times):
                        times.append(time.perf_counter() - began)
                        if len(times) == 1:
                            text = Path(said.name).read_text()
            finally:
                process.kill()
                process.wait()
            if len(times) < 2:
                said.seek(0)
                raise NotMeasured(f"start-up: not measured: {said.read().strip().splitlines()[-1]}")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    shares = {k: sum(map(float, re.findall(rf"Finished {words}.* in ([\d.e+-]+) sec", text))) for k, words in COMPILES.items()}
    # The first row comes after a block of steps, which takes as long as the second.
    return 2 * times[0] - times[1], shares


def startup(args: Args, _) -> list[Row]:
    found = {"empty": [], "filled": []}
    try:
        for _ in range(args.startups):
            with tempfile.TemporaryDirectory() as cache:
                for kind in found:
                    found[kind].append(start_up(Path(cache)))
    except NotMeasured as error:
        print(error, flush=True)
        return []
    rows = []
    for kind, runs in found.items():
        parts = ", ".join(f"{name} {statistics.median(shares[name] for _, shares in runs):.1f} s" for name in COMPILES)
        what = f"start of marvel.py to first gradient step, {kind} compilation cache"
        rows.append(Row(what, statistics.median(seconds for seconds, _ in runs), "s", note=f"SafetyPointRun; {parts}"))
    return rows


def whole(args: Args, _) -> list[Row]:
    rows = []
    for path in sorted((ROOT / "results").glob("*/marvel.json")):
        for run in json.loads(path.read_text()).get("runs", []):
            if run.get("seconds"):
                note = f"recorded at {run.get('commit', '')[:7]} on {run.get('device', '')}, not measured now; "
                note += f"without phase 1 where its checkpoints were there already; {run.get('command', '')}"
                which = f"seeds {min(run['seeds'])} to {max(run['seeds'])}"
                rows.append(Row(f"{WHOLE}, {path.parent.name}, {which}", run["seconds"], "s", note=note))
    if args.whole:
        with tempfile.TemporaryDirectory() as runs:
            words = ["algos/marvel.py", "--env", args.whole]
            began = time.perf_counter()
            done = subprocess.run([sys.executable, *words, "--runs", runs], cwd=ROOT, capture_output=True, text=True)
            seconds = time.perf_counter() - began
        if done.returncode:
            print(f"whole run: not measured: {(done.stderr.strip().splitlines() or [f'exit code {done.returncode}'])[-1]}", flush=True)
        else:
            rows.append(Row(f"{WHOLE}, {args.whole}, seed 0", seconds, "s", note=f"start and compilation included; {' '.join(words)}"))
    return rows


# ---------------------------------------------------------------- main


def main(args: Args) -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the runs and peers started here end with this
    if "gpu" in args.only:
        if jax.default_backend() == "cpu":
            raise logbook.BadInput('--only gpu: JAX finds no GPU here: pip install "jax[cuda13]" on a machine that has one')
        subprocess.run([sys.executable, HERE / "gpu.py", "--minutes", "7"], check=True)
        if args.only == ("gpu",):
            return
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    load = f", load {os.getloadavg()[0]:.1f} before" if hasattr(os, "getloadavg") else ""
    print(f"{jax.devices()[0].platform}, {cpus} of its cores{load}; medians of {args.repeats}", flush=True)
    floor, rows = Floor(args), []
    for part, measure in {"cpq": cpq, "online": online, "envs": environments, "startup": startup, "whole": whole}.items():
        if part in args.only or part == "whole" and args.whole:
            rows += measure(args, floor)
    rows += floor.rows(args)
    print(f"\n{show(rows)}\n\nratio: how many times as fast as the peer; floor: ms of the step's matrix products alone")
    write(rows, args.out)


if __name__ == "__main__":
    logbook.command(main, Args)
