"""Public reports, each as a small module in neuron_cases: what failed on Neuron is named, what runs is not."""

import importlib.util
import os

import pytest
import torch
from conftest import TESTS, needs_xla
from inf2 import check_module
from inf2.lowering import xla_process

CASES = TESTS / "neuron_cases"
# Each case with where it shows and words of what is said of it; its source is the first line of its file.
EXPECTED = {
    "argsort": ("finding", "integer sort is refused", "EVRF013"),
    "triangular_solve": ("finding", "linalg_solve_triangular runs on the host", "becomes a constant"),
    "fft": ("finding", "complex numbers are not on Neuron", "EVRF004"),
    "complex_rotary": ("finding", "complex numbers are not on Neuron", "EVRF004"),
    "erf_gelu": ("note", "erf did not compile", "torch.erf(h"),
    "bilinear_align_corners": (
        "note",
        "upsample_bilinear2d becomes a custom call",
        "layer up (Upsample)",
        "issues/995",
    ),
    "masked_select": ("finding", "masked_select runs on the host", "becomes a constant"),
    "early_stop": ("finding", "a value is read in Python", "early_stop.py:", "if sure.float().mean() > 0.95:"),
    "crf_decode": ("finding", "result 0 is float32 [5] that was computed on the host"),
    "boolean_assignment": ("finding", "aten::nonzero runs on the host", "rows[reverse]"),
    "int64_matmul": ("finding", "int64 dot is refused", "float32", "EVRF035"),
    "scatter_add_int": ("finding", "integer scatter with add is refused", "EVRF060"),
    "constant_64_bits": ("finding", "constant 1 has an int64 beyond 32 bits"),
    "int64_index": ("note", "int64 gather", "issues/937"),
    "dilated_conv_transpose": ("finding", "doubly dilated convolution", "layer 0 (ConvTranspose2d)", "EVRF010"),
    "positions_out_of_range": ("finding", "eager fails on example 1: IndexError"),
    "split_2d": ("finding", "differ from eager", "split with unequal sizes", "tensor_split", "xla/issues/8640"),
    "yolo_head": ("finding", "split with unequal sizes", "in layer at (Attention)"),
    "weight_norm": ("finding", "on a weight", "ends the process", "layer conv.", "remove_parametrizations"),
    "yolos": ("finding", "upsample_bicubic2d runs on the host", "on a weight", "layer model.vit.embeddings"),
    "cached_grid_on_cpu": ("note", "made on the host", "register it as a buffer", "issues/757"),
    "mask_minus_infinity": ("note", "not finite", "mask_minus_infinity.py:", "--enable-saturate-infinity"),
    "argument_order": ("note", "by their order, to input_ids, attention_mask, langs; left out: token_type_ids"),
    "auto_cast": ("note", "--auto-cast matmult --auto-cast-type bf16, imitated, moves results by"),
    "dropout_in_training_mode": ("finding", "layer 1 (Dropout) draws random numbers", "eval()"),
    "batch_norm_in_training_mode": ("finding", "BatchNorm2d 1 is in training mode", "eval()"),
    "mask_slice_assignment": ("finding", "a slice is overwritten by its own masked_fill", "transformers/issues/30259"),
    "fp8": ("finding", "float8_e4m3fn is no type of Inf2", "bfloat16", "EVRF051"),
    "bert_full_mask": ("finding", "input attention_mask is in no result"),
    "bert": ("clean", "a value of an input is read in Python", "trace with a padded example"),
    "bert_dict_output": ("clean", "forward returns a SequenceClassifierOutput", "by position: logits"),
    "whisper_decoder": ("clean", "a value that no input changes is read in Python"),
    "nested_outputs": ("clean", "by position: 0, 1[0][0], 1[0][1]"),
    **dict.fromkeys(("clip", "deberta_v2", "distilbert", "gpt2_features_no_cache", "perceiver"), ("clean",)),
    **dict.fromkeys(("resnet", "roberta", "swin", "t5_encoder", "unet", "vit"), ("clean",)),
    **dict.fromkeys(("weight_norm_folded", "yolo_head_slices"), ("clean",)),
}


@pytest.fixture(scope="module", autouse=True)
def quick_compiler():
    """One child process whose XLA compiles without optimization, which is most of the time."""
    flags = os.environ.get("XLA_FLAGS")
    os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    if importlib.util.find_spec("torch_xla"):
        xla_process().end()
    yield
    os.environ.pop("XLA_FLAGS")
    if flags is not None:
        os.environ["XLA_FLAGS"] = flags


def load(name):
    """A case, as a file that another process cannot import by name."""
    torch.manual_seed(0)
    specification = importlib.util.spec_from_file_location(f"case_{name}", CASES / f"{name}.py")
    case = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(case)
    return case


def test_every_case_is_expected():
    assert {path.stem for path in CASES.glob("*.py")} == {*EXPECTED, "large_literal", "str_and_int_inputs"}


@needs_xla
@pytest.mark.parametrize("name", EXPECTED)
def test_what_is_said_of_a_public_report(name):
    kind, *words = EXPECTED[name]
    case = load(name)
    checked = check_module(case.module, case.examples)
    assert bool(checked.findings) == (kind == "finding"), checked.findings
    said = checked.findings if kind == "finding" else checked.notes
    assert not words or any(all(word in sentence for word in words) for sentence in said), said


@needs_xla
def test_a_literal_beyond_the_limit_is_named(monkeypatch):
    monkeypatch.setattr("inf2.findings.CONSTANT_BYTES", 100_000)
    case = load("large_literal")
    (found,) = check_module(case.module, case.examples).findings
    assert "constants have" in found and "register them as buffers" in found and "issues/987" in found


def test_inputs_that_are_no_tensors_are_refused():
    case = load("str_and_int_inputs")
    with pytest.raises(ValueError, match="example input speed is a int: only tensors cross the trace boundary"):
        check_module(case.module, case.examples)
