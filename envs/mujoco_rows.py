"""Steps many rows of C MuJoCo on all cores in one call that does not hold Python's interpreter lock.

Through MuJoCo's Python bindings a row takes about ten calls, each of which takes the lock and gives it back, and a pool of Python
threads takes it again for every slice of rows: on many cores the threads wait for one another. Here numba compiles the loop over the
rows and runs it in numba's own threads. The loop calls libmujoco's functions through their addresses. Addresses are arguments, not
constants, so that the compiled loop can be kept on disk and used again by the next process.
"""

import ctypes
import threading
from pathlib import Path

import mujoco
import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core.typing import signature
from numba.extending import intrinsic

numba.config.THREADING_LAYER = "workqueue"  # the one that every platform's wheel has


def _library() -> ctypes.CDLL:
    """The libmujoco that the bindings have loaded already."""
    folder = Path(mujoco.__file__).parent
    for pattern in ("libmujoco.so.*", "libmujoco.*.dylib", "mujoco.dll"):
        for path in folder.glob(pattern):
            return ctypes.CDLL(str(path))
    raise OSError(f"{folder}: holds no libmujoco")


def _addresses(*names: str) -> np.ndarray:
    library = _library()
    return np.array([ctypes.cast(getattr(library, name), ctypes.c_void_p).value for name in names], np.uint64)


_FUNCTIONS = _addresses("mj_setState", "mj_step", "mj_forward", "mj_getState", "mju_copy")


def _c_call(typingctx, address, *arguments):
    """Calls the C function at `address` with 64-bit integers or pointers (uint64) and ints (int32); it returns nothing."""

    def generate(context, builder, sig, values):
        kinds = [context.get_value_type(t) for t in sig.args[1:]]
        pointer = builder.inttoptr(values[0], ir.FunctionType(ir.VoidType(), kinds).as_pointer())
        builder.call(pointer, values[1:])
        return context.get_dummy_value()

    return signature(types.void, address, *arguments), generate


@intrinsic
def _call2(typingctx, address, a, b):
    return _c_call(typingctx, address, a, b)


@intrinsic
def _call3(typingctx, address, a, b, c):
    return _c_call(typingctx, address, a, b, c)


@intrinsic
def _call4(typingctx, address, a, b, c, d):
    return _c_call(typingctx, address, a, b, c, d)


@intrinsic
def _take(typingctx, counter):
    """Adds one to the int64 at the address `counter` and gives what it was, whichever threads do so at once."""

    def generate(context, builder, sig, values):
        integer = ir.IntType(64)
        return builder.atomic_rmw("add", builder.inttoptr(values[0], integer.as_pointer()), integer(1), "monotonic")

    return types.int64(types.uint64), generate


def _step(functions, fields, model, what, substeps, ends_forward, sizes, rows):
    """Each thread steps the next row that no other has taken, with its own mjData: rows differ in cost, cores in speed."""
    set_state, step, forward, get_state, copy = functions
    engine, extra, nu, sensors_size = sizes
    n, counter = rows[0], rows[5]
    double = np.uint64(8)
    size = np.uint64(engine + extra)
    for t in numba.prange(len(fields)):
        data, ctrl, sensors, xpos = fields[t, 0], fields[t, 1], fields[t, 2], fields[t, 3]
        i = np.uint64(_take(counter))
        while i < n:
            after = rows[3] + i * size * double
            _call4(set_state, model, data, rows[1] + i * size * double, what)
            _call3(copy, ctrl, rows[2] + i * np.uint64(nu) * double, nu)
            for _ in range(substeps):
                _call2(step, model, data)
            if ends_forward:
                _call2(forward, model, data)
            _call4(get_state, model, data, after, what)
            _call3(copy, after + np.uint64(engine) * double, xpos, extra)
            _call3(copy, rows[4] + i * np.uint64(sensors_size) * double, sensors, sensors_size)
            i = np.uint64(_take(counter))


_TABLE = types.Array(types.uint64, 2, "C")
_SIGNATURE = types.void(
    types.UniTuple(types.uint64, 5), _TABLE, types.uint64, types.int32, types.int64, types.boolean,
    types.UniTuple(types.int32, 4), types.UniTuple(types.uint64, 6),
)  # fmt: skip
_OPTIONS = {"nogil": True, "parallel": True}
try:
    _compiled = numba.njit(_SIGNATURE, cache=True, **_OPTIONS)(_step)
except RuntimeError:  # numba finds no folder that it may write to
    _compiled = numba.njit(_SIGNATURE, **_OPTIONS)(_step)
_one_at_a_time = threading.Lock()  # numba ends the process where two threads start its loops at once


def step_rows(model, workspaces, what: int, substeps: int, ends_forward: bool, before, control, after, sensors) -> None:
    """Steps row i of `before` (n, >= state size) under `control` (n, nu) into `after` (n, state size [+ 3]) and `sensors`
    (n, nsensordata): C-contiguous float64 arrays. `workspaces` are (mjData, address of a body's position or None), one per thread;
    where one has a body, the last 3 columns of `after` become its position."""
    tracked = workspaces[0][1] is not None
    fields = np.array([(d._address, d.ctrl.ctypes.data, d.sensordata.ctypes.data, x or 0) for d, x in workspaces], np.uint64)
    sizes = before.shape[1] - 3 * tracked, 3 * tracked, control.shape[1], sensors.shape[1]
    for x in (before, control, after, sensors):
        assert x.dtype == np.float64 and x.flags.c_contiguous and len(x) == len(before)
    taken = np.zeros(1, np.int64)
    rows = len(before), *(x.ctypes.data for x in (before, control, after, sensors, taken))
    with _one_at_a_time:
        _compiled(tuple(_FUNCTIONS), fields, model._address, what, substeps, ends_forward, sizes, tuple(map(np.uint64, rows)))
