"""Compile Hugging Face's ``BlipForQuestionAnswering`` for AWS Neuron (Inf2), one notebook at a time.

Read it from top to bottom: the order is that of the notebooks. Everywhere, B is the number of questions a call takes, R
the number of rows the decoder takes (B times the beams), Q the traced question length, A the traced answer length (the
start token counts), T the number of image tokens, D the hidden size and V the vocabulary size.
"""

import contextlib
import copy
from dataclasses import asdict, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from inf2 import *  # noqa: F403 (all of it, so that a notebook needs one import)
from inf2 import clean_state, load_parts, read_manifest, trace_parts
from torch import nn
from transformers import BlipConfig, BlipForQuestionAnswering, GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPooling, CausalLMOutputWithCrossAttentions
from transformers.models.blip.modeling_blip_text import BlipTextLayer

from blip_answers import Verified, compare_answers, trim  # noqa: F401
from blip_checkpoints import MODELS, load_blip, load_config, load_resnet, question_count, uses_bundled_models  # noqa: F401
from blip_decoding import OnTheHost, TakesTurns, greedy_loop, on_the_host
from blip_examples import check_parts, each_graph_once, example_inputs  # noqa: F401 (notebook 06 checks with them)
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
from blip_pictures import resize_image  # noqa: F401
from blip_probes import CANNOT, probed_parts
from blip_scores import probabilities, rank_answers  # noqa: F401

# 01  Which model; trace a module ------------------------------------------------------------


class Logits(nn.Module):
    """An image classifier as it is traced: pixel_values fp32 [B, 3, S, S] -> logits fp32 [B, N]"""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, pixel_values):
        return self.model(pixel_values=pixel_values).logits


# 02  Wrap the two encoders ------------------------------------------------------------


class NeuronVisionModel(nn.Module):
    """The image graph: pixels in, image tokens out, one image a call."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, pixel_values):
        """pixel_values fp32 [1, 3, height, width] -> image_embeds fp32 [1, T, D]"""
        return self.model(pixel_values=pixel_values, interpolate_pos_encoding=False).last_hidden_state


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


@contextlib.contextmanager
def acting_question_mask(model):
    """Let the question mask act in the cross-attention of `model` for the length of a ``with`` block.

    transformers 5 hands ``encoder_attention_mask`` to ``BlipTextAttention`` as its ``attention_mask``, and
    ``BlipTextSelfAttention`` reads ``encoder_attention_mask`` alone when it attends across: no mask arrives. A forward
    pre-hook hands it on under the name that is read. Masks that are all ones change nothing.
    """

    def hand_on(module, args, kwargs):
        return args, {**kwargs, "encoder_attention_mask": kwargs.get("attention_mask")}

    layers = [m for m in model.modules() if isinstance(m, BlipTextLayer) and hasattr(m, "crossattention")]
    hooks = [layer.crossattention.self.register_forward_pre_hook(hand_on, with_kwargs=True) for layer in layers]
    try:
        yield model
    finally:
        for hook in hooks:
            hook.remove()


def additive_mask(mask):
    """1 and 0 -> 0 and -10,000, what attention adds to its scores; a dimension for the heads is put in.

    The graph builds it from its input: Hugging Face drops a mask that is all ones while a lazy trace (torch-xla,
    Neuron) is made, and the graph would ignore masks for ever. exp(-10,000) is 0 in every format, and unlike the
    smallest fp32 number it is finite in bf16 and fp16 as well.

    mask int64 [rows, ...] -> fp32 [rows, 1, ...]
    """
    return (1.0 - mask.float()).unsqueeze(1) * -10_000.0


class NeuronTextEncoder(nn.Module):
    """The question graph: B padded questions about one image."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask, encoder_hidden_states):
        """input_ids, attention_mask int64 [B, Q], encoder_hidden_states fp32 [1, T, D] -> features fp32 [B, Q, D]"""
        return self.model(
            input_ids=input_ids,
            attention_mask=additive_mask(attention_mask[:, None, :]),
            encoder_hidden_states=encoder_hidden_states,
        ).last_hidden_state


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


class PaddedDecoder(nn.Module):
    """The answer graph: all A tokens of the answer so far, padded, in; the logits of one position out."""

    def __init__(self, model):
        super().__init__()
        self.decoder = model

    def forward(self, input_ids, encoder_hidden_states, encoder_attention_mask, attention_mask, position):
        """input_ids, attention_mask int64 [R, A], encoder_hidden_states fp32 [R, Q, D], encoder_attention_mask int64
        [R, Q], position int64 [1] -> logits fp32 [R, 1, V]

        The position is chosen before the vocabulary head, which so runs on one position instead of A."""
        length = input_ids.shape[1]
        causal = torch.ones(length, length, dtype=attention_mask.dtype, device=attention_mask.device).tril()
        with acting_question_mask(self.decoder):
            return self.decoder(
                input_ids=input_ids,
                attention_mask=additive_mask(causal * attention_mask[:, None, :]),
                encoder_hidden_states=encoder_hidden_states,
                encoder_attention_mask=additive_mask(encoder_attention_mask[:, None, :]),
                logits_to_keep=position,
                use_cache=False,
            ).logits


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
    `DecoderPaddedGenerator` or one of those from notebook 05, and `generation_config` that of the text decoder."""

    def __init__(self, config, graphs, shapes, generation_config, decoder=DecoderPaddedGenerator):
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
        )

    @torch.no_grad()
    @on_the_host
    def encode_image(self, pixel_values):
        """Run the image graph, once for any number of questions asked later.

        pixel_values fp32 [images, 3, height, width] -> last_hidden_state fp32 [images, T, D], in the output object that
        `generate` and `infer` take as ``image``
        """
        self.check_image(pixel_values)
        return self.vision_model(pixel_values)

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
        that comes several times is encoded once. Without a limit there are at most A - 1 new tokens. -> int64 [rows,
        tokens], or what ``return_dict_in_generate`` asks for. A `ValueError` says what was not traced, or what no
        compiled model can do."""
        self.check_arguments(generate_kwargs)
        generate_kwargs = self.with_limit(generate_kwargs)
        images = self.check_images(pixel_values, image, interpolate_pos_encoding)
        self.check_questions(input_ids, len(images), generate_kwargs)
        features, mask = self._encode_questions(input_ids, attention_mask, images, encoded=image is not None)
        return self.text_decoder.generate(
            input_ids=torch.full((len(input_ids), 1), self.decoder_start_token_id),
            eos_token_id=self.config.text_config.sep_token_id,
            pad_token_id=self.config.text_config.pad_token_id,
            encoder_hidden_states=features,
            encoder_attention_mask=mask,
            **generate_kwargs,
        )

    def _encode_questions(self, input_ids, attention_mask, images, encoded):
        """What the question graph makes of each question about its image, and the padded mask, int64 [questions, Q]."""
        text, length = self.config.text_config, self.shapes.longest_question
        padded = pad_question(input_ids, attention_mask, length, text.pad_token_id, text.max_position_embeddings)
        input_ids, attention_mask = padded
        features = [None] * len(input_ids)
        for image, rows in rows_by_image(images, len(input_ids)):
            image_embeds = image if encoded else self.vision_model(image)[0]
            of_image = self.text_encoder(input_ids[rows], attention_mask[rows], image_embeds)[0]
            for row, feature in zip(rows, of_image, strict=True):
                features[row] = feature
        return torch.stack(features), attention_mask


def parts_to_trace(model, shapes, decoder="cached"):
    """The modules that are traced and example inputs for each: ``{name: (module, example_inputs)}``.

    The example masks are ragged: no value of theirs may end up in a graph, and a mask of ones is the likeliest to.
    `decoder` is ``"padded"``, ``"cached"`` or ``"greedy"``, a cached one that chooses the token itself.
    """
    if decoder not in DECODERS:
        raise ValueError(f"decoder is {decoder!r}; there are {', '.join(DECODERS)}")
    examples = example_inputs(model, shapes)
    make_encoder, make_decoder, example, _ = DECODERS[decoder]
    parts = {"vision_model": (NeuronVisionModel(model.vision_model), examples["image"])}
    for name, length in question_graphs(shapes).items():
        parts[name] = make_encoder(model), examples[f"question of {length}"]
    return parts | {"text_decoder": (make_decoder(model.text_decoder, shapes), examples[example])}


def _artifact(model, shapes, decoder, greedy):
    """The parts of a BLIP as `trace_parts` takes them, and what the manifest says of them."""
    shapes = BlipShapes() if shapes is None else shapes
    check_model(model, shapes, decoder, greedy)
    kind = "greedy" if greedy else decoder
    description = {
        "shapes": asdict(shapes),
        "decoder": kind,
        "config": model.config.to_dict(),
        "generation_config": model.text_decoder.generation_config.to_dict(),
    }

    def generator(graph):
        return DECODERS[decoder][-1](model.config.text_config, graph, shapes, GenerationConfig())

    try:
        parts, with_logits = parts_to_trace(model, shapes, kind), parts_to_trace(model, shapes, decoder)
    except (AttributeError, RuntimeError, TypeError) as error:
        raise ValueError(f"the model {CANNOT}: {type(error).__name__}: {error}") from error
    return probed_parts(model, shapes, parts, with_logits, generator, BeamRows), description


@clean_state()
def trace(model, directory, shapes=None, *, decoder="cached", greedy=False, dtype=torch.float32, **compiling):
    """Trace the parts of `model` into `directory` and load them as one model.

    What is there already and still valid is kept; the rest is traced, with the reason printed. What the modules answer
    to probe inputs is compared with the model's own answers first.

    Parameters
    ----------
    model : BlipForQuestionAnswering, in eval mode, fp32, on the CPU
    directory : str or Path
    shapes : BlipShapes, optional
    decoder : {"cached", "padded"}
        One that keeps keys and values (notebook 05), or one that computes the whole answer anew (notebook 03).
    greedy : bool
        Of a cached decoder: choose the token inside the graph, which returns ids and no logits.
    dtype, **compiling
        As in `trace_parts`: dtype, backend, compiler_args.

    Returns
    -------
    NeuronBlipForQuestionAnswering

    Raises
    ------
    ValueError
        If an argument is not of the kind described here, or a trace would not answer as the model does."""
    parts, description = _artifact(model, shapes, decoder, greedy)
    trace_parts(parts, directory, description, dtype=dtype, **compiling)
    return NeuronBlipForQuestionAnswering.from_pretrained(directory)


@clean_state()
def compile_for_inf2(
    model, directory, shapes=None, *, decoder="cached", greedy=False, dtype=torch.float32, compiler_args=None
):
    """As `trace`, on a machine with AWS's packages but without a Neuron device: compile, and load nothing.

    Copy `directory` to an Inf2 instance with the same versions of torch, transformers, torch-neuronx and neuronx-cc,
    and load it there with ``NeuronBlipForQuestionAnswering.from_pretrained``; `trace` keeps it as well. See
    `trace_module`."""
    parts, description = _artifact(model, shapes, decoder, greedy)
    how = {"dtype": dtype, "backend": "neuron", "compiler_args": compiler_args, "cpu_backend": True}
    trace_parts(parts, directory, description, **how)


def load_replicas(directory, n):
    """Load what `trace` left in `directory` n times, each copy with a state of its own; on Neuron one a NeuronCore."""
    whole_number("n", n)
    return [NeuronBlipForQuestionAnswering.from_pretrained(directory, core=core) for core in range(n)]


def infer(model, processor, text, image, *, return_scores=False, **generate_kwargs):
    """Ask questions about pictures: a str for a str, a list of str for a list.

    `model` is an original, which answers one unpadded question at a time, or a compiled one, which takes as many as
    fit; `image` a picture as `processor` takes it, its path or URL, or a list with one a question, or what
    ``encode_image`` of the compiled model returned. With `return_scores` an answer is a pair, the text and its
    probability (see `probabilities`). A `ValueError` says which question is empty or too long, or which image is none.
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
        for row, example in enumerate(batch):
            ours = actual.sequences[row * returned : (row + 1) * returned]
            logits = [step[row * each : (row + 1) * each] for step in actual.logits]
            verified = compare_answers(example, expected[row], ours, logits, compiled.config.text_config.sep_token_id)
            yield replace(verified, cut=any(compiled.was_cut(answer, generate_kwargs) for answer in verified.answers))


# 05  Cache the decoder ------------------------------------------------------------


def split_heads(hidden, heads):
    """[rows, length, D] -> [rows, H, length, D / H]"""
    return hidden.unflatten(-1, (heads, -1)).transpose(1, 2)


def attend(attention, hidden, keys, values, mask):
    """One query a row against kept keys and values: [R, 1, D] -> [R, 1, D]"""
    query = split_heads(attention.query(hidden), keys.shape[1])
    scores = query @ keys.transpose(-1, -2) / attention.attention_head_size**0.5 + mask
    return (scores.softmax(dim=-1) @ values).transpose(1, 2).flatten(2)


class CachedTextEncoder(nn.Module):
    """The question graph for a `CachedDecoder`: not the encoded question, but what each decoder layer makes of it.

    The keys and values of the decoder's cross-attention depend on the question alone: they are computed here, once.
    """

    def __init__(self, model):
        super().__init__()
        self.encoder = NeuronTextEncoder(model.text_encoder)
        self.heads = model.text_decoder.config.num_attention_heads
        attentions = [layer.crossattention.self for layer in model.text_decoder.bert.encoder.layer]
        self.projections = nn.ModuleList(project for layer in attentions for project in (layer.key, layer.value))

    def keys_and_values(self, features):
        """fp32 [B, Q, D] -> [B, 2 L, H, Q, D / H]: keys and values of layer 0, of layer 1 ..."""
        return torch.stack([split_heads(project(features), self.heads) for project in self.projections], dim=1)

    def forward(self, input_ids, attention_mask, encoder_hidden_states):
        """As `NeuronTextEncoder`, but -> fp32 [B, 2 L, H, Q, D / H], see `keys_and_values`"""
        return self.keys_and_values(self.encoder(input_ids, attention_mask, encoder_hidden_states))


class DecoderState(NamedTuple):
    """The state of a `CachedDecoder` by its names; on Neuron its tensors lie in this order.

    For each layer keys and values fp32 [R, H, Q, D / H] of the question, which the question graph made, and of the
    answer so far, fp32 [R, H, A, D / H]; between them the question's mask, fp32 [R, Q].
    """

    question: list
    question_mask: torch.Tensor
    answer: list

    @classmethod
    def of(cls, tensors):
        """The 4 L + 1 tensors of a state: keys and values of layer 0, of layer 1 ..., mask, keys and values again."""
        middle = len(tensors) // 2
        pairs = [list(zip(some[::2], some[1::2], strict=True)) for some in (tensors[:middle], tensors[middle + 1 :])]
        return cls(pairs[0], tensors[middle], pairs[1])

    def tensors(self):
        """The same, one after another."""
        return (
            *(t for pair in self.question for t in pair),
            self.question_mask,
            *(t for pair in self.answer for t in pair),
        )


def update(kept, projected, here, earlier, beam_rows):
    """Keys or values [R, H, A, D / H] with those of this token, [R, 1, D], in their slot and nothing behind it.

    What lies beyond is replaced, not multiplied by 0: a NaN of an earlier call would survive that."""
    kept = torch.where(earlier, kept.index_select(0, beam_rows), 0.0)
    return torch.where(here, split_heads(projected, kept.shape[1]), kept)


class CachedDecoder(nn.Module):
    """The answer graph with a memory: the last token of each row in, the logits of the next one out.

    ``state`` holds a `DecoderState` as Parameters. On Neuron they stay on the device from call to call
    (``input_output_aliases``). They are registered first: there, as in AWS's T5 tutorial, a traced module's parameters
    begin with its state.
    """

    def __init__(self, model, shapes):
        super().__init__()
        layers, heads = model.config.num_hidden_layers, model.config.num_attention_heads

        def zeros(*size):
            return nn.Parameter(torch.zeros(shapes.rows, *size, dtype=torch.float32), requires_grad=False)

        def keys_and_values(length):
            size = heads, length, model.config.hidden_size // heads
            return [(zeros(*size), zeros(*size)) for _ in range(layers)]

        question, answer = keys_and_values(shapes.longest_question), keys_and_values(shapes.answer_length)
        self.state = nn.ParameterList(DecoderState(question, zeros(shapes.longest_question), answer).tensors())
        # The same weights, without those that a CachedTextEncoder has.
        self.decoder = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
        for layer in self.decoder.bert.encoder.layer:
            layer.crossattention.self.key = layer.crossattention.self.value = None

    def forward(self, input_ids, position, beam_rows):
        """input_ids int64 [R, 1], position int64 [1], beam_rows int64 [R] (the row that each row goes on from)
        -> logits fp32 [R, 1, V], and the state"""
        state, answer = DecoderState.of([*self.state]), []
        slots = torch.arange(state.answer[0][0].shape[2], device=input_ids.device)
        here, earlier = (slots == position)[:, None], (slots < position)[:, None]
        answer_mask = additive_mask((slots <= position).long()[None, None])
        question_mask = additive_mask(state.question_mask[:, None])
        hidden = self.decoder.bert.embeddings(input_ids=input_ids, position_ids=position[None])
        for layer, question, kept in zip(self.decoder.bert.encoder.layer, state.question, state.answer, strict=True):
            attention, across = layer.attention.self, layer.crossattention
            keys = update(kept[0], attention.key(hidden), here, earlier, beam_rows)
            values = update(kept[1], attention.value(hidden), here, earlier, beam_rows)
            answer.append((keys, values))
            hidden = layer.attention.output(attend(attention, hidden, keys, values, answer_mask), hidden)
            hidden = across.output(attend(across.self, hidden, *question, question_mask), hidden)
            hidden = layer.feed_forward_chunk(hidden)
        return self.decoder.cls(hidden), *state._replace(answer=answer).tensors()


class GreedyDecoder(CachedDecoder):
    """A `CachedDecoder` that chooses the token itself: ids instead of V logits a row leave the device."""

    def forward(self, input_ids, position, beam_rows):
        """As `CachedDecoder`, but -> the most likely token int64 [R, 1], and the state"""
        logits, *state = super().forward(input_ids, position, beam_rows)
        return logits.argmax(dim=-1), *state


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


class DecoderGreedyGenerator(DecoderCachedGenerator):
    """Around a `GreedyDecoder`: Hugging Face's ``generate()`` with the loop of `greedy_loop` in place of its own."""

    returns_logits = False

    def generate_in_turn(self, input_ids, streamer=None, tokenizer=None, **kwargs):
        """As a `DecoderCachedGenerator`; what needs logits is a `ValueError`."""
        # To a custom_generate transformers hands neither, but arguments of other names.
        self.tokenizer = tokenizer
        return super().generate_in_turn(
            input_ids, custom_generate=greedy_loop, streamer=streamer, chosen_to=streamer, **kwargs
        )

    def _get_stopping_criteria(self, **kwargs):
        return super()._get_stopping_criteria(**kwargs | {"tokenizer": self.tokenizer})


# Of each kind: what makes the modules that are traced, the name of the decoder's example inputs, what stands around it.
DECODERS = {
    "padded": (
        lambda model: NeuronTextEncoder(model.text_encoder),
        lambda decoder, shapes: PaddedDecoder(decoder),
        "whole answer",
        DecoderPaddedGenerator,
    ),
    "cached": (CachedTextEncoder, CachedDecoder, "last token", DecoderCachedGenerator),
    "greedy": (CachedTextEncoder, GreedyDecoder, "last token", DecoderGreedyGenerator),
}
