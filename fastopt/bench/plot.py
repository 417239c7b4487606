"""Draws ratios as a PNG: one bar a case, torch's and its compiler's time over fastopt's."""

FASTOPT_COLOR, COMPILE_COLOR, COPY_COLOR = "#1f77b4", "#ee4c2c", "#999999"
BARS = (
    ("ratio", "fastest torch / fastopt", FASTOPT_COLOR),
    ("ratio_to_compile", "torch.compile / fastopt", COMPILE_COLOR),
    ("of_copy", "plain copy / fastopt", COPY_COLOR),
)


def save(file, reported):
    """Write the picture to ``file``.

    Raises:
        ImportError: there is no matplotlib.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    results = reported["results"]
    figure = Figure(figsize=(11, 2 + 0.45 * len(results)), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    height = 0.8 / len(BARS)
    for index, (key, label, color) in enumerate(BARS):
        bars = [(place + (index - 1) * height, result[key]) for place, result in enumerate(results) if result[key]]
        if not bars:
            continue
        places, values = zip(*bars, strict=True)
        axis.barh(places, [value - 1 for value in values], height, left=1, color=color, label=label)
        for place, value in bars:
            away = 3 if value >= 1 else -3
            side = "left" if value >= 1 else "right"
            place_and_text = (f"{value:.2f}x", (value, place), (away, 0))
            axis.annotate(*place_and_text, textcoords="offset points", ha=side, va="center", fontsize="x-small")
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
    where = machine["gpu"]["name"] if machine["gpu"] else f"{machine['processor']}, {machine['threads']} threads"
    axis.set_title(f"{where}, torch {machine['torch']}", fontsize="medium")
    figure.savefig(file, dpi=110, format="png")
