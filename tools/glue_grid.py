"""Train a grid of learning rates (x batch sizes) x seeds and choose on the development set, as the papers' GLUE figures were made.

    python tools/glue_grid.py -c run_configs/glue/cola.yaml --learning-rates 1e-5,2e-5,3e-5 --batch-sizes 16,32 --seeds 1,2,3,4,5

Every run is a `unimo2 train` of its own in <run.output>_grid/. Given again, the command skips finished runs and resumes the one it was
interrupted in. It writes grid.md and grid.json (best, mean and standard deviation per setting) after every run; --test then judges the
chosen run on the test split, once. Works for any finetuning configuration.
"""
import argparse
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import zlib  # noqa: F401  before paddle: Paddle 2.6.2 exports zlib's symbols, and the first use would then crash
from pathlib import Path

TOOLS = Path(__file__).resolve().parent
sys.path.insert(0, str(TOOLS.parent))

from unimo2_paddle.errors import UserInputError  # noqa: E402

KEYS = {"learning_rate": "optim.learning_rate", "batch_size": "train.batch_size", "seed": "run.seed"}


def parse_arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("-c", "--config", required=True, help="run configuration (YAML)")
    parser.add_argument("-o", "--override", action="append", default=[], metavar="KEY=VALUE", help="override one entry in every run (repeatable)")
    parser.add_argument("--learning-rates", required=True, type=_numbers(float), metavar="A,B,...", help="peak learning rates")
    parser.add_argument("--batch-sizes", default=[], type=_numbers(int), metavar="A,B,...", help="train.batch_size; default: the configuration's")
    parser.add_argument("--seeds", required=True, type=_numbers(int), metavar="A,B,...", help="run.seed")
    parser.add_argument("--launch", action="store_true", help="train through tools/launch.sh (one worker per GPU)")
    parser.add_argument("--keep-checkpoints", action="store_true", help="keep the training state of finished runs (best/ always stays)")
    parser.add_argument("--test", action="store_true", help="at the end judge the chosen run on the test split")
    return parser.parse_args(argv)


def _numbers(kind):
    def parse(text):
        try:
            return list(dict.fromkeys(kind(part) for part in text.split(",")))
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a list such as 1,2,3") from None

    return parse


class Grid:
    """The runs of a grid in their folder.

    Args:
        args: from :func:`parse_arguments`.

    Raises:
        ConfigError: the configuration is wrong; before any training.
    """

    def __init__(self, args):
        from unimo2_paddle.config import load_run_config
        from unimo2_paddle.tasks.base import task_class

        self.args = args
        config = load_run_config(args.config, args.override)
        self.selection = task_class(config.task)(config).selection
        self.root = Path(config.run.output.rstrip("/") + "_grid")
        self.settings = [dict(zip(KEYS, values)) for values in
                         itertools.product(args.learning_rates, args.batch_sizes or [config.train.batch_size], args.seeds)]
        self.failed = []

    def directory(self, setting):
        """The output directory of a run."""
        return self.root / "lr{learning_rate:g}_bs{batch_size}_seed{seed}".format(**setting)

    def overrides(self, setting):
        """The ``key=value`` of a run."""
        return [*self.args.override, *(f"{KEYS[key]}={value}" for key, value in setting.items()), f"run.output={self.directory(setting)}"]

    def result(self, setting):
        """The stored result of a finished run, or ``None``.

        Raises:
            UserInputError: the folder holds a run of another configuration.
        """
        path = self.directory(setting) / "result.json"
        if not path.is_file():
            return None
        result = json.loads(path.read_text(encoding="utf-8"))
        if result["config"] != self._config(setting):
            raise UserInputError(f"{path}: belongs to another configuration than the one given now; choose another run.output, or move "
                                 f"{self.root} away")
        return result

    def _config(self, setting):
        from unimo2_paddle.config import load_run_config

        return load_run_config(self.args.config, self.overrides(setting)).resolved()

    def run(self):
        """Train what is not finished; returns whether every run succeeded."""
        for setting in self.settings:  # strange folders are refused before any training
            self.result(setting)
        for number, setting in enumerate(self.settings, 1):
            told = ", ".join(f"{key} {value:g}" for key, value in setting.items())
            if self.result(setting) is not None:
                print(f"[{number}/{len(self.settings)}] {told}: finished before", flush=True)
                continue
            print(f"[{number}/{len(self.settings)}] {told}", flush=True)
            program = ["bash", str(TOOLS / "launch.sh")] if self.args.launch else [sys.executable, str(TOOLS / "train.py"), "-c"]
            options = [word for override in self.overrides(setting) for word in ("-o", override)]
            if subprocess.run([*program, self.args.config, *options, "--resume", "auto"]).returncode:
                self.failed.append(told)
                print(f"    failed; see {self.directory(setting) / 'train.log'}", flush=True)
                continue
            self._finish(setting)
            self.write_summary()
        return not self.failed

    def _finish(self, setting):
        directory = self.directory(setting)
        result = {**setting, **self._best(directory / "metrics.jsonl"), "config": self._config(setting)}
        _write(directory / "result.json", json.dumps(result, indent=2) + "\n")
        if not self.args.keep_checkpoints:
            shutil.rmtree(directory / "checkpoints", ignore_errors=True)  # serves only resuming, and is three times the model

    def _best(self, path):
        sign, key = (-1, self.selection[1:]) if self.selection.startswith("-") else (1, self.selection)
        kind, _, metric = key.partition("/")
        records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        judged = [record for record in records if record["kind"] == kind and metric in record]
        if not judged:
            raise UserInputError(f"{path}: no {key} in this run; the development set must be judged (eval.split, run.evaluate_at_end)")
        best = max(judged, key=lambda record: sign * record[metric])
        others = {f"{r['kind']}/{name}": value for r in records if r["step"] == best["step"] and r["kind"] != "train"
                  for name, value in r.items() if name not in ("step", "kind")}
        return {"value": best[metric], "step": best["step"], "metrics": others}

    def finished(self):
        """The results of the finished runs, best first."""
        results = [result for result in map(self.result, self.settings) if result is not None]
        return sorted(results, key=lambda result: result["value"], reverse=not self.selection.startswith("-"))

    def write_summary(self):
        """Write ``grid.json`` and ``grid.md``; returns the table."""
        results = self.finished()
        table = summary(results, self.selection)
        if results:
            os.makedirs(self.root, exist_ok=True)
            _write(self.root / "grid.json", json.dumps({"selection": self.selection, "runs": [
                {key: value for key, value in result.items() if key != "config"} for result in results]}, indent=2) + "\n")
            _write(self.root / "grid.md", table + "\n")
        return table

    def test(self):
        """Judge the chosen run on the test split, if that has not happened yet."""
        best, output = self.finished()[0], self.root / "test"
        if (output / "predictions").is_dir():
            print(f"the test split was judged before: {output / 'predictions'}")
            return True
        options = [*self.overrides({key: best[key] for key in KEYS})[:-1], f"model.init={self.directory(best) / 'best'}", "eval.split=test",
                   f"run.output={output}"]
        command = [sys.executable, str(TOOLS / "eval.py"), "-c", self.args.config, *(word for option in options for word in ("-o", option))]
        return subprocess.run(command).returncode == 0


def summary(results, selection):
    """Results (best first) as a Markdown table: per setting best, mean and standard deviation over the seeds; the chosen run below."""
    if not results:
        return "no finished run"
    groups = {}
    for result in results:
        groups.setdefault((result["learning_rate"], result["batch_size"]), []).append(result)
    lines = [f"| learning rate | batch size | seeds | best {selection} | mean | std |", "|---|---|---|---|---|---|"]
    for (rate, size), members in sorted(groups.items()):
        values = [member["value"] for member in members]
        spread = f"{statistics.stdev(values):.2f}" if len(values) > 1 else "-"
        lines.append(f"| {rate:g} | {size} | {len(values)} | {values[0]:.2f} | {statistics.mean(values):.2f} | {spread} |")
    values = [result["value"] for result in results]
    spread = f"{statistics.stdev(values):.2f}" if len(values) > 1 else "-"
    lines.append(f"| all | all | {len(values)} | {values[0]:.2f} | {statistics.mean(values):.2f} | {spread} |")
    best = results[0]
    others = ", ".join(f"{name} {value:.2f}" for name, value in best["metrics"].items())
    return "\n".join([*lines, "", f"chosen: learning rate {best['learning_rate']:g}, batch size {best['batch_size']}, seed {best['seed']}, "
                      f"step {best['step']}: {others}"])


def _write(path, text):
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def main(argv=None):
    args = parse_arguments(argv)
    try:
        grid = Grid(args)
        done = grid.run()
        print(grid.write_summary())
        for told in grid.failed:
            print(f"failed: {told}", file=sys.stderr)
        if done and args.test:
            done = grid.test()
    except UserInputError as error:
        print(f"glue_grid: {error}", file=sys.stderr)
        return 2
    return 0 if done else 1


if __name__ == "__main__":
    sys.exit(main())
