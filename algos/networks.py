"""The networks that every algorithm is built from, and the densities of their outputs: policy, critic ensemble, VAE.

`obs_size` is the length of the observation; critics may be given more (what the cost depends on but the observation lacks,
behind the first `obs_size` entries), policies and VAE never look at it.
"""

import functools
from typing import NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp


def symlog(x: jax.Array) -> jax.Array:
    """sign(x) log(1 + |x|): compresses contact spikes (accelerations of 100 m/s^2) and needs no running statistics."""
    return jnp.sign(x) * jnp.log1p(jnp.abs(x))


class Actor(nn.Module):
    """obs (..., o) -> mean and log standard deviation (..., a) of the Gaussian before tanh."""

    hidden: tuple[int, ...]
    obs_size: int
    action_size: int
    symlog: bool = True

    @nn.compact
    def __call__(self, obs):
        x = obs[..., : self.obs_size]
        x = symlog(x) if self.symlog else x
        for width in self.hidden:
            x = nn.relu(nn.Dense(width)(x))
        mean, raw = jnp.split(nn.Dense(2 * self.action_size)(x), 2, -1)
        return mean, -5.0 + 3.5 * (1.0 + jnp.tanh(raw))  # log sigma in [-5, 2]


class Critic(nn.Module):
    """Q(obs (..., o), action (..., a)) -> (...,); LayerNorm after each hidden layer.

    Without its learned scale and bias, which the next layer can express: their gradients, sums over the batch, took a third of a
    gradient step on a CPU (jaxlib 0.10).
    """

    hidden: tuple[int, ...]
    symlog: bool = True
    layer_norm: bool = True

    @nn.compact
    def __call__(self, obs, action):
        x = jnp.concatenate([symlog(obs) if self.symlog else obs, action], -1)
        for width in self.hidden:
            x = nn.Dense(width)(x)
            x = nn.relu(nn.LayerNorm(use_bias=False, use_scale=False)(x) if self.layer_norm else x)
        return nn.Dense(1)(x)[..., 0]


class Ensemble(nn.Module):
    """`size` critics with parameters of their own: (obs, action) -> (size, ...)."""

    size: int
    hidden: tuple[int, ...]
    symlog: bool = True
    layer_norm: bool = True

    @nn.compact
    def __call__(self, obs, action):
        members = nn.vmap(Critic, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=None, out_axes=0, axis_size=self.size)
        return members(self.hidden, self.symlog, self.layer_norm)(obs, action)


class VAE(nn.Module):
    """Conditional VAE of the dataset's actions; latent size 2 * action_size. Sees what the actor sees."""

    hidden: tuple[int, ...]
    obs_size: int
    action_size: int
    symlog: bool = True

    def setup(self):
        self.encoder = [nn.Dense(width) for width in self.hidden] + [nn.Dense(4 * self.action_size)]
        self.decoder = [nn.Dense(width) for width in self.hidden] + [nn.Dense(self.action_size)]

    def _obs(self, obs):
        obs = obs[..., : self.obs_size]
        return symlog(obs) if self.symlog else obs

    def encode(self, obs, action):
        """Mean and log standard deviation (..., 2a) of z."""
        x = jnp.concatenate([self._obs(obs), action], -1)
        for layer in self.encoder[:-1]:
            x = nn.relu(layer(x))
        mean, log_std = jnp.split(self.encoder[-1](x), 2, -1)
        return mean, jnp.clip(log_std, -4.0, 15.0)

    def decode(self, obs, z):
        """The action (..., a) of latent z."""
        x = jnp.concatenate([self._obs(obs), z], -1)
        for layer in self.decoder[:-1]:
            x = nn.relu(layer(x))
        return jnp.tanh(self.decoder[-1](x))

    def __call__(self, obs, action, key):
        mean, log_std = self.encode(obs, action)
        z = mean + jnp.exp(log_std) * jax.random.normal(key, mean.shape)
        return self.decode(obs, z), mean, log_std


class Networks(NamedTuple):
    """The networks of one configuration; `reward` is an ensemble whose minimum counts, `cost` one whose pessimistic mean does."""

    actor: Actor
    reward: Ensemble
    cost: Ensemble
    vae: VAE
    cost_pessimism: float = 0.0  # k: Qc = mean_i Qc_i + k std_i Qc_i

    def q(self, critics: dict, obs: jax.Array, action: jax.Array) -> jax.Array:
        """min_i Q_i (...,)."""
        # Not jnp.min: its gradient divides by the number of members that equal the minimum, and that is 0 where XLA computes a member
        # twice with other rounding.
        return functools.reduce(jnp.minimum, self.reward.apply(critics["reward"], obs, action))

    def qcs(self, critics: dict, obs: jax.Array, action: jax.Array) -> jax.Array:
        """Qc_i (cost critics, ...)."""
        return self.cost.apply(critics["cost"], obs, action)

    def pessimistic(self, qcs: jax.Array) -> jax.Array:
        """Qc_i (cost critics, ...) -> mean_i Qc_i + k std_i Qc_i (...,): an upper bound where the critics disagree (CAL)."""
        if qcs.shape[0] == 1:
            return qcs[0]
        variance = jnp.var(qcs, 0, ddof=1)
        return qcs.mean(0) + self.cost_pessimism * jnp.sqrt(jnp.maximum(variance, 1e-12))  # sqrt has no gradient at 0

    def qc(self, critics: dict, obs: jax.Array, action: jax.Array) -> jax.Array:
        """Qc (...,), pessimistic."""
        return self.pessimistic(self.qcs(critics, obs, action))

    def bellman_errors(self, critics: dict, obs: jax.Array, action: jax.Array, target: jax.Array, cost_target: jax.Array):
        """Mean squared errors of all critics: (sum of both kinds, its parts and the mean values for progress.csv).

        `target` (batch,), `cost_target` (1 or cost critics, batch); neither has a gradient.
        """
        target, cost_target = jax.lax.stop_gradient((target, cost_target))
        q, qc = self.reward.apply(critics["reward"], obs, action), self.qcs(critics, obs, action)
        chex.assert_equal_shape([q[0], qc[0], target, cost_target[0]])  # no silent broadcasting in the differences
        reward_loss, cost_loss = jnp.mean(jnp.square(q - target)), jnp.mean(jnp.square(qc - cost_target))
        info = {"reward_critic_loss": reward_loss, "cost_critic_loss": cost_loss, "q": q.mean(), "qc": qc.mean()}
        return reward_loss + cost_loss, info


def sample_action(key: jax.Array, mean: jax.Array, log_std: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A tanh-Gaussian action (..., a) and its log-probability (...,)."""
    noise = jax.random.normal(key, mean.shape)
    u = mean + jnp.exp(log_std) * noise
    log_normal = -0.5 * jnp.square(noise) - log_std - 0.5 * jnp.log(2 * jnp.pi)
    log_det = 2 * (jnp.log(2.0) - u - jax.nn.softplus(-2 * u))  # log(1 - tanh(u)^2), stable
    return jnp.tanh(u), jnp.sum(log_normal - log_det, -1)


def log_probability(action: jax.Array, mean: jax.Array, log_std: jax.Array) -> jax.Array:
    """log pi(action) (...,) of a tanh-Gaussian; actions at the bounds are moved inside by 1e-4."""
    action = jnp.clip(action, -1 + 1e-4, 1 - 1e-4)
    u = jnp.arctanh(action)
    log_normal = -0.5 * jnp.square((u - mean) / jnp.exp(log_std)) - log_std - 0.5 * jnp.log(2 * jnp.pi)
    return jnp.sum(log_normal - jnp.log1p(-jnp.square(action)), -1)


def kl_divergence(mean: jax.Array, log_std: jax.Array, prior_mean: jax.Array, prior_log_std: jax.Array) -> jax.Array:
    """KL(pi | prior) (...,) of two tanh-Gaussians, nats: that of the Gaussians before tanh."""
    ratio = (jnp.exp(2 * log_std) + jnp.square(mean - prior_mean)) / jnp.exp(2 * prior_log_std)
    return jnp.sum(prior_log_std - log_std + 0.5 * (ratio - 1.0), -1)


def latent_kl(mean: jax.Array, log_std: jax.Array) -> jax.Array:
    """KL(N(mean, std) | N(0, I)) averaged over the latent's dimensions: (...,)."""
    return jnp.mean(-0.5 * (1 + 2 * log_std - jnp.square(mean) - jnp.exp(2 * log_std)), -1)


def vae_loss(params, obs: jax.Array, action: jax.Array, key: jax.Array, vae: VAE, beta: float) -> jax.Array:
    """MSE(a, decode(s, z)) + beta KL(encode(s, a) | N(0, I)), each a mean over batch and dimensions, as OSRL's (CPQ, BEAR; beta 0.5)."""
    decoded, mean, log_std = vae.apply(params, obs, action, key)
    return jnp.mean(jnp.square(decoded - action)) + beta * latent_kl(mean, log_std).mean()
