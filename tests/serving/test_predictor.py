"""Predictions from checkpoint directories equal what the model computes; inputs are checked; indexes find what scoring every pair finds."""
import dataclasses
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import paddle
import pytest

from unimo2_paddle import Predictor
from unimo2_paddle.checkpoints.pretrained import save_pretrained
from unimo2_paddle.data.images import decode_image, load_image
from unimo2_paddle.data.tokenizer import Tokenizer
from unimo2_paddle.errors import CheckpointError, DataError, ImageError, UserInputError
from unimo2_paddle.models.classifier import Unimo2Classifier
from unimo2_paddle.models.configuration import Unimo2Config
from unimo2_paddle.models.generation import Decoding
from unimo2_paddle.models.unimo2 import Unimo2Model
from unimo2_paddle.serving.index import RetrievalIndex
from unimo2_paddle.serving.indexing import collect_items
from unimo2_paddle.serving.results import Answered, Captioned, Classified, Matched, Scored
from unimo2_paddle.tasks.captioning import CaptioningTask
from unimo2_paddle.tasks.entailment import EntailmentTask
from unimo2_paddle.tasks.finetune import copy_vocabulary
from unimo2_paddle.tasks.glue import GlueTask, encode_text
from unimo2_paddle.tasks.imagenet import ImagenetTask
from unimo2_paddle.tasks.vqa import VqaTask

ROOT = Path(__file__).resolve().parent.parent.parent
LABELS = ["contradiction", "neutral", "entailment"]
DECODING = dataclasses.asdict(Decoding(beam_size=2, min_length=2, max_length=6))
# What the tasks write into task.json (Task.description) beside the weights.
ABOUT = {
    "mnli": {"task": "glue", "dataset": "mnli", "labels": LABELS, "max_text_len": 64, "pair": True},
    "sst2": {"task": "glue", "dataset": "sst2", "labels": ["0", "1"], "max_text_len": 64, "pair": False},
    "stsb": {"task": "glue", "dataset": "stsb", "labels": [], "max_text_len": 64, "pair": True},
    "entailment": {"task": "entailment", "labels": LABELS, "max_text_len": 40, "layout": "pair", "contrastive": False},
    "vqa": {"task": "vqa", "answers": ["yes", "no", "red", "2"], "frequent_answers": {}, "max_text_len": 40, "layout": "caption", "contrastive": False},
    "imagenet": {"task": "imagenet", "classes": ["n1", "n2"], "names": ["cat", "dog"], "inputs": "image", "centre_crop": 0.0},
    "captioning": {"task": "captioning", "decoding": DECODING, "object_tags": False},
    "tagged": {"task": "captioning", "decoding": DECODING, "object_tags": True},
    "retrieval": {"task": "retrieval"},
    "pretrained": None,
}
INPUTS = {"mnli": "text", "sst2": "text", "stsb": "text", "entailment": "pair", "vqa": "pair", "imagenet": "image"}
NEEDS = {"mnli": ("text", "text_b"), "sst2": ("text",), "stsb": ("text", "text_b"), "imagenet": ("image",), "captioning": ("image",)}
TEXTS = {"text": "A small red ring is left of a blue box.", "text_b": "There is a ring."}


def test_the_task_files_of_these_tests_have_the_keys_the_tasks_write():
    settings = SimpleNamespace(
        data=SimpleNamespace(max_text_len=64, objects="", regions="", dataset="mnli", class_names=lambda: LABELS),
        eval=SimpleNamespace(decoding=Decoding(), centre_crop=0.0), head=SimpleNamespace(layout="pair", contrastive=False))
    stand_in = SimpleNamespace(config=settings, data=settings.data, answers=["yes"], frequent=dict, classes=["n1"], names=["cat"], inputs="image")
    for name, task in (("mnli", GlueTask), ("entailment", EntailmentTask), ("vqa", VqaTask), ("imagenet", ImagenetTask), ("captioning", CaptioningTask)):
        assert set(task.description(stand_in)) == set(ABOUT[name]) - {"task"}, name


def random_weights(model, seed=5):
    """Weights large enough that every input matters."""
    rng = np.random.default_rng(seed)
    for parameter in sorted(model.parameters(), key=lambda p: p.name):
        if not parameter.name.endswith("_temperature"):
            parameter.set_value(rng.normal(1.0 if parameter.name.endswith("_scale") else 0.0, 0.3, parameter.shape).astype("float32"))
    model.eval()
    return model


@pytest.fixture(scope="module")
def world(demo_data, tiny_config, tmp_path_factory):
    """For every kind of task a directory as its training leaves it, with the model that is in it."""
    root = tmp_path_factory.mktemp("models")
    config, models = Unimo2Config.from_dict(tiny_config.to_dict()), {}
    for name, about in ABOUT.items():
        with paddle.utils.unique_name.guard():
            if name in INPUTS:
                classes = (about.get("labels") or about.get("answers") or about.get("classes") or [None])
                model = Unimo2Classifier(config, INPUTS[name], len(classes), layout=about.get("layout", "pair"))
            else:
                model = Unimo2Model(config, heads=("masked_lm",) if about and about["task"] == "captioning" else ("pooling", "matching"))
        models[name] = random_weights(model)
        save_pretrained(model, str(root / name))
        copy_vocabulary(demo_data / "vocab", root / name / "vocab")
        if about:
            (root / name / "task.json").write_text(json.dumps(about))
    tokenizer = Tokenizer.from_directory(demo_data / "vocab")
    pictures = sorted((demo_data / "retrieval" / "images").glob("*.jpg"))[:8]
    return type("World", (), {"root": root, "models": models, "config": config, "tokenizer": tokenizer, "pictures": pictures})


@pytest.fixture
def predictor(world):
    return lambda name, **options: Predictor(world.root / name, **options)


def inputs_of(name, picture):
    given = {**TEXTS, "image": str(picture)}
    return {field: given[field] for field in NEEDS.get(name, ("image", "text"))}


def tensors(world, ids):
    ids = np.array([ids], dtype="int64")
    return {"input_ids": paddle.to_tensor(ids), "position_ids": paddle.to_tensor(np.arange(2, 2 + ids.shape[1])[None]),
            "text_mask": paddle.ones(ids.shape)}


def plain_logits(world, name, given):
    """Logits of one input by the model alone."""
    arrays = {}
    if "image" in given:
        arrays["image"] = paddle.to_tensor(load_image(given["image"], world.config.image_size)[None])
    if "text" in given:
        arrays.update(tensors(world, encode_text(world.tokenizer, given["text"], given.get("text_b"), 64)))
    return world.models[name](**arrays).numpy()[0].astype("float64")


@pytest.mark.parametrize("name", ["mnli", "sst2", "entailment", "imagenet"])
def test_class_probabilities_are_the_models(world, predictor, name):
    given = inputs_of(name, world.pictures[0])
    result = predictor(name)(**given)
    logits = plain_logits(world, name, given)
    wanted = np.exp(logits) / np.exp(logits).sum()
    names = ABOUT[name].get("names") or ABOUT[name]["labels"]
    assert isinstance(result, Classified) and result.label == names[int(wanted.argmax())]
    assert {n: result.probabilities[n] for n in names} == pytest.approx(dict(zip(names, wanted)), abs=1e-5)
    assert result.probability == max(result.probabilities.values())


def test_answers_have_independent_probabilities(world, predictor):
    picture = world.pictures[1]
    result = predictor("vqa", top=3)(image=picture, question="What colour is the ring?")
    wanted = 1 / (1 + np.exp(-plain_logits(world, "vqa", {"image": picture, "text": "What colour is the ring?"})))
    assert isinstance(result, Answered) and len(result.candidates) == 3
    assert list(result.candidates.values()) == pytest.approx(sorted(wanted, reverse=True)[:3], abs=1e-5)
    assert result.answer == ABOUT["vqa"]["answers"][int(wanted.argmax())]


def test_similarity_is_the_raw_score(world, predictor):
    result = predictor("stsb")(**TEXTS)
    assert isinstance(result, Scored) and result.score == pytest.approx(plain_logits(world, "stsb", TEXTS)[0], abs=1e-4)


@pytest.mark.parametrize("name", ["retrieval", "pretrained"])
def test_a_pair_is_scored_as_in_retrieval(world, predictor, name):
    model, picture = world.models[name], world.pictures[2]
    out = model(image=paddle.to_tensor(load_image(picture, world.config.image_size)[None]),
                **tensors(world, encode_text(world.tokenizer, TEXTS["text"], None, 64)))
    result = predictor(name)(image=picture, text=TEXTS["text"])
    assert isinstance(result, Matched)
    assert result.score == pytest.approx(float(model.retrieval_score(out)), abs=1e-4)
    assert result.contrastive == pytest.approx(float(model.contrastive_score(out)), abs=1e-4)


def test_captions_are_texts_with_what_else_the_search_kept(world, predictor):
    result = predictor("captioning")(image=world.pictures[0])
    assert isinstance(result, Captioned) and isinstance(result.caption, str) and len(result.others) == 1
    assert "[SEP]" not in result.caption
    assert isinstance(predictor("tagged")(image=world.pictures[0], text="ring box").caption, str)
    with pytest.raises(UserInputError, match="captioning model needs text"):
        predictor("tagged")(image=world.pictures[0])


@pytest.mark.parametrize("name", list(ABOUT))
def test_a_batch_gives_the_results_of_single_calls_in_order(world, predictor, name):
    model = predictor(name)
    requests = [inputs_of(name, picture) for picture in world.pictures[:3]]
    for request, text in zip(requests, ("A ring.", "We see a small white circle right of a big pink cross.", "A box.")):
        if "text" in request:
            request["text"] = text
    together, alone = model.predict_batch(requests, batch_size=2), [model(**request) for request in requests]
    for one, other in zip(together, alone):
        for key, value in one.to_json().items():
            assert value == (pytest.approx(other.to_json()[key], abs=1e-4) if isinstance(value, (float, dict)) else other.to_json()[key])
    assert model.predict_batch([]) == []


def test_a_path_its_bytes_and_its_pixels_give_the_same(world, predictor):
    model, path = predictor("imagenet"), world.pictures[0]
    results = [model(image=image) for image in (str(path), path, path.read_bytes(), decode_image(str(path)))]
    assert all(result == results[0] for result in results)


@pytest.mark.parametrize("name, given, told", [
    ("vqa", {"image": "x.jpg"}, "the vqa model needs text"),
    ("mnli", {"text": "a"}, "the glue model needs text_b"),
    ("sst2", {"text": "a", "text_b": "b"}, "takes no text_b"),
    ("sst2", {"text": "a", "image": "x.jpg"}, "takes no image"),
    ("vqa", {"text": "a", "question": "b"}, "text is given twice"),
    ("sst2", {"words": "a"}, "unknown input 'words'"),
    ("sst2", {"text": 3}, "must be a text, is int"),
    ("imagenet", {"image": np.zeros([4, 4, 3])}, "must be uint8"),
    ("imagenet", {"image": 5}, "must be a path"),
    ("imagenet", {"image": "nowhere.jpg"}, "nowhere.jpg"),
])
def test_a_wrong_input_is_told(predictor, name, given, told):
    with pytest.raises(UserInputError, match=told) as error:
        predictor(name)(**given)
    assert "request 1: " in str(error.value)


def test_a_batch_names_the_wrong_request(world, predictor):
    with pytest.raises(ImageError, match="request 2: .*gone.jpg"):
        predictor("imagenet").predict_batch([{"image": world.pictures[0]}, {"image": "gone.jpg"}])


def test_directories_that_cannot_predict_are_refused(world, tmp_path):
    with pytest.raises(CheckpointError, match="is not a directory"):
        Predictor(tmp_path / "none")
    with pytest.raises(CheckpointError, match="no config.json"):
        Predictor(tmp_path)
    (tmp_path / "task.json").write_text('{"task": "weather"}')
    with pytest.raises(CheckpointError, match="no predictions for task 'weather'"):
        Predictor(tmp_path)
    (tmp_path / "config.json").write_text((world.root / "sst2" / "config.json").read_text())
    copy_vocabulary(world.root / "sst2" / "vocab", tmp_path / "vocab")
    (tmp_path / "task.json").write_text('{"task": "glue"}')
    with pytest.raises(CheckpointError, match="task.json: not as this version writes it"):
        Predictor(tmp_path)


def test_an_index_finds_what_scoring_every_pair_finds(world, predictor, tmp_path):
    model = predictor("retrieval")
    pictures = [str(path) for path in world.pictures]
    RetrievalIndex.build(model, "images", pictures, batch_size=3).save(tmp_path / "index")
    index = RetrievalIndex.load(tmp_path / "index")
    matched = model.predict_batch([{"image": path, "text": TEXTS["text"]} for path in pictures])
    order = sorted(range(len(pictures)), key=lambda i: -matched[i].score)
    found = index.search(model, TEXTS["text"], top=3, rerank=len(pictures))
    assert [item.item for item in found] == [pictures[i] for i in order[:3]]
    assert [item.score for item in found] == pytest.approx([matched[i].score for i in order[:3]], abs=1e-4)
    alone = index.search(model, TEXTS["text"], top=8, rerank=0)
    assert [item.score for item in alone] == pytest.approx(sorted((m.contrastive for m in matched), reverse=True), abs=1e-4)


def test_sentences_are_found_by_a_picture(world, predictor, tmp_path):
    model = predictor("pretrained")
    (tmp_path / "lines.txt").write_text("A ring.\n\nA red box above a star.\nTwo shapes\n", encoding="utf-8")
    kind, items = collect_items(tmp_path / "lines.txt")
    assert kind == "texts" and len(items) == 3
    found = RetrievalIndex.build(model, kind, items).search(model, world.pictures[0], top=5)
    assert sorted(result.item for result in found) == sorted(items)
    scores = {item: model(image=world.pictures[0], text=item).score for item in items}
    assert found[0].item == max(scores, key=scores.get)


def test_wrong_indexes_are_refused(world, predictor, tmp_path):
    model = predictor("retrieval")
    index = RetrievalIndex.build(model, "texts", ["a ring"])
    index.save(tmp_path / "index")
    with pytest.raises(UserInputError, match="exists"):
        index.save(tmp_path / "index")
    with pytest.raises(UserInputError, match="a retrieval or pre-trained model"):
        index.search(predictor("sst2"), world.pictures[0])
    other = world.root / "other"
    if not other.exists():
        with paddle.utils.unique_name.guard():
            save_pretrained(random_weights(Unimo2Model(world.config, heads=("pooling", "matching")), seed=6), str(other))
        copy_vocabulary(world.root / "retrieval" / "vocab", other / "vocab")
    with pytest.raises(UserInputError, match="was not built with the weights"):
        index.search(Predictor(other), world.pictures[0])
    next((tmp_path / "index").glob("features-*.npy")).write_bytes(b"nonsense")
    with pytest.raises(DataError, match="no usable index"):
        RetrievalIndex.load(tmp_path / "index")
    with pytest.raises(DataError, match="no picture in this folder"):
        collect_items(tmp_path / "index")


def lines(outcome):
    assert outcome.status == 0, outcome.err
    return [json.loads(line) for line in outcome.out.splitlines()]


def test_the_command_answers_single_inputs_and_files(world, unimo2, tmp_path):
    picture, vqa = world.pictures[0], world.root / "vqa"
    [row] = lines(unimo2("predict", "--model", vqa, "--image", picture, "--question", "Is there a ring?", "--top", 2))
    assert row["answer"] in ABOUT["vqa"]["answers"] and len(row["candidates"]) == 2
    [row] = lines(unimo2("predict", "--model", world.root / "mnli", "--text", "A ring.", "--text-b", "A box."))
    assert row["label"] in LABELS
    [row] = lines(unimo2("predict", "--model", world.root / "captioning", "--image", picture, "--caption"))
    assert isinstance(row["caption"], str)
    (tmp_path / "in.jsonl").write_text("\n".join(json.dumps({"image": str(path), "question": "Why?"}) for path in world.pictures) + "\n")
    rows = lines(unimo2("predict", "--model", vqa, "--input", tmp_path / "in.jsonl", "--batch-size", 3))
    assert [row["image"] for row in rows] == [str(path) for path in world.pictures] and "answer" in rows[0]


def test_the_command_builds_and_searches_an_index(world, unimo2, tmp_path):
    folder = tmp_path / "pictures" / "deep"
    folder.mkdir(parents=True)
    for number in range(3):
        cv2.imwrite(str(folder / f"{number}.PNG"), np.full([20, 30, 3], 80 * number, dtype="uint8"))
    model = world.root / "retrieval"
    [row] = lines(unimo2("predict", "--model", model, "--build-index", tmp_path / "index", "--source", tmp_path / "pictures"))
    assert row["items"] == 3 and row["kind"] == "images"
    rows = lines(unimo2("predict", "--model", model, "--retrieve", tmp_path / "index", "--text", "a ring", "--top", 2))
    assert len(rows) == 2 and rows[0]["score"] >= rows[1]["score"] and rows[0]["item"].endswith(".PNG")
    outcome = unimo2("predict", "--model", model, "--retrieve", tmp_path / "index", "--image", world.pictures[0])
    assert outcome.status == 2 and "search it with --text alone" in outcome.err


@pytest.mark.parametrize("name, arguments, told", [
    ("vqa", [], "nothing to predict from"),
    ("vqa", ["--caption", "--image", "x.jpg"], "--caption: "),
    ("vqa", ["--image", "nowhere.jpg", "--text", "a"], "nowhere.jpg"),
    ("vqa", ["--input", "none.jsonl"], "none.jsonl: cannot be read"),
    ("vqa", ["--input", "x", "--text", "a"], "--text does not go with --input"),
    ("vqa", ["--build-index", "x"], "--build-index and --source go together"),
    ("vqa", ["--retrieve", "x", "--input", "y"], "give one of"),
    ("vqa", ["--top", "0", "--text", "a"], "--top and --batch-size"),
])
def test_wrong_arguments_end_with_status_2(world, unimo2, name, arguments, told):
    outcome = unimo2("predict", "--model", world.root / name, *arguments)
    assert outcome.status == 2 and told in outcome.err


def test_a_wrong_line_of_a_file_is_named(world, unimo2, tmp_path):
    (tmp_path / "in.jsonl").write_text('{"text": "a"}\n{"text": \n')
    outcome = unimo2("predict", "--model", world.root / "sst2", "--input", tmp_path / "in.jsonl")
    assert outcome.status == 2 and "in.jsonl:2: not JSON" in outcome.err
    (tmp_path / "in.jsonl").write_text('{"text": "a"}\n\n{"image": "a.jpg"}\n')
    outcome = unimo2("predict", "--model", world.root / "sst2", "--input", tmp_path / "in.jsonl")
    assert outcome.status == 2 and "in.jsonl:3: the glue model needs text" in outcome.err


def test_the_tool_is_the_command(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    monkeypatch.setattr(sys, "argv", ["predict.py", "--help"])
    import runpy

    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "tools" / "predict.py"), run_name="__main__")
    assert ended.value.code == 0 and "--question" in capsys.readouterr().out


CLASSES = ["red circle", "blue ring", "green box"]


def test_zero_shot_classes_are_those_whose_sentences_have_the_nearest_features(world, predictor):
    model, templates = world.models["pretrained"], ["a picture of a {}.", "one {}."]
    image = paddle.to_tensor(np.stack([load_image(path, world.config.image_size) for path in world.pictures[:3]]))
    alike = np.zeros([3, len(CLASSES)])
    for template in templates:
        for place, name in enumerate(CLASSES):
            out = model(image=image, **{key: value.expand([3, -1]) for key, value in
                                        tensors(world, encode_text(world.tokenizer, template.format(name), None, 64)).items()})
            alike[:, place] += model.contrastive_score(out).numpy() / len(templates)
    results = predictor("pretrained").classify(world.pictures[:3], CLASSES, templates, batch_size=2)
    for row, result in zip(alike / float(model.contrastive_temperature), results):
        wanted = np.exp(row - row.max()) / np.exp(row - row.max()).sum()
        assert result.label == CLASSES[int(row.argmax())]
        assert [result.probabilities[name] for name in CLASSES] == pytest.approx(list(wanted), abs=1e-4)


def test_zero_shot_classes_are_given_as_a_list_or_a_file(world, unimo2, tmp_path):
    model, picture = world.root / "pretrained", world.pictures[0]
    (tmp_path / "names.txt").write_text("\n".join(CLASSES) + "\n")
    given = [lines(unimo2("predict", "--model", model, "--image", picture, "--templates", "shapes", "--classes", classes))
             for classes in (", ".join(CLASSES), tmp_path / "names.txt")]
    assert given[0] == given[1] and given[0][0]["label"] in CLASSES


@pytest.mark.parametrize("name, arguments, told", [
    ("vqa", ["--image", "PICTURE", "--classes", "a,b"], "is a model for vqa; zero-shot classes need"),
    ("pretrained", ["--image", "PICTURE", "--classes", "a"], "at least two different"),
    ("pretrained", ["--image", "PICTURE", "--classes", "a,a"], "at least two different"),
    ("pretrained", ["--text", "a", "--classes", "a,b"], "--classes goes with --image alone"),
    ("pretrained", ["--image", "PICTURE", "--classes", "a,b", "--templates", "nowhere"], "nowhere: no such bundled list"),
])
def test_wrong_zero_shot_classes_end_with_status_2(world, unimo2, name, arguments, told):
    outcome = unimo2("predict", "--model", world.root / name, *(world.pictures[0] if a == "PICTURE" else a for a in arguments))
    assert outcome.status == 2 and told in outcome.err
