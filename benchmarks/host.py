"""Time what the host does around the graphs: ``python benchmarks/host.py``.

Graphs of full size that cost nothing, since they return constants, stand in place of compiled ones. What remains is
the host: reading the picture, the tokenizer, ``generate()``, and the rest of `infer`. Beside it Hugging Face's own
processor and its own ``generate()`` around parts that cost nothing either. Everything runs in one process, in turns:
each round calls every part of every contestant, so that a machine that slows down slows all of them. It calls it five
times in a row, as somebody who asks again and again, and keeps the median.
"""

import argparse
import functools
import io
import json
import statistics
import subprocess
import sys
import time

import numpy as np
import torch
from compare import BUILD, ROOT, machine
from inf2 import state_of
from PIL import Image
from torch import nn
from tqdm import tqdm
from transformers import BlipConfig, BlipForQuestionAnswering, BlipImageProcessorPil, BlipProcessor
from transformers.image_utils import load_image
from transformers.modeling_outputs import BaseModelOutputWithPooling, CausalLMOutputWithCrossAttentions

from blip_helpers import DECODERS, BlipShapes, NeuronBlipForQuestionAnswering, infer, parts_to_trace
from blip_inputs import padded_right, pixels_for, question_tokens, requests
from blip_pictures import load_picture
from blip_pixels import resized_pixels
from blip_seen import SeenPictures
from models.make_base import IMAGE_SIZE, make_model, make_tokenizer

SIZES = {"640x480": (640, 480), "1920x1080": (1920, 1080), "4000x3000": (4000, 3000)}
QUESTIONS = ["what colour is the left one ?", "how many are there ?"] * 4
NEW_TOKENS, A_TOKEN = 3, 1037
IN_A_ROW = 5
HUGGING_FACE = "Hugging Face"
BUSY = "while True: pass"


class Constant(nn.Module):
    """A graph that costs nothing: it returns what the module would, but always the same, and has a state as large."""

    def __init__(self, module, example_inputs, config):
        super().__init__()
        self.state = nn.ParameterList(nn.Parameter(torch.zeros(s.shape), False) for s in state_of(module))
        output = module(*example_inputs)  # on the device "meta", which computes shapes alone
        output = output[0] if isinstance(output, tuple) else output
        self.output = torch.zeros(output.shape, dtype=output.dtype)
        if not output.is_floating_point():  # tokens of an answer
            self.output[:] = A_TOKEN
            self.output[:, -1] = config.sep_token_id
        elif output.shape[-1] == config.vocab_size:
            self.output[..., A_TOKEN] = 1

    def forward(self, *inputs):
        return self.output


def compiled_around_constants(kind, questions):
    """The assembled model of full size, for so many questions at once."""
    shapes = BlipShapes(questions, 1, 16, 8, NEW_TOKENS)
    with torch.device("meta"):
        model = make_model().eval()
        parts = parts_to_trace(model, shapes, kind)
    text = model.config.text_config
    graphs = {name: Constant(module, inputs, text) for name, (module, inputs) in parts.items()}
    generation_config = model.text_decoder.generation_config
    return NeuronBlipForQuestionAnswering(model.config, graphs, shapes, generation_config, DECODERS[kind][-1])


def hugging_face_around_constants():
    """Hugging Face's own class and loop: what its three parts return is of full size, and costs nothing."""
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    full = BlipConfig().text_config.hidden_size
    tokenizer = make_tokenizer()
    special = {
        "bos_token_id": tokenizer.convert_tokens_to_ids("[DEC]"),
        "eos_token_id": tokenizer.sep_token_id,
        "sep_token_id": tokenizer.sep_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    text = {**small, "vocab_size": len(tokenizer), **special}
    model = BlipForQuestionAnswering(BlipConfig(text_config=text, vision_config={**small, "image_size": 32})).eval()
    image_embeds, features = torch.zeros(1, (IMAGE_SIZE // 16) ** 2 + 1, full), torch.zeros(1, 16, full)
    logits = torch.zeros(1, 1, len(tokenizer))
    logits[..., A_TOKEN] = 1
    for part, output in (
        (model.vision_model, lambda **inputs: BaseModelOutputWithPooling(last_hidden_state=image_embeds)),
        (model.text_encoder, lambda **inputs: (features[:, : inputs["input_ids"].shape[1]],)),
        (model.text_decoder, lambda **inputs: CausalLMOutputWithCrossAttentions(logits=logits)),
    ):
        part.forward = functools.wraps(part.forward)(output)  # generate() reads which arguments it takes
    return model


def jpeg(picture):
    picture.save(content := io.BytesIO(), "jpeg", quality=90)
    return content.getvalue()


def drawing(size):
    """Shapes with a little noise, which a JPEG has to keep."""
    random, (width, height) = np.random.default_rng(0), size
    smooth = Image.fromarray(random.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize(size, Image.BICUBIC)
    return Image.fromarray(np.asarray(smooth) // 2 + random.integers(0, 64, (height, width, 1), dtype=np.uint8))


def opened(image):
    """What Hugging Face's processor takes, of a decoded picture or of the bytes of one."""
    return load_image(Image.open(io.BytesIO(image))) if isinstance(image, bytes) else image


def padded(processor, questions):
    token_ids = [question_tokens(processor, question) for question in questions]
    return padded_right(token_ids, processor.tokenizer.pad_token_id)


def of_hugging_face(model, processor, image, questions):
    """The parts of what a plain loop does, and the whole: the processor and ``generate()`` for every question."""

    def picture():
        for _ in questions:
            processor.image_processor(opened(image), return_tensors="pt")

    def whole():
        for question in questions:
            inputs = processor(images=opened(image), text=question, return_tensors="pt")
            output = model.generate(**inputs, max_new_tokens=NEW_TOKENS)
            processor.batch_decode(output, skip_special_tokens=True)

    def generate():
        for one in each:
            model.generate(**one, max_new_tokens=NEW_TOKENS)

    each = [processor(images=opened(image), text=question, return_tensors="pt") for question in questions]
    tokenizer = processor.tokenizer
    return {
        "picture": picture,
        "tokenizer": lambda: [tokenizer(question, return_tensors="pt") for question in questions],
        "generate": generate,
        "whole": whole,
    }


def of_a_new_picture(model, processor, image, questions):
    """The same of a compiled model, for a picture that was not seen before."""
    pixels_of = pixels_for(model, processor)
    inputs, pixels = padded(processor, questions), pixels_of(image)
    return {
        "picture": lambda: pixels_of(image),
        "tokenizer": lambda: padded(processor, questions),
        "generate": lambda: model.generate(**inputs, pixel_values=pixels, max_new_tokens=NEW_TOKENS),
        "whole": lambda: infer(model, processor, questions, image, max_new_tokens=NEW_TOKENS),
    }


def of_a_seen_picture(model, processor, image, questions):
    """The same where the features of the picture are kept."""
    model.seen, inputs = SeenPictures(2**26), padded(processor, questions)
    (prepared,) = requests(model, processor, questions, image, len(questions))
    return {
        "picture": lambda: model.seen.features(image, None),
        "tokenizer": lambda: padded(processor, questions),
        "generate": lambda: model.generate(**inputs, image=prepared["image"], max_new_tokens=NEW_TOKENS),
        "whole": lambda: infer(model, processor, questions, image, max_new_tokens=NEW_TOKENS),
    }


def contestants(processor, image, count):
    """``{contestant: {part: call}}`` for so many questions about one picture."""
    questions = QUESTIONS[:count]
    size = (IMAGE_SIZE, IMAGE_SIZE)
    entries = {
        HUGGING_FACE: of_hugging_face(hugging_face_around_constants(), processor, image, questions),
        "Pillow alone": {"picture": lambda: load_picture(image).convert("RGB").resize(size, Image.BICUBIC)},
        "8 bits": {"picture": lambda: resized_pixels(processor, image)},
    }
    for kind in ("cached", "unrolled"):
        for when, of_a_picture in (("new", of_a_new_picture), ("seen", of_a_seen_picture)):
            model = compiled_around_constants(kind, count)
            entries[f"{kind}, {when}"] = of_a_picture(model, processor, image, questions)
    return entries


def measure(entries, rounds, of_what):
    """Wall and CPU seconds of every part of every contestant in every round, after one that is thrown away."""
    times = {(name, part): [] for name, parts in entries.items() for part in parts}
    for turn in tqdm(range(rounds + 1), desc=of_what, leave=False):
        for name, part in times:
            spent = [timed(entries[name][part]) for _ in range(IN_A_ROW)]
            if turn:
                times[name, part].append([statistics.median(column) for column in zip(*spent, strict=True)])
    return times


def timed(call):
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - wall, time.process_time() - cpu


def rows_of(times, of_what):
    """Medians in milliseconds; the rest is what the whole takes beyond its parts."""
    rows = {}
    for (name, part), spent in times.items():
        wall, cpu = (1e3 * statistics.median(column) for column in zip(*spent, strict=True))
        rows.setdefault(name, {**of_what, "name": name})[part] = wall
        rows[name][f"{part}, CPU"] = cpu
    for row in rows.values():
        if "whole" in row:
            row["rest"] = row["whole"] - sum(row[part] for part in ("picture", "tokenizer", "generate"))
            row["times as fast"] = rows[HUGGING_FACE]["whole"] / row["whole"]
    return list(rows.values())


def show(rows):
    columns = ("picture", "tokenizer", "generate", "rest", "whole", "whole, CPU", "times as fast")
    print(f"\n{'milliseconds, medians':<42}" + "".join(f"{column:>14}" for column in columns))
    for row in rows:
        name = f"{row['picture size']} {row['as']}, {row['questions']}: {row['name']}"
        numbers = (f"{row[column]:14.2f}" if column in row else " " * 14 for column in columns)
        print(f"{name:<42}" + "".join(numbers))


def read_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=21, help="at least 3 (21)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--pictures", default=",".join(SIZES), help=f"any of {','.join(SIZES)}")
    parser.add_argument("--questions", default="1,8", help="1, 8 or both")
    parser.add_argument("--busy", type=int, default=0, help="processes beside that take a core each (0)")
    arguments = parser.parse_args()
    if arguments.rounds < 3:
        parser.error(f"--rounds is {arguments.rounds}: a median needs at least 3")
    if not set(arguments.pictures.split(",")) <= set(SIZES):
        parser.error(f"--pictures is {arguments.pictures}: pass any of {','.join(SIZES)}")
    if not set(arguments.questions.split(",")) <= {"1", "8"}:
        parser.error(f"--questions is {arguments.questions}: pass 1, 8 or 1,8")
    return arguments


def main():
    arguments = read_arguments()
    torch.set_num_threads(arguments.threads)
    torch.set_grad_enabled(False)
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    processor = BlipProcessor(BlipImageProcessorPil(size=size), make_tokenizer())
    rows = []
    beside = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(arguments.busy)]
    try:
        for name in arguments.pictures.split(","):
            picture = drawing(SIZES[name])
            for kind, image in (("decoded", picture), ("JPEG", jpeg(picture))):
                for count in map(int, arguments.questions.split(",")):
                    of_what = {"picture size": name, "as": kind, "questions": count}
                    entries = contestants(processor, image, count)
                    rows += rows_of(measure(entries, arguments.rounds, f"{name} {kind}, {count}"), of_what)
    finally:
        for process in beside:
            process.kill()
    show(rows)
    said = {"threads": arguments.threads, "busy processes beside": arguments.busy, **machine()}
    del said["tuned"]
    for key, value in said.items():
        print(f"{key}: {value}")
    BUILD.mkdir(parents=True, exist_ok=True)
    path = BUILD / "host.json"
    path.write_text(json.dumps({"machine": said, "rows": rows}, indent=1))
    print(f"written: {path.relative_to(ROOT)}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\ninterrupted: no times were written")
