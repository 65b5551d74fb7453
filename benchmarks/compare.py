"""Time the compiled models beside Hugging Face's eager one: ``python benchmarks/compare.py --model base``.

Each kind of work in each dtype is measured by itself, since not everything fits into memory together: in one process,
in turns, each round calls every contestant once, so that a machine that slows down slows all of them, Hugging Face's
eager fp32 model among them. CPU times of the stand-in; they say nothing about Neuron.
"""

import argparse
import copy
import gc
import importlib.metadata
import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path

import matplotlib.pyplot as plt
import others
import torch
from tqdm import tqdm

from blip_helpers import (
    BlipShapes,
    NeuronBlipForQuestionAnswering,
    PaddedDecoder,
    additive_mask,
    load_blip,
    parts_to_trace,
    trace,
    trace_module,
)
from blip_one_call import Pixels

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "benchmark"
# Freed memory stays with the process: otherwise glibc gives large blocks back and asks for them again in every call.
MALLOC = {"MALLOC_TRIM_THRESHOLD_": "-1", "MALLOC_MMAP_MAX_": "0", "MALLOC_TOP_PAD_": str(64 * 2**20)}
QUESTION_TOKENS, NEW_TOKENS, QUESTIONS = 8, 3, 8
UNROLLED = {"unrolled_steps": 4}  # one more than the answers need, as who serves answers of up to four would have it
DECODERS = ("padded", "cached", "unrolled")
WORKS = {"one": "one question", "eight": f"{QUESTIONS} questions", "step": "a step"}
LIMIT = {"max_new_tokens": NEW_TOKENS}


class ArticleDecoder(PaddedDecoder):
    """The decoder of the article: the vocabulary head runs on all A positions, and one is taken afterwards."""

    def forward(self, input_ids, encoder_hidden_states, encoder_attention_mask, attention_mask, position):
        length = input_ids.shape[1]
        causal = torch.ones(length, length, dtype=attention_mask.dtype).tril()
        logits = self.decoder(
            input_ids=input_ids,
            attention_mask=additive_mask(causal * attention_mask[:, None, :]),
            encoder_hidden_states=encoder_hidden_states,
            use_cache=False,
        ).logits
        return torch.take_along_dim(logits, position.view(1, -1, 1), dim=1)


def one_by_one(model, questions, pixels):
    """Hugging Face's plain loop: the image again for every question."""
    return torch.cat([model.generate(question[None], pixels, **LIMIT) for question in questions])


def vision_once(model, questions, pixels):
    """What a careful user writes by hand: the image once, the questions as a batch."""
    image_embeds = model.vision_model(pixels)[0].expand(len(questions), -1, -1)
    features = model.text_encoder(questions, torch.ones_like(questions), encoder_hidden_states=image_embeds)[0]
    return model.text_decoder.generate(
        torch.full((len(questions), 1), model.decoder_start_token_id),
        eos_token_id=model.config.text_config.sep_token_id,
        pad_token_id=model.config.text_config.pad_token_id,
        encoder_hidden_states=features,
        **LIMIT,
    )


def eager_step(model, questions, answer_length):
    """A step of Hugging Face's decoder with its own cache half full, and what prepares it."""
    config = model.config.text_config
    features = torch.zeros(1, QUESTION_TOKENS, config.hidden_size, dtype=model.dtype)
    start = torch.full((1, answer_length // 2), config.bos_token_id)
    filled = model.text_decoder(start, encoder_hidden_states=features, use_cache=True).cache
    token = start[:, :1]
    return (
        lambda: copy.deepcopy(filled),
        lambda cache: model.text_decoder(token, encoder_hidden_states=features, cache=cache, use_cache=True),
    )


def contestants(model, name, arguments, pixels, questions, work, dtype):
    """The contestants of a kind of work in a dtype: ``{name: (prepare, call)}``; prepare is not timed.

    The first is Hugging Face's eager fp32 model. `pixels` are those of a resized picture, uint8.
    """
    works = {work: {} for work in WORKS}
    one, eight, step = works.values()
    pictures = Pixels().normalise(pixels)

    def add(work, contestant, call):
        work[contestant] = (lambda: None, lambda _: call())

    def add_both(contestant, call):
        add(one, contestant, lambda: call(questions[:1]))
        add(eight, contestant, lambda: call(questions))

    def add_eager(eager, short):
        cast = pictures.to(eager.dtype)
        add_both(f"HF eager {short}", lambda q: one_by_one(eager, q, cast))
        add(eight, f"HF eager {short}, vision once", lambda: vision_once(eager, questions, cast))
        step[f"HF eager {short}, its cache"] = eager_step(eager, questions, arguments.answer_length)

    short = {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
    eager = model if dtype == torch.float32 else copy.deepcopy(model).to(dtype)
    add_eager(model, "fp32")
    if eager is not model:
        add_eager(eager, short)
    if arguments.others and work != "step":
        add_others(add_both, model, eager, short, arguments.threads, pictures)
    add_ours(add, works, model, name, arguments, pixels, questions, work, dtype, short)
    return works[work]


def add_others(add_both, model, eager, short, threads, pictures):
    """Those of `others`, as far as they are installed; ONNX Runtime in fp32 alone, which is what an export gives."""
    compiled = others.by_torch(eager)
    add_both(f"torch.compile {short}", lambda q: one_by_one(compiled, q, pictures.to(eager.dtype)))
    plainly = {}
    if others.installed("onnxruntime") and short == "fp32":
        plainly["ONNX Runtime"] = others.by_onnx_runtime(model, QUESTION_TOKENS, BUILD, threads)
    if others.installed("openvino"):
        precision = {"fp32": "f32", "bf16": "bf16"}[short]
        plainly["OpenVINO"] = others.by_openvino(model, QUESTION_TOKENS, precision, threads)
    for name, calls in plainly.items():
        add_both(f"{name} {short}, plainly", lambda q, c=calls: others.answer(c, model, q, pictures, NEW_TOKENS))


def add_ours(add, works, model, name, arguments, pixels, questions, work, dtype, short):
    """Each decoder on the CPU stand-in, and where it is installed on OpenVINO; beside them the article's."""
    one, eight, step = works.values()
    asked = questions if work == "eight" else questions[:1]
    pictures = Pixels().normalise(pixels)
    for backend in ("cpu", "openvino"):
        if backend == "openvino" and not (others.installed("openvino") and arguments.others):
            continue
        where = {"cpu": "", "openvino": ", OpenVINO"}[backend]
        for kind in arguments.decoders:
            if work == "step" and (backend, kind == "unrolled") != ("cpu", False):
                continue
            options = UNROLLED if kind == "unrolled" else {}
            shapes = BlipShapes(len(asked), 1, QUESTION_TOKENS, arguments.answer_length, **options)
            directory = BUILD / f"{name}-{kind}-{short}-{len(asked)}-{arguments.answer_length}{where[2:]}"
            compiled = trace(model, directory, shapes, decoder=kind, dtype=dtype, backend=backend)
            given = pixels if kind == "unrolled" else pictures
            for whole in (one, eight):
                add(whole, f"{kind} {short}{where}", lambda c=compiled, p=given: c.generate(asked, p, **LIMIT))
            _, inputs = parts_to_trace(model, shapes, kind)["text_decoder"]
            add(step, f"{kind} {short}", lambda c=compiled, i=inputs: c.text_decoder.decoder.decoder(*i))
            if backend == "cpu" and kind == "padded" and dtype == torch.float32:
                shapes = BlipShapes(1, 1, QUESTION_TOKENS, arguments.answer_length)
                _, inputs = parts_to_trace(model, shapes, kind)["text_decoder"]
                graph = trace_module(ArticleDecoder(model.text_decoder), inputs)
                if work == "eight":  # the article's graphs take one question
                    directory = BUILD / f"{name}-padded-fp32-1-{arguments.answer_length}"
                    compiled = trace(model, directory, shapes, decoder=kind)
                article = with_decoder(compiled, graph)
                add(step, "the article's fp32", lambda g=graph, i=inputs: g(*i))
                for whole in (one, eight):
                    add(whole, "the article's fp32", lambda a=article: one_by_one(a, asked, pictures))


def with_decoder(compiled, graph):
    """The same model around another padded decoder."""
    graphs = {"vision_model": compiled.vision_model.graph, "text_encoder": compiled.text_encoder.graph}
    generation_config = compiled.text_decoder.generation_config
    return NeuronBlipForQuestionAnswering(
        compiled.config, graphs | {"text_decoder": graph}, compiled.shapes, generation_config
    )


def measure(entries, rounds, end, of_what):
    """Seconds of every contestant in every round, after one round that is thrown away, and in how many answers of that
    round, up to the token `end`, a contestant differs from the first one: both by its name."""
    times, answers = {name: [] for name in entries}, {}
    for turn in tqdm(range(rounds + 1), desc=f"{of_what}: rounds, the first to warm up"):
        for name, (prepare, call) in entries.items():
            given = prepare()
            start = time.perf_counter()
            output = call(given)
            if turn:
                times[name].append(time.perf_counter() - start)
            elif isinstance(output, torch.Tensor) and not output.is_floating_point():
                answers[name] = [until(end, row) for row in output.tolist()]
    first = next(iter(answers.values()), [])
    differ = {
        name: sum(row != of_first for row, of_first in zip(rows, first, strict=True)) for name, rows in answers.items()
    }
    return times, differ


def until(end, tokens):
    """Token ids of an answer without the first, which starts it, up to the one that ends it."""
    tokens = tokens[1:]
    return tokens[: tokens.index(end)] if end in tokens else tokens


def machine():
    """What the times depend on."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = fields.get("flags", "").split()
    return {
        "processor": fields.get("model name") or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "bf16 instructions": [flag for flag in ("avx512_bf16", "amx_bf16") if flag in flags] or "none",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": importlib.metadata.version("transformers"),
        "tuned": MALLOC,
    }


def table(work, times, differ):
    """Median, quartiles in milliseconds, and how many times as fast as the first contestant."""
    rows, base = [], None
    for name, seconds in times.items():
        low, middle, high = (1e3 * q for q in statistics.quantiles(seconds, n=4, method="inclusive"))
        base = base or middle
        row = {"work": work, "name": name, "median": middle, "low": low, "high": high, "ratio": base / middle}
        rows.append(row | {"answers that differ": differ[name]} if name in differ else row)
    return rows


def plot(rows, path, title):
    works = list(dict.fromkeys(row["work"] for row in rows))
    figure, panels = plt.subplots(len(works), 1, figsize=(9, 1 + 0.28 * len(rows) + 0.7 * len(works)), squeeze=False)
    for axes, work in zip(panels[:, 0], works, strict=True):
        of_work = [row for row in rows if row["work"] == work]
        middle = [row["median"] for row in of_work]
        spread = [[r["median"] - r["low"] for r in of_work], [r["high"] - r["median"] for r in of_work]]
        axes.barh([row["name"] for row in of_work], middle, xerr=spread, color="0.75", edgecolor="black", capsize=3)
        axes.invert_yaxis()
        axes.set(title=work, xlabel="milliseconds (CPU), median and quartiles")
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def read_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="base", help="tiny, base (random weights, full size) or a directory")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--answer-length", type=int, default=20, help="A, the start token counts (20)")
    parser.add_argument("--rounds", type=int, default=9, help="at least 7 (9)")
    parser.add_argument("--dtypes", default="fp32,bf16", help="fp32, bf16 or both")
    parser.add_argument(
        "--others",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="torch.compile, and ONNX Runtime and OpenVINO where they are installed: that takes minutes, and at full "
        "size 20 GB even with --decoders unrolled",
    )
    parser.add_argument("--decoders", default=",".join(DECODERS), help=f"any of {','.join(DECODERS)}")
    parser.add_argument("--work", default="one,eight,step", help="any of one,eight,step")
    arguments = parser.parse_args()
    known = {"fp32": torch.float32, "bf16": torch.bfloat16}
    if arguments.rounds < 7:
        parser.error(f"--rounds is {arguments.rounds}: quartiles need at least 7")
    if not set(arguments.dtypes.split(",")) <= set(known):
        parser.error(f"--dtypes is {arguments.dtypes}: pass fp32, bf16 or fp32,bf16")
    if not set(arguments.work.split(",")) <= set(WORKS):
        parser.error(f"--work is {arguments.work}: pass any of one,eight,step")
    if not set(arguments.decoders.split(",")) <= set(DECODERS):
        parser.error(f"--decoders is {arguments.decoders}: pass any of {','.join(DECODERS)}")
    arguments.decoders = arguments.decoders.split(",")
    least = UNROLLED["unrolled_steps"] + 1 if "unrolled" in arguments.decoders else NEW_TOKENS + 1
    if arguments.answer_length < least:
        parser.error(f"--answer-length is {arguments.answer_length}: these decoders need {least}")
    arguments.dtypes = [known[short] for short in arguments.dtypes.split(",")]
    arguments.work = arguments.work.split(",")
    return arguments


def main():
    arguments = read_arguments()
    if any(name not in os.environ for name in MALLOC):  # glibc reads them when a process starts
        os.execve(sys.executable, [sys.executable, *sys.argv], MALLOC | os.environ)
    torch.set_num_threads(arguments.threads)
    torch.set_grad_enabled(False)
    torch.manual_seed(0)
    BUILD.mkdir(parents=True, exist_ok=True)
    if arguments.model == "base":
        from models.make_base import make_model

        model, name = make_model().eval(), "base"
    else:
        model, _ = load_blip(None if arguments.model == "tiny" else arguments.model)
        name = Path(arguments.model).name
    config = model.config
    size = config.vision_config.image_size
    pixels = torch.randint(0, 256, (1, 3, size, size), dtype=torch.uint8)
    questions = torch.randint(5, config.text_config.vocab_size - 5, (QUESTIONS, QUESTION_TOKENS))
    rows = []
    for work in arguments.work:
        for dtype in arguments.dtypes:
            entries = contestants(model, name, arguments, pixels, questions, work, dtype)
            measured = measure(entries, arguments.rounds, config.text_config.sep_token_id, f"{WORKS[work]}, {dtype}")
            known = {(row["work"], row["name"]) for row in rows}
            rows += [row for row in table(WORKS[work], *measured) if (row["work"], row["name"]) not in known]
            del entries
            gc.collect()

    print(f"\n{'work':<14}{'contestant':<30}{'median':>10}{'quartiles':>20}{'times as fast':>15}")
    for row in rows:
        quartiles = f"{row['low']:.1f} to {row['high']:.1f}"
        print(
            f"{row['work']:<14}{row['name']:<30}{row['median']:>7.1f} ms{quartiles:>20}{row['ratio']:>14.2f}x", end=""
        )
        print(f"  {row['answers that differ']} answers differ" if row.get("answers that differ") else "")
    said = {"model": name, "threads": arguments.threads, "answer_length": arguments.answer_length, **machine()}
    for key, value in said.items():
        print(f"{key}: {value}")
    stem = f"{name}-{arguments.answer_length}"
    (BUILD / f"{stem}.json").write_text(json.dumps({"machine": said, "rows": rows}, indent=1))
    plot(rows, BUILD / f"{stem}.png", f"{name}, A = {arguments.answer_length}, {arguments.threads} threads")
    print(f"written: {BUILD.relative_to(ROOT)}/{stem}.json and .png")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\ninterrupted: no times were written")
