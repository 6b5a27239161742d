"""Environments of the user's own, registered with gymnasium: `module:id` in the pool of worker processes."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import gymnasium
import imageio.v3
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import algos
import envs
from algos import logbook, training
from data import collect, convert, dsrl, inspect
from envs import reference, render
from envs.reference.pool import WorkerError

ROOT = Path(__file__).resolve().parents[1]
OWN = "own_env:OwnPoint-v0"
sys.path.append(str(ROOT / "tests"))
import own_env

PLAIN = """
import gymnasium, numpy as np, sys
from gymnasium.spaces import Box, Dict, Discrete
from gymnasium.wrappers import FlattenObservation

class Plain(gymnasium.Env):
    observation_space, action_space = Box(-np.inf, np.inf, (2,)), Box(-1, 1, (2,))
    metadata = {{"render_modes": []}}
    def __init__(self, render_mode=None):
        pass
    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.np_random.normal(size=2).astype(np.float32), {{}}
    def step(self, action):
        return np.float32(action), 0.5, False, False, {{"cost": 1.0}}
{changes}

gymnasium.register("Plain-v0", entry_point={entry}, max_episode_steps={limit})
"""


def write(folder, changes="", module="plain", entry="Plain", limit=5):
    """A module that registers Plain-v0 with some lines of its class changed; the name to make it by."""
    lines = "".join(f"    {line}\n" for line in changes.splitlines())
    (folder / f"{module}.py").write_text(PLAIN.format(changes=lines, entry=entry, limit=limit))
    return f"{module}:Plain-v0"


def own(name=OWN, **options):
    env = envs.make(name, **options)
    return env, jax.jit(env.reset), jax.jit(env.step)


@pytest.fixture(scope="module")
def point():
    return own()


def roll(made, key, actions):
    """First observations, seeds and transitions of actions (T, N, a)."""
    _, reset, step = made
    state, first = reset(jax.random.split(key, actions.shape[1]))
    seeds, out = [np.asarray(state.seed)], []
    for action in actions:
        state, t = step(state, action)
        out.append(t)
        seeds.append(np.asarray(state.seed))
    return first, np.stack(seeds), jax.tree.map(lambda *x: np.stack(x), *out)


def pushes(steps, n, seed=0):
    """Actions of which some drive the point out of its track, beyond [-1, 1] now and then."""
    rng = np.random.default_rng(seed)
    return (rng.uniform(-1.2, 1.2, (steps, n, 2)) + [0.5, 0.6]).astype(np.float32)


# What the environment does here is what it does alone


def test_episodes_are_those_of_gymnasium(point):
    """Seeds, scaled actions, costs and both kinds of end, bit for bit, over several episodes."""
    env = point[0]
    assert (env.name, env.backend, env.horizon, env.obs_size, env.action_size) == (OWN, "gymnasium", 100, 6, 2)
    assert env.reward_scale == 0.1 and env.privileged_size == 0
    assert (env.action_low == -1).all() and (env.action_high == 1).all()
    actions = pushes(120, 2)
    actions[:, 1, 1] *= 0.1  # this one stays on the track until its time is up
    first, seeds, found = roll(point, jax.random.key(0), actions)
    for i in range(2):
        alone = gymnasium.make("OwnPoint-v0")
        obs, _ = alone.reset(seed=int(seeds[0, i]))
        np.testing.assert_array_equal(first[i], np.float32(obs))
        for t in range(120):
            action = 2.0 * np.clip(actions[t, i], -1, 1).astype(np.float64)
            obs, reward, terminated, truncated, info = alone.step(action)
            np.testing.assert_array_equal(found.next_obs[t, i], np.float32(obs))
            wanted = np.float32(reward), np.float32(info["cost"]), terminated, truncated
            assert tuple(x[t, i] for x in found[2:]) == wanted
            if terminated or truncated:
                obs, _ = alone.reset(seed=int(seeds[t + 1, i]))
            np.testing.assert_array_equal(found.obs[t, i], np.float32(obs))
    assert found.terminated[:, 0].any() and not found.truncated[:, 0].any() and found.truncated[99, 1] and not found.terminated[:, 1].any()
    assert 0 < found.cost.sum() < found.cost.size


def test_the_same_key_gives_the_same_episodes_whatever_happened_between(point):
    actions = pushes(40, 3)
    once = roll(point, jax.random.key(0), actions)
    other = roll(point, jax.random.key(1), actions)
    assert not np.array_equal(once[0], other[0]) and np.unique(once[0], axis=0).shape[0] == 3
    jax.tree.map(np.testing.assert_array_equal, once, roll(point, jax.random.key(0), actions))


def test_a_horizon_cuts_episodes_off(point):
    shorter = own(horizon=7)
    assert shorter[0].horizon == 7
    _, _, found = roll(shorter, jax.random.key(0), pushes(15, 2) * 0.1)
    np.testing.assert_array_equal(found.truncated[:, 0], np.arange(15) % 7 == 6)
    longer = envs.make(OWN, horizon=150)  # longer than it is registered with
    state, _ = jax.jit(longer.reset)(jax.random.key(0))
    ends = [0]

    @jax.jit
    def run(state):
        return jax.lax.scan(lambda s, _: (lambda out: (out[0], out[1].truncated))(longer.step(s, jnp.zeros(2))), state, length=150)[1]

    ends = np.flatnonzero(run(state))
    np.testing.assert_array_equal(ends, [149])


SIX = """
def step(self, action):
    return np.float32(action), 0.5, 2.0, False, False, {}
"""
NOISY = """
def step(self, action):
    print("x" * 100_000)
    sys.stdout.flush()
    return np.float32(action), 0.5, False, False, {"cost": 2.0 if sys.stdin.read() == "" else 1.0}
"""
ECHO = """
action_space = Box(np.array([0.0, 3.0]), np.array([10.0, 3.0]), dtype=np.float64)
observation_space = Box(0, 10, (2,), dtype=np.float64)
buffer = np.zeros(2)
def reset(self, *, seed=None, options=None):
    super().reset(seed=seed)
    self.buffer[:] = 0
    return self.buffer, {}
def step(self, action):
    assert action in self.action_space and action.dtype == np.float64
    self.buffer[:] = action
    return self.buffer, np.array([0.5]), np.bool_(False), False, {"cost": np.array(2)}
"""


@pytest.mark.parametrize("changes", [SIX, NOISY, ECHO], ids=["six values", "prints and reads", "bounds and types"])
def test_what_an_environment_may_do(changes, tmp_path, monkeypatch):
    """The cost as third of six values; printing to and reading from the pool's own channels; any finite range of actions, arrays
    instead of numbers, and one array for all observations."""
    monkeypatch.chdir(tmp_path)
    made = own(write(tmp_path, changes))
    actions = np.float32([[[-1, 1]], [[1, -1]], [[0, 0.5]], [[5, -5]], [[0.5, 0]]])
    _, _, found = roll(made, jax.random.key(0), actions)
    assert (found.cost == 2).all() and (found.reward == 0.5).all()
    clipped = np.clip(actions[:, 0], -1, 1)
    wanted = np.stack([5 + 5 * clipped[:, 0], np.full(5, 3)], 1) if changes == ECHO else clipped
    np.testing.assert_array_equal(found.next_obs[:, 0], np.float32(wanted))
    assert found.truncated[:, 0].tolist() == [False] * 4 + [True]
    assert not np.array_equal(found.obs[4], found.next_obs[4]) and np.array_equal(found.obs[:4], found.next_obs[:4])


@pytest.mark.parametrize("module", ["env", "worker", "compat"])
def test_modules_are_the_users_even_where_ours_have_their_names(module, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert envs.make(write(tmp_path, module=module)).horizon == 5


@pytest.mark.skipif(not gymnasium.__version__.startswith("0."), reason="gymnasium 1.0 removed plugins")
def test_gym_names_what_installed_packages_register(tmp_path, monkeypatch):
    """As a plugin package does it: its entry point is called when gymnasium is imported."""
    write(tmp_path)
    registration = "from gymnasium.envs.registration import register as of_gymnasium\n\ndef register():\n"
    (tmp_path / "plugin.py").write_text(registration + "    of_gymnasium('Plain-v0', entry_point='plain:Plain', max_episode_steps=5)\n")
    (tmp_path / "plugin-1.0.dist-info").mkdir()
    (tmp_path / "plugin-1.0.dist-info" / "entry_points.txt").write_text("[gymnasium.envs]\n__root__ = plugin:register\n")
    (tmp_path / "plugin-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: plugin\nVersion: 1.0\n")
    monkeypatch.chdir(tmp_path)
    assert envs.make("gym:Plain-v0").horizon == 5


def test_gym_make_takes_it(point):
    single = envs.gym_make(OWN)
    obs, info = single.reset(seed=3)
    assert obs.shape == (6,) and info == {"cost": 0.0} and single.spec.max_episode_steps == 100
    obs, reward, terminated, truncated, info = single.step(np.zeros(2))
    assert obs in single.observation_space and not terminated and not truncated and info == {"cost": 0.0}


def test_gym_make_tells_a_simulator_s_failure_in_a_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    env = envs.gym_make(write(tmp_path, STEP + 'np.float32(action), 1 / int(action[0] != 0.25), False, False, {"cost": 0}', limit=50))
    env.reset(seed=0)
    env.step(np.full(2, 0.5))
    with pytest.raises(WorkerError, match=r"^plain:Plain-v0: a simulator failed: ZeroDivisionError: .*\(plain.py, line \d+, in step\)"):
        env.step(np.full(2, 0.25))


# What is wrong with it is said in one line, at once


def refused(name, text, **options):
    with pytest.raises(envs.UnknownName, match=text) as caught:
        envs.make(name, **options)
    assert len(str(caught.value).splitlines()) == 1 and name.partition(":")[0] in str(caught.value)


STEP = "def step(self, action):\n    return "


@pytest.mark.parametrize(
    "changes, text",
    [
        ("observation_space = Dict(a=Box(-1, 1, (2,)))", "its observation space, Dict, must be a Box of one axis.*FlattenObservation"),
        ("observation_space = Box(0, 255, (4, 3), np.uint8)", r"observation space, Box of shape \(4, 3\), must be.*FlattenObservation"),
        ("action_space = Discrete(3)", "its action space, Discrete, must be a Box of one axis.*ActionWrapper"),
        ("action_space = Box(-np.inf, 1, (2,))", "its action space has infinite bounds: give finite"),
        ("action_space = Box(0, 9, (2,), np.int64)", "its actions are int64: must be floats"),
        (
            STEP + "np.zeros(2), 0.0, False, False, {}",
            r'plain:Plain-v0: Plain.step\(\) gives no info\["cost"\]: put the cost of the step there',
        ),
        (STEP + "np.zeros(2), 0.0, False, {}", r"step\(\) must return \(observation, reward, terminated, truncated, info\)"),
        (STEP + 'np.zeros(3), 0.0, False, False, {"cost": 0}', r"step\(\) gives an observation of shape \(3,\), its .* has \(2,\)"),
        (STEP + 'np.full(2, np.nan), 0.0, False, False, {"cost": 0}', r"step\(\) gives an observation with NaN or inf, first in entry 0"),
        (STEP + 'np.zeros(2), np.nan, False, False, {"cost": 0}', r"step\(\) gives the reward nan: must be finite"),
        (STEP + 'np.zeros(2), None, False, False, {"cost": [1, 2]}', r"step\(\) gives the cost \[1, 2\]: must be one number"),
        (STEP + 'np.zeros(2), 0.0, False, False, {"cost": -1}', r"step\(\) gives the cost -1: must be >= 0"),
        (STEP + "[][3]", r"a simulator failed: IndexError: list index out of range \(plain.py, line \d+, in step\)"),
        (STEP + "sys.exit('over')", r"a simulator failed: SystemExit: over \(plain.py, line \d+, in step\)"),
        (STEP + "__import__('os')._exit(3)", r"a simulator process died \(exit code 3\)"),
        ("def reset(self, **options):\n    return np.zeros(2)", r"reset\(\) must return \(observation, info\)"),
        (
            "def reset(self, **options):\n    return np.random.normal(size=2), {}",
            r"other numbers each time: its reset\(\) must call super\(\)",
        ),
        (
            "state = np.zeros(2)\ndef reset(self, *, seed=None, options=None):\n    gymnasium.Env.reset(self, seed=seed)\n"
            "    self.state[:] = self.np_random.normal(size=2)\n    return self.state.copy(), {}\n"
            'def step(self, action):\n    self.state += action\n    return self.state.copy(), 0.0, False, False, {"cost": 0}',
            "two of it at once disturb each other: it must keep all that steps change in self",
        ),
        ("def __init__(self):\n    raise OSError('no\\nlicence')", r"OSError: no licence \(plain.py, line \d+, in __init__\)"),
    ],
)
def test_environments_that_break_the_rules(changes, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(write(tmp_path, changes), text)


def test_the_wrapper_that_the_line_names_mends_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    changes = "observation_space = Box(-1, 1, (2, 1))\n"
    changes += "def reset(self, *, seed=None, options=None):\n    super().reset(seed=seed)\n    return np.zeros((2, 1), np.float32), {}\n"
    changes += 'def step(self, action):\n    return np.ones((2, 1), np.float32), 0.0, False, False, {"cost": 0}'
    assert envs.make(write(tmp_path, changes, entry="lambda **options: FlattenObservation(Plain(**options))")).obs_size == 2


def test_names_that_lead_nowhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = write(tmp_path)
    refused("plane:Plain-v0", "no module 'plane' in .*Did you mean plain")
    refused("plain:Plane-v0", "unknown environment 'plain:Plane-v0' of gymnasium. Its nearest: plain:Plain-v0$")
    refused(":Plain-v0", "no module before the colon")
    for path in ("./plain", "../plain", "/somewhere/plain.py", ".plain", "plain.py"):
        refused(f"{path}:Plain-v0", f"'{path}' is a path: name the module as import does, plain, in its folder or with")
    refused("gym:Pendulum-v2", "unknown environment 'gym:Pendulum-v2' of gymnasium. Its nearest: gym:Pendulum-v1.*named module:id")
    refused("gym:Pendulum-v1", r'PendulumEnv.step\(\) gives no info\["cost"\]')
    refused("json.decodr:Plain-v0", "no module 'json.decodr' .*decoder")
    refused("csv:Plain-v0", "importing csv registers no environment: call gymnasium.register")
    (tmp_path / "broken.py").write_text("import plain\nimport not_installed\n")
    refused("broken:Plain-v0", r"ModuleNotFoundError: No module named 'not_installed' \(broken.py, line 2, in <module>\)")
    refused(name, "has no backend 'mjx': leave the backend out", backend="mjx")
    refused(write(tmp_path, module="endless", limit=None), "nothing says how long its episodes are: add --horizon N")
    assert envs.make("endless:Plain-v0", horizon=9).horizon == 9
    refused("endless:Plain-v0", "cannot end after 0 steps", horizon=0)
    with pytest.raises(envs.UnknownName, match="module:id"):
        envs.make("Plain-v0")


def test_every_tool_takes_the_horizon_that_the_line_asks_for(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    name, rows = write(tmp_path, module="endless", limit=None), np.random.default_rng(0)
    numbers = {"observations": rows.normal(size=(33, 2)), "actions": rows.uniform(-1, 1, (33, 2)), "rewards": np.zeros(33)}
    np.savez("in.npz", **numbers, costs=np.ones(33))
    convert.main(["in.npz", "out.hdf5", "--env", name, "--horizon", "10"])
    inspect.main(["out.hdf5", "--env", name, "--horizon", "10"])
    inspect.main(["out.hdf5", "--horizon", "10"])  # the file names the environment
    assert capsys.readouterr().out.count(f"compared with {name}") == 2
    with pytest.raises(render.RenderError, match="it draws no pictures"):  # it is made, but draws none
        render.main([name, "out.gif", "--horizon", "10"])
    for env in (envs.gym_make(name, horizon=10), envs.gym_make(name, 2, horizon=10)):
        assert env.spec.max_episode_steps == 10
    assert gymnasium.make(envs.gym_make(name, horizon=10).spec).spec.kwargs["horizon"] == 10
    with pytest.raises(dsrl.DatasetError, match=f"^{name}: this collects no dataset of it; .*envs.Recorder"):  # no horizon would help
        collect.main(collect.Args(env=name))


@pytest.mark.parametrize("name, text", [("SafetyPointRun", "ends after 500 steps"), ("SafetyPointGoal1-v0", "has a horizon of its own")])
def test_other_environments_take_no_horizon(name, text):
    with pytest.raises(envs.UnknownName, match=f"{name} {text}: --horizon is for environments named module:id"):
        envs.make(name, horizon=5)


def test_no_dataset_names_the_mend():
    with pytest.raises(dsrl.DatasetError, match=f"^{OWN}: no dataset comes with it; .*--dataset FILE.*python -m data.convert") as caught:
        collect.provided(OWN)
    assert len(str(caught.value).splitlines()) == 1


def test_a_failure_in_the_middle_leaves_the_pool_whole(tmp_path, monkeypatch):
    """Every process has answered before the failure is raised: the next answers are those to the next questions."""
    monkeypatch.chdir(tmp_path)
    env = envs.make(write(tmp_path, STEP + 'np.float32(action), 1 / int(action[0] != 0.25), False, False, {"cost": 0}', limit=50))
    pool, seeds = env._pool, np.arange(4, dtype=np.uint32)
    arguments = lambda actions: (seeds, np.zeros((4, 50, 2), np.float32), np.zeros(4, int), np.float32(actions), np.zeros(4, bool), seeds)
    first = pool.reset(seeds)
    with pytest.raises(
        WorkerError, match=r"^plain:Plain-v0: a simulator failed: ZeroDivisionError: .*\(plain.py, line \d+, in step\)"
    ) as caught:
        pool.step(*arguments([[0.25, 0]] + [[0.5, 0]] * 3))
    assert len(str(caught.value).splitlines()) == 1 and "return np.float32(action), 1 /" in caught.value.__notes__[0]
    np.testing.assert_array_equal(pool.reset(seeds), first)
    np.testing.assert_array_equal(pool.step(*arguments([[0.1 * i, 0.5] for i in range(4)]))[1][:, 0], np.float32([0, 0.1, 0.2, 0.3]))


def test_a_failure_in_a_later_call_is_one_line_too(tmp_path, monkeypatch, capsys):
    """A program's first call raises another error than its later ones, in place of the step's own."""
    monkeypatch.chdir(tmp_path)
    reference.failures.clear()
    env = envs.make(write(tmp_path, STEP + 'np.float32(action), 1 / int(action[0] != 0.25), False, False, {"cost": 0}', limit=50))
    state, _ = env.reset(jax.random.split(jax.random.key(0), 2))
    step = jax.jit(env.step)
    for action in (0.5, 0.5):
        state, _ = jax.block_until_ready(step(state, jnp.full((2, 2), action)))
    with pytest.raises(SystemExit, match="1"), reference.reported():
        jax.block_until_ready(step(state, jnp.full((2, 2), 0.25)))
    said = capsys.readouterr().err
    assert said.startswith("error: plain:Plain-v0: a simulator failed: ZeroDivisionError") and len(said.splitlines()) == 1
    with pytest.raises(ValueError, match="mine"), reference.reported():
        reference.failures.clear()
        raise ValueError("mine")


# Pictures


def test_it_is_filmed_by_its_own_render(point, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))  # no ffmpeg
    fast = lambda obs, key: jnp.stack([jnp.ones(obs.shape[0]), -obs[:, 2] - obs[:, 4]], -1)
    path = render.video(point[0], fast, jax.random.key(0), tmp_path / "a.mp4", frames=50)
    pictures = imageio.v3.imread(path)
    assert path == tmp_path / "a.gif" and pictures.shape == (50, 60, 80, 3)
    dark = (pictures.sum(-1) < 60).any(1)  # (50, 80): the columns in which the point is
    assert len({tuple(np.flatnonzero(row)) for row in dark}) > 10, "nothing moves"
    white = pictures[:, 5, 60]  # always outside the strip, far from the point
    red = white[:, 0].astype(int) - white[:, 1] > 50
    assert 5 < red.sum() < 45, "steps with cost are not told apart"
    with pytest.raises(render.RenderError, match="only of native tasks.*though a video of it can be made"):
        render.check(point[0], tmp_path / "a.png", None)
    render.check(point[0], None, tmp_path / "a.gif")
    with pytest.raises(render.RenderError, match="a video of it can be made"):
        render.trajectory(point[0], fast, jax.random.key(0), tmp_path / "a.png")


def test_it_need_not_draw(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    env = envs.make(write(tmp_path))
    with pytest.raises(render.RenderError, match=r"plain:Plain-v0: it draws no pictures: .*render_modes \[\], without rgb_array") as caught:
        render.video(env, lambda obs, key: jnp.zeros((obs.shape[0], 2)), jax.random.key(0), tmp_path / "a.gif")
    assert len(str(caught.value).splitlines()) == 1 and not (tmp_path / "a.gif").exists()


# Algorithms on it


def test_the_run_folder_has_no_colon_and_the_hash_knows_the_horizon(tmp_path):
    assert envs.folder("my_package.my_module:MyEnv-v0") == "my_package.my_module/MyEnv-v0" and envs.folder("bullet/A") == "bullet/A"
    assert logbook.offline_path(tmp_path, OWN, "cpq", {}, 0).relative_to(tmp_path).parts[:3] == ("own_env", "OwnPoint-v0", "offline")
    config = {"runs": tmp_path, "resume": False, "checkpoint_seconds": 1.0, "track": "none", "cost_limit": 1.0}
    log = lambda **more: logbook.Logbook("cpq", OWN, config | more, [0])
    assert log().folder.relative_to(tmp_path).parts[:3] == ("own_env", "OwnPoint-v0", "cpq")
    hashes = [log(**more).config["config_hash"] for more in ({}, {"horizon": None}, {"horizon": 100}, {"horizon": 50})]
    assert hashes[0] == hashes[1] and len(set(hashes)) == 3


def test_a_registered_limit_and_the_same_horizon_are_one_configuration(tmp_path, monkeypatch):
    from algos import sac_lag

    monkeypatch.chdir(ROOT / "tests")
    args = sac_lag.Args(env=OWN, runs=tmp_path)
    runs = [training.prepare("sac_lag", args.__class__(env=OWN, runs=tmp_path, horizon=h), dataset=False) for h in (None, 100, 50)]
    hashes = [run.log.config["config_hash"] for run in runs]
    assert hashes[0] == hashes[1] != hashes[2] and [run.args.horizon for run in runs] == [100, 100, 50]


def behaviour(path, episodes=60):
    """A dataset of drivers of several speeds, some of whom slow down in the strip."""
    env, rng, rows = gymnasium.make("OwnPoint-v0"), np.random.default_rng(0), []
    for episode in range(episodes):
        obs, _ = env.reset(seed=episode)
        speed, careful, done = rng.uniform(0.5, 2.4), episode % 2, False
        while not done:
            slow = careful and obs[0] > -0.2
            push = 3 * ((0.8 if slow else speed) - obs[3]), -obs[2] - obs[4]
            force = np.clip(push + rng.normal(0, 0.2, 2), -2, 2)
            after, reward, terminated, truncated, info = env.step(force)
            rows.append((obs, after, force / 2, reward, info["cost"], terminated, truncated))
            obs, done = after, terminated or truncated
    dsrl.save(path, dsrl.Dataset(*map(np.array, zip(*rows))), {"env": OWN})


FINETUNE = (
    "--offline-steps 500 --iterations 1 --evals 1 --offline-evals 1 --eval-episodes 2 --final-eval-rounds 1 "
    "--updates-per-iter 20 --hidden 32 32 --vae-hidden 32 32 --buffer-size 10000 --dataset data.hdf5"
)
OFFLINE = "--offline-steps 500 --offline-evals 1 --eval-episodes 2 --final-eval-rounds 1 --hidden 32 32 --dataset data.hdf5"
SAC = "--env-steps 512 --num-envs 4 --steps-per-block 16 --updates-per-block 8 --evals 1 --eval-episodes 2 --final-eval-rounds 1 --hidden 32 32"


def run(folder, algo, options):
    command = [sys.executable, str(ROOT / "algos" / f"{algo}.py"), *options.split()]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


def rows(folder, algo):
    (path,) = (folder / "runs" / "own_env" / "OwnPoint-v0" / algo).glob("*/progress.csv")
    with open(path, newline="") as file:
        return [{k: v for k, v in row.items() if k != "commit"} for row in csv.DictReader(file)]


@pytest.mark.slow
@pytest.mark.parametrize(
    "algo, options",
    [
        ("sac_lag", SAC),
        ("marvel", FINETUNE + " --vpa-steps 500 --rank-points 4"),
        *((algo, FINETUNE) for algo in ("naive_o2o", "jsrl", "pex", "so2", "wsrl", "cal")),
        *((algo, OFFLINE) for algo in ("cpq", "bear_lag", "bc_safe")),
    ],
)
def test_every_algorithm_trains_on_it(algo, options, tmp_path):
    (tmp_path / "own_env.py").write_bytes(Path(own_env.__file__).read_bytes())
    if algo != "sac_lag":
        behaviour(tmp_path / "data.hdf5")
    done = run(tmp_path, algo, f"--env {OWN} --runs runs {options}")
    assert done.returncode == 0, done.stderr[-3000:]
    last = [row for row in rows(tmp_path, algo) if row["event"] == "eval"][-1]
    assert last["env"] == OWN and np.isfinite(float(last["return"])) and float(last["length"]) <= 100
    (checkpoint,) = (tmp_path / "runs" / "own_env" / "OwnPoint-v0" / algo).glob("*/checkpoint-seed0.safetensors")
    policy = algos.load_policy(checkpoint)
    np.testing.assert_array_equal(policy.scaled(np.float32([[-1, 0], [0.5, 1]])), [[-2, 0], [1, 2]])  # own_env's forces
    shown = run(tmp_path, algo, f"--eval {checkpoint} --episodes 2 --horizon 10 --video film.gif")
    assert shown.returncode == 0 and f"{OWN}: 2 episodes" in shown.stdout and "length 10" in shown.stdout, shown.stderr
    assert (tmp_path / "film.gif").exists()


@pytest.mark.slow
def test_a_run_whose_environment_fails_is_told_in_a_line_and_goes_on(tmp_path):
    """The environment fails while a file is there. Mended, the run ends as one that nothing interrupted."""
    text = Path(own_env.__file__).read_text()
    mine = "        if self.position[1] > 0.9 and __import__('os').path.exists('broken'):\n            raise ValueError('the wheel\\ncame off')\n"
    before = "        force = np.clip("
    assert text.count(before) == 1
    (tmp_path / "own_env.py").write_text(text.replace(before, mine + before))
    options = f"--env {OWN} --runs runs --checkpoint-seconds 0 {SAC}"
    (tmp_path / "broken").touch()
    failed = run(tmp_path, "sac_lag", options)
    assert failed.returncode == 1, failed.stderr[-3000:]
    last = failed.stderr.strip().splitlines()[-1]
    assert last.startswith(f"error: {OWN}: a simulator failed: ValueError: the wheel came off (own_env.py, line "), failed.stderr[-3000:]
    assert last.endswith("in step): mend it and go on with --resume") and "Traceback" not in failed.stderr
    os.remove(tmp_path / "broken")
    resumed = run(tmp_path, "sac_lag", options + " --resume")
    assert resumed.returncode == 0 and "resuming" in resumed.stderr, resumed.stderr[-3000:]
    other = tmp_path / "other"
    other.mkdir()
    (other / "own_env.py").write_bytes((tmp_path / "own_env.py").read_bytes())
    assert run(other, "sac_lag", options).returncode == 0
    assert rows(tmp_path, "sac_lag") == rows(other, "sac_lag")
