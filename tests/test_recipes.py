"""A checkpoint's recipe names arguments, dataset and a version: whoever changes what an offline learner computes must raise it.

`python tests/test_recipes.py` records the numbers anew (tests/goldens/recipes.json), after RECIPE_VERSION was raised.
"""

import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from algos import bc_safe, bear_lag, cpq, training
from envs.rollout import Batch

GOLDENS = Path(__file__).parent / "goldens" / "recipes.json"
MODULES = {"cpq": cpq, "bear_lag": bear_lag, "bc_safe": bc_safe}
SIZES = ("hidden", "vae_hidden", "offline_steps", "offline_batch_size", "ood_states")
CASES = {name: (name, {}) for name in MODULES}  # name: (module, arguments)
CASES["cpq as released"] = "cpq", {k: v for k, v in cpq.RELEASE.items() if k not in SIZES} | {"privileged_critic": True}
STEPS = 20


def trained(name: str):
    """(learner before, learner after, what was reported) of STEPS gradient steps at small sizes, on transitions made here with NumPy."""
    name, more = CASES[name]
    module, rng = MODULES[name], np.random.default_rng(0)
    env = SimpleNamespace(name="probe", obs_size=3, privileged_size=1, action_size=2, horizon=50)
    n = 200
    obs, action = rng.normal(size=(2, n, 4)).astype(np.float32), np.tanh(rng.normal(size=(n, 2))).astype(np.float32)
    cost, ends = (rng.random((2, n)) < np.array([[0.3], [0.02]])).astype(np.float32)
    data = Batch(*map(jnp.asarray, (obs[0], action, obs[0, :, 0] + action[:, 0], cost, obs[1], ends)))
    args = replace(module.Args(), hidden=(16, 16), offline_steps=STEPS, offline_batch_size=32)
    args = replace(args, vae_hidden=(16,), reward_scale=0.1, ood_states=16) if name == "cpq" else args
    args = replace(args, vae_hidden=(16,), reward_scale=0.1) if name == "bear_lag" else args
    args, kept = replace(args, **more), []

    def pretrain(run, algo, version, recipe, init, step, data, actor):
        train = jax.jit(partial(training.train_on_dataset, step=step, batch_size=args.offline_batch_size, steps=STEPS))
        kept.extend([init(jax.random.key(1)), *train(init(jax.random.key(1)), data, jax.random.key(2))])

    run = training.Run(args, env, None, None, data=data, cloned=jax.tree.map(lambda x: x[:50], data))
    original, training.pretrain = training.pretrain, pretrain
    try:
        module.pretrain(run)
    finally:
        training.pretrain = original
    return kept


def learned(name: str) -> dict[str, float]:
    """What those steps report, where they report anything, and the norms of what they leave behind."""
    _, learner, info = trained(name)
    norm = lambda tree: jnp.sqrt(sum(jnp.square(x).sum() for x in jax.tree.leaves(tree)))
    found = {k: float(v) for k, v in info.items()} | {f"norm {k}": float(norm(v)) for k, v in learner.params.items()}
    return {k: v for k, v in found.items() if v == v}


@pytest.mark.parametrize("name", CASES)
def test_the_same_arguments_give_the_recorded_numbers(name):
    golden, found = json.loads(GOLDENS.read_text())[name], learned(name)
    module = CASES[name][0]
    mend = f"raise RECIPE_VERSION in algos/{module}.py, then run python tests/test_recipes.py"
    assert golden["version"] == MODULES[module].RECIPE_VERSION, mend
    assert found.keys() == golden["numbers"].keys(), mend
    for key, value in golden["numbers"].items():
        assert found[key] == pytest.approx(value, rel=2e-3, abs=1e-4), f"{key} has changed: {mend}"


def test_what_serves_the_penalty_alone_is_left_alone_without_it():
    """OSRL's penalty has no gradient, so neither VAE nor alpha moves a policy or a critic: they are not trained then."""
    before, after, info = trained("cpq as released")
    for name in ("vae", "log_dual"):
        jax.tree.map(np.testing.assert_array_equal, before.params[name], after.params[name])
    assert all((x != y).any() for x, y in zip(*(jax.tree.leaves(learner.params["actor"]) for learner in (before, after))))
    assert np.isnan(info["qc_ood"]) and np.isnan(info["ood_weight"])


@pytest.mark.parametrize("name", MODULES)
def test_a_recipe_names_every_offline_argument(name):
    """All arguments of an offline algorithm's phase are in its recipe, but for the dataset, which counts by its hash."""
    args = MODULES[name].Args
    own = {f for cls in args.__mro__ if cls.__name__ not in ("RunArgs", "EvalArgs", "Args") for f in getattr(cls, "__annotations__", {})}
    assert own - {"dataset"} <= set(MODULES[name].RECIPE) <= set(args.__dataclass_fields__)


if __name__ == "__main__":
    numbers = {name: {"version": MODULES[module].RECIPE_VERSION, "numbers": learned(name)} for name, (module, _) in CASES.items()}
    for name, old in (json.loads(GOLDENS.read_text()) if GOLDENS.exists() else {}).items():
        if old["version"] == numbers[name]["version"] and old["numbers"] != pytest.approx(numbers[name]["numbers"], rel=2e-3, abs=1e-4):
            module = CASES[name][0]
            sys.exit(f"{name} computes other numbers than version {old['version']}: raise RECIPE_VERSION in algos/{module}.py first")
    GOLDENS.write_text(json.dumps(numbers, indent=1) + "\n")
