"""BEAR-Lagrangian: offline only, the second offline method that offline-to-online runs can start from (`--offline bear_lag`).

Source: BEAR (Kumar, Fu, Tucker, Levine; arXiv 1906.00949) with a Lagrangian cost term, as OSRL's BEARL, from which Marvel's
release (arXiv 2412.04426) starts. Leaves one checkpoint per seed under RUNS/ENV/offline/bear_lag/.

    equation                                                                                  function
    VAE: |a - decode(s, z)|^2 + beta KL(encode(s, a) | N(0, I))                               vae_loss
    MMD^2(p, q) = E k(x,x') - 2 E k(x,y) + E k(y,y'), Laplacian k, x,x' ~ p, y,y' ~ q         mmd_squared
    Q'(s',a') = w min_i Q'_i + (1-w) max_i Q'_i;  y_r = r + gamma (1-term.) max_k Q'(s',a'_k)  bear_critic_loss
    y_c = c + gamma (1-term.) mean_k Qc'(s',a'_k), a'_k ~ pi(.|s')                            bear_critic_loss
    maximise min_i Q_i(s,a) - lambda Qc(s,a) - beta (MMD(pi, VAE) - epsilon)                  bear_actor_loss
    lambda, beta >= 0 (dual): ascend lambda (Qc - q_thres), beta (MMD - epsilon)              dual_losses
    q_thres = d (1-gamma^T)/(1-gamma)/T                                                       thresholds

Units: critics see reward * reward_scale and raw cost, so lambda counts scaled reward per unit of cost.

Deviations, P from the paper, R from the reference code (OSRL):
 1 (R) The multiplier is a dual variable of E Qc <= q_thres, bounded by `offline_max_multiplier`, not a PID controller.
 2 (P) The MMD is between actions in [-1, 1]^a (after tanh), whose scale does not depend on the task.
 3 (R) The cost target is the mean over the sampled actions: the maximum, meant for optimism about reward, has no meaning for cost.
 4 (R) Time-outs bootstrap; only terminal states stop.
 5 (P, R) symlog observations, LayerNorm critics, hidden layers of 128, tau 0.02, batches of 256, as in the other files.
 6 (P, R) Critics see what the cost depends on but the observation lacks, where the dataset carries it (Run: x).
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
    dual_lr: float = 1e-3
    """phase 1: Adam step size of the logarithms of beta and lambda (OSRL: 1e-3 for beta)"""
    vae_hidden: tuple[int, ...] = (128, 128)
    """phase 1: hidden layers of the VAE's encoder and decoder (OSRL: 400)"""
    vae_beta: float = 0.5
    """phase 1: weight of the KL divergence (OSRL: 0.5)"""
    mmd_samples: int = 10
    """actions per state from policy and VAE (BEAR: 4 to 10)"""
    mmd_sigma: float = 1.0
    """width of the Laplacian kernel, in units of actions"""
    mmd_limit: float = 0.05
    """epsilon: MMD that the policy may keep from the behaviour (BEAR, OSRL: 0.05)"""
    minimum_weight: float = 0.75
    """w: weight of the smallest critic against the largest in the target (BEAR: 0.75)"""
    init_duals: tuple[float, float] = (1.0, 0.01)
    """initial beta (MMD) and lambda (cost)"""
    offline_max_multiplier: float = 1.0
    """upper bound of lambda"""

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
        "log_duals": jnp.log(jnp.array(fixed.args.init_duals)),
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


def mmd_squared(x, y, sigma: float):
    """Squared maximum mean discrepancy (...,) of samples x (..., n, a) and y (..., m, a) under a Laplacian kernel."""

    def kernel(a, b):
        return jnp.mean(jnp.exp(-jnp.sum(jnp.abs(a[..., :, None, :] - b[..., None, :, :]), -1) / sigma), (-2, -1))

    return kernel(x, x) - 2 * kernel(x, y) + kernel(y, y)


def bear_critic_loss(critics, params: dict, targets, batch, key, fixed: Fixed):
    """Both critics of BEAR-Lag, bootstrapped from `mmd_samples` policy actions per next state."""
    args, networks = fixed.args, fixed.networks
    next_obs = jnp.broadcast_to(batch.next_obs, (args.mmd_samples, *batch.next_obs.shape))
    mean, log_std = networks["actor"].apply(params["actor"], batch.next_obs)
    draws = (args.mmd_samples, *mean.shape)
    action, _ = sample_action(key, jnp.broadcast_to(mean, draws), jnp.broadcast_to(log_std, draws))
    next_qs = networks["reward"].apply(targets["reward"], next_obs, action)
    next_q = jnp.max(args.minimum_weight * jnp.min(next_qs, 0) + (1 - args.minimum_weight) * jnp.max(next_qs, 0), 0)
    next_qc = jnp.mean(networks["cost"].apply(targets["cost"], next_obs, action)[0], 0)
    alive = args.gamma * (1.0 - batch.terminated)
    cost = batch.cost + args.termination_cost * batch.terminated
    target = jax.lax.stop_gradient(args.reward_scale * batch.reward + alive * next_q)
    cost_target = jax.lax.stop_gradient(cost + alive * jnp.clip(next_qc, 0.0, 1.0 / (1.0 - args.gamma)))
    q = networks["reward"].apply(critics["reward"], batch.obs, batch.action)
    qc = networks["cost"].apply(critics["cost"], batch.obs, batch.action)[0]
    chex.assert_equal_shape([q[0], qc, target, cost_target])  # no silent broadcasting in the differences
    reward_loss, cost_loss = jnp.mean(jnp.square(q - target)), jnp.mean(jnp.square(qc - cost_target))
    info = {"reward_critic_loss": reward_loss, "cost_critic_loss": cost_loss, "q": q.mean(), "qc": qc.mean()}
    return reward_loss + cost_loss, info


def bear_actor_loss(actor, params: dict, batch, key, fixed: Fixed):
    """-(min_i Q_i - lambda Qc - beta (MMD - epsilon)); info has what the dual variables need."""
    args, networks = fixed.args, fixed.networks
    key_policy, key_vae = jax.random.split(key)
    mean, log_std = networks["actor"].apply(actor, batch.obs)
    draws = (args.mmd_samples, *mean.shape)
    actions, log_prob = sample_action(key_policy, jnp.broadcast_to(mean, draws), jnp.broadcast_to(log_std, draws))
    z = jnp.clip(jax.random.normal(key_vae, (*draws[:2], 2 * mean.shape[-1])), -0.5, 0.5)  # BEAR: near the mode
    obs = jnp.broadcast_to(batch.obs, (args.mmd_samples, *batch.obs.shape))
    behaviour = networks["vae"].apply(params["vae"], obs, z, method="decode")
    mmd = jnp.sqrt(jnp.maximum(mmd_squared(jnp.moveaxis(actions, 0, -2), jnp.moveaxis(behaviour, 0, -2), args.mmd_sigma), 1e-6)).mean()
    q = jnp.min(networks["reward"].apply(params["critics"]["reward"], batch.obs, actions[0]), 0)
    qc = networks["cost"].apply(params["critics"]["cost"], batch.obs, actions[0])[0]
    beta, multiplier = jnp.exp(params["log_duals"])
    loss = jnp.mean(-q + multiplier * qc) + beta * (mmd - args.mmd_limit)
    return loss, {"actor_loss": loss, "entropy": -log_prob.mean(), "qc_policy": qc.mean(), "mmd": mmd}


def dual_losses(log_duals, mmd, qc, mmd_limit: float, q_thres: float):
    """Raises beta while the MMD exceeds its limit, and lambda while the policy's cost value exceeds q_thres."""
    return -jnp.sum(jnp.exp(log_duals) * jax.lax.stop_gradient(jnp.stack([mmd - mmd_limit, qc - q_thres])))


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


def bear_step(learner: Learner, batches: tuple[Batch], key, fixed: Fixed):
    """VAE, both critics, actor, both dual variables."""
    (batch,) = batches
    args = fixed.args
    key_vae, key_critic, key_actor = jax.random.split(key, 3)
    gradient, _ = jax.grad(vae_loss, has_aux=True)(learner.params["vae"], batch, key_vae, fixed)
    learner = descend(learner, fixed, "vae", gradient)
    gradient, info = jax.grad(bear_critic_loss, has_aux=True)(
        learner.params["critics"], learner.params, learner.targets, batch, key_critic, fixed
    )
    learner = descend(learner, fixed, "critics", gradient)
    gradient, actor_info = jax.grad(bear_actor_loss, has_aux=True)(learner.params["actor"], learner.params, batch, key_actor, fixed)
    learner = descend(learner, fixed, "actor", gradient)
    mmd, qc = actor_info.pop("mmd"), actor_info.pop("qc_policy")
    q_thres = thresholds(args, fixed.env.horizon)[0]
    gradient = jax.grad(dual_losses)(learner.params["log_duals"], mmd, qc, args.mmd_limit, q_thres)
    learner = descend(learner, fixed, "log_duals", gradient)
    upper = jnp.log(jnp.array([jnp.exp(5.0), args.offline_max_multiplier]))
    learner.params["log_duals"] = jnp.clip(learner.params["log_duals"], -5.0, upper)
    weights = {"ood_weight": jnp.exp(learner.params["log_duals"][0]), "multiplier": jnp.exp(learner.params["log_duals"][1])}
    return follow(learner, fixed), {**info, **actor_info, **weights}


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
    log: Logbook
    roots: jax.Array  # (seeds,) PRNG keys; what is random anywhere follows from these


STREAMS = ("init", "offline", "vpa", "online", "collect", "eval", "rank")
CHUNK = 500  # gradient steps of phases 1 and 2 between two rows of progress.csv
OFFLINE_FIELDS = (
    "env cost_limit gamma tau hidden num_critics reward_scale termination_cost offline_steps offline_batch_size offline_actor_lr "
    "offline_critic_lr dual_lr vae_hidden vae_beta mmd_samples mmd_sigma mmd_limit minimum_weight init_duals "
    "offline_max_multiplier offline_evals eval_episodes final_eval_rounds eval_policy"
).split()
OFFLINE_CODE = (  # a change in any of these makes another checkpoint
    Actor, VAE, Critic, Ensemble, build, init_params, descend, follow, sample_action, thresholds, gaussian_kl, vae_loss,
    mmd_squared, bear_critic_loss, bear_actor_loss, dual_losses, bear_step, learn_offline, sample,
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


def bear_phase(run: Run) -> dict:
    """The parameters that BEAR-Lag learns; not repeated where every seed has the checkpoint of this recipe."""
    args, log = run.args, run.log
    actor = optax.cosine_decay_schedule(args.offline_actor_lr, args.offline_steps)
    rates = {"actor": actor, "critics": args.offline_critic_lr, "vae": args.offline_critic_lr, "log_duals": args.dual_lr}
    fixed = build(args, run.env, rates)
    recipe = {field: asdict(args)[field] for field in OFFLINE_FIELDS} | {"dataset": run.dataset["sha256"]}
    recipe |= {"code": [inspect.getsource(f) for f in OFFLINE_CODE]}
    paths = [logbook.offline_path(args.runs, run.env.name, "bear_lag", recipe, seed) for seed in log.seeds]
    learner = over_seeds(lambda key: start_phase(init_params(key, fixed), fixed))(keys(run, "init"))
    if all(path.exists() for path in paths) and not log.resuming("offline"):
        params = logbook.load_seeds(paths, learner.params)
        log.repeat(paths)
        return params
    learn = partial(learn_offline, step=bear_step, batch_size=args.offline_batch_size, steps=CHUNK, fixed=fixed)
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
    log = Logbook(algo, env.name, asdict(args), seeds, about | dsrl.describe(dataset, args.cost_limit))
    return Run(args, env, about, data, log, jax.vmap(jax.random.key)(jnp.array(seeds)))


def main(args: Args) -> None:
    logbook.check_numbers(args, {"offline_steps": CHUNK})
    if args.eval:
        return replay_checkpoint(args)
    run = prepare("bear_lag", args)
    params = bear_phase(run)
    run.log.save_seeds([run.log.folder / f"checkpoint-seed{seed}.safetensors" for seed in run.log.seeds], params)
    run.log.close()


if __name__ == "__main__":
    logbook.command(main, Args)
