"""MuJoCo MJX: the physics as XLA code, for GPUs and TPUs; a program that steps it has no host callback in it.

Everything is float32. What else differs from C MuJoCo (`python -m envs.deviation` measures what it amounts to in one step):

    solver      at most ITERATIONS Newton iterations with LINE_SEARCH steps each, not the models' 100 and 50: MJX iterates
                until the slowest row of the batch is done, and float32 hardly ever meets the models' tolerance of 1e-8.
    contacts    only those between `touching` and the floor: MJX pays at every step for every pair that could collide.
                A distance of exactly 0 (Car's wheels at the start) is a contact for C MuJoCo and none for MJX.
    divergence  a row whose state is not finite after a step stays where it was, at rest; C MuJoCo puts it at qpos0.
    tracked     Readings.dbody is not provided.
"""

import contextlib
import copy
import os
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import mujoco
import numpy as np

from envs.core import Readings

# On import it prints that warp is missing, which is not used here.
with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
    from mujoco import mjx

ITERATIONS, LINE_SEARCH = 8, 8
RK4_STAGES = np.array([[0.5, 0.5, 1.0, 0.0], np.array([1, 2, 2, 1]) / 6], np.float32).T  # (way to the next stage, weight)


def supported(model: mujoco.MjModel, forward: bool) -> int:
    """The model's integrator; NotImplementedError for what MJX or this interface lacks."""
    if model.na or model.opt.integrator not in (mujoco.mjtIntegrator.mjINT_EULER, mujoco.mjtIntegrator.mjINT_RK4):
        raise NotImplementedError("activations, and integrators other than Euler and RK4")
    if model.nsensor and not forward:
        raise NotImplementedError("sensors of a moment before the state")
    return model.opt.integrator


def only_floor(model: mujoco.MjModel, touching: Sequence[str] | None) -> mujoco.MjModel:
    """A copy in which only the geoms `touching` collide, with what is fixed to the world (None: as the model says)."""
    model = copy.deepcopy(model)
    if touching is not None:
        fixed = model.body_weldid[model.geom_bodyid] == 0
        on_list = np.isin(np.arange(model.ngeom), [model.geom(name).id for name in touching])
        model.geom_contype[:], model.geom_conaffinity[:] = on_list & ~fixed, fixed
    return model


def add_up(qpos, end, shifted):
    """(positions, their rests) after a step that ended at `end`, which where `shifted` counts from `qpos`: qpos + end without
    loss (Knuth's two-sum), as the rounded sum and what the rounding cut off."""
    total = qpos + end
    added = total - qpos
    cut_off = (qpos - (total - added)) + (end - added)
    return jnp.where(shifted, total, end), jnp.where(shifted, cut_off, 0.0)


class MjxState(NamedTuple):
    """Positions are qpos + rest: a movement of millimetres at 16.5 m would lose half its digits in one float32."""

    qpos: jax.Array  # (..., nq)
    rest: jax.Array  # (..., nq), not 0 only for coordinates along which the world is the same everywhere
    qvel: jax.Array  # (..., nv)
    warm: jax.Array  # (..., nv) acceleration that the solver starts from


class MjxPhysics:
    """Physics of `model`, `substeps` steps per environment step, then a forward pass if `forward`.

    `touching` names the geoms that can touch the floor, if nothing else ever touches (None: whatever the model allows).
    Raises NotImplementedError for models with features that MJX lacks.
    """

    def __init__(self, model: mujoco.MjModel, substeps: int, forward: bool, touching: Sequence[str] | None = None):
        runge_kutta = supported(model, forward) == mujoco.mjtIntegrator.mjINT_RK4
        self.substeps, self.shifted = substeps, uniform(model)
        self._advance = self._runge_kutta if runge_kutta else self._euler
        model = only_floor(model, touching)
        model.opt.iterations, model.opt.ls_iterations = ITERATIONS, LINE_SEARCH
        self._model, self._data = mjx.put_model(model, impl="jax"), mjx.make_data(model, impl="jax")
        # MJX takes ten times as long to trace as to lower: jit traces a row once, for all programs and sizes of batches.
        self._step_one, self._reset_one = jax.jit(self._step_row), jax.jit(self._reset_row)

    def reset(self, qpos, qvel, where):
        return _over_rows(self._reset_one, where.ndim, qpos, qvel)

    def step(self, state, control):
        return _over_rows(self._step_one, state.qpos.ndim - 1, state, control)

    def _reset_row(self, qpos, qvel):
        warm, sensors = self._sense(qpos, qvel, jnp.zeros_like(qvel), jnp.zeros(self._model.nu))
        rest = jnp.zeros_like(qpos)
        return MjxState(qpos, rest, qvel, warm), Readings(qpos, qvel, rest, sensors)

    def _step_row(self, before: MjxState, control):
        control = jnp.nan_to_num(control)
        start = jnp.where(self.shifted, before.rest, before.qpos)  # positions near 0 are fine-grained

        def substep(carry, _):
            return self._advance(*carry, control), None

        last, _ = jax.lax.scan(substep, (start, before.qvel, before.warm), length=self.substeps)
        sound = jnp.array([jnp.isfinite(x).all() for x in last]).all()
        at_rest = (start, jnp.zeros_like(before.qvel), jnp.zeros_like(before.warm))
        end, qvel, warm = jax.tree.map(partial(jnp.where, sound), last, at_rest)

        qpos, rest = add_up(before.qpos, end, self.shifted)
        warm, sensors = self._sense(qpos, qvel, warm, control)
        return MjxState(qpos, rest, qvel, warm), Readings(qpos, qvel, end - start, sensors)

    def _sense(self, qpos, qvel, warm, control):
        """(acceleration (nv,), sensors (nsensordata,)) at a state; the given acceleration where there are no sensors."""
        if not self._model.nsensor:
            return warm, jnp.zeros(0)
        data = self._accelerate(qpos, qvel, warm, control)
        for sensors in (mjx.sensor_pos, mjx.sensor_vel, mjx.sensor_acc):
            data = sensors(self._model, data)
        return data.qacc, data.sensordata

    def _accelerate(self, qpos, qvel, warm, control) -> mjx.Data:
        """mjx.forward without sensors, and with the contacts' frames of C MuJoCo."""
        model = self._model
        data = mjx.fwd_position(model, self._data.replace(qpos=qpos, qvel=qvel, qacc_warmstart=warm, ctrl=control))
        if data._impl.ncon:
            data = mjx.make_constraint(model, _align_with_capsules(model, data))
        data = mjx.fwd_acceleration(model, mjx.fwd_actuation(model, mjx.fwd_velocity(model, data)))
        return mjx.solve(model, data) if data._impl.nefc else data.replace(qacc=data.qacc_smooth)

    def _euler(self, qpos, qvel, warm, control):
        """One physics step: (qpos, qvel, the last acceleration that was solved for)."""
        data = mjx.euler(self._model, self._accelerate(qpos, qvel, warm, control))
        return data.qpos, data.qvel, data.qacc

    def _runge_kutta(self, qpos, qvel, warm, control):
        """The same of fourth order. mjx.rungekutta4 unrolls its stages, which takes XLA three times as long to compile."""
        h = self._model.opt.timestep

        def stage(carry, tableau):
            (at, velocity, warm), (mean_velocity, mean_acceleration) = carry
            way, weight = tableau
            data = self._accelerate(at, velocity, warm, control)
            following = self._move(qpos, h * way * velocity), qvel + h * way * data.qacc, data.qacc
            means = mean_velocity + weight * velocity, mean_acceleration + weight * data.qacc
            return (following, means), None

        zero = jnp.zeros_like(qvel)
        start = (qpos, qvel, warm), (zero, zero)
        ((_, _, warm), (velocity, acceleration)), _ = jax.lax.scan(stage, start, jnp.asarray(RK4_STAGES))
        return self._move(qpos, h * velocity), qvel + h * acceleration, warm

    def _move(self, qpos, by):
        """The positions (nq,) after a displacement `by` (nv,): joint by joint, quaternions turned by a rotation vector."""
        parts = []
        for kind, q, v in zip(map(mujoco.mjtJoint, self._model.jnt_type), self._model.jnt_qposadr, self._model.jnt_dofadr):
            if kind in (mujoco.mjtJoint.mjJNT_HINGE, mujoco.mjtJoint.mjJNT_SLIDE):
                parts.append(qpos[q : q + 1] + by[v : v + 1])
                continue
            if kind == mujoco.mjtJoint.mjJNT_FREE:
                parts.append(qpos[q : q + 3] + by[v : v + 3])
                q, v = q + 3, v + 3
            parts.append(_turn(qpos[q : q + 4], by[v : v + 3]))
        return jnp.concatenate(parts)


def _over_rows(function, axes: int, *args):
    """`function`, written for one row, over the first `axes` axes of all arguments."""
    for _ in range(axes):
        function = jax.vmap(function)
    # GPUs and TPUs would multiply matrices at 10 or 8 bits of mantissa.
    with jax.default_matmul_precision("highest"):
        return function(*args)


def _turn(quaternion, by):
    """A unit quaternion (4,), scalar first, then turned by the rotation vector `by` (3,) in its own frame."""
    angle = jnp.sqrt(jnp.sum(jnp.square(by)))
    w, v = jnp.cos(angle / 2), jnp.sinc(angle / (2 * jnp.pi)) / 2 * by
    a, u = quaternion[0], quaternion[1:]
    turned = jnp.concatenate([(a * w - u @ v)[None], a * v + w * u + jnp.cross(u, v)])
    return turned / jnp.linalg.norm(turned)


def _align_with_capsules(model: mjx.Model, data: mjx.Data) -> mjx.Data:
    """Turns the tangents of contacts between a plane and a capsule to the capsule's axis, as C MuJoCo does: friction along
    and across it is what its pyramids bound. MJX does not where the capsule stands steeply, as an ant's feet do (its issue 2774)."""
    contact, plane, capsule = data._impl.contact, int(mujoco.mjtGeom.mjGEOM_PLANE), int(mujoco.mjtGeom.mjGEOM_CAPSULE)
    first, second = contact.geom[:, 0], contact.geom[:, 1]
    kinds = jnp.asarray(model.geom_type)
    normal, axis = contact.frame[:, 0], data.geom_xmat[second][:, :, 2]
    along = axis - normal * jnp.sum(normal * axis, -1, keepdims=True)
    length = jnp.linalg.norm(along, axis=-1, keepdims=True)
    along = along / jnp.maximum(length, 1e-9)
    aligned = jnp.stack([normal, along, jnp.cross(normal, along)], 1)
    where = ((kinds[first] == plane) & (kinds[second] == capsule))[:, None] & (length > 1e-6)
    return data.tree_replace({"_impl.contact.frame": jnp.where(where[..., None], aligned, contact.frame)})


def uniform(model: mujoco.MjModel) -> np.ndarray:
    """(nq,) bool: coordinates that move all that can move horizontally, over nothing but level planes."""
    along = np.zeros(model.nq, bool)
    fixed = (model.body_weldid[model.geom_bodyid] == 0) & ((model.geom_contype != 0) | (model.geom_conaffinity != 0))
    level = [_rotate([0, 0, 1], quaternion)[2] > 1 - 1e-9 for quaternion in model.geom_quat[fixed]]
    roots = [i for i in range(1, model.nbody) if model.body_parentid[i] == 0 and model.body_weldid[i] != 0]
    if not all(level) or (model.geom_type[fixed] != mujoco.mjtGeom.mjGEOM_PLANE).any() or len(roots) != 1 or model.neq:
        return along
    body = model.body(roots[0])
    for joint in range(body.jntadr[0], body.jntadr[0] + body.jntnum[0]):
        address, kind = model.jnt_qposadr[joint], model.jnt_type[joint]
        if kind == mujoco.mjtJoint.mjJNT_FREE:
            along[address : address + 2] = True
        elif kind == mujoco.mjtJoint.mjJNT_SLIDE:
            horizontal = abs(_rotate(model.jnt_axis[joint], body.quat)[2]) < 1e-9
            along[address] = horizontal and not model.jnt_limited[joint] and not model.jnt_stiffness[joint]
        else:
            break  # slides behind a hinge turn with it
    return along


def _rotate(vector, quaternion) -> np.ndarray:
    out = np.empty(3)
    mujoco.mju_rotVecQuat(out, np.asarray(vector, float), np.asarray(quaternion, float))
    return out
