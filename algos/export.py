"""A policy's mean action as an ONNX model, for runtimes that have no Python: `--eval CHECKPOINT --export policy.onnx`.

    from algos import export, load_policy

    export.onnx_file(load_policy(CHECKPOINT), "policy.onnx")  # needs `pip install onnx`, not JAX

Input `obs` (n, obs_size) float32, the task's own observation; output `action` (n, action_size) float32 in [-1, 1]. Of PEX, whose critics
may see more of the state, there is a second input `privileged` (n, privileged_size) where they do.
"""

import json
import os
from pathlib import Path

import numpy as np

from algos.checkpoint import BadInput, write_atomically
from algos.policy import ExpandedPolicy, Policy

# LayerNormalization is there since operator set 17; the file format of its time is read by every runtime of today.
OPERATORS, FORMAT = 17, 8
TOLERANCE = 1e-5  # largest difference from the NumPy policy, in units of actions


class Graph:
    """Nodes and constants of a model in the making: `graph(operator, *inputs)` adds a node and gives the name of its output."""

    def __init__(self, onnx):
        self.helper, self.numpy_helper = onnx.helper, onnx.numpy_helper
        self.nodes, self.constants = [], []

    def constant(self, value) -> str:
        name = f"constant_{len(self.constants)}"
        self.constants.append(self.numpy_helper.from_array(np.asarray(value, np.float32), name))
        return name

    def __call__(self, operator: str, *inputs: str, **attributes) -> str:
        name = f"{operator}_{len(self.nodes)}"
        self.nodes.append(self.helper.make_node(operator, inputs, [name], **attributes))
        return name

    def symlog(self, x: str) -> str:
        return self("Mul", self("Sign", x), self("Log", self("Add", self("Abs", x), self.constant(1.0))))

    def mlp(self, layers: list, x: str, layer_norm: bool = False) -> str:
        """As policy.mlp."""
        for kernel, bias in layers[:-1]:
            x = self("Gemm", x, self.constant(kernel), self.constant(bias))
            if layer_norm:
                x = self("LayerNormalization", x, self.constant(np.ones_like(bias)), epsilon=1e-6)
            x = self("Relu", x)
        return self("Gemm", x, *map(self.constant, layers[-1]))

    def mean_action(self, policy: Policy, obs: str) -> str:
        """As Policy.__call__."""
        kernel, bias = policy.layers[-1]
        last = kernel[:, : policy.action_size], bias[: policy.action_size]
        return self("Tanh", self.mlp([*policy.layers[:-1], last], self.symlog(obs) if policy.symlog else obs))

    def score(self, policy: ExpandedPolicy, obs: str, privileged: list[str], action: str) -> str:
        """(n, 1), as ExpandedPolicy.scores."""
        seen = self("Concat", obs, *privileged, axis=1)
        x = self("Concat", self.symlog(seen) if policy.symlog else seen, action, axis=1)
        member = lambda layers, i: [(kernel[i], bias[i]) for kernel, bias in layers]
        members = lambda layers: [self.mlp(member(layers, i), x, policy.layer_norm) for i in range(len(layers[0][0]))]
        q, qcs = self("Min", *members(policy.reward_critics)), members(policy.cost_critics)
        qc = self("Mean", *qcs)
        if len(qcs) > 1:
            apart = [self("Sub", one, qc) for one in qcs]
            variance = self("Div", self("Sum", *(self("Mul", d, d) for d in apart)), self.constant(len(qcs) - 1.0))
            std = self("Sqrt", self("Max", variance, self.constant(1e-12)))
            qc = self("Add", qc, self("Mul", std, self.constant(policy.cost_pessimism)))
        return self("Sub", q, self("Mul", qc, self.constant(policy.multiplier)))

    def chosen_action(self, policy: ExpandedPolicy, obs: str, privileged: list[str]) -> str:
        """As ExpandedPolicy.__call__."""
        actions = [self.mean_action(part, obs) for part in (policy.offline, policy.learned)]
        scores = [self.score(policy, obs, privileged, action) for action in actions]
        return self("Where", self("GreaterOrEqual", *scores), *actions)


def model(policy: Policy, onnx):
    """The ONNX model of a policy's mean action, with env, algo, seed, cost_limit, env_low and env_high (JSON) in its metadata."""
    graph, helper = Graph(onnx), onnx.helper
    shape = lambda name, size: helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["n", size])
    inputs = [shape("obs", policy.obs_size)]
    if isinstance(policy, ExpandedPolicy):
        inputs += [shape("privileged", policy.privileged_size)] if policy.privileged_size else []
        action = graph.chosen_action(policy, "obs", [x.name for x in inputs[1:]])
    else:
        action = graph.mean_action(policy, "obs")
    graph.nodes.append(helper.make_node("Identity", [action], ["action"]))
    made = helper.make_graph(graph.nodes, "policy", inputs, [shape("action", policy.action_size)], graph.constants)
    made = helper.make_model(made, opset_imports=[helper.make_opsetid("", OPERATORS)], ir_version=FORMAT)
    made.doc_string = "obs: the task's observation, neither scaled nor normalised; action: the policy's mean action, in [-1, 1]"
    about = {name: str(getattr(policy, name)) for name in ("env", "algo", "seed", "cost_limit")}
    about |= {name: json.dumps(getattr(policy, name).tolist()) for name in ("env_low", "env_high")}
    helper.set_model_props(made, about)
    return made


def difference(content: bytes, policy: Policy, onnx) -> float:
    """The largest difference of actions between a model and the policy that it is made of, over 256 observations."""
    rng = np.random.default_rng(0)
    rows = lambda size: (rng.standard_normal((256, size)) * np.exp(rng.standard_normal((256, 1)))).astype(np.float32)
    obs, privileged = rows(policy.obs_size), rows(policy.privileged_size)
    given = {"obs": obs} | ({"privileged": privileged} if policy.privileged_size else {})
    (found,) = onnx.reference.ReferenceEvaluator(onnx.load_from_string(content)).run(None, given)
    apart = np.abs(found - policy(*given.values())).max(-1)
    if isinstance(policy, ExpandedPolicy):  # of two actions that are worth the same, rounding may choose either
        scores = policy.scores(obs, privileged, np.stack([policy.offline(obs), policy.learned(obs)]))
        apart = apart[np.abs(scores[0] - scores[1]) > 1e-4 * np.abs(scores).max(0)]
    return float(apart.max(initial=0.0))


def check(path: str | os.PathLike):
    """The onnx package; BadInput unless it is installed and `path` ends in .onnx."""
    if Path(path).suffix != ".onnx":
        raise BadInput(f"--export {path}: must end in .onnx")
    try:
        import onnx
        import onnx.helper
        import onnx.reference
    except ImportError:
        raise BadInput(f"--export {path}: needs the package onnx: pip install onnx") from None
    return onnx


def onnx_file(policy: Policy, path: str | os.PathLike) -> Path:
    """Writes the model of a policy's mean action, atomically, after its actions were compared with the policy's.

    Returns:
      `path`.

    Raises:
      BadInput: onnx is not installed; the path cannot be written; the model's actions differ by more than TOLERANCE. One line.
    """
    onnx, path = check(path), Path(path)
    made = model(policy, onnx)
    onnx.checker.check_model(made, full_check=True)

    def write(temporary: Path) -> None:
        temporary.write_bytes(made.SerializeToString())
        apart = difference(temporary.read_bytes(), policy, onnx)
        if not apart <= TOLERANCE:
            raise BadInput(f"{path}: not written, its actions differ from the policy's by {apart:.2g}: try another version of onnx")

    try:
        write_atomically(path, write)
    except (PermissionError, IsADirectoryError, NotADirectoryError, FileExistsError) as error:
        raise BadInput(f"--export {path}: {error.strerror}: name a file that can be written") from None
    return path
