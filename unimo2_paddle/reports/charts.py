"""Curves as SVG inside a page: one small chart per metric, one line per run.

Drawn here rather than by matplotlib because a page of forty charts then costs milliseconds at the end of every run, stays small and needs no
font or script.
"""
import html
import math

WIDTH, HEIGHT = 340, 190
LEFT, RIGHT, TOP, BOTTOM = 56, 20, 8, 24
MOST_POINTS = 300
LOGARITHMIC = 30.0   # a range this many times its smallest value is drawn on a logarithmic scale
COLOURS = ("#1f6fb4", "#d1662f", "#2a9d4a", "#9a4fb0", "#b8960b", "#1aa0a0", "#c23b6b", "#666666")

STYLE = (".charts{display:flex;flex-wrap:wrap;gap:.8rem}figure{margin:0;max-width:100%}figcaption{font-size:85%;font-weight:600}"
         "svg{max-width:100%;height:auto;background:#fff}svg text{font:10px system-ui,sans-serif;fill:#555}"
         "pre{overflow:auto;background:#fafafa;padding:.8rem}"
         "svg .grid{stroke:#e4e4e4}svg polyline{fill:none;stroke-width:1.6}.key{display:inline-block;margin-right:1.2rem}"
         ".key i{display:inline-block;width:1.4rem;height:.25rem;margin-right:.4rem;vertical-align:middle}")


def thinned(points, most=MOST_POINTS):
    """At most ``most`` points: means of neighbours, so that no curve makes a page heavy.

    >>> thinned([(1, 2.0), (2, 4.0), (3, 6.0), (4, 8.0)], most=2)
    [(2, 3.0), (4, 7.0)]
    """
    if len(points) <= most:
        return points
    size = -(-len(points) // most)
    blocks = [points[first:first + size] for first in range(0, len(points), size)]
    return [(block[-1][0], sum(value for _, value in block) / len(block)) for block in blocks]


def ticks(low, high, count=4):
    """Round numbers that divide ``[low, high]`` into about ``count`` parts.

    >>> ticks(0.0, 9.3)
    [0.0, 2.0, 4.0, 6.0, 8.0]
    """
    span = high - low
    if span <= 0 or not math.isfinite(span):
        return [low]
    raw = span / count
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(unit * factor for factor in (1, 2, 2.5, 5, 10) if unit * factor >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(step * number, 12) for number in range(first, math.floor(high / step + 1e-9) + 1)]


def shown(value):
    """A number as short as it can be read.

    >>> [shown(value) for value in (0.00041, 59.667, 12780.4, 1250000.0)]
    ['0.00041', '59.67', '12780', '1250k']
    """
    return f"{value:.4g}" if abs(value) < 1e4 else f"{value:.0f}" if abs(value) < 1e5 else f"{value / 1e3:.4g}k"


def _log_ticks(low, high):
    return [10.0 ** power for power in range(math.ceil(math.log10(low)), math.floor(math.log10(high)) + 1)] or [low, high]


def chart(title, lines):
    """One chart as a ``<figure>``.

    Args:
        title: above it; lines: (label, colour number, points) triples; points are (step, value) pairs in order.
    """
    lines = [(label, colour, thinned(points)) for label, colour, points in lines if points]
    values, steps = ([pair[part] for _, _, points in lines for pair in points] for part in (1, 0))
    low, high, first, last = min(values), max(values), min(steps), max(steps)
    logarithmic = low > 0 and high / low >= LOGARITHMIC
    if not logarithmic:
        margin = 0.05 * (high - low) or abs(high) * 0.1 or 1.0
        low, high = low - margin, high + margin
    scale = math.log10 if logarithmic else float

    def across(step):
        return LEFT + (WIDTH - LEFT - RIGHT) * ((step - first) / (last - first) if last > first else 0.5)

    def up(value):
        return TOP + (HEIGHT - TOP - BOTTOM) * (1 - (scale(value) - scale(low)) / ((scale(high) - scale(low)) or 1.0))

    parts = []
    for value in _log_ticks(low, high) if logarithmic else ticks(low, high):
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{up(value):.1f}" y2="{up(value):.1f}"/>'
                     f'<text x="{LEFT - 5}" y="{up(value) + 3:.1f}" text-anchor="end">{shown(value)}</text>')
    for step in ticks(first, last):
        parts.append(f'<text x="{across(step):.1f}" y="{HEIGHT - 8}" text-anchor="middle">{shown(step)}</text>')
    told = []
    for label, number, points in lines:
        colour = COLOURS[number % len(COLOURS)]
        places = " ".join(f"{across(step):.1f},{up(value):.1f}" for step, value in points)
        told.append(f"{label + ': ' if label else ''}{shown(points[0][1])} at step {points[0][0]}, {shown(points[-1][1])} at step {points[-1][0]}")
        parts.append(f'<polyline points="{places}" stroke="{colour}"><title>{html.escape(told[-1])}</title></polyline>'
                     f'<circle cx="{across(points[-1][0]):.1f}" cy="{up(points[-1][1]):.1f}" r="2.6" fill="{colour}"><title>{html.escape(told[-1])}'
                     "</title></circle>")
    note = " (logarithmic)" if logarithmic else ""
    return (f'<figure><figcaption>{html.escape(title)}{note}</figcaption><svg role="img" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" '
            f'height="{HEIGHT}" aria-label="{html.escape(title + ": " + "; ".join(told), quote=True)}">{"".join(parts)}</svg></figure>')


def chart_sections(runs, labels=None):
    """Every curve of two and more points in ``<h2>`` sections: losses, evaluations, what tells of speed and health.

    Args:
        runs: ``Run`` objects; labels: names of the lines, one per run; with one run no names are needed.
    """
    labels = labels or [""] * len(runs)
    groups = {"Curves: training": [], "Curves: evaluations": [], "Curves: speed and health": []}
    for kind, metric in _order(runs):
        lines = [(label, number, run.curves.get(kind, {}).get(metric, [])) for number, (run, label) in enumerate(zip(runs, labels))]
        loss = metric == "loss" or "/" in metric or "accuracy" in metric
        group = "evaluations" if kind != "train" else "training" if loss else "speed and health"
        if any(len(points) > 1 for _, _, points in lines):  # a point alone stands in the tables
            groups[f"Curves: {group}"].append(chart(metric if kind == "train" else f"{kind}/{metric}", lines))
    return "".join(f'<h2>{group}</h2><div class="charts">{"".join(charts)}</div>' for group, charts in groups.items() if charts)


def _order(runs):
    """(kind, metric) of every curve, in the order in which they were first written; the loss leads, epochs are left out."""
    seen = {}
    for run in runs:
        for kind, metrics in run.curves.items():
            seen.update({(kind, metric): None for metric in metrics if not metric.startswith("epoch")})
    return sorted(seen, key=lambda pair: (pair[0] != "train", pair[1] != "loss"))


def legend(labels):
    """What the colours mean."""
    return "<p>" + "".join(f'<span class="key"><i style="background:{COLOURS[number % len(COLOURS)]}"></i>{html.escape(label)}</span>'
                           for number, label in enumerate(labels)) + "</p>"
