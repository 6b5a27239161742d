"""Checkpoints as files of NumPy arrays. Nothing here imports JAX, so that a trained policy can be used without it (policy.py).

A checkpoint is a safetensors file: opening it runs no code. Its header holds `meta`, JSON that says what the file is of. An array is
named by its path in the tree of parameters; the last layer's index depends on the number of hidden layers:

    actor/params/Dense_0/kernel, bias       (obs_size, width), (width,)
    actor/params/Dense_1/kernel, bias       (width, width), (width,)
    actor/params/Dense_2/kernel, bias       (width, 2 action_size), (2 action_size,): mean, then what the deviation is made of
    prior/params/...                        the same of the offline policy, in files of finetuners
    critics/reward/params/VmapCritic_0/...  Dense_0 to Dense_2 of all reward critics, stacked: (critics, inputs, width), (critics, width)
    critics/cost/params/VmapCritic_0/...    the same of the cost critics; inputs: observation, then what only critics see, then action
    multiplier                              () lambda, in files of finetuners

A policy sees sign(x) log(1 + |x|) of each observation x, or x if its `meta` says so (config, symlog: false). Its action is tanh(u), where u
is Gaussian with the mean and the log standard deviation -5 + 3.5 (1 + tanh(y)); y is the second half of the outputs.
"""

import errno
import functools
import json
import os
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import safetensors
import safetensors.numpy

Arrays = dict[str, np.ndarray]


class BadInput(ValueError):
    """An argument or a file that cannot be used; the message is one line that names the mend."""


def checksum(arrays: Arrays) -> int:
    """CRC-32 of all arrays in the order of their names."""
    return functools.reduce(lambda crc, name: zlib.crc32(arrays[name].tobytes(), crc), sorted(arrays), 0)


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """`write(temporary path)`, then the rename: at no moment is there half a file at `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save(path: Path, arrays: Arrays, meta: dict) -> None:
    """Writes arrays, atomically, with `meta` as JSON in the header."""
    about = {"meta": json.dumps(meta | {"crc32": checksum(arrays)}, default=str)}

    def write(temporary):
        try:
            safetensors.numpy.save_file(arrays, temporary, about)
        except safetensors.SafetensorError as error:  # its I/O errors carry no errno
            if "No space left" in str(error) or "File too large" in str(error):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from None
            raise

    write_atomically(path, write)


def load(path: Path, foreign: bool = False) -> tuple[Arrays, dict]:
    """({path in the tree: array}, meta) of a file that `save` wrote; BadInput if it is not one or damaged.

    With `foreign`, also of other safetensors files, whose meta is empty.
    """
    path = Path(path)
    try:
        with safetensors.safe_open(path, "numpy") as file:
            header = file.metadata() or {}
            arrays = {k: file.get_tensor(k) for k in file.keys()}
        if foreign and "meta" not in header:
            return arrays, {}
        meta = json.loads(header["meta"])
        intact = meta["crc32"] == checksum(arrays)
    except FileNotFoundError:
        raise BadInput(f"{path}: no such checkpoint; runs leave theirs in runs/ENV/ALGO/STAMP/") from None
    except (safetensors.SafetensorError, OSError, KeyError, TypeError, ValueError):
        intact = False
    if not intact:
        mend = "delete it to have it made anew" if "offline" in path.parts else "name a checkpoint-seed*.safetensors of a run folder"
        raise BadInput(f"{path}: {'a folder' if path.is_dir() else 'damaged, or no checkpoint of this suite'}: {mend}")
    return arrays, meta


def load_policy(path: Path) -> tuple[Arrays, dict]:
    """`load` of a checkpoint that holds a policy."""
    arrays, meta = load(path)
    if not {"env", "config"} <= meta.keys() or not any(name.startswith("actor/") for name in arrays):
        raise BadInput(f"{path}: holds no policy: name a checkpoint-seed*.safetensors of a run folder")
    return arrays, meta


def layers(arrays: Arrays, prefix: str, source: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """[(kernel (..., inputs, outputs), bias (..., outputs))] of the network below `prefix`, from its input on, in float32.

    BadInput if the arrays there are missing, do not follow on each other, or are not finite.
    """
    own = {name.removeprefix(prefix): x for name, x in arrays.items() if name.startswith(prefix)}
    found = []
    while f"Dense_{len(found)}/kernel" in own and f"Dense_{len(found)}/bias" in own:
        found.append(tuple(np.asarray(own[f"Dense_{len(found)}/{part}"], np.float32) for part in ("kernel", "bias")))
    if not found or len(own) != 2 * len(found):
        raise BadInput(f"{source}: holds no network {prefix}Dense_0/kernel, {prefix}Dense_0/bias, {prefix}Dense_1/kernel and so on")
    shapes = [(*kernel.shape[:-2], kernel.shape[-1]) if kernel.ndim > 1 else None for kernel, _ in found]
    chained = all(before == (*kernel.shape[:-2], kernel.shape[-2]) for before, (kernel, _) in zip(shapes, found[1:]) if kernel.ndim > 1)
    if not chained or any(shape != bias.shape for shape, (_, bias) in zip(shapes, found)):
        raise BadInput(f"{source}: the layers of {prefix} do not fit each other")
    if not all(np.isfinite(x).all() for layer in found for x in layer):
        raise BadInput(f"{source}: {prefix} holds NaN or infinite numbers: name another checkpoint")
    return found
