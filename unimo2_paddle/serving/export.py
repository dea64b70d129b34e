"""A trained model as programs for paddle.inference and ONNX, with everything a prediction needs beside them (``unimo2 export``)."""
import contextlib
import copy
import json
import os
import shutil
import sys
import warnings

import numpy as np
import paddle
from paddle.static import InputSpec

from unimo2_paddle import __version__
from unimo2_paddle.checkpoints.download import sha256_of
from unimo2_paddle.errors import Unimo2Error, UserInputError
from unimo2_paddle.models.configuration import UnimoConfig
from unimo2_paddle.models.vision import resize_position_embeddings
from unimo2_paddle.serving.engine import ENGINES, EXPORT_FILE, FORMAT, ExportedPrograms, read_export_file
from unimo2_paddle.serving.parity import compare
from unimo2_paddle.tasks.finetune import TASK_FILE, copy_vocabulary

TOLERANCE = 1e-5
OPSET = 17


def export(predictor, directory, onnx=False, tolerance=TOLERANCE):
    """Write the programs of a predictor's model, compare them with it, and put the directory in place when they agree.

    Args:
        predictor: a ``Predictor`` of a checkpoint directory; directory: to make, must not exist.
        onnx: write every program in ONNX too; tolerance: largest difference, of the largest value of an output (at least 1);
            ten times that for code scores.

    Returns:
        list of :class:`unimo2_paddle.serving.parity.Difference`.

    Raises:
        UserInputError: the directory exists or cannot be written, the predictor is an exported model's, or paddle2onnx is missing.
        Unimo2Error: a program differs from the model by more than the tolerance; nothing is left then.
    """
    directory = os.path.abspath(directory)
    if os.path.lexists(directory):
        raise UserInputError(f"{directory} exists; choose another --to, or remove it")
    if predictor.exported:
        raise UserInputError(f"{predictor.directory} is an exported model already; give the checkpoint directory it was made from")
    if onnx:
        _import_paddle2onnx()
    temporary = f"{directory}.tmp-{os.getpid()}"
    try:
        os.makedirs(temporary)
        programs = _write_programs(predictor, temporary, onnx)
        _write_assets(predictor, temporary)
        about = describe(predictor, programs, temporary)
        _write_json(os.path.join(temporary, EXPORT_FILE), about)
        found = check(predictor, temporary, tolerance)
        about["parity"] = [one._asdict() for one in found]
        _write_json(os.path.join(temporary, EXPORT_FILE), about)
        os.rename(temporary, directory)
    except OSError as error:
        raise UserInputError(f"{directory}: cannot be written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return found


def check(predictor, directory, tolerance=TOLERANCE):
    """Compare an exported model with the predictor of its checkpoint directory; returns and raises as :func:`export`."""
    about, found = read_export_file(directory), []
    if about["fingerprint"] != predictor.kind.fingerprint():
        raise UserInputError(f"{directory} was not exported from the weights of {predictor.directory}")
    for engine in ENGINES if all("onnx" in program for program in about["programs"].values()) else ENGINES[:1]:
        found += compare(predictor, ExportedPrograms(directory, engine))
    worst = max(found, key=lambda one: one.excess)
    if worst.excess > tolerance:
        raise Unimo2Error(f"{predictor.directory}: {worst.engine} program {worst.program} differs from the model by {worst.relative:.1e} of its largest "
                          f"value in {worst.output}, more than {tolerance:g}")
    return found


def _write_programs(predictor, directory, onnx):
    """Trace every program; returns what ``export.json`` says of them."""
    about = {}
    with fixed_positions(predictor.kind.model):
        for name, program in predictor.kind.programs.programs.items():
            files = save_program(program, os.path.join(directory, name))
            about[name] = {"inputs": [{"name": spec.name, "dtype": spec.dtype, "shape": list(spec.shape)} for spec in program.inputs],
                           "outputs": program.outputs, "paddle": [os.path.basename(file) for file in files]}
            if onnx:
                about[name]["onnx"] = f"{name}.onnx"
                save_onnx(files, os.path.join(directory, f"{name}.onnx"), program)
    return about


def save_program(program, path):
    """Trace a program to ``path`` + .json (Paddle 2: .pdmodel) and .pdiparams; returns the two files."""
    program.eval()
    specs = {spec.name: InputSpec([size if isinstance(size, int) else None for size in spec.shape], spec.dtype, spec.name) for spec in program.inputs}
    with _quiet():
        # a copy, because tracing replaces the Layer's own forward
        paddle.jit.save(paddle.jit.to_static(copy.copy(program), input_spec=[specs], full_graph=True), path)
    graph = next(path + ending for ending in (".json", ".pdmodel") if os.path.exists(path + ending))
    for extra in (path + ".pdiparams.info",):
        if os.path.exists(extra):
            os.remove(extra)
    return graph, path + ".pdiparams"


def save_onnx(files, path, program):
    """A saved program in ONNX, its outputs under their names.

    ``paddle.onnx.export`` is not used: it runs pip by itself, which breaks the environment.
    """
    paddle2onnx, onnx = _import_paddle2onnx()
    with _quiet():
        paddle2onnx.export(*files, path, OPSET, optimize_tool="None")
    model = onnx.load(path)
    inputs = {spec.name for spec in program.inputs}
    names = {value.name: f"next_{output}" if output in inputs else output for value, output in zip(model.graph.output, program.outputs)}
    _fill_pads_with_zero(onnx, model)
    for node in model.graph.node:
        for places in (node.input, node.output):
            places[:] = [names.get(name, name) for name in places]
    for value in [*model.graph.output, *model.graph.value_info]:
        value.name = names.get(value.name, value.name)
    sizes = {spec.name: spec.shape for spec in program.inputs}
    for value in model.graph.input:
        for dimension, size in zip(value.type.tensor_type.shape.dim, sizes[value.name]):
            if isinstance(size, str):
                dimension.dim_param = size
    onnx.save(model, path)


def _fill_pads_with_zero(onnx, model):
    """paddle2onnx 2.1.0 leaves the value that a Pad fills in uninitialised; in these models it is always 0."""
    filling = {node.input[2] for node in model.graph.node if node.op_type == "Pad" and len(node.input) > 2}
    for node in model.graph.node:
        if node.op_type == "Constant" and filling & set(node.output):
            value = onnx.numpy_helper.to_array(node.attribute[0].t)
            node.attribute[0].t.CopyFrom(onnx.numpy_helper.from_array(np.zeros_like(value), node.attribute[0].t.name))


def _import_paddle2onnx():
    try:
        import onnx
        import paddle2onnx.convert
    except ImportError as error:
        raise UserInputError(f"{error.name} is not installed; pip install 'unimo2_paddle[onnx]', or export without --onnx") from None
    return paddle2onnx.convert, onnx


@contextlib.contextmanager
def _quiet():
    """Without Paddle's warnings about its own tracing; what its C++ parts print goes to standard error, as standard output is for results."""
    sys.stdout.flush()
    saved = os.dup(1)
    try:
        os.dup2(2, 1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        os.dup2(saved, 1)
        os.close(saved)


@contextlib.contextmanager
def fixed_positions(model):
    """Inside, the visual position table is the one of the model's picture size, so that no resizing is traced."""
    vision = next((layer for layer in model.sublayers(include_self=True) if hasattr(layer, "patch_weight")), None)
    if vision is None:
        yield
        return
    stored = vision.positions
    with paddle.no_grad():
        resized = resize_position_embeddings(stored, vision.image_size // vision.patch)
    if resized.shape != stored.shape:
        vision.positions = paddle.create_parameter(resized.shape, "float32", default_initializer=paddle.nn.initializer.Assign(resized))
    try:
        yield
    finally:
        vision.positions = stored


def _write_assets(predictor, directory):
    """The config, the task file and the vocabulary, as in the checkpoint directory."""
    for name in ("config.json", TASK_FILE):
        if os.path.exists(os.path.join(predictor.directory, name)):
            shutil.copyfile(os.path.join(predictor.directory, name), os.path.join(directory, name))
    if predictor.kind.tokenizer is not None:
        copy_vocabulary(os.path.join(predictor.directory, "vocab"), os.path.join(directory, "vocab"))


def describe(predictor, programs, directory):
    """What ``export.json`` says: everything an engineer needs who does not use this package."""
    kind, config = predictor.kind, predictor.kind.config
    about = {"format": FORMAT, "task": predictor.task, "system": "UNIMO" if isinstance(config, UnimoConfig) else "UNIMO-2",
             "unimo2_paddle": __version__, "paddle": paddle.__version__, "fingerprint": kind.fingerprint(), "programs": programs,
             "preprocessing": {}}
    if kind.takes("image"):
        about["preprocessing"]["image"] = {
            "input": "a detector's regions: features, boxes as x1/W, y1/H, x2/W, y2/H and share of the area; first the mean feature with box 0 0 1 1 1",
            "max_regions": kind.max_regions} if kind.reads_regions else {
            "input": "uint8 RGB, height x width x channel", "size": config.image_size, "resize": "Pillow, antialiased bicubic, aspect ratio not kept",
            "centre_crop": float(kind.about.get("centre_crop", 0.0)), "normalisation": "inside the program: x / 127.5 - 1"}
    if kind.tokenizer is not None:
        tokenizer = kind.tokenizer
        about["preprocessing"]["text"] = {
            "vocabulary": "vocab", "encoding": "byte-level BPE; [CLS] text [SEP]", "max_tokens": kind.max_text_len, "first_position": 2,
            "padding": {"input_ids": tokenizer.pad_id, "position_ids": 1, "text_mask": 0.0},
            "ids": {"cls": tokenizer.cls_id, "sep": tokenizer.sep_id, "pad": tokenizer.pad_id, "mask": tokenizer.mask_id}}
    for key in ("labels", "answers", "names", "decoding"):
        if key in kind.about:
            about["labels" if key in ("answers", "names") else key] = kind.about[key]
    if predictor.task == "retrieval" and not kind.reads_regions:
        about["temperature"] = kind.temperature()
    files = sorted(os.path.relpath(os.path.join(folder, name), directory) for folder, _, names in os.walk(directory) for name in names)
    about["files"] = {name: sha256_of(os.path.join(directory, name)) for name in files if name != EXPORT_FILE}
    return about


def _write_json(path, values):
    with open(path, "w", encoding="utf-8") as file:
        json.dump(values, file, indent=1, ensure_ascii=False)
        file.write("\n")
