"""Checkpoints of three kinds, read without knowing which, converted into each other and described.

``released``: the authors' directory, one file per variable. ``safetensors``: our own directory, ``config.json`` and
``model.safetensors``. ``pdparams``: Paddle's pickle, alone or as ``model_state.pdparams`` in a directory. In all three the
arrays carry the authors' variable names, so converting changes no value, shape or type.
"""
import json
import os
import re
from typing import Dict, NamedTuple, Optional

import numpy as np

from unimo2_paddle.checkpoints.fitting import HEAD_SIZE, fit_config, is_unimo, is_unimo2_name
from unimo2_paddle.checkpoints.pdparams import read_pdparams, write_pdparams
from unimo2_paddle.checkpoints.released import check_variable_name, new_directory, read_released, widen_bfloat16, write_released
from unimo2_paddle.errors import CheckpointError
from unimo2_paddle.models.configuration import config_class, load_config

SAFETENSORS, PDPARAMS, CONFIG = "model.safetensors", "model_state.pdparams", "config.json"
FORMATS = ("released", "safetensors", "pdparams")
_TITLES = {"released": "the authors' directory (one file per variable)", "safetensors": "safetensors", "pdparams": "pdparams"}


class Checkpoint(NamedTuple):
    """What ``read_checkpoint`` found: arrays by name, the values of config.json (None without one) and the kind."""

    arrays: Dict[str, np.ndarray]
    config: Optional[dict]
    kind: str


def read_checkpoint(path):
    """Read a checkpoint of any kind.

    Args:
        path: the authors' directory; a directory with ``model.safetensors`` or ``model_state.pdparams``; a ``.safetensors`` or
            ``.pdparams`` file. The config is the ``config.json`` in the directory, or beside a file.

    Returns:
        Checkpoint(arrays, config, kind), kind one of ``released``, ``safetensors``, ``pdparams``.

    Raises:
        CheckpointError: if the path is no checkpoint, or a damaged or unsafe one.
    """
    path = os.fspath(path)
    kind, file = locate(path)
    if kind == "released":
        arrays = read_released(path)
    elif kind == "safetensors":
        arrays = read_safetensors(file)
    else:
        arrays = _named_as_parameters(*read_pdparams(file), file)
    config_file = os.path.join(os.path.dirname(file) if file else path, CONFIG)
    return Checkpoint(dict(sorted(arrays.items())), read_json(config_file) if os.path.exists(config_file) else None, kind)


def locate(path):
    """The kind of checkpoint at ``path`` and its file (None for the authors' directories)."""
    if not os.path.exists(path):
        raise CheckpointError(f"{path} does not exist. Give a checkpoint directory, or a .safetensors or .pdparams file.")
    if os.path.isdir(path):
        for name, kind in ((SAFETENSORS, "safetensors"), (PDPARAMS, "pdparams")):
            if os.path.exists(os.path.join(path, name)):
                return kind, os.path.join(path, name)
        suffixes = (".safetensors", ".pdparams", ".safetensors.index.json")
        foreign = sorted(name for name in os.listdir(path) if name.endswith(suffixes))
        if foreign:
            raise CheckpointError(f"{path} has neither {SAFETENSORS} nor {PDPARAMS}; name the file wanted, for example "
                                  f"{os.path.join(path, foreign[0])}")
        return "released", None
    for suffix in ("safetensors", "pdparams"):
        if path.endswith("." + suffix):
            return suffix, path
    raise CheckpointError(f"{path} is a file, but neither .safetensors nor .pdparams. The authors' checkpoints are "
                          "directories: give the directory.")


def convert(source, target, format="safetensors", config=None):
    """Convert a checkpoint; all of the target appears, or nothing.

    Args:
        source: any path ``read_checkpoint`` takes.
        target: directory to create; it must not exist.
        format: what to write, one of ``released``, ``safetensors``, ``pdparams``.
        config: JSON file of the model's config, if the source has none with it; without either it is worked out from the
            shapes, with attention heads of 64.

    Returns:
        str: a summary for the screen.

    Raises:
        CheckpointError: if the source is unusable, the target exists or the format is unknown.
    """
    if format not in FORMATS:
        raise CheckpointError(f"format {format!r} is unknown; choose one of {', '.join(FORMATS)}")
    if os.path.lexists(target):
        raise CheckpointError(f"{target} exists already; nothing is overwritten. Choose another path or move it away.")
    checkpoint = read_checkpoint(source)
    arrays, values, note = checkpoint.arrays, checkpoint.config, "config.json taken over"
    if config is not None:
        values, note = load_config(config).to_dict(), f"config.json from {config}"
    elif values is None:
        fitted, note = config_by_shapes(arrays)
        values = fitted.to_dict() if fitted else None
        note += "" if fitted else "; no config.json is written, add one to load the model"
    if format == "released":
        write_released(target, arrays)
        note = "no config.json: the authors' format has none" + (", give it again when you load" if checkpoint.config else "")
    else:
        write_checkpoint(target, arrays, values, format)
    size = sum(array.nbytes for array in arrays.values())
    return (f"{source} ({_TITLES[checkpoint.kind]}) -> {target} ({_TITLES[format]})\n"
            f"{len(arrays)} variables, {sum(a.size for a in arrays.values()):,} values, {_readable(size)}\n{note}")


def write_checkpoint(directory, arrays, config, format="safetensors"):
    """Write ``model.safetensors`` or ``model_state.pdparams``, and ``config.json`` unless ``config`` is None, at once."""
    for name in arrays:
        check_variable_name(name)  # so that every checkpoint can also become an authors' directory
    with new_directory(directory) as temporary:
        if format == "safetensors":
            write_safetensors(os.path.join(temporary, SAFETENSORS), arrays)
        else:
            write_pdparams(os.path.join(temporary, PDPARAMS), arrays)
        if config is not None:
            with open(os.path.join(temporary, CONFIG), "w", encoding="utf-8") as file:
                file.write(json.dumps(config, indent=2, sort_keys=True) + "\n")


def describe(path):
    """What a checkpoint contains, for ``unimo2 inspect``.

    Returns:
        str: a table of names, shapes, types and sizes, the totals, the config the shapes fit, and which parts are there.
    """
    arrays, config, kind = read_checkpoint(path)
    rows = [("name", "shape", "type", "bytes")]
    rows += [(name, "x".join(map(str, array.shape)) or "scalar", array.dtype.name, f"{array.nbytes:,}")
             for name, array in arrays.items()]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = [f"{n:<{widths[0]}}  {s:>{widths[1]}}  {t:<{widths[2]}}  {b:>{widths[3]}}" for n, s, t, b in rows]
    size = sum(array.nbytes for array in arrays.values())
    fit = fit_config({name: array.shape for name, array in arrays.items()})
    lines += ["", f"{path}: {_TITLES[kind]}",
              f"{len(arrays)} variables, {sum(a.size for a in arrays.values()):,} parameters, {_readable(size)}", str(fit)]
    if fit.values:
        heads = f"cannot be told from the shapes (heads of {HEAD_SIZE} do not fill the width)"
        if config and "num_attention_heads" in config:
            heads = f"{config['num_attention_heads']} (config.json)"
        elif fit.knows_heads:
            heads = f"{fit.values['num_attention_heads']}, if they are {HEAD_SIZE} wide as in the released models"
        lines += [f"attention heads: {heads}",
                  f"present: {', '.join(fit.present) or 'none of the main parts'}",
                  f"absent: {', '.join(fit.absent) or 'none'}"]
        if fit.foreign:
            lines.append(f"not {fit.system} variables: {', '.join(fit.foreign)}")
    lines.append(f"config.json: {_config_verdict(config, fit)}")
    return "\n".join(lines)


def _config_verdict(config, fit):
    if config is None:
        return "none"
    decided = ("hidden_size", "text_vocab_size", "text_max_position_embeddings", "num_codebook", "resolution",
               "position_grid", "text_num_hidden_layers", "vit_num_hidden_layers", "num_hidden_layers", "model_type", "vocab_size",
               "max_position_embeddings", "image_embedding_size", "role_type_size", "turn_type_size", "weight_sharing")
    wrong = [f"{key} is {config[key]}, the shapes say {fit.values[key]}" for key in decided
             if key in config and key in fit.values and config[key] != fit.values[key]]
    if config.get("text_enc_layers") or config.get("grounding_enc_layers"):  # a subset may leave out the last layers
        wrong = [text for text in wrong if "_layers" not in text]
    return "DISAGREES with the weights: " + "; ".join(wrong) if wrong else "there, agrees with the weights"


def config_by_shapes(arrays):
    """The config that arrays fit, or None, and a sentence that says what was assumed or why there is none."""
    fit = fit_config({name: array.shape for name, array in arrays.items()})
    if not fit.is_whole:
        if not fit.values:
            reason = "there are no UNIMO-2 variables"
        elif fit.knows_heads:
            reason = f"the {'text or the grounded Transformer' if fit.system == 'UNIMO-2' else 'text embedding or the encoder'} is missing"
        else:
            reason = f"attention heads of {HEAD_SIZE} do not fill the width"
        return None, f"the config cannot be worked out from the shapes: {reason}"
    config = config_class(fit.values).from_dict(fit.values, source="config worked out from the shapes")
    assumed = f"attention heads of {HEAD_SIZE}" + (f" and {config.topk_value} grounded tokens per input" if fit.system == "UNIMO-2" else "")
    return config, f"config worked out from the shapes; {assumed} are assumed"


def _named_as_parameters(arrays, parameter_names, file):
    """The arrays under the authors' names where the file's name table gives them, else under the keys they were saved with."""
    if not any(map(is_unimo2_name, parameter_names.values())) and not is_unimo(parameter_names.values()):
        return arrays
    named = {}
    for key, array in arrays.items():
        name = parameter_names.get(key, key)
        if name in named and not np.array_equal(named[name], array):
            raise CheckpointError(f"{file}: two different arrays for the parameter {name!r}")
        named[name] = array
    return named


def read_safetensors(file):
    """The arrays of a ``.safetensors`` file by name (bfloat16 widened to float32); CheckpointError names a damaged file."""
    import safetensors
    from safetensors.numpy import load_file

    try:
        with safetensors.safe_open(file, "np") as opened:
            types = {opened.get_slice(name).get_dtype() for name in opened.keys()}
        if "BF16" not in types:
            arrays = load_file(file)
        else:  # numpy has no bfloat16: the raw bits are widened to float32
            with open(file, "rb") as raw:
                parts = dict(safetensors.deserialize(raw.read()))
            arrays = {name: _from_bits(part) for name, part in parts.items()}
    except OSError as error:
        raise CheckpointError(f"cannot read {file}: {error.strerror or error}") from error
    except (safetensors.SafetensorError, TypeError, KeyError) as error:
        raise CheckpointError(f"{file} is damaged or not a usable safetensors file: {error}") from error
    if not arrays:
        raise CheckpointError(f"{file} holds no weights")
    return arrays


def _from_bits(part):
    numpy_types = {"BF16": "<u2", "F16": "<f2", "F32": "<f4", "F64": "<f8", "I64": "<i8", "I32": "<i4", "U8": "u1",
                   "BOOL": "bool"}
    array = np.frombuffer(part["data"], numpy_types[part["dtype"]]).reshape(part["shape"])
    return widen_bfloat16(array) if part["dtype"] == "BF16" else array


def write_safetensors(file, arrays):
    """Write named arrays as a ``.safetensors`` file; the caller makes it appear at once (temporary directory, then rename).

    Raises:
        OSError: it cannot be written, for example on a full disk.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    # ascontiguousarray makes a scalar one-dimensional, so the shape is put back
    plain = {name: np.ascontiguousarray(a, a.dtype.newbyteorder("=")).reshape(a.shape) for name, a in arrays.items()}
    try:
        save_file(plain, file, metadata={"format": "np"})
    except SafetensorError as error:  # its own kind of error for the system's
        number = re.search(r"os error (\d+)", str(error))
        raise OSError(int(number[1]), os.strerror(int(number[1])), file) if number else OSError(str(error)) from error


def read_json(file):
    """The JSON object in a file, as a dict; CheckpointError if there is none."""
    try:
        with open(file, encoding="utf-8") as opened:
            values = json.load(opened)
    except OSError as error:
        raise CheckpointError(f"cannot read {file}: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"{file} is not a JSON file: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{file} is not a JSON object")
    return values


def _readable(size):
    for unit in ("bytes", "kB", "MB"):
        if size < 1000:
            return f"{size:.1f} {unit}" if unit != "bytes" else f"{size} bytes"
        size /= 1000
    return f"{size:.2f} GB"
