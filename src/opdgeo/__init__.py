"""opdgeo: where post-training moves a language model's weights. Importing this package imports no torch."""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from opdgeo.api import Result, compare, load, relate, track
    from opdgeo.checkpoints import open_checkpoint
    from opdgeo.diagnostics import Settings
    from opdgeo.training.channel import Channel
    from opdgeo.training.monitor import GeometryMonitor

__version__ = version("opdgeo")

_HOMES = {
    "Channel": "opdgeo.training.channel",
    "GeometryMonitor": "opdgeo.training.monitor",
    "Result": "opdgeo.api",
    "Settings": "opdgeo.diagnostics",
    "compare": "opdgeo.api",
    "load": "opdgeo.api",
    "open_checkpoint": "opdgeo.checkpoints",
    "relate": "opdgeo.api",
    "track": "opdgeo.api",
}
__all__ = [
    "Channel",
    "GeometryMonitor",
    "Result",
    "Settings",
    "compare",
    "load",
    "open_checkpoint",
    "relate",
    "track",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'opdgeo' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
