"""Naive offline-to-online: offline CPQ, then its actor and critics straight into SAC-Lagrangian ("warm start").

Source: the baseline of Marvel (arXiv 2412.04426) that shows what value pre-alignment is for. Equal to
`marvel.py --vpa-steps 0 --lagrangian dual --rank-points 0` to the bit; `diff algos/naive_o2o.py algos/marvel.py` shows the method.

    equation                                                                                   function
    offline: CPQ, as tabulated in cpq.py (--offline: another algorithm)                        finetuning.pretrain
    online: y_r = r + gamma (1-term.) (min_i Q'_i(s',a') + alpha h), h = -log pi(a'|s')        critic_loss
            y_c = c + gamma (1-term.) Qc'(s',a')                                               critic_loss
            maximise min_i Q_i(s,a) - lambda Qc(s,a) + alpha h(s,a) - w_a KL(pi(.|s) | pi_0(.|s)) actor_loss
            lambda from the mean cost of the newest episodes                                   lagrangian.update_multiplier

Units: critics see reward * reward_scale and raw cost, so lambda counts scaled reward per unit of cost: one unit of cost
outweighs lambda / reward_scale of raw reward.

Deviations: offline those of cpq.py. Online those of marvel.py that are about phase 3, with the same switches; and the plain
multiplier (dual ascent) by default: the paper gives its adaptive PID to every baseline, as --lagrangian apid does here.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp

from algos import finetuning, logbook, training
from algos.finetuning import FinetuneArgs
from algos.networks import Networks, kl_divergence, sample_action
from algos.training import Learner, Run, apply_gradient, update_targets
from envs.rollout import Batch


@dataclass(frozen=True)
class Args(FinetuneArgs):
    """this algorithm"""

    lagrangian: Literal["dual", "pid", "pid10", "apid"] = "dual"
    """dual: integral only; pid: fixed gains; pid10: fixed at ten times (a control); apid: gains adapt to recent costs (Marvel)"""


PRESETS = finetuning.PRESETS

# ---------------------------------------------------------------- losses


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


def online_step(learner: Learner, multiplier, anchor, batch: Batch, key, networks: Networks, optimizers: dict, args):
    """Phase 3, SAC-Lagrangian: both critics, actor."""
    key_critic, key_actor = jax.random.split(key)
    gradient, info = jax.grad(critic_loss, has_aux=True)(
        learner.params["critics"], learner.params["actor"], learner.targets, (args.entropy_weight, 0.0), batch, key_critic, networks, args
    )
    learner = apply_gradient(learner, optimizers, "critics", gradient)
    params, critics = learner.params, learner.params["critics"] if args.actor_critics == "online" else learner.targets
    gradient, actor_info = jax.grad(actor_loss, has_aux=True)(
        params["actor"], critics, params["prior"], multiplier, anchor, batch, key_actor, networks, args
    )
    learner = apply_gradient(learner, optimizers, "actor", gradient)
    return update_targets(learner, args.tau), {**info, **actor_info}


# ---------------------------------------------------------------- phases


def online_phase(run: Run, params: dict) -> dict:
    """Phase 3: episodes of the policy, multiplier, gradient steps, in turn."""
    networks = training.make_networks(run.args, run.env)
    start = {"actor": params["actor"], "critics": params["critics"], "prior": params["actor"]}
    evaluated = finetuning.of_actor(networks, run.args.eval_policy)
    return finetuning.finetune(run, start, online_step, finetuning.sampled(networks), evaluated)


def main(args: Args) -> None:
    if args.eval:
        return training.replay_checkpoint(args)
    run = finetuning.prepare(Path(__file__).stem, args)
    params = finetuning.pretrain(run)
    params = online_phase(run, params)
    training.finish(run, params)


if __name__ == "__main__":
    logbook.command(main, Args, PRESETS)
