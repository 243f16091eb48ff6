"""What comes with the package: two models, accelerate's configurations, a table of the noise controls."""

from importlib import resources
from pathlib import Path

PACKAGED = ("tiny/base", "tiny/teacher")
"""The packaged models by name. A folder of that name comes first."""


def packaged(name: str) -> Path:
    """The folder of a packaged model."""
    return Path(str(resources.files("opdgeo").joinpath("assets", *name.split("/"))))
