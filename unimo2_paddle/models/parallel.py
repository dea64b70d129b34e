"""Collective operations inside losses: feature gathering with gradient and global sums. In one process they do nothing."""
import paddle
import paddle.distributed as dist
from paddle.autograd import PyLayer


def world_size():
    """Number of workers."""
    return dist.get_world_size()


def rank():
    """This worker's number."""
    return dist.get_rank()


class _Gather(PyLayer):
    """all_gather has no gradient in Paddle: the backward sums all workers' gradients and takes its own slice."""

    @staticmethod
    def forward(ctx, tensor):
        parts = []
        dist.all_gather(parts, tensor.contiguous())
        ctx.rows = tensor.shape[0]
        return paddle.concat(parts, axis=0)

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        return gradient[rank() * ctx.rows: (rank() + 1) * ctx.rows]


def gather_rows(tensor):
    """Rows of all workers in rank order, ``[W * B, ...]`` of this worker's ``[B, ...]`` (equal B everywhere), with gradient."""
    return _Gather.apply(tensor) if world_size() > 1 else tensor


def global_share(count):
    """What this worker divides a sum by so that the mean over workers is the mean over all items.

    Args:
        count: number of items here (int).

    Returns:
        float: total items / workers, at least 1e-12.
    """
    if world_size() == 1:
        return max(float(count), 1e-12)
    total = paddle.to_tensor([float(count)], dtype="float32")
    dist.all_reduce(total)
    return max(float(total), 1e-12) / world_size()


def mean_over_all(total, count):
    """A sum over this worker's items as its part of the mean over all workers' items.

    Args:
        total: scalar tensor; count: number of items here, an int or a scalar tensor.

    Returns:
        scalar tensor, ``total`` / :func:`global_share`.
    """
    if paddle.in_dynamic_mode() or isinstance(count, int):
        return total / global_share(float(count))
    return total / count.astype(total.dtype).clip(min=1e-12)  # a static Program, in one process, knows the number when it runs
