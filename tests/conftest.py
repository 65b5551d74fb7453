"""A tiny random BLIP that every unit test can afford, and helpers that several test files use."""

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from hypothesis import settings
from torch import nn
from transformers import BertTokenizer, BlipConfig, BlipForQuestionAnswering, BlipImageProcessorPil, BlipProcessor

import blip_helpers

settings.register_profile("same every time", derandomize=True, deadline=None, max_examples=10)
settings.load_profile("same every time")

# The models are so small that a second thread costs more than it saves, the more so on a busy machine.
torch.set_num_threads(1)

# A shell starts what it runs in the background deaf to Ctrl-C, and so would be each command that a test interrupts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items):
    """Notebook 06 lowers graphs, which takes torch-xla; that exists for Linux on x86-64 alone."""
    if importlib.util.find_spec("torch_xla") is None:
        for item in items:
            if item.path.name.startswith("06_"):
                item.add_marker(pytest.mark.skip(reason="torch-xla is not installed"))


TESTS = Path(__file__).parent
WORDS = [
    *("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "?", ".", ","),
    *("what", "is", "this", "how", "many", "are", "there", "in", "the", "picture", "of", "where", "colour", "shape"),
    *("red", "green", "blue", "dot", "dots", "line", "lines", "left", "right", "one", "two", "three", "yes", "no"),
    *("a", "b", "c", "d", "e", "f", "g", "h", "i", "j", "and", "nothing"),
    *("[DEC]", "[ENC]"),
]
SIZE = 32
LAYER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
TINY_SHAPES = blip_helpers.BlipShapes(batch_size=3, num_beams=2, question_length=10, answer_length=8)


def make_tiny_blip(**text_config):
    """A random BLIP whose weights are large enough that another question, picture or token gives another answer."""
    config = BlipConfig(
        vision_config={**LAYER, "image_size": SIZE, "patch_size": 16, "projection_dim": 32},
        text_config={
            **LAYER,
            "encoder_hidden_size": 32,
            "projection_dim": 32,
            "vocab_size": len(WORDS),
            "max_position_embeddings": 32,
            "bos_token_id": WORDS.index("[DEC]"),
            "eos_token_id": WORDS.index("[SEP]"),
            "sep_token_id": WORDS.index("[SEP]"),
            "pad_token_id": WORDS.index("[PAD]"),
            **text_config,
        },
        projection_dim=32,
        image_text_hidden_size=32,
    )
    model = BlipForQuestionAnswering(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1:
                scale = 1 if "embedding" in name else weight.shape[-1] ** -0.5
                scale *= 2 if ".query." in name or ".key." in name else 1
                weight.copy_(scale * torch.randn(weight.shape, generator=generator))
        model.text_decoder.cls.predictions.bias[config.text_config.sep_token_id] = 16.0  # answers of many lengths
    return model


def make_processor():
    tokenizer = BertTokenizer(vocab={word: i for i, word in enumerate(WORDS)}, bos_token="[DEC]", model_max_length=32)
    return BlipProcessor(BlipImageProcessorPil(size={"height": SIZE, "width": SIZE}), tokenizer)


@pytest.fixture(scope="session")
def tiny():
    """The model; a test that changes it takes `make_tiny_blip` instead."""
    return make_tiny_blip()


@pytest.fixture(scope="session")
def processor():
    return make_processor()


@pytest.fixture(scope="session")
def traced_directory(tiny, tmp_path_factory):
    """The traced model on disk, to be read; a test that changes it takes `artifact`."""
    directory = tmp_path_factory.mktemp("traced") / "tiny"
    blip_helpers.trace(tiny, directory, TINY_SHAPES)
    return directory


@pytest.fixture(scope="session", params=["padded", "cached"])
def compiled(request, tiny, tmp_path_factory):
    return blip_helpers.trace(tiny, tmp_path_factory.mktemp(request.param), TINY_SHAPES, decoder=request.param)


@pytest.fixture(scope="session")
def assembled(tiny):
    """The assembled model around parts that are not traced: for what has nothing to do with a trace."""
    graphs = {name: module for name, (module, _) in blip_helpers.parts_to_trace(tiny, TINY_SHAPES, "padded").items()}
    generation_config = tiny.text_decoder.generation_config
    return blip_helpers.NeuronBlipForQuestionAnswering(tiny.config, graphs, TINY_SHAPES, generation_config)


@pytest.fixture
def artifact(traced_directory, tmp_path):
    """A copy of the traced model on disk."""
    return Path(shutil.copytree(traced_directory, tmp_path / "artifact"))


def make_questions(lengths, seed=0):
    """Random questions of these lengths, int64 [1, length] each, with [CLS] and [SEP] where there is room."""
    generator = torch.Generator().manual_seed(seed)
    questions = []
    for length in lengths:
        words = torch.randint(WORDS.index("what"), WORDS.index("[DEC]"), (1, length), generator=generator)
        words[:, 0] = WORDS.index("[CLS]")
        if length > 1:
            words[:, -1] = WORDS.index("[SEP]")
        questions.append(words)
    return questions


def make_pixels(count, seed=0):
    return torch.randn(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))


def pad(questions, length=None, value=0):
    """Questions [1, length] -> input_ids and attention_mask [questions, longest], padded on the right."""
    length = length or max(q.shape[1] for q in questions)
    ids = torch.cat([torch.nn.functional.pad(q, (0, length - q.shape[1]), value=value) for q in questions])
    mask = torch.cat([torch.nn.functional.pad(torch.ones_like(q), (0, length - q.shape[1])) for q in questions])
    return ids, mask


def answer_eagerly(model, questions, pixels, **generate_kwargs):
    """The truth: Hugging Face, eager, one unpadded question at a time. A list of token ids a row."""
    answers = []
    for question, image in zip(questions, pixels, strict=True):
        rows = model.generate(question, image[None], torch.ones_like(question), **generate_kwargs)
        answers += rows.tolist()
    return answers


def question_embeds(model, ids, mask, pixels):
    image_embeds = model.vision_model(pixels).last_hidden_state
    return model.text_encoder(ids, attention_mask=mask, encoder_hidden_states=image_embeds).last_hidden_state


def cut(rows):
    """Rows of token ids up to their end tokens: what follows in a batch fills up to its longest answer."""
    rows, end = [list(map(int, row)) for row in rows], WORDS.index("[SEP]")
    return [row[: row.index(end) + 1] if end in row else row for row in rows]


def start_python(code, *arguments, **popen):
    """Run a piece of Python in a process of its own, which sees this module as `conftest`."""
    path = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": path.rstrip(os.pathsep)},
        **popen,
    )


def read_json(process):
    """The last line that a process prints, from JSON."""
    output, errors = process.communicate(timeout=900)
    assert process.returncode == 0, errors
    return json.loads(output.splitlines()[-1])


# For modules that are no BLIP

needs_xla = pytest.mark.skipif(importlib.util.find_spec("torch_xla") is None, reason="torch-xla is not installed")
X = torch.tensor([[0.5, -1.0, 2.0, -0.25], [1.5, 3.0, -2.0, 0.75]])
Y = torch.tensor([[-0.5, 1.0, -3.0, 1.25], [2.5, -1.0, 0.5, -0.75]])


class Apply(nn.Module):
    """A function as a module, with a matrix of its own."""

    def __init__(self, function):
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.randn(1, 2, 4, 4), requires_grad=False)

    def forward(self, x, *more):
        return self.function(self, x, *more)


class Counter(nn.Module):
    def __init__(self):
        super().__init__()
        self.total = nn.Parameter(torch.zeros(2, 4), requires_grad=False)

    def forward(self, x):
        return self.total * 2, self.total + x


SOLUTION = re.compile(r"<details>\s*<summary>Solution.*?</summary>(.*?)</details>", re.DOTALL)
CODE = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)


def solutions(notebook):
    """The code of each folded solution in a notebook."""
    folded = [part for cell in notebook.cells if cell.cell_type == "markdown" for part in SOLUTION.findall(cell.source)]
    return [code for part in folded for code in CODE.findall(part)]
