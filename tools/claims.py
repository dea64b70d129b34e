"""Do the claims of UNIMO-2 show in small? Pre-trains all arms of the comparisons at the same compute, judges them, and tells what came out.

    python tools/claims.py                        # everything: resumes where it was interrupted
    python tools/claims.py --claim dictionary --claim unpaired --seeds 3
    python tools/claims.py --budget 60            # starts no further run after an hour
    python tools/claims.py --report               # tables and figures of what is there
    python tools/claims.py --smoke                # everything in its smallest size, into a directory that is removed

Claims: dictionary (grounded against baseline), unpaired (images and texts without partners), skills (joint learning against one corpus),
ablations, and rewriting (UNIMO; runs tools/rewriting_ablation.py). Every run leaves one JSON file in --results; a file that is there is not
computed again. Every arm gets the same steps, tokens (within a few per cent) and, where shapes allow, initial weights; its learning rate is
the best of the same small grid on the development split, with seed 1 and the middle number of pairs. Exit status: 0 done, 2 wrong input, 130 interrupted.
"""
import argparse
import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zlib  # noqa: F401  before paddle: Paddle 2.6.2 exports zlib's symbols, and the first use would then crash
from dataclasses import dataclass
from pathlib import Path
from typing import Dict, List, Tuple

TOOLS = Path(__file__).resolve().parent
sys.path[:0] = [str(TOOLS.parent), str(TOOLS)]

from unimo2_paddle.config import load_run_config, read_yaml  # noqa: E402
from unimo2_paddle.errors import UserInputError  # noqa: E402

BASELINE, ONE_CORPUS = "model.model_type=baseline", "mixture.weights={{{corpus}: 1.0}}"
NO_DICTIONARY_LOSS = tuple(f"train.{corpus}.dictionary=0" for corpus in ("pairs", "images", "texts"))
RESIZED = ["vq_emb", "grounded.mask_g_*"]  # what another dictionary or another head has in other shapes


@dataclass(frozen=True)
class Arm:
    """A variant: its keys over the sweep's config, what chooses its learning rate, and whether it is trained at every number of pairs."""

    name: str
    keys: Tuple[str, ...] = ()
    select: str = "r1"
    all_sizes: bool = False
    trained: bool = True


MAIN = (Arm("grounded-all", all_sizes=True), Arm("baseline-all", (BASELINE,), all_sizes=True),
        Arm("grounded-pairs", (ONE_CORPUS.format(corpus="pairs"),), all_sizes=True),
        Arm("baseline-pairs", (BASELINE, ONE_CORPUS.format(corpus="pairs")), all_sizes=True))
SKILLS = (Arm("texts-only", (ONE_CORPUS.format(corpus="texts"),), "text_loss"),
          Arm("images-only", (ONE_CORPUS.format(corpus="images"),), "classes"), Arm("untrained", trained=False))
ABLATIONS = (Arm("no dictionary loss", NO_DICTIONARY_LOSS), Arm("no matching", ("train.pairs.matching=0",)),
             Arm("no visual contrast", ("train.images.visual_contrastive=0",)), Arm("fixed temperatures", ('train.frozen=["*_temperature"]',)),
             Arm("masked grounded tokens", ("model.with_grounding_mask=true", "train.pairs.masked_grounding=1", "train.images.masked_grounding=1")),
             Arm("a quarter of the codes", ("model.num_codebook=32",)), Arm("four times the codes", ("model.num_codebook=512",)),
             Arm("a quarter of K", ("model.topk_value=4",)), Arm("twice K", ("model.topk_value=32",)))
CLAIMS = {"dictionary": MAIN, "unpaired": MAIN, "skills": SKILLS, "ablations": ABLATIONS}
SEEDS = {"dictionary": 3, "unpaired": 3, "skills": 2, "ablations": 2}
REWRITING = "rewriting"


@dataclass
class Sweep:
    """The file ``--sweep``; see tools/claims.yaml."""

    config: str
    output: str
    pairs: Dict[int, str]
    learning_rates: List[float]
    world: bool = False
    entailment: str = ""
    classes: str = ""
    texts: str = ""
    most: int = 600
    options: List[str] = dataclasses.field(default_factory=list)

    @classmethod
    def read(cls, path):
        """Raises ``UserInputError`` for unknown or missing keys and for what cannot be swept over."""
        values, known = read_yaml(path), {field.name: field for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - set(known))
        missing = [name for name in ("config", "output", "pairs", "learning_rates") if not values.get(name)]
        if unknown or missing:
            raise UserInputError(f"{path}: " + "; ".join([f"unknown key {key}" for key in unknown] + [f"{key} is missing" for key in missing]))
        if not isinstance(values["pairs"], dict) or not all(isinstance(size, int) and size > 0 for size in values["pairs"]):
            raise UserInputError(f"{path}: pairs must be numbers of pairs with their shards, for example 100: data/pairs-100/*.tar")
        return cls(**values)

    @property
    def middle(self):
        """The number of pairs that arms of one size are trained with."""
        return sorted(self.pairs)[len(self.pairs) // 2]


@dataclass(frozen=True)
class Run:
    """One training: an arm at a number of pairs, a learning rate and a seed."""

    arm: Arm
    size: int
    rate: float
    seed: int

    @property
    def name(self):
        """Of its directory and its result."""
        return f"{self.arm.name.replace(' ', '-')}_{self.size}_lr{self.rate:g}_seed{self.seed}"


def describe(run):
    """What a result says of its run."""
    return {"arm": run.arm.name, "size": run.size, "learning_rate": run.rate, "seed": run.seed, "select": run.arm.select}


class Results:
    """The results that are there, one JSON file per run.

    Args:
        directory: where they lie; it is made with the first one.
    """

    def __init__(self, directory):
        self.directory = directory

    def path(self, run):
        """The file of a run."""
        return os.path.join(self.directory, f"{run.name}.json")

    def read(self, run, settings=None):
        """The result of a run, ``None`` when it is not there.

        Raises:
            UserInputError: it is damaged, or of other ``settings``.
        """
        path = self.path(run)
        if not os.path.isfile(path):
            return None
        try:
            with open(path, encoding="utf-8") as file:
                result = json.load(file)
            then = result["settings"]
        except (OSError, ValueError, KeyError, TypeError):
            raise UserInputError(f"{path}: is not a result of this tool; move it away") from None
        if settings is not None and then != settings:
            raise UserInputError(f"{path}: was made with other settings; choose another --results, or move that directory away")
        return result

    def write(self, run, result):
        """Keep a result, in one piece."""
        os.makedirs(self.directory, exist_ok=True)
        path = self.path(run)
        lines = [f" {json.dumps(key)}: {json.dumps(value)}" for key, value in result.items()]
        with open(path + ".tmp", "w", encoding="utf-8") as file:
            file.write("{\n" + ",\n".join(lines) + "\n}\n")
        os.replace(path + ".tmp", path)

    def best_rate(self, arm, size, rates):
        """The learning rate of an arm that seed 1 does best with on the development split.

        Raises:
            UserInputError: the grid is not complete.
        """
        from claims_outcomes import HIGHER_IS_BETTER

        judged = [(self.read(Run(arm, size, rate, 1)), rate) for rate in rates]
        if any(result is None for result, _ in judged):
            raise UserInputError(f"{self.directory}: lacks a learning rate of {arm.name} at {size} pairs, seed 1; run the whole sweep")
        sign = 1 if HIGHER_IS_BETTER[arm.select] else -1
        return max(judged, key=lambda one: sign * one[0]["dev"][arm.select])[1]


class Experiment:
    """The runs of a sweep and their judges.

    Args:
        sweep: :class:`Sweep`; results: :class:`Results`; launch: train through tools/launch.sh (one worker per GPU).
    """

    def __init__(self, sweep, results, launch=False):
        self.sweep, self.results, self.launch = sweep, results, launch
        self.outcomes = None

    def plan(self, claims, seeds=None):
        """Yields the runs that are still to do, those first that tell most; the next one is chosen when the one before it is done."""
        groups = {}  # two claims may rest on the same arms
        for claim in claims:
            groups.setdefault(CLAIMS[claim], seeds or SEEDS[claim])
        for arms, count in groups.items():
            for size in sorted(self.sweep.pairs, key=lambda size: (size != self.sweep.middle, size)):
                for seed in range(1, count + 1):
                    for arm in arms:
                        if arm.all_sizes or size == self.sweep.middle:
                            yield from self._missing(arm, size, seed)

    def _missing(self, arm, size, seed):
        rates = self.sweep.learning_rates if arm.trained else [0.0]
        if seed > 1 or size != self.sweep.middle:
            rates = [self.results.best_rate(arm, self.sweep.middle, rates)]
        for run in (Run(arm, size, rate, seed) for rate in rates):
            if self.results.read(run, self.settings(run)) is None:
                yield run

    def keys(self, run):
        """The ``key=value`` that make a run out of the sweep's config."""
        sweep = self.sweep
        return [*sweep.options, *run.arm.keys, f'data.pairs=[{{shards: "{sweep.pairs[run.size]}"}}]', f"optim.learning_rate={run.rate}",
                f"run.seed={run.seed}", f"model.init={sweep.output}/initial-{run.seed}", f"model.allow_missing={json.dumps(RESIZED)}"]

    def settings(self, run):
        """A digest of everything a run is made from, but for the defaults of keys nobody set."""
        told = json.dumps([read_yaml(self.sweep.config), self.keys(run)], sort_keys=True)
        return hashlib.sha256(told.encode()).hexdigest()[:16]

    def carry_out(self, run):
        """Train what is to train, judge it, and keep the result."""
        directory = os.path.join(self.sweep.output, "runs", run.name)
        keys = [*self.keys(run), f"run.output={directory}", "run.evaluate_at_end=false", "run.progress=false"]
        self._initial(run.seed)
        started = time.perf_counter(), time.process_time()
        if run.arm.trained:
            self._train(keys)
        trained = [round(now() - then, 1) for now, then in zip((time.perf_counter, time.process_time), started)]
        judged = self._judge(os.path.join(directory, "best") if run.arm.trained else os.path.join(self.sweep.output, f"initial-{run.seed}"), keys)
        told = {**describe(run), "settings": self.settings(run), "keys": list(run.arm.keys), "seconds": trained[0], "processor_seconds": trained[1]}
        if run.arm.trained:
            told.update(logged(os.path.join(directory, "metrics.jsonl")))
            shutil.rmtree(os.path.join(directory, "checkpoints"), ignore_errors=True)  # the model is in best/
        self.results.write(run, {**told, **{split: {key: round(value, 4) for key, value in values.items()} for split, values in judged.items()}})

    def _initial(self, seed):
        """The weights that all arms of a seed start from: those of the whole grounded model."""
        path = os.path.join(self.sweep.output, f"initial-{seed}")
        if os.path.isdir(path):
            return
        from unimo2_paddle.checkpoints.pretrained import save_pretrained
        from unimo2_paddle.tasks.base import build_backbone

        config = load_run_config(self.sweep.config, [*self.sweep.options, "model.with_grounding_mask=true"])
        save_pretrained(build_backbone(config.model, seed, config.model.model_config()), path)

    def _train(self, keys):
        if self.launch:
            options = [word for key in keys for word in ("-o", key)]
            subprocess.run(["bash", str(TOOLS / "launch.sh"), self.sweep.config, *options, "--resume", "auto"], check=True)
            return
        from unimo2_paddle.tasks.base import task_class
        from unimo2_paddle.training.loop import Trainer

        config = load_run_config(self.sweep.config, keys)
        trainer = Trainer(task_class(config.task)(config), config, "auto")
        trainer.run()
        if trainer.stopped:
            raise KeyboardInterrupt

    def _judge(self, checkpoint, keys):
        from claims_outcomes import Outcomes

        from unimo2_paddle.checkpoints.pretrained import from_pretrained

        if self.outcomes is None:
            sweep = self.sweep
            self.outcomes = Outcomes(load_run_config(sweep.config, keys), sweep.entailment, sweep.classes, sweep.texts, sweep.most)
        return self.outcomes.judge(from_pretrained(checkpoint))


def logged(path):
    """What a run's ``metrics.jsonl`` tells: tokens read, passes over each corpus, and the curve of the dictionary's health."""
    tokens, before, passes, curve = 0.0, 0, {}, []
    with open(path, encoding="utf-8") as file:
        for record in map(json.loads, file):
            if record["kind"] == "train":
                tokens += record["tokens_per_second"] * record["batch_cost"] * (record["step"] - before)
                before = record["step"]
                passes = {key: round(value, 2) for key, value in record.items() if key.startswith("epoch_")}
            elif record["kind"] == "dictionary":
                curve.append({key: value if key == "step" else round(value, 3) for key, value in record.items() if key != "kind"})
    return {"steps": before, "tokens": round(tokens), "passes": passes, "dictionary": curve}


def smoke_sweep(directory):
    """A sweep of two steps a run over a world of 24 pairs, in ``directory``."""
    world, config = os.path.join(directory, "world-24"), str(TOOLS.parent / "run_configs" / "pretrain" / "claims.yaml")
    options = [f"data.vocab={world}/vocab", f"eval.annotations={world}/retrieval/dataset_shapes.json", f"eval.images={world}/retrieval/images",
               *(f'data.{corpus}=[{{shards: "{world}/{corpus}/*.tar"}}]' for corpus in ("images", "texts")), "train.steps=2", "eval.max_images=6",
               "mixture.global_batch={pairs: 4, images: 4, texts: 4}", "mixture.weights={pairs: 0.4, images: 0.3, texts: 0.3}",
               "train.matching_group=4", "train.fused_per_group=2", "eval.dictionary_every=2", "model.image_size=32", "model.hidden_size=16",
               "model.text_hidden_size=16", "model.vit_hidden_size=16", "run.log_every=1", "run.trial_save=false"]
    judges = {name: os.path.join(directory, name) for name in ("entailment", "classes", "texts")}
    return Sweep(config, directory, {24: f"{world}/pairs/*.tar"}, [1e-3, 3e-3], True, most=9, options=options, **judges)


def run_rewriting(seeds, out, results):
    """Run UNIMO's ablation and keep a copy of its results; returns its exit status."""
    import rewriting_ablation

    status = rewriting_ablation.main(["--seeds", str(seeds or 3), "--out", out])
    found = os.path.join(out, "results.json")
    if status == 0 and os.path.isfile(found):
        os.makedirs(results, exist_ok=True)
        shutil.copy(found, os.path.join(results, "rewriting.json.tmp"))
        os.replace(os.path.join(results, "rewriting.json.tmp"), os.path.join(results, "rewriting.json"))
    return status


def sweep_over(experiment, claims, seeds, budget):
    """Carry out what is to do; returns how many runs were started."""
    started, done = time.monotonic(), 0
    for run in experiment.plan(claims, seeds):
        if budget and time.monotonic() - started > 60 * budget:
            print(f"the budget of {budget:g} minutes is used up; the same command goes on", flush=True)
            break
        print(f"{time.strftime('%H:%M:%S')} {run.name}", flush=True)
        experiment.carry_out(run)
        done += 1
    return done


def smoke():
    """Every part of the tool once, in a directory that is removed; prints the tables."""
    import claims_report
    from claims_world import prepare

    with tempfile.TemporaryDirectory() as directory:
        sweep = smoke_sweep(directory)
        prepare(directory, sweep.pairs, classes=3)
        results = Results(os.path.join(directory, "results"))
        experiment = Experiment(sweep, results)
        sweep_over(experiment, ["dictionary"], 2, 0)
        for arm in (SKILLS[0], SKILLS[-1], ABLATIONS[3], ABLATIONS[4]):
            for run in experiment._missing(arm, 24, 1):
                experiment.carry_out(run)
        print(claims_report.write_report(results.directory, os.path.join(directory, "figures")))


def parse_arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--claim", action="append", choices=[*CLAIMS, REWRITING], help="only this one (repeatable); default: all but rewriting")
    parser.add_argument("--seeds", type=int, metavar="N", help=f"seeds 1 to N; default: {', '.join(f'{n} for {c}' for c, n in SEEDS.items())}")
    parser.add_argument("--budget", type=float, default=0, metavar="MINUTES", help="start no further run after so long; default: no limit")
    parser.add_argument("--sweep", default=str(TOOLS / "claims.yaml"), metavar="FILE", help="what to sweep over; default: tools/claims.yaml")
    parser.add_argument("--results", default="docs/claims/results", metavar="DIR", help="one JSON file per run; default: docs/claims/results")
    parser.add_argument("--figures", default="docs/claims", metavar="DIR", help="where figures go; default: docs/claims")
    parser.add_argument("--page", default="docs/claims.md", metavar="FILE", help="page whose results are replaced, if it is there; default: docs/claims.md")
    parser.add_argument("--rewriting", default="output/demo/rewriting", metavar="DIR", help="where the runs of the claim rewriting are; default: "
                        "output/demo/rewriting")
    parser.add_argument("--launch", action="store_true", help="train through tools/launch.sh (one worker per GPU)")
    parser.add_argument("--report", action="store_true", help="train nothing")
    parser.add_argument("--smoke", action="store_true", help="every part once in its smallest size (under two minutes)")
    return parser.parse_args(argv)


def main(argv=None):
    """Run the tool; returns the exit status."""
    args = parse_arguments(argv)
    try:
        if args.seeds is not None and args.seeds < 1:
            raise UserInputError(f"--seeds {args.seeds}: must be at least 1")
        from unimo2_paddle.runtime import import_paddle, prepare_process

        prepare_process()
        import_paddle()
        if args.smoke:
            smoke()
            return 0
        return _run(args)
    except UserInputError as error:
        print(f"claims: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("claims: interrupted; the same command goes on", file=sys.stderr)
        return 130


def _run(args):
    import claims_report

    if not args.report:
        sweep = Sweep.read(args.sweep)
        claims = args.claim or list(CLAIMS)
        if sweep.world:
            from claims_world import prepare

            prepare(sweep.output, sweep.pairs)
        experiment = Experiment(sweep, Results(args.results), args.launch)
        sweep_over(experiment, [claim for claim in claims if claim in CLAIMS], args.seeds, args.budget)
        if REWRITING in claims:
            status = run_rewriting(args.seeds, args.rewriting, args.results)
            if status:
                return status
    text = claims_report.write_report(args.results, args.figures)
    print(text)
    claims_report.replace_results(args.page, text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
