"""A running average of the weights (EMA), which is judged and saved instead of the weights themselves."""
import contextlib

import paddle


class WeightAverage:
    """``average = d * average + (1 - d) * weights`` after every step.

    Early in a run ``d`` is smaller than asked, ``(1 + step) / (10 + step)``, so that the random start is forgotten.

    Args:
        parameters: the model's parameters; decay: d in [0, 1).
    """

    def __init__(self, parameters, decay):
        self.decay = decay
        self.parameters = list(parameters)
        self.averages = [p.detach().clone() for p in self.parameters]

    def update(self, step):
        """Take in the weights after the optimizer's step number ``step`` (0 is the first)."""
        keep = min(self.decay, (1 + step) / (10 + step))
        with paddle.no_grad():
            for average, parameter in zip(self.averages, self.parameters):
                if parameter.stop_gradient:
                    continue  # frozen: its average is itself, which rounding would change
                average.set_value(average * keep + parameter * (1.0 - keep))

    @contextlib.contextmanager
    def applied(self):
        """The model has the averaged weights inside and its own ones afterwards."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def _exchange(self):
        with paddle.no_grad():
            for number, parameter in enumerate(self.parameters):
                own = parameter.detach().clone()
                parameter.set_value(self.averages[number])
                self.averages[number] = own

    def arrays(self):
        """``{parameter name: array}`` for a checkpoint."""
        return {p.name: average.numpy() for p, average in zip(self.parameters, self.averages)}

    def load(self, arrays):
        """Continue from :meth:`arrays` (names and shapes were checked by who read them)."""
        self.averages = [paddle.to_tensor(arrays[p.name]) for p in self.parameters]
