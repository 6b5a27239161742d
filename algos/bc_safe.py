"""BC-Safe: behaviour cloning of the dataset's safe trajectories. Offline only, no critics.

Source: the baseline of that name in OSRL and Marvel (arXiv 2412.04426).

    equation                                                                                  function
    maximise log pi(a|s) over the chosen trajectories' (s, a)                                 bc_loss
    safe: undiscounted cost <= d;  best, frontier: see `cloned`                               cloned

Deviations from OSRL: (1) the likelihood of a tanh-Gaussian policy, not the squared error of a deterministic one, so that the
policy is as stochastic as the data; (2) the frontier is read off the data, not off a fitted polynomial, and the band is below
it, a share of the returns at that cost or less; (3) an unfinished last trajectory never counts as safe, as its cost is not
known (OSRL: always); (4) as in cpq.py, with the same switches: symlog, smaller networks, fewer and smaller steps, the falling
step size (7, 8), the odometer (12).
"""

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
import optax

from algos import logbook, training
from algos.networks import Actor, log_probability
from algos.training import CHUNK, ActorArgs, EvalArgs, Learner, OfflineArgs, Run, RunArgs, apply_gradient
from data import dsrl
from envs.rollout import Batch


@dataclass(frozen=True)
class CloningArgs(OfflineArgs):
    """phase 1, BC-Safe"""

    data: Literal["safe", "best", "all", "frontier"] = "safe"
    """trajectories to clone: within the cost limit; the best of these, as CPQ does; all; near the best return at their cost or less"""
    frontier: float = 0.8
    """with --data frontier: least return, as a share of the way from the dataset's worst to the best at that cost or less"""


@dataclass(frozen=True)
class Args(EvalArgs, CloningArgs, ActorArgs, RunArgs):
    """this algorithm"""

    cloning_quantile: float = 0.75
    """with --data best: clone the safe trajectories whose return is at or above this quantile of theirs"""


PRESETS: dict[str, dict] = {  # per task, as phase 1 of `--offline bc_safe` has them
    "suite": {"SafetyAntRun": dict(offline_actor_lr=3e-3, final_eval_rounds=10), "SafetyCarRun": dict(cloning_quantile=0.25)}
}
RECIPE_VERSION = 1  # raise it when the same arguments give another policy or other critics (tests/test_recipes.py)
RECIPE = training.COMMON_RECIPE + ["data", "frontier", "cloning_quantile"]

# ---------------------------------------------------------------- loss


def bc_loss(params, batch: Batch, actor: Actor):
    """Negative log-likelihood of the batch's actions."""
    loss = -jnp.mean(log_probability(batch.action, *actor.apply(params, batch.obs)))
    return loss, {"actor_loss": loss}


def cloned(dataset: dsrl.Dataset, args, path) -> np.ndarray:
    """(N,) bool: the transitions to clone (--data).

    best: what CPQ clones beside its Q: `dsrl.in_safe_trajectories` above `cloning_quantile`.
    frontier: complete trajectories whose return reaches worst + `frontier` * (best - worst), best being the highest return among
    trajectories that cost no more, and worst the lowest of all: near the Pareto front of return and cost, at any cost.
    """
    split = dsrl.episodes(dataset)
    if args.data == "all":
        chosen = np.ones(len(split.returns), bool)
    elif args.data == "safe":
        chosen = split.safe(args.cost_limit)
    elif args.data == "best":
        chosen = dsrl.in_safe_trajectories(dataset, args.cost_limit, args.cloning_quantile)
    else:
        worst = split.returns[split.complete].min(initial=np.inf)
        as_cheap = split.complete & (split.costs[None, :] <= split.costs[:, None])
        best = np.max(np.where(as_cheap, split.returns[None, :], -np.inf), 1)
        chosen = split.complete & (split.returns >= worst + args.frontier * (best - worst))
    if not chosen.any():
        raise logbook.BadInput(f"{path}: no trajectory with cost <= {args.cost_limit:g} to clone: raise --cost-limit")
    return chosen if args.data == "best" else np.repeat(chosen, split.lengths.astype(np.int64))


def alone(dataset: dsrl.Dataset, args, path) -> tuple[np.ndarray, Any]:
    """What is cloned, and the arguments as they are: as no gate follows."""
    return cloned(dataset, args, path), args


# ---------------------------------------------------------------- one gradient step


def bc_step(learner: Learner, batches: tuple[Batch], key, actor: Actor, optimizers: dict):
    """One step up the likelihood; `key` is not needed."""
    (batch,) = batches
    gradient, info = jax.grad(bc_loss, has_aux=True)(learner.params["actor"], batch, actor)
    return apply_gradient(learner, optimizers, "actor", gradient), info


# ---------------------------------------------------------------- phase


def pretrain(run: Run) -> dict:
    """Phase 1: {"actor"} after cloning, from the checkpoint of each seed; what is missing is made."""
    args, env = run.args, run.env
    actor = Actor(args.hidden, env.obs_size, env.action_size, args.symlog)
    optimizers = {"actor": optax.adam(training.step_size(args.offline_actor_lr, args.offline_actor_schedule, args.offline_steps))}
    init = lambda key: training.init_learner({"actor": actor.init(key, jnp.zeros(env.obs_size))}, optimizers)
    step = partial(bc_step, actor=actor, optimizers=optimizers)
    return training.pretrain(run, "bc_safe", RECIPE_VERSION, RECIPE, init, step, run.batches("cloned"), actor)


def main(args: Args) -> None:
    logbook.check_numbers(args, {"offline_steps": CHUNK})
    if args.eval:
        return training.replay_checkpoint(args)
    run = training.prepare(Path(__file__).stem, args, cloned=alone)
    training.finish(run, pretrain(run))


if __name__ == "__main__":
    logbook.command(main, Args, PRESETS)
