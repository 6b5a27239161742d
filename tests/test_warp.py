"""envs/physics_warp.py: what it asks of the machine, its buffers, no host callbacks, and how far it is from C MuJoCo.

Warp runs on a CPU here, slowly, and compiles its kernels for a minute the first time: what steps is marked slow.
"""

import importlib.metadata

import jax
import jax.numpy as jnp
import mujoco
import numpy as np
import pytest

import envs
from envs import deviation, physics_mjx, physics_mujoco, physics_warp

POINT, CAR, ANT, CHEETAH = "SafetyPointRun", "SafetyCarRun", "SafetyAntRun", "SafetyHalfCheetahVelocity"
needs_warp = pytest.mark.skipif(not physics_warp.installed(), reason="warp-lang is not installed")


@pytest.fixture
def on_cpu(monkeypatch):
    monkeypatch.setenv(physics_warp.ON_CPU, "1")


def test_every_task_has_bounds():
    assert set(deviation.WARP_BOUNDS) == set(envs.TASKS)


# What it asks of the machine: one line each


def refused(name=POINT) -> str:
    with pytest.raises(envs.UnknownName) as error:
        envs.make(name, "warp")
    assert "\n" not in str(error.value)
    return str(error.value)


def version_is(monkeypatch, version):
    def found(name, real=importlib.metadata.version):
        if name != "warp-lang":
            return real(name)
        if version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(importlib.metadata, "version", found)


def test_without_a_gpu_another_backend_is_named(monkeypatch):
    monkeypatch.delenv(physics_warp.ON_CPU, raising=False)
    assert "NVIDIA GPU" in refused() and "--backend mujoco" in refused()


@pytest.mark.parametrize("version", [None, "1.7.0"])
def test_without_its_package_the_requirements_are_named(version, on_cpu, monkeypatch):
    version_is(monkeypatch, version)
    assert "pip install -r requirements-gpu.txt" in refused() and (version or "warp-lang") in refused()


def test_where_kernels_cannot_be_kept_the_variable_is_named(on_cpu, monkeypatch, tmp_path):
    version_is(monkeypatch, physics_warp.WARP)
    file = tmp_path / "file"
    file.touch()
    monkeypatch.setenv("WARP_CACHE_PATH", str(file / "warp"))
    assert "WARP_CACHE_PATH" in refused() and sorted(tmp_path.iterdir()) == [file]


def test_the_default_on_a_gpu(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(physics_mujoco, "WORKERS", 2)
    monkeypatch.setenv("WARP_CACHE_PATH", str(tmp_path))
    envs.warn_once.cache_clear()
    version_is(monkeypatch, physics_warp.WARP)
    assert {n for n in envs.TASKS if envs.fastest(n) == "warp"} == set(envs.FASTER_ON_WARP) and envs.fastest(POINT) == "mjx"
    assert capsys.readouterr() == ("", "")
    version_is(monkeypatch, None)
    assert envs.fastest(CHEETAH) == envs.fastest(CHEETAH) == "mjx"
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "requirements-gpu.txt" in err
    for cores, tasks in ((2, {ANT}), (4, {ANT, CHEETAH}), (16, {ANT, CHEETAH, POINT})):  # the host's cores are faster for few environments
        monkeypatch.setattr(physics_mujoco, "WORKERS", cores)
        assert {n for n in (POINT, CAR, ANT, CHEETAH) if envs.fastest(n) == "mujoco"} == tasks
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert envs.fastest(CHEETAH) == "mjx" and capsys.readouterr() == ("", "")


# Its buffers


def test_buffers_hold_all_that_may_touch_at_once():
    """Every contact and row that C MuJoCo makes, with the robot pressed into the floor in random poses, has its place."""
    rng = np.random.default_rng(0)
    for name, task in envs.TASKS.items():
        model = physics_mjx.only_floor(task.model(), task.touching)
        contacts, rows = physics_warp.sizes(model)
        data, most = mujoco.MjData(model), np.zeros(2, int)
        for _ in range(200):
            data.qpos[:] = model.qpos0 + rng.normal(size=model.nq)
            if model.jnt_type[0] == mujoco.mjtJoint.mjJNT_FREE:
                data.qpos[2] = rng.uniform(-3, 0.5)
            mujoco.mj_normalizeQuat(model, data.qpos)
            mujoco.mj_forward(model, data)
            most = np.maximum(most, (data.ncon, data.nefc))
        assert (most <= (contacts, rows)).all(), name
        assert contacts == 0 or most[0] > 0, name


def test_the_pairs_are_those_of_the_engine():
    body = '<body pos="0 0 {}"><freejoint/><geom size=".1"/><body pos=".1 0 0"><joint/><geom size=".1"/></body></body>'
    xml = f'<mujoco><worldbody><geom type="plane" size="1 1 1"/>{body.format(0)}{body.format(1)}</worldbody></mujoco>'
    model = mujoco.MjModel.from_xml_string(xml)
    # The plane (0) with all; of two bodies of two geoms, (1, 2) and (3, 4) are a parent and its child.
    assert physics_warp.pairs(model) == [(0, 1), (0, 2), (0, 3), (0, 4), (1, 3), (1, 4), (2, 3), (2, 4)]
    assert physics_warp.sizes(model) == (8, 8 * 4)
    with pytest.raises(NotImplementedError):
        physics_warp.sizes(mujoco.MjModel.from_xml_string(xml.replace("</worldbody>", '<geom type="box" size="1 1 1"/></worldbody>')))


@needs_warp
@pytest.mark.slow
def test_all_axes_of_vmap_share_buffers_of_their_size(on_cpu):
    physics = envs.make(ANT, "warp").physics
    assert physics.data(6)._impl.naconmax == 6 * physics.contacts and physics.data(6)._impl.njmax == physics.constraints
    found, real = [], physics.data
    physics.data = lambda rows: found.append(rows) or real(rows)
    zeros = lambda *shape: jnp.zeros((*shape, physics._host.nq))
    where = jnp.ones((2, 3, 4), bool)
    reset = jax.vmap(jax.vmap(physics.reset))
    jax.eval_shape(reset, zeros(2, 3, 4), jnp.zeros((2, 3, 4, physics._host.nv)), where)
    assert max(found) == 24


@needs_warp
@pytest.mark.slow
def test_a_row_whose_buffers_overflow_is_not_a_number(on_cpu):
    env, small = (envs.make(ANT, "warp") for _ in range(2))  # JAX keeps what it has traced of one
    state, _ = env.reset(jax.random.split(jax.random.key(0), 2))
    sound = jax.jit(lambda s: env.step(s, jnp.zeros((2, 8))))(state)[1]
    assert np.isfinite(np.asarray(sound.reward)).all() and np.isfinite(np.asarray(sound.next_obs)).all()
    small.physics.constraints = 3  # rows of constraints that a world has room for
    wrong = jax.jit(lambda s: small.step(s, jnp.zeros((2, 8))))(state)[1]
    assert np.isnan(np.asarray(wrong.reward)).all() and np.isnan(np.asarray(wrong.next_obs)).any(-1).all()


# The program


@needs_warp
@pytest.mark.slow
def test_no_host_callback_but_warps_own_call(on_cpu):
    env = envs.make(ANT, "warp")

    def collect(key):
        state, _ = env.reset(jax.random.split(key, 3))
        return jax.lax.scan(lambda s, _: env.step(s, jnp.zeros((3, 8))), state, length=4)

    text = jax.jit(jax.vmap(collect)).lower(jax.random.split(jax.random.key(0), 2)).as_text()
    assert "stablehlo.while" in text and "callback" not in text
    targets = {line.split("@")[1].split("(")[0] for line in text.splitlines() if "stablehlo.custom_call @" in line}
    assert any("func_wrapper" in target for target in targets), targets  # mujoco/mjx/warp/ffi.py


# Deviation from C MuJoCo


@needs_warp
@pytest.mark.slow
@pytest.mark.parametrize("name", [POINT, CAR, ANT, CHEETAH, "SafetyHopperVelocity", "SafetyAntVelocity"])
def test_one_step_deviates_from_c_mujoco_within_bounds(name, on_cpu):
    found = deviation.measure(name, backend="warp")
    assert not deviation.past(found, deviation.WARP_BOUNDS[name]), found


@needs_warp
@pytest.mark.slow
def test_seeds_restarts_and_diverged_rows(on_cpu):
    """Three environments of each of two seeds, vmap(scan): each steps as it would alone, restarts, and rests where it diverged."""
    env = envs.make(CHEETAH, "warp")
    keys = jax.random.split(jax.random.key(0), (2, 3))
    actions = jax.random.uniform(jax.random.key(1), (2, 4, 3, env.action_size), minval=-1.0)

    def roll(keys, actions):
        state, _ = env.reset(keys)
        state = state._replace(t=jnp.array([0, env.horizon - 2, 0], jnp.int32))
        qvel = state.physics.qvel.at[2, 0].set(jnp.inf)
        state = state._replace(physics=state.physics._replace(qvel=qvel))

        def step(state, action):
            after, t = env.step(state, action)
            return after, (after.physics, t)

        return state.physics, jax.lax.scan(step, state, actions)[1]

    first, (physics, t) = jax.jit(jax.vmap(roll))(keys, actions)
    assert all(np.isfinite(np.asarray(x)).all() for x in (*physics, *t))
    assert np.asarray(t.truncated[0]).tolist() == [[False] * 3, [False, True, False], [False] * 3, [False] * 3]
    assert (physics.qpos[:, 0, 2] == first.qpos[:, 2]).all() and (physics.qvel[:, 0, 2] == 0).all()
    assert (physics.qpos[:, 1, 2] != first.qpos[:, 2]).any()
    alone, (alone_physics, _) = jax.jit(roll)(keys[1], actions[1])
    np.testing.assert_allclose(alone.qpos, first.qpos[1], atol=1e-7)
    np.testing.assert_allclose(alone_physics.qpos, physics.qpos[1], atol=1e-4)
