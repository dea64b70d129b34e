"""UNIMO's tasks, and text generation by either system, train as static Programs as they do in the dynamic graph."""
import paddle
import pytest
import yaml

from tests.training.test_static_graph import TINY, assert_equal_runs
from unimo2_paddle.data.demo_tasks import captioning, entailment, regions, seq2seq
from unimo2_paddle.data.formats.coco_captions import filelist_paths
from unimo2_paddle.data.region_import import import_regions

pytestmark = pytest.mark.skipif(paddle.__version__.startswith("2."), reason="run.graph needs Paddle 3")

UNIMO = {"config": "unimo_demo", "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "hidden_dropout_prob": 0.1,
         "attention_probs_dropout_prob": 0.1}


@pytest.fixture(scope="module")
def world(demo_data, tmp_path_factory):
    """A folder with texts, annotations and the stores ``seen`` (all pictures) and ``judged_{split}`` (entailment's)."""
    out = tmp_path_factory.mktemp("static")
    for name, writer in (("seq2seq", seq2seq), ("captioning", captioning), ("entailment", entailment), ("regions", regions)):
        writer.write(str(out / name), str(demo_data), 1)
    import_regions(sorted(map(str, (out / "regions" / "bottom_up").glob("*.tsv"))), out / "seen", "bottom_up", show_progress=False)
    for split in ("train", "dev"):
        import_regions(filelist_paths(out / "regions" / "entailment" / f"{split}_filelist"), out / f"judged_{split}", "entailment", show_progress=False)
    return out


@pytest.fixture
def train(world, demo_data, tmp_path, unimo2):
    """A function: name of a run, graph -> its output directory after five steps."""
    annotations = {"annotations": str(world / "captioning" / "dataset_shapes.json"), "regions": str(world / "seen")}
    texts = {"max_source_len": 60, "max_target_len": 26}
    runs = {
        "gigaword": ("seq2seq", UNIMO, {"dataset": "gigaword", "directory": str(world / "seq2seq" / "gigaword"), **texts}, {}),
        "coqa": ("seq2seq", {**UNIMO, "role_type_size": 3, "turn_type_size": 16},
                 {"dataset": "coqa", "directory": str(world / "seq2seq" / "coqa"), **texts}, {}),
        "gigaword by UNIMO-2": ("seq2seq", TINY, {"dataset": "gigaword", "directory": str(world / "seq2seq" / "gigaword"), **texts}, {}),
        "captioning": ("captioning", UNIMO, {**annotations, "max_text_len": 40, "objects": str(
            world / "regions" / "captioning" / "shapes_object_0.35_tot.ids")}, {}),
        "retrieval": ("retrieval", UNIMO, {**annotations, "max_text_len": 40}, {"image_negatives": 2, "caption_negatives": 3}),
        "entailment": ("entailment", UNIMO, {"format": "store", "regions": str(world / "judged_{split}"), "max_text_len": 40}, {}),
    }

    def run(name, graph, **more):
        task, model, data, keys = runs[name]
        judged = {"split": "dev" if task == "entailment" else "val", "every_epochs": 0}
        values = {"task": task, "model": dict(model), "data": {**data, "vocab": str(demo_data / "vocab")},
                  "train": {"max_steps": 5, "batch_size": 4, **keys}, "optim": {"learning_rate": 1e-3}, "eval": judged, **more,
                  "run": {"output": str(tmp_path / graph), "graph": graph, "kernels": "plain",  # fused layers draw other dropout masks
                          "progress": False, "log_every": 1, "evaluate_at_end": False, "trial_save": False}}
        (tmp_path / f"{graph}.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
        run.outcome = unimo2("train", "-c", tmp_path / f"{graph}.yaml")
        return tmp_path / graph

    return run


@pytest.mark.parametrize("name", ["coqa", "entailment"] + [
    pytest.param(name, marks=pytest.mark.slow) for name in ("gigaword", "gigaword by UNIMO-2", "captioning", "retrieval")])
def test_static_steps_equal_dynamic_ones(train, name):
    found = []
    for graph in ("dynamic", "static"):
        found.append(train(name, graph))
        assert train.outcome.status == 0, train.outcome.err
    assert_equal_runs(*found)


def test_adversarial_training_is_refused_with_the_way_out(train):
    run = train("entailment", "static", adversarial={"adv_type": "villa"})
    assert train.outcome.status == 2 and "dynamic" in train.outcome.err and not run.exists()
