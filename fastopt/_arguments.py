"""Types of command-line arguments that the commands share."""

import argparse
import math
from pathlib import Path


def at_least(lowest):
    """A whole number that is ``lowest`` or more."""

    def integer(text):
        value = int(text)
        if value < lowest:
            raise argparse.ArgumentTypeError(f"must be >= {lowest}, got {value}")
        return value

    return integer


def non_negative(text):
    """A number that is 0 or more."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"must be >= 0 and finite, got {text}")
    return value


def new_file(text):
    """The path of a file that can be written, as far as its directory tells."""
    path = Path(text)
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f"must be a file in a directory that exists, got {text!r}")
    return path
