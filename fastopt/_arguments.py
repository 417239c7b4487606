"""Shared by the commands: types of arguments, and the meaning of exit statuses."""

import argparse
import math
import os
from pathlib import Path

EXIT_STATUS = """\
Exit status: 0 success; 1 the answer is no: trainings disagree, a result is wrong, something has become slower or is
gone; 2 bad input: an argument, a file, an environment variable, or a learning rate at which both trainings diverge; 3
what should not fail has failed: kernels cannot be built or loaded, or something crashed; 130 after Ctrl-C."""


def at_least(lowest):
    """Type of a whole number >= ``lowest``."""

    def integer(text):
        value = int(text)
        if value < lowest:
            raise argparse.ArgumentTypeError(f"must be >= {lowest}, got {value}")
        return value

    return integer


def non_negative(text):
    """A finite number >= 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"must be >= 0 and finite, got {text}")
    return value


def new_file(text):
    """The path of a file that can be written, judging by its directory."""
    path = Path(text)
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f"must be a file in a directory that exists, got {text!r}")
    if not os.access(path if path.exists() else path.absolute().parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"must be a file that can be written, got {text!r}")
    return path
