"""The critic ensemble that all algorithms share: one MLP, vmapped over its parameters."""

import flax.linen as nn
import jax
import jax.numpy as jnp


def symlog(x: jax.Array) -> jax.Array:
    """sign(x) log(1 + |x|): compresses contact spikes (accelerations of 100 m/s^2) and needs no running statistics."""
    return jnp.sign(x) * jnp.log1p(jnp.abs(x))


class Critic(nn.Module):
    """Q(obs (..., o), action (..., a)) -> (...,); LayerNorm after each hidden layer.

    Without its learned scale and bias, which the next layer can express: their gradients, sums over the batch, took a third of a
    gradient step on a CPU (jaxlib 0.10).
    """

    hidden: tuple[int, ...]

    @nn.compact
    def __call__(self, obs, action):
        x = jnp.concatenate([symlog(obs), action], -1)
        for width in self.hidden:
            x = nn.relu(nn.LayerNorm(use_bias=False, use_scale=False)(nn.Dense(width)(x)))
        return nn.Dense(1)(x)[..., 0]


class Ensemble(nn.Module):
    """`size` critics with parameters of their own: (obs, action) -> (size, ...)."""

    size: int
    hidden: tuple[int, ...]

    @nn.compact
    def __call__(self, obs, action):
        members = nn.vmap(
            Critic, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=None, out_axes=0, axis_size=self.size
        )
        return members(self.hidden)(obs, action)
