"""What a run tells: a progress bar, ``train.log``, ``metrics.jsonl`` and the VisualDL board."""
import json
import logging
import os
import sys
import time
from collections import defaultdict

from unimo2_paddle.training.throughput import peak_memory

logger = logging.getLogger("unimo2_paddle")


class RunLog:
    """All the outputs of the first worker; the others are silent.

    Args:
        directory: the run's output directory; enabled: first worker; total_steps: for the bar and the line;
        first_step: step the run (re)starts at; progress: draw a bar.
        ceiling: operations a second that count as full utilisation, see ``throughput.matmul_ceiling``; 0: not known.
    """

    def __init__(self, directory, enabled, total_steps, first_step=0, progress=True, ceiling=0.0):
        self.enabled, self.directory, self.total_steps, self.ceiling = enabled, directory, total_steps, ceiling
        self._latest = {}
        self._clear()
        self.bar = self.board = self._metrics = self._file = None
        if not enabled:
            return
        os.makedirs(directory, exist_ok=True)
        self._file = open(os.path.join(directory, "train.log"), "a", encoding="utf-8")
        self._metrics = open(os.path.join(directory, "metrics.jsonl"), "a", encoding="utf-8")
        from visualdl import LogWriter

        self.board = LogWriter(os.path.join(directory, "vdl"))
        if progress:
            from tqdm import tqdm

            self.bar = tqdm(total=total_steps, initial=first_step, unit="step", dynamic_ncols=True, file=sys.stderr,
                            mininterval=1.0 if sys.stderr.isatty() else 30.0)

    def write(self, text):
        """A line for people: into ``train.log`` and on the screen."""
        if not self.enabled:
            return
        self._file.write(time.strftime("%Y-%m-%d %H:%M:%S ") + text + "\n")
        self._file.flush()
        if self.bar is not None:
            self.bar.write(text, file=sys.stdout)
        else:
            print(text, flush=True)

    def _clear(self):
        self._sums, self._counts = defaultdict(float), defaultdict(int)
        self._costs, self._samples, self._steps, self._tokens, self._flops, self._norms = [0.0, 0.0], 0, 0, 0.0, 0.0, 0.0

    def skip(self):
        """A step passed without a change of the weights."""
        if self.bar is not None:
            self.bar.update()

    def step(self, terms, samples, reader_cost, batch_cost, tokens=0.0, flops=0.0, gradient_norm=0.0):
        """Take one optimizer step.

        Args:
            terms: loss terms (floats); samples, tokens: of all workers; reader_cost, batch_cost: seconds;
            flops: operations of this worker; gradient_norm: of all parameters before clipping.
        """
        for name, value in terms.items():
            self._sums[name] += value
            self._counts[name] += 1
        self._costs[0] += reader_cost
        self._costs[1] += batch_cost
        self._samples += samples
        self._steps += 1
        self._tokens += tokens
        self._flops += flops
        self._norms += gradient_norm
        if self.bar is not None:
            self.bar.update()
            self._latest.update(terms)  # a step trains one corpus: the others keep showing their last values
            order = sorted(self._latest, key=lambda name: (name != "loss", name))
            self.bar.set_postfix_str(" ".join(f"{name} {self._latest[name]:.3f}" for name in order if "accuracy" not in name), refresh=False)

    def flush(self, step, lr, epochs):
        """Write the averages since the last flush as one line, one JSON record and board scalars.

        Args:
            step: optimizer steps done; lr: learning rate; epochs: ``{"epoch": passes over the data, "epoch_<corpus>": ...}``.

        Returns:
            the costs: ``ips``, ``batch_cost``, ``reader_cost`` and ``eta`` (seconds); empty when no step was taken.
        """
        if not self._steps:
            return {}
        means = {name: self._sums[name] / self._counts[name] for name in sorted(self._sums)}
        seconds, steps = max(self._costs[1], 1e-9), self._steps
        costs = {"batch_cost": seconds / steps, "reader_cost": self._costs[0] / steps, "ips": self._samples / seconds}
        left = int((self.total_steps - step) * seconds / steps)
        memory = peak_memory() / 1e6
        rates = {"peak_memory_mb": memory, "gradient_norm": self._norms / steps}
        # after the eta: what stands before it is what people's scripts read
        more = f", memory: {memory:.0f} MB"
        if self._tokens:
            rates["tokens_per_second"] = self._tokens / seconds
            more = f", tokens/s: {rates['tokens_per_second']:.0f}" + more
        if self._flops and self.ceiling:
            rates["mfu"] = self._flops / seconds / self.ceiling
            more += f", mfu: {100 * rates['mfu']:.1f} %"
        if self.enabled:
            parts = ", ".join(f"{name}: {value:.4f}" for name, value in means.items())
            line = (f"epoch {int(epochs['epoch'])}, step {step}/{self.total_steps}, {parts}, lr: {lr:.3e}, batch_cost: {costs['batch_cost']:.4f} s, "
                    f"reader_cost: {costs['reader_cost']:.4f} s, ips: {costs['ips']:.2f} samples/s, "
                    f"eta: {left // 3600}:{left // 60 % 60:02d}:{left % 60:02d}{more}")
            self.write(line) if self.bar is None else self._quiet(line)
            self.metrics(step, {**means, "lr": lr, **costs, **rates, **epochs}, "train")
        self._clear()
        return {**costs, "eta": left}

    def _quiet(self, line):
        """With a bar on the screen the line goes to the file, and the bar shows its losses."""
        self._file.write(time.strftime("%Y-%m-%d %H:%M:%S ") + line + "\n")
        self._file.flush()

    def metrics(self, step, values, kind):
        """Numbers of one kind ("train", or an evaluator's name) at a step: one JSON record and board scalars."""
        if not self.enabled:
            return
        self._metrics.write(json.dumps({"step": step, "kind": kind, **values}) + "\n")
        self._metrics.flush()
        for name, value in values.items():
            self.board.add_scalar(tag=f"{kind}/{name}", step=step, value=value)

    def close(self):
        """Close bar, files and board."""
        if self.enabled:
            for part in (self.bar, self.board, self._metrics, self._file):
                if part is not None:
                    part.close()
