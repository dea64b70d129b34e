"""The training loop: a straight line from batches to checkpoints. It knows a task only through the ``Task`` protocol."""
import contextlib
import math
import os
import shutil
import time

import numpy as np
import paddle
from paddle import nn

from unimo2_paddle.checkpoints import store
from unimo2_paddle.checkpoints.pretrained import save_pretrained
from unimo2_paddle.config import load_run_config
from unimo2_paddle.errors import CheckpointError, TrainingError, UserInputError
from unimo2_paddle.tasks.base import task_class, to_tensors
from unimo2_paddle.training import distributed
from unimo2_paddle.training.averaging import WeightAverage
from unimo2_paddle.training.logging import RunLog
from unimo2_paddle.training.optim import build_optimizer
from unimo2_paddle.training.precision import Precision
from unimo2_paddle.training.schedule import ScheduleConfig, make_schedule


class _LossLayer(nn.Layer):
    """A task's loss as a Layer, so that data-parallel wrapping sees one forward."""

    def __init__(self, task, model):
        super().__init__()
        self.task, self.model = task, model

    def forward(self, batch):
        return self.task.loss(self.model, batch)


def step_seed(seed, step, micro, rank):
    """The seed of dropout in one micro-batch: a function of the position, so a resumed run draws the same masks."""
    return int(np.random.SeedSequence([seed, step, micro, rank]).generate_state(1)[0] >> 1)


def schedule_of(optim, task):
    """The learning-rate function of a run."""
    total = task.total_steps()
    warmup = optim.warmup_steps if optim.warmup_steps >= 0 else int(optim.warmup_ratio * total)
    per_epoch = task.steps_per_epoch()
    return make_schedule(ScheduleConfig(
        schedule=optim.schedule, learning_rate=optim.learning_rate, warmup_steps=warmup, total_steps=total,
        drop_at_steps=[epoch * per_epoch for epoch in optim.drop_at_epochs], drop_factor=optim.drop_factor))


class Trainer:
    """One training run in its output directory."""

    def __init__(self, task, config, resume="none"):
        self.task, self.config, self.run_config = task, config, config.run
        self.output = config.run.output
        self.checkpoints = os.path.join(self.output, "checkpoints")
        self.rate_at = schedule_of(config.optim, task)
        self.resume_path = self._resume_path(resume)
        self.precision = Precision(self.run_config.amp, self.run_config.amp_dtype)
        self.shard = distributed.start(self.run_config.sharding, self.run_config.worker_timeout)
        self.best, self.stale = None, 0  # stale: judging evaluations since the best one
        self.average = None
        self.evaluators = task.evaluators()

    def _resume_path(self, resume):
        if os.path.exists(self.output) and not os.path.isdir(self.output):
            raise UserInputError(f"run.output {self.output} is a file; give a directory")
        existing = store.complete_checkpoints(self.checkpoints)
        if resume == "none":
            if existing or os.path.isfile(os.path.join(self.output, "config.yaml")):
                newest = f" (its newest complete checkpoint: {os.path.basename(existing[-1])})" if existing else ""
                raise UserInputError(f"run.output {self.output} already holds a run{newest}. Continue it with --resume auto, choose another "
                                     "run.output, or move the directory away; nothing is deleted")
            return None
        if resume == "auto":
            return existing[-1] if existing else None
        store.verify_checkpoint(resume)
        return resume

    def run(self):
        """Train to the last step; returns the final evaluation's metrics."""
        # accumulators get Paddle's running numbers: inside a guard they are the same in every process and every run
        with paddle.utils.unique_name.guard():
            best = self._run()
        distributed.leave()
        return best

    def _run(self):
        task, optim, run = self.task, self.config.optim, self.run_config
        model = task.build_model()
        if run.recompute:
            distributed.check_recompute()
            model.set_recompute()
        optimizer = build_optimizer(model.parameters(), optim)
        self.precision.prepare(model, optimizer)
        layer = distributed.wrap(_LossLayer(task, model), self.shard)
        optimizer = distributed.wrap_optimizer(optimizer, self.shard, run.sharding)
        if self.shard.world_size > 1:
            self.precision.spread()
        if optim.ema:
            self.average = WeightAverage(model.parameters(), optim.ema)
        total = task.total_steps()
        state = {"step": 0, "data": None, "best": None}
        if self.resume_path:
            state = store.load_checkpoint(self.resume_path, model, optimizer, self.average)
            self.precision.load_state_dict(state.get("scaler"))
        first, self.best, self.stale = state["step"], state["best"], state.get("stale", 0)
        if first > total:
            raise CheckpointError(f"{self.resume_path} is at step {first}, this run ends at step {total}; give it more steps")
        batches = task.train_batches(self.shard, state["data"])
        self._start_output()
        log = RunLog(self.output, self.shard.rank == 0, total, task.steps_per_epoch(), first, run.progress)
        try:
            self._announce(log, model, first, total)
            for step in range(first, total):
                self._step(step, layer, optimizer, batches, self.rate_at(step), log)
                done = step + 1
                if done % run.log_every == 0 or done == total:
                    log.flush(done, self.rate_at(step))
                last = done == total
                due = self._due(done, last and run.evaluate_at_end)
                if due:
                    with self._judged_weights():
                        if self._evaluate(done, due, model, log):
                            self._save_best(model)
                if run.early_stop and distributed.from_first(self.stale, self.shard) >= run.early_stop and not last:
                    log.write(f"step {done}: stopped early, {run.early_stop} evaluations without a better {task.selection}")
                    self._save(done, model, optimizer, batches)
                    break
                if last or (run.save_every and done % run.save_every == 0):
                    self._save(done, model, optimizer, batches)
            return self.best
        finally:
            batches.close()
            log.close()

    def _start_output(self):
        if self.shard.rank == 0:
            path = os.path.join(self.output, "config.yaml")
            try:
                os.makedirs(self.output, exist_ok=True)
                with open(path + ".tmp", "w", encoding="utf-8") as file:
                    file.write(self.config.to_yaml())
                os.replace(path + ".tmp", path)
            except OSError as error:
                raise UserInputError(f"run.output {self.output} cannot be written: {error.strerror}; give another directory") from None
        distributed.barrier(self.shard)

    def _announce(self, log, model, first, total):
        count = sum(p.size for p in model.parameters())
        log.write(f"{self.config.task}: {int(count):,} parameters, {self.shard.world_size} worker(s), steps {first} to {total}, output {self.output}")
        if self.resume_path:
            log.write(f"resumed from {self.resume_path}")

    def _step(self, step, layer, optimizer, batches, rate, log):
        accumulate = getattr(self.config.train, "accumulate", 1)
        layer.train()
        terms, samples, reader_cost, start = {}, 0, 0.0, time.perf_counter()
        for micro in range(accumulate):
            waiting = time.perf_counter()
            batch = next(batches)
            reader_cost += time.perf_counter() - waiting
            samples += batch["samples"]
            paddle.seed(step_seed(self.run_config.seed, step, micro, self.shard.rank))
            losses = self._backward(layer, to_tensors(batch), accumulate, last=micro == accumulate - 1)
            for name, value in losses.items():
                terms[name] = terms.get(name, 0.0) + float(value) / accumulate
        if not math.isfinite(terms["loss"]):
            raise TrainingError(f"step {step}: the loss is {terms['loss']} ({', '.join(f'{k} {v:.4g}' for k, v in terms.items())}); "
                                "lower optim.learning_rate or look at the data of this step")
        optimizer.set_lr(rate)
        taken = self.precision.step(optimizer)
        if self.average is not None and taken:
            self.average.update(step)
        if self.run_config.check_workers_every and (step + 1) % self.run_config.check_workers_every == 0:
            distributed.check_identical(layer.parameters(), self.shard, step + 1)
        # no gradient rather than a zero one: what a step does not train stays as it is, in a resumed run as in the first
        optimizer.clear_grad(set_to_zero=False)
        log.step(distributed.average(terms, self.shard), samples, reader_cost, time.perf_counter() - start)

    def _backward(self, layer, batch, accumulate, last):
        """Forward and backward of one micro-batch; workers exchange gradients only in a step's last one."""
        with contextlib.nullcontext() if last else distributed.without_exchange(layer):
            with self.precision.forward():
                losses = layer(batch)
            self.precision.scaled(losses["loss"] / accumulate).backward()
        return losses

    def _due(self, step, at_end):
        """The evaluators that run after this step."""
        return [e for e in self.evaluators if at_end or (e.every_steps and step % e.every_steps == 0)]

    def _evaluate(self, step, due, model, log):
        """Run the evaluators ``due``; returns whether the selection metric reached a new best."""
        improved = False
        if self.shard.rank == 0:
            for evaluator in due:
                started = time.perf_counter()
                metrics = evaluator.run(model)
                log.metrics(step, metrics, evaluator.name)
                shown = ", ".join(f"{name} {value:.2f}" for name, value in metrics.items())
                log.write(f"step {step}, {evaluator.name}: {shown} ({time.perf_counter() - started:.1f} s)")
                improved |= self._is_best(step, evaluator.name, metrics)
                self.stale = 0 if improved else self.stale + self._judges(evaluator.name)
            if log.board is not None:
                self.task.illustrate(model, log.board, step)
        distributed.barrier(self.shard)
        return improved

    def _judged_weights(self):
        """Inside, the model has the weights that are judged and kept: the averaged ones if the run averages."""
        return contextlib.nullcontext() if self.average is None else self.average.applied()

    def _judges(self, name):
        """Whether the evaluator called ``name`` holds the metric that chooses the best checkpoint."""
        return self.task.selection.lstrip("-").partition("/")[0] == name

    def _is_best(self, step, name, metrics):
        selection = self.task.selection
        sign, key = (-1, selection[1:]) if selection.startswith("-") else (1, selection)
        metric = key.partition("/")[2]
        if not self._judges(name) or metric not in metrics:
            return False
        if self.best is None or sign * metrics[metric] > sign * self.best["value"]:
            self.best = {"step": step, "metric": key, "value": metrics[metric]}
            return True
        return False

    def _save_best(self, model):
        """Replace ``best/``: the new model is complete before the old one goes."""
        best, fresh, old = (os.path.join(self.output, name) for name in ("best", ".best.new", ".best.old"))
        if os.path.isdir(old) and not os.path.isdir(best):
            os.rename(old, best)  # an earlier run ended between the two renames below
        for leftover in (fresh, old):
            shutil.rmtree(leftover, ignore_errors=True)
        save_pretrained(model, fresh)
        self.task.save_assets(fresh)
        if os.path.isdir(best):
            os.rename(best, old)
        os.rename(fresh, best)
        shutil.rmtree(old, ignore_errors=True)

    def _save(self, step, model, optimizer, batches):
        distributed.collect_state(optimizer)
        if self.shard.rank == 0:
            state = {"step": step, "data": batches.state_dict(), "best": self.best, "stale": self.stale, "scaler": self.precision.state_dict()}
            store.save_checkpoint(self.checkpoints, step, model, optimizer, state, self.run_config.keep_last, self.average)
            if self.best is None and step == self.task.total_steps():
                with self._judged_weights():
                    self._save_best(model)  # nothing was judged: the last model is the best there is
        distributed.barrier(self.shard)


def train_from_config(path, overrides=(), resume="none"):
    """``unimo2 train``: run the configuration at ``path``."""
    config = load_run_config(path, overrides)
    if "optim" not in config.groups:
        raise UserInputError(f"{path}: task {config.task} cannot be trained, only evaluated (unimo2 eval)")
    task = task_class(config.task)(config)
    trainer = Trainer(task, config, resume)
    best = trainer.run()
    if trainer.shard.rank == 0:
        chosen = f"best {best['metric']} {best['value']:.2f} at step {best['step']}; " if best else ""
        print(f"done: {chosen}model in {os.path.join(config.run.output, 'best')}, log in {os.path.join(config.run.output, 'train.log')}\n"
              f"board: visualdl --logdir {os.path.join(config.run.output, 'vdl')} --language en")
    return best


def run_evaluators(path, overrides=()):
    """Run a task's evaluators on its model and write their reports into ``<output>/predictions``.

    Returns:
        list of (evaluator, metrics).

    Raises:
        UserInputError: there is nothing to evaluate, or no checkpoint.
    """
    config = load_run_config(path, overrides)
    task = task_class(config.task)(config)
    evaluators = task.evaluators()
    if not evaluators:
        raise UserInputError(f"{path}: this configuration has nothing to evaluate (group eval)")
    if not config.model.init:
        raise CheckpointError(f"{path}: model.init is empty; give the checkpoint to evaluate, for example -o model.init=output/demo/pretrain/best")
    model = task.build_model()
    model.eval()
    judged = []
    for evaluator in evaluators:
        judged.append((evaluator, evaluator.run(model)))
        print(evaluator.table())
        directory = os.path.join(config.run.output, "predictions")
        os.makedirs(directory, exist_ok=True)
        evaluator.write_report(directory)
        print(f"report: {directory}")
    return judged


def evaluate_from_config(path, overrides=()):
    """``unimo2 eval``: :func:`run_evaluators`, returning ``{evaluator name: metrics}``."""
    return {evaluator.name: metrics for evaluator, metrics in run_evaluators(path, overrides)}
