"""Draws ratios as a PNG: one bar a case, torch's and its compiler's time over fastopt's."""

BARS = (
    ("ratio", "fastest torch / fastopt", "#1f77b4"),
    ("ratio_to_compile", "torch.compile / fastopt", "#ee4c2c"),
    ("of_copy", "plain copy / fastopt", "#999999"),
)


def save(file, reported):
    """Write the picture to ``file``.

    Raises:
        ImportError: there is no matplotlib.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    results = reported["results"]
    figure = Figure(figsize=(11, 2 + 0.45 * len(results)), layout="constrained")
    axis = figure.subplots()
    height = 0.8 / len(BARS)
    for index, (key, label, color) in enumerate(BARS):
        bars = [(place + (index - 1) * height, result[key]) for place, result in enumerate(results) if result[key]]
        if not bars:
            continue
        places, values = zip(*bars, strict=True)
        drawn = axis.barh(places, [value - 1 for value in values], height, left=1, color=color, label=label)
        axis.bar_label(drawn, [f"{value:.2f}x" for value in values], padding=3, fontsize="x-small")
    axis.axvline(1, color="black", linewidth=0.8)
    axis.set(xscale="log", xlabel="time over fastopt's (log scale); right of 1 fastopt is faster")
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_yticks(range(len(results)), [result["name"] for result in results], fontsize="small")
    axis.invert_yaxis()
    axis.margins(x=0.12, y=0.01)
    axis.set_axisbelow(True)
    axis.grid(axis="x", alpha=0.3)
    axis.legend(loc="best", fontsize="small")
    machine = reported["machine"]
    chip = machine["gpu"]["name"] if machine["gpu"] else f"{machine['processor']}, {machine['threads']} threads"
    axis.set_title(f"{chip}, torch {machine['torch']}", fontsize="medium")
    figure.savefig(file, dpi=110, format="png")
