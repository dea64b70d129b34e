#!/usr/bin/env python3
"""Check this implementation against golden vectors made with the authors' code: ``python tools/check_golden.py DIR``.

DIR holds ``*.npz`` cases and ``tiny_config.json``. A case's family follows from the arrays it has, its settings from its ``set/`` keys,
else from array shapes and parameter names, else from the defaults of the vectors' notes. Prints one line per quantity and exits 1
when one is outside its tolerance.
"""
import argparse
import json
import re
import sys
import zlib  # noqa: F401  before paddle, see unimo2_paddle/__init__.py
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

import numpy as np  # noqa: E402

FORWARD, GRADIENT, SCORE, EXACT = 1e-5, 1e-4, 1e-4, 0.0


class Case:
    """One npz file with its config, and the comparison rows collected for it."""

    def __init__(self, path, config_path):
        self.name, self.path = path.stem, path
        with np.load(path) as arrays:
            self.arrays = {key: arrays[key] for key in arrays.files}
        self.config_path = config_path
        self.rows = []

    def __contains__(self, key):
        return key in self.arrays

    def __getitem__(self, key):
        return self.arrays[key]

    def keys(self, prefix):
        return [key for key in self.arrays if key.startswith(prefix)]

    def setting(self, key, default=None):
        """The value of ``set/<key>``, or the default."""
        if f"set/{key}" not in self:
            return default
        value = self[f"set/{key}"]
        return value.item() if value.size == 1 else value.tolist()

    def tensor(self, key):
        """An input as a paddle tensor; ids lose their trailing axis of length 1, masks their middle one."""
        import paddle

        value = self[f"in/{key}"]
        if value.dtype.kind in "iu" and value.ndim > 1 and value.shape[-1] == 1:
            value = value[..., 0].astype("int64")
        if key == "text_mask":
            value = value[:, 0]
        return paddle.to_tensor(value)

    def check(self, quantity, value, key=None, tolerance=FORWARD, shape=None):
        """Compare ``value`` with ``out/<quantity>`` (or ``key``) when the case has it."""
        key = key or f"out/{quantity}"
        if key not in self:
            return
        expected = self[key]
        value = np.asarray(value.numpy() if hasattr(value, "numpy") else value)
        if value.size != expected.size:
            self.rows.append((quantity, float("inf"), tolerance))
            return
        value = value.reshape(expected.shape).astype("float64")
        self.rows.append((quantity, float(np.abs(value - expected).max()) if value.size else 0.0, tolerance))

    def config(self):
        """The tiny config with this case's switches."""
        from unimo2_paddle import Unimo2Config

        params = {key[6:] for key in self.keys("param/")}
        overrides = {
            "grounding_counts_padding": True,
            "model_type": "grounded" if "vq_emb" in params else "baseline",
            "with_grounding_projection": "grounded.grounding_patch_projection.w_0" in params,
            "with_cmcl_projection": "grounded.cmcl_pooled_fc_text.w_0" in params,
            "weight_sharing": "grounded.mask_lm_out_fc.w_0" not in params,
            "with_grounding_pos": "grounding_pos" in self.name,
            "with_grounding_mask": "grounded.mask_g_trans_fc.w_0" in params,
        }
        if "shared" in self.name:
            overrides.update(with_cmcl_projection=True, cmcl_share_parameters=True)
        for key in self.keys("in/image_pixel"):
            overrides["image_size"] = int(self[key].shape[1])
        base = Unimo2Config.from_json(self.config_path)
        if "out/grounded_encoding_indices" in self and self["out/grounded_encoding_indices"].shape[1] > base.topk_value:
            overrides["grounding_method"] = "normal"
        for key in base.to_dict():
            if f"set/{key}" in self:
                overrides[key] = self.setting(key)
        return Unimo2Config.from_json(self.config_path, **overrides)

    def load(self, *layers):
        """Put the case's parameters into the layers (by parameter name)."""
        missing = []
        for layer in layers:
            for parameter in layer.parameters():
                key = f"param/{parameter.name}"
                if key in self:
                    parameter.set_value(self[key])
                else:
                    missing.append(parameter.name)
        # captioning and classification programs have no temperature, image-only programs no text encoder
        without_text = not any("_ids" in key for key in self.keys("in/"))
        needed = [n for n in missing if n != "cmcl_temperature" and not (without_text and n.startswith("text."))]
        if needed:
            raise SystemExit(f"{self.name}: the case has no value for {sorted(needed)}")

    def model(self, config):
        """A model with exactly the heads whose parameters the case has."""
        import paddle

        from unimo2_paddle import Unimo2Model

        markers = {"pooling": "pooled_fc_text", "matching": "img_text_matching_fc", "masked_lm": "mask_lm_trans_fc",
                   "masked_grounding": "mask_g_trans_fc"}
        heads = [head for head, name in markers.items() if f"param/grounded.{name}.w_0" in self]
        with paddle.utils.unique_name.guard():
            model = Unimo2Model(config, vision="param/vit.cls_token_embeddings" in self, heads=heads)
        self.load(model)
        model.eval()
        return model

    def check_hypotheses(self, found, special):
        """Compare the hypotheses of a beam search, their scores after every token, and the best without ``special`` ids."""
        shape = self["out/hyp_ids"].shape
        ids, scores = np.full(shape, -1, dtype="int64"), np.zeros(shape)
        best = np.full(self["out/best_ids"].shape, -1, dtype="int64")
        for row, hypotheses in enumerate(found):
            for k, hypothesis in enumerate(hypotheses):
                ids[row, k, :len(hypothesis.ids)] = hypothesis.ids
                scores[row, k, :len(hypothesis.ids)] = hypothesis.scores
            words = hypotheses[0].tokens(special)
            best[row, :len(words)] = words
        self.check("hyp_ids", ids, tolerance=EXACT)
        self.check("hyp_scores", scores, tolerance=SCORE)
        self.check("best_ids", best, tolerance=EXACT)
        self.check("best_score", [hypotheses[0].scores[-1] for hypotheses in found], tolerance=SCORE)

    def check_gradients(self, *layers):
        """Compare the gradients of all parameters that the case has gradients for."""
        gradients = {p.name: p.grad for layer in layers for p in layer.parameters()}
        for key in self.keys("grad/"):
            if key[5:] in gradients and gradients[key[5:]] is not None:
                self.check(f"grad {key[5:]}", gradients[key[5:]], key, GRADIENT)
            elif np.abs(self[key]).max() > 0:
                self.rows.append((f"grad {key[5:]} (none computed)", float("inf"), GRADIENT))


def text_inputs(case):
    """Keyword arguments of the text side, empty when the case has none."""
    if "in/src_ids" not in case:
        return {}
    return {"input_ids": case.tensor("src_ids"), "position_ids": case.tensor("pos_ids"), "text_mask": case.tensor("text_mask")}


def check_output(case, out):
    """Compare everything a forward returns."""
    for quantity, value in (("vit_enc_out", out.image_states), ("text_enc_out", out.text_states), ("grounded_enc_out", out.grounded_tokens),
                            ("vq_loss", out.grounding_loss), ("enc_v_out", out.fused_image), ("enc_g_out", out.fused_grounded),
                            ("enc_l_out", out.fused_text)):
        if value is not None:
            case.check(quantity, value)
    if out.grounded_ids is not None:
        case.check("grounded_encoding_indices", out.grounded_ids, tolerance=EXACT)


def run_forward(case):
    """Forward of image, text or both, with pooled features, scores, and gradients of CE(matching) + dictionary loss."""
    import paddle.nn.functional as F

    model = case.model(case.config())
    inputs = text_inputs(case)
    if "in/image_pixel_input" in case:
        inputs["image"] = case.tensor("image_pixel_input")
    out = model(**inputs)
    check_output(case, out)
    if "pooling" in model.heads:
        if out.fused_text is not None:
            case.check("pooled_text", model.pool_text(out))
        if out.fused_image is not None and model.vision is not None:
            case.check("pooled_image", model.pool_image(out))
    if "matching" in model.heads and out.fused_text is not None and out.fused_image is not None:
        logits = model.matching_logits(out)
        case.check("itm_logits", logits)
        case.check("cmcl_scores", model.contrastive_score(out))
        case.check("score", model.retrieval_score(out))
        if case.keys("grad/"):
            matching = F.cross_entropy(logits, case.tensor("labels"))
            loss = matching + out.grounding_loss
            case.check("itm_loss", matching)
            case.check("loss", loss)
            loss.backward()
            case.check_gradients(model)


def topk_accuracy(logits, label, k=5):
    """Share of rows whose label is among the k best columns (``label``: int array [B])."""
    best = np.argsort(-logits, axis=1, kind="stable")[:, :k]
    return float(np.mean([label[i] in best[i] for i in range(len(label))]))


def run_pretraining(case):
    """Pre-training heads: masked words, contrastive (within and across), matching, masked grounded tokens, total and gradients."""
    import paddle
    import paddle.nn.functional as F

    from unimo2_paddle.models.losses import contrastive_loss, masked_mean

    config = case.config()
    model = case.model(config)
    size, length = case["in/src_ids"].shape[:2]
    token_mask = None
    if "in/grounding_is_mask" in case:
        token_mask = paddle.to_tensor(case["in/grounding_is_mask"].reshape(size, -1))
    out = model(image=case.tensor("image_pixel_input"), token_mask=token_mask, **text_inputs(case))
    check_output(case, out)
    case.check("pooled_text", model.pool_text(out))
    case.check("pooled_image", model.pool_image(out))
    multimodal = paddle.to_tensor(case["in/is_multimodal"].ravel())
    labels = case["in/match_labels"].ravel()
    pair = paddle.to_tensor(labels.astype("float32")) * multimodal

    total = []
    positions = case["in/mask_pos"].ravel()
    states = paddle.index_select(out.fused_text.reshape([-1, config.hidden_size]), paddle.to_tensor(positions.astype("int64")))
    word_loss = F.cross_entropy(model.mlm_logits(states), case.tensor("mask_label"), reduction="none").reshape([-1])
    flags = case["in/lm_loss_flag"].ravel() * case["in/with_text"].ravel()[positions // length]
    default_weight = 0.7 if case.name.startswith("case06a") else 1.0
    sample_weight = np.where(case["in/is_multimodal"].ravel() > 0, case.setting("mm_lr_weight", default_weight), 1.0)[positions // length]
    # the authors' [M, 1] * [M] broadcast makes the mean weight multiply the whole loss
    mlm = masked_mean(word_loss, paddle.to_tensor(flags.astype("float32"))) * float(sample_weight.mean())
    case.check("mlm_loss", mlm)
    total.append(mlm)

    for kind, normalise in (("cmcl", "image"), ("cmcl_cross", "none")):
        image, text = model.contrastive_features(out.image_states, out.text_states, normalise)
        loss, image_logits, _ = contrastive_loss(image, text, model.temperature(), pair)
        # they leave no trace when no sample has both sides
        case.check(f"{kind}_loss", loss if float(multimodal.sum()) else paddle.zeros([]))
        check_contrastive_accuracy(case, kind, image_logits.numpy(), pair.numpy(), multimodal.numpy())
        if kind == "cmcl":
            total.append(loss)

    logits = model.matching_logits(out, fusion=case.setting("fusion", "sum" if "sum" in case.name else "mul"))
    itm = masked_mean(F.cross_entropy(logits, paddle.to_tensor(labels), reduction="none").reshape([-1]), multimodal)
    case.check("itm_loss", itm)
    correct = (logits.numpy().argmax(axis=1) == labels) * multimodal.numpy()
    case.check("itm_acc", correct.sum() / max(multimodal.numpy().sum(), 1e-12))
    total.append(itm)
    if out.grounding_loss is not None:
        total.append(out.grounding_loss)
    if token_mask is not None:
        masked = np.flatnonzero(case["in/grounding_is_mask"])
        case.check("grounding_mask_pos", masked, tolerance=EXACT)
        picked = paddle.to_tensor(masked)
        hidden = paddle.index_select(out.fused_grounded.reshape([-1, config.hidden_size]), picked)
        loss = F.cross_entropy(model.masked_grounding_logits(hidden), paddle.index_select(out.grounded_ids.reshape([-1]), picked))
        case.check("mask_grounding_loss", loss)
        total.append(loss)
    total = sum(total[1:], total[0])
    case.check("total", total)
    if case.keys("grad/"):
        total.backward()
        case.check_gradients(model)


def check_contrastive_accuracy(case, kind, logits, pair, multimodal):
    """Top-5 accuracies as the authors log them: text-to-image ranks the rows of the column softmax (not transposed)."""
    count = max(pair.sum(), 1e-12)
    for direction, axis in (("img2txt", 1), ("txt2img", 0)):
        shifted = np.exp(logits - logits.max(axis=axis, keepdims=True))
        best = np.argsort(-(shifted / shifted.sum(axis=axis, keepdims=True)), axis=1, kind="stable")[:, :5]
        hits = np.array([row in best[row] for row in range(len(best))], dtype="float64")
        case.check(f"{kind}_{direction}_acc", (hits * pair).sum() / count if multimodal.sum() else 0.0)


def run_circle(case):
    """Circle loss on given scores with every (margin, scale) that the case's output names hold; gradients for the first."""
    import paddle

    from unimo2_paddle.models.losses import retrieval_circle_loss

    gradient_of = case.setting("grad_of", "m0.2_s1")
    for key in case.keys("out/loss_total_"):
        tag = key[len("out/loss_total_"):]
        margin, scale = (float(v) for v in re.fullmatch(r"m([\d.]+)_s([\d.]+)", tag).groups())
        parts = [paddle.to_tensor(case[f"in/{name}"], stop_gradient=False) for name in ("positive", "image_neg", "caption_neg")]
        total, caption, image = retrieval_circle_loss(paddle.concat(parts, axis=1), margin, scale)
        for name, value in (("total", total), ("caption", caption), ("image", image)):
            case.check(f"loss_{name}_{tag}", value)
        if tag == gradient_of:
            total.backward()
            for name, part in zip(("positive", "image_neg", "caption_neg"), parts):
                case.check(f"grad {name}", part.grad, f"grad/{name}", GRADIENT)


def run_retrieval_training(case):
    """Scores of 1 + N image negatives + N caption negatives per sample, circle loss, accuracy, gradients."""
    import paddle

    from unimo2_paddle.models.losses import retrieval_circle_loss

    model = case.model(case.config())
    image = paddle.to_tensor(case["in/image_pixel_unique"][case["in/image_index"].ravel()])
    out = model(image=image, **text_inputs(case))
    case.check("itm_logits", model.matching_logits(out))
    case.check("cmcl_scores", model.contrastive_score(out))
    scores = model.retrieval_score(out).reshape([case["in/labels"].shape[0], -1])
    case.check("score", scores)
    loss = retrieval_circle_loss(scores, case.setting("margin", 0.2), case.setting("scale", 1.0))[0]
    case.check("loss", loss)
    case.check("acc", (scores.numpy().argmax(axis=1) == case["in/labels"].ravel()).mean())
    loss.backward()
    case.check_gradients(model)


def run_classifier(case):
    """Text classification: logits, loss, probabilities, accuracy."""
    import paddle
    import paddle.nn.functional as F

    from unimo2_paddle.models.heads import ClassificationHead

    config = case.config()
    model = case.model(config)
    prefix = "cls_out_new" if "param/cls_out_new_w" in case else "cls_out"
    with paddle.utils.unique_name.guard():
        head = ClassificationHead(config.hidden_size, case[f"param/{prefix}_w"].shape[1], prefix=prefix)
    case.load(head)
    head.eval()
    out = model(**text_inputs(case))
    logits, labels = head(model.pool_text(out)), case.tensor("labels")
    probabilities = F.softmax(logits)
    case.check("logits", logits)
    case.check("probs", probabilities)
    case.check("pred_probs", probabilities)
    loss = F.cross_entropy(logits, labels)
    case.check("loss", loss)
    case.check("accuracy", (logits.numpy().argmax(axis=1) == labels.numpy()).mean())
    case.check("num_seqs", len(labels), tolerance=EXACT)
    if case.keys("grad/"):
        loss.backward()
        case.check_gradients(model, head)


def run_caption_training(case):
    """Caption loss over objects ++ caption under the sequence-to-sequence mask, with gradients."""
    import paddle

    from unimo2_paddle.models.losses import smoothed_cross_entropy

    config = case.config()
    model = case.model(config)
    out = model(image=case.tensor("image_pixel"), input_ids=case.tensor("token_ids"), position_ids=case.tensor("position_ids"),
                text_mask=case.tensor("token_seq_mask"), layout="caption")
    check_output(case, out)
    positions = paddle.to_tensor(case["in/tgt_pos"].ravel().astype("int64"))
    logits = model.mlm_logits(paddle.index_select(out.fused_text.reshape([-1, config.hidden_size]), positions))
    case.check("logits", logits)
    smoothing = case.setting("label_smooth", 0.0 if "nosmooth" in case.name else 0.1)
    loss = smoothed_cross_entropy(logits, case.tensor("tgt_label"), smoothing)
    case.check("loss", loss)
    loss.backward()
    case.check_gradients(model)


def run_decoding(case):
    """Beam search from image and object tags: all hypotheses, their score after every token, and the best caption."""
    import paddle

    from unimo2_paddle.models.generation import Decoding, generate

    model = case.model(case.config())
    options = Decoding(
        beam_size=case.setting("beam_size"), length_penalty=case.setting("length_penalty"), min_length=case.setting("min_out_len"),
        max_length=case.setting("max_out_len"), block_trigrams=case.setting("block_trigram"), attend_padded_tags=True)
    start, end = int(case["in/tgt_word"].ravel()[0]), case.setting("eos_id")
    tags = case.tensor("obj_token_ids"), case.tensor("obj_pos_ids"), paddle.to_tensor(case["in/obj_token_mask"][:, 0])
    found = generate(model, case.tensor("image_pixel"), start, end, options, tags, case["in/is_full_token"] > 0)
    case.check_hypotheses(found, special=(start, 1, end))  # [PAD] is 1 in the authors' vocabulary


def run_positions(case):
    """Bicubic resizing of the position table alone."""
    import paddle

    from unimo2_paddle.models.vision import resize_position_embeddings

    table = paddle.to_tensor(case["param/vit.position_embeddings"])
    patch = case.config().resolution
    for key in case.keys("out/pos_embed_"):
        case.check(key[4:], resize_position_embeddings(table, int(key.rsplit("_", 1)[1]) // patch))


def run_learning_rates(case):
    """Learning-rate tables of the authors' two optimisation files."""
    from unimo2_paddle.training.schedule import ScheduleConfig, make_schedule

    names = {"fluid_linear_warmup_decay": "linear_warmup_decay", "fleet_linear_warmup_decay": "fleet_linear", "fluid_noam_decay": "noam",
             "fleet_noam_decay": "fleet_noam", "fluid_scale_by_epoch_decay": "piecewise", "fleet_scale_by_epoch_decay": "piecewise",
             "fluid_no_warmup": "constant"}
    rate, values = case.setting("learning_rate"), case.setting("values")
    for key in case.keys("out/lr_"):
        name = names[key[len("out/lr_"):]]
        schedule = make_schedule(ScheduleConfig(
            schedule=name, learning_rate=rate, total_steps=case.setting("num_train_steps"), drop_at_steps=case.setting("boundaries"),
            warmup_steps=0 if "no_warmup" in key else case.setting("warmup_steps"), drop_factor=values[1] / values[0]))
        case.check(key[4:], [schedule(step) for step in range(len(case[key]))], tolerance=1e-9)


def run_optimizer(case):
    """Adam, clipping, schedules and decay by name over a few steps of a joint classification model."""
    from unimo2_paddle.training.optim import decays
    from unimo2_paddle.training.schedule import ScheduleConfig, make_schedule

    def schedule(name, **kwargs):
        return make_schedule(ScheduleConfig(schedule=name, learning_rate=1e-3, total_steps=20, **kwargs))

    plain = schedule("constant")
    runs = {
        "fluid_wd0.01": (schedule("linear_warmup_decay", warmup_steps=2), 0.01, 4),
        "fleet_wd0.01": (schedule("fleet_linear", warmup_steps=2), 0.0, 4),  # the fleet file's decay is commented out
        "fleet_wd0": (schedule("fleet_linear", warmup_steps=2), 0.0, 4),
        "fleet_piecewise": (schedule("piecewise", drop_at_steps=[1, 2]), 0.0, 4),
        "fluid_lr1e-3_wd0_one_step": (plain, 0.0, 1),
        "fluid_wd0.01/wd0.5_one_step": (plain, 0.5, 1),
    }
    for name, (rate_at, weight_decay, steps) in runs.items():
        if case.keys(f"out/{name}/"):
            _optimizer_run(case, name, rate_at, weight_decay, steps)
    # cmcl_temperature has no gradient in this program, so nothing there decays it
    every = sorted(set(case["out/decayed_names"]) | set(case["out/not_decayed_names"]) - {"cmcl_temperature"})
    wrong = [n for n in every if decays(n, "authors") != (n in set(case["out/decayed_names"]))]
    case.rows.append((f"decay by name ({len(every)} names)", float(len(wrong)), EXACT))


def _optimizer_run(case, name, rate_at, weight_decay, steps):
    import paddle
    import paddle.nn.functional as F

    from unimo2_paddle.models.heads import ClassificationHead
    from unimo2_paddle.training.optim import OptimConfig, build_optimizer

    config = case.config()
    model = case.model(config)
    with paddle.utils.unique_name.guard():
        head = ClassificationHead(config.hidden_size, case["param/cls_out_w"].shape[1], dropout=0.0)
    case.load(head)
    parameters = [p for p in model.parameters() + head.parameters() if f"param/{p.name}" in case]
    optimizer = build_optimizer(parameters, OptimConfig(weight_decay=weight_decay, decay_rule="authors"))
    losses, rates = [], []
    for step in range(steps):
        out = model(image=case.tensor("image_pixel_input"), **text_inputs(case))
        loss = F.cross_entropy(head(model.fused_features(out)), case.tensor("labels")) + out.grounding_loss
        loss.backward()
        if steps == 1 and weight_decay == 0.0:
            case.check_gradients(model, head)
            squares = sum(float(p.grad.square().sum()) for p in parameters if p.grad is not None)
            case.check("global_grad_norm_step0", squares ** 0.5, tolerance=GRADIENT)
        losses.append(float(loss))
        rates.append(rate_at(step))
        optimizer.set_lr(rate_at(step))
        optimizer.step()
        optimizer.clear_grad()
        prefix = f"out/{name}/" + (f"step{step}/" if steps > 1 else "")
        for parameter in parameters:
            case.check(f"{prefix[4:]}{parameter.name}", parameter, f"{prefix}{parameter.name}")
    case.check(f"{name}/loss", losses, tolerance=FORWARD)
    case.check(f"{name}/lr", rates, tolerance=1e-9)


def family(case):
    """The check function for a case, chosen by the arrays it holds."""
    if "set/beam_size" in case:
        return run_decoding
    if "in/positive" in case:
        return run_circle
    if case.keys("out/lr_"):
        return run_learning_rates
    if "out/decayed_names" in case:
        return run_optimizer
    if case.keys("out/pos_embed_"):
        return run_positions
    if "in/tgt_label" in case:
        return run_caption_training
    if "in/image_pixel_unique" in case:
        return run_retrieval_training
    if "in/match_labels" in case:
        return run_pretraining
    if case.keys("param/cls_out") and "out/logits" in case:
        return run_classifier
    return run_forward


def check_case(path, config_path=None):
    """All rows ``(quantity, max error, tolerance)`` of one case."""
    case = Case(Path(path), config_path or Path(path).parent / "tiny_config.json")
    if is_unimo(case.config_path):
        import golden_unimo

        golden_unimo.check(case)
    else:
        family(case)(case)
    return case.rows


def is_unimo(config_path):
    """Whether the vectors are of UNIMO, the first system."""
    from unimo2_paddle.models.configuration import UnimoConfig, config_class

    return config_class(json.loads(Path(config_path).read_text(encoding="utf-8"))) is UnimoConfig


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path, help="directory with *.npz cases and tiny_config.json")
    parser.add_argument("--only", default="", metavar="TEXT", help="only cases whose name contains TEXT")
    parser.add_argument("--all-rows", action="store_true", help="print every gradient and parameter, not just the worst per case")
    args = parser.parse_args(argv)
    paths = sorted(p for p in args.directory.glob("*.npz") if args.only in p.name)
    if not paths or not (args.directory / "tiny_config.json").is_file():
        print(f"check_golden: {args.directory} holds no matching *.npz or no tiny_config.json", file=sys.stderr)
        return 2
    print(f"{'case':34} {'quantity':44} {'max error':>10} {'tolerance':>10}  verdict")
    failed = 0
    for path in paths:
        rows = check_case(path, args.directory / "tiny_config.json")
        failed += sum(error > tolerance for _, error, tolerance in rows) + (not rows)
        for quantity, error, tolerance in rows if args.all_rows else summarise(rows):
            verdict = "ok" if error <= tolerance else "FAIL"
            print(f"{path.stem:34} {quantity[:44]:44} {error:10.2e} {tolerance:10.0e}  {verdict}")
    print(f"{len(paths)} cases checked, {failed} quantities outside tolerance")
    return 1 if failed else 0


def summarise(rows):
    """Named outputs as they are; of gradients and stepped parameters only the worst, with the count."""
    kept = [r for r in rows if not r[0].startswith("grad ") and r[0].count("/") == 0]
    for label, bulk in (("gradients", [r for r in rows if r[0].startswith("grad ")]),
                        ("values of optimizer runs", [r for r in rows if "/" in r[0] and not r[0].startswith("grad ")])):
        if bulk:
            worst = max(bulk, key=lambda r: r[1] / r[2] if r[2] else r[1])
            kept.append((f"{len(bulk)} {label}, worst: {worst[0].removeprefix('grad ')}", worst[1], worst[2]))
    return kept


if __name__ == "__main__":
    sys.exit(main())
