"""What a task is: a batch's meaning, its loss, its judges. The loop (training/loop.py) knows nothing else about it."""
import difflib
import importlib
import os
from dataclasses import dataclass, field
from typing import Any, Dict, List, Union

import paddle

from unimo2_paddle.checkpoints.zoo import PREFIX as ZOO
from unimo2_paddle.checkpoints.zoo import cached_path
from unimo2_paddle.checkpoints.zoo import fetch as fetch_from_zoo
from unimo2_paddle.checkpoints.zoo import find as find_in_zoo
from unimo2_paddle.errors import CheckpointError, ConfigError, VocabularyError, ZooError
from unimo2_paddle.models import fused
from unimo2_paddle.models.configuration import Unimo2Config, UnimoConfig, load_config
from unimo2_paddle.models.onednn import PRECISIONS
from unimo2_paddle.models.unimo import UnimoModel
from unimo2_paddle.models.unimo2 import Unimo2Model
from unimo2_paddle.training.optim import OptimConfig

TASKS = {
    "pretrain": "unimo2_paddle.tasks.pretrain:PretrainTask",
    "unimo_pretrain": "unimo2_paddle.tasks.unimo_pretrain:UnimoPretrainTask",
    "retrieval": "unimo2_paddle.tasks.retrieval:RetrievalTask",
    "vqa": "unimo2_paddle.tasks.vqa:VqaTask",
    "entailment": "unimo2_paddle.tasks.entailment:EntailmentTask",
    "captioning": "unimo2_paddle.tasks.captioning:CaptioningTask",
    "glue": "unimo2_paddle.tasks.glue:GlueTask",
    "seq2seq": "unimo2_paddle.tasks.seq2seq:Seq2SeqTask",
    "imagenet": "unimo2_paddle.tasks.imagenet:ImagenetTask",
    "zeroshot": "unimo2_paddle.tasks.zeroshot:ZeroShotTask",
}
CONFIG_DIRECTORY = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "models", "configs")


def task_class(name):
    """The class of a task by its name in run configs."""
    module, _, attribute = TASKS[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


@dataclass
class ModelSection:
    """Group ``model``: a named or JSON model config, single keys over it, and where the weights come from.

    ``config``: name of a bundled config (unimo2_base, unimo_base, ...) or a JSON file, whose keys say which of the two systems it is; may
    be empty when ``init`` is a directory with its own config.json. ``init``: directory of weights (own or the authors'), or ``zoo:NAME``, which is
    downloaded when the run starts and is not in the cache; empty = from scratch.
    ``allow_missing``: name patterns of parameters that ``init`` may lack.
    """

    config: str = ""
    init: str = ""
    allow_missing: List[str] = field(default_factory=list)
    overrides: Dict[str, Any] = field(default_factory=dict, metadata={"collect": (Unimo2Config, UnimoConfig)})

    def problems(self):
        if not self.config and not self.init:
            return ["config: give a model config or an init directory"]
        if self.init.startswith(ZOO):
            try:
                find_in_zoo(self.init)
            except ZooError as error:
                return [f"init: {error}"]
        if not self.config and not os.path.exists(self.init_path):
            return []  # a checkpoint may still have to be made when its run config is checked
        try:
            self.model_config()
        except ConfigError as error:
            keys = {*Unimo2Config.__dataclass_fields__, *UnimoConfig.__dataclass_fields__}
            return [text if text.split(":")[0] in keys else f"config: {error.source or self.config}: {text}" for text in error.problems]
        return []

    @property
    def init_path(self):
        """Where the weights of ``init`` are on this disk, downloaded or not yet."""
        return cached_path(self.init) if self.init.startswith(ZOO) else self.init

    def fetch(self):
        """Have the weights of a ``zoo:NAME`` on this disk; of several workers one downloads and the others wait.

        Raises:
            ZooError, DownloadError: see :func:`unimo2_paddle.checkpoints.zoo.fetch`.
        """
        if self.init.startswith(ZOO):
            fetch_from_zoo(self.init)

    def model_config(self):
        """The ``Unimo2Config`` or ``UnimoConfig`` described here.

        Raises:
            ConfigError: unknown name, unreadable file, or values that do not fit together.
        """
        if not self.config and self.init.startswith(ZOO) and not os.path.exists(self.init_path):
            name = self.init[len(ZOO):]
            raise ConfigError(f"model.init: {self.init} is not in the cache yet, so its config is unknown; run unimo2 download {name} first, or "
                              "name a model.config")
        if not self.config and not os.path.exists(self.init_path):
            raise ConfigError(f"model.init: {self.init} does not exist; give a checkpoint directory, or name a model.config")
        path = self.config or os.path.join(self.init_path, "config.json")
        if self.config and not self.config.endswith(".json"):
            path = os.path.join(CONFIG_DIRECTORY, f"{self.config}.json")
            if not os.path.isfile(path):
                known = sorted(n[:-5] for n in os.listdir(CONFIG_DIRECTORY) if n.endswith(".json"))
                close = difflib.get_close_matches(self.config, known, n=1)
                hint = f"; did you mean {close[0]!r}?" if close else ""
                raise ConfigError(f"no such bundled config; known: {', '.join(known)}, or a path ending in .json{hint}", self.config)
        return load_config(path, **self.overrides)


def build_backbone(section, seed, config, vision=True, heads=None, head_patterns=()):
    """A ``Unimo2Model`` or ``UnimoModel``, as ``config`` is, drawn from ``seed``, then with the weights of ``section.init`` when it is given.

    ``head_patterns``: see :func:`load_initial`.

    Raises:
        CheckpointError: see :func:`load_initial`.
    """
    arrays = read_initial(section)
    paddle.seed(seed)
    with paddle.utils.unique_name.guard():
        model = (UnimoModel if isinstance(config, UnimoConfig) else Unimo2Model)(config, vision=vision, heads=heads)
    load_initial(model, section, head_patterns, arrays=arrays)
    return model


build_unimo2 = build_backbone  # the name it had before there was UNIMO


def read_initial(section):
    """The arrays of ``section.init``, ``None`` when it is empty; worth doing before a large model is built.

    Raises:
        CheckpointError: ``init`` does not exist or is damaged.
    """
    from unimo2_paddle.checkpoints.convert import read_checkpoint

    if not section.init:
        return None
    section.fetch()
    if not os.path.exists(section.init_path):
        raise CheckpointError(f"model.init: {section.init} does not exist; give a checkpoint directory, or leave it empty to start from scratch")
    return read_checkpoint(section.init_path).arrays


def load_initial(model, section, head_patterns=(), arrays=None):
    """Load ``section.init`` (or its ``arrays``, read already) into a model.

    Args:
        head_patterns: names of a new head's parameters, which may be missing or mis-shaped, besides ``section.allow_missing``.

    Returns:
        the ``LoadReport``, or ``None`` when ``init`` is empty (training from scratch).

    Raises:
        CheckpointError: ``init`` does not exist, is damaged, or lacks other parameters.
    """
    from unimo2_paddle.checkpoints.released import assign_parameters, match_parameters

    arrays = read_initial(section) if arrays is None else arrays
    if arrays is None:
        return None
    shapes = {name: (array.shape, array.dtype) for name, array in arrays.items()}
    report = match_parameters(model, shapes, section.init, tuple(head_patterns) + tuple(section.allow_missing))
    assign_parameters(model, {name: arrays[name] for name in report.loaded})
    return report


def check_vocabulary(tokenizer, config, directory):
    """Raise ``VocabularyError`` when the tokenizer and the model disagree on the vocabulary size."""
    if tokenizer.vocab_size != config.text_vocab_size:
        key = "vocab_size" if isinstance(config, UnimoConfig) else "text_vocab_size"
        raise VocabularyError(f"{directory}: the vocabulary has {tokenizer.vocab_size} entries, the model's {key} is "
                              f"{config.text_vocab_size}; use the vocabulary the model was made with, or set model.{key}")


def normalise_tensor(image):
    """uint8 ``[B, S, S, 3]`` as the model's float32 input in [-1, 1], on the tensor's device."""
    return image.astype("float32") * (2.0 / 255.0) - 1.0


def to_tensors(batch):
    """The arrays of a batch as tensors; everything else stays."""
    return {key: paddle.to_tensor(value) if hasattr(value, "dtype") and not isinstance(value, paddle.Tensor) else value
            for key, value in batch.items()}


@dataclass
class RunSection:
    """Group ``run``: where the output goes, how often things happen, how workers share the load. Steps are optimizer steps.

    The keys of many workers stand here and not in a group of their own: they say how a run is carried out, not what it computes.
    """

    output: str
    seed: int = 1
    recompute: bool = False
    log_every: int = 10
    save_every: int = 0             # 0: only at the end
    keep_last: int = 3
    async_save: bool = True         # write checkpoints while training goes on; false: wait for each
    evaluate_at_end: bool = True
    early_stop: int = 0             # stop after so many evaluations without a better one; 0: never
    progress: bool = True
    graph: str = "dynamic"          # static: Programs in one process; to_static: traced encoders in the dynamic loop
    kernels: str = "auto"           # auto: layers fused by numba on CPU where graph is dynamic; plain: Paddle's operations one by one
    skip_bad_steps: int = 0         # so many steps whose loss or gradient is not finite are left out before the run stops
    trial_save: bool = True         # write and read back a checkpoint before training starts
    profile: List[int] = field(default_factory=list)  # first and last step that Paddle's profiler looks at, for example [10, 20]
    sharding: int = 0               # 1: spread the optimizer's state over the workers; 0: every worker has all of it
    amp: Union[str, bool] = "off"   # half precision on GPU: off, O1 or O2
    amp_dtype: str = "bfloat16"     # or float16, with dynamic loss scaling
    precision: str = "dynamic"      # of evaluation on CPU: dynamic, or fp32 or bf16 through oneDNN (models/onednn.py)
    compare_precision: bool = False  # unimo2 eval: judge in the dynamic graph too, and show by how much the metrics differ
    worker_timeout: float = 300.0   # seconds to wait for workers that have not arrived at the start
    check_workers_every: int = 0    # steps between checks that all workers have the same weights; 0: never

    def __post_init__(self):
        if self.amp is False:  # YAML reads a bare off as false
            self.amp = "off"

    def problems(self):
        found = [] if self.output else ["output: is empty; give a directory"]
        if self.profile and not (len(self.profile) == 2 and 1 <= self.profile[0] <= self.profile[1]):
            found.append(f"profile: must be the first and the last step, for example [10, 20], is {self.profile}")
        return found + [f"{key}: must be at least {low}, is {getattr(self, key)}"
                        for key, low in (("log_every", 1), ("save_every", 0), ("early_stop", 0), ("keep_last", 1), ("seed", 0),
                                         ("check_workers_every", 0), ("worker_timeout", 1), ("skip_bad_steps", 0)) if getattr(self, key) < low] + [
                    f"{key}: {getattr(self, key)!r} is not one of {', '.join(map(str, choices))}"
                    for key, choices in (("graph", ("dynamic", "static", "to_static")), ("kernels", fused.KINDS), ("sharding", (0, 1, 2, 3)),
                                         ("amp", ("off", "O1", "O2")), ("amp_dtype", ("bfloat16", "float16")), ("precision", PRECISIONS))
                    if getattr(self, key) not in choices]


@dataclass
class Shard:
    """Which part of every global batch this process computes."""

    rank: int = 0
    world_size: int = 1


class Task:
    """One learning problem.

    Subclasses set ``sections`` (group name -> dataclass), ``selection`` (the metric that chooses the best checkpoint; higher is
    better unless it starts with "-") and implement the methods below.
    """

    sections = {"model": ModelSection, "optim": OptimConfig, "run": RunSection}
    selection = ""
    systems = (Unimo2Config,)  # the systems whose models can learn it

    def __init__(self, config):
        self.config = config
        config.model.fetch()  # before anything asks the checkpoint for its config, classes or answers

    @classmethod
    def wrong_system(cls, section):
        """The problem, as a list of texts, that the group ``model`` is of a system this task is not there for."""
        if not section.config and not os.path.exists(os.path.join(section.init_path, "config.json")):
            return []  # a checkpoint that is still to be made, or the authors'
        found, names = section.model_config(), {Unimo2Config: "UNIMO-2", UnimoConfig: "UNIMO"}
        if isinstance(found, cls.systems):
            return []
        return [f"model: {section.config or section.init} is a model of {names[type(found)]}, this task takes one of "
                f"{' or '.join(names[one] for one in cls.systems)}"]

    @classmethod
    def check(cls, config):
        """Problems between groups, as a list of texts."""
        return []

    def build_model(self):
        """The model with its initial weights."""
        raise NotImplementedError

    def total_steps(self):
        """Optimizer steps of the whole run."""
        raise NotImplementedError

    def steps_per_epoch(self):
        """Optimizer steps of one pass over the data (for schedules given in epochs)."""
        return self.total_steps()

    def epochs(self, step, batches):
        """Passes over the data after ``step`` steps, for the log: ``{"epoch": float}``, more keys where there are several corpora."""
        return {"epoch": step / self.steps_per_epoch()}

    def step_kinds(self):
        """Names of the kinds of steps (``batch["corpus"]``), each of which may train other parameters."""
        return [""]

    def work(self, batch):
        """(tokens, floating-point operations of forward and backward) of a batch, for the log; 0 where they are not known."""
        return 0, 0.0

    def train_batches(self, shard, state=None):
        """Endless ``Batches`` of this shard (``next()``, ``state_dict()``, ``close()``), continued from ``state``.

        A batch is a dict of arrays with ``samples`` (of all workers), and for what a run reports about itself ``corpus`` (the kind of
        step) and ``keys`` (names of its records).
        """
        raise NotImplementedError

    def loss(self, model, batch):
        """Named loss terms as scalars; ``"loss"`` is their weighted sum."""
        raise NotImplementedError

    def evaluators(self):
        """Objects with ``name``, ``every_steps`` and ``run(model) -> dict[str, float]``."""
        return []

    def save_assets(self, directory):
        """Optional files beside a saved model (vocabulary, labels)."""

    def illustrate(self, model, writer, step):
        """Optional pictures and texts for the board (called after evaluations)."""
