"""JSRL-Lagrangian, jump-start: the offline policy plays the beginning of each episode, the learner the rest, and the learner's share grows.

Source: JSRL (Uchendu et al., arXiv 2204.02372), a baseline of Marvel (arXiv 2412.04426). The guide is CPQ's actor, frozen; the
learner is SAC-Lagrangian.

    equation                                                                                   function
    offline: CPQ, as tabulated in cpq.py (--offline: another algorithm)                        finetuning.pretrain
    online: a ~ guide(.|s) while t < share * T, then a ~ pi(.|s)                               jump_start
            share -= 1/stages after episodes as good and as safe as the guide's                advance
    online: y_r = r + gamma (1-term.) (min_i Q'_i(s',a') + alpha h), h = -log pi(a'|s')        critic_loss
            y_c = c + gamma (1-term.) Qc'(s',a')                                               critic_loss
            maximise min_i Q_i(s,a) - lambda Qc(s,a) + alpha h(s,a) - w_a KL(pi(.|s) | pi_0(.|s)) actor_loss
            lambda from the mean cost of the newest episodes                                   lagrangian.update_multiplier

Units: critics see reward * reward_scale and raw cost, so lambda counts scaled reward per unit of cost: one unit of cost
outweighs lambda / reward_scale of raw reward.

Deviations: offline those of cpq.py. Online: (1) the share also shrinks only if the episodes' cost is at most the limit or the
guide's own, or up to `tolerance` above that (the paper has no costs); (2) it is at most what a straight line from 1 to 0 over
`handover` of the iterations leaves, so that the learner always gets its turn; (3) evaluations are of the learner alone, from the
first one on; (4) w_a = 0 by default (--anchor-weight): a new learner is not held near the guide; (5) the newest batch of training
episodes is compared with the guide's first batch, where the paper compares a moving average of evaluations with the best average
so far; (6) the guide begins with the whole episode, where the paper's D4RL runs begin with the time that the guide needs to solve
the task; (7) batches are of online data alone, where those runs take a quarter from the dataset (--replay mixed: half). The
multiplier and what else the suite adds to phase 3 (marvel.py, 2 but for phase 2, 3, 4, lambda's start in 6, 7, 8, 10 to 13, 15,
16) is as in the other files.
"""

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp

from algos import finetuning, logbook, training
from algos.finetuning import FinetuneArgs
from algos.networks import Networks, kl_divergence, sample_action
from algos.seeds import vmap_seeds
from algos.training import Learner, Run, apply_gradient, update_targets
from envs.rollout import Batch


@dataclass(frozen=True)
class Args(FinetuneArgs):
    """this algorithm"""

    actor_warmup: int = 0
    """iterations in which only critics and multiplier learn (paper, release: 0)"""
    anchor_weight: float = 0.0
    """weight of KL(pi | offline policy), scaled reward per nat (paper, release: 0)"""
    learner: Literal["fresh", "pretrained"] = "fresh"
    """what the learner starts from: new networks (JSRL), or the offline actor and critics"""
    stages: int = 10
    """steps in which the guide hands over (JSRL's curriculum)"""
    tolerance: float = 0.1
    """share of the guide's return and cost by which episodes may be worse and still count as good"""
    handover: float = 0.6
    """share of the iterations after which the guide plays no more, whatever was reached"""


PRESETS = finetuning.PRESETS

# ---------------------------------------------------------------- the guide's share


class Curriculum(NamedTuple):
    """How far the guide has handed over."""

    share: jax.Array  # () of an episode's steps that the guide plays, from 1 to 0
    guide: jax.Array  # (2,) return and cost of the guide's own episodes; NaN before they were seen


def advance(curriculum: Curriculum, episodes: dict, n, args: Args) -> Curriculum:
    """The curriculum after iteration n with these (mean) `episodes`; see the table at the top."""
    outcome = jnp.stack([episodes["return"], episodes["cost"]])
    guide = jnp.where(jnp.isnan(curriculum.guide), outcome, curriculum.guide)
    good = outcome[0] >= guide[0] - args.tolerance * jnp.abs(guide[0])
    safe = outcome[1] <= jnp.maximum(args.cost_limit, (1 + args.tolerance) * guide[1])
    share = curriculum.share - jnp.where(good & safe, 1.0 / args.stages, 0.0)
    latest = 1.0 - n / (args.handover * args.iterations)
    return Curriculum(jnp.clip(share, 0.0, jnp.maximum(latest, 0.0)), guide)


def jump_start(guide, policy, share, horizon: int):
    """The policy (obs, key, elapsed) in which `guide(obs, key)` acts in the first `share` of an episode's steps, then `policy`."""

    def act(obs, key, elapsed):
        key_guide, key_policy = jax.random.split(key)
        return jnp.where((elapsed < share * horizon)[:, None], guide(obs, key_guide), policy(obs, key_policy))

    return act


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
    """Phase 3: episodes that guide and learner share, multiplier, gradient steps, in turn."""
    args, networks = run.args, training.make_networks(run.args, run.env)
    start = {"actor": params["actor"], "critics": params["critics"], "prior": params["actor"]}
    if args.learner == "fresh":
        fresh = vmap_seeds(lambda key: training.init_params(key, networks, run.critic_obs_size))(run.keys("online"))
        start |= {"actor": fresh["actor"], "critics": fresh["critics"]}
    policy = lambda actor: training.evaluated_policy(networks.actor, actor, "sample")

    def behaviour(params, multiplier, curriculum):
        return jump_start(policy(params["prior"]), policy(params["actor"]), curriculum.share, run.env.horizon)

    evaluated = finetuning.of_actor(networks, args.eval_policy)
    curriculum = vmap_seeds(lambda _: Curriculum(jnp.float32(1.0), jnp.full(2, jnp.nan, jnp.float32)))(run.roots)
    return finetuning.finetune(run, start, online_step, behaviour, evaluated, curriculum, partial(advance, args=args))


def main(args: Args) -> None:
    if args.eval:
        return training.replay_checkpoint(args)
    run = finetuning.prepare(Path(__file__).stem, args)
    params = finetuning.pretrain(run)
    params = online_phase(run, params)
    training.finish(run, params)


if __name__ == "__main__":
    logbook.command(main, Args, PRESETS)
