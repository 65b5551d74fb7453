"""One call an answer: the question graph and the decoder's steps in one graph."""

from itertools import pairwise

import pytest
import torch
from conftest import (
    TINY_SHAPES,
    answer_eagerly,
    make_pixels,
    make_questions,
    needs_xla,
    pad,
)
from hypothesis import given
from hypothesis import strategies as st

from blip_helpers import (
    MODELS,
    BlipShapes,
    PictureAnswer,
    UnrolledAnswer,
    check_module,
    count_cost,
    example_inputs,
    load_blip,
    parts_to_trace,
    trace_module,
)
from blip_one_call import Pixels
from models.make_base import make_model
from models.scenes import examples

B, Q, PIXELS = TINY_SHAPES.batch_size, TINY_SHAPES.question_length, Pixels()


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def unrolled(answers, steps, pad_token_id=0):
    """Answers of generate(), each with its start token -> what a graph of so many steps returns, a list of lists"""
    return [(answer[1:] + steps * [pad_token_id])[:steps] for answer in answers]


def tiny_call(lengths, seed):
    """Questions of these lengths and one picture: padded ids and mask, its bytes, the questions"""
    questions, generator = make_questions(lengths, seed), torch.Generator().manual_seed(seed)
    pixels = torch.randint(256, make_pixels(1).shape, generator=generator, dtype=torch.uint8)
    return *pad(questions, Q), pixels, questions


def make_answer(kind, model, steps):
    return UnrolledAnswer(model, steps) if kind is UnrolledAnswer else PictureAnswer(model, steps, PIXELS)


def traced_inputs(model, kind):
    """What a graph of the tiny model is traced on."""
    of_kind = example_inputs(model, TINY_SHAPES)
    ids, mask, image_embeds = of_kind[f"question of {Q}"]
    return ids, mask, image_embeds if kind is UnrolledAnswer else of_kind["bytes"][0]


def image_for(kind, model, pixels):
    return features_of(model, pixels) if kind is UnrolledAnswer else pixels


def features_of(model, pixels):
    return model.vision_model(PIXELS.normalise(pixels)).last_hidden_state


# Answers


@pytest.fixture(scope="module")
def held_out():
    """The bundled model, 200 held-out questions as it takes them, and its own answers."""
    model, processor = load_blip(MODELS / "tiny-blip-vqa")
    with torch.no_grad():
        asked = [processor(e.image, e.question, return_tensors="pt") for e in examples("held-out", 200)]
        answers = [model.generate(**inputs, max_new_tokens=23)[0].tolist() for inputs in asked]
    assert max(map(len, answers)) <= 23  # with the start token: 23 steps are more than any answer has
    return model, asked, answers


@pytest.mark.parametrize("steps", [2, 23])
def test_200_held_out_answers_equal_eager(held_out, steps):
    model, asked, answers = held_out
    graph = UnrolledAnswer(model, steps)
    given = [
        graph(*pad([inputs.input_ids], 20), model.vision_model(inputs.pixel_values).last_hidden_state)[0].tolist()
        for inputs in asked
    ]
    assert given == unrolled(answers, steps)


@given(
    lengths=st.lists(st.integers(1, Q), min_size=1, max_size=5), steps=st.integers(1, 12), seed=st.integers(0, 10**6)
)
def test_ragged_questions_about_a_picture_equal_eager_one_at_a_time(tiny, lengths, steps, seed):
    ids, mask, pixels, questions = tiny_call(lengths, seed)
    pixel_values = PIXELS.normalise(pixels).expand(len(lengths), -1, -1, -1)
    expected = answer_eagerly(tiny, questions, pixel_values, max_new_tokens=steps)
    with torch.no_grad():
        tokens = PictureAnswer(tiny, steps, PIXELS)(ids, mask, pixels)
    assert tokens.dtype == torch.int64 and tokens.tolist() == unrolled(expected, steps)


def test_one_call_with_pixels_is_the_two_calls_with_features(tiny):
    ids, mask, pixels, _ = tiny_call([1, 6, Q], seed=3)
    features = features_of(tiny, pixels)
    assert torch.equal(PictureAnswer(tiny, 6, PIXELS)(ids, mask, pixels), UnrolledAnswer(tiny, 6)(ids, mask, features))


def test_what_stands_behind_a_question_changes_nothing(tiny):
    ids, mask, pixels, _ = tiny_call([2, 5, 9], seed=4)
    graph = PictureAnswer(tiny, 6, PIXELS)
    assert torch.equal(graph(ids, mask, pixels), graph(ids.where(mask == 1, 20), mask, pixels))


@pytest.mark.parametrize("kind", [UnrolledAnswer, PictureAnswer])
def test_traced_it_answers_as_the_module_does(tiny, kind):
    module = make_answer(kind, tiny, 6)
    graph = trace_module(module, traced_inputs(tiny, kind))
    seen = set()
    for seed, lengths in enumerate([[1, 6, Q], [3, 3, 3], [Q, Q, Q]]):
        ids, mask, pixels, _ = tiny_call(lengths, seed)
        inputs = ids, mask, image_for(kind, tiny, pixels)
        assert torch.equal(graph(*inputs), module(*inputs))
        seen |= set(map(tuple, graph(*inputs).tolist()))
    assert len(seen) > 3


@needs_xla
def test_the_check_finds_nothing(tiny):
    calls = [traced_inputs(tiny, PictureAnswer)]
    calls += [tiny_call(lengths, seed)[:3] for seed, lengths in enumerate([[1, 6, Q], [Q, Q, Q]])]
    checked = check_module(PictureAnswer(tiny, 4, PIXELS), calls)  # the other graph is inside
    assert checked.findings == () and checked.difference == 0


@pytest.mark.parametrize(
    ("steps", "message"),
    [(0, "steps is 0: give a whole number"), (2.5, "steps is 2.5: give"), (33, "steps is 33; the decoder has 32 pos")],
)
def test_steps_that_cannot_be_unrolled_are_refused(tiny, steps, message):
    with pytest.raises(ValueError, match=message):
        UnrolledAnswer(tiny, steps)


# Cost


@pytest.fixture(scope="module")
def full_size():
    """The architecture of blip-vqa-base without its weights: operations can be counted all the same."""
    with torch.device("meta"):
        return make_model().eval()


@pytest.mark.parametrize("questions", [1, 8])
def test_it_costs_no_more_than_the_cached_way_and_moves_ids_alone(full_size, questions):
    steps = 4  # an answer of three tokens and its end
    with torch.device("meta"):
        parts = parts_to_trace(full_size, BlipShapes(batch_size=questions, answer_length=steps + 1))
        image, question, step = (count_cost(*parts[name]) for name in ("vision_model", "text_encoder", "text_decoder"))
        ids, mask, image_embeds = parts["text_encoder"][1]
        one = count_cost(UnrolledAnswer(full_size, steps), (ids, mask, image_embeds))
        pixels = parts["vision_model"][1][0].byte()
        whole = count_cost(PictureAnswer(full_size, steps, PIXELS), (ids, mask, pixels))
    assert one.flops <= 1.02 * (question.flops + steps * step.flops)
    assert whole.flops == image.flops + one.flops
    assert whole.inputs == 2 * 8 * questions * 16 + pixels.numel()
    assert (one.state, one.outputs) == (0, 8 * questions * steps)


def test_each_step_multiplies_with_the_keys_of_its_own_length(full_size):
    text, ids = full_size.config.text_config, torch.ones(2, 16, dtype=torch.int64, device="meta")
    image_embeds = torch.zeros(1, 5, text.hidden_size, device="meta")
    flops = [count_cost(UnrolledAnswer(full_size, steps), (ids, ids, image_embeds)).flops for steps in (1, 2, 3, 4)]
    of_step = [after - before for before, after in pairwise(flops)]
    # A key and a value more: a multiplication and an addition each, for every row, layer and number of the hidden size.
    one_more = 2 * 2 * len(ids) * text.num_hidden_layers * text.hidden_size
    assert [after - before for before, after in pairwise(of_step)] == [one_more, one_more]
