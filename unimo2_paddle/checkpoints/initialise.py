"""A UNIMO-2 or UNIMO model that starts from PaddleNLP's RoBERTa and, UNIMO-2, PaddleClas' ViT weights (``unimo2 init``).

Decisions, each where the two worlds differ:

- **Both language encoders.** RoBERTa's layers go to the text and to the grounded encoder, layer i to layer i; a config with a
  6 + 6 split (``text_enc_layers``, ``grounding_enc_layers``) therefore gets the lower and the upper half.
- **Token types.** RoBERTa adds the embedding of token type 0 to every token; UNIMO-2 has no such table. It is added to every
  row of the position table, not of the word table, which is also the output matrix of the masked-word head.
- **Vocabulary.** The authors' vocab.txt numbers the pieces as English RoBERTa does (0 [CLS] is <s>, 1 [PAD], 2 [SEP] is </s>,
  3 [UNK], then the same pieces in the same order, [MASK] last), so rows are taken in order. If the weights have a
  ``vocab.json`` beside them and the model's vocabulary is given, rows are matched by piece instead, whatever their order.
- **Positions** start at 2 in both; weights made with another padding id (Chinese BERT vocabularies) are refused.
- **Patch padding.** PaddleClas cuts patches without padding, the authors pad by 7 pixels and so shift the patches. The filters
  are taken as they are: they see the same picture 7 pixels further down and right, which pre-training absorbs. Epsilon is
  1e-12 in the authors' ViT and 1e-6 in PaddleClas': outputs differ by about 1e-6.
- **Position grid.** A table for another grid (384-pixel weights have 24 x 24) is resized bicubically, as the model itself does.
- **UNIMO** has one encoder, which gets RoBERTa's layers; its region embedding keeps initial values.
- Poolers, matching head, codebook, the grounded tokens' norm and temperatures have no counterpart: they keep initial values.
"""
import os
from typing import Dict, NamedTuple

import numpy as np

from unimo2_paddle.checkpoints.convert import locate, read_json, write_checkpoint
from unimo2_paddle.checkpoints.pdparams import read_pdparams
from unimo2_paddle.checkpoints.released import parameter_arrays
from unimo2_paddle.errors import CheckpointError
from unimo2_paddle.models.configuration import Unimo2Config, load_config

_ROBERTA_LINEARS = {
    "self_attn.q_proj": "multi_head_att_query_fc", "self_attn.k_proj": "multi_head_att_key_fc",
    "self_attn.v_proj": "multi_head_att_value_fc", "self_attn.out_proj": "multi_head_att_output_fc",
    "linear1": "ffn_fc_0", "linear2": "ffn_fc_1",
}
_ROBERTA_NORMS = {"norm1": "post_att", "norm2": "post_ffn"}
_VIT_LINEARS = {"attn.proj": "multi_head_att_output_fc", "mlp.fc1": "ffn_fc_0", "mlp.fc2": "ffn_fc_1"}
_VIT_NORMS = {"norm1": "pre_att", "norm2": "pre_ffn"}
_SPECIAL_TOKENS = {"[CLS]": "<s>", "[PAD]": "<pad>", "[SEP]": "</s>", "[UNK]": "<unk>", "[MASK]": "<mask>"}


def initialise(target, config, roberta=None, vit=None, seed=1, roberta_vocab=None, vocab_file=None, encoder_json=None):
    """Write our own checkpoint directory, initialised from other libraries' weights.

    Args:
        target: directory to create; it must not exist.
        config: ``Unimo2Config``, ``UnimoConfig`` or path of its JSON file: the model to write.
        roberta: PaddleNLP RoBERTa weights, ``.pdparams`` or a directory with ``model_state.pdparams``.
        vit: PaddleClas VisionTransformer weights, ``.pdparams``.
        seed: of the parameters that no source provides.
        roberta_vocab: ``vocab.json`` (piece to row) of the RoBERTa weights; default: the one beside them, if any.
        vocab_file, encoder_json: the model's own vocabulary; with both, rows are matched to ``roberta_vocab`` by piece.

    Returns:
        str: what came from where, for the screen.

    Raises:
        CheckpointError: target in use, unreadable weights, or the list of all shapes that do not fit.
    """
    if roberta is None and vit is None:
        raise CheckpointError("nothing to start from: give RoBERTa weights (--roberta), ViT weights (--vit) or both")
    if os.path.lexists(target):
        raise CheckpointError(f"{target} exists already; nothing is overwritten. Choose another path or move it away.")
    config = load_config(config)
    rooms = _rooms(config)
    if vit is not None and not isinstance(config, Unimo2Config):
        raise CheckpointError("UNIMO has no visual Transformer, its images are detector regions: leave --vit out")
    language = None if roberta is None else _read_weights(roberta, "roberta.")
    visual = None if vit is None else _read_weights(vit)
    initial = _random_parameters(config, seed)
    new, report, problems = {}, [], []
    if language is not None:
        path, arrays = language
        _check_roberta_config(path, config, rooms, problems)
        new.update(_roberta_parameters(path, arrays, rooms, problems))
        rows, how = _row_order(path, roberta_vocab, vocab_file, encoder_json)
        for name in (f"{rooms.embeddings}word_embedding", f"{rooms.head}mask_lm_out_fc.b_0"):
            if rows is not None and name in new:
                new[name] = _reordered(name, new[name], initial[name], rows, problems)
        used = [f"{title} ({_layers_used(arrays, 'encoder.layers.', layers)})" for title, (_, layers) in rooms.encoders.items()]
        report.append(f"{' and '.join(used)} from {path}; {how}")
    if visual is not None:
        path, arrays = visual
        new.update(_vit_parameters(path, arrays, config, problems))
        used = _layers_used(arrays, "blocks.", range(config.vit_num_hidden_layers))
        report.append(f"visual encoder ({used}) from {path}; filters as they are, though patches here are shifted by "
                      f"{(config.resolution - 1) // 2} pixels; position grid {config.position_grid}x{config.position_grid}")
    new = {name: array for name, array in new.items() if name in initial}  # the config may leave a head out
    problems += [f"{name}: the config needs {list(initial[name].shape)}, the weights give {list(array.shape)}"
                 for name, array in sorted(new.items()) if array.shape != initial[name].shape]
    if problems:
        listing = "\n".join(f"  {line}" for line in problems)
        raise CheckpointError(f"the weights do not fit the config, {len(problems)} problems:\n{listing}")
    merged = {name: np.asarray(new.get(name, array), array.dtype) for name, array in initial.items()}
    write_checkpoint(target, merged, config.to_dict())
    rest = sorted(set(initial) - set(new))
    report.append(f"{len(new)} of {len(initial)} parameters converted; at their initial values (seed {seed}): "
                  f"{', '.join(rest) or 'none'}")
    return f"wrote {target}\n" + "\n".join(report)


def _random_parameters(config, seed):
    import paddle

    from unimo2_paddle.models.unimo import UnimoModel
    from unimo2_paddle.models.unimo2 import Unimo2Model

    paddle.seed(seed)
    with paddle.utils.unique_name.guard():
        return parameter_arrays((Unimo2Model if isinstance(config, Unimo2Config) else UnimoModel)(config))


class _Rooms(NamedTuple):
    """Where RoBERTa's weights go in a system: prefixes of the embeddings and the masked-word head, and ``{title: (prefix, layers)}``."""

    embeddings: str
    head: str
    encoders: Dict[str, tuple]


def _rooms(config):
    if isinstance(config, Unimo2Config):
        return _Rooms("text.", "grounded.", {"text encoder": ("text.", config.text_enc_layers),
                                             "grounded encoder": ("grounded.", config.grounding_enc_layers)})
    return _Rooms("", "", {"encoder": ("", range(config.num_hidden_layers))})


def _read_weights(path, prefix=""):
    """Arrays of a pdparams file by the names their library gives them, without ``prefix`` where they have it."""
    kind, file = locate(os.fspath(path))
    if kind != "pdparams":
        raise CheckpointError(f"{path}: weights of PaddleNLP and PaddleClas are .pdparams files, or a directory with "
                              "model_state.pdparams; this is something else")
    arrays = read_pdparams(file).arrays
    return file, {name[len(prefix):] if name.startswith(prefix) else name: array for name, array in arrays.items()}


def _take(path, arrays, names, problems):
    """The arrays that ``names`` (theirs -> ours) asks for, under our names; absent ones are noted as problems."""
    problems += [f"{path}: {theirs} is missing" for theirs in names if theirs not in arrays]
    return {ours: arrays[theirs] for theirs, ours in names.items() if theirs in arrays}


def _layer_names(theirs, ours, linears, norms):
    """Names of one layer's fully connected layers and norms, theirs -> ours."""
    names = {}
    for a, b in linears.items():
        names.update({f"{theirs}.{a}.weight": f"{ours}_{b}.w_0", f"{theirs}.{a}.bias": f"{ours}_{b}.b_0"})
    for a, b in norms.items():
        names.update({f"{theirs}.{a}.weight": f"{ours}_{b}_layer_norm_scale",
                      f"{theirs}.{a}.bias": f"{ours}_{b}_layer_norm_bias"})
    return names


def _layers_used(arrays, prefix, used):
    there = {name[len(prefix):].split(".", 1)[0] for name in arrays if name.startswith(prefix)}
    return f"{len(list(used))} of {len(there)} layers"


# ---- RoBERTa ----


def _check_roberta_config(path, config, rooms, problems):
    """Compare with the model what the weights' own config.json says and shapes cannot show."""
    file = os.path.join(os.path.dirname(path), "config.json")
    if not os.path.exists(file):
        return
    stored = read_json(file)
    prefix = rooms.embeddings.replace(".", "_")  # of the config's keys: text_ in UNIMO-2, none in UNIMO
    wanted = [("num_attention_heads", getattr(config, f"{prefix}num_attention_heads"), f"{prefix}num_attention_heads of the model"),
              ("hidden_act", getattr(config, f"{prefix}hidden_act"), f"{prefix}hidden_act of the model"),
              ("pad_token_id", 1, "with it positions start at 2, as they do here")]
    if "grounded encoder" in rooms.encoders:
        wanted.insert(1, ("num_attention_heads", config.num_attention_heads, "num_attention_heads of the model's grounded encoder"))
    problems += [f"{file}: {key} is {stored[key]!r}, needed is {value!r} ({why})"
                 for key, value, why in wanted if key in stored and stored[key] != value]


def _roberta_parameters(path, arrays, rooms, problems):
    text, head = rooms.embeddings, rooms.head
    names = {"embeddings.word_embeddings.weight": f"{text}word_embedding",
             "embeddings.position_embeddings.weight": f"{text}pos_embedding",
             "embeddings.layer_norm.weight": f"{text}pre_encoder_layer_norm_scale",
             "embeddings.layer_norm.bias": f"{text}pre_encoder_layer_norm_bias"}
    if "lm_head.dense.weight" in arrays:
        bias = "lm_head.bias" if "lm_head.bias" in arrays else "lm_head.decoder.bias"
        names.update({"lm_head.dense.weight": f"{head}mask_lm_trans_fc.w_0",
                      "lm_head.dense.bias": f"{head}mask_lm_trans_fc.b_0",
                      "lm_head.layer_norm.weight": f"{head}mask_lm_trans_layer_norm_scale",
                      "lm_head.layer_norm.bias": f"{head}mask_lm_trans_layer_norm_bias", bias: f"{head}mask_lm_out_fc.b_0"})
    new = _take(path, arrays, names, problems)
    for prefix, layers in rooms.encoders.values():
        for layer in layers:
            names = _layer_names(f"encoder.layers.{layer}", f"{prefix}encoder_layer_{layer}", _ROBERTA_LINEARS, _ROBERTA_NORMS)
            new.update(_take(path, arrays, names, problems))
    types, positions = arrays.get("embeddings.token_type_embeddings.weight"), new.get(f"{text}pos_embedding")
    if types is not None and positions is not None:
        if types.ndim == positions.ndim == 2 and len(types) and types.shape[1] == positions.shape[1]:
            new[f"{text}pos_embedding"] = positions + types[0]
        else:
            problems.append(f"{path}: token types {list(types.shape)} and positions {list(positions.shape)} do not match")
    return new


def _row_order(path, roberta_vocab, vocab_file, encoder_json):
    """RoBERTa's row (-1: none) for every row of the model's word table, or None for the same order; and a sentence on it."""
    beside = os.path.join(os.path.dirname(path), "vocab.json")
    if roberta_vocab is None and os.path.exists(beside):
        roberta_vocab = beside
    if vocab_file is None or encoder_json is None or roberta_vocab is None:
        return None, "word rows in the order of the weights, which is the authors' for English RoBERTa"
    pieces = {str(number): piece for piece, number in read_json(encoder_json).items()}
    try:
        with open(vocab_file, encoding="utf-8") as file:
            lines = file.read().split()
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"cannot read the vocabulary {vocab_file}: {error}") from error
    theirs = read_json(roberta_vocab)
    rows = [theirs.get(pieces.get(line) or _SPECIAL_TOKENS.get(line, line), -1) for line in lines]
    known = sum(isinstance(row, int) and row >= 0 for row in rows)
    if not known or not all(isinstance(row, int) for row in rows):
        raise CheckpointError(f"{roberta_vocab} does not give the row numbers of the pieces in {vocab_file}")
    same = rows == list(range(len(rows)))
    return np.array(rows), (f"word rows matched by piece ({'the same order' if same else 'another order'}; "
                            f"{len(rows) - known} of {len(rows)} pieces are not in {roberta_vocab} and stay random)")


def _reordered(name, array, initial, rows, problems):
    if len(rows) != len(initial) or rows.max() >= len(array) or array.shape[1:] != initial.shape[1:]:
        problems.append(f"{name}: the model has {list(initial.shape)}, its vocabulary {len(rows)} entries, the weights "
                        f"{list(array.shape)} of which row {rows.max()} is needed")
        return initial
    result = initial.astype(array.dtype)
    result[rows >= 0] = array[rows[rows >= 0]]
    return result


# ---- ViT ----


def _vit_parameters(path, arrays, config, problems):
    new = _take(path, arrays, {
        "patch_embed.proj.weight": "vit.patch_embeddings_projection_weight",
        "patch_embed.proj.bias": "vit.patch_embeddings_projection_bias",
        "cls_token": "vit.cls_token_embeddings", "pos_embed": "vit.position_embeddings",
        "norm.weight": "vit.post_encoder_layer_norm_scale", "norm.bias": "vit.post_encoder_layer_norm_bias"}, problems)
    positions = new.get("vit.position_embeddings")
    if positions is not None:
        new["vit.position_embeddings"] = _resized_positions(path, positions, config.position_grid, problems)
    for layer in range(config.vit_num_hidden_layers):
        theirs, ours = f"blocks.{layer}", f"vit.encoder_layer_{layer}"
        new.update(_take(path, arrays, _layer_names(theirs, ours, _VIT_LINEARS, _VIT_NORMS), problems))
        joint = arrays.get(f"{theirs}.attn.qkv.weight")
        if joint is None or joint.ndim != 2 or joint.shape[1] % 3:
            problems.append(f"{path}: {theirs}.attn.qkv.weight is missing or not [width, 3 x width]")
            continue
        bias = arrays.get(f"{theirs}.attn.qkv.bias", np.zeros(joint.shape[1], joint.dtype))  # PaddleClas may leave it out
        for part, w, b in zip(("query", "key", "value"), np.split(joint, 3, axis=1), np.split(bias, 3)):
            new[f"{ours}_multi_head_att_{part}_fc.w_0"], new[f"{ours}_multi_head_att_{part}_fc.b_0"] = w, b
    return new


def _resized_positions(path, table, grid, problems):
    stored = round((table.shape[1] - 1) ** 0.5) if table.ndim == 3 and table.shape[1] > 1 else 0
    if stored < 1 or stored * stored + 1 != table.shape[1] or len(table) != 1:
        problems.append(f"{path}: pos_embed {list(table.shape)} is not a [CLS] position and a square grid")
        return table
    if stored == grid:
        return table
    import paddle

    from unimo2_paddle.models.vision import resize_position_embeddings

    return resize_position_embeddings(paddle.to_tensor(np.asarray(table, "float32")), grid).numpy()
