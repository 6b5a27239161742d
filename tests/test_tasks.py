"""The Circle and Velocity tasks: their values in closed form, where they start, and gymnasium's robots side by side."""

import csv
import subprocess
import sys
from pathlib import Path
from unittest import mock

import gymnasium
import jax
import jax.numpy as jnp
import mujoco
import numpy as np
import pytest
from gymnasium.envs.mujoco import MujocoEnv
from scipy import stats
from test_envs import actions, draws, heading, independent, made, positions, readings, same, uniform

import envs
from envs import __main__ as listing
from envs.circle import lidar

ROOT = Path(__file__).resolve().parents[1]
RUNNERS = ["HalfCheetah", "Hopper", "Swimmer", "Walker2d", "Ant"]

# obs, actions, T
SIZES = {
    "SafetyPointRun": (12, 2, 500),
    "SafetyCarRun": (24, 2, 500),
    "SafetyAntRun": (40, 8, 500),
    "SafetyPointCircle1": (28, 2, 500),
    "SafetyCarCircle1": (40, 2, 500),
    "SafetyAntCircle1": (56, 8, 500),
    "SafetyPointCircle2": (28, 2, 500),
    "SafetyCarCircle2": (40, 2, 500),
    "SafetyAntCircle2": (56, 8, 500),
    "SafetyHalfCheetahVelocity": (17, 6, 1000),
    "SafetyHopperVelocity": (11, 3, 1000),
    "SafetySwimmerVelocity": (8, 2, 1000),
    "SafetyWalker2dVelocity": (17, 6, 1000),
    "SafetyAntVelocity": (27, 8, 1000),
}


def test_speeds_of_the_backends_that_run_here(capsys, monkeypatch):
    """A batch whose call would take too long is left out, in words; the default is named."""
    rates = {("mujoco", 10): 1e4, ("mujoco", 4096): 2e4, ("mjx", 10): 1.0}
    monkeypatch.delenv(listing.physics_warp.ON_CPU, raising=False)
    monkeypatch.setattr(listing, "speed", lambda env, n: rates[env.backend, n])
    listing.main(["--speed", "SafetyPointRun0-v0", "--seeds", "2"])
    out, err = capsys.readouterr()
    lines = [line.split() for line in out.splitlines()]
    assert lines[0][0] == "SafetyPointRun," and lines[-1] == ["without", "--backend:", "mujoco"]
    assert [line[:2] + line[3:4] for line in lines[1:4]] == [["mujoco", "10", "10,000"], ["mujoco", "4096", "20,000"], ["mjx", "10", "1"]]
    assert lines[4][:2] == ["mjx", "4096"] and "not measured" in out.splitlines()[4]
    assert err.startswith("without warp: ") and err.count("\n") == 1
    for words, text in ((["--speed", "SafetyPoint"], "Did you mean"), (["--speed", "SafetyPointRun", "--seeds", "0"], "must be positive")):
        with pytest.raises(SystemExit) as stop:
            listing.main(words)
        assert stop.value.code == 2 and text in capsys.readouterr().err


def test_a_speed_is_measured(capsys):
    env = listing.envs.make("SafetyPointRun", "mujoco")
    assert 10 < listing.speed(env, 4, seconds=0.1) < 1e7


def test_the_listing_has_every_task_with_its_sizes(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(listing, "DATA", tmp_path)
    (tmp_path / "SafetyPointCircle2.hdf5").write_bytes(b"x" * 2_500_000)
    (tmp_path / "policies").mkdir()
    (tmp_path / "policies" / "SafetyPointRun.safetensors").touch()
    listing.main([])
    header, *lines, own = capsys.readouterr().out.splitlines()
    assert "--env module:id" in own
    cells = {line.split()[0]: line for line in lines}
    assert list(cells) == list(envs.TASKS) and set(cells) == set(SIZES)
    for name, sizes in SIZES.items():
        version = {"Run": "0-v0", "le1": "-v0", "le2": "-v0", "ity": "-v1"}[name[-3:]]
        assert cells[name].split()[1:5] == [name + version, *map(str, sizes)]
        assert envs.resolve(name + version) == name
        other = "made at first use" if name == "SafetyPointRun" else "  -"
        assert cells[name].endswith("data/SafetyPointCircle2.hdf5 (2.5 MB)" if name == "SafetyPointCircle2" else other)
        assert "mujoco" in cells[name] and envs.TASKS[name].cost in cells[name]
    assert "|x| > 1.125 m or |y| > 1.125 m" in cells["SafetyCarCircle2"] and "speed > 2.6222 m/s" in cells["SafetyAntVelocity"]
    assert header.split()[0] == "task"


# Circle


def test_lidar_reads_closeness_in_the_direction_of_the_target():
    def read(distance, bins):
        angle = bins * 2 * np.pi / 16
        return np.asarray(lidar(jnp.array([distance * np.cos(angle), distance * np.sin(angle)], jnp.float32)))

    def expected(**shares):
        return [shares.get(f"b{i}", 0.0) for i in range(16)]

    near = dict(atol=1e-5)
    np.testing.assert_allclose(read(3, 4.5), expected(b4=0.5, b3=0.25, b5=0.25), **near)
    np.testing.assert_allclose(read(1.5, 15.75), expected(b15=0.75, b0=0.75 * 0.75, b14=0.75 * 0.25), **near)
    np.testing.assert_allclose(read(0.6, 8.25), expected(b8=0.9, b9=0.9 * 0.25, b7=0.9 * 0.75), **near)
    assert (read(6.01, 3.3) == 0).all() and (read(600, 3.3) == 0).all()
    assert read(0, 0).max() == 1
    # Rounding an angle to the wrong side of a bin's edge must not matter: no jumps anywhere around the circle.
    angle = jnp.linspace(-4, 4, 20001)
    around = lidar(2 * jnp.stack([jnp.cos(angle), jnp.sin(angle)], -1))
    assert np.abs(np.diff(around, axis=0)).max() < 2e-3


@pytest.mark.parametrize("robot", ["Point", "Car", "Ant"])
def test_lidar_sees_the_centre_from_the_robots_side(robot):
    """At (0, -2) the centre is to the left of a robot that heads along x, and straight ahead of one that heads along y."""
    env = made(f"Safety{robot}Circle1")[0]
    for yaw, ahead in ((0.0, 4), (np.pi / 2, 0), (np.pi, 12)):
        pose = env.task.robot.pose(jax.random.key(0), jnp.float32(0), jnp.float32(-2), jnp.float32(yaw + 0.1))
        seen = env.task.observe(readings(env, 1, qpos=np.asarray(pose[0])[None]))[0, -16:]
        assert int(np.argmax(seen)) == (ahead - 1) % 16
        np.testing.assert_allclose(np.max(seen), 1 - 2 / 6, atol=1e-6)


def test_lidar_of_a_tilted_robot_looks_along_its_own_plane():
    env = made("SafetyAntCircle1")[0]
    qpos = np.zeros((1, 15))
    qpos[0, :3], qpos[0, 3:7] = (-3, 0, 0.5), (np.cos(0.2), 0, np.sin(0.2), 0)  # pitched by 0.4 rad, nose down
    seen = np.asarray(env.task.observe(readings(env, 1, qpos=qpos)))[0, -16:]
    np.testing.assert_allclose(seen[0], 1 - (3 * np.cos(0.4) + 0.5 * np.sin(0.4)) / 6, atol=1e-6)


def test_circle_pays_for_speed_around_the_centre_near_the_line():
    env, rows = made("SafetyCarCircle1")[0], []
    # x, y, u, v -> reward
    rows += [(1.5, 0, 0, 2, 0.2), (0, 1.5, -2, 0, 0.2), (1.5, 0, 0, -2, -0.2), (-1.5, 0, 7, 0, 0)]
    rows += [(0.5, 0, 0, 2, 0.1), (0, -3.5, 2, 0, 0.2 / 3), (0.9, 1.2, -1.6, 1.2, 0.2)]
    rows += [(1.5, 0, 0, 300, 10), (0, 1.5, 300, 0, -10), (0, 0, 1, 1, 0)]
    x, y, u, v, wanted = np.array(rows).T
    qpos, qvel = np.zeros((len(rows), 13)), np.zeros((len(rows), 11))
    qpos[:, 0], qpos[:, 1], qvel[:, 0], qvel[:, 1] = x, y, u, v
    reward, _, terminated = env.task.evaluate(readings(env, len(rows), qpos=qpos, qvel=qvel), None)
    np.testing.assert_allclose(reward, wanted, rtol=1e-6, atol=1e-7)
    assert not terminated.any()


@pytest.mark.parametrize("robot", ["Point", "Car", "Ant"])
def test_circle_costs_beyond_the_walls(robot):
    just = np.nextafter(np.float32(1.125), 2)
    x = [0, 1.125, just, -1.125, -just, 0, 0, 0, 0, 3]
    y = [0, 0, 0, 0, 0, 1.125, just, -1.125, -just, 3]
    for level, wanted in ((1, [0, 0, 1, 0, 1, 0, 0, 0, 0, 1]), (2, [0, 0, 1, 0, 1, 0, 1, 0, 1, 1])):
        env = made(f"Safety{robot}Circle{level}")[0]
        qpos = np.ones((len(x), env.physics.sizes[0]))
        qpos[:, 0], qpos[:, 1] = x, y
        assert env.task.evaluate(readings(env, len(x), qpos=qpos), None)[1].tolist() == wanted


@pytest.mark.parametrize("task, height", [("SafetyPointCircle1", None), ("SafetyCarCircle2", 0.1), ("SafetyAntCircle1", 0.18)])
def test_circle_starts_anywhere_in_the_middle_with_any_heading(task, height):
    qpos, qvel = draws(task)
    x, y, yaw = qpos[:, 0], qpos[:, 1], heading(qpos)
    uniform(x, -0.8, 0.8)
    uniform(y, -0.8, 0.8)
    uniform(yaw, 0, 2 * np.pi)
    independent(np.column_stack([x, y, yaw, qpos[:, 7:] if "Ant" in task else np.empty((len(x), 0))]))
    assert (qvel == 0).all() and (height is None or (qpos[:, 2] == np.float32(height)).all())


def test_circle_states_do_not_depend_on_the_batch():
    """Bit by bit; what is computed from them (a lidar of sines and angles) may, by a rounding."""
    env, reset, step = made("SafetyPointCircle1")
    keys, acts = jax.random.split(jax.random.key(1), 8), actions(env, 3, 8)
    (many, _), (one, _) = reset(keys), reset(keys[5])
    for action in acts:
        (many, wide), (one, narrow) = step(many, action), step(one, action[5])
        same(jax.tree.map(lambda x: x[5], many), one)
        for a, b in zip(wide, narrow):
            np.testing.assert_allclose(a[5], b, rtol=0, atol=2e-6)


# Velocity


@pytest.mark.parametrize("robot", RUNNERS)
def test_velocity_is_gymnasiums_robot_step_by_step(robot):
    """The same states bit by bit, and the same observations, rewards, terminations and velocities, over whole episodes."""
    env, reset, step = made(f"Safety{robot}Velocity")
    model, length, ended, costs = env.task.model(), 60, 0, []
    # gymnasium's reading of swimmer.xml fails in MuJoCo 3, and its margins of contacts have another meaning there.
    with mock.patch.object(MujocoEnv, "_initialize_simulation", lambda _: (model, mujoco.MjData(model))):
        theirs = gymnasium.make(f"{robot}-v4", disable_env_checker=True)
    for episode in range(3):
        state, obs = reset(jax.random.key(episode))
        theirs.reset(seed=0)
        # Ours began from draws of our own.
        theirs.unwrapped.set_state(*positions(env, state))
        np.testing.assert_allclose(obs, theirs.unwrapped._get_obs(), rtol=1e-6, atol=1e-6)
        for action in np.repeat(np.asarray(actions(env, length // 5, seed=episode)), 5, 0):
            state, ours = step(state, action)
            next_obs, reward, terminated, _, info = theirs.step(action)
            np.testing.assert_allclose(ours.next_obs, next_obs, rtol=1e-6, atol=1e-6)
            np.testing.assert_allclose(ours.reward, reward, rtol=1e-6, atol=1e-6)
            speed = np.hypot(info["x_velocity"], info["y_velocity"]) if robot == "Ant" else info["x_velocity"]
            assert ours.cost == (speed > env.task.threshold) and ours.terminated == terminated
            costs.append(float(ours.cost))
            if terminated:
                ended += 1
                break
            for mine, other in zip(positions(env, state), (theirs.unwrapped.data.qpos, theirs.unwrapped.data.qvel)):
                np.testing.assert_array_equal(mine, other)
    assert ended > 0 or robot in ("HalfCheetah", "Swimmer", "Ant")
    assert len(costs) > 20


@pytest.mark.parametrize(
    "robot, threshold", [("HalfCheetah", 3.2096), ("Hopper", 0.7402), ("Swimmer", 0.2282), ("Walker2d", 2.3415), ("Ant", 2.6222)]
)
def test_velocity_costs_above_the_threshold(robot, threshold):
    env = made(f"Safety{robot}Velocity")[0]
    step_time = {"HalfCheetah": 0.05, "Hopper": 0.008, "Swimmer": 0.04, "Walker2d": 0.008, "Ant": 0.05}[robot]
    under, over = threshold - 1e-4, threshold + 1e-4
    velocity = np.array([[0, 0], [under, 0], [over, 0], [-9, 0], [0, over], [0.8 * threshold] * 2])
    moved = np.zeros((len(velocity), env.physics.sizes[0]))
    moved[:, :2] = velocity * step_time
    given = readings(env, len(velocity), dqpos=moved)
    action = np.zeros((len(velocity), env.action_size))
    if robot == "Ant":
        reward, cost, _ = env.task.evaluate(given, action)
        assert cost.tolist() == [0, 0, 1, 1, 1, 1]  # the norm, here of 1.13 times the threshold
        # The engine's own positions come first where the physics gives them.
        other = given._replace(dbody=2 * given.dqpos[:, :3])
        np.testing.assert_allclose(env.task.evaluate(other, action)[0] - 1, 2 * (reward - 1), rtol=1e-5, atol=1e-6)
    else:
        assert env.task.evaluate(given, action)[1].tolist() == [0, 0, 1, 0, 0, 0]


@pytest.mark.parametrize(
    "robot, index, good, bad",
    [
        ("Hopper", 1, [0.71, 1.25, 40], [0.69, 0.7, -1]),
        ("Hopper", 2, [-0.19, 0.19], [-0.21, 0.21, 3]),
        ("Hopper", 3, [-99, 99], [-101, 100.1]),
        ("Hopper", -1, [-99, 99], [-101, 100.1]),
        ("Walker2d", 1, [0.81, 1.99], [0.79, 2.01]),
        ("Walker2d", 2, [-0.99, 0.99], [-1.01, 1.01]),
        ("Walker2d", -1, [-1e4, 1e4], []),
        ("Ant", 2, [0.2, 0.75, 1.0], [0.199, 1.001]),
        ("Ant", -1, [-1e4, 1e4], [np.nan, np.inf]),
        ("Swimmer", 3, [-1e3, 1e3], []),
        ("HalfCheetah", 1, [-1e3, 1e3], []),
    ],
)
def test_velocity_ends_where_the_robot_is_unhealthy(robot, index, good, bad):
    """index: in qpos, or -1 for a velocity."""
    env = made(f"Safety{robot}Velocity")[0]
    values = np.array([*good, *bad])
    qpos = np.tile(env.task.model().qpos0, (len(values), 1))
    qvel = np.zeros((len(values), env.physics.sizes[1]))
    (qvel if index < 0 else qpos)[:, index] = values
    given = readings(env, len(values), qpos=qpos, qvel=qvel)
    terminated = env.task.evaluate(given, np.zeros((len(values), env.action_size)))[2]
    assert terminated.tolist() == [False] * len(good) + [True] * len(bad)


@pytest.mark.parametrize("robot, noise", [("Hopper", 5e-3), ("Walker2d", 5e-3), ("Swimmer", 0.1)])
def test_velocity_starts_near_the_models_pose(robot, noise):
    qpos, qvel = draws(f"Safety{robot}Velocity")
    middle = made(f"Safety{robot}Velocity")[0].task.model().qpos0
    assert middle[1] == (1.25 if robot != "Swimmer" else 0)
    for joint in range(len(middle)):
        # float32 draws around 1.25 are 1e-7 apart
        uniform(qpos[:, joint] - middle[joint], -noise, noise)
        uniform(qvel[:, joint], -noise, noise)
    independent(np.column_stack([qpos, qvel]))


def test_velocity_ant_starts_near_the_models_pose():
    qpos, qvel = draws("SafetyAntVelocity")
    np.testing.assert_allclose(np.linalg.norm(qpos[:, 3:7], axis=1), 1, rtol=1e-6)
    for joint, middle in [(0, 0), (1, 0), (2, 0.75), *((j, 0) for j in range(7, 15))]:
        uniform(qpos[:, joint] - middle, -0.1, 0.1)
    # The noise is on the quaternion (1, 0, 0, 0), which is normalised then.
    ratio = qpos[:, 4:7] / qpos[:, 3:4]
    assert 0.1 < np.abs(ratio).max() < 0.1 / 0.9 and np.abs(ratio.mean(0)).max() < 0.005
    for joint in range(14):
        assert stats.kstest(qvel[:, joint], stats.norm(0, 0.1).cdf).pvalue > 1e-3
    independent(np.column_stack([qpos[:, :3], qpos[:, 4:], qvel]))


def test_observed_velocities_are_clipped_where_gymnasium_does():
    for robot, top in (("Hopper", 10), ("Walker2d", 10), ("Ant", 1e3)):
        env = made(f"Safety{robot}Velocity")[0]
        qvel = np.full((1, env.physics.sizes[1]), -1e3)
        seen = env.task.observe(readings(env, 1, qvel=qvel))[0, -qvel.size :]
        assert (np.asarray(seen) == -top).all()


def test_contacts_of_the_runners_begin_at_the_margin_of_the_reference():
    """A foot 1.5 margins above the floor is free, one at half a margin is not: MuJoCo now adds both geoms' margins."""
    for robot, margin in (("Ant", 0.01), ("Hopper", 0.001)):
        model = envs.TASKS[f"Safety{robot}Velocity"].model()
        data = mujoco.MjData(model)
        height = 1 if robot == "Hopper" else 2

        def lowest(offset):
            mujoco.mj_resetData(model, data)
            data.qpos[height] += offset
            mujoco.mj_forward(model, data)
            gaps = [mujoco.mj_geomDistance(model, data, 0, geom, 9.0, None) for geom in range(1, model.ngeom)]
            return min(gaps), data.ncon

        above, _ = lowest(0.0)
        assert lowest(1.5 * margin - above)[1] == 0 and lowest(0.5 * margin - above)[1] > 0
        np.testing.assert_allclose(lowest(0.5 * margin - above)[0], 0.5 * margin, rtol=1e-6)


@pytest.mark.slow
def test_the_speed_script_measures_and_keeps_other_rows(tmp_path):
    out = tmp_path / "envs.csv"
    out.write_text("task,num_envs,steps_per_second,old\nSafetyPointRun,64,27718,1\n")
    command = [sys.executable, ROOT / "results" / "speed" / "envs.py", "--num-envs", "4", "--steps", "3", "--repeats", "1"]
    command += ["--seconds", "0.1", "--out", out, "--tasks", "SafetyHopperVelocity-v1", "SafetySwimmerVelocity"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    with open(out, newline="") as file:
        rows = {row["task"]: row for row in csv.DictReader(file)}
    assert list(rows) == ["SafetyPointRun", "SafetyHopperVelocity", "SafetySwimmerVelocity"]
    assert rows["SafetyPointRun"]["steps_per_second"] == "27718"
    for name in ("SafetyHopperVelocity", "SafetySwimmerVelocity"):
        row = rows[name]
        for column in ("steps_per_second", "gymnasium_steps_per_second"):
            assert float(row[column]) > 0
        wanted = float(row["steps_per_second"]) / float(row["gymnasium_steps_per_second"])
        np.testing.assert_allclose(float(row["times_gymnasium"]), wanted, atol=0.06)
    unknown = subprocess.run([*command[:2], "--tasks", "SafetyHoper"], capture_output=True, text=True)
    assert unknown.returncode != 0 and unknown.stderr.startswith("unknown environment 'SafetyHoper'")
