"""`ship.batcher`: who asks gets the row of what was asked, in batches of few shapes; the rest is refused or dropped."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future

import numpy as np
import pytest

from jaxsft.ship.batcher import Batcher, Ended, Full, Late, Part, batch_sizes

LONG = 30.0  # seconds, which no test waits


class Doubling:
    """Computes 2 x + 1 of each number, and goes on only as far as it is let."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.gate = threading.Event()
        self.gate.set()
        self.begun = threading.Semaphore(0)

    def __call__(self, numbers: np.ndarray) -> np.ndarray:
        self.begun.release()
        assert self.gate.wait(LONG)
        self.sizes.append(len(numbers))
        if (numbers < 0).any():
            raise ValueError("below zero")
        return 2 * numbers + 1


@pytest.fixture
def compute() -> Doubling:
    return Doubling()


@pytest.fixture
def batcher(compute: Doubling) -> Iterator[Batcher]:
    made = batcher_of(compute)
    yield made
    compute.gate.set()
    made.close(LONG)


def batcher_of(compute: Doubling, max_batch: int = 8, max_wait: float = 0.0, queue: int = 16) -> Batcher:
    return Batcher(compute, [Part((), np.float32)], max_batch=max_batch, max_wait=max_wait, queue=queue)


def submit(batcher: Batcher, number: float, seconds: float = LONG) -> Future[np.ndarray]:
    return batcher.submit(np.float32(number), deadline=time.monotonic() + seconds)


@pytest.mark.parametrize(("most", "sizes"), [(1, (1,)), (2, (1, 2)), (6, (1, 2, 4, 6)), (32, (1, 2, 4, 8, 16, 32))])
def test_sizes(most: int, sizes: tuple[int, ...]) -> None:
    assert batch_sizes(most) == sizes


def test_every_size_is_compiled_before(batcher: Batcher, compute: Doubling) -> None:
    assert batcher.warm() == 1  # of zero
    assert compute.sizes == [1, 2, 4, 8]
    assert not batcher.alive


def test_many_threads_get_their_own_rows(batcher: Batcher, compute: Doubling) -> None:
    batcher.start()
    found: dict[int, float] = {}

    def client(first: int) -> None:
        for number in range(first, first + 50):
            found[number] = float(submit(batcher, number).result(LONG))

    threads = [threading.Thread(target=client, args=(100 * i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 400
    assert all(value == 2 * number + 1 for number, value in found.items())
    assert set(compute.sizes) <= {1, 2, 4, 8}


def test_what_gathers_meanwhile_is_one_batch(batcher: Batcher, compute: Doubling) -> None:
    seen: list[tuple[int, int]] = []
    batcher._observe = lambda examples, size, seconds: seen.append((examples, size))
    compute.gate.clear()
    first = submit(batcher, 0)
    batcher.start()
    assert compute.begun.acquire(timeout=LONG)
    rest = [submit(batcher, number) for number in range(1, 14)]
    assert batcher.waiting == 13
    compute.gate.set()
    assert [float(future.result(LONG)) for future in [first, *rest]] == [2 * n + 1 for n in range(14)]
    batcher.close(LONG)
    assert seen == [(1, 1), (8, 8), (5, 8)]


def test_the_first_waits_for_others_but_not_for_long(compute: Doubling) -> None:
    batcher = batcher_of(compute, max_wait=0.3)
    batcher.start()
    began = time.monotonic()
    submit(batcher, 1).result(LONG)
    assert time.monotonic() - began >= 0.3
    batcher.close(LONG)
    patient = batcher_of(compute, max_batch=2, max_wait=LONG)
    patient.start()
    for future in [submit(patient, 1), submit(patient, 2)]:
        future.result(LONG / 2)  # the batch was full
    patient.close(LONG)
    assert compute.sizes == [1, 2]


def test_a_full_queue_refuses_and_cancelled_ones_make_room(batcher: Batcher) -> None:
    waiting = [submit(batcher, number) for number in range(16)]
    with pytest.raises(Full):
        submit(batcher, 16)
    assert waiting[3].cancel()
    late = submit(batcher, 17)
    batcher.start()
    assert float(late.result(LONG)) == 35
    assert float(waiting[15].result(LONG)) == 31


def test_late_and_cancelled_ones_are_not_computed(batcher: Batcher, compute: Doubling) -> None:
    late, gone, fine = submit(batcher, 1, seconds=-1), submit(batcher, 2), submit(batcher, 3)
    gone.cancel()
    batcher.start()
    with pytest.raises(Late):
        late.result(LONG)
    assert float(fine.result(LONG)) == 7
    assert compute.sizes == [1]


def test_an_error_reaches_its_batch_and_no_other(batcher: Batcher) -> None:
    bad = [submit(batcher, -1), submit(batcher, 1)]
    batcher.start()
    for future in bad:
        with pytest.raises(ValueError, match="below zero"):
            future.result(LONG)
    assert float(submit(batcher, 4).result(LONG)) == 9


def test_the_end_answers_what_waits_and_takes_no_more(batcher: Batcher) -> None:
    waiting = [submit(batcher, number) for number in range(10)]
    batcher.start()
    batcher.close(LONG)
    assert [float(future.result(0)) for future in waiting] == [2 * n + 1 for n in range(10)]
    assert not batcher.alive
    with pytest.raises(Ended):
        submit(batcher, 1)


def test_the_end_leaves_what_takes_too_long(batcher: Batcher, compute: Doubling) -> None:
    compute.gate.clear()
    first = submit(batcher, 1)
    batcher.start()
    assert compute.begun.acquire(timeout=LONG)
    second = submit(batcher, 2)
    batcher.close(0.05)
    with pytest.raises(Ended):
        second.result(0)
    compute.gate.set()
    assert float(first.result(LONG)) == 3
