"""SO2-Lagrangian: offline CPQ, then online with perturbed target actions and many updates per episode.

Source: SO2 (Zhang et al.; arXiv 2312.07685), a baseline of Marvel (arXiv 2412.04426): Q-values that offline training left
noisy are smoothed by clipped noise on the target action, and learn faster by more gradient steps per environment step.

    equation                                                                                   function
    offline: CPQ, as tabulated in cpq.py (--offline: another algorithm)                        finetuning.pretrain
    online: a~ = clip(a' + clip(noise, -b, b), -1, 1), noise ~ N(0, s^2), a' ~ pi(.|s')        perturbed
            y_r = r + gamma (1-term.) (min_i Q'_i(s',a~) + alpha h), h = -log pi(a'|s')        so2_critic_loss
            y_c = c + gamma (1-term.) Qc'(s',a~)                                               so2_critic_loss
            maximise min_i Q_i(s,a) - lambda Qc(s,a) + alpha h(s,a) - w_a KL(pi(.|s) | pi_0(.|s)) actor_loss
            lambda from the mean cost of the newest episodes                                   lagrangian.update_multiplier

Units: critics see reward * reward_scale and raw cost, so lambda counts scaled reward per unit of cost: one unit of cost
outweighs lambda / reward_scale of raw reward.

Deviations: offline those of cpq.py. Online: (1) the cost critic's target action is perturbed alike, so that a cost just beside the
policy counts; (2) three times the updates of the other files (on AntRun twice, of half the batch), not the paper's ten per
environment step, which a CPU cannot afford (--updates-per-iter); (3) two critics, not an ensemble of ten; (4) batches are of online
data alone, where the public code mixes in the dataset (--replay mixed is nearest); (5) those of marvel.py that are about phase 3,
with the same switches.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

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

    updates_per_iter: int = 600
    """gradient steps per iteration (SO2: ten per environment step)"""
    noise: float = 0.3
    """standard deviation of the target action's noise (SO2: 0.3)"""
    noise_clip: float = 0.6
    """bound of that noise (SO2: 0.6)"""


SUITE = finetuning.SUITE | {"SafetyAntRun": finetuning.SUITE["SafetyAntRun"] | dict(updates_per_iter=1200, batch_size=128)}
RELEASE = finetuning.RELEASE | {"*": finetuning.RELEASE["*"] | dict(updates_per_iter=3 * finetuning.RELEASE["*"]["updates_per_iter"])}
PRESETS = {"suite": SUITE, "release": RELEASE}


# ---------------------------------------------------------------- losses


def perturbed(key, action, args: Args):
    """Actions (..., a) with clipped Gaussian noise, inside [-1, 1]."""
    noise = jnp.clip(args.noise * jax.random.normal(key, action.shape), -args.noise_clip, args.noise_clip)
    return jnp.clip(action + noise, -1.0, 1.0)


def so2_critic_loss(critics, actor, targets, batch: Batch, key, networks: Networks, args):
    """Soft Bellman errors of both critics under the policy, at perturbed target actions."""
    key_action, key_noise = jax.random.split(key)
    action, log_prob = sample_action(key_action, *networks.actor.apply(actor, batch.next_obs))
    action = perturbed(key_noise, action, args)
    next_q = networks.q(targets, batch.next_obs, action) - args.entropy_weight * log_prob
    next_qc = networks.qcs(targets, batch.next_obs, action)
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


def so2_step(learner: Learner, multiplier, anchor, batch: Batch, key, networks: Networks, optimizers: dict, args):
    """Phase 3, SAC-Lagrangian with perturbed targets: both critics, actor."""
    key_critic, key_actor = jax.random.split(key)
    gradient, info = jax.grad(so2_critic_loss, has_aux=True)(
        learner.params["critics"], learner.params["actor"], learner.targets, batch, key_critic, networks, args
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
    return finetuning.finetune(run, start, so2_step, finetuning.sampled(networks), evaluated)


def main(args: Args) -> None:
    if args.eval:
        return training.replay_checkpoint(args)
    run = finetuning.prepare(Path(__file__).stem, args)
    params = finetuning.pretrain(run)
    params = online_phase(run, params)
    training.finish(run, params)


if __name__ == "__main__":
    logbook.command(main, Args, PRESETS)
