"""Gloo process groups that find each other on a busy machine.

Every gloo group of a launch publishes its workers' addresses in one key-value store under the same keys (their ranks; measured in Paddle
3.3.1). A worker that makes its second group a little early reads an address of the first one and ends with "Connection refused". Fleet
makes several groups at its start. Here each group gets a store of its own.
"""
import contextlib
import socket

_stores = []  # the groups use their stores as long as the process lives


def _free_port(host):
    with contextlib.closing(socket.socket()) as probe:
        probe.bind((host, 0))
        return probe.getsockname()[1]


def _own_store(store, rank, world_size, group_id):
    """A new store for one group, served by its first worker, whose address goes through the common ``store``."""
    from paddle.base import core
    from paddle.distributed.collective import _get_global_env

    key = f"unimo2_paddle/gloo_group/{group_id}"
    if rank == 0:
        host = _get_global_env().current_endpoint.rpartition(":")[0]
        port = _free_port(host)
        store.set(key, f"{host}:{port}")
    else:
        host, _, port = store.get(key).decode().rpartition(":")
    own = core.TCPStore(host, int(port), rank == 0, world_size, 300)
    _stores.append(own)
    return own


@contextlib.contextmanager
def separate_stores():
    """Inside, groups made by Paddle or fleet get their own stores. Paddle offers no other way in than the function that makes groups."""
    from paddle.distributed import collective

    make = collective._new_process_group_impl

    def make_apart(backend, store, rank, world_size, group_name, pg_options, group_id=0, *others, **more):
        if backend == "gloo" and world_size > 1 and group_id != 0:
            store = _own_store(store, rank, world_size, group_id)
        return make(backend, store, rank, world_size, group_name, pg_options, group_id, *others, **more)

    collective._new_process_group_impl = make_apart
    try:
        yield
    finally:
        collective._new_process_group_impl = make
