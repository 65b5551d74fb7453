"""What is served: an artifact on disk, whose it is, and a question with a known answer. No Ray."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from inf2.artifact import check_parts
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
    """What the original answers to the first of the held-out examples, with the artifact's hash that it is for, and a
    hash of what makes pixels and tokens."""

    question: str
    answer: str
    artifact: str
    processor: str

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
    """The processor for an artifact of `model`, and a `Known`; a `ValueError` if it is damaged or of another model."""
    manifest = check_parts(directory)
    size = manifest["config"]["vision_config"]["image_size"]
    if size != model.config.vision_config.image_size:
        model, processor = resize_image(model, processor, size)
    pixels = Pixels(**manifest["pixels"]) if "pixels" in manifest else None
    shapes = BlipShapes(**manifest["shapes"])
    check_traced_from(
        directory, manifest, parts_to_trace(model, shapes, manifest["decoder"], pixels), model.name_or_path
    )
    example = next(examples("held-out", 1))
    tokens = len(question_tokens(processor, example.question))
    if tokens > shapes.longest_question:
        raise ValueError(
            f"the question that tells whether a core is well, {example.question!r}, has {tokens} tokens; {directory} "
            f"was traced for {shapes.longest_question}: trace it for as many"
        )
    answer = infer(model, processor, example.question, example.image, max_new_tokens=shapes.answer_length - 1)
    return processor, Known(example.question, answer, artifact_hash(directory), processor_hash(processor))


def artifact_hash(directory):
    """12 hexadecimal digits that say which artifact an answer is from: the beginning of its manifest's SHA-256."""
    return sha256(Path(directory) / "manifest.json")[:12]


def processor_hash(processor):
    """A hash of what a processor makes of pictures and questions."""
    return sha256([processor.image_processor.to_json_string(), processor.tokenizer.backend_tokenizer.to_str()])[:12]


def load_known(directory, processor, seen_bytes, known):
    """An `Answering` of an artifact that was asked the known question, which also warms it up.

    Raises
    ------
    ValueError
        If the artifact is damaged, another one than `known` is for, or of a model with another processor.
    RuntimeError
        If it answers the known question otherwise.
    """
    found = artifact_hash(directory)
    if found != known.artifact:
        raise ValueError(f"{directory} is artifact {found}, not {known.artifact}: it was changed meanwhile")
    if processor_hash(processor) != known.processor:
        raise ValueError(
            f"the processor of {directory}'s model makes other pixels or tokens than this service's: start it anew"
        )
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


class Serving:
    """Which artifact a replica that starts now has to load: the one that `reload` named last, in a file; until then
    the one that the service was started with."""

    def __init__(self, path, directory, known):
        self.path, self.first = Path(path), (str(directory), known)

    def name(self, directory, known):
        with whole_file(self.path) as file:
            file.write(json.dumps({"directory": str(Path(directory).resolve()), "known": asdict(known)}).encode())

    def named(self):
        """The directory and the `Known`."""
        if not self.path.is_file():
            return self.first
        serving = json.loads(self.path.read_bytes())
        return serving["directory"], Known(**serving["known"])

    def forget(self):
        """Begin with the first one again, where a former service left another."""
        if self.path.is_file():  # without asking, a file system that is only read would be an error
            self.path.unlink()

    def check(self, known):
        """A `RuntimeError` if a replica that has the artifact of `known` has missed that another one was named."""
        if (named := self.named()[1].artifact) != known.artifact:
            raise RuntimeError(f"this replica has artifact {known.artifact}, and {named} is served")
