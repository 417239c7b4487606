"""Draws the outcome of the demo as a PNG: losses of both trainings above, times of each part below."""

from .report import COLUMNS

SMOOTHING = 0.9
RUNS = (("torch", "#ee4c2c", 3.5, -0.2), ("fastopt", "#1f77b4", 1.2, 0.2))  # color, width of its line, place of its bar


def save(file, config, comparisons):
    """Write the picture to ``file``.

    Raises:
        ImportError: there is no matplotlib.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2 + 4.2 * len(comparisons), 7.5), layout="constrained")
    axes = figure.subplots(2, len(comparisons), squeeze=False)
    for (above, below), outcome in zip(axes.T, comparisons, strict=True):
        for run, color, width, offset in RUNS:
            found = getattr(outcome, run)
            label = f"{run}, test accuracy {found['accuracy_percent']:.2f} %"
            steps = range(1, len(found["losses"]) + 1)
            above.plot(steps, _smooth(found["losses"]), color=color, linewidth=width, label=label)
            places = [index + offset for index in range(len(COLUMNS))]
            below.bar(places, [found["median_ms"][column] for column in COLUMNS], 0.4, color=color, label=run)
        for index, column in enumerate(COLUMNS):
            height = max(outcome.torch["median_ms"][column], outcome.fastopt["median_ms"][column])
            place = dict(xy=(index, height), xytext=(0, 3), textcoords="offset points", ha="center")
            below.annotate(f"{outcome.speedup[column]:.2f}x", **place, fontsize="small")
        above.set(title=outcome.optimizer, xlabel="step", ylabel="training loss, smoothed", ylim=(0, None))
        below.set_xticks(range(len(COLUMNS)), COLUMNS)
        below.set(yscale="log", ylabel="median ms (log scale), torch/fastopt above")
        below.margins(y=0.12)
        for axis, grid in ((above, "both"), (below, "y")):
            axis.legend(fontsize="small")
            axis.grid(axis=grid, alpha=0.3)
    figure.suptitle(f"{config.model}, batch {config.batch_size}, {config.steps} steps, seed {config.seed}")
    figure.savefig(file, dpi=110, format="png")


def _smooth(losses):
    """Exponential moving average, its start not biased towards zero."""
    smoothed, total, weight = [], 0.0, 0.0
    for loss in losses:
        total, weight = SMOOTHING * total + loss, SMOOTHING * weight + 1
        smoothed.append(total / weight)
    return smoothed
