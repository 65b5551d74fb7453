"""A batch of requests on one core: grouped by picture and settings, every error a value of its own row. No Ray."""

import math
import time
from dataclasses import dataclass, field

import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling

from blip_helpers import NeuronBlipForQuestionAnswering, SeenPictures, StaticGraph, probabilities
from blip_inputs import padded_right
from blip_one_call import Pixels
from blip_pictures import pixel_values_of
from blip_pixels import resized_pixels
from service.faults import BAD_INPUT, NOT_A_NUMBER, CoreLost, on_the_core, status_of


@dataclass(frozen=True)
class Settings:
    """How to answer: questions that differ in it are never in one call."""

    top_k: int = 1
    max_new_tokens: int | None = None

    def generate_kwargs(self):
        beams = {} if self.top_k == 1 else {"num_beams": self.top_k, "num_return_sequences": self.top_k}
        return beams | ({} if self.max_new_tokens is None else {"max_new_tokens": self.max_new_tokens})


@dataclass(frozen=True)
class Ask:
    """A request as it comes to a core.

    Attributes
    ----------
    pixels : Tensor
        One picture: uint8 [1, 3, S, S] resized, or fp32 of that shape, normalised.
    questions : tuple of tuple of int
        Token ids of each question.
    settings : Settings
    sent : float
        ``time.time()`` when it left the ingress.
    """

    pixels: torch.Tensor
    questions: tuple
    settings: Settings = Settings()
    sent: float = field(default_factory=time.time)

    def __reduce__(self):
        # Torch pickles a tensor by way of a file, numpy its bytes: 0.04 ms in place of 0.3.
        return _ask, (self.pixels.numpy(), self.questions, self.settings, self.sent)


def _ask(pixels, *others):
    return Ask(torch.from_numpy(pixels.copy()), *others)  # what arrives may be read-only


@dataclass(frozen=True)
class Answer:
    """One answer: its text, its probability, and whether it ended at a limit of tokens instead of by itself."""

    text: str
    score: float
    cut: bool


@dataclass(frozen=True)
class Failure:
    """Instead of the answers to one question: an HTTP status and a sentence."""

    status: int
    sentence: str


@dataclass
class Batch:
    """What a batch was: questions, rows of the graphs that they filled and that there were, pictures by whether they
    were known, and seconds on the device and around it."""

    questions: int = 0
    rows: int = 0
    rows_in_all: int = 0
    seen: int = 0
    new: int = 0
    device: float = 0.0
    decoding: float = 0.0


class GraphClock:
    """The seconds that the graphs of a model took, summed over all of its `StaticGraph`."""

    def __init__(self, model):
        self.seconds, self._since = 0.0, 0.0
        for module in model.modules():
            if isinstance(module, StaticGraph):
                module.register_forward_pre_hook(self._start)
                module.register_forward_hook(self._stop, always_call=True)

    def _start(self, *_):
        self._since = time.perf_counter()

    def _stop(self, *_):
        self.seconds += time.perf_counter() - self._since


class Answering:
    """A compiled model that answers batches of requests; for one thread.

    Parameters
    ----------
    compiled : NeuronBlipForQuestionAnswering
    processor : BlipProcessor
    seen_bytes : int
        What the features of pictures that were seen before may take, in bytes.
    """

    def __init__(self, compiled, processor, seen_bytes=2**28):
        self.compiled, self.processor = compiled, processor
        self.seen = SeenPictures(seen_bytes)
        self.clock = GraphClock(compiled)

    @classmethod
    def load(cls, directory, processor, seen_bytes=2**28):
        """Load what `trace` left in `directory` onto core 0 of those that this process sees."""
        return cls(NeuronBlipForQuestionAnswering.from_pretrained(directory), processor, seen_bytes)

    def refusal(self, question, settings):
        """What the traced shapes do not allow of one question, a `Failure`; else None."""
        try:
            self.compiled.padded(torch.tensor([question]), None)
            self.compiled.limit_of(settings.generate_kwargs())
        except ValueError as error:
            return Failure(422, str(error))
        rows = self.compiled.shapes.rows
        if settings.top_k > rows:
            return Failure(
                422, f"top_k is {settings.top_k}; this model was traced for {rows} rows: ask for at most that"
            )
        return None

    @torch.no_grad()
    def answer(self, asks, seen=None):
        """Answer a list of `Ask`; `seen` is a `SeenPictures` in place of this model's own.

        Returns
        -------
        list of list
            For each request, for each of its questions: a list of `Answer`, the likeliest first, or a `Failure`.
        Batch

        Raises
        ------
        CoreLost
            After a fatal status of the core.
        """
        start, on_the_device = time.perf_counter(), self.clock.seconds
        seen = self.seen if seen is None else seen
        hits, misses = seen.hits, seen.misses
        batch = Batch(questions=sum(len(ask.questions) for ask in asks))
        results = [[self.refusal(question, ask.settings) for question in ask.questions] for ask in asks]
        features = [self._features(ask, row, seen) for ask, row in zip(asks, results, strict=True)]
        for settings in dict.fromkeys(ask.settings for ask in asks):
            self._answer_alike(asks, features, settings, results, batch)
        batch.seen, batch.new = seen.hits - hits, seen.misses - misses
        batch.device = self.clock.seconds - on_the_device
        batch.decoding = time.perf_counter() - start - batch.device
        return results, batch

    def _features(self, ask, results, seen):
        """The features of a request's picture, fp32 [1, T, D]; None, and a `Failure` a question, where that fails."""

        def encode(pixels):
            pixels = Pixels.of(self.processor).normalise(pixels) if pixels.dtype == torch.uint8 else pixels
            return on_the_core(lambda: self.compiled.encode_image(pixels)).last_hidden_state

        if all(results):
            return None
        try:
            return seen.features(ask.pixels, encode)
        except CoreLost:
            raise
        except Exception as error:
            results[:] = [result or failure_of(error) for result in results]
            return None

    def _answer_alike(self, asks, features, settings, results, batch):
        """Fill in the results of all questions with the same settings, those about one picture beside each other."""
        rows = [
            (i, j)
            for i, ask in enumerate(asks)
            if ask.settings == settings
            for j in range(len(ask.questions))
            if results[i][j] is None
        ]
        rows.sort(key=lambda row: id(features[row[0]]))
        together = max(1, self.compiled.shapes.rows // settings.top_k)
        for start in range(0, len(rows), together):
            some = rows[start : start + together]
            batch.rows += len(some) * settings.top_k
            batch.rows_in_all += self.compiled.shapes.rows
            questions = [(asks[i].questions[j], features[i]) for i, j in some]
            for (i, j), result in zip(some, self._call(questions, settings), strict=True):
                results[i][j] = result

    def _call(self, questions, settings):
        """Answer (token ids, features) in one call; where that fails, each alone, so that one harms no other."""
        try:
            return on_the_core(lambda: self._generate(questions, settings))
        except CoreLost:
            raise
        except Exception as error:
            if len(questions) == 1:
                return [failure_of(error)]
            return [result for question in questions for result in self._call([question], settings)]

    def _generate(self, questions, settings):
        token_ids, features = zip(*questions, strict=True)
        one_picture = all(each is features[0] for each in features)
        image = BaseModelOutputWithPooling(last_hidden_state=features[0] if one_picture else torch.cat(features))
        output = self.compiled.generate(
            **padded_right([list(ids) for ids in token_ids], self.processor.tokenizer.pad_token_id),
            image=image,
            return_dict_in_generate=True,
            output_scores=True,
            **settings.generate_kwargs(),
        )
        texts = self.processor.batch_decode(output.sequences, skip_special_tokens=True)
        end = self.compiled.config.text_config.sep_token_id
        cut = [end not in tokens[1:] for tokens in output.sequences.tolist()]
        rows = zip(texts, probabilities(self.compiled, output), cut, strict=True)
        answers = [Answer(text, score, was_cut) for text, score, was_cut in rows]
        each = [answers[start : start + settings.top_k] for start in range(0, len(answers), settings.top_k)]
        return [checked(sorted(some, key=lambda answer: -answer.score)) for some in each]


def pixels_of(processor, picture):
    """A picture as the image graph takes it: uint8 [1, 3, S, S], or fp32 where the processor makes other numbers."""
    pixels = resized_pixels(processor, picture)
    return pixel_values_of(processor, picture) if pixels is None else pixels


def checked(answers):
    """The answers to a question; a `Failure` where a probability is not a number, since its text says nothing then."""
    if all(math.isfinite(answer.score) for answer in answers):
        return answers
    return Failure(500, "the model computed NaN for this question and picture: nothing is wrong with the request")


def failure_of(error):
    """What to tell the one whose question failed alone."""
    status, said = status_of(error), next(iter(str(error).splitlines()), "")
    if status in NOT_A_NUMBER:
        return Failure(500, "the NeuronCore computed NaN for this question and picture (status 1003)")
    if isinstance(error, ValueError) or status in BAD_INPUT:
        return Failure(422, said or type(error).__name__)
    return Failure(500, f"the model failed: {type(error).__name__}: {said}")
