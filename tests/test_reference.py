"""envs/reference: the real packages behind `Env`'s interface, and agreement of the native tasks with them, side by side."""

import csv
import dataclasses
import os
import signal
import subprocess
import sys
import time
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import envs
from algos import diagnostics, marvel, training
from data import dsrl
from envs import parity
from envs.reference import compat
from envs.reference import pool as pool_module
from envs.reference.env import bullet_python
from envs.reference.pool import Pool, WorkerError

ROOT = Path(__file__).resolve().parents[1]
CHEETAH, HOPPER = "SafetyHalfCheetahVelocity", "SafetyHopperVelocity"


@cache
def made(name):
    """The real environment with its reset and step jitted, made once for all tests."""
    env = envs.make(name, backend=None if name.startswith("bullet/") else "safety-gymnasium")
    return env, jax.jit(env.reset), jax.jit(env.step)


def actions(env, *shape, seed=2):
    return jax.random.uniform(jax.random.key(seed), (*shape, env.action_size), minval=-1.0, maxval=1.0)


def roll(env, key, acts):
    """The first observations and the transitions of actions (T, N, a)."""
    state, obs = env.reset(jax.random.split(key, acts.shape[1]))
    step = lambda state, action: env.step(state, action)
    return obs, jax.lax.scan(step, state, acts)[1]


def same(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


# Native and real, side by side


def engine_state(sim):
    """(qpos, qvel, warm start), each (1, n), of a genuine Safety-Gymnasium environment, in the native tasks' coordinates."""
    real = getattr(sim.unwrapped, "task", sim.unwrapped)
    placed = np.empty(0), np.empty(0)
    if real is not sim.unwrapped:
        body = real.model.body("agent")
        placed = body.pos[None], body.quat[None]
    placement = dict(zip(("agent_body_pos", "agent_body_quat"), placed))
    return parity.to_world(placement, *(x[None].copy() for x in (real.data.qpos, real.data.qvel, real.data.qacc_warmstart)))


@pytest.mark.parametrize(
    "task, obs_error, reward_error",
    [
        # float32 roundings, of an accelerometer up to some 100 m/s^2 where there is one
        ("SafetyPointRun", 2e-5, 2e-6),
        pytest.param("SafetyCarRun", 2e-5, 2e-6, marks=pytest.mark.slow),
        (CHEETAH, 2e-6, 2e-6),
        pytest.param(HOPPER, 2e-6, 2e-6, marks=pytest.mark.slow),
        pytest.param("SafetySwimmerVelocity", 2e-6, 2e-6, marks=pytest.mark.slow),
    ],
)
def test_native_and_real_side_by_side(task, obs_error, reward_error):
    """At every state of a genuine roll-out, both take the same action and must come to the same observation, reward, cost and
    end. Stepped from the genuine state each time: Point's friction amplifies a difference of 1e-13 m to a visible one in 30
    steps, in the genuine task too. The worker's simulator, given the same seed and actions, must repeat the roll-out exactly."""
    native = envs.make(task, "mujoco")
    real, reset, step = made(task)
    assert real.reward_scale == native.reward_scale
    native_step = jax.jit(native.step)
    sim = compat.safety_gymnasium().make(native.task.reference_id, disable_env_checker=True)
    state, obs = reset(jax.random.split(jax.random.key(0), 1))
    first, _ = sim.reset(seed=int(state.seed[0]))
    np.testing.assert_array_equal(obs[0], np.float32(first))

    physics, _ = native.physics.reset(*(jnp.float32(x) for x in engine_state(sim)[:2]), jnp.ones(1, bool))
    native_state = envs.EnvState(physics, jnp.zeros(1, jnp.int32), jax.random.split(jax.random.key(0), 1))
    rng, action, steps = np.random.default_rng(1), None, 0
    for i in range(60):
        if i % 10 == 0:
            action = rng.uniform(-1, 1, native.action_size).astype(np.float32)
        bits = np.array(native_state.physics).view(np.float64)
        engine = np.concatenate(engine_state(sim), 1)
        bits[:, : engine.shape[1]] = engine
        native_state = native_state._replace(physics=jnp.asarray(bits.view(np.uint32)))

        native_state, ours = native_step(native_state, action[None])
        state, theirs = step(state, action[None])
        obs, reward, cost, terminated, truncated, _ = sim.step(action)
        for found, wanted in zip(theirs[1:], (obs, reward, cost, terminated, truncated)):
            np.testing.assert_array_equal(found[0], np.float32(wanted))
        np.testing.assert_allclose(ours.next_obs[0], obs, atol=obs_error, rtol=2e-6)
        np.testing.assert_allclose(ours.reward[0], reward, atol=reward_error, rtol=2e-6)
        assert (ours.cost[0], ours.terminated[0]) == (cost, terminated)
        steps += 1
        if terminated:
            break
    assert steps > 5


# Steps are pure functions


def test_the_same_key_and_actions_give_the_same_whatever_happened_between():
    env, _, _ = made(HOPPER)
    acts = actions(env, 40, 6)
    run = jax.jit(lambda key, acts: roll(env, key, acts))
    first = run(jax.random.key(0), acts)
    assert first[1].terminated.sum() > 6  # the simulators were reset on the way
    run(jax.random.key(1), acts)  # takes the simulators away
    same(first, run(jax.random.key(0), acts))
    other = run(jax.random.key(0), acts.at[3].mul(0.5))
    assert not np.array_equal(first[1].next_obs[3], other[1].next_obs[3])
    same(jax.tree.map(lambda x: x[:3], first[1]), jax.tree.map(lambda x: x[:3], other[1]))


def test_an_old_state_can_be_stepped_again():
    """A state is a value: stepped twice, after others, in a batch with itself, or with the clock set back."""
    env, reset, step = made(CHEETAH)
    acts = actions(env, 12, 3)
    state, _ = reset(jax.random.split(jax.random.key(0), 3))
    states, outs = [state], []
    for action in acts:
        state, t = step(state, action)
        states.append(state)
        outs.append(t)
    for i in (4, 4, 11, 0):
        same(step(states[i], acts[i])[1], outs[i])
    three = jax.tree.map(lambda x: jnp.stack([x[1]] * 3), states[7])
    branched = jax.jit(jax.vmap(env.step))(three, jnp.stack([acts[7, 1], acts[0, 0], acts[7, 1]]))[1]
    same(jax.tree.map(lambda x: x[0], branched), jax.tree.map(lambda x: x[1], outs[7]))
    same(jax.tree.map(lambda x: x[0], branched), jax.tree.map(lambda x: x[2], branched))
    assert not np.array_equal(branched.obs[0], branched.obs[1])
    mixed = jax.tree.map(lambda *x: jnp.stack([x[0][0], x[1][1], x[2][2]]), states[5], states[9], states[2])
    wanted = jax.tree.map(lambda *x: jnp.stack([x[0][0], x[1][1], x[2][2]]), outs[5], outs[9], outs[2])
    same(step(mixed, jnp.stack([acts[5, 0], acts[9, 1], acts[2, 2]]))[1], wanted)
    rewound = states[6]._replace(t=jnp.zeros_like(states[6].t))
    same(step(rewound, acts[6])[1], outs[6])


@pytest.mark.parametrize("shape", [(2, 3), pytest.param((), marks=pytest.mark.slow)])
def test_any_leading_batch_shape_and_raw_keys(shape):
    env, reset, step = made(CHEETAH)
    keys = jax.random.split(jax.random.key(0), 6)[: int(np.prod(shape))].reshape(shape)
    state, obs = reset(keys)
    same(obs, reset(jax.random.key_data(keys))[1])
    next_state, t = step(state, actions(env, *shape))
    assert obs.shape == t.obs.shape == t.next_obs.shape == (*shape, 17)
    assert [x.dtype for x in t] == [jnp.float32] * 4 + [bool] * 2
    assert all(leaf.shape == shape for leaf in (*t[2:], next_state.t, next_state.n, next_state.seed, next_state.key))
    kinds = [[(x.shape, x.dtype) for x in jax.tree.leaves(s)] for s in (state, next_state)]
    assert kinds[0] == kinds[1]
    assert np.unique(np.asarray(obs).reshape(-1, 17), axis=0).shape[0] == keys.size
    if shape:
        same(jax.jit(jax.vmap(jax.vmap(env.step)))(state, actions(env, *shape))[1], t)


def test_episodes_end_and_begin_again():
    env, reset, step = made(HOPPER)
    state, obs = reset(jax.random.split(jax.random.key(3), 2))
    state = state._replace(t=jnp.array([env.horizon - 2, 0]))
    lengths, starts = [0, 0], []
    for _ in range(60):
        before = state
        state, t = step(state, actions(env, 2) * 0.3)
        done = np.asarray(t.terminated | t.truncated)
        for i in range(2):
            lengths[i] += 1
            if done[i]:
                starts.append(np.asarray(t.obs[i]))
                assert (int(state.t[i]), int(state.n[i])) == (0, 0) and not np.array_equal(t.obs[i], t.next_obs[i])
                assert int(state.seed[i]) != int(before.seed[i])
                np.testing.assert_array_equal(t.obs[i], made(HOPPER)[0]._pool.reset(np.asarray(state.seed[i : i + 1]))[0])
            else:
                np.testing.assert_array_equal(t.obs[i], t.next_obs[i])
        if lengths[0] == 2:
            assert t.truncated[0] and not t.terminated[0]  # the clock alone
    assert len(starts) > 2 and len({s.tobytes() for s in starts}) == len(starts)


def test_actions_are_clipped_and_scaled_to_the_packages_range():
    env, reset, step = made("SafetyHumanoidVelocity-v1")  # its range is +-0.4
    sim = compat.safety_gymnasium().make("SafetyHumanoidVelocity-v1", disable_env_checker=True)
    state, _ = reset(jax.random.key(0))
    sim.reset(seed=int(state.seed))
    big = jnp.where(jnp.arange(env.action_size) % 2, 7.0, -0.5)
    wanted = sim.step(np.where(np.arange(env.action_size) % 2, 0.4, -0.2))
    np.testing.assert_allclose(step(state, big)[1].next_obs, wanted[0], atol=1e-4, rtol=1e-4)
    assert (env.action_low == -1).all() and (env.action_high == 1).all()


# The pool


def step_arguments(pool, n, past):
    seeds = np.arange(n, dtype=np.uint32)
    history = np.zeros((n, 1000, 6), np.float32)
    history[:, : past.shape[1]] = past
    steps = np.full(n, past.shape[1])
    acts = np.random.default_rng(5).uniform(-1, 1, (n, 6)).astype(np.float32)
    return seeds, history, steps, acts, np.zeros(n, bool), seeds + 100


@pytest.mark.parametrize("workers", [1, 3])
def test_results_do_not_depend_on_workers_order_or_company(workers):
    pool = Pool("safety-gymnasium", "SafetyHalfCheetahVelocity-v1", workers=workers)
    past = np.random.default_rng(4).uniform(-1, 1, (5, 7, 6)).astype(np.float32)
    arguments = step_arguments(pool, 5, past)
    together = pool.step(*arguments)
    assert len(pool._processes) == workers
    order = np.array([3, 0, 4, 1, 2])
    shuffled = pool.step(*(a[order] for a in arguments))
    for a, b in zip(together, shuffled):
        np.testing.assert_array_equal(a[order], b)
    for i in (2, 0):
        for a, b in zip(together, pool.step(*(a[i : i + 1] for a in arguments))):
            np.testing.assert_array_equal(a[i : i + 1], b)
    assert sum(pool._made) <= 6 + workers  # rows of the batch sizes 5 and 1, rounded up per process
    pool.close()


def test_large_batches_share_their_simulators(monkeypatch):
    """Beyond KEPT no batch has simulators of its own; what comes out stays the same."""
    past = np.random.default_rng(4).uniform(-1, 1, (8, 3, 6)).astype(np.float32)
    out, made = [], []
    for kept in (128, 2):
        monkeypatch.setattr("envs.reference.pool.KEPT", kept)
        pool = Pool("safety-gymnasium", "SafetyHalfCheetahVelocity-v1", workers=2)
        whole = step_arguments(pool, 8, past)
        out.append([pool.step(*(a[rows] for a in whole)) for rows in (slice(8), slice(3), slice(2, 8), slice(5))])
        made.append(sum(pool._made))
        pool.close()
    same(*out)
    assert made[1] <= 8 + 2 < made[0]


def test_the_rank_diagnostic_takes_simulators_for_one_batch_of_points(monkeypatch):
    """Not for all seeds and for both kinds of points at once, and its numbers are those of all at once."""
    env = envs.make(CHEETAH, backend="safety-gymnasium")
    env.horizon = 4
    networks = training.make_networks(SimpleNamespace(**vars(marvel.Args(env=CHEETAH, odometer=False, hidden=(8,)))), env)
    params = jax.vmap(lambda key: training.init_params(key, networks, env.obs_size))(jax.random.split(jax.random.key(0), 3))
    rows = []
    log = SimpleNamespace(log=lambda phase, event, **row: rows.append(row))
    args = SimpleNamespace(rank_points=6, gamma=0.99, reward_scale=0.1, termination_cost=0.0)
    run = SimpleNamespace(args=args, env=env, log=log, keys=lambda name: jax.random.split(jax.random.key(1), 3))
    diagnostics.rank_diagnostic(run, networks)("offline", params["actor"], params["critics"], 0)
    assert sum(env._pool._made) <= 6 + len(env._pool._processes)
    monkeypatch.setattr(diagnostics, "Env", object)  # as if it were a native one
    diagnostics.rank_diagnostic(run, networks)("offline", params["actor"], params["critics"], 0)
    assert sum(env._pool._made) > 30 and np.isfinite(rows[0]["rank_q_policy"]).all()
    for name in ("rank_q_policy", "rank_q_random", "rank_qc_policy", "rank_qc_random"):
        np.testing.assert_allclose(rows[0][name], rows[1][name], atol=1e-6)


def test_evaluation_does_not_evict_training():
    """Two batches that take turns each keep their simulators: nothing is replayed."""
    pool = Pool("safety-gymnasium", "SafetyHalfCheetahVelocity-v1", workers=2)
    replayed = []
    call = pool._call
    pool._call = lambda method, simulators, starts, *rest: (
        replayed.extend(x is not None for x in starts if method == "step"),
        call(method, simulators, starts, *rest),
    )[1]
    many, few = np.arange(7, dtype=np.uint32), np.arange(50, 54, dtype=np.uint32)
    pool.reset(few)
    zeros = lambda n: np.zeros((n, 6), np.float32)

    def take(seeds, n):
        rows = len(seeds)
        pool.step(seeds, np.zeros((rows, 1000, 6), np.float32), np.full(rows, n), zeros(rows), np.zeros(rows, bool), seeds)

    take(few, 0)
    for round in range(3):
        pool.reset(many + 7 * round)
        for n in range(2):
            take(many + 7 * round, n)
        take(few, round + 1)
    assert replayed and not any(replayed)
    pool.close()


def test_a_dead_worker_is_named():
    pool = Pool("safety-gymnasium", "SafetyHopperVelocity-v1", workers=1)
    os.kill(pool._processes[0]._popen.pid, signal.SIGKILL)
    with pytest.raises(WorkerError, match="SafetyHopperVelocity-v1: a simulator process died"):
        pool.reset(np.zeros(2, np.uint32))
    assert pool.reset(np.zeros(2, np.uint32)).shape == (2, 11)  # a new process has taken its place
    pool.close()


@pytest.mark.parametrize("asked", ["step", "reset"])
def test_an_interrupt_leaves_no_answer_to_the_next_question(asked, monkeypatch):
    """Ctrl-C between question and answer: what is asked later gets its own answers, from states that are replayed."""
    pool, seeds = Pool("safety-gymnasium", "SafetyHopperVelocity-v1", workers=2), np.arange(3, dtype=np.uint32)
    first = pool.reset(seeds)

    def step(t, push):
        past = np.zeros((3, 1000, 3), np.float32)
        past[:, :t] = 0.5
        return pool.step(seeds, past, np.full(3, t), np.full((3, 3), push, np.float32), np.zeros(3, bool), seeds)[1]

    wanted = [step(0, 0.5), step(1, -0.5)]
    pool.reset(seeds)
    step(0, 0.5)
    receive = pool_module._Process.receive

    def interrupted(process):
        monkeypatch.setattr(pool_module._Process, "receive", receive)
        raise KeyboardInterrupt

    monkeypatch.setattr(pool_module._Process, "receive", interrupted)
    with pytest.raises(KeyboardInterrupt):
        step(1, 0.9) if asked == "step" else pool.reset(seeds + 7)
    np.testing.assert_array_equal(step(1, -0.5), wanted[1])
    np.testing.assert_array_equal(pool.reset(seeds), first)
    np.testing.assert_array_equal(step(0, 0.5), wanted[0])
    pool.close()


def test_workers_end_with_their_parent_however_it_ends():
    code = (
        "import envs, os, signal; e = envs.make('SafetyHopperVelocity-v1', 'safety-gymnasium');"
        "print(e._pool._processes[0]._popen.pid, flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    pid = int(subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout)
    deadline = time.time() + 20
    while Path(f"/proc/{pid}").exists() and Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z" and time.time() < deadline:
        time.sleep(0.1)
    assert time.time() < deadline


# Importing the old package


def test_compat_leaves_nothing_behind_and_patches_only_what_is_needed():
    package = compat.safety_gymnasium()
    assert package.__version__ == "1.0.0"
    assert not any(name.startswith("gymnasium_robotics") for name in sys.modules)
    assert dataclasses.dataclass.__module__ == "dataclasses"

    @dataclasses.dataclass
    class Plain:
        x: int = 1

    assert Plain().x == 1
    from safety_gymnasium.bases import base_agent

    try:
        float(np.zeros(1))
        needed = np.lib.NumpyVersion(np.__version__) >= "1.25.0"  # it warns
    except TypeError:
        needed = True
    assert ("float" in vars(base_agent)) == needed


@pytest.mark.parametrize("kind", ["Goal1", "Button1", "Push1", "Circle1", "Run0"])
@pytest.mark.parametrize("robot", ["Point", "Car", "Doggo", "Racecar", "Ant"])
@pytest.mark.slow
def test_every_family_and_robot_runs(kind, robot):
    env = envs.make(f"Safety{robot}{kind}-v0", backend="safety-gymnasium")
    obs, t = jax.jit(lambda key, acts: roll(env, key, acts))(jax.random.key(0), actions(env, 12, 2))
    assert np.isfinite(t.next_obs).all() and np.isfinite(t.reward).all() and set(np.unique(t.cost)) <= {0.0, 1.0}
    assert obs.shape == (2, env.obs_size) and t.next_obs.std(0).max() > 0


def test_an_id_without_a_native_task_goes_to_the_package():
    env = envs.make("SafetyPointGoal1-v0")
    assert env.reward_scale == 5.0
    assert (env.name, env.backend, env.horizon) == ("SafetyPointGoal1-v0", "safety-gymnasium", 1000)
    assert (env.obs_size, env.action_size, env.privileged_size) == (60, 2, 0)
    assert envs.make("SafetyPointRun0-v0").backend != "safety-gymnasium"
    run = made("SafetyPointRun")[0]
    assert (run.name, run.backend) == ("SafetyPointRun", "safety-gymnasium")  # native datasets fit


@pytest.mark.parametrize(
    "name, backend, text",
    [
        ("SafetyPointGoal9-v0", None, "unknown environment 'SafetyPointGoal9-v0' of safety-gymnasium.*SafetyPointGoal1-v0"),
        ("Nothing", "safety-gymnasium", "unknown environment 'Nothing' of safety-gymnasium"),
        ("SafetyPointGoal1Vision-v0", None, r"not a vector of numbers\)$"),
        ("SafetyPointGoal1-v0", "mjx", "has no backend 'mjx': leave the backend out"),
        ("SafetyPointRace1-v0", None, "cannot be made .*village_floor"),
        ("bullet/SafetyBallRun", "mujoco", "leave the backend out"),
    ],
)
def test_refusals_are_one_clear_line(name, backend, text):
    with pytest.raises(envs.UnknownName, match=text) as caught:
        envs.make(name, backend)
    assert len(str(caught.value).splitlines()) == 1


# The algorithms, unchanged


def has_bullet():
    try:
        return bool(bullet_python())
    except envs.UnknownName:
        return False


needs_bullet = pytest.mark.skipif(not has_bullet(), reason="Bullet-Safety-Gym is optional: make setup-bullet")


def random_dataset(env, path, episodes):
    """Whole episodes of random actions, as an algorithm's --dataset."""
    policy = jax.random.uniform(jax.random.key(7), (env.horizon, episodes, env.action_size), minval=-1.0)
    obs, t = jax.jit(lambda key, acts: roll(env, key, acts))(jax.random.key(0), policy)
    before = jnp.concatenate([obs[None], t.obs[:-1]])
    columns = before, t.next_obs, policy, t.reward, t.cost, t.terminated, t.truncated
    flat = [np.asarray(jnp.moveaxis(x, 1, 0)).reshape(-1, *x.shape[2:]) for x in columns]
    dsrl.save(path, dsrl.Dataset(*flat), {"env": env.name})


MARVEL = (
    "--offline-steps 500 --vpa-steps 500 --iterations 1 --evals 1 --offline-evals 1 --eval-episodes 2 --final-eval-rounds 1 --rank-points 4 "
    "--updates-per-iter 20 --hidden 32 32 --vae-hidden 32 32 --buffer-size 10000 --cost-limit 1000 --dataset data.hdf5"
)
SAC = "--env-steps 512 --num-envs 4 --steps-per-block 16 --updates-per-block 8 --evals 1 --eval-episodes 2 --final-eval-rounds 1 --hidden 32 32"


@pytest.mark.slow
@pytest.mark.parametrize(
    "algo, options, name",
    [
        ("sac_lag", SAC, "SafetyPointGoal1-v0"),
        ("marvel", MARVEL, "SafetyPointGoal1-v0"),
        pytest.param("marvel", MARVEL, "bullet/SafetyBallRun", marks=needs_bullet),
    ],
)
def test_an_algorithm_trains_on_a_real_package(algo, options, name, tmp_path):
    env = made(name)[0]
    if algo == "marvel":
        random_dataset(env, tmp_path / "data.hdf5", 3)
    command = [sys.executable, str(ROOT / "algos" / f"{algo}.py"), "--env", name, "--runs", "runs", *options.split()]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    (folder,) = (tmp_path / "runs" / env.name / algo).iterdir()
    with open(folder / "progress.csv", newline="") as file:
        last = [row for row in csv.DictReader(file) if row["event"] == "eval"][-1]
    assert (last["env"], last["phase"], float(last["length"])) == (env.name, "online", env.horizon)
    assert np.isfinite(float(last["return"])) and (folder / "checkpoint-seed0.safetensors").exists()


# Bullet-Safety-Gym


def test_the_missing_extra_is_one_clear_line(tmp_path, monkeypatch):
    monkeypatch.setattr("envs.reference.env.ROOT", tmp_path)
    with pytest.raises(envs.UnknownName, match="not installed .* run `make setup-bullet`") as caught:
        envs.make("bullet/SafetyBallRun")
    assert len(str(caught.value).splitlines()) == 1


SIZES = {"Ball": (7, 2), "Car": (7, 2), "Drone": (17, 4), "Ant": (33, 8)}  # in Run; Circle observes one number more
HORIZONS = {"Run": (100, 200, 200, 200), "Circle": (200, 300, 300, 500)}


@needs_bullet
@pytest.mark.parametrize("kind", [pytest.param("Run"), pytest.param("Circle", marks=pytest.mark.slow)])
@pytest.mark.parametrize("robot", ["Ball", *(pytest.param(robot, marks=pytest.mark.slow) for robot in ("Car", "Drone", "Ant"))])
def test_bullet_is_seeded_and_pure(robot, kind):
    env, reset, step = made(f"bullet/Safety{robot}{kind}-v0")
    assert env.name == f"bullet/Safety{robot}{kind}" and env.backend == "bullet"
    extra = kind == "Circle"
    assert (env.obs_size - extra, env.action_size) == SIZES[robot]
    assert env.horizon == HORIZONS[kind][list(SIZES).index(robot)]
    run = jax.jit(lambda key, acts: roll(env, key, acts))
    acts = actions(env, 15, 2)
    first = run(jax.random.key(0), acts)
    other = run(jax.random.key(1), acts)
    assert not np.array_equal(first[0], other[0]) and not np.array_equal(first[0][0], first[0][1])
    same(first, run(jax.random.key(0), acts))
    state, _ = reset(jax.random.split(jax.random.key(0), 2))  # and an old state is reached again by replaying
    for i in range(3):
        state, t = step(state, acts[i])
    run(jax.random.key(1), acts)
    same(step(state, acts[3])[1], jax.tree.map(lambda x: x[3], first[1]))
