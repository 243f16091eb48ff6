"""How many examples hypothesis tries of a law: `OPDGEO_EXAMPLES` in the environment, or the few of every day."""

from __future__ import annotations

import os
from typing import Any

from hypothesis import settings


def examples(usual: int, **more: Any) -> settings:
    return settings(max_examples=int(os.environ.get("OPDGEO_EXAMPLES", usual)), deadline=None, **more)
