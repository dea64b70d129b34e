"""A tiny model for pairs with random weights, and a folder of pictures."""
import shutil
from types import SimpleNamespace

import numpy as np
import paddle
import pytest

from unimo2_paddle.checkpoints.pretrained import save_pretrained
from unimo2_paddle.models.unimo2 import Unimo2Model
from unimo2_paddle.tasks.finetune import copy_vocabulary


@pytest.fixture(scope="session")
def pair_model(demo_data, tiny_config, tmp_path_factory):
    """A function: name, seed and changes of the config -> a model with its directory; states and codes are large enough that codes differ."""

    def make(name, seed=5, **changes):
        directory = tmp_path_factory.mktemp("pair") / name
        with paddle.utils.unique_name.guard():
            model = Unimo2Model(type(tiny_config).from_dict({**tiny_config.to_dict(), **changes}), heads=("pooling", "matching"))
        rng = np.random.default_rng(seed)
        for parameter in sorted(model.parameters(), key=lambda p: p.name):
            if not parameter.name.endswith("_temperature"):
                parameter.set_value(rng.normal(1.0 if parameter.name.endswith("_scale") else 0.0, 0.3, parameter.shape).astype("float32"))
        if model.grounded:
            model.dictionary.temperature.set_value(np.array([1.0], "float32"))
        model.eval()
        save_pretrained(model, str(directory))
        copy_vocabulary(demo_data / "vocab", directory / "vocab")
        return SimpleNamespace(model=model, directory=directory)

    return make


@pytest.fixture(scope="session")
def grounded(pair_model):
    """The tiny model and its directory; not to be changed."""
    return pair_model("grounded")


@pytest.fixture
def folder(demo_data, tmp_path):
    """A folder of six pictures, one of them deeper down; free to be changed."""
    target = tmp_path / "pictures"
    (target / "deep").mkdir(parents=True)
    for number, path in enumerate(sorted((demo_data / "retrieval" / "images").glob("*.jpg"))[:6]):
        shutil.copy(path, target / ("deep" if number == 5 else "") / f"{number}.jpg")
    return target
