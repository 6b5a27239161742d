"""Whether a file can be written, asked before the work that it is for."""

import os
import tempfile
from pathlib import Path


def obstacle(path: Path) -> str | None:
    """Why no file can be written at `path`, in the system's words; None if one can. Nothing is left behind, and no folder made."""
    try:
        # Access rights do not tell: root has them everywhere, /proc and read-only mounts included.
        with tempfile.TemporaryFile(dir=next(folder for folder in path.absolute().parents if folder.exists())):
            return None
    except OSError as error:
        return os.strerror(error.errno or 0)
