"""Which records a step reads: equal for every number of workers, resumable anywhere, fair to records and weights."""
import multiprocessing
import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unimo2_paddle.data.mixture import Batches, MixturePlan, generator
from unimo2_paddle.data.shards import EpochOrder
from unimo2_paddle.errors import CheckpointError, DataError

WEIGHTS = {"pairs": 0.5, "images": 0.2, "texts": 0.3}
BATCH = {"pairs": 8, "images": 4, "texts": 16}


def sources():
    return {"pairs": [(1.0, EpochOrder([5, 6], 1, 4)), (3.0, EpochOrder([7], 2, 3))], "images": [(1.0, EpochOrder([9], 3, 5))],
            "texts": [(2.0, EpochOrder([4, 4, 5], 4, 6)), (1.0, EpochOrder([3], 5, 2))]}


def plan(rank=0, world_size=1, accumulate=1, state=None, seed=7, weights=None):
    return MixturePlan(sources(), weights or WEIGHTS, BATCH, seed, accumulate, rank, world_size, state)


def steps(plans, count):
    """The (corpus, slots) of ``count`` global batches, put together from the workers' slices in rank and micro-batch order."""
    taken = []
    for _ in range(count):
        draws = [p.next_step() for p in plans]
        corpora = {draw.corpus for worker in draws for draw in worker}
        assert len(corpora) == 1
        slots = [slot for micro in zip(*draws) for draw in micro for slot in draw.slots]
        taken.append((corpora.pop(), slots))
    return taken


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_global_batches_do_not_depend_on_workers_or_accumulation(world_size, accumulate):
    if world_size * accumulate > 4:
        world_size = 2  # 4 pictures cannot be shared by 8
    plans = [plan(rank, world_size, accumulate) for rank in range(world_size)]
    assert steps(plans, 40) == steps([plan()], 40)


def test_slots_are_numbered_through_the_global_batch():
    for corpus, slots in steps([plan(rank, 2, 2) for rank in range(2)], 10):
        assert [slot for slot, _, _ in slots] == list(range(BATCH[corpus]))


@given(st.integers(0, 25), st.sampled_from([1, 2, 4]), st.sampled_from([1, 2, 4]))
@settings(max_examples=30)
def test_resuming_anywhere_continues_the_sequence_at_any_world_size(stop, before, after):
    whole = steps([plan()], 30)
    first = [plan(rank, before) for rank in range(before)]
    head = steps(first, stop)
    assert len({str(p.state_dict()) for p in first}) == 1, "all workers agree on the position"
    state = first[0].state_dict()
    assert state["step"] == stop
    assert head + steps([plan(rank, after, state=state) for rank in range(after)], 30 - stop) == whole


def test_a_state_is_plain_data_and_is_not_changed_by_going_on():
    import json

    p = plan()
    p.next_step()
    state = p.state_dict()
    text = json.dumps(state)
    resumed = plan(state=json.loads(text))
    steps([p], 3)
    assert json.dumps(state) == text
    assert steps([resumed], 3) == steps([plan()], 4)[1:]


@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.lists(st.tuples(st.sampled_from([(1, 1), (2, 1), (4, 1), (1, 4), (2, 2)]),
                                                                               st.integers(0, 9)), min_size=1, max_size=4))
@settings(max_examples=60, deadline=None)
def test_a_run_moved_between_workers_and_accumulations_reads_every_record_once_per_epoch(lengths, legs):
    """Also with fewer shards, or records, than workers: workers share the epoch's records, not the shards."""
    state, read = None, {0: [], 1: []}
    for (world_size, accumulate), length in legs:
        plans = [MixturePlan({"pairs": [(1.0, EpochOrder(lengths, 1, 4)), (2.0, EpochOrder([3], 2, 2))]}, {"pairs": 1.0}, {"pairs": 8}, 5,
                             accumulate, rank, world_size, state) for rank in range(world_size)]
        for _, slots in steps(plans, length):
            for _, source, index in slots:
                read[source].append(index)
        state = plans[-1].state_dict()
    for source, total in ((0, sum(lengths)), (1, 3)):
        for start in range(0, len(read[source]), total):
            epoch = read[source][start:start + total]
            assert len(set(epoch)) == len(epoch) and set(epoch) <= set(range(total))
            assert len(epoch) == total or start + total > len(read[source])


@pytest.mark.parametrize("change,words", [(([5, 7], 1, 4), "records 11 then and 12 now"), (([5, 6], 9, 4), "seed 1 then and 9 now"),
                                          (([5, 6], 1, 5), "window 4 then and 5 now"), (([6, 5], 1, 4), "lengths")])
def test_a_position_in_another_reading_order_is_refused(change, words):
    def made(order, state=None):
        return MixturePlan({"pairs": [(1.0, EpochOrder(*order))]}, {"pairs": 1.0}, BATCH, 7, state=state)

    state = made(([5, 6], 1, 4)).state_dict()
    made(([5, 6], 1, 4), state)
    with pytest.raises(CheckpointError, match=f"another reading order of pairs source 0 .*{words}.*model.init"):
        made(change, state)


@pytest.mark.parametrize("read", [{"pairs": [1, 2]}, {"pairs": [1], "images": [0], "texts": [0, 0]}, {}])
def test_a_position_in_other_corpora_is_refused(read):
    with pytest.raises(CheckpointError, match="data position"):
        plan(state={"step": 3, "read": read})


def test_every_record_is_read_once_per_epoch():
    p, lengths = plan(), {corpus: [len(order) for _, order in entries] for corpus, entries in sources().items()}
    read = {(corpus, source): [] for corpus, counts in lengths.items() for source in range(len(counts))}
    for corpus, slots in steps([p], 200):
        for _, source, index in slots:
            read[corpus, source].append(index)
    for (corpus, source), indices in read.items():
        length = lengths[corpus][source]
        assert len(indices) > 2 * length
        for start in range(0, len(indices) - length, length):
            assert sorted(indices[start:start + length]) == list(range(length)), (corpus, source, start)
        epochs = [tuple(indices[start:start + length]) for start in range(0, len(indices) - length, length)]
        assert length < 4 or len(set(epochs)) > 1, "epochs differ in order"


def test_shares_converge_to_the_weights():
    counts, within = Counter(), Counter()
    for corpus, slots in steps([plan()], 3000):
        counts[corpus] += 1
        within.update((corpus, source) for _, source, _ in slots)
    for corpus, weight in WEIGHTS.items():
        assert abs(counts[corpus] / 3000 - weight) < 4 * np.sqrt(weight * (1 - weight) / 3000)
    assert abs(within["pairs", 1] / (within["pairs", 0] + within["pairs", 1]) - 0.75) < 0.02
    assert abs(within["texts", 0] / (within["texts", 0] + within["texts", 1]) - 2 / 3) < 0.02


def test_another_seed_gives_another_sequence():
    assert steps([plan()], 10) != steps([plan(seed=8)], 10)


def test_a_corpus_without_weight_is_never_read():
    assert {corpus for corpus, _ in steps([plan(weights={"pairs": 1.0, "images": 0.0, "texts": 1.0})], 200)} == {"pairs", "texts"}


@given(st.lists(st.integers(0, 2 ** 40), min_size=1, max_size=6))
def test_a_generator_depends_on_its_key_alone(key):
    first = generator(*key).random()
    np.random.seed(0)
    assert generator(*key).random() == first != generator(*key[:-1], key[-1] + 1).random()


def build(draw):
    """A stand-in for the batch builder: arrays that tell what was drawn."""
    if draw.step == 30:
        raise DataError("record 17 is broken")
    return {"corpus": draw.corpus, "samples": draw.size, "slots": np.array(draw.slots), "one": np.full([2, 3], draw.step, dtype="float32"),
            "pixels": np.full([1, 2], draw.step, dtype="uint8")}


def plain(batch):
    return {key: value if isinstance(value, (str, int)) else (str(value.dtype).split(".")[-1], np.asarray(value).tolist())
            for key, value in batch.items()}


def taken(batches, count):
    return [plain(next(batches)) for _ in range(count)]


@pytest.fixture
def worker_batches():
    """Makes ``Batches`` with two worker processes and ends them."""
    made = []

    def make(**options):
        made.append(Batches(plan(**options), build, num_workers=2))
        return made[-1]

    yield make
    for batches in made:
        batches.close()


def test_worker_processes_give_the_same_batches_in_the_same_order(worker_batches):
    assert taken(worker_batches(accumulate=2), 20) == taken(Batches(plan(accumulate=2), build), 20)


def test_the_position_ignores_what_was_prefetched(worker_batches):
    batches = worker_batches(accumulate=2)
    assert batches.state_dict()["step"] == 0
    next(batches)
    assert batches.state_dict()["step"] == 0, "a step is passed when all its micro-batches were taken"
    taken(batches, 5)
    state = batches.state_dict()
    assert state["step"] == 3
    rest = taken(batches, 6)
    assert taken(Batches(plan(accumulate=2, state=state), build), 6) == rest
    assert taken(worker_batches(accumulate=2, state=state), 6) == rest


def test_a_run_moved_to_another_number_of_worker_processes_goes_on_in_the_same_order(worker_batches):
    whole = taken(Batches(plan(), build), 12)
    batches = worker_batches()
    assert taken(batches, 5) == whole[:5]
    assert taken(Batches(plan(state=batches.state_dict()), build), 7) == whole[5:]


def test_closing_ends_the_worker_processes(worker_batches):
    before = set(multiprocessing.active_children())
    batches = worker_batches()
    next(batches)
    started = set(multiprocessing.active_children()) - before
    assert len(started) == 2
    batches.close()
    end = time.time() + 10
    while any(process.is_alive() for process in started) and time.time() < end:
        time.sleep(0.05)
    assert not any(process.is_alive() for process in started)
    batches.close()  # closing twice does no harm


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_data_error_arrives_with_its_text(num_workers):
    batches = Batches(plan(), build, num_workers)
    try:
        taken(batches, 30)
        with pytest.raises(DataError, match="record 17 is broken"):
            next(batches)
    finally:
        batches.close()
