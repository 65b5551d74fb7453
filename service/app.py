"""The application that answers, for Ray Serve: ``service.app:vqa``. The one for a browser is ``service.page:page``."""

import os

from pydantic import BaseModel, PositiveInt

from service.answerer import Answerer
from service.artifacts import Serving, prepare
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
    serving
        A file that says which artifact is served once `reload` named another, for replicas that start anew; by
        default beside the directory.
    seen_bytes
        What a process keeps of pictures that it saw: features on a core, resized pixels where they are decoded.
    """

    directory: str
    model: str | None = None
    processor: str | None = None
    replicas: PositiveInt = 1
    ingresses: PositiveInt | None = None
    serving: str | None = None
    seen_bytes: PositiveInt = 2**28


def vqa(arguments: VqaArguments):
    """The application that answers."""
    directory = os.path.abspath(arguments.directory)
    processor, known = prepare(directory, arguments.model, arguments.processor)
    head, name = os.path.split(directory)
    serving = Serving(arguments.serving or os.path.join(head, f".{name}.serving.json"), directory, known)
    serving.forget()
    ingresses = arguments.ingresses or max(1, (os.cpu_count() or 1) - arguments.replicas)
    answerer = Answerer.options(num_replicas=arguments.replicas).bind(serving, processor, arguments.seen_bytes)
    most = max(1, WAITING_PER_CORE * arguments.replicas // ingresses)
    return Ingress.options(num_replicas=ingresses).bind(answerer, processor, most, arguments.seen_bytes)
