"""SAC-Lagrangian from scratch: no offline data. A baseline, and the trainer of the datasets' behaviour policies.

Per block: `steps_per_block` steps in `num_envs` parallel environments with the stochastic policy into the replay buffer
(`collect`), then `updates_per_block` gradient steps (`online_step`); whenever `episodes_per_iter` more episodes have ended,
one update of the multiplier from their mean cost (`update_multiplier`).

    equation                                                                                 function
    a = tanh(u), u ~ N(mu(s), sigma(s)); log pi(a|s) = log N(u) - sum log(1 - tanh(u)^2)     sample_action
    y_r = r + gamma (1-terminated) (min_i Q'_i(s',a') - alpha log pi(a'|s'))                 critic_loss
    y_c = c + gamma (1-terminated) Qc'(s',a')                                                critic_loss
    maximise min_i Q_i(s,a) - lambda Qc(s,a) - alpha log pi(a|s)                             actor_loss
    alpha >= 0: dual variable of  E[-log pi] >= target entropy                               temperature_loss
    e = J_c - d;  I <- max(0, I + Ki e);  lambda = max(0, Kp EMA(e) + I + Kd D)              update_multiplier

Sources: SAC (arXiv 1812.05905), PID-Lagrangian (arXiv 2007.03964), adaptive gains (Marvel, arXiv 2412.04426).
Units: critics see reward * reward_scale and raw cost, so lambda counts scaled reward per unit of cost: one unit of cost
outweighs lambda / reward_scale of raw reward.

Deviations: (1) symlog observations and LayerNorm critics; (2) the multiplier moves once per batch of newly ended episodes,
never twice on the same costs; (3) the critics, never the policy, see what the cost depends on but the observation lacks
(Run's x): without it the one-step targets of Qc say nothing of where a heading leads, and PointRun does not become safe; (4)
--termination-cost charges dying (data collection); (5) lambda rises slowly, by fixed gains: if it exceeds the scaled reward
of a step of running before the policy has learnt to run, standing still is best, and stays so (PointRun, adaptive gains from
kp 0.001, ki 0.0001, bound 10: return -4 after 250,000 steps, seeds 0 to 2).
"""

import math
import sys
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import envs
from algos import logbook
from algos.critics import Ensemble, symlog
from algos.logbook import Logbook
from algos.seeds import over_seeds
from envs import render


@dataclass(frozen=True)
class Args:
    env: str = "SafetyPointRun"
    """task: a name of envs.TASKS or a Safety-Gymnasium id"""
    seed: int = 0
    """first seed"""
    seeds: int = 1
    """number of seeds, vmapped in one program"""
    cost_limit: float = 20.0
    """d, undiscounted cost per episode (Marvel: 20); inf: no constraint"""
    backend: str | None = None
    """physics backend (default: the fastest here)"""
    runs: Path = logbook.ROOT / "runs"
    """where run folders and offline checkpoints go"""
    resume: bool = False
    """go on with the newest unfinished run of this configuration, if there is one"""
    checkpoint_seconds: float = 60.0
    """least time between two saves of the whole state, s"""

    env_steps: int = 400_000
    """online steps per seed, over all environments"""
    num_envs: int = 5
    """parallel environments per seed"""
    steps_per_block: int = 50
    """steps in each environment between two rounds of gradient steps"""
    updates_per_block: int = 48
    """gradient steps per block"""
    buffer_size: int = 1_000_000
    """replay capacity, transitions"""
    batch_size: int = 128
    """transitions per gradient step"""

    gamma: float = 0.99
    """discount of both critics"""
    tau: float = 0.005
    """rate of the target critics' moving average"""
    hidden: tuple[int, ...] = (128, 128)
    """hidden layers of actor and critics"""
    num_critics: int = 2
    """reward critics; the minimum counts"""
    actor_lr: float = 5e-4
    """Adam step size, falling to zero as a cosine"""
    critic_lr: float = 5e-4
    """Adam step size, both critics"""
    temperature_lr: float = 5e-4
    """Adam step size of log alpha"""
    entropy_per_action: float = -0.5
    """target entropy per action dimension, nats"""
    init_temperature: float = 0.1
    """alpha at the start, scaled reward per nat"""
    reward_scale: float | None = None
    """factor on rewards before the critics see them (default: the task's, mostly OSRL's 0.1)"""
    privileged_critic: bool = True
    """let the critics see what the cost depends on but the observation lacks (Run: x)"""
    termination_cost: float = 0.0
    """cost that the critic, not the log, charges a terminal step: dying must not be a way to be safe (data collection)"""

    lagrangian: Literal["dual", "pid", "pid10", "apid"] = "pid"
    """dual: integral only; pid: fixed gains; pid10: fixed at ten times (a control); apid: gains adapt to recent costs"""
    episodes_per_iter: int = 5
    """episodes per update of the multiplier (Marvel: 5)"""
    kp: float = 0.0001
    """initial proportional gain, lambda per unit of episode cost"""
    ki: float = 0.00003
    """integral gain per multiplier update"""
    kd: float = 0.0
    """initial derivative gain"""
    reserve: float = 0.4
    """share of cost_limit that the controller aims to leave unused: what is at the limit on average is above it half of the time"""
    init_multiplier: float = 0.0
    """lambda at the start (the integral's initial value)"""
    max_multiplier: float = 2.0
    """upper bound of the integral and of lambda"""
    pid_decay: float = 0.8
    """decay of the moving averages of error and cost"""
    pid_delay: int = 5
    """multiplier updates between the two averages that the derivative compares"""
    gain_rates: tuple[float, float, float] = (0.05, 0.02, 0.02)
    """a, b, c: how fast Kp, Ki, Kd adapt (apid)"""
    gain_window: int = 5
    """multiplier updates whose costs set the gains (apid)"""

    eval_episodes: int = 20
    """episodes per evaluation"""
    final_eval_rounds: int = 5
    """evaluations that the one at the end of each phase averages: the cost of 20 episodes scatters too widely to compare"""
    eval_policy: Literal["sample", "mean"] = "sample"
    """evaluate the stochastic policy, whose cost the multiplier controls, or its mean action"""
    evals: int = 10
    """evaluations, evenly spaced, the last at the end"""
    snapshots: bool = False
    """save the policy at every evaluation (data collection)"""
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
    networks = {
        "actor": Actor(args.hidden, env.obs_size, env.action_size),
        "reward": Ensemble(args.num_critics, args.hidden),
        "cost": Ensemble(1, args.hidden),
    }
    return Fixed(args, env, networks, {name: optax.adam(rate) for name, rate in rates.items()})


def init_params(key, fixed: Fixed) -> dict:
    keys = jax.random.split(key, 3)
    obs, action = jnp.zeros(fixed.env.obs_size), jnp.zeros(fixed.env.action_size)
    seen = jnp.zeros(fixed.env.obs_size + fixed.env.privileged_size)
    init = lambda name, key, *inputs: fixed.networks[name].init(key, *inputs)
    return {
        "actor": init("actor", keys[0], obs),
        "critics": {"reward": init("reward", keys[1], seen, action), "cost": init("cost", keys[2], seen, action)},
        "log_alpha": jnp.log(jnp.float32(fixed.args.init_temperature)),
    }


def start_phase(params: dict, fixed: Fixed) -> Learner:
    """A learner with fresh optimiser states, its targets equal to its critics."""
    return Learner(params, params["critics"], {k: opt.init(params[k]) for k, opt in fixed.optimizers.items()})


def descend(learner: Learner, fixed: Fixed, name: str, gradient) -> Learner:
    """One optimiser step of params[name]."""
    update, state = fixed.optimizers[name].update(gradient, learner.optimizers[name])
    params = learner.params | {name: optax.apply_updates(learner.params[name], update)}
    return Learner(params, learner.targets, learner.optimizers | {name: state})


def follow(learner: Learner, fixed: Fixed) -> Learner:
    """Moves the targets towards the critics."""
    return learner._replace(targets=optax.incremental_update(learner.params["critics"], learner.targets, fixed.args.tau))


# ---------------------------------------------------------------- maths


def sample_action(key, mean, log_std):
    """A tanh-Gaussian action (..., a) and its log-probability (...,)."""
    noise = jax.random.normal(key, mean.shape)
    u = mean + jnp.exp(log_std) * noise
    log_normal = -0.5 * jnp.square(noise) - log_std - 0.5 * jnp.log(2 * jnp.pi)
    log_det = 2 * (jnp.log(2.0) - u - jax.nn.softplus(-2 * u))  # log(1 - tanh(u)^2), stable
    return jnp.tanh(u), jnp.sum(log_normal - log_det, -1)


class Multiplier(NamedTuple):
    """State of the PID controller of lambda."""

    value: jax.Array  # lambda
    integral: jax.Array
    error_ema: jax.Array
    cost_emas: jax.Array  # (pid_delay + 1,), newest first
    costs: jax.Array  # (gain_window,) newest first, NaN where not yet measured
    gains: jax.Array  # (3,) Kp, Ki, Kd


def init_multiplier(args: Args) -> Multiplier:
    scale = {"dual": (0.0, 1.0, 0.0), "pid10": (10.0, 10.0, 10.0)}.get(args.lagrangian, (1.0, 1.0, 1.0))
    gains = jnp.array([args.kp, args.ki, args.kd]) * jnp.array(scale)
    start, unknown = jnp.float32(args.init_multiplier), jnp.float32(jnp.nan)
    return Multiplier(start, start, unknown, jnp.full(args.pid_delay + 1, unknown), jnp.full(args.gain_window, unknown), gains)


def update_multiplier(m: Multiplier, cost, args: Args) -> Multiplier:
    """One controller update from the mean cost (scalar) of newly ended episodes; see the table at the top.

    D = max(0, EMA(J_c) - EMA(J_c) `pid_delay` updates ago). apid then scales the gains by (1 + a tanh((m-d)/d),
    1 + b (m-d)/d, 1 + c s/d), m and s the mean and standard deviation of the recent costs, within [K0/10, 10 K0].
    """
    limit, decay = (1.0 - args.reserve) * args.cost_limit, args.pid_decay
    if math.isinf(limit):  # no constraint
        return m
    error = cost - limit
    ema = lambda old, new: jnp.where(jnp.isnan(old), new, decay * old + (1 - decay) * new)
    error_ema = ema(m.error_ema, error)
    cost_emas = jnp.concatenate([ema(m.cost_emas[0], cost)[None], m.cost_emas[:-1]])
    costs = jnp.concatenate([cost[None], m.costs[:-1]])
    kp, ki, kd = m.gains
    integral = jnp.clip(m.integral + ki * error, 0.0, args.max_multiplier)
    derivative = jnp.maximum(0.0, jnp.nan_to_num(cost_emas[0] - cost_emas[-1]))
    value = jnp.clip(kp * error_ema + integral + kd * derivative, 0.0, args.max_multiplier)
    gains = m.gains
    if args.lagrangian == "apid":
        initial, unit = init_multiplier(args).gains, max(limit, 1.0)
        mean, std = jnp.nanmean(costs), jnp.nanstd(costs)
        a, b, c = args.gain_rates
        scale = jnp.stack([1 + a * jnp.tanh((mean - limit) / unit), 1 + b * (mean - limit) / unit, 1 + c * std / unit])
        gains = jnp.clip(gains * scale, initial / 10, initial * 10)
    return Multiplier(value, integral, error_ema, cost_emas, costs, gains)


def critic_loss(critics, params: dict, targets, batch, key, fixed: Fixed):
    """Soft Bellman errors of both critics under the policy."""
    args, networks = fixed.args, fixed.networks
    action, log_prob = sample_action(key, *networks["actor"].apply(params["actor"], batch.next_obs))
    entropy_bonus = -jnp.exp(params["log_alpha"]) * log_prob
    next_q = jnp.min(networks["reward"].apply(targets["reward"], batch.next_obs, action), 0) + entropy_bonus
    next_qc = networks["cost"].apply(targets["cost"], batch.next_obs, action)[0]
    alive = args.gamma * (1.0 - batch.terminated)
    cost = batch.cost + args.termination_cost * batch.terminated
    target = jax.lax.stop_gradient(args.reward_scale * batch.reward + alive * next_q)
    cost_target = jax.lax.stop_gradient(cost + alive * next_qc)
    q = networks["reward"].apply(critics["reward"], batch.obs, batch.action)
    qc = networks["cost"].apply(critics["cost"], batch.obs, batch.action)[0]
    chex.assert_equal_shape([q[0], qc, target, cost_target])  # no silent broadcasting in the differences
    reward_loss, cost_loss = jnp.mean(jnp.square(q - target)), jnp.mean(jnp.square(qc - cost_target))
    info = {"reward_critic_loss": reward_loss, "cost_critic_loss": cost_loss, "q": q.mean(), "qc": qc.mean()}
    return reward_loss + cost_loss, info


def actor_loss(actor, params: dict, multiplier, batch, key, fixed: Fixed):
    """-(min_i Q_i - lambda Qc - alpha log pi) of the policy's own actions."""
    networks = fixed.networks
    action, log_prob = sample_action(key, *networks["actor"].apply(actor, batch.obs))
    q = jnp.min(networks["reward"].apply(params["critics"]["reward"], batch.obs, action), 0)
    qc = networks["cost"].apply(params["critics"]["cost"], batch.obs, action)[0]
    loss = jnp.mean(jnp.exp(params["log_alpha"]) * log_prob - q + multiplier * qc)
    return loss, {"actor_loss": loss, "entropy": -log_prob.mean()}


def temperature_loss(log_alpha, entropy, target_entropy):
    """Raises alpha while the policy's entropy is below its target."""
    return log_alpha * jax.lax.stop_gradient(entropy - target_entropy)


# ---------------------------------------------------------------- replay and episodes


class Batch(NamedTuple):
    obs: jax.Array  # (..., o)
    action: jax.Array  # (..., a)
    reward: jax.Array  # (...,) raw
    cost: jax.Array  # (...,) raw
    next_obs: jax.Array  # (..., o)
    terminated: jax.Array  # (...,) float, 1: do not bootstrap


class Replay(NamedTuple):
    data: Batch  # leaves (capacity, ...)
    inserted: jax.Array  # () int32, transitions ever inserted


def insert(replay: Replay, new: Batch) -> Replay:
    """Writes n transitions (leaves (n, ...)) over the oldest; the capacity is a multiple of n."""
    capacity = replay.data.reward.shape[0]
    start = replay.inserted % capacity
    write = lambda old, x: jax.lax.dynamic_update_slice_in_dim(old, x.astype(old.dtype), start, 0)
    return Replay(jax.tree.map(write, replay.data, new), replay.inserted + new.reward.shape[0])


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


class Actors(NamedTuple):
    """The environments between two blocks: state, observation (num_envs, o), running sums (num_envs, 3) of the episodes."""

    state: Any
    obs: jax.Array
    running: jax.Array


def init_actors(key, env: envs.Env, num_envs: int) -> Actors:
    state, obs = env.reset(jax.random.split(key, num_envs))
    return Actors(state, obs, jnp.zeros((num_envs, 3)))


def collect(actors: Actors, policy, key, env: envs.Env, steps: int) -> tuple[Actors, Batch, Episodes]:
    """`steps` steps of `policy(obs, key)` in every environment; transitions have leaves (steps, num_envs, ...)."""

    def step(carry, key):
        actors, ended = carry
        action = policy(actors.obs, key)
        state, t = env.step(actors.state, action)
        running = actors.running + jnp.stack([t.reward, t.cost, jnp.ones_like(t.reward)], -1)
        done = (t.terminated | t.truncated).astype(jnp.float32)
        sums = jnp.sum(running * done[:, None], 0)
        ended = Episodes(ended.number + done.sum(), ended.returns + sums[0], ended.costs + sums[1], ended.lengths + sums[2])
        batch = Batch(actors.obs, action, t.reward, t.cost, t.next_obs, t.terminated.astype(jnp.float32))
        return (Actors(state, t.obs, running * (1 - done[:, None])), ended), batch

    start = (actors, Episodes(*jnp.zeros(4)))
    (actors, ended), batch = jax.lax.scan(step, start, jax.random.split(key, steps))
    return actors, batch, ended


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


def online_step(learner: Learner, multiplier, batch: Batch, key, fixed: Fixed):
    """SAC-Lagrangian: both critics, actor, temperature."""
    key_critic, key_actor = jax.random.split(key)
    gradient, info = jax.grad(critic_loss, has_aux=True)(
        learner.params["critics"], learner.params, learner.targets, batch, key_critic, fixed
    )
    learner = descend(learner, fixed, "critics", gradient)
    gradient, actor_info = jax.grad(actor_loss, has_aux=True)(
        learner.params["actor"], learner.params, multiplier, batch, key_actor, fixed
    )
    learner = descend(learner, fixed, "actor", gradient)
    target_entropy = fixed.args.entropy_per_action * fixed.env.action_size
    gradient = jax.grad(temperature_loss)(learner.params["log_alpha"], actor_info["entropy"], target_entropy)
    learner = descend(learner, fixed, "log_alpha", gradient)
    return follow(learner, fixed), {**info, **actor_info}


# ---------------------------------------------------------------- one block


def learn_online(learner, multiplier: Multiplier, replay: Replay, pending: Episodes, new: Batch, ended: Episodes, key, fixed: Fixed):
    """Inserts what was collected, moves the multiplier if enough episodes have ended, takes `updates_per_block` steps."""
    args = fixed.args
    replay = insert(replay, jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), new))
    pending = jax.tree.map(jnp.add, pending, ended)
    due = pending.number >= args.episodes_per_iter
    moved = update_multiplier(multiplier, pending.means()["cost"], args)
    multiplier = jax.tree.map(partial(jnp.where, due), moved, multiplier)
    pending = jax.tree.map(lambda x: jnp.where(due, 0.0, x), pending)
    filled = jnp.minimum(replay.inserted, replay.data.reward.shape[0])

    def one(learner, key):
        key_batch, key_step = jax.random.split(key)
        return online_step(learner, multiplier.value, sample(key_batch, replay.data, args.batch_size, filled), key_step, fixed)

    learner, info = jax.lax.scan(one, learner, jax.random.split(key, args.updates_per_block))
    return learner, multiplier, replay, pending, jax.tree.map(jnp.mean, info)


# ---------------------------------------------------------------- phases


class Run(NamedTuple):
    """What main decides and every phase needs."""

    args: Args
    env: envs.Env
    log: Logbook
    roots: jax.Array  # (seeds,) PRNG keys; what is random anywhere follows from these


STREAMS = ("init", "offline", "vpa", "online", "collect", "eval", "rank")


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


def spread(blocks: int, n: int) -> set[int]:
    """The blocks after which the n evaluations of a phase come: evenly spaced, the last at the end."""
    return set(np.linspace(0, blocks, n + 1).round().astype(int).tolist()[1:])


def online_phase(run: Run) -> dict:
    """The only phase: steps, multiplier, gradient steps, in turn."""
    args, log, env = run.args, run.log, run.env
    per_block = args.num_envs * args.steps_per_block
    blocks = args.env_steps // per_block
    falling = optax.cosine_decay_schedule(args.actor_lr, blocks * args.updates_per_block)
    fixed = build(args, env, {"actor": falling, "critics": args.critic_lr, "log_alpha": args.temperature_lr})
    policy = lambda actor, obs, key: sample_action(key, *fixed.networks["actor"].apply(actor, obs))[0]
    evaluated = lambda actor: partial(act, args, fixed.networks, actor)
    found = over_seeds(lambda actor, key: evaluate(evaluated(actor), key, env, args.eval_episodes).means())
    gather = over_seeds(lambda actor, actors, key: collect(actors, partial(policy, actor), key, env, args.steps_per_block))
    learn = over_seeds(partial(learn_online, fixed=fixed), donate_argnums=(0, 2))

    capacity = min(max(1, args.buffer_size // per_block), blocks) * per_block
    seen, zeros = env.obs_size + env.privileged_size, lambda *shape: jnp.zeros((capacity, *shape))
    empty = lambda: Replay(Batch(zeros(seen), zeros(env.action_size), zeros(), zeros(), zeros(seen), zeros()), jnp.int32(0))
    start = over_seeds(
        lambda key_init, key_collect: (
            start_phase(init_params(key_init, fixed), fixed), init_multiplier(args), empty(), Episodes(*jnp.zeros(4)),
            init_actors(key_collect, env, args.num_envs),
        )
    )  # fmt: skip
    evaluate_after = spread(blocks, args.evals) | {0}

    def block(n, carry):
        learner, multiplier, replay, pending, actors = carry
        steps = {"gradient_steps": n * args.updates_per_block, "env_steps": n * per_block}
        if n:
            actors, new, ended = gather(learner.params["actor"], actors, keys(run, "collect", n))
            learner, multiplier, replay, pending, info = learn(learner, multiplier, replay, pending, new, ended, keys(run, "online", n))
            kp, ki, kd = multiplier.gains.T
            log.log("online", "train", **steps, **ended.means(), multiplier=multiplier.value, kp=kp, ki=ki, kd=kd, **info)
        if n in evaluate_after:
            means = measured(run, partial(found, learner.params["actor"]), n, n == blocks)
            log.log("online", "eval", **steps, **means, multiplier=multiplier.value)
            if args.snapshots:
                names = [f"snapshot-seed{seed}-{n * per_block:08d}.safetensors" for seed in log.seeds]
                log.save_seeds([log.folder / name for name in names], {"actor": learner.params["actor"]})
        return learner, multiplier, replay, pending, actors

    return log.run("online", blocks, start(keys(run, "init"), keys(run, "collect")), block, per_block)[0].params


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
    """Environment and run folder."""
    env = envs.make(args.env, args.backend, privileged=args.privileged_critic)
    args = replace(args, env=env.name, reward_scale=args.reward_scale or env.reward_scale)
    seeds = list(range(args.seed, args.seed + args.seeds))
    log = Logbook(algo, env.name, asdict(args), seeds)
    return Run(args, env, log, jax.vmap(jax.random.key)(jnp.array(seeds)))


def main(args: Args) -> None:
    logbook.check_numbers(args)
    if args.env_steps < args.num_envs * args.steps_per_block:
        raise logbook.BadInput(f"--env-steps {args.env_steps}: must be at least --num-envs * --steps-per-block")
    if args.eval:
        return replay_checkpoint(args)
    run = prepare("sac_lag", args)
    params = online_phase(run)
    run.log.save_seeds([run.log.folder / f"checkpoint-seed{seed}.safetensors" for seed in run.log.seeds], params)
    run.log.close()


if __name__ == "__main__":
    logbook.command(main, Args)
