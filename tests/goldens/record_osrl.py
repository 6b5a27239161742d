"""Records what OSRL computes on small networks: `PYTHON tests/goldens/record_osrl.py tests/goldens/osrl.npz`.

PYTHON is one that has OSRL and not this project's (`pip install --no-deps osrl-lib==0.1.0` beside torch, gymnasium, scipy, tqdm and
pyyaml; fsrl, which OSRL needs for its loggers only, is stubbed here). The file was made with torch 2.14.1. OSRL's own methods run
unchanged; the noise that they draw is fixed in advance and recorded, so that others can take the same.

Names in the file: `batch/`, `noise/`, a network's parameters under its OSRL name (`actor/net.0.weight`), and per test what OSRL
returned; `meta` is a JSON string with the configuration. tests/test_osrl.py says which number is which.
"""

import copy
import json
import sys
import types
from contextlib import contextmanager

import numpy as np
import torch

utils = types.ModuleType("fsrl.utils")
utils.DummyLogger = utils.WandbLogger = type("Logger", (), {})
sys.modules |= {"fsrl": types.ModuleType("fsrl"), "fsrl.utils": utils}

from osrl.algorithms.bearl import BEARL
from osrl.algorithms.cpq import CPQ, CPQTrainer
from osrl.common.net import LagrangianPIDController, SquashedNormal

OBS, ACTION, ROWS, SAMPLES, STEPS = 5, 2, 32, 10, 4
META = {
    "gamma": 0.9, "tau": 0.1, "beta": 0.5, "cost_limit": 20, "episode_len": 50, "reward_scale": 0.1, "lr": 1e-3, "alpha_lr": 1e-2,
    "lmbda": 0.75, "sigma": 0.6, "multiplier": 0.4, "bias": 4.0, "pid": [0.2, 0.05, 0.3], "pid_thres": 20.0, "osrl": "0.1.0",
    "torch": torch.__version__,
}  # fmt: skip
SHARED = dict(
    state_dim=OBS, action_dim=ACTION, max_action=1.0, a_hidden_sizes=[16, 16], c_hidden_sizes=[16, 16], vae_hidden_sizes=16,
    sample_action_num=SAMPLES, gamma=META["gamma"], tau=META["tau"], beta=META["beta"], cost_limit=META["cost_limit"],
    episode_len=META["episode_len"],
)  # fmt: skip
saved: dict[str, np.ndarray] = {}


def keep(name, value):
    saved[name] = np.asarray(value.detach() if torch.is_tensor(value) else value, np.float32)


def keep_module(name, module, gradient=False):
    for key, p in module.named_parameters():
        keep(f"{name}/{key}", p.grad if gradient else p)


def normal(*shape):
    return torch.as_tensor(rng.normal(size=shape), dtype=torch.float32)


@contextmanager
def noise(*queue):
    """Whatever draws standard normal noise takes the next of `queue`; all of it must be taken."""
    queue = list(queue)

    def draw(like):
        x = queue.pop(0)
        assert x.shape == like, (x.shape, like)
        return x

    old = torch.randn_like, torch.randn, torch.normal, torch.distributions.normal._standard_normal
    torch.randn_like = lambda x: draw(x.shape)
    torch.randn = lambda shape: draw(shape)
    torch.normal = lambda mean, std: mean + std * draw(mean.shape)
    torch.distributions.normal._standard_normal = lambda shape, dtype, device: draw(shape)
    yield
    torch.randn_like, torch.randn, torch.normal, torch.distributions.normal._standard_normal = old
    assert not queue


def spread_costs(critic):
    """Cost values that lie in (0, 1 / (1 - gamma)), on both sides of the threshold."""
    with torch.no_grad():
        for net in critic:
            net[-2].weight *= 6
            net[-2].bias += META["bias"]


def backup_of(model, name, run):
    """What a critic regresses onto, as its `loss` is given it."""
    seen, critic = [], getattr(model, name)
    original = critic.loss
    critic.loss = lambda target, q_list=None: seen.append(target) or original(target, q_list)
    result = run()
    del critic.loss
    return seen[0], result[0]


def fresh(model, log_alpha=-1e9):
    """A copy with optimisers; -1e9 switches off the term that alpha weighs."""
    model = copy.deepcopy(model)
    model.log_alpha = torch.tensor(float(log_alpha))
    model.setup_optimizers(actor_lr=META["lr"], critic_lr=META["lr"], vae_lr=META["lr"], alpha_lr=META["alpha_lr"])
    return model


def record_policy(model):
    """Samples and log-probabilities, also far out, where tanh saturates; log-likelihood of given actions."""
    for name, x in (("policy", obs), ("far", 40 * obs)):
        with noise(n["actor"]):
            action, log_prob = model.actor(x)
        keep(f"{name}/action", action), keep(f"{name}/log_prob", log_prob)
    mean, std = 0.5 * normal(1, ROWS, ACTION), torch.exp(0.3 * normal(1, ROWS, ACTION))
    keep("likelihood/mean", mean), keep("likelihood/log_std", std.log())
    keep("likelihood/log_prob", SquashedNormal(mean, std).log_likelihood(actions[None]))


def record_thresholds():
    cases = [(20, 0.99, 500), (20, 0.99, 1000), (10, 0.95, 300), (40, 0.9, 50)]
    models = [CPQ(**{**SHARED, "cost_limit": d, "gamma": g, "episode_len": t}) for d, g, t in cases]
    keep("thresholds", [(*case, m.q_thres, m.qc_thres) for case, m in zip(cases, models)])


def record_cpq(model):
    m = fresh(model)
    with noise(n["vae"]):
        keep("vae_loss", m.vae_loss(obs, actions)[0])
    keep_module("vae_gradient", m.vae, True)

    with noise(n["next"]):
        backup, loss = backup_of(m, "critic", lambda: m.critic_loss(obs, next_obs, actions, rewards, done))
    keep("critic_backup", backup), keep("critic_loss", loss), keep_module("critic_gradient", m.critic, True)

    def cost(name, log_alpha, done):
        m = fresh(model, log_alpha)
        quantile, seen = torch.quantile, []
        torch.quantile = lambda x, q: seen.append((x, quantile(x, q))) or seen[-1][1]
        with noise(n["next"], n["actor"], n["ood"], n["ood_vae"]):
            run = lambda: m.cost_critic_loss(obs, next_obs, actions, costs, done)
            backup, loss = backup_of(m, "cost_critic", run)
        torch.quantile = quantile
        keep(f"{name}_backup", backup), keep(f"{name}_loss", loss), keep_module(f"{name}_gradient", m.cost_critic, True)
        return m, seen[0]

    cost("cost", -1e9, done)
    cost("cost_terminal", -1e9, torch.ones_like(done))
    m, (kl, quantile) = cost("cost_penalty", 0.0, done)
    keep("ood/kl", kl), keep("ood/far", kl >= quantile), keep("ood/log_alpha", m.log_alpha)
    with noise(n["actor"]):
        dist = model.actor(obs, with_distribution=True)[2]
    sampled = dist.loc + n["ood"] * dist.scale
    keep("ood/action", sampled)
    q, _ = model.cost_critic_old.predict(obs.expand(SAMPLES, -1, -1).reshape(-1, OBS), sampled.reshape(-1, ACTION))
    keep("ood/qc", q.reshape(SAMPLES, ROWS))

    m = fresh(model)
    with noise(n["actor"]):
        keep("actor_loss", m.actor_loss(obs)[0])
    keep_module("actor_gradient", m.actor, True)


def record_steps(model):
    """Whole training steps: the rows of those that do not end (OSRL's cost target has no other)."""
    m = fresh(model)
    trainer, alive = CPQTrainer.__new__(CPQTrainer), done == 0
    trainer.model, trainer.logger = m, types.SimpleNamespace(store=lambda **_: None)
    rows = int(alive.sum())
    draws = {"vae": (rows, 2 * ACTION), "next": (rows, ACTION), "actor": (rows, ACTION)}
    steps = {name: normal(STEPS, *shape) for name, shape in draws.items()}
    for name, x in steps.items():
        keep(f"steps/noise/{name}", x)
    unused = normal(rows, ACTION), normal(SAMPLES, rows, ACTION), normal(SAMPLES * rows, 2 * ACTION)
    for i in range(STEPS):
        with noise(steps["vae"][i], steps["next"][i], steps["next"][i], *unused, steps["actor"][i]):
            trainer.train_one_step(*(x[alive] for x in (obs, next_obs, actions, rewards, costs, done)))
    for name in ("actor", "critic", "critic_old", "cost_critic", "cost_critic_old", "vae"):
        keep_module(f"steps/{name}", getattr(m, name))


def record_pid():
    """Costs on both sides of the threshold; each term alone, and together."""
    costs = np.concatenate([[20, 26, 35, 41, 30, 24], [12, 2, 0, 5, 19], [28, 60, 75, 75, 22, 8, 40]])
    keep("pid/cost", costs)
    for name, on in {"p": (1, 0, 0), "i": (0, 1, 0), "d": (0, 0, 1), "all": (1, 1, 1)}.items():
        controller = LagrangianPIDController(*(k * x for k, x in zip(META["pid"], on)), META["pid_thres"])
        keep(f"pid/{name}", [controller.control(torch.tensor([c])) for c in costs])


def record_bear(model):
    x, y = torch.tanh(normal(6, 4, ACTION)), torch.tanh(normal(6, 4, ACTION) + 0.5)
    keep("mmd/x", x), keep("mmd/y", y), keep("mmd/value", model.mmd_loss_gaussian(x, y, META["sigma"]))

    draws = normal(ROWS * SAMPLES, ACTION)  # a state's samples are neighbours
    keep("bear/noise", draws)
    for name in ("critic", "critic_old", "cost_critic", "cost_critic_old"):
        keep_module(f"bear/{name}", getattr(model, name))
    m = fresh(model)
    with noise(draws):
        backup, loss = backup_of(m, "critic", lambda: m.critic_loss(obs, next_obs, actions, rewards, done))
    keep("bear/critic_backup", backup), keep("bear/critic_loss", loss), keep_module("bear/critic_gradient", m.critic, True)

    one = fresh(model)
    one.sample_action_num = 1
    with noise(n["next"]):
        backup, loss = backup_of(one, "cost_critic", lambda: one.cost_critic_loss(obs, next_obs, actions, costs, done))
    keep("bear/cost_backup", backup), keep("bear/cost_loss", loss), keep_module("bear/cost_gradient", one.cost_critic, True)

    m = fresh(model)
    m.controller = types.SimpleNamespace(control=lambda qc: torch.tensor(META["multiplier"]))
    with noise(n["bear_vae"], draws):
        m.actor_loss(obs)
    keep_module("bear/actor_gradient", m.actor, True)


if __name__ == "__main__":
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    obs, next_obs, actions = normal(ROWS, OBS), normal(ROWS, OBS), torch.tanh(normal(ROWS, ACTION))
    raw, costs = normal(ROWS), torch.as_tensor(rng.integers(0, 2, ROWS), dtype=torch.float32)
    rewards, done = META["reward_scale"] * 10 * raw, torch.as_tensor(np.arange(ROWS) % 4 == 0, dtype=torch.float32)
    for name, x in dict(obs=obs, action=actions, reward=10 * raw, cost=costs, next_obs=next_obs, done=done).items():
        keep(f"batch/{name}", x)
    n = dict(
        vae=normal(ROWS, 2 * ACTION), next=normal(ROWS, ACTION), actor=normal(ROWS, ACTION), ood=normal(SAMPLES, ROWS, ACTION),
        ood_vae=normal(SAMPLES * ROWS, 2 * ACTION), bear_vae=normal(ROWS, SAMPLES, 2 * ACTION),
    )  # fmt: skip
    for name in ("vae", "next", "actor"):
        keep(f"noise/{name}", n[name])

    model, other = (CPQ(num_q=2, num_qc=1, **SHARED) for _ in range(2))
    model.critic_old, model.cost_critic_old = other.critic, other.cost_critic  # targets of their own
    with torch.no_grad():
        for p in model.vae.parameters():
            p *= 2  # at their first values all actions are about as far out
    spread_costs(model.cost_critic.q_nets), spread_costs(model.cost_critic_old.q_nets)
    for name in ("actor", "critic", "critic_old", "cost_critic", "cost_critic_old", "vae"):
        keep_module(name, getattr(model, name))
    record_policy(model), record_thresholds(), record_cpq(model), record_steps(model), record_pid()

    bear, other = (BEARL(**SHARED, lmbda=META["lmbda"], kernel="laplacian", start_update_policy_step=0) for _ in range(2))
    bear.actor, bear.actor_old, bear.vae = model.actor, copy.deepcopy(model.actor), model.vae
    bear.critic_old, bear.cost_critic_old = other.critic, other.cost_critic
    for critic in (bear.cost_critic, bear.cost_critic_old):
        spread_costs(critic.q1_nets)
        critic.q2_nets = copy.deepcopy(critic.q1_nets)  # this project has one cost critic
    record_bear(bear)
    np.savez_compressed(sys.argv[1], **saved, meta=json.dumps(META))
