"""--track: the rows of progress.csv as curves in TensorBoard, Weights & Biases or Trackio. progress.csv stays the record.

Each seed is one run; the runs of a folder are a group. A column is the scalar EVENT/COLUMN (`eval/return`, `train/qc`) at the row's
gradient step, which goes on counting through the phases: one curve shows the change from offline to online. `env_steps` is a
scalar too, which W&B and Trackio can take as their x axis.

No point comes twice, whatever is killed and resumed. Only rows behind a saved state are sent, and all rows of a seed at one gradient
step are one point. A resumed run sends what comes after the last point that W&B or Trackio has; event files, and those of W&B's
offline mode, it writes anew. A tracker that fails costs one line, never the run: `python -m algos.tracking TRACKER FOLDER` sends
the rows of a run folder later.
"""

import contextlib
import contextvars
import fcntl
import importlib.util
import io
import json
import math
import os
import shutil
import struct
import sys
import time
from pathlib import Path
from typing import Any, Literal, NamedTuple

from algos import curves

PROJECT = "offline-to-online-safe-rl"  # or what WANDB_PROJECT or TRACKIO_PROJECT says
Name = Literal["none", "tensorboard", "wandb", "trackio"]
IDENTITY = frozenset("env algo seed phase event gradient_steps env_steps cost_limit config_hash commit dataset_hash".split())
Point = tuple[int, dict[str, float]]  # gradient step, scalars


class TrackerError(ValueError):
    """A tracker that cannot be used; the message is one line that names the mend."""


class Seed(NamedTuple):
    """What a tracker is told of the run of one seed."""

    folder: Path
    seed: int
    config: dict

    @property
    def group(self) -> str:
        return "/".join((self.config["env"], self.config["algo"], self.folder.resolve().name))

    @property
    def name(self) -> str:
        return f"{self.group}-seed{self.seed}".replace("/", "-")


# ---------------------------------------------------------------- the trackers


class TensorBoard:
    """Event files in FOLDER/tensorboard/seedN/."""

    package = "tensorboardX"

    def __init__(self, about: Seed):
        # Not SummaryWriter: its queue is emptied by a thread, and when that dies of a full disk, training waits for ever.
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import SessionLog
        from tensorboardX.summary import text

        path = about.folder / "tensorboard" / f"seed{about.seed}"
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
        self.first, self.where = 0, f"tensorboard --logdir {path.parent}"
        self._writer = EventsWriter(str(path / "events"))
        self._write(0, session_log=SessionLog(status=SessionLog.START))  # an open TensorBoard forgets the files before
        self._write(0, summary=text("config", "    " + json.dumps(about.config, indent=2, default=str).replace("\n", "\n    ")))

    def _write(self, step: int, **content) -> None:
        from tensorboardX.proto.event_pb2 import Event

        self._writer.write_event(Event(wall_time=time.time(), step=step, **content))

    def log(self, points: list[Point]) -> None:
        from tensorboardX.proto.summary_pb2 import Summary

        for step, values in points:
            self._write(step, summary=Summary(value=[Summary.Value(tag=tag, simple_value=x) for tag, x in values.items()]))
        self._writer.flush()

    def picture(self, path: Path, step: int) -> None:
        from tensorboardX.proto.summary_pb2 import Summary

        content = path.read_bytes()
        width, height = struct.unpack(">II", content[16:24])  # of a PNG's header
        image = Summary.Image(width=width, height=height, colorspace=4, encoded_image_string=content)
        self._write(step, summary=Summary(value=[Summary.Value(tag="curves", image=image)]))

    def finish(self) -> None:
        self._writer.close()


class WandB:
    """A run of Weights & Biases, its files in FOLDER/wandb/; WANDB_MODE=offline keeps it there until `wandb sync`."""

    package = "wandb"

    @staticmethod
    def check() -> None:
        import wandb

        if wandb.setup().settings.mode == "online":
            try:
                wandb.login(verify=False)
            except wandb.errors.UsageError:  # no key, and no terminal to ask for one
                raise TrackerError("--track wandb: no API key: type `wandb login` first, or set WANDB_MODE=offline") from None

    def __init__(self, about: Seed):
        import wandb

        if wandb.setup().settings.mode == "offline":  # nothing can say what these files hold
            for path in (about.folder / "wandb").glob(f"offline-run-*-{about.name}"):
                shutil.rmtree(path)
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT), group=about.group, name=about.name, id=about.name, config=about.config,
            dir=about.folder, resume="allow", reinit="create_new", settings=wandb.Settings(console="off", silent=True),
        )  # fmt: skip
        self.first = self._run.starting_step
        self.where = f"wandb sync {about.folder}/wandb/offline-run-*" if self._run.offline else self._run.url

    def log(self, points: list[Point]) -> None:
        for step, values in points:
            self._run.log(values, step=step)

    def picture(self, path: Path, step: int) -> None:
        import wandb

        self._run.log({"curves": wandb.Image(str(path))}, step=step)

    def finish(self) -> None:
        self._run.finish()


class Trackio:
    """A run of Trackio in its own folder on this machine, or where TRACKIO_SPACE_ID or TRACKIO_SERVER_URL says."""

    package = "trackio"

    def __init__(self, about: Seed):
        import trackio

        project = os.environ.get("TRACKIO_PROJECT", PROJECT)
        with contextlib.redirect_stdout(io.StringIO()):
            # init ends the run that it finds in its context, and there is one for each seed
            self._run = contextvars.Context().run(
                trackio.init, project=project, group=about.group, name=about.name, config=about.config, resume="allow"
            )
        self.first = self._run._next_step  # no public name says where it goes on
        self.where = f"trackio show --project {project}"

    def log(self, points: list[Point]) -> None:
        for step, values in points:
            self._run.log(values, step=step)

    def picture(self, path: Path, step: int) -> None:
        import trackio

        self._run.log({"curves": trackio.Image(str(path))}, step=step)

    def finish(self) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            self._run.finish()


TRACKERS: dict[str, Any] = {"tensorboard": TensorBoard, "wandb": WandB, "trackio": Trackio}


def check(name: Name) -> None:
    """TrackerError if the tracker's package is missing, or would not know for whom to work. Writes nothing."""
    if name == "none":
        return
    tracker = TRACKERS[name]
    if importlib.util.find_spec(tracker.package) is None:
        raise TrackerError(f"--track {name}: needs a package that is not installed: pip install {tracker.package}")
    if hasattr(tracker, "check"):
        tracker.check()


# ---------------------------------------------------------------- the rows


def scalars(row: dict) -> dict[str, float]:
    """The numbers of one row of progress.csv by their names in a tracker."""
    numbers = {column: float(x) for column, x in row.items() if column not in IDENTITY and x not in ("", None)}
    named = {f"{row['event']}/{column}": x for column, x in numbers.items() if math.isfinite(x)}
    return {"env_steps": float(row["env_steps"])} | (named or {row["event"]: 1.0})  # a seed that diverged has no numbers


class Tracker:
    """The runs of all seeds of a run folder, fed with its rows; none if `name` is none. Raises nothing: see the module."""

    def __init__(self, name: Name, folder: Path, config: dict, seeds: list[int]):
        self._name, self._folder, self._taken, self.failed = name, folder, 0, False
        self._waiting: dict[int, dict[int, dict[str, float]]] = {}  # by seed and gradient step, what may not be whole yet
        self._runs: dict[int, Any] = {}
        if name == "none" or not seeds:
            return
        whole = {k: v for k, v in config.items() if k != "config"} | config["config"]

        def start():
            for seed in seeds:
                self._runs[seed] = TRACKERS[name](Seed(folder, seed, whole | {"seed": seed, "seeds": 1}))
            if where := self._runs[seeds[0]].where:
                print(f"{name}: {where}", file=sys.stderr)

        self._try(start)

    def _try(self, work) -> None:
        try:
            work()
        except Exception as error:
            self._runs.clear()
            self.failed = True
            said = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            later = f"to send the rows later: python -m algos.tracking {self._name} {self._folder}"
            print(f"warning: {self._name} failed and gets no more rows ({said}); {later}", file=sys.stderr)

    def send(self, rows: list[dict], whole: bool = False) -> None:
        """Sends what is new in `rows`, all rows so far: the points to which no row can come any more, or `whole`: all of them."""
        if self._runs:
            self._try(lambda: self._send(rows, whole))

    def _send(self, rows: list[dict], whole: bool) -> None:
        for row in rows[self._taken :]:
            of_seed = self._waiting.setdefault(int(row["seed"]), {})
            of_seed.setdefault(int(row["gradient_steps"]), {}).update(scalars(row))
        self._taken = len(rows)
        for seed, waiting in self._waiting.items():
            ready = list(waiting)[: None if whole else -1]  # gradient steps never go back
            points = [(step, waiting.pop(step)) for step in ready]
            self._runs[seed].log([point for point in points if point[0] >= self._runs[seed].first])

    def show(self, rows: list[dict], picture: Path) -> None:
        """All rows, and at the last of them the picture of the run."""

        def work():
            self._send(rows, True)
            for seed, run in self._runs.items():
                run.picture(picture, max((int(row["gradient_steps"]) for row in rows if int(row["seed"]) == seed), default=0))

        if self._runs:
            self._try(work)

    def finish(self) -> None:
        """Waits until all is sent."""
        self._try(lambda: [run.finish() for run in self._runs.values()])


# ---------------------------------------------------------------- later


def later(name: Name, folder: Path) -> bool:
    """Sends the rows of a run folder in which nobody trains; whether all went well. Raises TrackerError and curves.CurvesError."""
    run = curves.read(folder)
    with open(run.folder / "progress.csv", "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            raise TrackerError(f"{folder}: in use by a run: wait for it, or stop it and go on with --resume --track {name}") from None
        tracker = Tracker(name, run.folder, run.config, sorted({int(row["seed"]) for row in run.rows}))
        if (run.folder / "curves.png").exists():
            tracker.show(run.rows, run.folder / "curves.png")
        tracker.send(run.rows)
        tracker.finish()
    return not tracker.failed


def main(words: list[str] | None = None) -> None:
    parser = curves.Parser(prog="python -m algos.tracking", description="Sends the rows of run folders to a tracker.")
    parser.add_argument("tracker", choices=list(TRACKERS))
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="run folders, runs/ENV/ALGO/STAMP")
    try:
        args = parser.parse_args(words)
        check(args.tracker)
        well = [later(args.tracker, folder) for folder in args.folders]
    except (TrackerError, curves.CurvesError) as error:
        sys.exit(print(f"error: {error}", file=sys.stderr) or 2)
    sys.exit(0 if all(well) else 1)


if __name__ == "__main__":
    main()
