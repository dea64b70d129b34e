"""AdamW whose clipping and update go over all parameters in one compiled pass on CPU; its state and its numbers are those of Paddle's."""
import math

import numpy as np
import paddle
from paddle.base.layer_helper import LayerHelper

from unimo2_paddle.models import fused


def _kernels():
    from unimo2_paddle.training import update_kernels  # compiled code is loaded when it is used

    return update_kernels


def _counts(tensors):
    return np.array([math.prod(tensor.shape) for tensor in tensors], np.int64)  # Tensor.size is 50 times slower


def square_sums(tensors):
    """Sum of squares of each contiguous float32 tensor, float64 ``[N]``."""
    counts = _counts(tensors)
    addresses = np.array([tensor.data_ptr() for tensor in tensors], np.int64)
    sums = np.zeros((fused.threads(), len(counts)))
    fused.share(int(counts.sum()), None, lambda part, room, first, last: _kernels().square_sums(addresses, counts, first, last, sums[part]))
    return sums.sum(axis=0)


def fits(tensors):
    """Whether compiled code may read the tensors: contiguous float32 on CPU, at least one."""
    return bool(tensors) and fused.enabled() and all(
        t.dtype == paddle.float32 and t.place.is_cpu_place() and t.is_contiguous() for t in tensors)


class FusedAdamW(paddle.optimizer.AdamW):
    """``paddle.optimizer.AdamW``, which also takes the steps that the compiled pass cannot (GPU, half precision, other clipping)."""

    def step(self):
        """Update the parameters that have a gradient."""
        trained = [p for p in self._parameter_list if not isinstance(p, dict) and not p.stop_gradient and p.grad is not None]
        gradients = [p.grad for p in trained]
        clip = self._grad_clip
        plain_clip = clip is None or type(clip) is paddle.nn.ClipGradByGlobalNorm and all(p.need_clip for p in trained)
        if not (plain_clip and not getattr(self, "_amsgrad", False) and self._lr_ratio is None and fits([*trained, *gradients])):
            super().step()
            return
        if self.helper is None:  # Paddle 2 creates accumulators through it, and makes it in its own step
            self.helper = LayerHelper(type(self).__name__)
        self._create_accumulators(paddle.static.default_main_program().global_block(), trained)
        moments = [[self._get_accumulator(name, p) for p in trained] for name in (
            self._moment1_acc_str, self._moment2_acc_str, self._beta1_pow_acc_str, self._beta2_pow_acc_str)]
        scale = 1.0
        if clip is not None:
            scale = clip.clip_norm / max(np.sqrt(square_sums(gradients).sum()), clip.clip_norm)
        rate = self.get_lr()
        rates = np.array([rate * p.optimize_attr["learning_rate"] for p in trained], np.float32)
        decay = np.array([self._weight_decay * self._apply_decay_param_fun(p.name) for p in trained], np.float32)
        tables = [np.array([t.data_ptr() for t in group], np.int64) for group in (trained, gradients, *moments)]
        counts = _counts(trained)
        numbers = [np.float32(v) for v in (self._beta1, self._beta2, self._epsilon, scale)]
        fused.share(int(counts.sum()), None, lambda part, room, first, last: _kernels().adamw(
            *tables, counts, rates, decay, *numbers, first, last))
        for powers, beta in zip(tables[4:], numbers):
            _kernels().scale_numbers(powers, beta)
