"""The programs that bench.py measures this suite beside: `PYTHON -I peers.py osrl|torch|crax SIZES`, SIZES a JSON object.

They run under interpreters that have neither this repository nor its packages. Each says `ready` once it is warm, then for
every line on standard input makes `steps` steps and answers with the seconds they took, so that bench.py can alternate them
with its own. `-I` keeps this folder, whose envs.py would hide other packages, off their path.
"""

import json
import os
import sys
import time
import types


def answer(repeat, reply) -> None:
    """Warms up, then times one call of `repeat` per line of standard input."""
    for _ in range(2):  # the second may compile anew, for what the first returned
        repeat()
    print("ready", file=reply, flush=True)
    for _ in sys.stdin:
        began = time.perf_counter()
        repeat()
        print(time.perf_counter() - began, file=reply, flush=True)


def transitions(torch, sizes):
    """Random observations, next observations, actions, rewards, costs, ends: (rows, ...)."""
    rows, obs, act = sizes["rows"], sizes["obs"], sizes["act"]
    action = torch.tanh(torch.randn(rows, act))
    costs = torch.randint(0, 2, (rows,)).float()
    return torch.randn(rows, obs), torch.randn(rows, obs), action, torch.randn(rows), costs, torch.zeros(rows)


def osrl(sizes):
    """Gradient steps of OSRL's CPQ (`pip install osrl-lib --no-deps`, torch, gymnasium, tqdm; its loggers' packages are not needed)."""

    class Logger:
        def store(self, **_):
            pass

    stub = types.ModuleType("fsrl.utils")
    stub.DummyLogger = stub.WandbLogger = Logger
    sys.modules["fsrl"], sys.modules["fsrl.utils"] = types.ModuleType("fsrl"), stub
    # osrl.algorithms imports all of its algorithms, with packages that CPQ does not need: without the package's own __init__.
    import importlib.util

    where = importlib.util.find_spec("osrl")
    if where is None:
        raise ModuleNotFoundError("No module named 'osrl': pip install osrl-lib --no-deps")
    for name in ("osrl", "osrl.algorithms", "osrl.common"):
        bare = types.ModuleType(name)
        bare.__path__ = [os.path.join(where.submodule_search_locations[0], *name.split(".")[1:])]
        sys.modules[name] = bare
    import torch
    from osrl.algorithms.cpq import CPQ, CPQTrainer

    model = CPQ(
        sizes["obs"], sizes["act"], 1.0, list(sizes["hidden"]), list(sizes["hidden"]), sizes["vae"], sizes["ood_actions"],
        beta=0.5, num_q=2, num_qc=1, qc_scalar=1.5, cost_limit=20, episode_len=sizes["horizon"],
    )  # fmt: skip
    trainer = CPQTrainer(model, None, Logger(), actor_lr=1e-4, critic_lr=1e-3, alpha_lr=1e-4, vae_lr=1e-3)
    data = transitions(torch, sizes)

    def repeat():
        for _ in range(sizes["steps"]):
            rows = torch.randint(sizes["rows"], (sizes["batch"],))
            trainer.train_one_step(*(x[rows] for x in data))

    return repeat


def torch(sizes):
    """SAC-Lagrangian as it is commonly written in eager PyTorch: two reward critics, a cost critic, targets, a fixed entropy weight."""
    import copy

    import torch
    import torch.nn.functional as F
    from torch import nn

    obs_size, act, gamma, tau, entropy_weight, multiplier = sizes["obs"], sizes["act"], 0.99, 0.005, 0.01, 0.1

    def mlp(inputs, outputs):
        layers, width = [], inputs
        for hidden in sizes["hidden"]:
            layers += [nn.Linear(width, hidden), nn.ReLU()]
            width = hidden
        return nn.Sequential(*layers, nn.Linear(width, outputs))

    actor = mlp(obs_size, 2 * act)
    critics = nn.ModuleList(mlp(obs_size + act, 1) for _ in range(3))  # Q, Q, Qc
    targets = copy.deepcopy(critics).requires_grad_(False)
    actor_optimizer = torch.optim.Adam(actor.parameters(), lr=3e-5)
    critic_optimizer = torch.optim.Adam(critics.parameters(), lr=5e-4)

    def sample(obs):
        mean, log_std = actor(obs).chunk(2, -1)
        normal = torch.distributions.Normal(mean, log_std.clamp(-5, 2).exp())
        u = normal.rsample()
        log_det = 2 * (0.6931472 - u - F.softplus(-2 * u))
        return torch.tanh(u), (normal.log_prob(u) - log_det).sum(-1)

    def values(networks, obs, action):
        x = torch.cat([obs, action], -1)
        return [network(x).squeeze(-1) for network in networks]

    data = transitions(torch, sizes)

    def step():
        rows = torch.randint(sizes["rows"], (sizes["batch"],))
        obs, next_obs, action, reward, cost, terminated = (x[rows] for x in data)
        with torch.no_grad():
            next_action, log_prob = sample(next_obs)
            q1, q2, qc = values(targets, next_obs, next_action)
            alive = gamma * (1 - terminated)
            target = 0.1 * reward + alive * (torch.min(q1, q2) - entropy_weight * log_prob)
            cost_target = cost + alive * qc
        q1, q2, qc = values(critics, obs, action)
        loss = F.mse_loss(q1, target) + F.mse_loss(q2, target) + F.mse_loss(qc, cost_target)
        critic_optimizer.zero_grad()
        loss.backward()
        critic_optimizer.step()

        critics.requires_grad_(False)
        new_action, log_prob = sample(obs)
        q1, q2, qc = values(critics, obs, new_action)
        loss = (entropy_weight * log_prob - torch.min(q1, q2) + multiplier * qc).mean()
        actor_optimizer.zero_grad()
        loss.backward()
        actor_optimizer.step()
        critics.requires_grad_(True)
        with torch.no_grad():
            for target, source in zip(targets.parameters(), critics.parameters()):
                target.lerp_(source, tau)

    def repeat():
        for _ in range(sizes["steps"]):
            step()

    return repeat


def crax(sizes):
    """Steps of CRAX's environments with random actions and its own restarts, in a jitted scan."""
    import crax.envs
    import jax

    env = crax.envs.create(sizes["task"], batch_size=sizes["num_envs"], auto_reset=True)
    shape = (sizes["num_envs"], env.action_size)

    @jax.jit
    def run(state, key):
        def step(state, key):
            state = env.step(state, jax.random.uniform(key, shape, minval=-1.0, maxval=1.0))
            return state, (state.obs, state.reward, state.info["cost"], state.done)

        return jax.lax.scan(step, state, jax.random.split(key, sizes["steps"]))

    key = jax.random.key(0)
    state = jax.jit(env.reset)(key)

    def repeat():
        nonlocal state, key
        key, own = jax.random.split(key)
        state, _ = jax.block_until_ready(run(state, own))

    return repeat


if __name__ == "__main__":
    # What the peers print goes to standard error: standard output is for the answers alone.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    answer({"osrl": osrl, "torch": torch, "crax": crax}[sys.argv[1]](json.loads(sys.argv[2])), answers)
