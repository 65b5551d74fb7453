"""What is served: an artifact on disk, whose it is, and a question with a known answer. No Ray."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from inf2.files import sha256, whole_file

from blip_checkpoints import check_traced_from
from blip_helpers import (
    BlipShapes,
    SeenPictures,
    compile_for_inf2,
    default_backend,
    infer,
    load_blip,
    parts_to_trace,
    read_manifest,
    resize_image,
    trace,
)
from blip_inputs import question_tokens
from blip_one_call import Pixels
from models.scenes import examples
from service.answering import Answering, Ask, pixels_of

SHAPES = BlipShapes(batch_size=4, num_beams=2, question_length=16, answer_length=24)


@dataclass(frozen=True)
class Known:
    """What the original answers to the first of the held-out examples, with the artifact's hash that it is for."""

    question: str
    answer: str
    artifact: str

    @property
    def picture(self):
        return next(examples("held-out", 1)).image


def prepare(directory, source=None, processor=None):
    """Trace the model that `source` names into `directory`, unless something was traced there.

    Returns
    -------
    processor : BlipProcessor
        That of the model, for pictures of the artifact's size.
    known : Known

    Raises
    ------
    ValueError
        If the artifact is damaged, incomplete, or was traced from another model.
    """
    model, processor = load_blip(source, processor=processor)
    if not (Path(directory) / "manifest.json").is_file():
        # On Neuron a process that loads a graph takes its cores, and the replicas need them.
        (compile_for_inf2 if default_backend() == "neuron" else trace)(model, directory, SHAPES)
    return known_answer(directory, model, processor)


def known_answer(directory, model, processor):
    """The processor for an artifact of `model`, and a `Known`; a `ValueError` if it is of another model."""
    manifest = read_manifest(directory)
    size = manifest["config"]["vision_config"]["image_size"]
    if size != model.config.vision_config.image_size:
        model, processor = resize_image(model, processor, size)
    pixels = Pixels(**manifest["pixels"]) if "pixels" in manifest else None
    parts = parts_to_trace(model, BlipShapes(**manifest["shapes"]), manifest["decoder"], pixels)
    check_traced_from(directory, manifest, parts, model.name_or_path)
    example = next(examples("held-out", 1))
    limit = BlipShapes(**manifest["shapes"]).answer_length - 1
    answer = infer(model, processor, example.question, example.image, max_new_tokens=limit)
    return processor, Known(example.question, answer, artifact_hash(directory))


def artifact_hash(directory):
    """12 hexadecimal digits that say which artifact an answer is from: the beginning of its manifest's SHA-256."""
    return sha256(Path(directory) / "manifest.json")[:12]


def load_known(directory, processor, seen_bytes, known):
    """An `Answering` of an artifact that was asked the known question, which also warms it up.

    Raises
    ------
    ValueError
        If the artifact is damaged, or another one than `known` is for.
    RuntimeError
        If it answers the known question otherwise.
    """
    found = artifact_hash(directory)
    if found != known.artifact:
        raise ValueError(f"{directory} is artifact {found}, not {known.artifact}: it was changed meanwhile")
    answering = Answering.load(directory, processor, seen_bytes)
    check_known(answering, known)
    return answering


def check_known(answering, known):
    """Ask the known question through the graphs; a `RuntimeError` if the answer is another."""
    tokens = tuple(question_tokens(answering.processor, known.question))
    ask = Ask(pixels_of(answering.processor, known.picture), (tokens,))
    # Of a picture that was seen before the image graph would not be asked: these keep nothing.
    (((result,),), _) = answering.answer([ask], seen=SeenPictures(1))
    text = result[0].text if isinstance(result, list) else result.sentence
    if text != known.answer:
        raise RuntimeError(f"the known question {known.question!r} is answered {text!r}, not {known.answer!r}")


# Which artifact a replica that starts now has to load: the one that `reload` named last.


def serving_file(directory):
    """Where it is written down, beside the directory that the service was started with."""
    directory = Path(directory).resolve()
    return directory.with_name(f".{directory.name}.serving.json")


def set_serving(started_with, directory, known):
    with whole_file(serving_file(started_with)) as file:
        file.write(json.dumps({"directory": str(Path(directory).resolve()), "known": asdict(known)}).encode())


def get_serving(started_with, known):
    """The directory and the `Known` of the artifact that is served."""
    path = serving_file(started_with)
    if not path.is_file():
        return str(started_with), known
    serving = json.loads(path.read_bytes())
    return serving["directory"], Known(**serving["known"])
