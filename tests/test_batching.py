"""Batches form while the core is busy: an idle core does not wait, nothing is lost, each gets its own answer."""

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.batching import Batcher

MOST = 4


class Core:
    """A function of a batch that ends when `done` is set, and remembers what it was given."""

    def __init__(self):
        self.batches, self.done = [], asyncio.Event()

    async def __call__(self, items):
        self.batches.append(items)
        await self.done.wait()
        return [f"answer to {item}" for item in items]


async def started(batches, items):
    """A task for each of `items`, each of which has come as far as it can."""
    tasks = [asyncio.create_task(batches(item)) for item in items]
    for _ in range(5):
        await asyncio.sleep(0)
    return tasks


def test_an_idle_core_answers_at_once():
    async def scene():
        core = Core()
        await started(Batcher(core, MOST), ["a"])
        assert core.batches == [["a"]]
        core.done.set()

    asyncio.run(scene())


def test_what_arrives_in_one_moment_is_one_batch_and_what_arrives_meanwhile_the_next_ones():
    async def scene():
        core = Core()
        batches = Batcher(core, MOST)
        first = await started(batches, "ab")
        later = await started(batches, "cdefgh")
        assert core.batches == [["a", "b"]]
        core.done.set()
        answers = await asyncio.gather(*first, *later)
        assert core.batches == [["a", "b"], ["c", "d", "e", "f"], ["g", "h"]]
        assert answers == [f"answer to {item}" for item in "abcdefgh"]

    asyncio.run(scene())


def test_whoever_stops_waiting_gives_its_place_away():
    async def scene():
        core = Core()
        batches = Batcher(core, MOST)
        (_,) = await started(batches, "a")
        waiting = await started(batches, "bcdef")
        waiting[1].cancel()
        core.done.set()
        answers = await asyncio.gather(*waiting, return_exceptions=True)
        assert core.batches == [["a"], ["b", "d", "e", "f"]]
        assert isinstance(answers[1], asyncio.CancelledError)

    asyncio.run(scene())


def test_one_that_leaves_while_it_is_computed_harms_no_other():
    async def scene():
        core = Core()
        tasks = await started(Batcher(core, MOST), "ab")
        tasks[0].cancel()
        core.done.set()
        answers = await asyncio.gather(*tasks, return_exceptions=True)
        assert isinstance(answers[0], asyncio.CancelledError)
        assert answers[1] == "answer to b"

    asyncio.run(scene())


def test_a_batch_is_no_heavier_than_it_may_be_and_one_that_is_goes_alone():
    async def scene():
        core = Core()
        batches = Batcher(core, MOST, heaviest=10, weight_of=len)
        first = await started(batches, ["a"])
        waiting = await started(batches, ["b" * 6, "c" * 4, "d" * 30, "e", "f" * 9, "g"])
        waiting[1].cancel()
        core.done.set()
        await asyncio.gather(*first, *waiting, return_exceptions=True)
        assert core.batches == [["a"], ["b" * 6], ["d" * 30], ["e", "f" * 9], ["g"]]

    asyncio.run(scene())


@pytest.mark.parametrize("failure", [RuntimeError("no"), "too few results"])
def test_an_exception_goes_to_its_batch_and_the_next_batch_is_answered(failure):
    async def call(items):
        if "a" in items:
            if isinstance(failure, Exception):
                raise failure
            return []
        return items

    async def scene():
        batches = Batcher(call, MOST)
        tasks = await started(batches, "ab")
        answers = await asyncio.gather(*tasks, return_exceptions=True)
        assert {type(answer) for answer in answers} <= {RuntimeError, ValueError}
        assert await batches("c") == "c"

    asyncio.run(scene())


@settings(max_examples=100, deadline=None)
@given(arrivals=st.lists(st.tuples(st.integers(0, 4), st.booleans()), max_size=40), most=st.integers(1, 9))
def test_each_gets_its_own_answer_and_no_batch_is_too_large(arrivals, most):
    sizes = []

    async def call(items):
        sizes.append(len(items))
        await asyncio.sleep(0)
        return [-item for item in items]

    async def scene():
        batches, tasks, left = Batcher(call, most), [], set()
        for number, (pause, leaves) in enumerate(arrivals):
            for _ in range(pause):
                await asyncio.sleep(0)
            tasks.append(asyncio.create_task(batches(number)))
            if leaves and number:
                left.add(number - 1)
                tasks[number - 1].cancel()
        answers = await asyncio.gather(*tasks, return_exceptions=True)
        for number, answer in enumerate(answers):
            assert answer == -number or (number in left and isinstance(answer, asyncio.CancelledError))

    asyncio.run(scene())
    assert all(1 <= size <= most for size in sizes)
