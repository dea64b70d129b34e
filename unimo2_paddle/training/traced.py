"""``run.graph: to_static``: the encoders traced by ``paddle.jit.to_static`` inside the dynamic loop, for one worker or many.

Only stacks of layers are traced. Losses stay dynamic, as they exchange features and counts between workers, which no traced graph can do on CPU.
"""
import paddle
from paddle import nn
from paddle.static import InputSpec


def trace_encoders(model):
    """Let every stack of layers in ``model`` run as a traced graph while it is trained.

    Evaluation and decoding stay dynamic. The sizes of batch and sequence are open, so a stack is traced at most once for each
    combination of the inputs it is given.
    """
    # operations in the order of the trace: dropout draws the dynamic graph's masks
    paddle.set_flags({"FLAGS_new_executor_serial_run": True})
    for layer in model.sublayers():
        if hasattr(layer, "recompute") and hasattr(layer, "layers"):
            layer.forward = _TracedStack(layer).run


class _TracedStack:
    """Traced forms of one stack by the inputs given besides the states."""

    def __init__(self, stack):
        self.stack, self.forward, self.forms = stack, stack.forward, {}

    def run(self, states, mask=None, rows=None, caches=None):
        """As the stack's own ``forward``."""
        if caches is not None or not self.stack.training:
            return self.forward(states, mask, rows, caches)
        given = {name: value for name, value in (("mask", mask), ("rows", rows)) if value is not None}
        if tuple(given) not in self.forms:
            specs = [InputSpec([None] * (len(value.shape) - (name == "states")) + ([value.shape[-1]] if name == "states" else []),
                               str(value.dtype).rpartition(".")[2], name) for name, value in (("states", states), *given.items())]
            self.forms[tuple(given)] = paddle.jit.to_static(_Form(self, tuple(given)), input_spec=specs, full_graph=True)
        return self.forms[tuple(given)](states, *given.values())


class _Form(nn.Layer):
    """One set of inputs: ``states`` and those named, in this order."""

    def __init__(self, traced, names):
        super().__init__()
        self.stack, self.names = traced.stack, names
        self._forward = traced.forward  # the stack's own: its attribute of this name is the traced one by now

    def forward(self, states, first=None, second=None):
        return self._forward(states, **dict(zip(self.names, (first, second))))
