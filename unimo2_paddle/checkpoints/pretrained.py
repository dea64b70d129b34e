"""Whole models from and to disk: ``save_pretrained`` and ``from_pretrained``."""
import difflib
import logging
import os
from typing import Any, Mapping, Sequence, Union

import paddle

from unimo2_paddle.checkpoints.convert import config_by_shapes, locate, read_checkpoint, write_checkpoint
from unimo2_paddle.checkpoints.released import assign_parameters, match_parameters, parameter_arrays
from unimo2_paddle.checkpoints.zoo import PREFIX, entries, fetch, find
from unimo2_paddle.errors import CheckpointError
from unimo2_paddle.models import unimo, unimo2
from unimo2_paddle.models.configuration import UnimoConfig, load_config
from unimo2_paddle.paths import PathLike

logger = logging.getLogger(__name__)

_HEAD_PREFIXES = {"pooling": "grounded.pooled_fc_text.", "matching": "grounded.img_text_matching_fc.",
                  "masked_lm": "grounded.mask_lm_", "masked_grounding": "grounded.mask_g_"}
_UNIMO_HEAD_PREFIXES = {"pooling": "pooled_fc_text.", "matching": "match_fc.", "masked_lm": "mask_lm_", "masked_region": "mask_region_"}


def save_pretrained(model: Union[unimo2.Unimo2Model, unimo.UnimoModel], directory: PathLike) -> None:
    """Write a model as our own directory: ``config.json`` and ``model.safetensors`` keyed by the authors' variable names.

    Args:
        model: a ``Unimo2Model`` or ``UnimoModel``.
        directory: path to create; it must not exist or be an empty directory.

    Raises:
        CheckpointError: if the directory is in use or cannot be written; nothing is left half-written.
    """
    write_checkpoint(directory, parameter_arrays(model), model.config.to_dict())


def from_pretrained(name_or_directory: PathLike,
                    config: Union[unimo2.Unimo2Config, UnimoConfig, Mapping[str, Any], str, None] = None,
                    allow_missing: Sequence[str] = ()) -> Union[unimo2.Unimo2Model, unimo.UnimoModel]:
    """Build a model and load its weights.

    Our own directory says by its variables which parts the model has (a text-only model or one without some head is built as
    it was saved). The authors' directories hold what their program needed, so there the whole model is built (UNIMO: with the
    poolers and the masked_lm head, as it was pre-trained) and what is missing is an error.

    Args:
        name_or_directory: our own directory, an authors' directory, a ``.safetensors`` or ``.pdparams`` file, or a model's name in the zoo
            (with or without ``zoo:``), which is downloaded when it is not in the cache; what exists on the disk goes before a name.
        config: ``Unimo2Config``, ``UnimoConfig``, dict or JSON path; default: the checkpoint's ``config.json``, or else worked out from the
            shapes (attention heads of 64 are assumed, and the log says so).
        allow_missing: name patterns of parameters that may be missing or mis-shaped and keep their initial values.

    Returns:
        Unimo2Model or UnimoModel, whichever the config is of, in eval mode.

    Raises:
        CheckpointError: unknown name, damaged checkpoint, or the list of parameters that do not fit.
        ZooError, DownloadError: the named weights are not in the cache and cannot be fetched.
        ConfigError: an unusable config.
    """
    path = checkpoint_path(os.fspath(name_or_directory))
    kind, _ = locate(path)
    arrays, stored_config, _ = read_checkpoint(path)
    config = _chosen_config(path, arrays, stored_config, config)
    with paddle.utils.unique_name.guard():
        model = _build(config, arrays, as_saved=kind == "safetensors")
    stored = {name: (array.shape, array.dtype) for name, array in arrays.items()}
    report = match_parameters(model, stored, path, allow_missing)
    assign_parameters(model, {name: arrays[name] for name in report.loaded})
    if report.missing or report.mismatched or report.unexpected:
        logger.info("%s: %s", path, report)
    model.eval()
    return model


def checkpoint_path(given):
    """The path of a checkpoint on this disk, or of the zoo's model of this name, which is fetched; raises as :func:`from_pretrained`."""
    name = given[len(PREFIX):] if given.startswith(PREFIX) else given
    if not given.startswith(PREFIX):
        if os.path.exists(given):
            return given
        known = entries()
        if given not in known:
            models = [one for one, entry in known.items() if entry.kind == "model"]
            close = difflib.get_close_matches(given, models, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"its models: {', '.join(models)}"
            raise CheckpointError(f"{given!r} is neither a directory nor a file, nor a model of the zoo; {hint}")
    if find(name).kind != "model":
        raise CheckpointError(f"{name!r} is {find(name).kind} in the zoo, no model; unimo2 zoo list --kind model shows the models")
    return fetch(name)


def _build(config, names, as_saved):
    """The model of ``config`` with every part, or with the parts that the variables ``names`` show."""
    of_unimo = isinstance(config, UnimoConfig)
    make, region, prefixes = ((unimo.UnimoModel, "image_emb.", _UNIMO_HEAD_PREFIXES) if of_unimo
                              else (unimo2.Unimo2Model, "vit.", _HEAD_PREFIXES))
    stored = [head for head, prefix in prefixes.items() if any(name.startswith(prefix) for name in names)]
    if as_saved:
        return make(config, vision=any(name.startswith(region) for name in names), heads=stored)
    # UNIMO's matching head exists only after retrieval finetuning
    return make(config, heads=["pooling", "masked_lm"] + ["matching"] * ("matching" in stored)) if of_unimo else make(config)


def _chosen_config(path, arrays, stored, given):
    if given is not None:
        return load_config(given)
    if stored is not None:
        return load_config(stored, source=f"the config.json of {path}")
    config, note = config_by_shapes(arrays)
    if config is None:
        raise CheckpointError(f"{path}: {note}. Give the config the checkpoint was made with (config=...).")
    logger.warning("%s: %s", path, note)
    return config
