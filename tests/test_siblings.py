"""algos/: what an algorithm file repeats so that a reader can compare it is the same text; who may import whom; how long files are."""

import ast
import dataclasses
import difflib
import importlib
from pathlib import Path

import pytest

from algos import logbook

ROOT = Path(__file__).resolve().parents[1]
FINETUNERS = ("marvel", "naive_o2o", "jsrl", "pex", "so2", "wsrl", "cal")
OFFLINE = ("cpq", "bear_lag", "bc_safe")
SCRIPTS = (*FINETUNERS, *OFFLINE, "sac_lag")
SHARED = "checkpoint curves diagnostics export finetuning lagrangian logbook networks policy seeds tracking training".split()
OWN = {"Args", "main", "online_phase", "PRESETS"}  # what each file has of its own
DIFFERENT = {("marvel", "critic_loss"): "the entropy terms of pre-alignment have a switch"}


def definitions(script: str) -> dict[str, str]:
    """Top-level functions of a script and their text."""
    text = (ROOT / "algos" / f"{script}.py").read_text()
    return {node.name: ast.get_source_segment(text, node) for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)}


def imported(path: Path) -> set[str]:
    """Dotted names of all modules that a file imports, `from algos import x` and `from . import x` as algos.x."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = path.parent.name if node.level else ""
            module = ".".join(part for part in (package, node.module) if part)
            names |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return names


def test_what_finetuners_repeat_is_the_same_text():
    owners: dict[str, dict[str, str]] = {}
    for script in FINETUNERS:
        for name, text in definitions(script).items():
            if name not in OWN and (script, name) not in DIFFERENT:
                owners.setdefault(name, {})[script] = text
    assert not {name: sorted(copies) for name, copies in owners.items() if len(set(copies.values())) > 1}
    repeated = {name for name, copies in owners.items() if len(copies) > 1}
    assert repeated == {"critic_loss", "actor_loss", "online_step"}  # the rest stands once


def test_every_exception_still_is_one():
    for script, name in DIFFERENT:
        others = [definitions(s).get(name) for s in FINETUNERS if (s, name) not in DIFFERENT]
        assert definitions(script)[name] not in others, (script, name)


@pytest.mark.parametrize("script", SCRIPTS)
def test_algorithms_import_shared_modules_only(script):
    """And the offline algorithm that a finetuner starts from."""
    modules = {name.split(".")[1] for name in imported(ROOT / "algos" / f"{script}.py") if name.startswith("algos.")}
    assert modules <= set(SHARED) | ({"cpq"} if script in FINETUNERS else set())


def test_shared_modules_know_no_finetuner():
    """finetuning.py alone knows the offline algorithms; the others know no algorithm at all."""
    for module in SHARED:
        modules = {name.split(".")[1] for name in imported(ROOT / "algos" / f"{module}.py") if name.startswith("algos.")}
        assert modules & set(SCRIPTS) == (set(OFFLINE) if module == "finetuning" else set()), module


def test_dependencies_point_one_way():
    """algos -> data -> envs, and algos -> envs; results, but for the speed scripts, -> the CSVs only."""
    top = lambda folder, pattern="*.py": {
        name.split(".")[0]: path for path in (ROOT / folder).rglob(pattern) if "packaging" not in path.parts for name in imported(path)
    }
    assert not {"algos", "data", "results"} & top("envs").keys()
    assert not {"algos", "results"} & top("data").keys()
    assert "results" not in top("algos")
    for path in (ROOT / "results").glob("*.py"):
        assert not {"algos", "data", "envs"} & {name.split(".")[0] for name in imported(path)}, path


def test_no_script_is_forgotten():
    assert {p.stem for p in (ROOT / "algos").glob("*.py")} - {"__init__"} == {*SCRIPTS, *SHARED}


def test_files_are_short_and_their_difference_is_the_method():
    lines = {script: (ROOT / "algos" / f"{script}.py").read_text().splitlines() for script in SCRIPTS}
    assert max(map(len, lines.values())) <= 450
    changed = [
        line
        for line in difflib.unified_diff(lines["naive_o2o"], lines["marvel"], n=0)
        if line[0] in "+-" and line[:3] not in ("+++", "---")
    ]
    assert len(changed) <= 160


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_argument_is_explained_and_keeps_its_type(script):
    args = importlib.import_module(f"algos.{script}").Args
    explained: dict[str, str] = {}
    for cls in args.__mro__[:-1]:
        own = cls.__dict__.get("__annotations__", {})
        assert logbook.documented(cls).keys() == own.keys(), cls
        explained |= logbook.documented(cls)
        for parent in cls.__mro__[1:-1]:
            for name in own.keys() & parent.__dict__.get("__annotations__", {}).keys():
                assert own[name] == parent.__annotations__[name], name
    assert explained.keys() == {field.name for field in dataclasses.fields(args)} and all(explained.values())
