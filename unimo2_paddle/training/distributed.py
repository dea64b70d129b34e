"""Several workers through fleet: gloo on CPU, NCCL on GPU, the same code path."""
import os

import paddle
import paddle.distributed as dist

from unimo2_paddle.errors import UserInputError
from unimo2_paddle.tasks.base import Shard


def start():
    """Join the workers of the launch, if there are several; returns this process's ``Shard``."""
    if int(os.environ.get("PADDLE_TRAINERS_NUM", "1")) > 1:
        from paddle.distributed import fleet

        if not dist.is_initialized():
            strategy = fleet.DistributedStrategy()
            # every step trains one corpus, so some parameters have no gradient in it
            strategy.find_unused_parameters = True
            fleet.init(is_collective=True, strategy=strategy)
        return Shard(dist.get_rank(), dist.get_world_size())
    return Shard()


def wrap(layer, shard):
    """The layer with averaged gradients over all workers (a ``DataParallel`` under the strategy of :func:`start`)."""
    if shard.world_size == 1:
        return layer
    for parameter in (p for p in layer.parameters() if not p.stop_gradient):
        # the reducer reads a gradient's memory in a row; one that is a transposed view would arrive scrambled (Paddle 3.3.1)
        parameter.register_hook(lambda gradient: gradient.contiguous())
    from paddle.distributed import fleet

    return fleet.distributed_model(layer)


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


def check_recompute():
    """Raise ``UserInputError`` where Paddle cannot recompute: 2.6.2 cannot keep the random state of a CPU."""
    if paddle.__version__.startswith("2.") and not paddle.is_compiled_with_cuda():
        raise UserInputError(f"run.recompute: Paddle {paddle.__version__} cannot recompute activations on CPU; set run.recompute=false or use Paddle 3")
