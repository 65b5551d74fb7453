"""Batches that form while the core is busy, so that an idle core answers at once and a busy one in full batches.

``ray.serve.batch`` closes a batch when its time is up, whether or not the one before it is done. With a short wait a
busy core then gets one question at a time; with a long one an idle core waits for nothing. No Ray.
"""

import asyncio
from collections import deque


class Batcher:
    """Collects what is asked one by one, for a function that answers several at once; for one event loop.

    Parameters
    ----------
    call : coroutine function
        Takes a list of items and returns a list with a result each. Called again only when it has returned.
    most : int
        How many items it takes at once.
    heaviest, weight_of : int and function, optional
        What the items of a batch may weigh in all, and what one does; one that weighs more is a batch of its own.
    """

    def __init__(self, call, most, heaviest=None, weight_of=lambda item: 0):
        self.call, self.most = call, most
        self.heaviest, self.weight_of = heaviest or 0, weight_of
        self._waiting, self._running = deque(), None

    async def __call__(self, item):
        """The result of one item. Whoever stops waiting gives its place to the next one."""
        future = asyncio.get_running_loop().create_future()
        self._waiting.append((item, future))
        if self._running is None:
            self._running = asyncio.create_task(self._run())
        return await future

    async def _run(self):
        try:
            await asyncio.sleep(0)  # what arrived in the same moment is in the same batch
            while batch := self._next():
                items, futures = zip(*batch, strict=True)
                try:
                    results = await self.call(list(items))
                    for future, result in zip(futures, results, strict=True):
                        if not future.done():
                            future.set_result(result)
                except Exception as error:
                    for future in futures:
                        if not future.done():
                            future.set_exception(error)
        finally:
            self._running = None

    def _next(self):
        """The items of the next batch, without those that nobody waits for any more."""
        batch, weight = [], 0
        while self._waiting and len(batch) < self.most:
            item, future = self._waiting[0]
            if not future.done():
                weight += self.weight_of(item)
                if batch and weight > self.heaviest:
                    break
                batch.append((item, future))
            self._waiting.popleft()
        return batch
