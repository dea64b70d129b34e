"""Several workers through fleet: gloo on CPU, NCCL on GPU, the same code path. In one process everything here does nothing.

Workers share out the data (data parallel). With ``run.sharding=1`` they share out the optimizer's state too (training/sharding.py).
"""
import contextlib
import hashlib
import os
from collections import Counter

import numpy as np
import paddle
import paddle.distributed as dist

from unimo2_paddle.errors import TrainingError, UserInputError
from unimo2_paddle.tasks.base import Shard
from unimo2_paddle.training import rendezvous
from unimo2_paddle.training.gloo_groups import separate_stores
from unimo2_paddle.training.sharding import ShardedOptimizer, check_stage

_team = None  # the workers this process has met: like Paddle's own connections they belong to the process


def start(sharding=0, timeout=300):
    """Join the workers of the launch, if there are several; returns this process's ``Shard``.

    Args:
        sharding: stage of ZeRO; timeout: seconds to wait for the other workers.

    Raises:
        TrainingError: a worker did not arrive (it is named), or a port is taken; UserInputError: no such sharding here.
    """
    global _team
    check_stage(sharding)
    world_size = int(os.environ.get("PADDLE_TRAINERS_NUM", "1"))
    if world_size == 1:
        return Shard()
    if not dist.is_initialized():
        from paddle.distributed import fleet

        rank, endpoints = int(os.environ["PADDLE_TRAINER_ID"]), os.environ["PADDLE_TRAINER_ENDPOINTS"].split(",")
        master = os.environ.get("PADDLE_MASTER", "")
        if rank == 0 and master not in ("", *endpoints):
            rendezvous.listen(master, "where Paddle's workers meet (PADDLE_MASTER)").close()
        team = rendezvous.meet(rank, endpoints, timeout, job=master)
        strategy = fleet.DistributedStrategy()
        # every step trains one corpus, so some parameters have no gradient in it
        strategy.find_unused_parameters = True
        if sharding:
            strategy.hybrid_configs = {"dp_degree": 1, "mp_degree": 1, "pp_degree": 1, "sharding_degree": world_size}
        with separate_stores():
            fleet.init(is_collective=True, strategy=strategy, log_level="WARNING")
        _team = team.start()
    return Shard(dist.get_rank(), dist.get_world_size())


def leave():
    """This worker's part is done: the others need not end when its process does."""
    if _team is not None:
        _team.leave()


def wrap(layer, shard):
    """The layer whose gradients are averaged over all workers: in the backward pass (``DataParallel``), or sharded by the optimizer's step."""
    if shard.world_size == 1:
        return layer
    for parameter in (p for p in layer.parameters() if not p.stop_gradient):
        # the reducer reads a gradient's memory in a row; one that is a transposed view would arrive scrambled (Paddle 3.3.1)
        parameter.register_hook(lambda gradient: gradient.contiguous())
    from paddle.distributed import fleet

    return fleet.distributed_model(layer)


def wrap_optimizer(optimizer, shard, sharding=0):
    """The optimizer as it is, or with its state spread over the workers."""
    return ShardedOptimizer(optimizer, shard) if sharding and shard.world_size > 1 else optimizer


def without_exchange(layer):
    """The context of a backward pass whose gradients stay here: all micro-batches of a step but the last."""
    return layer.no_sync() if isinstance(layer, paddle.DataParallel) else contextlib.nullcontext()


def collect_state(optimizer):
    """Let the first worker's ``optimizer.state_dict()`` hold the state of all workers; all of them call this before it is saved."""
    if isinstance(optimizer, ShardedOptimizer):
        optimizer.collect()


def barrier(shard):
    """Wait for all workers."""
    if shard.world_size > 1:
        dist.barrier()


def average(values, shard):
    """Mean over the workers of a ``{name: float}`` mapping with the same names everywhere."""
    if shard.world_size == 1 or not values:
        return values
    tensor = paddle.to_tensor([values[name] for name in sorted(values)], dtype="float64")
    dist.all_reduce(tensor)
    return dict(zip(sorted(values), (tensor / shard.world_size).tolist()))


def from_first(value, shard):
    """The first worker's integer on every worker."""
    if shard.world_size == 1:
        return value
    tensor = paddle.to_tensor([value], dtype="int64")
    dist.broadcast(tensor, src=0)
    return int(tensor)


def any_worker(flag, shard):
    """Whether ``flag`` is true on at least one worker; every worker gets the same answer (for example "stop after this step")."""
    if shard.world_size == 1:
        return bool(flag)
    tensor = paddle.to_tensor([int(bool(flag))], dtype="int64")
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return bool(int(tensor))


def check_identical(parameters, shard, step):
    """Raise ``TrainingError`` unless every parameter is bit for bit the same on all workers.

    Args:
        parameters: the model's, in the same order everywhere; step: for the message.
    """
    if shard.world_size == 1:
        return
    parameters = list(parameters)
    digests = [hashlib.blake2b(np.ascontiguousarray(p.numpy()), digest_size=8).digest() for p in parameters]
    parts = []
    dist.all_gather(parts, paddle.to_tensor(np.frombuffer(b"".join(digests), "int64")))
    problem = describe_differences([p.name for p in parameters], np.stack([part.numpy() for part in parts]))
    if problem:
        raise TrainingError(f"step {step}: the workers no longer have the same weights: {problem}. Resume from a checkpoint; if it happens again, "
                            "suspect that worker's memory or GPU")


def describe_differences(names, digests):
    """Which workers differ from most others, and in what; empty when all agree.

    Args:
        names: P parameter names; digests: integers ``[W, P]``.
    """
    differing = {}  # rank -> names
    for name, column in zip(names, np.asarray(digests).T.tolist()):
        usual = Counter(column).most_common(1)[0][0]  # among equals the first worker's
        for rank, digest in enumerate(column):
            if digest != usual:
                differing.setdefault(rank, []).append(name)
    return "; ".join(f"worker {rank} differs in {', '.join(found[:3])}" + (f" and {len(found) - 3} more" if len(found) > 3 else "")
                     + f" (of {len(names)} parameters)" for rank, found in sorted(differing.items()))


def check_recompute():
    """Raise ``UserInputError`` where Paddle cannot recompute: 2.6.2 cannot keep the random state of a CPU."""
    if paddle.__version__.startswith("2.") and not paddle.is_compiled_with_cuda():
        raise UserInputError(f"run.recompute: Paddle {paddle.__version__} cannot recompute activations on CPU; set run.recompute=false or use Paddle 3")
