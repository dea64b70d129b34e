"""The optimizer's state spread over the workers (stage 1 of ZeRO, arXiv 1910.02054) by fleet's ``hybrid_configs``."""
import paddle
import paddle.distributed as dist

from unimo2_paddle.checkpoints.store import MASTERS, optimizer_arrays, optimizer_state, parameter_of
from unimo2_paddle.errors import UserInputError


def check_stage(stage):
    """Raise ``UserInputError`` for the stages that are not available."""
    if stage < 2:
        return
    where = "here" if paddle.is_compiled_with_cuda() else f"on CPU (Paddle {paddle.__version__} has them on GPU only)"
    raise UserInputError(f"run.sharding={stage}: sharded gradients and parameters are not available {where}; use run.sharding=1, which spreads the "
                         "optimizer's state, with run.recompute=true and train.accumulate to save more memory")


class ShardedOptimizer:
    """An optimizer each of whose parameters is updated by one worker, which alone holds its accumulators, and then sent to all others.

    What is not defined here is fleet's: ``step`` averages the gradients first, backward passes exchange nothing.

    Args:
        optimizer: a Paddle optimizer over all parameters; shard: this worker.
    """

    def __init__(self, optimizer, shard):
        from paddle.distributed import fleet

        self._shard, self._whole = shard, None
        self._fleet = fleet.distributed_optimizer(optimizer)
        spread = self._fleet._inner_opt
        average_all = spread.reduce_gradients

        def average_present(parameters, groups):
            # Paddle 3 gives the others a gradient of zero, and Adam would move what this step does not train
            average_all(with_gradient(parameters), groups)

        spread.reduce_gradients = average_present

    def __getattr__(self, name):
        return getattr(self._fleet, name)

    def collect(self):
        """Bring the whole state to the first worker, whose next :meth:`state_dict` is complete; all workers call this."""
        own = optimizer_arrays(self._fleet)
        described = []
        dist.all_gather_object(described, [(key, own[key].shape, str(own[key].dtype)) for key in sorted(own)])
        # broadcast, not send: gloo numbers its messages per process, so a first worker that heard another one misses the next one's
        for rank in range(1, self._shard.world_size):
            for key, shape, dtype in described[rank]:
                mine = self._shard.rank == rank
                array = paddle.to_tensor(own[key]) if mine else paddle.empty(shape, dtype)
                dist.broadcast(array, src=rank)
                if self._shard.rank == 0:
                    own[key] = array.numpy()
        if self._shard.rank > 0:
            return
        self._whole = optimizer_state(own)

    def state_dict(self):
        """The state that :meth:`collect` brought, once; at other times this worker's own part."""
        whole, self._whole = self._whole, None
        return self._fleet.state_dict() if whole is None else whole

    def set_state_dict(self, state):
        """Take this worker's part of a whole state."""
        spread = self._fleet._inner_opt
        own = {p.name for p in spread._rank2params[self._shard.rank]}
        parts = {key: value for key, value in state.items() if parameter_of(key) in own}
        if MASTERS in state:
            parts[MASTERS] = {name: value for name, value in state[MASTERS].items() if name in own}
        spread.set_state_dict(parts)

    @property
    def _accumulators_holder(self):
        """Nothing waits outside of what :meth:`collect` brings."""
        return {}


def with_gradient(parameters):
    """Those of ``parameters`` that have a gradient on at least one worker; the same list on all workers."""
    present = paddle.to_tensor([int(p.grad is not None) for p in parameters], dtype="int32")
    dist.all_reduce(present, op=dist.ReduceOp.MAX)
    return [p for p, there in zip(parameters, present.tolist()) if there]
