"""The training loop: a straight line from batches to checkpoints. It knows a task only through the ``Task`` protocol."""
import contextlib
import math
import os
import time

import numpy as np
import paddle
from paddle import nn

from unimo2_paddle.checkpoints import store
from unimo2_paddle.checkpoints.background import Writer
from unimo2_paddle.checkpoints.pretrained import save_pretrained
from unimo2_paddle.config import load_run_config
from unimo2_paddle.errors import CheckpointError, Unimo2Error, UserInputError
from unimo2_paddle.models import fused
from unimo2_paddle.models.onednn import inference_engine
from unimo2_paddle.reports.page import FILE as REPORT
from unimo2_paddle.reports.page import write_run_report
from unimo2_paddle.reports.runs import note_evaluations
from unimo2_paddle.runtime import describe_environment
from unimo2_paddle.tasks.base import task_class, to_tensors
from unimo2_paddle.training import distributed
from unimo2_paddle.training.averaging import WeightAverage
from unimo2_paddle.training.logging import RunLog, logger
from unimo2_paddle.training.optim import build_optimizer
from unimo2_paddle.training.precision import Precision
from unimo2_paddle.training.profiling import StepProfiler
from unimo2_paddle.training.sanity import BadSteps, GradientCoverage, StepWitness, global_norm, gradient_norms, trial_save
from unimo2_paddle.training.schedule import ScheduleConfig, make_schedule
from unimo2_paddle.training.signals import StopSignals
from unimo2_paddle.training.static import StaticGraph, check_graph
from unimo2_paddle.training.status import Heartbeat
from unimo2_paddle.training.throughput import matmul_ceiling
from unimo2_paddle.training.traced import trace_encoders


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
    """One training run in its output directory.

    Attributes:
        best: the best judged step so far, or ``None``; stopped: the signal that ended the run early, or ``None``; done: steps taken.
    """

    def __init__(self, task, config, resume="none"):
        self.task, self.config, self.run_config = task, config, config.run
        self.output = config.run.output
        self.checkpoints = os.path.join(self.output, "checkpoints")
        self.rate_at = schedule_of(config.optim, task)
        self.total = task.total_steps()
        self.resume_path = self._resume_path(resume)
        self.precision = Precision(self.run_config.amp, self.run_config.amp_dtype)
        if self.run_config.graph != "dynamic":
            check_graph(self.run_config)
        self.shard = distributed.start(self.run_config.sharding, self.run_config.worker_timeout)
        self.first_worker = self.shard.rank == 0
        self.best, self.stale = None, 0  # stale: judging evaluations since the best one
        self.stopped, self.done = None, 0
        self.writer = Writer(config.run.async_save)
        self.average = self.static = None
        self.evaluators = task.evaluators()

    def _resume_path(self, resume):
        if os.path.exists(self.output) and not os.path.isdir(self.output):
            raise UserInputError(f"run.output {self.output} is a file; give a directory")
        existing = store.complete_checkpoints(self.checkpoints)
        self.passed_over, self.aside = [], []  # damaged checkpoints newer than the one resumed from; all that were set aside
        if resume == "none":
            if existing or os.path.isfile(os.path.join(self.output, "config.yaml")):
                newest = f" (its newest complete checkpoint: {os.path.basename(existing[-1])})" if existing else ""
                raise UserInputError(f"run.output {self.output} already holds a run{newest}. Continue it with --resume auto, choose another "
                                     "run.output, or move the directory away; nothing is deleted")
            return None
        if resume == "auto":
            path, self.passed_over = store.newest_whole(self.checkpoints)
            return path
        store.verify_checkpoint(resume)
        if existing and os.path.dirname(os.path.realpath(resume)) != os.path.realpath(self.checkpoints):
            raise UserInputError(f"run.output {self.output} already holds another run (its newest complete checkpoint: "
                                 f"{os.path.basename(existing[-1])}); continue that one with --resume auto, or choose another run.output for "
                                 f"the continuation of {resume}")
        return resume

    def run(self):
        """Train to the last step; returns the final evaluation's metrics."""
        # accumulators get Paddle's running numbers: inside a guard they are the same in every process and every run
        with paddle.utils.unique_name.guard():
            best = self._run()
        distributed.leave()
        return best

    def _run(self):
        state, run = self._build(), self.run_config
        self.done, self.best, self.stale = state["step"], state["best"], state.get("stale", 0)
        if self.done > self.total:
            raise CheckpointError(f"{self.resume_path} is at step {self.done}, this run ends at step {self.total}; give it more steps")
        if distributed.from_first(self.done, self.shard) != self.done:
            raise CheckpointError(f"worker {self.shard.rank} resumed at step {self.done}, the first worker at another one: the workers see different "
                                  f"files in {self.checkpoints}; give --resume a PATH that all of them see")
        self.bad = BadSteps(os.path.join(self.output, "bad_steps"), run.skip_bad_steps, state.get("bad_steps", 0), self.shard.rank)
        self.coverage = GradientCoverage(self.parameters, self.task.step_kinds())
        with contextlib.ExitStack() as exits:
            self.batches = self.task.train_batches(self.shard, state["data"])
            exits.callback(self.batches.close)
            warning = self._start_output()
            ceiling = matmul_ceiling() if self.first_worker else 0.0
            exits.callback(self._report)  # last of all: with the end of the log and of the status
            self.log = RunLog(self.output, self.first_worker, self.total, self.done, run.progress, ceiling)
            exits.callback(self.log.close)
            self.status = exits.enter_context(Heartbeat(self.output, self.first_worker, task=self.config.task, workers=self.shard.world_size,
                                                        total_steps=self.total, step=self.done, best=self.best, bad_steps=self.bad.count,
                                                        environment=describe_environment() if self.first_worker else None))
            exits.callback(self.writer.close)
            self._announce(warning, state)
            self.profiler = exits.enter_context(StepProfiler(run.profile, self.output, self.first_worker))
            self.signals = exits.enter_context(StopSignals())
            self._train(state.get("unjudged", False))
        return self.best

    def _build(self):
        """Model, optimizer and average, continued from the checkpoint to resume; returns its state."""
        run, optim = self.run_config, self.config.optim
        self.model = self.task.build_model()
        fused.choose(run.kernels)
        if run.recompute:
            distributed.check_recompute()
            self.model.set_recompute()
        self.parameters = self.model.parameters()
        self.optimizer = build_optimizer(self.parameters, optim)
        self.precision.prepare(self.model, self.optimizer)
        if run.graph == "to_static":
            trace_encoders(self.model)
        self.layer = distributed.wrap(_LossLayer(self.task, self.model), self.shard)
        self.optimizer = distributed.wrap_optimizer(self.optimizer, self.shard, run.sharding)
        if self.shard.world_size > 1:
            self.precision.spread()
        if run.graph == "static":
            self.static = StaticGraph(self.task, self.model, self.optimizer, optim, getattr(self.config.train, "accumulate", 1), run.recompute)
            self.optimizer = self.static.optimizer
        if optim.ema:
            self.average = WeightAverage(self.parameters, optim.ema)
        if self.resume_path:
            state = store.load_checkpoint(self.resume_path, self.model, self.optimizer, self.average, task=self.config.task, verified=True)
            self.precision.load_state_dict(state.get("scaler"))
            return state
        return {"step": 0, "data": None, "best": None}

    def _start_output(self):
        """Make the output directory, try to save into it, write ``config.yaml``; returns a warning or ``None``."""
        warning = None
        if self.first_worker:
            path = os.path.join(self.output, "config.yaml")
            try:
                os.makedirs(self.output, exist_ok=True)
                with open(path + ".tmp", "w", encoding="utf-8") as file:
                    file.write("\n".join(self.config.header()) + "\n" + self.config.to_yaml())
            except OSError as error:
                raise UserInputError(f"run.output {self.output} cannot be written: {error.strerror}; give another directory") from None
        try:
            if self.run_config.trial_save and not self.resume_path:  # a run that goes on has saved before
                snapshot = self._snapshot()
                warning = trial_save(self.output, lambda directory: snapshot and store.write_snapshot(directory, 0, snapshot), self.model,
                                     self.task.save_assets, self.first_worker)
        except CheckpointError:
            os.remove(path + ".tmp")  # a run that never began must not keep the next one out of its directory
            raise
        if self.first_worker:
            os.replace(path + ".tmp", path)
            store.recover_directory(os.path.join(self.output, "best"))
            self.aside = store.set_aside(self.checkpoints, self.done)
        distributed.barrier(self.shard)
        return warning

    def _announce(self, warning, state):
        count = sum(p.size for p in self.parameters)
        self.log.write(f"{self.config.task}: {int(count):,} parameters, {self.shard.world_size} worker(s), steps {self.done} to {self.total}, "
                       f"output {self.output}")
        if self.resume_path:
            for problem in self.passed_over:
                self.log.write(f"passed over: {problem}")
            changes = store.changes_since(state, seed=self.run_config.seed, workers=self.shard.world_size)
            self.log.write(f"resumed from {self.resume_path}" + (f" (written with {', '.join(changes)})" if changes else ""))
            if self.aside:
                self.log.write(f"later checkpoints are kept as {', '.join(self.aside)}")
        if warning:
            self.log.write(warning)

    def _train(self, unjudged):
        """All steps that are left. ``unjudged``: the run was stopped before the evaluation that was due at its last step."""
        run = self.run_config
        self.status.tell(state="running")
        if unjudged:
            self._judge()
            self._save()
        if self._stale_enough():
            self.log.write(f"step {self.done}: the run has stopped early before; raise run.early_stop to go on")
        while self.done < self.total and not self._stale_enough():
            self.writer.check()
            self.profiler.step(self.done + 1)
            stop = self._step()
            self.done += 1
            self._tell(self.profiler.end(self.done))
            last = self.done == self.total
            if self.done % run.log_every == 0 or last or stop:
                self._flush()
            self.status.beat(step=self.done, bad_steps=self.bad.count)
            due = bool(self._due())
            if due and not stop:
                self._judge()
            if last or stop or self._stale_enough() or (run.save_every and self.done % run.save_every == 0):
                self._save(unjudged=due and stop)
            if stop:
                self.writer.wait()
                self.stopped = self.signals.received or "another worker's signal"
                self.log.write(f"{self.stopped}: stopped after step {self.done} of {self.total}, saved; resume with --resume auto")
                self.status.tell(state="stopped", step=self.done)
                return
        self.writer.wait()

    def _report(self):
        """Write ``report.html``; a report that cannot be written is no reason for a run to fail."""
        if self.first_worker:
            try:
                write_run_report(self.output)
            except (Unimo2Error, OSError) as error:
                logger.warning("no report: %s; try again with unimo2 report %s", error, self.output)

    def _tell(self, text):
        """Write a line for people, if there is one."""
        if text:
            self.log.write(text)

    def _flush(self):
        rate = self.rate_at(self.done - 1)
        epochs = self.task.epochs(self.done, self.batches)
        costs = self.log.flush(self.done, rate, epochs)
        self.status.beat(step=self.done, epoch=epochs["epoch"], lr=rate, **costs)

    def _step(self):
        """One optimizer step; one whose loss or gradients are not finite changes nothing. Returns whether the run has to stop after it."""
        step, accumulate = self.done, getattr(self.config.train, "accumulate", 1)
        self.layer.train()
        terms, samples, work, reader_cost, start = {}, 0, np.zeros(2), 0.0, time.perf_counter()
        witness = StepWitness()
        for micro in range(accumulate):
            waiting = time.perf_counter()
            batch = next(self.batches)
            reader_cost += time.perf_counter() - waiting
            samples += batch["samples"]
            work += self.task.work(batch)
            paddle.seed(step_seed(self.run_config.seed, step, micro, self.shard.rank))
            losses = self._backward(batch, accumulate, last=micro == accumulate - 1)
            losses = {name: float(value) for name, value in losses.items()}
            witness.take(batch, losses)
            for name, value in losses.items():
                terms[name] = terms.get(name, 0.0) + value / accumulate
        norms = gradient_norms(self.parameters, self.precision.scale())
        # under dynamic loss scaling overflowing gradients are no accident: the scaler leaves such a step out and lowers the scale
        overflow = not math.isfinite(sum(norms.values())) and self.precision.scaler is None
        # one reduction carries everything that all workers must see alike, so that they decide alike
        shared = distributed.average({**terms, "_bad": float(overflow), "_tokens": work[0],
                                      "_stop": float(self.signals.received is not None)}, self.shard)
        bad, tokens, stop = (shared.pop(name) for name in ("_bad", "_tokens", "_stop"))
        if bad or not math.isfinite(shared["loss"]):
            self.log.write(self.bad.note(step, shared, norms, witness))
            self.optimizer.clear_grad(set_to_zero=False)
            self.log.skip()
            return stop > 0
        self.optimizer.set_lr(self.rate_at(step))
        taken = self.precision.step(self.optimizer)
        if self.average is not None and taken:
            self.average.update(step)
        if self.run_config.check_workers_every and (step + 1) % self.run_config.check_workers_every == 0:
            distributed.check_identical(self.parameters, self.shard, step + 1)
        # no gradient rather than a zero one: what a step does not train stays as it is, in a resumed run as in the first
        self.optimizer.clear_grad(set_to_zero=False)
        self.log.step(shared, samples, reader_cost, time.perf_counter() - start, tokens * self.shard.world_size, work[1], global_norm(norms))
        self._tell(self.coverage.note(batch.get("corpus", ""), norms))
        return stop > 0

    def _backward(self, batch, accumulate, last):
        """Forward and backward of one micro-batch; workers exchange gradients only in a step's last one."""
        if self.static is not None:
            return self.static.backward(batch)
        with contextlib.nullcontext() if last else distributed.without_exchange(self.layer):
            with self.precision.forward():
                losses = self.layer(to_tensors(batch))
            self.precision.scaled(losses["loss"] / accumulate).backward()
        return losses

    def _due(self):
        """The evaluators that run after the step just taken."""
        at_end = self.done == self.total and self.run_config.evaluate_at_end
        return [e for e in self.evaluators if at_end or (e.every_steps and self.done % e.every_steps == 0)]

    def _stale_enough(self):
        """Whether the evaluations have found nothing better for so long that the run ends early."""
        limit = self.run_config.early_stop
        return bool(limit) and self.stale >= limit

    def _judge(self):
        """Run the evaluators that are due, keep the best model, and agree on what came out."""
        self.status.tell(state="evaluating", step=self.done)
        with self._judged_weights():
            if self._evaluate():
                self._save_best()
        self.stale = distributed.from_first(self.stale, self.shard)
        if self._stale_enough() and self.done < self.total:
            self.log.write(f"step {self.done}: stopped early, {self.run_config.early_stop} evaluations without a better {self.task.selection}")
        self.status.tell(state="running", best=self.best)

    def _evaluate(self):
        """Run the evaluators that are due; returns whether the selection metric reached a new best."""
        improved = False
        if self.first_worker:
            for evaluator in self._due():
                started = time.perf_counter()
                with inference_engine(self.model, self.run_config.precision):
                    metrics = evaluator.run(self.model)
                self.log.metrics(self.done, metrics, evaluator.name)
                shown = ", ".join(f"{name} {value:.2f}" for name, value in metrics.items())
                self.log.write(f"step {self.done}, {evaluator.name}: {shown} ({time.perf_counter() - started:.1f} s)")
                improved |= self._is_best(self.done, evaluator.name, metrics)
                self.stale = 0 if improved else self.stale + self._judges(evaluator.name)
            if self.log.board is not None:
                self.task.illustrate(self.model, self.log.board, self.done)
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

    def _save_best(self):
        """Replace ``best/``; always before the checkpoint that tells of it."""
        with store.replaced_directory(os.path.join(self.output, "best")) as fresh:
            save_pretrained(self.model, fresh)
            self.task.save_assets(fresh)

    def _snapshot(self, unjudged=False):
        """What a checkpoint of the steps done holds (``None`` on other workers than the first); all workers call this."""
        distributed.collect_state(self.optimizer)
        if not self.first_worker:
            return None
        state = {"step": self.done, "data": self.batches.state_dict(), "best": self.best, "stale": self.stale, "bad_steps": self.bad.count,
                 "unjudged": unjudged, "scaler": self.precision.state_dict(), "task": self.config.task, "seed": self.run_config.seed,
                 "workers": self.shard.world_size}
        return store.take_snapshot(self.model, self.optimizer, state, self.average)

    def _save(self, unjudged=False):
        """Write the checkpoint of the steps done; ``unjudged``: an evaluation is due at this step and has not run."""
        self.status.tell(state="saving")
        if self.first_worker and self.best is None and self.done == self.total and not unjudged:
            with self._judged_weights():
                self._save_best()  # nothing was judged: the last model is the best there is
        snapshot = self._snapshot(unjudged)
        if self.first_worker:
            self.writer.submit(store.write_snapshot, self.checkpoints, self.done, snapshot, self.run_config.keep_last)
        distributed.barrier(self.shard)
        self.status.tell(state="running")


def train_from_config(path, overrides=(), resume="none"):
    """``unimo2 train``: run the configuration at ``path``."""
    config = load_run_config(path, overrides)
    if "optim" not in config.groups:
        raise UserInputError(f"{path}: task {config.task} cannot be trained, only evaluated (unimo2 eval)")
    task = task_class(config.task)(config)
    trainer = Trainer(task, config, resume)
    best = trainer.run()
    if trainer.first_worker:
        print(_ending(trainer, best))
    if trainer.stopped == "SIGINT":
        raise KeyboardInterrupt
    return best


def _ending(trainer, best):
    """The last words of a run."""
    output = trainer.output
    if trainer.stopped:
        return (f"stopped by {trainer.stopped} after step {trainer.done} of {trainer.total}, everything is saved; resume with\n"
                f"  unimo2 train -c {os.path.join(output, 'config.yaml')} --resume auto")
    chosen = f"best {best['metric']} {best['value']:.2f} at step {best['step']}; " if best else ""
    return (f"done: {chosen}model in {os.path.join(output, 'best')}, log in {os.path.join(output, 'train.log')}\n"
            f"report: {os.path.join(output, REPORT)}\n"
            f"board: visualdl --logdir {os.path.join(output, 'vdl')} --language en")


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
        plain = evaluator.run(model) if config.run.compare_precision else None
        with inference_engine(model, config.run.precision) as differences:
            judged.append((evaluator, evaluator.run(model)))
        print(evaluator.table())
        for line in precision_lines(config.run.precision, differences, judged[-1][1], plain):
            print(line)
        directory = os.path.join(config.run.output, "predictions")
        os.makedirs(directory, exist_ok=True)
        evaluator.write_report(directory)
        print(f"report: {directory}")
    note_evaluations(config.run.output, [(evaluator.name, metrics) for evaluator, metrics in judged], config, describe_environment())
    print(f"page: {write_run_report(config.run.output)}")
    return judged


def precision_lines(precision, differences, metrics, plain=None):
    """What to tell about an evaluation through oneDNN: how far its states are off, and where it was judged twice every metric that differs.

    Args:
        differences: as ``inference_engine`` yields them; metrics, plain: of this precision and of the dynamic graph.
    """
    shown = [f"precision {precision} (oneDNN): states of the first sample differ by " +
             ", ".join(f"{100 * value:.2g} % ({stack})" for stack, value in differences.items())] if differences else []
    if plain is not None:
        changed = [f"  {key:<28}{plain[key]:>10.4f}{metrics[key]:>10.4f}{metrics[key] - plain[key]:>+10.4f}" for key in metrics
                   if metrics[key] != plain.get(key)]
        head = f"  {'metric':<28}{'dynamic':>10}{precision:>10}{'change':>10}"
        shown += [head, *changed] if changed else [f"precision {precision}: no metric differs from dynamic"]
    return shown


def evaluate_from_config(path, overrides=()):
    """``unimo2 eval``: :func:`run_evaluators`, returning ``{evaluator name: metrics}``."""
    return {evaluator.name: metrics for evaluator, metrics in run_evaluators(path, overrides)}
