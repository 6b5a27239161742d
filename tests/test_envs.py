"""envs/: agreement with the recorded reference, the rules of `Env`, and the tasks' values in closed form."""

import logging
import sys
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import mujoco
import numpy as np
import pytest
from scipy import stats

import envs
from algos import training
from data import dsrl
from envs import __main__ as listing
from envs import core, parity, physics_mujoco, render
from envs.render import RenderError

RECORDINGS = sorted((Path(__file__).parent / "recordings").glob("*.npz"))
RECORDED = {path.name.split("-")[0].rstrip("0"): path for path in RECORDINGS}
TASKS = list(envs.TASKS)
POINT, CAR, ANT, CHEETAH = "SafetyPointRun", "SafetyCarRun", "SafetyAntRun", "SafetyHalfCheetahVelocity"
CORE = [POINT, CAR, ANT, CHEETAH]  # test_tasks.py has what is particular to the others


@cache
def made(name, privileged=False):
    """An environment with its reset and step jitted, made once for all tests."""
    env = envs.make(name, privileged=privileged)
    return env, jax.jit(env.reset), jax.jit(env.step)


def actions(env, *shape, seed=2):
    return jax.random.uniform(jax.random.key(seed), (*shape, env.action_size), minval=-1.0, maxval=1.0)


def positions(env, state):
    """(qpos, qvel), float64, out of a state's bits."""
    bits = np.ascontiguousarray(state.physics)
    return np.split(bits.view(np.float64), np.cumsum(env.physics.sizes[:2]), axis=-1)[:2]


def same(a, b):
    """Asserts that two trees of arrays are equal bit for bit."""
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        assert x.shape == y.shape and x.dtype == y.dtype
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


# Parity with the reference


def test_tasks_agree_with_the_recorded_reference(capsys):
    assert set(RECORDED) == set(TASKS)
    assert parity.main([str(path) for path in RECORDINGS]) == 0
    assert capsys.readouterr().out.count(" 60 steps ") == len(TASKS)


def change(path, to, **changes):
    """Copies a recording with entries replaced: by an array, by a function of the old one, or (None) by nothing."""
    with np.load(path) as file:
        content = dict(file)
    for key, new in changes.items():
        old = content.pop(key)
        if new is not None:
            content[key] = new(old.copy()) if callable(new) else new
    np.savez(to, **content)
    return str(to)


def at(index, delta):
    """A function that adds `delta` to one entry (and flips a bool)."""

    def edit(array):
        array[index] = not array[index] if array.dtype == bool else array[index] + delta
        return array

    return edit


@pytest.mark.parametrize(
    "task, key, edit, quantity",
    [
        (POINT, "reward", at(17, 1e-3), "reward"),
        (CAR, "reward", at(59, -1e-5), "reward"),
        (CHEETAH, "cost", at(0, 1.0), "cost"),
        (ANT, "terminated", at(30, 0), "terminated"),
        (ANT, "next_obs", at((30, 39), 1e-5), "obs"),
        (CAR, "next_obs", at((30, 3), 1e-5), "obs"),
        (CAR, "next_obs", at((30, 2), 1e-2), "accelerometer"),
        (POINT, "next_obs", at((30, 2), 1e-4), "accelerometer"),
        (CHEETAH, "action", at((30, 2), 1e-3), "qvel"),
        (ANT, "warm", lambda a: np.full_like(a, np.nan), "qpos"),
        (POINT, "reward", at(3, np.nan), "reward"),
    ],
)
def test_parity_fails_where_a_recording_disagrees(tmp_path, capsys, task, key, edit, quantity):
    path = change(RECORDED[task], tmp_path / "changed.npz", **{key: edit})
    assert parity.main([path, str(RECORDED[task])]) == 1
    changed, unchanged = capsys.readouterr().out.splitlines()
    assert quantity in changed.partition("PAST: ")[2].split(", ") and unchanged.endswith("ok")


def test_parity_refuses_unusable_files_in_one_line_each(tmp_path, capsys):
    good = RECORDED[POINT]
    whole = good.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 255
    for name, content in {"junk": b"junk", "empty": b"", "cut": whole[:-9], "flipped": bytes(flipped)}.items():
        (tmp_path / name).write_bytes(content)
    cases = {
        "absent": "no such file",
        ".": "Is a directory",
        "junk": "not an .npz",
        "empty": "not an .npz",
        "cut": "not an .npz",
        "flipped": "not an .npz",
        "no_reward.npz": "misses reward",
        "objects.npz": "not an .npz file of plain arrays",
        "words.npz": "reward is <U1",
        "short.npz": "next_obs is float64 (59, 12)",
        "narrow.npz": "qpos is float64 (60, 2)",
        "no_rows.npz": "qpos is",
        "not_json.npz": "meta is not JSON",
        "list.npz": "meta has no usable id",
        "other.npz": "unknown environment 'SafetyPointRan'. Did you mean SafetyPointRun",
    }
    change(good, tmp_path / "no_reward.npz", reward=None)
    change(good, tmp_path / "objects.npz", reward=np.array([None] * 60))
    change(good, tmp_path / "words.npz", reward=np.array(["x"] * 60))
    change(good, tmp_path / "short.npz", next_obs=lambda a: a[:59])
    change(good, tmp_path / "narrow.npz", qpos=lambda a: a[:, :2])
    change(good, tmp_path / "no_rows.npz", **{key: lambda a: a[:0] for key in parity.KEYS})
    change(good, tmp_path / "not_json.npz", meta=np.array("{"))
    change(good, tmp_path / "list.npz", meta=np.array("[]"))
    change(good, tmp_path / "other.npz", meta=np.array('{"id": "SafetyPointRan", "obs_keys": []}'))
    for name, text in cases.items():
        assert parity.main([str(tmp_path / name), str(good)]) == 2
        out, err = capsys.readouterr()
        assert len(err.splitlines()) == 1 and text in err and str(tmp_path / name) in err, (name, err)
        assert len(out.splitlines()) == 1  # the good file is still compared
    assert parity.main([]) == 2


# Names and sizes


@pytest.mark.parametrize(
    "task, reference_id, obs, action, horizon",
    [
        (POINT, "SafetyPointRun0-v0", 12, 2, 500),
        (CAR, "SafetyCarRun0-v0", 24, 2, 500),
        (ANT, "SafetyAntRun0-v0", 40, 8, 500),
        (CHEETAH, "SafetyHalfCheetahVelocity-v1", 17, 6, 1000),
    ],
)
def test_names_and_sizes(task, reference_id, obs, action, horizon):
    env = envs.make(reference_id)
    assert (env.name, env.obs_size, env.action_size, env.horizon) == (task, obs, action, horizon)
    assert envs.resolve(task) == envs.resolve(reference_id) == task
    assert (env.action_low == -1).all() and (env.action_high == 1).all() and env.action_low.dtype == np.float32


def test_unknown_names_get_the_nearest():
    with pytest.raises(ValueError, match=r"'SafetyAntRum'\. Did you mean SafetyAntRun .*Known: .*SafetyPointRun"):
        envs.make("SafetyAntRum")
    with pytest.raises(ValueError, match="^unknown environment '%'. Known: "):
        envs.make("%")
    with pytest.raises(ValueError, match="unknown backend 'gpu'. Known: mujoco"):
        envs.make(POINT, backend="gpu")


# The rules of Env


@pytest.mark.parametrize("shape", [(), (3,), (2, 3)])
def test_any_leading_batch_shape_and_raw_keys(shape):
    env, reset, step = made(POINT)
    keys = jax.random.split(jax.random.key(0), 6)[: int(np.prod(shape))].reshape(shape)
    state, obs = reset(keys)
    same((state, obs), reset(jax.random.key_data(keys)))
    next_state, transition = step(state, actions(env, *shape))
    assert obs.shape == transition.obs.shape == transition.next_obs.shape == (*shape, 12)
    for leaf in (*transition[2:], next_state.t, next_state.key, state.t):
        assert leaf.shape == shape
    assert jax.tree.structure(state) == jax.tree.structure(next_state)
    kinds = [[(x.shape, x.dtype) for x in jax.tree.leaves(s)] for s in (state, next_state)]
    assert kinds[0] == kinds[1]
    assert [x.dtype for x in transition] == [jnp.float32] * 4 + [bool] * 2
    assert np.unique(np.asarray(obs).reshape(-1, 12), axis=0).shape[0] == keys.size  # every key its own start


@pytest.mark.parametrize("task", [*CORE, "SafetyAntVelocity"])
def test_bits_do_not_depend_on_the_batch(task):
    """The same key and actions give the same bits alone, among 7, among 64, under vmap; over 21 steps with resets."""
    env, length = made(task)[0], 21
    keys, acts = jax.random.split(jax.random.key(1), 64), actions(env, length, 64)

    def roll(keys, acts):
        state, obs = env.reset(keys)
        state = state._replace(t=state.t + env.horizon - 15)

        def step(state, action):
            state, transition = env.step(state, action)
            return state, (state.physics, transition)

        return obs, *jax.lax.scan(step, state, acts)[1]

    first, bits, transitions = jax.jit(roll)(keys, acts)
    ended = np.asarray(transitions.truncated | transitions.terminated)
    assert ended.sum() >= 64 and ended.any(0).all()  # resets are among what is compared
    rows = lambda index: (first[index], bits[:, index], jax.tree.map(lambda x: x[:, index], transitions))
    if task in (CAR, ANT):  # observations with sines and products; the others only copy
        same(jax.jit(roll)(keys[:7], acts[:, :7]), rows(slice(7)))
    same(jax.jit(roll)(keys[5], acts[:, 5]), rows(5))
    same(jax.jit(jax.vmap(roll, (0, 1), (0, 1, 1)))(keys[:7], acts[:, :7]), rows(slice(7)))


def test_an_episode_ends_at_the_horizon_and_the_next_differs():
    env = made(POINT)[0]
    state, obs = env.reset(jax.random.split(jax.random.key(3), 2))

    def step(state, action):
        state, transition = env.step(state, action)
        return state, (state, transition)

    _, (states, transitions) = jax.jit(lambda s, a: jax.lax.scan(step, s, a))(state, actions(env, 1001, 2))
    ended = np.zeros((1001, 2), bool)
    ended[[499, 999]] = True
    np.testing.assert_array_equal(transitions.truncated, ended)
    assert not np.asarray(transitions.terminated).any()
    t = (np.arange(1001) + 1) % 500
    np.testing.assert_array_equal(states.t, np.stack([t, t], 1))
    # Between episodes obs is the new one's first; elsewhere it is the outcome of the action.
    equal = (np.asarray(transitions.obs) == np.asarray(transitions.next_obs)).all(-1)
    np.testing.assert_array_equal(equal, ~ended)
    qpos, qvel = positions(env, states)
    starts = qpos[ended]
    assert (starts[:, 1] == 16.5).all() and (np.abs(starts[:, 0]) <= 0.2).all() and (qvel[ended] == 0).all()
    first = positions(env, state)[0]
    assert len(np.unique(np.concatenate([first, starts])[:, 0])) == 6  # both environments, three episodes each
    # The observation to act on belongs to the restarted state: the velocimeter reads rest, unlike the last step's.
    assert (np.abs(np.asarray(transitions.obs)[ended][:, 3:6]) < 1e-6).all()
    assert (np.abs(np.asarray(transitions.next_obs)[ended][:, 3:5]).max(-1) > 1e-3).all()


@pytest.mark.parametrize("task", [ANT, CHEETAH])
def test_the_horizon_truncates_and_does_not_terminate(task):
    env, reset, step = made(task)
    state, _ = reset(jax.random.split(jax.random.key(3), 2))
    state = state._replace(t=jnp.array([env.horizon - 2, env.horizon - 1], jnp.int32))
    state, transition = step(state, actions(env, 2))
    assert transition.truncated.tolist() == [False, True] and transition.terminated.tolist() == [False, False]
    assert state.t.tolist() == [env.horizon - 1, 0]


def test_a_fallen_ant_terminates_and_the_others_go_on():
    env, reset, step = made(ANT)
    state, _ = reset(jax.random.split(jax.random.key(3), 16))
    physics_step, falls = jax.jit(env.physics.step), 0
    for action in actions(env, 20, 16):
        t, (_, readings) = np.asarray(state.t), physics_step(state.physics, action)
        state, transition = step(state, action)
        fell = np.asarray(transition.terminated)
        np.testing.assert_array_equal(fell, np.asarray(readings.qpos)[:, 2] <= 0.08)
        qpos, qvel = positions(env, state)
        assert (qpos[fell, 1] == 16.5).all() and (qvel[fell] == 0).all()
        np.testing.assert_array_equal(state.t, np.where(fell, 0, t + 1))
        np.testing.assert_array_equal((transition.obs == transition.next_obs).all(-1), ~fell)
        assert not np.asarray(transition.truncated).any()
        falls += fell.sum()
    assert 0 < falls < 16 * 20


@pytest.mark.parametrize("task", CORE)
def test_actions_are_clipped(task):
    env, reset, step = made(task)
    state, _ = reset(jax.random.split(jax.random.key(3), 2))
    for _ in range(2):
        inside, outside = step(state, jnp.ones((2, env.action_size))), step(state, jnp.full((2, env.action_size), 7.0))
        same(inside, outside)
        state = inside[0]
    assert np.isfinite(np.asarray(outside[1].next_obs)).all()


def test_mujoco_warnings_go_to_logging_and_not_to_the_working_directory(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    env, reset, step = made(CHEETAH)
    with caplog.at_level(logging.DEBUG, "mujoco"):
        type(env.task).model.__wrapped__(env.task)  # past the cache: loading warns of a deprecated attribute
        assert [r.levelno for r in caplog.records if "settotalmass" in r.message] in ([], [logging.DEBUG])
        caplog.clear()
        state, _ = reset(jax.random.split(jax.random.key(3), 8))
        jax.block_until_ready(step(state, jnp.full((8, env.action_size), jnp.nan)))
    assert caplog.records and {r.levelno for r in caplog.records} == {logging.WARNING}  # from the worker threads
    assert "CTRL" in caplog.records[0].message
    assert not list(tmp_path.iterdir())


# The tasks' values in closed form


def readings(env, n, **given):
    """Readings (n, ...), zero where not given."""
    names = ("qpos", "qvel", "dqpos", "sensors")
    full = [given.get(k, np.zeros((n, size))) for k, size in zip(names, env.physics.sizes)]
    return envs.Readings(*(jnp.asarray(x, jnp.float32) for x in full))


def test_run_rewards_the_decrease_of_the_distance_to_the_goal():
    env, rng, n = made(ANT)[0], np.random.default_rng(0), 1000
    after, moved = rng.uniform(-20, 20, (2, n, 15)).astype(np.float32)
    moved *= np.float32(0.002)
    moved[0] = 0
    reward, _, _ = env.task.evaluate(readings(env, n, qpos=after, dqpos=moved), None)
    goal, after, moved = np.array([0, -1000.0]), after[:, :2].astype(float), moved[:, :2].astype(float)
    distance = np.linalg.norm(after - goal, axis=1)
    wanted = 60 * (np.linalg.norm(after - moved - goal, axis=1) - distance)
    # The reward is a small difference of distances near 1,000 m, of which float32 leaves 6e-5 m (0.004 of reward).
    np.testing.assert_allclose(reward, wanted, rtol=1e-6, atol=5e-7)
    assert reward[0] == 0 and np.abs(wanted).max() > 2


@pytest.mark.parametrize("task", [POINT, CAR, ANT])
def test_run_costs_outside_the_corridor(task):
    env = made(task)[0]
    x = np.array([0, 0.5, -0.5, np.nextafter(np.float32(0.5), 1), -np.nextafter(np.float32(0.5), 1), 0.499, -3, 3])
    qpos = np.ones((len(x), env.physics.sizes[0]))
    qpos[:, 0] = x
    _, cost, _ = env.task.evaluate(readings(env, len(x), qpos=qpos), None)
    assert cost.tolist() == [0, 0, 0, 1, 1, 0, 1, 1]


def test_only_an_ant_whose_torso_is_down_dies():
    z = np.array([0.18, 0.0801, 0.08, 0.0, -1.0])
    for task, dead in ((ANT, [False, False, True, True, True]), (CAR, [False] * 5)):
        env = made(task)[0]
        qpos = np.zeros((5, env.physics.sizes[0]))
        qpos[:, 2] = z
        assert env.task.evaluate(readings(env, 5, qpos=qpos), None)[2].tolist() == dead


def test_half_cheetah_is_paid_for_velocity_and_charged_for_control_and_for_speeding():
    env = made(CHEETAH)[0]
    velocity = np.array([0, 1.5, -4, 3.2095, 3.2097, 10])
    dqpos = np.zeros((6, 9))
    dqpos[:, 0] = velocity * 0.05
    action = np.asarray(actions(env, 6))
    reward, cost, terminated = env.task.evaluate(readings(env, 6, dqpos=dqpos), action)
    np.testing.assert_allclose(reward, velocity - 0.1 * (action.astype(float) ** 2).sum(1), rtol=1e-6, atol=1e-6)
    assert cost.tolist() == [0, 0, 0, 0, 1, 1] and not terminated.any()


@pytest.mark.parametrize("task", [POINT, CHEETAH])
def test_step_pays_for_the_movement_of_the_float64_state(task):
    env, reset, step = made(task)
    state, _ = reset(jax.random.split(jax.random.key(3), 4))
    for action in actions(env, 15, 4):
        before = positions(env, state)[0]
        state, transition = step(state, action)
        after = positions(env, state)[0]
        if task == POINT:
            distance = lambda qpos: np.hypot(qpos[:, 0], qpos[:, 1] + 1000)
            wanted = 60 * (distance(before) - distance(after))
        else:
            wanted = (after - before)[:, 0] / 0.05 - 0.1 * (np.asarray(action, float) ** 2).sum(1)
        np.testing.assert_allclose(transition.reward, wanted, rtol=1e-6, atol=1e-6)
    assert np.abs(wanted).min() > 1e-4


# Where episodes start


def uniform(sample, low, high):
    """Asserts that a sample lies in [low, high] and looks uniform; the keys are fixed, so this cannot flicker."""
    assert sample.min() >= low - 1e-6 and sample.max() <= high + 1e-6
    assert stats.kstest(sample, stats.uniform(low, high - low).cdf).pvalue > 1e-3


def independent(columns):
    """Asserts that no two columns (n, k) are correlated, as they would be if a key were used twice."""
    correlation = np.corrcoef(columns.T)
    assert np.abs(correlation - np.eye(len(correlation))).max() < 5 / np.sqrt(len(columns))


def draws(task, n=4000):
    keys = jax.random.split(jax.random.key(11), n)
    qpos, qvel = jax.jit(lambda keys: core.batched(made(task)[0].task.initial, keys))(keys)
    return np.asarray(qpos, float), np.asarray(qvel, float)


def heading(qpos):
    """(n,) yaw in [0, 2 pi) of Point's hinge or of the others' free joint, which must be upright."""
    if qpos.shape[1] == 3:
        return qpos[:, 2]
    np.testing.assert_allclose(np.linalg.norm(qpos[:, 3:7], axis=1), 1, rtol=1e-6)
    assert (qpos[:, 4:6] == 0).all()
    return 2 * np.arctan2(qpos[:, 6], qpos[:, 3]) % (2 * np.pi)


@pytest.mark.parametrize("task, height", [(POINT, None), (CAR, 0.1), (ANT, 0.18)])
def test_run_starts_at_the_corridors_end_with_any_heading(task, height):
    qpos, qvel = draws(task)
    x, yaw = qpos[:, 0], heading(qpos)
    uniform(x, -0.2, 0.2)
    uniform(yaw, 0, 2 * np.pi)
    noise = qpos[:, 7:] if task == ANT else np.empty((len(x), 0))
    independent(np.column_stack([x, yaw, noise]))
    assert (qpos[:, 1] == 16.5).all() and (qvel == 0).all()
    if height:
        assert (qpos[:, 2] == np.float32(height)).all()


def test_ant_starts_with_bent_legs():
    legs = draws(ANT)[0][:, 7:]
    sign = np.array([1, 1, 1, -1, 1, -1, 1, 1])
    middle = np.array([0, np.pi / 2] * 4)
    for joint in range(8):
        uniform((legs * sign - middle)[:, joint], -0.1, 0.1)
    with np.load(RECORDED[ANT]) as file:
        recorded = file["qpos"][file["t"] == 0, 7:]
    assert len(recorded) and (np.abs(recorded * sign - middle) <= 0.1).all()


def test_half_cheetah_starts_near_rest():
    qpos, qvel = draws(CHEETAH)
    for joint in range(9):
        uniform(qpos[:, joint], -0.1, 0.1)
        assert stats.kstest(qvel[:, joint], stats.norm(0, 0.1).cdf).pvalue > 1e-3
    independent(np.column_stack([qpos, qvel]))


def test_privileged_observations_append_x_where_the_cost_depends_on_it():
    cheetah = envs.make(CHEETAH, privileged=True)
    assert (cheetah.obs_size, cheetah.privileged_size) == (17, 0)
    (env, reset, step), (more, more_reset, more_step) = made(POINT), made(POINT, privileged=True)
    assert (more.obs_size, more.privileged_size, env.privileged_size) == (12, 1, 0)
    keys = jax.random.split(jax.random.key(3), 3)
    (state, obs), (more_state, more_obs) = reset(keys), more_reset(keys)
    # The second step restarts one episode: its x must be the new one's in obs and the old one's in next_obs.
    for first in (0, env.horizon - 1):
        t = jnp.array([first, 1, 2], jnp.int32)
        state, transition = step(state._replace(t=t), actions(env, 3))
        more_state, more_transition = more_step(more_state._replace(t=t), actions(env, 3))
        same(more_transition.next_obs[:, :12], transition.next_obs)
        for wide, narrow in ((more_obs, obs), (more_transition.obs, transition.obs)):
            assert wide.shape == (3, 13)
            same(wide[:, :12], narrow)
        x = positions(more, more_state)[0][:, 0].astype(np.float32)
        np.testing.assert_array_equal(more_transition.obs[:, 12], x)
    assert np.asarray(transition.truncated).tolist() == [True, False, False]
    assert np.asarray(more_transition.next_obs != more_transition.obs)[:, 12].tolist() == [True, False, False]


def test_a_task_needs_no_twin_but_actuators_of_the_range_of_actions(monkeypatch, capsys):
    """As a user writes one: without Safety-Gymnasium's id and without the cost in words."""

    class Slide(envs.Task):
        name, horizon, substeps = "MySlide", 10, 1
        initial = staticmethod(lambda key: (jax.random.uniform(key, (1,)), jnp.zeros(1)))
        observe = staticmethod(lambda r: jnp.concatenate([r.qpos, r.qvel], -1))
        evaluate = staticmethod(lambda r, action: (r.dqpos[..., 0], jnp.float32(r.qvel[..., 0] > 1), r.qpos[..., 0] > 9))

        def __init__(self, ctrlrange):
            self.ctrlrange = ctrlrange

        def model(self):
            body = '<body><joint name="x" type="slide" axis="1 0 0"/><geom size="0.1" mass="1"/></body>'
            motor = f'<motor joint="x" gear="2" ctrlrange="{self.ctrlrange}" ctrllimited="true"/>'
            return mujoco.MjModel.from_xml_string(f"<mujoco><worldbody>{body}</worldbody><actuator>{motor}</actuator></mujoco>")

    monkeypatch.setitem(envs.TASKS, "MySlide", Slide("-1 1"))
    env = envs.make("MySlide", "mujoco")
    state, obs = env.reset(jax.random.split(jax.random.key(0), 3))
    _, transition = env.step(state, jnp.ones((3, 1)))
    assert (transition.next_obs[:, 1] > 0).all() and obs.shape == (3, 2)
    assert envs.make("SafetyAntRun0-v0", "mujoco").name == "SafetyAntRun"
    with pytest.raises(RenderError, match="no pictures of MySlide: they need x and y"):
        render.check(env, "a.png", None)
    listing.main([])
    assert "MySlide" in capsys.readouterr().out
    monkeypatch.setitem(envs.TASKS, "MySlide", Slide("-2 2"))
    with pytest.raises(
        envs.UnknownName, match=r"MySlide: ctrlrange of the model's actuators is \[-2, 2\]: make each -1 1, and scale by gear"
    ):
        envs.make("MySlide", "mujoco")


def test_the_odometer_is_the_sideways_way_by_hand():
    """Body velocities in world headings 0, 90 and 90 degrees: x advances by dt times 1, 0 and -1."""
    task = envs.TASKS[POINT]
    obs = np.zeros((3, 12), np.float32)
    obs[:, 3:6] = [[1, 0, 9], [1, 0, 0], [0, 1, 0]]
    obs[:, 9:12] = [[0, -0.5, 0], [-0.5, 0, 0], [-0.5, 0, 0]]  # the field (0, -0.5, 0) as the turned body sees it
    found = jax.jit(jax.vmap(task.remember))(jnp.array([[0.25], [0.0], [0.0]]), obs)
    np.testing.assert_allclose(found[:, 0], [0.25 + 0.02, 0.0, -0.02], atol=1e-7)


@pytest.mark.parametrize(("task", "error"), [(POINT, 0.005), (CAR, 0.01), (ANT, 0.065)])
def test_the_odometer_follows_x_without_seeing_it(task, error):
    """Over 100 steps of a scan; it starts again at zero where an episode does, and stands between observation and x."""
    env = envs.make(task, privileged=True, memory=True)
    plain = made(task)[0]
    assert (env.obs_size, env.memory_size, env.privileged_size) == (plain.obs_size + 1, 1, 1) and plain.memory_size == 0
    state, first = env.reset(jax.random.split(jax.random.key(5), 8))
    held = jnp.repeat(actions(env, 10, 8), 10, 0)  # held for ten steps each, to get somewhere

    def step(state, action):
        state, transition = env.step(state, action)
        return state, transition

    _, t = jax.jit(lambda s, a: jax.lax.scan(step, s._replace(t=s.t + 430), a))(state, held)  # episodes end in the 70th step
    ended = np.asarray(t.terminated | t.truncated)
    assert ended[69].all() or task == ANT
    odometer, x = np.asarray(t.next_obs)[..., -2], np.asarray(t.next_obs)[..., -1]
    before = np.concatenate([first[None], t.obs[:-1]])  # what each step was taken from
    start = np.zeros((101, 8))
    start[0] = np.asarray(first)[:, -1]
    for i in range(100):
        start[i + 1] = np.where(ended[i], np.asarray(t.obs)[i, :, -1], start[i])
    rms = lambda x: np.sqrt(np.mean(np.square(x)))
    assert rms(odometer - (x - start[:100])) < error < rms(x - start[:100])
    fresh = np.concatenate([np.ones((1, 8), bool), ended[:-1]])
    assert (before[..., -2][fresh] == 0).all() and (before[..., -2][~fresh] != 0).all()
    # a dataset's transitions, which hold no memory, are given the same
    flat = lambda x: np.asarray(x).swapaxes(0, 1).reshape(800, -1)
    n = env.obs_size - 1
    ends = flat(t.terminated), flat(t.truncated)
    ends[1][99::100] = ~ends[0][99::100]  # rows follow one another
    columns = flat(before)[:, :n], flat(t.next_obs)[:, :n], flat(held), flat(t.reward)[:, 0], flat(t.cost)[:, 0]
    wide = training.remembering(dsrl.Dataset(*columns, *(x[:, 0].astype(bool) for x in ends)), env)
    np.testing.assert_allclose(wide.observations, flat(before)[:, : n + 1], atol=1e-6)
    np.testing.assert_allclose(wide.next_observations, flat(t.next_obs)[:, : n + 1], atol=1e-6)


def test_host_functions_see_numpy_arrays_and_batches_in_front():
    """Under jit, vmap and scan; what the function raises reaches the caller."""

    def host(x, n):
        assert type(x) is type(n) is np.ndarray
        if n.max() > 9:
            raise ValueError("too many")
        return x.sum(-1), n + 1

    def roll(x, n):
        shapes = jax.ShapeDtypeStruct((), jnp.float32), jax.ShapeDtypeStruct((), jnp.int32)

        def step(carry, _):
            x, n = carry
            total, n = core.on_host(host, shapes, x, n)
            return (x + 1, n), total

        return jax.lax.scan(step, (x, n), None, length=2)

    x, n = jnp.arange(6.0).reshape(2, 3), jnp.array([3, 4])
    (_, after), totals = jax.jit(jax.vmap(roll))(x, n)
    assert after.tolist() == [5, 6] and totals.tolist() == [[3.0, 6.0], [12.0, 15.0]]
    assert roll(x[1], n[1])[1].tolist() == [12.0, 15.0]
    with pytest.raises(Exception, match="too many"):
        jax.block_until_ready(jax.jit(roll)(x[0], jnp.int32(10)))


# ---------------------------------------------------------------- rows without the interpreter lock


@pytest.mark.parametrize("task", [POINT, ANT, CHEETAH, "SafetyAntVelocity"])
def test_rows_are_the_same_bits_with_and_without_numba(task, monkeypatch):
    """Warm starts, the last forward pass, sensors, AntVelocity's tracked body."""
    assert physics_mujoco.step_rows() is not None
    env = envs.make(task, "mujoco")
    physics, where, act = env.physics, np.ones(5, bool), np.asarray(actions(env, 30, 5))
    qpos, qvel = (np.asarray(x, np.float32) for x in jax.vmap(env.task.initial)(jax.random.split(jax.random.key(3), 5)))

    def roll():
        bits, _ = physics._on_host(physics._reset_rows, qpos, qvel, where)
        out = []
        for control in act:
            bits, readings = physics._on_host(physics._step_rows, bits, control)
            out.append((bits, readings))
        return out

    compiled = roll()
    monkeypatch.setattr(physics_mujoco, "_loaded", [None])
    jax.tree.map(np.testing.assert_array_equal, compiled, roll())
    assert len({bits.tobytes() for bits, _ in compiled}) == 30  # something moved


def test_without_numba_one_line_says_so(monkeypatch, capsys):
    monkeypatch.setattr(physics_mujoco, "_loaded", [])
    monkeypatch.setitem(sys.modules, "numba", None)
    monkeypatch.delitem(sys.modules, "envs.mujoco_rows", raising=False)
    monkeypatch.delattr(envs, "mujoco_rows", raising=False)
    assert physics_mujoco.step_rows() is None and physics_mujoco.step_rows() is None
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "pip install numba" in err
