"""Recomputing activations in a static Program: the backward part runs copies of a layer's operations instead of keeping their results.

Paddle's ``recompute`` works on the dynamic graph only, and the pass of its automatic parallel engine draws dropout masks anew.
"""
import contextlib

import paddle


@contextlib.contextmanager
def mark_segments(layers, program, enabled):
    """Collect the operations of every layer that the model would recompute, while its loss is traced.

    Args:
        layers: all Layers of the model; a stack of layers has ``layers`` and the switch ``recompute``; enabled: ``False`` marks nothing.

    Yields:
        list that receives the operations of each call of a layer, as (begin, end) in the Program's block.
    """
    stacks = [layer for layer in layers if getattr(layer, "recompute", False)]
    segments, begun, hooks = [], [], []

    def begin(layer, inputs):
        begun.append(len(program.global_block().ops))

    def end(layer, inputs, outputs):
        segments.append((begun.pop(), len(program.global_block().ops)))

    for stack in stacks:
        stack.recompute = False  # the dynamic graph's way, which cannot be traced
        for layer in stack.layers if enabled else ():
            hooks += [layer.register_forward_pre_hook(begin), layer.register_forward_post_hook(end)]
    try:
        yield segments
    finally:
        for stack in stacks:
            stack.recompute = True
        for hook in hooks:
            hook.remove()


def recompute_segments(program, segments, forward):
    """Let the operations after the first ``forward`` ones read recomputed results of the segments.

    A dropout is not drawn again: its mask is kept (one byte a number) and applied to the recomputed input.
    """
    operations = list(program.global_block().ops)
    backward = operations[forward:]
    for begin, end in segments:
        own = operations[begin:end]
        made = {value.id: op for op in own for value in op.results()}
        kept = {op.results()[1].id for op in own if op.name() == "pd_op.dropout"}
        kept |= {value.id for op in operations[end:forward] for value in _inputs(op)}  # what the layer hands on
        wanted, first = {}, None
        for op in backward:
            for value in _inputs(op):
                if value.id in made and value.id not in kept:
                    wanted[value.id] = value
                    first = first or op
        if first is not None:
            copies = _copy_before(first, own, made, kept, wanted)
            users = set(backward)
            for number, value in wanted.items():
                value.replace_grad_users_with(copies[number], users)
    paddle.pir.set_insertion_point_to_block_end(program.global_block())


def _inputs(op):
    """The values that an operation reads (absent optional ones have no id)."""
    return [value for value in op.operands_source() if value.initialized()]


def _copy_before(place, own, made, kept, wanted):
    """Copies of the operations that lead to the values ``wanted``, inserted before ``place``; returns value id -> copied Value."""
    needed, chosen = set(wanted), []
    for op in reversed(own):
        if any(value.id in needed for value in op.results()):
            chosen.append(op)
            needed.update(value.id for value in _inputs(op) if value.id in made and value.id not in kept)
    paddle.pir.set_insertion_point(place)
    mapping, copies = paddle.pir.IrMapping(), {}
    for op in reversed(chosen):
        for value in _inputs(op):
            if value.id not in copies:
                mapping.add(value, value)
        if op.name() == "pd_op.dropout":
            source, probability = op.operands_source()[0], op.operands_source()[2]
            results = [paddle._C_ops.dropout_grad(op.results()[1], copies.get(source.id, source), copies.get(probability.id, probability),
                                                  op.attrs()["is_test"], op.attrs()["mode"])]
        else:
            results = op.clone(mapping, paddle.pir.CloneOptions(False, True, True)).results()
        for value, copy in zip(op.results(), results):
            copies[value.id] = copy
            mapping.add(value, copy)
    return copies
