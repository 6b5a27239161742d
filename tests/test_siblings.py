"""algos/*.py: what siblings share is the same text in each, so that a fix cannot miss one; nobody imports a sibling."""

import ast
import importlib
import inspect
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ("marvel", "cpq", "bc_safe", "sac_lag", "naive_o2o", "jsrl", "pex", "so2", "bear_lag")
OWN = {"Args", "main", "Run", "prepare", "online_phase"}  # what each file has of its own
DIFFERENT = {  # (file, name): why its text differs from the siblings'
    ("sac_lag", "build"): "no VAE",
    ("sac_lag", "init_params"): "critics may see more than the policy; a temperature",
    ("sac_lag", "critic_loss"): "a learned temperature",
    ("sac_lag", "actor_loss"): "a learned temperature",
    ("sac_lag", "online_step"): "a learned temperature",
    ("sac_lag", "learn_online"): "episodes do not end all at once",
    ("bc_safe", "build"): "no critics",
    ("bc_safe", "init_params"): "no critics",
    ("bc_safe", "start_phase"): "no critics",
    ("bear_lag", "init_params"): "two dual variables",
    ("bear_lag", "OFFLINE_FIELDS"): "its own recipe",
    ("bear_lag", "OFFLINE_CODE"): "its own recipe",
    ("pex", "replay_checkpoint"): "its policy needs the critics",
    ("cpq", "TUNED"): "offline only",
    ("so2", "TUNED"): "more updates, as its defaults have",
}


def definitions(script: str) -> dict[str, str]:
    """Top-level functions, classes and constants of a script, and their text with decorators."""
    text = (ROOT / "algos" / f"{script}.py").read_text()
    found = {}
    for node in ast.parse(text).body:
        name = getattr(node, "name", None) or (node.targets[0].id if isinstance(node, ast.Assign) else None)
        if name:
            found[name] = "\n".join(ast.unparse(d) for d in getattr(node, "decorator_list", ())) + ast.get_source_segment(text, node)
    return found


def test_copies_are_equal():
    owners: dict[str, dict[str, str]] = {}
    for script in SCRIPTS:
        for name, text in definitions(script).items():
            if name not in OWN and (script, name) not in DIFFERENT:
                owners.setdefault(name, {})[script] = text
    differing = {name: sorted(copies) for name, copies in owners.items() if len(set(copies.values())) > 1}
    assert not differing


def test_every_exception_still_is_one():
    """An entry of DIFFERENT whose text has become the siblings' must go."""
    for script, name in DIFFERENT:
        others = [definitions(s).get(name) for s in SCRIPTS if s != script and (s, name) not in DIFFERENT]
        assert definitions(script)[name] not in others, (script, name)


@pytest.mark.parametrize("script", SCRIPTS)
def test_files_stand_alone(script):
    tree = ast.parse((ROOT / "algos" / f"{script}.py").read_text())
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module == "algos" for alias in node.names}
    modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("algos.")}
    assert imported | {m.removeprefix("algos.") for m in modules} <= {"logbook", "critics", "seeds"}


def test_no_script_is_forgotten():
    scripts = {p.stem for p in (ROOT / "algos").glob("*.py")} - {"__init__", "critics", "seeds", "logbook", "curves"}
    assert scripts == set(SCRIPTS)


@pytest.mark.parametrize("script", SCRIPTS)
def test_shared_arguments_have_one_meaning(script):
    """An argument that two files have has the same type and explanation; only so few have another default."""
    other_default = set(
        "anchor_weight actor_warmup env lagrangian updates_per_iter tau kp ki kd max_multiplier actor_lr dual_lr evals".split()
    )
    fields = lambda name: importlib.import_module(f"algos.{name}").Args.__dataclass_fields__
    ours, reference = fields(script), fields("marvel")
    for name in ours.keys() & reference.keys():
        assert ours[name].type == reference[name].type, name
        if ours[name].default != reference[name].default:
            assert name in other_default, (name, ours[name].default)


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_argument_is_explained(script):
    source = inspect.getsource(importlib.import_module(f"algos.{script}").Args)
    body = ast.parse(source).body[0].body
    for field, text in zip(body[::2], body[1::2], strict=True):
        assert isinstance(field, ast.AnnAssign) and isinstance(text.value.value, str), ast.unparse(field)
