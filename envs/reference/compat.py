"""Imports safety_gymnasium 1.0.0, the newest release (2023), under today's Python, numpy and mujoco.

Call `safety_gymnasium()` in place of `import safety_gymnasium`. Each patch names its cause upstream and is applied only where the
installed versions need it. gymnasium must stay below 1.0, which removed `gymnasium.wrappers.compatibility` (requirements.txt).
Needs no JAX: the workers (worker.py) import this.
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

import mujoco
import numpy as np
import xmltodict


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
def _no_multi_agent():
    """Importing the package imports gymnasium_robotics, for a base class of its multi-agent tasks only: stand in for it."""
    if importlib.util.find_spec("gymnasium_robotics") is not None:
        yield
        return
    leaf = "gymnasium_robotics.envs.multiagent_mujoco.mujoco_multi"
    names = [leaf.rsplit(".", i)[0] for i in range(leaf.count(".") + 1)]
    sys.modules |= {name: types.ModuleType(name) for name in names}
    sys.modules[leaf].MultiAgentMujocoEnv = object
    try:
        yield
    finally:
        for name in names:
            del sys.modules[name]


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
    """Two things that mujoco 3 changed for the robots of gymnasium 0.29.1 (envs/mujoco), on which the Velocity tasks stand.

    The margins of two geoms now add up where the larger counted: the robots' geoms have one margin each, so with half of it
    contacts begin where they did. And `<option collision="predefined">` is gone: Swimmer has it and no pairs, so no contacts.
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
    with _array_defaults(), _no_multi_agent():
        import safety_gymnasium as package
    _float_of_array()
    _gymnasium_robots()
    _no_sky()
    return package
