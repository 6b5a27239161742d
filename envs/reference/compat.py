"""Imports safety_gymnasium 1.0.0, the newest release (2023), under today's Python, numpy and mujoco.

Call `safety_gymnasium()` in place of `import safety_gymnasium`. Each patch names its cause upstream and is applied only where the
installed versions need it: gymnasium may be 0.29 or 1.x. Needs no JAX: the workers (worker.py) import this.
"""

import dataclasses
import importlib.util
import logging
import sys
import types
import warnings
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import gymnasium
import mujoco
import numpy as np
import xmltodict
from gymnasium.envs import registration

OLD_GYMNASIUM = importlib.util.find_spec("gymnasium.wrappers.compatibility") is not None  # below 1.0


@contextmanager
def _array_defaults():
    """Python 3.11 refuses unhashable dataclass defaults; the package gives arrays (tasks/, assets/): make them factories."""
    original = dataclasses.dataclass

    def dataclass(cls=None, /, **options):
        if cls is None:
            return lambda cls: dataclass(cls, **options)
        for name, default in list(vars(cls).items()):
            if isinstance(default, np.ndarray):
                setattr(cls, name, dataclasses.field(default_factory=default.copy))
        return original(cls, **options)

    dataclasses.dataclass = dataclass
    try:
        yield
    finally:
        dataclasses.dataclass = original


@contextmanager
def _stand_ins(modules: dict[str, dict[str, object]]):
    """Modules {name: {attribute: value}} that can be imported while this lasts."""
    for name, attributes in modules.items():
        sys.modules[name] = types.ModuleType(name)
        vars(sys.modules[name]).update(attributes)
    try:
        yield
    finally:
        for name in modules:
            del sys.modules[name]


def _no_multi_agent():
    """Importing the package imports gymnasium_robotics, for a base class of its multi-agent tasks only: stand in for it."""
    if importlib.util.find_spec("gymnasium_robotics") is not None:
        return _stand_ins({})
    leaf = "gymnasium_robotics.envs.multiagent_mujoco.mujoco_multi"
    names = [leaf.rsplit(".", i)[0] for i in range(leaf.count(".") + 1)]
    return _stand_ins({name: {"MultiAgentMujocoEnv": object} if name == leaf else {} for name in names})


def _moved_wrappers():
    """gymnasium 1.0 removed EnvCompatibility, which no task here uses, and put its wrappers into other modules."""
    if OLD_GYMNASIUM:
        return _stand_ins({})
    from gymnasium import wrappers
    from gymnasium.wrappers.utils import RunningMeanStd

    normalize = {"NormalizeObservation": wrappers.NormalizeObservation, "NormalizeReward": wrappers.NormalizeReward}
    modules = {
        "autoreset": {"AutoResetWrapper": wrappers.Autoreset},
        "compatibility": {"EnvCompatibility": object},
        "env_checker": {"PassiveEnvChecker": wrappers.PassiveEnvChecker},
        "normalize": normalize | {"RunningMeanStd": RunningMeanStd},
        "time_limit": {"TimeLimit": wrappers.TimeLimit},
    }
    return _stand_ins({f"gymnasium.wrappers.{name}": attributes for name, attributes in modules.items()})


def _make(id: str, max_episode_steps: int | None = None, disable_env_checker: bool | None = None, **kwargs) -> gymnasium.Env:
    """What the package's `make` does for its own tasks; that reads fields of EnvSpec which gymnasium 1.0 removed.

    It gives the six-tuple (obs, reward, cost, terminated, truncated, info), for which gymnasium's own `make` has no time limit.
    """
    from safety_gymnasium import wrappers

    spec = registration.registry[id]
    assert isinstance(spec.entry_point, str)
    env: Any = registration.load_env_creator(spec.entry_point)(**spec.kwargs | kwargs)
    env.unwrapped.spec = dataclasses.replace(spec, kwargs=spec.kwargs | kwargs)
    if disable_env_checker is False or (disable_env_checker is None and not spec.disable_env_checker):
        env = wrappers.SafePassiveEnvChecker(env)
    if spec.order_enforce:
        env = gymnasium.wrappers.OrderEnforcing(env)
    limit = max_episode_steps or spec.max_episode_steps
    return env if limit is None else wrappers.SafeTimeLimit(env, limit)


def _joint_by_array() -> None:
    """The package calls `model.jnt(array([i]))` (bases/base_agent.py, assets/robot.py); newer mujoco wants an int."""
    model = mujoco.MjModel.from_xml_string("<mujoco><worldbody><body><joint/><geom size='1'/></body></worldbody></mujoco>")
    try:
        model.jnt(np.array([0]))
    except TypeError:
        original = mujoco.MjModel.jnt
        mujoco.MjModel.jnt = lambda self, key=0: original(self, key.item() if isinstance(key, np.ndarray) else key)


def _float_of_array() -> None:
    """bases/base_agent.py calls `float(array of one)`: deprecated in numpy 1.25, an error since 2.4."""
    from safety_gymnasium.bases import base_agent

    with warnings.catch_warnings():
        warnings.simplefilter("error", DeprecationWarning)
        try:
            float(np.zeros(1))
        except (TypeError, DeprecationWarning):
            base_agent.float = lambda x: np.asarray(x).item()


def _gymnasium_robots() -> None:
    """Two things that mujoco 3 changed for the robots of gymnasium (envs/mujoco), on which the Velocity tasks stand.

    The margins of two geoms now add up where the larger counted: the robots' geoms have one margin each, so with half of it
    contacts begin where they did. And `<option collision="predefined">` is gone: gymnasium 0.29's Swimmer has it and no pairs, so no
    contacts; 1.x's says so with its geoms.
    """
    from gymnasium.envs.mujoco import mujoco_env

    spheres = "".join(f"<body pos='{x} 0 0'><freejoint/><geom size='1' margin='1'/></body>" for x in (0, 2))
    model = mujoco.MjModel.from_xml_string(f"<mujoco><worldbody>{spheres}</worldbody></mujoco>")
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    margins_add = data.contact[0].includemargin > 1.5
    try:
        mujoco.MjModel.from_xml_string("<mujoco><option collision='predefined'/></mujoco>")
        knows_predefined = True
    except ValueError:
        knows_predefined = False

    original = mujoco_env.MujocoEnv._initialize_simulation

    def initialize(self):
        predefined = ' collision="predefined"'
        xml = Path(self.fullpath).read_text()
        if knows_predefined or predefined not in xml:
            model, data = original(self)
        else:
            model = mujoco.MjModel.from_xml_string(xml.replace(predefined, ""))
            model.geom_contype[:] = model.geom_conaffinity[:] = 0
            data = mujoco.MjData(model)
        if margins_add:
            model.geom_margin /= 2
        return model, data

    mujoco_env.MujocoEnv._initialize_simulation = initialize  # type: ignore[method-assign]


def _no_sky() -> None:
    """Every reset compiles the model anew with a sky of 24 MB of PNG files, for pictures only: 75 MB and most of the time of a
    reset per simulator. Leave it out."""
    from safety_gymnasium import world

    def unparse(xml):
        asset = xml["mujoco"]["asset"]
        asset["texture"] = [texture for texture in asset["texture"] if texture["@type"] != "skybox"]
        return xmltodict.unparse(xml)

    world.xmltodict = types.SimpleNamespace(parse=xmltodict.parse, unparse=unparse)


@cache
def safety_gymnasium() -> types.ModuleType:
    """The imported package; ModuleNotFoundError names the mend if it is not installed."""
    if importlib.util.find_spec("safety_gymnasium") is None:
        raise ModuleNotFoundError("safety_gymnasium is not installed: run `make setup` or `pip install -r requirements.txt`")
    if mujoco.get_mju_user_warning() is None:  # left alone, MuJoCo writes MUJOCO_LOG.TXT into the working directory
        mujoco.set_mju_user_warning(lambda message: logging.getLogger("mujoco").debug(message.strip()))
    _joint_by_array()
    with _array_defaults(), _no_multi_agent(), _moved_wrappers():
        import safety_gymnasium as package
    if not OLD_GYMNASIUM:
        package.make = _make
    _float_of_array()
    _gymnasium_robots()
    _no_sky()
    return package
