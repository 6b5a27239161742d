"""envs.gym_make: the native tasks as gymnasium's environments."""

import warnings

import gymnasium
import jax
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from gymnasium.utils.passive_env_checker import env_reset_passive_checker

import envs

HOPPER = "SafetyHopperVelocity"


@pytest.mark.parametrize("task", [t if t == "SafetyPointRun" else pytest.param(t, marks=pytest.mark.slow) for t in envs.TASKS])
def test_gymnasiums_own_checker_passes(task):
    env = envs.gym_make(task)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*Box observation space .* value is -infinity")  # ours is unbounded
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
            np.testing.assert_array_equal(info["final_observation"][1] if terminated[1] else obs[1], alone)
            if terminated[1]:
                assert info["final_info"][1] == info_alone and info["_final_observation"][1]
        for i in np.flatnonzero(~(terminated | truncated)):
            assert not any(key in info and info[key][i] for key in ("_final_observation", "_final_info"))
    assert ended.min() > 1
    np.testing.assert_array_equal(vector.reset(seed=[8, 7, 6])[0][2], first)
    assert not np.array_equal(vector.reset()[0][2], first)


def test_misuse_is_refused():
    with pytest.raises(envs.UnknownName, match="Did you mean SafetyPointRun"):
        envs.gym_make("SafetyPointRum")
    for env in (envs.gym_make("SafetyPointRun"), envs.gym_make("SafetyPointRun", num_envs=2)):
        with pytest.raises(gymnasium.error.ResetNeeded):
            env.step(env.action_space.sample())
        env.reset(seed=0)
        with pytest.raises(ValueError, match=r"an action of shape \(3,\): must be"):
            env.step(np.zeros(3))
