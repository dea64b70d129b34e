"""Run configurations: YAML, overrides, types, and one message with every problem."""
from dataclasses import dataclass, field
from typing import Dict, List, Optional, Union

import pytest
import yaml

from unimo2_paddle.config import apply_overrides, build, load_run_config, read_yaml
from unimo2_paddle.errors import ConfigError


@dataclass
class Inner:
    path: Union[str, List[str]] = ""
    weight: float = 1.0

    def problems(self):
        return [] if self.weight > 0 else [f"weight: must be above 0, is {self.weight}"]


@dataclass
class Collected:
    width: int = 4
    layers: Optional[List[int]] = None


@dataclass
class Group:
    name: str
    rate: float = 0.1
    steps: int = 10
    loud: bool = False
    limit: Optional[int] = None
    sizes: List[int] = field(default_factory=list)
    shares: Dict[str, float] = field(default_factory=dict)
    inner: Inner = field(default_factory=Inner)
    many: List[Inner] = field(default_factory=list)
    extra: Dict[str, object] = field(default_factory=dict, metadata={"collect": (Collected,)})


def built(**values):
    """(group, problems) of these values."""
    problems = []
    return build(Group, values, "group", problems), problems


def problems_of(**values):
    return built(**{"name": "x", **values})[1]


@pytest.mark.parametrize("key, value, wanted", [
    ("rate", "1e-4", 1e-4), ("rate", 3, 3.0), ("rate", "5", 5.0), ("steps", 1e3, 1000), ("steps", "1e3", 1000), ("steps", 7, 7),
    ("steps", 10 ** 17 + 1, 10 ** 17 + 1), ("name", None, ""), ("loud", True, True), ("limit", None, None), ("limit", 3, 3),
    ("sizes", [1, 2.0], [1, 2]), ("shares", {"a": 1, "b": "2e-1"}, {"a": 1.0, "b": 0.2}),
])
def test_a_value_becomes_the_declared_type(key, value, wanted):
    group, problems = built(**{"name": "x", key: value})
    assert problems == []
    assert getattr(group, key) == wanted and type(getattr(group, key)) is type(wanted)


@pytest.mark.parametrize("key, value, text", [
    ("steps", True, "group.steps: True is not int"),
    ("rate", False, "group.rate: False is not float"),
    ("loud", 1, "group.loud: 1 is not bool"),
    ("loud", "yes please", "group.loud: 'yes please' is not bool"),
    ("steps", 1.5, "group.steps: 1.5 is not int"),
    ("steps", "many", "group.steps: 'many' is not int"),
    ("rate", float("nan"), "group.rate: nan is not float"),
    ("rate", "inf", "group.rate: 'inf' is not float"),
    ("rate", 10 ** 400, "is not float"),
    ("name", 5, "group.name: 5 is not str"),
    ("name", [1], "group.name: [1] is not str"),
    ("limit", "three", "group.limit: 'three' is not int"),
    ("sizes", 3, "group.sizes: 3 is not a list"),
    ("sizes", [1, "b"], "group.sizes[1]: 'b' is not int"),
    ("shares", [1], "group.shares: [1] is not a mapping"),
    ("shares", {"a": "b"}, "group.shares.a: 'b' is not float"),
    ("inner", 3, "group.inner: must be a group of keys, is 3"),
    ("many", [{"weight": 0}], "group.many[0].weight: must be above 0, is 0.0"),
    ("many", [{"wieght": 1}], "group.many[0].wieght: unknown key; did you mean 'weight'?"),
    ("width", "wide", "group.width: 'wide' is not int"),
    ("layers", [0, True], "group.layers: [0, True] is not"),
])
def test_a_value_of_the_wrong_type_is_named_with_its_place(key, value, text):
    (problem,) = problems_of(**{key: value})
    assert text in problem


def test_text_or_list_takes_both():
    problems = []
    assert build(Inner, {"path": "a"}, "i", problems).path == "a"
    assert build(Inner, {"path": ["a", "b"]}, "i", problems).path == ["a", "b"]
    assert problems == []
    build(Inner, {"path": 5}, "i", problems)
    assert len(problems) == 1 and problems[0].startswith("i.path: 5 is not str or List")


def test_keys_of_another_dataclass_are_collected_and_checked():
    group, problems = built(name="x", width=8, layers=[0, 2])
    assert problems == [] and group.extra == {"width": 8, "layers": [0, 2]}
    assert problems_of(widht=8) == ["group.widht: unknown key; did you mean 'width'?"]
    assert problems_of(extra={"width": 8})[0].startswith("group.extra: unknown key"), "the collector itself is not a key"


def test_all_problems_of_a_group_are_found_in_one_go():
    _, problems = built(rat=0.2, steps="x", loud="y", nonsense=1)
    assert len(problems) == 5
    assert "group.rat: unknown key; did you mean 'rate'?" in problems
    assert "group.name: is required" in problems
    (unknown,) = [p for p in problems if "nonsense" in p]
    assert "known keys:" in unknown and "width" in unknown and "extra" not in unknown


@pytest.mark.parametrize("text, complaint", [
    ("task: pretrain\nrun: {output: a}\nrun: {output: b}\n", "line 3: key 'run' is given twice"),
    ("run:\n  seed: 1\n  output: a\n  seed: 2\n", "line 4: key 'seed' is given twice"),
    ("a: [1, 2\n", "not valid YAML"),
    ("a: 2024-13-45\n", "not valid YAML"),
    ("a: !!int foo\n", "not valid YAML"),
    ("a: !!timestamp foo\n", "not valid YAML"),
    ("a: " + "[" * 3000 + "\n", "not valid YAML"),
    ("a: !!python/object/apply:os.system ['true']\n", "not valid YAML"),
    ("? [a]\n: 1\n", "a key must be a word"),
    ("- a\n", "must be a mapping"),
    ("", "must be a mapping"),
    ("a: b\n---\nc: d\n", "not valid YAML"),
])
def test_unusable_yaml_is_refused_with_its_file(tmp_path, text, complaint):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        read_yaml(path)
    assert complaint in str(error.value) and str(path) in str(error.value)


@pytest.mark.parametrize("content", [None, b"\xff\xfe\x00"])
def test_a_file_that_is_missing_or_no_text_is_refused(tmp_path, content):
    path = tmp_path / "run.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match="run.yaml"):
        read_yaml(path)


def test_yaml_anchors_and_merge_keys_work(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("a: &base {p: 1, q: 2}\nb:\n  <<: *base\n  q: 3\n")
    assert read_yaml(path)["b"] == {"p": 1, "q": 3}


@pytest.mark.parametrize("override, wanted", [
    ("group.rate=2e-3", 2e-3), ("group.steps=20", 20), ("group.steps=1e3", 1000), ("group.loud=true", True), ("group.name=abc", "abc"),
    ("group.name=007", "007"), ("group.name=2024-01-05", "2024-01-05"), ("group.name=12:30", "12:30"), ("group.name=no", "no"),
    ("group.name='007'", "007"), ("group.name=", ""), ("group.limit=null", None), ("group.sizes=[1, 2]", [1, 2]),
    ("group.name=a=b", "a=b"), ("group.shares.a=0.5", {"a": 0.5}), ("group.shares={a: 1}", {"a": 1.0}), ("group.width=9", {"width": 9}),
])
def test_an_override_takes_the_type_of_its_key(override, wanted):
    values = apply_overrides({"group": {"name": "x"}}, [override])
    problems = []
    group = build(Group, values["group"], "group", problems)
    assert problems == []
    key = override.partition("=")[0].split(".")[1]
    found = group.extra if key == "width" else getattr(group, key)
    assert found == wanted and type(found) is type(wanted)


def test_an_override_fills_an_empty_group_and_later_ones_win():
    assert apply_overrides({"a": None}, ["a.b.c=text", "a.b.c=other"]) == {"a": {"b": {"c": "other"}}}


@pytest.mark.parametrize("code", ["__import__('os').system('touch hacked')", "!!python/object/apply:os.system ['touch hacked']", "${HOME}",
                                  "$(touch hacked)", "1+1"])
def test_an_override_is_never_evaluated(tmp_path, monkeypatch, code):
    monkeypatch.chdir(tmp_path)
    try:
        values = apply_overrides({}, [f"group.name={code}"])
        assert values["group"]["name"] == code
    except ConfigError as error:
        assert "not valid YAML" in str(error)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("override, complaint", [
    ("steps", "write key=value"), ("=3", "write key=value"), ("a..b=3", "write key=value"), ("a.b={", "not valid YAML"),
    ("a.b={c: 1, c: 2}", "given twice"), ("name.x=1", "name is not a group"), ("list.0=1", "list is not a group; override the whole list"),
])
def test_a_malformed_override_is_explained(override, complaint):
    with pytest.raises(ConfigError) as error:
        apply_overrides({"name": "text", "list": [1]}, [override])
    assert complaint in str(error.value) and repr(override) in str(error.value)


def test_a_run_config_reports_unknown_groups_keys_wrong_types_and_bad_overrides_together(pretrain_config):
    path = pretrain_config({"optm": {"learning_rate": 1}, "train.stepps": 3, "optim.beta1": "high", "model.hiden_size": 32, "run.seed": -1})
    with pytest.raises(ConfigError) as error:
        load_run_config(path, ["broken", "mixture.weights.pairs=lots"])
    text, problems = str(error.value), error.value.problems
    for part in ("optm: unknown group; did you mean 'optim'?", "train.stepps: unknown key; did you mean 'steps'?",
                 "optim.beta1: 'high' is not float", "model.hiden_size: unknown key; did you mean 'hidden_size'?",
                 "run.seed: must be at least 0, is -1", "override 'broken': write key=value", "mixture.weights.pairs: 'lots' is not float"):
        assert part in text
    assert len(problems) == 7 and text.startswith(path)


@pytest.mark.parametrize("changes, problem", [
    ({"model.image_size": 33}, "model.image_size: 33 is not a multiple of the patch size"),
    ({"model.topk_value": 33}, "model.topk_value: 33 is larger than the codebook"),
    ({"model.config": "unimo2_bse"}, "did you mean 'unimo2_base'?"),
    ({"model.config": "nowhere.json"}, "cannot read the model config"),
    ({"model.config": ""}, "model.config: give a model config or an init directory"),
    ({"optim.schedule": "linaer"}, "optim.schedule: 'linaer' is not one of"),
    ({"optim.learning_rate": -1}, "optim.learning_rate: must be at least 0"),
    ({"optim.beta2": 1.0}, "optim.beta2: must be in [0, 1)"),
    ({"optim.epsilon": 0}, "optim.epsilon: must be above 0"),
    ({"optim.warmup_steps": -2}, "optim.warmup_steps"),
    ({"optim.schedule": "piecewise"}, "optim.drop_at_epochs"),
    ({"run.output": ""}, "run.output: is empty"),
    ({"mixture.weights": {"pears": 1}}, "mixture.weights.pears: unknown corpus; known: pairs, images, texts"),
    ({"mixture.weights": {"pairs": 0}}, "mixture.weights: must not be negative, and one must be above 0"),
    ({"mixture.global_batch": {"pairs": 8}}, "mixture.global_batch.images: is required"),
    ({"train.accumulate": 3}, "is not a multiple of train.accumulate 3"),
    ({"train.matching_group": 3}, "are not a multiple of train.matching_group 3"),
    ({"train.mask_ratio": 1}, "train.mask_ratio: must be between 0 and 1"),
    ({"train.pairs": {"matching": -1}}, "train.pairs.matching: a weight must not be negative"),
    ({"train.visual_temperature": 0}, "train.visual_temperature: must be above 0"),
    ({"train.pairs": {"masked_grounding": 1}}, "needs a grounded model with model.with_grounding_mask"),
    ({"train.images": {"visual_contrastive": 0, "dictionary": 0}}, "train.images: no objective"),
    ({"model.model_type": "baseline", "train.images": {"visual_contrastive": 0}}, "train.images: no objective"),
    ({"data.texts": []}, "data.texts: mixture.weights.texts is above 0 but no shards are given"),
    ({"data.max_text_len": 65}, "data.max_text_len: 65 tokens need 67 text positions, the model has 66"),
    ({"data.max_bad_ratio": 2}, "data.max_bad_ratio: must be between 0 and 1"),
    ({"data.view_augmentation": {"crop": 2}}, "data.view_augmentation.crop: 2.0 is not a probability"),
    ({"task": ["pretrain"]}, "task: ['pretrain'] is not a known task"),
    ({"task": "pretrian"}, "did you mean 'pretrain'?"),
    ({"optim": 0}, "optim: must be a group of keys, is 0"),
])
def test_values_that_cannot_work_are_refused_before_anything_runs(pretrain_config, changes, problem):
    with pytest.raises(ConfigError) as error:
        load_run_config(pretrain_config(changes))
    assert problem in str(error.value)


def test_an_empty_group_means_its_defaults(pretrain_config):
    assert load_run_config(pretrain_config({"optim": None})).optim.learning_rate == 1e-4


def test_the_resolved_config_loads_to_itself(pretrain_config, tmp_path):
    path = pretrain_config({"optim.drop_at_epochs": [2, 4], "train.pairs": {"caption": 0.5}, "run.output": str(tmp_path / "läufe" / "no")})
    first = load_run_config(path, ["optim.learning_rate=3e-5", "model.topk_value=3"])
    written = tmp_path / "resolved.yaml"
    written.write_text(first.to_yaml(), encoding="utf-8")
    second = load_run_config(written)
    assert second.resolved() == first.resolved() and second.to_yaml() == first.to_yaml()
    resolved = yaml.safe_load(first.to_yaml())
    assert resolved["model"]["topk_value"] == 3 and resolved["optim"]["learning_rate"] == 3e-5
    assert resolved["run"]["output"].endswith("läufe/no") and resolved["train"]["pairs"]["matching"] == 1.0
    assert "overrides" not in resolved["model"]


def test_validate_prints_the_resolved_config(pretrain_config, unimo2):
    outcome = unimo2("validate", "-c", pretrain_config(), "-o", "train.steps=9")
    assert outcome.status == 0
    assert yaml.safe_load(outcome.out)["train"]["steps"] == 9


def test_validate_needs_no_data(pretrain_config, unimo2, tmp_path):
    path = pretrain_config({"data.vocab": "not/there", "data.pairs": [{"shards": "not/there/*.tar"}]})
    assert unimo2("validate", "-c", path).status == 0
    assert not (tmp_path / "run").exists()
