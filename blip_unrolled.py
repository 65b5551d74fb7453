"""A greedy answer in one call: the question graph and K decoder steps, one after another, in a single graph.

Beside B, Q, T and D (see `blip_helpers`), K is the number of steps that were unrolled.
"""

import torch
from torch import nn

from blip_helpers import NeuronTextEncoder, NeuronVisionModel, additive_mask, attend, split_heads
from blip_inputs import whole_number


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
    """A new picture and B questions about it in one call: `NeuronVisionModel`, then `UnrolledAnswer`."""

    def __init__(self, model, steps):
        super().__init__()
        self.vision = NeuronVisionModel(model.vision_model)
        self.answer = UnrolledAnswer(model, steps)

    def forward(self, input_ids, attention_mask, pixel_values):
        """input_ids, attention_mask int64 [B, Q], pixel_values fp32 [1, 3, height, width] -> token ids int64 [B, K]"""
        return self.answer(input_ids, attention_mask, self.vision(pixel_values))
