"""Steps many rows of C MuJoCo in one call that does not hold Python's interpreter lock.

Through MuJoCo's Python bindings a row takes about ten calls, each of which takes the lock and gives it back: on many cores the threads
wait for one another. Here numba compiles the loop over the rows, which calls libmujoco's own functions through their addresses. The
addresses are arguments, not constants, so that the compiled loop can be kept on disk and used again by the next process.
"""

import ctypes
from pathlib import Path

import mujoco
import numba
import numpy as np
from numba import types

_POINTER, _VOID = types.uintp, types.void
_SIGNATURES = {  # of libmujoco's functions; model, data and states are pointers
    "mj_setState": types.FunctionType(_VOID(_POINTER, _POINTER, _POINTER, types.intc)),
    "mj_step": types.FunctionType(_VOID(_POINTER, _POINTER)),
    "mj_forward": types.FunctionType(_VOID(_POINTER, _POINTER)),
    "mj_getState": types.FunctionType(_VOID(_POINTER, _POINTER, _POINTER, types.intc)),
}


class _CFunction(types.WrapperAddressProtocol):
    """A function of libmujoco as numba's first-class function."""

    def __init__(self, library: ctypes.CDLL, name: str):
        self._address = ctypes.cast(getattr(library, name), ctypes.c_void_p).value
        self._signature = _SIGNATURES[name].signature

    def __wrapper_address__(self):
        return self._address

    def signature(self):
        return self._signature


def _library() -> ctypes.CDLL:
    """The libmujoco that the bindings have loaded already."""
    folder = Path(mujoco.__file__).parent
    for pattern in ("libmujoco.so.*", "libmujoco.*.dylib", "mujoco.dll"):
        for path in folder.glob(pattern):
            return ctypes.CDLL(str(path))
    raise OSError(f"{folder}: holds no libmujoco")


_FUNCTIONS = tuple(_CFunction(_library(), name) for name in _SIGNATURES)
_ROWS = types.Array(types.float64, 2, "C")
_VIEW = types.Array(types.float64, 1, "C")
_READ, _CONTROL = (types.Array(kind, 2, "C", readonly=True) for kind in (types.float64, types.float32))
_SIGNATURE = _VOID(
    *_SIGNATURES.values(), _POINTER, _POINTER, types.intc, types.int64, types.boolean,
    _READ, _CONTROL, _ROWS, _ROWS, _VIEW, _VIEW, _VIEW, types.int64,
)  # fmt: skip


def _step(
    set_state,
    step,
    forward,
    get_state,
    model,
    data,
    what,
    substeps,
    ends_forward,
    before,
    control,
    after,
    sensors,
    ctrl,
    read,
    xpos,
    engine,
):
    for i in range(before.shape[0]):
        set_state(model, data, before[i].ctypes.data, what)
        for j in range(ctrl.shape[0]):
            ctrl[j] = control[i, j]
        for _ in range(substeps):
            step(model, data)
        if ends_forward:
            forward(model, data)
        get_state(model, data, after[i].ctypes.data, what)
        for j in range(after.shape[1] - engine):
            after[i, engine + j] = xpos[j]
        for j in range(read.shape[0]):
            sensors[i, j] = read[j]


try:
    _compiled = numba.njit(_SIGNATURE, nogil=True, cache=True)(_step)
except RuntimeError:  # numba finds no folder that it may write to
    _compiled = numba.njit(_SIGNATURE, nogil=True)(_step)


def step_rows(
    model: mujoco.MjModel, data: mujoco.MjData, what: int, substeps: int, forward: bool,
    before: np.ndarray, control: np.ndarray, after: np.ndarray, sensors: np.ndarray, xpos: np.ndarray,
) -> None:  # fmt: skip
    """Environment steps from the states `before` (n, size) float64 under `control` (n, nu) float32, into `after` and `sensors`.

    A state is MuJoCo's of the kind `what`, then, where `size` is larger, the position `xpos` (3,) of a body as MuJoCo last computed it.
    """
    engine = mujoco.mj_stateSize(model, what)
    _compiled(
        *_FUNCTIONS, model._address, data._address, what, substeps, forward, before, control, after, sensors,
        data.ctrl, data.sensordata, xpos, engine,
    )  # fmt: skip
