"""``report.html`` of a run: how it went, what it came to beside what was expected, examples, configuration, environment; one file, no links out."""
import html
import os

import yaml

from unimo2_paddle.config import SOURCE
from unimo2_paddle.reports.charts import STYLE as CHART_STYLE
from unimo2_paddle.reports.charts import chart_sections, shown
from unimo2_paddle.reports.expected import comparisons, told
from unimo2_paddle.reports.runs import read_run
from unimo2_paddle.tasks.reporting import STYLE, examples_of, page_start, table, write_text
from unimo2_paddle.training.status import duration

FILE = "report.html"


def write_run_report(directory, path=None):
    """Write the report of the run in ``directory``; it can be written again at any time, also while the run goes on.

    Args:
        directory: ``run.output`` of a training run or an evaluation; path: the page; default: ``report.html`` in the directory.

    Returns:
        the page's path.

    Raises:
        UserInputError: there is no run, or its files are damaged.
    """
    run = read_run(directory)
    path = path or os.path.join(run.directory, FILE)
    parts = [page_start(f"{run.config.get('task', 'Run')}: {run.name}", STYLE + CHART_STYLE), _summary(run), _expected(run), _judged(run), _evaluated(run),
             chart_sections([run]), _examples(run), _config(run), _environment(run)]
    write_text(path, "\n".join(part for part in parts if part) + "\n")
    return path


def _summary(run):
    status = run.status
    if not status:
        return ""
    rows = [("state", status.get("state", "unknown")), ("steps", f"{status.get('step', 0)} of {status.get('total_steps', 0)}"),
            ("time", duration(status.get("updated", 0) - status.get("started", 0))), ("workers", status.get("workers", 1))]
    best = status.get("best")
    if best:
        rows.append(("best", f"{best['metric']} {shown(best['value'])} at step {best['step']}"))
    if status.get("bad_steps"):
        rows.append(("steps left out", f"{status['bad_steps']}, their loss or gradient was not finite"))
    if status.get("error"):
        rows.append(("error", status["error"]))
    return table("Run", ["", ""], rows)


def _expected(run):
    lines = "".join(f"<p><b>{html.escape(word)}</b> {html.escape(text)}</p>" for word, text in told(run.header))
    rows = [[one.name, shown(one.expected), one.source, "not measured" if one.measured is None else f"{shown(one.measured)} ({one.evaluator})",
             "" if one.difference is None else f"{one.difference:+.2f}"] for one in comparisons(run)]
    if not rows and not lines:
        return ""
    heading = f"<h2>What to expect</h2><p>According to {html.escape(run.source)}.</p>{lines}"
    return heading + (table("Expected and measured", ["figure", "expected", "reported by", "here", "difference"], rows) if rows else "")


def _judged(run):
    rows = [[name, metric, "" if best is None else shown(best), shown(last)] for (name, metric), (best, last) in run.judgements().items()]
    step = (run.status.get("best") or {}).get("step")
    return table("Judged during training", ["evaluator", "metric", f"best model (step {step})" if step else "best model", "last"], rows) if rows else ""


def _evaluated(run):
    rows = [[name, metric, shown(value), entry.get("model", "")] for name, entry in run.evaluations.items()
            for metric, value in entry.get("metrics", {}).items()]
    return table("Evaluated", ["evaluator", "metric", "value", "model"], rows) if rows else ""


def _examples(run):
    directory = os.path.join(run.directory, "predictions")
    pages = sorted(name for name in os.listdir(directory) if name.endswith(".html")) if os.path.isdir(directory) else []
    found = [(name, examples_of(os.path.join(directory, name))) for name in pages]
    return "".join(f"<h2>Examples: {html.escape(name[:-5])}</h2>{text}" for name, text in found if text)


def _config(run):
    if not run.config:
        return ""
    text = "\n".join(line for line in run.header if not line.startswith(SOURCE))
    values = yaml.safe_dump(run.config, sort_keys=False, default_flow_style=None, width=120, allow_unicode=True)
    return f"<h2>Configuration, resolved</h2><p>{html.escape(run.source)}</p><pre>{html.escape(f'{text}{chr(10)}{values}')}</pre>"


def _environment(run):
    return table("Environment", ["", ""], [[key, value] for key, value in run.environment.items()]) if run.environment else ""
