"""A progress bar on stderr: redrawn in place on a terminal, a few lines elsewhere."""

import sys
import time

_REDRAW_S = 0.1
_WIDTH = 30


class Progress:
    """Counts ``n_steps`` steps under ``label``; silent if ``quiet``."""

    def __init__(self, label, n_steps, *, quiet=False, stream=None):
        self.label, self.n_steps, self.quiet, self.stream = label, n_steps, quiet, stream or sys.stderr
        self.n_done, self.started, self.drawn = 0, time.monotonic(), 0.0

    def step(self):
        """One more step is done."""
        self.n_done += 1
        if self.quiet:
            return
        now, is_last = time.monotonic(), self.n_done == self.n_steps
        count = f"{self.n_done}/{self.n_steps} steps, {now - self.started:.0f} s"
        if not self.stream.isatty():
            if self.n_done * 4 // self.n_steps > (self.n_done - 1) * 4 // self.n_steps:
                print(f"{self.label}: {count}", file=self.stream, flush=True)
        elif is_last or now - self.drawn >= _REDRAW_S:
            self.drawn = now
            bar = "#" * (_WIDTH * self.n_done // self.n_steps)
            end = "\n" if is_last else ""
            print(f"\r{self.label:<9} [{bar:.<{_WIDTH}}] {count}", end=end, file=self.stream, flush=True)
