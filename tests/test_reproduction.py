"""The reproduction table: its configs and commands are real, its measured figures are recorded elsewhere, the page says what the data say."""
import re
import shlex
from pathlib import Path

import pytest

from unimo2_paddle import reproduction
from unimo2_paddle.cli import build_parser
from unimo2_paddle.config import load_run_config

ROOT = Path(__file__).resolve().parent.parent
FACTS = reproduction.read_facts()
TABLES = [(paper, number) for paper, about in FACTS["papers"].items() for number in about["tables"]]
TOYS = [(system, task) for system, toys in FACTS["toy"].items() for task in toys]


def header(config):
    return "".join(re.match(r"(?:#.*\n)*", (ROOT / "run_configs" / config).read_text(encoding="utf-8")).group().split("#"))


def all_entries():
    return [entry for paper, number in TABLES for entry in reproduction.entries(FACTS, FACTS["papers"][paper]["tables"][number])]


def all_commands():
    toys = (command for system, task in TOYS for command in reproduction.task_commands(FACTS["toy"][system][task]))
    return sorted({command for entry in all_entries() for command in entry.commands} | set(toys))


def test_every_command_is_valid_with_its_config_and_overrides(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    commands = all_commands()
    assert len(commands) > 60
    for command in commands:
        args = build_parser().parse_args(shlex.split(command)[1:])
        assert (ROOT / args.config).is_file(), command
        load_run_config(ROOT / args.config, args.override)


def test_every_figure_of_our_rows_has_a_run_or_says_why_not():
    for entry in all_entries():
        assert entry.expected and bool(entry.commands) == bool(entry.config), entry
        assert entry.needs, entry
        if entry.commands:
            assert "released weights" in entry.status or "pre-training" in entry.status


@pytest.mark.parametrize(("paper", "number"), TABLES)
def test_rows_have_figures_of_known_columns_only(paper, number):
    table = FACTS["papers"][paper]["tables"][number]
    for row in table["rows"]:
        figures = set(row) - {"name", "system", "note"}
        assert figures and figures <= set(table["columns"]), row
        for key in figures:
            metric, parts = table["columns"][key]["metric"], row[key].split(" / ")
            assert all(re.fullmatch(r"\d+\.\d+|-", part) for part in parts), row[key]
            assert len(parts) <= metric.count("/") + 1, f"{row['name']}: {row[key]} are more figures than {metric}"


def test_expected_figures_agree_with_the_headers_of_the_configs():
    for entry in all_entries():
        if entry.config and not entry.row.startswith(("Our Baseline", "UNIMO-base w/o")):
            told = header(entry.config.split("/", 1)[1])
            for _, _, figure in entry.expected:
                missing = [part for part in figure.split(" / ") if part not in told]
                assert not missing, f"{entry.row}, {entry.task}: {missing} not in the header of {entry.config}"


@pytest.mark.parametrize(("system", "task"), TOYS)
def test_a_figure_measured_here_is_recorded_in_the_config_of_its_demo(system, task):
    toy = FACTS["toy"][system][task]
    told = header(toy["config"]) + (ROOT / "README.md").read_text(encoding="utf-8")
    assert ("measured" in toy) == ("without" in toy)
    for figure in re.findall(r"(?<![-@\d])\d+(?:\.\d+)?", re.sub(r"R@1|top-1", "", toy.get("measured", "") + " " + toy.get("without", ""))):
        assert re.search(rf"(?<![\d.]){re.escape(figure)}(?![\d])", told), f"{figure} is not in the header of {toy['config']}"


def test_the_page_equals_what_the_data_give():
    page = (ROOT / "docs" / "reproduction.md").read_text(encoding="utf-8")
    assert page == reproduction.render_page(), "write it again: unimo2 reproduce --page > docs/reproduction.md"


def test_a_table_is_shown_with_commands_and_status(unimo2):
    outcome = unimo2("reproduce", "--table", "1", "--paper", "unimo2")
    assert outcome.status == 0
    assert "unimo2 eval -c run_configs/retrieval/flickr30k_zeroshot.yaml" in outcome.out
    assert "zero-shot IR: 72.70 / 91.18" in outcome.out and "needs released weights; measured at toy scale: R@1 70.7 / 73.3" in outcome.out


def test_without_a_number_the_tables_are_listed(unimo2):
    assert len(unimo2("reproduce").out.splitlines()) == len(TABLES)
    assert len(unimo2("reproduce", "--paper", "unimo").out.splitlines()) == len(FACTS["papers"]["unimo"]["tables"])


def test_an_unknown_table_is_refused_with_the_known_ones(unimo2):
    outcome = unimo2("reproduce", "--table", "7")
    assert outcome.status == 2 and "1, 2, 3" in outcome.err


def test_an_own_pretraining_comes_before_the_tasks_that_start_from_it():
    commands = reproduction.system_commands(FACTS, FACTS["systems"]["unimo2_baseline"], "stsb")
    assert [re.search(r"run_configs/(\S+)", command).group(1) for command in commands] == ["pretrain/unimo2_base.yaml", "glue/mnli.yaml", "glue/stsb.yaml"]
    assert "-o model.init=output/glue/mnli_baseline/best" in commands[-1]
