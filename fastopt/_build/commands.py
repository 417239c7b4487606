"""Runs compilers and other programs of a build; errors of a build, with advice to the user."""

import os
import re
import subprocess
import sys
import threading

USE_WRITABLE_CACHE = "free some space, or set FASTOPT_CACHE_DIR to a directory that can be written"
ERROR_LINE = re.compile(
    r"\berror *: |#error|\bfatal *: |\bundefined reference\b|\bcannot find\b|: not found$|: No such file or directory$"
    r"|\bNo space left|^FAILED: |ModuleNotFoundError"
)

# Held while a program is started, and by a thread that forks: a child forked in between would keep open the pipe by
# which the start is reported, and the parent would wait for it.
spawn_lock = threading.RLock()


class BuildError(Exception):
    """A library cannot be built here: ``reason`` is the cause, ``remedy`` the advice to the user."""

    def __init__(self, reason, remedy):
        super().__init__(f"{reason}; {remedy}")
        self.reason = reason
        self.remedy = remedy


class BadVariable(BuildError):
    """An environment variable has a value that cannot be used."""


def spawn(command, stderr=subprocess.STDOUT, **options):
    """Start a program with no input and its output in a pipe."""
    with spawn_lock:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            errors="replace",
            **options,
        )


def query(command):
    """Exit status of a program and its standard output, stripped."""
    process = spawn(command, stderr=subprocess.DEVNULL)
    output = process.communicate()[0].strip()
    return process.returncode, output


def run(command, variables=None, verbose=False, cwd=None):
    """Exit status of a program and the lines it printed, which ``verbose`` passes on to stderr.

    Its environment is ours with ``variables``, but for LD_PRELOAD: a sanitizer's runtime is for tests, not compilers.
    """
    env = {**os.environ, **(variables or {})}
    env.pop("LD_PRELOAD", None)
    log = []
    with spawn(command, env=env, cwd=cwd) as process:
        for line in process.stdout:
            log.append(line.rstrip())
            if verbose:
                print(line, end="", file=sys.stderr)
    return process.returncode, log


def failure_from_log(failed, log, remedies, otherwise):
    """The error to raise for a build that failed, from what it printed.

    Args:
        failed: the step that failed.
        log: lines of its output.
        remedies: pairs of a pattern to look for in the lines and the advice if it is found.
        otherwise: the advice if none is found.
    """
    errors = [line for line in log if ERROR_LINE.search(line)] or log[-4:]
    reason = "\n    ".join([f"{failed}:", *(line[:200] for line in errors[:6])])
    remedies = [("No space left on device", USE_WRITABLE_CACHE), *remedies]
    found = (remedy for pattern, remedy in remedies if any(re.search(pattern, line) for line in log))
    return BuildError(reason, next(found, otherwise))
