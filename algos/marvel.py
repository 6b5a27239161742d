"""Marvel: offline CPQ -> value pre-alignment (VPA) -> online SAC-Lagrangian with an adaptive PID multiplier.

Sources: Marvel (Chen, Wei, Deng, Lin; arXiv 2412.04426) and its released code, SAC (arXiv 1812.05905). Phase 1 makes one offline
checkpoint per seed; every run with the same offline arguments and dataset takes it up.

    phase, equation                                                                            function
    1  CPQ, as tabulated in cpq.py (--offline: another algorithm)                              finetuning.pretrain
    2  y_r = r + gamma (1-term.) g (min_i Q'_i(s',a') + alpha_r h), a' ~ pi_0, h = -log pi_0   critic_loss, vpa_step
       g = 1[Qc'(s',a') + alpha_c h <= threshold], CPQ's gate                                  cpq.calibrated
       y_c = c + gamma (1-term.) (Qc'(s',a') + alpha_c h); pi_0 frozen                         critic_loss, vpa_step
    3  the same critics with alpha_r = alpha, the entropy weight, and alpha_c = 0              critic_loss, online_step
       maximise min_i Q_i(s,a) - lambda Qc(s,a) + alpha h(s,a) - w_a KL(pi(.|s) | pi_0(.|s))   actor_loss, online_step
       d' = (1 - reserve) d;  u = max(d', 1);  e = min(J_c, 2 u) - d'                          lagrangian.update_multiplier
       I <- I + f Ki e;  lambda = Kp EMA(e) + I + Kd D;  both within [0, --max-multiplier]     lagrangian.update_multiplier
       Kp *= 1 + a tanh((m-d')/u);  Ki *= 1 + b (m-d')/u;  Kd *= 1 + c s/u                     lagrangian.update_multiplier

Units: critics see reward * reward_scale and raw cost, so lambda counts scaled reward per unit of cost: one unit of cost
outweighs lambda / reward_scale of raw reward.

Deviations, P from the paper, R from the released code, each with the arguments that undo it; --preset release undoes all at once.
Those of phase 1 are in cpq.py.
 1 (R) VPA's entropy terms are per sample; the mean over the batch cannot rank actions (--vpa-entropy batch_mean).
 2 (P, R) VPA takes fewer, larger batches (--vpa-steps 20000 --vpa-batch-size 64), targets follow faster (--tau 0.005), and both critics
   have one step size, also in phase 3 (--vpa-lr, --vpa-cost-lr, --critic-lr, --cost-critic-lr: R's are those of phase 3 in both).
 3 (R) The multiplier moves once per batch of episodes (--multiplier-updates 20), as the paper says (--gain-rule release), within a bound
   (--max-multiplier inf), by larger gains (--kp, --ki, --kd 5e-6) and shorter averages (--pid-decay 0.9 --pid-delay 10, --gain-rates).
 4 (P, R) The controller aims at (1 - reserve) d: while the return still rises, lambda lags behind the cost (--reserve 0).
 5 (P, R) The online actor is anchored to the offline policy pi_0; the anchor weakens (--anchor-weight 0). Where Q is nearly flat
   around a good policy, Adam makes steps of full size out of its noise.
 6 (P, R) The online actor first waits for its critics (--actor-warmup 0), and lambda does not start at zero (--init-multiplier 0).
 7 (R) More gradient steps per episode, larger batches (--updates-per-iter 20 --batch-size 64), fewer episodes (--iterations).
 8 (R) The actor's step size falls to zero, so that the last episodes are of a policy at rest (--actor-schedule constant).
 9 (R) The actor's loss takes the online critics (--actor-critics target).
10 (P, R) symlog observations, LayerNorm critics, hidden layers of 128 (--no-symlog --no-layer-norm --hidden 256 256).
11 (P, R) Critics, never the policy, see what the cost depends on but the observation lacks (--no-privileged-critic): cpq.py, 9.
12 (P, R) A terminal step costs the critics more on AntRun (--termination-cost 0). Else a large lambda Qc would pay for falling.
13 (P, R) Evaluations sample the policy, whose cost the multiplier controls (--eval-policy mean).
14 (P, R) VPA's Q keeps CPQ's gate g (--no-vpa-gate). Without it, Q forgets that unsafe states are worth nothing.
15 (P, R) A batch of episodes counts as at most 2 u of cost, and the integral falls at a quarter (f) of its speed (--cost-clip inf
   --integral-fall 1). Costs are heavy-tailed: lambda fell to zero in quiet batches and jumped in loud ones.
16 (P, R) On the Run tasks all networks see the odometer (--no-odometer): cpq.py, 12.
17 (R) One setting for all tasks but those of finetuning.SUITE; the release has one per task (finetuning.RELEASE).
Repairs of R without a switch: time-outs never stop the bootstrap; log pi is that of a tanh-Gaussian (R: the Gaussian's part has the
wrong sign); phase 3's entropy is per sample (R: of the batch); phases start with fresh optimisers (R keeps the actor's, with the step size
of phase 1, not its table's); the multiplier's repeated updates (3) come before the gradient steps (R: one before each).
"""

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp

from algos import cpq, finetuning, logbook, training
from algos.diagnostics import rank_diagnostic
from algos.finetuning import FinetuneArgs
from algos.networks import Networks, kl_divergence, sample_action
from algos.seeds import vmap_seeds
from algos.training import CHUNK, Learner, Run, apply_gradient, update_targets
from envs.rollout import Batch


@dataclass(frozen=True)
class VPAArgs:
    """phase 2, value pre-alignment"""

    vpa_steps: int = 10_000
    """gradient steps (release: 20,000); 0 leaves phase 2 out"""
    vpa_batch_size: int = 128
    """transitions per gradient step (release: 64)"""
    vpa_lr: float = 1e-3
    """Adam step size of the reward critics (release: critic_lr)"""
    vpa_cost_lr: float | None = None
    """Adam step size of the cost critic (default: vpa_lr; release: cost_critic_lr)"""
    vpa_alpha_reward: float = 0.002
    """alpha_r, scaled reward per nat (release: 0); 0 with alpha_c = 0: plain fitted Q evaluation"""
    vpa_alpha_cost: float = 0.001
    """alpha_c < alpha_r, cost per nat (release: 0)"""
    vpa_entropy: Literal["sample", "batch_mean"] = "sample"
    """h of each action (paper), or its mean over the batch (release)"""
    vpa_gate: bool = True
    """Q keeps CPQ's gate, as if a state whose Qc' is above its threshold ended the episode (paper, release: no); not after bear_lag"""
    critics: Literal["pretrained", "fresh"] = "pretrained"
    """critics to start from (fresh: a control)"""
    rank_points: int = 32
    """starting points of the rank diagnostic before and after phase 2, of either kind; 0 leaves it out"""


@dataclass(frozen=True)
class Args(VPAArgs, FinetuneArgs):
    """this algorithm"""


RELEASE = dict(vpa_steps=20_000, vpa_batch_size=64, vpa_alpha_reward=0.0, vpa_alpha_cost=0.0, vpa_entropy="batch_mean", vpa_gate=False)
_SAME = {"critic_lr": "vpa_lr", "cost_critic_lr": "vpa_cost_lr"}  # the release's step sizes of phase 3 are those of phase 2
_TASKS = {task: values | {_SAME[k]: x for k, x in values.items() if k in _SAME} for task, values in finetuning.RELEASE.items()}
PRESETS = {"suite": finetuning.SUITE, "release": _TASKS | {"*": _TASKS["*"] | RELEASE}}


# ---------------------------------------------------------------- losses


def critic_loss(critics, actor, targets, entropy_weights, batch: Batch, key, networks: Networks, args, entropy="sample", gate=None):
    """Soft Bellman errors of both critics under the policy; `entropy_weights` = (alpha_r, alpha_c), `gate` = the threshold of g or None."""
    action, log_prob = sample_action(key, *networks.actor.apply(actor, batch.next_obs))
    log_prob = log_prob if entropy == "sample" else log_prob.mean()
    next_q = networks.q(targets, batch.next_obs, action) - entropy_weights[0] * log_prob
    next_qc = networks.qcs(targets, batch.next_obs, action) - entropy_weights[1] * log_prob
    if gate is not None:
        next_q = next_q * (networks.pessimistic(next_qc) <= gate)
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


# ---------------------------------------------------------------- one gradient step of each phase


def vpa_step(learner: Learner, batches: tuple[Batch, ...], key, networks: Networks, optimizers: dict, args, limits: tuple = ()):
    """Phase 2, value pre-alignment: both critics evaluate the frozen offline policy under the online objective.

    With --vpa-gate: minibatches of all and of safe trajectories.
    """
    params, weights = learner.params, (args.vpa_alpha_reward, args.vpa_alpha_cost)
    batch, *safe = batches
    gate = cpq.calibrated(limits, learner.targets, safe[0], networks, args)[0] if safe else None
    gradient, info = jax.grad(critic_loss, has_aux=True)(
        params["critics"], params["actor"], learner.targets, weights, batch, key, networks, args, args.vpa_entropy, gate
    )
    return update_targets(apply_gradient(learner, optimizers, "critics", gradient), args.tau), info


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


def vpa_phase(run: Run, params: dict) -> dict:
    """Phase 2, between two looks at how the critics rank; returns the parameters with pre-aligned critics."""
    args, log = run.args, run.log
    networks = training.make_networks(args, run.env)
    optimizers = {"critics": training.critic_adam(args.vpa_lr, args.vpa_cost_lr)}
    limits = cpq.thresholds(args.cost_limit, args.gamma, run.env.horizon)
    step = partial(vpa_step, networks=networks, optimizers=optimizers, args=args, limits=limits)
    names = ("data", "cloned") if args.vpa_gate and run.cloned is not None else ("data",)
    data = run.batches(*names) if args.vpa_steps else ()
    train = vmap_seeds(partial(training.train_on_dataset, step=step, batch_size=args.vpa_batch_size, steps=CHUNK), (0, None, 0))
    show = training.make_evaluator(run, lambda actor: training.evaluated_policy(networks.actor, actor, args.eval_policy))
    rank, start = rank_diagnostic(run, networks), params
    if args.critics == "fresh":
        fresh = vmap_seeds(lambda key: training.init_params(key, networks, run.critic_obs_size)["critics"])
        start = params | {"critics": fresh(run.keys("vpa"))}
    blocks, before = args.vpa_steps // CHUNK, log.steps_before("vpa")

    def block(n, carry):
        (learner,), done = carry, before + n * CHUNK
        if n == 0:
            rank("offline", learner.params["actor"], params["critics"], done)
        else:
            learner, info = train(learner, data, run.keys("vpa", n))
            log.log("vpa", "train", gradient_steps=done, env_steps=0, **info)
            log.check("vpa", learner)
            if n == blocks:
                rank("vpa", learner.params["actor"], learner.params["critics"], done)
                show("vpa", (learner.params["actor"],), done, last=True, gradient_steps=done, env_steps=0)
        return (learner,)

    learner = vmap_seeds(partial(training.init_learner, optimizers=optimizers))(start)
    return log.run("vpa", blocks, (learner,), block, CHUNK)[0].params


def online_phase(run: Run, params: dict) -> dict:
    """Phase 3: episodes of the policy, multiplier, gradient steps, in turn."""
    networks = training.make_networks(run.args, run.env)
    start = {"actor": params["actor"], "critics": params["critics"], "prior": params["actor"]}
    evaluated = finetuning.of_actor(networks, run.args.eval_policy)
    return finetuning.finetune(run, start, online_step, finetuning.sampled(networks), evaluated)


def main(args: Args) -> None:
    if args.eval:
        return training.replay_checkpoint(args)
    run = finetuning.prepare(Path(__file__).stem, args, multiples={"vpa_steps": CHUNK}, dataset=args.vpa_steps > 0)
    params = finetuning.pretrain(run)
    params = vpa_phase(run, params)
    params = online_phase(run, params)
    training.finish(run, params)


if __name__ == "__main__":
    logbook.command(main, Args, PRESETS)
