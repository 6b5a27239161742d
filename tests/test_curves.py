"""`python -m algos.curves`: what it draws of one run and of several, also while they train, and how bad input is refused."""

import json
from pathlib import Path

import pytest

from algos import curves
from tests.test_tracking import train


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    runs = tmp_path_factory.mktemp("curves")
    return [train(runs, track="none"), train(runs, track="none", cost_limit=10.0)]


def run_curves(capsys, *words):
    """(exit code, output, errors) of `python -m algos.curves`."""
    try:
        curves.main([str(word) for word in words])
        code = 0
    except SystemExit as stop:
        code = stop.code
    return code, *capsys.readouterr()


def test_curves_of_one_and_of_several_runs(folders, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (folders[0] / "curves.png").unlink()
    for words, path in (
        ([folders[0]], folders[0] / "curves.png"),
        (folders, Path("curves.png")),
        ([*folders, "--out", "x.pdf"], Path("x.pdf")),
    ):
        assert run_curves(capsys, *words) == (0, f"{path}\n", "")
        assert path.read_bytes()[:4] in (b"\x89PNG", b"%PDF")
    assert {path.name for path in tmp_path.iterdir()} == {"curves.png", "x.pdf"}  # nothing half-written


def test_what_the_curves_of_a_run_are(folders):
    run = curves.read(folders[0])
    assert run.curves("online", "eval", "return")[4].tolist() == [[0.2, -20.0], [0.5, -50.0]]
    assert run.curves("offline", "train", "cost")[3].tolist() == [[0.01 * n, n] for n in range(1, 6)]
    assert run.running_cost("online")[3].tolist() == [[0.1, 1.0], [0.2, 1.5], [0.3, 2.0], [0.4, 2.5], [0.5, 3.0]]
    assert curves.mean([curve for curve in run.curves("online", "eval", "return").values()]).tolist() == [[0.2, -11.0], [0.5, -27.5]]
    assert curves.cost_limits([curves.read(folder) for folder in folders]) == [10, 20]
    stamps = [folder.name for folder in folders]
    assert curves.names([curves.read(folder) for folder in folders]) == [f"algo {stamp} (2 seeds)" for stamp in stamps]


@pytest.mark.parametrize("cut", range(1, 60, 7))
def test_a_line_that_is_being_written_is_left_out(cut, folders, tmp_path, capsys):
    for name in ("progress.csv", "config.json"):
        (tmp_path / name).write_bytes((folders[0] / name).read_bytes())
    content = (tmp_path / "progress.csv").read_bytes()
    (tmp_path / "progress.csv").write_bytes(content[:-cut])
    rows = curves.read(folders[0]).rows[: content[:-cut].count(b"\n") - 1]
    assert str(curves.read(tmp_path).rows) == str(rows)  # NaN is not NaN
    assert run_curves(capsys, tmp_path)[0] == 0


def test_the_mean_leaves_out_seeds_that_diverged(folders, tmp_path):
    lines = (folders[0] / "progress.csv").read_text().splitlines(keepends=True)
    own = [line for line in lines if ",4,online," in line]
    kept = [line for line in lines if line not in own[3:]]
    (tmp_path / "progress.csv").write_text("".join(kept) + own[3].replace(",eval,", ",diverged,").replace(",train,", ",diverged,"))
    (tmp_path / "config.json").write_text((folders[0] / "config.json").read_text())
    run = curves.read(tmp_path)
    assert run.diverged == {4} and len(run.curves("online", "train", "cost")[4]) == 2
    figure = curves.plt.figure()
    axis = figure.add_subplot()
    curves.plot_seeds(axis, run.curves("online", "train", "cost"), run.diverged)
    assert [len(line.get_xdata()) for line in axis.lines] == [5, 2, 5] and axis.lines[2].get_ydata().tolist() == [1, 2, 3, 4, 5]
    curves.plt.close(figure)


@pytest.mark.parametrize(
    "words, message",
    [
        (["nowhere"], "nowhere/progress.csv: No such file"),
        (["damaged"], "damaged: its progress.csv or config.json"),
        (["binary"], "binary: its progress.csv or config.json"),
        (["empty"], "has no rows yet"),
        (["one", "other"], "several do not compare"),
        (["one"] * 10, "at most 9"),
        (["one", "--out", "x.txt"], "must end in .png"),
        (["one", "--out", "nowhere/x.png"], "there is no folder nowhere"),
        (["one", "--out", "folder.png"], "folder.png: Is a directory: name a place that can be written"),
        ([], "required"),
    ],
)
def test_bad_input_for_curves_is_one_line(words, message, folders, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("one", "other", "damaged", "binary", "empty"):
        Path(name).mkdir()
        for file in ("progress.csv", "config.json"):
            (tmp_path / name / file).write_bytes((folders[0] / file).read_bytes())
    config = json.loads(Path("other/config.json").read_text())
    Path("other/config.json").write_text(json.dumps(config | {"env": "elsewhere"}))
    Path("damaged/progress.csv").write_text("a,b\n1,2\n")
    Path("binary/progress.csv").write_bytes(b"\xff\xfe\x00\n")
    Path("empty/progress.csv").write_text(Path("one/progress.csv").read_text().splitlines(keepends=True)[0])
    Path("folder.png").mkdir()
    before = set(tmp_path.rglob("*"))
    code, out, err = run_curves(capsys, *words)
    assert code == 2 and not out and err.startswith("error: ") and err.count("\n") == 1 and message in err, err
    assert set(tmp_path.rglob("*")) == before
