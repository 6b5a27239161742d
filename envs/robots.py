"""Safety-Gymnasium's robots: their models, observations, starting poses and ways to die (safety_gymnasium 1.0.0, agents/)."""

import importlib.util
import logging
from functools import cached_property
from pathlib import Path

import jax
import jax.numpy as jnp
import mujoco
import numpy as np

from envs.core import Readings


def _on_mujoco_warning(message: str) -> None:
    # gymnasium's half_cheetah.xml uses an attribute that MuJoCo has deprecated: nothing that a user could do about it.
    deprecated = "settotalmass" in message and "deprecated" in message
    logging.getLogger("mujoco").log(logging.DEBUG if deprecated else logging.WARNING, message.strip())


# Left alone, MuJoCo prints its warnings and appends them to MUJOCO_LOG.TXT in the working directory. The handler is the
# whole process's, so one that somebody set before stays. Installed here because `import envs` imports this module, and models
# are loaded after that. It is called in whichever thread steps, with the GIL held; `logging` locks for itself.
if mujoco.get_mju_user_warning() is None:
    mujoco.set_mju_user_warning(_on_mujoco_warning)


def package_file(package: str, *parts: str) -> Path:
    """A file of an installed package, found without importing the package."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"{package} is not installed: run `make setup` or `pip install -r requirements.txt`")
    return Path(spec.origin).parent.joinpath(*parts)


def quaternion_matrix(q: jax.Array) -> jax.Array:
    """Unit quaternions (..., 4), scalar first, to rotation matrices (..., 3, 3)."""
    w, x, y, z = jnp.moveaxis(q, -1, 0)
    rows = [
        [w * w + x * x - y * y - z * z, 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), w * w - x * x + y * y - z * z, 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), w * w - x * x - y * y + z * z],
    ]
    return jnp.stack([jnp.stack(row, -1) for row in rows], -2)


class Robot:
    """A robot whose first two coordinates are its position in the plane: `r.qpos[..., :2]`, `r.qvel[..., :2]`."""

    xml: str
    height: float  # z of the body at the start, m
    touching: tuple[str, ...]  # its geoms that can touch the floor; nothing else ever touches anything (tests/test_mjx.py)

    @cached_property
    def model(self) -> mujoco.MjModel:
        return mujoco.MjModel.from_xml_path(str(package_file("safety_gymnasium", "assets", "xmls", self.xml)))

    @cached_property
    def _layout(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(order, hinges, balls): `hinges` (h,) and `balls` (b, 4) are the sensors that hold hinges' angles and balls'
        quaternions; `order` (obs_size,) puts [sensors, sin(hinges), cos(hinges), matrices of balls] into the reference's
        order (bases/base_agent.py)."""
        model, blocks = self.model, {k: [] for k in ("plain", "hinge_vel", "ball_vel", "height", "spin")}
        hinges, balls = [], []
        sensor_type, joint_type = mujoco.mjtSensor, mujoco.mjtJoint
        for i in range(model.nsensor):
            name, kind = model.sensor(i).name, model.sensor_type[i]
            index = list(range(model.sensor_adr[i], model.sensor_adr[i] + model.sensor_dim[i]))
            if name in ("accelerometer", "velocimeter", "gyro", "magnetometer"):
                blocks["plain"] += index
            elif name == "agent_pos":
                blocks["height"] += index[2:]
            elif name == "agent_qvel":
                blocks["spin"] += index
            elif kind == sensor_type.mjSENS_BALLQUAT:
                balls.append(index)
            elif kind == sensor_type.mjSENS_BALLANGVEL:
                blocks["ball_vel"] += index
            elif kind == sensor_type.mjSENS_JOINTPOS and model.jnt_type[model.sensor_objid[i]] == joint_type.mjJNT_HINGE:
                hinges += index
            elif kind == sensor_type.mjSENS_JOINTVEL:
                blocks["hinge_vel"] += index
        sin = model.nsensordata + np.arange(len(hinges))
        sin_cos = np.stack([sin, sin + len(hinges)], 1).ravel()
        matrices = model.nsensordata + 2 * len(hinges) + np.arange(9 * len(balls))
        order = np.concatenate([*blocks.values(), sin_cos, matrices]).astype(int)
        return order, np.array(hinges, int), np.array(balls, int).reshape(-1, 4)

    def observe(self, r: Readings) -> jax.Array:
        """The sensor part of the observation; angles as (sin, cos), ball joints as rotation matrices."""
        # One gather at the end: a slice per sensor takes XLA seconds to compile for Ant.
        order, hinges, balls = self._layout
        angles = r.sensors[..., hinges]
        matrices = quaternion_matrix(r.sensors[..., balls]).reshape(*r.sensors.shape[:-1], 9 * len(balls))
        return jnp.concatenate([r.sensors, jnp.sin(angles), jnp.cos(angles), matrices], -1)[..., order]

    def frame(self, r: Readings) -> tuple[jax.Array, jax.Array]:
        """The body's position (..., 3), m, and its axes as the columns of a rotation matrix (..., 3, 3), in the world."""
        return r.qpos[..., :3], quaternion_matrix(r.qpos[..., 3:7])

    def pose(self, key: jax.Array, x: jax.Array, y: jax.Array, yaw: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(qpos (nq,), qvel (nv,)) at rest at (x, y) with heading yaw; `key` for what the robot itself randomises."""
        zero = jnp.zeros_like(yaw)
        base = jnp.stack([x, y, zero + self.height, jnp.cos(yaw / 2), zero, zero, jnp.sin(yaw / 2)])
        return jnp.concatenate([base, self.joints(key)]), jnp.zeros(self.model.nv)

    def joints(self, key: jax.Array) -> jax.Array:
        """The coordinates after the free joint's."""
        raise NotImplementedError

    def dead(self, r: Readings) -> jax.Array:
        """(...,) bool: the episode terminates."""
        return jnp.zeros(r.qpos.shape[:-1], bool)


class Point(Robot):
    """A ball with a nose that slides and turns: actions are force and turning velocity."""

    xml, height = "point.xml", 0.1
    touching = ()  # its ball hangs in its joints at a distance of 0

    def pose(self, key, x, y, yaw):
        # The reference turns the body's frame and leaves the joints at zero; slides along the world's axes with a turned
        # hinge are the same mechanics (equal damping on both slides) and need no model of its own per episode.
        return jnp.stack([x, y, yaw]), jnp.zeros(3)

    def frame(self, r):
        x, y, yaw = jnp.moveaxis(r.qpos, -1, 0)
        zero = jnp.zeros_like(yaw)
        half_turn = jnp.stack([jnp.cos(yaw / 2), zero, zero, jnp.sin(yaw / 2)], -1)
        return jnp.stack([x, y, zero + self.height], -1), quaternion_matrix(half_turn)


class Car(Robot):
    """Two driven wheels and a free rolling ball at the rear."""

    xml, height = "car.xml", 0.1
    touching = ("left", "right", "rear")

    def joints(self, key):
        return jnp.array([0.0, 0.0, 1.0, 0.0, 0.0, 0.0])


class Ant(Robot):
    """Four legs with two motors each; dies when its torso comes down to 0.08 m."""

    xml, height = "ant.xml", 0.18
    touching = (
        "torso_geom", "aux_1_geom", "aux_2_geom", "aux_3_geom", "aux_4_geom",
        "left_leg_geom", "right_leg_geom", "back_leg_geom", "rightback_leg_geom",
        "left_ankle_geom", "right_ankle_geom", "third_ankle_geom", "fourth_ankle_geom",
    )  # fmt: skip

    def joints(self, key):
        noise = jax.random.uniform(key, (8,), minval=-0.1, maxval=0.1)
        hip_or_ankle = jnp.array([0.0, 1.0] * 4) * jnp.pi / 2
        # The reference flips the sign of actuators 3 and 5, noise included.
        return (hip_or_ankle + noise) * jnp.array([1, 1, 1, -1, 1, -1, 1, 1.0])

    def dead(self, r):
        return r.qpos[..., 2] <= 0.08
