"""Installs `unimo2_paddle` and the console command `unimo2`; tested versions are pinned in requirements.txt."""
import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent

INSTALL_REQUIRES = [
    "matplotlib>=3.6",
    "numba>=0.60,<0.69",  # fused Transformer layers on CPU
    "nltk>=3.8",  # Porter's stemmer, in ROUGE
    "numpy>=1.23,<2",
    "opencv-python>=4.6",
    "pillow>=9.0",
    "protobuf>=3.20.2,<7",  # 7 breaks visualdl's add_hparams
    "pyyaml>=5.4",
    "safetensors>=0.4",
    "scikit-learn>=1.2",
    "scipy>=1.9",
    "tokenizers>=0.15",
    "tqdm>=4.60",
    "visualdl>=2.5.3",
]
EXTRAS_REQUIRE = {
    # Paddle is an extra: both packages install the module `paddle`, and requiring one would put it beside the other.
    "cpu": ["paddlepaddle>=2.6.2,<3.4"],
    "gpu": ["paddlepaddle-gpu>=2.6.2,<3.4"],
    # paddlenlp 2.8.1 does not declare the upper bounds it needs to be importable.
    "pretrained": ["paddlenlp==2.8.1", "paddleclas==2.6.0", "huggingface-hub<1", "aistudio-sdk<0.3", "pyarrow<26"],
    # faiss only makes `unimo2 augment retrieve` faster; textblob is what parses captions.
    "augment": ["textblob>=0.17,<0.21", "faiss-cpu>=1.7.4"],
    # paddle2onnx 2 for Paddle 3, 1.3 for Paddle 2.6; onnxruntime runs what `unimo2 export --onnx` wrote.
    "onnx": ["paddle2onnx>=1.3,<3", "onnx>=1.14,<1.18", "onnxruntime>=1.16"],
    # fastapi-offline brings the API page's scripts, so that it needs no content delivery network.
    "serve": ["fastapi>=0.115,<1", "uvicorn>=0.30,<1", "prometheus-client>=0.20", "fastapi-offline>=1.7"],
    "docs": ["mkdocs-material>=9.5", "mkdocs>=1.6,<2"],  # 2 drops the plugins and themes of 1
    "test": ["pytest>=8", "pytest-xdist>=3.5", "hypothesis>=6.100", "playwright>=1.40"],
}


def version():
    """The version written in the package, read without importing it."""
    text = (ROOT / "unimo2_paddle" / "__init__.py").read_text(encoding="utf-8")
    return re.search(r'^__version__ = "(.+)"$', text, re.MULTILINE).group(1)


def long_description():
    """The README, or nothing where a source archive lacks it."""
    readme = ROOT / "README.md"
    return readme.read_text(encoding="utf-8") if readme.exists() else ""


setup(
    name="unimo2_paddle",
    version=version(),
    description="UNIMO-2 and UNIMO on PaddlePaddle: pre-train, finetune, evaluate, convert",
    long_description=long_description(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["unimo2_paddle", "unimo2_paddle.*"]) + ["unimo2_paddle.run_configs", "unimo2_paddle.model_zoo"],
    # Beside the package in a checkout, inside it in a wheel: config.bundled_config and checkpoints.zoo find both.
    package_dir={"unimo2_paddle.run_configs": "run_configs", "unimo2_paddle.model_zoo": "model_zoo"},
    package_data={"unimo2_paddle": ["**/*.yaml", "**/*.json", "**/*.txt", "py.typed", "serving/web/static/*"], "unimo2_paddle.run_configs": ["**/*.yaml"],
                  "unimo2_paddle.model_zoo": ["*.yaml", "README.md"]},
    python_requires=">=3.9,<3.12",  # numpy 1.24.4, which paddleclas demands, has no wheels for 3.12
    install_requires=INSTALL_REQUIRES,
    extras_require=EXTRAS_REQUIRE,
    entry_points={"console_scripts": ["unimo2=unimo2_paddle.cli:main"]},
)
