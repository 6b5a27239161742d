"""envs/physics_mjx.py: the rules of `Env`, no host callbacks, its precision, and how far it is from C MuJoCo."""

from functools import cache

import jax
import jax.numpy as jnp
import mujoco
import numpy as np
import pytest

import envs
from envs import deviation, physics_mjx, physics_mujoco
from envs.physics_mjx import MjxState
from envs.rollout import collect, start_rollout

POINT, CAR, ANT, CHEETAH = "SafetyPointRun", "SafetyCarRun", "SafetyAntRun", "SafetyHalfCheetahVelocity"
ROBOTS = {type(envs.TASKS[name].robot).__name__: name for name in (POINT, CAR, ANT)}
STEPS, SHAPE = 560, (2, 3)
NAN_AT, INF_AT = 530, 545


@cache
def rolled():
    """Point from `SHAPE` keys for STEPS random steps, past the end of an episode; compiled once for all tests.

    Gives (env, keys, actions, first obs, states with the first in front, transitions). In row (0, 0) an action at NAN_AT is
    NaN; row (1, 2) has an infinite velocity before the step at INF_AT.
    """
    env = envs.make(POINT, "mjx")
    keys = jax.random.split(jax.random.key(0), 6).reshape(SHAPE)
    actions = jax.random.uniform(jax.random.key(2), (STEPS // 8, *SHAPE, 2), minval=-1.5, maxval=1.5).repeat(8, 0)
    actions = actions.at[NAN_AT, 0, 0, 0].set(jnp.nan)

    @jax.jit
    def roll(keys, actions):
        def step(state, x):
            i, action = x
            qvel = state.physics.qvel
            qvel = jnp.where(i == INF_AT, qvel.at[1, 2].set(jnp.inf), qvel)
            state, transition = env.step(state._replace(physics=state.physics._replace(qvel=qvel)), action)
            return state, (state, transition)

        # A step from the end of an episode resets as `env.reset(keys)` does, which would be compiled on top.
        ended = envs.EnvState(MjxState(*(jnp.zeros((*SHAPE, 3)) for _ in range(4))), jnp.full(SHAPE, 499, jnp.int32), keys)
        steps = jnp.arange(-1, STEPS), jnp.concatenate([jnp.zeros((1, *SHAPE, 2)), actions])
        _, (states, t) = jax.lax.scan(step, ended, steps)
        return t.obs[0], states, jax.tree.map(lambda x: x[1:], t)

    return env, keys, actions, *roll(keys, actions)


def position(physics):
    """(..., nq) in float64."""
    return np.asarray(physics.qpos, float) + np.asarray(physics.rest, float)


# No host in the program


def program(name, backend, platforms):
    """The texts, per platform, of the program in which Marvel resets and steps 2 environments for each of 2 seeds."""
    env = envs.make(name, backend)

    def program(key):
        policy = lambda obs, key, elapsed: jax.random.uniform(key, (*obs.shape[:-1], env.action_size))
        return collect(start_rollout(key, env, 2), policy, key, env, 3)[1:]

    traced = jax.jit(jax.vmap(program)).trace(jax.random.split(jax.random.key(0), 2))
    return [traced.lower(lowering_platforms=(p,)).as_text() for p in platforms]


def test_no_host_callback_on_any_platform():
    assert "callback" in program(POINT, "mujoco", ["cpu"])[0]
    for text in program(POINT, "mjx", ["cpu", "cuda", "tpu"]):
        assert "stablehlo.while" in text and "callback" not in text
        assert not any(word in text for word in ("infeed", "outfeed", "stablehlo.send", "stablehlo.recv"))
        products = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
        assert products and all("precision = [HIGHEST, HIGHEST]" in line for line in products)  # not TF32 or bfloat16


@pytest.mark.slow
@pytest.mark.parametrize("name", envs.TASKS)
def test_no_host_callback_in_any_task(name):
    for text in program(name, "mjx", ["cpu", "cuda", "tpu"]):
        assert "stablehlo.while" in text and "callback" not in text


def test_mjx_is_the_default_where_jax_does_not_compute_on_a_cpu(monkeypatch):
    assert envs.make(POINT).backend == "mujoco"
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(physics_mujoco, "WORKERS", 2)  # with many cores C MuJoCo is faster
    assert envs.make(POINT).backend == "mjx" and envs.make(POINT, "mujoco").backend == "mujoco"


# The rules of Env


@pytest.mark.parametrize("shape", [(), (3,), (2, 3)])
def test_any_leading_batch_shape(shape, monkeypatch):
    env = envs.make(POINT, "mjx")

    # The rows' own functions take seconds to trace, and the other tests go through them.
    def reset_row(qpos, qvel):
        assert qpos.shape == qvel.shape == (3,)
        return MjxState(qpos, qpos, qvel, qvel), envs.Readings(qpos, qvel, qpos, jnp.zeros(21))

    def step_row(state, control):
        assert control.shape == (2,) and {x.shape for x in state} == {(3,)}
        return state, envs.Readings(state.qpos, state.qvel, state.qpos, jnp.zeros(21))

    monkeypatch.setattr(env.physics, "_reset_row", reset_row)
    monkeypatch.setattr(env.physics, "_step_row", step_row)
    state, obs = jax.eval_shape(env.reset, jax.ShapeDtypeStruct((*shape, 2), jnp.uint32))
    following, t = jax.eval_shape(env.step, state, jax.ShapeDtypeStruct((*shape, 2), jnp.float32))
    kinds = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
    assert kinds(state) == kinds(following)  # what a scan needs
    assert obs.shape == t.obs.shape == t.next_obs.shape == (*shape, 12)
    assert [x.shape for x in t[2:]] == [shape] * 4 and state.t.shape == shape


def test_episodes_restart_at_the_horizon():
    _, _, _, _, states, t = rolled()
    ended = np.zeros((STEPS, *SHAPE), bool)
    ended[499] = True
    np.testing.assert_array_equal(t.truncated, ended)
    assert not np.asarray(t.terminated).any()
    np.testing.assert_array_equal(states.t, np.broadcast_to((np.arange(STEPS + 1) % 500)[:, None, None], (STEPS + 1, *SHAPE)))
    np.testing.assert_array_equal((t.obs == t.next_obs).all(-1), ~ended)
    starts = np.stack([position(states.physics)[i] for i in (0, 500)])
    assert (starts[..., 1] == 16.5).all() and (np.abs(starts[..., 0]) <= 0.2).all() and np.unique(starts[..., 0]).size == 12
    assert (states.physics.qvel[500] == 0).all() and (states.physics.rest[500] == 0).all()
    # The observation to act on belongs to the restarted state: at rest, and with its heading in the magnetometer.
    velocimeter = [np.abs(np.asarray(x)[499, ..., 3:5]) for x in (t.obs, t.next_obs)]
    assert (velocimeter[0] < 1e-6).all() and (velocimeter[1] > 1e-6).any()
    yaw = starts[1, ..., 2]
    np.testing.assert_allclose(t.obs[499, ..., 9:11], -0.5 * np.stack([np.sin(yaw), np.cos(yaw)], -1), atol=1e-5)


def test_first_observations_are_those_of_c_mujoco():
    _, keys, _, obs, states, _ = rolled()
    state, expected = jax.jit(envs.make(POINT, "mujoco").reset)(keys)
    np.testing.assert_allclose(obs, expected, atol=1e-4)
    assert np.array_equal(jax.random.key_data(states.key[0]), jax.random.key_data(state.key))


def test_actions_are_clipped_and_nan_is_no_action():
    _, _, actions, _, states, t = rolled()
    assert (np.abs(actions[~np.isnan(actions)]) > 1).any()
    assert all(np.isfinite(np.asarray(x)).all() for x in (*jax.tree.leaves(states.physics), *t))
    for found, expected in one_step_of_c(np.arange(NAN_AT - 1, NAN_AT + 2), actions.at[NAN_AT, 0, 0, 0].set(0.0)):
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)


# Precision


def one_step_of_c(steps, actions):
    """((qpos found, expected), (qvel ...), (reward ...)): of C MuJoCo from MJX's states at `steps`, in float64."""
    _, _, _, _, states, t = rolled()
    c, before = envs.make(POINT, "mujoco"), jax.tree.map(lambda x: x[steps], states.physics)
    engine = np.concatenate([position(before), before.qvel, before.warm], -1).astype(np.float64)
    bits = jnp.asarray(engine.view(np.uint32))
    after, readings = c.physics.step(bits, jnp.clip(actions[steps], -1, 1))
    qpos, qvel, _ = np.split(np.ascontiguousarray(after).view(np.float64), [3, 6], -1)
    reward = c.task.evaluate(readings, None)[0]
    found = jax.tree.map(lambda x: x[steps + 1], states.physics)
    return (position(found), qpos), (np.asarray(found.qvel), qvel), (np.asarray(t.reward)[steps], np.asarray(reward))


def test_point_steps_like_c_mujoco():
    actions = rolled()[2]
    (qpos, c_qpos), (qvel, c_qvel), (reward, c_reward) = one_step_of_c(np.arange(490), actions)
    np.testing.assert_allclose(qpos[..., :2], c_qpos[..., :2], rtol=0, atol=3e-6)  # 5 times the largest found
    np.testing.assert_allclose(qpos[..., 2], c_qpos[..., 2], rtol=1e-5, atol=2e-4)
    np.testing.assert_allclose(reward, c_reward, rtol=0, atol=2e-4)
    # The turning motor is stiff and saturates: where that ends in one of the steps, its last digit counts 1e5 times.
    error = np.abs(qvel - c_qvel)
    assert np.quantile(error, 0.99) < 1e-3 and error.max() < 0.1
    assert np.abs(c_reward).max() > 0.1 and np.abs(np.diff(c_qpos[..., 1], axis=0)).max() > 1e-3


def test_movements_add_up_to_the_way_and_rewards_to_its_worth():
    """At y = 16.5 one float32 is right to 1e-6 m only, and 500 steps of 10 substeps would pile that up."""
    _, _, _, _, states, t = rolled()
    qpos, reward = position(states.physics)[:500], np.asarray(t.reward, float)[:499]
    distance = np.hypot(qpos[..., 0], qpos[..., 1] + 1000)
    np.testing.assert_allclose(reward, 60 * (distance[:-1] - distance[1:]), rtol=1e-5, atol=1e-6)
    assert np.abs(60 * (distance[0] - distance[-1])).max() > 1  # they went somewhere
    # Rounded alone, positions would not do.
    alone = np.asarray(states.physics.qpos, float)[:500]
    alone = 60 * -np.diff(np.hypot(alone[..., 0], alone[..., 1] + 1000), axis=0)
    assert np.abs(alone - reward).max() > 1e-5


def test_a_row_that_diverges_rests_where_it_was():
    _, _, _, _, states, t = rolled()
    qpos, qvel = position(states.physics), np.asarray(states.physics.qvel)
    stays = (qpos[INF_AT + 1] == qpos[INF_AT]).all(-1)
    assert stays.tolist() == [[False] * 3, [False, False, True]]  # and no other row with it
    assert (qvel[INF_AT + 1, 1, 2] == 0).all() and t.reward[INF_AT, 1, 2] == 0
    assert (qpos[INF_AT + 2, 1, 2] != qpos[INF_AT, 1, 2]).any()  # it goes on from there


def test_joints_move_as_in_mujoco():
    model = envs.TASKS[CAR].model()  # a free joint, hinges and a ball
    physics, rng = envs.make(CAR, "mjx").physics, np.random.default_rng(0)
    for size in (1.0, 1e-4, 0.0):
        qpos, by = rng.normal(size=model.nq), size * rng.normal(size=model.nv)
        for quaternion in (slice(3, 7), slice(9, 13)):
            qpos[quaternion] /= np.linalg.norm(qpos[quaternion])
        expected = qpos.copy()
        mujoco.mj_integratePos(model, expected, by, 1.0)
        np.testing.assert_allclose(physics._move(jnp.float32(qpos), jnp.float32(by)), expected, atol=1e-6)


# What the model is reduced to


def test_the_world_is_uniform_along_the_plane_unless_something_stands_in_it():
    found = {name: np.flatnonzero(physics_mjx.uniform(task.model())).tolist() for name, task in envs.TASKS.items()}
    assert found[POINT] == found[CAR] == found[ANT] == found["SafetyAntVelocity"] == found["SafetySwimmerVelocity"] == [0, 1]
    assert found[CHEETAH] == found["SafetyHopperVelocity"] == found["SafetyWalker2dVelocity"] == [0]
    joints = '<joint type="slide" axis="{}" {}/><joint axis="0 0 1"/><joint type="slide" axis="0 1 0"/>'
    body = f'<body>{joints}<geom size=".1"/></body>'
    floor, wall = '<geom type="plane" size="1 1 1" {}/>', '<geom type="box" size="1 1 1" pos="9 0 0"/>'
    for world, along in [
        (floor + body.format("1 0 0", ""), [True, False, False]),  # the second slide turns with the hinge
        (floor + body.format("1 0 1", ""), [False] * 3),  # up the hill
        (floor + body.format("1 0 0", 'stiffness="1"'), [False] * 3),
        (floor + body.format("1 0 0", 'limited="true" range="-1 1"'), [False] * 3),
        (floor + wall + body.format("1 0 0", ""), [False] * 3),
        (floor.format('euler="0 5 0"') + body.format("1 0 0", ""), [False] * 3),  # a slope
        (floor + 2 * body.format("1 0 0", ""), [False] * 6),  # two bodies that might meet
    ]:
        model = mujoco.MjModel.from_xml_string(f"<mujoco><worldbody>{world.replace('{}', '')}</worldbody></mujoco>")
        assert physics_mjx.uniform(model).tolist() == along, world


@pytest.mark.parametrize("robot", ROBOTS)
def test_nothing_touches_but_what_is_said_to(robot):
    """Under C MuJoCo, with random and with extreme actions, held for short and long."""
    task = envs.TASKS[ROBOTS[robot]]
    model, rng = task.model(), np.random.default_rng(0)
    data, allowed, seen = mujoco.MjData(model), {model.geom(name).id for name in task.touching}, set()
    floor, initial = model.geom("floor").id, jax.jit(task.initial)
    for episode in range(24):
        mujoco.mj_resetData(model, data)
        data.qpos[:] = initial(jax.random.key(episode))[0]
        held = rng.choice([1, 10, 100])
        for step in range(500):
            if step % held == 0:
                action = rng.uniform(-1, 1, model.nu)
                data.ctrl[:] = np.sign(action) if episode % 2 else action
            mujoco.mj_step(model, data)
            if data.nefc:  # Point's ball is at a distance of 0 all the time, and held by nothing
                for pair in data.contact.geom:
                    assert floor in pair and set(pair) - {floor} <= allowed
                    seen |= set(pair) - {floor}
    assert seen == allowed if robot == "Car" else seen <= allowed and len(seen) >= len(allowed) / 2


def test_models_beyond_mjx_are_refused():
    body = '<worldbody><body><joint name="j"/><geom size=".1"/></body></worldbody>'
    for extra in ('<option integrator="implicit"/>', '<actuator><intvelocity joint="j" kp="1"/></actuator>'):
        model = mujoco.MjModel.from_xml_string(f"<mujoco>{body}{extra}</mujoco>")
        with pytest.raises(NotImplementedError):
            physics_mjx.MjxPhysics(model, 1, False)


# Deviation from C MuJoCo


@pytest.mark.slow
@pytest.mark.parametrize("name", envs.TASKS)
def test_one_step_deviates_from_c_mujoco_within_bounds(name):
    found = deviation.measure(name)
    assert not deviation.past(found, deviation.BOUNDS[name]), found


def test_deviations_past_their_bounds_are_named():
    assert set(deviation.BOUNDS) == set(envs.TASKS)
    bound = deviation.Bound((1e-6, 1e-4), (1e-6, 1e-4), (1e-6, 1e-4), (1e-6, 1e-4), 0.01)
    within = {"qpos": (1e-6, 1e-4), "qvel": (0, 0), "obs": (0, 0), "reward": (0, 0), "flags": 0.01}
    assert deviation.past(within, bound) == []
    wrong = {"qpos": (2e-6, 0), "qvel": (0, 2e-4), "obs": (np.nan, 0), "reward": (0, 0), "flags": 0.02}
    assert deviation.past(wrong, bound) == ["qpos", "qvel", "obs", "flags"]
    assert deviation.main(["SafetyPointRan"]) == 2


@pytest.mark.slow
def test_the_command_reports_and_fails(monkeypatch, capsys):
    assert deviation.main([POINT]) == 0 and capsys.readouterr().out.splitlines()[1].endswith("ok")
    monkeypatch.setitem(deviation.BOUNDS, POINT, deviation.BOUNDS[POINT]._replace(qvel=(1e-12, 1.0)))
    assert deviation.main([POINT]) == 1 and capsys.readouterr().out.splitlines()[1].endswith("PAST: qvel")


@pytest.mark.slow
@pytest.mark.parametrize("name", [CAR, ANT, CHEETAH])
def test_robots_with_contacts_run_and_restart(name):
    env = envs.make(name, "mjx")
    state, _ = jax.jit(env.reset)(jax.random.split(jax.random.key(0), 2))
    state = state._replace(t=jnp.array([env.horizon - 3, 0], jnp.int32))
    step = jax.jit(env.step)
    for i in range(4):
        action = jax.random.uniform(jax.random.key(i), (2, env.action_size), minval=-1.0)
        state, t = step(state, action)
        assert np.asarray(t.truncated).tolist() == [i == 2, False]
        assert np.isfinite(np.asarray(t.next_obs)).all() and np.isfinite(np.asarray(t.obs)).all()
    assert state.t.tolist() == [1, 4]
