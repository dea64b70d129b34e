"""Does text rewriting help UNIMO's zero-shot retrieval? Pre-trains with and without it over several seeds, at the same compute, and compares.

    bash tools/prepare_unimo_demo.sh
    python tools/rewriting_ablation.py --seeds 3            # results in output/demo/rewriting/results.json, a table on the screen

Both sides see the same pairs in the same order and read as many pairs jointly per step: without rewriting, other captions and pictures of
the batch stand where rewritten captions stood. Selection does not enter: every run is judged once, after its last step, on the test split.
What is finished is kept; an interrupted run goes on. Exit status: 0 done, 2 wrong input.
"""
import argparse
import json
import math
import os
import sys
import time
import zlib  # noqa: F401  before paddle: Paddle 2.6.2 exports zlib's symbols, and the first use would then crash
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from unimo2_paddle.config import load_run_config  # noqa: E402
from unimo2_paddle.errors import UserInputError  # noqa: E402

CONFIG = "run_configs/unimo/pretrain_demo.yaml"
VARIANTS = ("with rewriting", "without rewriting")
METRICS = {"ir_r1": "text to image R@1", "tr_r1": "image to text R@1", "recall_mean": "mean recall", "alone_ir_r1": "alone, text to image R@1",
           "alone_tr_r1": "alone, image to text R@1"}


def overrides(variant, candidates):
    """The keys that make a variant, for the settings ``candidates`` of the run with rewriting."""
    if variant == VARIANTS[0]:
        return []
    joint = candidates.paraphrases + candidates.hard_negatives + candidates.random_negatives
    return ["train.candidates.paraphrases=0", "train.candidates.hard_negatives=0", f"train.candidates.random_negatives={joint}"]


def read_results(path, settings):
    """The finished runs, ``{}`` at the beginning.

    Raises:
        UserInputError: the file is damaged or of other settings.
    """
    if not os.path.isfile(path):
        return {}
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
        kept, then = content["runs"], content["settings"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserInputError(f"{path}: is not a result file of this tool; move it away") from None
    if then != settings:
        changed = ", ".join(sorted(key for key in set(then) | set(settings) if then.get(key) != settings.get(key)))
        raise UserInputError(f"{path}: its runs have other settings ({changed}); choose another --out, or move that directory away")
    return kept


def write_results(path, settings, runs):
    """Write what is finished, and its summary, in one piece."""
    with open(path + ".tmp", "w", encoding="utf-8") as file:
        json.dump({"settings": settings, "runs": runs, "summary": summary(runs)}, file, indent=2)
        file.write("\n")
    os.replace(path + ".tmp", path)


def mean_and_deviation(values):
    """(mean, sample standard deviation; 0 of a single value)."""
    mean = sum(values) / len(values)
    return mean, math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1)) if len(values) > 1 else 0.0


def summary(runs):
    """``{variant: {metric: [mean, deviation]}}`` and under ``difference`` that of the seeds that both variants have (with minus without)."""
    found = {variant: [run["metrics"] for run in runs.values() if run["variant"] == variant] for variant in VARIANTS}
    told = {variant: {key: mean_and_deviation([metrics[key] for metrics in all_of_it]) for key in METRICS}
            for variant, all_of_it in found.items() if all_of_it}
    seeds = [{run["seed"]: run["metrics"] for run in runs.values() if run["variant"] == variant} for variant in VARIANTS]
    both = sorted(set(seeds[0]) & set(seeds[1]))
    if both:
        told["difference"] = {key: mean_and_deviation([seeds[0][seed][key] - seeds[1][seed][key] for seed in both]) for key in METRICS}
    return told


def table(runs):
    """The summary as Markdown."""
    told = summary(runs)
    count = max(sum(run["variant"] == variant for run in runs.values()) for variant in VARIANTS)
    lines = [f"| mean ± deviation over {count} seed(s) | {' | '.join(METRICS.values())} |", "|---" * (1 + len(METRICS)) + "|"]
    for name, values in told.items():
        cells = " | ".join(f"{mean:{'+' if name == 'difference' else ''}.1f} ± {deviation:.1f}" for mean, deviation in values.values())
        lines.append(f"| {name} | {cells} |")
    return "\n".join(lines)


class Ablation:
    """The runs and what came out.

    Args:
        config: run config of the variant with rewriting; out: directory; options: further ``key=value``; train, judge:
            ``train_from_config`` and ``run_evaluators`` of the training loop (tests give fakes).
    """

    def __init__(self, config, out, options, train, judge):
        self.config, self.out, self.options, self.train, self.judge = config, out, list(options), train, judge
        resolved = load_run_config(config, self.options)
        if resolved.task != "unimo_pretrain":
            raise UserInputError(f"{config}: is a config of task {resolved.task}, not of unimo_pretrain")
        self.candidates = resolved.train.candidates
        plain = resolved.resolved()
        plain["run"] = {}
        self.settings, self.path = json.loads(json.dumps(plain)), os.path.join(out, "results.json")
        self.runs = read_results(self.path, self.settings)

    def run(self, seeds):
        """All variants with the seeds 1 to ``seeds``, seed by seed; returns the finished runs by name."""
        os.makedirs(self.out, exist_ok=True)
        for seed in range(1, seeds + 1):
            for variant in VARIANTS:
                name = f"{variant.split()[0]}-{seed}"
                if name not in self.runs:
                    self.runs[name] = {"variant": variant, "seed": seed, **self._one(name, variant, seed)}
                    write_results(self.path, self.settings, self.runs)
                    print(table(self.runs), flush=True)
        return self.runs

    def _one(self, name, variant, seed):
        output = os.path.join(self.out, name)
        keys = [*self.options, *overrides(variant, self.candidates), f"run.seed={seed}", f"run.output={output}"]
        started = time.perf_counter(), time.process_time()
        self.train(self.config, [*keys, "eval.annotations="], resume="auto")
        minutes = [round((now() - then) / 60, 2) for now, then in zip((time.perf_counter, time.process_time), started)]
        judged = self.judge(self.config, [*keys, "eval.split=test", f"model.init={os.path.join(output, 'best')}"])
        return {"minutes": minutes[0], "processor_minutes": minutes[1], "metrics": {key: judged[0][1][key] for key in METRICS}}


def main(argv=None, train=None, judge=None):
    """Run the tool; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("-c", "--config", default=str(ROOT / CONFIG), metavar="FILE", help=f"run config with rewriting; default: {CONFIG}")
    parser.add_argument("-o", "--option", action="append", default=[], metavar="KEY=VALUE", help="replace a key in all runs (repeatable)")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="seeds 1 to N; default: 3")
    parser.add_argument("--out", default="output/demo/rewriting", metavar="DIR", help="where runs and results go; default: output/demo/rewriting")
    args = parser.parse_args(argv)
    try:
        if args.seeds < 1:
            raise UserInputError(f"--seeds {args.seeds}: must be at least 1")
        if train is None:
            from unimo2_paddle.runtime import import_paddle, prepare_process

            prepare_process()
            import_paddle()
            from unimo2_paddle.training.loop import run_evaluators as judge
            from unimo2_paddle.training.loop import train_from_config as train
        ablation = Ablation(args.config, args.out, args.option, train, judge)
        runs = ablation.run(args.seeds)
    except UserInputError as error:
        print(f"rewriting_ablation: {error}", file=sys.stderr)
        return 2
    print(f"\n{table(runs)}\n\nall figures: {ablation.path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
