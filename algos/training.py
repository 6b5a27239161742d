"""What every training script does around its algorithm: arguments, networks, optimisers, keys, evaluation, checkpoints.

A script's main prepares a `Run`, carries parameters through its phases, and ends with `finish`. What is random anywhere follows
from the seed, the name of a stream and a number (`Run.keys`), so that changing one phase leaves the others' randomness alone.
"""

import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import envs
from algos import checkpoint, export, logbook, tracking
from algos import policy as policies
from algos.logbook import Logbook
from algos.networks import VAE, Actor, Ensemble, Networks, sample_action
from algos.seeds import vmap_seeds
from data import collect, dsrl, inspect, public
from data.replay import sample
from envs import reference, render
from envs.rollout import Batch, evaluate

CHUNK = 500  # gradient steps on a dataset between two rows of progress.csv
STREAMS = ("init", "offline", "vpa", "online", "collect", "eval", "rank")

# ---------------------------------------------------------------- arguments


@dataclass(frozen=True)
class RunArgs:
    """run"""

    env: str = "SafetyAntRun"
    """task: a name of envs.TASKS, a Safety-Gymnasium id, or module:id, an environment of your own (envs/README.md)"""
    seed: int = 0
    """first seed"""
    seeds: int = 1
    """number of seeds, vmapped in one program"""
    cost_limit: float = 20.0
    """d, undiscounted cost per episode (Marvel: 20); inf: no constraint"""
    backend: str | None = None
    """physics backend (default: the fastest here)"""
    horizon: int | None = None
    """for an environment of your own: steps after which an episode is cut off (default: its max_episode_steps)"""
    runs: Path = logbook.ROOT / "runs"
    """where run folders and offline checkpoints go"""
    resume: bool = False
    """go on with the newest unfinished run of this configuration, if there is one"""
    checkpoint_seconds: float = 60.0
    """least time between two saves of the whole state, s"""
    track: tracking.Name = "none"
    """send the rows of progress.csv to a tracker too, one run per seed; --resume doubles nothing"""


@dataclass(frozen=True)
class EvalArgs:
    """evaluation"""

    eval_episodes: int = 20
    """episodes per evaluation"""
    final_eval_rounds: int = 25
    """rounds of `eval_episodes` episodes in the last evaluation of a phase; one round is too noisy for comparisons"""
    eval_policy: Literal["sample", "mean"] = "sample"
    """evaluate the stochastic policy, whose cost the multiplier controls, or its mean action (release)"""
    eval: Path | None = None
    """replay this checkpoint on its own task, by its own cost limit, instead of training, and print return and cost"""
    episodes: int = 20
    """episodes to replay with --eval"""
    video: Path | None = None
    """with --eval: film an episode to this .mp4 or .gif"""
    trajectory: Path | None = None
    """with --eval: draw episodes from above to this .png"""
    export: Path | None = None
    """with --eval: write the policy's mean action as an ONNX model to this .onnx (needs the package onnx)"""


@dataclass(frozen=True)
class ActorArgs:
    """networks"""

    hidden: tuple[int, ...] = (128, 128)
    """hidden layers of actor and critics (release: 256 256)"""
    symlog: bool = True
    """networks see sign(x) log(1 + |x|) of each observation x (paper, release: x)"""
    odometer: bool = True
    """on the Run tasks all networks see how far the robot has gone sideways, by its own sensors (paper, release: no)"""


@dataclass(frozen=True)
class NetworkArgs(ActorArgs):
    """networks"""

    layer_norm: bool = True
    """LayerNorm after each hidden layer of the critics (paper, release: none)"""
    num_critics: int = 2
    """reward critics; the minimum counts"""
    cost_critics: int = 1
    """cost critics; Qc is their mean, plus `cost_pessimism` times their standard deviation (CAL: 4)"""
    cost_pessimism: float = 0.5
    """k of mean + k std of several cost critics (CAL: 0.5)"""
    privileged_critic: bool = True
    """let the critics see what the cost depends on but the observation lacks (Run: x), where it is known (paper, release: no)"""
    gamma: float = 0.99
    """discount of all critics (paper, release: 0.99)"""
    tau: float = 0.02
    """rate of the target critics' moving average (release: 0.005)"""
    reward_scale: float | None = None
    """factor on rewards before the critics see them (default: the task's, mostly OSRL's 0.1)"""
    termination_cost: float = 0.0
    """cost that the critic, not the log, charges a terminal step (paper, release: 0): dying must not be a way to be safe"""


@dataclass(frozen=True)
class OfflineArgs:
    """phase 1, offline"""

    dataset: Path | None = None
    """DSRL-format HDF5 file, or dsrl/NAME for a published one (default: the task's own in data/, made if it is missing)"""
    terminals_are_timeouts: bool = False
    """read the dataset's terminals as time-outs, through which critics bootstrap: for files that store them so"""
    offline_steps: int = 10_000
    """gradient steps (OSRL: 100,000; BEAR-Lag 300,000)"""
    offline_batch_size: int = 256
    """transitions per gradient step (OSRL: 512)"""
    offline_actor_lr: float = 1e-3
    """Adam step size of the actor (OSRL: CPQ 1e-4, BC and BEAR-Lag 1e-3)"""
    offline_actor_schedule: Literal["cosine", "constant"] = "cosine"
    """the actor's step size falls to zero as a cosine, or stays (OSRL: constant)"""
    offline_evals: int = 2
    """evaluations during phase 1, evenly spaced, the last at the end, and one more before the first step"""


@dataclass(frozen=True)
class OfflineCriticArgs(OfflineArgs):
    """phase 1, offline"""

    offline_critic_lr: float = 1e-3
    """Adam step size of critics and VAE (OSRL: 1e-3)"""
    clip_cost_target: bool = True
    """clip Qc' to [0, max(C/(1-gamma), termination_cost)], C the dataset's largest cost of a step (paper, OSRL: no)"""
    vae_hidden: tuple[int, ...] = (128, 128)
    """hidden layers of the VAE's encoder and decoder (OSRL: 400 400)"""
    vae_beta: float = 0.5
    """weight of the VAE's KL divergence (OSRL: 0.5)"""


# ---------------------------------------------------------------- networks and optimisers


class Learner(NamedTuple):
    """Everything that gradient steps change. `optimizers` has an entry for each part of `params` that is trained."""

    params: dict
    targets: dict  # moving averages of params["critics"] = {"reward": ..., "cost": ...}
    optimizers: dict


def make_networks(args, env: envs.Env) -> Networks:
    """The networks of NetworkArgs for a task; the VAE's sizes are those of OfflineCriticArgs, where `args` has them."""
    vae_hidden = getattr(args, "vae_hidden", args.hidden)
    return Networks(
        Actor(args.hidden, env.obs_size, env.action_size, args.symlog),
        Ensemble(args.num_critics, args.hidden, args.symlog, args.layer_norm),
        Ensemble(args.cost_critics, args.hidden, args.symlog, args.layer_norm),
        VAE(vae_hidden, env.obs_size, env.action_size, args.symlog),
        args.cost_pessimism,
    )


def init_params(key: jax.Array, networks: Networks, critic_obs_size: int) -> dict:
    """Fresh {"actor", "critics": {"reward", "cost"}, "vae"}; critics see `critic_obs_size` numbers of a state."""
    keys = jax.random.split(key, 4)
    obs, action = jnp.zeros(networks.actor.obs_size), jnp.zeros(networks.actor.action_size)
    seen = jnp.zeros(critic_obs_size)
    critics = {"reward": networks.reward.init(keys[1], seen, action), "cost": networks.cost.init(keys[2], seen, action)}
    return {"actor": networks.actor.init(keys[0], obs), "critics": critics, "vae": networks.vae.init(keys[3], obs, action, keys[3])}


def step_size(lr: float, schedule: str, steps: int):
    """Of one optimiser over `steps` steps: constant, or falling to zero as a cosine."""
    return optax.cosine_decay_schedule(lr, steps) if schedule == "cosine" else lr


def critic_adam(lr: float, cost_lr: float | None = None) -> optax.GradientTransformation:
    """Adam for {"reward", "cost"}, with a step size of its own for the cost critic if `cost_lr` is given."""
    if cost_lr is None or cost_lr == lr:
        return optax.adam(lr)
    return optax.partition({"reward": optax.adam(lr), "cost": optax.adam(cost_lr)}, {"reward": "reward", "cost": "cost"})


def init_learner(params: dict, optimizers: dict) -> Learner:
    """A learner with fresh optimiser states, its targets equal to its critics."""
    return Learner(params, params.get("critics", {}), {name: opt.init(params[name]) for name, opt in optimizers.items()})


def apply_gradient(learner: Learner, optimizers: dict, name: str, gradient) -> Learner:
    """One optimiser step of params[name]."""
    update, state = optimizers[name].update(gradient, learner.optimizers[name])
    params = learner.params | {name: optax.apply_updates(learner.params[name], update)}
    return Learner(params, learner.targets, learner.optimizers | {name: state})


def update_targets(learner: Learner, tau: float) -> Learner:
    """Moves the target critics towards the critics."""
    return learner._replace(targets=optax.incremental_update(learner.params["critics"], learner.targets, tau))


# ---------------------------------------------------------------- the run


@partial(vmap_seeds, in_axes=(0, None, None))
def _fold_in(root, stream, n):
    return jax.random.fold_in(jax.random.fold_in(root, stream), n)


class Start(NamedTuple):
    """Parameters from files (--init)."""

    params: dict  # leaves (seeds, ...)
    files: list[dict]  # {"path", "sha256"} of each file
    said: str  # one line about them


class Run(NamedTuple):
    """What main decides and the phases need."""

    args: Any  # the resolved arguments
    env: envs.Env
    log: Logbook
    roots: jax.Array  # (seeds,) PRNG keys; what is random anywhere follows from these
    dataset_hash: str = ""
    data: Batch | None = None  # all transitions of the dataset
    cloned: Batch | None = None  # those that the offline algorithm imitates
    max_cost: float = 1.0  # largest cost of a step in the dataset
    start: Start | None = None  # what --init gives instead of phase 1

    def keys(self, stream: str, n: int = 0) -> jax.Array:
        """(seeds,) the n-th key of a stream, the same however the run got there."""
        return _fold_in(self.roots, STREAMS.index(stream), n)

    def batches(self, *names: str) -> tuple[Batch, ...]:
        """The transitions of those names, which must be there."""
        found = tuple(getattr(self, name) for name in names)
        assert all(batch is not None for batch in found), names
        return found

    @property
    def max_qc(self) -> float:
        """What costs can add up to, discounted, by which Qc' is bounded: the largest cost in every step, or one terminal step's charge."""
        # The terminal step's own cost is not added to its charge: on AntRun it would change 100 to 101.
        return max(self.max_cost / (1.0 - self.args.gamma), self.args.termination_cost)

    @property
    def critic_obs_size(self) -> int:
        return self.env.obs_size + self.env.privileged_size


def prepare(algo: str, args, dataset: bool = True, cloned: Callable | None = None, start: Callable | None = None) -> Run:
    """Environment, dataset and run folder; whatever is wrong with the arguments is said before anything is written.

    `cloned(dataset, args, path)` gives the (N,) bool of the transitions that the offline algorithm imitates, and the arguments, resolved;
    `start(args, env, seeds)` the Start of the run.
    """
    tracking.check(args.track)
    for flag in ("video", "trajectory", "export"):
        if getattr(args, flag):
            raise logbook.BadInput(f"--{flag}: shows a trained policy: name its checkpoint with --eval")
    privileged = getattr(args, "privileged_critic", False)
    env = envs.make(args.env, args.backend, privileged, args.odometer, args.horizon)
    args = replace(args, env=env.name, horizon=env.horizon if reference.own(env.name) else None)
    if env.name in envs.TASKS and not isinstance(env, envs.Env):  # the package's own has neither: other networks than the native task's
        args = replace(args, odometer=False, **({"privileged_critic": False} if privileged else {}))
    if hasattr(args, "reward_scale"):
        args = replace(args, reward_scale=args.reward_scale or env.reward_scale)
    seeds = list(range(args.seed, args.seed + args.seeds))
    roots = jax.vmap(jax.random.key)(jnp.array(seeds))
    if not dataset:
        begin = start(args, env, seeds) if start else None
        return Run(args, env, Logbook(algo, env.name, asdict(args), seeds, init=begin and begin.files), roots, start=begin)
    hidden = env.privileged_size
    env, loaded, about = load_dataset(args, env)
    if env.privileged_size < hidden:
        args = replace(args, privileged_critic=False)
        print("note: the dataset lacks x, so the critics do not see it (--no-privileged-critic)", file=sys.stderr)
    flat = (loaded.observations, loaded.actions, loaded.rewards, loaded.costs, loaded.next_observations, loaded.terminals)
    data = Batch(*(jnp.asarray(x, jnp.float32) for x in flat))
    chosen, args = cloned(loaded, args, about["path"]) if cloned else (None, args)
    imitated = None if chosen is None else jax.tree.map(lambda x: x[chosen], data)
    begin = start(args, env, seeds) if start else None
    log = Logbook(algo, env.name, asdict(args), seeds, about | dsrl.describe(loaded, args.cost_limit), begin and begin.files)
    return Run(args, env, log, roots, about["sha256"], data, imitated, float(loaded.costs.max()), begin)


def load_dataset(args, env: envs.Env) -> tuple[envs.Env, dsrl.Dataset, dict[str, Any]]:
    """(environment, dataset, its metadata): the data as the environment observes, which is without x if the data lack it."""
    path, seen = args.dataset or collect.provided(env.name), env.obs_size - env.memory_size
    loaded, about = public.load(path, env=env.name, obs_size=seen, action_size=env.action_size)
    path = about["path"]
    if args.terminals_are_timeouts:
        loaded = dsrl.as_timeouts(loaded)
    dsrl.check_episodes(loaded, path, env.horizon)
    inspect.check_rows(path, loaded, env.horizon)
    inspect.check_about(path, about, env)
    inspect.check_env(loaded, path, env)
    if env.memory_size:
        loaded = remembering(loaded, env)
    if env.privileged_size and loaded.privileged is None:
        env = envs.make(args.env, args.backend, memory=args.odometer)
    return env, dsrl.widened(loaded, env.privileged_size, path), about


def remembering(dataset: dsrl.Dataset, env: envs.Env) -> dsrl.Dataset:
    """The dataset with what `env` remembers behind its observations, as `envs.make(..., memory=True)` observes."""

    def one(memory, row):
        obs, done = row
        after = env.task.remember(memory, obs)
        return jnp.where(done, 0.0, after), (memory, after)

    rows = dataset.next_observations, dataset.terminals | dataset.timeouts
    _, (before, after) = jax.jit(partial(jax.lax.scan, one))(jnp.zeros(env.memory_size), rows)
    wide = lambda obs, memory: np.concatenate([obs, np.asarray(memory)], 1)
    observations, next_observations = wide(dataset.observations, before), wide(dataset.next_observations, after)
    return dataset._replace(observations=observations, next_observations=next_observations)


def finish(run: Run, params: dict) -> None:
    """One checkpoint per seed; curves and summary."""
    low, high = (np.asarray(bound).tolist() for bound in run.env.action_bounds)
    paths = [run.log.folder / f"checkpoint-seed{seed}.safetensors" for seed in run.log.seeds]
    run.log.save_seeds(paths, params, {"action_low": low, "action_high": high})
    run.log.close()


# ---------------------------------------------------------------- evaluation


def evaluated_policy(actor: Actor, params, eval_policy: str) -> Callable:
    """The policy (obs, key) -> action that evaluations show: a sample, or the mean action."""

    def policy(obs, key):
        mean, log_std = actor.apply(params, obs)
        return sample_action(key, mean, log_std)[0] if eval_policy == "sample" else jnp.tanh(mean)

    return policy


def evaluation_blocks(blocks: int, n: int) -> set[int]:
    """The blocks after which the n evaluations of a phase come: evenly spaced, the last at the end."""
    return set(np.linspace(0, blocks, n + 1).round().astype(int).tolist()[1:])


def make_evaluator(run: Run, policy: Callable) -> Callable:
    """A function that evaluates `policy(*params)` of every seed and logs what `episode_statistics` says.

    The last evaluation of a phase has `final_eval_rounds` rounds of episodes. Round i has key number n + i of the stream "eval"; n is the
    gradient step, or the block (sac_lag.py).
    """
    args, log = run.args, run.log
    episodes = vmap_seeds(lambda params, key: evaluate(policy(*params), key, run.env, args.eval_episodes))

    def show(phase: str, params: tuple, n: int, last: bool, **columns) -> None:
        rounds = [episodes(params, run.keys("eval", n + i)) for i in range(args.final_eval_rounds if last else 1)]
        values = {k: np.concatenate([r[k] for r in rounds], -1) for k in rounds[0]}
        log.log(phase, "eval", **columns, **episode_statistics(values, args.cost_limit))

    return show


def episode_statistics(episodes: dict[str, np.ndarray], cost_limit: float) -> dict[str, np.ndarray]:
    """Columns (...) of an evaluation from the "return", "cost" and "length" (..., n) of its n episodes.

    Means; the standard errors of return and cost (NaN for one episode); the share of episodes that cost more than the limit; the
    mean cost of the most costly tenth of the episodes, at least one (CVaR at 0.9).
    """
    n = episodes["cost"].shape[-1]
    se = lambda x: np.std(x, -1, ddof=1) / np.sqrt(n) if n > 1 else np.full(x.shape[:-1], np.nan)
    worst = np.sort(episodes["cost"], -1)[..., -max(1, n // 10) :]
    return {k: np.mean(x, -1) for k, x in episodes.items()} | {
        "episodes": np.full(worst.shape[:-1], float(n)),
        "return_se": se(episodes["return"]),
        "cost_se": se(episodes["cost"]),
        "share_above": np.mean(episodes["cost"] > cost_limit, -1),
        "worst_tenth": np.mean(worst, -1),
    }


def replayed_env(args, meta: dict, privileged: bool = False) -> envs.Env:
    """The environment that the policy of a checkpoint with this `meta` was trained in, on the backend of `args`."""
    logbook.check_numbers(args)
    config = meta["config"]
    if envs.recorded(args.env) != meta["env"]:
        raise logbook.BadInput(f"--env {args.env} --eval {args.eval}: its policy is of {meta['env']}: leave --env out")
    return envs.make(meta["env"], args.backend, privileged, config.get("odometer", False), args.horizon or config.get("horizon"))


def replay_checkpoint(args) -> None:
    """--eval: prints return and cost of a checkpoint's policy."""
    assert args.eval is not None
    arrays, meta = checkpoint.load_policy(args.eval)
    if policies.expanded(arrays, meta):
        raise logbook.BadInput(f"{args.eval}: its policy is PEX's, of two actors and the critics: replay it with algos/pex.py")
    env = replayed_env(args, meta)
    actor = Actor(tuple(meta["config"]["hidden"]), env.obs_size, env.action_size, meta["config"].get("symlog", True))
    template = jax.eval_shape(actor.init, jax.random.key(0), jnp.zeros(env.obs_size))
    policy = evaluated_policy(actor, logbook.restore(template, arrays, str(args.eval), "actor/"), args.eval_policy)
    show_episodes(args, env, policy)


def show_episodes(args, env: envs.Env, policy: Callable) -> None:
    """Return and cost of a policy over --episodes; its --trajectory, --video and --export."""
    if args.export:
        export.check(args.export)
    render.check(env, args.trajectory, args.video)
    key = jax.random.key(args.seed)
    found = episode_statistics(replayed(env, policy, key, args.episodes), args.cost_limit)
    print(f"{env.name}: {args.episodes} episodes, return {found['return']:.1f}, cost {found['cost']:.1f}")
    shown = "drawn from the stochastic policy" if args.eval_policy == "sample" else "the policy's mean actions"
    print(f"  actions: {shown} (--eval-policy {args.eval_policy})")
    if args.episodes > 1:
        print(f"  standard errors {found['return_se']:.2g} and {found['cost_se']:.2g}, length {found['length']:.0f}")
        print(f"  {found['share_above']:.1%} of the episodes above {args.cost_limit:g}", end="")
        print(f", mean cost of the worst tenth {found['worst_tenth']:.1f}")
    for draw, path in ((render.trajectory, args.trajectory), (render.video, args.video)):
        if path:
            print(draw(env, policy, key, path))
    if args.export:
        print(export.onnx_file(policies.load_policy(args.eval), args.export))


def replayed(env: envs.Env, policy: Callable, key: jax.Array, episodes: int) -> dict[str, np.ndarray]:
    """{"return", "cost", "length"}, each (episodes,), some at a time: a simulator of another package's is a process's, of up to 30 MB."""
    at_once = 1000 if isinstance(env, envs.Env) else 20
    play = jax.jit(evaluate, static_argnums=(0, 2, 3))
    rounds = []
    for first in range(0, episodes, at_once):
        own = key if first == 0 else jax.random.fold_in(key, first)
        rounds.append(play(policy, own, env, min(at_once, episodes - first)))
    return {k: np.concatenate([np.asarray(r[k], float) for r in rounds]) for k in rounds[0]}


# ---------------------------------------------------------------- training on a dataset


def cost_threshold(cost_limit: float, gamma: float, horizon: int) -> float:
    """q_thres = d (1-gamma^T)/(1-gamma)/T: what a cost critic may say where an episode of T steps may cost d (OSRL)."""
    return cost_limit * (1 - gamma**horizon) / (1 - gamma) / horizon


def train_on_dataset(learner, data: tuple[Batch, ...], key, step: Callable, batch_size: int, steps: int):
    """`steps` times `step(learner, minibatches, key)` with a minibatch of each of `data`; the mean of what the steps report."""

    def one(learner, key):
        *keys, key_step = jax.random.split(key, len(data) + 1)
        batches = tuple(sample(k, d, batch_size, d.reward.shape[0]) for k, d in zip(keys, data, strict=True))
        return step(learner, batches, key_step)

    learner, info = jax.lax.scan(one, learner, jax.random.split(key, steps))
    return learner, jax.tree.map(jnp.mean, info)


# Arguments on which the rows of an offline checkpoint depend, whatever the algorithm.
COMMON_RECIPE = "env cost_limit terminals_are_timeouts hidden symlog odometer offline_steps offline_batch_size offline_actor_lr".split()
COMMON_RECIPE += "offline_actor_schedule offline_evals eval_episodes final_eval_rounds eval_policy".split()
CRITIC_RECIPE = "layer_norm num_critics privileged_critic gamma tau reward_scale termination_cost offline_critic_lr".split()
CRITIC_RECIPE += "cost_critics cost_pessimism clip_cost_target vae_hidden vae_beta".split()


def pretrain(
    run: Run, algo: str, version: int, recipe: list[str], init: Callable, step: Callable, data: tuple[Batch, ...], actor: Actor
) -> dict:
    """Phase 1: (seeds, ...) parameters after `offline_steps` of `step` on the dataset, from one checkpoint per seed.

    Checkpoints that are there stay as they are, so that all runs start from the same ones; only the seeds that lack one are trained.
    It lies under RUNS/ENV/offline/ALGO/ and is named by its recipe: the arguments in `recipe`, the dataset's hash, and `version`,
    which is raised whenever the same arguments give another policy or other critics.

    Args:
      init: key -> Learner.
      step: (learner, minibatches, key) -> (learner, {column: value}), with a minibatch of each of `data`.
    """
    args, log = run.args, run.log
    about = {name: asdict(args)[name] for name in recipe} | {"dataset": run.dataset_hash, "version": version}
    about |= {"horizon": args.horizon} if args.horizon else {}
    paths = {seed: logbook.offline_path(args.runs, run.env.name, algo, about, seed) for seed in log.seeds}
    # A resumed run continues with the seeds that it was training, even if another run has saved their checkpoints since.
    missing = log.resumed_seeds("offline") or [seed for seed in log.seeds if not paths[seed].exists()]
    kept = {seed: path for seed, path in paths.items() if seed not in missing}
    template = jax.eval_shape(init, run.roots[0]).params
    of_seed = {seed: logbook.load_seed(path, template) for seed, path in kept.items()}
    if kept:
        log.repeat(kept)
    if missing:
        part = run._replace(roots=run.roots[jnp.array([log.seeds.index(seed) for seed in missing])])
        trained = train_offline(part, [paths[seed] for seed in missing], missing, about, init, step, data, actor)
        for i, seed in enumerate(missing):  # one that diverged has none
            made = paths[seed].exists()
            of_seed[seed] = logbook.load_seed(paths[seed], template) if made else jax.tree.map(lambda x: x[i], trained)
    return jax.tree.map(lambda *x: jnp.stack(x), *(of_seed[seed] for seed in log.seeds))


def train_offline(
    run: Run, paths: list[Path], seeds: list[int], about: dict, init: Callable, step: Callable, data: tuple[Batch, ...], actor: Actor
) -> dict:
    """(seeds, ...) parameters of those `seeds`, of which alone the roots of `run` are, after phase 1; writes their checkpoints."""
    args, log = run.args, run.log
    train = partial(train_on_dataset, step=step, batch_size=args.offline_batch_size, steps=CHUNK)
    train = vmap_seeds(train, (0, None, 0), donate_argnums=0)
    show = make_evaluator(run, lambda params: evaluated_policy(actor, params, args.eval_policy))
    blocks = args.offline_steps // CHUNK
    evaluate_after = evaluation_blocks(blocks, args.offline_evals) | {0}

    def block(n, carry):
        (learner,), steps = carry, {"gradient_steps": n * CHUNK, "env_steps": 0}
        if n:
            learner, info = train(learner, data, run.keys("offline", n))
            log.log("offline", "train", **steps, **info)
            log.check("offline", learner)
        if n in evaluate_after:
            show("offline", (learner.params["actor"],), n * CHUNK, n == blocks, **steps)
        if n == blocks:
            log.save_seeds(paths, learner.params, {"recipe": about}, keep=True)
        return (learner,)

    learner = vmap_seeds(init)(run.keys("init"))
    return log.run("offline", blocks, (learner,), block, CHUNK, seeds=seeds)[0].params
