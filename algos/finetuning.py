"""What the offline-to-online algorithms share: their arguments, phase 1, and the loop of the online phase.

The online phase runs `iterations` times: collect `episodes_per_iter` episodes, move the multiplier by their mean cost, take
`updates_per_iter` gradient steps. An algorithm brings its own gradient step, its behaviour policy and the policy it is judged by.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

import envs
from algos import bc_safe, bear_lag, checkpoint, cpq, logbook, policy, training
from algos.lagrangian import LagrangianArgs, Multiplier, init_multiplier, update_multiplier
from algos.networks import Actor, Networks
from algos.seeds import vmap_seeds
from algos.training import CHUNK, EvalArgs, Learner, NetworkArgs, Run, RunArgs, Start
from data import dsrl
from data.replay import Replay, empty_replay, insert, sample, sample_recent
from envs import reference
from envs.rollout import Batch, Episodes, collect, start_rollout

OFFLINE = {"cpq": cpq, "bear_lag": bear_lag, "bc_safe": bc_safe}
SHARED = ("gate_quantile", "cloning_quantile")  # arguments of CPQ that other phases take, too


@dataclass(frozen=True)
class OnlineArgs:
    """phase 3, online"""

    iterations: int = 50
    """rounds of episodes and gradient steps (release: 100 to 1,000, by task)"""
    episodes_per_iter: int = 5
    """parallel environments; each takes T steps per iteration, so more episodes end where they end early (Marvel: 5)"""
    updates_per_iter: int = 200
    """gradient steps per iteration (release: 20)"""
    batch_size: int = 128
    """transitions per gradient step (release: 64)"""
    buffer_size: int = 1_000_000
    """replay capacity, transitions: whole iterations, at least one"""
    replay: Literal["online", "mixed"] = "online"
    """batches from online transitions (Marvel), or half of each from the dataset"""
    actor_lr: float = 2e-4
    """Adam step size of the actor (release: 2e-6 to 1e-3, by task; its code takes up the offline actor's instead)"""
    actor_schedule: Literal["cosine", "constant"] = "cosine"
    """the actor's step size falls to zero as a cosine, so that policy and multiplier come to rest, or stays (release)"""
    critic_lr: float = 5e-4
    """Adam step size of the reward critics (release: 5e-4 to 1e-2, by task)"""
    cost_critic_lr: float | None = None
    """Adam step size of the cost critic (default: critic_lr; release: 8e-4 to 1e-2, by task)"""
    actor_critics: Literal["online", "target"] = "online"
    """critics in the actor's loss (release: target)"""
    entropy_weight: float = 0.003
    """alpha, scaled reward per nat (release: 5e-5 to 5e-3, by task)"""
    actor_warmup: int = 2
    """iterations in which only critics and multiplier learn (paper, release: 0)"""
    anchor_weight: float = 0.2
    """weight of KL(pi | offline policy), scaled reward per nat (paper, release: 0)"""
    anchor_decay: float = 0.7
    """the anchor's weight falls linearly, and would reach 0 after this share of the iterations"""
    anchor_floor: float = 0.1
    """share of the anchor's weight that stays"""
    evals: int = 5
    """evaluations, evenly spaced, the last at the end"""


@dataclass(frozen=True)
class FinetuneArgs(
    EvalArgs, LagrangianArgs, OnlineArgs, bc_safe.CloningArgs, bear_lag.BearArgs, cpq.CPQArgs, NetworkArgs, RunArgs
):  # fmt: skip
    """configuration"""

    preset: Literal["suite", "release"] = "suite"
    """whole configuration: this suite's, or that of Marvel's paper and code; arguments that are given override it"""
    offline: Literal["cpq", "bear_lag", "bc_safe"] | None = None
    """phase 1: offline algorithm (default: cpq); bc_safe leaves no critics, so these start from new ones"""
    init: Path | None = None
    """instead of phase 1: start from the actor of this checkpoint, and from its critics if they fit; {seed} in it: a file for each seed"""


# ---------------------------------------------------------------- presets: whole configurations

SUITE: dict[str, dict] = {  # per task, where the defaults do not do; the same for every algorithm
    "SafetyAntRun": cpq.SUITE["SafetyAntRun"] | dict(iterations=80, updates_per_iter=600, batch_size=256, actor_lr=3e-4),
    "SafetyCarRun": cpq.SUITE["SafetyCarRun"],
}


def _task(actor_lr: float, critic_lr: float, cost_critic_lr: float, entropy_weight: float, episodes: int) -> dict:
    rates = dict(actor_lr=actor_lr, critic_lr=critic_lr, cost_critic_lr=cost_critic_lr, entropy_weight=entropy_weight)
    return rates | dict(iterations=episodes // 5)


RELEASE: dict[str, dict] = cpq.SLOW | {  # Marvel's release; tasks that are not its own have BallCircle's numbers
    "*": cpq.RELEASE
    | dict(
        actor_warmup=0, init_multiplier=0.0, anchor_weight=0.0, reserve=0.0, updates_per_iter=20, batch_size=64, actor_schedule="constant",
        actor_critics="target", max_multiplier=float("inf"), multiplier_updates=20, gain_rule="release", lagrangian="apid",
        kp=5e-6, ki=5e-6, kd=5e-6, pid_decay=0.9, pid_delay=10, gain_rates=(0.05, 0.05, 0.05), cost_clip=float("inf"), integral_fall=1.0,
    )
    | _task(5e-5, 5e-3, 5e-3, 1e-3, 500),
    "bullet/SafetyBallCircle": _task(5e-5, 5e-3, 5e-3, 1e-3, 500),
    "bullet/SafetyBallRun": _task(1e-5, 5e-3, 5e-3, 1e-3, 500),
    "bullet/SafetyCarCircle": _task(5e-4, 5e-3, 8e-3, 1e-3, 500),
    "bullet/SafetyCarRun": _task(5e-5, 5e-3, 8e-3, 5e-3, 500),
    "bullet/SafetyDroneCircle": _task(5e-6, 8e-4, 2e-3, 5e-3, 1000),
    "bullet/SafetyDroneRun": _task(2e-6, 8e-3, 5e-3, 1e-3, 5000),
    "bullet/SafetyAntCircle": _task(5e-5, 5e-4, 8e-4, 5e-5, 5000),
    "bullet/SafetyAntRun": _task(5e-5, 2e-3, 5e-3, 1e-4, 5000),
    "SafetySwimmerVelocity": _task(1e-5, 5e-4, 8e-4, 1e-4, 2000),
    "SafetyHalfCheetahVelocity": _task(1e-3, 1e-2, 1e-2, 5e-3, 5000),
    "SafetyHopperVelocity": _task(1e-3, 1e-2, 1e-2, 5e-3, 5000),
}  # fmt: skip
PRESETS = {"suite": SUITE, "release": RELEASE}

# ---------------------------------------------------------------- phase 1


def prepare(algo: str, args, multiples: dict[str, int] | None = None, dataset: bool = False) -> Run:
    """Checks the arguments; environment, dataset and run folder. `dataset`: whether a later phase needs it, even with --replay online."""
    logbook.check_numbers(args, {"offline_steps": CHUNK} | (multiples or {}))
    if args.iterations <= args.actor_warmup:
        said = f"--iterations {args.iterations} --actor-warmup {args.actor_warmup}: the actor waits all the time and learns nothing online"
        print(f"warning: {said}: raise --iterations, or lower --actor-warmup", file=sys.stderr)
    if args.init and args.offline:
        raise logbook.BadInput(f"--init {args.init} --offline {args.offline}: --init replaces the offline phase: leave one of them out")
    args, gate = replace(args, offline=None if args.init else args.offline or "cpq"), getattr(args, "vpa_gate", False)
    if ignored := without_effect(args):
        print(f"note: no effect with {'--init' if args.init else f'--offline {args.offline}'}: {' '.join(ignored)}", file=sys.stderr)
    if args.offline == "bear_lag" and gate:
        args = replace(args, vpa_gate=False)
        print("note: BEAR-Lag has no gate that phase 2 could keep (--no-vpa-gate)", file=sys.stderr)
    if args.offline:
        cloned = {"cpq": cpq.gated, "bc_safe": partial(cpq.gated, cloned=bc_safe.cloned) if gate else bc_safe.alone}.get(args.offline)
        return training.prepare(algo, args, cloned=cloned)
    cloned = partial(cpq.gated, cloned=partial(cpq.cloned, instead="--no-vpa-gate")) if dataset and gate else None
    try:
        return training.prepare(algo, args, dataset or args.replay == "mixed" or args.dataset is not None, cloned, start)
    except dsrl.DatasetError as error:
        if args.dataset:
            raise
        without = "--replay online" + (" --vpa-steps 0" if hasattr(args, "vpa_steps") else "")
        raise logbook.BadInput(f"{error}; name another with --dataset, or do without: {without}") from None


def without_effect(args) -> list[str]:
    """The arguments, as on the command line, that differ from the preset's but belong to an offline algorithm which does not run."""
    preset = PRESETS[args.preset]
    usual = {field.name: field.default for field in fields(args)} | preset.get("*", {}) | preset.get(envs.recorded(args.env), {})
    own = {"cpq": cpq.CPQArgs, "bear_lag": bear_lag.BearArgs, "bc_safe": bc_safe.CloningArgs}
    names = [name for algo, group in own.items() if algo != args.offline for name in group.__annotations__ if name not in SHARED]
    return [switch(name, value) for name in names if (value := getattr(args, name)) != usual[name]]


def pretrain(run: Run) -> dict:
    """Phase 1: {"actor", "critics"} of the offline algorithm that --offline names, or of --init; new critics where these have none."""
    if run.start:
        print(run.start.said, file=sys.stderr)
    params = run.start.params if run.start else OFFLINE[run.args.offline].pretrain(run)
    networks = training.make_networks(run.args, run.env)
    if "critics" not in params:
        init = vmap_seeds(lambda key: training.init_params(key, networks, run.critic_obs_size)["critics"])
        params = params | {"critics": init(run.keys("init"))}
    return first_evaluation(run, params, networks) if run.start else params


# ---------------------------------------------------------------- --init


def start(args, env, seeds: list[int]) -> Start:
    """The actor, and if they fit the critics, of the files that --init names; BadInput if an actor does not fit."""
    networks, pattern = training.make_networks(args, env), str(args.init)
    shapes = jax.eval_shape(lambda: training.init_params(jax.random.key(0), networks, env.obs_size + env.privileged_size))
    of_seed = [Path(pattern.replace("{seed}", str(seed))) for seed in seeds]
    found = {path: checkpoint.load(path, foreign=True) for path in dict.fromkeys(of_seed)}
    for path, (arrays, meta) in found.items():
        check_actor(path, arrays, meta.get("config", {}), args, networks.actor, env)
    reasons = [why_new_critics(arrays, meta.get("config", {}), args, shapes["critics"]) for arrays, meta in found.values()]
    taken = ["actor"] if any(reasons) else ["actor", "critics"]
    trees = {
        path: {name: logbook.restore(shapes[name], arrays, str(path), f"{name}/") for name in taken} for path, (arrays, _) in found.items()
    }
    params = jax.tree.map(lambda *x: jnp.stack(x), *(trees[path] for path in of_seed))
    arrays, meta = next(iter(found.values()))
    part = ", its learned policy alone" if policy.expanded(arrays, meta) else ""
    origin = f" ({meta['algo']} on {meta['env']}{part})" if {"algo", "env"} <= meta.keys() else ""
    critics = f"; new critics: {next(filter(None, reasons))}" if any(reasons) else ""
    seen = "sign(x) log(1 + |x|) of each observation x (else --no-symlog)" if args.symlog else "observations as they are (else --symlog)"
    unsaid = "" if meta.get("config") else f"; taken to see {seen}, as the file does not say"
    files = [{"path": str(path), "sha256": dsrl.sha256(path)} for path in found]
    return Start(params, files, f"start from the {' and the '.join(taken)} of {pattern}{origin}{critics}{unsaid}")


def check_actor(path: Path, arrays: checkpoint.Arrays, config: dict, args, actor: Actor, env: envs.Env) -> None:
    """BadInput, naming the argument that mends it, unless the actor of `arrays` is of the shape of `actor`."""
    layers = checkpoint.layers(arrays, "actor/params/", str(path))
    hidden, sizes = tuple(len(bias) for _, bias in layers[:-1]), (layers[0][0].shape[-2], layers[-1][1].shape[-1] / 2)
    if sizes != (actor.obs_size, actor.action_size):
        if config and config.get("odometer", False) != args.odometer:
            add = "leave --backend out" if args.backend == reference.BACKEND else "add that"
            raise logbook.BadInput(f"--init {path}: its policy was trained with {switch('odometer', not args.odometer)}: {add}")
        if not config and env.memory_size and sizes == (actor.obs_size - env.memory_size, actor.action_size):
            raise logbook.BadInput(f"--init {path}: its policy does not see the odometer: add --no-odometer")
        takes = f"takes {sizes[0]} numbers and gives {sizes[1]:g}"
        raise logbook.BadInput(
            f"--init {path}: its policy {takes}, {env.name} has {actor.obs_size} and {actor.action_size}: name one of this task"
        )
    if hidden != actor.hidden:
        words = lambda widths: " ".join(map(str, widths))
        raise logbook.BadInput(
            f"--init {path}: its policy has hidden layers {words(hidden)}, not {words(actor.hidden)}: --hidden {words(hidden)}"
        )
    if config.get("symlog", args.symlog) != args.symlog:
        raise logbook.BadInput(f"--init {path}: its policy was trained with the other input: {switch('symlog', config['symlog'])}")


def why_new_critics(arrays: checkpoint.Arrays, config: dict, args, shapes: dict) -> str:
    """Why the critics in `arrays` cannot be taken; empty if they can."""
    if not any(name.startswith("critics/") for name in arrays):
        return "it holds none"
    for name in ("symlog", "layer_norm", "gamma", "reward_scale"):
        if config.get(name, getattr(args, name)) != getattr(args, name):
            return f"its own were trained with {switch(name, config[name])}"
    try:
        logbook.restore(shapes, arrays, "", "critics/")
    except logbook.BadInput:
        return "its own have other sizes (--num-critics, --cost-critics, --privileged-critic)"
    return "" if all(np.isfinite(x).all() for name, x in arrays.items() if name.startswith("critics/")) else "its own are not finite"


def switch(name: str, value) -> str:
    """How an argument is written on the command line."""
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{flag}" if value else f"--no-{flag}"
    return f"--{flag} {' '.join(map(str, value)) if isinstance(value, tuple) else value}"


def first_evaluation(run: Run, params: dict, networks: Networks) -> dict:
    """`params` as they are, after the policy of --init was evaluated; its row is of the offline phase, after no gradient steps."""
    evaluated = lambda actor: training.evaluated_policy(networks.actor, actor, run.args.eval_policy)
    show = training.make_evaluator(run, evaluated)

    def block(n, carry):
        show("offline", (carry[0]["actor"],), 0, last=True, gradient_steps=0, env_steps=0)
        return carry

    return run.log.run("offline", 0, (params,), block)[0]


# ---------------------------------------------------------------- phase 3


def make_optimizers(args: OnlineArgs) -> dict:
    """One Adam each for the actor and for both critics."""
    steps = max(1, args.iterations - args.actor_warmup) * args.updates_per_iter
    actor = optax.adam(training.step_size(args.actor_lr, args.actor_schedule, steps))
    return {"actor": actor, "critics": training.critic_adam(args.critic_lr, args.cost_critic_lr)}


def anchor_weight(n, args: OnlineArgs):
    """Of iteration n: falls linearly, towards 0 after `anchor_decay` of the iterations, down to `anchor_floor` of its start."""
    return args.anchor_weight * jnp.maximum(args.anchor_floor, 1.0 - n / (args.anchor_decay * args.iterations))


def freeze_all(new: Learner, old: Learner, frozen) -> Learner:
    """`old` where `frozen`, else `new`."""
    return jax.tree.map(partial(jnp.where, frozen), old, new)


def freeze_actor(new: Learner, old: Learner, frozen) -> Learner:
    """`new`, but with the actor of `old` and its optimiser's state where `frozen`."""
    keep = lambda new, old: new | {"actor": jax.tree.map(partial(jnp.where, frozen), old["actor"], new["actor"])}
    return Learner(keep(new.params, old.params), new.targets, keep(new.optimizers, old.optimizers))


def train_online(
    learner: Learner, multiplier: Multiplier, replay: Replay, data: Batch, new: Batch, ended: Episodes, key, n,
    step: Callable, freeze: Callable, args,
):  # fmt: skip
    """Iteration n: inserts what was collected, moves the multiplier by the episodes that ended, takes `updates_per_iter` steps."""
    replay = insert(replay, jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), new))
    multiplier = update_multiplier(multiplier, ended.means()["cost"], args)

    def one(learner, key):
        key_online, key_offline, key_step = jax.random.split(key, 3)
        if args.replay == "online":
            batch = sample_recent(key_online, replay, args.batch_size)
        else:
            half = sample_recent(key_online, replay, args.batch_size // 2)
            rest = sample(key_offline, data, args.batch_size - args.batch_size // 2, data.reward.shape[0])
            batch = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), half, rest)
        after, info = step(learner, multiplier.value, anchor_weight(n, args), batch, key_step)
        return freeze(after, learner, n <= args.actor_warmup), info

    learner, info = jax.lax.scan(one, learner, jax.random.split(key, args.updates_per_iter))
    return learner, multiplier, replay, jax.tree.map(jnp.mean, info)


def finetune(
    run: Run,
    params: dict,
    step: Callable,
    behaviour: Callable,
    evaluated: Callable,
    curriculum: Any = (),
    advance: Callable | None = None,
    freeze: Callable = freeze_actor,
    optimizers: dict | None = None,
) -> dict:
    """The online phase; (seeds, ...) parameters after it, with the last "multiplier" beside them.

    Args:
      params: {"actor", "critics", "prior"} to start from; the prior is frozen.
      step: (learner, multiplier, anchor weight, minibatch, key, networks, optimizers, args) -> (learner, {column: value}).
      behaviour: (params, multiplier, curriculum) -> policy(obs, key, elapsed) that collects episodes.
      evaluated: (params, multiplier) -> policy(obs, key) that evaluations show.
      curriculum, advance: what the behaviour depends on beside them, and (curriculum, means of the episodes, n) -> curriculum.
      freeze: (learner after a step, before it, whether the actor waits) -> learner; the multiplier moves meanwhile.
      optimizers: of further entries of `params`.
    """
    args, log, env, before = run.args, run.log, run.env, run.log.steps_before("online")
    networks, optimizers = training.make_networks(args, env), make_optimizers(args) | (optimizers or {})
    step = partial(step, networks=networks, optimizers=optimizers, args=args)
    learner = vmap_seeds(partial(training.init_learner, optimizers=optimizers))(params)
    per_iter = args.episodes_per_iter * env.horizon
    capacity = min(max(1, args.buffer_size // per_iter), args.iterations) * per_iter
    replay = vmap_seeds(lambda _: empty_replay(capacity, run.critic_obs_size, env.action_size))(run.roots)
    rollout = vmap_seeds(lambda key: start_rollout(key, env, args.episodes_per_iter))(run.keys("collect"))
    multiplier = vmap_seeds(lambda _: init_multiplier(args))(run.roots)
    gather = vmap_seeds(
        lambda params, multiplier, curriculum, rollout, key: collect(
            rollout, behaviour(params, multiplier, curriculum), key, env, env.horizon
        )
    )
    train = vmap_seeds(partial(train_online, step=step, freeze=freeze, args=args), (0, 0, 0, None, 0, 0, 0, None), donate_argnums=(0, 2))
    show = training.make_evaluator(run, evaluated)
    evaluate_after = training.evaluation_blocks(args.iterations, args.evals)
    advance = vmap_seeds(advance, (0, 0, None)) if advance else lambda curriculum, episodes, n: curriculum

    def block(n, carry):
        learner, multiplier, replay, rollout, curriculum = carry
        steps = {"gradient_steps": before + n * args.updates_per_iter, "env_steps": n * per_iter}
        if n == 0:
            return carry
        rollout, new, ended = gather(learner.params, multiplier.value, curriculum, rollout, run.keys("collect", n))
        curriculum = advance(curriculum, ended.means(), n)
        learner, multiplier, replay, info = train(learner, multiplier, replay, run.data, new, ended, run.keys("online", n), n)
        controller = {"multiplier": multiplier.value} | dict(zip(("kp", "ki", "kd"), multiplier.gains.T, strict=True))
        columns = info if "multiplier" in info else controller | info  # a step that has a multiplier of its own reports it
        log.log("online", "train", **steps, **ended.means(), **columns)
        log.check("online", learner)
        if n in evaluate_after:
            policy = learner.params, multiplier.value
            show("online", policy, steps["gradient_steps"], n == args.iterations, **steps, multiplier=columns["multiplier"])
        return learner, multiplier, replay, rollout, curriculum

    carry = (learner, multiplier, replay, rollout, curriculum)
    learner, multiplier, *_ = log.run("online", args.iterations, carry, block, unit="iterations")
    return learner.params | {"multiplier": multiplier.value}


def sampled(networks: Networks) -> Callable:
    """The behaviour of most algorithms: a sample of the actor's policy."""

    def behaviour(params, multiplier, curriculum):
        policy = training.evaluated_policy(networks.actor, params["actor"], "sample")
        return lambda obs, key, elapsed: policy(obs, key)

    return behaviour


def of_actor(networks: Networks, eval_policy: str) -> Callable:
    """What evaluations of most algorithms show: the actor's policy."""
    return lambda params, multiplier: training.evaluated_policy(networks.actor, params["actor"], eval_policy)
