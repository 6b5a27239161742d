"""A worker process: simulators of one environment, stepped on demand. pool.py starts it as a script and talks to it by pickles
over standard input and output; it ends when its input does, so it never outlives its parent.

Needs only the standard library, numpy and the simulator's package: it may run under another interpreter than its parent.
"""

import copy
import difflib
import importlib
import os
import pickle
import pkgutil
import signal
import sys
import traceback

import numpy as np


class Unusable(Exception):
    """What is wrong with the environment and how to mend it, in one line."""


class SafetyGymnasium:
    """One environment of Safety-Gymnasium."""

    def __init__(self, name: str):
        import compat

        self.env = compat.safety_gymnasium().make(name, disable_env_checker=True)

    @staticmethod
    def names(name: str) -> list[str]:
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
    def names(name: str) -> list[str]:
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


class Gymnasium:
    """One environment that the user has registered with gymnasium: `module:id`, where importing the module registers the id, or
    `gym:id`. Its cost is info["cost"], or the third of six values that its step gives. Raises Unusable where it breaks the rules."""

    def __init__(self, name: str, **options):
        import gymnasium

        spec = copy.deepcopy(gymnasium.spec(name.rpartition(":")[2]))
        self.limit = spec.max_episode_steps
        # The pool ends episodes in time and begins new ones. gymnasium's wrappers for that cannot take six values.
        spec.max_episode_steps, spec.autoreset = None, False
        self.env = gymnasium.make(spec, disable_env_checker=True, **options)
        if self.env.spec is not None:  # a wrapper inside may know
            self.limit = self.limit or self.env.spec.max_episode_steps
        self.title = type(self.env.unwrapped).__name__
        self._check_spaces(gymnasium.spaces.Box)

    def _check_spaces(self, Box) -> None:
        flat = "must be a Box of one axis: register it inside gymnasium.wrappers.FlattenObservation (an entry_point may be a function)"
        obs, action = self.env.observation_space, self.env.action_space
        if not isinstance(obs, Box) or len(obs.shape) != 1 or not obs.shape[0]:
            raise Unusable(f"its observation space, {_kind(obs)}, {flat}")
        if not isinstance(action, Box) or len(action.shape) != 1 or not action.shape[0]:
            raise Unusable(
                f"its action space, {_kind(action)}, must be a Box of one axis: wrap it in a gymnasium.ActionWrapper that makes it one"
            )
        if not np.issubdtype(action.dtype, np.floating):
            raise Unusable(f"its actions are {action.dtype}: must be floats, as algorithms here act in [-1, 1]")
        if not np.isfinite(action.high - action.low).all():
            raise Unusable("its action space has infinite bounds: give finite low and high, to which [-1, 1] is scaled")

    @staticmethod
    def names(name: str) -> list[str]:
        """[`name`] if there is such an environment, else those to choose from."""
        import gymnasium

        module, _, own = name.rpartition(":")
        before = set(gymnasium.registry)
        if module != "gym":
            _import(module)
        if own in gymnasium.registry:
            return [name]
        found = sorted(set(gymnasium.registry) - before) if module != "gym" else list(gymnasium.registry)
        if not found:
            raise Unusable(
                f"importing {module} registers no environment: call gymnasium.register(id=..., entry_point=...) at its top level"
            )
        return [f"{module}:{id}" for id in found]

    def reset(self, seed: int) -> np.ndarray:
        out = self.env.reset(seed=seed)
        if not isinstance(out, tuple) or len(out) != 2:
            raise Unusable(f"{self.title}.reset() must return (observation, info)")
        return self._vector(out[0], f"{self.title}.reset()")

    def step(self, action: np.ndarray):
        space = self.env.action_space
        out = self.env.step(np.clip(action, space.low, space.high).astype(space.dtype))
        step = f"{self.title}.step()"
        if not isinstance(out, tuple) or len(out) not in (5, 6):
            raise Unusable(
                f"{step} must return (observation, reward, terminated, truncated, info), or these with the cost after the reward"
            )
        obs, reward, *cost, terminated, truncated, info = out
        if not cost and "cost" not in info:
            raise Unusable(f'{step} gives no info["cost"]: put the cost of the step there, a number >= 0, in every step')
        cost = _number(cost[0] if cost else info["cost"], f"{step} gives the cost")
        if cost < 0:
            raise Unusable(f"{step} gives the cost {cost:g}: must be >= 0")
        return self._vector(obs, step), _number(reward, f"{step} gives the reward"), cost, bool(terminated), bool(truncated)

    def _vector(self, obs, method: str) -> np.ndarray:
        """A copy, as some environments return the same array again; float32, as the space says, and finite."""
        obs, shape = np.array(obs, np.float32), self.env.observation_space.shape
        if obs.shape != shape:
            raise Unusable(f"{method} gives an observation of shape {obs.shape}, its observation space has {shape}")
        if not np.isfinite(obs).all():
            raise Unusable(f"{method} gives an observation with NaN or inf, first in entry {np.flatnonzero(~np.isfinite(obs))[0]}")
        return obs


def _kind(space) -> str:
    """A space in a few words."""
    return f"{type(space).__name__} of shape {space.shape}" if space.shape else type(space).__name__


def _number(value, what: str) -> float:
    try:
        number = float(np.asarray(value, np.float64).reshape(()))
    except (TypeError, ValueError):
        raise Unusable(f"{what} {value!r:.60}: must be one number") from None
    if not np.isfinite(number):
        raise Unusable(f"{what} {number}: must be finite")
    return number


def _import(module: str) -> None:
    """Imports the module of an environment's name; Unusable with the nearest modules if there is none."""
    if not module:
        raise Unusable("no module before the colon: name the one that registers the environment, or gym")
    if module.startswith(".") or module.endswith(".py") or "/" in module or os.sep in module:
        name = os.path.basename(module).removesuffix(".py").lstrip(".")
        raise Unusable(f"{module!r} is a path: name the module as import does, {name}, in its folder or with that on PYTHONPATH")
    try:
        importlib.import_module(module)
        return
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if not f"{module}.".startswith(f"{missing}."):  # of something that it imports
            raise
    package, _, leaf = missing.rpartition(".")
    folders = getattr(sys.modules[package], "__path__", []) if package else [os.getcwd()]
    near = difflib.get_close_matches(leaf, [found.name for found in pkgutil.iter_modules(folders)], n=3, cutoff=0.5)
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    raise Unusable(f"no module {missing!r} in {os.getcwd()} or on Python's path (PYTHONPATH).{hint}")


def told(error: BaseException) -> str:
    """An exception in one line: type, text, and the line of the environment's own code, not of a package, that led to it."""
    library = os.path.dirname(os.__file__)
    foreign = lambda file: file.startswith((library, "<")) or "site-packages" in file or file == __file__
    frames = traceback.extract_tb(error.__traceback__)
    frame = ([f for f in frames if not foreign(f.filename)] or frames)[-1]
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return f"{text} ({os.path.basename(frame.filename)}, line {frame.lineno}, in {frame.name})"


class Worker:
    """The simulators of this process; rows of a request name them by number, and new numbers make new ones."""

    def open(self, package: str, name: str, path: list[str] | None = None) -> dict | list[str]:
        """Sizes of the environment, or the known names if there is none called `name`. path: where modules are looked for."""
        if path is not None:
            sys.path[:] = path
        self.kind, self.name = {"safety-gymnasium": SafetyGymnasium, "bullet": Bullet, "gymnasium": Gymnasium}[package], name
        names = self.kind.names(name)
        if name not in names:
            return names
        self.simulators = [self.kind(name)]
        env = self.simulators[0].env
        obs, action = env.observation_space, env.action_space
        if len(obs.shape or ()) != 1:
            raise Unusable("its observation is not a vector of numbers")
        self.simulators[0].reset(0)  # what cannot work at all fails here
        self.middle, self.half = (action.high + action.low) / 2, (action.high - action.low) / 2
        horizon = getattr(self.simulators[0], "limit", None) or env.spec.max_episode_steps
        rate = env.metadata.get("render_fps") or 30
        sizes = {"obs_size": obs.shape[0], "action_size": action.shape[0], "horizon": horizon, "frame_rate": float(rate)}
        return sizes | {"action_bounds": (np.asarray(action.low, np.float32), np.asarray(action.high, np.float32))}

    def check(self) -> None:
        """Unusable unless the first steps of an episode can be had again, from its seed and actions, here and in another simulator."""
        actions = np.random.default_rng(0).uniform(-1, 1, (3, *self.half.shape)).astype(np.float32)

        def episode(simulator, beside=None):
            out = [simulator.reset(0)]
            for action in actions:
                if beside is not None:
                    beside.reset(1)
                    beside.step(self._scaled(-action))
                obs, *rest = simulator.step(self._scaled(action))
                out += [obs, np.asarray(rest, np.float64)]
                if rest[2] or rest[3]:
                    break
            return np.concatenate(out)

        first = episode(self._simulator(0))
        if not all(np.array_equal(first, episode(self._simulator(number))) for number in (1, 0)):
            raise Unusable(
                "the same seed and actions give other numbers each time: its reset() must call super().reset(seed=seed), set all that "
                "steps change, and random numbers must come from self.np_random"
            )
        if not np.array_equal(first, episode(self._simulator(0), self._simulator(1))):
            raise Unusable("two of it at once disturb each other: it must keep all that steps change in self, not in its class or module")

    def film(self, seed: int, actions: np.ndarray, shown: set[int]) -> list[np.ndarray]:
        """The environment's own pictures (height, width, 3), uint8, after the steps numbered `shown`, from 0, of an episode."""
        modes = self.simulators[0].env.metadata.get("render_modes") or []
        if "rgb_array" not in modes:
            raise Unusable(f"it draws no pictures: its metadata has render_modes {modes}, without rgb_array")
        simulator = self.kind(self.name, render_mode="rgb_array")
        simulator.reset(int(seed))
        pictures = []
        for i, action in enumerate(actions):
            simulator.step(self._scaled(action))
            if i in shown:
                picture = np.asarray(simulator.env.render())
                if picture.ndim != 3 or picture.shape[2] != 3 or picture.dtype != np.uint8:
                    raise Unusable(f"render() gives {picture.dtype} of shape {picture.shape}: must be uint8 (height, width, 3)")
                pictures.append(picture)
        simulator.env.close()
        return pictures

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
    """Answers (method, arguments) with (True, result) or (False, one line, traceback) until the input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group: the parent decides
    # Simulators print, and may read: let the one go to standard error and the other find nothing.
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    worker = Worker()
    while True:
        try:
            method, arguments = pickle.load(requests)
        except EOFError:
            return
        try:
            answer: tuple = True, getattr(worker, method)(*arguments)
        except Unusable as error:
            answer = False, str(error), ""
        except (Exception, SystemExit) as error:
            answer = False, f"a simulator failed: {told(error)}", traceback.format_exc()
        pickle.dump(answer, answers)
        answers.flush()


if __name__ == "__main__":
    serve()
