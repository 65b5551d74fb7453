"""What a request may hold: read, checked and bounded before anything is computed. No Ray, no model.

The body is that of Hugging Face's visual-question-answering task, in both forms that are about: as
``huggingface_hub.InferenceClient`` sends it, ``{"inputs": image, "question": ..., "image": image, "parameters": {}}``,
and as the task's page has it, ``{"inputs": {"image": ..., "question": ...}, "parameters": {}}``.
"""

import asyncio
import base64
import binascii
import io
import json

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError

MAX_BODY = 32 * 2**20  # bytes; the client sends a picture twice, each a third larger than its file
MAX_PIXELS = 50_000_000  # of a picture, decoded: 150 MB in RGB
MAX_QUESTIONS = 64  # of one request
MAX_ANSWERS = 64  # of one request, or of a batch of several: questions times the answers to each
MAX_QUESTION = 2_000  # characters; of more than that no model's tokens are enough, and counting them takes long
SECONDS_TO_ARRIVE = 10  # of a body
# Those that browsers and cameras make. Pillow reads more, some of them by starting another program.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")


class Refusal(ValueError):
    """A request that is not answered: an HTTP status and a sentence."""

    def __init__(self, status, sentence):
        # It may repeat what was sent, such as half a character or a name of a thousand letters.
        sentence = sentence.encode(errors="backslashreplace").decode()
        super().__init__(sentence if len(sentence) <= 400 else sentence[:400] + "...")
        self.status = status

    def __reduce__(self):  # it goes from one process to another
        return Refusal, (self.status, str(self))


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Parameters(Strict):
    """How to answer."""

    top_k: int | None = Field(None, ge=1, description="How many answers, the likeliest first; 1 by default.")
    max_new_tokens: int | None = Field(None, ge=1, description="Tokens of an answer; by default what was traced.")


class Inputs(Strict):
    """A picture and a question about it."""

    image: str = Field(description="The bytes of a picture's file, in base64.")
    question: str


class VisualQuestionAnswering(Strict):
    """A question about a picture."""

    inputs: str | Inputs = Field(description="The bytes of a picture's file in base64, or picture and question.")
    question: str | None = None
    image: str | None = Field(None, description="The same picture again, as huggingface_hub sends it.")
    parameters: Parameters = Parameters()

    def picture_and_questions(self):
        """The picture in base64, and the question in a list."""
        image, question = self.inputs, self.question
        if isinstance(image, Inputs):
            if self.question is not None or self.image is not None:
                raise Refusal(422, "inputs has a picture and a question already: leave question and image out")
            image, question = self.inputs.image, self.inputs.question
        elif self.image not in (None, image):
            raise Refusal(422, "inputs and image are two pictures: send one, or the same twice")
        if question is None:
            raise Refusal(422, "question is missing: ask something")
        return image, [question]


class Questions(Strict):
    """Several questions about one picture, which is encoded once."""

    image: str = Field(description="The bytes of a picture's file, in base64.")
    questions: list[str] = Field(min_length=1, max_length=MAX_QUESTIONS)
    parameters: Parameters = Parameters()

    def picture_and_questions(self):
        return self.image, self.questions


def check_headers(headers):
    """Refuse a body that is no JSON, or too large, before it is read."""
    content_type = headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != "application/json":
        raise Refusal(415, f"content-type is {content_type or 'missing'}: send application/json")
    length = headers.get("content-length", "0")
    if length.isdecimal() and int(length) > MAX_BODY:
        raise too_large(int(length))


def too_large(size):
    return Refusal(413, f"the body has {size} bytes; this service takes {MAX_BODY}: send a smaller picture")


async def whole_body(stream):
    """The bytes of a body that arrives in parts, an async iterator; refused as soon as there are too many, or when they
    take too long, since the request has a place meanwhile."""
    parts, size = [], 0
    try:
        async with asyncio.timeout(SECONDS_TO_ARRIVE):
            async for part in stream:
                size += len(part)
                if size > MAX_BODY:
                    raise too_large(size)
                parts.append(part)
    except TimeoutError:
        raise Refusal(
            408, f"after {SECONDS_TO_ARRIVE} s there were {size} bytes of the body: send it at once"
        ) from None
    return b"".join(parts)


def check_amount(questions, top_k):
    """Refuse a request for more answers than one may have."""
    if (wanted := len(questions) * top_k) > MAX_ANSWERS:
        raise Refusal(422, f"{len(questions)} questions and top_k {top_k} are {wanted} answers: ask for {MAX_ANSWERS}")


def read_body(body, kind):
    """Bytes of JSON -> a `kind`, one of the classes above; a `Refusal` names what is wrong and where."""
    try:
        given = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Refusal(400, f"the body is no JSON ({str(error)[:100]}): send an object") from None
    if not isinstance(given, dict):
        raise Refusal(422, f"the body is a {type(given).__name__}: send an object with {', '.join(kind.model_fields)}")
    if kind is VisualQuestionAnswering and isinstance(given.get("inputs"), list):
        raise Refusal(422, "inputs is a list: send one picture a request, and several questions to /questions")
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        raise Refusal(422, sentence_of(error, kind)) from None


def sentence_of(error, kind):
    """The first thing that pydantic has to say, with its place and, where it is short, its value."""
    errors = error.errors(include_url=False)
    # `inputs` is of two kinds, and there are errors of both: an object was meant as one.
    of_an_object = (each for each in errors if "Inputs" in each["loc"] and each["type"] != "model_type")
    first = next(of_an_object, errors[0])
    place = ".".join(str(part) for part in first["loc"] if part not in ("str", "Inputs")) or "a name in the body"
    if first["type"] == "extra_forbidden":
        known = Parameters if place.startswith("parameters.") else Inputs if place.startswith("inputs.") else kind
        return f"{place} is unknown: there are {', '.join(known.model_fields)}"
    if first["type"] == "missing":
        return f"{place} is missing"
    value = repr(first["input"])
    said = first["msg"][0].lower() + first["msg"][1:]
    return f"{place} is {value if len(value) <= 60 else type(first['input']).__name__}: {said}"


def picture_bytes(encoded):
    """The bytes of a picture's file of its base64 or data URL. A URL is none: this service fetches nothing."""
    if encoded.startswith(("http://", "https://", "file:")):
        raise Refusal(422, "image is a URL, and this service fetches nothing: send the bytes of the file in base64")
    encoded = encoded.partition(",")[2] if encoded.startswith("data:image/") else encoded
    try:
        content = base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError):
        raise Refusal(422, "image is no base64: send the bytes of a picture's file in base64") from None
    if not content:
        raise Refusal(422, "image is empty: send the bytes of a picture's file in base64")
    return content


def check_picture(content):
    """Refuse the bytes of a file whose header is no picture's, or one of more pixels than are decoded here."""
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            width, height = image.size
    except Image.DecompressionBombError:
        raise Refusal(413, f"image has more pixels than the {MAX_PIXELS} that are taken: send it smaller") from None
    except Exception as error:
        raise Refusal(
            422, f"image cannot be read as a picture ({type(error).__name__}): send one of {', '.join(FORMATS)}"
        ) from None
    if width * height > MAX_PIXELS:
        raise Refusal(413, f"image has {width} x {height} pixels; {MAX_PIXELS} are taken: send it smaller")
