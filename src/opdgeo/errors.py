"""The one exception family. The command line maps each of these to exit status 2 and prints its message alone."""

LONGEST = 1 << 13  # characters of a message: a name in a file may be longer than any screen


def printable(text: str) -> str:
    r"""A name from an untrusted file as it may be shown and stored: what is not printed, or is half a character, is escaped.

    >>> printable("layers.0\x1b[2J")
    'layers.0\\x1b[2J'
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class OpdgeoError(Exception):
    """A request that cannot be met: the message says what arrived, what was expected and what to try.

    What arrived may be a name from an untrusted file: control characters, which a terminal would obey, are replaced.
    """

    def __str__(self) -> str:
        text = super().__str__()
        if len(text) > LONGEST:
            text = f"{text[: LONGEST // 2]} … {text[-LONGEST // 2 :]}"
        return "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in text)


class CheckpointError(OpdgeoError):
    """A checkpoint is missing, damaged, or in a form that cannot be read."""


class PairingError(OpdgeoError):
    """Two checkpoints do not belong to the same architecture, or their tensors disagree in shape."""


class NumericsError(OpdgeoError):
    """A matrix for which the asked quantity cannot be computed."""


class ConfigError(OpdgeoError):
    """A setting, preset or folder that cannot be used."""
