"""``unimo2 compare``: several runs side by side: which keys differ, what they came to, how fast they were, their curves in one chart."""
import html
import os
from collections import Counter

from unimo2_paddle.errors import UserInputError
from unimo2_paddle.reports.charts import STYLE as CHART_STYLE
from unimo2_paddle.reports.charts import chart_sections, legend, shown
from unimo2_paddle.reports.runs import flat, read_run
from unimo2_paddle.tasks.reporting import STYLE, page_start, table, write_text
from unimo2_paddle.training.status import duration

SPEED = (("samples a second", "ips"), ("seconds a step", "batch_cost"), ("of which reading", "reader_cost"), ("tokens a second", "tokens_per_second"),
         ("share of the machine's ceiling", "mfu"), ("peak memory, MB", "peak_memory_mb"))
NOTHING = "-"
WIDEST = 40  # characters of a cell on the screen; the page has all of them


def compare_runs(directories, path=None):
    """Write the page and give the text of ``unimo2 compare``.

    Args:
        directories: two or more ``run.output``; path: the page; default: ``compare.html`` in the directory that holds all of them.

    Returns:
        the tables as text; its last line names the page.

    Raises:
        UserInputError: fewer than two runs, the same one twice, or a directory without a run.
    """
    real = [os.path.realpath(directory) for directory in directories]
    if len(set(real)) < 2 or len(set(real)) < len(real):
        raise UserInputError(f"two or more different runs are needed to compare, got {', '.join(map(str, directories)) or 'none'}")
    runs = [read_run(directory) for directory in directories]
    labels = short_names([run.name for run in runs])
    path = path or os.path.join(os.path.commonpath([os.path.dirname(place) for place in real]), "compare.html")
    tables = [("Keys that differ", differing_keys(runs)), ("Figures", figures(runs)), ("Speed", speed(runs))]
    parts = [page_start("Runs compared", STYLE + CHART_STYLE), legend(labels)]
    parts += [table(name, ["", *labels], rows) if rows else f"<h2>{html.escape(name)}</h2><p>none</p>" for name, rows in tables]
    parts += [legend(labels), chart_sections(runs, labels)]
    try:
        write_text(path, "\n".join(parts) + "\n")
    except OSError as error:
        raise UserInputError(f"{path} cannot be written: {error.strerror}; give another --out") from None
    text = [_text(name, ["", *labels], rows) for name, rows in tables if rows]
    if not tables[0][1]:
        text.insert(0, "The configurations do not differ.")
    return "\n\n".join([*text, f"page with curves: {path}"])


def short_names(names):
    """The names without the directories that all of them share, as far as they stay different.

    >>> short_names(["output/demo/vqa", "output/demo/vqa_large"])
    ['vqa', 'vqa_large']
    """
    parts = [name.replace("\\", "/").split("/") for name in names]
    while all(len(own) > 1 for own in parts) and len({own[0] for own in parts}) == 1:
        parts = [own[1:] for own in parts]
    return ["/".join(own) for own in parts]


def differing_keys(runs):
    """Rows (key, value of every run) of the configuration keys whose values differ; where a run writes to is left out.

    Of runs of different tasks the keys that only one of them has are left out: every key of a group would be one.
    """
    flats = [flat(run.config) for run in runs]
    owners = Counter(key for own in flats for key in own)
    least = 1 if len({own.get("task") for own in flats}) == 1 else 2
    return [[key, *(str(own.get(key, NOTHING)) for own in flats)] for key, count in owners.items()
            if key != "run.output" and count >= least and len({str(own.get(key, NOTHING)) for own in flats}) > 1]


def figures(runs):
    """Rows (figure, value of every run): evaluations, then judgements during training as ``best (last)``."""
    rows = []
    names = dict.fromkeys((name, metric) for run in runs for name, entry in run.evaluations.items() for metric in entry.get("metrics", {}))
    for name, metric in names:
        values = [run.evaluations.get(name, {}).get("metrics", {}).get(metric) for run in runs]
        rows.append([f"{name}/{metric} evaluated", *(NOTHING if value is None else shown(value) for value in values)])
    judged = [run.judgements() for run in runs]
    for key in dict.fromkeys(key for own in judged for key in own):
        rows.append(["/".join(key) + " best model (last)", *(_best_and_last(own.get(key)) for own in judged)])
    losses = [run.curves.get("train", {}).get("loss") for run in runs]
    if any(losses):
        rows.append(["training loss, last", *(shown(points[-1][1]) if points else NOTHING for points in losses)])
    return rows


def _best_and_last(pair):
    if pair is None:
        return NOTHING
    best, last = pair
    return f"({shown(last)})" if best is None else f"{shown(best)} ({shown(last)})"


def speed(runs):
    """Rows (figure, value of every run): medians over the log lines, peak memory, steps and time."""
    rows = []
    for title, name in SPEED:
        series = [sorted(value for _, value in run.curves.get("train", {}).get(name, [])) for run in runs]
        if any(series):
            rows.append([title, *((shown(own[-1] if name.startswith("peak") else own[len(own) // 2]) if own else NOTHING) for own in series)])
    if any(run.status for run in runs):
        rows.append(["steps", *(f"{run.status.get('step', 0)} of {run.status.get('total_steps', 0)}" if run.status else NOTHING for run in runs)])
        times = (run.status.get("updated", 0) - run.status.get("started", 0) for run in runs)
        rows.append(["time of the last start", *(duration(seconds) if run.status else NOTHING for run, seconds in zip(runs, times))])
    return rows


def _text(title, head, rows):
    grid = [[title, *head[1:]], *([line[0], *(cell if len(cell) <= WIDEST else cell[:WIDEST - 3] + "..." for cell in line[1:])] for line in rows)]
    widths = [max(len(line[place]) for line in grid) for place in range(len(head))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in grid)
