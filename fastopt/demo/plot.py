"""Draws the outcome of the demo as a PNG: losses of both trainings above, times of each part below."""

from .report import COLUMNS

TORCH_COLOR, FASTOPT_COLOR = "#ee4c2c", "#1f77b4"
SMOOTHING = 0.9


def save(file, config, comparisons):
    """Write the picture to ``file``.

    Raises:
        ImportError: there is no matplotlib.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2 + 4.2 * len(comparisons), 7.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, len(comparisons), squeeze=False)
    for column, outcome in enumerate(comparisons):
        _losses(axes[0][column], outcome)
        _times(axes[1][column], outcome)
    figure.suptitle(f"{config.model}, batch {config.batch_size}, {config.steps} steps, seed {config.seed}")
    figure.savefig(file, dpi=110, format="png")


def _losses(axis, outcome):
    for run, color, width in (("torch", TORCH_COLOR, 3.5), ("fastopt", FASTOPT_COLOR, 1.2)):
        losses = getattr(outcome, run)["losses"]
        steps = range(1, len(losses) + 1)
        label = f"{run}, test accuracy {getattr(outcome, run)['accuracy_percent']:.2f} %"
        axis.plot(steps, _smooth(losses), color=color, linewidth=width, label=label)
    axis.set(title=outcome.optimizer, xlabel="step", ylabel="training loss, smoothed", ylim=(0, None))
    axis.legend(fontsize="small")
    axis.grid(alpha=0.3)


def _times(axis, outcome):
    for offset, run, color in ((-0.2, "torch", TORCH_COLOR), (0.2, "fastopt", FASTOPT_COLOR)):
        median_ms = getattr(outcome, run)["median_ms"]
        places = [index + offset for index in range(len(COLUMNS))]
        axis.bar(places, [median_ms[column] for column in COLUMNS], 0.4, color=color, label=run)
    for index, column in enumerate(COLUMNS):
        height = max(outcome.torch["median_ms"][column], outcome.fastopt["median_ms"][column])
        text = f"{outcome.speedup[column]:.2f}x"
        axis.annotate(text, (index, height), (0, 3), textcoords="offset points", ha="center", fontsize="small")
    axis.set_xticks(range(len(COLUMNS)), COLUMNS)
    axis.set(yscale="log", ylabel="median ms (log scale), torch/fastopt above")
    axis.margins(y=0.12)
    axis.legend(fontsize="small")
    axis.grid(axis="y", alpha=0.3)


def _smooth(losses):
    """Exponential moving average, its start not biased towards zero."""
    smoothed, total, weight = [], 0.0, 0.0
    for loss in losses:
        total, weight = SMOOTHING * total + loss, SMOOTHING * weight + 1
        smoothed.append(total / weight)
    return smoothed
