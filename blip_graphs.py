"""The modules that are traced: what becomes a graph of the parts of a ``BlipForQuestionAnswering``.

Read it from top to bottom: the order is that of the notebooks. Everywhere, B is the number of questions a call takes, R
the number of rows the decoder takes (B times the beams), Q the traced question length, A the traced answer length (the
start token counts), K the number of unrolled steps, T the number of image tokens, D the hidden size, H the number of
heads, L of layers, S the size of a picture and V that of the vocabulary. What stands around the graphs is in
`blip_helpers`.
"""

import contextlib
import copy
from typing import NamedTuple

import torch
from torch import nn
from transformers.models.blip.modeling_blip_text import BlipTextLayer

from blip_inputs import whole_number
from blip_pixels import columns, normalised

# 01  A plain model ------------------------------------------------------------


class Logits(nn.Module):
    """An image classifier as it is traced: pixel_values fp32 [B, 3, S, S] -> logits fp32 [B, N]"""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, pixel_values):
        return self.model(pixel_values=pixel_values).logits


# 02  The two encoders ------------------------------------------------------------


class NeuronVisionModel(nn.Module):
    """The image graph: pixels in, image tokens out, one image a call."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, pixel_values):
        """pixel_values fp32 [1, 3, height, width] -> image_embeds fp32 [1, T, D]"""
        return self.model(pixel_values=pixel_values, interpolate_pos_encoding=False).last_hidden_state


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


# 03  The decoder, padded ------------------------------------------------------------


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


# 05  The decoder, cached ------------------------------------------------------------


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


# 07  A whole answer ------------------------------------------------------------


def keys_and_values(attention, hidden):
    """What an attention makes of [B, length, D]: its keys and its values, [B, H, length, D / H] each"""
    return [split_heads(project(hidden), attention.num_attention_heads) for project in (attention.key, attention.value)]


class UnrolledAnswer(nn.Module):
    """The whole way from B padded questions about one image to up to K tokens of their answers, without a state.

    A step chooses the most likely token and feeds it to the next one, inside the graph. The keys and values of the
    question are computed once. Those of the answer grow by a token a step: K is fixed, so that each step has a shape
    of its own, and none multiplies with padding.

    `model` is a ``BlipForQuestionAnswering``, whose weights are used and not copied. A `ValueError` says if `steps`, K,
    is no whole number from 1 to the number of positions that the decoder has.
    """

    def __init__(self, model, steps):
        super().__init__()
        text = model.config.text_config
        self.steps = whole_number("steps", steps)
        if self.steps > text.max_position_embeddings:
            raise ValueError(
                f"steps is {steps}; the decoder has {text.max_position_embeddings} positions: unroll at most as many"
            )
        self.encoder = NeuronTextEncoder(model.text_encoder)
        self.decoder = model.text_decoder
        self.start, self.end, self.pad = text.bos_token_id, text.sep_token_id, text.pad_token_id

    def forward(self, input_ids, attention_mask, encoder_hidden_states):
        """input_ids, attention_mask int64 [B, Q], encoder_hidden_states fp32 [1, T, D] -> token ids int64 [B, K]

        Without the start token, which every answer has. A row that ended is filled with [PAD] behind its [SEP]; one
        without [SEP] may be longer than K."""
        features = self.encoder(input_ids, attention_mask, encoder_hidden_states)
        question_mask = additive_mask(attention_mask[:, None])
        layers = self.decoder.bert.encoder.layer
        question = [keys_and_values(layer.crossattention.self, features) for layer in layers]
        answer = [None for _ in layers]
        token = torch.full_like(input_ids[:, :1], self.start)
        ended, tokens = torch.zeros_like(token, dtype=torch.bool), []
        for step in range(self.steps):
            logits, answer = self.decode(token, step, answer, question, question_mask)
            token = logits.argmax(dim=-1).masked_fill(ended, self.pad)
            ended = ended | (token == self.end)
            tokens.append(token)
        return torch.cat(tokens, dim=1)

    def decode(self, token, step, answer, question, question_mask):
        """One step: token int64 [B, 1], keys and values of each layer -> logits fp32 [B, 1, V], those of the answer"""
        hidden = self.decoder.bert.embeddings(input_ids=token, cache_length=step)
        longer = []
        for layer, earlier, asked in zip(self.decoder.bert.encoder.layer, answer, question, strict=True):
            attention, across = layer.attention.self, layer.crossattention
            kept = keys_and_values(attention, hidden)
            if earlier:
                kept = [torch.cat(pair, dim=2) for pair in zip(earlier, kept, strict=True)]
            longer.append(kept)
            # No mask: there are no keys but those of this token and the ones before.
            hidden = layer.attention.output(attend(attention, hidden, *kept, 0.0), hidden)
            hidden = across.output(attend(across.self, hidden, *asked, question_mask), hidden)
            hidden = layer.feed_forward_chunk(hidden)
        return self.decoder.cls(hidden), longer


class PictureAnswer(nn.Module):
    """A new picture and B questions about it in one call: `NeuronVisionModel`, then `UnrolledAnswer`.

    The picture comes as bytes, a quarter of what fp32 pixels take. `pixels` is the `Pixels` of the model's processor.
    """

    def __init__(self, model, steps, pixels):
        super().__init__()
        self.vision = NeuronVisionModel(model.vision_model)
        self.answer = UnrolledAnswer(model, steps)
        self.register_buffer("image_mean", columns(pixels.image_mean))
        self.register_buffer("image_std", columns(pixels.image_std))
        self.rescale_factor = pixels.rescale_factor

    def forward(self, input_ids, attention_mask, pixels):
        """input_ids, attention_mask int64 [B, Q], pixels uint8 [1, 3, S, S] -> token ids int64 [B, K]"""
        pixel_values = normalised(pixels, self.image_mean, self.image_std, self.rescale_factor)
        return self.answer(input_ids, attention_mask, self.vision(pixel_values))
