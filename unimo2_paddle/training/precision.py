"""Training in half precision (Paddle's AMP) on GPU: levels O1 and O2, bfloat16, or float16 with dynamic loss scaling."""
import contextlib

import numpy as np
import paddle

from unimo2_paddle.errors import TrainingError, UserInputError

FIRST_SCALE = 65536.0


class Precision:
    """How one run computes: the context of its forward passes, the scale of its loss, its optimizer step.

    O1 computes the operators that gain from it in half precision and keeps float32 parameters; O2 keeps the parameters in half precision too, and
    float32 copies of them in the optimizer. float16 overflows, so its loss is scaled: a step with a gradient that is not finite is left out and
    halves the scale, 2,000 good steps double it.

    Args:
        level: off, O1 or O2; dtype: bfloat16 or float16; scaler: for tests; default: Paddle's own where the dtype needs one.

    Raises:
        UserInputError: this backend cannot compute like that.
    """

    def __init__(self, level="off", dtype="bfloat16", scaler=None):
        self.level, self.dtype, self.skipped = level, dtype, 0
        if level != "off":
            check_amp(level, dtype)
        if scaler is None and level != "off" and dtype == "float16":
            scaler = paddle.amp.GradScaler(init_loss_scaling=FIRST_SCALE, incr_every_n_steps=2000, decr_every_n_nan_or_inf=1)
        self.scaler = scaler

    def prepare(self, model, optimizer):
        """Give model and optimizer the precision of their parameters; before they are wrapped for several workers."""
        if self.level == "O2":
            paddle.amp.decorate(models=model, optimizers=optimizer, level="O2", dtype=self.dtype, master_weight=True)

    def spread(self):
        """Let the workers agree on overflows; after the optimizer was sharded."""
        if self.scaler is not None:
            from paddle.distributed import fleet

            self.scaler = fleet.distributed_scaler(self.scaler)

    def forward(self):
        """The context of a forward pass."""
        return contextlib.nullcontext() if self.level == "off" else paddle.amp.auto_cast(level=self.level, dtype=self.dtype)

    def scaled(self, loss):
        """The loss to start the backward pass from."""
        return loss if self.scaler is None else self.scaler.scale(loss)

    def step(self, optimizer):
        """One optimizer step.

        Returns:
            whether it was taken; a step whose scaled gradients are not finite is left out (and counted in ``skipped``).

        Raises:
            TrainingError: gradients are not finite though the scale cannot go lower.
        """
        if self.scaler is None:
            optimizer.step()
            return True
        before = self.scale()
        self.scaler.step(optimizer)
        self.scaler.update()
        if self.scaler.state_dict()["incr_count"] > 0 or self.scale() > before:
            return True
        self.skipped += 1
        if before <= 1.0:
            raise TrainingError("the gradients are not finite even with a loss scale of 1; lower optim.learning_rate, or use run.amp_dtype=bfloat16")
        return False

    def scale(self):
        """The present loss scale; 1 where nothing is scaled."""
        return 1.0 if self.scaler is None else float(np.ravel(self.scaler.state_dict()["scale"])[0])

    def state_dict(self):
        """Plain Python for a checkpoint; ``None`` where nothing is scaled."""
        if self.scaler is None:
            return None
        return {**self.scaler.state_dict(), "scale": [self.scale()], "skipped": self.skipped}

    def load_state_dict(self, state):
        """Continue from :meth:`state_dict`; a run that did not scale its loss until now starts with a fresh scale."""
        if self.scaler is not None and state:
            self.skipped = state["skipped"]
            self.scaler.load_state_dict({**{key: value for key, value in state.items() if key != "skipped"}, "scale": np.array(state["scale"], "float32")})


def check_amp(level, dtype):
    """Raise ``UserInputError`` where Paddle cannot compute in half precision."""
    if not paddle.get_device().startswith("gpu"):
        raise UserInputError(f"run.amp={level}: Paddle trains in half precision on GPU only (on CPU auto_cast does nothing and says nothing); "
                             "set run.amp=off, or train on a GPU")
    if dtype == "bfloat16" and not paddle.amp.is_bfloat16_supported():
        raise UserInputError("run.amp_dtype=bfloat16: this GPU does not compute in bfloat16; set run.amp_dtype=float16")
