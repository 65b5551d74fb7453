"""``python blip.py reload``: another artifact for the service on this machine, in two steps and without a gap."""

import contextlib
import logging
import signal
import threading
from pathlib import Path

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from blip_helpers import load_blip
from service.artifacts import known_answer
from service.running import quiet


def reload_artifact(arguments):
    """``python blip.py reload``: every replica loads the new artifact beside the old one, then all change over.

    Where one of them refuses it, none changes over.
    """
    directory = Path(arguments.directory).resolve()
    model, processor = load_blip(arguments.model, processor=arguments.processor)
    _, known = known_answer(directory, model, processor)
    quiet()
    with contextlib.ExitStack() as undo:
        try:
            ray.init(address="auto", log_to_driver=False, logging_level=logging.ERROR, namespace="serve")
        except ConnectionError:
            raise RuntimeError("no service runs on this machine: start one with python blip.py serve") from None
        undo.callback(ray.shutdown)
        print(change_over(directory, known))
    return 0


def change_over(directory, known):
    """Have all replicas of the running service answer from `directory`; what was done, in a sentence.

    Raises
    ------
    ValueError
        If a replica refuses it: none changes over.
    RuntimeError
        If a replica ends meanwhile, or there is no service: none changes over.
    """
    try:
        answerer = serve.get_deployment_handle("Answerer", "vqa")
        serving = answerer.serving.remote().result()
        reasons = load_next(answerer, directory, known)
    except (RayError, RayServeException) as error:
        raise RuntimeError(
            f"{directory} is not taken, the service could not be asked: {type(error).__name__}"
        ) from error
    with uninterrupted():
        serving.name(directory, known)
        # One that ends now, or is only starting, loads what was named; its health check sees to it.
        with contextlib.suppress(RayError, RayServeException):
            answerer.broadcast("take_next").results()
    return f"{len(reasons)} replicas answer from {directory} now (artifact {known.artifact})"


def load_next(answerer, directory, known):
    """Have each replica load it beside what answers, and forget it where one of them does not."""
    try:
        reasons = answerer.broadcast("load_next", str(Path(directory).resolve()), known).results()
        if refused := [reason for reason in reasons if reason is not None]:
            raise ValueError(f"{directory} is not taken, the service goes on as it was: {refused[0]}")
        return reasons
    except BaseException:  # Ctrl-C as well
        with contextlib.suppress(RayError, RayServeException):
            answerer.broadcast("drop_next").results()
        raise


@contextlib.contextmanager
def uninterrupted():
    """Ctrl-C has no effect meanwhile: half of the replicas would answer from another artifact."""
    if threading.current_thread() is not threading.main_thread():  # the only one that it interrupts
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
