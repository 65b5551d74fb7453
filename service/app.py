"""The application that answers, for Ray Serve: ``service.app:vqa``. The one for a browser is ``service.page:page``."""

import os

from pydantic import BaseModel, PositiveInt

from service.answerer import Answerer
from service.artifacts import prepare, set_serving
from service.ingress import Ingress

# Requests under way for each core: a batch that is computed, one that forms, and what HTTP holds meanwhile.
WAITING_PER_CORE = 16


class VqaArguments(BaseModel):
    """What ``args`` of a Serve configuration may have.

    Attributes
    ----------
    directory
        The artifact. Without one the model is traced into it, which on Neuron takes long: compile before.
    model, processor
        The checkpoint that it was traced from: a directory or a hub name; by default as `load_blip`.
    replicas
        Cores to use, one each.
    ingresses
        Processes that decode pictures; by default as many as the machine has CPUs to spare, at least one.
    seen_bytes
        What a process keeps of pictures that it saw: features on a core, resized pixels where they are decoded.
    """

    directory: str
    model: str | None = None
    processor: str | None = None
    replicas: PositiveInt = 1
    ingresses: PositiveInt | None = None
    seen_bytes: PositiveInt = 2**28


def vqa(arguments: VqaArguments):
    """The application that answers."""
    directory = os.path.abspath(arguments.directory)
    processor, known = prepare(directory, arguments.model, arguments.processor)
    set_serving(directory, directory, known)
    ingresses = arguments.ingresses or max(1, (os.cpu_count() or 1) - arguments.replicas)
    answerer = Answerer.options(num_replicas=arguments.replicas).bind(directory, processor, known, arguments.seen_bytes)
    most = max(1, WAITING_PER_CORE * arguments.replicas // ingresses)
    return Ingress.options(num_replicas=ingresses).bind(answerer, processor, most, arguments.seen_bytes)
