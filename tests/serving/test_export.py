"""Exported models predict what the checkpoint predicts, in paddle.inference and in onnxruntime; a directory says all that another program needs."""
import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import paddle
import pytest

from unimo2_paddle import Predictor
from unimo2_paddle.checkpoints.pretrained import save_pretrained
from unimo2_paddle.data.region_store import Regions
from unimo2_paddle.errors import CheckpointError, Unimo2Error, UserInputError
from unimo2_paddle.models.classifier import Unimo2Classifier, UnimoClassifier
from unimo2_paddle.models.generation import Decoding
from unimo2_paddle.models.unimo import UnimoModel
from unimo2_paddle.models.unimo2 import Unimo2Model
from unimo2_paddle.serving import export as exporting
from unimo2_paddle.serving.export import check, export
from unimo2_paddle.serving.index import RetrievalIndex
from unimo2_paddle.serving.indexing import update_index
from unimo2_paddle.tasks.base import ModelSection
from unimo2_paddle.tasks.finetune import copy_vocabulary

LABELS = ["contradiction", "neutral", "entailment"]
DECODING = dataclasses.asdict(Decoding(beam_size=2, min_length=2, max_length=6))
CAPTION = {"task": "captioning", "decoding": DECODING}
ENTAILMENT = {"task": "entailment", "labels": LABELS, "max_text_len": 40}
WRITING = {"task": "seq2seq", "max_source_len": 40, "decoding": DECODING}
# name -> (system, what its task leaves in task.json, the model of a config)
MODELS = {
    "vqa": ("unimo2", {"task": "vqa", "answers": ["yes", "no", "red", "2"], "max_text_len": 40, "layout": "caption", "contrastive": True},
            lambda config: Unimo2Classifier(config, "pair", 4, layout="caption", contrastive=True)),
    "entailment": ("unimo2", {**ENTAILMENT, "layout": "pair", "contrastive": False}, lambda config: Unimo2Classifier(config, "pair", 3)),
    "glue": ("unimo2", {"task": "glue", "dataset": "mnli", "labels": LABELS, "max_text_len": 64, "pair": True},
             lambda config: Unimo2Classifier(config, "text", 3)),
    "imagenet": ("unimo2", {"task": "imagenet", "classes": ["n1", "n2"], "names": ["cat", "dog"], "inputs": "image", "centre_crop": 0.0},
                 lambda config: Unimo2Classifier(config, "image", 2)),
    "retrieval": ("unimo2", None, lambda config: Unimo2Model(config, heads=("pooling", "matching"))),
    "captioning": ("unimo2", {**CAPTION, "object_tags": False}, lambda config: Unimo2Model(config, heads=("masked_lm",))),
    "tagged": ("unimo2", {**CAPTION, "object_tags": True}, lambda config: Unimo2Model(config, heads=("masked_lm",))),
    "writing": ("unimo2", {**WRITING, "dialog": False}, lambda config: Unimo2Model(config, vision=False, heads=("masked_lm",))),
    "unimo_entailment": ("unimo", ENTAILMENT, lambda config: UnimoClassifier(config, "pair", 3)),
    "unimo_retrieval": ("unimo", {"task": "retrieval", "max_text_len": 40}, lambda config: UnimoModel(config, heads=("pooling", "matching"))),
    "unimo_captioning": ("unimo", {**CAPTION, "object_tags": True}, lambda config: UnimoModel(config, heads=("masked_lm",))),
    "unimo_writing": ("unimo", {**WRITING, "dialog": False}, lambda config: UnimoModel(config, vision=False, heads=("masked_lm",))),
    "unimo_dialogue": ("unimo_dialogue", {**WRITING, "dialog": True}, lambda config: UnimoModel(config, vision=False, heads=("masked_lm",))),
}
SELDOM = ("entailment", "imagenet", "captioning", "writing", "unimo_entailment", "unimo_writing")  # much like others
IN_THREE = ("vqa", "retrieval", "tagged", "unimo_captioning", "unimo_dialogue")  # those whose ONNX is made too


@pytest.fixture(scope="module")
def checkpoint(demo_data, tiny_config, tmp_path_factory):
    """A function: name -> checkpoint directory as training leaves it, with weights large enough that every input matters."""
    root, made = tmp_path_factory.mktemp("checkpoints"), {}
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    unimo = {"unimo": ModelSection("unimo_demo", overrides=small).model_config(),
             "unimo_dialogue": ModelSection("unimo_demo", overrides={**small, "role_type_size": 3, "turn_type_size": 16}).model_config()}

    def make(name):
        system, about, build = MODELS[name]
        if name not in made:
            with paddle.utils.unique_name.guard():
                model = build(type(tiny_config).from_dict(tiny_config.to_dict()) if system == "unimo2" else unimo[system])
            rng = np.random.default_rng(5)
            for parameter in sorted(model.parameters(), key=lambda p: p.name):
                if not parameter.name.endswith("_temperature"):
                    parameter.set_value(rng.normal(1.0 if parameter.name.endswith("_scale") else 0.0, 0.3, parameter.shape).astype("float32"))
            if system == "unimo2":
                getattr(model, "backbone", model).dictionary.temperature.set_value(np.array([1.0], "float32"))  # no two codes tie
            save_pretrained(model, str(root / name))
            copy_vocabulary(demo_data / "vocab", root / name / "vocab")
            if about:
                (root / name / "task.json").write_text(json.dumps(about))
            made[name] = root / name
        return made[name]

    return make


@pytest.fixture(scope="module")
def exported(checkpoint, tmp_path_factory):
    """A function: name -> the predictor, the exported directory, and how they were found to differ."""
    root, made = tmp_path_factory.mktemp("exported"), {}

    def make(name):
        if name not in made:
            predictor = Predictor(checkpoint(name))
            found = export(predictor, root / name, onnx=name in IN_THREE and has_onnx())
            made[name] = SimpleNamespace(predictor=predictor, directory=root / name, differences=found)
        return made[name]

    return make


def has_onnx():
    try:
        import onnxruntime  # noqa: F401
        import paddle2onnx.convert  # noqa: F401
    except ImportError:
        return False
    return not paddle.__version__.startswith("2.")


@pytest.fixture(scope="module")
def requests(demo_data):
    """A function: predictor -> requests of different lengths with everything it takes."""
    pictures = sorted((demo_data / "retrieval" / "images").glob("*.jpg"))[:3]
    rng = np.random.default_rng(2)
    regions = [Regions(f"p{n}", 64, 64, rng.normal(size=(2 + n, 64)).astype("float32"), rng.uniform(0, 60, (2 + n, 4)).astype("float32")) for n in range(3)]
    texts = ["a red ring", "A small red ring is left of a blue box.", "a box"]
    dialogue = ["What is left of the box? [SEP] a ring [SEP] What colour is it?", "a box [SEP] a ring", "Where is the ring?"]

    def make(predictor):
        if predictor.task == "seq2seq" and predictor.kind.dialog:  # turns, with their passage or without one
            return [{"text": turns, **({"text_b": passage} if passage else {})} for turns, passage in zip(dialogue, [*texts[:2], None])]
        given = {"image": regions if predictor.kind.reads_regions else [str(picture) for picture in pictures], "text": texts, "text_b": texts[::-1]}
        return [{field: given[field][n] for field in predictor.needs} for n in range(3)]

    return make


def assert_same(one, other):
    """Two results differ by float rounding at most."""
    one, other = one.to_json(), other.to_json()
    assert one.keys() == other.keys()
    for key, value in one.items():
        assert other[key] == (pytest.approx(value, abs=1e-4) if isinstance(value, (float, dict)) else value), key


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SELDOM)) for name in MODELS])
def test_an_exported_model_predicts_what_its_checkpoint_predicts(exported, requests, name):
    made = exported(name)
    given, loaded = requests(made.predictor), Predictor(made.directory)
    assert loaded.exported and loaded.kind.model is None
    for batch_size in (1, 3):
        for wanted, got in zip(made.predictor.predict_batch(given), loaded.predict_batch(given, batch_size)):
            assert_same(wanted, got)
    assert all(one.excess <= 1e-5 and one.compared for one in made.differences)


@pytest.mark.skipif(not has_onnx(), reason="onnxruntime and paddle2onnx for Paddle 3 are not installed")
@pytest.mark.parametrize("name", IN_THREE)
def test_onnxruntime_predicts_what_the_checkpoint_predicts(exported, requests, name):
    made = exported(name)
    given = requests(made.predictor)
    for wanted, got in zip(made.predictor.predict_batch(given), Predictor(made.directory, engine="onnx").predict_batch(given)):
        assert_same(wanted, got)
    assert {one.engine for one in made.differences} == {"paddle", "onnx"}


@pytest.mark.skipif(not has_onnx(), reason="onnxruntime and paddle2onnx for Paddle 3 are not installed")
def test_onnx_files_name_their_inputs_outputs_and_open_sizes(exported):
    import onnxruntime

    session = onnxruntime.InferenceSession(str(exported("vqa").directory / "logits.onnx"))
    shapes = {value.name: value.shape for value in session.get_inputs()}
    assert shapes == {"image": ["batch", 32, 32, 3], **{name: ["batch", "length"] for name in ("input_ids", "position_ids", "text_mask")}}
    assert [value.name for value in session.get_outputs()] == ["logits"]


def test_search_and_zero_shot_classes_work_on_an_exported_model_and_an_index_serves_both(exported, folder, tmp_path):
    made = exported("retrieval")
    loaded = Predictor(made.directory)
    update_index(made.predictor, str(folder), str(tmp_path / "index"))
    index = RetrievalIndex.load(str(tmp_path / "index"))
    wanted, got = (index.search(one, "a red ring", top=3, rerank=4) for one in (made.predictor, loaded))
    assert [found.item for found in got] == [found.item for found in wanted]
    assert [found.score for found in got] == pytest.approx([found.score for found in wanted], abs=1e-4)
    pictures = [str(path) for path in sorted(folder.glob("*.jpg"))]
    for one, other in zip(made.predictor.classify(pictures, ["ring", "box"]), loaded.classify(pictures, ["ring", "box"])):
        assert_same(one, other)


def test_the_directory_tells_everything_about_inputs_and_outputs(exported):
    about = json.loads((exported("captioning").directory / "export.json").read_text())
    assert about["task"] == "captioning" and about["system"] == "UNIMO-2" and about["paddle"] == paddle.__version__
    assert about["preprocessing"]["image"]["size"] == 32 and about["preprocessing"]["text"]["ids"]["cls"] >= 0
    assert about["decoding"]["beam_size"] == 2 and {"config.json", "vocab/vocab.txt", *about["programs"]["step"]["paddle"]} <= set(about["files"])
    prefix, step = (about["programs"][name] for name in ("prefix", "step"))
    assert {spec["name"] for spec in step["inputs"]} - {"tokens", "step"} == set(prefix["outputs"]) - {"logits"}
    assert json.loads((exported("vqa").directory / "export.json").read_text())["labels"] == ["yes", "no", "red", "2"]


def test_a_damaged_or_incomplete_directory_is_named(exported, tmp_path):
    import shutil

    shutil.copytree(exported("glue").directory, tmp_path / "copy")
    weights = tmp_path / "copy" / "logits.pdiparams"
    weights.write_bytes(weights.read_bytes()[:-4] + b"oops")
    with pytest.raises(CheckpointError, match="logits.pdiparams is damaged"):
        Predictor(tmp_path / "copy")
    weights.unlink()
    with pytest.raises(CheckpointError, match="logits.pdiparams is missing"):
        Predictor(tmp_path / "copy")
    (tmp_path / "copy" / "export.json").write_text("{}")
    with pytest.raises(CheckpointError, match="export.json: cannot be read"):
        Predictor(tmp_path / "copy")


def test_a_model_that_differs_leaves_nothing_behind(checkpoint, tmp_path, monkeypatch):
    real = exporting.save_program

    def wrong(program, path):
        with paddle.no_grad():
            program.model.head.bias.set_value(program.model.head.bias + 1.0)
        try:
            return real(program, path)
        finally:
            with paddle.no_grad():
                program.model.head.bias.set_value(program.model.head.bias - 1.0)

    monkeypatch.setattr(exporting, "save_program", wrong)
    with pytest.raises(Unimo2Error, match="paddle program logits differs from the model by"):
        export(Predictor(checkpoint("imagenet")), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_weights_of_another_model_are_not_compared(exported, checkpoint):
    with pytest.raises(UserInputError, match="was not exported from the weights of"):
        check(Predictor(checkpoint("entailment")), exported("imagenet").directory)


def test_the_command_writes_checks_and_refuses(checkpoint, exported, unimo2, tmp_path):
    model = checkpoint("imagenet")
    outcome = unimo2("export", "-m", model, "--to", tmp_path / "out")
    assert outcome.status == 0 and "| paddle | logits | logits | 16 x 2 | 24 |" in outcome.out, outcome.err
    assert unimo2("export", "-m", model, "--check", tmp_path / "out").out.startswith("| engine |")
    for arguments, told in ((("--to", tmp_path / "out"), "exists; choose another --to"), (("--check", model), "export.json: cannot be read"),
                            (("--check", tmp_path / "out", "--onnx"), "--onnx goes with --to"), (("--to", tmp_path / "x", "--tolerance", "0"), "--tolerance")):
        outcome = unimo2("export", "-m", model, *arguments)
        assert outcome.status == 2 and told in outcome.err, outcome.err
    outcome = unimo2("export", "-m", tmp_path / "out", "--to", tmp_path / "again")
    assert outcome.status == 2 and "is an exported model already" in outcome.err
    outcome = unimo2("explain", "--model", exported("retrieval").directory, "--out", tmp_path / "page", model / "none.jpg", "a ring")
    assert outcome.status == 2
