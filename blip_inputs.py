"""What a compiled BLIP may be asked: the sizes it is traced for, and the arguments of a call."""

import functools
import operator
import warnings
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from inf2 import describe
from transformers import BlipForQuestionAnswering, GenerationConfig
from transformers.modeling_outputs import BaseModelOutputWithPooling

from blip_decoding import OnTheHost
from blip_pictures import pixel_values_of
from blip_pixels import resized_pixels


@dataclass(frozen=True)
class BlipShapes:
    """The sizes that a trace fixes; those of the picture come from the model.

    Parameters
    ----------
    batch_size : int
        B, questions a call of the question graph.
    num_beams : int
        The decoder's R rows are ``batch_size * num_beams``: a call of ``generate()`` fits when its questions times its
        beams (or returned sequences) are no more.
    question_length : int, or tuple of int
        Q, tokens of a question with its ``[CLS]`` and ``[SEP]``. Several lengths make a question graph each, of which
        a call takes the smallest that fits; Q is the longest then.
    answer_length : int
        A, tokens of an answer with its start token: at most A - 1 new ones.
    unrolled_steps : int
        K, with ``decoder="unrolled"``: tokens that one call gives, ``[SEP]`` among them. A longer answer is given by
        the cached decoder; a wasted step reads the decoder's weights for nothing.
    """

    batch_size: int = 1
    num_beams: int = 1
    question_length: int | tuple[int, ...] = 16
    answer_length: int = 24
    unrolled_steps: int = 4

    def __post_init__(self):
        for field in fields(self):
            least = 2 if field.name == "answer_length" else 1
            given = getattr(self, field.name)
            several = field.name == "question_length" and isinstance(given, tuple | list) and len(given) > 0
            numbers = tuple(whole_number(field.name, value, least) for value in (given if several else [given]))
            object.__setattr__(self, field.name, numbers if several else numbers[0])
        object.__setattr__(self, "question_length", self.question_lengths)
        if len(self.question_lengths) == 1:
            object.__setattr__(self, "question_length", self.longest_question)

    @property
    def rows(self):
        """R, rows of the decoder."""
        return self.batch_size * self.num_beams

    @property
    def question_lengths(self):
        """The lengths that there is a question graph for, the shortest first."""
        several = isinstance(self.question_length, tuple | list)
        return tuple(sorted(set(self.question_length))) if several else (self.question_length,)

    @property
    def longest_question(self):
        """Q, what questions are padded to, and what the decoder was traced for."""
        return self.question_lengths[-1]


class ChecksRequests(OnTheHost):
    """The part of a compiled model that refuses what it was not traced for; of `self` it reads ``shapes``, ``config``,
    ``one_call`` and the text decoder's generation settings."""

    warned = False

    def forward(self, *args, **kwargs):
        """Not compiled: what ``forward`` of the original computes is a loss, for training."""
        raise NotImplementedError("a compiled model answers with generate(); train the original")

    def limit_of(self, generate_kwargs):
        """The limit of new tokens, at most A - 1, and whether the trace alone sets it."""
        most, limits = self.shapes.answer_length - 1, []
        for of_the_model in (None, self.text_decoder.generation_config):
            new = setting_of("max_new_tokens", generate_kwargs, of_the_model)
            length = setting_of("max_length", generate_kwargs, of_the_model)  # of which one is the start token
            limits += [] if new is None else [whole_number("max_new_tokens", new)]
            limits += [] if length is None else [whole_number("max_length", length) - 1]
            if of_the_model is None and limits and limits[0] > most:
                longer = self.longer("answer_length", limits[0] + 1)
                raise ValueError(
                    f"the answer may have {limits[0]} new tokens; this model was traced for {most}: ask for "
                    f"max_new_tokens <= {most}{', or ' + longer if longer else ''}"
                )
        return (min(limits[0], most), limits[0] > most) if limits else (most, True)

    def with_limit(self, generate_kwargs):
        """The same arguments with an explicit limit of new tokens, which is no more than A - 1."""
        limit, _ = self.limit_of(generate_kwargs)
        return {k: v for k, v in generate_kwargs.items() if k != "max_length"} | {"max_new_tokens": limit}

    def longer(self, name, length):
        """The advice to trace a longer `name`; "" where the checkpoint has no more positions."""
        positions = self.config.text_config.max_position_embeddings
        return f"trace it with {name} >= {length}" if length <= positions else ""

    def was_cut(self, answer, generate_kwargs):
        """Whether an answer, a list of A token ids, ended without [SEP] because no longer one was traced."""
        ended = len(answer) < self.shapes.answer_length or self.config.text_config.sep_token_id in answer[1:]
        return not ended and self.limit_of(generate_kwargs)[1]

    def warn_if_cut(self, answers, generate_kwargs):
        """Say once a model that an answer was cut: `answers` is int64 [rows, tokens]."""
        if not self.warned and any(self.was_cut(answer, generate_kwargs) for answer in answers.tolist()):
            self.warned = True
            length = self.shapes.answer_length
            remedy = self.longer("answer_length", length + 1) or "this checkpoint has no more positions"
            said = f"an answer was cut after {length - 1} new tokens, as answer_length={length} was traced: {remedy}"
            warnings.warn(said, stacklevel=3)

    def check_arguments(self, generate_kwargs):
        config = generate_kwargs.get("generation_config")
        if config is not None and not isinstance(config, GenerationConfig):
            raise ValueError(f"generation_config is a {type(config).__name__}: pass a GenerationConfig")
        for name, without_effect in NOT_COMPILED.items():
            value = setting_of(name, generate_kwargs, self.text_decoder.generation_config)
            number = isinstance(value, int | float) and value == without_effect
            if value is not None and value is not False and not number:
                raise ValueError(f"{name} is nothing that a compiled model can do: leave it out, or ask the original")
        for name in SET_BY_THE_MODEL:
            if name in generate_kwargs:
                raise ValueError(f"{name} comes from the configuration and the question: leave it out")

    def check_images(self, pixel_values, image, interpolate_pos_encoding):
        if (pixel_values is None) == (image is None):
            raise ValueError("pass either pixel_values or image, what encode_image made of them, and not both")
        if interpolate_pos_encoding:
            raise ValueError("interpolate_pos_encoding is True; the image graph has one image size: resize the picture")
        return self.check_image(pixel_values) if image is None else self.check_encoded(image)

    def check_image(self, pixel_values):
        check_dimensions("pixel_values", pixel_values, 4)
        taken = (torch.float32,) if self.one_call is None else (torch.float32, torch.uint8)
        if pixel_values.dtype not in taken:
            raise ValueError(f"pixel_values is {describe(pixel_values)}; the graph was traced for float32: pass that")
        return pixel_values

    def check_encoded(self, image):
        image_embeds = image.last_hidden_state if isinstance(image, BaseModelOutputWithPooling) else None
        if image_embeds is None:
            raise ValueError(f"image is {describe(image)}: pass what encode_image returns, or pixel_values")
        check_dimensions("image", image_embeds, 3)
        if image_embeds.dtype != torch.float32:
            raise ValueError(f"image is {describe(image_embeds)}; the graph was traced for float32: pass that")
        return image_embeds

    def check_questions(self, input_ids, images, generate_kwargs):
        check_dimensions("input_ids", input_ids, 2)
        questions, each = len(input_ids), rows_per_question(generate_kwargs, self.text_decoder.generation_config)
        if images not in (1, questions):
            raise ValueError(f"{images} images for {questions} questions: pass one each or one for all")
        if questions * each > self.shapes.rows:
            raise ValueError(
                f"{questions} questions with {each} rows each need {questions * each} rows; this model was traced for "
                f"{self.shapes.rows}: pass fewer, or trace it with batch_size * num_beams >= {questions * each}"
            )
        if generate_kwargs.get("streamer") is not None and questions * each > 1:
            raise ValueError(
                f"a streamer hears one answer at a time, not {questions * each}: ask one question, without beams"
            )
        last = self.config.text_config.vocab_size - 1
        if input_ids.numel() and not 0 <= input_ids.min() <= input_ids.max() <= last:
            raise ValueError(
                f"input_ids has tokens from {input_ids.min()} to {input_ids.max()}; the vocabulary has 0 to {last}: "
                "use the processor of this checkpoint"
            )


def check_dimensions(name, tensor, dims):
    if not isinstance(tensor, torch.Tensor) or tensor.dim() != dims or not len(tensor):
        raise ValueError(f"{name} is {describe(tensor)}: pass a tensor of {dims} dimensions, as the processor")
    if tensor.device.type != "cpu":
        raise ValueError(f"{name} is on {tensor.device}: pass it on the CPU, the graphs take it from there")


def check_tokens(input_ids, attention_mask):
    """Raise a `ValueError` unless both are tensors [questions, tokens]."""
    tensors = isinstance(input_ids, torch.Tensor) and isinstance(attention_mask, torch.Tensor)
    if not tensors or input_ids.dim() != 2 or attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"input_ids is {describe(input_ids)} and attention_mask {describe(attention_mask)}: both have to be "
            "[questions, tokens]"
        )


def setting_of(name, generate_kwargs, of_the_model):
    """An argument of generate(): by keyword, else in a generation_config, else the model's own; None if nowhere."""
    given = (generate_kwargs.get("generation_config"), of_the_model)
    values = [generate_kwargs.get(name), *(getattr(config, name, None) for config in given)]
    return next((value for value in values if value is not None), None)


def whole_number(name, value, least=1):
    """`value` as an int: a whole number of at least `least`, which may be numpy's or a tensor without dimensions."""
    kind = getattr(value, "dtype", type(value))
    try:
        number = None if "bool" in str(kind) or getattr(value, "ndim", 0) else operator.index(value)
    except TypeError:
        number = None
    if number is None or number < least:
        raise ValueError(f"{name} is {value!r}: give a whole number of at least {least}")
    return number


def rows_per_question(generate_kwargs, of_the_model):
    """Rows that a question takes."""
    given = {name: setting_of(name, generate_kwargs, of_the_model) for name in ("num_beams", "num_return_sequences")}
    return max(1 if value is None else whole_number(name, value) for name, value in given.items())


# What generate() of the original can do and these graphs can't (they return logits alone, keep their own cache and take
# no other input), each with the number that has no effect.
NOT_COMPILED = dict.fromkeys(
    (
        *("assistant_early_exit", "assistant_model", "assistant_tokenizer", "cache", "cache_config"),
        *("cache_implementation", "constraints", "continuous_batching_config", "custom_generate", "dola_layers"),
        *("diversity_penalty", "force_words_ids", "inputs", "inputs_embeds", "max_cache_len"),
        *(
            "is_assistant",
            "negative_prompt_attention_mask",
            "negative_prompt_ids",
            "output_attentions",
            "output_hidden_states",
        ),
        *("past_key_values", "penalty_alpha", "position_ids", "prefill_chunk_size", "prompt_lookup_num_tokens"),
        *("synced_gpus", "token_healing", "use_mtp"),
    ),
    0,
) | {"guidance_scale": 1, "num_beam_groups": 1}
# What the model hands to its text decoder itself.
SET_BY_THE_MODEL = ("encoder_attention_mask", "encoder_hidden_states", "eos_token_id", "pad_token_id")


def requests(model, processor, text, image, together):
    """What `infer` is given, as inputs of ``generate()``: yields a dict for each call, of so many questions `together`.

    Both models get what Hugging Face's processor makes, except that padding is on the right, that a picture which all
    questions share comes once, and that a graph which takes a picture's bytes gets them before they are normalised."""
    questions, images, encoded = pair_up(model, text, image)
    token_ids = [question_tokens(processor, question) for question in questions]
    seen = None if encoded else getattr(model, "seen", None)
    pixels_of, ready = pixels_for(model, processor), {}

    def prepared(picture):
        if encoded:
            return picture[None]
        if seen is None:
            return pixels_of(picture)
        return seen.features(picture, lambda new: model.encode_image(pixels_of(new)).last_hidden_state)

    for start in range(0, len(questions), together):
        batch = slice(start, start + together)
        padded = processor.tokenizer.pad({"input_ids": token_ids[batch]}, padding_side="right", return_tensors="pt")
        # A picture that was in the batch before is not processed again; others are forgotten.
        ready = {id(picture): ready.get(id(picture)) for picture in images[batch]}
        for picture in images[batch]:
            if ready[id(picture)] is None:
                ready[id(picture)] = prepared(picture)
        pictures = [ready[id(picture)] for picture in images[batch]] if len(ready) > 1 else [*ready.values()]
        if len({tensor.dtype for tensor in pictures}) > 1:
            pictures = [model.normalised(tensor) for tensor in pictures]
        pictures = torch.cat(pictures) if len(pictures) > 1 else pictures[0]
        inputs = {"input_ids": padded.input_ids, "attention_mask": padded.attention_mask}
        if encoded or seen is not None:
            yield inputs | {"image": BaseModelOutputWithPooling(last_hidden_state=pictures)}
        else:
            yield inputs | {"pixel_values": pictures}


def pixels_for(model, processor):
    """What makes the pixels of a picture for a model: bytes where it takes them and normalises as the processor."""
    one_call = getattr(model, "one_call", None)
    if one_call is None or not one_call.pixels.are_those_of(processor):
        return functools.partial(pixel_values_of, processor)

    def as_bytes(picture):
        pixels = resized_pixels(processor, picture)
        return pixel_values_of(processor, picture) if pixels is None else pixels

    return as_bytes


def pair_up(model, text, image):
    """Questions and images of one length, and whether the images are encoded."""
    if not isinstance(text, str | list | tuple):
        raise ValueError(f"question is a {type(text).__name__}: pass a str, or a list of them")
    questions = [text] if isinstance(text, str) else list(text)
    encoded = isinstance(image, BaseModelOutputWithPooling)
    if encoded and not isinstance(model, ChecksRequests):
        raise ValueError("image is an encoded one, which only a compiled model takes: pass the picture")
    images = list(model.check_encoded(image)) if encoded else image
    images = list(images) if isinstance(images, list | tuple) else [images]
    images = images * len(questions) if len(images) == 1 and not isinstance(image, list | tuple) else images
    if len(images) != len(questions):
        raise ValueError(f"{len(images)} images for {len(questions)} questions: pass an image each, or one for all")
    return questions, images, encoded


def how_many_together(model, text, generate_kwargs):
    """How many of the questions of `infer` a call of `model` takes; what gives no text each is a `ValueError`."""
    own = model.text_decoder.generation_config
    if setting_of("num_return_sequences", generate_kwargs, own) not in (None, 1):
        raise ValueError("infer gives one answer a question: call model.generate() for num_return_sequences > 1")
    if setting_of("return_dict_in_generate", generate_kwargs, own):
        raise ValueError("infer gives texts: call model.generate() for return_dict_in_generate")
    if not isinstance(model, ChecksRequests) or generate_kwargs.get("streamer") is not None:
        return 1
    together = max(1, model.shapes.rows // rows_per_question(generate_kwargs, own))
    questions = len(text) if isinstance(text, list | tuple) else 1
    if questions > together and setting_of("do_sample", generate_kwargs, own):
        raise ValueError(
            f"{questions} questions are more than the {together} that fit into one call, and sampling in several "
            "calls would draw other random numbers: pass fewer, or trace a larger batch_size"
        )
    return together


def check_model(model, shapes, decoder):
    """Raise a `ValueError` unless it is a model, and a kind of decoder, that can be traced."""
    if decoder not in ("cached", "padded", "unrolled"):
        raise ValueError(f"decoder is {decoder!r}; there are 'cached', 'padded' and 'unrolled'")
    if not isinstance(model, BlipForQuestionAnswering) or isinstance(model, ChecksRequests):
        raise ValueError(f"model is a {type(model).__name__}: pass a BlipForQuestionAnswering that is not compiled")
    if model.decoder_start_token_id != model.config.text_config.bos_token_id:
        raise ValueError(
            f"decoder_start_token_id is {model.decoder_start_token_id}, bos_token_id of the text_config "
            f"{model.config.text_config.bos_token_id}: a compiled model starts with the latter, set both"
        )
    if not isinstance(shapes, BlipShapes):
        raise ValueError(f"shapes is a {type(shapes).__name__}: pass BlipShapes(...)")
    if decoder == "unrolled" and shapes.unrolled_steps >= shapes.answer_length:
        raise ValueError(
            f"unrolled_steps is {shapes.unrolled_steps}; answer_length={shapes.answer_length} allows "
            f"{shapes.answer_length - 1} new tokens: unroll at most as many"
        )
    check_weights_to_trace(model)
    if any(module.training for module in model.modules()):
        raise ValueError("the model is in training mode, a trace would keep its dropout: call model.eval() first")
    last = model.config.text_config.vocab_size - 1
    for name in ("bos_token_id", "sep_token_id", "pad_token_id"):
        token = getattr(model.config.text_config, name)
        if not isinstance(token, int) or not 0 <= token <= last:
            raise ValueError(
                f"{name} of the text_config is {token!r}; the vocabulary has 0 to {last}: set it to the tokenizer's"
            )


def check_weights_to_trace(model):
    """Raise a `ValueError` unless all is fp32, on the CPU and as Hugging Face made it."""
    tensors = [*model.parameters(), *model.buffers()]
    devices = {str(tensor.device) for tensor in tensors} - {"cpu"}
    if devices:
        raise ValueError(f"the model is on {', '.join(sorted(devices))}; it is traced on the CPU: load it there")
    quantised = [name for name, module in model.named_modules() if type(module).__module__.startswith("torch.ao.nn.")]
    # A tensor of another class, or of whole numbers, says fp32 of itself or can't be made so.
    quantised += [
        name
        for name, p in model.named_parameters()
        if type(p.data) is not torch.Tensor or not (p.is_floating_point() or p.is_complex())
    ]
    if quantised:
        raise ValueError(
            f"{quantised[0]} is quantised; float32 is what is traced: load the original, and let the compiler round it "
            "(dtype=torch.bfloat16)"
        )
    others = {describe(p).split()[0] for p in model.parameters()} - {"float32"}
    if others:
        raise ValueError(f"the model has weights in {', '.join(others)}; float32 is what is traced: call model.float()")


def rows_by_image(images, questions):
    """Each different image, [1, ...] as `images` has them, with the rows of its questions."""
    if len(images) == 1:
        return [(images, list(range(questions)))]
    rows = {}
    for row, image in enumerate(images):
        rows.setdefault(image.numpy().tobytes(), []).append(row)
    return [(images[of_image[:1]], of_image) for of_image in rows.values()]


def question_tokens(processor, question, name="question"):
    """The token ids of a text, a list of int; `name` is what a `ValueError` calls it."""
    if not isinstance(question, str):
        raise ValueError(f"{name} is a {type(question).__name__}: pass a str")
    try:
        question.encode()
    except UnicodeEncodeError as error:
        half = question[error.start]
        raise ValueError(f"{name} has {half!r}, half of a character, at {error.start}: pass whole characters") from None
    tokens = processor.tokenizer(question).input_ids
    if len(tokens) <= processor.tokenizer.num_special_tokens_to_add():
        raise ValueError(f"{name} {question!r} is empty: {'ask something' if name == 'question' else 'leave it out'}")
    return tokens


def pad_question(input_ids, attention_mask, question_length, pad_token_id=0, positions=None):
    """Pad to the traced length: int64 [questions, q] -> input_ids and attention_mask int64 [questions, Q].

    What is padded already, on either side, is moved to the left and padded again: positions are those of the unpadded
    question. `positions` are those that the checkpoint has.

    Raises
    ------
    ValueError
        If a question is longer than Q, has no token at all, or a masked one between others; nothing is cut off.
    """
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    check_tokens(input_ids, attention_mask)
    missing = question_length - input_ids.shape[1]
    if 0 <= missing < question_length and len(input_ids) and attention_mask.all():  # the usual one, with the least work
        ones = torch.ones_like(input_ids, dtype=torch.int64)
        return F.pad(input_ids, (0, missing), value=pad_token_id), F.pad(ones, (0, missing))
    attention_mask = (attention_mask != 0).long()
    tokens = attention_mask.sum(dim=1)
    if not tokens.all() or not len(tokens) or not input_ids.shape[1]:
        raise ValueError("a question is empty (its attention_mask has no 1): ask something")
    start = attention_mask.argmax(dim=1)
    if (attention_mask.cumsum(dim=1).argmax(dim=1) + 1 - start > tokens).any():
        raise ValueError("an attention_mask has a 0 between two 1s: leave the token out, a mask is for padding")
    longest = int(tokens.max())
    if longest > question_length:
        advice = "shorten it" if positions and longest > positions else f"trace it with question_length >= {longest}"
        raise ValueError(f"question has {longest} tokens; this model was traced for {question_length}: {advice}")
    columns = torch.arange(question_length)
    mask = columns < tokens[:, None]
    moved = input_ids.gather(1, (start[:, None] + columns).clamp(max=input_ids.shape[1] - 1))
    return moved.where(mask, pad_token_id), mask.long()
