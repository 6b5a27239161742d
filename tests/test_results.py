"""results/: the CSV reader, the measures, sweep, diff and report, on synthetic results whose answers are known."""

import collections
import importlib
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from algos import bear_lag, logbook
from envs import TASKS, reference
from results import arms, comparisons, csvs, diff, figures, measures, report, sweep, tune

ROOT = Path(__file__).resolve().parents[1]
ENV = "SafetyPointRun"


# ---------------------------------------------------------------- synthetic results


def row(seed, phase, event, gradient_steps=0, env_steps=0, **values):
    blank = {column: math.nan for column in csvs.COLUMNS}
    fixed = {"env": ENV, "algo": "marvel", "seed": seed, "phase": phase, "event": event, "gradient_steps": gradient_steps}
    rest = {"env_steps": env_steps, "cost_limit": 20.0, "config_hash": "c" * 12, "commit": "0" * 12, "dataset_hash": "d" * 12}
    return blank | fixed | rest | values


def seed_rows(seed, final=700.0, cost=10.0, train_cost=15.0, **fixed):
    """Offline return 500 and cost 30, three online evaluations up to `final` and `cost`, 10 blocks of 5 training episodes."""
    rows = [row(seed, "offline", "eval", 100, 0, episodes=20.0, **{"return": 500.0, "cost": 30.0})]
    for phase, q in (("offline", 0.1), ("vpa", 0.6)):
        rows.append(row(seed, phase, "rank", 100, 0, **dict.fromkeys(measures.RANKS, q)))
    for i in range(1, 11):
        steps = dict(gradient_steps=100 + i, env_steps=2500 * i)
        values = {
            "episodes": 5.0,
            "return": 0.0,
            "cost": train_cost,
            "length": 500.0,
            "multiplier": 0.1 * i,
            "kp": 0.001,
            "ki": 0.0001,
            "kd": 0.001,
        }
        rows.append(row(seed, "online", "train", **steps, **values))
        if i % 5 == 0:
            value = 500 + (final - 500) * i / 10
            rows.append(row(seed, "online", "eval", **steps, episodes=20.0, **{"return": value, "cost": cost}))
    return [r | fixed for r in rows]


def about(seeds, **config):
    return {
        "config": {"actor_lr": 0.001, "lagrangian": "apid", **config},
        "dataset": {"safe_return_best": 800.0},
        "runs": [
            {
                "seeds": list(seeds),
                "command": f"algos/marvel.py --env {ENV} --seeds {len(seeds)}",
                "commit": "0" * 12,
                "device": "cpu",
                "seconds": 10.0,
            }
        ],
    }


def make_run(name="marvel", seeds=5, final=700.0, cost=10.0, train_cost=15.0, noise=5.0, config=None, **fixed):
    """A run whose seeds spread by about `noise` around the given values."""
    rng, rows = np.random.default_rng(0), []
    fixed = {"algo": name.split("+")[0]} | fixed
    for seed in range(seeds):
        e = noise * rng.standard_normal(3)
        rows += seed_rows(seed, final + e[0], max(0.0, cost + e[1]), max(0.0, train_cost + e[2]), **fixed)
    return csvs.Run(Path(f"{name}.csv"), name, rows, about(range(seeds), **(config or {})))


def run_folder(run, runs, stamp="20260101-000000", **config):
    """The run folder that training would leave."""
    folder = runs / run.env / run.rows[0]["algo"] / stamp
    folder.mkdir(parents=True)
    path = csvs.write(run, runs / "tmp")
    shutil.move(path, folder / "progress.csv")
    shutil.rmtree(runs / "tmp")
    seeds = {"seed": run.seeds[0], "seeds": len(run.seeds)}
    whole = {"algo": run.rows[0]["algo"], "env": run.env, "config": run.about["config"] | seeds | config, "config_hash": "c" * 12}
    whole |= {"dataset": run.about["dataset"], "command": run.about["runs"][0]["command"], "seconds": 10.0}
    (folder / "config.json").write_text(json.dumps(whole))
    return folder


def run_diff(capsys, *arguments):
    code = diff.main([str(a) for a in arguments])
    return code, capsys.readouterr().out


# ---------------------------------------------------------------- the reader


def test_columns_are_those_of_the_logbook():
    assert csvs.COLUMNS == logbook.COLUMNS


def test_names_of_tasks_are_those_of_envs():
    assert csvs.IDS == {task.reference_id: name for name, task in TASKS.items()}
    assert all(csvs.task(name) == name for name in (*TASKS, "SafetyPointGoal1-v0", "own_env:Corridor-v0", "bullet/SafetyBallRun"))
    assert csvs.task("bullet/SafetyBallRun-v0") == "bullet/SafetyBallRun"
    for name in ("SafetyPointGoal1-v0", "own_env:Corridor-v0", "bullet/SafetyBallRun", "SafetyPointGoal1", "Typo", "Typo-v0", ""):
        assert csvs.can_be_task(name) == reference.wanted(name, None, {*csvs.IDS, *TASKS})
    assert all(csvs.can_be_task(name) for name in TASKS)


def test_a_command_is_recorded_as_a_shell_reads_it(tmp_path, monkeypatch):
    words = ["--dataset", "my data.hdf5", "--runs", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["/somewhere/algos/cpq.py", *words])
    book = logbook.Logbook("cpq", ENV, {"checkpoint_seconds": 60.0, "runs": tmp_path, "resume": False, "track": "none"}, [0])
    assert shlex.split(json.loads((book.folder / "config.json").read_text())["command"]) == ["algos/cpq.py", *words]


@pytest.mark.parametrize("place", ["'/my work/runs'", "/my work/runs", "/john's/runs"])  # the last two as they were recorded once
def test_what_a_baseline_says_of_its_command(tmp_path, place):
    folder = run_folder(make_run(), tmp_path)
    config = json.loads((folder / "config.json").read_text())
    command = f"algos/marvel.py --resume --env X --runs {place} --dataset a.hdf5 --checkpoint-seconds=5 --reserve 0 --track wandb"
    (folder / "config.json").write_text(json.dumps(config | {"command": command}))
    assert csvs.load(folder).about["runs"][0]["command"] == "algos/marvel.py --env X --dataset a.hdf5 --reserve 0"


def test_writing_and_reading_keeps_every_value(tmp_path):
    run = make_run()
    path = csvs.write(run, tmp_path)
    assert path == tmp_path / ENV / "marvel.csv"
    again = csvs.load(path)
    assert again.key == (ENV, "marvel", 20.0) and again.seeds == [0, 1, 2, 3, 4] and again.about == run.about
    for old, new in zip(run.rows, again.rows, strict=True):
        for column in csvs.COLUMNS:
            same = (
                old[column] == new[column]
                if isinstance(old[column], str | int)
                else np.isclose(old[column], new[column], 1e-5, equal_nan=True)
            )
            assert same, column
    assert csvs.write(again, tmp_path / "b").read_bytes() == path.read_bytes()


def test_a_file_from_before_a_column_was_added_is_read(tmp_path):
    kept = [column for column in csvs.COLUMNS if column not in csvs.LATER]
    row = dict.fromkeys(kept, "") | dict(env=ENV, algo="marvel", seed=0, phase="online", event="eval", gradient_steps=1, env_steps=1)
    row |= {"return": 1, "cost": 2, "cost_limit": 20}
    (tmp_path / "x.csv").write_text(",".join(kept) + "\n" + ",".join(str(row[column]) for column in kept) + "\n")
    (found,) = csvs.read(tmp_path / "x.csv")
    assert found["cost"] == 2 and math.isnan(found["share_above"])


HEADER = ",".join(csvs.COLUMNS)
GOOD = f"{ENV},marvel,0,online,eval,10,100,5,1.5,2,500,,,,,,,,,,,,,,,,,,,,,20.0,abc,def,123"
BAD = [
    ("", "column env"),
    ("x,y\n1,2\n", "column env"),
    (HEADER.replace(",cost,", ",") + "\n", "column cost"),
    (HEADER.replace("kp", "seed") + "\n", "column seed"),
    (HEADER + "\n", "no rows"),
    (f"{HEADER}\n{GOOD.rsplit(',', 2)[0]}\n", "row 2 has 33 fields"),
    (f"{HEADER}\n{GOOD},7\n", "row 2 has 36 fields"),
    (f"{HEADER}\n{GOOD.replace('1.5', 'abc')}\n", "return is 'abc', not a number"),
    (f"{HEADER}\n{GOOD.replace('1.5', '1_5')}\n", "return is '1_5', not a number"),
    (f"{HEADER}\n{GOOD.replace('1.5', 'nan')}\n", "return is nan, not finite"),
    (f"{HEADER}\n{GOOD.replace('1.5', '1e999')}\n", "return is 1e999, not finite"),
    (f"{HEADER}\n{GOOD.replace('1.5', '')}\n", "eval row without return"),
    (f"{HEADER}\n{GOOD.replace(',0,online', ',-1,online')}\n", "seed is '-1', not a whole number"),
    (f"{HEADER}\n{GOOD.replace(',0,online', ',1.5,online')}\n", "seed is '1.5'"),
    (f"{HEADER}\n{GOOD.replace(',100,', ',,')}\n", "env_steps is ''"),
    (f"{HEADER}\n{GOOD.replace('eval', 'evil')}\n", "event 'evil' is none of"),
    (f"{HEADER}\n{GOOD.replace('marvel', '')}\n", "algo is empty"),
    (f"{HEADER}\n{GOOD}\n{GOOD}\n", "row 3 repeats row 2"),
    (f"{HEADER}\n{GOOD}\n{GOOD.replace(ENV, 'Other').replace('10,100', '11,100')}\n", "several values of env"),
    (f"{HEADER}\n{GOOD}\n{GOOD.replace('20.0', '40.0').replace('10,100', '11,100')}\n", "several values of cost_limit"),
    (f"{HEADER}\n{GOOD}\n".encode() + b"\xff\xfe", "not a readable CSV"),
    (f'{HEADER}\n"{GOOD}', "not a readable CSV"),
    (f"{HEADER}\n{GOOD}\n".encode("utf-16"), "not a readable CSV"),
]


@pytest.mark.parametrize("content, message", BAD)
def test_a_bad_csv_is_one_clear_line(tmp_path, content, message):
    path = tmp_path / "x.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(csvs.BadInput) as found:
        csvs.read(path)
    assert message in str(found.value) and str(path) in str(found.value) and "\n" not in str(found.value)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_fuzz_the_reader_reads_or_refuses(tmp_path_factory, data):
    """Whatever the bytes: rows of the promised types, or BadInput in one line; never anything else."""
    content = bytearray(f"{HEADER}\r\n{GOOD}\r\n{GOOD.replace('10,100', '11,200')}\r\n".encode())
    if data.draw(st.booleans()):
        for _ in range(data.draw(st.integers(1, 6))):
            at, piece = (
                data.draw(st.integers(0, len(content))),
                data.draw(st.binary(max_size=6) | st.sampled_from([b",", b"\n", b'"', b"inf", b"-", b"\0"])),
            )
            content[at : at + data.draw(st.integers(0, 6))] = piece
    else:
        content = data.draw(st.binary(max_size=300))
    path = tmp_path_factory.getbasetemp() / "fuzz.csv"
    path.write_bytes(content)
    try:
        rows = csvs.read(path)
    except csvs.BadInput as error:
        assert "\n" not in str(error)
        return
    for r in rows:
        assert r.keys() == set(csvs.COLUMNS) and r["event"] in csvs.EVENTS and r["seed"] >= 0
        assert all(isinstance(r[c], str if c in csvs.TEXT else int if c in csvs.COUNTS else float) for c in csvs.COLUMNS)
    measures.per_seed(csvs.Run(path, "marvel", rows, {}))


def test_a_torn_json_beside_a_csv_is_one_line(tmp_path):
    path = csvs.write(make_run(), tmp_path)
    path.with_suffix(".json").write_text('{"config": {')
    with pytest.raises(csvs.BadInput, match="marvel.json: not the JSON"):
        csvs.load(path)


def test_a_control_is_recognised_by_its_arguments():
    assert csvs.variant("marvel", {"critics": "fresh", "vpa_alpha_reward": 0.002}) == "marvel+fresh"
    assert csvs.variant("marvel", {"vpa_alpha_reward": 0.0, "vpa_alpha_cost": 0.0, "critics": "pretrained"}) == "marvel+fqe"
    assert csvs.variant("marvel", {"vpa_alpha_reward": 0.0, "vpa_alpha_cost": 0.1}) == "marvel"
    assert csvs.variant("sac_lag", {}) == "sac_lag"


# ---------------------------------------------------------------- the measures


def test_measures_of_a_run_worked_out_by_hand():
    rows = [row(0, "offline", "eval", 100, 0, episodes=5.0, **{"return": 100.0, "cost": 50.0})]
    for i, cost in enumerate([60.0, 10.0, 30.0, 10.0, 10.0, 10.0, 10.0, 10.0, 100.0], 1):
        rows.append(row(0, "online", "train", 100 + i, 500 * i, episodes=5.0, length=100.0, cost=cost))
    rows += [
        row(0, "online", "eval", 110, steps, episodes=5.0, **{"return": r, "cost": c})
        for steps, r, c in ((1500, 400.0, 1.0), (4500, 200.0, 2.0))
    ]
    found = {key: values[0] for key, values in measures.per_seed(csvs.Run(Path("x"), "marvel", rows, {})).items()}
    assert (found["offline_return"], found["offline_cost"], found["return"], found["cost"]) == (100, 50, 200, 2)
    assert found["auc"] == pytest.approx((1500 * 250 + 3000 * 300) / 4500)
    assert (found["training_episodes"], found["training_cost"]) == (45, 5 * 250)
    assert (found["train_cost"], found["early_cost"]) == (pytest.approx(250 / 9), (60 + 10) / 2)  # a fifth of nine rows: two
    assert found["regret"] == 5 * (40 + 10 + 80)
    assert found["episodes_to_safe"] == 5  # mean of 10 30 10 10 is 15
    assert math.isinf(found["episodes_to_stay"])  # the last window holds 100


def test_regret_does_not_depend_on_how_training_episodes_are_grouped_below_the_block():
    fine = [
        row(0, "online", "train", i, 500 * i, episodes=1.0, length=500.0, cost=c) for i, c in enumerate([0.0, 100.0, 0.0, 0.0, 0.0] * 2, 1)
    ]
    coarse = [row(0, "online", "train", i, 2500 * i, episodes=5.0, length=500.0, cost=20.0) for i in (1, 2)]
    a, b = (measures.per_seed(csvs.Run(Path("x"), "marvel", rows, {})) for rows in (fine, coarse))
    assert a["regret"] == b["regret"] == 0 and a["training_cost"] == b["training_cost"] == 200


@pytest.mark.parametrize("n", [5, 10, 20])
@pytest.mark.parametrize("skewed", [False, True], ids=["normal", "lognormal"])
def test_intervals_cover_the_mean(n, skewed):
    """At least 90% of the 95% intervals, of skewed values too (sigma 1: Student's t covers 80%, 84%, 87%); less what 1,000 draws allow."""
    rng, mean = np.random.default_rng(1), math.exp(0.5) if skewed else 0.0
    draw = (lambda: rng.lognormal(size=n)) if skewed else (lambda: rng.standard_normal(n))
    inside = [low <= mean <= high for low, high in (measures.interval(draw()) for _ in range(1000))]
    assert np.mean(inside) > 0.90 - 2 * math.sqrt(0.9 * 0.1 / 1000)


def test_intervals_of_differences_cover_them():
    rng = np.random.default_rng(2)
    draws = [(rng.standard_normal(10), 3 + 2 * rng.standard_normal(5)) for _ in range(500)]
    inside = [low <= 3 <= high for low, high in (measures.difference(a, b) for a, b in draws)]
    assert np.mean(inside) > 0.92


def test_intervals_of_few_or_equal_values():
    assert measures.interval([3.0, 3.0, 3.0]) == (3.0, 3.0)
    assert all(map(math.isnan, measures.interval([3.0, math.nan])))
    assert measures.difference([1.0, 1.0], [3.0, 3.0]) == (2.0, 2.0)
    low, high = measures.interval([0.0, 0.0, 0.0, 0.0, 100.0])
    assert low < 20 < high < math.inf
    low, high = measures.interval([0.0, -1.0, 699.0, 1.0, 98.0])  # one learned, and some did not
    assert -1000 < low < 159 < high < 2000


def test_wilson_interval_of_a_share():
    """9 of 10, by the formula: (p + z^2/2n +- z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n)."""
    z, n, p = 1.959964, 10, 0.9
    middle, half = p + z**2 / (2 * n), z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    assert measures.share(9, 10) == pytest.approx(((middle - half) / (1 + z**2 / n), (middle + half) / (1 + z**2 / n)), rel=1e-6)
    assert measures.share(10, 10)[1] == 1 and all(map(math.isnan, measures.share(0, 0)))


def test_other_tasks_widen_the_interval():
    """Two tasks that disagree wholly: of others nothing is known."""
    tasks = [(np.ones(5), np.zeros(5)), (np.zeros(5), np.ones(5))]
    p, low, high = measures.improvement(tasks)
    assert p == 0.5 and 0.2 < low < 0.5 < high < 0.8
    assert measures.improvement(tasks, other_tasks=True) == (0.5, 0.0, 1.0)
    assert math.isnan(measures.improvement(tasks[:1], other_tasks=True)[1])


def test_the_interval_for_other_tasks_covers_their_mean():
    """Four tasks whose probabilities are drawn evenly from 0.3 to 0.9, ten seeds each; nominally 95%."""
    rng = np.random.default_rng(4)
    shift = lambda: math.sqrt(2) * scipy.stats.norm.ppf(rng.uniform(0.3, 0.9))  # P(x > y) of unit normals
    draw = lambda: [(rng.standard_normal(10) + shift(), rng.standard_normal(10)) for _ in range(4)]
    inside = [low <= 0.6 <= high for _, low, high in (measures.improvement(draw(), other_tasks=True) for _ in range(200))]
    assert np.mean(inside) > 0.90 - 2 * math.sqrt(0.9 * 0.1 / 200)


def test_the_interval_of_a_probability_is_newcombes():
    """Five above five: the lower limit q solves 1 - q = z sqrt(var(q)), with Hanley and McNeil's variance; at 1/2 that is Mann-Whitney's."""
    q1, q2 = lambda q: q / (2 - q), lambda q: 2 * q * q / (1 + q)  # two seeds of x above one of y, one of x above two of y
    variance = lambda q: (q * (1 - q) + 4 * (q1(q) - q * q) + 4 * (q2(q) - q * q)) / 25
    assert variance(0.5) == pytest.approx((5 + 5 + 1) / (12 * 25))
    p, low, high = measures.superiority(np.arange(5.0) + 10, np.arange(5.0))
    assert (p, high) == (1, 1) and 1 - low == pytest.approx(1.959964 * math.sqrt(variance(low)), rel=1e-5)
    assert measures.superiority(np.arange(5.0), np.arange(5.0) + 10) == pytest.approx((0, 0, 1 - low))


def test_intervals_of_tasks_are_put_together():
    assert measures.over_tasks([(0.5, 0.2, 0.6), (0.7, 0.3, 0.9)]) == pytest.approx((0.6, 0.6 - 0.25, 0.6 + math.hypot(0.1, 0.2) / 2))


@pytest.mark.parametrize("tasks, seeds", [(1, 5), (1, 20), (4, 5)])
def test_verdicts_without_a_difference_are_rare(tasks, seeds):
    """Nominally 5%, of at most 8% what 400 draws allow; the percentile bootstrap had 11% with one task of five seeds."""
    rng = np.random.default_rng(3)
    draw = lambda: [(rng.standard_normal(seeds), rng.standard_normal(seeds)) for _ in range(tasks)]
    told = [not low <= 0.5 <= high for _, low, high in (measures.improvement(draw()) for _ in range(400))]
    assert np.mean(told) < 0.08 + 2 * math.sqrt(0.08 * 0.92 / 400)
    moved = [not low <= 0 <= high for _, low, high in (measures.stratified_mean([x for x, _ in draw()]) for _ in range(100))]
    assert np.mean(moved) < 0.08 + 2 * math.sqrt(0.08 * 0.92 / 100)


def test_the_median_of_an_even_number_of_seeds():
    assert measures.median([1.0, 4.0, math.nan, 2.0, math.inf]) == 3 and math.isinf(measures.median([1.0, math.inf]))
    assert math.isnan(measures.median([math.nan]))


def test_aggregates_worked_out_by_hand():
    middle, low, high = measures.iqm([np.array([0.0, 1.0]), np.array([2.0, 100.0])])
    assert middle == 1.5 and low <= 1.5 <= high
    # Tasks count the same, whatever their numbers of seeds: the middle half of 0, 0, 1, 1 and 2, 3, 4, 5.
    assert measures.iqm([np.array([0.0, 1.0]), np.array([2.0, 3.0, 4.0, 5.0])])[0] == (1 + 1 + 2 + 3) / 4
    # Numbers of seeds without a common divisor, as after divergences, against every score repeated until all tasks have as many.
    sizes, rng = (5, 4, 3), np.random.default_rng(0)
    tasks = [rng.normal(size=n) for n in sizes]
    repeated = np.sort(np.concatenate([np.repeat(x, 60 // len(x)) for x in tasks]))
    assert measures.iqm(tasks)[0] == pytest.approx(repeated[45:135].mean())
    many = measures.iqm([np.arange(n, dtype=float) for n in (20, 19, 17, 18, 10)])
    assert many[1] < many[0] < many[2]
    p, low, high = measures.improvement([(np.array([1.0, 3.0]), np.array([2.0, 3.0])), (np.array([5.0]), np.array([1.0]))])
    assert p == pytest.approx(((0 + 0 + 1 + 0.5) / 4 + 1) / 2) and low <= p <= high
    shares, low, high = measures.profile([np.array([0.0, 1.0]), np.array([2.0, -math.inf])], [-1.0, 0.5, 1.0, 2.0])
    assert shares.tolist() == [0.75, 0.5, 0.25, 0.0] and (low <= shares).all() and (shares <= high).all()
    assert (low[0], high[0], high[-1]) == (0.5, 1.0, 0.0)  # at -1 one seed of the second task alone decides; nothing is above 2
    x, y = measures.as_numbers(measures.constrained_order([900, 100], [30, 5], 20), measures.constrained_order([50, 999], [20, 25], 20))
    assert list(np.argsort(np.concatenate([x, y]))) == [0, 3, 2, 1]  # cost 30, cost 25, safe 50, safe 100


# ---------------------------------------------------------------- diff


@pytest.fixture
def place(tmp_path):
    csvs.write(make_run(), tmp_path / "results")
    return tmp_path


def fresh_against_baseline(place, capsys, run, *more):
    run_folder(run, place / "runs")
    return run_diff(capsys, "--runs", place / "runs", "--results", place / "results", *more)


def test_identical_runs_are_the_same(place, capsys):
    code, out = fresh_against_baseline(place, capsys, make_run())
    assert code == 0 and out.count("same") == 4 and "0 worse of 4" in out and "*" not in out


@pytest.mark.parametrize(
    "changed, verdicts, code",
    [
        (dict(final=300.0), {"return": "worse", "auc": "worse", "cost": "same", "training_cost": "same"}, 1),
        (dict(final=900.0), {"return": "better", "auc": "better", "cost": "same", "training_cost": "same"}, 0),
        (dict(cost=90.0), {"return": "same", "auc": "same", "cost": "worse", "training_cost": "same"}, 1),
        (dict(cost=0.0, train_cost=0.0), {"return": "same", "auc": "same", "cost": "same", "training_cost": "same"}, 0),
        (dict(train_cost=60.0), {"return": "same", "auc": "same", "cost": "same", "training_cost": "worse"}, 1),
        (dict(final=703.0), {"return": "same", "auc": "same", "cost": "same", "training_cost": "same"}, 0),
    ],
)
def test_a_shift_beyond_the_interval_is_told(place, capsys, changed, verdicts, code):
    found, out = fresh_against_baseline(place, capsys, make_run(**changed))
    assert found == code
    for measure, verdict in verdicts.items():
        assert re.search(rf"  {measure} .* {verdict}$", out, re.MULTILINE), (measure, out)


def test_a_shift_within_the_spread_of_seeds_is_no_verdict(tmp_path, capsys):
    csvs.write(make_run(noise=200.0), tmp_path / "results")
    code, out = fresh_against_baseline(tmp_path, capsys, make_run(noise=200.0, final=600.0))
    assert code == 0 and "worse" not in out.replace("0 worse of", "")


def test_a_difference_within_the_margin_is_none():
    """1 of 100 with a margin of 2%, though the interval excludes 0."""
    judge = lambda new, low, high: diff.judge(100.0, new, low, high, None, 0.02)
    assert judge(101.0, 0.5, 1.5) == judge(99.0, -1.5, -0.5) == "same"
    assert (judge(105.0, 4.0, 6.0), judge(95.0, -6.0, -4.0)) == ("better", "worse")


def test_what_is_not_alike_is_named(place, capsys):
    other = make_run(seeds=3, config={"actor_lr": 0.5}, dataset_hash="e" * 12)
    code, out = fresh_against_baseline(place, capsys, other)
    assert "fewer seeds in the fresh run: 5 -> 3" in out and f"other dataset: {'d' * 12} -> {'e' * 12}" in out
    assert "other configuration: actor_lr 0.001 -> 0.5" in out and "same *" in out
    more = make_run(seeds=6)
    assert "fewer seeds in the baseline: 5 -> 6" in diff.cautions(make_run(), more)
    limit = make_run(cost_limit=40.0)
    assert "other cost limit: 20 -> 40" in diff.cautions(make_run(), limit)
    path = csvs.write(limit, place / "results")
    assert path.name == "marvel@40.csv"
    path.with_suffix(".json").unlink()
    code, out = run_diff(capsys, place / "results" / ENV / "marvel.csv", path)
    assert "other cost limit: 20 -> 40" in out


def test_one_seed_is_unclear_and_missing_and_new_are_named(place, capsys):
    csvs.write(make_run("cpq"), place / "results")
    run_folder(make_run("sac_lag"), place / "runs", "20260101-000001")
    code, out = fresh_against_baseline(place, capsys, make_run(seeds=1, final=0.0))
    assert code == 0 and "unclear" in out
    assert re.search(r"cpq +5 -> - .*missing", out) and re.search(r"sac_lag +- -> 5 .*new", out)


def test_a_name_that_nothing_is_of_is_refused(place, capsys):
    run_folder(make_run(), place / "runs")
    with pytest.raises(csvs.BadInput, match="--algos pexx: neither a finished run in .* nor a baseline in .* is of it"):
        run_diff(capsys, "--runs", place / "runs", "--results", place / "results", "--algos", "marvel", "pexx")


def test_a_file_of_arguments_may_hold_several_on_a_line(tmp_path):
    (tmp_path / "my.args").write_text("--envs A 'B C' # comment\n\n--seeds 3\n")
    parser = csvs.Parser("")
    parser.add_argument("--envs", nargs="+")
    parser.add_argument("--seeds", type=int)
    assert vars(parser.parse_args([f"@{tmp_path / 'my.args'}"])) == {"envs": ["A", "B C"], "seeds": 3}


def test_more_diverged_seeds_are_worse(place, capsys):
    run = make_run()
    lost = [r for r in run.rows if r["seed"] != 3] + seed_rows(3)[:4] + [row(3, "online", "diverged", 102, 5000)]
    code, out = fresh_against_baseline(place, capsys, csvs.Run(run.path, run.name, lost, run.about))
    assert code == 1 and re.search(r"diverged seeds +0 +1 +worse", out)
    assert "diverged in the fresh run: seed 3 (online, step 102)" in out


def test_accept_merges_seeds_of_the_same_configuration_and_replaces_others(place, capsys):
    run_folder(make_run(seeds=2, final=650.0), place / "runs", "20260101-000000")
    arguments = ["--runs", place / "runs", "--results", place / "results"]
    assert run_diff(capsys, *arguments, "--accept") == (0, f"{ENV}/marvel.csv: seeds 0 1, kept 2 3 4\n")
    merged = csvs.load(place / "results" / ENV / "marvel.csv")
    assert merged.seeds == [0, 1, 2, 3, 4] and [part["seeds"] for part in merged.about["runs"]] == [[0, 1], [2, 3, 4]]
    assert measures.per_seed(merged)["return"][2] == pytest.approx(measures.per_seed(make_run())["return"][2], rel=1e-5)
    assert measures.per_seed(merged)["return"][0] < 670 < measures.per_seed(make_run())["return"][0]
    run_folder(make_run(seeds=2, config={"actor_lr": 0.5}), place / "runs", "20260101-000001")
    kept = (place / "results" / ENV / "marvel.csv").read_bytes()
    with pytest.raises(csvs.BadInput, match="of another configuration .* whose seeds 0 1 2 3 4 would be lost: .*--replace"):
        run_diff(capsys, *arguments, "--accept")
    assert (place / "results" / ENV / "marvel.csv").read_bytes() == kept
    run_diff(capsys, *arguments, "--accept", "--replace")
    assert csvs.load(place / "results" / ENV / "marvel.csv").seeds == [0, 1]
    code, out = run_diff(capsys, *arguments)
    assert code == 0 and out.count("same") == 4


def test_a_run_on_another_dataset_is_another_experiment(place, capsys):
    """Its seeds do not join those of the baseline, and do not replace more of them unasked."""
    run_folder(make_run(seeds=2, dataset_hash="e" * 12), place / "runs")
    arguments = ["--runs", place / "runs", "--results", place / "results", "--accept"]
    with pytest.raises(csvs.BadInput, match="of another configuration or dataset .* whose seeds 0 1 2 3 4 would be lost"):
        run_diff(capsys, *arguments)
    assert run_diff(capsys, *arguments, "--replace")[1].endswith("seeds 0 1, replaces another configuration, dataset or kind of seeds\n")
    accepted = csvs.load(place / "results" / ENV / "marvel.csv")
    assert accepted.seeds == [0, 1] and accepted.dataset_hashes == ["e" * 12]


def test_defaults_of_an_offline_algorithm_that_is_not_used_are_no_other_experiment():
    assert csvs.BEAR == {name for name in bear_lag.BearArgs.__annotations__}
    old, new = (make_run(config={"offline": "cpq", "mmd_sigma": sigma}) for sigma in (1.0, 50.0))
    assert csvs.same_experiment(old, new)
    old, new = (make_run(config={"offline": "bear_lag", "mmd_sigma": sigma}) for sigma in (1.0, 50.0))
    assert not csvs.same_experiment(old, new)


def test_a_row_of_mixed_code_is_told_when_accepted_compared_and_reported(place, capsys):
    """The run was begun at one commit and went on at another (--resume)."""
    old, new = "0" * 12, "1" * 12 + "+"
    mixed = lambda r: r | ({"commit": new} if r["seed"] < 2 and r["phase"] == "online" else {})
    run = make_run(seeds=3, final=650.0)
    folder = run_folder(replace(run, rows=[mixed(r) for r in run.rows]), place / "runs", "20260101-000000")
    config = json.loads((folder / "config.json").read_text()) | {"commit": old, "resumed": [{"commit": new}]}
    (folder / "config.json").write_text(json.dumps(config))
    arguments = ["--runs", place / "runs", "--results", place / "results"]
    line = f"seeds 0 1 are of several commits, resumed in between: {old} -> {new}"
    assert f"marvel: in the fresh run {line}" in run_diff(capsys, *arguments)[1]
    assert run_diff(capsys, *arguments, "--accept") == (0, f"{ENV}/marvel.csv: seeds 0 1 2, kept 3 4\n  warning: {line}\n")
    assert f"(seeds 0 1 2; commit {old}, resumed at {new}; None; 10 s)" in report.report(place / "results")
    capsys.readouterr()
    sweep.warn_of_other_commits(sweep.parse(["--runs", str(place / "runs"), "--envs", ENV]))
    assert "1 finished run(s)" in capsys.readouterr().out


def test_fresh_runs_of_one_configuration_are_put_together(tmp_path):
    first, second = make_run(seeds=3), make_run(seeds=2, final=100.0)
    later = csvs.Run(second.path, second.name, [r | {"seed": r["seed"] + 2} for r in second.rows], about([2, 3]))
    run_folder(first, tmp_path, "20260101-000000")
    run_folder(later, tmp_path, "20260101-000001")
    run_folder(make_run(seeds=5, config={"actor_lr": 9.0}), tmp_path, "20250101-000001")
    unfinished = run_folder(make_run(seeds=5), tmp_path, "20270101-000001")
    config = json.loads((unfinished / "config.json").read_text())
    del config["seconds"]
    (unfinished / "config.json").write_text(json.dumps(config))
    ((_, run),) = csvs.fresh(tmp_path).items()
    assert run.seeds == [0, 1, 2, 3]
    returns = measures.per_seed(run)["return"]
    assert (returns[:2] > 600).all() and (returns[2:] < 200).all()  # the newest of seed 2 counts
    run_folder(make_run(seeds=5, config={"actor_lr": 9.0}), tmp_path / csvs.TRIES, "20280101-000001")  # a try is no result
    assert [run.seeds for run in csvs.fresh(tmp_path).values()] == [[0, 1, 2, 3]]
    assert [run.seeds for run in csvs.fresh(tmp_path / csvs.TRIES).values()] == [[0, 1, 2, 3, 4]]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["nowhere.csv", "nothing.csv"], "nowhere.csv: no such file"),
        (["one.csv"], "name two files"),
        (["--runs", "nowhere"], "nowhere: no finished run"),
        (["--confidence", "1"], "--confidence must be between"),
        (["--confidence", "x"], "invalid float value"),
        (["--frobnicate"], "unrecognized arguments"),
    ],
)
def test_diff_refuses_bad_input_in_one_line(tmp_path, arguments, message, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(lambda: diff.main(arguments), message, capsys)


def refused(main, message, capsys):
    with pytest.raises(SystemExit) as left:
        csvs.command(main)
    out, err = capsys.readouterr()
    assert left.value.code == 2 and message in err and err.startswith("error: ") and err.count("\n") == 1 and not out


# ---------------------------------------------------------------- report


def test_report_says_what_the_numbers_say(tmp_path):
    diverged = make_run("jsrl", seeds=2)
    rows = [r for r in diverged.rows if r["phase"] == "offline"] + [row(s, "online", "diverged", 777, 5000, algo="jsrl") for s in (0, 1)]
    for run in (
        make_run("marvel"), make_run("marvel+fqe", final=400.0), make_run("marvel+pid", final=900.0), make_run("marvel+pid10"),
        make_run("sac_lag", final=1000.0, cost=80.0, train_cost=80.0), make_run("marvel+bare", final=800.0, train_cost=60.0),
        csvs.Run(Path("jsrl.csv"), "jsrl", rows, diverged.about),
        make_run("cpq", cost_limit=40.0, env="bullet/SafetyBallRun"),
    ):  # fmt: skip
        csvs.write(run, tmp_path)
    text = report.report(tmp_path)
    claim = lambda words: next(line for line in text.splitlines() if words in line and line.startswith("|"))
    assert claim("P(better than Marvel, plain fitted Q)").endswith("| supported |")
    assert claim("P(better than Marvel, fixed PID)").endswith("| contradicted |")
    assert claim("P(better than SAC-Lag from scratch)").endswith("| supported |")  # unsafe loses, whatever its return
    assert claim("P(better than SAC-Lag from scratch)").split(" | ")[3:5] == ["**1.00 [0.64, 1.00]**", "0.00 [0.00, 0.36]"]
    bare = claim("make Marvel's training safer")  # judged by the violation regret, not by the end
    assert bare.split(" | ")[3:] == ["0.00 [0.00, 0.36]", "0.00 [0.00, 0.36]", "**1.00 [0.64, 1.00]**", "supported |"]
    assert claim("P(better than PEX)").endswith("| no data |")
    assert claim("makes Qc rank actions").split(" | ")[3] == "**0.50 [0.50, 0.50]**"
    assert claim("Marvel ends safe").endswith("| 1 (5) | **5 of 5 [0.57, 1.00]** | - | - | - |")
    line = claim("| JSRL | 0 + 2 diverged")
    assert "diverged (online, step 777)" in line
    assert (
        "Missing: CPQ (offline); BC-Safe (offline); the clone of what CPQ clones (offline); BEAR-Lag (offline); naive finetuning; PEX"
        in text
    )
    assert "# Cost limit 40" in text and "(bullet/SafetyBallRun/learning@40.png)" in text
    assert f"`python algos/marvel.py --env {ENV} --seeds 5`" in text
    figures = re.findall(r"!\[.*?\]\((.*?)\)", text)
    assert len(figures) >= 6
    for figure in figures:
        content = (tmp_path / figure).read_bytes()
        assert content[:4] == b"\x89PNG" and len(content) < 150_000, figure


def test_figures_over_tasks_compare_the_same_tasks_and_seeds(tmp_path, monkeypatch):
    """Marvel ran on a second task and with more seeds, a control on that task only: neither changes what the figures compare."""
    for name in arms.PLAIN:
        csvs.write(make_run(name), tmp_path)
    drawn = []
    monkeypatch.setattr(figures, "draw_aggregate", lambda shown, path: drawn.append(shown) or True)
    monkeypatch.setattr(figures, "draw_profiles", lambda tasks, best_of, path: drawn.append(tasks) or True)
    text = report.report(tmp_path)
    assert f"Tasks (seeds): {ENV} (5)." in text
    shutil.rmtree(tmp_path / ENV)
    for name in arms.PLAIN:
        csvs.write(make_run(name, seeds=7 if name == "marvel" else 5), tmp_path)
    for name, final in (("marvel", 100.0), ("marvel+pid", 900.0)):
        csvs.write(make_run(name, final=final, env="SafetyCarRun"), tmp_path)
    assert f"Tasks (seeds): {ENV} (5)." in report.report(tmp_path)
    assert drawn[0] == drawn[2] and {name for name, *_ in drawn[0]} == set(arms.PLAIN)
    seeds = [{env: {name: run.seeds for name, run in task.items()} for env, task in tasks.items()} for tasks in drawn[1::2]]
    assert seeds[0] == seeds[1] == {ENV: {name: [0, 1, 2, 3, 4] for name in arms.PLAIN}}


def test_two_algorithms_are_compared_on_the_seeds_that_both_have():
    """A seed of one algorithm alone would tilt the comparison; other offline evaluations tell of other checkpoints."""
    marvel, pex = make_run("marvel", seeds=4), make_run("pex", seeds=2, final=900.0)
    later = [r | {"return": r["return"] + 1000.0} for r in marvel.rows if r["seed"] > 1]
    compared = lambda run: comparisons.compared({ENV: {"marvel": run, "pex": pex}}, "marvel", "pex")
    better = replace(marvel, rows=[r for r in marvel.rows if r["seed"] <= 1] + later)
    for run, chance in ((better, 0.0), (replace(marvel, rows=later), 1.0)):  # the second has no seed in common with PEX
        assert compared(run)["seeds"] == 2 and compared(run)["return"][0] == chance
    other = [r | {"return": 400.0} if r["phase"] == "offline" and r["event"] == "eval" else r for r in marvel.rows]
    assert compared(marvel)["paired"] and not compared(replace(marvel, rows=other))["paired"]


def test_a_diverged_seed_loses_every_comparison_and_is_not_safe():
    marvel, pex = make_run("marvel", train_cost=15.0), make_run("pex", train_cost=60.0)
    lost = [r for r in marvel.rows if r["seed"] > 2] + [row(s, "online", "diverged", 102, 5000) for s in range(3)]
    found = comparisons.compared({ENV: {"marvel": replace(marvel, rows=lost), "pex": pex}}, "marvel", "pex")
    assert found["seeds"] == 5 and found["paired"]  # what diverged does not tell where it started
    assert found["regret"][0] == pytest.approx(2 / 5) and found["return"][0] <= 2 / 5
    assert comparisons.within(replace(marvel, rows=lost)) == (2, 5) and comparisons.within(marvel) == (5, 5)


def test_an_algorithm_that_ran_on_one_task_does_not_shrink_the_figures():
    """Four algorithms on two tasks are eight cells, five on one task are five."""
    tasks = {env: {name: make_run(name, env=env) for name in ("cpq", "marvel", "naive_o2o", "pex")} for env in (ENV, "SafetyCarRun")}
    tasks[ENV]["sac_lag"] = make_run("sac_lag")
    assert {env: set(task) for env, task in comparisons.comparable(tasks).items()} == {env: set(tasks["SafetyCarRun"]) for env in tasks}
    for name in ("cpq", "naive_o2o", "pex"):
        del tasks["SafetyCarRun"][name]
    assert {env: set(task) for env, task in comparisons.comparable(tasks).items()} == {ENV: set(tasks[ENV])}


def test_other_limits_compare_the_seeds_that_all_limits_have(tmp_path):
    for run in (make_run("marvel", seeds=3), make_run("marvel", cost_limit=10.0, seeds=2, cost=15.0), make_run("pex", cost_limit=40.0)):
        csvs.write(run, tmp_path)
    text = report.report(tmp_path)
    table = text.partition("## Other cost limits")[2].partition("Data:")[0].splitlines()
    rows = [line.split(" | ") for line in table if line.startswith(f"| {ENV}")]
    assert [row[1:4] for row in rows] == [["Marvel", "10", "2"], ["Marvel", "20", "2"]]  # PEX has one limit only
    assert rows[0][5].startswith("0 of 2") and rows[1][5].startswith("2 of 2")
    assert text.count("## What the numbers say") == 1  # a limit without all tasks has tables per task only


def test_an_algorithm_that_has_not_run_does_not_shrink_the_figures(tmp_path, monkeypatch):
    for env in (ENV, "SafetyCarRun"):
        for name in ("marvel", "cpq"):
            csvs.write(make_run(name, env=env), tmp_path)
    csvs.write(make_run("marvel+pid"), tmp_path)
    drawn = []
    monkeypatch.setattr(figures, "draw_profiles", lambda tasks, best_of, path: drawn.append(tasks) or True)
    report.report(tmp_path)
    assert {env: set(task) for env, task in drawn[0].items()} == {env: {"marvel", "cpq"} for env in (ENV, "SafetyCarRun")}


def test_a_diverged_seed_has_the_lowest_return_and_the_highest_cost_in_the_profiles(tmp_path, monkeypatch):
    run = make_run(seeds=2, final=800.0, cost=10.0, noise=0.0)
    csvs.write(replace(run, rows=[*run.rows[:3], row(0, "online", "diverged", 777), *(r for r in run.rows if r["seed"] == 1)]), tmp_path)
    scores = []
    real = measures.profile
    monkeypatch.setattr(measures, "profile", lambda tasks, taus: scores.append([list(task) for task in tasks]) or real(tasks, taus))
    report.report(tmp_path)
    assert scores == [[[-math.inf, 1.0]], [[math.inf, 0.5]]]  # the best safe return is 800, the limit 20
    assert (tmp_path / "profiles.png").read_bytes()[:4] == b"\x89PNG"


def test_scores_are_arrays_of_seeds_and_tasks(tmp_path):
    """Without pickles; the two kinds of seeds apart; what is gone leaves nothing behind."""
    run = make_run("marvel", seeds=3, noise=0.0)
    rows = [*(r for r in run.rows if r["seed"] != 1), *seed_rows(1)[:3], row(1, "online", "diverged", 777)]
    csvs.write(on_seeds(replace(run, rows=rows), 100), tmp_path)
    csvs.write(on_seeds(make_run("marvel", seeds=2, final=400.0, cost=50.0, noise=0.0, env="SafetyCarRun"), 100), tmp_path)
    csvs.write(make_run("pex"), tmp_path)
    (tmp_path / "scores").mkdir()
    (tmp_path / "scores" / "jsrl.npz").touch()
    report.report(tmp_path)
    assert {path.name for path in (tmp_path / "scores").iterdir()} == {"marvel.npz", "pex-chosen.npz"}
    with np.load(tmp_path / "scores" / "marvel.npz") as found:
        assert found["tasks"].tolist() == [ENV, "SafetyCarRun"] and found["seeds"].tolist() == [100, 101, 102]
        np.testing.assert_array_equal(found["return"], [[700, 400], [math.nan, 400], [700, math.nan]])
        np.testing.assert_array_equal(found["cost"], [[10, 50], [math.nan, 50], [10, math.nan]])
        np.testing.assert_array_equal(found["train_cost"], [[15, 15], [math.nan, 15], [15, math.nan]])
        assert found["diverged"].tolist() == [[False, False], [True, False], [False, False]]
        assert found["best_safe_return"].tolist() == [800, 800] and found["cost_limit"] == 20


def test_report_reads_whatever_is_present(tmp_path):
    offline = make_run("cpq", seeds=1)
    csvs.write(csvs.Run(offline.path, "cpq", [r for r in offline.rows if r["phase"] == "offline"], {}), tmp_path)
    (tmp_path / ENV / "cpq.json").unlink()
    text = report.report(tmp_path)
    assert (
        "| CPQ (offline) | 1 | 500 | 30 | 500 | 30 | 0 of 1 [0.00, 0.79] | - | - | - | - | - | - | - | - | 00000000; 0 |" in text
        and "unknown: no JSON beside cpq.csv" in text
    )
    with pytest.raises(csvs.BadInput, match="no ENV/ALGO.csv"):
        report.report(tmp_path / "empty")


def test_summary_has_the_tasks_on_which_marvel_was_run(tmp_path):
    for name in arms.PLAIN:
        csvs.write(make_run(name, final=700.0, cost=10.0, train_cost=15.0, noise=0.0), tmp_path)
    csvs.write(make_run("naive_o2o", env="SafetyCarRun"), tmp_path)
    warning, _, *lines = report.summary(tmp_path).splitlines()
    assert warning == "On seeds on which settings may have been chosen:"
    assert lines[0] == f"| algorithm | {ENV} | per training episode |"
    assert "| Marvel | 700 / 10 (5) | 15 |" in lines
    assert len(lines) == 2 + len(arms.PLAIN)  # controls that were not run have no line


def on_seeds(run, first):
    """The run with its seeds renumbered from `first` on."""
    return replace(run, rows=[row | {"seed": row["seed"] + first} for row in run.rows])


def test_unseen_seeds_never_share_a_table_with_those_that_settings_were_chosen_on(tmp_path):
    csvs.write(make_run("naive_o2o"), tmp_path)
    csvs.write(on_seeds(make_run("marvel"), 100), tmp_path)
    text = report.report(tmp_path)
    unseen, chosen = text.split("# Cost limit 20, seeds on which settings may have been chosen")
    assert "| Marvel | 5 |" in unseen and "| naive finetuning | 5 |" not in unseen
    assert "| Marvel | 5 |" not in chosen and "| naive finetuning | 5 |" in chosen
    assert "On seeds" not in report.summary(tmp_path)
    mixed = make_run("marvel")
    mixed = replace(mixed, rows=mixed.rows + on_seeds(mixed, 100).rows)
    with pytest.raises(csvs.BadInput, match="report seeds from 100 on apart"):
        assert mixed.unseen
    committed = (tmp_path / ENV / "marvel.csv").read_text()
    first, both = on_seeds(make_run("cal", seeds=3), 100), [make_run("cal"), make_run("marvel")]
    with pytest.raises(csvs.BadInput, match=r"do not replace the unseen ones .*run seeds from 100 on"):
        diff.accept({run.key: run for run in [first, both[1]]}, {mixed.key: on_seeds(make_run("marvel"), 100)}, tmp_path)
    assert not (tmp_path / ENV / "cal.csv").exists() and (tmp_path / ENV / "marvel.csv").read_text() == committed
    assert diff.cautions(first, both[0])[:1] == ["other kind of seeds: unseen -> for choosing settings"]
    assert diff.cautions(make_run("cal"), on_seeds(make_run("cal"), 5)) == ["other seeds: 0 1 2 3 4 -> 5 6 7 8 9"]


def test_a_later_run_of_seed_0_does_not_hide_a_sweep(tmp_path):
    run_folder(on_seeds(make_run("marvel"), 100), tmp_path, "20260101-000000")
    run_folder(make_run("marvel", seeds=1), tmp_path, "20260102-000000")
    (found,) = csvs.fresh(tmp_path).values()
    assert found.seeds == [100, 101, 102, 103, 104]


def test_the_ladder_shows_the_rungs_that_were_run(tmp_path):
    """And only where there is more than the suite itself."""
    csvs.write(make_run("marvel", final=700.0, noise=0.0), tmp_path)
    assert "What carries" not in report.report(tmp_path)
    csvs.write(make_run("marvel+bare", final=600.0, train_cost=40.0, noise=0.0), tmp_path)
    csvs.write(make_run("naive_o2o+apid+blind", cost=30.0, noise=0.0), tmp_path)
    table = report.report(tmp_path).split("## What carries the results")[1].split("\n## ")[0]
    rows = [line.split(" | ") for line in table.splitlines() if line.startswith("| ")][1:]
    assert [row[1] for row in rows] == ["Marvel", "Marvel", "naive finetuning, adaptive PID"]
    assert rows[0][0].startswith("| bare") and rows[0][5] == "600 [600, 600]" and rows[0][7][:2] == rows[0][8][:2] == "40"
    assert rows[2][4] == "0 of 5 [0.00, 0.43]" and (tmp_path / "ladder.png").exists()


@pytest.mark.parametrize("limit", [0.0, math.inf])
def test_a_task_s_figures_of_any_limit(tmp_path, limit):
    """Where no cost is allowed, and where every cost is."""
    task = {name: make_run(name, cost_limit=limit) for name in ("marvel", "marvel+bare", "marvel+pid")}
    report.ladder({ENV: task}, tmp_path, "")
    report.section(ENV, task, tmp_path, "")
    assert {path.name for path in tmp_path.rglob("*.png")} >= {"ladder.png", "learning.png", "multiplier.png"}


def test_rungs_are_compared_on_the_seeds_that_all_have(tmp_path):
    csvs.write(make_run("marvel", seeds=7), tmp_path)
    csvs.write(make_run("marvel+bare", seeds=3), tmp_path)
    table = report.report(tmp_path).split("## What carries the results")[1].split("\n## ")[0]
    assert re.findall(r"^\| .* \| Marvel \| (\d) \|", table, re.MULTILINE) == ["3", "3"]
    csvs.write(on_seeds(make_run("marvel+anchor", seeds=3), 4), tmp_path)
    assert f"**{ENV}**: the rungs have no seed in common." in report.report(tmp_path)


def test_a_flag_without_value_names_a_variant():
    assert csvs.variant("marvel", {"privileged_critic": False}) == "marvel+blind"
    assert csvs.variant("marvel", {"privileged_critic": True, "lagrangian": "apid"}) == "marvel"
    assert csvs.variant("naive_o2o", {"privileged_critic": False, "lagrangian": "apid"}) == "naive_o2o+apid+blind"


def test_what_is_no_variant_of_the_suite_is_not_counted_as_one():
    assert csvs.variant("marvel", {"preset": "release", "iterations": 7}) == "marvel+release+other"
    assert csvs.variant("marvel", {"preset": "suite", "init": "a.safetensors", "vpa_steps": 0}) == "marvel+init"


@pytest.mark.parametrize("name", arms.ALGOS)
def test_the_command_line_of_a_variant_names_it_again(name):
    """From the configuration that a run of it records, whatever the presets add."""
    _, script, arguments, _ = arms.ALGOS[name]
    module = importlib.import_module(f"algos.{script}")
    args = logbook.parse(module.Args, ["--env", ENV, *arguments.split()], getattr(module, "PRESETS", None))
    assert csvs.variant(script, json.loads(json.dumps(asdict(args), default=str))) == name
    logbook.check_numbers(args)  # and it runs


def test_the_interval_of_a_mean_cost_has_nothing_below_zero():
    costs = np.array([0.0, 0.0, 0.0, 0.0, 10.0])
    low, high = measures.interval(costs)
    assert low < 0 and report.spread(costs).startswith(f"2 [{low:.3g}, ") and report.cost_spread(costs) == f"2 [0, {high:.3g}]"
    assert report.cost_spread(np.array([5.0])) == "5"  # one seed has no interval


def test_a_task_that_has_the_papers_arms_alone_misses_nothing(tmp_path):
    csvs.write(make_run("naive_o2o+release"), tmp_path)
    assert "Missing: " not in report.report(tmp_path)


def test_the_papers_own_configuration_is_a_table_of_its_own(tmp_path):
    """By task and offline budget; its arms stand in no other comparison."""
    csvs.write(make_run("naive_o2o+release", cost=30.0, noise=0.0), tmp_path)
    csvs.write(make_run("marvel+release", final=700.0, noise=0.0), tmp_path)
    csvs.write(make_run("marvel+published+fqe", noise=0.0), tmp_path)
    whole = report.report(tmp_path)
    table = whole.split("## The paper's own configuration")[1].split("\n## ")[0]
    rows = [line.split(" | ") for line in table.splitlines() if line.startswith("| Safety")]
    assert [row[2] for row in rows] == ["naive finetuning, adaptive PID", "Marvel", "Marvel without entropy terms"]
    assert [row[6][:6] for row in rows] == ["0 of 5", "5 of 5", "5 of 5"] and rows[1][7] == "700 [700, 700]"
    assert [row[-1][:4] for row in rows] == ["- |", "1.00", "- |"]
    assert "release" not in whole.split("## Over all tasks")[1].split("\n## ")[0]


def test_a_row_says_how_many_settings_were_tried(tmp_path):
    csvs.write(make_run("marvel"), tmp_path)
    (tmp_path / "tried.csv").write_text(f"{','.join(csvs.TRIED)}\nmarvel,{ENV},,0-9,1,,,,,,,,0,1,c\n")  # the defaults, measured nothing
    assert csvs.tries(tmp_path) == {("marvel", ENV): 1}
    rest = "--reserve 0,0-9,0.9,700"
    tried = [f"{algo},{env},{rest},{i},,,,,,0,1,c" for i, (algo, env) in enumerate(zip(("marvel",) * 3 + ("cpq",), (ENV, ENV, "X", ENV)))]
    (tmp_path / "tried.csv").write_text("\n".join([",".join(csvs.TRIED), *tried, ""]))
    table = report.report(tmp_path).split("# Settings tried")[1]
    assert table.count("`marvel --reserve 0`") == 3 and f"| {ENV} | `cpq --reserve 0` | 0-9 | 90% | 700 | 3 | - |" in table
    assert "; 2 |" in next(line for line in report.report(tmp_path).splitlines() if line.startswith("| Marvel | 5 |"))


@pytest.mark.parametrize("header", ["algorithm,env", ",".join(csvs.TRIED)])
def test_a_damaged_list_of_tries_is_one_line(tmp_path, header):
    (tmp_path / "tried.csv").write_text(f"{header}\nmarvel,{ENV},,0-9,0.9,much,1,1,1,1,1,1,0,1,c\n")
    with pytest.raises(csvs.BadInput, match="tried.csv: row 2: .* is not as results/tune.py writes it: restore the file"):
        csvs.tries(tmp_path)


def test_two_files_of_one_experiment_are_refused(tmp_path):
    path = csvs.write(make_run("marvel"), tmp_path)
    path.with_name("marvel_old.csv").write_bytes(path.read_bytes())
    with pytest.raises(csvs.BadInput, match="marvel_old.csv: of the same task, algorithm and cost limit as .*marvel.csv: move one"):
        csvs.baselines(tmp_path)


def test_a_seed_that_ends_early_is_a_file_cut_off(tmp_path):
    path = csvs.write(make_run("marvel"), tmp_path)
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-3]))
    with pytest.raises(csvs.BadInput, match="seed 4 ends at env_steps .*, others at .*: cut off"):
        csvs.load(path)


def test_figures_of_an_own_environment_lie_beside_its_results(tmp_path):
    csvs.write(make_run("marvel", env="my_module:My-v0"), tmp_path)
    links = re.findall(r"\]\((my_module[^)]*png)\)", report.report(tmp_path))
    assert links and all(link.startswith("my_module/My-v0/") and (tmp_path / link).exists() for link in links)


def test_the_command_beside_a_number_still_makes_its_configuration():
    """Of every committed run: a default that changes needs the run again, or an argument in its command."""
    wrong, parsed = [], {}
    for run in csvs.baselines(ROOT / "results").values():
        stored = csvs.effective(run)
        for made in run.about["runs"]:
            _, *words = csvs.split(made["command"])
            kept = tuple(
                word
                for flag, value in csvs.words(shlex.join(words)).items()
                if flag not in ("--seed", "--seeds")
                for word in (flag, *csvs.split(value))
            )
            script = run.name.split("+")[0]
            if (script, kept) not in parsed:
                module = importlib.import_module(f"algos.{script}")
                parsed[script, kept] = logbook.parse(module.Args, [*kept], getattr(module, "PRESETS", None))
            now = json.loads(json.dumps(asdict(parsed[script, kept]), default=str))
            if "reward_scale" in now:  # as training.prepare and finetuning.prepare resolve them
                now["reward_scale"] = now["reward_scale"] or TASKS[run.env].reward_scale
            if "offline" in now:
                now["offline"] = now["offline"] or "cpq"
            differ = {name for name, value in stored.items() if name not in ("env", "seed", "seeds") and now.get(name, "gone") != value}
            wrong += [f"{run.path.relative_to(ROOT)}: {name} was {stored[name]}" for name in sorted(differ)]
    assert not wrong, "\n".join(sorted(set(wrong)))


@pytest.mark.parametrize("page", ["README.md", "algos/README.md"])
def test_intervals_in_the_text_are_those_of_the_report(page):
    """Whoever adds rows finds here what has to be written anew; tables are made by the report itself."""
    quoted = re.findall(r"-?\d\.\d\d \[-?\d\.\d\d, -?\d\.\d\d\]", " ".join((ROOT / page).read_text().split()))
    report_text = (ROOT / "results" / "README.md").read_text()
    assert [text for text in quoted if text not in report_text] == []


def test_the_committed_report_is_that_of_the_committed_results(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "save", lambda figure, *_, **__: figures.plt.close(figure) or True)  # half of the time
    shutil.copytree(ROOT / "results", tmp_path / "results", ignore=shutil.ignore_patterns("*.npz", "*.png"))
    committed = (ROOT / "results" / "README.md").read_text()
    assert report.report(tmp_path / "results") == committed, "run `make report`"
    page = (ROOT / "algos" / "README.md").read_text()
    assert report.put_between_marks(page, report.summary(tmp_path / "results")) == page, "run `make report`"
    assert page.count("| Marvel |") == 1
    page = (ROOT / "README.md").read_text()
    assert report.put_between_marks(page, report.overview(tmp_path / "results")) == page, "run `make report`"
    made, kept = ({path.name: path for path in (place / "scores").iterdir()} for place in (tmp_path / "results", ROOT / "results"))
    assert made.keys() == kept.keys(), "run `make report`"
    for name in made:
        with np.load(made[name]) as new, np.load(kept[name]) as old:
            assert new.keys() == old.keys()
            for key in new:
                np.testing.assert_array_equal(new[key], old[key], err_msg=f"{name} {key}: run `make report`")
    for figure in re.findall(r"!\[.*?\]\((.*?)\)", committed):
        assert (ROOT / "results" / figure).stat().st_size < 150_000


# ---------------------------------------------------------------- sweep

FAKE = """
import json, os, shlex, sys, time
from pathlib import Path
words = dict(zip(sys.argv[2::2], sys.argv[3::2]))
assert sys.argv[1] == "--resume"
algo, env, runs = Path(sys.argv[0]).stem, words["--env"], Path(words["--runs"])
first, n = int(words["--seed"]), int(words["--seeds"])
journal = open(runs / "journal", "a", buffering=1)
print("start", algo, env, first, n, os.getpid(), file=journal)
if words.get("--fail") == algo:
    sys.exit("something went wrong in " + algo)
offline = runs / env / "offline"
if algo != "sac_lag" and not all((offline / str(first + i)).exists() for i in range(n)):
    time.sleep(0.3)
    for i in range(n):
        print("offline", env, first + i, file=journal)
        offline.mkdir(parents=True, exist_ok=True)
        (offline / str(first + i)).touch()
time.sleep(float(words.get("--sleep", 0.1)))
folder = runs / env / algo / f"{time.time_ns()}-{os.getpid()}"
folder.mkdir(parents=True)
config = {"critics": words.get("--critics", "pretrained"), "cost_limit": float(words.get("--cost-limit", 20)), "seed": first, "seeds": n}
command = shlex.join(["algos/" + algo + ".py", *sys.argv[1:]])
about = {"algo": algo, "env": env, "config": config, "command": command, "dataset": None}
(folder / "progress.csv").write_text("")
print("end", algo, env, first, n, os.getpid(), file=journal)
(folder / "config.json").write_text(json.dumps(about | {"seconds": 2.0 * n, "commit": "x"}))
"""


@pytest.fixture
def fakes(tmp_path):
    """Arguments of a sweep over stand-ins for the algorithms that only sleep and keep a journal of what they did."""
    (tmp_path / "fakes").mkdir()
    (tmp_path / "runs").mkdir()
    for name in ("cpq", "marvel", "sac_lag", "naive_o2o"):
        (tmp_path / "fakes" / f"{name}.py").write_text(FAKE)
    return ["--scripts", str(tmp_path / "fakes"), "--runs", str(tmp_path / "runs"), "--seeds", "2"]


ALL = ["--envs", "own:A", "bullet/EnvB", "--algos", "marvel", "cpq", "sac_lag", "marvel+fresh"]


def journal(place, what="end"):
    path = place / "runs" / "journal"
    lines = path.read_text().splitlines() if path.exists() else []
    return [tuple(line.split()[1:]) for line in lines if line.startswith(what)]


def start_sweep(arguments):
    command = [sys.executable, ROOT / "results" / "sweep.py", *arguments]
    heed = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # which tests run in the background of a shell inherit as ignored
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True, preexec_fn=heed)


def test_a_sweep_runs_what_is_missing_and_nothing_twice(tmp_path, fakes, capsys):
    assert sweep.main([*fakes, *ALL[:-1]]) == 0
    out = capsys.readouterr().out
    assert len(re.findall(r"^\[\d/6\] \S+ \S+ seeds 100-101: done in", out, re.MULTILINE)) == 6
    assert len(journal(tmp_path)) == 6
    assert sorted(collections.Counter(journal(tmp_path, "offline")).values()) == [1, 1, 1, 1]  # one per environment and seed
    assert sweep.main([*fakes, *ALL]) == 0
    assert "2 job(s) to run, 6 done" in capsys.readouterr().out and len(journal(tmp_path)) == 8
    fakes[-1] = "4"  # two more seeds
    assert sweep.main([*fakes, "--envs", "own:A", "--algos", "marvel", "--seeds-per-job", "1"]) == 0
    assert [entry[2:4] for entry in journal(tmp_path)[8:]] == [("102", "1"), ("103", "1")]
    assert sweep.main([*fakes, "--envs", "own:A", "--algos", "marvel"]) == 0
    assert "0 job(s) to run, 1 done" in capsys.readouterr().out
    assert sweep.main([*fakes, "--envs", "own:A", "--algos", "marvel", "--limits", "20.0", "40"]) == 0  # 20.0 is the 20 that is done
    assert len(journal(tmp_path)) == 11


def test_a_job_s_seeds_have_no_gap():
    assert sweep._consecutive([100, 102, 103, 104], 2) == [(100,), (102, 103), (104,)]


def test_offline_checkpoints_are_made_once_by_parallel_jobs(tmp_path, fakes):
    assert sweep.main([*fakes, *ALL, "naive_o2o", "--parallel", "4"]) == 0
    assert len(journal(tmp_path)) == 10
    assert sorted(collections.Counter(journal(tmp_path, "offline")).values()) == [1, 1, 1, 1]


def test_arguments_for_all_and_for_some(tmp_path, fakes, capsys):
    some = [*fakes, *ALL, "--print-jobs", "--args=--sleep 0 --x 1", "--args-for=own:A/marvel*=--x 2", "--args-for=*=--y 3"]
    assert sweep.main(some) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 8 and not journal(tmp_path, "")
    assert all(line.endswith(f" --runs {tmp_path / 'runs'}") and " --y 3 " in line for line in lines)
    x = {tuple(re.search(r"(\w+)\.py --resume --env (\S+)", line).groups()): re.search(r"--x (\d)", line)[1] for line in lines}
    assert x[("marvel", "own:A")] == "2" and x[("marvel", "bullet/EnvB")] == x[("cpq", "own:A")] == "1"
    fresh = [i for i, line in enumerate(lines) if "--critics fresh" in line]
    assert min(fresh) > max(i for i, line in enumerate(lines) if "sac_lag" in line)  # what waits for others comes last
    assert sweep.main([*some, "--args-for=own:A/marvle=--x 3"]) == 0  # a study's entries may be of tasks that are left out
    printed = capsys.readouterr()
    assert printed.out.splitlines() == lines and "note: --args-for own:A/marvle=--x 3: fits no ENV/ALGO" in printed.err
    (tmp_path / "study").write_text("# a study\n" + "\n".join(some) + "\n")
    assert sweep.main([f"@{tmp_path / 'study'}"]) == 0
    assert capsys.readouterr().out.splitlines() == lines


def test_printed_jobs_count_as_done_when_run_by_hand(tmp_path, fakes, capsys):
    sweep.main([*fakes, *ALL, "--print-jobs"])
    for line in capsys.readouterr().out.splitlines():
        assert " --cost-limit 20 " in line
        subprocess.run(line.replace(" --cost-limit 20 ", " "), shell=True, check=True, cwd=ROOT)  # the default need not be said
    assert sweep.main([*fakes, *ALL]) == 0
    assert "0 job(s) to run, 8 done" in capsys.readouterr().out


def test_an_id_of_safety_gymnasium_is_the_task(tmp_path, fakes, capsys):
    """Runs are recorded under the task's own name, whatever name asked for them."""
    sweep.main([*fakes, "--envs", ENV, "--algos", "sac_lag", "--args=--sleep 0"])
    capsys.readouterr()
    by_id = [*fakes, "--envs", f"{ENV}0-v0", "--algos", "sac_lag", f"--args-for={ENV}0-v0/*=--sleep 0"]
    assert sweep.main([*by_id, "--dry-run"]) == 0
    assert "0 job(s) to run, 1 done" in capsys.readouterr().out
    csvs.write(make_run(), tmp_path / "results")
    run_folder(make_run(), tmp_path / "again")
    code, out = run_diff(capsys, "--runs", tmp_path / "again", "--results", tmp_path / "results", "--envs", f"{ENV}0-v0")
    assert code == 0 and f"{ENV} marvel" in out


def test_what_is_listed_twice_is_one_job(fakes, capsys):
    twice = [*fakes, "--envs", ENV, f"{ENV}0-v0", "--algos", "cpq", "cpq", "--limits", "20", "2e1", "inf", "0"]
    assert sweep.main([*twice, "--print-jobs"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [re.search(r"--cost-limit (\S+)", line)[1] for line in lines] == ["20", "inf", "0"]


def test_paths_with_spaces_stay_whole(tmp_path, fakes, capsys):
    (tmp_path / "my runs").mkdir()
    one = [*fakes, "--runs", str(tmp_path / "my runs"), "--envs", "own:A", "--algos", "sac_lag", "--args=--dataset '/my work/own.hdf5'"]
    sweep.main([*one, "--print-jobs"])
    line = capsys.readouterr().out
    assert {"/my work/own.hdf5", str(tmp_path / "my runs")} <= set(shlex.split(line))
    subprocess.run(line, shell=True, check=True, cwd=ROOT)
    (config,) = (tmp_path / "my runs").glob("own:A/sac_lag/*/config.json")
    about = json.loads(config.read_text())
    for command in (about["command"], about["command"].replace("'", "")):  # as it was recorded once
        config.write_text(json.dumps(about | {"command": command}))
        assert sweep.main([*one, "--dry-run"]) == 0
        assert "0 job(s) to run, 1 done" in capsys.readouterr().out


def test_dry_run_estimates_from_finished_runs(tmp_path, fakes, capsys):
    sweep.main([*fakes, "--envs", "own:A", "--algos", "sac_lag"])
    fakes[-1] = "5"
    capsys.readouterr()
    assert sweep.main([*fakes, "--envs", "own:A", "own:B", "--algos", "sac_lag", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"own:A sac_lag seeds 102-104 +6 s\n", out) and re.search(r"own:B sac_lag seeds 100-104 +unknown\n", out)
    assert "2 job(s) to run, 0 done; one after another 6 s, and 1 job(s) never measured" in out
    assert len(journal(tmp_path)) == 1


def test_dry_run_estimates_from_committed_results_of_own_environments(tmp_path, fakes, capsys, monkeypatch):
    """They are jobs of own_env:Own-v0, whose results lie in own_env/Own-v0/."""
    monkeypatch.setattr(sweep, "ROOT", tmp_path)
    csvs.write(make_run("sac_lag", env="own_env:Own-v0"), tmp_path / "results")  # 10 s, five seeds
    assert sweep.main([*fakes, "--envs", "own_env:Own-v0", "--algos", "sac_lag", "--dry-run"]) == 0
    assert re.search(r"own_env:Own-v0 sac_lag seeds 100-101 +4 s\n", capsys.readouterr().out)


def test_failures_are_listed_with_their_log(tmp_path, fakes, capsys):
    code = sweep.main([*fakes, *ALL, "--args=--fail sac_lag", "--parallel=4"])
    out, err = capsys.readouterr()
    assert code == 1 and out.count("FAILED (exit code 1)") == 2 and out.count(": done in") == 6
    assert "2 of 8 job(s) failed:" in err and "own:A sac_lag seeds 100-101: exit code 1: something went wrong in sac_lag" in err
    logs = re.findall(r"^    (.*\.log)$", err, re.MULTILINE)
    assert len(logs) == 2 and all("something went wrong" in Path(log).read_text() for log in logs)
    assert sweep.main([*fakes, *ALL, "--args=--fail sac_lag"]) == 1
    assert "2 job(s) to run, 6 done" in capsys.readouterr().out  # what failed is tried again, nothing else


def test_another_dataset_or_argument_is_not_done(tmp_path, fakes, capsys, monkeypatch):
    one = [*fakes, "--envs", "own:A", "--algos", "marvel"]
    sweep.main(one)
    capsys.readouterr()
    sweep.main([*one, "--args=--checkpoint-seconds 5 --track wandb", "--dry-run"])  # of no consequence
    assert "0 job(s) to run, 1 done" in capsys.readouterr().out
    sweep.main([*one, "--args=--sleep 0", "--dry-run"])
    assert "1 job(s) to run, 0 done" in capsys.readouterr().out
    (config,) = (tmp_path / "runs").glob("own:A/marvel/*/config.json")
    data = tmp_path / "data.hdf5"
    data.write_bytes(b"1")
    about = json.loads(config.read_text()) | {"dataset": {"path": str(data), "sha256": sweep.sha256(data)}}
    config.write_text(json.dumps(about))
    sweep.main([*one, "--dry-run"])
    assert "0 job(s) to run, 1 done" in capsys.readouterr().out
    data.write_bytes(b"2")
    sweep.sha256.cache_clear()
    sweep.main([*one, "--dry-run"])
    assert "1 job(s) to run, 0 done" in capsys.readouterr().out


@pytest.mark.parametrize("study", sorted((ROOT / "results" / "studies").glob("*.args")), ids=lambda path: path.stem)
def test_a_study_is_on_unseen_seeds_and_says_its_command(study):
    options = sweep.parse([f"@{study}"])
    assert options.first_seed == csvs.UNSEEN and options.seeds >= 3
    assert f"make sweep STUDY={study.relative_to(ROOT)}\n" in study.read_text()


def test_every_variant_is_in_a_study():
    studies = [sweep.parse([f"@{path}"]) for path in (ROOT / "results" / "studies").glob("*.args")]
    assert {name for study in studies for name in study.algos} == arms.ALGOS.keys()


def wait_until(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def alive(pid):
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()


@pytest.mark.parametrize("blow", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_sweep_stops_its_jobs_and_goes_on_later(tmp_path, fakes, blow):
    slow = [*fakes, "--envs", "own:A", "own:B", "--algos", "sac_lag", "--args=--sleep 1.5"]
    process = start_sweep(slow)
    wait_until(lambda: journal(tmp_path, "start"))
    process.send_signal(blow)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130 and "interrupted: the same command goes on" in err and "Traceback" not in err
    assert not alive(journal(tmp_path, "start")[0][-1]) and not journal(tmp_path)
    process = start_sweep(slow)
    assert process.wait(60) == 0 and sorted(e[1] for e in journal(tmp_path)) == ["own:A", "own:B"]


def test_after_sigkill_the_orphaned_job_is_waited_for_and_not_repeated(tmp_path, fakes):
    slow = [*fakes, "--envs", "own:A", "own:B", "--algos", "sac_lag", "--args=--sleep 2"]
    process = start_sweep(slow)
    wait_until(lambda: journal(tmp_path, "start"))
    process.kill()
    process.wait()
    assert alive(journal(tmp_path, "start")[0][-1])
    again, at_once = start_sweep(slow), start_sweep(slow)  # even two sweeps at a time
    assert again.wait(60) == 0 and at_once.wait(60) == 0
    assert sorted(e[1] for e in journal(tmp_path)) == ["own:A", "own:B"] and len(journal(tmp_path, "start")) == 2


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--algos", "sarsa"], "--algos sarsa: unknown"),
        (["--envs", ENV, "SafetyPointRum"], "--envs SafetyPointRum: unknown; known are SafetyPointRun"),
        (["--seeds", "0"], "--seeds 0: must be positive"),
        (["--seeds", "x"], "invalid int value"),
        (["--parallel", "-1"], "--parallel -1"),
        (["--gpus", "-1"], "--gpus -1.0"),
        (["--gpus", "nan"], "--gpus nan: must not be negative or NaN"),
        (["--limits", "20", "nan"], "--limits nan: must not be negative or NaN"),
        (["--limits=-5"], "--limits -5.0: must not be negative or NaN"),
        (
            ["--limits", "20", "12.3456789"],
            "--limits 12.3456789: has more than six digits, which results are not told apart by: use 12.3457",
        ),
        (["--first-seed", "2147483647", "--seeds", "2"], "the last seed must be below 2147483648"),
        (["--args=--evals 1 --seeds 3"], "--args --seeds: the sweep's own: use --seeds"),
        (["--args=--cost_limit=3"], "--args --cost-limit: the sweep's own: use --limits"),
        (["--args-for=*/marvel=--resume"], "--args-for --resume: the sweep's own: use no argument"),
        (["--args", "iterations 5"], "--args iterations 5: must begin with an argument's name"),
        (["--args-for=x"], "--args-for x: must be PATTERN=ARGS"),
        (["--args=--dataset 'my data.hdf5"], "--args --dataset 'my data.hdf5: no closing quotation"),
        (["--scripts", "nowhere", "--algos", "cpq"], "there is no"),
        (["--launcher", "slurm"], "invalid choice"),
        (["@nothing"], "nothing"),
    ],
)
def test_sweep_refuses_bad_input_in_one_line(tmp_path, arguments, message, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if arguments[0] != "--scripts":
        arguments = ["--scripts", str(tmp_path), "--dry-run", *arguments]
        for arm in arms.ALGOS.values():
            (tmp_path / f"{arm.script}.py").touch()
    refused(lambda: sweep.main(arguments), message, capsys)


@pytest.mark.slow
def test_a_real_sweep_and_what_follows(tmp_path):
    """sac_lag with tiny arguments: sweep, accept, diff, report; then a sweep that finds nothing to do."""
    tiny = "--env-steps 2560 --num-envs 16 --steps-per-block 16 --updates-per-block 8 --evals 1 --eval-episodes 2 --final-eval-rounds 1 "
    tiny += "--hidden 32 32 --buffer-size 10000"
    arguments = ["--envs", ENV, "--algos", "sac_lag", "--seeds", "2", "--args", tiny, "--runs", str(tmp_path / "runs")]
    process = start_sweep(arguments)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err + "".join(path.read_text() for path in (tmp_path / "runs" / "sweep").glob("*.log"))
    assert f"[1/1] {ENV} sac_lag seeds 100-101: done in" in out
    assert "0 job(s) to run, 1 done" in start_sweep(arguments).communicate(timeout=60)[0]
    places = ["--runs", str(tmp_path / "runs"), "--results", str(tmp_path / "results")]
    assert diff.main([*places, "--accept"]) == 0 and diff.main(places) == 0
    baseline = csvs.load(tmp_path / "results" / ENV / "sac_lag.csv")
    assert baseline.seeds == [100, 101] and str(tmp_path) not in json.dumps(baseline.about)
    assert "| SAC-Lag from scratch | 2 |" in report.report(tmp_path / "results")


@pytest.mark.slow
def test_a_ray_node_dies_in_mid_sweep(tmp_path, fakes):
    """A cluster of two local nodes, half a (pretended) GPU per job, one node killed while jobs run on it: every job ends once."""
    pytest.importorskip("ray", reason="Ray is not installed: pip install -r requirements-ray.txt")
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 8, "num_gpus": 1, "include_dashboard": False})
    try:
        second = cluster.add_node(num_cpus=8, num_gpus=1)
        cluster.wait_for_nodes()
        many = [*fakes, "--envs", *(f"own:{i}" for i in range(5)), "--algos", "sac_lag", "marvel", "--args=--sleep 4"]
        process = start_sweep([*many, "--launcher", "ray", "--address", cluster.address, "--gpus", "0.5"])
        wait_until(lambda: len(journal(tmp_path, "start")) >= 3, 60)  # a node holds two
        assert len(journal(tmp_path, "start")) - len(journal(tmp_path)) <= 4
        cluster.remove_node(second, allow_graceful=False)
        out, err = process.communicate(timeout=180)
        assert process.returncode == 0, out + err
        ended = collections.Counter(entry[:2] for entry in journal(tmp_path))
        assert len(ended) == 10 and set(ended.values()) == {1}, ended
        assert len(journal(tmp_path, "start")) > 10  # the dead node's jobs were begun again
        assert out.count(": done") == 10
    finally:
        cluster.shutdown()


# ---------------------------------------------------------------- tries


def test_the_outcome_of_a_try():
    """Two seeds, one within the limit; training costs 10 and 50 but for the first fifth of the rows, which cost 100."""
    rows = [*seed_rows(0, final=700, cost=10, train_cost=10), *seed_rows(1, final=600, cost=40, train_cost=50)]
    for r in rows:
        if r["event"] == "train" and r["env_steps"] <= 2 * 2500:
            r["cost"] = 100.0
    found = tune.outcome(csvs.Run(Path("marvel.csv"), "marvel", rows, about(range(2))))
    assert found == {
        "share_safe": 0.5, "return": 650.0, "cost": 25.0, "worst_cost": 40.0, "train_cost": (8 * 10 + 8 * 50 + 4 * 100) / 20,
        "first_fifth": 100.0, "offline_return": 500.0, "offline_cost": 30.0, "diverged": 0,
    }  # fmt: skip
    lost = [r for r in rows if r["seed"] == 0] + [row(1, "online", "diverged", 102, 5000)]
    found = tune.outcome(csvs.Run(Path("marvel.csv"), "marvel", lost, about(range(2))))
    assert (found["share_safe"], found["return"], found["diverged"]) == (0.5, 700.0, 1)


@pytest.mark.parametrize("lost", [1, 2], ids=["a crash", "all seeds diverged"])
def test_a_try_of_which_every_seed_diverged_is_an_outcome(tmp_path, monkeypatch, lost):
    """The run's last line names its folder; a newer folder of another list is not taken."""
    diverged = [row(seed, "online", "diverged", 102, 5000) for seed in range(lost)]
    rows = [r for r in make_run(seeds=2).rows if r["seed"] >= lost] + diverged
    facts = about(range(2))
    folder = run_folder(csvs.Run(Path("marvel.csv"), "marvel", rows, facts), tmp_path / "runs")
    run_folder(make_run(seeds=2), tmp_path / "runs", "20260102-000000")
    (tmp_path / "algos").mkdir()
    (tmp_path / "algos" / "marvel.py").write_text(f"print('  {folder}')\nraise SystemExit('error: it stopped')\n")
    monkeypatch.setattr(tune, "ROOT", tmp_path)
    attempt = lambda: tune.attempt("marvel", ENV, [], range(2), tmp_path / "runs")
    for words in (["--seed", "100"], ["--seeds=3"], ["--env", "SafetyCarRun"]):  # the last of two values would win
        with pytest.raises(csvs.BadInput, match=f"{words[0].split('=')[0]}.* is this script's to set"):
            tune.attempt("marvel", ENV, words, range(2), tmp_path / "runs")
    if lost == 2:
        found = attempt()
        assert found["diverged"] == 2 and "return" not in found
    else:
        with pytest.raises(csvs.BadInput, match="exit code 1: error: it stopped"):
            attempt()


def test_a_list_of_tries_goes_on_where_it_was(tmp_path, monkeypatch, capsys):
    done, tries, out = [], tmp_path / "tries.txt", tmp_path / "tried.csv"
    tries.write_text(f"marvel {ENV} --reserve 0.5  # a comment\n\nmarvel {ENV}0-v0\n")

    def attempt(algo, env, arguments, seeds, runs):
        done.append(arguments)
        if "--reserve" in arguments:
            raise csvs.BadInput("it failed")
        return {"return": 1.0}

    monkeypatch.setattr(tune, "attempt", attempt)
    words = ["tune.py", str(tries), "--out", str(out), "--seeds", "2", "--common", "--evals 1"]
    monkeypatch.setattr(sys, "argv", words)
    assert tune.main() == 1 and "it failed" in capsys.readouterr().err
    assert tune.main() == 1 and done == [["--reserve", "0.5", "--evals", "1"], ["--evals", "1"], ["--reserve", "0.5", "--evals", "1"]]
    assert [tuple(row[c] for c in csvs.TRIED_KEY) for row in csvs.tried(out)] == [("marvel", ENV, "--evals 1", "0-1")]
    tries.write_text(f"marvel\nmarvel {ENV} --x 'y\nmarvel {ENV} --evals 2\n")  # a line that cannot be read costs no other
    monkeypatch.setattr(sys, "argv", words[:-2])
    capsys.readouterr()
    assert tune.main() == 1 and done[-1] == ["--evals", "2"]
    first, second = capsys.readouterr().err.splitlines()
    assert "line 1: marvel: must be ALGO ENV" in first and "line 2" in second and "(No closing quotation): close it" in second
    for more, said in (["--seeds", "11"], "0 to 9"), (["--what"], "unrecognized arguments: --what"):
        monkeypatch.setattr(sys, "argv", [*words, *more])
        with pytest.raises(csvs.BadInput, match=said):
            tune.main()
    monkeypatch.setattr(sys, "argv", ["tune.py", str(tmp_path / "nowhere.txt")])
    with pytest.raises(csvs.BadInput, match="nowhere.txt: not readable"):
        tune.main()


def test_a_bare_sweep_leaves_out_what_has_a_study_of_its_own():
    options = sweep.parse([])
    assert options.first_seed == csvs.UNSEEN and {"cpq", "marvel+fqe"} <= set(options.algos)
    assert not any(rung in name.split("+") for name in options.algos for rung in (*arms.BUDGETS, *filter(None, arms.LADDER)))
