"""Answers in one call of a graph: which requests get them, the bytes of a picture, and the share that went on."""

import copy
import threading
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GenerationConfig
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from blip_pixels import mean_std_and_factor, normalised

# What may be asked of the most likely token at each step, and what of a text decoder's own settings says nothing else.
_PLAIN = {"do_sample": (None, False), "num_beams": (None, 1), "num_return_sequences": (None, 1)}
_LIMITS = ("max_length", "max_new_tokens")
_OF_THE_MODEL = (
    *("_from_model_config", "bos_token_id", "decoder_start_token_id", "eos_token_id", "pad_token_id"),
    *("transformers_version", "use_cache"),
)


@dataclass(frozen=True)
class Pixels:
    """What an image processor makes of the bytes of a resized picture: see `blip_pixels.normalised`."""

    image_mean: tuple[float, float, float] = tuple(OPENAI_CLIP_MEAN)
    image_std: tuple[float, float, float] = tuple(OPENAI_CLIP_STD)
    rescale_factor: float = 1 / 255

    def __post_init__(self):
        for name in ("image_mean", "image_std"):
            object.__setattr__(self, name, tuple(getattr(self, name)))

    @classmethod
    def of(cls, processor):
        """Those of a `BlipProcessor`; a `ValueError` if its pictures are not rescaled and normalised."""
        return cls(*mean_std_and_factor(processor))

    def are_those_of(self, processor):
        """Whether a processor normalises as these say."""
        try:
            return self == type(self).of(processor)
        except ValueError:
            return False

    def normalise(self, pixels):
        """As the graph does: uint8 [images, 3, S, S] -> pixel_values fp32 of the same shape"""
        return normalised(pixels, self.image_mean, self.image_std, self.rescale_factor)


class PlainRequests:
    """Tells the requests that take the most likely token at each step and nothing but the tokens: no search, no
    sampling, no change to the logits, nothing that looks at them. What is not known is none."""

    def __init__(self):
        self._seen, self._plain = None, False

    def __contains__(self, request):
        """Of arguments of ``generate()`` and the text decoder's own ``generation_config``."""
        generate_kwargs, own = request
        given = vars(own)
        if given != self._seen:  # somebody may have changed it since
            self._seen, self._plain = copy.deepcopy(given), says_nothing(own)
        return self._plain and all(
            name in _LIMITS or value in _PLAIN.get(name, ()) for name, value in generate_kwargs.items()
        )


def says_nothing(own):
    """Whether a GenerationConfig has no setting but limits that changes an answer."""
    usual = GenerationConfig().to_dict()

    def said(name, value):
        return None if value is False or value in _PLAIN.get(name, ()) else value

    return all(
        name in (*_LIMITS, *_OF_THE_MODEL) or said(name, value) == said(name, usual.get(name))
        for name, value in own.to_dict().items()
    )


class OneCall(nn.Module):
    """Around an `UnrolledAnswer` and a `PictureAnswer`, traced or not: any number of questions about one image.

    ``answers`` says how many answers there were, ``longer`` how many of them had more than K tokens: the cached decoder
    gave these.
    """

    def __init__(self, graphs, shapes, config, pixels):
        super().__init__()
        self.of_features, self.of_picture = graphs["unrolled_answer"], graphs["picture_answer"]
        self.batch_size, self.steps, self.pixels = shapes.batch_size, shapes.unrolled_steps, pixels
        self.start, self.end, self.pad = config.bos_token_id, config.sep_token_id, config.pad_token_id
        self.requests = PlainRequests()
        self.answers = self.longer = 0
        self._counting = threading.Lock()

    def forward(self, input_ids, attention_mask, image, vision_model):
        """input_ids, attention_mask int64 [questions, Q]; the image's bytes uint8 [1, 3, S, S], pixel_values fp32 of
        that shape, or features fp32 [1, T, D] -> K token ids of each question, a list of lists of int, without the
        start token

        Bytes and questions that fit go in one call. More questions share the features that `vision_model` makes."""
        graph = self.of_picture
        if image.dim() == 4 and (image.dtype != torch.uint8 or len(input_ids) > self.batch_size):
            image = vision_model(self.pixels.normalise(image) if image.dtype == torch.uint8 else image)[0]
        if image.dim() == 3:
            graph = self.of_features
        tokens = []
        for start in range(0, len(input_ids), self.batch_size):
            ids, mask = (given[start : start + self.batch_size] for given in (input_ids, attention_mask))
            missing = (0, 0, 0, self.batch_size - len(ids))
            if missing[-1]:
                ids, mask = F.pad(ids, missing, value=self.pad), F.pad(mask, missing, value=1)
            tokens += graph(ids, mask, image).tolist()
        return tokens[: len(input_ids)]

    def join(self, tokens, limit, go_on):
        """What ``generate()`` returns of tokens, lists of K, and a limit of new ones: int64 [questions, tokens] with a
        start token, no longer than its longest answer.

        ``go_on(rows)`` answers once more, without the limit of K, the questions whose answers are longer."""
        answers = [row[: row.index(self.end) + 1] if self.end in row else row for row in tokens]
        longer = [row for row, answer in enumerate(answers) if answer[-1] != self.end and limit > self.steps]
        with self._counting:
            self.answers, self.longer = self.answers + len(tokens), self.longer + len(longer)
        answers = [[self.start, *answer[:limit]] for answer in answers]
        for row, answer in zip(longer, go_on(longer).tolist() if longer else (), strict=True):
            answers[row] = answer
        width = max(map(len, answers))
        return torch.tensor([answer + [self.pad] * (width - len(answer)) for answer in answers])
