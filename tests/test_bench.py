"""results/speed/bench.py: what it counts and writes; nothing here measures time."""

import csv
import importlib.util
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import envs
from algos import logbook

PATH = Path(__file__).resolve().parents[1] / "results" / "speed" / "bench.py"


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("bench", PATH)
    sys.modules["bench"] = module = importlib.util.module_from_spec(spec)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_matrix_products_are_counted_by_hand(bench):
    """(3, 4) x (4, 5): 2 * 60; batched by 7; seven times in a scan; in both branches' larger one, jitted or not."""
    a, b = jnp.ones((3, 4)), jnp.ones((4, 5))
    count = lambda f, *x: bench.matmul_flops(jax.make_jaxpr(f)(*x))
    assert count(jnp.matmul, a, b) == count(jax.jit(jnp.matmul), a, b) == 120
    assert count(jax.vmap(jnp.matmul, (0, None)), jnp.ones((7, 3, 4)), b) == 840
    assert count(lambda x: jax.lax.scan(lambda c, _: (c @ c, None), x, length=7)[0], jnp.ones((4, 4))) == 7 * 128
    assert count(lambda x: x + 1, a) == 0


def test_ratios_say_how_many_times_as_fast(bench):
    assert bench.Row("step", 2.0, "ms", peer=6.0).ratio == 3.0
    assert bench.Row("steps", 600.0, "steps/s", peer=200.0).ratio == 3.0
    assert bench.Row("step", 2.0, "ms").ratio is None
    assert bench.Row("step", 2.0, "ms", floor=0.5).times_floor == 4.0


def test_the_table_can_be_read_again(bench, tmp_path):
    rows = [bench.Row("a, b", 12345.6, "steps/s", peer=5.0, peer_name="other", note="x"), bench.Row("c", 0.25, "ms")]
    bench.write(rows, tmp_path / "t.csv")
    with open(tmp_path / "t.csv", newline="") as file:
        found = list(csv.DictReader(file))
    assert [row["what"] for row in found] == ["a, b", "c"]
    assert float(found[0]["ours"]) == pytest.approx(12345.6, rel=0.01) and float(found[0]["ratio"]) == pytest.approx(2469, rel=0.01)
    assert found[1]["peer"] == found[1]["ratio"] == ""
    assert len(bench.show(rows).splitlines()) == 3
    bench.write([bench.Row("c", 0.5, "ms")], tmp_path / "t.csv")  # a part alone measured again
    with open(tmp_path / "t.csv", newline="") as file:
        assert [(row["what"], row["ours"]) for row in csv.DictReader(file)] == [("c", "0.5"), ("a, b", "12346")]


def test_recorded_runs_replace_those_of_before(bench, tmp_path):
    row = lambda what: bench.Row(what, 1.0, "s")
    bench.write([row("step"), row("whole run, A, seeds 0 to 4"), row("whole run, B, seed 0")], tmp_path / "t.csv")
    bench.write([row("whole run, A, seeds 100 to 104")], tmp_path / "t.csv")
    with open(tmp_path / "t.csv", newline="") as file:
        assert [r["what"] for r in csv.DictReader(file)] == ["whole run, A, seeds 100 to 104", "step"]


def test_a_measurement_replaces_the_old_one_when_it_comes(tmp_path):
    from results.speed import cores, gpu

    read = lambda name: list(csv.DictReader(open(tmp_path / name, newline="")))
    row = lambda backend, rate: {"task": "A", "backend": backend, "steps_per_s": str(rate)}
    table = gpu.Table(tmp_path / "gpu.csv", gpu.COLUMNS)
    for backend in ("mjx", "warp"):
        table.add(row(backend, 1))
    table = gpu.Table(tmp_path / "gpu.csv", gpu.COLUMNS)  # the next time
    assert len(read("gpu.csv")) == 2
    for rate in (2, 3):
        table.add(row("mjx", rate))
    assert [(r["backend"], r["steps_per_s"]) for r in read("gpu.csv")] == [("warp", "1"), ("mjx", "2"), ("mjx", "3")]
    for n, step in ((1, 5), (2, 6), (1, 7)):
        cores.add({"task": "A", "envs": 64, "cores": n, "machine": "M", "step": step}, tmp_path / "cores.csv")
    assert [(r["cores"], r["step"]) for r in read("cores.csv")] == [("2", "6"), ("1", "7")]


def test_good_arguments_are_taken(bench):
    assert logbook.parse(bench.Args, "--only floor --repeats 2".split()).only == ("floor",)


def test_a_missing_peer_is_one_line(bench):
    with pytest.raises(bench.NotMeasured, match="OSRL: not measured: name an interpreter with TORCH="):
        bench.Peer("OSRL", "TORCH", None, "osrl", {"steps": 1}, 1.0)
    with pytest.raises(bench.NotMeasured, match="nowhere"):
        bench.Peer("OSRL", "TORCH", "/nowhere/python", "osrl", {"steps": 1}, 1.0)


def test_a_peer_that_takes_too_long_is_stopped_and_said(bench, tmp_path):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho ready\nread line\necho 0.5\nexec sleep 60\n")
    python.chmod(0o755)
    peer = bench.Peer("OSRL", "TORCH", str(python), "osrl", {"steps": 2}, 2.0)
    assert peer() == 0.25
    with pytest.raises(bench.NotMeasured, match="^OSRL: not measured: no answer within 2 s$"):
        peer()


def test_medians_are_of_rounds_that_alternate_and_a_failure_is_left_out(bench, capsys):
    calls, values = [], {"a": iter([1.0, 9.0, 2.0]), "b": iter([5.0, 4.0, 6.0])}

    def broken():
        raise bench.NotMeasured("c: not measured: gone")

    def measure(name):
        calls.append(name)
        return next(values[name])

    found = bench.alternate({"a": lambda: measure("a"), "c": broken, "b": lambda: measure("b")}, 3)
    assert found == {"a": 2.0, "b": 5.0} and calls == ["a", "b"] * 3
    assert capsys.readouterr().out == "c: not measured: gone\n"


def test_the_online_program_still_fits_marvel(bench):
    """A changed signature in algos/marvel.py must show here; seeds share a program, not its arithmetic."""
    sizes = bench.ONLINE | {"rows": 40, "batch": 8, "hidden": (16, 16)}

    def traced(seeds):  # nothing is compiled
        program, start = bench.online_program(sizes, seeds, 3)
        return program(start, 0)

    one, two = (bench.matmul_flops(jax.make_jaxpr(lambda seeds=seeds: traced(seeds))()) for seeds in (1, 2))
    assert two == 2 * one > 0


@pytest.mark.parametrize("words", ["--repeats 0", "--only everything", "--whole SafetyPointRan", "--out /nowhere/x.csv"])
def test_bad_arguments_are_one_line(bench, words):
    with pytest.raises((logbook.BadInput, envs.UnknownName)) as error:
        logbook.parse(bench.Args, words.split())
    assert "\n" not in str(error.value)


def test_bad_arguments_exit_with_2():
    done = subprocess.run([sys.executable, str(PATH), "--repeats", "0"], capture_output=True, text=True, timeout=170)
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1, done.stderr
