"""Compile Hugging Face's ``BlipForQuestionAnswering`` for AWS Neuron (Inf2), one notebook at a time.

Here is what stands around the graphs: Hugging Face's interface outside, fixed shapes inside. The modules that become
graphs are in `blip_graphs`, which says what B, R, Q, A, K, T, D, H, L, S and V are. Read both from top to bottom: the
order is that of the notebooks.
"""

from dataclasses import asdict, replace

import torch
import torch.nn.functional as F
from inf2 import *  # noqa: F403 (all of it, so that a notebook needs one import)
from inf2 import clean_state, load_parts, read_manifest, trace_parts
from torch import nn
from transformers import BlipConfig, BlipForQuestionAnswering, GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPooling, CausalLMOutputWithCrossAttentions

from blip_answers import Verified, compare_answers, trim  # noqa: F401
from blip_checkpoints import MODELS, load_blip, load_config, load_resnet, question_count, uses_bundled_models  # noqa: F401
from blip_decoding import OnTheHost, TakesTurns, on_the_host
from blip_examples import check_parts, each_graph_once, example_inputs  # noqa: F401 (notebook 06 checks with them)
from blip_graphs import (  # noqa: F401 (the notebooks show each)
    CachedDecoder,
    CachedTextEncoder,
    DecoderState,
    Logits,
    NeuronTextEncoder,
    NeuronVisionModel,
    PaddedDecoder,
    PictureAnswer,
    UnrolledAnswer,
    acting_question_mask,
    additive_mask,
    attend,
    keys_and_values,
    split_heads,
    update,
)
from blip_inputs import (
    BlipShapes,
    ChecksRequests,
    check_model,
    how_many_together,
    pad_question,
    requests,
    rows_by_image,
    rows_per_question,
    setting_of,
    whole_number,
)
from blip_one_call import OneCall, Pixels
from blip_pictures import resize_image  # noqa: F401
from blip_probes import CANNOT, probed_parts
from blip_scores import probabilities, rank_answers  # noqa: F401
from blip_seen import SeenPictures  # noqa: F401

# 02  Wrap the two encoders ------------------------------------------------------------


class VisionModelWrapper(nn.Module):
    """Stands in for ``model.vision_model``: keyword arguments and output object outside, the image graph inside."""

    def __init__(self, graph):
        super().__init__()
        self.graph = graph

    def forward(self, pixel_values, interpolate_pos_encoding=False):
        """pixel_values fp32 [images, 3, height, width] -> last_hidden_state fp32 [images, T, D]"""
        if interpolate_pos_encoding:
            raise ValueError("interpolate_pos_encoding is True; the image graph has one image size: resize the picture")
        image_embeds = torch.cat([self.graph(image[None]) for image in pixel_values])
        return BaseModelOutputWithPooling(last_hidden_state=image_embeds)


def fill_rows(tensor, rows):
    """Repeat the last row until there are `rows`; what comes out of such filler is cut off again."""
    return torch.cat([tensor, tensor[-1:].expand(rows - len(tensor), *tensor.shape[1:])])


class TextEncoderWrapper(nn.Module):
    """Stands in for ``model.text_encoder``: any number of questions about one image outside, B at a time inside."""

    def __init__(self, graph, shapes):
        super().__init__()
        self.graph = graph
        self.shapes = shapes

    def forward(self, input_ids, attention_mask, encoder_hidden_states, encoder_attention_mask=None, return_dict=False):
        """input_ids, attention_mask int64 [questions, Q], encoder_hidden_states fp32 [1, T, D]
        -> (features fp32 [questions, Q, D],), or whatever else the graph makes of a question

        Every image token counts, so that ``encoder_attention_mask`` has nothing to say."""
        questions = []
        batch_size = self.shapes.batch_size
        for ids, mask in zip(input_ids.split(batch_size), attention_mask.split(batch_size), strict=True):
            embeds = self.graph(fill_rows(ids, batch_size), fill_rows(mask, batch_size), encoder_hidden_states)
            questions.append(embeds[: len(ids)])
        return (torch.cat(questions),)


class ShortestQuestionGraph(nn.Module):
    """Several question graphs as one of the longest's shapes: each call takes the shortest graph that fits."""

    def __init__(self, graphs, shapes):
        super().__init__()
        self.graphs = nn.ModuleList(graphs.values())
        self.lengths = shapes.question_lengths

    def forward(self, input_ids, attention_mask, encoder_hidden_states):
        """As `NeuronTextEncoder` or `CachedTextEncoder`; what is missing to the length Q is filled with zeros."""
        tokens = attention_mask.sum(dim=1).max()
        which = next(i for i, length in enumerate(self.lengths) if tokens <= length)
        length = self.lengths[which]
        inputs = input_ids[:, :length].contiguous(), attention_mask[:, :length].contiguous()
        features = self.graphs[which](*inputs, encoder_hidden_states)
        return F.pad(features, (0, 0, 0, self.lengths[-1] - length))


# 03  Pad the decoder ------------------------------------------------------------


class DecoderOutputFormatter(nn.Module):
    """Gives the graph's bare tensor the name that ``generate()`` reads."""

    def __init__(self, decoder):
        super().__init__()
        self.decoder = decoder

    def forward(self, *inputs):
        outputs = self.decoder(*inputs)
        # In AWS's T5 tutorial the state comes back as well, behind what is read; the stand-in keeps it inside.
        logits = outputs[0] if isinstance(outputs, tuple | list) else outputs
        return CausalLMOutputWithCrossAttentions(logits=logits)


class DecoderPaddedGenerator(OnTheHost, PreTrainedModel, GenerationMixin):
    """Stands in for ``model.text_decoder``: Hugging Face's ``generate()`` around a graph of fixed length.

    `decoder` is a `PaddedDecoder` or what became of it in a trace, `shapes` a `BlipShapes`, and `generation_config`
    that of ``model.text_decoder``: it, not the whole model's, rules what ``generate()`` does."""

    main_input_name = "input_ids"

    def __init__(self, config, decoder, shapes, generation_config):
        super().__init__(config)
        self.decoder = DecoderOutputFormatter(decoder)
        self.shapes = shapes
        self.generation_config = GenerationConfig.from_dict(generation_config.to_dict() | {"use_cache": False})

    def prepare_inputs_for_generation(self, input_ids, encoder_hidden_states, encoder_attention_mask, **kwargs):
        """Pad the tokens so far, int64 [rows, so far], to A; a mask that is 1 for them; the last one's position."""
        so_far = input_ids.shape[1]
        padding = (0, self.shapes.answer_length - so_far)
        return {
            "input_ids": F.pad(input_ids, padding, value=self.config.pad_token_id),
            "encoder_hidden_states": encoder_hidden_states,
            "encoder_attention_mask": encoder_attention_mask,
            "attention_mask": F.pad(torch.ones_like(input_ids), padding),
            "position": torch.tensor([so_far - 1]),
        }

    def forward(self, input_ids, encoder_hidden_states, encoder_attention_mask, attention_mask, position, **kwargs):
        """As `PaddedDecoder`, for any number of rows up to R; filler rows are added here and cut off again, so that
        ``generate()`` and its random numbers see real rows only."""
        per_row = (input_ids, encoder_hidden_states, encoder_attention_mask, attention_mask)
        output = self.decoder(*(fill_rows(tensor, self.shapes.rows) for tensor in per_row), position)
        return CausalLMOutputWithCrossAttentions(logits=output.logits[: len(input_ids)])


# 04  Assemble and verify ------------------------------------------------------------


def question_graphs(shapes):
    """The names of the question graphs, with the length of each."""
    if len(shapes.question_lengths) == 1:
        return {"text_encoder": shapes.longest_question}
    return {f"text_encoder_{length}": length for length in shapes.question_lengths}


class NeuronBlipForQuestionAnswering(ChecksRequests, BlipForQuestionAnswering):
    """A ``BlipForQuestionAnswering`` whose three parts are graphs of fixed shape.

    `graphs` has by the names of `parts_to_trace` what was traced, or the modules that are traced (which keep no
    state: a cached decoder has to be traced); `decoder` is what stands in for the text decoder,
    `DecoderPaddedGenerator` or the one from notebook 05, and `generation_config` that of the text decoder. `pixels`
    says what the graph of notebook 07, where there is one, makes of a picture's bytes."""

    def __init__(self, config, graphs, shapes, generation_config, decoder=DecoderPaddedGenerator, pixels=None):
        # Past BlipForQuestionAnswering's own __init__, which would draw a second full set of random weights.
        super(BlipForQuestionAnswering, self).__init__(config)
        self.decoder_pad_token_id = config.text_config.pad_token_id
        self.decoder_start_token_id = config.text_config.bos_token_id
        self.shapes = shapes
        self.vision_model = VisionModelWrapper(graphs["vision_model"])
        questions = {name: graphs[name] for name in question_graphs(shapes)}
        self.text_encoder = TextEncoderWrapper(
            ShortestQuestionGraph(questions, shapes) if len(questions) > 1 else questions["text_encoder"], shapes
        )
        self.text_decoder = decoder(config.text_config, graphs["text_decoder"], shapes, generation_config)
        self.seen = None  # set it to a SeenPictures, and infer() keeps the features of pictures
        in_one = "unrolled_answer" in graphs
        self.one_call = OneCall(graphs, shapes, config.text_config, pixels or Pixels()) if in_one else None
        self.eval()

    @classmethod
    def from_pretrained(cls, directory, *, core=0):
        """Load what `trace` left in `directory`, on Neuron onto the NeuronCore `core`.

        Raises
        ------
        ValueError
            If the artifact is incomplete, was changed, or was made by other versions or for another backend.
        """
        graphs = load_parts(directory, core=core)
        manifest = read_manifest(directory)
        return cls(
            BlipConfig.from_dict(manifest["config"]),
            graphs,
            BlipShapes(**manifest["shapes"]),
            GenerationConfig.from_dict(manifest["generation_config"]),
            DECODERS[manifest["decoder"]][-1],
            Pixels(**manifest["pixels"]) if "pixels" in manifest else None,
        )

    @torch.no_grad()
    @on_the_host
    def encode_image(self, pixel_values):
        """Run the image graph, once for any number of questions asked later.

        pixel_values as in `generate` -> last_hidden_state fp32 [images, T, D], in the output object that `generate` and
        `infer` take as ``image``
        """
        return self.vision_model(self.normalised(self.check_image(pixel_values)))

    def normalised(self, images):
        """Pictures as the image graph takes them: bytes, uint8 [images, 3, S, S], become fp32; fp32 is left alone."""
        return self.one_call.pixels.normalise(images) if images.dtype == torch.uint8 else images

    @torch.no_grad()
    @on_the_host
    def generate(
        self,
        input_ids,
        pixel_values=None,
        attention_mask=None,
        interpolate_pos_encoding=False,
        *,
        image=None,
        **generate_kwargs,
    ):
        """Answer questions; as Hugging Face's method, with a question mask that acts.

        input_ids, attention_mask int64 [questions, q], q <= Q, 0 where a question is padded; pixel_values fp32
        [images, 3, height, width], or ``image``, what `encode_image` returned: one a question, or one for all; one
        that comes several times is encoded once. Without a limit there are at most A - 1 new tokens. A model with
        unrolled steps takes the bytes of resized pictures as well, uint8 [images, 3, S, S]. -> int64 [rows, tokens], or
        what ``return_dict_in_generate`` asks for. A `ValueError` says what was not traced, or what no compiled model
        can do."""
        in_one_call = self.answers_in_one_call(generate_kwargs)
        if not in_one_call:
            self.check_arguments(generate_kwargs)
        generate_kwargs = self.with_limit(generate_kwargs)
        images = self.check_images(pixel_values, image, interpolate_pos_encoding)
        self.check_questions(input_ids, len(images), generate_kwargs)
        answer = self._answer_in_one_call if in_one_call else self._answer
        return answer(*self.padded(input_ids, attention_mask), images, **generate_kwargs)

    def padded(self, input_ids, attention_mask):
        """Questions and their mask or None, int64 [questions, q], as the graphs take them: both int64 [questions, Q]"""
        text = self.config.text_config
        length, positions = self.shapes.longest_question, text.max_position_embeddings
        return pad_question(input_ids, attention_mask, length, text.pad_token_id, positions)

    def answers_in_one_call(self, generate_kwargs):
        """Whether arguments of `generate` ask for what a graph of notebook 07 returns, where there is one."""
        return (
            self.one_call is not None
            and (generate_kwargs, self.text_decoder.generation_config) in self.one_call.requests
        )

    def _answer_in_one_call(self, input_ids, attention_mask, images, max_new_tokens, **plain):
        """K tokens of each question in a call an image; those that need more begin again with the cached decoder."""
        tokens = [None] * len(input_ids)
        for image, rows in rows_by_image(images, len(input_ids)):
            question = (
                (input_ids, attention_mask) if len(rows) == len(input_ids) else (input_ids[rows], attention_mask[rows])
            )
            for row, answer in zip(rows, self.one_call(*question, image, self.vision_model), strict=True):
                tokens[row] = answer

        def go_on(rows):
            of_these = images if len(images) == 1 else images[rows]
            return self._answer(input_ids[rows], attention_mask[rows], of_these, max_new_tokens=max_new_tokens)

        return self.one_call.join(tokens, max_new_tokens, go_on)

    def _answer(self, input_ids, attention_mask, images, **generate_kwargs):
        """Hugging Face's ``generate()`` around the decoder's graph."""
        return self.text_decoder.generate(
            input_ids=torch.full((len(input_ids), 1), self.decoder_start_token_id),
            eos_token_id=self.config.text_config.sep_token_id,
            pad_token_id=self.config.text_config.pad_token_id,
            encoder_hidden_states=self.encode_questions(input_ids, attention_mask, self.normalised(images)),
            encoder_attention_mask=attention_mask,
            **generate_kwargs,
        )

    def encode_questions(self, input_ids, attention_mask, images):
        """What the question graph makes of each question, int64 [questions, Q], about its image or its features."""
        features = [None] * len(input_ids)
        for image, rows in rows_by_image(images, len(input_ids)):
            image_embeds = image if image.dim() == 3 else self.vision_model(image)[0]
            of_image = self.text_encoder(input_ids[rows], attention_mask[rows], image_embeds)[0]
            for row, feature in zip(rows, of_image, strict=True):
                features[row] = feature
        return torch.stack(features)


def parts_to_trace(model, shapes, decoder="cached", pixels=None):
    """The modules that are traced and example inputs for each: ``{name: (module, example_inputs)}``.

    The example masks are ragged: no value of theirs may end up in a graph, and a mask of ones is the likeliest to.
    `decoder` and `pixels` are as for `trace`, which makes `pixels` of a processor.
    """
    if decoder not in DECODERS:
        raise ValueError(f"decoder is {decoder!r}; there are {', '.join(DECODERS)}")
    examples = example_inputs(model, shapes)
    make_encoder, make_decoder, example, _ = DECODERS[decoder]
    parts = {"vision_model": (NeuronVisionModel(model.vision_model), examples["image"])}
    for name, length in question_graphs(shapes).items():
        parts[name] = make_encoder(model), examples[f"question of {length}"]
    parts["text_decoder"] = make_decoder(model.text_decoder, shapes), examples[example]
    if decoder == "unrolled":
        steps, (ids, mask, image_embeds) = shapes.unrolled_steps, examples[f"question of {shapes.longest_question}"]
        parts["unrolled_answer"] = UnrolledAnswer(model, steps), (ids, mask, image_embeds)
        parts["picture_answer"] = PictureAnswer(model, steps, pixels or Pixels()), (ids, mask, *examples["bytes"])
    return parts


def _artifact(model, shapes, decoder, processor):
    """The parts of a BLIP as `trace_parts` takes them, and what the manifest says of them."""
    shapes = BlipShapes() if shapes is None else shapes
    check_model(model, shapes, decoder)
    description = {
        "shapes": asdict(shapes),
        "decoder": decoder,
        "config": model.config.to_dict(),
        "generation_config": model.text_decoder.generation_config.to_dict(),
    }
    pixels = Pixels() if processor is None else Pixels.of(processor)
    if decoder == "unrolled":
        description["pixels"] = asdict(pixels)

    def generator(graph):
        return DECODERS[decoder][-1](model.config.text_config, graph, shapes, GenerationConfig())

    try:
        parts = parts_to_trace(model, shapes, decoder, pixels)
    except (AttributeError, RuntimeError, TypeError) as error:
        raise ValueError(f"the model {CANNOT}: {type(error).__name__}: {error}") from error
    return probed_parts(model, shapes, parts, generator, BeamRows, pixels), description


@clean_state()
def trace(model, directory, shapes=None, *, decoder="cached", processor=None, dtype=torch.float32, **compiling):
    """Trace the parts of `model` into `directory` and load them as one model.

    What is there already and still valid is kept; the rest is traced, with the reason printed. What the modules answer
    to probe inputs is compared with the model's own answers first.

    Parameters
    ----------
    model : BlipForQuestionAnswering, in eval mode, fp32, on the CPU
    directory : str or Path
    shapes : BlipShapes, optional
    decoder : {"cached", "padded", "unrolled"}
        One that keeps keys and values (notebook 05), or one that computes the whole answer anew (notebook 03). With
        "unrolled" (notebook 07) there are a cached one and two graphs that answer in one call; these give the most
        likely tokens, and what is longer than ``shapes.unrolled_steps``, or asked for in another way, the cached one.
    processor : BlipProcessor, optional
        With "unrolled": how pictures are normalised inside the graph; by default as BLIP's own processors do.
    dtype, **compiling
        As in `trace_parts`: dtype, backend, compiler_args.

    Returns
    -------
    NeuronBlipForQuestionAnswering

    Raises
    ------
    ValueError
        If an argument is not of the kind described here, or a trace would not answer as the model does."""
    parts, description = _artifact(model, shapes, decoder, processor)
    trace_parts(parts, directory, description, dtype=dtype, **compiling)
    return NeuronBlipForQuestionAnswering.from_pretrained(directory)


@clean_state()
def compile_for_inf2(
    model, directory, shapes=None, *, decoder="cached", processor=None, dtype=torch.float32, compiler_args=None
):
    """As `trace`, on a machine with AWS's packages but without a Neuron device: compile, and load nothing.

    Copy `directory` to an Inf2 instance with the same versions of torch, transformers, torch-neuronx and neuronx-cc,
    and load it there with ``NeuronBlipForQuestionAnswering.from_pretrained``; `trace` keeps it as well. See
    `trace_module`."""
    parts, description = _artifact(model, shapes, decoder, processor)
    how = {"dtype": dtype, "backend": "neuron", "compiler_args": compiler_args, "cpu_backend": True}
    trace_parts(parts, directory, description, **how)


def load_replicas(directory, n):
    """Load what `trace` left in `directory` n times, each copy with a state of its own; on Neuron one a NeuronCore."""
    whole_number("n", n)
    return [NeuronBlipForQuestionAnswering.from_pretrained(directory, core=core) for core in range(n)]


def infer(model, processor, text, image, *, return_scores=False, **generate_kwargs):
    """Ask questions about pictures: a str for a str, a list of str for a list.

    `model` is an original, which answers one unpadded question at a time, or a compiled one, which takes as many as
    fit; `image` a picture as `processor` takes it, its path, URL or bytes, or a list with one a question, or what
    ``encode_image`` of the compiled model returned. A compiled model whose ``seen`` is a `SeenPictures` keeps the
    features of pictures there. With `return_scores` an answer is a pair, the text and its probability (see
    `probabilities`). A `ValueError` says which question is empty or too long, or which image is none.
    """
    together = how_many_together(model, text, generate_kwargs)
    details = {"return_dict_in_generate": True, "output_scores": True} if return_scores else {}
    answers = []
    for inputs in requests(model, processor, text, image, together):
        output = model.generate(**inputs, **generate_kwargs | details)
        token_ids = output.sequences if return_scores else output
        texts = processor.batch_decode(token_ids, skip_special_tokens=True)
        answers += zip(texts, probabilities(model, output), strict=True) if return_scores else texts
        if isinstance(model, ChecksRequests):
            model.warn_if_cut(token_ids, generate_kwargs)
    return answers[0] if isinstance(text, str) else answers


def verify(compiled, model, processor, examples, **generate_kwargs):
    """Compare `compiled` with `model`, eager, one unpadded question at a time, with the same limit of new tokens.

    `examples` have a ``question`` and an ``image``; the compiled model takes as many at once as fit, of different
    lengths; where it samples, one, from the random numbers that the model drew. Yields for each a `Verified`."""
    examples, own = list(examples), compiled.text_decoder.generation_config
    returned = whole_number("num_return_sequences", setting_of("num_return_sequences", generate_kwargs, own) or 1)
    each = rows_per_question(generate_kwargs, own)
    at_once = 1 if setting_of("do_sample", generate_kwargs, own) else max(1, compiled.shapes.rows // each)
    limited = compiled.with_limit(generate_kwargs) | {"return_dict_in_generate": True, "output_logits": True}
    for batch in (examples[start : start + at_once] for start in range(0, len(examples), at_once)):
        asked = [example.question for example in batch], [example.image for example in batch]
        drawn_from = torch.get_rng_state()
        expected = [model.generate(**alone, **limited) for alone in requests(model, processor, *asked, 1)]
        torch.set_rng_state(drawn_from)
        (together,) = requests(compiled, processor, *asked, len(batch))
        actual = compiled.generate(**together, **limited)
        sequences = actual.sequences  # with logits, and so of the decoder, where an answer may come from one call
        if compiled.answers_in_one_call(generate_kwargs):
            sequences = compiled.generate(**together, **generate_kwargs)
        for row, example in enumerate(batch):
            ours = sequences[row * returned : (row + 1) * returned]
            logits = [step[row * each : (row + 1) * each] for step in actual.logits]
            verified = compare_answers(example, expected[row], ours, logits, compiled.config.text_config.sep_token_id)
            yield replace(verified, cut=any(compiled.was_cut(answer, generate_kwargs) for answer in verified.answers))


# 05  Cache the decoder ------------------------------------------------------------


class BeamRows(Cache):
    """The cache that ``generate()`` sees: only which row each beam goes on from. Keys and values are in the graph."""

    def __init__(self, rows):
        super().__init__(layers=[])
        self.rows = torch.arange(rows)

    def reorder_cache(self, beam_idx):
        self.rows = beam_idx


class DecoderCachedGenerator(TakesTurns, DecoderPaddedGenerator):
    """Stands in for ``model.text_decoder`` as `DecoderPaddedGenerator` does, around a graph that keeps state.

    There is one state: calls from several threads take turns, and a call made while this one waits for it never ends.
    A copy for each is what `load_replicas` makes. `decoder` is a traced `CachedDecoder`.
    """

    def generate_in_turn(self, input_ids, **kwargs):
        """As ``GenerationMixin.generate`` from a start token, int64 [rows, 1]; ``encoder_hidden_states`` is what
        `CachedTextEncoder` returned."""
        rows = len(input_ids) * rows_per_question(kwargs, self.generation_config)
        return GenerationMixin.generate(self, input_ids=input_ids, cache=BeamRows(rows), **kwargs)

    def prepare_inputs_for_generation(self, input_ids, cache, **kwargs):
        """The last token of each row, int64 [rows, 1], and its position; what came before is in the graph."""
        names = ("encoder_hidden_states", "encoder_attention_mask")
        return {
            "input_ids": input_ids[:, -1:],
            "position": torch.tensor([input_ids.shape[1] - 1]),
            "cache": cache,
            **{name: kwargs[name] for name in names},
        }

    def forward(self, input_ids, position, cache, encoder_hidden_states, encoder_attention_mask, **kwargs):
        """As `CachedDecoder`, for any number of rows up to R. The first step writes the question into the state."""
        rows, given = self.shapes.rows, len(input_ids)
        if position == 0:
            question = [*fill_rows(encoder_hidden_states, rows).unbind(1), fill_rows(encoder_attention_mask, rows)]
            for state, value in zip(self.decoder.parameters(), question, strict=False):
                state.copy_(value)
        beam_rows = torch.cat([cache.rows, torch.arange(given, rows)])
        output = self.decoder(fill_rows(input_ids, rows), position, beam_rows)
        cache.rows = torch.arange(given)
        return CausalLMOutputWithCrossAttentions(logits=output.logits[:given])


_CACHED = (CachedTextEncoder, CachedDecoder, "last token", DecoderCachedGenerator)
# Of each kind: what makes the modules that are traced, the name of the decoder's example inputs, what stands around it.
DECODERS = {
    "padded": (
        lambda model: NeuronTextEncoder(model.text_encoder),
        lambda decoder, shapes: PaddedDecoder(decoder),
        "whole answer",
        DecoderPaddedGenerator,
    ),
    "cached": _CACHED,
    "unrolled": _CACHED,  # for what one call does not give; `parts_to_trace` adds the graphs that answer in one
}
