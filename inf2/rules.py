"""What neuronx-cc is known to refuse for Inf2, or may refuse, each with the page or issue that says so."""

_DOCS = "https://awsdocs-neuron.readthedocs-hosted.com/en/latest"
_TRACE_PAGE = f"{_DOCS}/frameworks/torch/torch-neuronx/api-reference-guide/inference/api-torch-neuronx-trace.html"
_JAX_PAGE = f"{_DOCS}/frameworks/jax/setup/jax-neuronx-known-issues.html"
_TYPES_PAGE = f"{_DOCS}/about-neuron/arch/neuron-features/data-types.html"
_ERRORS = f"{_DOCS}/compiler/error-codes"

# HLO operators and element types that neuronx-cc is known to refuse for Inf2, with the source of each. AWS publishes no
# complete list (``neuronx-cc list-operators --framework XLA`` prints one), so that an operator that is missing here may
# still be refused.
REFUSED_OPERATORS = {
    "conditional": _JAX_PAGE,
    "custom-call": f"{_ERRORS}/EHCA005.html",  # it takes targets of its own, which are not there on a CPU
    "fft": f"{_TRACE_PAGE.replace('-trace.html', '-analyze.html')}",
    "reduce-precision": _JAX_PAGE,
    "set-dimension-size": "https://github.com/aws-neuron/aws-neuron-sdk/issues/1144",
    "sort": _TRACE_PAGE,
    "triangular-solve": f"{_ERRORS}/EVRF001.html",
}
REFUSED_TYPES = {
    "float64": _TYPES_PAGE,
    "complex64": f"{_ERRORS}/EVRF004.html",
    "complex128": f"{_ERRORS}/EVRF004.html",
}
DYNAMIC_SHAPES = f"{_ERRORS}/EMOD025.html"
# Not refused, or not always: what is said of them, and where. On Neuron erf, topk and argmax may become operators of
# the compiler's own, AwsNeuronErf, AwsNeuronTopK and AwsNeuronArgMax (on the page of EHCA005), which no CPU shows.
REPORTED_OPERATORS = {
    "erf": ("did not compile in one model on SDK 2.21", "https://github.com/aws-neuron/aws-neuron-sdk/issues/1081"),
    "topk": ("is a sort on a CPU, and taken by neuronx-cc for floating point", f"{_ERRORS}/EVRF013.html"),
    "variadic reduce": ("is not supported in JAX; argmax is one on a CPU", _JAX_PAGE),
    "while": ("is supported if it is static", _JAX_PAGE),
    "float64 number": ("is what torch-xla makes of a number in Python, to be converted", _TYPES_PAGE),
}
