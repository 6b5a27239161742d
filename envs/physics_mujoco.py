"""C MuJoCo in batch behind a JAX callback: the physics for CPUs.

The state (qpos, qvel, act, warm start) is MuJoCo's own float64, carried through JAX as opaque uint32 bits, so nothing is
rounded between steps and a row's future does not depend on the batch it sits in. `mujoco.rollout` is not used because it
returns no warm start and cannot end a step with the forward pass that Safety-Gymnasium's sensors need.
"""

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial

import jax
import jax.numpy as jnp
import mujoco
import numpy as np

from envs.core import Readings

STATE = int(
    mujoco.mjtState.mjSTATE_QPOS | mujoco.mjtState.mjSTATE_QVEL | mujoco.mjtState.mjSTATE_ACT | mujoco.mjtState.mjSTATE_WARMSTART
)
WORKERS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(WORKERS, thread_name_prefix="mujoco")


class MujocoPhysics:
    """Physics of `model`, `substeps` mj_steps per environment step, then mj_forward if `forward`.

    State: uint32 (..., 2 * state_size).
    """

    def __init__(self, model: mujoco.MjModel, substeps: int, forward: bool):
        self.model, self.substeps, self.forward = model, substeps, forward
        self.state_size = mujoco.mj_stateSize(model, STATE)
        self.sizes = (model.nq, model.nv, model.nq, model.nsensordata)
        self._local = threading.local()

    def reset(self, qpos, qvel, where):
        return self._call(self._reset_rows, where.shape, qpos, qvel, where)

    def step(self, state, control):
        return self._call(self._step_rows, state.shape[:-1], state, control)

    def _call(self, rows, batch, *args):
        out = (
            jax.ShapeDtypeStruct((*batch, 2 * self.state_size), jnp.uint32),
            jax.ShapeDtypeStruct((*batch, sum(self.sizes)), jnp.float32),
        )
        host = partial(self._on_host, rows)
        bits, readings = jax.pure_callback(host, out, *args, vmap_method="broadcast_all")
        return bits, Readings(*jnp.split(readings, np.cumsum(self.sizes)[:-1], axis=-1))

    def _on_host(self, rows, *args):
        """Runs `rows(data, slice, states, readings, *args)` over slices of the rows, spread over the worker threads."""
        args = [np.asarray(a) for a in args]
        # vmap adds axes in front; the last axis of the first argument is never a batch axis.
        batch = args[0].shape[:-1]
        args = [a.reshape(-1, *a.shape[len(batch) :]) for a in args]
        n = args[0].shape[0]
        states, readings = np.zeros((n, self.state_size)), np.zeros((n, sum(self.sizes)), np.float32)

        def work(start, stop):
            if not hasattr(self._local, "data"):
                self._local.data = mujoco.MjData(self.model)
            rows(self._local.data, slice(start, stop), states, readings, *args)

        size = max(1, -(-n // (4 * WORKERS)))
        for future in [_pool().submit(work, i, min(n, i + size)) for i in range(0, n, size)]:
            future.result()
        return states.view(np.uint32).reshape(*batch, -1), readings.reshape(*batch, -1)

    def _reset_rows(self, data, rows, states, readings, qpos, qvel, where):
        for i in np.arange(len(where))[rows][where[rows]]:
            mujoco.mj_resetData(self.model, data)
            data.qpos[:], data.qvel[:] = qpos[i], qvel[i]
            mujoco.mj_forward(self.model, data)
            mujoco.mj_getState(self.model, data, states[i], STATE)
            self.read(data, data.qpos, readings[i])

    def _step_rows(self, data, rows, states, readings, bits, control):
        before = bits[rows].view(np.float64)
        for i, state, ctrl in zip(range(rows.start, rows.stop), before, control[rows]):
            self.step_row(data, state, ctrl, states[i], readings[i])

    def step_row(self, data: mujoco.MjData, before: np.ndarray, control: np.ndarray, after: np.ndarray, readings: np.ndarray):
        """One environment step of one float64 state row (state_size,) into the rows `after` and `readings`."""
        mujoco.mj_setState(self.model, data, before, STATE)
        data.ctrl[:] = control
        mujoco.mj_step(self.model, data, self.substeps)
        if self.forward:
            mujoco.mj_forward(self.model, data)
        mujoco.mj_getState(self.model, data, after, STATE)
        self.read(data, before[: self.model.nq], readings)

    def read(self, data: mujoco.MjData, qpos_before: np.ndarray, out: np.ndarray) -> None:
        """Fills `out` (sum(sizes),) with the Readings of `data`."""
        nq, nv = self.sizes[:2]
        out[:nq], out[nq : nq + nv] = data.qpos, data.qvel
        np.subtract(data.qpos, qpos_before, out=out[nq + nv : 2 * nq + nv], casting="same_kind")
        out[2 * nq + nv :] = data.sensordata
