"""Compares the native tasks with recorded transitions of the reference: `python -m envs.parity FILE.npz ...`.

A recording (one task, N single steps) holds t (the step in its episode), qpos, qvel, warm (qacc_warmstart), action, next_qpos,
next_qvel, next_obs, reward, cost, terminated, agent_xpos (the body's position before the step, as the engine had last computed
it), agent_body_pos, agent_body_quat and meta (JSON with the task's id). Two comparisons per file:

    obs, reward, cost, terminated: the task's functions at the *recorded* next state against the recorded values,
    qpos, qvel: the state that the native physics steps to from the recorded one against the recorded next state.

Prints the largest error of each and exits 1 where one is past the task's tolerance, 2 where a file cannot be compared.
"""

import json
import sys
from typing import NamedTuple

import mujoco
import numpy as np

import envs
from envs.physics_mujoco import STATE, MujocoPhysics, Workspace


class RecordingError(ValueError):
    """A recording that cannot be read; the message is one line."""


class Tolerance(NamedTuple):
    """Largest allowed errors: absolute, or relative where the recorded value exceeds 1.

    The tasks compute in float32 from float64 states: 1e-6 is a few roundings. The physics is float64 throughout: 1e-9
    leaves room for another compiler's order of operations.
    """

    obs: float = 1e-6  # all but the accelerometer
    accelerometer: float = 1e-6
    reward: float = 1e-6
    cost: float = 0.0
    terminated: float = 0.0
    qpos: float = 1e-9
    qvel: float = 1e-9


# The recordings were made with mujoco 2.3.3; a task's own values are 3 to 5 times the largest error over 300 recorded
# steps with mujoco 3.17.
TOLERANCES: dict[str, Tolerance] = {
    # Its ball touches the floor all the time, but both engines solve that single contact alike: the state differs by
    # 3e-14 (qpos) and 8e-12 (qvel).
    "SafetyPointRun": Tolerance(),
    # Wheels and rear ball roll on frictional contacts, which the newer solver leaves at another residual. It shows in full
    # in the accelerometer (4.0e-5), which measures forces, and integrated in the state (9.3e-7 and 4.0e-5).
    "SafetyCarRun": Tolerance(accelerometer=1.5e-4, qpos=3e-6, qvel=1.5e-4),
    # Feet on and off the floor, the same way: 5.7e-4; 8.2e-7 and 1.9e-5.
    "SafetyAntRun": Tolerance(accelerometer=2e-3, qpos=3e-6, qvel=8e-5),
    # The robots of Run, here somewhere else (the same errors: accelerometer 1.4e-4; 6.6e-7 and 4.9e-5), and a lidar (9.8e-7),
    # whose shares of a bin are 16 / (2 pi) times as rough as the angle that they come from.
    "SafetyPointCircle1": Tolerance(obs=4e-6),
    "SafetyPointCircle2": Tolerance(obs=4e-6),
    "SafetyCarCircle1": Tolerance(obs=4e-6, accelerometer=1.5e-4, qpos=3e-6, qvel=1.5e-4),
    "SafetyCarCircle2": Tolerance(obs=4e-6, accelerometer=1.5e-4, qpos=3e-6, qvel=1.5e-4),
    "SafetyAntCircle1": Tolerance(obs=4e-6, accelerometer=2e-3, qpos=3e-6, qvel=8e-5),
    "SafetyAntCircle2": Tolerance(obs=4e-6, accelerometer=2e-3, qpos=3e-6, qvel=8e-5),
    # Contacts too, but with the same outcome in both engines (4e-15 and 2e-13), and no accelerometer.
    "SafetyHalfCheetahVelocity": Tolerance(),
    "SafetyHopperVelocity": Tolerance(),  # 2e-16 and 4e-15
    "SafetyWalker2dVelocity": Tolerance(),  # 5e-16 and 4e-14
    # No contacts, but joints at their limits (2e-12 and 7e-11).
    "SafetySwimmerVelocity": Tolerance(),
    # Four feet that slide and roll: the solvers agree to 1.3e-9 and 1.5e-8.
    "SafetyAntVelocity": Tolerance(qpos=5e-9, qvel=6e-8),
}

KEYS = ("qpos", "qvel", "warm", "action", "next_qpos", "next_qvel", "next_obs", "reward", "cost", "terminated", "t")
PLACEMENT = ("agent_xpos", "agent_body_pos", "agent_body_quat")  # empty for tasks that place nobody


def load(path: str) -> tuple[dict[str, np.ndarray], str]:
    """A recording's arrays and its task's own name; RecordingError where it is not a recording of a known task."""
    try:
        with np.load(path, allow_pickle=False) as file:
            recording = dict(file)
    except FileNotFoundError:
        raise RecordingError(f"{path}: no such file") from None
    except OSError as e:
        raise RecordingError(f"{path}: cannot be read: {e.strerror or 'damaged'}") from None
    except Exception:  # numpy, zipfile and zlib raise nearly everything between them on damaged files
        raise RecordingError(f"{path}: not an .npz file of plain arrays") from None
    if missing := [k for k in ("meta", *KEYS, *PLACEMENT) if k not in recording]:
        raise RecordingError(f"{path}: misses {', '.join(missing)}")
    try:
        meta = json.loads(str(recording["meta"]))
        name = envs.resolve(meta["id"])
        blocks = [(str(key), int(np.prod(shape))) for key, shape in meta["obs_keys"]]
    except ValueError as e:
        wrong = "meta is not JSON" if isinstance(e, json.JSONDecodeError) else str(e)
        raise RecordingError(f"{path}: {wrong}") from None
    except (KeyError, TypeError):
        raise RecordingError(f"{path}: meta has no usable id and obs_keys") from None

    env, n = envs.make(name, backend="mujoco"), len(np.atleast_1d(recording["action"]))
    nq, nv = env.physics.sizes[:2]
    rows = dict(qpos=nq, qvel=nv, warm=nv, next_qpos=nq, next_qvel=nv, action=env.action_size, next_obs=env.obs_size)
    for key in KEYS:
        wanted = (n, rows[key]) if key in rows else (n,)
        array = recording[key]
        if n == 0 or array.shape != wanted or array.dtype.kind not in "bif":
            raise RecordingError(f"{path}: {key} is {array.dtype} {array.shape}, not numbers {wanted}")
    for key, size in zip(PLACEMENT, (3, 3, 4)):
        if recording[key].size and recording[key].shape != (n, size):
            raise RecordingError(f"{path}: {key} is {recording[key].shape}, not {(n, size)}")

    # Recordings without named blocks (Velocity) have no accelerometer.
    names = [key for key, size in blocks for _ in range(size)] or [""] * env.obs_size
    if len(names) != env.obs_size:
        raise RecordingError(f"{path}: obs_keys name {len(names)} entries, not {env.obs_size}")
    recording["is_accelerometer"] = np.array([key == "accelerometer" for key in names])
    return recording, name


def to_world(recording: dict, qpos: np.ndarray, *velocities: np.ndarray) -> list[np.ndarray]:
    """The reference places Point by moving its body, with joints relative to it; our joints are along the world's axes."""
    if qpos.shape[1] != 3 or recording["agent_body_pos"].size == 0:
        return [qpos, *velocities]
    w, z = recording["agent_body_quat"][:, 0], recording["agent_body_quat"][:, 3]
    yaw = 2 * np.arctan2(z, w)
    rotate = lambda v: np.stack([np.cos(yaw) * v[:, 0] - np.sin(yaw) * v[:, 1], np.sin(yaw) * v[:, 0] + np.cos(yaw) * v[:, 1], v[:, 2]], 1)
    offset = np.concatenate([recording["agent_body_pos"][:, :2], yaw[:, None]], 1)
    return [rotate(qpos) + offset, *(rotate(v) for v in velocities)]


def readings_at(physics: MujocoPhysics, before, state, control) -> envs.Readings:
    """The Readings (N, ...) that a step between these float64 states (N, state_size) would give."""
    workspace, sensors = Workspace(physics.model), np.empty((len(state), physics.model.nsensordata))
    for i in range(len(state)):
        mujoco.mj_setState(physics.model, workspace.data, state[i, : physics.engine_size], STATE)
        workspace.ctrl[:] = control[i]
        mujoco.mj_forward(physics.model, workspace.data)
        sensors[i] = workspace.sensors
    out = np.empty((len(state), sum(physics.sizes)), np.float32)
    physics.read(before, state, sensors, out)
    return envs.Readings(*np.split(out, np.cumsum(physics.sizes)[:-1], axis=-1))


def judged_rows(recording: dict, env: envs.Env) -> np.ndarray:
    """(N,) bool: steps whose reward and cost can be compared: where they depend on a body's position as the engine had last
    computed it (Readings.dbody) and the recording lacks that, only the first ones of episodes."""
    everything = env.task.tracked is None or recording["agent_xpos"].size
    return np.ones(len(recording["t"]), bool) if everything else recording["t"] == 0


def errors(recording: dict, env: envs.Env) -> dict[str, float]:
    """The largest error of each quantity over a recording (as `load` gives it)."""
    physics = env.physics
    assert isinstance(physics, MujocoPhysics)
    qpos, qvel, warm = to_world(recording, recording["qpos"], recording["qvel"], recording["warm"])
    next_qpos, next_qvel = to_world(recording, recording["next_qpos"], recording["next_qvel"])
    action = np.clip(recording["action"], env.action_low, env.action_high)

    before, recorded = np.zeros((2, len(qpos), physics.state_size))
    before[:, : physics.engine_size] = np.concatenate([qpos, qvel, warm], 1)
    recorded[:, : physics.engine_size] = np.concatenate([next_qpos, next_qvel, warm], 1)
    workspace, after, unused = Workspace(physics.model), np.empty_like(before), np.empty(physics.model.nsensordata)
    for i in range(len(before)):
        physics.step_row(workspace, before[i], action[i], after[i], unused)
    stepped_qpos, stepped_qvel, _ = np.split(after, np.cumsum(physics.sizes[:2]), axis=1)
    if physics.body is not None:
        before[:, physics.engine_size :] = recording["agent_xpos"] if recording["agent_xpos"].size else qpos[:, :3]
        recorded[:, physics.engine_size :] = after[:, physics.engine_size :]
    readings = readings_at(physics, before, recorded, action)
    reward, cost, terminated = env.task.evaluate(readings, action.astype(np.float32))
    judged = judged_rows(recording, env)

    def largest(a, b) -> float:
        return float(np.max(np.abs(np.asarray(a, np.float64) - b) / np.maximum(1, np.abs(b)), initial=0))

    obs, next_obs, where = np.asarray(env.task.observe(readings)), recording["next_obs"], recording["is_accelerometer"]
    return {
        "obs": largest(obs[:, ~where], next_obs[:, ~where]),
        "accelerometer": largest(obs[:, where], next_obs[:, where]),
        "reward": largest(reward[judged], recording["reward"][judged]),
        "cost": largest(cost[judged], recording["cost"][judged]),
        "terminated": largest(terminated, recording["terminated"]),
        "qpos": largest(stepped_qpos, next_qpos),
        "qvel": largest(stepped_qvel, next_qvel),
    }


def main(paths: list[str]) -> int:
    if not paths:
        print("usage: python -m envs.parity FILE.npz ...", file=sys.stderr)
        return 2
    failed = unusable = False
    for path in paths:
        try:
            recording, name = load(path)
        except RecordingError as e:
            print(e, file=sys.stderr)
            unusable = True
            continue
        env = envs.make(name, backend="mujoco")
        found, tolerance = errors(recording, env), TOLERANCES.get(name, Tolerance())
        past = [k for k, v in found.items() if not v <= getattr(tolerance, k)]
        failed |= bool(past)
        cells = "  ".join(f"{k} {v:.1e}/{getattr(tolerance, k):.1e}" for k, v in found.items())
        judged = judged_rows(recording, env)
        if not judged.all():
            cells += f"  (reward and cost of {judged.sum()} steps: no agent_xpos)"
        print(f"{name:28s} {len(recording['action'])} steps  {cells}  {'PAST: ' + ', '.join(past) if past else 'ok'}")
    return 2 if unusable else int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
