"""Compares the native tasks with recorded transitions of the reference: `python -m envs.parity FILE.npz ...`.

A recording (one task, N single steps) holds qpos, qvel, warm (qacc_warmstart), action, next_qpos, next_qvel, next_obs, reward,
cost, terminated, agent_body_pos, agent_body_quat and meta (JSON with the task's id). Two comparisons per file:

    obs, reward, cost, terminated: the task's functions at the *recorded* next state against the recorded values,
    qpos, qvel: the state that the native physics steps to from the recorded one against the recorded next state.

Prints the largest error of each and exits 1 where one is past the task's tolerance.
"""

import json
import sys
from typing import NamedTuple

import mujoco
import numpy as np

import envs
from envs.physics_mujoco import MujocoPhysics


class Tolerance(NamedTuple):
    """Largest allowed absolute errors; obs, qvel and acceleration errors are relative where the recorded value exceeds 1.

    The tasks compute in float32 from float64 states: 1e-6 is a few roundings.
    """

    obs: float = 1e-6
    reward: float = 1e-6
    cost: float = 0.0
    terminated: float = 0.0
    qpos: float = 1e-6
    qvel: float = 1e-6


TOLERANCES: dict[str, Tolerance] = {}


def to_world(recording: dict, qpos: np.ndarray, *velocities: np.ndarray) -> list[np.ndarray]:
    """The reference places Point by moving its body, with joints relative to it; ours has joints along the world's axes."""
    if qpos.shape[1] != 3 or recording["agent_body_pos"].size == 0:
        return [qpos, *velocities]
    w, z = recording["agent_body_quat"][:, 0], recording["agent_body_quat"][:, 3]
    yaw = 2 * np.arctan2(z, w)
    rotate = lambda v: np.stack(
        [np.cos(yaw) * v[:, 0] - np.sin(yaw) * v[:, 1], np.sin(yaw) * v[:, 0] + np.cos(yaw) * v[:, 1], v[:, 2]], 1
    )
    offset = np.concatenate([recording["agent_body_pos"][:, :2], yaw[:, None]], 1)
    return [rotate(qpos) + offset, *(rotate(v) for v in velocities)]


def readings_at(physics: MujocoPhysics, qpos, qvel, warm, control, qpos_before) -> envs.Readings:
    """The Readings (N, ...) that a step ending at these float64 states would give."""
    model = physics.model
    data, out = mujoco.MjData(model), np.zeros((len(qpos), sum(physics.sizes)), np.float32)
    for i in range(len(qpos)):
        data.qpos[:], data.qvel[:], data.qacc_warmstart[:], data.ctrl[:] = qpos[i], qvel[i], warm[i], control[i]
        mujoco.mj_forward(model, data)
        physics.read(data, qpos_before[i], out[i])
    return envs.Readings(*np.split(out, np.cumsum(physics.sizes)[:-1], axis=-1))


def errors(recording: dict, env: envs.Env) -> dict[str, float]:
    """The largest error of each quantity over a recording."""
    physics = env.physics
    qpos, qvel, warm = to_world(recording, recording["qpos"], recording["qvel"], recording["warm"])
    next_qpos, next_qvel = to_world(recording, recording["next_qpos"], recording["next_qvel"])
    action = np.clip(recording["action"], env.action_low, env.action_high)

    readings = readings_at(physics, next_qpos, next_qvel, warm, action, qpos)
    reward, cost, terminated = env.task.evaluate(readings, action.astype(np.float32))
    state = np.concatenate([qpos, qvel, warm], 1)
    data, stepped_qpos, stepped_qvel = mujoco.MjData(physics.model), np.empty_like(qpos), np.empty_like(qvel)
    row, unused = np.empty(physics.state_size), np.empty(sum(physics.sizes), np.float32)
    for i in range(len(qpos)):
        physics.step_row(data, state[i], action[i], row, unused)
        stepped_qpos[i], stepped_qvel[i] = np.split(row[: qpos.shape[1] + qvel.shape[1]], [qpos.shape[1]])

    relative = lambda a, b: float(np.max(np.abs(np.asarray(a, np.float64) - b) / np.maximum(1, np.abs(b))))
    return {
        "obs": relative(env.task.observe(readings), recording["next_obs"]),
        "reward": relative(reward, recording["reward"]),
        "cost": relative(cost, recording["cost"]),
        "terminated": relative(terminated, recording["terminated"]),
        "qpos": relative(stepped_qpos, next_qpos),
        "qvel": relative(stepped_qvel, next_qvel),
    }


def main(paths: list[str]) -> int:
    if not paths:
        print("usage: python -m envs.parity FILE.npz ...", file=sys.stderr)
        return 2
    failed = False
    for path in paths:
        with np.load(path, allow_pickle=False) as file:
            recording = dict(file)
        env = envs.make(json.loads(str(recording["meta"]))["id"], backend="mujoco")
        tolerance = TOLERANCES.get(env.name, Tolerance())
        found = errors(recording, env)
        past = [k for k, v in found.items() if not v <= getattr(tolerance, k)]
        failed |= bool(past)
        cells = "  ".join(f"{k} {v:.1e}/{getattr(tolerance, k):.0e}" for k, v in found.items())
        print(f"{env.name:28s} {len(recording['t'])} steps  {cells}  {'PAST: ' + ', '.join(past) if past else 'ok'}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
