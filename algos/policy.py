"""A trained policy in NumPy alone, for use where JAX and the simulators are not.

    import algos

    policy = algos.load_policy("runs/SafetyPointRun/marvel/STAMP/checkpoint-seed0.safetensors")
    action = policy(obs)  # the mean action
    action = policy.sample(obs)  # a draw of the stochastic policy

It computes what networks.py and pex.py compute in JAX, in float32. Training controls the cost of the stochastic policy, and evaluations
show it by default (`eval_policy`). The mean action may cost more or less: measure it with `--eval CHECKPOINT --eval-policy mean`.
"""

import os
from pathlib import Path

import numpy as np

from algos import checkpoint
from algos.checkpoint import Arrays, BadInput


def symlog(x: np.ndarray) -> np.ndarray:
    """sign(x) log(1 + |x|), as in networks.py."""
    return np.sign(x) * np.log1p(np.abs(x))


def mlp(layers: list, x: np.ndarray, layer_norm: bool = False) -> np.ndarray:
    """ReLU network of `layers` (checkpoint.layers) on x (..., inputs); LayerNorm without scale and bias before each ReLU if asked for."""
    for kernel, bias in layers[:-1]:
        x = x @ kernel + bias[..., None, :]
        if layer_norm:
            x = x - x.mean(-1, keepdims=True)
            x = x / np.sqrt(np.square(x).mean(-1, keepdims=True) + 1e-6)
        x = np.maximum(x, 0.0)
    kernel, bias = layers[-1]
    return x @ kernel + bias[..., None, :]


class Policy:
    """The policy of a checkpoint: action = tanh(u), u ~ N(mean, std^2), both from a network of the observation.

    `load_policy` makes it.

    Attributes:
      obs_size, action_size: lengths of observation and action.
      action_low, action_high: (action_size,) float32, -1 and 1: the range of its actions, which the suite's environments take.
      env_low, env_high: (action_size,) float32, the range that the environment itself has, for `scaled`.
      env, algo, seed: the task, the algorithm and the seed of the run.
      cost_limit: d, undiscounted cost per episode, that it was trained under; inf: none.
      eval_policy: what the run's evaluations show, "sample" or "mean".
      odometer: whether the run's networks saw the odometer, on tasks that have one.
      symlog: whether the network sees sign(x) log(1 + |x|) of the observation x; inputs of the policy are x in any case.
      privileged_size: how much of the state it must be given beside the observation; 0 but for some of PEX (ExpandedPolicy).
    """

    privileged_size = 0

    def __init__(self, arrays: Arrays, meta: dict, source: str, rng: np.random.Generator, part: str = "actor"):
        config = meta["config"]
        self.source, self.rng, self.symlog = source, rng, bool(config.get("symlog", True))
        self.layers = checkpoint.layers(arrays, f"{part}/params/", source)
        hidden, outputs = [kernel.shape[-1] for kernel, _ in self.layers[:-1]], self.layers[-1][1].shape
        if any(kernel.ndim != 2 for kernel, _ in self.layers) or outputs[0] % 2 or hidden != list(config.get("hidden", hidden)):
            raise BadInput(f"{source}: its {part} does not fit the sizes in its header: name another checkpoint")
        self.obs_size, self.action_size = len(self.layers[0][0]), outputs[0] // 2
        self.action_high = np.ones(self.action_size, np.float32)
        self.action_low = -self.action_high
        bound = lambda name, usual: np.broadcast_to(np.asarray(meta.get(name, usual), np.float32), self.action_size)
        self.env_low, self.env_high = bound("action_low", self.action_low), bound("action_high", self.action_high)
        self.odometer = bool(config.get("odometer", False))
        self.env, self.algo, self.seed = meta["env"], meta.get("algo", ""), meta.get("seed")
        self.cost_limit, self.eval_policy = float(config.get("cost_limit", np.inf)), config.get("eval_policy", "sample")

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.algo} on {self.env}, seed {self.seed}: {self.obs_size} -> {self.action_size}>"

    def __call__(self, obs, privileged=None) -> np.ndarray:
        """The mean action tanh(mean), the same for the same observation.

        Args:
          obs: (obs_size,) or (n, obs_size), the task's own observation, neither scaled nor normalised. On a Run task the odometer comes
            last, if `odometer` says so: `envs.gym_make(policy.env, memory=policy.odometer)` observes both.
          privileged: (privileged_size,) or (n, privileged_size), only where `privileged_size` is not 0.

        Returns:
          (action_size,) or (n, action_size) float32 in [-1, 1].

        Raises:
          BadInput: another size, NaN or infinite numbers.
        """
        return self._act(obs, privileged, self._mean)

    def sample(self, obs, privileged=None) -> np.ndarray:
        """A draw of the stochastic policy from `rng`; arguments, result and errors as of a call."""
        return self._act(obs, privileged, self._sample)

    def scaled(self, action) -> np.ndarray:
        """An action of this policy (..., action_size) in the range of the environment itself, as `gymnasium.make` has it."""
        return (self.env_low + (np.asarray(action, np.float32) + 1) / 2 * (self.env_high - self.env_low)).astype(np.float32)

    def _act(self, obs, privileged, act) -> np.ndarray:
        rows = self._rows(obs, self.obs_size, "observation")
        seen = np.zeros((*rows.shape[:-1], 0)) if privileged is None else privileged
        seen = self._rows(seen, self.privileged_size, "privileged")
        if seen.shape[:-1] != rows.shape[:-1]:
            raise BadInput(f"{self.source}: observation has shape {rows.shape}, privileged {seen.shape}: give one row for each")
        return act(np.atleast_2d(rows), np.atleast_2d(seen)).reshape(*rows.shape[:-1], self.action_size)

    def _rows(self, x, size: int, what: str) -> np.ndarray:
        try:
            rows = np.asarray(x, np.float32)
        except (TypeError, ValueError):
            raise BadInput(f"{self.source}: {what} is not an array of numbers") from None
        if rows.ndim not in (1, 2) or rows.shape[-1] != size:
            raise BadInput(f"{self.source}: {what} has shape {rows.shape}; this policy of {self.env} takes ({size},) or (n, {size})")
        if not np.isfinite(rows).all():
            raise BadInput(f"{self.source}: {what} holds NaN or infinite numbers")
        return rows

    def _gaussian(self, obs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation (n, action_size) before tanh."""
        mean, raw = np.split(mlp(self.layers, symlog(obs) if self.symlog else obs), 2, -1)
        return mean, np.exp(-5.0 + 3.5 * (1.0 + np.tanh(raw)))

    def _mean(self, obs: np.ndarray, privileged: np.ndarray) -> np.ndarray:
        return np.tanh(self._gaussian(obs)[0])

    def _sample(self, obs: np.ndarray, privileged: np.ndarray) -> np.ndarray:
        mean, std = self._gaussian(obs)
        return np.tanh(mean + std * self.rng.standard_normal(mean.shape, np.float32))


class ExpandedPolicy(Policy):
    """PEX's policy: per observation, the critics choose between the actions of the offline policy and of the learned one (pex.py).

    A call takes both policies' mean actions, and of these the one with the higher min Q - lambda Qc. `sample` draws an action of
    each, then one of the two, with probabilities softmax((min Q - lambda Qc) / temperature).

    Critics may have been trained to see what the observation lacks (Run: x). Then `privileged_size` is not 0, and the choice cannot
    be made without it. Where it cannot be measured, `learned` and `offline` are policies of the observation alone. The run's
    evaluations are not theirs: measure their cost first.

    Attributes:
      learned, offline: the two policies.
      multiplier: lambda, scaled reward per unit of cost.
      temperature: scaled reward.
    """

    def __init__(self, arrays: Arrays, meta: dict, source: str, rng: np.random.Generator):
        super().__init__(arrays, meta, source, rng)
        config = meta["config"]
        self.learned, self.offline = (Policy(arrays, meta, source, rng, part) for part in ("actor", "prior"))
        self.reward_critics, self.cost_critics = (
            checkpoint.layers(arrays, f"critics/{name}/params/VmapCritic_0/", source) for name in ("reward", "cost")
        )
        self.layer_norm, self.cost_pessimism = bool(config.get("layer_norm", True)), float(config.get("cost_pessimism", 0.0))
        self.multiplier, self.temperature = np.float32(arrays["multiplier"].flat[0]), np.float32(config.get("temperature", 0.1))
        sizes = {layers[0][0].shape[-2] for layers in (self.reward_critics, self.cost_critics)}
        self.privileged_size = min(sizes) - self.obs_size - self.action_size
        odd = any(kernel.ndim != 3 for kernel, _ in (*self.reward_critics, *self.cost_critics)) or arrays["multiplier"].size != 1
        other = (self.offline.obs_size, self.offline.action_size) != (self.obs_size, self.action_size)
        if odd or other or len(sizes) > 1 or self.privileged_size < 0:
            raise BadInput(f"{source}: its critics do not fit its policies: name another checkpoint")

    def _act(self, obs, privileged, act) -> np.ndarray:
        if privileged is None and self.privileged_size:
            wanted = f"privileged=... ({self.privileged_size} more of the state)"
            raise BadInput(f"{self.source}: critics choose the action, and see more than the observation: give {wanted}, or use .learned")
        return super()._act(obs, privileged, act)

    def scores(self, obs: np.ndarray, privileged: np.ndarray, actions: np.ndarray) -> np.ndarray:
        """min Q - lambda Qc (2, n), scaled reward, of actions (2, n, action_size) at obs (n, obs_size), privileged (n, privileged_size)."""
        seen = np.concatenate([obs, privileged], -1)
        seen = np.broadcast_to(symlog(seen) if self.symlog else seen, (2, *seen.shape))
        x = np.concatenate([seen, actions], -1)[:, None]  # (2, 1, n, inputs), against kernels (critics, inputs, outputs)
        q = mlp(self.reward_critics, x, self.layer_norm)[..., 0].min(1)
        qcs = mlp(self.cost_critics, x, self.layer_norm)[..., 0]
        qc = qcs.mean(1)
        if qcs.shape[1] > 1:
            qc = qc + self.cost_pessimism * np.sqrt(np.maximum(qcs.var(1, ddof=1), 1e-12))
        return q - self.multiplier * qc

    def _mean(self, obs: np.ndarray, privileged: np.ndarray) -> np.ndarray:
        actions = np.stack([policy._mean(obs, privileged) for policy in (self.offline, self.learned)])
        scores = self.scores(obs, privileged, actions)
        return np.where((scores[0] >= scores[1])[:, None], *actions)

    def _sample(self, obs: np.ndarray, privileged: np.ndarray) -> np.ndarray:
        actions = np.stack([policy._sample(obs, privileged) for policy in (self.offline, self.learned)])
        scores = self.scores(obs, privileged, actions) / self.temperature
        chosen = scores[0] - scores[1] >= self.rng.logistic(size=len(obs))  # has the probability sigmoid of the difference
        return np.where(chosen[:, None], *actions)


def load_policy(path: str | os.PathLike, rng: int | np.random.Generator | None = None) -> Policy:
    """The policy of a checkpoint: a Policy, or of a run of pex.py an ExpandedPolicy.

    Args:
      path: checkpoint-seed*.safetensors of a run folder of any algorithm, an offline checkpoint, or a snapshot of sac_lag.py. Of JSRL it
        is the learner alone, as in its evaluations.
      rng: what `sample` draws from: a seed, a generator, or None for fresh entropy (as `numpy.random.default_rng`).

    Raises:
      BadInput: no file, not a checkpoint, damaged, no policy in it. One line.
    """
    path = Path(path)
    arrays, meta = checkpoint.load_policy(path)
    return (ExpandedPolicy if expanded(arrays, meta) else Policy)(arrays, meta, str(path), np.random.default_rng(rng))


def expanded(arrays: Arrays, meta: dict) -> bool:
    """Whether a checkpoint's policy is PEX's: the same arrays of another finetuner mean its actor alone."""
    return meta.get("algo") == "pex" and "multiplier" in arrays
