"""From two checkpoints or a trajectory to the data files: pairing, the loop over matrices, the tables."""

from opdgeo.survey.results import Result, load_result
from opdgeo.survey.run import compare, track

__all__ = ["Result", "compare", "load_result", "track"]
