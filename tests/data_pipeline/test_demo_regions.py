"""The demo's region features: real formats, the pixel tasks' texts, features that tell what a thing is."""
import numpy as np
import pytest
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from unimo2_paddle.data.demo_regions import ATTRIBUTE_NAMES, FEATURE_SIZE, OBJECT_NAMES, detect
from unimo2_paddle.data.demo_tasks import captioning, entailment, regions
from unimo2_paddle.data.demo_tasks.scenes import read_scenes
from unimo2_paddle.data.formats.coco_captions import filelist_paths, read_caption_filelist, read_object_tags
from unimo2_paddle.data.formats.ids import read_ids
from unimo2_paddle.data.formats.karpathy import read_karpathy
from unimo2_paddle.data.formats.snli_ve import LABELS, read_snli_ve
from unimo2_paddle.data.region_import import import_regions
from unimo2_paddle.data.region_store import RegionStore
from unimo2_paddle.data.shapes import PICTURE_SIZE, draw, sample_scene
from unimo2_paddle.data.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def written(demo_data, tmp_path_factory):
    out = tmp_path_factory.mktemp("regions") / "regions"
    regions.write(str(out), str(demo_data), 1)
    return out


@pytest.fixture(scope="module")
def store_of(written, tmp_path_factory):
    """A function: region files, format -> their store."""

    def make(paths, layout):
        out = tmp_path_factory.mktemp("store") / "store"
        manifest = import_regions([str(p) for p in paths], out, layout, "float32", probabilities=layout in ("captioning", "retrieval"),
                                  object_names=written / "objects_vocab.txt", attribute_names=written / "attributes_vocab.txt", show_progress=False)
        assert manifest["bad_records"] == 0
        return RegionStore(out)

    return make


@pytest.fixture(scope="module")
def public(written, store_of):
    return store_of([written / "bottom_up" / f"{split}.tsv" for split in ("train", "dev", "test")], "bottom_up")


def overlap(boxes, box):
    """Intersection over union of every row of boxes [N, 4] with one box."""
    size = np.clip(np.minimum(boxes[:, 2:], box[2:]) - np.maximum(boxes[:, :2], box[:2]), 0, None).prod(axis=1)
    return size / ((boxes[:, 2:] - boxes[:, :2]).prod(axis=1) + np.prod(box[2:] - box[:2]) - size)


def test_every_picture_has_its_objects_among_its_regions(demo_data, public):
    rows = [row for split in ("train", "dev", "test") for row, _ in read_scenes(demo_data, split)]
    assert sorted(public) == sorted(row["key"] for row in rows)
    right = total = 0
    for row in rows:
        found = public[row["key"]]
        assert (found.width, found.height) == (PICTURE_SIZE, PICTURE_SIZE) and found.features.shape == (len(found.boxes), FEATURE_SIZE)
        assert len(found.boxes) >= len(row["objects"]) + 2
        assert found.boxes.min() >= 0 and found.boxes.max() <= PICTURE_SIZE
        for thing in row["objects"]:
            overlaps = overlap(found.boxes, np.array(thing["box"]))
            assert overlaps.max() > 0.4
            right += f"{thing['colour']} {thing['shape']}" in public.names(row["key"], 0.35)
            total += 1
    assert right / total > 0.85


def test_a_linear_layer_reads_colour_and_shape_from_the_features():
    generators = [np.random.default_rng(number) for number in range(240)]
    scenes = [sample_scene(rng, "train") for rng in generators]
    found = detect([("one", scene, draw(scene, rng)) for scene, rng in zip(scenes, generators)], generators)
    features, names = [], []
    for scene, regions_found in zip(scenes, found):
        for thing in scene.objects:
            features.append(regions_found.features[overlap(regions_found.boxes, np.array(thing.box)).argmax()])
            names.append((thing.colour, thing.shape))
    features, train = np.array(features), 440
    colours, shapes = (LinearDiscriminantAnalysis().fit(features[:train], [name[k] for name in names[:train]]).score(
        features[train:], [name[k] for name in names[train:]]) for k in (0, 1))
    assert colours > 0.95 and shapes > 0.6


def test_captioning_records_tell_the_pixel_tasks_captions(demo_data, written, store_of, tmp_path):
    captioning.write(str(tmp_path / "pixels"), str(demo_data), 1)
    for split, name in (("train", "train"), ("val", "valid"), ("test", "test")):
        store = store_of(filelist_paths(written / "captioning" / f"{name}_filelist"), "captioning")
        pixels = read_caption_filelist(tmp_path / "pixels" / f"{split}_filelist", str(tmp_path / "pixels"))
        told = {image.image_id: [] for image in pixels}
        for text in store.texts():
            told[text["image_id"]] += [text["token_ids"]] if text["token_ids"] else []
        assert sorted(store) == sorted(told) and told == {image.image_id: image.tokens for image in pixels}
    assert store[list(store)[0]].object_probs.shape[1] == 1 + len(OBJECT_NAMES)
    tags = read_object_tags(written / "captioning" / "shapes_object_0.35_tot.ids")
    tokenizer = Tokenizer.from_directory(demo_data / "vocab")
    assert all(tokenizer.decode(tags[key]).split() == " ".join(tag for tag in _tags(store, key)).split() for key in store)


def _tags(store, key):
    """Every sure region's name, doubles too."""
    found = store[key]
    for o, a, sure in zip(found.object_ids, found.attribute_ids, found.object_confidence):
        if sure > 0.35:
            yield f"{ATTRIBUTE_NAMES[a]} {OBJECT_NAMES[o]}"


def test_entailment_records_tell_the_pixel_tasks_hypotheses(demo_data, written, store_of, tmp_path):
    entailment.write(str(tmp_path / "pixels"), str(demo_data), 1)
    tokenizer = Tokenizer.from_directory(demo_data / "vocab")
    for split in ("train", "dev", "test"):
        store = store_of(filelist_paths(written / "entailment" / f"{split}_filelist"), "entailment")
        wanted = [(h.text, LABELS[h.label])
                  for h in read_snli_ve(tmp_path / "pixels" / f"snli_ve_{split}.jsonl", tmp_path / "pixels" / "flickr30k-images")]
        assert [(tokenizer.decode(t["token_ids"]), LABELS[int(t["label"])]) for t in store.texts()] == wanted


def test_retrieval_records_and_captions_name_the_same_pictures(demo_data, written, store_of, public):
    tokenizer = Tokenizer.from_directory(demo_data / "vocab")
    for split, ids, karpathy in (("train", "train", "train"), ("dev", "val.all", "val"), ("test", "test.all", "test")):
        store = store_of([written / "retrieval" / "features" / split / "part-00000"], "retrieval")
        captions = {}
        for caption in read_ids(written / "retrieval" / "textids" / f"{ids}.ids"):
            captions.setdefault(caption.image_id, []).append(tokenizer.decode(caption.token_ids))
        images = read_karpathy(demo_data / "retrieval" / "dataset_shapes.json", demo_data / "retrieval" / "images", karpathy)
        assert list(captions.values()) == [image.captions for image in images] and list(store) == list(captions)
        np.testing.assert_array_equal(store[list(store)[0]].features, public[images[0].image_id].features)


def test_the_same_arguments_write_the_same_bytes(demo_data, written, tmp_path):
    regions.write(str(tmp_path / "again"), str(demo_data), 1)
    files = {p.relative_to(written): p.read_bytes() for p in written.rglob("*") if p.is_file()}
    assert files == {p.relative_to(tmp_path / "again"): p.read_bytes() for p in (tmp_path / "again").rglob("*") if p.is_file()}
    assert len(files) == 25
