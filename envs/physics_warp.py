"""MuJoCo Warp through MJX: the physics as CUDA kernels, for NVIDIA GPUs; a program that steps it has no host callback in it.

Each physics step is one call of Warp's FFI target from XLA; on a GPU Warp captures its kernels in a CUDA graph. Everything is
float32, with the model's own solver limits. What else differs from C MuJoCo:

    contacts    only those between `touching` and the floor, as on MJX.
    frames      as shipped, contacts of a plane with a capsule within 30 degrees of its normal (an ant's feet) get tangents along
                the world's axes, where C MuJoCo turns them to the capsule: friction along and across it is what its pyramids
                bound. `load` gives Warp a function that does so, too (MuJoCo issue 2774; warp_frames.py).
    divergence  a row whose state is not finite after a step stays where it was, at rest; C MuJoCo puts it at qpos0.
    tracked     Readings.dbody is not provided.
    overflow    buffers hold all contacts and constraints that the model can have at once (`sizes`). Should they overflow all the
                same, the simulation would be wrong: Warp prints a line, and the row's position, observation and reward become NaN.

On a CPU it runs too, but slowly: for tests, where the environment variable ENVS_WARP_ON_CPU is set.
"""

import contextlib
import importlib.metadata
import inspect
import os
from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import mujoco
import numpy as np

from envs.core import Readings
from envs.physics_mjx import MjxState, add_up, only_floor, supported, uniform

WARP = "1.18.0"  # what mujoco-mjx 3.17's extra "warp" asks for
ON_CPU = "ENVS_WARP_ON_CPU"
# The largest number of contacts that Warp makes of a pair of geoms, by their types in ascending order.
GEOM = mujoco.mjtGeom
PLANE, SPHERE, CAPSULE = int(GEOM.mjGEOM_PLANE), int(GEOM.mjGEOM_SPHERE), int(GEOM.mjGEOM_CAPSULE)
BUFFERS = ("NEFC", "NJMAX_NNZ", "BROADPHASE", "NARROWPHASE", "CCD", "HFIELD")  # overflows after which forces are missing
CONTACTS = {
    (PLANE, SPHERE): 1,
    (PLANE, CAPSULE): 2,
    (PLANE, int(GEOM.mjGEOM_ELLIPSOID)): 1,
    (PLANE, int(GEOM.mjGEOM_CYLINDER)): 4,
    (PLANE, int(GEOM.mjGEOM_BOX)): 8,
    (SPHERE, SPHERE): 1,
    (SPHERE, CAPSULE): 1,
    (CAPSULE, CAPSULE): 2,
}


class Unavailable(ValueError):
    """Warp cannot be used here; the message is one line that names the mend."""


def installed() -> bool:
    try:
        importlib.metadata.version("warp-lang")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def cache_folder() -> Path:
    """Where Warp keeps its compiled kernels (as warp/_src/build.py finds it)."""
    if "WARP_CACHE_PATH" in os.environ:
        return Path(os.environ["WARP_CACHE_PATH"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "warp"


def check() -> None:
    """Raises Unavailable unless Warp can run here. Writes nothing."""
    if jax.default_backend() not in ("gpu", "cuda") and not os.environ.get(ON_CPU):
        raise Unavailable("--backend warp needs an NVIDIA GPU that JAX computes on, and there is none here: use --backend mujoco")
    if not installed():
        raise Unavailable("--backend warp needs the package warp-lang: pip install -r requirements-gpu.txt")
    version = importlib.metadata.version("warp-lang")
    if version != WARP:
        raise Unavailable(f"--backend warp needs warp-lang {WARP} and finds {version}: pip install -r requirements-gpu.txt")
    folder = cache_folder()
    existing = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise Unavailable(f"Warp cannot write its compiled kernels to {folder}: set WARP_CACHE_PATH to a folder that can be written")


@cache
def load():
    """The module mujoco.mjx, with Warp in it and C MuJoCo's contact frames in Warp."""
    import warp

    warp.config.log_level = warp.LOG_WARNING  # no banner, and no line for every kernel, on stdout
    # If another module imported mjx first it did so with Warp, too: `check` has seen that it is installed.
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        from mujoco import mjx
        from mujoco.mjx.third_party.mujoco_warp._src import collision_primitive
        from mujoco.mjx.third_party.mujoco_warp._src import collision_primitive_core as core
    # Warp compiles kernels when they are first launched, with whatever function the name then stands for. A package that has
    # another function is left alone: it is mended there, or unknown here.
    if "if b_norm < 0.5:" in inspect.getsource(core.plane_capsule.func):
        from envs import warp_frames

        collision_primitive.plane_capsule = warp_frames.plane_capsule
    return mjx


def pairs(model: mujoco.MjModel) -> list[tuple[int, int]]:
    """The pairs of geoms that may collide, by MuJoCo's rules: masks, not in one weld group, nor in a parent and its child."""
    weld = model.body_weldid[model.geom_bodyid]
    parent = model.body_weldid[model.body_parentid[weld]]
    filtered = not model.opt.disableflags & mujoco.mjtDisableBit.mjDSBL_FILTERPARENT

    def may(i, j):
        masks = (model.geom_contype[i] & model.geom_conaffinity[j]) | (model.geom_contype[j] & model.geom_conaffinity[i])
        related = filtered and weld[i] and weld[j] and (parent[i] == weld[j] or parent[j] == weld[i])
        return masks and weld[i] != weld[j] and not related

    return [(i, j) for i in range(model.ngeom) for j in range(i + 1, model.ngeom) if may(i, j)]


def sizes(model: mujoco.MjModel) -> tuple[int, int]:
    """(contacts, constraint rows) that a world can never exceed: each pair that may collide does, at every one of its points,
    and each limit and friction loss acts. Raises NotImplementedError for what this does not count."""
    if model.npair or model.neq or model.ntendon or model.nflex:
        raise NotImplementedError("explicit contact pairs, equalities, tendons and flexes")
    contacts = rows = 0
    for pair in pairs(model):
        kinds = tuple(sorted(int(model.geom_type[k]) for k in pair))
        if kinds not in CONTACTS:
            raise NotImplementedError(f"contacts of {' with '.join(GEOM(k).name for k in kinds)}")
        dim = max(model.geom_condim[k] for k in pair)
        pyramid = model.opt.cone == mujoco.mjtCone.mjCONE_PYRAMIDAL and dim > 1
        contacts += CONTACTS[kinds]
        rows += CONTACTS[kinds] * (2 * (dim - 1) if pyramid else dim)
    rows += int(model.jnt_limited.sum()) + int((model.dof_frictionloss > 0).sum())
    return contacts, int(rows)


class WarpPhysics:
    """Physics of `model`, `substeps` steps per environment step, then a forward pass if `forward`; as MjxPhysics."""

    def __init__(self, model: mujoco.MjModel, substeps: int, forward: bool, touching: Sequence[str] | None = None):
        check()
        supported(model, forward)
        mjx = load()
        self.substeps, self.shifted = substeps, uniform(model)
        self._host = only_floor(model, touching)
        self.contacts, self.constraints = sizes(self._host)
        # On several devices, graphs that write to buffers of their own, copied outside the graph: the one mode of Warp's that bears
        # sharded programs (MuJoCo issue 3191). They cost: a step of 160 cheetahs took 10.5 ms (results/speed/gpu.csv). On one device
        # mjx's default, in which such steps were not measured.
        staged = jax.default_backend() != "cpu" and jax.device_count() > 1
        self.graph_mode, mode = ("WARP_STAGED_EX", mjx.warp.types.GraphMode.WARP_STAGED_EX) if staged else ("default", None)
        self._mjx, model = mjx, mjx.put_model(self._host, impl="warp", graph_mode=mode)
        from mujoco.mjx.third_party.mujoco_warp._src.types import OverflowType

        self._buffers = sum(int(OverflowType[name]) for name in BUFFERS)
        # Not of a solver that was ended by its limit, which is a line per step and row.
        self._model = model.tree_replace({"opt._impl.warn_overflow": self._buffers})
        self._step, self._sense = _flattened(self._step_rows), _flattened(self._sense_rows)

    def data(self, rows: int):
        """mjx.Data for `rows` worlds at once: contacts share one buffer, constraints have one per world."""
        return self._mjx.make_data(self._host, impl="warp", naconmax=max(1, rows * self.contacts), njmax=max(1, self.constraints))

    def reset(self, qpos, qvel, where):
        control = jnp.zeros((*qpos.shape[:-1], self._host.nu))
        warm, sensors = self._sensed(qpos, qvel, jnp.zeros_like(qvel), control)
        rest = jnp.zeros_like(qpos)
        return MjxState(qpos, rest, qvel, warm), Readings(qpos, qvel, rest, sensors)

    def step(self, before, control):
        control = jnp.nan_to_num(control)
        start = jnp.where(self.shifted, before.rest, before.qpos)  # positions near 0 are fine-grained
        *last, overflow = _over(self._step, before.qpos.shape[:-1], start, before.qvel, before.warm, control)
        sound = jnp.stack([jnp.isfinite(x).all(-1, keepdims=True) for x in last]).all(0)
        at_rest = (start, jnp.zeros_like(before.qvel), jnp.zeros_like(before.warm))
        end, qvel, warm = jax.tree.map(partial(jnp.where, sound), tuple(last), at_rest)
        qpos, rest = add_up(before.qpos, end, self.shifted)
        warm, sensors = self._sensed(qpos, qvel, warm, control)
        qpos, sensors, moved = (jnp.where(overflow > 0, jnp.nan, x) for x in (qpos, sensors, end - start))
        return MjxState(qpos, rest, qvel, warm), Readings(qpos, qvel, moved, sensors)

    def _sensed(self, qpos, qvel, warm, control):
        """(acceleration (..., nv), sensors (..., nsensordata)); the given acceleration where there are no sensors."""
        if not self._host.nsensor:
            return warm, jnp.zeros((*qpos.shape[:-1], 0))
        return _over(self._sense, qpos.shape[:-1], qpos, qvel, warm, control)

    def _rows(self, function, *args):
        """`function(data)` for every row of `args` (rows, .), with buffers for all of them together."""
        data = self.data(len(args[0]))

        def row(qpos, qvel, warm, control):
            return function(data.replace(qpos=qpos, qvel=qvel, qacc_warmstart=warm, ctrl=control))

        return jax.vmap(row)(*args)

    def _step_rows(self, *args):
        def row(data):
            data, _ = jax.lax.scan(lambda d, _: (self._mjx.step(self._model, d), None), data, length=self.substeps)
            overflow = (data._impl.overflow & self._buffers) != 0
            return data.qpos, data.qvel, data.qacc_warmstart, overflow.astype(jnp.float32).reshape(1)

        return self._rows(row, *args)

    def _sense_rows(self, *args):
        def row(data):
            data = self._mjx.forward(self._model, data)
            return data.qacc, data.sensordata

        return self._rows(row, *args)


def _flattened(function):
    """`function` of arrays (rows, .), such that vmap adds to the rows: Warp's contact buffer is sized by all of them, however many
    axes of seeds, studies and environments they come from."""
    flat = jax.custom_batching.custom_vmap(function)

    @flat.def_vmap
    def _(size, batched, *args):
        args = [a if b else jnp.broadcast_to(a, (size, *a.shape)) for a, b in zip(args, batched)]
        out = flat(*(a.reshape(-1, a.shape[-1]) for a in args))
        return jax.tree.map(lambda x: x.reshape(size, -1, x.shape[-1]), out), jax.tree.map(lambda _: True, out)

    return flat


def _over(function, shape: tuple[int, ...], *args):
    """`function`, written for arrays (rows, .), on arrays (*shape, .)."""
    rows = int(np.prod(shape))
    out = function(*(a.reshape(rows, a.shape[-1]) for a in args))
    return jax.tree.map(lambda x: x.reshape(*shape, x.shape[-1]), out)
