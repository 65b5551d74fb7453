"""A replica: the whole model on one NeuronCore, asked in batches."""

import asyncio
import contextlib
import functools
import logging
import os
import time
from concurrent.futures import ThreadPoolExecutor

import torch
from ray import serve

from service.artifacts import check_known, load_known
from service.batching import Batcher
from service.bodies import MAX_ANSWERS
from service.faults import CoreLost
from service.metrics import AnswererMetrics

logger = logging.getLogger("ray.serve")
BATCH = 8  # requests that are taken together; the model may take them in several calls


def answers_of(ask):
    """How many answers a `service.answering.Ask` wants."""
    return len(ask.questions) * ask.settings.top_k


@contextlib.contextmanager
def ending_with_the_core():
    """Only the end of the process frees a core that was lost; Serve notices it at once and starts another replica."""
    try:
        yield
    except CoreLost as error:
        logger.error("this replica ends: %s", error)
        logging.shutdown()
        os._exit(1)


@serve.deployment(
    max_ongoing_requests=4 * BATCH,  # so that the next batch is there when one is done
    ray_actor_options={"num_cpus": 1, "resources": {"neuron_cores": 1}},
    health_check_period_s=5,
    health_check_timeout_s=30,
    graceful_shutdown_timeout_s=20,
)
class Answerer:
    """Answers requests on one core.

    Parameters
    ----------
    serving : service.artifacts.Serving
        What to load.
    processor : BlipProcessor
    seen_bytes : int
        What the features of pictures that were seen before may take.
    """

    def __init__(self, serving, processor, seen_bytes):
        # The host's part of a replica is one thread's work; a second thread would take a core from another replica.
        torch.set_num_threads(1)
        torch.set_grad_enabled(False)
        # Batches and health checks run here, one after another, and the event loop goes on.
        self._core = ThreadPoolExecutor(1, thread_name_prefix="core")
        self._batches = Batcher(functools.partial(self._on_the_core, self._answer), BATCH, MAX_ANSWERS, answers_of)
        self._metrics = AnswererMetrics()
        self._processor, self._next = processor, None
        self._serving, self._seen_bytes = serving, seen_bytes
        directory, known = serving.named()
        self._answering, self._known = self._load(directory, known), known

    def _load(self, directory, known):
        return load_known(directory, self._processor, self._seen_bytes, known)

    async def __call__(self, ask):
        """Answer a `service.answering.Ask`.

        Returns
        -------
        results : list
            For each question a list of `Answer`, or a `Failure`.
        artifact : str
        seconds : dict of str to float
            ``queue``, ``batch``, ``device`` and ``decoding``; the last two are those of the whole batch.
        """
        arrived = time.time()
        results, artifact, started, device, decoding = await self._batches(ask)
        seconds = {"queue": arrived - ask.sent, "batch": started - arrived, "device": device, "decoding": decoding}
        return results, artifact, seconds

    def _answer(self, asks):
        started = time.time()
        results, batch = self._answering.answer(asks)
        self._metrics.batch(batch)
        return [(result, self._known.artifact, started, batch.device, batch.decoding) for result in results]

    async def _on_the_core(self, call, *arguments):
        with ending_with_the_core():
            return await asyncio.get_running_loop().run_in_executor(self._core, call, *arguments)

    async def check_health(self):
        """Ask the known question through the device; Serve calls this every few seconds."""
        await self._on_the_core(lambda: check_known(self._answering, self._known))
        self._serving.check(self._known)  # it may have been starting while the others changed over

    # A new artifact: each replica loads it beside the old one, and only when all have does any of them change over.

    async def load_next(self, directory, known):
        """Load another artifact beside the one that answers: None, or in a sentence why not."""
        try:
            with ending_with_the_core():
                self._next = await asyncio.to_thread(self._load, directory, known), known
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return None

    async def take_next(self):
        """Answer with it from the next batch on."""
        if self._next is not None:
            await self._on_the_core(self._change_over)

    async def drop_next(self):
        self._next = None

    def _change_over(self):
        (self._answering, self._known), self._next = self._next, None

    def serving(self):
        return self._serving
