"""SAC-Lagrangian from scratch: no offline data. A baseline, and the trainer of the datasets' behaviour policies.

Per block: `steps_per_block` steps in `num_envs` parallel environments with the stochastic policy into the replay buffer
(`collect`), then `updates_per_block` gradient steps (`online_step`); whenever `episodes_per_iter` more episodes have ended,
one update of the multiplier from their mean cost.

    equation                                                                                 function
    a = tanh(u), u ~ N(mu(s), sigma(s)); log pi(a|s) = log N(u) - sum log(1 - tanh(u)^2)     networks.sample_action
    y_r = r + gamma (1-terminated) (min_i Q'_i(s',a') - alpha log pi(a'|s'))                 critic_loss
    y_c = c + gamma (1-terminated) Qc'(s',a')                                                critic_loss
    maximise min_i Q_i(s,a) - lambda Qc(s,a) - alpha log pi(a|s)                             actor_loss
    alpha >= 0: dual variable of  E[-log pi] >= target entropy                               temperature_loss
    lambda from the mean cost of the newest episodes                                         lagrangian.update_multiplier

Sources: SAC (arXiv 1812.05905), PID-Lagrangian (arXiv 2007.03964), adaptive gains (Marvel, arXiv 2412.04426).
Units: critics see reward * reward_scale and raw cost, so lambda counts scaled reward per unit of cost: one unit of cost
outweighs lambda / reward_scale of raw reward.

Deviations: (1) symlog observations and LayerNorm critics; (2) the multiplier moves once per batch of newly ended episodes,
never twice on the same costs; (3) the critics, never the policy, see what the cost depends on but the observation lacks (Run's
x): without it the one-step targets of Qc say nothing of where a heading leads; (4) --termination-cost charges dying (data
collection); (5) lambda rises slowly, by fixed gains: if it exceeds the scaled reward of a step of running before the policy has
learnt to run, standing still is best, and stays so (PointRun, adaptive gains from kp 0.001, ki 0.0001, bound 10: return -4
after 250,000 steps, seeds 0 to 2); (6) it aims at half of the limit (--reserve 0); (7) the target entropy is -0.5 per action
dimension (SAC: -1), there are fewer updates per step, and the actor's step size falls to zero; (8) the actor's loss is not
divided by 1 + lambda (the public code of the PID-Lagrangian does that); (9) smaller networks (--hidden 256 256), and on the Run
tasks all of them see the odometer (--no-odometer; cpq.py, 12).
"""

import math
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import optax

from algos import logbook, training
from algos.lagrangian import LagrangianArgs, Multiplier, init_multiplier, update_multiplier
from algos.networks import Networks, sample_action
from algos.seeds import vmap_seeds
from algos.training import EvalArgs, Learner, NetworkArgs, Run, RunArgs, apply_gradient, update_targets
from data.replay import Replay, empty_replay, insert, sample_recent
from envs.rollout import Batch, Episodes, collect, start_rollout


@dataclass(frozen=True)
class OnlineArgs:
    """online"""

    env_steps: int = 400_000
    """online steps per seed, over all environments: whole blocks, rounded down"""
    num_envs: int = 5
    """parallel environments per seed"""
    steps_per_block: int = 50
    """steps in each environment between two rounds of gradient steps"""
    updates_per_block: int = 48
    """gradient steps per block"""
    buffer_size: int = 1_000_000
    """replay capacity, transitions: whole blocks, at least one"""
    batch_size: int = 128
    """transitions per gradient step"""
    actor_lr: float = 5e-4
    """Adam step size of the actor, falling to zero as a cosine"""
    critic_lr: float = 5e-4
    """Adam step size, both critics"""
    temperature_lr: float = 5e-4
    """Adam step size of log alpha"""
    entropy_per_action: float = -0.5
    """target entropy per action dimension, nats"""
    init_temperature: float = 0.1
    """alpha at the start, scaled reward per nat"""
    episodes_per_iter: int = 5
    """episodes per update of the multiplier (Marvel: 5)"""
    evals: int = 10
    """evaluations, evenly spaced, the last at the end, and one more before the first step"""
    snapshots: bool = False
    """save the policy at every evaluation (data collection)"""


@dataclass(frozen=True)
class Args(EvalArgs, OnlineArgs, LagrangianArgs, NetworkArgs, RunArgs):
    """defaults of its own"""

    env: str = "SafetyPointRun"
    """task: a name of envs.TASKS, a Safety-Gymnasium id, or module:id, an environment of your own (envs/README.md)"""
    tau: float = 0.005
    """rate of the target critics' moving average"""
    lagrangian: Literal["dual", "pid", "pid10", "apid"] = "pid"
    """dual: integral only; pid: fixed gains; pid10: fixed at ten times (a control); apid: gains adapt to recent costs (Marvel)"""
    kp: float = 0.0001
    """initial proportional gain, lambda per unit of episode cost"""
    ki: float = 0.00003
    """integral gain per multiplier update"""
    kd: float = 0.0
    """initial derivative gain"""
    init_multiplier: float = 0.0
    """lambda at the start, the integral's initial value"""
    cost_clip: float = math.inf
    """a batch of episodes counts as at most this many times d'; inf: as it is"""
    integral_fall: float = 1.0
    """how fast the integral falls, in units of how fast it rises"""
    max_multiplier: float = 2.0
    """upper bound of the integral and of lambda"""


# ---------------------------------------------------------------- losses


def critic_loss(critics, params: dict, targets, batch: Batch, key, networks: Networks, args):
    """Soft Bellman errors of both critics under the policy."""
    action, log_prob = sample_action(key, *networks.actor.apply(params["actor"], batch.next_obs))
    entropy_bonus = -jnp.exp(params["log_alpha"]) * log_prob
    next_q = networks.q(targets, batch.next_obs, action) + entropy_bonus
    next_qc = networks.qcs(targets, batch.next_obs, action)
    alive = args.gamma * (1.0 - batch.terminated)
    cost = batch.cost + args.termination_cost * batch.terminated
    target = args.reward_scale * batch.reward + alive * next_q
    cost_target = cost + alive * next_qc
    return networks.bellman_errors(critics, batch.obs, batch.action, target, cost_target)


def actor_loss(actor, params: dict, multiplier, batch: Batch, key, networks: Networks):
    """-(min_i Q_i - lambda Qc - alpha log pi) of the policy's own actions."""
    action, log_prob = sample_action(key, *networks.actor.apply(actor, batch.obs))
    q, qc = networks.q(params["critics"], batch.obs, action), networks.qc(params["critics"], batch.obs, action)
    loss = jnp.mean(jnp.exp(params["log_alpha"]) * log_prob - q + multiplier * qc)
    return loss, {"actor_loss": loss, "entropy": -log_prob.mean()}


def temperature_loss(log_alpha, entropy, target_entropy):
    """Raises alpha while the policy's entropy is below its target."""
    return log_alpha * jax.lax.stop_gradient(entropy - target_entropy)


# ---------------------------------------------------------------- one gradient step


def online_step(learner: Learner, multiplier, batch: Batch, key, networks: Networks, optimizers: dict, args):
    """SAC-Lagrangian: both critics, actor, temperature."""
    key_critic, key_actor = jax.random.split(key)
    gradient, info = jax.grad(critic_loss, has_aux=True)(
        learner.params["critics"], learner.params, learner.targets, batch, key_critic, networks, args
    )
    learner = apply_gradient(learner, optimizers, "critics", gradient)
    gradient, actor_info = jax.grad(actor_loss, has_aux=True)(
        learner.params["actor"], learner.params, multiplier, batch, key_actor, networks
    )
    learner = apply_gradient(learner, optimizers, "actor", gradient)
    target_entropy = args.entropy_per_action * networks.actor.action_size
    gradient = jax.grad(temperature_loss)(learner.params["log_alpha"], actor_info["entropy"], target_entropy)
    learner = apply_gradient(learner, optimizers, "log_alpha", gradient)
    return update_targets(learner, args.tau), {**info, **actor_info}


# ---------------------------------------------------------------- one block


def train_online(
    learner: Learner, multiplier: Multiplier, replay: Replay, pending: Episodes, new: Batch, ended: Episodes, key, step, args: Args
):
    """Inserts what was collected, moves the multiplier if enough episodes have ended, takes `updates_per_block` steps."""
    replay = insert(replay, jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), new))
    pending = jax.tree.map(jnp.add, pending, ended)
    due = pending.number >= args.episodes_per_iter
    moved = update_multiplier(multiplier, pending.means()["cost"], args)
    multiplier = jax.tree.map(partial(jnp.where, due), moved, multiplier)
    pending = jax.tree.map(lambda x: jnp.where(due, 0.0, x), pending)

    def one(learner, key):
        key_batch, key_step = jax.random.split(key)
        return step(learner, multiplier.value, sample_recent(key_batch, replay, args.batch_size), key_step)

    learner, info = jax.lax.scan(one, learner, jax.random.split(key, args.updates_per_block))
    return learner, multiplier, replay, pending, jax.tree.map(jnp.mean, info)


# ---------------------------------------------------------------- phase


def make_optimizers(args: Args) -> dict:
    """One Adam per entry of the learner's parameters; the actor's step size falls to zero."""
    blocks = args.env_steps // (args.num_envs * args.steps_per_block)
    rates = {"actor": training.step_size(args.actor_lr, "cosine", blocks * args.updates_per_block)}
    rates |= {"critics": args.critic_lr, "log_alpha": args.temperature_lr}
    return {name: optax.adam(rate) for name, rate in rates.items()}


def online_phase(run: Run) -> dict:
    """The only phase: steps, multiplier, gradient steps, in turn."""
    args, log, env = run.args, run.log, run.env
    networks, optimizers = training.make_networks(args, env), make_optimizers(args)
    per_block = args.num_envs * args.steps_per_block
    blocks = args.env_steps // per_block
    capacity = min(max(1, args.buffer_size // per_block), blocks) * per_block
    policy = lambda actor: training.evaluated_policy(networks.actor, actor, "sample")
    behaviour = lambda actor: lambda obs, key, elapsed: policy(actor)(obs, key)
    gather = vmap_seeds(lambda actor, rollout, key: collect(rollout, behaviour(actor), key, env, args.steps_per_block))
    step = partial(online_step, networks=networks, optimizers=optimizers, args=args)
    train = vmap_seeds(partial(train_online, step=step, args=args), donate_argnums=(0, 2))
    show = training.make_evaluator(run, lambda actor: training.evaluated_policy(networks.actor, actor, args.eval_policy))

    def start(key_init, key_collect):
        params = training.init_params(key_init, networks, run.critic_obs_size)
        params = {"actor": params["actor"], "critics": params["critics"], "log_alpha": jnp.log(jnp.float32(args.init_temperature))}
        replay = empty_replay(capacity, run.critic_obs_size, env.action_size)
        rollout = start_rollout(key_collect, env, args.num_envs)
        return training.init_learner(params, optimizers), init_multiplier(args), replay, Episodes(*jnp.zeros(4)), rollout

    evaluate_after = training.evaluation_blocks(blocks, args.evals) | {0}

    def block(n, carry):
        learner, multiplier, replay, pending, rollout = carry
        steps = {"gradient_steps": n * args.updates_per_block, "env_steps": n * per_block}
        if n:
            rollout, new, ended = gather(learner.params["actor"], rollout, run.keys("collect", n))
            learner, multiplier, replay, pending, info = train(learner, multiplier, replay, pending, new, ended, run.keys("online", n))
            kp, ki, kd = multiplier.gains.T
            log.log("online", "train", **steps, **ended.means(), multiplier=multiplier.value, kp=kp, ki=ki, kd=kd, **info)
            log.check("online", learner)
        if n in evaluate_after:
            show("online", (learner.params["actor"],), n, n == blocks, **steps, multiplier=multiplier.value)
            if args.snapshots:
                names = [f"snapshot-seed{seed}-{n * per_block:08d}.safetensors" for seed in log.seeds]
                log.save_seeds([log.folder / name for name in names], {"actor": learner.params["actor"]})
        return learner, multiplier, replay, pending, rollout

    carry = vmap_seeds(start)(run.keys("init"), run.keys("collect"))
    return log.run("online", blocks, carry, block, per_block)[0].params


def main(args: Args) -> None:
    logbook.check_numbers(args)
    if args.env_steps < args.num_envs * args.steps_per_block:
        raise logbook.BadInput(f"--env-steps {args.env_steps}: must be at least --num-envs * --steps-per-block")
    if args.eval:
        return training.replay_checkpoint(args)
    run = training.prepare(Path(__file__).stem, args, dataset=False)
    training.finish(run, online_phase(run))


if __name__ == "__main__":
    logbook.command(main, Args)
