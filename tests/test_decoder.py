"""Notebook 03: the padded decoder and what it takes of generate()."""

import pytest
import torch
from conftest import (
    TINY_SHAPES,
    WORDS,
    make_pixels,
    make_questions,
    pad,
    question_embeds,
)
from torch import nn

from blip_helpers import (
    DecoderPaddedGenerator,
    PaddedDecoder,
    parts_to_trace,
    trace_module,
)

B, Q, A = TINY_SHAPES.batch_size, TINY_SHAPES.question_length, TINY_SHAPES.answer_length
R = TINY_SHAPES.rows
LIMIT = {"max_new_tokens": A - 1}


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


# The decoder


@pytest.fixture(scope="module")
def answer_graph(tiny):
    module, examples = parts_to_trace(tiny, TINY_SHAPES, "padded")["text_decoder"]
    return trace_module(module, examples)


@pytest.fixture(scope="module")
def decoding(tiny):
    """Inputs for the answer graph, R ragged rows, and the eager logits of each row and position, unpadded."""
    with torch.no_grad():
        lengths = [1, 3, 5, 7, 9, Q][:R]
        questions, pixels = make_questions(lengths), make_pixels(R)
        generator = torch.Generator().manual_seed(1)
        answers = torch.randint(5, len(WORDS), (R, A), generator=generator)
        _, mask = pad(questions, Q)
        embeds = [question_embeds(tiny, q, torch.ones_like(q), pixels[i : i + 1]) for i, q in enumerate(questions)]
        padded = torch.cat([nn.functional.pad(e, (0, 0, 0, Q - e.shape[1]), value=9.0) for e in embeds])
        expected = [
            [
                tiny.text_decoder(answers[i : i + 1, : p + 1], encoder_hidden_states=embeds[i]).logits[0, -1]
                for p in range(A)
            ]
            for i in range(R)
        ]
        return answers, padded, mask, torch.stack([torch.stack(row) for row in expected])


@pytest.mark.parametrize("position", range(A))
@pytest.mark.parametrize("filler", [0, 33])
def test_the_logits_of_each_position_equal_eager(answer_graph, decoding, position, filler):
    answers, embeds, question_mask, expected = decoding
    answers = answers.clone()
    answers[:, position + 1 :] = filler
    mask = (torch.arange(A) <= position).long().expand(R, -1)
    logits = answer_graph(answers, embeds, question_mask, mask, torch.tensor([position]))
    assert logits.shape == (R, 1, len(WORDS))
    torch.testing.assert_close(logits[:, 0], expected[:, position], rtol=0, atol=1e-4)


def test_later_tokens_change_no_bit_even_where_the_mask_lets_them(answer_graph, decoding):
    answers, embeds, question_mask, _ = decoding
    others, everything = answers.clone(), torch.ones(R, A, dtype=torch.long)
    others[:, 4:] = answers[:, 4:].flip(0)
    results = [answer_graph(a, embeds, question_mask, everything, torch.tensor([3])) for a in (answers, others)]
    assert torch.equal(*results)


def test_masked_tokens_change_no_bit_even_before_the_position(answer_graph, decoding):
    answers, embeds, question_mask, _ = decoding
    others, mask = answers.clone(), torch.ones(R, A, dtype=torch.long)
    others[:, 1], mask[:, 1] = answers[:, 1].flip(0), 0
    results = [answer_graph(a, embeds, question_mask, mask, torch.tensor([3])) for a in (answers, others)]
    assert torch.equal(*results)


def test_the_vocabulary_head_runs_on_one_position(tiny, decoding):
    answers, embeds, question_mask, _ = decoding
    seen = []
    handle = tiny.text_decoder.cls.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
    PaddedDecoder(tiny.text_decoder)(answers, embeds, question_mask, torch.ones_like(answers), torch.tensor([2]))
    handle.remove()
    assert seen == [(R, 1, 32)]


@pytest.mark.parametrize("so_far", [1, 4, A])
def test_inputs_of_a_step_are_padded_to_the_traced_length(assembled, so_far):
    tokens = torch.arange(10, 10 + 2 * so_far).view(2, so_far)
    embeds, question_mask = torch.zeros(2, Q, 32), torch.ones(2, Q, dtype=torch.long)
    inputs = assembled.text_decoder.prepare_inputs_for_generation(
        tokens, encoder_hidden_states=embeds, encoder_attention_mask=question_mask, attention_mask=None, use_cache=False
    )
    assert set(inputs) == {"input_ids", "encoder_hidden_states", "encoder_attention_mask", "attention_mask", "position"}
    assert inputs["input_ids"].tolist() == [row + [0] * (A - so_far) for row in tokens.tolist()]
    assert inputs["attention_mask"].tolist() == [[1] * so_far + [0] * (A - so_far)] * 2
    assert inputs["position"].tolist() == [so_far - 1]
    assert inputs["encoder_hidden_states"] is embeds and inputs["encoder_attention_mask"] is question_mask
    assert all(inputs[name].dtype == torch.int64 for name in ("input_ids", "attention_mask", "position"))


@pytest.mark.parametrize("rows", range(1, R + 1))
def test_filler_rows_are_added_inside_and_cut_off_again(tiny, decoding, rows):
    class Recorded(PaddedDecoder):
        def forward(self, *inputs):
            seen.append([len(tensor) for tensor in inputs])
            return super().forward(*inputs)

    seen, text_decoder = [], tiny.text_decoder
    generator = DecoderPaddedGenerator(
        tiny.config.text_config, Recorded(text_decoder), TINY_SHAPES, text_decoder.generation_config
    )
    answers, embeds, question_mask, expected = decoding
    mask = (torch.arange(A) <= 4).long().expand(rows, -1)
    logits = generator(answers[:rows], embeds[:rows], question_mask[:rows], mask, torch.tensor([4])).logits
    assert seen == [[R, R, R, R, 1]]
    assert logits.shape == (rows, 1, len(WORDS))
    torch.testing.assert_close(logits[:, 0], expected[:rows, 4], rtol=0, atol=1e-4)
