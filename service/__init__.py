"""Hosting: a compiled BLIP as a service, a page to try it on, on Ray Serve.

Without Ray: `faults` (what a failure of a NeuronCore means), `bodies` (what a request may hold), `admission` (how many
may wait), `answering` (a batch on a core), `batching` (how batches form), `artifacts` (what is served, and its known
answer). With Ray: `metrics`, `answerer` (a replica on a core), `ingress` (HTTP), `page`, `app` (the two applications),
and `running` (the commands). Each imports only those that stand before it.
"""
