"""What a run should come to: the figures of reproduction.yaml for its configuration beside what the run measured."""
import fnmatch
import re
from typing import List, NamedTuple, Optional

from unimo2_paddle.reproduction import read_facts

HEADER_LINES = ("expected", "authors", "chance")


class Comparison(NamedTuple):
    """One figure: its name, the value somebody reported and who, the run's own value and the evaluator it comes from (``None``, "": not measured)."""

    name: str
    expected: float
    source: str
    measured: Optional[float]
    evaluator: str

    @property
    def difference(self):
        return None if self.measured is None else self.measured - self.expected


def config_name(source):
    """The name below ``run_configs/`` of the file a run came from, "" for a file of the user's own."""
    parts = source.replace("\\", "/").split("/")
    return "/".join(parts[len(parts) - parts[::-1].index("run_configs"):]) if "run_configs" in parts else ""


def comparisons(run) -> List[Comparison]:
    """The figures that are known for a run's configuration: of our demos, of the papers."""
    name, facts = config_name(run.source), read_facts()
    found = []
    if not name:
        return found
    for toys in facts["toy"].values():
        for task, toy in toys.items():
            if toy["config"] == name and "measured" in toy:
                found += _compare(run, facts["tasks"][task].get("demo_keys", ()), *_figures(toy["measured"]), "a run of ours, see docs/reproduction.md")
    baseline = run.config.get("model", {}).get("model_type") == "baseline"
    for about in facts["papers"].values():
        for number, table in about["tables"].items():
            for row in (row for row in table["rows"] if "system" in row):
                system = facts["systems"][row["system"]]
                if ("pretrain" in system) != baseline or (baseline and row["system"] != "unimo2_baseline"):
                    continue
                for key, column in table["columns"].items():
                    run_of = facts["tasks"][column["task"]].get(system["family"], {})
                    if key in row and run_of.get("config") == name:
                        names, figures = [f"{column['name']}, {part}" for part in _parts(column)], _figures(row[key])[1]
                        source = f"{row['name']} in {about['title'].partition(' ')[0]} table {number}"
                        found += _compare(run, column.get("keys", ()), names, figures, source, column.get("scale", 1.0))
    return list(dict.fromkeys(found))  # two tables of a paper repeat a row


def _parts(column):
    """The names of a column's figures: "image retrieval R@1 / R@5" has two."""
    head, *others = column["metric"].split(" / ")
    first, _, name = head.rpartition(" ")
    return [head, *(f"{first} {other}" if first else other for other in others)] if name else [head]


def _figures(text):
    """Names and numbers of ``"R@1 59.7 / 58.0"``: (["R@1", "R@1"], [59.7, 58.0]); "-" stands for no figure."""
    name = re.match(r"(?:[^\d\s-]\S*\s)*", text).group().strip()
    numbers = [re.match(r"\s*(\d+(?:\.\d+)?)", part) for part in text[len(name):].split(" / ")]
    return [name] * len(numbers), [None if number is None else float(number.group(1)) for number in numbers]


def _compare(run, keys, names, figures, source, scale=1.0):
    found = []
    for place, figure in enumerate(figures):
        if figure is not None:
            value, evaluator = find_measured(run, keys[place]) if place < len(keys) else (None, "")
            name = names[place] if place < len(names) else names[-1]
            found.append(Comparison(name, figure, source, None if value is None else value * scale, evaluator))
    return found


def find_measured(run, key):
    """The run's figure for a key, and the evaluator it comes from; (``None``, "") when there is none.

    Args:
        key: ``metric``, looked for where the test split was judged, then where a checkpoint was chosen; or ``PATTERN/metric`` of evaluators.
    """
    pattern, _, metric = key.rpartition("/")
    selection = (run.status.get("best") or {}).get("metric", "").partition("/")[0]
    names = [name for name in [*run.evaluations, *(kind for kind in run.curves if kind != "train")]
             if fnmatch.fnmatch(name, pattern or "*") and run.value(name, metric) is not None]
    ranked = sorted(names, key=lambda name: (not name.startswith("test"), name != selection, not name.startswith(("val", "dev"))))
    if not pattern:  # a baseline's evaluator must not stand for the model's
        ranked = [name for name in ranked if name.startswith(("test", "val", "dev", "minival")) or name == selection]
    return (run.value(ranked[0], metric), ranked[0]) if ranked else (None, "")


def told(header):
    """What the header of a configuration says of results: ``[(word, text)]`` of its lines ``# expected:``, ``# authors:``, ``# chance:``."""
    found, current = [], None
    for line in header:
        match = re.match(r"# ?(\w[\w ]*):\s+(.*)", line)
        if match:
            current = match.group(1) if match.group(1) in HEADER_LINES else None
            if current:
                found.append((current, match.group(2).strip()))
        elif current and re.match(r"# {3,}\S", line):
            found[-1] = (current, f"{found[-1][1]} {line[1:].strip()}")
        else:
            current = None
    return found
