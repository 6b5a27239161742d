"""PEX-Lagrangian, policy expansion: the offline policy stays, a new policy learns beside it, and the critics choose between them per state.

Source: PEX (Zhang, Xu, Yu; arXiv 2302.00935), a baseline of Marvel (arXiv 2412.04426). The frozen policy is CPQ's actor; critics
start from CPQ's; the new policy starts from nothing and learns by SAC-Lagrangian.

    equation                                                                                   function
    offline: CPQ, as tabulated in cpq.py (--offline: another algorithm)                        finetuning.pretrain
    online: a_i ~ pi_i(.|s), i in {offline, new};  i ~ softmax((min Q - lambda Qc)(s,a_i) / T)  expanded_policy
            y_r = r + gamma (1-term.) (min_i Q'_i(s',a') + alpha h), a' of the chosen policy   pex_critic_loss
            y_c = c + gamma (1-term.) Qc'(s',a')                                               pex_critic_loss
            maximise min_i Q_i(s,a) - lambda Qc(s,a) + alpha h(s,a), a ~ the new policy        actor_loss
            (- w_a KL(new | offline) with --anchor-weight)                                     actor_loss
            lambda from the mean cost of the newest episodes                                   lagrangian.update_multiplier

Units: critics see reward * reward_scale and raw cost, so lambda counts scaled reward per unit of cost: one unit of cost
outweighs lambda / reward_scale of raw reward.

Deviations: offline those of cpq.py. Online: (1) the choice is by Q - lambda Qc, not by Q (the paper has no costs); (2) h is the
entropy of the policy that was chosen; (3) evaluations and --eval are of the expanded policy, which needs critics and multiplier;
--eval-policy mean takes both policies' mean actions, and the better of them; (4) w_a = 0 by default: the new policy is free; (5)
where the critics see more than the observation (Run), so does the policy that they choose; (6) critics and new policy learn as in
SAC, where the public code takes IQL's losses; (7) batches are of online data alone, where the public code takes half of each from
the dataset (--replay mixed); (8) the frozen policy's actions are sampled, where the public code takes their mean; (9) T is 0.1 of
scaled reward, where the public code has 0.1 of raw reward (--temperature 0.01 at a reward scale of 0.1); (10) the first updates
follow the first episodes (public code: after 5,000 steps), and evaluations choose as training does (public code: greedily but for
a tenth of the steps). The multiplier and what else the suite adds to phase 3 (marvel.py, 2 but for phase 2, 3, 4, lambda's start
in 6, 7, 8, 10 to 12, 15, 16) is as in the other files.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp

from algos import checkpoint, finetuning, logbook, policy, training
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
    temperature: float = 0.1
    """T of the choice between the two policies, in units of scaled reward (PEX: 0.1 of raw reward)"""


PRESETS = finetuning.PRESETS

# ---------------------------------------------------------------- the expanded policy


def expanded_policy(params: dict, critics, multiplier, obs, key, networks: Networks, temperature: float):
    """Action (..., a) and log-probability (...,) of the policy that Q - lambda Qc chooses per state: params["prior"] or params["actor"]."""
    keys = jax.random.split(key, 3)
    drawn = [sample_action(k, *networks.actor.apply(params[name], obs)) for k, name in zip(keys, ("prior", "actor"), strict=False)]
    actions, log_probs = (jnp.stack(x) for x in zip(*drawn, strict=True))
    both = jnp.broadcast_to(obs, (2, *obs.shape))
    q, qc = networks.q(critics, both, actions), networks.qc(critics, both, actions)
    chosen = jax.random.categorical(keys[2], (q - multiplier * qc) / temperature, axis=0)
    return jnp.where((chosen == 0)[..., None], *actions), jnp.where(chosen == 0, *log_probs)


def evaluated_policy(params: dict, multiplier, networks: Networks, args):
    """The expanded policy (obs, key) -> action as --eval-policy wants it: mean takes the better of the two mean actions."""

    def policy(obs, key):
        if args.eval_policy == "sample":
            return expanded_policy(params, params["critics"], multiplier, obs, key, networks, args.temperature)[0]
        means = jnp.stack([jnp.tanh(networks.actor.apply(params[name], obs)[0]) for name in ("prior", "actor")])
        both = jnp.broadcast_to(obs, (2, *obs.shape))
        score = networks.q(params["critics"], both, means) - multiplier * networks.qc(params["critics"], both, means)
        return jnp.where((score[0] >= score[1])[..., None], *means)

    return policy


# ---------------------------------------------------------------- losses


def pex_critic_loss(critics, params: dict, targets, multiplier, batch: Batch, key, networks: Networks, args):
    """Soft Bellman errors of both critics under the expanded policy."""
    action, log_prob = expanded_policy(params, targets, multiplier, batch.next_obs, key, networks, args.temperature)
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


def pex_step(learner: Learner, multiplier, anchor, batch: Batch, key, networks: Networks, optimizers: dict, args):
    """Phase 3: both critics under the expanded policy, then the new policy."""
    key_critic, key_actor = jax.random.split(key)
    gradient, info = jax.grad(pex_critic_loss, has_aux=True)(
        learner.params["critics"], learner.params, learner.targets, multiplier, batch, key_critic, networks, args
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
    """Phase 3: episodes of the expanded policy, multiplier, gradient steps, in turn."""
    args, networks = run.args, training.make_networks(run.args, run.env)
    new = vmap_seeds(lambda key: training.init_params(key, networks, run.critic_obs_size)["actor"])(run.keys("online"))
    start = {"actor": new, "critics": params["critics"], "prior": params["actor"]}

    def behaviour(params, multiplier, curriculum):
        expanded = lambda obs, key: expanded_policy(params, params["critics"], multiplier, obs, key, networks, args.temperature)[0]
        return lambda obs, key, elapsed: expanded(obs, key)

    evaluated = lambda params, multiplier: evaluated_policy(params, multiplier, networks, args)
    return finetuning.finetune(run, start, pex_step, behaviour, evaluated)


def replay_checkpoint(args: Args) -> None:
    """--eval: prints return and cost of a checkpoint's expanded policy, which needs its critics and multiplier."""
    assert args.eval is not None
    arrays, meta = checkpoint.load_policy(args.eval)
    if not policy.expanded(arrays, meta):
        raise logbook.BadInput(f"{args.eval}: holds no expanded policy: name a checkpoint-seed*.safetensors of a run of pex.py")
    env = training.replayed_env(args, meta, privileged=policy.load_policy(args.eval).privileged_size > 0)
    own = {"hidden": tuple(meta["config"]["hidden"]), "num_critics": meta["config"]["num_critics"]}
    later = "cost_critics cost_pessimism symlog layer_norm temperature".split()
    own |= {name: meta["config"].get(name, getattr(args, name)) for name in later}
    args = replace(args, **own)
    networks = training.make_networks(args, env)
    shapes = jax.eval_shape(lambda: training.init_params(jax.random.key(0), networks, env.obs_size + env.privileged_size))
    shapes = {k: shapes[k] for k in ("actor", "critics")} | {"prior": shapes["actor"], "multiplier": jnp.float32(0)}
    params = logbook.restore(shapes, arrays, str(args.eval))
    training.show_episodes(args, env, evaluated_policy(params, params["multiplier"], networks, args))


def main(args: Args) -> None:
    if args.eval:
        return replay_checkpoint(args)
    run = finetuning.prepare(Path(__file__).stem, args)
    params = finetuning.pretrain(run)
    params = online_phase(run, params)
    training.finish(run, params)


if __name__ == "__main__":
    logbook.command(main, Args, PRESETS)
