"""trace() makes an artifact that knows what it is; from_pretrained() refuses every other one."""

import dataclasses
import importlib.metadata
import json
import os
import signal

import inf2.artifact
import pytest
import torch
from conftest import (
    TINY_SHAPES,
    answer_eagerly,
    cut,
    make_pixels,
    make_questions,
    make_tiny_blip,
    pad,
    read_json,
    start_python,
)
from torch import nn

import blip_helpers
from blip_helpers import (
    BlipShapes,
    CachedDecoder,
    DecoderCachedGenerator,
    NeuronBlipForQuestionAnswering,
    read_manifest,
    trace,
)

VISION, ENCODER, DECODER = PARTS = ("vision_model", "text_encoder", "text_decoder")
FILES = ["manifest.json", *sorted(f"{part}.pt" for part in PARTS)]
QUESTIONS, PIXELS = make_questions([4, 9, 2]), make_pixels(3)


@pytest.fixture(scope="module")
def expected(tiny):
    return cut(answer_eagerly(tiny, QUESTIONS, PIXELS, max_new_tokens=TINY_SHAPES.answer_length - 1))


def answers(compiled):
    ids, mask = pad(QUESTIONS)
    return cut(compiled.generate(ids, PIXELS, mask))


def reasons(capsys):
    """What trace() said of each part: "" where it was kept."""
    lines = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    said = {part: text.strip() for part, text in lines if part in PARTS}
    assert list(said) == list(PARTS)
    assert all(text == "kept" or text.startswith("traced: ") for text in said.values())
    return {part: text.removeprefix("kept").removeprefix("traced: ") for part, text in said.items()}


@pytest.fixture
def traced_before(traced_directory, monkeypatch):
    """Tracing takes long. Where model and shapes are those of the session, what was traced before is as good."""
    parts = {"NeuronVisionModel": VISION, "CachedTextEncoder": ENCODER, "CachedDecoder": DECODER}

    def load_instead(module, *args, **kwargs):
        return blip_helpers.load_traced(traced_directory / f"{parts[type(module).__name__]}.pt")

    monkeypatch.setattr("inf2.artifact.trace_module", load_instead)


def edit_manifest(directory, change):
    """Change a manifest as somebody would who also knows how it protects itself."""
    manifest = read_manifest(directory)
    change(manifest)
    inf2.artifact._write_manifest(directory, manifest)


# Made, kept, loaded


def test_trace_makes_an_artifact_and_loads_it(tiny, tmp_path, expected, capsys):
    compiled = trace(tiny, tmp_path / "deep" / "in" / "a folder", TINY_SHAPES)
    assert set(reasons(capsys).values()) == {"not traced yet"}
    assert answers(compiled) == expected
    assert sorted(path.name for path in (tmp_path / "deep" / "in" / "a folder").iterdir()) == FILES


def test_a_second_trace_keeps_everything(tiny, artifact, capsys, expected):
    before = {name: (artifact / name).stat().st_mtime_ns for name in FILES if name.endswith(".pt")}
    compiled = trace(tiny, str(artifact), TINY_SHAPES)
    assert set(reasons(capsys).values()) == {""}
    assert {name: (artifact / name).stat().st_mtime_ns for name in before} == before
    assert answers(compiled) == expected


def test_an_artifact_may_be_moved(artifact, tmp_path, expected):
    moved = artifact.rename(tmp_path / "elsewhere")
    assert answers(NeuronBlipForQuestionAnswering.from_pretrained(moved)) == expected


def test_another_process_loads_it_and_gives_the_same_tokens(artifact, expected):
    code = """
import json, sys
from blip_helpers import NeuronBlipForQuestionAnswering
from test_artifact import answers
print(json.dumps(answers(NeuronBlipForQuestionAnswering.from_pretrained(sys.argv[1]))))
"""
    assert read_json(start_python(code, artifact)) == expected


def test_the_manifest_says_what_the_artifact_is(artifact):
    manifest = json.loads((artifact / "manifest.json").read_text())
    assert manifest["shapes"] == dataclasses.asdict(TINY_SHAPES)
    assert manifest["decoder"] == "cached" and manifest["backend"] == blip_helpers.default_backend()
    assert list(manifest["parts"]) == list(PARTS)
    for part in manifest["parts"].values():
        assert {"kind", "inputs", "state", "dtype", "weights", "sha256", "versions", "compiler_args"} <= set(part)
        assert part["versions"]["torch"] in torch.__version__
    rows, batch = TINY_SHAPES.rows, TINY_SHAPES.batch_size
    question, answer = TINY_SHAPES.question_length, TINY_SHAPES.answer_length
    assert manifest["parts"][ENCODER]["inputs"]["input_ids"] == f"int64 [{batch}, {question}]"
    assert manifest["parts"][DECODER]["inputs"]["input_ids"] == f"int64 [{rows}, 1]"
    assert f"float32 [{rows}, 4, {answer}, 8]" in manifest["parts"][DECODER]["state"].values()
    assert manifest["parts"][VISION]["inputs"] == {"pixel_values": "float32 [1, 3, 32, 32]"}


def test_trace_leaves_the_model_alone(tmp_path, capsys):
    model = make_tiny_blip()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trace(model, tmp_path, TINY_SHAPES)
    assert not capsys.readouterr().err
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(m.training or m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    assert all(p.requires_grad for p in model.parameters())


def test_a_configuration_of_many_labels_makes_a_valid_artifact(tmp_path):
    """JSON knows no integer keys: a dict of more than ten changes its order on the way."""
    model = make_tiny_blip()
    model.config.id2label = {i: f"label {i}" for i in range(12)}
    assert (
        trace(model, tmp_path, BlipShapes(question_length=4, answer_length=4)).config.id2label == model.config.id2label
    )


@pytest.mark.parametrize(("tracing", "loading"), [(False, True), (True, False)])
def test_an_artifact_of_any_mode_answers_in_any_mode(tiny, tmp_path, tracing, loading, expected):
    with torch.inference_mode(tracing):
        trace(tiny, tmp_path, TINY_SHAPES)
    with torch.inference_mode(loading):
        compiled = NeuronBlipForQuestionAnswering.from_pretrained(tmp_path)
    for calling in (False, True):
        with torch.inference_mode(calling):
            assert answers(compiled) == expected


def test_a_model_made_in_inference_mode_is_traced(tmp_path, expected):
    with torch.inference_mode():
        model = make_tiny_blip()
    assert answers(trace(model, tmp_path, TINY_SHAPES)) == expected


def test_generation_settings_of_the_text_decoder_are_part_of_it(artifact, capsys):
    model = make_tiny_blip()
    model.text_decoder.generation_config.repetition_penalty = 3.0
    compiled = trace(model, artifact, TINY_SHAPES)
    assert set(reasons(capsys).values()) == {""}
    assert answers(compiled) == cut(
        answer_eagerly(model, QUESTIONS, PIXELS, max_new_tokens=TINY_SHAPES.answer_length - 1)
    )
    assert compiled.text_decoder.generation_config.repetition_penalty == 3.0


def test_loading_makes_no_weights_of_its_own(artifact, monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("a layer of weights was made")

    for layer in (nn.Linear, nn.Embedding, nn.Conv2d, nn.LayerNorm):
        monkeypatch.setattr(layer, "__init__", never)
    NeuronBlipForQuestionAnswering.from_pretrained(artifact)


def test_loading_draws_no_random_numbers(artifact):
    before = torch.random.get_rng_state()
    NeuronBlipForQuestionAnswering.from_pretrained(artifact)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_an_artifact_holds_each_weight_once(tiny, compiled):
    cached = isinstance(compiled.text_decoder, DecoderCachedGenerator)
    state = CachedDecoder(tiny.text_decoder, TINY_SHAPES).state if cached else []
    held = [*compiled.parameters()]
    assert sum(p.numel() for p in held) - sum(p.numel() for p in state) == sum(p.numel() for p in tiny.parameters())


# What changes, is traced again, and nothing else


def with_weight(name):
    def change():
        model = make_tiny_blip()
        with torch.no_grad():
            weight = dict(model.named_parameters())[name].view(-1)
            weight[-1] = torch.nextafter(weight[-1], torch.tensor(9.0))
        return model, {}

    return change


def with_heads(config):
    def change():
        model = make_tiny_blip(**({"num_attention_heads": 2} if config == "text_config" else {}))
        if config == "vision_config":
            model.config.vision_config.hidden_act = "relu"
        return model, {}

    return change


def with_shapes(**shapes):
    return lambda: (make_tiny_blip(), {"shapes": dataclasses.replace(TINY_SHAPES, **shapes)})


CHANGES = {
    "a weight of the image graph": (with_weight("vision_model.post_layernorm.bias"), {VISION}, "weights"),
    "a weight of the question graph": (
        with_weight("text_encoder.encoder.layer.1.output.dense.bias"),
        {ENCODER},
        "weights",
    ),
    "a weight of the decoder": (with_weight("text_decoder.cls.predictions.bias"), {DECODER}, "weights"),
    "heads": (with_heads("text_config"), {ENCODER, DECODER}, "configuration"),
    "activation": (with_heads("vision_config"), {VISION}, "configuration"),
    "question_length": (with_shapes(question_length=9), {ENCODER, DECODER}, "int64 [3, 10], is int64 [3, 9]"),
    "answer_length": (with_shapes(answer_length=9), {DECODER}, "[6, 4, 8, 8], is float32 [6, 4, 9, 8]"),
    "batch_size": (with_shapes(batch_size=2), {ENCODER, DECODER}, "[3, 10], is int64 [2, 10]"),
    "num_beams": (with_shapes(num_beams=1), {DECODER}, "[6, 1], is int64 [3, 1]"),
    "rows split otherwise": (with_shapes(num_beams=3, batch_size=2), {ENCODER}, "[3, 10], is int64 [2, 10]"),
    "compiler_args": (lambda: (make_tiny_blip(), {"compiler_args": "--optlevel 3"}), set(PARTS), "--optlevel"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_changed_is_traced_again_and_the_reason_given(artifact, capsys, change):
    make, changed, why = CHANGES[change]
    model, arguments = make()
    arguments = {"shapes": TINY_SHAPES} | arguments
    compiled = trace(model, artifact, **arguments)
    said = reasons(capsys)
    assert {part for part, reason in said.items() if reason} == changed
    assert all(why in (said[ENCODER] if ENCODER in changed else said[part]) for part in changed)
    limit = {"max_new_tokens": arguments["shapes"].answer_length - 1}
    assert answers(compiled) == cut(answer_eagerly(model, QUESTIONS, PIXELS, **limit))


@pytest.mark.usefixtures("traced_before")
@pytest.mark.parametrize("package", ["torch", "transformers"])
def test_another_version_is_refused_and_traced_again(tiny, artifact, capsys, monkeypatch, package):
    version = importlib.metadata.version
    was = version(package).split("+")[0]
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "99.1" if name == package else version(name))
    with pytest.raises(ValueError, match=f"{package} was {was}, is 99.1.*trace"):
        NeuronBlipForQuestionAnswering.from_pretrained(artifact)
    trace(tiny, artifact, TINY_SHAPES)
    assert set(reasons(capsys).values()) == {f"{package} was {was}, is 99.1"}


def test_another_build_of_the_same_version_is_the_same(artifact, monkeypatch):
    version = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version(name).split("+")[0] + "+other")
    NeuronBlipForQuestionAnswering.from_pretrained(artifact)


def test_an_artifact_for_neuron_is_refused_where_neuron_is_not(artifact, monkeypatch):
    monkeypatch.setattr("inf2.tracing.neuron_is_here", lambda: False)

    def to_neuron(manifest):
        manifest["backend"] = "neuron"

    edit_manifest(artifact, to_neuron)
    with pytest.raises(ValueError, match="torch_neuronx is not installed"):
        NeuronBlipForQuestionAnswering.from_pretrained(artifact)


# Damage


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def swap(path):
    other = path.with_name(f"{DECODER}.pt" if path.stem != DECODER else f"{VISION}.pt")
    path.write_bytes(other.read_bytes())


DAMAGE = {
    "one bit": flip,
    "one byte short": truncate,
    "empty": lambda path: path.write_bytes(b""),
    "missing": lambda path: path.unlink(),
    "a part of another kind": swap,
}


@pytest.mark.usefixtures("traced_before")
@pytest.mark.parametrize(
    ("damage", "part"),
    [*(("one bit", part) for part in PARTS), *zip(list(DAMAGE)[1:], (VISION, ENCODER, DECODER, VISION), strict=True)],
)
def test_a_damaged_part_is_refused_and_repaired(tiny, artifact, capsys, expected, damage, part):
    DAMAGE[damage](artifact / f"{part}.pt")
    with pytest.raises(ValueError, match=f"{part}.pt (is missing|was changed).*trace"):
        NeuronBlipForQuestionAnswering.from_pretrained(artifact)
    assert answers(trace(tiny, artifact, TINY_SHAPES)) == expected
    said = reasons(capsys)
    assert [name for name in PARTS if said[name]] == [part]
    assert f"{part}.pt" in said[part]


def not_one_digit_more(path):
    text = path.read_text()
    assert text.count('"answer_length": 8') == 1
    path.write_text(text.replace('"answer_length": 8', '"answer_length": 9'))


MANIFESTS = {
    "changed": not_one_digit_more,
    "missing": lambda path: path.unlink(),
    "empty": lambda path: path.write_text(""),
    "half": lambda path: path.write_text(path.read_text()[: path.stat().st_size // 2]),
    "no JSON": lambda path: path.write_bytes(b"\xff\xfe\x00\x01"),
    "no object": lambda path: path.write_text("null"),
    "a list": lambda path: path.write_text("[]"),
    "an empty object": lambda path: path.write_text("{}"),
    "of another program": lambda path: path.write_text('{"name": "app", "sha256": "0"}'),
    "without its hash": lambda path: path.write_text(
        json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "sha256"})
    ),
}


@pytest.mark.parametrize("damage", MANIFESTS)
def test_a_damaged_manifest_is_refused(artifact, damage):
    MANIFESTS[damage](artifact / "manifest.json")
    with pytest.raises(ValueError, match=r"manifest\.json"):
        NeuronBlipForQuestionAnswering.from_pretrained(artifact)


@pytest.mark.usefixtures("traced_before")
@pytest.mark.parametrize("damage", ["changed", "missing", "half", "a list"])
def test_with_a_damaged_manifest_everything_is_traced_again(tiny, artifact, capsys, expected, damage):
    MANIFESTS[damage](artifact / "manifest.json")
    assert answers(trace(tiny, artifact, TINY_SHAPES)) == expected
    assert all(reasons(capsys).values())


@pytest.mark.usefixtures("traced_before")
def test_a_manifest_of_another_format_is_refused(tiny, artifact, capsys, monkeypatch):
    monkeypatch.setattr(inf2.artifact, "FORMAT", inf2.artifact.FORMAT + 1)
    with pytest.raises(ValueError, match="format"):
        NeuronBlipForQuestionAnswering.from_pretrained(artifact)
    trace(tiny, artifact, TINY_SHAPES)
    assert all(reasons(capsys).values())


def test_every_other_file_is_foreign(tmp_path):
    for directory in (tmp_path, tmp_path / "none"):
        with pytest.raises(ValueError, match=r"no manifest\.json"):
            NeuronBlipForQuestionAnswering.from_pretrained(directory)


# Interruptions


def leftovers(directory):
    return sorted(path.name for path in directory.iterdir() if path.name not in FILES)


@pytest.mark.usefixtures("traced_before")
@pytest.mark.parametrize(
    ("part", "error"),
    [*zip(PARTS, (OSError("No space left on device"), KeyboardInterrupt(), MemoryError()), strict=True)],
)
def test_an_exception_leaves_whole_parts_only(tiny, tmp_path, capsys, monkeypatch, expected, part, error):
    save = torch.jit.save

    def fail(traced, file):
        if part in str(file.name):
            file.write(b"half")
            raise error
        save(traced, file)

    with monkeypatch.context() as patched, pytest.raises(type(error)):
        patched.setattr(torch.jit, "save", fail)
        trace(tiny, tmp_path, TINY_SHAPES)
    assert not leftovers(tmp_path)
    with pytest.raises(ValueError, match=f"{part}.* not traced yet.*trace"):
        NeuronBlipForQuestionAnswering.from_pretrained(tmp_path)
    capsys.readouterr()
    assert answers(trace(tiny, tmp_path, TINY_SHAPES)) == expected
    kept = [name for name, reason in reasons(capsys).items() if not reason]
    assert kept == list(PARTS[: PARTS.index(part)])


@pytest.mark.usefixtures("traced_before")
@pytest.mark.parametrize("call", [1, 2, 7])
def test_a_rename_that_fails_leaves_no_unfinished_file(tiny, tmp_path, monkeypatch, expected, call):
    replace, calls = os.replace, []

    def fail(source, target):
        calls.append(target)
        if len(calls) == call:
            raise OSError("Input/output error")
        replace(source, target)

    with monkeypatch.context() as patched, pytest.raises(OSError, match="Input/output"):
        patched.setattr(os, "replace", fail)
        trace(tiny, tmp_path, TINY_SHAPES)
    assert not leftovers(tmp_path)
    with pytest.raises(ValueError, match="trace"):
        NeuronBlipForQuestionAnswering.from_pretrained(tmp_path)
    assert answers(trace(tiny, tmp_path, TINY_SHAPES)) == expected


KILLS = {
    "while the second part is written": """
def save(traced, file, real=torch.jit.save):
    if "text_encoder" in str(file.name):
        file.write(b"half of it")
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    real(traced, file)
torch.jit.save = save
""",
    "before the manifest names the second part": """
def save_traced(traced, path, real=inf2.artifact.save_traced):
    real(traced, path)
    if "text_encoder" in str(path):
        os.kill(os.getpid(), signal.SIGKILL)
inf2.artifact.save_traced = save_traced
""",
    "while the manifest is written": """
def replace(source, target, real=os.replace, calls=[]):
    calls.append(target)
    if len(calls) == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    real(source, target)
os.replace = replace
""",
}


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """The directories in which trace() was killed; all at once, because importing torch is what takes long."""
    processes, directories = [], {}
    for kill, patch in KILLS.items():
        directories[kill] = tmp_path_factory.mktemp("killed") / "artifact"
        code = f"""
import os, signal, sys
import torch
import blip_helpers
import inf2.artifact
from conftest import TINY_SHAPES, make_tiny_blip
{patch}
blip_helpers.trace(make_tiny_blip(), sys.argv[1], TINY_SHAPES)
"""
        processes.append(start_python(code, directories[kill]))
    for process in processes:
        errors = process.communicate(timeout=900)[1]
        assert process.returncode == -signal.SIGKILL, errors
    return directories


@pytest.mark.usefixtures("traced_before")
@pytest.mark.parametrize("kill", KILLS)
def test_a_killed_trace_is_refused_and_goes_on(killed, tiny, capsys, expected, kill):
    directory = killed[kill]
    with pytest.raises(ValueError, match=r"not traced yet.*trace"):
        NeuronBlipForQuestionAnswering.from_pretrained(directory)
    capsys.readouterr()
    assert answers(trace(tiny, directory, TINY_SHAPES)) == expected
    assert reasons(capsys) == {VISION: "", ENCODER: "not traced yet", DECODER: "not traced yet"}
    assert not leftovers(directory)


# Arguments of trace()


def test_a_model_in_training_mode_is_a_value_error(tmp_path):
    with pytest.raises(ValueError, match=r"training mode.*eval"):
        trace(make_tiny_blip().train(), tmp_path)


@pytest.mark.parametrize("part", PARTS)
def test_a_part_in_training_mode_is_a_value_error(tmp_path, part):
    model = make_tiny_blip()
    getattr(model, part).train()
    with pytest.raises(ValueError, match=r"training mode.*eval"):
        trace(model, tmp_path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_model_of_another_dtype_is_a_value_error_and_harms_nothing(artifact, dtype):
    with pytest.raises(ValueError, match=f"{str(dtype).removeprefix('torch.')}.*float32"):
        trace(make_tiny_blip().to(dtype), artifact, TINY_SHAPES)
    NeuronBlipForQuestionAnswering.from_pretrained(artifact)


@pytest.mark.parametrize(
    "model", [None, "Salesforce/blip-vqa-base", nn.Linear(2, 2).eval()], ids=lambda m: type(m).__name__
)
def test_what_is_no_blip_is_a_value_error(tmp_path, model):
    with pytest.raises(ValueError, match="model is a"):
        trace(model, tmp_path)


@pytest.mark.parametrize("shapes", [(1, 1, 16, 24), {"batch_size": 2}, 4], ids=str)
def test_shapes_that_are_none_are_a_value_error(tiny, tmp_path, shapes):
    with pytest.raises(ValueError, match="shapes is a"):
        trace(tiny, tmp_path, shapes)


@pytest.mark.parametrize("lengths", [{"question_length": 33}, {"answer_length": 33}], ids=str)
def test_lengths_beyond_the_positions_of_the_model_are_a_value_error(tiny, tmp_path, lengths):
    with pytest.raises(ValueError, match=r"33.*32 positions"):
        trace(tiny, tmp_path, BlipShapes(**lengths))


def test_all_positions_of_the_model_can_be_used(tiny, tmp_path):
    compiled = trace(tiny, tmp_path, BlipShapes(question_length=32, answer_length=32))
    question, pixels = make_questions([32]), make_pixels(1)
    actual = compiled.generate(question[0], pixels, min_new_tokens=31)
    assert actual.tolist() == answer_eagerly(tiny, question, pixels, min_new_tokens=31, max_new_tokens=31)


def test_a_directory_that_is_a_file_is_a_value_error(tiny, tmp_path):
    path = tmp_path / "file"
    path.write_text("mine")
    with pytest.raises(ValueError, match="file is a file"):
        trace(tiny, path, TINY_SHAPES)
    with pytest.raises(ValueError, match=r"no manifest\.json"):
        NeuronBlipForQuestionAnswering.from_pretrained(path)
    assert path.read_text() == "mine"


def test_neuron_without_its_package_is_a_value_error(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("inf2.tracing.neuron_is_here", lambda: False)
    with pytest.raises(ValueError, match="torch_neuronx is not installed"):
        trace(tiny, tmp_path / "new", TINY_SHAPES, backend="neuron")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("arguments", [{"backend": "gpu"}, {"decoder": "fast"}], ids=str)
def test_an_unknown_backend_or_decoder_is_a_value_error(tiny, tmp_path, arguments):
    ((name, value),) = arguments.items()
    with pytest.raises(ValueError, match=f"{name} is '{value}'"):
        trace(tiny, tmp_path / "new", TINY_SHAPES, **arguments)
    assert not (tmp_path / "new").exists()


@pytest.mark.usefixtures("traced_before")
def test_other_files_of_the_directory_stay(tiny, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    trace(tiny, tmp_path, TINY_SHAPES)
    assert (tmp_path / "notes.txt").read_text() == "mine"
