"""What neuronx-cc is known to refuse for Inf2, or may refuse, each with the page or issue that says so.

Pages bear no date of their own: that of a page's last change in https://github.com/aws-neuron/aws-neuron-sdk stands
beside it. Read in 2026-11, up to SDK 2.33. No page names Inf2's compiler apart, but where it says so.
"""

_DOCS = "https://awsdocs-neuron.readthedocs-hosted.com/en/latest"
_TRACE_PAGE = f"{_DOCS}/frameworks/torch/torch-neuronx/api-reference-guide/inference/api-torch-neuronx-trace.html"
_ANALYZE_PAGE = _TRACE_PAGE.replace("-trace.html", "-analyze.html")
_JAX_PAGE = f"{_DOCS}/frameworks/jax/setup/jax-neuronx-known-issues.html"
_TYPES_PAGE = f"{_DOCS}/about-neuron/arch/neuron-features/data-types.html"
_ERRORS = f"{_DOCS}/compiler/error-codes"
_ISSUES = "https://github.com/aws-neuron/aws-neuron-sdk/issues"

# HLO operators and element types that neuronx-cc is known to refuse for Inf2, with the source of each. AWS publishes no
# complete list (``neuronx-cc list-operators --framework XLA`` prints one), so that an operator that is missing here may
# still be refused. Names that are no opcode of XLA are those of `inf2.hlo.special_name`.
REFUSED_OPERATORS = {
    "cholesky": f"{_ERRORS}/EVRF001.html",  # 2025-12-02, "an unsupported operator"; the page's example is another one
    "conditional": _JAX_PAGE,  # 2026-03-13
    "constant beyond 32 bits": f"{_ERRORS}/ESFH002.html",  # 2025-12-02 for uint64; int64 is cut to 32 bits
    "custom-call": f"{_ERRORS}/EHCA005.html",  # 2025-12-02; it takes targets of its own, which are not there on a CPU
    "doubly dilated convolution": f"{_ERRORS}/EVRF010.html",  # 2025-12-02
    "dilated reduce-window": f"{_ERRORS}/EVRF018.html",  # 2025-12-02
    "fft": _ANALYZE_PAGE,  # 2026-03-13
    "int64 dot": f"{_ERRORS}/EVRF035.html",  # 2026-08-17, int64 on all targets; int32 is computed in float32 on Inf2
    **{f"integer scatter with {computes}": f"{_ERRORS}/EVRF060.html" for computes in ("add", "multiply")},  # 2026-08-17
    **{f"integer scatter with {computes}": f"{_ERRORS}/EVRF016.html" for computes in ("minimum", "maximum")},
    **{f"integer scatter with {computes}": f"{_ERRORS}/EVRF016.html" for computes in ("and", "or")},  # 2025-12-02
    "int64 power": f"{_ERRORS}/EVRF062.html",  # 2026-08-17
    "integer sort": f"{_ERRORS}/EVRF013.html",  # 2025-12-02, of topk
    "long sort": f"{_ISSUES}/1339",  # 2026-06-02, EVRF014: along more than 16,384 numbers
    "reduce-precision": _JAX_PAGE,
    "set-dimension-size": f"{_ISSUES}/1144",
    "shift-right-arithmetic not of 32 bits": f"{_ERRORS}/EVRF022.html",  # 2025-12-02
    "sort": _TRACE_PAGE,  # 2026-03-13
    "strided convolution of dilated input": f"{_ERRORS}/EVRF011.html",  # 2025-12-02
    "triangular-solve": f"{_ERRORS}/EVRF001.html",  # 2025-12-02
    "variadic reduce-window": f"{_ERRORS}/EVRF019.html",  # 2025-12-02; cummax and cummin make it
}
# Pages that list an operator as unsupported; the others are of an error that the compiler gave.
LISTS = (_TRACE_PAGE, _ANALYZE_PAGE, _JAX_PAGE)
REFUSED_TYPES = {
    "float64": _TYPES_PAGE,
    "complex64": f"{_ERRORS}/EVRF004.html",  # 2025-12-02
    "complex128": f"{_ERRORS}/EVRF004.html",
    "float8_e4m3fn": f"{_ERRORS}/EVRF051.html",  # 2026-07-15, on Trn1 and Trn2; ESPP047 (2025-12-02) on any
    "float8_e4m3fnuz": f"{_ERRORS}/EVRF005.html",  # 2025-12-02
    "float8_e5m2fnuz": f"{_ERRORS}/EVRF005.html",
    "float8_e4m3b11fnuz": f"{_ERRORS}/EVRF005.html",
}
# What to do instead, as a clause. `torch.inverse`, the remedy on the page of EVRF001, is a custom call itself.
REMEDIES = {
    "conditional": "compute both sides and choose with torch.where",
    "constant beyond 32 bits": "int64 is cut to 32 bits on Inf2; use smaller numbers",
    "custom-call": "compute it before the trace, or by other operators",
    "doubly dilated convolution": "its input and its kernel are dilated: put the zeros into one of them by hand",
    "dilated reduce-window": "take slices with a step and their maximum",
    "fft": "multiply by the matrix of the transform",
    "int64 dot": "convert both sides to float32",
    "int64 power": "convert to float32 or int32",
    "integer sort": "convert to float32 first, which is exact up to 2**24",
    "long sort": "split the dimension",
    "shift-right-arithmetic not of 32 bits": "convert to int32 first",
    "sort": "users have seen it compile since neuronx-cc 2.18 (aws-neuron-sdk#868, 2025-06), so try it or use topk",
    "strided convolution of dilated input": "upsample and downsample apart",
    "triangular-solve": "compute it before the trace",
    "variadic reduce-window": "mask each row with a triangle and take its maximum",
    "float64": "torch-neuronx computes it in float32: convert to that",
    "complex64": "compute with real and imaginary parts",
    "complex128": "compute with real and imaginary parts",
    **{f"float8_{kind}": "convert to bfloat16 or float16" for kind in ("e4m3fn", "e4m3fnuz", "e5m2fnuz")},
    **{name: "convert to float32 first" for name in REFUSED_OPERATORS if name.startswith("integer scatter")},
}
DYNAMIC_SHAPES = f"{_ERRORS}/EMOD025.html"  # 2026-07-15
# Not refused, or not always: what is said of them, and where. On Neuron erf, topk and argmax may become operators of
# the compiler's own, AwsNeuronErf, AwsNeuronTopK and AwsNeuronArgMax (on the page of EHCA005), which no CPU shows.
REPORTED_OPERATORS = {
    "erf": ("did not compile in one model on SDK 2.21", f"{_ISSUES}/1081"),
    "topk": ("is a sort on a CPU, and taken by neuronx-cc for floating point", f"{_ERRORS}/EVRF013.html"),
    "variadic reduce": ("is not supported in JAX; argmax is one on a CPU", _JAX_PAGE),
    "while": ("is supported if it is static", _JAX_PAGE),
    "float64 number": ("is what torch-xla makes of a number in Python, to be converted", _TYPES_PAGE),
    "integer dot": ("is computed in float32, exact up to 2**24", f"{_ERRORS}/EVRF035.html"),
    "int64 gather": ("looked up zeros for every second number in old releases", f"{_ISSUES}/937"),  # 2024-07
}
# As above, of operators of PyTorch that a graph on a CPU does not show.
REPORTED_CALLS = {
    f"aten::upsample_{kind}2d": (
        "becomes a custom call Resize on Neuron, which SDK 2.20 refused and 2.27 lists as known",
        f"{_ISSUES}/995",
    )
    for kind in ("bilinear", "nearest", "_nearest_exact")
}
MASKED_SLICE = "https://github.com/huggingface/transformers/issues/30259"  # 2024-04
HOST_ON_WEIGHT = f"{_ISSUES}/1265"  # 2025-12, AWS's release notes of 2.28: yolos, wav2vec2 and convbert
SPLIT = "https://github.com/pytorch/xla/issues/8640"  # AWS's page on PyTorch 2.9; on Inf2 aws-neuron-sdk#1323 (2026-05)
CONSTANT_BYTES, CONSTANT_BYTES_SOURCE = 2**31, f"{_ISSUES}/987"
NESTED = f"{_ISSUES}/809"
DRIFT = f"{_ISSUES}/750"
ORDER = f"{_ISSUES}/641"
HOST_TENSORS = f"{_ISSUES}/757"
NOT_FINITE = f"{_DOCS}/compiler/neuronx-cc/api-reference-guide/neuron-compiler-cli-reference-guide.html"
INT32 = _TYPES_PAGE

# What to add to an error of torch-xla that has these words.
_NO_COMPLEX = f"complex numbers are not on Neuron, compute with real and imaginary parts ({_ERRORS}/EVRF004.html)"
HINTS = {
    "view_as_complex": _NO_COMPLEX,
    "view_as_real": _NO_COMPLEX,
    "appears to be a view operator": "torch_neuronx records without functionalization as well: use slices or indices",
    "XLA_DISABLE_FUNCTIONALIZATION": "torch_neuronx runs so: use another operator, or set it to 0 before the import",
    "Expected XLA tensor": "a tensor was made on the host: make it on an input's device, or register it as a buffer",
    "Type not supported: Float8": f"this type is not on Inf2, convert to bfloat16 ({_ERRORS}/EVRF005.html)",
}
# How to take a host operator on a weight out of a module.
UNFOLD = {
    ".parametrizations.": "fold it with torch.nn.utils.parametrize.remove_parametrizations(layer, name)",
    "aten::_weight_norm_interface": "fold it with torch.nn.utils.remove_weight_norm(layer)",
    "": "compute it once before the trace, and keep the result as the weight",
}
