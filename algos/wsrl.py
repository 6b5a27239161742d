"""WSRL, warm-start RL: offline CPQ, warm-up episodes of the frozen policy, then SAC-Lagrangian on online data alone.

Source: WSRL (Zhou, Peng, Levine, Kumar; arXiv 2412.07762) and its public code. It has no costs; here it gets the suite's
multiplier. `--actor-warmup` in the other finetuners is taken from here: so their naive finetuning has one addition that the paper's lacks.

    equation                                                                                   function
    offline: CPQ, as tabulated in cpq.py (--offline: another algorithm)                        finetuning.pretrain
    warm-up: episodes of the frozen policy go to the replay; only lambda moves                 finetuning.freeze_all
    online: y_r = r + gamma (1-term.) min_{i in M} Q'_i(s',a'), M: `critic_subset` of the Q'_i  wsrl_critic_loss
            y_c = c + gamma (1-term.) Qc'(s',a')                                               wsrl_critic_loss
            maximise min_i Q_i(s,a) - lambda Qc(s,a) + alpha h(s,a), h = -log pi(a|s)          wsrl_actor_loss
            lambda from the mean cost of the newest episodes                                   lagrangian.update_multiplier

Units: critics see reward * reward_scale and raw cost, so lambda counts scaled reward per unit of cost: one unit of cost
outweighs lambda / reward_scale of raw reward.

Deviations, P from the paper, R from its code. Offline those of cpq.py. Online:
 1 (P, R) The suite's multiplier and cost critic; the paper has no costs.
 2 (P, R) Two Q (--num-critics 10, as REDQ), smaller networks, and updates as in the suite's other finetuners: --updates-per-iter of
   both critics and actor. R takes four critic steps of 256 transitions per step of the environment, and one actor step on all 1,024.
   M has distinct members, as in REDQ; R draws them with replacement.
 3 (P, R) The suite's step sizes (--actor-lr 1e-4 --critic-lr 3e-4 --actor-schedule constant --tau 0.005).
 4 (P, R) Fixed entropy weight (R: tuned to a target entropy).
 5 (P, R) What every finetuner of the suite has: marvel.py, 10, 11, 12, 13, 16, with the same switches.
The offline policy anchors nothing, as published; --anchor-weight 0.2 gives it the suite's anchor.
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
    actor_warmup: int = FinetuneArgs.actor_warmup
    """iterations of warm-up, in which the frozen policy collects and only lambda moves (WSRL: 5,000 steps of the environment)"""
    anchor_weight: float = 0.0
    """weight of KL(pi | offline policy), scaled reward per nat (WSRL: 0)"""
    critic_subset: int = 2
    """reward critics, drawn anew for each gradient step, whose minimum is the target (WSRL: 2 of 10)"""


# Marvel's release has no warm-up, which this method is.
PRESETS = finetuning.PRESETS | {"release": finetuning.RELEASE | {"*": finetuning.RELEASE["*"] | dict(actor_warmup=Args.actor_warmup)}}

# ---------------------------------------------------------------- losses


def wsrl_critic_loss(critics, actor, targets, batch: Batch, key, networks: Networks, args):
    """Bellman errors of both critics under the policy, without entropy terms (WSRL's `backup_entropy` is off)."""
    key_action, key_subset = jax.random.split(key)
    action, _ = sample_action(key_action, *networks.actor.apply(actor, batch.next_obs))
    next_qs = networks.reward.apply(targets["reward"], batch.next_obs, action)
    chosen = jax.random.choice(key_subset, args.num_critics, (min(args.critic_subset, args.num_critics),), replace=False)
    next_q, next_qc = next_qs[chosen].min(0), networks.qcs(targets, batch.next_obs, action)
    alive = args.gamma * (1.0 - batch.terminated)
    cost = batch.cost + args.termination_cost * batch.terminated
    target = args.reward_scale * batch.reward + alive * next_q
    cost_target = cost + alive * next_qc
    return networks.bellman_errors(critics, batch.obs, batch.action, target, cost_target)


def wsrl_actor_loss(actor, critics, prior, multiplier, anchor, batch: Batch, key, networks: Networks, args):
    """-(min_i Q_i - lambda Qc + entropy weight * h - anchor * KL(pi | offline policy)) of the policy's own actions."""
    mean, log_std = networks.actor.apply(actor, batch.obs)
    action, log_prob = sample_action(key, mean, log_std)
    q, qc = networks.q(critics, batch.obs, action), networks.qc(critics, batch.obs, action)
    divergence = kl_divergence(mean, log_std, *networks.actor.apply(prior, batch.obs))
    loss = jnp.mean(args.entropy_weight * log_prob + anchor * divergence - q + multiplier * qc)
    return loss, {"actor_loss": loss, "entropy": -log_prob.mean()}


# ---------------------------------------------------------------- one gradient step


def wsrl_step(learner: Learner, multiplier, anchor, batch: Batch, key, networks: Networks, optimizers: dict, args):
    """Phase 3, after the warm-up: both critics, actor."""
    key_critic, key_actor = jax.random.split(key)
    gradient, info = jax.grad(wsrl_critic_loss, has_aux=True)(
        learner.params["critics"], learner.params["actor"], learner.targets, batch, key_critic, networks, args
    )
    learner = apply_gradient(learner, optimizers, "critics", gradient)
    params, critics = learner.params, learner.params["critics"] if args.actor_critics == "online" else learner.targets
    gradient, actor_info = jax.grad(wsrl_actor_loss, has_aux=True)(
        params["actor"], critics, params["prior"], multiplier, anchor, batch, key_actor, networks, args
    )
    learner = apply_gradient(learner, optimizers, "actor", gradient)
    return update_targets(learner, args.tau), {**info, **actor_info}


# ---------------------------------------------------------------- phases


def online_phase(run: Run, params: dict) -> dict:
    """Warm-up, then episodes of the policy, multiplier, gradient steps, in turn."""
    networks = training.make_networks(run.args, run.env)
    start = {"actor": params["actor"], "critics": params["critics"], "prior": params["actor"]}
    evaluated = finetuning.of_actor(networks, run.args.eval_policy)
    return finetuning.finetune(run, start, wsrl_step, finetuning.sampled(networks), evaluated, freeze=finetuning.freeze_all)


def main(args: Args) -> None:
    if args.eval:
        return training.replay_checkpoint(args)
    run = finetuning.prepare(Path(__file__).stem, args)
    params = finetuning.pretrain(run)
    params = online_phase(run, params)
    training.finish(run, params)


if __name__ == "__main__":
    logbook.command(main, Args, PRESETS)
