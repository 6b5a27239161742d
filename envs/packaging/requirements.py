"""Writes requirements*.txt from pyproject.toml: `python envs/packaging/requirements.py`, or `--check` to see whether they are as it says.

`--lock` also renews requirements.lock, by `uv pip compile` (pip install uv), to the newest versions that the ranges allow.
"""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MADE = "# Made from pyproject.toml by envs/packaging/requirements.py.\n"
USE = """# Direct dependencies, as ranges known to work together on Python 3.11, 3.12 and 3.13.
# Install from the repository root (one entry is a relative path):
#     pip install -r requirements.txt                        # newest versions in range
#     pip install -r requirements.txt -c requirements.lock   # exact versions (what `make setup` does)
"""
GPU = """# For `--backend warp` on an NVIDIA GPU (Linux, driver for CUDA 13): pip install -r requirements-gpu.txt
-r requirements.txt
"""
RAY = "# For `make sweep LAUNCHER=ray` only: .venv/bin/python -m pip install -r requirements-ray.txt (the same on every node).\n"
LOCK = """# Exact versions of every installed package, used as constraints: pip install -r requirements.txt -c requirements.lock
# One set serves Python 3.11, 3.12 and 3.13. safety-gymnasium is absent because its own folder pins it, by hash.
"""


def files() -> dict[str, str]:
    """{file name: content} of all that pyproject.toml determines."""
    text = (ROOT / "pyproject.toml").read_text()
    table = tomllib.loads(text)
    folder = table["tool"]["uv"]["sources"]["safety-gymnasium"]["path"]
    # tomllib drops comments, which say why: take those lines as they stand.
    block = re.search(r"^dependencies = \[\n(.*?)^\]", text, re.S | re.M)
    assert block
    lines = [line.strip().rstrip(",").strip('"').replace("'", '"') if line.strip()[:1] == '"' else line.strip() for line in block[1].splitlines()]
    lines = [f"./{folder}" if line == "safety-gymnasium" else line for line in lines]
    extras, dev = table["project"]["optional-dependencies"], table["dependency-groups"]["dev"]
    return {
        "requirements.txt": "\n".join([MADE + USE, *lines, "", "# --- tests and checks", *dev, ""]),
        "requirements-gpu.txt": "\n".join([MADE + GPU.rstrip(), *extras["cuda13"], ""]),
        "requirements-ray.txt": "\n".join([MADE + RAY.rstrip(), *extras["ray"], ""]),
    }


def lock() -> None:
    """Renews requirements.lock."""
    command = ["uv", "pip", "compile", "requirements.txt", "--python-version", "3.11", "--no-annotate", "--no-header", "--upgrade", "--quiet"]
    found = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout
    lines = [line for line in found.splitlines() if re.match(r"[\w.-]+==", line)]
    (ROOT / "requirements.lock").write_text(LOCK + "\n".join(lines) + "\n")


def main(words: list[str]) -> int:
    if words not in ([], ["--check"], ["--lock"]):
        sys.exit(f"{' '.join(words)}: only --check or --lock")
    odd = [name for name, content in files().items() if not (ROOT / name).exists() or (ROOT / name).read_text() != content]
    if words == ["--check"]:
        print("\n".join(f"{name}: not what pyproject.toml says: run python envs/packaging/requirements.py" for name in odd), file=sys.stderr)
        return int(bool(odd))
    for name in odd:
        (ROOT / name).write_text(files()[name])
    if words == ["--lock"]:
        lock()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
