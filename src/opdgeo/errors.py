"""The one exception family. The command line maps each of these to exit status 2 and prints its message alone."""


class OpdgeoError(Exception):
    """A request that cannot be met: the message says what arrived, what was expected and what to try."""


class CheckpointError(OpdgeoError):
    """A checkpoint is missing, damaged, or in a form that cannot be read."""


class PairingError(OpdgeoError):
    """Two checkpoints do not belong to the same architecture, or their tensors disagree in shape."""


class NumericsError(OpdgeoError):
    """A matrix for which the asked quantity cannot be computed."""


class ConfigError(OpdgeoError):
    """A setting, preset or folder that cannot be used."""
