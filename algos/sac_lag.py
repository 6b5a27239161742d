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
never twice on the same costs; (3) --privileged-critic shows the critics what the cost depends on but the observation lacks
(data collection only: the policy never sees it).
"""

import sys
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

import envs
from algos.critics import Ensemble, symlog
from algos.logbook import Logbook


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

    env_steps: int = 250_000
    """online steps per seed, over all environments"""
    num_envs: int = 5
    """parallel environments per seed"""
    steps_per_block: int = 50
    """steps in each environment between two rounds of gradient steps"""
    updates_per_block: int = 125
    """gradient steps per block"""
    buffer_size: int = 1_000_000
    """replay capacity, transitions"""
    batch_size: int = 256
    """transitions per gradient step"""

    gamma: float = 0.99
    """discount of both critics"""
    tau: float = 0.005
    """rate of the target critics' moving average"""
    hidden: tuple[int, ...] = (256, 256)
    """hidden layers of actor and critics"""
    num_critics: int = 2
    """reward critics; the minimum counts"""
    actor_lr: float = 5e-4
    """Adam step size"""
    critic_lr: float = 5e-4
    """Adam step size, both critics"""
    temperature_lr: float = 5e-4
    """Adam step size of log alpha"""
    entropy_per_action: float = -0.5
    """target entropy per action dimension, nats"""
    init_temperature: float = 0.1
    """alpha at the start, scaled reward per nat"""
    reward_scale: float = 0.1
    """factor on rewards before the critics see them (OSRL: 0.1)"""
    privileged_critic: bool = False
    """let the critics see what the cost depends on but the observation lacks (data collection only)"""

    lagrangian: Literal["dual", "pid", "apid"] = "apid"
    """dual: integral term only; pid: fixed gains; apid: gains adapt to the recent costs (Marvel)"""
    episodes_per_iter: int = 5
    """episodes per update of the multiplier (Marvel: 5)"""
    kp: float = 0.005
    """initial proportional gain, lambda per unit of episode cost"""
    ki: float = 0.0005
    """integral gain per multiplier update"""
    kd: float = 0.005
    """initial derivative gain"""
    init_multiplier: float = 0.0
    """lambda at the start (the integral's initial value)"""
    max_multiplier: float = 10.0
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
    """episodes of the mean action per evaluation"""
    evals: int = 10
    """evaluations, evenly spaced, the last at the end"""
    snapshots: bool = False
    """save the policy at every evaluation (data collection)"""


# ---------------------------------------------------------------- networks


class Actor(nn.Module):
    """obs (..., o) -> mean and log standard deviation (..., a) of the Gaussian before tanh."""

    hidden: tuple[int, ...]
    action_size: int

    @nn.compact
    def __call__(self, obs):
        x = symlog(obs)
        for width in self.hidden:
            x = nn.relu(nn.Dense(width)(x))
        mean, raw = jnp.split(nn.Dense(2 * self.action_size)(x), 2, -1)
        return mean, -5.0 + 3.5 * (1.0 + jnp.tanh(raw))  # log sigma in [-5, 2]


class Learner(NamedTuple):
    """Everything that gradient steps change."""

    actor: Any
    critics: dict  # {"reward": ..., "cost": ...}
    targets: dict  # the same, moving averages
    log_alpha: jax.Array
    optimizers: dict


def build(args: Args, env: envs.Env):
    """The modules and optimisers of a configuration."""
    adam = lambda rate: optax.adam(rate)
    networks = {
        "actor": Actor(args.hidden, env.action_size),
        "reward": Ensemble(args.num_critics, args.hidden),
        "cost": Ensemble(1, args.hidden),
    }
    optimizers = {"actor": adam(args.actor_lr), "critics": adam(args.critic_lr), "log_alpha": adam(args.temperature_lr)}
    return networks, optimizers


def init_learner(key, args: Args, env: envs.Env, networks, optimizers) -> Learner:
    keys = jax.random.split(key, 3)
    obs, action = jnp.zeros(env.obs_size), jnp.zeros(env.action_size)
    seen = jnp.zeros(env.obs_size + env.privileged_size)
    actor = networks["actor"].init(keys[0], obs)
    critics = {"reward": networks["reward"].init(keys[1], seen, action), "cost": networks["cost"].init(keys[2], seen, action)}
    log_alpha = jnp.log(args.init_temperature)
    states = {"actor": actor, "critics": critics, "log_alpha": log_alpha}
    return Learner(actor, critics, critics, log_alpha, {k: optimizers[k].init(v) for k, v in states.items()})


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
    gains = jnp.array([0.0, args.ki, 0.0] if args.lagrangian == "dual" else [args.kp, args.ki, args.kd])
    start = jnp.float32(args.init_multiplier)
    nothing = jnp.full
    return Multiplier(start, start, jnp.nan, nothing(args.pid_delay + 1, jnp.nan), nothing(args.gain_window, jnp.nan), gains)


def update_multiplier(m: Multiplier, cost, args: Args) -> Multiplier:
    """One controller update from the mean cost (scalar) of newly ended episodes; see the table at the top.

    D = max(0, EMA(J_c) - EMA(J_c) `pid_delay` updates ago). apid then scales the gains by (1 + a tanh((m-d)/d),
    1 + b (m-d)/d, 1 + c s/d), m and s the mean and standard deviation of the recent costs, within [K0/10, 10 K0].
    """
    limit, decay = args.cost_limit, args.pid_decay
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


def critic_loss(critics, actor, targets, alpha, batch, key, networks, args: Args, obs_size: int):
    """Soft Bellman errors of both critics, bootstrapping through time-outs."""
    mean, log_std = networks["actor"].apply(actor, batch.next_obs[..., :obs_size])
    action, log_prob = sample_action(key, mean, log_std)
    next_q = jnp.min(networks["reward"].apply(targets["reward"], batch.next_obs, action), 0) - alpha * log_prob
    next_qc = networks["cost"].apply(targets["cost"], batch.next_obs, action)[0]
    alive = args.gamma * (1.0 - batch.terminated)
    target = jax.lax.stop_gradient(args.reward_scale * batch.reward + alive * next_q)
    cost_target = jax.lax.stop_gradient(batch.cost + alive * next_qc)
    q = networks["reward"].apply(critics["reward"], batch.obs, batch.action)
    qc = networks["cost"].apply(critics["cost"], batch.obs, batch.action)[0]
    reward_loss, cost_loss = jnp.mean(jnp.square(q - target)), jnp.mean(jnp.square(qc - cost_target))
    info = {"reward_critic_loss": reward_loss, "cost_critic_loss": cost_loss, "q": q.mean(), "qc": qc.mean()}
    return reward_loss + cost_loss, info


def actor_loss(actor, critics, alpha, multiplier, batch, key, networks, obs_size: int):
    """-(min_i Q_i - lambda Qc - alpha log pi) of the policy's own actions."""
    mean, log_std = networks["actor"].apply(actor, batch.obs[..., :obs_size])
    action, log_prob = sample_action(key, mean, log_std)
    q = jnp.min(networks["reward"].apply(critics["reward"], batch.obs, action), 0)
    qc = networks["cost"].apply(critics["cost"], batch.obs, action)[0]
    loss = jnp.mean(alpha * log_prob - q + multiplier * qc)
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


# ---------------------------------------------------------------- online phase


def online_step(learner: Learner, multiplier, batch: Batch, key, networks, optimizers, args: Args, obs_size: int):
    """One gradient step of critics, actor and temperature."""
    key_critic, key_actor = jax.random.split(key)
    alpha = jnp.exp(learner.log_alpha)
    states, updated = dict(learner.optimizers), {}

    def descend(name, gradient, parameters):
        update, states[name] = optimizers[name].update(gradient, states[name])
        return optax.apply_updates(parameters, update)

    gradient, info = jax.grad(critic_loss, has_aux=True)(
        learner.critics, learner.actor, learner.targets, alpha, batch, key_critic, networks, args, obs_size
    )
    critics = descend("critics", gradient, learner.critics)
    gradient, actor_info = jax.grad(actor_loss, has_aux=True)(
        learner.actor, critics, alpha, multiplier, batch, key_actor, networks, obs_size
    )
    actor = descend("actor", gradient, learner.actor)
    target_entropy = args.entropy_per_action * batch.action.shape[-1]
    gradient = jax.grad(temperature_loss)(learner.log_alpha, actor_info["entropy"], target_entropy)
    log_alpha = descend("log_alpha", gradient, learner.log_alpha)
    targets = optax.incremental_update(critics, learner.targets, args.tau)
    return Learner(actor, critics, targets, log_alpha, states), {**info, **actor_info}


def learn(learner: Learner, multiplier: Multiplier, replay: Replay, new: Batch, pending: Episodes, ended: Episodes, key, **fixed):
    """Inserts what was collected, moves the multiplier if enough episodes have ended, takes `updates_per_block` steps."""
    args = fixed["args"]
    replay = insert(replay, jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), new))
    pending = jax.tree.map(jnp.add, pending, ended)
    due = pending.number >= args.episodes_per_iter
    moved = update_multiplier(multiplier, pending.means()["cost"], args)
    multiplier = jax.tree.map(partial(jnp.where, due), moved, multiplier)
    pending = jax.tree.map(lambda x: jnp.where(due, 0.0, x), pending)
    filled = jnp.minimum(replay.inserted, replay.data.reward.shape[0])

    def step(learner, key):
        key_batch, key_step = jax.random.split(key)
        rows = jax.random.randint(key_batch, (args.batch_size,), 0, filled)
        batch = jax.tree.map(lambda x: x[rows], replay.data)
        return online_step(learner, multiplier.value, batch, key_step, **fixed)

    learner, info = jax.lax.scan(step, learner, jax.random.split(key, args.updates_per_block))
    return learner, multiplier, replay, pending, jax.tree.map(jnp.mean, info)


# ---------------------------------------------------------------- main


def main(args: Args) -> Path:
    env = envs.make(args.env, args.backend, privileged=args.privileged_critic)
    evaluation_env = envs.make(args.env, args.backend)
    seeds = list(range(args.seed, args.seed + args.seeds))
    log = Logbook("sac_lag", env.name, asdict(args), seeds)

    networks, optimizers = build(args, env)
    act = lambda actor, obs, key: sample_action(key, *networks["actor"].apply(actor, obs[..., : env.obs_size]))[0]
    mean_action = lambda actor, obs, key: jnp.tanh(networks["actor"].apply(actor, obs)[0])
    per_block = args.num_envs * args.steps_per_block
    capacity = args.buffer_size // per_block * per_block

    def start(key):
        keys = jax.random.split(key, 2)
        learner = init_learner(keys[0], args, env, networks, optimizers)
        seen, zero = jnp.zeros(env.obs_size + env.privileged_size), jnp.float32(0)
        empty = Batch(seen, jnp.zeros(env.action_size), zero, zero, seen, zero)
        replay = Replay(jax.tree.map(lambda x: jnp.zeros((capacity, *x.shape)), empty), jnp.int32(0))
        return learner, replay, init_actors(keys[1], env, args.num_envs)

    over_seeds = lambda f, **options: jax.jit(jax.vmap(f), **options)
    run_collect = over_seeds(
        lambda learner, actors, key: collect(actors, partial(act, learner.actor), key, env, args.steps_per_block)
    )
    run_learn = over_seeds(
        partial(learn, networks=networks, optimizers=optimizers, args=args, obs_size=env.obs_size), donate_argnums=(0, 2)
    )
    run_evaluate = over_seeds(
        lambda learner, key: evaluate(partial(mean_action, learner.actor), key, evaluation_env, args.eval_episodes).means()
    )

    root = jax.vmap(jax.random.key)(jnp.array(seeds))
    key_for = jax.jit(jax.vmap(lambda key, purpose, block: jax.random.fold_in(jax.random.fold_in(key, purpose), block), (0, None, None)))
    learner, replay, actors = over_seeds(start)(key_for(root, 0, 0))
    multiplier = jax.tree.map(lambda x: jnp.broadcast_to(x, (args.seeds, *jnp.shape(x))), init_multiplier(args))
    pending = Episodes(*jnp.zeros((4, args.seeds)))

    blocks = args.env_steps // per_block
    evaluate_at = set(np.linspace(0, blocks, args.evals + 1).round().astype(int))
    log.phase("online", blocks * per_block, "steps")
    for block in range(blocks + 1):
        steps = {"gradient_steps": block * args.updates_per_block, "env_steps": block * per_block}
        if block in evaluate_at:
            log.log("online", "eval", **steps, **run_evaluate(learner, key_for(root, 1, block)), multiplier=multiplier.value)
            if args.snapshots:
                log.save(f"actor-{steps['env_steps']:08d}", jax.device_get(learner.actor), log.rows[-1])
        if block == blocks:
            break
        actors, new, ended = run_collect(learner, actors, key_for(root, 2, block))
        learner, multiplier, replay, pending, info = run_learn(
            learner, multiplier, replay, new, pending, ended, key_for(root, 3, block)
        )
        kp, ki, kd = multiplier.gains.T
        steps = {"gradient_steps": (block + 1) * args.updates_per_block, "env_steps": (block + 1) * per_block}
        log.log("online", "train", **steps, **ended.means(), multiplier=multiplier.value, kp=kp, ki=ki, kd=kd, **info)
        log.advance(per_block)

    log.save("final", jax.device_get(learner._asdict()))
    log.close()
    return log.folder


if __name__ == "__main__":
    main(tyro.cli(Args))
