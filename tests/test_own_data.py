"""envs.Recorder, and a whole example: a dataset of one's own environment (own_env.py), looked at, and trained on."""

import json
import os
import subprocess
import sys
from pathlib import Path

import gymnasium
import h5py
import numpy as np
import own_env
import pytest
from gymnasium import spaces
from gymnasium.error import ResetNeeded

import envs
from data import convert, dsrl, inspect

ROOT = Path(__file__).resolve().parents[1]

# ---------------------------------------------------------------- the example


def towards(obs, speed):
    """Force in N that brings the point to a speed along x, and to the middle of its way."""
    _, _, y, vx, vy, _ = obs
    return np.array([0.8 * speed + 5 * (speed - vx), -y - 2 * vy])


def careful(obs, speed):
    """Fast, and slow in the strip x < 1 and before it."""
    x = np.arctan2(obs[1], obs[0]) % (2 * np.pi) * own_env.OwnPoint.LENGTH / (2 * np.pi)
    return towards(obs, 0.9 if x < 1 or x > 2.5 else speed)


# name: (policy, standard deviation of the noise on its force, N)
POLICIES = {
    "lazy": (lambda obs: towards(obs, 0.1), 0.2),  # poor and safe
    "random": (lambda obs: np.zeros(2), 2.0),
    "slow": (lambda obs: towards(obs, 0.8), 0.2),
    "fast": (lambda obs: towards(obs, 2.4), 0.2),  # good and unsafe
    "hasty": (lambda obs: careful(obs, 2.4), 1.0),
    "careful": (lambda obs: careful(obs, 2.0), 0.1),  # good and safe
}


def record(path, episodes):
    """A dataset with `episodes` of each policy."""
    rng = np.random.default_rng(0)
    with envs.Recorder(gymnasium.make("OwnPoint-v0"), path) as env:
        env.reset(seed=0)
        for policy, noise in POLICIES.values():
            for _ in range(episodes):
                obs, _ = env.reset()
                done = False
                while not done:
                    obs, _, terminated, truncated, _ = env.step(policy(obs) + noise * rng.normal(size=2))
                    done = terminated or truncated
    return path


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    return record(tmp_path_factory.mktemp("own") / "own.hdf5", episodes=10)


def test_the_dataset_ranges_from_poor_to_good_and_from_safe_to_unsafe(own):
    dataset, about = dsrl.load(own, env="own_env:OwnPoint-v0", obs_size=6, action_size=2)
    assert about["env"] == "OwnPoint-v0" and about["horizon"] == 100
    assert [json.loads(about[key]) for key in ("action_low", "action_high")] == [[-2, -2], [2, 2]]
    found = dsrl.episodes(dataset)
    assert found.complete.all() and len(found.start) == 60 and (found.lengths[dataset.timeouts[found.stop - 1]] == 100).all()
    returns, costs = found.returns.reshape(6, 10).mean(1), found.costs.reshape(6, 10).mean(1)
    by_name = dict(zip(POLICIES, zip(returns, costs)))
    assert by_name["lazy"][0] < by_name["slow"][0] < by_name["careful"][0] < by_name["fast"][0]
    assert by_name["lazy"][1] == by_name["slow"][1] == 0 and by_name["careful"][1] < 5 < 15 < by_name["fast"][1], by_name


def test_it_can_be_looked_at(own, tmp_path):
    words = [sys.executable, "-m", "data.inspect", own, "--cost-limit", "5", "--plot", tmp_path / "own.png"]
    done = subprocess.run(
        list(map(str, words)), capture_output=True, text=True, cwd=ROOT / "tests", env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 0, done.stderr
    assert "60 trajectories" in done.stdout and "safe (cost at most 5)" in done.stdout and (tmp_path / "own.png").exists()
    assert not [line for line in done.stderr.splitlines() if "warning" in line], done.stderr


@pytest.mark.slow
def test_it_can_be_trained_on(own, tmp_path):
    options = "--offline-steps 500 --offline-evals 1 --eval-episodes 2 --final-eval-rounds 1 --hidden 32 --vae-hidden 32 --iterations 2"
    options += " --evals 1 --updates-per-iter 20 --actor-warmup 1 --vpa-steps 500 --rank-points 8 --cost-limit 5"
    words = [sys.executable, ROOT / "algos" / "marvel.py", "--env", "own_env:OwnPoint-v0", "--dataset", own, "--runs", tmp_path / "runs"]
    quick = os.environ | {"XLA_FLAGS": "--xla_backend_optimization_level=0"}  # such short runs are mostly compilation
    done = subprocess.run([*map(str, words), *options.split()], capture_output=True, text=True, cwd=ROOT / "tests", env=quick)
    assert done.returncode == 0, done.stderr
    assert "does not fit" not in done.stderr
    (curves,) = (tmp_path / "runs").glob("**/curves.png")
    assert curves.read_bytes().startswith(b"\x89PNG")


# ---------------------------------------------------------------- the recorder


class Counter(gymnasium.Env):
    """Counts its steps: the observation is (2, 1) [steps, last action]; it ends after `end` steps, or never."""

    def __init__(self, end=5, cost=True, six=False, low=-1.0, high=3.0):
        self.observation_space = spaces.Box(-np.inf, np.inf, (2, 1), np.float64)
        self.action_space = spaces.Box(low, high, (1,), np.float32)
        self.end, self.cost, self.six = end, cost, six

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return np.zeros((2, 1)), {}

    def step(self, action):
        self.t += 1
        obs, cost = np.array([[self.t], action], float), self.t % 2
        if self.six:
            return obs, 0.5, cost, self.t == self.end, False, {}
        return obs, np.array([0.5]), self.t == self.end, False, {"cost": np.float64(cost)} if self.cost else {}


def walk(env, steps, action=2.0):
    env.reset()
    return [env.step(np.array([action])) for _ in range(steps)][-1]


@pytest.mark.parametrize("six", [False, True])
def test_what_is_recorded(tmp_path, six):
    env = envs.Recorder(
        gymnasium.wrappers.TimeLimit(Counter(end=3, six=six), 7) if not six else Counter(end=3, six=True), tmp_path / "a" / "c.hdf5"
    )
    last = walk(env, 3)
    assert len(last) == (6 if six else 5)  # what the environment gives
    walk(env, 2)  # not finished: dropped
    walk(env, 3, action=99.0)
    walk(env, 1)  # still running
    assert env.save() == tmp_path / "a" / "c.hdf5" and os.listdir(tmp_path / "a") == ["c.hdf5"]
    found, about = dsrl.load(env.path)
    np.testing.assert_array_equal(found.observations, [[0, 0], [1, 2], [2, 2], [0, 0], [1, 3], [2, 3]])  # clipped before it acts
    np.testing.assert_array_equal(found.next_observations, [[1, 2], [2, 2], [3, 2], [1, 3], [2, 3], [3, 3]])
    np.testing.assert_array_equal(found.actions[:, 0], [0.5] * 3 + [1.0] * 3)  # of [-1, 3]
    np.testing.assert_array_equal(found.costs, [1, 0, 1, 1, 0, 1])
    assert (found.rewards == 0.5).all() and np.flatnonzero(found.terminals).tolist() == [2, 5] and not found.timeouts.any()
    assert json.loads(about["action_high"]) == [3.0] and "env" not in about
    env.step(np.zeros(1))  # and it goes on
    env.step(np.zeros(1))
    env.close()
    assert len(dsrl.load(env.path)[0].rewards) == 9


def test_time_limits_are_time_outs(tmp_path):
    with envs.Recorder(gymnasium.wrappers.TimeLimit(Counter(end=4), 4), tmp_path / "c.hdf5") as env:
        walk(env, 4)  # both at once: it terminated
    with envs.Recorder(gymnasium.wrappers.TimeLimit(Counter(), 3), tmp_path / "d.hdf5") as env:
        walk(env, 3)
    flags = [dsrl.load(tmp_path / name)[0][5:7] for name in ("c.hdf5", "d.hdf5")]
    assert [[x.tolist() for x in pair] for pair in flags] == [[[False] * 3 + [True], [False] * 4], [[False] * 3, [False] * 2 + [True]]]


def test_a_task_of_this_suite_fits_itself(tmp_path):
    """A recording through gymnasium is data of the native task, id and all."""
    rng = np.random.default_rng(0)
    with envs.Recorder(envs.gym_make("SafetyHopperVelocity"), tmp_path / "h.hdf5") as env:
        for seed in range(30):
            env.reset(seed=seed)
            done = False
            while not done:
                _, _, terminated, truncated, _ = env.step(rng.uniform(-1, 1, 3))
                done = terminated or truncated
    dataset, about = dsrl.load(tmp_path / "h.hdf5", env="SafetyHopperVelocity", obs_size=11, action_size=3)
    assert about["horizon"] == 1000 and dataset.terminals.sum() == 30
    assert inspect.mismatch(dataset, envs.make("SafetyHopperVelocity")) is None
    backwards = dataset._replace(observations=dataset.observations[:, ::-1], next_observations=dataset.next_observations[:, ::-1])
    assert "first observations differ" in inspect.mismatch(backwards, envs.make("SafetyHopperVelocity"))


def test_the_odometer_is_not_recorded(tmp_path):
    """Policies of this suite see it behind the observation; whoever trains on the file computes it anew."""
    with envs.Recorder(envs.gym_make("SafetyPointRun", memory=True, backend="mujoco"), tmp_path / "o.hdf5") as env:
        obs, _ = env.reset(seed=0)
        seen, done = [obs], False
        while not done:
            obs, _, terminated, truncated, _ = env.step(np.ones(2))
            done, seen = terminated or truncated, [*seen, obs]
    assert seen[0].shape == (13,)
    dataset, _ = dsrl.load(tmp_path / "o.hdf5", env="SafetyPointRun", obs_size=12, action_size=2)
    np.testing.assert_array_equal(dataset.observations, np.array(seen)[:-1, :12])
    np.testing.assert_array_equal(dataset.next_observations, np.array(seen)[1:, :12])


@pytest.mark.slow
def test_safety_gymnasiums_six_values(tmp_path):
    from envs.reference import compat

    env = envs.Recorder(compat.safety_gymnasium().make("SafetyPointRun0-v0"), tmp_path / "p.hdf5")
    env.reset(seed=0)
    rng, done = np.random.default_rng(0), False
    while not done:
        *_, terminated, truncated, _ = env.step(rng.uniform(-1, 1, 2))
        done = terminated or truncated
    env.close()
    dataset, about = dsrl.load(tmp_path / "p.hdf5", env="SafetyPointRun", obs_size=12, action_size=2)
    assert len(dataset.rewards) == 500 and dataset.timeouts[-1] and about["env"] == "SafetyPointRun"


def test_an_error_in_the_middle_keeps_the_whole_episodes(tmp_path):
    with pytest.raises(KeyboardInterrupt), envs.Recorder(Counter(), tmp_path / "c.hdf5") as env:
        walk(env, 5)
        walk(env, 2)
        raise KeyboardInterrupt
    assert len(dsrl.load(tmp_path / "c.hdf5")[0].rewards) == 5


class Faulty(Counter):
    """A Counter whose step number 7, the second of the second episode, has other values."""

    def __init__(self, **other):
        super().__init__()
        self.other, self.steps = other, 0

    def step(self, action):
        obs, reward, terminated, truncated, info = super().step(action)
        self.steps += 1
        other = self.other if self.steps == 7 else {}
        info["cost"] = other.get("cost", info["cost"])
        return other.get("obs", obs), other.get("reward", reward), terminated, truncated, info


FAULTY = [
    ({"reward": np.nan}, "step 2's reward is nan, not a finite number (float32); mend the environment"),
    ({"reward": 1e39}, "step 2's reward is 1e+39, not a finite number"),
    ({"cost": None}, "step 2's cost is None, not a finite number (float32) >= 0"),
    ({"cost": np.ones(2)}, "step 2's cost is [1. 1.], not a finite number"),
    ({"cost": -1.0}, "step 2's cost is -1.0, not a finite number (float32) >= 0"),
    ({"obs": np.array([[0], [np.inf]])}, "step 2's observation is inf in column 1, not 2 finite numbers"),
    ({"obs": np.zeros(3)}, "step 2's observation is [0. 0. 0.], not 2 finite numbers"),
]


@pytest.mark.parametrize("other, said", FAULTY, ids=[said.partition(",")[0] for _, said in FAULTY])
def test_a_faulty_number_is_told_at_once_and_costs_one_episode(tmp_path, other, said):
    with envs.Recorder(Faulty(**other), tmp_path / "c.hdf5") as env:
        walk(env, 5)
        walk(env, 1)
        with pytest.raises(dsrl.DatasetError) as caught:
            env.step(np.zeros(1))
        assert said in str(caught.value) and "this episode is dropped, whole ones kept: 1" in str(caught.value)
        assert len(str(caught.value).splitlines()) == 1
        with pytest.raises(ResetNeeded):
            env.step(np.zeros(1))
        walk(env, 5)
    assert dsrl.load(tmp_path / "c.hdf5")[0].observations[:, 0].tolist() == [0, 1, 2, 3, 4] * 2


def test_an_action_that_is_no_number_does_not_reach_the_environment(tmp_path):
    with envs.Recorder(Counter(), tmp_path / "c.hdf5") as env:
        walk(env, 4)
        with pytest.raises(ValueError, match=r"an action with NaN: \[nan\]; mend the policy"):
            env.step(np.array([np.nan]))
        env.step(np.array([np.inf]))
    found = dsrl.load(tmp_path / "c.hdf5")[0]
    assert found.terminals.tolist() == [False] * 4 + [True] and found.actions[-1] == 1


def test_a_killed_recording_leaves_no_half_file(tmp_path):
    program = "import sys; sys.path[:0] = ['tests', '.']; import os, test_own_data as t, envs; from data import dsrl\n"
    program += f"env = envs.Recorder(t.Counter(), {str(tmp_path / 'c.hdf5')!r}); t.walk(env, 5)\n"
    program += "os.replace = lambda *names: os._exit(9)\n"  # everything is written, and then it dies
    program += "env.save()\n"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT).returncode == 9
    assert not (tmp_path / "c.hdf5").exists() and len(os.listdir(tmp_path)) == 1  # the part with its other name


def refused(said, env, path, steps=0):
    with pytest.raises(dsrl.DatasetError) as caught:
        walk(envs.Recorder(env, path), steps)
    assert len(str(caught.value).splitlines()) == 1 and said in str(caught.value)
    assert not path.exists()


def test_what_cannot_be_recorded_is_refused(tmp_path):
    path = tmp_path / "c.hdf5"
    refused("record one environment at a time", gymnasium.vector.SyncVectorEnv([Counter, Counter]), path)
    refused("its actions are not bounded; give its action space finite bounds", Counter(low=-np.inf), path)
    refused("a step has no cost; let step() put it into info['cost']", Counter(cost=False), path, 1)
    discrete = Counter()
    discrete.action_space = spaces.Discrete(3)
    refused("its action space is Discrete(3), not a Box; only continuous actions", discrete, path)
    nested = Counter()
    nested.observation_space = spaces.Dict({"a": spaces.Box(0, 1)})
    refused("wrap it with FlattenObservation", nested, path)
    itself = getattr(gymnasium.wrappers, "Autoreset", None) or gymnasium.wrappers.AutoResetWrapper
    refused("resets by itself, which hides an episode's last observation; wrap the Recorder", itself(Counter()), path)
    assert os.listdir(tmp_path) == []


def test_a_recording_without_a_whole_episode_says_so(tmp_path, capsys):
    """The time limit around the Recorder, not in it: the Recorder sees no end."""
    recorder = envs.Recorder(Counter(end=-1), tmp_path / "c.hdf5")
    env = gymnasium.wrappers.TimeLimit(recorder, 20)
    for _ in range(3):
        walk(env, 20)
    env.reset()
    with pytest.raises(dsrl.DatasetError, match=r"no episode has ended, and only whole ones are kept; .*Recorder\(TimeLimit\(env"):
        recorder.save()
    env.close()
    said = capsys.readouterr().err
    assert said.startswith("warning: ") and "no episode has ended" in said and len(said.splitlines()) == 1
    assert os.listdir(tmp_path) == []


def test_episodes_that_reset_cuts_off_are_told(tmp_path, capsys):
    """The last one, which nobody reset, is none of them."""
    env = envs.Recorder(Counter(end=5), tmp_path / "c.hdf5")
    for steps in (5, 3, 5, 2):
        walk(env, steps)
    env.close()
    (line,) = capsys.readouterr().err.splitlines()
    assert "c.hdf5: 1 of 3 episodes (3 steps) had not ended at reset() and are left out; give the Recorder" in line
    assert dsrl.load(tmp_path / "c.hdf5")[0].rewards.shape == (10,)


def warned(capsys, dataset, about, env):
    inspect.check_rows("f", dataset, env.horizon)
    inspect.check_about("f", about, env)
    return capsys.readouterr().err.splitlines()


def test_other_limits_ranges_and_orders_of_rows_are_warned_of(own, capsys):
    dataset, about = dsrl.load(own)
    env = envs.make("own_env:OwnPoint-v0")
    assert warned(capsys, dataset, about, env) == []
    (line,) = warned(capsys, dataset, about, envs.make("own_env:OwnPoint-v0", horizon=150))[-1:]
    assert "its episodes were cut off after 100 steps, those of own_env:OwnPoint-v0 end after 150 (--horizon)" in line
    (line,) = warned(capsys, dataset, about | {"action_low": "[0.0, -2.0]"}, env)
    assert "its actions were scaled from [0, 2], [-2, 2], own_env:OwnPoint-v0 takes [-2, 2]" in line
    (line,) = warned(capsys, dataset, {}, env)
    assert "-1 and 1 among its actions are read as the ends of [-2, 2]; if they are not: python -m data.convert" in line
    swapped = dataset._replace(observations=dataset.next_observations, next_observations=dataset.observations)
    (line,) = warned(capsys, swapped, about, env)
    assert "of the rows, the next observation is not that of the next row: are the two swapped" in line


@pytest.mark.parametrize("bounds, recorded", [("-2 2", [-2, 2]), ("-1 1", [-2, 2])])
def test_a_converted_file_says_which_range_its_actions_had(own, bounds, recorded, tmp_path, monkeypatch, capsys):
    """-1 and 1 say that the actions were scaled before: the environment's range is then the file's."""
    monkeypatch.chdir(ROOT / "tests")
    low, high = bounds.split()
    with h5py.File(own) as old, h5py.File(tmp_path / "raw.hdf5", "w") as new:
        for name in old:
            new[name] = old[name][()] * (float(high) if name == "actions" else 1)
    words = [tmp_path / "raw.hdf5", tmp_path / "out.hdf5", "--env", "own_env:OwnPoint-v0", "--action-low", low, "--action-high", high]
    convert.main(list(map(str, words)))
    assert "actions" not in capsys.readouterr().err
    found, about = dsrl.load(tmp_path / "out.hdf5")
    np.testing.assert_allclose(found.actions, dsrl.load(own)[0].actions, atol=1e-6)
    assert [np.unique(json.loads(about[f"action_{side}"])) for side in ("low", "high")] == recorded


def test_an_attribute_of_the_user_s_environment_costs_no_column(tmp_path):
    """`memory_size` of this suite's environments counts columns that are left out; another environment may mean something else by it."""
    inner = Counter()
    inner.memory_size = 1
    with envs.Recorder(inner, tmp_path / "c.hdf5") as env:
        walk(env, 5)
    assert dsrl.load(tmp_path / "c.hdf5")[0].observations.shape == (5, 2)


def test_a_file_that_cannot_be_written_is_told_before_anything_is_recorded(tmp_path):
    (tmp_path / "file").touch()
    for name in ("file/c.hdf5", "c.npz", "."):
        with pytest.raises(dsrl.DatasetError, match=f"^{tmp_path / name}: .*; name a file"):
            envs.Recorder(Counter(), tmp_path / name)
    assert os.listdir(tmp_path) == ["file"]


def test_misuse_is_refused(tmp_path):
    env = envs.Recorder(Counter(), tmp_path / "c.hdf5")
    with pytest.raises(ResetNeeded):
        env.step(np.zeros(1))
    env.reset()
    with pytest.raises(ValueError, match=r"an action of shape \(2,\): must be \(1,\)"):
        env.step(np.zeros(2))
    walk(env, 5)
    with pytest.raises(ResetNeeded):
        env.step(np.zeros(1))
