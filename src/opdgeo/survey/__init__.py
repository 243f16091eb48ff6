"""From two checkpoints, a trajectory or several updates to the data files: pairing, the loop over matrices, the tables."""

from opdgeo.survey.results import Result, load_result
from opdgeo.survey.run import compare, relate, track

__all__ = ["Result", "compare", "load_result", "relate", "track"]
