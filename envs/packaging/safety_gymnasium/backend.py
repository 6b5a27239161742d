"""Build backend that repackages the published safety-gymnasium 1.0.0 wheel with usable dependencies.

Why: the wheel's metadata pins mujoco==2.3.3, gymnasium==0.28.1, pygame==2.1.0 and gymnasium-robotics==1.2.2.
pygame 2.1.0 has no wheels for Python 3.11 or later, and mujoco 2.3.3 is far older than any MJX we can use, although
the files we need (the MuJoCo models among its assets) work with current versions. pip has no per-requirement
`--no-deps`, so a plain `pip install -r requirements.txt` could not install the package as published.

How: requirements.txt names this folder, so pip calls `build_wheel` below (PEP 517). It downloads the original
wheel with pip itself, under whatever index settings the user has, and pip checks its SHA-256. Every file of the
package is copied byte for byte; only the `Requires-Dist` lines change. The result is versioned `1.0.0+relaxed`,
so that `pip list` shows that the metadata is not the published one.

The package cannot be imported as it is: its dataclasses have array defaults, which Python 3.11 and later reject,
and its multi-agent tasks import gymnasium-robotics. Its files can be read, though. Find them without importing it:
`importlib.util.find_spec("safety_gymnasium").submodule_search_locations[0]`. envs/reference/compat.py imports it all the same.
"""

import base64
import hashlib
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

NAME, VERSION, LOCAL_VERSION = "safety_gymnasium", "1.0.0", "1.0.0+relaxed"
SHA256 = "1efb19de9316bde563df887660e6be0da98e3962058fe60a0f8db5bffb9e0fe0"
UNPINNED = {"gymnasium", "mujoco"}  # our requirements.txt decides their versions
DROPPED = {"gymnasium-robotics", "pygame"}  # multi-agent tasks and interactive windows only
DIST_INFO = f"{NAME}-{LOCAL_VERSION}.dist-info"


def _download(folder: Path) -> Path:
    requirement = folder / "requirement.txt"
    requirement.write_text(f"{NAME}=={VERSION} --hash=sha256:{SHA256}\n")
    options = ["--require-hashes", "--no-deps", "--only-binary", ":all:", "--dest", str(folder)]
    # pip's own chatter goes to stderr: stdout belongs to the outer pip.
    subprocess.run(
        [sys.executable, "-m", "pip", "download", *options, "-r", str(requirement)], check=True, stdout=sys.stderr
    )
    return next(folder.glob("*.whl"))


def _relax(metadata: str) -> str:
    """Set our version and relax the requirements in the header; the description after it is left alone."""
    header, blank, description = metadata.partition("\n\n")
    lines = []
    for line in header.splitlines():
        requirement = re.match(r"Requires-Dist: ([\w.-]+)", line)
        if requirement and requirement[1] in DROPPED:
            continue
        if requirement and requirement[1] in UNPINNED:
            line = requirement[0]
        lines.append(f"Version: {LOCAL_VERSION}" if line.startswith("Version: ") else line)
    return "\n".join(lines) + blank + description


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    """PEP 517 hook: write the wheel into `wheel_directory` and return its file name."""
    result = f"{NAME}-{LOCAL_VERSION}-py3-none-any.whl"
    record = []
    with (
        tempfile.TemporaryDirectory() as temporary,
        zipfile.ZipFile(_download(Path(temporary))) as source,
        zipfile.ZipFile(Path(wheel_directory) / result, "w", zipfile.ZIP_DEFLATED) as target,
    ):
        for entry in source.infolist():
            path = entry.filename.replace(f"{NAME}-{VERSION}.dist-info", DIST_INFO)
            content = source.read(entry)
            if path == f"{DIST_INFO}/RECORD":
                continue
            if path == f"{DIST_INFO}/METADATA":
                content = _relax(content.decode()).encode()
            target.writestr(path, content)
            digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
            record.append(f"{path},sha256={digest},{len(content)}\n")
        target.writestr(f"{DIST_INFO}/RECORD", "".join(record) + f"{DIST_INFO}/RECORD,,\n")
    return result
