"""Retrieval evaluation: the factored scores equal plain forwards, inputs are encoded once, reports and refusals are right."""
import json
import types

import numpy as np
import paddle
import pytest
from PIL import Image

from unimo2_paddle import Tokenizer, Unimo2Config, Unimo2Model
from unimo2_paddle.data.images import normalise
from unimo2_paddle.data.tokenizer import train_vocabulary
from unimo2_paddle.errors import ConfigError, DataError, ImageError, UserInputError, VocabularyError
from unimo2_paddle.metrics.retrieval import retrieval_metrics
from unimo2_paddle.models.onednn import inference_engine
from unimo2_paddle.tasks import retrieval, retrieval_scoring
from unimo2_paddle.tasks.retrieval import RetrievalData, RetrievalDataset, RetrievalEval, RetrievalEvaluator, RetrievalTask
from unimo2_paddle.tasks.retrieval_report import _best

SENTENCES = ["a red dot", "a very long sentence about a blue square beside a green dot over there", "the dot", "green $x$ <b>",
             "two dots and one square", "a", "square square square square", "a red dot and a green dot", "blue", "over there a dot"]


@pytest.fixture(scope="session")
def vocab(tmp_path_factory):
    directory = tmp_path_factory.mktemp("vocab")
    train_vocabulary(SENTENCES, directory, size=280)
    return directory


@pytest.fixture
def world(tmp_path, vocab):
    """Five pictures with one to three captions each: Karpathy JSON, ``.ids`` folder and picture folder."""
    tokenizer = Tokenizer.from_directory(vocab)
    rng = np.random.default_rng(3)
    (tmp_path / "images").mkdir()
    (tmp_path / "ids").mkdir()
    entries, lines, sentence = [], [], 0
    for number, captions in enumerate([2, 1, 3, 2, 2]):
        name = f"p{number}"
        Image.fromarray(rng.integers(0, 256, (20 + number, 30, 3), dtype="uint8")).save(tmp_path / "images" / f"{name}.png")
        texts = SENTENCES[sentence: sentence + captions]
        sentence += captions
        entries.append({"filename": f"{name}.png", "split": "test", "imgid": number, "sentences": [{"raw": t} for t in texts]})
        for place, text in enumerate(texts):
            ids = [tokenizer.cls_id] + tokenizer.encode(text) + [tokenizer.sep_id]
            fields = [ids, [0] * len(ids), range(2, 2 + len(ids))]
            lines.append(";".join([" ".join(map(str, f)) for f in fields] + [name, f"{name}_{place}"]))
    (tmp_path / "captions.json").write_text(json.dumps({"images": entries}))
    (tmp_path / "ids" / "test.all.ids").write_text("\n".join(lines) + "\n")
    return types.SimpleNamespace(path=tmp_path, tokenizer=tokenizer, vocab=vocab)


def dataset_of(world, **arguments):
    return RetrievalDataset.from_karpathy(str(world.path / "captions.json"), str(world.path / "images"), world.tokenizer, **arguments)


def tiny_config(**overrides):
    values = dict(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, text_num_hidden_layers=2, text_num_attention_heads=2,
        vit_num_hidden_layers=1, vit_num_attention_heads=2, text_vocab_size=280, text_max_position_embeddings=150,
        resolution=8, image_size=24, position_grid=3, num_codebook=40, topk_value=6)
    return Unimo2Config.from_dict({**values, **overrides})


def tiny_model(**overrides):
    """A model with random weights large enough that every input matters and code scores are well apart."""
    config = tiny_config(**overrides)
    with paddle.utils.unique_name.guard():
        model = Unimo2Model(config)
    rng = np.random.default_rng(7)
    for parameter in sorted(model.parameters(), key=lambda p: p.name):
        if parameter.name == "topk_temperature":
            parameter.set_value(np.array([1.0], "float32"))
        elif parameter.name != "cmcl_temperature":
            mean = 1.0 if parameter.name.endswith("_scale") else 0.0
            parameter.set_value(rng.normal(mean, 0.3, parameter.shape).astype("float32"))
    model.eval()
    return model


def plain_scores(model, dataset):
    """One full forward per pair, no batch, no padding, nothing shared."""
    scores = np.zeros((len(dataset.captions), len(dataset)), "float32")
    contrastive = scores.copy()
    with paddle.no_grad():
        for t in range(len(dataset.captions)):
            ids, positions, mask = (paddle.to_tensor(a) for a in dataset.text_batch([t]))
            for i in range(len(dataset)):
                image = paddle.to_tensor(normalise(dataset.pictures(i, i + 1, model.config.image_size)))
                out = model(image, ids, positions, mask)
                scores[t, i], contrastive[t, i] = float(model.retrieval_score(out)), float(model.contrastive_score(out))
    return scores, contrastive


@pytest.mark.parametrize("overrides", [
    {}, {"model_type": "baseline"}, {"grounding_method": "normal"}, {"with_cmcl_projection": True, "cmcl_score_weight": 0.7},
    {"with_grounding_projection": True, "with_cmcl_projection": True, "cmcl_share_parameters": True, "with_grounding_pos": True,
     "fusion_method": "sum"},
], ids=["grounded", "baseline", "nearest", "projection", "shared-positions-sum"])
@pytest.mark.parametrize("image_batch, pair_batch", [(2, 3), (32, 128)])
def test_factored_scores_equal_a_full_forward_of_every_pair(world, overrides, image_batch, pair_batch):
    model, dataset = tiny_model(**overrides), dataset_of(world)
    evaluator = RetrievalEvaluator(dataset, image_batch=image_batch, pair_batch=pair_batch)
    evaluator.run(model)
    expected, contrastive = plain_scores(model, dataset)
    assert expected.std() > 0.01
    np.testing.assert_allclose(evaluator.scores.retrieval, expected, atol=1e-5)
    np.testing.assert_allclose(evaluator.scores.contrastive, contrastive, atol=1e-5)


@pytest.mark.parametrize("rerank_k", ["all", 2])
def test_scores_through_onednn_equal_those_of_the_dynamic_graph(world, rerank_k):
    model = tiny_model()
    plain, through = (RetrievalEvaluator(dataset_of(world), image_batch=2, pair_batch=3, rerank_k=rerank_k) for _ in range(2))
    plain.run(model)
    with inference_engine(model, "fp32") as differences:
        through.run(model)
    np.testing.assert_allclose(through.scores.retrieval, plain.scores.retrieval, atol=1e-5)
    assert through.metrics == plain.metrics and set(differences) == {"vision", "text", "grounded_encoder"}


def test_metrics_are_those_of_both_score_matrices(world):
    evaluator = RetrievalEvaluator(dataset_of(world))
    metrics = evaluator.run(tiny_model())
    expected = retrieval_metrics(evaluator.scores.retrieval, evaluator.dataset.text_image)
    alone = retrieval_metrics(evaluator.scores.contrastive, evaluator.dataset.text_image)
    assert metrics == {**expected, **{f"contrastive_{key}": value for key, value in alone.items()}}


def test_every_picture_and_caption_is_encoded_once(world, monkeypatch):
    model, dataset, seen = tiny_model(), dataset_of(world), {"image": 0, "text": 0, "decoded": 0}

    def counted(function, key, count):
        def wrapper(*args, **kwargs):
            seen[key] += count(args)
            return function(*args, **kwargs)
        return wrapper

    monkeypatch.setattr(model, "encode_image", counted(model.encode_image, "image", lambda a: a[0].shape[0]))
    monkeypatch.setattr(model, "encode_text", counted(model.encode_text, "text", lambda a: a[0].shape[0]))
    monkeypatch.setattr(retrieval, "decode_image", counted(retrieval.decode_image, "decoded", lambda a: 1))
    evaluator = RetrievalEvaluator(dataset, image_batch=2, pair_batch=3)
    evaluator.run(model)
    assert seen == {"image": 5, "text": 10, "decoded": 5}
    evaluator.run(model)
    assert seen["decoded"] == 5  # kept between evaluations as 8-bit pictures
    assert dataset.pictures(0, 2, 24).dtype == np.uint8
    assert dataset.pictures(3, 9, 16).shape == (2, 16, 16, 3)  # another size is not served from the cache


def test_the_cache_of_pictures_has_a_bound(world, monkeypatch):
    dataset = dataset_of(world)
    monkeypatch.setattr(retrieval, "PIXEL_CACHE", 2 * 24 * 24 * 3)
    first = dataset.pictures(0, 5, 24)
    assert len(dataset._cache.pictures) == 2
    np.testing.assert_array_equal(dataset.pictures(0, 5, 24), first)


def test_two_processes_of_a_machine_decode_a_picture_once_when_they_share_a_file(world, monkeypatch, tmp_path):
    data = RetrievalData(annotations=str(world.path / "captions.json"), images=str(world.path / "images"), vocab=str(world.vocab),
                         picture_cache=str(tmp_path / "cache"))
    expected, seen = dataset_of(world).pictures(0, 5, 24), []
    monkeypatch.setattr(retrieval, "decode_image", lambda *a, _decode=retrieval.decode_image, **k: seen.append(a) or _decode(*a, **k))
    for _ in range(2):  # a data set of its own each, as in two processes
        dataset = RetrievalDataset.read(data, world.tokenizer, "test")
        np.testing.assert_array_equal(dataset.chosen_pictures([4, 0, 2, 1, 3], 24), expected[[4, 0, 2, 1, 3]])
        assert len(seen) == 5
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_captions_are_grouped_by_length_and_keep_their_numbers(world):
    dataset = dataset_of(world)
    with paddle.no_grad():
        groups = retrieval_scoring.encode_texts(tiny_model(), dataset, batch_size=4)
    lengths = [[len(dataset.tokens[row]) for row in group.rows] for group in groups]
    assert [length for group in lengths for length in group] == sorted(len(ids) for ids in dataset.tokens)
    assert sorted(row for group in groups for row in group.rows) == list(range(10))
    assert [group.texts.states.shape[1] for group in groups] == [max(group) for group in lengths]
    assert max(len(group) for group in lengths) <= 4


def test_layout_and_cut_of_captions(world):
    tokenizer, dataset = world.tokenizer, dataset_of(world, max_text_len=6)
    whole = tokenizer.encode(SENTENCES[1])
    assert len(whole) > 6
    assert dataset.tokens[1] == [tokenizer.cls_id] + whole[:4] + [tokenizer.sep_id]
    ids, positions, mask = dataset.text_batch([1, 5])
    short = len(dataset.tokens[5])
    assert positions[0].tolist() == [2, 3, 4, 5, 6, 7]
    assert positions[1].tolist() == list(range(2, 2 + short)) + [1] * (6 - short)
    assert ids[1, short:].tolist() == [tokenizer.pad_id] * (6 - short)
    assert mask[1].tolist() == [1.0] * short + [0.0] * (6 - short)


def test_ids_files_give_the_same_data_set_as_their_text(world):
    for arguments in ({}, {"max_text_len": 6}, {"max_images": 3, "captions_per_image": 1}):
        text = dataset_of(world, **arguments)
        ids = RetrievalDataset.from_ids(str(world.path / "ids" / "test.all.ids"), str(world.path / "images"), world.tokenizer,
                                        suffix=".png", **arguments)
        assert (ids.tokens, ids.positions, ids.captions) == (text.tokens, text.positions, text.captions)
        assert ids.text_image.tolist() == text.text_image.tolist()
        assert (ids.image_ids, ids.image_paths) == (text.image_ids, text.image_paths)


def test_limits_take_the_first_pictures_and_captions(world):
    dataset = dataset_of(world, max_images=3, captions_per_image=1)
    assert dataset.captions == [SENTENCES[0], SENTENCES[2], SENTENCES[3]]
    assert dataset.text_image.tolist() == [0, 1, 2]


def test_positions_of_ids_files_are_fed_as_they_are(world):
    path = world.path / "ids" / "val.ids"
    path.write_text("0 5 2;0 0 0;7 8 9;p0;a\n")
    dataset = RetrievalDataset.from_ids(str(path), str(world.path / "images"), world.tokenizer, suffix=".png", max_text_len=2)
    assert (dataset.tokens, dataset.positions) == ([[0, 2]], [[7, 8]])


def test_the_ids_file_of_the_wrong_split_is_refused(world):
    folder = str(world.path / "ids")
    assert retrieval.ids_file(folder, "test").endswith("test.all.ids")
    assert retrieval.ids_file(f"{folder}/test.all.ids", "test") == f"{folder}/test.all.ids"
    with pytest.raises(DataError, match="'test', but the split 'val' is wanted"):
        retrieval.ids_file(f"{folder}/test.all.ids", "val")
    with pytest.raises(DataError, match="neither val.all.ids nor val.ids in this folder; it has test.all.ids"):
        retrieval.ids_file(folder, "val")


def test_ids_of_another_vocabulary_are_refused(world):
    path = world.path / "ids" / "val.ids"
    path.write_text("0 5000 2;0 0 0;2 3 4;p0;a\n")
    with pytest.raises(DataError, match="token id 5000, the vocabulary has 280"):
        RetrievalDataset.from_ids(str(path), str(world.path / "images"), world.tokenizer, suffix=".png")


def test_modes_and_gradients_are_restored(world, monkeypatch):
    model = tiny_model(hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5)
    model.train()
    model.vision.eval()
    before = [layer.training for layer in model.sublayers(include_self=True)]
    evaluator = RetrievalEvaluator(dataset_of(world))
    assert evaluator.run(model) == evaluator.run(model)  # no dropout
    assert [layer.training for layer in model.sublayers(include_self=True)] == before
    assert paddle.is_grad_enabled()
    monkeypatch.setattr(model, "encode_image", lambda image: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        evaluator.run(model)
    assert [layer.training for layer in model.sublayers(include_self=True)] == before


def test_progress_counts_every_pair_once(world):
    model, dataset, done = tiny_model(), dataset_of(world), []
    with retrieval_scoring.evaluation_mode(model):
        scores = retrieval_scoring.score_matrix(
            model, retrieval_scoring.encode_images(model, dataset, 2), retrieval_scoring.encode_texts(model, dataset, 4), 8, done.append)
    assert sum(done) == scores.retrieval.size == 50
    assert max(done) <= 8


def test_the_report_holds_numbers_answers_and_a_picture(world):
    evaluator = RetrievalEvaluator(dataset_of(world), name="test")
    metrics = evaluator.run(tiny_model())
    target = world.path / "out" / "predictions"
    paths = evaluator.write_report(str(target))
    assert sorted(p.name for p in target.iterdir()) == ["results.json", "retrieval.html", "retrieval.jsonl", "retrieval.png"]
    results = json.loads((target / "results.json").read_text())
    assert results["metrics"] == metrics and results["images"] == 5 and results["captions"] == 10
    lines = [json.loads(line) for line in (target / "retrieval.jsonl").read_text().splitlines()]
    texts = [line for line in lines if line["direction"] == "text_to_image"]
    assert [line["query"] for line in texts] == evaluator.dataset.captions
    assert sum(line["rank"] == 1 for line in texts) / 10 * 100 == metrics["ir_r1"]
    for t, line in enumerate(texts):
        assert line["right"] == evaluator.dataset.image_ids[evaluator.dataset.text_image[t]]
        assert [answer["score"] for answer in line["top"]] == sorted((answer["score"] for answer in line["top"]), reverse=True)
        assert line["top"][line["rank"] - 1]["image"] == line["right"]
    pictures = [line for line in lines if line["direction"] == "image_to_text"]
    assert sum(line["rank"] == 1 for line in pictures) / 5 * 100 == metrics["tr_r1"]
    assert all(line["top"][line["rank"] - 1]["caption"] in line["right"] for line in pictures)
    with Image.open(paths["sheet"]) as sheet:
        pixels = np.asarray(sheet.convert("RGB")).reshape(-1, 3)
    assert (pixels == (26, 150, 65)).all(axis=1).sum() > 100  # green frames


def test_the_table_shows_both_directions_and_chance(world):
    evaluator = RetrievalEvaluator(dataset_of(world), name="test")
    with pytest.raises(RuntimeError, match="run"):
        evaluator.table()
    metrics = evaluator.run(tiny_model())
    lines = evaluator.table().splitlines()
    assert lines[0] == "retrieval, test: 5 pictures, 10 captions"
    assert lines[1].split() == ["R@1", "R@5", "R@10", "median", "rank"]
    rows = {tuple(line.split()[:-4]): [float(v) for v in line.split()[-4:]] for line in lines[2:]}
    full = rows[("text", "->", "image", "matching", "+", "contrastive")]
    assert full == pytest.approx([metrics["ir_r1"], metrics["ir_r5"], metrics["ir_r10"], metrics["ir_median_rank"]], abs=0.05)
    assert rows[("text", "->", "image", "chance")] == [20, 100, 100, 3]
    assert ("image", "->", "text", "chance") in rows and ("image", "->", "text", "contrastive", "alone") in rows


def test_best_answers_are_sorted_and_ties_go_to_the_first():
    scores = np.array([1.0, 3.0, 2.0, 3.0, 2.0, 2.0, -np.inf])
    assert _best(scores, 4).tolist() == [1, 3, 2, 4]
    assert _best(scores, 10).tolist() == [1, 3, 2, 4, 5, 0, 6]


def test_a_damaged_picture_is_named(world):
    (world.path / "images" / "p3.png").write_bytes(b"not a picture")
    with pytest.raises(ImageError, match="p3.png"):
        RetrievalEvaluator(dataset_of(world)).run(tiny_model())


def test_weights_with_nan_are_reported(world):
    model = tiny_model()
    model.matching.bias.set_value(np.full([2], np.nan, "float32"))
    with pytest.raises(DataError, match="not a number"):
        RetrievalEvaluator(dataset_of(world)).run(model)


@pytest.mark.parametrize("overrides, arguments, message", [
    ({}, {"heads": ["masked_lm"]}, "pooling and matching heads"),
    ({}, {"vision": False, "heads": ["pooling"]}, "visual and text Transformers"),
    ({}, {"text": False, "heads": ["pooling"]}, "visual and text Transformers"),
    ({"text_vocab_size": 200}, {}, "model's vocabulary has 200 entries"),
    ({"text_max_position_embeddings": 12}, {}, "data.max_text_len to at most 10"),
])
def test_a_model_that_cannot_hold_the_captions_is_refused(world, overrides, arguments, message):
    with paddle.utils.unique_name.guard():
        model = Unimo2Model(tiny_config(**overrides), **arguments)
    with pytest.raises(UserInputError, match=message):
        RetrievalEvaluator(dataset_of(world)).run(model)


def run_config(world, directory, **data):
    """What ``load_run_config`` hands to the task, with the model saved in ``directory``."""
    from unimo2_paddle.tasks.base import ModelSection, RunSection

    settings = dict(annotations=str(world.path / "captions.json"), images=str(world.path / "images"), vocab=str(world.vocab))
    return types.SimpleNamespace(model=ModelSection(init=str(directory)), data=RetrievalData(**{**settings, **data}),
                                 eval=RetrievalEval(split="test", pair_batch=16), run=RunSection(output="unused", progress=False))


def test_the_task_evaluates_a_saved_model_in_both_formats(world):
    from unimo2_paddle.checkpoints.pretrained import save_pretrained

    model = tiny_model()
    save_pretrained(model, str(world.path / "model"))
    expected = RetrievalEvaluator(dataset_of(world)).run(model)
    for data in ({}, {"format": "ids", "annotations": str(world.path / "ids"), "image_suffix": ".png"}):
        task = RetrievalTask(run_config(world, world.path / "model", **data))
        evaluator, = task.evaluators()
        assert (evaluator.name, evaluator.every_steps) == ("test", 0)
        assert evaluator.run(task.build_model()) == pytest.approx(expected)


def test_a_vocabulary_of_another_size_is_refused(world):
    from unimo2_paddle.checkpoints.pretrained import save_pretrained

    save_pretrained(tiny_model(text_vocab_size=300), str(world.path / "model"))
    with pytest.raises(VocabularyError, match="280 entries, the model's text_vocab_size is 300"):
        RetrievalTask(run_config(world, world.path / "model")).evaluators()


def test_wrong_settings_are_reported_all_at_once(tmp_path):
    from unimo2_paddle.config import load_run_config

    path = tmp_path / "config.yaml"
    path.write_text("""
task: retrieval
model: {init: somewhere}
data: {annotations: a.json, images: "", vocab: v, format: coco, max_text_len: 2}
eval: {split: "", pair_batch: 0, max_images: -1}
run: {output: out}
""")
    with pytest.raises(ConfigError) as caught:
        load_run_config(path)
    text = str(caught.value)
    for problem in ("data.images: is empty", "data.format: 'coco' is not one of karpathy, ids", "data.max_text_len: must be at least 3",
                    "eval.split: is empty", "eval.pair_batch: must be at least 1, is 0", "eval.max_images: must be at least 0, is -1"):
        assert problem in text
    path.write_text(path.read_text().replace("max_images", "max_image"))
    with pytest.raises(ConfigError, match="did you mean 'max_images'"):
        load_run_config(path)
