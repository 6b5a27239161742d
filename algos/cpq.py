"""CPQ, constraints-penalised Q-learning: offline only; makes the checkpoints that the offline-to-online algorithms start from.

Source: CPQ (Xu, Zhan, Zhu; arXiv 2107.09003); OSRL is the reference code. This is the offline phase of marvel.py: a run of
marvel.py with the same configuration and dataset takes the checkpoint that this file leaves under RUNS/ENV/offline/cpq/.

    equation                                                                                  function
    VAE: |a - decode(s, z)|^2 + beta KL(encode(s, a) | N(0, I))                               vae_loss
    OOD actions: the quarter of a ~ pi(.|s) with the largest KL                               ood_actions
    y_r = r + gamma (1-term.) 1[Qc'(s',a') <= q_thres] min_i Q'_i(s',a')                      cpq_critic_loss
    y_c = c + gamma (1-term.) Qc'(s',a');  loss -= alpha min(0, E_ood Qc - qc_thres)        cpq_critic_loss
    alpha >= 0 (dual): ascends alpha (qc_thres - E_ood Qc)                                    dual_loss
    maximise 1[Qc(s,a) <= q_thres] min_i Q_i(s,a)                                             cpq_actor_loss
    q_thres = d (1-gamma^T)/(1-gamma)/T,  qc_thres = 1.5 q_thres                              thresholds

Units: critics see reward * reward_scale and raw cost.

Deviations, P from the paper, R from the reference code (OSRL):
 1 (R) The OOD penalty has a gradient: it goes through the online cost critic (OSRL's CPQ takes the target's, without one).
 2 (P, R) The OOD penalty is estimated on `ood_states` of the batch's states; only the far quarter goes through the cost critic
   (the same expectation for less work); an action counts only if its KL is beyond that of 99% of the batch's own actions;
   the penalty acts while E_ood Qc < qc_thres, alpha starts at `init_dual`, and Qc' is clipped to [0, 1/(1-gamma)]. Without
   these the penalty lifts Qc past q_thres everywhere, 1[Qc <= q_thres] is 0 for every action, and nothing is learned.
 3 (P, R) The actor also clones the best safe trajectories (`cloning_weight`, `cloning_quantile`); for the same reason: the gate
   opens only around a policy that is nearly safe. --cloning-weight 0 is CPQ without it.
 4 (R) Time-outs bootstrap; only terminal states stop.
 5 (P, R) symlog observations, LayerNorm critics, hidden layers of 128, tau 0.02, batches of 256, as in the other files.
 6 (P, R) Critics see what the cost depends on but the observation lacks, where the dataset carries it, and a terminal step costs
   them `termination_cost` more (AntRun, `TUNED`): see deviations 12 and 13 of marvel.py.
"""

import inspect
import sys
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

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

TUNED = {  # per task, where the defaults do not do; what the command line says goes before
    "SafetyAntRun": dict(
        cloning_weight=10.0, offline_actor_lr=3e-3, termination_cost=100.0,
    ),  # fmt: skip
    "SafetyCarRun": dict(cloning_quantile=0.25),  # offline cost 114; cloned from the fastest quarter: 285
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
    data: Batch  # all transitions of the dataset
    safe: Batch  # those to clone
    log: Logbook
    roots: jax.Array  # (seeds,) PRNG keys; what is random anywhere follows from these


def offline_rates(args: Args) -> dict:
    """Adam step sizes of phase 1. The actor's falls to zero: at a constant one the cost of its last steps scatters widely."""
    actor = optax.cosine_decay_schedule(args.offline_actor_lr, args.offline_steps)
    return {"actor": actor, "critics": args.offline_critic_lr, "vae": args.offline_critic_lr, "log_dual": args.dual_lr}


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
    log = Logbook(algo, env.name, asdict(args), seeds, about | dsrl.describe(dataset, args.cost_limit))
    return Run(args, env, about, data, safe, log, jax.vmap(jax.random.key)(jnp.array(seeds)))


def main(args: Args) -> None:
    logbook.check_numbers(args, {"offline_steps": CHUNK})
    if args.eval:
        return replay_checkpoint(args)
    run = prepare("cpq", args)
    params = cpq_phase(run)
    run.log.save_seeds([run.log.folder / f"checkpoint-seed{seed}.safetensors" for seed in run.log.seeds], params)
    run.log.close()


if __name__ == "__main__":
    logbook.command(main, Args, tuned=TUNED)
