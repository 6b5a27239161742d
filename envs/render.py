"""Seeing what a policy does: `video` (needs OpenGL, not a screen) and `trajectory`, a plot that needs none.

    python -m envs.render SafetyPointRun out.mp4 out.png      # random actions, in one episode and in five

Both take a policy (obs (episodes, obs_size), key) -> actions (episodes, action_size). OpenGL is imported by `video` alone:
through EGL (a GPU's, or Mesa's), else OSMesa; MUJOCO_GL=egl, osmesa or glfw decides instead. Video files are written by
`ffmpeg` if it is on the PATH, otherwise as GIF. An environment of the user's own (`module:id`) draws its own pictures.
"""

import argparse
import copy
import functools
import importlib
import itertools
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import mujoco
import numpy as np

from envs import files, reference
from envs.circle import Circle
from envs.core import Env, Readings, Task
from envs.reference.pool import WorkerError
from envs.run import Run
from envs.velocity import Velocity

COST = (0.86, 0.15, 0.13)  # red of cost steps, in both pictures
WALL, GROUND, TILE, RING = (0.2, 0.35, 0.75, 0.45), (0.86, 0.87, 0.88, 1.0), (0.74, 0.76, 0.78, 1.0), (0.2, 0.65, 0.3, 0.5)
RATES = 15.0, 25.0  # lowest and highest number of pictures per second
TRAJECTORIES = (".png", ".pdf", ".svg")
VIDEOS = (".mp4", ".gif", ".webm", ".mkv", ".mov", ".avi")  # all but GIF by ffmpeg
SIZE, GIF_SIZE = (640, 480), (400, 300)  # width and height of a video, pixels

Policy = Callable[[jax.Array, jax.Array], jax.Array]


class RenderError(ValueError):
    """No picture can be made; the message is one line that names the mend."""


def suffixed(path: str | os.PathLike, suffixes: tuple[str, ...]) -> Path:
    """The path; RenderError unless it ends in one of these and can be written."""
    path = Path(path)
    if path.suffix not in suffixes:
        raise RenderError(f"{path}: its suffix is {path.suffix!r}; name a file that ends in {', '.join(suffixes[:-1])} or {suffixes[-1]}")
    if path.is_dir() or (obstacle := files.obstacle(path)):
        wrong = "is a folder" if path.is_dir() else f"cannot be written ({obstacle})"
        raise RenderError(f"{path}: {wrong}; name a file in a folder that can be")
    return path


def check_native(env: Any) -> None:
    """RenderError if the environment is not one of this package's own tasks."""
    if not hasattr(env, "physics"):
        film = ", though a video of it can be made (.mp4, .gif)" if reference.own(env.name) else ""
        raise RenderError(f"no pictures of {env.name} on the backend {env.backend}: only of native tasks (envs.TASKS){film}")


def check(env: Any, path_trajectory: str | os.PathLike | None, path_video: str | os.PathLike | None) -> None:
    """RenderError if one of these (None: not wanted) cannot be made. For before the episodes, which may be slow."""
    for path, suffixes in ((path_trajectory, TRAJECTORIES), (path_video, VIDEOS)):
        if path:
            suffixed(path, suffixes)
    if path_trajectory or path_video and not reference.own(env.name):
        check_native(env)
        if env.task.model().nq < 2:
            raise RenderError(f"no pictures of {env.name}: they need x and y as the first two coordinates of its model")
    if path_video and not reference.own(env.name):
        opengl()


class Rollout(NamedTuple):
    """E episodes side by side over T steps, as numpy arrays; everything is at the state that the step led to."""

    qpos: np.ndarray  # (T, E, nq)
    speed: np.ndarray  # (T, E) m/s that a Velocity task limits; 0 in others
    reward: np.ndarray  # (T, E) raw
    cost: np.ndarray  # (T, E) raw
    valid: np.ndarray  # (T, E) bool; False behind the episode's end


def rollout(env: Env, policy: Policy, key: jax.Array, episodes: int) -> Rollout:
    """Runs `episodes` episodes of a policy; RenderError if the environment is not one of this package's own tasks."""
    check_native(env)
    key_reset, key_policy = jax.random.split(key)

    def one(carry, key):
        state, obs, valid = carry
        action = policy(obs, key)
        # Once more without env.step's reset, which replaces the last state of an episode.
        _, readings = env.physics.step(state.physics, jnp.clip(action, env.action_low, env.action_high))
        state, t = env.step(state, action)
        out = Rollout(readings.qpos, speed(env.task, readings), t.reward, t.cost, valid)
        return (state, t.obs, valid & ~(t.terminated | t.truncated)), out

    @jax.jit
    def run(key_reset, key_policy):
        state, obs = env.reset(jax.random.split(key_reset, episodes))
        start = (state, obs, jnp.ones(episodes, bool))
        return jax.lax.scan(one, start, jax.random.split(key_policy, env.horizon))[1]

    return jax.tree.map(np.asarray, run(key_reset, key_policy))


def speed(task: Task, r: Readings) -> jax.Array:
    """(...,) m/s, what a Velocity task compares with its threshold; 0 for other tasks."""
    return task.speed(r) if isinstance(task, Velocity) else jnp.zeros(r.qpos.shape[:-1])


class Scenery(NamedTuple):
    """What of a task can be seen, m: the allowed |x| and |y|, and the radius of the circle to run around."""

    x: float | None = None
    y: float | None = None
    radius: float | None = None


def scenery(task: Task) -> Scenery:
    if isinstance(task, Run):
        return Scenery(x=task.half_width)
    if isinstance(task, Circle):
        return Scenery(x=task.wall, y=task.wall if task.walled > 1 else None, radius=task.radius)
    return Scenery()


# ---------------------------------------------------------------- trajectory plot


def trajectory(env: Env, policy: Policy, key: jax.Array, path: str | os.PathLike, episodes: int = 5) -> Path:
    """Draws `episodes` episodes from above, or for Velocity tasks their velocity over time, with the cost's boundary where it is known.

    Returns: the path written; the format follows its suffix, one of TRAJECTORIES.

    Raises:
      RenderError: another suffix, or an environment that is not a native task. One line.
    """
    from matplotlib.figure import Figure

    path = suffixed(path, TRAJECTORIES)
    found, view = rollout(env, policy, key, episodes), scenery(env.task)
    returns, costs = (np.where(found.valid, x, 0).sum(0) for x in (found.reward, found.cost))
    limited = isinstance(env.task, Velocity)
    corridor = view.x is not None and not view.radius
    figure = Figure(figsize=(9, 3.5) if limited or corridor else (5, 5.5), layout="constrained")
    axes = figure.subplots()
    for i in range(episodes):
        valid = found.valid[:, i]
        x, y = found.qpos[valid, i, :2].T
        if limited:
            horizontal, vertical = np.arange(1, valid.sum() + 1), found.speed[valid, i]
        else:
            horizontal, vertical = (-y, x) if corridor else (x, y)
        costly = found.cost[valid, i] > 0
        label = lambda text: text if i == 0 else None  # once in the legend
        axes.plot(horizontal, vertical, color="#4477aa", lw=0.9, alpha=0.7, label=label("policy"))
        axes.plot(horizontal[costly], vertical[costly], ".", color=COST, ms=3, label=label("step with cost"))
        if not limited:
            axes.plot(horizontal[0], vertical[0], "o", color="black", ms=3, label=label("start"))
    boundary: dict[str, Any] = {"color": "black", "ls": "--", "lw": 1}
    if limited:
        assert isinstance(env.task, Velocity)
        axes.axhline(env.task.threshold, **boundary, label="threshold")
        axes.set(xlabel="step", ylabel="velocity (m/s)")
    else:
        if corridor:
            axes.set(xlabel="-y (m): the way to go", ylabel="x (m)")
        else:
            axes.set(xlabel="x (m)", ylabel="y (m)", aspect="equal")
        if view.radius:
            angle = np.linspace(0, 2 * np.pi, 200)
            axes.plot(view.radius * np.cos(angle), view.radius * np.sin(angle), color=RING[:3], lw=1, label="circle")
        sides = ((axes.axhline if corridor else axes.axvline, view.x), (axes.axhline, view.y))
        walls = [(draw, sign * bound) for draw, bound in sides if bound is not None for sign in (1, -1)]
        for i, (draw, wall) in enumerate(walls):
            draw(wall, **boundary, label=None if i else "boundary")
    axes.set_title(f"{env.name}: {episodes} episodes, return {returns.mean():.1f}, cost {costs.mean():.1f}", fontsize=10)
    figure.legend(loc="outside lower center", ncols=5, fontsize=8, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return path


# ---------------------------------------------------------------- OpenGL

_PROBE = """
import importlib, os, sys, mujoco
context = importlib.import_module("mujoco." + sys.argv[1]).GLContext(64, 64)
context.make_current()
mujoco.MjrContext(mujoco.MjModel.from_xml_string("<mujoco/>"), mujoco.mjtFontScale.mjFONTSCALE_100)
os._exit(0)
"""


@functools.cache
def opengl():
    """The module whose `GLContext(width, height)` works here without a screen; RenderError if none does.

    Each way is tried in a process of its own: PyOpenGL keeps the first platform it was loaded for, working or not.
    """
    own = {"Linux": ("egl", "osmesa"), "Darwin": ("cgl",)}.get(platform.system(), ("glfw",))
    ways = (os.environ["MUJOCO_GL"],) if os.environ.get("MUJOCO_GL") else own
    for way in ways:
        tried = subprocess.run([sys.executable, "-c", _PROBE, way], env=os.environ | {"MUJOCO_GL": way}, capture_output=True)
        if tried.returncode == 0:
            return importlib.import_module(f"mujoco.{way}")
    raise RenderError(
        f"no OpenGL works here (tried {', '.join(ways)}): install one, e.g. `apt-get install libosmesa6` or "
        "`libegl1 libgl1-mesa-dri`, or draw a trajectory instead, which needs none"
    )


class Canvas:
    """An off-screen picture of a model, as a context manager."""

    def __init__(self, task: Task, width: int, height: int):
        self.task, self.view = task, scenery(task)
        self.model = copy.copy(task.model())  # its looks are changed below
        self.model.vis.global_.offwidth, self.model.vis.global_.offheight = width, height
        # Safety-Gymnasium's models have a bare floor, drawn smaller than it is: make it endless and put tiles on it.
        self.bare = [i for i in range(self.model.ngeom) if self.model.geom_type[i] == mujoco.mjtGeom.mjGEOM_PLANE]
        self.bare = [i for i in self.bare if self.model.geom_matid[i] == -1]
        self.model.geom_size[self.bare, :2], self.model.geom_rgba[self.bare] = 0, GROUND
        if not self.model.nlight:  # those models have none
            self.model.vis.headlight.ambient, self.model.vis.headlight.diffuse = (0.5,) * 3, (0.5,) * 3
        self.data = mujoco.MjData(self.model)
        self.rect = mujoco.MjrRect(0, 0, width, height)
        self.context = opengl().GLContext(width, height)
        self.context.make_current()
        self.drawing = mujoco.MjrContext(self.model, mujoco.mjtFontScale.mjFONTSCALE_100)
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self.drawing)
        self.scene = mujoco.MjvScene(self.model, maxgeom=1000)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.drawing.free()
        self.context.free()

    def camera(self) -> mujoco.MjvCamera:
        """Circle from afar, Run from behind, Velocity as the model's own `track` camera sees it; other tasks from behind, too."""
        camera, (x, y) = mujoco.MjvCamera(), self.data.qpos[:2]
        if self.view.radius:
            beyond = lambda z: z - np.clip(z, -1.5, 1.5)  # stands still until the robot gets far away
            camera.lookat, camera.distance, camera.azimuth, camera.elevation = (beyond(x), beyond(y), 0), 6.0, 90, -60
        elif self.view.x or "track" not in {self.model.camera(i).name for i in range(self.model.ncam)}:
            camera.lookat, camera.distance, camera.azimuth, camera.elevation = (x, y - 0.7, 0.1), 3.0, -90, -35
        else:
            camera.type = mujoco.mjtCamera.mjCAMERA_FIXED
            camera.fixedcamid = self.model.camera("track").id
        return camera

    def _add(self, kind, size, position, rgba) -> None:
        geom = self.scene.geoms[self.scene.ngeom]
        mujoco.mjv_initGeom(geom, kind, np.float64(size), np.float64(position), np.eye(3).ravel(), np.float32(rgba))
        self.scene.ngeom += 1

    def _decorate(self) -> None:
        """Tiles, walls and circle; the walls are as far along as the tiles."""
        box, reach = mujoco.mjtGeom.mjGEOM_BOX, 8
        x, y = (0, 0) if self.view.radius else np.round(self.data.qpos[:2]).astype(int)
        for i in range(x - reach, x + reach):
            for j in range(y - reach, y + reach):
                if (i + j) % 2:
                    self._add(box, (0.5, 0.5, 0.001), (i + 0.5, j + 0.5, 0.001), TILE)
        if self.view.radius:
            self._add(mujoco.mjtGeom.mjGEOM_CYLINDER, (self.view.radius, 0.003, 0), (0, 0, 0.003), RING)
        length = 3.5 if self.view.radius else reach
        for side in (-1, 1):
            if self.view.x is not None:
                self._add(box, (0.02, length, 0.1), (side * self.view.x, y, 0.1), WALL)
            if self.view.y is not None:
                self._add(box, (length, 0.02, 0.1), (x, side * self.view.y, 0.1), WALL)

    def draw(self, qpos: np.ndarray, text: dict[str, str], tinted: bool) -> np.ndarray:
        """The picture (height, width, 3), uint8, of a state (nq,), with `text` in its corner, red if `tinted`."""
        self.data.qpos[:] = qpos
        mujoco.mj_forward(self.model, self.data)
        everything = mujoco.mjtCatBit.mjCAT_ALL
        mujoco.mjv_updateScene(self.model, self.data, mujoco.MjvOption(), None, self.camera(), everything, self.scene)
        if self.bare:
            self._decorate()
        self.context.make_current()
        mujoco.mjr_render(self.rect, self.scene, self.drawing)
        columns = "\n".join(text), "\n".join(text.values())
        font, corner = mujoco.mjtFont.mjFONT_NORMAL, mujoco.mjtGridPos.mjGRID_TOPLEFT
        mujoco.mjr_overlay(font, corner, self.rect, *columns, self.drawing)
        picture = np.empty((self.rect.height, self.rect.width, 3), np.uint8)
        mujoco.mjr_readPixels(picture, None, self.rect, self.drawing)
        picture = picture[::-1]  # OpenGL counts rows from the bottom
        return tint(picture) if tinted else picture


def tint(picture: np.ndarray) -> np.ndarray:
    """A picture (height, width, 3), uint8, of a step with cost."""
    return (0.65 * picture + 0.35 * 255 * np.array(COST)).astype(np.uint8)


# ---------------------------------------------------------------- video


def video(
    env: Env, policy: Policy, key: jax.Array, path: str | os.PathLike, size: tuple[int, int] | None = None, frames: int = 300
) -> Path:
    """Films one episode: return and cost so far in the corner, red where the steps shown cost something.

    It plays in real time, or faster where that would be fewer than 15 pictures per second.

    Args:
      path: where to, with a suffix of VIDEOS; a GIF if it ends in .gif, or without ffmpeg.
      size: width and height in pixels, even numbers; None: 640 x 480, or 400 x 300 for a GIF.
      frames: most pictures to draw; where an episode has more environment steps, several share one.

    Returns: the path written, with the suffix .gif where there is no ffmpeg.

    Raises:
      RenderError: no OpenGL, an environment that cannot be drawn, another suffix, or ffmpeg cannot write this format. One line.
    """
    path = suffixed(path, VIDEOS)
    path = path if shutil.which("ffmpeg") else path.with_suffix(".gif")
    if reference.own(env.name):
        drawn, rate = own_pictures(env, policy, key, frames)
        path.parent.mkdir(parents=True, exist_ok=True)
        (write_gif if path.suffix == ".gif" else write_with_ffmpeg)(path, iter(drawn), rate)
        return path
    size = size or (GIF_SIZE if path.suffix == ".gif" else SIZE)
    opengl()  # before the work, not after it
    found = rollout(env, policy, key, 1)
    n, seconds = int(found.valid.sum()), env.task.model().opt.timestep * env.task.substeps
    shown, rate = steps_shown(n, seconds, frames)
    returns, costs = np.cumsum(found.reward[:, 0]), np.cumsum(found.cost[:, 0])

    def pictures() -> Iterator[np.ndarray]:
        before = 0
        with Canvas(env.task, *size) as canvas:
            for t in shown:
                text = {"return": f"{returns[t]:.1f}", "cost": f"{costs[t]:g}", "step": f"{t + 1} of {env.horizon}"}
                yield canvas.draw(found.qpos[t, 0], text, costs[t] > before)
                before = costs[t]

    path.parent.mkdir(parents=True, exist_ok=True)
    (write_gif if path.suffix == ".gif" else write_with_ffmpeg)(path, pictures(), rate)
    return path


def steps_shown(n: int, seconds: float, frames: int) -> tuple[np.ndarray, float]:
    """Which of n steps of so many seconds to draw, at most about `frames` of them and the last in any case; pictures per second."""
    stride = max(1, round(1 / (RATES[1] * seconds)), -(-n // frames))
    return np.unique(np.append(np.arange(stride - 1, n, stride), n - 1)), max(RATES[0], 1 / (seconds * stride))


def own_pictures(env: Any, policy: Policy, key: jax.Array, frames: int) -> tuple[list[np.ndarray], float]:
    """The pictures that an environment of the user's own draws of one episode, red as in `video`, and how many per second.

    Raises:
      RenderError: it draws none.
    """
    key_reset, key_policy = jax.random.split(key)

    def one(carry, key):
        before, obs = carry
        state, t = env.step(before, policy(obs, key))
        return (state, t.obs), (state.actions[0, before.n[0]], t.cost[0], t.terminated[0] | t.truncated[0])

    @jax.jit
    def run(key_reset, key_policy):
        start = env.reset(jax.random.split(key_reset, 1))
        return start[0].seed[0], jax.lax.scan(one, start, jax.random.split(key_policy, env.horizon))[1]

    seed, (actions, costs, done) = jax.tree.map(np.asarray, run(key_reset, key_policy))
    n = int(np.argmax(done)) + 1
    try:
        shown, rate = steps_shown(n, 1 / env.frame_rate, frames)
        pictures = env.pictures(seed, actions[:n], set(shown.tolist()))
    except WorkerError as error:
        raise RenderError(str(error)) from None
    costly = [costs[start:stop].any() for start, stop in zip(np.append(0, shown[:-1] + 1), shown + 1)]
    even = lambda picture: picture[: picture.shape[0] // 2 * 2, : picture.shape[1] // 2 * 2]  # ffmpeg's yuv420p needs that
    return [even(tint(picture) if red else picture) for picture, red in zip(pictures, costly)], rate


def write_gif(path: Path, pictures: Iterator[np.ndarray], rate: float) -> None:
    """Writes pictures (height, width, 3), `rate` of them per second."""
    import imageio.v3

    imageio.v3.imwrite(path, list(pictures), duration=1000 / rate, loop=0)


def write_with_ffmpeg(path: Path, pictures: Iterator[np.ndarray], rate: float) -> None:
    """As `write_gif`, in the format that the path's suffix means to ffmpeg."""
    first = next(pictures)
    raw = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{first.shape[1]}x{first.shape[0]}", "-r", f"{rate:g}", "-i", "-"]
    command = ["ffmpeg", "-v", "error", "-y", *raw, "-pix_fmt", "yuv420p", str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdin and process.stderr
        try:
            for picture in itertools.chain([first], pictures):
                process.stdin.write(np.ascontiguousarray(picture).data)
            process.stdin.close()
        except BrokenPipeError:  # ffmpeg gave up: its own words follow
            pass
        message = process.stderr.read().decode(errors="replace").strip()
    if process.returncode:
        raise RenderError(f"{path}: ffmpeg cannot write it ({' '.join(message.split())[-200:]}): try .mp4 or .gif")


def main(words: list[str] | None = None) -> None:
    """Pictures of an environment under random actions: .png, .pdf and .svg trajectories, or a video."""
    import envs

    parser = argparse.ArgumentParser(prog="python -m envs.render", description="Pictures of an environment under random actions.")
    parser.add_argument("env", metavar="ENVIRONMENT")
    parser.add_argument("paths", metavar="PATH", nargs="+", help=".png, .pdf, .svg: trajectories; .mp4, .gif: a video")
    parser.add_argument("--horizon", type=int, metavar="N", help="for an environment of your own: steps after which an episode is cut off")
    args = parser.parse_args(words)
    for path in args.paths:
        suffixed(path, TRAJECTORIES + VIDEOS)
    env = envs.make(args.env, horizon=args.horizon)
    policy = lambda obs, key: jax.random.uniform(key, (*obs.shape[:-1], env.action_size), minval=-1.0)
    for path in args.paths:
        draw = trajectory if Path(path).suffix in TRAJECTORIES else video
        print(draw(env, policy, jax.random.key(0), path))


if __name__ == "__main__":
    import envs

    try:
        with reference.reported():
            main()
    except (RenderError, envs.UnknownName) as error:
        sys.exit(print(f"error: {error}", file=sys.stderr) or 2)
