"""CPQ, constraints-penalised Q-learning: offline only; makes the checkpoints that the offline-to-online algorithms start from.

Source: CPQ (Xu, Zhan, Zhu; arXiv 2107.09003); OSRL is the reference code. Every finetuner's phase 1 is `pretrain`: it takes the
checkpoint that this file has left under RUNS/ENV/offline/cpq/ for the same arguments and dataset, or makes it.

    equation                                                                                  function
    VAE: MSE(a, decode(s, z)) + beta mean KL(encode(s, a) | N(0, I))                          networks.vae_loss
    OOD actions: the quarter of a ~ pi(.|s) with the largest KL                               ood_actions
    y_r = r + gamma (1-term.) 1[Qc'(s',a') <= q_thres] min_i Q'_i(s',a')                      cpq_critic_loss, calibrated
    y_c = c + gamma (1-term.) Qc'(s',a');  loss -= alpha min(0, E_ood Qc - qc_thres)          cpq_critic_loss
    alpha in [e^-5, e^5] (dual): ascends alpha (qc_thres - E_ood Qc)                          dual_loss
    maximise 1[Qc(s,a) <= q_thres] min_i Q_i(s,a)                                             cpq_actor_loss
    q_thres = d (1-gamma^T)/(1-gamma)/T,  qc_thres = 1.5 q_thres                              thresholds

Units: critics see reward * reward_scale and raw cost.

Deviations, P from the paper, R from the reference code (OSRL), and the value of the argument that undoes each:
 1 (R) The OOD penalty has a gradient: it goes through the online cost critic. OSRL's goes through the target critic and has none:
   CPQ without the penalty (--no-ood-gradient; VAE and alpha, which serve the penalty alone, then stay untrained).
 2 (P, R) The OOD penalty is estimated on some of the batch's states (--ood-states 0: on all).
 3 (P, R) An action counts as OOD only if its KL is beyond that of 99% of the batch's own actions (--ood-quantile 0: always).
 4 (P, R) The penalty acts only while E_ood Qc < qc_thres (--no-one-sided-penalty: always), and alpha starts at 0.01 (--init-dual 1).
 5 (P, R) Qc' is clipped to what costs can add up to (--no-clip-cost-target).
   Without 3 to 5 the penalty lifts Qc past q_thres everywhere; 1[Qc <= q_thres] is then 0 and nothing is learned.
 6 (P, R) The actor also clones the best safe trajectories (--cloning-weight 0: no), for the same reason: the gate opens only around
   a policy that is nearly safe. Q is divided by its mean size, so that the weight has the same meaning on every task (without cloning,
   too: the size of a loss hardly changes Adam's steps).
 7 (P, R) symlog observations and LayerNorm critics (--no-symlog, --no-layer-norm), smaller networks (--hidden 256 256
   --vae-hidden 400 400), faster targets (--tau 0.005), fewer and smaller steps (--offline-steps 100000 --offline-batch-size 512).
 8 (P, R) The actor's step size is larger and falls to zero (--offline-actor-lr 1e-4 --offline-actor-schedule constant).
 9 (P, R) Critics see what the cost depends on but the observation lacks, where the dataset carries it (--no-privileged-critic).
10 (P, R) A terminal step can cost the critics more (--termination-cost 0; AntRun has 100).
11 (P, R) The gate lets through 90% of what the cloned trajectories do, which kept the limit (--gate-quantile 0): q_thres is raised to
   that quantile of Qc, and qc_thres to 1.5 times it. Else, on HalfCheetah and AntRun, Qc is above q_thres everywhere: the gate
   was shut, and Q was the reward of one step.
12 (P, R) On the Run tasks all networks see an odometer: how far the robot has gone sideways, summed up from its own velocimeter and
   magnetometer (envs/run.py; --no-odometer). Without it, a policy does not know how far the wall is.
13 (R) Rewards are multiplied by the task's own factor, on Circle 1 and on Swimmer 5, elsewhere R's 0.1 (--reward-scale 0.1).
Without a switch: one cost critic, as in Marvel's release (R: two, and the smaller value everywhere); log sigma is a smooth function
within [-5, 2] (R: cut off at -20 and 2); time-outs never stop the bootstrap, terminal states do, for both critics (R: time-outs stop
Q, and nothing stops Qc).
"""

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
import optax

from algos import logbook, training
from algos.networks import Networks, latent_kl, log_probability, sample_action, vae_loss
from algos.training import CHUNK, EvalArgs, Learner, NetworkArgs, OfflineCriticArgs, Run, RunArgs, apply_gradient, update_targets
from data import dsrl
from envs.rollout import Batch


@dataclass(frozen=True)
class CPQArgs(OfflineCriticArgs):
    """phase 1, CPQ"""

    dual_lr: float = 1e-4
    """Adam step size of log alpha of the OOD constraint (OSRL: 1e-4)"""
    init_dual: float = 0.01
    """initial weight alpha of the OOD constraint (OSRL: 1)"""
    ood_actions: int = 10
    """policy actions per state among which the out-of-distribution ones are found (OSRL: 10)"""
    ood_fraction: float = 0.25
    """share of those actions, the ones with the largest KL, that count as out of distribution (OSRL: 0.25)"""
    ood_states: int = 64
    """states of the batch that those actions are drawn for; 0: all (paper, OSRL)"""
    ood_quantile: float = 0.99
    """an action counts if its KL is beyond this quantile of the batch's own actions'; 0: always (paper, OSRL)"""
    ood_gradient: bool = True
    """the penalty goes through the online cost critic (paper); no: there is none, as OSRL's has no gradient"""
    one_sided_penalty: bool = True
    """the penalty acts only while E_ood Qc < qc_thres (paper, OSRL: no)"""
    gate_quantile: float = 0.9
    """the gate's threshold is at least this quantile of Qc over the cloned trajectories, which kept the limit; 0: q_thres (paper, OSRL)"""
    cloning_weight: float = 1.0
    """weight of behaviour cloning beside the (normalised) Q in the actor's loss (paper, OSRL: 0)"""
    cloning_quantile: float = 0.75
    """clone the safe trajectories whose return is at or above this quantile of theirs"""


@dataclass(frozen=True)
class Args(EvalArgs, CPQArgs, NetworkArgs, RunArgs):
    """configuration"""

    preset: Literal["suite", "release"] = "suite"
    """whole configuration: this suite's, or OSRL's as far as it can be had by arguments; arguments that are given override it"""


SUITE: dict[str, dict] = {  # per task, where the defaults do not do
    "SafetyAntRun": dict(cloning_weight=10.0, offline_actor_lr=3e-3, termination_cost=100.0, final_eval_rounds=10),
    "SafetyCarRun": dict(cloning_quantile=0.25),  # a clone of the fastest quarter costs more than one of the fastest three quarters
}
RELEASE = dict(  # OSRL's, from which Marvel's release starts
    hidden=(256, 256), vae_hidden=(400, 400), symlog=False, odometer=False, layer_norm=False, privileged_critic=False,
    tau=0.005, termination_cost=0.0, reward_scale=0.1,
    offline_steps=100_000, offline_batch_size=512, offline_actor_lr=1e-4, offline_actor_schedule="constant", offline_critic_lr=1e-3,
    clip_cost_target=False, init_dual=1.0, ood_states=0, ood_quantile=0.0, ood_gradient=False, one_sided_penalty=False,
    cloning_weight=0.0, gate_quantile=0.0, eval_policy="mean",
)  # fmt: skip
SLOW = {"SafetyAntRun": dict(final_eval_rounds=SUITE["SafetyAntRun"]["final_eval_rounds"])}  # tasks whose 500 episodes take too long
PRESETS = {"suite": SUITE, "release": SLOW | {"*": RELEASE}}
RECIPE_VERSION = 1  # raise it when the same arguments give another policy or other critics (tests/test_recipes.py)
RECIPE = training.COMMON_RECIPE + training.CRITIC_RECIPE
RECIPE += "dual_lr init_dual ood_actions ood_fraction ood_states ood_quantile ood_gradient one_sided_penalty".split()
RECIPE += "cloning_weight cloning_quantile gate_quantile".split()

# ---------------------------------------------------------------- losses


def thresholds(cost_limit: float, gamma: float, horizon: int) -> tuple[float, float]:
    """(q_thres, qc_thres): the discounted equivalent of the limit over T steps, and 1.5 times it (CPQ, OSRL)."""
    q_thres = training.cost_threshold(cost_limit, gamma, horizon)
    return q_thres, 1.5 * q_thres


def calibrated(limits: tuple, critics: dict, safe: Batch, networks: Networks, args) -> tuple:
    """`limits` = (q_thres, qc_thres), raised to the `gate_quantile` quantile of Qc over safe trajectories, and 1.5 times it.

    Where Qc is too high everywhere, the gate is shut even on what is known to be safe, and Q becomes the reward of one step.
    """
    if not args.gate_quantile or unconstrained(limits[0]):
        return limits
    known = jnp.quantile(networks.qc(critics, safe.obs, safe.action), args.gate_quantile)
    gate = jax.lax.stop_gradient(jnp.maximum(limits[0], known))
    return gate, 1.5 * gate


def unconstrained(threshold) -> bool:
    """Whether the cost limit is infinite (a number known before the program is compiled)."""
    return isinstance(threshold, float) and math.isinf(threshold)


def penalised(qc_thres, args) -> bool:
    """Whether OOD actions are penalised: not at an infinite limit, where none is too cheap. VAE and alpha serve this penalty alone."""
    return args.ood_gradient and not unconstrained(qc_thres)


def ood_actions(params: dict, batch: Batch, key, networks: Networks, args: CPQArgs):
    """The `ood_fraction` of the policy's actions with the largest encoder KL: obs (m, o), action (m, a), weight (m,).

    Weight 1 where the action is really far, its KL beyond the `ood_quantile` of the batch's own actions', else 0.
    """
    latent = lambda obs, action: latent_kl(*networks.vae.apply(params["vae"], obs, action, method="encode"))
    repeat = lambda x: jnp.repeat(x, args.ood_actions, 0)  # after the actor, so that it runs once per state
    states = batch.obs[: args.ood_states or None]
    mean, log_std = networks.actor.apply(params["actor"], states)
    obs, (action, _) = repeat(states), sample_action(key, repeat(mean), repeat(log_std))
    kl, far = jax.lax.top_k(latent(obs, action), max(1, int(obs.shape[0] * args.ood_fraction)))
    if not args.ood_quantile:
        return obs[far], action[far], jnp.ones(far.shape)
    weight = kl > jnp.quantile(latent(batch.obs, batch.action), args.ood_quantile)
    return obs[far], action[far], weight.astype(jnp.float32)


def cpq_critic_loss(critics, params: dict, targets, batch: Batch, ood, key, networks: Networks, args, limits, max_qc: float):
    """Both critics of CPQ: safe actions only in the reward backup, OOD actions' cost pushed up to qc_thres.

    `limits` = (q_thres, qc_thres); `ood` = ood_actions(...), None without the penalty; `max_qc` bounds Qc' from above (--clip-cost-target).
    """
    q_thres, qc_thres = limits
    action, _ = sample_action(key, *networks.actor.apply(params["actor"], batch.next_obs))
    next_q, next_qc = networks.q(targets, batch.next_obs, action), networks.qcs(targets, batch.next_obs, action)
    alive = args.gamma * (1.0 - batch.terminated)
    cost = batch.cost + args.termination_cost * batch.terminated
    target = args.reward_scale * batch.reward + alive * (networks.pessimistic(next_qc) <= q_thres) * next_q
    bounded = jnp.clip(next_qc, 0.0, max_qc) if args.clip_cost_target else next_qc
    cost_target = cost + alive * bounded
    loss, info = networks.bellman_errors(critics, batch.obs, batch.action, target, cost_target)
    if not penalised(qc_thres, args):
        return loss, info | {"qc_ood": jnp.float32(jnp.nan)}
    ood_obs, ood_action, weight = ood
    qc_ood = networks.qcs(critics, ood_obs, ood_action).mean(0)
    qc_ood = qc_thres + jnp.sum(weight * (qc_ood - qc_thres)) / jnp.maximum(weight.sum(), 1.0)
    below = jnp.minimum(qc_ood - qc_thres, 0.0) if args.one_sided_penalty else qc_ood - qc_thres
    return loss - jnp.exp(params["log_dual"]) * below, info | {"qc_ood": qc_ood}


def dual_loss(log_dual, qc_ood, qc_thres):
    """Raises alpha while the OOD actions' mean cost value is below qc_thres."""
    return jnp.exp(log_dual) * jax.lax.stop_gradient(qc_ood - qc_thres)


def cpq_actor_loss(actor, critics, batch: Batch, safe: Batch, key, networks: Networks, args, q_thres: float):
    """-1[Qc <= q_thres] min_i Q_i of the policy's own actions, beside cloning of safe trajectories (deviation 6)."""
    action, log_prob = sample_action(key, *networks.actor.apply(actor, batch.obs))
    q, qc = networks.q(critics, batch.obs, action), networks.qc(critics, batch.obs, action)
    scale = jax.lax.stop_gradient(jnp.abs(q).mean() + 1e-3)
    loss = -jnp.mean(jax.lax.stop_gradient(qc <= q_thres) * q) / scale
    if args.cloning_weight:
        loss -= args.cloning_weight * jnp.mean(log_probability(safe.action, *networks.actor.apply(actor, safe.obs)))
    return loss, {"actor_loss": loss, "entropy": -log_prob.mean()}


# ---------------------------------------------------------------- one gradient step


def cpq_step(learner: Learner, batches: tuple[Batch, Batch], key, networks: Networks, optimizers: dict, args, limits, max_qc: float):
    """VAE, both critics, the OOD constraint's dual, actor; minibatches of all and of safe trajectories."""
    batch, safe = batches
    key_vae, key_ood, key_critic, key_actor = jax.random.split(key, 4)
    penalty, ood = penalised(limits[1], args), None
    if penalty:
        gradient = jax.grad(vae_loss)(learner.params["vae"], batch.obs, batch.action, key_vae, networks.vae, args.vae_beta)
        learner = apply_gradient(learner, optimizers, "vae", gradient)
        ood = ood_actions(learner.params, batch, key_ood, networks, args)
    limits = calibrated(limits, learner.targets, safe, networks, args)
    gradient, info = jax.grad(cpq_critic_loss, has_aux=True)(
        learner.params["critics"], learner.params, learner.targets, batch, ood, key_critic, networks, args, limits, max_qc
    )
    learner = apply_gradient(learner, optimizers, "critics", gradient)
    if penalty:
        gradient = jax.grad(dual_loss)(learner.params["log_dual"], info["qc_ood"], limits[1])
        learner = apply_gradient(learner, optimizers, "log_dual", gradient)
        learner.params["log_dual"] = jnp.clip(learner.params["log_dual"], -5.0, 5.0)
    gradient, actor_info = jax.grad(cpq_actor_loss, has_aux=True)(
        learner.params["actor"], learner.params["critics"], batch, safe, key_actor, networks, args, limits[0]
    )
    learner = apply_gradient(learner, optimizers, "actor", gradient)
    weight = jnp.exp(learner.params["log_dual"]) if penalty else jnp.float32(jnp.nan)
    return update_targets(learner, args.tau), {**info, **actor_info, "ood_weight": weight}


# ---------------------------------------------------------------- phase


def make_optimizers(args: CPQArgs) -> dict:
    """One Adam per entry of the learner's parameters. The actor's step size falls: else the cost of its last steps scatters widely."""
    actor = training.step_size(args.offline_actor_lr, args.offline_actor_schedule, args.offline_steps)
    rates = {"actor": actor, "critics": args.offline_critic_lr, "vae": args.offline_critic_lr, "log_dual": args.dual_lr}
    return {name: optax.adam(rate) for name, rate in rates.items()}


def cloned(dataset: dsrl.Dataset, args, path, instead: str = "--cloning-weight 0") -> np.ndarray:
    """(N,) bool: the best safe trajectories; all where cloning is off and none is safe. BadInput, naming `instead`, if there are none."""
    safe = dsrl.in_safe_trajectories(dataset, args.cost_limit, args.cloning_quantile)
    if not safe.any() and args.cloning_weight:
        raise logbook.BadInput(
            f"{path}: no trajectory with cost <= {args.cost_limit:g}, which cloning and the gate take: raise --cost-limit, or {instead}"
        )
    return safe if safe.any() else np.ones_like(safe)


def gated(dataset: dsrl.Dataset, args, path, cloned: Callable = cloned) -> tuple[np.ndarray, Any]:
    """What `cloned` gives, and the arguments: if that breaks the limit, without the calibration of the gate, which would be open."""
    chosen = cloned(dataset, args, path)
    calibrates = args.gate_quantile and math.isfinite(args.cost_limit)
    if calibrates and (chosen & ~dsrl.in_safe_trajectories(dataset, args.cost_limit)).any():
        args = replace(args, gate_quantile=0.0)
        print("note: some of what is cloned breaks the limit, so the gate stays at q_thres (--gate-quantile 0)", file=sys.stderr)
    return chosen, args


def pretrain(run: Run) -> dict:
    """Phase 1: {"actor", "critics", "vae", "log_dual"} after CPQ, from the checkpoint of each seed; what is missing is made."""
    args, env = run.args, run.env
    networks, optimizers = training.make_networks(args, env), make_optimizers(args)
    limits = thresholds(args.cost_limit, args.gamma, env.horizon)
    step = partial(cpq_step, networks=networks, optimizers=optimizers, args=args, limits=limits, max_qc=run.max_qc)

    def init(key):
        params = training.init_params(key, networks, run.critic_obs_size)
        return training.init_learner(params | {"log_dual": jnp.log(jnp.float32(args.init_dual))}, optimizers)

    return training.pretrain(run, "cpq", RECIPE_VERSION, RECIPE, init, step, run.batches("data", "cloned"), networks.actor)


def main(args: Args) -> None:
    logbook.check_numbers(args, {"offline_steps": CHUNK})
    if args.eval:
        return training.replay_checkpoint(args)
    run = training.prepare(Path(__file__).stem, args, cloned=gated)
    training.finish(run, pretrain(run))


if __name__ == "__main__":
    logbook.command(main, Args, PRESETS)
