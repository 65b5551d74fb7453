"""Notebook 02: shapes, the question mask, the two wrapped encoders."""

import pytest
import torch
from conftest import (
    SIZE,
    TINY_SHAPES,
    WORDS,
    make_pixels,
    make_questions,
    pad,
    question_embeds,
)

from blip_helpers import (
    BlipShapes,
    NeuronVisionModel,
    TextEncoderWrapper,
    VisionModelWrapper,
    acting_question_mask,
    additive_mask,
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


# BlipShapes


@pytest.mark.parametrize("name", ["batch_size", "num_beams", "question_length", "answer_length"])
@pytest.mark.parametrize("value", [0, -1, True, 1.0, 2.5, "4", None])
def test_shapes_are_whole_positive_numbers(name, value):
    with pytest.raises(ValueError, match=f"^{name} is .*at least"):
        BlipShapes(**{name: value})


def test_an_answer_has_room_for_a_token_after_the_start_token():
    with pytest.raises(ValueError, match=r"answer_length is 1: .*at least 2"):
        BlipShapes(answer_length=1)
    assert BlipShapes(answer_length=2).answer_length == 2


def test_shapes_have_defaults_rows_and_do_not_change():
    assert BlipShapes() == BlipShapes(batch_size=1, num_beams=1, question_length=16, answer_length=24)
    assert BlipShapes(batch_size=3, num_beams=4).rows == 12
    with pytest.raises(AttributeError):
        BlipShapes().batch_size = 2


# The question mask


def answer_logits(model, ids, mask, pixels, answer):
    """Logits of every position of an answer, as `BlipForQuestionAnswering.forward` computes them."""
    embeds = question_embeds(model, ids, mask, pixels)
    return model.text_decoder(answer, encoder_hidden_states=embeds, encoder_attention_mask=mask).logits


def worst_padding(model, mask_of):
    """The largest difference of logits between questions padded and unpadded, over lengths and pads."""
    answer = torch.tensor([[WORDS.index("[DEC]"), 9, 20, 31]])
    worst = 0.0
    for seed, (length, to) in enumerate([(1, 2), (2, 10), (5, 6), (5, 10), (9, 10)]):
        (question,), pixels = make_questions([length], seed), make_pixels(1, seed)
        ids, mask = pad([question], to, value=seed)
        unpadded = answer_logits(model, question, torch.ones_like(question), pixels, answer)
        padded = answer_logits(model, ids, mask_of(mask), pixels, answer)
        worst = max(worst, (padded - unpadded).abs().max().item())
    return worst


def test_a_padded_question_has_the_logits_of_the_unpadded_one(tiny):
    with acting_question_mask(tiny):
        assert worst_padding(tiny, lambda mask: mask) < 1e-4


def test_without_an_acting_mask_padding_changes_the_logits(tiny):
    assert worst_padding(tiny, lambda mask: mask) > 1e-2


def test_the_acting_mask_is_the_one_that_is_given(tiny):
    with acting_question_mask(tiny):
        assert worst_padding(tiny, torch.ones_like) > 1e-2


def test_a_mask_of_ones_changes_no_bit(tiny):
    (question,), pixels, answer = make_questions([6]), make_pixels(1), torch.tensor([[48, 9, 20]])
    stock = answer_logits(tiny, question, torch.ones_like(question), pixels, answer)
    with acting_question_mask(tiny):
        assert torch.equal(answer_logits(tiny, question, torch.ones_like(question), pixels, answer), stock)
    assert torch.equal(answer_logits(tiny, question, torch.ones_like(question), pixels, answer), stock)


def hooks_of(model):
    return [m for m in model.modules() if m._forward_pre_hooks or m._forward_hooks]


def test_the_mask_acts_inside_the_block_only(tiny):
    with acting_question_mask(tiny) as inside:
        assert inside is tiny
        assert len(hooks_of(tiny)) == 4, "a cross-attention for each of two layers, in encoder and decoder"
    assert not hooks_of(tiny)


def test_the_mask_stops_acting_after_an_exception(tiny):
    with pytest.raises(KeyError), acting_question_mask(tiny):
        raise KeyError
    assert not hooks_of(tiny)


def test_other_hooks_stay(tiny):
    layer = tiny.text_decoder.bert.encoder.layer[0].crossattention.self
    with acting_question_mask(tiny):
        handle = layer.register_forward_pre_hook(lambda module, args: None)
    assert hooks_of(tiny) == [layer]
    handle.remove()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_additive_mask_lets_ones_through_and_shuts_zeros_out(dtype):
    mask = additive_mask(torch.tensor([[[1, 0, 1]]]))
    assert mask.shape == (1, 1, 1, 3) and mask.dtype == torch.float32
    mask = mask.to(dtype)
    assert mask.isfinite().all()
    assert torch.equal(torch.softmax(mask, -1).float(), torch.tensor([[[[0.5, 0.0, 0.5]]]]))


# The encoders


@pytest.fixture(scope="module")
def image_graph(tiny):
    return trace_module(NeuronVisionModel(tiny.vision_model), torch.zeros(1, 3, SIZE, SIZE))


@pytest.fixture(scope="module")
def question_graph(tiny):
    module, examples = parts_to_trace(tiny, TINY_SHAPES, "padded")["text_encoder"]
    return trace_module(module, examples)


def test_the_image_graph_equals_eager(tiny, image_graph):
    for image in make_pixels(4).split(1):
        expected = tiny.vision_model(image).last_hidden_state
        torch.testing.assert_close(image_graph(image), expected, rtol=0, atol=1e-5)


def test_the_vision_wrapper_takes_images_as_hugging_face_does(tiny, image_graph):
    pixels = make_pixels(3)
    output = VisionModelWrapper(image_graph)(pixel_values=pixels, interpolate_pos_encoding=False)
    expected = tiny.vision_model(pixels).last_hidden_state
    torch.testing.assert_close(output.last_hidden_state, expected, rtol=0, atol=1e-5)
    assert output[0] is output.last_hidden_state


def test_another_image_size_is_refused(image_graph):
    with pytest.raises(ValueError, match="interpolate_pos_encoding is True"):
        VisionModelWrapper(image_graph)(make_pixels(1), interpolate_pos_encoding=True)


def unpadded_embeds(tiny, questions, image):
    return [question_embeds(tiny, question, torch.ones_like(question), image)[0] for question in questions]


@pytest.mark.parametrize("lengths", [[Q, Q, Q], [1, 5, Q], [2, 2, 2]], ids=str)
@pytest.mark.parametrize("value", [0, 17])
def test_the_question_graph_equals_eager_on_unpadded_questions(tiny, question_graph, lengths, value):
    questions, image = make_questions(lengths), make_pixels(1)
    ids, mask = pad(questions, Q, value)
    actual = question_graph(ids, mask, tiny.vision_model(image).last_hidden_state)
    for row, expected in zip(actual, unpadded_embeds(tiny, questions, image), strict=True):
        torch.testing.assert_close(row[: len(expected)], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7])
def test_any_number_of_questions_about_one_image(tiny, question_graph, count):
    questions, image = make_questions([1 + 3 * i % Q for i in range(count)]), make_pixels(1)
    image_embeds = tiny.vision_model(image).last_hidden_state
    (actual,) = TextEncoderWrapper(question_graph, TINY_SHAPES)(*pad(questions, Q), image_embeds)
    assert len(actual) == count
    for row, expected in zip(actual, unpadded_embeds(tiny, questions, image), strict=True):
        torch.testing.assert_close(row[: len(expected)], expected, rtol=0, atol=1e-5)


def test_rows_of_the_question_graph_do_not_see_each_other(tiny, question_graph):
    image_embeds = tiny.vision_model(make_pixels(1)).last_hidden_state
    ids, mask = pad(make_questions([4, 6, 8]), Q)
    others_ids, others_mask = pad([make_questions([4])[0], *make_questions([9, 2], seed=1)], Q)
    assert torch.equal(
        question_graph(ids, mask, image_embeds)[0], question_graph(others_ids, others_mask, image_embeds)[0]
    )
