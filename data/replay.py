"""The replay buffer, and minibatches of it or of a dataset."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from envs.rollout import Batch


class Replay(NamedTuple):
    data: Batch  # leaves (capacity, ...)
    inserted: jax.Array  # () int32, transitions ever inserted


def empty_replay(capacity: int, obs_size: int, action_size: int) -> Replay:
    """A buffer of `capacity` transitions, all zero."""
    zeros = lambda *shape: jnp.zeros((capacity, *shape))
    return Replay(Batch(zeros(obs_size), zeros(action_size), zeros(), zeros(), zeros(obs_size), zeros()), jnp.int32(0))


def insert(replay: Replay, new: Batch) -> Replay:
    """Writes n transitions (leaves (n, ...)) over the oldest; the capacity must be a multiple of n."""
    capacity = replay.data.reward.shape[0]
    start = replay.inserted % capacity
    write = lambda old, x: jax.lax.dynamic_update_slice_in_dim(old, x.astype(old.dtype), start, 0)
    return Replay(jax.tree.map(write, replay.data, new), replay.inserted + new.reward.shape[0])


def sample(key: jax.Array, data: Batch, n: int, filled) -> Batch:
    """n of the first `filled` transitions, uniformly, with replacement."""
    rows = jax.random.randint(key, (n,), 0, filled)
    return jax.tree.map(lambda x: x[rows], data)


def sample_recent(key: jax.Array, replay: Replay, n: int) -> Batch:
    """n of the transitions that the buffer holds."""
    return sample(key, replay.data, n, jnp.minimum(replay.inserted, replay.data.reward.shape[0]))
