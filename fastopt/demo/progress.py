"""A progress bar on stderr: redrawn in place on a terminal, a few lines elsewhere."""

import sys
import time

_REDRAW_S = 0.1
_WIDTH = 30


class Progress:
    """Counts ``n_steps`` steps under ``label``; silent if ``quiet``."""

    def __init__(self, label, n_steps, *, quiet=False, stream=None):
        self.label, self.n_steps, self.quiet = label, n_steps, quiet
        self.stream = stream or sys.stderr
        self.redraws = self.stream.isatty()
        self.n_done, self.started, self.drawn = 0, time.monotonic(), 0.0

    def step(self):
        """One more step is done."""
        self.n_done += 1
        if self.quiet:
            return
        now, last = time.monotonic(), self.n_done == self.n_steps
        if self.redraws and (last or now - self.drawn >= _REDRAW_S):
            self.drawn = now
            filled = _WIDTH * self.n_done // self.n_steps
            bar = "#" * filled + "." * (_WIDTH - filled)
            self._write(f"\r{self.label:<9} [{bar}] {self._count(now)}" + "\n" * last)
        elif not self.redraws and (last or self.n_done * 4 // self.n_steps > (self.n_done - 1) * 4 // self.n_steps):
            self._write(f"{self.label}: {self._count(now)}\n")

    def _count(self, now):
        return f"{self.n_done}/{self.n_steps} steps, {now - self.started:.0f} s"

    def _write(self, text):
        self.stream.write(text)
        self.stream.flush()
