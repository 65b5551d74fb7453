"""A replica: the whole model on one NeuronCore, asked in batches."""

import asyncio
import functools
import logging
import os
import time
from concurrent.futures import ThreadPoolExecutor

import torch
from ray import serve

from service.artifacts import check_known, get_serving, load_known
from service.batching import Batcher
from service.faults import CoreLost
from service.metrics import AnswererMetrics

logger = logging.getLogger("ray.serve")
BATCH = 8  # requests that are taken together; the model may take them in several calls


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
    directory : str
        What `trace` left. Where `reload` named another one since, that one is loaded.
    processor : BlipProcessor
    known : service.artifacts.Known
    seen_bytes : int
        What the features of pictures that were seen before may take.
    """

    def __init__(self, directory, processor, known, seen_bytes):
        # The host's part of a replica is one thread's work; a second thread would take a core from another replica.
        torch.set_num_threads(1)
        torch.set_grad_enabled(False)
        # Whatever touches the core runs here, so that the event loop, and health checks with it, go on.
        self._core = ThreadPoolExecutor(1, thread_name_prefix="core")
        self._batches = Batcher(functools.partial(self._on_the_core, self._answer), BATCH)
        self._metrics = AnswererMetrics()
        self._processor, self._next = processor, None
        self._started_with, self._seen_bytes = directory, seen_bytes
        directory, known = get_serving(directory, known)
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
        try:
            return await asyncio.get_running_loop().run_in_executor(self._core, call, *arguments)
        except CoreLost as error:
            # Only the end of the process frees the core; Serve notices it at once and starts another replica.
            logger.error("this replica ends: %s", error)
            logging.shutdown()
            os._exit(1)

    async def check_health(self):
        """Ask the known question through the device; Serve calls this every few seconds."""
        await self._on_the_core(lambda: check_known(self._answering, self._known))

    # A new artifact: each replica loads it beside the old one, and only when all have does any of them change over.

    async def load_next(self, directory, known):
        """Load another artifact beside the one that answers: None, or in a sentence why not."""
        try:
            self._next = await asyncio.to_thread(self._load, directory, known), known
        except CoreLost:
            raise
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

    def started_with(self):
        """The directory that the service was started with."""
        return self._started_with
