"""Makes the offline datasets: `python -m data.collect --env SafetyPointRun` writes data/SafetyPointRun.hdf5.

Behaviour policies come from from-scratch SAC-Lagrangian (algos/sac_lag.py) at several cost limits, each at several stages from
early to expert, so that a file mixes safe-poor, safe-good, unsafe-good and bad trajectories, as DSRL's do. They are kept in
data/policies/ENV.safetensors; the dataset is their stochastic rollouts, the same for the same key. A training script whose dataset is
missing makes it by `provided`.

    python -m data.collect --env E                              # data/E.hdf5 from the kept policies
    python -m data.collect --env E --transitions 1000000 --out big.hdf5
    python -m data.collect --env E --train                      # the policies too, from nothing (minutes to hours)
"""

import fcntl
import json
import math
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
import tyro
from tqdm import tqdm

import envs
from data import dsrl, public
from data.dsrl import DatasetError
from envs import reference

ROOT = Path(__file__).resolve().parents[1]


class Behaviour(NamedTuple):
    """One training run of sac_lag.py and the stages of it that are kept."""

    cost_limit: float
    env_steps: int
    evals: int  # snapshots are taken at env_steps * k / evals
    stages: tuple[int, ...]  # the k that are kept
    options: str  # further arguments of sac_lag.py


COMMON = (
    "--lagrangian pid --hidden 128 128 --batch-size 256 --updates-per-block 64 --eval-episodes 10 --final-eval-rounds 1 "
    "--kp 0.001 --kd 0.0 --reserve 0 --no-odometer --snapshots"
)
SIXTEEN = "--num-envs 16 --steps-per-block 16 --episodes-per-iter 16 --max-multiplier 2 --ki 0.0003"
MANY = "--num-envs 32 --steps-per-block 8 --episodes-per-iter 32 --max-multiplier 2 --ki 0.0003"
# lambda rises slowly and dying costs: otherwise falling early is the first way to be safe that they learn
ANT = "--num-envs 32 --steps-per-block 8 --episodes-per-iter 32 --max-multiplier 2 --kp 0.00001 --ki 0.00003 --termination-cost 100"
# short episodes, learnt in a tenth of the steps
BULLET = "--num-envs 16 --steps-per-block 16 --episodes-per-iter 16 --max-multiplier 2 --ki 0.001"
# slow simulators: few evaluations, which only the log needs
GOAL = "--num-envs 16 --steps-per-block 16 --episodes-per-iter 16 --max-multiplier 0.2 --ki 0.001 --eval-episodes 4"

# Stages chosen for PointCircle1 and SwimmerVelocity. Without a limit Circle2 is Circle1: CarCircle's kept ones of that kind are of one run.
CIRCLE = (
    Behaviour(15.0, 300_000, 24, (2, 4, 6, 8, 10, 14, 18, 24), SIXTEEN),
    Behaviour(float("inf"), 150_000, 12, (1, 3, 6, 12), SIXTEEN),
)
VELOCITY = (
    Behaviour(15.0, 300_000, 12, (1, 2, 3, 4, 6, 8, 10, 12), SIXTEEN + " --reward-scale 0.1"),
    Behaviour(float("inf"), 120_000, 6, (1, 2, 4, 6), SIXTEEN + " --reward-scale 0.1"),
)

RECIPES: dict[str, tuple[Behaviour, ...]] = {
    "SafetyPointRun": (Behaviour(10.0, 200_000, 16, (1, 2, 4, 5, 6, 8, 10, 12, 13, 14), SIXTEEN),),
    "SafetyHalfCheetahVelocity": (
        Behaviour(15.0, 600_000, 24, (1, 2, 3, 4, 5), SIXTEEN),
        Behaviour(float("inf"), 200_000, 8, (2, 3, 4, 5), SIXTEEN),
    ),
    "SafetyCarRun": (
        Behaviour(15.0, 600_000, 24, (1, 3, 4, 5, 6, 8, 20, 24), MANY),
        Behaviour(float("inf"), 250_000, 10, (1, 2, 4), MANY),
    ),
    "bullet/SafetyBallRun": (Behaviour(10.0, 120_000, 24, (1, 2, 3, 4, 5, 7, 8, 9, 12, 14, 20, 23), BULLET),),
    "bullet/SafetyBallCircle": (
        Behaviour(10.0, 120_000, 12, (1, 2, 3, 5, 7, 8, 10, 12), BULLET),
        Behaviour(float("inf"), 40_000, 8, (1, 2, 3, 7), BULLET),
    ),
    "bullet/SafetyCarRun": (Behaviour(10.0, 100_000, 20, (1, 2, 3, 4, 5), BULLET),),
    "SafetyPointGoal1-v0": (
        Behaviour(15.0, 200_000, 16, (2, 4, 6, 8, 12, 16), GOAL),
        Behaviour(float("inf"), 150_000, 6, (1, 2, 4, 6), GOAL),
    ),
    **{f"Safety{robot}Circle{level}": CIRCLE for robot in ("Point", "Car", "Ant") for level in (1, 2)},
    **{f"Safety{robot}Velocity": VELOCITY for robot in ("Swimmer", "Hopper", "Walker2d", "Ant")},
    "SafetyHopperVelocity": (  # without a limit it falls soon: fewer of its many trajectories
        VELOCITY[0],
        VELOCITY[1]._replace(stages=(2, 6)),
    ),
    "SafetyAntRun": (
        Behaviour(15.0, 900_000, 36, (3, 4, 5, 6, 20, 22, 22, 24), ANT),
        Behaviour(float("inf"), 425_000, 17, (17,), ANT),
    ),
}

# Their ants learn to fall early by the recipe, because its rewards hardly pay for standing: their policies are not kept.
FALLING = frozenset({"SafetyAntCircle1", "SafetyAntCircle2"})

TRANSITIONS = {"SafetyPointCircle1": 60_000, "SafetySwimmerVelocity": 60_000, "SafetyPointGoal1-v0": 60_000}  # the others: 100,000
PIECES = 20  # calls that a collection is split into, for its progress bar


@dataclass(frozen=True)
class Args:
    env: str = "SafetyPointRun"
    """task: a name of RECIPES"""
    transitions: int | None = None
    """size of the dataset; up to a third fewer where episodes end early, and at least an episode per policy (default: 100,000, of three
    tasks 60,000)"""
    seed: int = 0
    """key of the rollouts"""
    out: Path | None = None
    """file to write (default: data/ENV.hdf5)"""
    train: bool = False
    """train the behaviour policies first, replacing the kept ones"""
    runs: tuple[Path, ...] = ()
    """with --train: finished run folders of the recipe's behaviours, in its order, to take instead of training"""


def policies_path(env: str) -> Path:
    return Path(__file__).parent / "policies" / f"{env}.safetensors"


def train(env: str, behaviour: Behaviour) -> Path:
    """Trains one behaviour and returns its run folder."""
    words = f"--env {env} --cost-limit {behaviour.cost_limit} --env-steps {behaviour.env_steps} --evals {behaviour.evals}"
    command = [sys.executable, str(ROOT / "algos" / "sac_lag.py"), *words.split(), *COMMON.split(), *behaviour.options.split()]
    print(" ".join(command), file=sys.stderr)
    return Path(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1].strip())


def pack(env: str, folders: list[Path]) -> None:
    """Stacks the kept stages of all behaviours into data/policies/ENV.safetensors."""
    trees, about = [], []
    for behaviour, folder in zip(RECIPES[env], folders, strict=True):
        for k in behaviour.stages:
            steps = behaviour.env_steps * k / behaviour.evals
            path = min(folder.glob("snapshot-seed0-*"), key=lambda p: abs(int(p.stem[-8:]) - steps))
            trees.append(safetensors.numpy.load_file(path))
            about.append({"cost_limit": str(behaviour.cost_limit), "env_steps": int(path.stem[-8:])})
    stacked = {name.removeprefix("actor/params/"): np.stack([tree[name] for tree in trees]) for name in trees[0]}
    policies_path(env).parent.mkdir(exist_ok=True)
    safetensors.numpy.save_file(stacked, policies_path(env), {"policies": json.dumps(about)})


def act(params: dict, obs: jax.Array, key: jax.Array) -> jax.Array:
    """sac_lag.py's stochastic policy: a tanh-Gaussian MLP on symlog observations."""
    x = jnp.sign(obs) * jnp.log1p(jnp.abs(obs))
    layers = len(params) // 2
    for i in range(layers):
        x = x @ params[f"Dense_{i}/kernel"] + params[f"Dense_{i}/bias"]
        x = jax.nn.relu(x) if i < layers - 1 else x
    mean, raw = jnp.split(x, 2, -1)
    return jnp.tanh(mean + jnp.exp(-5.0 + 3.5 * (1.0 + jnp.tanh(raw))) * jax.random.normal(key, mean.shape))


def rollouts(env: envs.Env, params: dict, rows: int, key: jax.Array, rounds: int = 1) -> dict[str, Any]:
    """T = `rounds` * `env.horizon` steps of every policy (leaves (P, ...)) in `rows` environments each: (P, rows, T, ...)."""
    o, steps = env.obs_size, rounds * env.horizon
    pieces = math.gcd(steps, PIECES)

    def start(key):
        key_reset, key_steps = jax.random.split(key)
        return env.reset(jax.random.split(key_reset, rows)), jax.random.split(key_steps, steps).reshape(pieces, -1)

    def one(params, carry, keys):
        def step(carry, key):
            state, obs = carry
            action = act(params, obs[..., :o], key)
            state, t = env.step(state, action)
            out = dict(
                observations=obs[..., :o], next_observations=t.next_obs[..., :o], actions=action, rewards=t.reward, costs=t.cost,
                terminals=t.terminated, timeouts=t.truncated & ~t.terminated,
            )  # fmt: skip
            out |= dict(privileged=obs[..., o:], next_privileged=t.next_obs[..., o:]) if env.privileged_size else {}
            return (state, t.obs), out

        carry, out = jax.lax.scan(step, carry, keys)
        return carry, jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), out)

    policies = next(iter(params.values())).shape[0]
    carry, keys = jax.jit(jax.vmap(start))(jax.random.split(key, policies))
    one, found = jax.jit(jax.vmap(one)), []
    with tqdm(total=policies * rows * steps, desc=f"collecting {env.name}", unit=" steps", unit_scale=True, disable=None) as bar:
        for i in range(pieces):
            carry, out = one(params, carry, keys[:, i])
            found.append(jax.tree.map(np.asarray, out))
            bar.update(bar.total // pieces)
    return jax.tree.map(lambda *x: np.concatenate(x, 2), *found)


def rounded(x: np.ndarray) -> np.ndarray:
    """float32 to 14 bits of mantissa (a relative 3e-5): what is left compresses to two thirds, so files stay below 20 MB."""
    return ((np.ascontiguousarray(x).view(np.uint32) + 0x100) & np.uint32(0xFFFFFE00)).view(np.float32)


def whole_episodes(out: dict[str, Any]) -> dsrl.Dataset:
    """Drops what follows the last end of an episode in each row and joins the rest."""
    flat = {k: np.asarray(v).reshape(-1, *v.shape[2:]) for k, v in out.items()}  # (P * rows, T, ...)
    flat |= {k: rounded(flat[k]) for k in flat if k in dsrl.MATRICES and k != "actions"}
    ends = flat["terminals"] | flat["timeouts"]
    keep = np.cumsum(ends[:, ::-1], 1)[:, ::-1] > 0
    return dsrl.Dataset(**{k: v[keep] for k, v in flat.items()})


def collect(env: envs.Env, out: Path, transitions: int | None = None, seed: int = 0) -> dsrl.Dataset:
    """Writes the dataset of a task, an episode or more of each of its kept policies, to `out`, which appears whole or not at all."""
    with safetensors.safe_open(policies_path(env.name), "numpy") as file:
        params = {k: file.get_tensor(k) for k in file.keys()}
        policies = json.loads(file.metadata()["policies"])
    transitions = transitions or TRANSITIONS.get(env.name, 100_000)
    episodes = transitions / (len(policies) * env.horizon)
    # Environments of a real package are simulators of their own, of up to 30 MB: fewer of them, for longer.
    rounds = 1 if isinstance(env, envs.Env) else math.ceil(episodes / 4)
    rows = max(1, round(episodes / rounds))
    dataset = whole_episodes(rollouts(env, params, rows, jax.random.key(seed), rounds))
    about = {"env": env.name, "seed": seed, "policies": policies, "rows_per_policy": rows}
    about |= {"rounds": rounds} if rounds > 1 else {}
    dsrl.save(out, dataset, {k: v if isinstance(v, (str, int)) else json.dumps(v) for k, v in about.items()})
    return dataset


def _mend(name: str) -> str:
    """How to get a dataset of a task that has none."""
    if name in RECIPES:
        but = "; its ants fall early, so --dataset FILE with one of your own is better" if name in FALLING else ""
        return f"`python -m data.collect --env {name} --train` makes one, in hours{but}"
    published = public.published(name)
    if published:
        return f"--dataset dsrl/{published.name} downloads a published one"
    return "name one with --dataset FILE (data/README.md: envs.Recorder records one, `python -m data.convert` takes other formats)"


def provided(name: str) -> Path:
    """The task's own dataset in data/, made from its kept behaviour policies if it is missing: seconds to a minute.

    Of several processes that ask for one, one makes it and the others wait.

    Raises:
      DatasetError: there are no policies to make it from, or it cannot be written.
    """
    path = dsrl.default_path(name)
    if path.exists():
        return path
    if not policies_path(name).exists():
        raise DatasetError(f"{name}: no dataset comes with it; {_mend(name)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path.with_name(f".{path.name}.lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not path.exists():
                print(f"making {path.name}, once, as `python -m data.collect --env {name}` does", file=sys.stderr)
                collect(envs.make(name, privileged=True), path)
            Path(lock.name).unlink(missing_ok=True)
    except (OSError, DatasetError) as error:
        cause = error if isinstance(error, OSError) else error.__cause__
        if not isinstance(cause, OSError):
            raise
        mend = f"make it elsewhere by `python -m data.collect --env {name} --out FILE`, and name it with --dataset FILE"
        raise DatasetError(f"{path}: cannot be written ({os.strerror(cause.errno or 0)}); {mend}") from None
    return path


def main(args: Args) -> None:
    if args.transitions is not None and args.transitions < 1:
        raise DatasetError(f"--transitions {args.transitions}: must be positive")
    if not 0 <= args.seed < 2**32:
        raise DatasetError(f"--seed {args.seed}: must be at least 0 and below 2^32, of which JAX makes its keys")
    if reference.own(args.env) and args.env not in RECIPES:  # before it is made: what that may ask for would be of no use here
        raise DatasetError(f"{args.env}: this collects no dataset of it; {_mend(args.env)}")
    env = envs.make(args.env, privileged=True)
    out = args.out or dsrl.default_path(env.name)
    dsrl.check_output(out)
    if args.runs and not args.train:
        raise DatasetError(f"--runs {' '.join(map(str, args.runs))}: only with --train, whose runs it replaces: add that")
    if args.train:
        if env.name not in RECIPES:
            raise DatasetError(f"{env.name}: no recipe; add one to RECIPES in data/collect.py (there are {', '.join(RECIPES)})")
        for folder in args.runs:
            if not any(folder.glob("snapshot-seed0-*")):
                raise DatasetError(f"--runs {folder}: holds no snapshot-seed0-*: name a run folder of algos/sac_lag.py --snapshots")
        if args.runs and len(args.runs) != len(RECIPES[env.name]):
            wanted = f"{len(RECIPES[env.name])} folders, one for each behaviour of {env.name}"
            raise DatasetError(f"--runs: {len(args.runs)} given; name {wanted}")
        folders = list(args.runs) or [train(env.name, behaviour) for behaviour in RECIPES[env.name]]
        pack(env.name, folders)
    path = policies_path(env.name)
    if not path.exists():
        mend = "--train trains its behaviour policies" if env.name in RECIPES else f"there are {', '.join(RECIPES)}"
        raise DatasetError(f"{path}: no such file; {mend}")
    dataset = collect(env, out, args.transitions, args.seed)
    print(json.dumps({"file": str(out), "MB": round(out.stat().st_size / 1e6, 1), **dsrl.describe(dataset, 20.0)}, indent=1))


if __name__ == "__main__":
    try:
        with reference.reported():
            main(tyro.cli(Args))
    except (DatasetError, envs.UnknownName) as error:
        sys.exit(print(f"error: {error}", file=sys.stderr) or 2)
