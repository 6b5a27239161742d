"""Marvel: offline CPQ -> value pre-alignment (VPA) -> online SAC-Lagrangian with an adaptive PID multiplier.

Sources: Marvel (Chen, Wei, Deng, Lin; arXiv 2412.04426), CPQ (Xu, Zhan, Zhu; arXiv 2107.09003), PID-Lagrangian (Stooke, Achiam,
Abbeel; arXiv 2007.03964), SAC (arXiv 1812.05905). One offline checkpoint per seed is made by phase 1 and reused by every run
whose offline configuration and dataset match; phases 2 and 3 start from it.

    phase, equation                                                                           function
    1  VAE: |a - decode(s, z)|^2 + beta KL(encode(s, a) | N(0, I))                             vae_loss
       OOD actions: the quarter of a ~ pi(.|s) with the largest KL                             ood_actions
       y_r = r + gamma (1-term.) 1[Qc'(s',a') <= q_thres] min_i Q'_i(s',a')                    cpq_critic_loss
       y_c = c + gamma (1-term.) Qc'(s',a');  loss -= alpha min(0, E_ood Qc - qc_thres)      cpq_critic_loss
       alpha >= 0 (dual): ascends alpha (qc_thres - E_ood Qc)                                  dual_loss
       maximise 1[Qc(s,a) <= q_thres] min_i Q_i(s,a)                                           cpq_actor_loss
       q_thres = d (1-gamma^T)/(1-gamma)/T,  qc_thres = 1.5 q_thres                            thresholds
    2  y_r = r + gamma (1-term.) (min_i Q'_i(s',a') + alpha_r h), a' ~ pi_0, h = -log pi_0     critic_loss
       y_c = c + gamma (1-term.) (Qc'(s',a') + alpha_c h); pi_0 frozen                         critic_loss
    3  the same critics with alpha_r = alpha, the entropy weight, and alpha_c = 0              critic_loss
       maximise min_i Q_i(s,a) - lambda Qc(s,a) + alpha h(s,a) - k KL(pi(.|s) | pi_0(.|s))     actor_loss, drift
       e = J_c - d;  I <- max(0, I + Ki e);  lambda = max(0, Kp EMA(e) + I + Kd D)             update_multiplier
       Kp *= 1 + a tanh((m-d)/d);  Ki *= 1 + b (m-d)/d;  Kd *= 1 + c s/d                       update_multiplier

Units: critics see reward * reward_scale and raw cost, so lambda counts scaled reward per unit of cost: one unit of cost
outweighs lambda / reward_scale of raw reward.

Deviations, P from the paper, R from the released code:
 1 (R) VPA's entropy terms are per sample, not the batch mean of the log-probability (a constant cannot rank actions).
 2 (R) The OOD penalty has a gradient: it goes through the online cost critic (OSRL's CPQ takes the target's, without one).
 3 (P, R) The OOD penalty is estimated on `ood_states` of the batch's states; only the far quarter goes through the cost critic
   (the same expectation for less work); an action counts only if its KL is beyond that of 99% of the batch's own actions;
   the penalty acts while E_ood Qc < qc_thres, alpha starts at `init_dual`, and Qc' is clipped to [0, 1/(1-gamma)]. Without
   these the penalty lifts Qc past q_thres everywhere, 1[Qc <= q_thres] is 0 for every action, and nothing is learned.
 4 (P, R) The offline actor also clones the best safe trajectories (`cloning_weight`, `cloning_quantile`); for the same reason:
   the gate opens only around a policy that is nearly safe.
 5 (R) One multiplier update per batch of newly ended episodes; tanh on Kp as in the paper; divisions by d; gains within 10x.
 6 (R) Time-outs bootstrap; only terminal states stop. Optimisers start afresh in every phase, at that phase's rates; the
   actors' fall (`offline_rates`, `online_rates`).
 7 (R) One setting for all tasks but those of `TUNED`.
 8 (P, R) symlog observations, LayerNorm critics, hidden layers of 128, tau 0.02: VPA must have converged before phase 3 starts
   (at tau 0.005 and 2,500 steps Q was a third of what it became, and the first online updates undo the policy).
 9 (P, R) Evaluations sample the policy, whose cost the multiplier controls; --eval-policy mean for the mean action.
10 (P, R) The online actor is at first anchored to the offline policy pi_0 (`anchor_at`) and waits for the critics
   (`actor_warmup`). Where Q is nearly flat around a good policy, Adam makes steps of full size out of its noise: on PointRun
   the episodes of the first five iterations cost 229 on average, where the offline policy's cost 40. The divergence holds what no
   value speaks for, yields where one does, and weakens as the critics see the policy's own episodes.
11 (P, R) The controller aims at (1 - reserve) d: a policy whose mean cost is d is above d half of the time, and while the return
   still rises lambda lags behind (at a reserve of 0.2 the final costs were 26 on PointRun and 21 on HalfCheetah).
12 (P, R) Critics, never the policy, see what the cost depends on but the observation lacks, where the dataset carries it (Run: x).
   Without it Qc cannot tell a heading that leads out of the corridor: AntRun's and CarRun's online phases hardly lower the cost.
13 (P, R) A terminal step costs the critics `termination_cost` more (AntRun: 100, a cost of 1 for ever after): an ant that has fallen
   costs nothing any more, so that a large lambda Qc would pay for falling.
"""

import inspect
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
from algos.critics import Critic, Ensemble, symlog
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

    gamma: float = 0.99
    """discount of all critics"""
    tau: float = 0.02
    """rate of the target critics' moving average"""
    hidden: tuple[int, ...] = (128, 128)
    """hidden layers of actor and critics (release: 256)"""
    num_critics: int = 2
    """reward critics; the minimum counts"""
    reward_scale: float | None = None
    """factor on rewards before the critics see them (default: the task's, mostly OSRL's 0.1)"""
    termination_cost: float = 0.0
    """cost that the critic, not the log, charges a terminal step: dying must not be a way to be safe"""

    offline: Literal["cpq", "bear_lag"] = "cpq"
    """phase 1: offline algorithm; bear_lag starts from the checkpoints of algos/bear_lag.py"""
    offline_steps: int = 10_000
    """phase 1: CPQ gradient steps (OSRL: 100,000)"""
    offline_batch_size: int = 256
    """phase 1: transitions per gradient step (OSRL: 512)"""
    offline_actor_lr: float = 1e-3
    """phase 1: Adam step size of the actor (OSRL: 1e-4), falling to zero as a cosine"""
    offline_critic_lr: float = 1e-3
    """phase 1: Adam step size of critics and VAE (OSRL: 1e-3)"""
    dual_lr: float = 1e-4
    """phase 1: Adam step size of log alpha of the OOD constraint (OSRL: 1e-4)"""
    cloning_weight: float = 1.0
    """phase 1: weight of behaviour cloning beside the (normalised) Q in the actor's loss; CPQ has 0"""
    cloning_quantile: float = 0.75
    """phase 1: clone the safe trajectories whose return is at or above this quantile of theirs"""
    init_dual: float = 0.01
    """phase 1: initial weight alpha of the OOD constraint"""
    vae_hidden: tuple[int, ...] = (128, 128)
    """phase 1: hidden layers of the VAE's encoder and decoder (OSRL: 400)"""
    vae_beta: float = 0.5
    """phase 1: weight of the KL divergence (OSRL: 0.5)"""
    ood_actions: int = 10
    """phase 1: policy actions per state among which the out-of-distribution quarter is found (OSRL: 10)"""
    ood_states: int = 64
    """phase 1: states of the batch that those actions are drawn for"""

    vpa_steps: int = 10_000
    """phase 2: gradient steps (release: 20,000); 0 leaves phase 2 out"""
    vpa_batch_size: int = 128
    """phase 2: transitions per gradient step (release: 64)"""
    vpa_lr: float = 1e-3
    """phase 2: Adam step size of both critics"""
    vpa_alpha_reward: float = 0.002
    """phase 2: alpha_r, scaled reward per nat; 0 with alpha_c = 0: plain fitted Q evaluation"""
    vpa_alpha_cost: float = 0.001
    """phase 2: alpha_c < alpha_r, cost per nat"""
    critics: Literal["pretrained", "fresh"] = "pretrained"
    """phase 2: critics to start from (fresh: a control)"""

    iterations: int = 50
    """phase 3: rounds of episodes and gradient steps"""
    actor_warmup: int = 5
    """phase 3: iterations after which the actor starts to move; until then only the critics learn"""
    episodes_per_iter: int = 5
    """phase 3: parallel episodes per iteration, and per update of the multiplier (Marvel: 5)"""
    updates_per_iter: int = 200
    """phase 3: gradient steps per iteration (release: 20)"""
    batch_size: int = 128
    """phase 3: transitions per gradient step (release: 64)"""
    buffer_size: int = 1_000_000
    """phase 3: replay capacity, transitions"""
    actor_lr: float = 5e-5
    """phase 3: Adam step size of the actor, falling to zero as a cosine"""
    critic_lr: float = 5e-4
    """phase 3: Adam step size of both critics"""
    entropy_weight: float = 0.003
    """phase 3: alpha, scaled reward per nat (release: 5e-5 to 5e-3)"""
    anchor_weight: float = 0.2
    """phase 3: weight of KL(pi | offline policy), scaled reward per nat; the paper has 0"""
    anchor_decay: float = 0.7
    """phase 3: share of the iterations after which the anchor, weakening linearly, would be gone"""
    anchor_floor: float = 0.1
    """phase 3: share of the anchor's weight that stays"""
    replay: Literal["online", "mixed"] = "online"
    """phase 3: batches from online transitions, or half of each from the dataset"""

    lagrangian: Literal["dual", "pid", "pid10", "apid"] = "apid"
    """dual: integral only; pid: fixed gains; pid10: fixed at ten times (a control); apid: gains adapt to recent costs"""
    kp: float = 0.02
    """initial proportional gain, lambda per unit of episode cost"""
    ki: float = 0.002
    """initial integral gain, per multiplier update"""
    kd: float = 0.01
    """initial derivative gain"""
    reserve: float = 0.4
    """share of cost_limit that the controller aims to leave unused: what is at the limit on average is above it half of the time"""
    init_multiplier: float = 0.0
    """lambda at the start (the integral's initial value)"""
    max_multiplier: float = 0.5
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
    offline_evals: int = 2
    """evaluations during phase 1"""
    evals: int = 5
    """evaluations during phase 3, evenly spaced, the last at the end"""
    rank_points: int = 32
    """starting points of the rank diagnostic before and after phase 2, of either kind; 0 leaves it out"""
    eval: Path | None = None
    """replay this checkpoint instead of training, and print return and cost"""
    episodes: int = 20
    """episodes to replay with --eval"""
    video: Path | None = None
    """with --eval: film an episode to this .mp4 or .gif"""
    trajectory: Path | None = None
    """with --eval: draw episodes from above to this .png"""

TUNED = {  # per task, where the defaults do not do; what the command line says goes before
    "SafetyAntRun": dict(
        cloning_weight=10.0, offline_actor_lr=3e-3, termination_cost=100.0,
        iterations=160, updates_per_iter=600, batch_size=256, actor_lr=3e-4,
        kp=0.002, ki=0.0002, kd=0.001, max_multiplier=2.0,
    ),  # fmt: skip
    # Offline cost 114; cloned from the fastest quarter: 285 (both without x). Marvel at the default gains: 825 / 20, at these 822 / 14.
    "SafetyCarRun": dict(cloning_quantile=0.25, kp=0.002, ki=0.0002, kd=0.001),
    "SafetyPointRun": dict(kp=0.002, ki=0.0002, kd=0.001),  # Marvel at the default gains: 817 / 19, at these 818 / 9
}


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


class VAE(nn.Module):
    """Conditional VAE of the dataset's actions; latent size 2 * action_size. Sees what the actor sees."""

    hidden: tuple[int, ...]
    obs_size: int
    action_size: int

    def setup(self):
        self.encoder = [nn.Dense(width) for width in self.hidden] + [nn.Dense(4 * self.action_size)]
        self.decoder = [nn.Dense(width) for width in self.hidden] + [nn.Dense(self.action_size)]

    def encode(self, obs, action):
        """Mean and log standard deviation (..., 2a) of z."""
        x = jnp.concatenate([symlog(obs[..., : self.obs_size]), action], -1)
        for layer in self.encoder[:-1]:
            x = nn.relu(layer(x))
        mean, log_std = jnp.split(self.encoder[-1](x), 2, -1)
        return mean, jnp.clip(log_std, -4.0, 15.0)

    def decode(self, obs, z):
        """The action (..., a) of latent z."""
        x = jnp.concatenate([symlog(obs[..., : self.obs_size]), z], -1)
        for layer in self.decoder[:-1]:
            x = nn.relu(layer(x))
        return jnp.tanh(self.decoder[-1](x))

    def __call__(self, obs, action, key):
        mean, log_std = self.encode(obs, action)
        z = mean + jnp.exp(log_std) * jax.random.normal(key, mean.shape)
        return self.decode(obs, z), mean, log_std


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
        "vae": VAE(args.vae_hidden, env.obs_size, env.action_size),
    }
    return Fixed(args, env, networks, {name: optax.adam(rate) for name, rate in rates.items()})


def init_params(key, fixed: Fixed) -> dict:
    keys = jax.random.split(key, 4)
    obs, action = jnp.zeros(fixed.env.obs_size), jnp.zeros(fixed.env.action_size)
    seen = jnp.zeros(fixed.env.obs_size + fixed.env.privileged_size)
    init = lambda name, key, *inputs: fixed.networks[name].init(key, *inputs)
    return {
        "actor": init("actor", keys[0], obs),
        "critics": {"reward": init("reward", keys[1], seen, action), "cost": init("cost", keys[2], seen, action)},
        "vae": init("vae", keys[3], obs, action, keys[3]),
        "log_dual": jnp.log(jnp.float32(fixed.args.init_dual)),
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


def log_probability(action, mean, log_std):
    """log pi(action) (...,) of a tanh-Gaussian; actions at the bounds are moved inside by 1e-4."""
    action = jnp.clip(action, -1 + 1e-4, 1 - 1e-4)
    u = jnp.arctanh(action)
    log_normal = -0.5 * jnp.square((u - mean) / jnp.exp(log_std)) - log_std - 0.5 * jnp.log(2 * jnp.pi)
    return jnp.sum(log_normal - jnp.log1p(-jnp.square(action)), -1)


def thresholds(args: Args, horizon: int) -> tuple[float, float]:
    """(q_thres, qc_thres): the discounted equivalent of the limit over T steps, and 1.5 times it (CPQ, OSRL)."""
    q_thres = args.cost_limit * (1 - args.gamma**horizon) / (1 - args.gamma) / horizon
    return q_thres, 1.5 * q_thres


def gaussian_kl(mean, log_std):
    """KL(N(mean, std) | N(0, I)) averaged over the latent's dimensions: (...,)."""
    return jnp.mean(-0.5 * (1 + 2 * log_std - jnp.square(mean) - jnp.exp(2 * log_std)), -1)


def vae_loss(vae, batch, key, fixed: Fixed):
    """Reconstruction error plus beta times the latent's divergence."""
    action, mean, log_std = fixed.networks["vae"].apply(vae, batch.obs, batch.action, key)
    loss = jnp.mean(jnp.square(action - batch.action)) + fixed.args.vae_beta * gaussian_kl(mean, log_std).mean()
    return loss, {"vae_loss": loss}


def ood_actions(params: dict, batch, key, fixed: Fixed):
    """The quarter of `ood_actions` policy actions per state with the largest encoder KL: obs (m, o), action (m, a), weight (m,).

    Weight 1 where the action is really far, its KL beyond that of 99% of the batch's own actions (deviation 3), else 0.
    """
    vae_kl = lambda obs, action: gaussian_kl(*fixed.networks["vae"].apply(params["vae"], obs, action, method="encode"))
    repeat = lambda x: jnp.repeat(x, fixed.args.ood_actions, 0)  # after the actor, for which the copies are one state
    mean, log_std = fixed.networks["actor"].apply(params["actor"], batch.obs[: fixed.args.ood_states])
    obs, (action, _) = repeat(batch.obs[: fixed.args.ood_states]), sample_action(key, repeat(mean), repeat(log_std))
    kl, far = jax.lax.top_k(vae_kl(obs, action), obs.shape[0] // 4)
    weight = kl > jnp.quantile(vae_kl(batch.obs, batch.action), 0.99)
    return obs[far], action[far], weight.astype(jnp.float32)


def cpq_critic_loss(critics, params: dict, targets, batch, ood, key, fixed: Fixed):
    """Both critics of CPQ: safe actions only in the reward backup, OOD actions' cost pushed up to qc_thres."""
    args, networks = fixed.args, fixed.networks
    q_thres, qc_thres = thresholds(args, fixed.env.horizon)
    action, _ = sample_action(key, *networks["actor"].apply(params["actor"], batch.next_obs))
    next_q = jnp.min(networks["reward"].apply(targets["reward"], batch.next_obs, action), 0)
    next_qc = networks["cost"].apply(targets["cost"], batch.next_obs, action)[0]
    alive = args.gamma * (1.0 - batch.terminated)
    cost = batch.cost + args.termination_cost * batch.terminated
    target = jax.lax.stop_gradient(args.reward_scale * batch.reward + alive * (next_qc <= q_thres) * next_q)
    cost_target = jax.lax.stop_gradient(cost + alive * jnp.clip(next_qc, 0.0, 1.0 / (1.0 - args.gamma)))
    q = networks["reward"].apply(critics["reward"], batch.obs, batch.action)
    qc = networks["cost"].apply(critics["cost"], batch.obs, batch.action)[0]
    ood_obs, ood_action, weight = ood
    qc_ood = networks["cost"].apply(critics["cost"], ood_obs, ood_action)[0]
    qc_ood = qc_thres + jnp.sum(weight * (qc_ood - qc_thres)) / jnp.maximum(weight.sum(), 1.0)
    chex.assert_equal_shape([q[0], qc, target, cost_target])  # no silent broadcasting in the differences
    reward_loss, cost_loss = jnp.mean(jnp.square(q - target)), jnp.mean(jnp.square(qc - cost_target))
    penalty = jnp.exp(params["log_dual"]) * jnp.minimum(qc_ood - qc_thres, 0.0)
    info = {"reward_critic_loss": reward_loss, "cost_critic_loss": cost_loss, "q": q.mean(), "qc": qc.mean(), "qc_ood": qc_ood}
    return reward_loss + cost_loss - penalty, info


def dual_loss(log_dual, qc_ood, qc_thres):
    """Raises alpha while the OOD actions' mean cost value is below qc_thres."""
    return jnp.exp(log_dual) * jax.lax.stop_gradient(qc_ood - qc_thres)


def cpq_actor_loss(actor, critics, batch, safe, key, fixed: Fixed):
    """-1[Qc <= q_thres] min_i Q_i of the policy's own actions, beside cloning of safe trajectories (deviation 4)."""
    networks, q_thres = fixed.networks, thresholds(fixed.args, fixed.env.horizon)[0]
    action, log_prob = sample_action(key, *networks["actor"].apply(actor, batch.obs))
    q = jnp.min(networks["reward"].apply(critics["reward"], batch.obs, action), 0)
    qc = networks["cost"].apply(critics["cost"], batch.obs, action)[0]
    scale = jax.lax.stop_gradient(jnp.abs(q).mean() + 1e-3)
    cloning = -jnp.mean(log_probability(safe.action, *networks["actor"].apply(actor, safe.obs)))
    loss = -jnp.mean(jax.lax.stop_gradient(qc <= q_thres) * q) / scale + fixed.args.cloning_weight * cloning
    return loss, {"actor_loss": loss, "entropy": -log_prob.mean()}


def critic_loss(critics, actor, targets, entropy_weights, batch, key, fixed: Fixed):
    """Soft Bellman errors of both critics under the policy; `entropy_weights` = (alpha_r, alpha_c)."""
    args, networks = fixed.args, fixed.networks
    action, log_prob = sample_action(key, *networks["actor"].apply(actor, batch.next_obs))
    next_q = jnp.min(networks["reward"].apply(targets["reward"], batch.next_obs, action), 0) - entropy_weights[0] * log_prob
    next_qc = networks["cost"].apply(targets["cost"], batch.next_obs, action)[0] - entropy_weights[1] * log_prob
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


def drift(mean, log_std, prior_mean, prior_log_std):
    """KL(pi | prior) (...,) of two tanh-Gaussians, nats: that of the Gaussians before tanh."""
    ratio = (jnp.exp(2 * log_std) + jnp.square(mean - prior_mean)) / jnp.exp(2 * prior_log_std)
    return jnp.sum(prior_log_std - log_std + 0.5 * (ratio - 1.0), -1)


def anchor_at(n, args: Args):
    """The anchor's weight in iteration n: falls linearly, towards 0 after `anchor_decay` of the iterations, down to `anchor_floor`."""
    return args.anchor_weight * jnp.maximum(args.anchor_floor, 1.0 - n / (args.anchor_decay * args.iterations))


def actor_loss(actor, params: dict, multiplier, anchor, batch, key, fixed: Fixed):
    """-(min_i Q_i - lambda Qc + entropy weight * h - anchor * KL(pi | offline policy)) of the policy's own actions."""
    args, networks, critics = fixed.args, fixed.networks, params["critics"]
    mean, log_std = networks["actor"].apply(actor, batch.obs)
    action, log_prob = sample_action(key, mean, log_std)
    q = jnp.min(networks["reward"].apply(critics["reward"], batch.obs, action), 0)
    qc = networks["cost"].apply(critics["cost"], batch.obs, action)[0]
    away = drift(mean, log_std, *networks["actor"].apply(params["prior"], batch.obs))
    loss = jnp.mean(args.entropy_weight * log_prob + anchor * away - q + multiplier * qc)
    return loss, {"actor_loss": loss, "entropy": -log_prob.mean()}


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


# ---------------------------------------------------------------- rank diagnostic (Marvel, Table 1)


class Points(NamedTuple):
    """State-action pairs with the Monte-Carlo returns of the policy from them."""

    obs: jax.Array  # (n, o)
    action: jax.Array  # (n, a)
    returns: jax.Array  # (n,) discounted, scaled reward
    costs: jax.Array  # (n,) discounted cost


def monte_carlo_points(explore, policy, key, env: envs.Env, n: int, args: Args) -> Points:
    """n points met by `explore` in the first half of an episode, each followed by `policy` for half an episode.

    The remaining gamma^(T/2) is dropped; the clock restarts at the point, so that time-outs, which Q bootstraps through,
    do not cut returns short.
    """
    keys = jax.random.split(key, 5)
    state, obs = env.reset(jax.random.split(keys[0], n))
    half = env.horizon // 2
    leave = jax.random.randint(keys[1], (n,), 0, half)

    def approach(carry, step):
        i, key = step
        (state, obs), kept = carry
        select = lambda new, old: jnp.where((i == leave).reshape((n,) + (1,) * (new.ndim - 1)), new, old)
        kept = jax.tree.map(select, (state, obs), kept)
        state, t = env.step(state, explore(obs, key))
        return ((state, t.obs), kept), None

    steps = (jnp.arange(half), jax.random.split(keys[2], half))
    _, (state, start) = jax.lax.scan(approach, ((state, obs), (state, obs)), steps)[0]
    state = state._replace(t=jnp.zeros_like(state.t))
    action = explore(start, keys[3])

    def follow_policy(carry, step):
        state, action, weight, sums = carry
        state, t = env.step(state, action)
        sums = sums + weight[:, None] * jnp.stack([args.reward_scale * t.reward, t.cost + args.termination_cost * t.terminated], -1)
        weight = weight * args.gamma * (1.0 - t.terminated)
        return (state, policy(t.obs, step), weight, sums), None

    carry = (state, action, jnp.ones(n), jnp.zeros((n, 2)))
    sums = jax.lax.scan(follow_policy, carry, jax.random.split(keys[4], half))[0][3]
    return Points(start, action, sums[:, 0], sums[:, 1])


def spearman(x, y):
    """Spearman's rank correlation of x and y (n,), ties at their mean rank; NaN if either is constant."""
    chex.assert_equal_shape([x, y])
    rank = lambda v: jnp.sum(v[:, None] > v, 1) + 0.5 * jnp.sum(v[:, None] == v, 1)
    constant = jnp.all(x == x[0]) | jnp.all(y == y[0])  # corrcoef's rounding would make something of it
    return jnp.where(constant, jnp.nan, jnp.corrcoef(rank(x), rank(y))[0, 1])


def rank_correlations(critics, own: Points, random: Points, networks) -> dict:
    """Correlations of Q and Qc with Monte-Carlo returns on the policy's own and on random-policy rollouts."""
    out = {}
    for name, points in {"policy": own, "random": random}.items():
        q = jnp.min(networks["reward"].apply(critics["reward"], points.obs, points.action), 0)
        qc = networks["cost"].apply(critics["cost"], points.obs, points.action)[0]
        out |= {f"rank_q_{name}": spearman(q, points.returns), f"rank_qc_{name}": spearman(qc, points.costs)}
    return out


# ---------------------------------------------------------------- one gradient step of each phase


def cpq_step(learner: Learner, batches: tuple[Batch, Batch], key, fixed: Fixed):
    """Phase 1, CPQ: VAE, both critics, the OOD constraint's dual, actor; batches of all and of safe trajectories."""
    batch, safe = batches
    key_vae, key_ood, key_critic, key_actor = jax.random.split(key, 4)
    gradient, _ = jax.grad(vae_loss, has_aux=True)(learner.params["vae"], batch, key_vae, fixed)
    learner = descend(learner, fixed, "vae", gradient)
    ood = ood_actions(learner.params, batch, key_ood, fixed)
    gradient, info = jax.grad(cpq_critic_loss, has_aux=True)(
        learner.params["critics"], learner.params, learner.targets, batch, ood, key_critic, fixed
    )
    learner = descend(learner, fixed, "critics", gradient)
    qc_thres = thresholds(fixed.args, fixed.env.horizon)[1]
    learner = descend(learner, fixed, "log_dual", jax.grad(dual_loss)(learner.params["log_dual"], info["qc_ood"], qc_thres))
    learner.params["log_dual"] = jnp.clip(learner.params["log_dual"], -5.0, 5.0)
    gradient, actor_info = jax.grad(cpq_actor_loss, has_aux=True)(
        learner.params["actor"], learner.params["critics"], batch, safe, key_actor, fixed
    )
    learner = descend(learner, fixed, "actor", gradient)
    return follow(learner, fixed), {**info, **actor_info, "ood_weight": jnp.exp(learner.params["log_dual"])}


def vpa_step(learner: Learner, batches: tuple[Batch], key, fixed: Fixed):
    """Phase 2, value pre-alignment: both critics evaluate the frozen offline policy under the online objective."""
    (batch,) = batches
    weights = (fixed.args.vpa_alpha_reward, fixed.args.vpa_alpha_cost)
    gradient, info = jax.grad(critic_loss, has_aux=True)(
        learner.params["critics"], learner.params["actor"], learner.targets, weights, batch, key, fixed
    )
    return follow(descend(learner, fixed, "critics", gradient), fixed), info


def online_step(learner: Learner, multiplier, anchor, batch: Batch, key, fixed: Fixed):
    """Phase 3, SAC-Lagrangian: both critics, actor."""
    key_critic, key_actor = jax.random.split(key)
    weights = (fixed.args.entropy_weight, 0.0)
    gradient, info = jax.grad(critic_loss, has_aux=True)(
        learner.params["critics"], learner.params["actor"], learner.targets, weights, batch, key_critic, fixed
    )
    learner = descend(learner, fixed, "critics", gradient)
    gradient, actor_info = jax.grad(actor_loss, has_aux=True)(
        learner.params["actor"], learner.params, multiplier, anchor, batch, key_actor, fixed
    )
    return follow(descend(learner, fixed, "actor", gradient), fixed), {**info, **actor_info}


# ---------------------------------------------------------------- one block of each phase


def learn_offline(learner: Learner, data: tuple[Batch, ...], key, step, batch_size: int, steps: int, fixed: Fixed):
    """`steps` gradient steps on minibatches of each of `data`; phases 1 and 2."""

    def one(learner, key):
        *keys, key_step = jax.random.split(key, len(data) + 1)
        batches = tuple(sample(k, d, batch_size, d.reward.shape[0]) for k, d in zip(keys, data))
        return step(learner, batches, key_step, fixed)

    learner, info = jax.lax.scan(one, learner, jax.random.split(key, steps))
    return learner, jax.tree.map(jnp.mean, info)


def hold_actor(new: Learner, old: Learner, hold) -> Learner:
    """`new`, but with the actor of `old` and its optimiser's state where `hold`."""
    keep = lambda new, old: new | {"actor": jax.tree.map(partial(jnp.where, hold), old["actor"], new["actor"])}
    return Learner(keep(new.params, old.params), new.targets, keep(new.optimizers, old.optimizers))


def learn_online(learner, multiplier: Multiplier, replay: Replay, data: Batch, new: Batch, ended: Episodes, key, n, step, fixed: Fixed):
    """Iteration n: inserts what was collected, moves the multiplier by the episodes that ended, takes `updates_per_iter` of `step`."""
    args = fixed.args
    replay = insert(replay, jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), new))
    multiplier = update_multiplier(multiplier, ended.means()["cost"], args)
    filled = jnp.minimum(replay.inserted, replay.data.reward.shape[0])

    def one(learner, key):
        key_online, key_offline, key_step = jax.random.split(key, 3)
        if args.replay == "online":
            batch = sample(key_online, replay.data, args.batch_size, filled)
        else:
            half = sample(key_online, replay.data, args.batch_size // 2, filled)
            rest = sample(key_offline, data, args.batch_size - args.batch_size // 2, data.reward.shape[0])
            batch = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), half, rest)
        after, info = step(learner, multiplier.value, anchor_at(n, args), batch, key_step, fixed)
        return hold_actor(after, learner, n <= args.actor_warmup), info

    learner, info = jax.lax.scan(one, learner, jax.random.split(key, args.updates_per_iter))
    return learner, multiplier, replay, jax.tree.map(jnp.mean, info)


# ---------------------------------------------------------------- phases


class Run(NamedTuple):
    """What main decides and every phase needs."""

    args: Args
    env: envs.Env
    dataset: dict  # dsrl.load's description of the file
    data: Batch  # all transitions of the dataset
    safe: Batch  # those to clone
    log: Logbook
    roots: jax.Array  # (seeds,) PRNG keys; what is random anywhere follows from these


def offline_rates(args: Args) -> dict:
    """Adam step sizes of phase 1. The actor's falls to zero: at a constant one the cost of its last steps scatters widely."""
    actor = optax.cosine_decay_schedule(args.offline_actor_lr, args.offline_steps)
    return {"actor": actor, "critics": args.offline_critic_lr, "vae": args.offline_critic_lr, "log_dual": args.dual_lr}


def online_rates(args: Args) -> dict:
    """Adam step sizes of phase 3. The actor's falls to zero, so that policy and multiplier come to rest."""
    steps = max(1, args.iterations - args.actor_warmup) * args.updates_per_iter
    return {"actor": optax.cosine_decay_schedule(args.actor_lr, steps), "critics": args.critic_lr}


STREAMS = ("init", "offline", "vpa", "online", "collect", "eval", "rank")
CHUNK = 500  # gradient steps of phases 1 and 2 between two rows of progress.csv
OFFLINE_FIELDS = (
    "env cost_limit gamma tau hidden num_critics reward_scale termination_cost offline_steps offline_batch_size offline_actor_lr "
    "offline_critic_lr dual_lr init_dual cloning_weight cloning_quantile vae_hidden vae_beta ood_actions ood_states "
    "offline_evals eval_episodes final_eval_rounds eval_policy"
).split()
OFFLINE_CODE = (  # a change in any of these makes another checkpoint
    Actor, VAE, Critic, Ensemble, build, init_params, descend, follow, sample_action, log_probability, thresholds, gaussian_kl,
    vae_loss, ood_actions, cpq_critic_loss, dual_loss, cpq_actor_loss, cpq_step, learn_offline, sample, offline_rates,
)  # fmt: skip


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


def cpq_phase(run: Run) -> dict:
    """Phase 1: the parameters that CPQ learns; not repeated where every seed has the checkpoint of this recipe."""
    args, log = run.args, run.log
    fixed = build(args, run.env, offline_rates(args))
    recipe = {field: asdict(args)[field] for field in OFFLINE_FIELDS} | {"dataset": run.dataset["sha256"]}
    recipe |= {"code": [inspect.getsource(f) for f in OFFLINE_CODE]}
    paths = [logbook.offline_path(args.runs, run.env.name, "cpq", recipe, seed) for seed in log.seeds]
    learner = over_seeds(lambda key: start_phase(init_params(key, fixed), fixed))(keys(run, "init"))
    if all(path.exists() for path in paths) and not log.resuming("offline"):
        params = logbook.load_seeds(paths, learner.params)
        log.repeat(paths)
        return params
    learn = partial(learn_offline, step=cpq_step, batch_size=args.offline_batch_size, steps=CHUNK, fixed=fixed)
    learn = over_seeds(learn, (0, None, 0), donate_argnums=0)
    show = evaluator(run, fixed.networks)
    blocks = args.offline_steps // CHUNK
    evaluate_after = spread(blocks, args.offline_evals) | {0}

    def block(n, carry):
        (learner,) = carry
        if n:
            learner, info = learn(learner, (run.data, run.safe), keys(run, "offline", n))
            log.log("offline", "train", gradient_steps=n * CHUNK, env_steps=0, **info)
        if n in evaluate_after:
            show("offline", learner, n * CHUNK, 0, n == blocks)
        if n == blocks:
            log.save_seeds(paths, learner.params, {"recipe": recipe})
        return (learner,)

    return log.run("offline", blocks, (learner,), block, CHUNK)[0].params


def other_checkpoints(args: Args, dataset: dict, seeds: list[int]) -> list[Path]:
    """One checkpoint per seed that another offline algorithm (--offline) made for this task, limit, network size and dataset."""
    if args.offline == "cpq":
        return []
    wanted = {"env": args.env, "cost_limit": args.cost_limit, "hidden": args.hidden, "dataset": dataset["sha256"]}
    return [logbook.newest_offline(args.runs, args.env, args.offline, seed, wanted) for seed in seeds]


def offline_phase(run: Run) -> dict:
    """Phase 1 by the algorithm that --offline names: CPQ here, another's from the checkpoints that its own file made."""
    paths = other_checkpoints(run.args, run.dataset, run.log.seeds)
    if not paths:
        return cpq_phase(run)
    fixed = build(run.args, run.env, {})
    shapes = jax.eval_shape(over_seeds(lambda key: init_params(key, fixed)), run.roots)
    params = logbook.load_seeds(paths, {k: shapes[k] for k in ("actor", "critics")})
    run.log.repeat(paths)
    return params


def vpa_phase(run: Run, params: dict) -> dict:
    """Phase 2, between two looks at how the critics rank; returns the parameters with pre-aligned critics."""
    args, log = run.args, run.log
    fixed = build(args, run.env, {"critics": args.vpa_lr})
    policy = lambda actor, obs, key: sample_action(key, *fixed.networks["actor"].apply(actor, obs))[0]
    random_policy = lambda obs, key: jax.random.uniform(key, (*obs.shape[:-1], run.env.action_size), minval=-1.0)
    follow_up = lambda explore, actor, key: monte_carlo_points(explore, partial(policy, actor), key, run.env, args.rank_points, args)
    own_points = over_seeds(lambda actor, key: follow_up(partial(policy, actor), actor, key))
    random_points = over_seeds(lambda actor, key: follow_up(random_policy, actor, key))
    points = []  # of the frozen policy: the same before and after
    correlations = over_seeds(partial(rank_correlations, networks=fixed.networks))

    def rank(phase, actor, critics, gradient_steps):
        if args.rank_points:
            points[:] = points or [f(actor, keys(run, "rank")) for f in (own_points, random_points)]
            log.log(phase, "rank", gradient_steps=gradient_steps, env_steps=0, **correlations(critics, *points))

    learn = partial(learn_offline, step=vpa_step, batch_size=args.vpa_batch_size, steps=CHUNK, fixed=fixed)
    learn = over_seeds(learn, (0, None, 0))
    show = evaluator(run, fixed.networks)
    start = params
    if args.critics == "fresh":
        start = params | {"critics": over_seeds(lambda key: init_params(key, fixed)["critics"])(keys(run, "vpa"))}
    blocks, before = args.vpa_steps // CHUNK, log.steps_before("vpa")

    def block(n, carry):
        (learner,) = carry
        done = before + n * CHUNK
        if n == 0:
            rank("offline", learner.params["actor"], params["critics"], done)
        else:
            learner, info = learn(learner, (run.data,), keys(run, "vpa", n))
            log.log("vpa", "train", gradient_steps=done, env_steps=0, **info)
            if n == blocks:
                rank("vpa", learner.params["actor"], learner.params["critics"], done)
                show("vpa", learner, done, 0, True)
        return (learner,)

    return log.run("vpa", blocks, (over_seeds(partial(start_phase, fixed=fixed))(start),), block, CHUNK)[0].params


def online_phase(run: Run, params: dict) -> dict:
    """Phase 3: episodes, multiplier, gradient steps, in turn."""
    args, log, env, before = run.args, run.log, run.env, run.log.steps_before("online")
    fixed = build(args, env, online_rates(args))
    start = {"actor": params["actor"], "critics": params["critics"], "prior": params["actor"]}
    learner = over_seeds(partial(start_phase, fixed=fixed))(start)
    per_iter = args.episodes_per_iter * env.horizon
    capacity = min(max(1, args.buffer_size // per_iter), args.iterations) * per_iter
    replay = over_seeds(lambda _: Replay(jax.tree.map(lambda x: jnp.zeros((capacity, *x.shape[1:])), run.data), jnp.int32(0)))(run.roots)
    actors = over_seeds(lambda key: init_actors(key, env, args.episodes_per_iter))(keys(run, "collect"))
    multiplier = over_seeds(lambda _: init_multiplier(args))(run.roots)
    policy = lambda actor, obs, key: sample_action(key, *fixed.networks["actor"].apply(actor, obs))[0]
    gather = over_seeds(lambda actor, actors, key: collect(actors, partial(policy, actor), key, env, env.horizon))
    learn = over_seeds(partial(learn_online, step=online_step, fixed=fixed), (0, 0, 0, None, 0, 0, 0, None), donate_argnums=(0, 2))
    show = evaluator(run, fixed.networks)
    evaluate_after = spread(args.iterations, args.evals)

    def block(n, carry):
        learner, multiplier, replay, actors = carry
        steps = {"gradient_steps": before + n * args.updates_per_iter, "env_steps": n * per_iter}
        if n == 0:
            return carry
        actors, new, ended = gather(learner.params["actor"], actors, keys(run, "collect", n))
        learner, multiplier, replay, info = learn(learner, multiplier, replay, run.data, new, ended, keys(run, "online", n), n)
        kp, ki, kd = multiplier.gains.T
        log.log("online", "train", **steps, **ended.means(), multiplier=multiplier.value, kp=kp, ki=ki, kd=kd, **info)
        if n in evaluate_after:
            show("online", learner, **steps, last=n == args.iterations, multiplier=multiplier.value)
        return learner, multiplier, replay, actors

    return log.run("online", args.iterations, (learner, multiplier, replay, actors), block, unit="iterations")[0].params


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
    args = replace(args, env=env.name, reward_scale=args.reward_scale or env.reward_scale)
    seeds = list(range(args.seed, args.seed + args.seeds))
    dataset, about = public.load(args.dataset, env=env.name, obs_size=env.obs_size, action_size=env.action_size)
    if dataset.privileged is not None:
        env = envs.make(args.env, args.backend, privileged=True)
        dataset = dsrl.widened(dataset, env.privileged_size, about["path"])
    flat = (dataset.observations, dataset.actions, dataset.rewards, dataset.costs, dataset.next_observations, dataset.terminals)
    data = Batch(*(jnp.asarray(x, jnp.float32) for x in flat))
    safe = jax.tree.map(lambda x: x[dsrl.in_safe_trajectories(dataset, args.cost_limit, args.cloning_quantile)], data)
    if safe.reward.shape[0] == 0:
        raise logbook.BadInput(f"{about['path']}: no trajectory with cost <= {args.cost_limit:g} to clone: raise --cost-limit")
    other_checkpoints(args, about, seeds)  # whatever is missing is said before anything is written
    log = Logbook(algo, env.name, asdict(args), seeds, about | dsrl.describe(dataset, args.cost_limit))
    return Run(args, env, about, data, safe, log, jax.vmap(jax.random.key)(jnp.array(seeds)))


def main(args: Args) -> None:
    logbook.check_numbers(args, {"offline_steps": CHUNK, "vpa_steps": CHUNK})
    if args.eval:
        return replay_checkpoint(args)
    run = prepare("marvel", args)
    params = offline_phase(run)
    params = vpa_phase(run, params)
    params = online_phase(run, params)
    run.log.save_seeds([run.log.folder / f"checkpoint-seed{seed}.safetensors" for seed in run.log.seeds], params)
    run.log.close()


if __name__ == "__main__":
    logbook.command(main, Args, tuned=TUNED)
