"""C MuJoCo in batch behind a JAX callback: the physics for CPUs.

The state (qpos, qvel, act, warm start) is MuJoCo's own float64, carried through JAX as opaque uint32 bits, so nothing is
rounded between steps and a row's future does not depend on the batch it sits in. `mujoco.rollout` is not used because it
returns no warm start and cannot end a step with the forward pass that Safety-Gymnasium's sensors need.
"""

import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial

import jax
import jax.numpy as jnp
import mujoco
import numpy as np

from envs.core import WORKERS, Readings, on_host

STATE = int(mujoco.mjtState.mjSTATE_QPOS | mujoco.mjtState.mjSTATE_QVEL | mujoco.mjtState.mjSTATE_ACT | mujoco.mjtState.mjSTATE_WARMSTART)
_loading, _loaded = threading.Lock(), []


def step_rows():
    """`mujoco_rows.step_rows`, or None where numba cannot be had: said in one line, once."""
    with _loading:
        if not _loaded:
            try:
                from envs import mujoco_rows

                _loaded.append(mujoco_rows.step_rows)
            except Exception as error:  # whatever numba or its cache trips over, the rows can be stepped without it
                why = f"{type(error).__name__}: {error}".splitlines()[0]
                print(f"warning: C MuJoCo steps row by row, slowly on many cores ({why}): pip install numba", file=sys.stderr)
                _loaded.append(None)
        return _loaded[0]


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(WORKERS, thread_name_prefix="mujoco")


class Workspace:
    """One thread's MjData with views of its fields: MuJoCo's bindings make a new array at every attribute access."""

    def __init__(self, model: mujoco.MjModel):
        self.data = data = mujoco.MjData(model)
        self.ctrl, self.qpos, self.qvel, self.sensors, self.xpos = data.ctrl, data.qpos, data.qvel, data.sensordata, data.xpos


class MujocoPhysics:
    """Physics of `model`, `substeps` mj_steps per environment step, then mj_forward if `forward`.

    State: uint32 (..., 2 * state_size): MuJoCo's own, then the position of the body `tracked` as MuJoCo last computed it.
    """

    def __init__(self, model: mujoco.MjModel, substeps: int, forward: bool, tracked: str | None = None):
        self.model, self.substeps, self.forward = model, substeps, forward
        self.body = None if tracked is None else model.body(tracked).id
        extra = () if tracked is None else (3,)
        self.engine_size = mujoco.mj_stateSize(model, STATE)
        self.state_size = self.engine_size + sum(extra)
        self.sizes = (model.nq, model.nv, model.nq, model.nsensordata, *extra)
        self._local, self._making, self._workspaces = threading.local(), threading.Lock(), []
        _pool().submit(step_rows)  # it loads while JAX compiles

    def reset(self, qpos, qvel, where):
        return self._call(self._reset_rows, where.shape, qpos, qvel, where)

    def step(self, state, control):
        return self._call(self._step_rows, state.shape[:-1], state, control)

    def _call(self, rows, batch, *args):
        out = (
            jax.ShapeDtypeStruct((*batch, 2 * self.state_size), jnp.uint32),
            jax.ShapeDtypeStruct((*batch, sum(self.sizes)), jnp.float32),
        )
        bits, readings = on_host(partial(self._on_host, rows), out, *args)
        return bits, Readings(*jnp.split(readings, np.cumsum(self.sizes)[:-1], axis=-1))

    def _on_host(self, rows, *args):
        """Calls `rows(states, readings, *args)` with the batch axes as one."""
        # vmap adds axes in front; the last axis of the first argument is never a batch axis.
        batch = args[0].shape[:-1]
        args = [a.reshape(-1, *a.shape[len(batch) :]) for a in args]
        n = args[0].shape[0]
        states, readings = np.zeros((n, self.state_size)), np.zeros((n, sum(self.sizes)), np.float32)
        rows(states, readings, *args)
        return states.view(np.uint32).reshape(*batch, -1), readings.reshape(*batch, -1)

    def _reset_rows(self, states, readings, qpos, qvel, where):
        def reset(w, i):
            mujoco.mj_resetData(self.model, w.data)
            w.qpos[:], w.qvel[:] = qpos[i], qvel[i]
            mujoco.mj_forward(self.model, w.data)
            self._save(w, states[i])
            self.read(states[i], states[i], w.sensors, readings[i])

        self._one_by_one(reset, np.flatnonzero(where))  # most environment steps reset nothing

    def _step_rows(self, states, readings, bits, control):
        before, control = np.ascontiguousarray(bits).view(np.float64), np.ascontiguousarray(control, np.float64)
        sensors = np.empty((len(before), self.model.nsensordata))
        compiled = step_rows()
        if compiled:
            compiled(self.model, self._for_threads(), STATE, self.substeps, self.forward, before, control, states, sensors)
        else:
            self._one_by_one(lambda w, i: self.step_row(w, before[i], control[i], states[i], sensors[i]), range(len(before)))
        self.read(before, states, sensors, readings)

    def _for_threads(self) -> list[tuple[mujoco.MjData, int | None]]:
        """What `mujoco_rows.step_rows` works with: made at the first step, as an MjData is large."""
        with self._making:
            while len(self._workspaces) < WORKERS:
                w = Workspace(self.model)
                self._workspaces.append((w.data, None if self.body is None else w.xpos[self.body].ctypes.data))
        return self._workspaces

    def _one_by_one(self, row, indices) -> None:
        """Calls `row(workspace, i)` for all indices, in slices of them spread over the pool's threads."""

        def work(part):
            if not hasattr(self._local, "workspace"):
                self._local.workspace = Workspace(self.model)
            for i in part:
                row(self._local.workspace, i)

        size = max(1, -(-len(indices) // WORKERS))
        for future in [_pool().submit(work, indices[i : i + size]) for i in range(0, len(indices), size)]:
            future.result()

    def step_row(self, w: Workspace, before: np.ndarray, control: np.ndarray, after: np.ndarray, sensors: np.ndarray):
        """One environment step from a float64 state (state_size,) into the rows `after` and `sensors` (nsensordata,)."""
        mujoco.mj_setState(self.model, w.data, before[: self.engine_size], STATE)
        w.ctrl[:] = control
        mujoco.mj_step(self.model, w.data, self.substeps)
        if self.forward:
            mujoco.mj_forward(self.model, w.data)
        self._save(w, after)
        sensors[:] = w.sensors

    def _save(self, w: Workspace, state: np.ndarray):
        mujoco.mj_getState(self.model, w.data, state[: self.engine_size], STATE)
        if self.body is not None:
            state[self.engine_size :] = w.xpos[self.body]

    def read(self, before: np.ndarray, after: np.ndarray, sensors: np.ndarray, out: np.ndarray) -> None:
        """Fills `out` (..., sum(sizes)) with the Readings of a step between float64 states (..., state_size)."""
        nq, nv = self.sizes[:2]
        # A state begins with qpos and qvel.
        out[..., : nq + nv] = after[..., : nq + nv]
        np.subtract(after[..., :nq], before[..., :nq], out=out[..., nq + nv : 2 * nq + nv], casting="same_kind")
        out[..., 2 * nq + nv : 2 * nq + nv + self.sizes[3]] = sensors
        if self.body is not None:
            np.subtract(after[..., -3:], before[..., -3:], out=out[..., -3:], casting="same_kind")
