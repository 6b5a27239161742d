"""envs.gym_make: the native tasks as gymnasium's environments."""

import warnings
from pathlib import Path

import gymnasium
import jax
import mujoco
import numpy as np
import pytest
from gymnasium.envs.registration import EnvSpec
from gymnasium.utils.env_checker import check_env
from gymnasium.utils.passive_env_checker import env_reset_passive_checker

import envs
from envs.velocity import ASSETS, Velocity

HOPPER = "SafetyHopperVelocity"
OLD = gymnasium.__version__.startswith("0.")
FINAL_OBS = "final_observation" if OLD else "final_obs"


@pytest.mark.parametrize("task", [t if t == "SafetyPointRun" else pytest.param(t, marks=pytest.mark.slow) for t in envs.TASKS])
def test_gymnasiums_own_checker_passes(task):
    env = envs.gym_make(task)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*Box observation space .* value is -?infinity")  # ours is unbounded
        check_env(env)
        env_reset_passive_checker(env)
    assert env.spec.max_episode_steps == envs.TASKS[task].horizon


def test_episodes_are_those_of_the_pure_functions():
    wrapped, env = envs.gym_make(HOPPER), envs.make(HOPPER)
    first, info = wrapped.reset(seed=3)
    key = jax.random.key(int(gymnasium.utils.seeding.np_random(3)[0].integers(2**31)))
    state, obs = jax.jit(env.reset)(key)
    np.testing.assert_array_equal(first, obs)
    assert info == {"cost": 0.0}
    step, costs = jax.jit(env.step), 0
    for _ in range(200):
        action = np.float32([-0.3, 0.3, 1.0])  # it jumps faster than the limit, and falls
        state, t = step(state, action)
        obs, reward, terminated, truncated, info = wrapped.step(action)
        np.testing.assert_array_equal(obs, t.next_obs)
        assert (reward, info["cost"], terminated, truncated) == (t.reward, t.cost, t.terminated, t.truncated)
        costs += info["cost"]
        if terminated:
            break
    assert terminated and costs > 0
    with pytest.raises(gymnasium.error.ResetNeeded):
        wrapped.step(action)
    again, _ = wrapped.reset()
    assert not np.array_equal(again, first)


def test_time_limit_truncates():
    env = envs.gym_make("SafetyPointRun")
    env.reset(seed=0)
    ends = [env.step(np.zeros(2))[2:4] for _ in range(500)]
    assert ends == [(False, False)] * 499 + [(False, True)]


def test_vector_environment_runs_the_same_episodes_and_restarts():
    single, vector = envs.gym_make(HOPPER), envs.gym_make(HOPPER, num_envs=3)
    assert isinstance(vector, gymnasium.vector.VectorEnv) and vector.action_space.shape == (3, 3)
    obs, info = vector.reset(seed=5)
    assert obs in vector.observation_space and (info["cost"] == 0).all() and info["_cost"].all()
    first, _ = single.reset(seed=6)
    np.testing.assert_array_equal(obs[1], first)
    rng, ended = np.random.default_rng(0), np.zeros(3, int)
    for _ in range(120):
        actions = rng.uniform(-1, 1, (3, 3)).astype(np.float32)
        before = ended.copy()
        obs, reward, terminated, truncated, info = vector.step(actions)
        assert obs in vector.observation_space and reward.shape == info["cost"].shape == terminated.shape == (3,)
        ended += terminated | truncated
        if not before[1]:
            alone, reward_alone, terminated_alone, _, info_alone = single.step(actions[1])
            assert (reward_alone, terminated_alone, info_alone["cost"]) == (reward[1], terminated[1], info["cost"][1])
            np.testing.assert_array_equal(info[FINAL_OBS][1] if terminated[1] else obs[1], alone)
            if terminated[1]:
                final = info["final_info"]
                assert (final[1] if OLD else {"cost": final["cost"][1]}) == info_alone and info[f"_{FINAL_OBS}"][1]
        for i in np.flatnonzero(~(terminated | truncated)):
            assert not any(key in info and info[key][i] for key in (f"_{FINAL_OBS}", "_final_info"))
    assert ended.min() > 1
    for seed in ([8, 7, 6], np.array([8, 7, 6]), np.int64(4)):
        np.testing.assert_array_equal(vector.reset(seed=seed)[0][2], first)
    assert not np.array_equal(vector.reset()[0][2], first)


def test_restarts_are_announced_and_told_as_gymnasium_tells_them():
    """The same step of gymnasium's own vector environment, over the single ones, gives the same keys, types and numbers."""
    vector = envs.gym_make(HOPPER, num_envs=3)
    own = {} if OLD else {"autoreset_mode": gymnasium.vector.AutoresetMode.SAME_STEP}
    assert {k: v for k, v in vector.metadata.items() if k != "render_modes"} == own
    theirs = gymnasium.vector.SyncVectorEnv([lambda: envs.gym_make(HOPPER)] * 3, **own)
    vector.reset(seed=4), theirs.reset(seed=4)
    for space in ("observation_space", "action_space", "single_observation_space", "single_action_space"):
        assert getattr(vector, space) == getattr(theirs, space)
    rng, done = np.random.default_rng(0), np.zeros(3, bool)
    while not done.any():  # later episodes begin with other draws
        actions = rng.uniform(-1, 1, (3, 3)).astype(np.float32)
        (obs, *numbers, info), (obs_theirs, *numbers_theirs, info_theirs) = vector.step(actions), theirs.step(actions)
        done = numbers[1] | numbers[2]
        np.testing.assert_array_equal(obs[~done], obs_theirs[~done])
        for ours, gymnasiums in zip(numbers, numbers_theirs):
            np.testing.assert_array_equal(ours, np.float32(gymnasiums))
    assert info.keys() == info_theirs.keys()
    for key in (FINAL_OBS, f"_{FINAL_OBS}", "final_info", "_final_info"):
        ours, gymnasiums = (list(x) if isinstance(x, np.ndarray) else x for x in (info[key], info_theirs[key]))
        np.testing.assert_equal(ours, gymnasiums)
    vector.close(), theirs.close()


@pytest.mark.parametrize("task", [t for t in envs.TASKS.values() if isinstance(t, Velocity)], ids=lambda t: t.name)
def test_our_copies_of_gymnasiums_robots_are_the_installed_ones(task):
    """Otherwise safety-gymnasium's Velocity tasks, which stand on the installed gymnasium, are not the native ones any more."""
    own, path = (ASSETS / task.xml).read_text(), Path(gymnasium.__file__).parent / "envs" / "mujoco" / "assets" / task.xml
    ours, theirs = (mujoco.MjModel.from_xml_string(xml.replace('collision="predefined"', "")) for xml in (own, path.read_text()))
    if task.name == "SafetySwimmerVelocity":  # the option meant that nothing touches; gymnasium 1.x says it otherwise
        for model in (ours, theirs):
            model.geom_contype[:] = model.geom_conaffinity[:] = 0
    broad = ("body_bvh", "body_con")  # which pairs are looked at for contacts, from the geoms' own
    names = [n for n in dir(ours) if n.startswith(("qpos", "body_", "jnt_", "dof_", "geom_", "actuator_")) and not n.startswith(broad)]
    for name in names:
        np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name), err_msg=name)
    for name in ("timestep", "integrator", "gravity", "density", "viscosity"):
        np.testing.assert_array_equal(getattr(ours.opt, name), getattr(theirs.opt, name), err_msg=name)
    assert len(names) > 100


def test_the_spec_makes_it_again():
    """Minari and others keep an environment as its spec's JSON."""
    spec = EnvSpec.from_json(envs.gym_make("SafetyPointRun", memory=True).spec.to_json())
    assert spec.id == "SafetyPointRun" and gymnasium.make(spec).observation_space.shape == (13,)


def test_misuse_is_refused():
    with pytest.raises(ValueError, match="^2 seeds for 3 environments: give one each, or one number$"):
        envs.gym_make("SafetyPointRun", num_envs=3).reset(seed=[1, 2])
    for number in (0, -1):
        with pytest.raises(ValueError, match=f"^num_envs {number}: must be positive$"):
            envs.gym_make("SafetyPointRun", num_envs=number)
    with pytest.raises(envs.UnknownName, match="Did you mean SafetyPointRun"):
        envs.gym_make("SafetyPointRum")
    with pytest.raises(envs.UnknownName, match="remembers nothing: leave memory out"):  # it would observe 12 numbers, not 13
        envs.gym_make("SafetyPointRun", backend="safety-gymnasium", memory=True)
    for env in (envs.gym_make("SafetyPointRun"), envs.gym_make("SafetyPointRun", num_envs=2)):
        with pytest.raises(gymnasium.error.ResetNeeded):
            env.step(env.action_space.sample())
        env.reset(seed=0)
        with pytest.raises(ValueError, match=r"an action of shape \(3,\): must be"):
            env.step(np.zeros(3))
        with pytest.raises(ValueError, match="an action with NaN: "):
            env.step(np.full(env.action_space.shape, np.nan))
