"""The command blip.py: check, compile, report."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import (
    TESTS,
    make_tiny_blip,
    needs_xla,
)
from torch import nn
from transformers import BertConfig, BlipForImageTextRetrieval

import blip_helpers as bh

ROOT = TESTS.parent


@needs_xla
def test_files_of_the_working_directory_are_not_imported(tmp_path):
    (tmp_path / "random.py").write_text("raise RuntimeError('not this one')")
    done = subprocess.run(
        [sys.executable, ROOT / "blip.py", "check", bh.MODELS / "tiny-resnet"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def inf2(*arguments, **environment):
    command = [sys.executable, ROOT / "blip.py", *map(str, arguments)]
    # Notebooks, CI and users may have set these.
    clean = {k: v for k, v in os.environ.items() if k not in ("BLIP_MODEL", "RESNET_MODEL", "QUESTIONS")}
    return subprocess.run(
        command, cwd=ROOT, env=clean | environment, capture_output=True, text=True, timeout=600, check=False
    )


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, processor):
    directory = tmp_path_factory.mktemp("checkpoint")
    make_tiny_blip().save_pretrained(directory)
    processor.save_pretrained(directory)
    return directory


@needs_xla
def test_the_command_checks_every_graph(checkpoint):
    done = inf2("check", checkpoint, "--question-length", 4, 8, "--decoders", "cached", "unrolled")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "6 graphs checked, 0 findings" in done.stdout
    assert all(name in done.stdout for name in ("vision_model", "cached text_encoder_4", "unrolled picture_answer"))


@needs_xla
def test_the_command_fails_on_a_finding(tmp_path, processor):
    model = make_tiny_blip(tie_word_embeddings=False)
    model.config.tie_word_embeddings = False
    head = model.text_decoder.cls.predictions.decoder
    head.weight = nn.Parameter(model.text_decoder.get_input_embeddings().weight.detach().clone())
    head.bias = nn.Parameter(head.bias.detach().clone())
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    done = inf2("check", tmp_path, "--decoders", "padded")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "FOUND padded text_decoder" in done.stdout and "1 findings" in done.stdout


def test_the_command_names_another_kind_of_model(tmp_path):
    BertConfig().save_pretrained(tmp_path)
    done = inf2("check", tmp_path)
    assert done.returncode == 2 and "is a bert; this series compiles blip and resnet" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_command_names_another_head(tmp_path, processor):
    BlipForImageTextRetrieval(make_tiny_blip().config).save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    for arguments in (("check", tmp_path), ("compile", tmp_path / "artifact", "--model", tmp_path)):
        done = inf2(*arguments)
        assert done.returncode == 2 and done.stdout == "" and "Traceback" not in done.stderr
        assert "is a BlipForImageTextRetrieval: pass a BlipForQuestionAnswering" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("check", "/nowhere/at/all"), "/nowhere/at/all does not exist"),
        (("check", "--answer-length", 65), "longer than the 64 positions"),
        (("check", "--batch-size", 0), "batch_size"),
        (("report", "somewhere", "--questions", 0), "--questions is 0"),
        (("report", "somewhere", "--model", bh.MODELS / "tiny-resnet"), "is a ResNetForImageClassification"),
        (("check", "tests"), "tests"),
    ],
)
def test_a_mistake_is_a_sentence_and_exit_status_2(arguments, message):
    done = inf2(*arguments)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr


def test_damaged_weights_are_a_sentence(checkpoint, tmp_path):
    damaged = Path(shutil.copytree(checkpoint, tmp_path / "damaged"))
    (damaged / "model.safetensors").write_bytes(b"{}")
    done = inf2("check", damaged)
    assert done.returncode == 2 and "Traceback" not in done.stderr


def test_an_interrupted_import_is_no_traceback(tmp_path):
    (tmp_path / "torch.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGINT)")
    done = inf2("check", PYTHONPATH=str(tmp_path))
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "\ninterrupted\n")


@needs_xla
def test_an_interrupted_check_says_so():
    command = [sys.executable, "-u", ROOT / "blip.py", "check", bh.MODELS / "tiny-blip-vqa"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and errors.endswith("interrupted\n") and "Traceback" not in errors


def test_the_command_needs_awss_packages_to_compile(checkpoint, tmp_path):
    done = inf2("compile", tmp_path / "artifact", "--model", checkpoint)
    assert done.returncode == 2 and "torch_neuronx is not installed" in done.stderr


def test_compiled_without_a_device_and_kept_where_there_is_one(checkpoint, tmp_path):
    """Through the double of torch_neuronx: the rules of cpu_backend, and that the artifact is taken as it is."""
    log, double = tmp_path / "log", {"PYTHONPATH": f"{TESTS / 'double'}{os.pathsep}{ROOT}"}
    shapes = ("--question-length", 8, "--answer-length", 6)
    done = inf2(
        *("compile", tmp_path / "artifact", "--model", checkpoint, *shapes),
        **double | {"TORCH_NEURONX_DOUBLE_DEVICE": "0", "TORCH_NEURONX_DOUBLE_LOG": str(log)},
    )
    assert done.returncode == 0, done.stderr
    calls = [json.loads(line) for line in log.read_text().splitlines()]
    assert len(calls) == 3 and all(call["cpu_backend"] for call in calls)
    assert all(call["compiler_args"][-2:] == ["--target", "inf2"] for call in calls)
    code = f"""
import torch, blip_helpers as bh
model, _ = bh.load_blip({str(checkpoint)!r})
bh.trace(model, {str(tmp_path / "artifact")!r}, bh.BlipShapes(question_length=8, answer_length=6))
"""
    kept = subprocess.run([sys.executable, "-c", code], env=os.environ | double, capture_output=True, text=True)
    assert kept.returncode == 0, kept.stderr
    assert [line.split() for line in kept.stdout.splitlines()] == [
        ["vision_model", "kept"],
        ["text_encoder", "kept"],
        ["text_decoder", "kept"],
    ]


def test_the_report_is_a_table_of_what_came_out(tmp_path):
    model, _ = bh.load_blip(bh.MODELS / "tiny-blip-vqa")
    shapes = bh.BlipShapes(batch_size=4, question_length=(8, 16))
    bh.trace(model, tmp_path / "artifact", shapes, backend="cpu")
    done = inf2("report", tmp_path / "artifact", "--questions", 8)
    assert done.returncode == 0, done.stderr
    for row in (
        "| ran on | CPU stand-in for Neuron |",
        "| answers equal to eager | 8 of 8 |",
        "| vision_model, a call |",
        "| text_encoder_8, a call |",
        "| text_encoder_16, a call |",
        "| text_decoder, a call |",
    ):
        assert row in done.stdout


def test_the_report_is_of_the_model_that_was_traced(traced_directory):
    done = inf2("report", traced_directory)
    assert done.returncode == 2 and done.stdout == "" and "Traceback" not in done.stderr
    assert "traced from other weights" in done.stderr and "--model" in done.stderr


def test_the_report_of_no_artifact_says_so(tmp_path):
    done = inf2("report", tmp_path)
    assert done.returncode == 2 and "no manifest.json" in done.stderr and "Traceback" not in done.stderr
