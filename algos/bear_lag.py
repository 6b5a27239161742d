"""BEAR-Lagrangian: offline only, the second offline method that offline-to-online runs can start from (`--offline bear_lag`).

Source: BEAR (Kumar, Fu, Tucker, Levine; arXiv 1906.00949) with a Lagrangian cost term, as OSRL's BEARL, from which Marvel's
release (arXiv 2412.04426) starts. Leaves one checkpoint per seed under RUNS/ENV/offline/bear_lag/.

    equation                                                                                  function
    VAE: MSE(a, decode(s, z)) + beta mean KL(encode(s, a) | N(0, I))                          networks.vae_loss
    MMD^2(p, q) = E k(x,x') - 2 E k(x,y) + E k(y,y'), Gaussian k, x,x' ~ p, y,y' ~ q          mmd_squared
    Q'(s',a') = w min_i Q'_i + (1-w) max_i Q'_i;  y_r = r + gamma (1-term.) max_k Q'(s',a'_k)  bear_critic_loss
    y_c = c + gamma (1-term.) mean_k Qc'(s',a'_k), a'_k ~ pi(.|s')                            bear_critic_loss
    maximise min_i Q_i(s,a) - lambda Qc(s,a) - beta (MMD(pi, VAE) - epsilon)                  bear_actor_loss
    lambda, beta >= 0 (dual): ascend lambda (Qc - q_thres), beta (MMD - epsilon)              dual_losses
    q_thres = d (1-gamma^T)/(1-gamma)/T                                                       training.cost_threshold

Units: critics see reward * reward_scale and raw cost, so lambda counts scaled reward per unit of cost.

Deviations, P from the paper, R from the reference code (OSRL):
 1 (R) The multiplier is a dual variable of E Qc <= q_thres, bounded by `offline_max_multiplier`, not a PID controller.
 2 (P, R) The MMD is between actions in [-1, 1]^a, after tanh (P, R: before it). Its kernel and width are R's (P: Laplacian).
 3 (R) One cost critic, as Marvel's release (R: two). Its target is the mean over the sampled actions: the maximum, meant for optimism
   about reward, has no meaning for cost.
 4 (R) Time-outs bootstrap; terminal states stop both critics (R: time-outs too, and the cost critic never stops).
 5 (R) The next actions are the policy's (R: of its moving average).
 6 (P, R) As in cpq.py, with the same switches: symlog, LayerNorm, smaller networks, faster targets, fewer and smaller steps, the falling
   step size (7, 8), x for critics (9), the termination cost (10), the odometer (12), the task's reward scale (13), and the bound of
   Qc' (--no-clip-cost-target).
"""

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
import optax

from algos import logbook, training
from algos.networks import Networks, sample_action, vae_loss
from algos.training import CHUNK, EvalArgs, Learner, NetworkArgs, OfflineCriticArgs, Run, RunArgs, apply_gradient, update_targets
from envs.rollout import Batch


@dataclass(frozen=True)
class BearArgs(OfflineCriticArgs):
    """phase 1, BEAR-Lag"""

    mmd_samples: int = 10
    """actions per state from policy and VAE (BEAR: 4 to 10)"""
    mmd_sigma: float = 50.0
    """width of the Gaussian kernel exp(-|x-y|^2 / (2 sigma)), in squared units of actions (OSRL: 50)"""
    mmd_limit: float = 0.05
    """epsilon: MMD that the policy may keep from the behaviour (BEAR, OSRL: 0.05)"""
    mmd_dual_lr: float = 1e-3
    """Adam step size of the logarithms of beta and lambda (OSRL: 1e-3 for beta)"""
    minimum_weight: float = 0.75
    """w: weight of the smallest critic against the largest in the target (BEAR: 0.75)"""
    init_duals: tuple[float, float] = (1.0, 0.01)
    """initial beta (MMD) and lambda (cost)"""
    offline_max_multiplier: float = 1.0
    """upper bound of lambda"""


@dataclass(frozen=True)
class Args(EvalArgs, BearArgs, NetworkArgs, RunArgs):
    """this algorithm"""


PRESETS: dict[str, dict] = {  # per task, as phase 1 of `--offline bear_lag` has them
    "suite": {"SafetyAntRun": dict(offline_actor_lr=3e-3, termination_cost=100.0, final_eval_rounds=10)}
}
RECIPE_VERSION = 2  # raise it when the same arguments give another policy or other critics (tests/test_recipes.py)
RECIPE = training.COMMON_RECIPE + training.CRITIC_RECIPE
RECIPE += "mmd_samples mmd_sigma mmd_limit mmd_dual_lr minimum_weight init_duals offline_max_multiplier".split()

# ---------------------------------------------------------------- losses


def mmd_squared(x, y, sigma: float):
    """Squared maximum mean discrepancy (...,) of samples x (..., n, a) and y (..., m, a) under the kernel exp(-|x-y|^2 / (2 sigma))."""

    def kernel(a, b):
        return jnp.mean(jnp.exp(-jnp.sum(jnp.square(a[..., :, None, :] - b[..., None, :, :]), -1) / (2 * sigma)), (-2, -1))

    return kernel(x, x) - 2 * kernel(x, y) + kernel(y, y)


def bear_critic_loss(critics, params: dict, targets, batch: Batch, key, networks: Networks, args, max_qc: float):
    """Both critics of BEAR-Lag, bootstrapped from `mmd_samples` policy actions per next state; `max_qc` bounds Qc'."""
    next_obs = jnp.broadcast_to(batch.next_obs, (args.mmd_samples, *batch.next_obs.shape))
    mean, log_std = networks.actor.apply(params["actor"], batch.next_obs)
    draws = (args.mmd_samples, *mean.shape)
    action, _ = sample_action(key, jnp.broadcast_to(mean, draws), jnp.broadcast_to(log_std, draws))
    next_qs = networks.reward.apply(targets["reward"], next_obs, action)
    next_q = jnp.max(args.minimum_weight * jnp.min(next_qs, 0) + (1 - args.minimum_weight) * jnp.max(next_qs, 0), 0)
    next_qc = jnp.mean(networks.qcs(targets, next_obs, action), 1)
    next_qc = jnp.clip(next_qc, 0.0, max_qc) if args.clip_cost_target else next_qc
    alive = args.gamma * (1.0 - batch.terminated)
    cost = batch.cost + args.termination_cost * batch.terminated
    target = args.reward_scale * batch.reward + alive * next_q
    cost_target = cost + alive * next_qc
    return networks.bellman_errors(critics, batch.obs, batch.action, target, cost_target)


def bear_actor_loss(actor, params: dict, batch: Batch, key, networks: Networks, args):
    """-(min_i Q_i - lambda Qc - beta (MMD - epsilon)); info has what the dual variables need."""
    key_policy, key_vae = jax.random.split(key)
    mean, log_std = networks.actor.apply(actor, batch.obs)
    draws = (args.mmd_samples, *mean.shape)
    actions, log_prob = sample_action(key_policy, jnp.broadcast_to(mean, draws), jnp.broadcast_to(log_std, draws))
    z = jnp.clip(jax.random.normal(key_vae, (*draws[:2], 2 * mean.shape[-1])), -0.5, 0.5)  # BEAR: near the mode
    obs = jnp.broadcast_to(batch.obs, (args.mmd_samples, *batch.obs.shape))
    behaviour = networks.vae.apply(params["vae"], obs, z, method="decode")
    mmd = jnp.sqrt(jnp.maximum(mmd_squared(jnp.moveaxis(actions, 0, -2), jnp.moveaxis(behaviour, 0, -2), args.mmd_sigma), 1e-6)).mean()
    q, qc = networks.q(params["critics"], batch.obs, actions[0]), networks.qc(params["critics"], batch.obs, actions[0])
    beta, multiplier = jnp.exp(params["log_duals"])
    multiplier = multiplier if np.isfinite(args.cost_limit) else 0.0
    loss = jnp.mean(-q + multiplier * qc) + beta * (mmd - args.mmd_limit)
    return loss, {"actor_loss": loss, "entropy": -log_prob.mean(), "qc_policy": qc.mean(), "mmd": mmd}


def dual_losses(log_duals, mmd, qc, mmd_limit: float, q_thres: float):
    """Raises beta while the MMD exceeds its limit, and lambda while the policy's cost value exceeds q_thres."""
    return -jnp.sum(jnp.exp(log_duals) * jax.lax.stop_gradient(jnp.stack([mmd - mmd_limit, qc - q_thres])))


# ---------------------------------------------------------------- one gradient step


def bear_step(learner: Learner, batches: tuple[Batch], key, networks: Networks, optimizers: dict, args, q_thres: float, max_qc: float):
    """VAE, both critics, actor, both dual variables."""
    (batch,) = batches
    key_vae, key_critic, key_actor = jax.random.split(key, 3)
    gradient = jax.grad(vae_loss)(learner.params["vae"], batch.obs, batch.action, key_vae, networks.vae, args.vae_beta)
    learner = apply_gradient(learner, optimizers, "vae", gradient)
    gradient, info = jax.grad(bear_critic_loss, has_aux=True)(
        learner.params["critics"], learner.params, learner.targets, batch, key_critic, networks, args, max_qc
    )
    learner = apply_gradient(learner, optimizers, "critics", gradient)
    gradient, actor_info = jax.grad(bear_actor_loss, has_aux=True)(
        learner.params["actor"], learner.params, batch, key_actor, networks, args
    )
    learner = apply_gradient(learner, optimizers, "actor", gradient)
    mmd, qc = actor_info.pop("mmd"), actor_info.pop("qc_policy")
    qc = qc if np.isfinite(q_thres) else jnp.full_like(qc, -1e9)  # no constraint: lambda falls to its lower bound
    q_thres = q_thres if np.isfinite(q_thres) else 0.0
    gradient = jax.grad(dual_losses)(learner.params["log_duals"], mmd, qc, args.mmd_limit, q_thres)
    learner = apply_gradient(learner, optimizers, "log_duals", gradient)
    upper = jnp.log(jnp.array([jnp.exp(5.0), args.offline_max_multiplier]))
    learner.params["log_duals"] = jnp.clip(learner.params["log_duals"], -5.0, upper)
    beta, multiplier = jnp.exp(learner.params["log_duals"])
    weights = {"ood_weight": beta, "multiplier": multiplier if np.isfinite(args.cost_limit) else jnp.float32(0)}
    return update_targets(learner, args.tau), {**info, **actor_info, **weights}


# ---------------------------------------------------------------- phase


def make_optimizers(args: BearArgs) -> dict:
    """One Adam per entry of the learner's parameters."""
    actor = training.step_size(args.offline_actor_lr, args.offline_actor_schedule, args.offline_steps)
    rates = {"actor": actor, "critics": args.offline_critic_lr, "vae": args.offline_critic_lr, "log_duals": args.mmd_dual_lr}
    return {name: optax.adam(rate) for name, rate in rates.items()}


def pretrain(run: Run) -> dict:
    """Phase 1: {"actor", "critics", "vae", "log_duals"} after BEAR-Lag, from the checkpoint of each seed; what is missing is made."""
    args, env = run.args, run.env
    networks, optimizers = training.make_networks(args, env), make_optimizers(args)
    limit = training.cost_threshold(args.cost_limit, args.gamma, env.horizon)
    step = partial(bear_step, networks=networks, optimizers=optimizers, args=args, q_thres=limit, max_qc=run.max_qc)

    def init(key):
        params = training.init_params(key, networks, run.critic_obs_size)
        return training.init_learner(params | {"log_duals": jnp.log(jnp.array(args.init_duals))}, optimizers)

    return training.pretrain(run, "bear_lag", RECIPE_VERSION, RECIPE, init, step, run.batches("data"), networks.actor)


def main(args: Args) -> None:
    logbook.check_numbers(args, {"offline_steps": CHUNK})
    if args.eval:
        return training.replay_checkpoint(args)
    run = training.prepare(Path(__file__).stem, args)
    training.finish(run, pretrain(run))


if __name__ == "__main__":
    logbook.command(main, Args, PRESETS)
