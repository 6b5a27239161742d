"""A worker process: simulators of one environment, stepped on demand. pool.py starts it as a script and talks to it by pickles
over standard input and output; it ends when its input does, so it never outlives its parent.

Needs only the standard library, numpy and the simulator's package: it may run under another interpreter than its parent.
"""

import os
import pickle
import signal
import sys
import traceback

import numpy as np


class SafetyGymnasium:
    """One environment of Safety-Gymnasium."""

    def __init__(self, name: str):
        import compat

        self.env = compat.safety_gymnasium().make(name, disable_env_checker=True)

    @staticmethod
    def names() -> list[str]:
        import compat

        compat.safety_gymnasium()
        from safety_gymnasium.utils.registration import safe_registry

        return sorted(safe_registry)

    def reset(self, seed: int):
        return self.env.reset(seed=seed)[0]

    def step(self, action):
        return self.env.step(action)[:5]


class Bullet:
    """One environment of Bullet-Safety-Gym, made a function of seed and actions."""

    def __init__(self, name: str):
        import bullet_safety_gym  # noqa: F401 registers the names
        import gymnasium

        self.env = gymnasium.make(name, disable_env_checker=True)
        # Every later reset restores the physics that the first one saves: it must be the same in every simulator.
        np.random.seed(0)
        self.env.reset()

    @staticmethod
    def names() -> list[str]:
        robots = ("Ball", "Car", "Drone", "Ant")
        return [f"Safety{robot}{task}-v0" for task in ("Run", "Circle") for robot in robots]

    def reset(self, seed: int):
        # What is restored leaves out the motors' targets, which act in the simulation step that ends a reset: set them to those
        # of the zero action, and spend the forces that come with it.
        world = self.env.unwrapped
        world.bc.restoreState(world.stored_state_id)
        world.agent.apply_action(np.zeros(world.agent.act_dim))
        world.bc.stepSimulation()
        np.random.seed(seed)  # the package ignores seeds, and draws from numpy's global generator: only in resets
        return self.env.reset()[0]

    def step(self, action):
        obs, reward, terminated, truncated, info = self.env.step(action)
        return obs, reward, info["cost"], terminated, truncated


class Worker:
    """The simulators of this process; rows of a request name them by number, and new numbers make new ones."""

    def open(self, package: str, name: str) -> dict | list[str]:
        """Sizes of the environment, or the known names if there is none called `name`."""
        self.kind, self.name = {"safety-gymnasium": SafetyGymnasium, "bullet": Bullet}[package], name
        if name not in self.kind.names():
            return self.kind.names()
        self.simulators = [self.kind(name)]
        env = self.simulators[0].env
        obs, action = env.observation_space, env.action_space
        if len(obs.shape or ()) != 1:
            raise ValueError("its observation is not a vector of numbers")
        self.simulators[0].reset(0)  # what cannot work at all fails here
        self.middle, self.half = (action.high + action.low) / 2, (action.high - action.low) / 2
        return {"obs_size": obs.shape[0], "action_size": action.shape[0], "horizon": env.spec.max_episode_steps}

    def _simulator(self, number: int):
        while number >= len(self.simulators):
            self.simulators.append(self.kind(self.name))
        return self.simulators[number]

    def reset(self, numbers, seeds) -> tuple[np.ndarray]:
        obs = [self._simulator(number).reset(int(seed)) for number, seed in zip(numbers, seeds)]
        return (np.asarray(obs, np.float32),)

    def step(self, numbers, starts, actions, last, seeds) -> tuple[np.ndarray, ...]:
        """One step per row: obs, next_obs, reward, cost, terminated, truncated.

        starts: per row None, or (seed, actions so far): first bring the simulator to that state. last: the time is up after
        this step. seeds: of the next episode, which begins at once where this one ends.
        """
        rows = [self._row(self._simulator(number), *row) for number, *row in zip(numbers, starts, actions, last, seeds)]
        return tuple(np.asarray(column, np.float32) for column in zip(*rows))

    def _row(self, simulator, start, action, last, seed):
        if start is not None:
            simulator.reset(int(start[0]))
            for past in start[1]:
                simulator.step(self._scaled(past))
        next_obs, reward, cost, terminated, truncated = simulator.step(self._scaled(action))
        truncated = bool(truncated or last)
        obs = simulator.reset(int(seed)) if terminated or truncated else next_obs
        return obs, next_obs, float(reward), float(cost), bool(terminated), truncated

    def _scaled(self, action: np.ndarray) -> np.ndarray:
        """[-1, 1] to the package's range."""
        return self.middle + self.half * action


def serve() -> None:
    """Answers (method, arguments) with (True, result) or (False, traceback) until the input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group: the parent decides
    # The packages print: let that go to standard error, and keep standard output for answers.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    worker = Worker()
    while True:
        try:
            method, arguments = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            answer = True, getattr(worker, method)(*arguments)
        except Exception:
            answer = False, traceback.format_exc()
        pickle.dump(answer, answers)
        answers.flush()


if __name__ == "__main__":
    serve()
