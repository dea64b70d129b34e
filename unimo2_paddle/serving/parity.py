"""How far an exported model is from the model in memory, program by program, over several batch sizes and lengths."""
import contextlib
from typing import NamedTuple

import numpy as np

from unimo2_paddle.errors import CheckpointError

SIZES = ((1, 3), (2, 7), (5, 12), (16, 9))  # (batch, every other open size)
CLEAR = 1e-3  # a code's score sums a sigmoid over patches and words, so scores differ by some 1e-5 between engines
BEAMS = 2


class Difference(NamedTuple):
    """Largest difference of one output over all sizes; ``relative`` is that over the output's largest value (at least 1), ``compared`` the number
    of rows compared, of ``rows``."""

    engine: str
    program: str
    output: str
    shape: list
    compared: int
    rows: int
    absolute: float
    relative: float

    @property
    def excess(self):
        """``relative``, of code scores a tenth: their temperature (100 and more) multiplies the rounding of the states, and they only order codes."""
        return self.relative / (10.0 if self.output == "code_scores" else 1.0)


def compare(predictor, exported):
    """Compare programs on random inputs that look like real ones.

    Where codes of the dictionary tie at the last chosen place, the K best codes are not defined, and onnxruntime takes others than Paddle: such
    rows are left out for onnxruntime (paddle.inference has Paddle's own kernel).

    Args:
        predictor: of the checkpoint directory; exported: ``ExportedPrograms`` of the same model.

    Returns:
        list of :class:`Difference`, one per program and output.

    Raises:
        CheckpointError: an output has another shape than the model's.
    """
    reference, found = predictor.kind.programs, {}
    rng = np.random.default_rng(0)
    words = predictor.kind.config.text_vocab_size if predictor.kind.tokenizer is not None else 0
    kinds = {f"{name}_ids": getattr(predictor.kind.config, f"{name}_type_size", 0) for name in ("role", "turn")}
    for batch, other in SIZES:
        values = {}
        for name, about in exported.about["programs"].items():
            inputs = {spec["name"]: values.get(spec["name"]) for spec in about["inputs"]}
            for spec in about["inputs"]:
                if inputs[spec["name"]] is None:
                    inputs[spec["name"]] = _random(spec, batch, other, rng, kinds.get(spec["name"], words))
            if name == "step":
                inputs["step"] = np.array([1], "int64")
            with _clear_choices(predictor.kind.model, batch) as clear:
                wanted = reference.run(name, inputs)
            got, rows = exported.run(name, inputs), clear if exported.engine == "onnx" else slice(None)
            # what later programs read: encoders feed the matcher, the prefix feeds a step
            values.update({**inputs, **wanted, **{f"{name}_{output}": value for output, value in wanted.items()}})
            for output, value in wanted.items():
                if got[output].shape != value.shape:
                    raise CheckpointError(f"{exported.directory}: {exported.engine} program {name} gives {output} as {list(got[output].shape)}, "
                                          f"the model as {list(value.shape)}")
                pair = value[rows], got[output][rows]
                if output == "states" and "text_mask" in inputs:
                    # a padded position sees nothing but the mask's -1e4, beside which float32 rounds to 1e-3; nobody reads its state
                    pair = tuple(one * inputs["text_mask"][rows][:, :, None] for one in pair)
                # [B, 1, 1, prefix]; UNIMO's one stack has one
                bias = wanted.get(f"{output.split('_')[0]}_bias", wanted.get("bias")) if "_prefix_" in output else None
                if bias is not None:  # as above: what the bias hides
                    pair = tuple(one * (bias[rows][:, 0, :, :, None, None] > -1.0) for one in pair)
                if exported.engine == "onnx" and "_prefix_" in output:
                    pair = tuple(np.sort(one, axis=2) for one in pair)  # chosen codes of equal scores stand in another order, which nothing reads
                found.setdefault((name, output), []).append((*pair, value.shape))
    return [_difference(exported.engine, name, output, pairs) for (name, output), pairs in found.items()]


def _difference(engine, name, output, pairs):
    absolute = [float(np.abs(wanted - got).max(initial=0.0)) for wanted, got, _ in pairs]
    relative = [most / max(1.0, float(np.abs(wanted).max(initial=0.0))) for most, (wanted, _, _) in zip(absolute, pairs)]
    return Difference(engine, name, output, list(pairs[-1][2]), sum(len(wanted) for wanted, _, _ in pairs), sum(shape[0] for _, _, shape in pairs),
                      max(absolute), max(relative))


@contextlib.contextmanager
def _clear_choices(model, batch):
    """Yields a bool array ``[batch]`` that tells after a run in which rows the K-th best code was clearly better than the next one."""
    clear, dictionary = np.ones(batch, bool), getattr(getattr(model, "backbone", model), "dictionary", None)
    if dictionary is None or dictionary.topk >= dictionary.codebook.shape[0]:
        yield clear
        return
    choose = dictionary.choose

    def noting(scores):
        best = np.sort(scores.numpy(), axis=1)[:, ::-1]
        clear[:] &= best[:, dictionary.topk - 1] - best[:, dictionary.topk] > CLEAR
        return choose(scores)

    dictionary.choose = noting
    try:
        yield clear
    finally:
        del dictionary.choose


def _random(spec, batch, other, rng, words):
    """One input; the second half of the last row is padding."""
    sizes = {"batch": batch, "beams": BEAMS}
    shape = [size if isinstance(size, int) else sizes.get(size, other) for size in spec["shape"]]
    name, real = spec["name"], np.ones((batch, other), bool)
    real[-1, (other + 1) // 2:] = False
    if spec["dtype"] == "uint8":
        # smooth pictures: noise has patches that no code of the dictionary prefers, and a tie decides nothing
        coarse = rng.integers(0, 256, (batch, 4, 4, 3))
        return np.repeat(np.repeat(coarse, -(-shape[1] // 4), axis=1), -(-shape[2] // 4), axis=2)[:, :shape[1], :shape[2]].astype("uint8")
    if name.endswith("mask"):
        return real.astype("float32")
    if name in ("role_ids", "turn_ids"):
        return rng.integers(0, words, shape).astype("int64")
    if name.endswith("positions") or name == "position_ids":
        return np.where(real, np.arange(2, 2 + other)[None], 1).astype("int64")
    if spec["dtype"] == "int64":
        ids = rng.integers(5, words, shape)
        return ids.astype("int64")
    return rng.normal(0.0, 1.0, shape).astype("float32")


def table(differences):
    """The comparison as text for the screen: a Markdown table."""
    lines = ["| engine | program | output | shape | rows | largest difference | of the largest value |", "|---|---|---|---|---|---|---|"]
    for one in differences:
        rows = str(one.rows) if one.compared == one.rows else f"{one.compared} of {one.rows}"
        found = f"{one.absolute:.1e} | {one.relative:.1e}" if one.compared else "all rows tie | -"
        lines.append(f"| {one.engine} | {one.program} | {one.output} | {' x '.join(map(str, one.shape))} | {rows} | {found} |")
    return "\n".join(lines)
