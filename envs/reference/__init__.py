"""The real packages behind this suite's interface: env.py over pool.py over worker.py; compat.py lets the older one run today.

`bullet/` before a name asks for Bullet-Safety-Gym (`bullet/SafetyBallRun`), the backend `safety-gymnasium` for Safety-Gymnasium.
"""

import re

BACKEND, BULLET = "safety-gymnasium", "bullet/"


def wanted(name: str, backend: str | None, native: set[str]) -> bool:
    """Whether `name` is to be made here: asked for by backend or prefix, or an id that is not among the native names."""
    foreign = bool(re.fullmatch(r"Safety\w+-v\d", name)) and name not in native
    return name.startswith(BULLET) or backend == BACKEND or (backend is None and foreign)
