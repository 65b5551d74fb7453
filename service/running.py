"""``python blip.py serve``: the service on this machine, started, and ended with all its processes."""

import contextlib
import logging
import os
import signal
import socket
import tempfile
import threading
import time
import urllib.request

import ray
from ray import serve
from ray.exceptions import RayError

from blip_helpers import default_backend
from service.app import VqaArguments, vqa

TIMEOUT = 30  # seconds that a request may take before it is answered with 408


@contextlib.contextmanager
def started(arguments, *, host="127.0.0.1", port=8000, metrics_port=None, page=False):
    """The service on this machine, as long as the ``with`` goes on; then every process that it started has ended.

    `arguments` is a `service.app.VqaArguments`. Yields the address that it answers at; what it counts is at
    `metrics_port`, for Prometheus. On Neuron the cores are those that Ray detects; elsewhere as many are declared as
    there are replicas. A `ValueError` says what is wrong with the artifact, a `RuntimeError` what is with the machine.
    """
    check_port(host, port, "--port")
    if metrics_port is not None:
        check_port("0.0.0.0", metrics_port, "--metrics-port")
    with tempfile.TemporaryDirectory(prefix="blip-") as directory:
        application = vqa(arguments.model_copy(update={"serving": arguments.serving or f"{directory}/serving.json"}))
        with cluster(arguments.replicas, arguments.ingresses or 1, host, port, metrics_port):
            run(application)
            if page:
                from service.page import page as page_of  # Gradio takes seconds to import

                run(page_of({}), "page", "/")
            address = f"http://{host}:{port}"
            wait_until_answered(f"{address}/vqa/health")
            yield address


@contextlib.contextmanager
def cluster(replicas, ingresses, host, port, metrics_port=None):
    """Ray and Ray Serve on this machine, with a declared core for each replica where there is no Neuron."""
    quiet()
    cores = {} if default_backend() == "neuron" else {"resources": {"neuron_cores": replicas}}
    with settings_of_ray():
        try:
            ray.init(
                # An ingress and a replica each ask for a CPU: on a small machine they share what there is.
                num_cpus=max(os.cpu_count() or 1, replicas + ingresses + 1),
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.CRITICAL,
                object_store_memory=2**28,
                _metrics_export_port=metrics_port,
                **cores,
            )
            if replicas > (there := int(ray.cluster_resources().get("neuron_cores", 0))):
                raise RuntimeError(f"{replicas} replicas need a NeuronCore each and there are {there}: ask for fewer")
            start_serve(http_options={"host": host, "port": port, "request_timeout_s": TIMEOUT})
            yield
        finally:
            ray.shutdown()  # ends the processes of the whole cluster, which was started for this service alone


def quiet():
    for name in ("ray", "ray.serve"):  # what is wrong comes as an exception or a status
        logging.getLogger(name).setLevel(logging.CRITICAL)


def start_serve(**options):
    """As ``serve.start``, which gives its proxies a fixed minute, too little on a busy machine: a second call finds the
    controller that the first one started, and the proxies go on starting meanwhile."""
    options["logging_config"] = {"log_level": "ERROR", "enable_access_log": False}
    try:
        serve.start(**options)
    except (TimeoutError, RayError):
        serve.start(**options)


def wait_until_answered(url, seconds=120):
    """HAProxy begins to listen some time after Serve says that all runs; a `RuntimeError` if it does not."""
    until, why = time.monotonic() + seconds, None
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    while time.monotonic() < until:
        try:
            with opener.open(url, timeout=TIMEOUT):
                return
        except OSError as error:  # refused, or a status that is none of success
            why = error
            time.sleep(0.1)
    raise RuntimeError(f"{url} does not answer after {seconds} s ({why})")


def run(application, name="vqa", route_prefix="/vqa"):
    without_requests = {"log_level": "WARNING", "enable_access_log": False}
    try:
        serve.run(application, name=name, route_prefix=route_prefix, logging_config=without_requests)
    except (RuntimeError, RayError) as error:  # a traceback of another process; its last line says what is wrong
        raise RuntimeError(f"{name} did not start: {str(error).strip().splitlines()[-1]}") from error


@contextlib.contextmanager
def settings_of_ray():
    """For the processes that Ray starts: one event loop each; a directory for the page's pictures and for HAProxy's
    files, and ports for its figures, so that two services on a machine share none."""
    before = dict(os.environ)
    with tempfile.TemporaryDirectory(prefix="blip-") as directory:
        os.environ.update(
            GRADIO_TEMP_DIR=f"{directory}/pictures",
            GRADIO_ANALYTICS_ENABLED="0",
            RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP="0",
            RAY_SERVE_HAPROXY_CONFIG_FILE_LOC=f"{directory}/haproxy.cfg",
            RAY_SERVE_HAPROXY_SOCKET_PATH=f"{directory}/admin.sock",
            RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH=f"{directory}/metrics.sock",
            RAY_SERVE_HAPROXY_SERVER_STATE_BASE=directory,
            RAY_SERVE_HAPROXY_SERVER_STATE_FILE=f"{directory}/state",
            RAY_SERVE_HAPROXY_METRICS_PORT=str(free_port()),
            RAY_SERVE_HAPROXY_STATS_PORT=str(free_port()),
            RAY_SERVE_HAPROXY_NBTHREAD=str(min(4, os.cpu_count() or 1)),
        )
        try:
            yield
        finally:
            os.environ.clear()
            os.environ.update(before)


def free_port():
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def check_port(host, port, option):
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except (OSError, OverflowError) as error:
            why = getattr(error, "strerror", error)
            raise RuntimeError(f"port {port} of {host} cannot be used ({why}): choose another {option}") from None


def serve_until_interrupted(arguments):
    """``python blip.py serve``: start, say where to look and what to type, wait for Ctrl-C."""
    stop = threading.Event()
    signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGINT))  # until all is there both end it at once
    given = {name: value for name, value in vars(arguments).items() if name in VqaArguments.model_fields}
    print(f"starting {arguments.replicas} replicas of {arguments.directory} ...", flush=True)
    metrics_port = arguments.metrics_port or free_port()
    where = {"host": arguments.host, "port": arguments.port, "metrics_port": metrics_port}
    with started(VqaArguments(**given), **where, page=True) as address:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: stop.set())
        print(HOW_TO.format(address=address, metrics=f"http://127.0.0.1:{metrics_port}/metrics"), flush=True)
        stop.wait()
        print("ending ...", flush=True)
    return 0


HOW_TO = """
a page to try it on    {address}/
the API, described     {address}/docs
what is counted        {metrics}
a new artifact         python blip.py reload DIRECTORY
to end it              Ctrl-C

In Python:

    from huggingface_hub import InferenceClient

    client = InferenceClient("{address}/vqa")
    client.visual_question_answering(image="picture.jpg", question="how many shapes are there?")
"""
