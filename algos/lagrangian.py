"""The multiplier lambda of the Lagrangian: dual ascent, PID and Marvel's adaptive PID, one update per batch of episodes.

    d' = (1 - reserve) d                      what the controller aims at
    c = mean cost of the newest batch of episodes, at most `cost_clip` max(d', 1)
    e = c - d';  P = EMA(e)
    I <- clip(I + Ki e f, 0, max_multiplier)  f: integral_fall where e < 0, else 1
    D = max(0, EMA(c) - EMA(c) `pid_delay` updates ago)
    lambda = clip(Kp P + I + Kd D, 0, max_multiplier)
    aPID, from the mean m and the standard deviation s of the last `gain_window` c:
    Kp *= 1 + a tanh((m-d')/u);  Ki *= 1 + b (m-d')/u;  Kd *= 1 + c s/u;  u = max(d', 1);  each within [K0 / gain_bound, K0 gain_bound]
Marvel's released code (--gain-rule release) has no tanh, and u = m. Its m and s are of the last `pid_delay` EMAs of c, with 0.1 added to m.
All EMAs start at 0, and D compares with 0 until there are enough of them. Here an EMA starts at its first value, and D is 0 until then.

Sources: PID-Lagrangian (Stooke, Achiam, Abbeel; arXiv 2007.03964), aPID (Marvel; arXiv 2412.04426). lambda counts scaled reward
per unit of cost. With --cost-limit inf there is no constraint: lambda is 0.
"""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp


@dataclass(frozen=True)
class LagrangianArgs:
    """multiplier"""

    lagrangian: Literal["dual", "pid", "pid10", "apid"] = "apid"
    """dual: integral only; pid: fixed gains; pid10: fixed at ten times (a control); apid: gains adapt to recent costs (Marvel)"""
    kp: float = 0.005
    """initial proportional gain, lambda per unit of episode cost (release: 5e-6, all three)"""
    ki: float = 0.002
    """initial integral gain, per multiplier update"""
    kd: float = 0.002
    """initial derivative gain"""
    reserve: float = 0.5
    """share of the cost limit that the controller leaves unused: it aims at (1 - reserve) d (Marvel: 0)"""
    init_multiplier: float = 0.2
    """lambda at the start, the integral's initial value (release: 0)"""
    max_multiplier: float = 2.0
    """upper bound of the integral and of lambda (Marvel: none; inf)"""
    cost_clip: float = 2.0
    """a batch counts as at most this many times max(d', 1), so that one costly batch does not push lambda to its bound (Marvel: inf)"""
    integral_fall: float = 0.25
    """factor on the integral's steps while the cost is below d' (Marvel: 1); below 1 it falls more slowly than it rises"""
    pid_decay: float = 0.8
    """decay of the moving averages (EMA) of error and cost (release: 0.9)"""
    pid_delay: int = 5
    """multiplier updates between the two averages that the derivative compares (release: 10)"""
    gain_rates: tuple[float, float, float] = (0.05, 0.02, 0.02)
    """a, b, c: how fast Kp, Ki, Kd adapt (apid; release: 0.05 each)"""
    gain_window: int = 5
    """multiplier updates whose costs set the gains (apid with --gain-rule paper; release: pid_delay)"""
    gain_rule: Literal["paper", "release"] = "paper"
    """where averages and derivative start (pid, too) and how gains adapt (apid): as in the paper, or as in the released code"""
    gain_bound: float = 10.0
    """apid's gains stay within this factor of the initial ones (release: 10; 1e9: none)"""
    multiplier_updates: int = 1
    """updates of the multiplier per batch of episodes, all from the same cost (release: 20, with --gain-rule release)"""


class Multiplier(NamedTuple):
    """State of the controller."""

    value: jax.Array  # () lambda
    integral: jax.Array  # ()
    error_ema: jax.Array  # ()
    cost_emas: jax.Array  # (pid_delay + 1,), newest first, NaN where not yet measured
    costs: jax.Array  # (gain_window,) newest first, NaN where not yet measured
    gains: jax.Array  # (3,) Kp, Ki, Kd


def init_multiplier(args) -> Multiplier:
    """The controller before the first episode; `args` has the fields of LagrangianArgs."""
    scale = {"dual": (0.0, 1.0, 0.0), "pid10": (10.0, 10.0, 10.0)}.get(args.lagrangian, (1.0, 1.0, 1.0))
    gains = jnp.array([args.kp, args.ki, args.kd]) * jnp.array(scale)
    start = jnp.float32(0.0 if math.isinf(args.cost_limit) else args.init_multiplier)
    unknown = jnp.float32(jnp.nan)
    first = jnp.float32(0.0) if args.gain_rule == "release" else unknown  # what an EMA starts from
    averages = jnp.full(args.pid_delay + 1, unknown).at[0].set(first)
    return Multiplier(start, start, first, averages, jnp.full(args.gain_window, unknown), gains)


def update_multiplier(m: Multiplier, cost: jax.Array, args) -> Multiplier:
    """The controller after a batch of newly ended episodes of mean cost `cost` (); see the equations above."""
    for _ in range(args.multiplier_updates):
        m = _update(m, cost, args)
    return m


def _update(m: Multiplier, cost: jax.Array, args) -> Multiplier:
    limit, decay = (1.0 - args.reserve) * args.cost_limit, args.pid_decay
    if math.isinf(args.cost_limit):  # no constraint
        return m
    cost = jnp.minimum(cost, args.cost_clip * max(limit, 1.0))
    error = cost - limit
    ema = lambda old, new: jnp.where(jnp.isnan(old), new, decay * old + (1 - decay) * new)
    error_ema = ema(m.error_ema, error)
    cost_emas = jnp.concatenate([ema(m.cost_emas[0], cost)[None], m.cost_emas[:-1]])
    costs = jnp.concatenate([cost[None], m.costs[:-1]])
    kp, ki, kd = m.gains
    change = ki * error * jnp.where(error < 0, args.integral_fall, 1.0)
    integral = jnp.clip(m.integral + change, 0.0, args.max_multiplier)
    before = jnp.where(jnp.isnan(cost_emas[-1]), 0.0 if args.gain_rule == "release" else cost_emas[0], cost_emas[-1])
    derivative = jnp.maximum(0.0, cost_emas[0] - before)
    value = jnp.clip(kp * error_ema + integral + kd * derivative, 0.0, args.max_multiplier)
    gains = m.gains
    if args.lagrangian == "apid":
        initial, (a, b, c) = init_multiplier(args).gains, args.gain_rates
        if args.gain_rule == "paper":
            mean, std, unit = jnp.nanmean(costs), jnp.nanstd(costs), max(limit, 1.0)
            factors = 1 + a * jnp.tanh((mean - limit) / unit), 1 + b * (mean - limit) / unit, 1 + c * std / unit
        else:
            mean, std = jnp.nanmean(cost_emas[:-1]) + 0.1, jnp.nanstd(cost_emas[:-1])
            factors = 1 + a * (mean - limit) / mean, 1 + b * (mean - limit) / mean, 1 + c * std / mean
        gains = jnp.clip(gains * jnp.stack(factors), initial / args.gain_bound, initial * args.gain_bound)
    return Multiplier(value, integral, error_ema, cost_emas, costs, gains)
