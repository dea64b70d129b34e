"""The papers' result tables: what reproduces each row, and how far that is here (``unimo2 reproduce``, docs/reproduction.md).

The facts stand in reproduction.yaml; this module turns them into commands, a terminal listing and the page.
"""
import os
from typing import List, NamedTuple, Tuple

from unimo2_paddle.config import bundled_config, read_yaml
from unimo2_paddle.errors import UserInputError

DATA = os.path.join(os.path.dirname(os.path.abspath(__file__)), "reproduction.yaml")
QUOTED = "other system, quoted"


class Entry(NamedTuple):
    """One task of one row.

    ``expected``: (column name, metric, the paper's figure) of its columns. ``config``: file of run_configs, "" when there is none.
    ``commands``: in order. ``needs``: what is missing for the paper's figure. ``toy``: status of the demo of the same task.
    """

    row: str
    task: str
    expected: List[Tuple[str, str, str]]
    config: str
    commands: List[str]
    needs: str
    toy: str
    note: str

    @property
    def status(self):
        """The row's state in words."""
        if not self.config:
            return f"not reproducible here: {self.needs}"
        return f"not measured, needs {self.needs}; {self.toy}"


def read_facts():
    """The content of reproduction.yaml as plain Python."""
    return read_yaml(DATA)


def find_table(facts, paper, number):
    """One table of a paper.

    Raises:
        UserInputError: the paper has no table of this number.
    """
    tables = facts["papers"][paper]["tables"]
    if number not in tables:
        raise UserInputError(f"--table {number}: {facts['papers'][paper]['title']} has the result tables {', '.join(map(str, tables))}")
    return tables[number]


def entries(facts, table):
    """The :class:`Entry` of every task of every row of ours, in the table's order."""
    found = []
    for row in table["rows"]:
        if "system" in row:
            columns = {}
            for key, column in table["columns"].items():
                if key in row:
                    columns.setdefault(column["task"], []).append((column["name"], column["metric"], row[key]))
            found.extend(_entry(facts, row, task, expected) for task, expected in columns.items())
    return found


def _entry(facts, row, task, expected):
    system = facts["systems"][row["system"]]
    name, run = facts["tasks"][task]["name"], facts["tasks"][task][system["family"]]
    if "missing" in run:
        return Entry(row["name"], name, expected, "", [], run["missing"], "", "")
    notes = "; ".join(part["note"] for part in (system, facts["tasks"][task], run) if "note" in part)
    commands = system_commands(facts, system, task)
    needs, toy = run.get("needs", system["needs"]), _toy_status(facts, row["system"], task)
    return Entry(row["name"], name, expected, _shown(run["config"]), commands, needs, toy, notes)


def _toy_status(facts, system, task):
    toy = facts["toy"].get(system, {}).get(task)
    if toy is None:
        return "no demo of this row"
    if "measured" not in toy:
        return "its demo has no recorded figure"
    return f"measured at toy scale: {toy['measured']} ({toy['without']})"


def system_commands(facts, system, task):
    """The commands that give a system's figure of a task; an own pre-training comes first where it needs one."""
    run = facts["tasks"][task][system["family"]]
    if "pretrain" not in system:
        return task_commands(run)
    suffix, pretrain = system["suffix"], system["pretrain"]
    if "start" in run:
        before, source = system_commands(facts, system, run["start"]), facts["tasks"][run["start"]][system["family"]]["config"]
    else:
        overrides = [*pretrain["overrides"], f"run.output={_output(pretrain['config'])}{suffix}"]
        before, source = task_commands({**pretrain, "overrides": overrides}), pretrain["config"]
    overrides = [*system.get("overrides", ()), f"run.output={_output(run['config'])}{suffix}"]
    return before + task_commands({**run, "overrides": overrides}, init=f"{_output(source)}{suffix}/best")


def task_commands(run, init=None):
    """The commands of one run: ``config``, ``overrides``, ``train`` and ``test`` as in reproduction.yaml; ``init``: another start than the config's."""
    overrides = list(run.get("overrides", ()))
    start = [f"model.init={init}"] if init else []
    if not run.get("train", True):
        return [_command("eval", run["config"], start + overrides)]
    commands = [_command("train", run["config"], start + overrides)]
    if "test" in run:
        output = next((text.partition("=")[2] for text in overrides if text.startswith("run.output=")), None) or _output(run["config"])
        commands.append(_command("eval", run["config"], [f"model.init={output}/best", *overrides, *run["test"]]))
    return commands


def _command(name, config, overrides):
    return " ".join([f"unimo2 {name} -c {_shown(config)}", *(f"-o {text}" for text in overrides)])


def _shown(config):
    return f"run_configs/{config}"


def _output(config):
    return read_yaml(bundled_config(config))["run"]["output"]


def describe(paper=None, number=None):
    """The text of ``unimo2 reproduce``: a table with the commands of its rows, or the list of tables when ``number`` is ``None``."""
    facts = read_facts()
    if number is None:
        return _list_tables(facts, [paper] if paper else list(facts["papers"]))
    paper = paper or "unimo2"
    table = find_table(facts, paper, number)
    lines = [f"{facts['papers'][paper]['title']}, table {number}: {table['title']}", f"source: {table['source']}", ""]
    keys = list(table["columns"])
    grid = [["", *(column["name"] for column in table["columns"].values())]]
    grid += [[row["name"], *(row.get(key, "-") for key in keys)] for row in table["rows"]]
    widths = [max(len(line[place]) for line in grid) for place in range(len(grid[0]))]
    lines += ["  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in grid]
    for entry in entries(facts, table):
        lines += ["", f"{entry.row}, {entry.task}"]
        lines += [f"  paper     {name}: {figure} ({metric})" for name, metric, figure in entry.expected]
        lines += [f"  run       {command}" for command in entry.commands]
        lines += [f"  status    {entry.status}"] + ([f"  note      {entry.note}"] if entry.note else [])
    lines += ["", "Rows without a run are other systems, quoted from the paper."]
    return "\n".join(lines)


def _list_tables(facts, papers):
    return "\n".join(f"unimo2 reproduce --paper {paper} --table {number}    {facts['papers'][paper]['title']}: {table['title']}"
                     for paper in papers for number, table in facts["papers"][paper]["tables"].items())


def _markdown_table(head, rows):
    cells = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(line) + " |" for line in cells]


def render_page():
    """docs/reproduction.md as Markdown."""
    facts = read_facts()
    lines = ["# Reproduction", "", "<!-- Written by `unimo2 reproduce --page`; change unimo2_paddle/reproduction.yaml instead. -->", "",
             "Each row of both papers' result tables, with the configuration and the commands that lead to its figure, and its status. The papers'",
             "figures were not measured here: that takes the released weights, the data sets and GPUs, or a pre-training at the authors' scale. What was",
             "measured here is the same code on generated data, in the first table. `unimo2 reproduce --table 1 --paper unimo2` shows a table in the terminal.",
             "", "## Measured here, at toy scale", "",
             "The test split of the generated world (handwritten digits for classification), one run each on two shared CPU cores. First", "",
             "```bash", "bash tools/demo.sh", "unimo2 demo-data --out output/demo/data", "```", "",
             "The demos of UNIMO read region features: `python tools/run_all_demo_tasks.py --family unimo` prepares and runs them all.", ""]
    for system, toys in facts["toy"].items():
        lines += [f"### {'UNIMO-2' if system == 'unimo2_base' else 'UNIMO'}", ""]
        lines += _markdown_table(["demo of", "commands", "measured", "what needs no such training"], [
            [facts["tasks"][task]["name"], _code(task_commands(toy)), toy.get("measured", "no recorded figure"), toy.get("without", "")]
            for task, toy in toys.items()]) + [""]
    for about in facts["papers"].values():
        for number, table in about["tables"].items():
            lines += [f"## {about['title']}, table {number}: {table['title']}", "", f"Source: {table['source']}.", ""]
            lines += _paper_table(table) + [""]
            lines += _markdown_table(["row", "task", "config", "commands", "expected (the paper)", "status"], [
                [entry.row, entry.task, f"`{entry.config}`" if entry.config else "none", _code(entry.commands),
                 "<br>".join(f"{name} {figure}" for name, _, figure in entry.expected), entry.status + (f". {entry.note}" if entry.note else "")]
                for entry in entries(facts, table)]) + [""]
    return "\n".join(lines).rstrip() + "\n"


def _paper_table(table):
    head = ["", *(f"{column['name']} ({column['metric']})" for column in table["columns"].values()), "status"]
    rows = []
    for row in table["rows"]:
        status = "see below" if "system" in row else QUOTED
        rows.append([row["name"], *(row.get(key, "-") for key in table["columns"]), status + (f"; {row['note']}" if "note" in row else "")])
    return _markdown_table(head, rows)


def _code(commands):
    return "<br>".join(f"`{command}`" for command in commands)
