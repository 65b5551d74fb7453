"""Names that moved to ``torch_neuronx`` and are kept here with a warning (placement documentation, since SDK 2.25)."""

import warnings

import torch_neuronx


def neuron_cores_context(start_nc=-1, nc_count=-1):
    said = (
        "double of torch_neuronx: torch_neuronx.experimental.neuron_cores_context is torch_neuronx.neuron_cores_context"
    )
    warnings.warn(said, DeprecationWarning, stacklevel=2)
    return torch_neuronx.neuron_cores_context(start_nc, nc_count)
