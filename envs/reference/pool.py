"""Simulators with hidden state in worker processes, addressed by what happened to them.

A state is named by its history: the seed of its episode and the actions since. `Pool` keeps a table of which simulator is at
which history; stepping a state whose simulator has moved on (an old state, or one stepped twice) replays its episode in the
simulator that was used longest ago. So results depend on the arguments alone, and callers may treat steps as pure functions.
"""

import os
import pickle
import subprocess
import sys
import threading
import weakref
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

from envs.core import WORKERS

KEPT = 128  # simulators, beyond those of the largest batch; one of Bullet takes 30 to 40 MB


class WorkerError(RuntimeError):
    """A simulator raised, or its process died. One line: the environment, and `what` happened; a note holds the traceback."""

    def __init__(self, name: str, what: str):
        super().__init__(f"{name}: {what}")
        self.what = what


class Died(WorkerError):
    """The process of a simulator is gone."""


class _Process:
    """A running worker.py."""

    def __init__(self, python: str, package: str, name: str, path: list[str] | None):
        one_thread = {key: "1" for key in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}
        self._popen = subprocess.Popen(
            [python, str(Path(__file__).with_name("worker.py"))],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=os.environ | one_thread,
        )  # fmt: skip
        assert self._popen.stdin and self._popen.stdout
        self._stdin, self._stdout = self._popen.stdin, self._popen.stdout
        self.name = name
        self.send("open", package, name, path)

    def send(self, method: str, *arguments) -> None:
        with suppress(BrokenPipeError):  # `receive` says so
            pickle.dump((method, arguments), self._stdin)
            self._stdin.flush()

    def receive(self):
        try:
            good, answer, *details = pickle.load(self._stdout)
        except (EOFError, pickle.UnpicklingError):
            raise Died(self.name, f"a simulator process died (exit code {self._popen.wait()})") from None
        if not good:
            error = WorkerError(self.name, answer)
            for traceback in filter(None, details):
                error.add_note(traceback)
            raise error
        return answer

    def close(self) -> None:
        with suppress(BrokenPipeError):  # it has died before what was sent to it left the buffer
            self._stdin.close()
        self._stdout.close()
        self._popen.wait()

    def kill(self) -> None:
        self._popen.kill()
        self.close()


def _close(processes: list[_Process]) -> None:
    for process in processes:
        process.close()


class Pool:
    """Simulators of one environment, spread over `workers` processes (default: one per CPU), made as they are needed.

    `about` is what worker.py's `open` answers: the environment's sizes, or the list of known names if `name` is not one.
    `path` is where the processes look for modules (default: where a script in this folder would).
    """

    def __init__(self, package: str, name: str, python: str = sys.executable, workers: int | None = None, path: list[str] | None = None):
        self._lock = threading.Lock()
        self._start = lambda: _Process(python, package, name, path)
        self._processes = [self._start()]
        self._limit = workers or WORKERS
        self.close = weakref.finalize(self, _close, self._processes)  # also called at exit
        self.about = self._processes[0].receive()
        self._at: dict[bytes, tuple[int, int]] = {}  # history -> (process, number) of the simulator there; oldest use first
        self._idle: list[tuple[int, int]] = []  # simulators at no particular state
        self._made = [0] * self._limit  # simulators per process
        self._batches: set[int] = set()  # sizes seen

    @contextmanager
    def _exchange(self) -> Iterator[None]:
        """Around questions and answers. An interrupt, or a process that died, may leave answers that would be taken for those of the next
        question: all processes are then replaced, and states come back by replay."""
        with self._lock:
            try:
                yield
            except BaseException as error:
                if isinstance(error, Died) or not isinstance(error, WorkerError):
                    for process in self._processes:
                        process.kill()
                    self._processes.clear()  # the list that `close` holds
                    self._at.clear()
                    self._idle.clear()
                    self._made = [0] * self._limit
                raise

    def reset(self, seeds: np.ndarray) -> np.ndarray:
        """The first observations (n, obs_size) of the episodes with these seeds (n,), uint32."""
        with self._exchange():
            histories = [seed.tobytes() for seed in seeds]
            simulators, _ = self._simulators([None] * len(histories))
            (obs,) = self._call("reset", simulators, seeds)
            self._record(histories, simulators)
            return obs

    def step(self, seeds, past, n, actions, last, next_seeds) -> tuple[np.ndarray, ...]:
        """One step of every state: obs, next_obs (n, obs_size), reward, cost, terminated, truncated (n,), all float32.

        The states are seeds (rows,) uint32 with the first n (rows,) of the actions past (rows, T, a). Where the episode ends,
        or `last` (rows,) says so, the next one begins with next_seeds.
        """
        with self._exchange():
            pasts = [past[i, : n[i]] for i in range(len(seeds))]
            histories = [seed.tobytes() + p.tobytes() for seed, p in zip(seeds, pasts)]
            simulators, there = self._simulators(histories)
            starts = [None if hit else (seed, p) for hit, seed, p in zip(there, seeds, pasts)]
            out = self._call("step", simulators, starts, actions, last, next_seeds)
            ended = (out[4] + out[5]) > 0
            after = [s.tobytes() if end else h + a.tobytes() for end, s, h, a in zip(ended, next_seeds, histories, actions)]
            self._record(after, simulators)
            return out

    def ask(self, method: str, *arguments):
        """What a method of worker.py's `Worker` answers that is about no state."""
        with self._exchange():
            self._grow(1)
            self._processes[0].send(method, *arguments)
            return self._processes[0].receive()

    def _simulators(self, histories: Sequence[bytes | None]) -> tuple[list[tuple[int, int]], list[bool]]:
        """A simulator for every history, and whether it is there already."""
        self._batches.add(len(histories))
        self._grow(len(histories))
        hits = [None if history is None else self._at.pop(history, None) for history in histories]
        there = [simulator is not None for simulator in hits]
        load = [sum(simulator is not None and simulator[0] == i for simulator in hits) for i in range(len(self._processes))]
        found = []
        for hit in hits:
            if hit is None:
                process = load.index(min(load))
                load[process] += 1
                hit = self._take(process)
            found.append(hit)
        return found, there

    def _grow(self, rows: int) -> None:
        """Starts processes, together: their imports take a second."""
        new = [self._start() for _ in range(len(self._processes), min(self._limit, rows))]
        try:
            for process in new:
                process.receive()
        except BaseException:
            for process in new:
                process.kill()
            raise
        self._processes += new

    def _take(self, process: int) -> tuple[int, int]:
        """A simulator of this process whose state may be lost: an idle one, a new one, or the one used longest ago.

        There are as many as rows in all the batch sizes seen, so that evaluation and training, say, do not evict each other. Where
        these are more than KEPT, batches share them, and a batch that comes back replays its episodes once.
        """
        for simulator in self._idle:
            if simulator[0] == process:
                self._idle.remove(simulator)
                return simulator
        oldest = next((history for history, simulator in self._at.items() if simulator[0] == process), None)
        wanted = max(*self._batches, min(sum(self._batches), KEPT))
        if oldest is None or self._made[process] * len(self._processes) < wanted:
            self._made[process] += 1
            return process, self._made[process] - 1
        return self._at.pop(oldest)

    def _record(self, histories: list[bytes], simulators: list[tuple[int, int]]) -> None:
        for history, simulator in zip(histories, simulators):
            if history in self._at:  # two rows came to the same state
                self._idle.append(simulator)
            else:
                self._at[history] = simulator

    def _call(self, method: str, simulators: list[tuple[int, int]], *columns) -> tuple[np.ndarray, ...]:
        """One message to, and one from, every process that has rows; the answers in the rows' order."""
        rows = defaultdict(list)
        for row, (process, _) in enumerate(simulators):
            rows[process].append(row)
        for process, mine in rows.items():
            arguments = [[column[row] for row in mine] for column in columns]
            self._processes[process].send(method, [simulators[row][1] for row in mine], *arguments)
        answers, failures = [], []
        for process in rows:  # all, so that no answer is left for the next question
            try:
                answers.append(self._processes[process].receive())
            except WorkerError as error:
                failures.append(error)
        if failures:
            self._idle += simulators
            raise failures[0]
        order = np.argsort([row for mine in rows.values() for row in mine])
        return tuple(np.concatenate(column)[order] for column in zip(*answers))
