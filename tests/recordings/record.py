"""Records single steps of the reference: `PYTHON tests/recordings/record.py ID FILE.npz`; see README.md for what is in the file.

PYTHON is one that has the reference as published (Python 3.10: `pip install safety-gymnasium==1.0.0`, which brings mujoco
2.3.3), not this project's. The first step of an episode is recorded, then every `STRIDE`th; actions are held for a while.
"""

import json
import sys

import mujoco
import numpy as np
import safety_gymnasium

ROWS, STRIDE, HOLD, EPISODE = 60, 11, 25, 240  # EPISODE: steps after which a new one is begun at the latest


def record(name: str, seed: int = 0) -> dict:
    env = safety_gymnasium.make(name)
    base, rng, rows, episode = env.unwrapped, np.random.default_rng(seed), [], 0
    navigation = hasattr(base, "task")
    inner = base.task if navigation else base
    body = "agent" if navigation else "torso"
    done = True
    while len(rows) < ROWS:
        if done:
            obs, _ = env.reset(seed=seed + episode)
            t, episode = 0, episode + 1
        if t % HOLD == 0:
            action = rng.uniform(env.action_space.low, env.action_space.high)
        model, data = inner.model, inner.data  # a reset makes new ones
        state = lambda: (data.qpos.copy(), data.qvel.copy(), data.body(body).xpos.copy())
        row = dict(zip(("qpos", "qvel", "agent_xpos"), state()), warm=data.qacc_warmstart.copy(), act=data.act.copy())
        row |= dict(obs=obs, action=action, episode=episode - 1, t=t)
        placed = model.body("agent") if navigation else None
        row |= dict(agent_body_pos=placed.pos.copy(), agent_body_quat=placed.quat.copy()) if placed else {}
        obs, reward, cost, terminated, truncated, _ = env.step(action)
        row |= dict(zip(("next_qpos", "next_qvel", "next_agent_xpos"), state()), next_obs=obs)
        row |= dict(reward=reward, cost=float(cost), terminated=bool(terminated), truncated=bool(truncated))
        if t % STRIDE == 0 or terminated:
            rows.append(row)
        t += 1
        done = terminated or truncated or t == EPISODE
    spaces = inner.obs_info.obs_space_dict.spaces if navigation else {}
    meta = {"id": name, "obs_keys": [[k, list(s.shape)] for k, s in spaces.items()], "mujoco": mujoco.__version__}
    columns = {key: np.stack([row[key] for row in rows]) for key in rows[0]}
    return {"agent_body_pos": np.zeros(0), "agent_body_quat": np.zeros(0), **columns, "meta": json.dumps(meta)}


if __name__ == "__main__":
    np.savez_compressed(sys.argv[2], **record(sys.argv[1]))
