"""BC-Safe: behaviour cloning of the dataset's safe trajectories. Offline only, no critics.

Source: the baseline of that name in OSRL and Marvel (arXiv 2412.04426).

    equation                                                                                  function
    maximise log pi(a|s) over the chosen trajectories' (s, a)                                 bc_loss
    safe: undiscounted cost <= d;  frontier: see chosen_trajectories                          chosen_trajectories

An unfinished last trajectory never counts as safe: its cost is not known.

Deviations from OSRL: (1) the likelihood of a tanh-Gaussian policy, not the squared error of a deterministic one, so that the
policy is as stochastic as the data; (2) the frontier is read off the data, not off a fitted polynomial.
"""

import sys
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import envs
from algos import logbook
from algos.critics import symlog
from algos.logbook import Logbook
from algos.seeds import over_seeds
from data import dsrl, public
from envs import render


@dataclass(frozen=True)
class Args:
    env: str = "SafetyAntRun"
    """task: a name of envs.TASKS or a Safety-Gymnasium id"""
    seed: int = 0
    """first seed"""
    seeds: int = 1
    """number of seeds, vmapped in one program"""
    cost_limit: float = 20.0
    """d, undiscounted cost per episode (Marvel: 20)"""
    dataset: Path | None = None
    """DSRL-format HDF5 file, or dsrl/NAME for a published one (default: the task's own in data/)"""
    backend: str | None = None
    """physics backend (default: the fastest here)"""
    runs: Path = logbook.ROOT / "runs"
    """where run folders and offline checkpoints go"""
    resume: bool = False
    """go on with the newest unfinished run of this configuration, if there is one"""
    checkpoint_seconds: float = 60.0
    """least time between two saves of the whole state, s"""

    hidden: tuple[int, ...] = (128, 128)
    """hidden layers of actor and critics (release: 256)"""
    data: Literal["safe", "all", "frontier"] = "safe"
    """trajectories to clone: within the cost limit; all; or those whose return is near the best at their cost or less"""
    frontier: float = 0.8
    """with --data frontier: least return, as a share of the way from the dataset's worst to the best at that cost or less"""

    offline_steps: int = 10_000
    """phase 1: CPQ gradient steps (OSRL: 100,000)"""
    offline_batch_size: int = 256
    """phase 1: transitions per gradient step (OSRL: 512)"""
    offline_actor_lr: float = 1e-3
    """phase 1: Adam step size of the actor (OSRL: 1e-4), falling to zero as a cosine"""

    eval_episodes: int = 20
    """episodes per evaluation"""
    final_eval_rounds: int = 5
    """evaluations that the one at the end of each phase averages: the cost of 20 episodes scatters too widely to compare"""
    eval_policy: Literal["sample", "mean"] = "sample"
    """evaluate the stochastic policy, whose cost the multiplier controls, or its mean action"""
    offline_evals: int = 2
    """evaluations during phase 1"""
    eval: Path | None = None
    """replay this checkpoint instead of training, and print return and cost"""
    episodes: int = 20
    """episodes to replay with --eval"""
    video: Path | None = None
    """with --eval: film an episode to this .mp4 or .gif"""
    trajectory: Path | None = None
    """with --eval: draw episodes from above to this .png"""


# ---------------------------------------------------------------- networks


class Actor(nn.Module):
    """obs (..., o) -> mean and log standard deviation (..., a) of the Gaussian before tanh. Blind to what follows o."""

    hidden: tuple[int, ...]
    obs_size: int
    action_size: int

    @nn.compact
    def __call__(self, obs):
        x = symlog(obs[..., : self.obs_size])
        for width in self.hidden:
            x = nn.relu(nn.Dense(width)(x))
        mean, raw = jnp.split(nn.Dense(2 * self.action_size)(x), 2, -1)
        return mean, -5.0 + 3.5 * (1.0 + jnp.tanh(raw))  # log sigma in [-5, 2]


class Learner(NamedTuple):
    """Everything that gradient steps change. `params` and `optimizers` have one entry per optimiser."""

    params: dict
    targets: dict  # moving averages of params["critics"] = {"reward": ..., "cost": ...}
    optimizers: dict


class Fixed(NamedTuple):
    """What is decided before any program is compiled."""

    args: Args
    env: envs.Env
    networks: dict
    optimizers: dict


def build(args: Args, env: envs.Env, rates: dict) -> Fixed:
    """Networks of a configuration and one Adam per entry of `rates`."""
    networks = {"actor": Actor(args.hidden, env.obs_size, env.action_size)}
    return Fixed(args, env, networks, {name: optax.adam(rate) for name, rate in rates.items()})


def init_params(key, fixed: Fixed) -> dict:
    return {"actor": fixed.networks["actor"].init(key, jnp.zeros(fixed.env.obs_size))}


def start_phase(params: dict, fixed: Fixed) -> Learner:
    """A learner with fresh optimiser states and no targets."""
    return Learner(params, {}, {k: opt.init(params[k]) for k, opt in fixed.optimizers.items()})


def descend(learner: Learner, fixed: Fixed, name: str, gradient) -> Learner:
    """One optimiser step of params[name]."""
    update, state = fixed.optimizers[name].update(gradient, learner.optimizers[name])
    params = learner.params | {name: optax.apply_updates(learner.params[name], update)}
    return Learner(params, learner.targets, learner.optimizers | {name: state})


# ---------------------------------------------------------------- maths


def sample_action(key, mean, log_std):
    """A tanh-Gaussian action (..., a) and its log-probability (...,)."""
    noise = jax.random.normal(key, mean.shape)
    u = mean + jnp.exp(log_std) * noise
    log_normal = -0.5 * jnp.square(noise) - log_std - 0.5 * jnp.log(2 * jnp.pi)
    log_det = 2 * (jnp.log(2.0) - u - jax.nn.softplus(-2 * u))  # log(1 - tanh(u)^2), stable
    return jnp.tanh(u), jnp.sum(log_normal - log_det, -1)


def log_probability(action, mean, log_std):
    """log pi(action) (...,) of a tanh-Gaussian; actions at the bounds are moved inside by 1e-4."""
    action = jnp.clip(action, -1 + 1e-4, 1 - 1e-4)
    u = jnp.arctanh(action)
    log_normal = -0.5 * jnp.square((u - mean) / jnp.exp(log_std)) - log_std - 0.5 * jnp.log(2 * jnp.pi)
    return jnp.sum(log_normal - jnp.log1p(-jnp.square(action)), -1)


def bc_loss(actor, batch, fixed: Fixed):
    """Negative log-likelihood of the batch's actions."""
    mean, log_std = fixed.networks["actor"].apply(actor, batch.obs)
    loss = -jnp.mean(log_probability(batch.action, mean, log_std))
    return loss, {"actor_loss": loss}


def chosen_trajectories(dataset: dsrl.Dataset, args: Args) -> np.ndarray:
    """(N,) bool: the transitions to clone (--data).

    frontier: complete trajectories whose return reaches worst + `frontier` * (best - worst), best being the highest return among
    trajectories that cost no more, and worst the lowest of all: near the Pareto front of return and cost, at any cost.
    """
    found = dsrl.episodes(dataset)
    if args.data == "all":
        chosen = np.ones(len(found.returns), bool)
    elif args.data == "safe":
        chosen = found.complete & (found.costs <= args.cost_limit)
    else:
        worst = found.returns[found.complete].min(initial=np.inf)
        as_cheap = found.complete & (found.costs[None, :] <= found.costs[:, None])
        best = np.max(np.where(as_cheap, found.returns[None, :], -np.inf), 1)
        chosen = found.complete & (found.returns >= worst + args.frontier * (best - worst))
    return np.repeat(chosen, found.lengths.astype(np.int64))


# ---------------------------------------------------------------- data and episodes


class Batch(NamedTuple):
    obs: jax.Array  # (..., o)
    action: jax.Array  # (..., a)
    reward: jax.Array  # (...,) raw
    cost: jax.Array  # (...,) raw
    next_obs: jax.Array  # (..., o)
    terminated: jax.Array  # (...,) float, 1: do not bootstrap


def sample(key, data: Batch, n: int, filled) -> Batch:
    """n of the first `filled` transitions, uniformly, with replacement."""
    rows = jax.random.randint(key, (n,), 0, filled)
    return jax.tree.map(lambda x: x[rows], data)


class Episodes(NamedTuple):
    """Sums over episodes that ended: number, return, cost, length."""

    number: jax.Array
    returns: jax.Array
    costs: jax.Array
    lengths: jax.Array

    def means(self) -> dict:
        n = jnp.maximum(self.number, 1)
        return {"episodes": self.number, "return": self.returns / n, "cost": self.costs / n, "length": self.lengths / n}


def evaluate(policy, key, env: envs.Env, episodes: int) -> Episodes:
    """`episodes` fresh episodes of `policy(obs, key)`, each counted up to its first end."""
    key_reset, key_steps = jax.random.split(key)
    state, obs = env.reset(jax.random.split(key_reset, episodes))

    def step(carry, key):
        state, obs, alive, sums = carry
        state, t = env.step(state, policy(obs, key))
        sums = sums + jnp.stack([jnp.sum(alive * x) for x in (t.reward, t.cost, jnp.ones_like(t.reward))])
        return (state, t.obs, alive * (1.0 - (t.terminated | t.truncated)), sums), None

    start = (state, obs, jnp.ones(episodes), jnp.zeros(3))
    sums = jax.lax.scan(step, start, jax.random.split(key_steps, env.horizon))[0][3]
    return Episodes(jnp.float32(episodes), *sums)


# ---------------------------------------------------------------- one gradient step


def bc_step(learner: Learner, batches: tuple[Batch], key, fixed: Fixed):
    """One step up the likelihood; `key` is not needed."""
    (batch,) = batches
    gradient, info = jax.grad(bc_loss, has_aux=True)(learner.params["actor"], batch, fixed)
    return descend(learner, fixed, "actor", gradient), info


# ---------------------------------------------------------------- one block


def learn_offline(learner: Learner, data: tuple[Batch, ...], key, step, batch_size: int, steps: int, fixed: Fixed):
    """`steps` gradient steps on minibatches of each of `data`; phases 1 and 2."""

    def one(learner, key):
        *keys, key_step = jax.random.split(key, len(data) + 1)
        batches = tuple(sample(k, d, batch_size, d.reward.shape[0]) for k, d in zip(keys, data))
        return step(learner, batches, key_step, fixed)

    learner, info = jax.lax.scan(one, learner, jax.random.split(key, steps))
    return learner, jax.tree.map(jnp.mean, info)


# ---------------------------------------------------------------- phases


class Run(NamedTuple):
    """What main decides and every phase needs."""

    args: Args
    env: envs.Env
    dataset: dict  # dsrl.load's description of the file
    data: Batch  # the transitions to clone
    log: Logbook
    roots: jax.Array  # (seeds,) PRNG keys; what is random anywhere follows from these


STREAMS = ("init", "offline", "vpa", "online", "collect", "eval", "rank")
CHUNK = 500  # gradient steps of phases 1 and 2 between two rows of progress.csv


@partial(over_seeds, in_axes=(0, None, None))
def fold(root, stream, n):
    return jax.random.fold_in(jax.random.fold_in(root, stream), n)


def keys(run: Run, stream: str, n: int = 0) -> jax.Array:
    """(seeds,) the n-th key of a stream, the same however the run got there."""
    return fold(run.roots, STREAMS.index(stream), n)


def act(args: Args, networks: dict, actor, obs, key):
    """The evaluated policy's action (--eval-policy)."""
    mean, log_std = networks["actor"].apply(actor, obs)
    return sample_action(key, mean, log_std)[0] if args.eval_policy == "sample" else jnp.tanh(mean)


def measured(run: Run, found, n: int, last: bool) -> dict:
    """What `found(keys)`, one evaluation, finds; at the end of a phase the mean of `final_eval_rounds` of them."""
    rounds = [found(keys(run, "eval", n + i)) for i in range(run.args.final_eval_rounds if last else 1)]
    return {k: sum(r[k] for r in rounds) / (1 if k == "episodes" else len(rounds)) for k in rounds[0]}


def evaluator(run: Run, networks: dict):
    """A function that evaluates a learner and logs what it found."""
    args = run.args
    policy = lambda actor: partial(act, args, networks, actor)
    found = over_seeds(lambda actor, key: evaluate(policy(actor), key, run.env, args.eval_episodes).means())

    def show(phase, learner, gradient_steps, env_steps, last, **columns):
        means = measured(run, partial(found, learner.params["actor"]), gradient_steps, last)
        run.log.log(phase, "eval", gradient_steps=gradient_steps, env_steps=env_steps, **means, **columns)

    return show


def spread(blocks: int, n: int) -> set[int]:
    """The blocks after which the n evaluations of a phase come: evenly spaced, the last at the end."""
    return set(np.linspace(0, blocks, n + 1).round().astype(int).tolist()[1:])


def bc_phase(run: Run) -> dict:
    """The only phase."""
    args, log = run.args, run.log
    fixed = build(args, run.env, {"actor": optax.cosine_decay_schedule(args.offline_actor_lr, args.offline_steps)})
    learner = over_seeds(lambda key: start_phase(init_params(key, fixed), fixed))(keys(run, "init"))
    learn = partial(learn_offline, step=bc_step, batch_size=args.offline_batch_size, steps=CHUNK, fixed=fixed)
    learn = over_seeds(learn, (0, None, 0), donate_argnums=0)
    show = evaluator(run, fixed.networks)
    blocks = args.offline_steps // CHUNK
    evaluate_after = spread(blocks, args.offline_evals) | {0}

    def block(n, carry):
        (learner,) = carry
        if n:
            learner, info = learn(learner, (run.data,), keys(run, "offline", n))
            log.log("offline", "train", gradient_steps=n * CHUNK, env_steps=0, **info)
        if n in evaluate_after:
            show("offline", learner, n * CHUNK, 0, n == blocks)
        return (learner,)

    return log.run("offline", blocks, (learner,), block, CHUNK)[0].params


# ---------------------------------------------------------------- main


def replay_checkpoint(args: Args) -> None:
    """--eval: prints return and cost of a checkpoint's policy."""
    arrays, meta = logbook.load(args.eval)
    if not {"env", "config"} <= meta.keys() or not any(name.startswith("actor/") for name in arrays):
        raise logbook.BadInput(f"{args.eval}: holds no policy: name a checkpoint-seed*.safetensors of a run folder")
    env = envs.make(meta["env"], args.backend)
    networks = {"actor": Actor(tuple(meta["config"]["hidden"]), env.obs_size, env.action_size)}
    template = jax.eval_shape(networks["actor"].init, jax.random.key(0), jnp.zeros(env.obs_size))
    policy = partial(act, args, networks, logbook.restore(template, arrays, str(args.eval), "actor/"))
    key = jax.random.key(args.seed)
    found = jax.jit(lambda key: evaluate(policy, key, env, args.episodes).means())(key)
    print(f"{env.name}: {args.episodes} episodes, return {found['return']:.1f}, cost {found['cost']:.1f}")
    for draw, path in ((render.trajectory, args.trajectory), (render.video, args.video)):
        if path:
            print(draw(env, policy, key, path))


def prepare(algo: str, args: Args) -> Run:
    """Environment, dataset and run folder."""
    env = envs.make(args.env, args.backend)
    args = replace(args, env=env.name)
    seeds = list(range(args.seed, args.seed + args.seeds))
    dataset, about = public.load(args.dataset, env=env.name, obs_size=env.obs_size, action_size=env.action_size)
    flat = (dataset.observations, dataset.actions, dataset.rewards, dataset.costs, dataset.next_observations, dataset.terminals)
    data = Batch(*(jnp.asarray(x, jnp.float32) for x in flat))
    data = jax.tree.map(lambda x: x[chosen_trajectories(dataset, args)], data)
    if data.reward.shape[0] == 0:
        raise logbook.BadInput(f"{about['path']}: no trajectory with cost <= {args.cost_limit:g} to clone: raise --cost-limit")
    log = Logbook(algo, env.name, asdict(args), seeds, about | dsrl.describe(dataset, args.cost_limit))
    return Run(args, env, about, data, log, jax.vmap(jax.random.key)(jnp.array(seeds)))


def main(args: Args) -> None:
    logbook.check_numbers(args, {"offline_steps": CHUNK})
    if args.eval:
        return replay_checkpoint(args)
    run = prepare("bc_safe", args)
    params = bc_phase(run)
    run.log.save_seeds([run.log.folder / f"checkpoint-seed{seed}.safetensors" for seed in run.log.seeds], params)
    run.log.close()


if __name__ == "__main__":
    logbook.command(main, Args)
