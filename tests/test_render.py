"""envs/render.py: what is drawn is what happened; no OpenGL where none is needed, one clear line where it is missing."""

import copy
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import imageio.v3
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import envs
from algos import training
from envs import render

ROOT, KEY = Path(__file__).parents[1], jax.random.key(0)


def short(name="SafetyPointRun", horizon=60, **constants):
    """A task cut off after `horizon` steps, with some of its constants changed, on C MuJoCo."""
    env = envs.make(name, "mujoco")
    task = copy.copy(env.task)
    vars(task).update(horizon=horizon, **constants)
    return envs.Env(task, env.physics, "mujoco")


WIDE, NARROW = {"half_width": 5.0}, {"half_width": 0.01}  # no step of a short episode costs anything; nearly all do


def forward(obs, key):
    return jnp.broadcast_to(jnp.array([1.0, 0.0]), (*obs.shape[:-1], 2))


def needs_opengl():
    try:
        render.opengl()
    except render.RenderError as error:
        pytest.skip(str(error))


def has_red(picture):
    red, green, blue = np.moveaxis(picture[..., :3].astype(int), -1, 0)
    return (red > 180) & (green < 80) & (blue < 80)


def test_rollout_is_the_environments_own():
    env = short("SafetyHopperVelocity", 120)
    policy = lambda obs, key: jax.random.uniform(key, (*obs.shape[:-1], 3), minval=-1.0)
    found = render.rollout(env, policy, KEY, 2)
    key_reset, key_policy = jax.random.split(KEY)

    @jax.jit
    def run():
        def one(carry, key):
            state, obs = carry
            state, transition = env.step(state, policy(obs, key))
            return (state, transition.obs), transition

        return jax.lax.scan(one, env.reset(jax.random.split(key_reset, 2)), jax.random.split(key_policy, env.horizon))[1]

    transitions = jax.tree.map(np.asarray, run())
    ended = np.cumsum(transitions.terminated | transitions.truncated, 0)
    assert transitions.terminated.any(0).all(), "no episode ended early: the test is empty"
    valid = np.concatenate([np.ones((1, 2), bool), ended[:-1] == 0])
    np.testing.assert_array_equal(found.valid, valid)
    np.testing.assert_allclose(found.reward[valid], transitions.reward[valid], rtol=1e-5)
    # The observation is qpos without x, then qvel: what is drawn is the state before any reset, also at the end.
    np.testing.assert_allclose(found.qpos[valid, 1:], transitions.next_obs[valid, :5], atol=1e-6)
    np.testing.assert_array_equal(found.speed[valid] > env.task.threshold, found.cost[valid] > 0)


@pytest.mark.parametrize("name", [name for name in envs.TASKS if not name.endswith("Velocity")])
def test_scenery_is_where_the_cost_is(name):
    task = envs.TASKS[name]
    model, view = task.model(), render.scenery(task)
    xy = np.random.default_rng(0).uniform(-2, 2, (500, 2)).astype(np.float32)
    qpos = jnp.zeros((500, model.nq)).at[:, :2].set(xy)
    readings = envs.Readings(qpos, jnp.zeros((500, model.nv)), 0 * qpos, jnp.zeros((500, model.nsensordata)))
    cost = np.asarray(task.evaluate(readings, jnp.zeros((500, model.nu)))[1])
    outside = (np.abs(xy) > [view.x, np.inf if view.y is None else view.y]).any(1)
    np.testing.assert_array_equal(cost, outside)


def test_trajectory(tmp_path):
    path = render.trajectory(short(**WIDE), forward, KEY, tmp_path / "new" / "a.png", episodes=2)
    assert path == tmp_path / "new" / "a.png" and has_red(imageio.v3.imread(path)).sum() < 50  # the legend's dot
    render.trajectory(short(**NARROW), forward, KEY, path, episodes=2)
    assert has_red(imageio.v3.imread(path)).sum() > 200


class Plain(envs.Task):
    """A task as a reader of README adds one: without corridor, circle or threshold."""

    name, reference_id, horizon, substeps, cost = "Plain", "Plain-v0", 30, 10, "never"
    robot = envs.TASKS["SafetyPointRun"]
    model, initial, observe = robot.model, robot.initial, robot.observe

    def evaluate(self, r, action):
        return r.qpos[..., 0], 0 * r.qpos[..., 0], jnp.zeros(r.qpos.shape[:-1], bool)


def test_a_task_of_the_users_own_is_drawn(tmp_path):
    env = envs.Env(Plain(), short().physics, "mujoco")
    picture = imageio.v3.imread(render.trajectory(env, forward, KEY, tmp_path / "a.png", episodes=2))
    assert picture[..., :3].std() > 10
    needs_opengl()
    path = render.video(env, forward, KEY, tmp_path / "a.gif", size=(160, 120), frames=5)
    assert imageio.v3.imread(path).shape == (5, 120, 160, 3)


def test_trajectory_and_training_need_no_opengl(tmp_path):
    code = f"""
import sys, jax, jax.numpy as jnp
sys.path.insert(0, {str(ROOT / "tests")!r})
import algos.marvel, test_render
from envs import render
render.trajectory(test_render.short(), test_render.forward, jax.random.key(0), {str(tmp_path / "a.pdf")!r}, 1)
assert not [name for name in sys.modules if name.split(".")[0] == "OpenGL" or name in ("mujoco.egl", "mujoco.osmesa")]
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, env=os.environ | {"MUJOCO_GL": "disable"})
    assert (tmp_path / "a.pdf").read_bytes().startswith(b"%PDF")


def test_without_opengl(tmp_path, monkeypatch):
    monkeypatch.setenv("MUJOCO_GL", "none-such")
    render.opengl.cache_clear()
    try:
        with pytest.raises(render.RenderError, match="tried none-such.*libosmesa6.*trajectory") as caught:
            render.video(short(), forward, KEY, tmp_path / "a.gif")
    finally:
        render.opengl.cache_clear()
    assert len(str(caught.value).splitlines()) == 1 and not list(tmp_path.iterdir())


def test_an_unknown_suffix_is_refused_before_the_episodes(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))  # no ffmpeg: a video was a GIF, whatever it was called
    monkeypatch.setattr(render, "rollout", None)
    monkeypatch.setattr(training, "replayed", None)
    none = dict(export=None, video=None, trajectory=None)
    replayed = lambda flag: lambda *args: training.show_episodes(SimpleNamespace(**none | {flag: args[-1]}), None, None)
    for draw, name, said in (
        (render.video, "a.foo", "its suffix is '.foo'; name a file that ends in .mp4, .gif, "),
        (render.video, "a", "its suffix is ''; name"),
        (render.trajectory, "a.foo", "its suffix is '.foo'; name a file that ends in .png, .pdf or .svg$"),
        (lambda *args: render.main(["SafetyPointRun", str(args[-1])]), "a.foo", "its suffix is '.foo'; name a file that ends in .png, "),
        (replayed("video"), "a.foo", "its suffix is '.foo'; name a file that ends in .mp4, "),
        (replayed("trajectory"), "a.foo", "its suffix is '.foo'; name a file that ends in .png, "),
    ):
        with pytest.raises(render.RenderError, match=f"^{tmp_path / name}: {said}"):
            draw(None, forward, KEY, tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_foreign_environment(tmp_path):
    foreign = SimpleNamespace(name="SafetyPointGoal1-v0", backend="safety-gymnasium")
    with pytest.raises(render.RenderError, match="SafetyPointGoal1-v0 on the backend safety-gymnasium"):
        render.trajectory(foreign, forward, KEY, tmp_path / "a.png")


def test_gif(tmp_path, monkeypatch):
    needs_opengl()
    monkeypatch.setenv("PATH", str(tmp_path))  # no ffmpeg
    path = render.video(short(**WIDE), forward, KEY, tmp_path / "a.mp4", size=(160, 120), frames=10)
    assert path == tmp_path / "a.gif"
    safe = imageio.v3.imread(path)
    assert safe.shape == (10, 120, 160, 3)
    assert (safe[0] != safe[-1]).mean() > 0.02, "nothing moves"
    costly = imageio.v3.imread(render.video(short(**NARROW), forward, KEY, path, size=(160, 120), frames=10))
    redness = lambda video: (video[..., 0].astype(int) - video[..., 1])[-1, 60:].mean()
    assert redness(costly) > redness(safe) + 20


@pytest.mark.parametrize("name", ["SafetyAntCircle2", "SafetySwimmerVelocity"])
def test_every_kind_of_scene(name):
    needs_opengl()
    task = envs.TASKS[name]
    pictures = []
    with render.Canvas(task, 160, 120) as canvas:
        for x in (0.0, 0.3):
            qpos = task.model().qpos0.copy()
            qpos[0] += x
            pictures.append(canvas.draw(qpos, {"return": "1.5"}, False))
    assert pictures[0].shape == (120, 160, 3) and pictures[0].std() > 10
    assert (pictures[0] != pictures[1]).mean() > 0.002
    assert task.model().vis.global_.offwidth != 160, "the task's own model was changed"


def fake_ffmpeg(folder, script):
    path = folder / "ffmpeg"
    path.write_text("#!/bin/sh\n" + script)
    path.chmod(0o755)


def test_ffmpeg(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    pictures = [np.full((4, 6, 3), i, np.uint8)[::-1] for i in range(3)]
    fake_ffmpeg(tmp_path, 'for last in "$@"; do :; done\ncat > "$last"\n')
    render.write_with_ffmpeg(tmp_path / "a.mp4", iter(pictures), 25.0)
    assert (tmp_path / "a.mp4").read_bytes() == b"".join(p.tobytes() for p in pictures)
    fake_ffmpeg(tmp_path, "echo Unable to choose >&2\necho a format >&2\nexit 1\n")
    with pytest.raises(render.RenderError, match="a.xyz: ffmpeg cannot write it .Unable to choose a format."):
        render.write_with_ffmpeg(tmp_path / "a.xyz", iter(pictures), 25.0)
