"""Opening checkpoints as named, typed tensors that are read one at a time, and pairing two of them."""

from opdgeo.checkpoints.checkpoint import Checkpoint
from opdgeo.checkpoints.names import ROLES, Matrix
from opdgeo.checkpoints.opening import open_checkpoint, run_checkpoints, tell_apart
from opdgeo.checkpoints.pairing import Pairing, pair

__all__ = ["ROLES", "Checkpoint", "Matrix", "Pairing", "open_checkpoint", "pair", "run_checkpoints", "tell_apart"]
