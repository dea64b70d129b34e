"""Everything that is claimed to be fast, measured against the slow way: a table, a JSON file per row, and docs/performance.md.

    python tools/benchmarks/run.py                               # all rows, demo-size models, on all cores
    python tools/benchmarks/run.py --size base --missing         # base-size models, only rows that have no result yet
    python tools/benchmarks/run.py --only tokenizer --only pairs
    python tools/benchmarks/run.py --page                        # write docs/performance.md from the JSON files

Every row runs in a process of its own and writes tools/benchmarks/results/ROW-SIZE.json when it is through, so a stopped run goes on with
--missing. Both sides of a comparison run alternately in one process; a ratio is the median over the rounds. --torch-python names an interpreter
with PyTorch (rows that need it skip with a line otherwise), --demo the output directory of tools/demo.sh.
"""
import argparse
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE)]

from bench import Options, record_of  # noqa: E402
from page import table, write_page  # noqa: E402

from unimo2_paddle.runtime import prepare_process  # noqa: E402

# row -> module beside this file, whose measure(options) returns lines, or the reason why there are none
ROWS = ("startup", "tokenizer", "pictures", "pairs", "demo_recall", "encoders", "finetune", "captions", "features", "train_step", "picture_memory",
        "reader", "growth", "workers", "plan_memory")
RESULTS = HERE / "results"


def parse(arguments):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=ROWS, metavar="NAME", help=f"rows to run (repeatable): {', '.join(ROWS)}; default: all")
    parser.add_argument("--size", choices=("tiny", "base"), default="tiny", help="demo-size models (default), or base width and real picture sizes")
    parser.add_argument("--missing", action="store_true", help="leave out rows that have a result of this size")
    parser.add_argument("--repeats", type=int, default=3, help="rounds of every comparison; default: 3")
    parser.add_argument("--demo", default="output/demo", help="output directory of tools/demo.sh, for rows that need a trained model")
    parser.add_argument("--torch-python", default="", metavar="PATH", help="an interpreter that has PyTorch")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the JSON files are; default: results/ beside this file")
    parser.add_argument("--page", action="store_true", help="write docs/performance.md from the JSON files and run nothing")
    parser.add_argument("--inside", choices=ROWS, help=argparse.SUPPRESS)  # this process runs that one row
    return parser.parse_args(arguments)


def store(path, record):
    """Write a result whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".tmp")
    fresh.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    os.replace(fresh, path)


def read(directory):
    """All results, in the order of the rows, tiny before base."""
    places = [directory / f"{row}-{size}.json" for row in ROWS for size in ("tiny", "base")]
    return [json.loads(place.read_text(encoding="utf-8")) for place in places if place.is_file()]


def run_row(row, args):
    """One row in a process of its own; returns whether it went well."""
    command = [sys.executable, __file__, "--inside", row, "--size", args.size, "--repeats", str(args.repeats), "--demo", args.demo,
               "--torch-python", args.torch_python, "--results", str(args.results)]
    return subprocess.run(command, check=False).returncode == 0


def main(arguments=None):
    args = parse(arguments)
    if args.page:
        print(write_page(read(args.results)))
        return 0
    prepare_process()
    if args.inside:
        options = Options(args.size, args.repeats, args.demo, args.torch_python, int(os.environ["OMP_NUM_THREADS"]))
        record = record_of(args.inside, options, importlib.import_module(args.inside).measure)
        store(args.results / f"{args.inside}-{args.size}.json", record)
        print(table([record]), flush=True)
        return 0
    failed = []
    for row in args.only or ROWS:
        if args.missing and (args.results / f"{row}-{args.size}.json").is_file():
            continue
        if not run_row(row, args):
            failed.append(row)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
