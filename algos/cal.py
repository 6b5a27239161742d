"""CAL, conservative augmented Lagrangian, from an offline checkpoint: offline CPQ, then CAL online.

Source: CAL (Wu et al., "Off-policy primal-dual safe reinforcement learning"; arXiv 2401.14758) and its public code, which know no
offline phase.

    equation                                                                                   function
    offline: CPQ with an ensemble of cost critics, as tabulated in cpq.py                      finetuning.pretrain
    online: y_r = r + gamma (1-term.) (min_i Q'_i(s',a') + alpha h), h = -log pi(a'|s')        critic_loss
            y_ci = c + gamma (1-term.) Qc'_i(s',a')                                            critic_loss
            Qc = mean_i Qc_i + k std_i Qc_i                                                    networks.pessimistic
            w = max(0, lambda + kappa (E_batch Qc - q_d)), q_d = d' (1-gamma^T)/(1-gamma)/T    rectified
            maximise min_i Q_i(s,a) - w Qc(s,a) + alpha h(s,a) - w_a KL(pi(.|s) | pi_0(.|s))   actor_loss
            log lambda descends lambda (q_d - E_batch Qc), one step of Adam per gradient step  multiplier_loss

The multiplier follows the cost critic, at every gradient step, not the costs of the newest episodes: the noise of five episodes
does not reach it, an error of the critic does. E_batch Qc is of replayed actions: it lags behind the policy. The controller of
lagrangian.py has no effect here, but for d' = (1 - reserve) d. The column `multiplier` is w.

Units: critics see reward * reward_scale and raw cost, so lambda counts scaled reward per unit of cost: one unit of cost
outweighs lambda / reward_scale of raw reward. --init-multiplier and --rectification are per raw reward, as CAL's, and multiplied by
reward_scale.

Deviations, P from the paper, R from its code. Offline those of cpq.py. Online those of marvel.py that are about phase 3, with the
same switches, the multiplier excepted; and
 1 (P, R) A state's end stops the bootstrap of costs as of rewards; R lets costs go on through it on Safety-Gym's tasks.
 2 (R) The suite's number of updates (ten a step of the environment), batches (12), step sizes (3e-4 for all) and targets (0.005 of the way,
   every second update). R's numbers here and below are those of Safety-Gym's tasks; on MuJoCo's, kappa, the number of critics and k differ.
 3 (R) A fixed entropy weight (tuned to an entropy of -|a|).
"""

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import optax

from algos import cpq, finetuning, logbook, training
from algos.finetuning import FinetuneArgs
from algos.networks import Networks, kl_divergence, sample_action
from algos.training import Learner, Run, apply_gradient, update_targets
from envs.rollout import Batch


@dataclass(frozen=True)
class Args(FinetuneArgs):
    """this algorithm"""

    cost_critics: int = 4
    """cost critics; Qc is their mean, plus `cost_pessimism` times their standard deviation (CAL: 4 on Safety-Gym)"""
    lagrangian: Literal["dual", "pid", "pid10", "apid"] = "apid"
    """no effect here: CAL's multiplier is its own. Of this controller's arguments, only reserve and init_multiplier have one"""
    init_multiplier: float = 0.7
    """lambda at the start, raw reward per unit of cost (CAL: 0.69)"""
    multiplier_lr: float = 3e-4
    """Adam step size of log lambda (CAL: 3e-4)"""
    rectification: float = 10.0
    """kappa, raw reward per squared unit of cost (CAL: 10 on Safety-Gym); 0: lambda alone"""


# The others' release starts from lambda = 0, which log lambda cannot.
PRESETS = finetuning.PRESETS | {"release": finetuning.RELEASE | {"*": finetuning.RELEASE["*"] | dict(init_multiplier=Args.init_multiplier)}}

# ---------------------------------------------------------------- losses


def rectified(multiplier, qc, threshold, args):
    """w (): lambda plus kappa times the excess of E Qc () over q_d, at least 0."""
    return jnp.maximum(0.0, multiplier + args.reward_scale * args.rectification * (qc - threshold))


def multiplier_loss(log_multiplier, qc, threshold):
    """Raises log lambda while E Qc () is above q_d."""
    return jnp.exp(log_multiplier) * jax.lax.stop_gradient(threshold - qc)


def critic_loss(critics, actor, targets, entropy_weights, batch: Batch, key, networks: Networks, args):
    """Soft Bellman errors of both critics under the policy; `entropy_weights` = (alpha_r, alpha_c)."""
    action, log_prob = sample_action(key, *networks.actor.apply(actor, batch.next_obs))
    next_q = networks.q(targets, batch.next_obs, action) - entropy_weights[0] * log_prob
    next_qc = networks.qcs(targets, batch.next_obs, action) - entropy_weights[1] * log_prob
    alive = args.gamma * (1.0 - batch.terminated)
    cost = batch.cost + args.termination_cost * batch.terminated
    target = args.reward_scale * batch.reward + alive * next_q
    cost_target = cost + alive * next_qc
    return networks.bellman_errors(critics, batch.obs, batch.action, target, cost_target)


def actor_loss(actor, critics, prior, multiplier, anchor, batch: Batch, key, networks: Networks, args):
    """-(min_i Q_i - lambda Qc + entropy weight * h - anchor * KL(pi | offline policy)) of the policy's own actions."""
    mean, log_std = networks.actor.apply(actor, batch.obs)
    action, log_prob = sample_action(key, mean, log_std)
    q, qc = networks.q(critics, batch.obs, action), networks.qc(critics, batch.obs, action)
    divergence = kl_divergence(mean, log_std, *networks.actor.apply(prior, batch.obs))
    loss = jnp.mean(args.entropy_weight * log_prob + anchor * divergence - q + multiplier * qc)
    return loss, {"actor_loss": loss, "entropy": -log_prob.mean()}


# ---------------------------------------------------------------- one gradient step


def cal_step(learner: Learner, _, anchor, batch: Batch, key, networks: Networks, optimizers: dict, args, threshold: float):
    """Phase 3: all critics, actor, multiplier; the controller's multiplier is not used."""
    key_critic, key_actor = jax.random.split(key)
    gradient, info = jax.grad(critic_loss, has_aux=True)(
        learner.params["critics"], learner.params["actor"], learner.targets, (args.entropy_weight, 0.0), batch, key_critic, networks, args
    )
    learner = apply_gradient(learner, optimizers, "critics", gradient)
    params, critics = learner.params, learner.params["critics"] if args.actor_critics == "online" else learner.targets
    expected = networks.qc(critics, batch.obs, batch.action).mean()
    unconstrained = cpq.unconstrained(threshold)
    weight = jnp.float32(0) if unconstrained else rectified(jnp.exp(params["log_multiplier"]), expected, threshold, args)
    gradient, actor_info = jax.grad(actor_loss, has_aux=True)(
        params["actor"], critics, params["prior"], weight, anchor, batch, key_actor, networks, args
    )
    learner = apply_gradient(learner, optimizers, "actor", gradient)
    if not unconstrained:
        gradient = jax.grad(multiplier_loss)(params["log_multiplier"], expected, threshold)
        learner = apply_gradient(learner, optimizers, "log_multiplier", gradient)
    return update_targets(learner, args.tau), {**info, **actor_info, "multiplier": weight}


# ---------------------------------------------------------------- phases


def online_phase(run: Run, params: dict) -> dict:
    """Phase 3: episodes of the policy and gradient steps, in turn."""
    args, networks = run.args, training.make_networks(run.args, run.env)
    start = {"actor": params["actor"], "critics": params["critics"], "prior": params["actor"]}
    start["log_multiplier"] = jnp.full(run.roots.shape, jnp.log(args.init_multiplier * args.reward_scale), jnp.float32)
    threshold, _ = cpq.thresholds((1 - args.reserve) * args.cost_limit, args.gamma, run.env.horizon)
    step = partial(cal_step, threshold=threshold)
    evaluated = finetuning.of_actor(networks, args.eval_policy)
    optimizers = {"log_multiplier": optax.adam(args.multiplier_lr)}
    params = finetuning.finetune(run, start, step, finetuning.sampled(networks), evaluated, optimizers=optimizers)
    multiplier = jnp.zeros(run.roots.shape) if cpq.unconstrained(threshold) else jnp.exp(params["log_multiplier"])
    return params | {"multiplier": multiplier}  # the controller's is not used


def main(args: Args) -> None:
    if args.eval:
        return training.replay_checkpoint(args)
    if args.init_multiplier == 0:
        raise logbook.BadInput(f"--init-multiplier {args.init_multiplier}: must be positive: CAL learns its logarithm")
    run = finetuning.prepare(Path(__file__).stem, args)
    params = finetuning.pretrain(run)
    params = online_phase(run, params)
    training.finish(run, params)


if __name__ == "__main__":
    logbook.command(main, Args, PRESETS)
