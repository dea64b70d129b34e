"""What every test shares: one thread, no network, repeatable property tests, a tiny pre-training run."""
import ipaddress
import os
import socket
import zlib  # noqa: F401  before paddle: Paddle 2.6.2 exports zlib's symbols, and the first use would then crash
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import settings

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HYPOTHESIS_STORAGE_DIRECTORY", str(Path(__file__).resolve().parent.parent / ".pytest_cache" / "hypothesis"))

# No deadline: the machine may be shared. No database: a run leaves nothing behind and equals the one before.
settings.register_profile("unimo2", deadline=None, derandomize=True, database=None)
settings.load_profile("unimo2")


def _is_local(family, address):
    """Whether a socket address stays on this machine."""
    if family not in (socket.AF_INET, socket.AF_INET6):
        return True  # Unix sockets and the like
    host = address[0]
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@pytest.fixture(autouse=True, scope="session")
def no_network():
    """Make every connection that would leave this machine an error."""

    def guard(connect):
        def guarded(self, address):
            if not _is_local(self.family, address):
                raise RuntimeError(f"a test tried to reach {address!r}; tests use the network of this machine only")
            return connect(self, address)

        return guarded

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", guard(socket.socket.connect))
        patch.setattr(socket.socket, "connect_ex", guard(socket.socket.connect_ex))
        yield


# A model of a few thousand weights on 32-pixel pictures: a training step takes some 40 ms.
TINY_MODEL = {
    "config": "unimo2_demo", "hidden_size": 32, "text_hidden_size": 32, "vit_hidden_size": 32, "num_attention_heads": 2,
    "text_num_attention_heads": 2, "vit_num_attention_heads": 2, "num_hidden_layers": 2, "text_num_hidden_layers": 1,
    "vit_num_hidden_layers": 1, "image_size": 32, "resolution": 16, "position_grid": 2, "num_codebook": 32, "topk_value": 4,
}


@pytest.fixture(scope="session")
def demo_data(tmp_path_factory):
    """The smallest demo corpora: 24 pairs, 12 pictures, 24 texts, 20 pictures for retrieval; not to be changed."""
    from unimo2_paddle.data.demo import write_demo_data

    out = tmp_path_factory.mktemp("demo") / "data"
    write_demo_data(out, size=24, seed=1)
    return out


@pytest.fixture(scope="session")
def tiny_pretrain(demo_data):
    """A function: output directory -> the tiny pre-training run over all three corpora, as nested plain Python."""

    def values(output):
        return {
            "task": "pretrain",
            "model": dict(TINY_MODEL),
            "data": {"vocab": str(demo_data / "vocab"), "max_text_len": 40,
                     **{corpus: [{"shards": str(demo_data / corpus / "*.tar")}] for corpus in ("pairs", "images", "texts")}},
            "mixture": {"weights": {"pairs": 0.5, "images": 0.25, "texts": 0.25}, "global_batch": {"pairs": 8, "images": 4, "texts": 8}},
            "train": {"steps": 6, "matching_group": 4},
            "optim": {"learning_rate": 1e-3},
            "run": {"output": str(output), "progress": False, "log_every": 1},
        }

    return values


@pytest.fixture
def pretrain_config(tiny_pretrain, tmp_path):
    """A function that writes the tiny run with some keys replaced ({"group.key": value}) and returns the file's path."""
    return lambda changes=None, name="run.yaml": _written(tiny_pretrain(tmp_path / "run"), changes, tmp_path / name)


@dataclass
class Outcome:
    """What a command left behind."""

    status: int
    out: str
    err: str


@pytest.fixture
def unimo2(capsys):
    """A function that runs ``unimo2 ARGUMENTS`` in this process."""
    from unimo2_paddle.cli import main

    def run(*arguments):
        capsys.readouterr()
        status = main([str(a) for a in arguments])
        return Outcome(status, *capsys.readouterr())

    return run


@pytest.fixture(scope="session")
def tiny_config():
    """The ``Unimo2Config`` of the tiny run."""
    from unimo2_paddle.tasks.base import ModelSection

    return ModelSection(TINY_MODEL["config"], overrides={key: value for key, value in TINY_MODEL.items() if key != "config"}).model_config()


# A UNIMO of a few thousand weights for the demo's region features.
TINY_UNIMO = {"config": "unimo_demo", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture(scope="session")
def unimo_corpora(demo_data, tmp_path_factory):
    """The demo's regions as stores ``train``, ``dev``, ``test``, and ``augmentations`` of its 24 pairs; not to be changed."""
    from unimo2_paddle.cli import main
    from unimo2_paddle.data.demo_tasks import regions, rewrites
    from unimo2_paddle.data.region_import import import_regions

    out = tmp_path_factory.mktemp("unimo")
    regions.write(str(out / "regions"), str(demo_data), 1)
    rewrites.write(str(out / "rewrites"), str(demo_data), 1)
    for split in ("train", "dev", "test"):
        import_regions([str(out / "regions" / "bottom_up" / f"{split}.tsv")], str(out / split), "bottom_up", show_progress=False)
    pairs, index, made = str(demo_data / "pairs" / "*.tar"), str(out / "index"), str(out / "augmentations")
    for arguments in (["index", "--source", pairs, "--synonyms", str(out / "rewrites" / "synonyms.txt"), "--out", index],
                      ["rewrite", "--source", pairs, "--index", index, "--paraphrases", str(out / "rewrites" / "paraphrases.jsonl"), "--out", made],
                      ["index", "--source", str(demo_data / "texts" / "*.tar"), "--out", str(out / "texts")],
                      ["retrieve", "--source", pairs, "--index", str(out / "texts"), "--top", "3", "--out", made]):
        assert main(["augment", *arguments]) == 0
    return out


@pytest.fixture(scope="session")
def tiny_unimo_pretrain(demo_data, unimo_corpora):
    """A function: output directory -> UNIMO's tiny pre-training over all three corpora, as nested plain Python."""

    def values(output):
        return {
            "task": "unimo_pretrain",
            "model": dict(TINY_UNIMO),
            "data": {"vocab": str(demo_data / "vocab"), "max_text_len": 40,
                     "pairs": [{"regions": str(unimo_corpora / "train"), "captions": str(demo_data / "pairs" / "*.tar"),
                                "augmentations": str(unimo_corpora / "augmentations")}],
                     "images": [{"regions": str(unimo_corpora / "train")}], "texts": [{"shards": str(demo_data / "texts" / "*.tar")}]},
            "mixture": {"weights": {"pairs": 0.5, "images": 0.25, "texts": 0.25}, "global_batch": {"pairs": 8, "images": 4, "texts": 8}},
            "train": {"steps": 6, "candidates": {"group": 4, "hard_negatives": 2, "related_images": 0}},
            "optim": {"learning_rate": 1e-3},
            "run": {"output": str(output), "progress": False, "log_every": 1},
        }

    return values


@pytest.fixture
def unimo_pretrain_config(tiny_unimo_pretrain, tmp_path):
    """As ``pretrain_config``, of UNIMO's tiny run."""
    return lambda changes=None, name="run.yaml": _written(tiny_unimo_pretrain(tmp_path / "run"), changes, tmp_path / name)


def _written(values, changes, path):
    """Write nested values with some keys replaced ({"group.key": value}); returns the file's path."""
    import yaml

    for place, value in (changes or {}).items():
        *groups, key = place.split(".")
        target = values
        for group in groups:
            target = target.setdefault(group, {})
        target[key] = value
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return str(path)
