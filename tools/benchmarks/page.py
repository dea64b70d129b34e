"""The benchmarks' results as a table for the screen and as docs/performance.md."""
from pathlib import Path

PAGE = Path(__file__).resolve().parents[2] / "docs" / "performance.md"
HEAD = ("work", "ours", "other side", "ratio (range)", "bar")
INTRODUCTION = """# Performance

Written by `python tools/benchmarks/run.py --page` from the results in `tools/benchmarks/results/`; do not edit by hand.

Every row compares two ways to do the same work, alternately in one process (or two, where the other side is PyTorch), on the same machine.
"ours" and "other side" are medians; the ratio says how many times better ours is: the median of the rounds' ratios, with its range. The other side is
the authors' *procedure* on our own layers, or what people would use instead, as each row says. Numbers of one machine say little about another;
`python tools/benchmarks/run.py --size tiny` (and `base`) measures yours.
"""
SIZES = {"tiny": "Demo-size models", "base": "Base width and real picture sizes"}


def number(value):
    """Three significant digits, without exponents."""
    if value is None:
        return ""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def cells(line):
    """The columns of one line as text."""
    other = "" if line["other"] is None else f"{number(line['other'])} {line['unit']}"
    ratio = "" if line["ratio"] is None else f"{line['ratio']:.2f} ({line['low']:.2f} to {line['high']:.2f})"
    verdict = {True: "reached", False: "missed", None: ""}[line["reached"]]
    return [line["work"], f"{number(line['ours'])} {line['unit']}", other, ratio, ": ".join(filter(None, (line["bar"], verdict)))]


def table(records):
    """The results for the screen."""
    rows = [list(HEAD)]
    for record in records:
        rows += [cells(line) for line in record["lines"]] or [[f"{record['row']}: {record['skipped']}", "", "", "", ""]]
    widths = [max(len(row[column]) for row in rows) for column in range(1, len(HEAD))]
    lines = []
    for row in rows:
        lines += [row[0], "    " + "  ".join(cell.ljust(width) for cell, width in zip(row[1:], widths)).rstrip()] if any(row[1:]) else [row[0]]
    if records:
        lines.append(f"{records[-1]['machine']}; {records[-1]['threads']} thread(s); load {records[-1]['load']}")
    return "\n".join(lines)


def markdown(records):
    """The page as text."""
    parts = [INTRODUCTION]
    for size, title in SIZES.items():
        chosen = [record for record in records if record["size"] == size]
        if not chosen:
            continue
        parts.append(f"## {title}\n\n`python tools/benchmarks/run.py --size {size}`\n")
        parts.append("| " + " | ".join(HEAD) + " |\n" + "|---" * len(HEAD) + "|")
        parts += ["| " + " | ".join(cells(line)) + " |" for record in chosen for line in record["lines"]]
        notes = [f"* **{line['work']}**: " + " ".join(filter(None, (line["floor"], line["note"])))
                 for record in chosen for line in record["lines"] if line["floor"] or line["note"]]
        notes += [f"* `{record['row']}` was skipped: {record['skipped']}" for record in chosen if record["skipped"]]
        if notes:
            parts.append("\n" + "\n".join(notes))
        parts.append("\n" + _circumstances(chosen))
    return "\n".join(parts) + "\n"


def _circumstances(records):
    """Where and when the rows were measured, said once per machine."""
    groups = {}
    for record in records:
        key = (record["machine"], record["threads"], record["versions"])
        groups.setdefault(key, []).append(record)
    said = []
    for (machine, threads, versions), group in groups.items():
        rows = ", ".join(f"{r['row']} {r['date']} {r['commit']} ({r['load'][0]:.1f} to {r['load'][1]:.1f}, {r['seconds']:.0f} s)" for r in group)
        said.append(f"Measured on {machine}, {threads} thread(s); {versions}. Row, date, commit, load average of the machine before and after, "
                    f"time of the row: {rows}.\n")
    return "\n".join(said)


def write_page(records):
    """Write docs/performance.md; returns its path as text."""
    PAGE.write_text(markdown(records), encoding="utf-8")
    return str(PAGE)
