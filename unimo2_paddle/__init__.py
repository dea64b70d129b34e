"""UNIMO-2 and UNIMO on PaddlePaddle: models, pre-training, finetuning, evaluation.

The public names are loaded on first use, so that ``import unimo2_paddle`` and ``unimo2 --help`` stay fast.
"""
import zlib  # noqa: F401  paddle 2.6.2 exports zlib's symbols: Python's own must be loaded before it
from typing import TYPE_CHECKING, Any, List

if TYPE_CHECKING:  # what __getattr__ below hides from type checkers and editors
    from unimo2_paddle.checkpoints.pretrained import from_pretrained as from_pretrained
    from unimo2_paddle.checkpoints.pretrained import save_pretrained as save_pretrained
    from unimo2_paddle.checkpoints.released import LoadReport as LoadReport
    from unimo2_paddle.checkpoints.released import load_released as load_released
    from unimo2_paddle.checkpoints.released import save_released as save_released
    from unimo2_paddle.data.images import load_image as load_image
    from unimo2_paddle.data.tokenizer import Tokenizer as Tokenizer
    from unimo2_paddle.models.configuration import Unimo2Config as Unimo2Config
    from unimo2_paddle.models.configuration import UnimoConfig as UnimoConfig
    from unimo2_paddle.models.unimo import UnimoModel as UnimoModel
    from unimo2_paddle.models.unimo2 import Unimo2Model as Unimo2Model
    from unimo2_paddle.serving.explain import explain as explain
    from unimo2_paddle.serving.predictor import Predictor as Predictor

__version__ = "0.1.0"

_PUBLIC = {
    "Unimo2Config": "unimo2_paddle.models.configuration",
    "Unimo2Model": "unimo2_paddle.models.unimo2",
    "UnimoConfig": "unimo2_paddle.models.configuration",
    "UnimoModel": "unimo2_paddle.models.unimo",
    "Tokenizer": "unimo2_paddle.data.tokenizer",
    "load_image": "unimo2_paddle.data.images",
    "Predictor": "unimo2_paddle.serving.predictor",
    "explain": "unimo2_paddle.serving.explain",
    "LoadReport": "unimo2_paddle.checkpoints.released",
    "load_released": "unimo2_paddle.checkpoints.released",
    "save_released": "unimo2_paddle.checkpoints.released",
    "from_pretrained": "unimo2_paddle.checkpoints.pretrained",
    "save_pretrained": "unimo2_paddle.checkpoints.pretrained",
}
__all__ = sorted(_PUBLIC) + ["__version__"]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'unimo2_paddle' has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value


def __dir__() -> List[str]:
    return __all__
