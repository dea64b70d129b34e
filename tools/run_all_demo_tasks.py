"""`python tools/run_all_demo_tasks.py`: every task's demo in sequence, judged once on its test split, against baselines and bars.

Needs the demo's data and, for UNIMO-2, its pre-trained model (bash tools/demo.sh). `--family unimo` runs the demos of UNIMO, the first system:
its pre-training, what starts from that (retrieval, entailment), and what starts from scratch. What is finished is kept in
<out>/demo_tasks.json and not run again; an interrupted training goes on. `cpu min` is the processor time of training, of all threads: on a
machine with nothing else to do, about the minutes times the cores. Exit status: 0 every bar met, 1 one missed or a demo failed, 2 wrong input.
"""
import argparse
import hashlib
import json
import os
import subprocess
import sys
import time
import traceback
import zlib  # noqa: F401  before paddle: Paddle 2.6.2 exports zlib's symbols, and the first use would then crash
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from unimo2_paddle.config import read_yaml  # noqa: E402
from unimo2_paddle.errors import CheckpointError, Unimo2Error, UserInputError  # noqa: E402

CONFIG_OUTPUT = "output/demo"  # where the demo configs read and write


@dataclass(frozen=True)
class Demo:
    """A task's demo and the bar it has to reach on the test split.

    ``metric``: of the evaluator named like the split. ``baseline``: a key of that evaluator's ``baselines`` (``EVALUATOR/metric`` = a
    metric of another evaluator, ``zero-shot`` = the same metric of the pre-trained model before training, ``CONFIG:METRIC`` = a metric of
    another demo), or a number; of several in a tuple the best counts. ``start``: the pre-trained model it starts from, below the demo's
    directory; empty: from scratch. ``prepare``: what it reads that is made of the demo's data: a key of ``STORES``, or "all": what
    tools/prepare_unimo_demo.sh makes.
    ``bar``: ("at least", value), ("points above", value), ("times", factor), ("errors gone", share), or ("at least and above", value).
    """

    name: str
    config: str
    metric: str
    baseline: object
    bar: tuple
    train: bool = True
    overrides: tuple = ()
    start: str = "pretrain/best"
    prepare: str = ""


STORES = {  # stores of region features: kind -> (store, file or list of files of the demo's data), both below the demo's directory
    "bottom_up": [(f"unimo/regions/{split}", f"data/regions/bottom_up/{own}.tsv") for split, own in (("train", "train"), ("val", "dev"), ("test", "test"))],
    "entailment": [(f"unimo/entailment_regions/{split}", f"data/regions/entailment/{split}_filelist") for split in ("train", "dev", "test")],
}
RETRIEVAL_TEST = ("eval.max_images=300", "eval.captions_per_image=1", "eval.rerank_k=all")
DEMOS = (
    Demo("retrieval, text to image", "retrieval/demo_finetune.yaml", "ir_r1", "zero-shot", ("errors gone", 1 / 3), overrides=RETRIEVAL_TEST),
    Demo("retrieval, image to text", "retrieval/demo_finetune.yaml", "tr_r1", "zero-shot", ("errors gone", 1 / 3), overrides=RETRIEVAL_TEST),
    Demo("VQA", "vqa/demo.yaml", "accuracy", "most frequent answer", ("points above", 15.0)),
    Demo("captioning", "captioning/demo.yaml", "cider", "nearest_neighbour/cider", ("at least and above", 1.0)),
    Demo("visual entailment", "entailment/demo.yaml", "accuracy", 100 / 3, ("at least", 70.0)),
    Demo("sentiment (SST-2's format)", "glue/demo_sst2.yaml", "accuracy", "majority accuracy", ("points above", 15.0)),
    Demo("inference (MNLI's format)", "glue/demo_mnli.yaml", "accuracy", "majority accuracy", ("points above", 15.0)),
    Demo("acceptability (CoLA's format)", "glue/demo_cola.yaml", "accuracy", "majority accuracy", ("points above", 15.0)),
    Demo("similarity (STS-B's format)", "glue/demo_stsb.yaml", "pearson", "shared words pearson", ("at least", 60.0)),
    Demo("handwritten digits", "imagenet/demo_digits.yaml", "top1", "top1", ("at least", 95.0)),
    Demo("zero-shot shapes", "imagenet/demo_zeroshot.yaml", "top1", "top1", ("times", 5.0), train=False),
)


def _text_demo(name, config, metric, baseline, bar):
    """A demo of UNIMO on text alone, from scratch."""
    return Demo(name, f"unimo/{config}", metric, baseline, bar, start="")


def _copied(metric):
    """The baselines of generated texts."""
    return f"first sentence {metric}", f"most frequent target {metric}"


def _picture_demo(name, config, metric, baseline, bar, start="unimo/pretrain/best", prepare="bottom_up", overrides=()):
    """A demo of UNIMO on detector regions."""
    return Demo(name, f"unimo/{config}", metric, baseline, bar, start=start, prepare=prepare, overrides=overrides)


_PRETRAINED, _THIRD = "unimo/pretrain_demo.yaml", ("errors gone", 1 / 3)
UNIMO_DEMOS = (
    _picture_demo("zero-shot, text to image", "pretrain_demo.yaml", "alone_ir_r1", 100 / 300, ("times", 10.0), "", "all", RETRIEVAL_TEST),
    _picture_demo("zero-shot, image to text", "pretrain_demo.yaml", "alone_tr_r1", 100 / 300, ("times", 10.0), "", "all", RETRIEVAL_TEST),
    _picture_demo("retrieval, text to image", "retrieval/demo.yaml", "ir_r1", f"{_PRETRAINED}:alone_ir_r1", _THIRD, overrides=RETRIEVAL_TEST),
    _picture_demo("retrieval, image to text", "retrieval/demo.yaml", "tr_r1", f"{_PRETRAINED}:alone_tr_r1", _THIRD, overrides=RETRIEVAL_TEST),
    _picture_demo("captioning", "captioning/demo.yaml", "cider", "nearest_neighbour/cider", ("at least and above", 1.0), ""),
    _picture_demo("visual entailment", "entailment/demo.yaml", "accuracy", 100 / 3, ("at least", 70.0), prepare="entailment"),
    _text_demo("sentiment (SST-2's format)", "glue/demo_sst2.yaml", "accuracy", "majority accuracy", ("points above", 15.0)),
    _text_demo("inference (MNLI's format)", "glue/demo_mnli.yaml", "accuracy", "majority accuracy", ("points above", 15.0)),
    _text_demo("acceptability (CoLA's format)", "glue/demo_cola.yaml", "accuracy", "majority accuracy", ("points above", 15.0)),
    _text_demo("similarity (STS-B's format)", "glue/demo_stsb.yaml", "pearson", "shared words pearson", ("at least", 60.0)),
    _text_demo("summaries (CNN/DM's files)", "seq2seq/demo_cnndm.yaml", "rouge_l", _copied("rouge_l"), ("points above", 15.0)),
    _text_demo("headlines (Gigaword's files)", "seq2seq/demo_gigaword.yaml", "rouge_l", _copied("rouge_l"), ("points above", 15.0)),
    _text_demo("questions (SQuAD-QG's files)", "seq2seq/demo_squad_qg.yaml", "bleu_4", _copied("bleu_4"), ("points above", 15.0)),
    _text_demo("answers (CoQA's files)", "seq2seq/demo_coqa.yaml", "f1", _copied("f1"), ("points above", 15.0)),
)
FAMILIES = {"unimo2": DEMOS, "unimo": UNIMO_DEMOS, "all": DEMOS + UNIMO_DEMOS}


def threshold(bar, baseline):
    """The value that has to be reached (for "at least and above": at least), given the baseline.

    >>> threshold(("errors gone", 0.5), 60.0)
    80.0
    """
    kind, value = bar
    if kind in ("at least", "at least and above"):
        return max(value, baseline or 0.0) if kind.endswith("above") else value
    if baseline is None:
        raise UserInputError(f"the bar {kind} {value:g} needs a baseline, and the evaluator gives none")
    return {"points above": baseline + value, "times": baseline * value, "errors gone": baseline + (100.0 - baseline) * value}[kind]


def is_met(bar, value, baseline):
    """Whether ``value`` reaches the bar; "at least and above" must also beat the baseline itself."""
    return value >= threshold(bar, baseline) and not (bar[0] == "at least and above" and baseline is not None and value <= baseline)


def find_baseline(name, evaluator, judged, metrics):
    """The baseline called ``name`` of an evaluation, ``None`` when nobody tells it; see :class:`Demo`."""
    if isinstance(name, tuple):
        return max((found for found in (find_baseline(one, evaluator, judged, metrics) for one in name) if found is not None), default=None)
    if isinstance(name, (int, float)):
        return float(name)
    other, slash, metric = name.partition("/")
    if slash:
        return next((float(found[metric]) for one, found in judged if one.name == other and metric in found), None)
    told = getattr(evaluator, "baselines", None) or {}
    told = told() if callable(told) else told
    value = told.get(name, getattr(evaluator, "baseline", None))
    return None if value is None else float(value)


def write_config(config, out):
    """A demo config with its paths below ``out``; returns the path to use (the original when nothing changes)."""
    source = ROOT / "run_configs" / config
    if os.path.normpath(out) == CONFIG_OUTPUT:
        return str(source)

    def moved(value):
        if isinstance(value, dict):
            return {key: moved(part) for key, part in value.items()}
        if isinstance(value, list):
            return [moved(part) for part in value]
        return out + value[len(CONFIG_OUTPUT):] if isinstance(value, str) and value.startswith(CONFIG_OUTPUT + "/") else value

    import yaml

    target = os.path.join(out, "demo_configs", config.replace("/", "_"))
    os.makedirs(os.path.dirname(target), exist_ok=True)
    with open(target, "w", encoding="utf-8") as file:
        yaml.safe_dump(moved(read_yaml(source)), file, sort_keys=False)
    return target


def fingerprint(config_path, model):
    """What a result depends on: the config's text and the pre-trained weights (``model`` ``None``: it starts from scratch)."""
    digest = hashlib.sha256(Path(config_path).read_bytes())
    if model is None:
        return digest.hexdigest()[:16]
    weights = os.path.join(model, "model.safetensors")
    if not os.path.isfile(weights):
        how = f"{sys.argv[0]} --family unimo --only zero-shot" if "unimo" in Path(model).parts[-3:] else "bash tools/demo.sh"
        raise CheckpointError(f"{weights} does not exist; make the demo's data and model first: {how} (or give --out)")
    digest.update(Path(weights).read_bytes())
    return digest.hexdigest()[:16]


def start_of(demo, out):
    """The directory of the pre-trained model a demo starts from, ``None`` from scratch."""
    return os.path.join(out, demo.start) if demo.start else None


def prepare(kind, out):
    """Make what is missing of a demo's ``prepare``: import region files into stores, for "all" also rewrite captions and retrieve texts."""
    if kind == "all":
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        environment = {**os.environ, "PYTHON": sys.executable, "PYTHONPATH": path}
        subprocess.run(["bash", str(ROOT / "tools" / "prepare_unimo_demo.sh"), out], check=True, env=environment)
        return
    from unimo2_paddle.data.formats.coco_captions import filelist_paths
    from unimo2_paddle.data.region_import import import_regions

    for store, source in STORES.get(kind, ()):
        store, source = os.path.join(out, store), os.path.join(out, source)
        if not os.path.isdir(store) and os.path.isfile(source):
            # the public files have numbers for what the detector saw; the records of the tasks are read without
            names = {f"{what}_names": os.path.join(out, "data", "regions", f"{what}s_vocab.txt") for what in ("object", "attribute")}
            import_regions(filelist_paths(source) if source.endswith("_filelist") else [source], store, kind, **names)


def _is_anothers(baseline):
    """Whether a demo's baseline is a figure of another demo."""
    return isinstance(baseline, str) and ":" in baseline


class Runner:
    """Runs demos and keeps what came out.

    Args:
        out: the demo directory; train, judge: ``train_from_config`` and ``run_evaluators`` of the training loop (tests give fakes).
    """

    def __init__(self, out, train, judge):
        self.out, self.train, self.judge = out, train, judge
        self.path = os.path.join(out, "demo_tasks.json")
        self.kept = {}
        if os.path.isfile(self.path):
            try:
                with open(self.path, encoding="utf-8") as file:
                    self.kept = json.load(file)["runs"]
            except (OSError, ValueError, KeyError, TypeError):
                raise UserInputError(f"{self.path}: is not a result file of this tool; remove it") from None

    def evaluation(self, demo):
        """The metrics of a demo's config: trained on its own split, judged on test; kept ones are taken as they are."""
        config = write_config(demo.config, self.out)
        model = start_of(demo, self.out)
        mark, run = fingerprint(config, model), self.kept.get(demo.config, {})
        if run and run["fingerprint"] != mark:
            raise UserInputError(f"{demo.config}: its config or the pre-trained model changed since it was run; move {run['output']} and its entry in "
                                 f"{self.path} away to run it again")
        output = read_yaml(config)["run"]["output"]
        run = self.kept.setdefault(demo.config, {"fingerprint": mark, "output": output})
        test = ["eval.split=test", *demo.overrides]
        if demo.baseline == "zero-shot" and "zero_shot" not in run:
            prepare(demo.prepare, self.out)
            judged = self.judge(config, [*test, f"model.init={model}", f"run.output={output}_zeroshot"])
            run["zero_shot"] = dict(judged[0][1])
            self._save()
        if "metrics" not in run:
            prepare(demo.prepare, self.out)
            started = time.perf_counter(), time.process_time()
            if demo.train:
                self._save()
                self.train(config, resume="auto")
                run["minutes"], run["processor_minutes"] = (round((now() - then) / 60, 2) for now, then in zip((time.perf_counter, time.process_time), started))
                test.append(f"model.init={os.path.join(output, 'best')}")
            judged = self.judge(config, test)
            run["metrics"] = {evaluator.name: dict(metrics) for evaluator, metrics in judged}
            told = [other for other in FAMILIES["all"] if other.config == demo.config and other.baseline != "zero-shot" and not _is_anothers(other.baseline)]
            run["baselines"] = {other.name: find_baseline(other.baseline, judged[0][0], judged, judged[0][1]) for other in told}
            run["first"] = judged[0][0].name
            self._save()
        return run

    def row(self, demo):
        """One line of the table: metric, value, baseline, what had to be reached, verdict."""
        run = self.evaluation(demo)
        baseline = run["zero_shot"][demo.metric] if demo.baseline == "zero-shot" else run["baselines"].get(demo.name)
        if _is_anothers(demo.baseline):
            config, _, metric = demo.baseline.partition(":")
            other = self.evaluation(next(one for one in FAMILIES["all"] if one.config == config))
            baseline = other["metrics"][other["first"]][metric]
        if demo.metric not in run["metrics"][run["first"]]:
            raise UserInputError(f"{demo.config}: the evaluation has no metric {demo.metric!r}; it has {', '.join(run['metrics'][run['first']])}")
        value = run["metrics"][run["first"]][demo.metric]
        return {"task": demo.name, "metric": demo.metric, "value": value, "baseline": baseline, "needed": threshold(demo.bar, baseline),
                "bar": f"{demo.bar[0]} {demo.bar[1]:.3g}", "met": is_met(demo.bar, value, baseline), "minutes": run.get("minutes"),
                "processor_minutes": run.get("processor_minutes")}

    def _save(self, rows=None):
        os.makedirs(self.out, exist_ok=True)
        with open(self.path + ".tmp", "w", encoding="utf-8") as file:
            json.dump({"runs": self.kept, **({} if rows is None else {"table": rows})}, file, indent=2)
            file.write("\n")
        os.replace(self.path + ".tmp", self.path)

    def run(self, demos):
        """All demos; one that fails is told and does not stop the others. Returns the rows."""
        rows = []
        for demo in demos:
            print(f"\n=== {demo.name}: run_configs/{demo.config}", flush=True)
            try:
                rows.append(self.row(demo))
            except Exception as error:  # whatever went wrong in one demo, the table must still be made
                if not isinstance(error, Unimo2Error):
                    traceback.print_exc()
                print(f"{demo.name}: {error}", file=sys.stderr)
                rows.append({"task": demo.name, "metric": demo.metric, "failed": str(error), "met": False})
        self._save(rows)
        return rows


def format_table(rows):
    """The rows as text."""
    lines = [f"{'task':<32}{'metric':<12}{'value':>8}{'baseline':>10}{'needed':>9}  {'verdict':<8}{'minutes':>8}{'cpu min':>9}"]
    for row in rows:
        if "failed" in row:
            lines.append(f"{row['task']:<32}{row['metric']:<12}{'':>27}  failed: {row['failed'].splitlines()[0][:80]}")
            continue
        baseline = "" if row["baseline"] is None else f"{row['baseline']:.2f}"
        minutes, processor = ("" if row.get(key) is None else f"{row[key]:.1f}" for key in ("minutes", "processor_minutes"))
        verdict = "met" if row["met"] else "MISSED"
        lines.append(f"{row['task']:<32}{row['metric']:<12}{row['value']:>8.2f}{baseline:>10}{row['needed']:>9.2f}  {verdict:<8}{minutes:>8}{processor:>9}")
    return "\n".join(lines)


def main(argv=None, train=None, judge=None):
    """Run the tool; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--out", default=CONFIG_OUTPUT, metavar="DIR", help=f"the demo's directory; default: {CONFIG_OUTPUT}")
    parser.add_argument("--family", choices=tuple(FAMILIES), default="unimo2", help="demos of which system; default: unimo2")
    parser.add_argument("--only", action="append", metavar="TEXT", help="only demos whose name or config contains TEXT (repeatable)")
    args = parser.parse_args(argv)
    known = FAMILIES[args.family]
    demos = [d for d in known if not args.only or any(text.lower() in f"{d.name} {d.config}".lower() for text in args.only)]
    try:
        if not demos:
            raise UserInputError(f"--only {' '.join(args.only)}: no such demo; there are {', '.join(d.name for d in known)}")
        if train is None:
            from unimo2_paddle.runtime import import_paddle, prepare_process

            prepare_process()
            import_paddle()
            from unimo2_paddle.training.loop import run_evaluators as judge
            from unimo2_paddle.training.loop import train_from_config as train
        fingerprint(write_config(demos[0].config, args.out), start_of(demos[0], args.out))
        rows = Runner(args.out, train, judge).run(demos)
    except UserInputError as error:
        print(f"run_all_demo_tasks: {error}", file=sys.stderr)
        return 2
    print("\n" + format_table(rows) + f"\nall figures: {os.path.join(args.out, 'demo_tasks.json')}")
    return 0 if all(row["met"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
