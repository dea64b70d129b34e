"""Static graph: a task's loss as Programs run by an Executor, on the memory of the dynamic model.

The Layers are traced once per kind of batch with their parameters replaced by the Program's, under the same names. One Program computes
loss terms and gradients, another one clips and applies AdamW. Parameters, gradients and the optimizer's accumulators are variables of one
scope that share memory with the dynamic model and optimizer, so evaluators, checkpoints and weight averages need nothing of their own.
"""
import contextlib
import dataclasses
import os

import numpy as np
import paddle
from paddle import nn

from unimo2_paddle.errors import TrainingError, UserInputError
from unimo2_paddle.models import fused
from unimo2_paddle.tasks.base import to_tensors
from unimo2_paddle.training.optim import build_optimizer
from unimo2_paddle.training.recompute import mark_segments, recompute_segments

GRADIENT, FIRST = "@gradient", "first_micro_batch"
TOLERANCE = 1e-5  # of a new Program's loss terms against the dynamic graph's; the kernels are the same, so they are equal or wrong


def check_graph(run):
    """Raise ``UserInputError`` where a run cannot train with its ``run.graph``, static or to_static, with the ways out."""
    if paddle.__version__.startswith("2."):
        raise UserInputError(f"run.graph={run.graph} needs Paddle 3, this is {paddle.__version__}; set run.graph=dynamic")
    if run.amp != "off":
        raise UserInputError(f"run.graph={run.graph}: half precision (run.amp={run.amp}) is implemented for the dynamic graph only; "
                             "set run.graph=dynamic, or run.amp=off")
    workers = int(os.environ.get("PADDLE_TRAINERS_NUM", "1"))
    if run.graph == "static" and workers > 1:
        why = ("fleet's static optimizer fails in Paddle 3 (its Programs cannot be cloned for testing), and no GPU was at hand to try a way round"
               if paddle.is_compiled_with_cuda() else "Paddle has no collective operations in static graph on CPU")
        raise UserInputError(f"run.graph=static trains in one process, this run has {workers} workers: {why}. Set run.graph=dynamic, or "
                             "run.graph=to_static, which traces the encoders inside the dynamic loop")
    if run.graph == "to_static" and run.recompute:
        raise UserInputError("run.graph=to_static: a traced encoder keeps its activations, so run.recompute cannot work; set run.recompute=false, or "
                             "run.graph to dynamic or (one process) static")


@contextlib.contextmanager
def static_mode():
    """Paddle in static graph mode inside, dynamic afterwards."""
    paddle.enable_static()
    try:
        yield
    finally:
        paddle.disable_static()


class _Reading(dict):
    """A batch whose arrays are placeholders, made when the loss reads them; ``placeholders`` and ``constants`` hold what was read."""

    def __init__(self, batch, shapes):
        super().__init__(batch)
        self.shapes, self.placeholders, self.constants = shapes, {}, {}

    def __getitem__(self, key):
        value = super().__getitem__(key)
        if key not in self.shapes:
            self.constants[key] = value
            return value
        if key not in self.placeholders:
            self.placeholders[key] = paddle.static.data(key, self.shapes[key], str(value.dtype))
        return self.placeholders[key]

    def get(self, key, default=None):
        return self[key] if key in self else default


@dataclasses.dataclass
class LossProgram:
    """Loss terms and gradients of one kind of batch.

    Attributes:
        program: what the Executor runs; terms: name -> Value of every loss term; trained: names of the parameters with a gradient.
        names: entries of the batch; shapes: sizes of the arrays that the loss reads, ``None`` where any size fits; types: their data types;
            constants: the other entries that it read.
    """

    program: object
    terms: dict
    trained: list
    names: set
    shapes: dict
    types: dict
    constants: dict

    def same_kind(self, batch):
        """Whether a batch differs at most in the sizes of its arrays."""
        return (batch.keys() == self.names and all(batch[key] == value for key, value in self.constants.items())
                and all(batch[key].dtype == dtype and batch[key].ndim == len(self.shapes[key]) for key, dtype in self.types.items()))

    def fits(self, batch):
        """Whether the arrays of such a batch have sizes that the Program takes."""
        return all(size in (None, own) for key, shape in self.shapes.items() for size, own in zip(shape, batch[key].shape))

    def opened(self, batch):
        """The shapes with ``None`` also where this batch has another size."""
        return {key: [own if size == own else None for size, own in zip(shape, batch[key].shape)] for key, shape in self.shapes.items()}


class StaticOptimizer:
    """The dynamic optimizer with a step that a Program takes; everything else (its state above all) is the dynamic one's."""

    def __init__(self, optimizer, graph):
        self._inner_opt, self._graph, self._rate = optimizer, graph, optimizer.get_lr()  # the name that fleet's wrappers give what they wrap

    def __getattr__(self, name):
        return getattr(self._inner_opt, name)

    def set_lr(self, rate):
        """The learning rate of the next step."""
        self._rate = rate

    def step(self):
        """Clip the gradients and update the parameters that have any."""
        self._graph.step(self._rate)

    def clear_grad(self, set_to_zero=False):
        """The next micro-batch begins a step."""
        self._graph.trained = []
        self._inner_opt.clear_grad(set_to_zero=False)


class StaticGraph:
    """Forward, backward and optimizer step of a training run as static Programs.

    Args:
        task: the ``Task``; model: its dynamic model; optimizer: the dynamic AdamW, whose accumulators are used.
        config: the run's ``OptimConfig``; accumulate: micro-batches per step; recompute: recompute the layers' activations.

    Attributes:
        optimizer: what the loop steps; programs: a :class:`LossProgram` per kind of batch; trained: names of the parameters with a
            gradient in this step.
    """

    def __init__(self, task, model, optimizer, config, accumulate=1, recompute=False):
        self.task, self.model, self.config = task, model, config
        self.optimizer, self.dynamic_optimizer = StaticOptimizer(optimizer, self), optimizer
        self.accumulate, self.recompute = accumulate, recompute
        self.parameters = {p.name: p for p in model.parameters()}
        self.scope = paddle.static.Scope()
        self.place = paddle.framework._current_expected_place()
        self.executor = paddle.static.Executor(self.place)
        self.programs, self.trained, self._exact, self._updates = [], [], [], {}
        # operations in the order of the trace: dropout draws its masks in the dynamic graph's order, and a run repeats exactly
        paddle.set_flags({"FLAGS_new_executor_serial_run": True})

    def backward(self, batch):
        """Loss terms of a micro-batch of numpy arrays; the gradients are added to those of the step's earlier ones.

        Returns:
            ``{name: float}``; afterwards ``parameter.grad`` is what the dynamic graph would leave there.
        """
        kind = self._program_for(batch)
        values = self._run_loss(kind, batch, self.trained)
        # in the model's order, in which the dynamic graph sums the norm
        self.trained = [name for name in self.parameters if name in self.trained or name in kind.trained]
        for name in kind.trained:
            self._show_gradient(name)
        return values

    def step(self, rate):
        """Clip the gradients and apply AdamW with the learning rate ``rate`` to the parameters that have any."""
        names = tuple(self.trained)
        if names not in self._updates:
            self._updates[names] = self._build_update(names)
        program, rate_name, accumulators = self._updates[names]
        self._share()
        for name, accumulator in accumulators.items():
            self._variable(name)._share_data_with(accumulator.get_tensor())
        self._variable(rate_name).set(np.asarray(rate, dtype="float32"), self.place)
        with static_mode():
            self.executor.run(program, scope=self.scope)

    def save_vars(self, directory):
        """Write the parameters with ``paddle.static.save_vars``: one file per variable under the authors' names.

        Raises:
            UserInputError: no batch was trained yet, so there is no Program.
        """
        if not self.programs:
            raise UserInputError("save_vars: no Program yet; train a step first")
        self._share()
        program = self.programs[0].program
        with static_mode(), paddle.static.scope_guard(self.scope):
            paddle.static.save_vars(self.executor, directory, program, vars=program.global_block().all_parameters())

    def _variable(self, name):
        return self.scope.var(name).get_tensor()

    def _share(self):
        """The scope's parameters are the dynamic model's memory; again before every run, as anybody may have replaced that."""
        for name, parameter in self.parameters.items():
            self._variable(name)._share_data_with(parameter.get_tensor())

    def _show_gradient(self, name):
        """``parameter.grad`` as a view of the scope's gradient, which outlives a ``clear_grad``."""
        view = paddle.empty([0])
        view.get_tensor()._share_data_with(self._variable(name + GRADIENT))
        self.parameters[name].grad = view

    def _run_loss(self, kind, batch, trained):
        """Run a Program; the gradients of the parameters ``trained`` are added to what earlier micro-batches left."""
        self._share()
        feed = {key: batch[key] for key in kind.shapes}
        if self.accumulate > 1:
            feed[FIRST] = np.array([not trained])
        for name in kind.trained:
            gradient = self._variable(name + GRADIENT)
            if not gradient._is_initialized() or (trained and name not in trained):
                gradient.set(np.zeros(self.parameters[name].shape, dtype="float32"), self.place)
        with static_mode():
            values = self.executor.run(kind.program, feed=feed, fetch_list=list(kind.terms.values()), scope=self.scope)
        return {name: float(value) for name, value in zip(kind.terms, values)}

    def _program_for(self, batch):
        """The Program of a batch. A size that turns out to vary becomes open, unless the loss cannot be traced so."""
        kinds = [kind for kind in self.programs if kind.same_kind(batch)]
        for kind in kinds:
            if kind.fits(batch):
                return kind
        open_kinds = [kind for kind in kinds if kind not in self._exact]
        if open_kinds:
            kind = self._try(batch, open_kinds[0].opened(batch))
            if kind is not None:
                self.programs[self.programs.index(open_kinds[0])] = kind
                return kind
            self._exact += open_kinds
        kind = self._build_loss(batch, {key: list(value.shape) for key, value in batch.items() if isinstance(value, np.ndarray)})
        problem = self._difference(kind, batch)
        if problem:
            raise TrainingError(f"run.graph: static: the Program of task {type(self.task).__name__} does not compute what the dynamic graph "
                                f"does ({problem}); set run.graph=dynamic and report it")
        self.programs.append(kind)
        if kinds:
            self._exact.append(kind)
        return kind

    def _try(self, batch, shapes):
        """A Program with open sizes, or ``None`` when the loss needs them as numbers (it then fails or computes something else)."""
        try:
            kind = self._build_loss(batch, shapes)
            return None if self._difference(kind, batch) else kind
        except Exception:  # whatever Paddle raises about an open size: closed sizes are the way then
            return None

    def _difference(self, kind, batch):
        """What a new Program computes differently from the dynamic graph on the same batch, in words; empty when nothing."""
        state = paddle.get_rng_state()
        with paddle.no_grad(), fused.plain():  # fused layers would draw other dropout masks
            expected = {name: float(value) for name, value in self.task.loss(self.model, to_tensors(batch)).items()}
        paddle.set_rng_state(state)
        earlier = {name: np.array(self._variable(name + GRADIENT)) for name in self.trained}  # of the step's micro-batches so far
        try:
            found = self._run_loss(kind, batch, [])
        finally:
            for name, gradient in earlier.items():
                self._variable(name + GRADIENT).set(gradient, self.place)
            paddle.set_rng_state(state)
        return ", ".join(f"{name} {found[name]} instead of {value}" for name, value in expected.items()
                         if not np.isclose(found[name], value, rtol=TOLERANCE, atol=TOLERANCE, equal_nan=True))

    def _build_loss(self, batch, shapes):
        program = paddle.static.Program()
        layers = self.model.sublayers(include_self=True)
        with static_mode(), paddle.static.program_guard(program, paddle.static.Program()), paddle.utils.unique_name.guard():
            values = {name: _parameter(p) for name, p in self.parameters.items()}
            reading = _Reading(batch, shapes)
            with _replaced(layers, values), _true_division(), mark_segments(layers, program, self.recompute) as segments:
                try:
                    terms = self.task.loss(self.model, reading)
                except Exception as error:
                    raise UserInputError(f"run.graph: static cannot trace the loss of {type(self.task).__name__} "
                                         f"({type(error).__name__}: {str(error).strip().splitlines()[-1] if str(error).strip() else 'no message'}); "
                                         "set run.graph=dynamic") from error
            forward = len(program.global_block().ops)
            with _true_division():
                loss = terms["loss"] / self.accumulate
            pairs = paddle.static.append_backward(loss, parameter_list=[v for name, v in values.items() if not self.parameters[name].stop_gradient])
            if segments:
                recompute_segments(program, segments, forward)
            pairs = [(value.name, gradient) for value, gradient in pairs if gradient is not None]
            first = paddle.static.data(FIRST, [1], "bool") if self.accumulate > 1 else None
            for name, gradient in pairs:
                kept = _kept(name + GRADIENT, self.parameters[name])
                if first is not None:
                    gradient = paddle.where(first, gradient, kept + gradient)
                paddle.assign(gradient, output=kept)
        read = list(reading.placeholders)
        return LossProgram(program, terms, [name for name, _ in pairs], set(batch), {key: shapes[key] for key in read},
                           {key: batch[key].dtype for key in read}, reading.constants)

    def _build_update(self, names):
        """(Program, name of the learning rate's variable, accumulator name -> dynamic accumulator) for the parameters ``names``."""
        parameters = [self.parameters[name] for name in names]
        self.dynamic_optimizer._create_accumulators(paddle.base.framework.default_main_program().global_block(), parameters)
        program = paddle.static.Program()
        with static_mode(), paddle.static.program_guard(program, paddle.static.Program()), paddle.utils.unique_name.guard():
            values = [_parameter(p) for p in parameters]
            pairs = [(value, _kept(value.name + GRADIENT, p)) for value, p in zip(values, parameters)]
            if self.config.clip_norm > 0:
                # here and not in the optimizer, which would sort by name and so sum the norm in another order than the dynamic graph
                pairs = nn.ClipGradByGlobalNorm(self.config.clip_norm)(pairs)
            optimizer = build_optimizer(values, dataclasses.replace(self.config, clip_norm=0.0))
            for value, parameter in zip(values, parameters):
                value.optimize_attr = dict(parameter.optimize_attr)  # its share of the rate counts the whole model's layers
            optimizer.apply_gradients(pairs)
            rate_name = optimizer._global_learning_rate().name
            accumulators = {own[name].name: self.dynamic_optimizer._accumulators[kind][name]
                            for kind, own in optimizer._accumulators.items() for name in names}
        return program, rate_name, accumulators


def _parameter(parameter):
    """The Program's parameter for a dynamic one. Its start value is never used: the scope has the dynamic one's memory."""
    attribute = paddle.ParamAttr(name=parameter.name, initializer=nn.initializer.Constant(0.0), trainable=not parameter.stop_gradient)
    return paddle.static.create_parameter(list(parameter.shape), str(parameter.dtype).rpartition(".")[2], attr=attribute)


def _kept(name, parameter):
    """A variable of the scope shaped like a parameter, which outlives a run."""
    return paddle.pir.core.create_persistable_value(parameter.dtype, list(parameter.shape), name, initializer=nn.initializer.Constant(0.0))


@contextlib.contextmanager
def _true_division():
    """Inside, a traced tensor divided by a number is divided, as in the dynamic graph; Paddle multiplies by 1 / number, which rounds twice."""
    own = paddle.pir.Value.__truediv__

    def divide(value, other):
        if isinstance(other, (int, float)):
            value = value if paddle.is_floating_point(value) else value.astype("float32")
            other = paddle.full([], other, value.dtype)
        return own(value, other)

    paddle.pir.Value.__truediv__ = divide
    try:
        yield
    finally:
        paddle.pir.Value.__truediv__ = own


@contextlib.contextmanager
def _replaced(layers, values):
    """Inside, the Layers compute with the Program's parameters ``values``."""
    own = [(layer, dict(layer._parameters)) for layer in layers]
    for layer, parameters in own:
        layer._parameters.update({key: values[p.name] for key, p in parameters.items() if p is not None})
    try:
        yield
    finally:
        for layer, parameters in own:
            layer._parameters.update(parameters)
