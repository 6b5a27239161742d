"""How much device memory a run of Marvel takes on the mjx backend: `python results/speed/memory.py`. Prints a table.

Bytes are those of the arrays that the program really carries, shaped by JAX without running anything. `--working` also
compiles the environments' step for the device at hand and asks XLA for the size of its temporary buffers (minutes on a CPU).
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository is not installed
# A script's own folder comes first on the path, where the neighbouring envs.py would be taken for the package `envs`.
sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != Path(__file__).resolve().parent]

import envs
from algos import cpq, marvel, training


@dataclass
class Args:
    """Estimate the memory of vmapped seeds."""

    tasks: tuple[str, ...] = tuple(envs.TASKS)
    """tasks to list"""
    seeds: int = 32
    """seeds in one program"""
    buffer_size: int = 1_000_000
    """replay capacity of a seed, transitions"""
    transitions: int = 100_000
    """of the dataset, of which one copy serves all seeds"""
    gigabytes: float = 80.0
    """memory of the device, 10^9 bytes"""
    working: bool = False
    """measure the temporary buffers of the environments' step too"""


def size(tree) -> int:
    """Bytes of a tree of arrays or of their shapes."""

    def one(x):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x = jax.eval_shape(jax.random.key_data, x)
        return x.size * x.dtype.itemsize

    return sum(one(x) for x in jax.tree.leaves(tree))


def measure(name: str, args: Args) -> dict[str, float]:
    """Bytes by part: of one environment, one transition, one seed's parts, the dataset, and everything."""
    defaults = marvel.Args()
    env = envs.make(name, "mjx", defaults.privileged_critic, defaults.odometer)
    # Evaluations run that many at a time, and the rank diagnostic two for each of its points.
    keys = jax.random.split(jax.random.key(0), max(defaults.eval_episodes, 2 * defaults.rank_points))
    state = jax.eval_shape(lambda keys: env.reset(keys)[0], keys)
    seen = env.obs_size + env.privileged_size
    fields = (seen, env.action_size, 1, 1, seen, 1)
    transition = 4 * sum(fields)

    def learner(key):
        networks, optimizers = training.make_networks(defaults, env), cpq.make_optimizers(defaults)
        params = training.init_params(key, networks, seen)
        return training.init_learner(params | {"log_dual": jnp.float32(0)}, optimizers)

    # Phase 1 has the most: every network, and an optimiser for each.
    learners = size(jax.eval_shape(learner, jax.random.key(0)))
    environments, working = size(state), 0
    if args.working:
        many = jax.ShapeDtypeStruct((args.seeds, len(keys), env.action_size), jnp.float32)
        states = jax.tree.map(lambda x: jax.ShapeDtypeStruct((args.seeds, *x.shape), x.dtype), state)
        compiled = jax.jit(jax.vmap(env.step)).lower(states, many).compile()
        working = compiled.memory_analysis().temp_size_in_bytes
    new = defaults.episodes_per_iter * env.horizon * transition  # between collecting and inserting
    seed = learners + environments + args.buffer_size * transition + new
    return {
        "environment": environments / len(keys),
        "transition": transition,
        "learner": learners,
        "buffer": args.buffer_size * transition,
        "dataset": args.transitions * transition,
        "working": working,
        "all": args.seeds * seed + args.transitions * transition + working,
    }


def main(args: Args) -> None:
    try:
        tasks = [envs.resolve(name) for name in args.tasks]
    except envs.UnknownName as error:
        sys.exit(f"error: {error}")
    print(f"{args.seeds} seeds, a replay buffer of {args.buffer_size:,} and a dataset of {args.transitions:,} transitions\n")
    print(f"{'task':28s}{'environment':>13}{'transition':>12}{'learner/seed':>14}{'buffer/seed':>14}{'dataset':>11}", end="")
    print(f"{'step, all':>12}{'all':>10}{'of the device':>15}")
    for name in tasks:
        found = measure(name, args)
        mega = lambda key, found=found: f"{found[key] / 1e6:,.1f} MB"
        print(f"{name:28s}{found['environment']:>11,.0f} B{found['transition']:>10,} B{mega('learner'):>14}", end="")
        print(f"{mega('buffer'):>14}{mega('dataset'):>11}{mega('working') if args.working else '-':>12}", end="")
        print(f"{found['all'] / 1e9:>7.2f} GB{found['all'] / 1e9 / args.gigabytes:>15.0%}", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Args))
