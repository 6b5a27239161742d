"""Velocity: run, but not too fast (safety_gymnasium 1.0.0, tasks/safe_velocity v1, on gymnasium's MuJoCo -v4 robots)."""

from functools import cache

import jax
import jax.numpy as jnp
import mujoco

from envs.core import Task
from envs.robots import package_file


class Velocity(Task):
    """Base of the Velocity tasks; cost: 1 where the velocity exceeds `threshold` (m/s)."""

    horizon, forward = 1000, False  # gymnasium's robots read no sensors, so there is no forward pass after the substeps
    xml: str
    threshold: float

    @cache
    def model(self):
        return mujoco.MjModel.from_xml_path(str(package_file("gymnasium", "envs", "mujoco", "assets", self.xml)))

    @property
    def cost(self):
        return f"velocity > {self.threshold}"


class HalfCheetah(Velocity):
    """Reward: forward velocity - 0.1 * |action|^2. Never terminates."""

    name, reference_id = "SafetyHalfCheetahVelocity", "SafetyHalfCheetahVelocity-v1"
    xml, threshold, substeps = "half_cheetah.xml", 3.2096, 5
    dt = 0.05  # s per environment step

    def initial(self, key):
        key_pos, key_vel = jax.random.split(key)
        return jax.random.uniform(key_pos, (9,), minval=-0.1, maxval=0.1), 0.1 * jax.random.normal(key_vel, (9,))

    def observe(self, r):
        return jnp.concatenate([r.qpos[..., 1:], r.qvel], -1)

    def evaluate(self, r, action):
        velocity = r.dqpos[..., 0] / self.dt
        reward = velocity - 0.1 * jnp.sum(jnp.square(action), -1)
        return reward, (velocity > self.threshold).astype(jnp.float32), jnp.zeros(reward.shape, bool)
