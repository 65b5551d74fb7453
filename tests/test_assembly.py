"""Notebook 04: the assembled model answers what Hugging Face answers, eager, one unpadded question at a time."""

import io
import warnings
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from conftest import (
    SIZE,
    TINY_SHAPES,
    WORDS,
    answer_eagerly,
    cut,
    make_pixels,
    make_questions,
    make_tiny_blip,
    pad,
)
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import nn
from transformers import GenerationConfig

from blip_helpers import (
    BlipShapes,
    NeuronBlipForQuestionAnswering,
    PaddedDecoder,
    infer,
    parts_to_trace,
    trace,
    verify,
)

B, Q, A = TINY_SHAPES.batch_size, TINY_SHAPES.question_length, TINY_SHAPES.answer_length
R = TINY_SHAPES.rows
LIMIT = {"max_new_tokens": A - 1}


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def test_the_tiny_model_can_tell(tiny):
    """With a model that always answers the same the tests below would prove nothing."""
    lengths = [1 + i % Q for i in range(30)]
    answers = answer_eagerly(tiny, make_questions(lengths), make_pixels(30), **LIMIT)
    assert len({tuple(answer) for answer in answers}) >= 20
    assert len({len(answer) for answer in answers}) >= 4
    assert len({token for answer in answers for token in answer}) >= 15
    one_question = make_questions([5]) * 10
    assert len({tuple(a) for a in answer_eagerly(tiny, one_question, make_pixels(10), **LIMIT)}) >= 5
    one_image = make_pixels(1).expand(10, -1, -1, -1)
    assert len({tuple(a) for a in answer_eagerly(tiny, make_questions([5] * 10), one_image, **LIMIT)}) >= 5


# generate()


def assert_answers(compiled, tiny, questions, pixels, **generate_kwargs):
    """Compare a batch, padded, with eager, one by one and unpadded."""
    ids, mask = pad(questions)
    actual = compiled.generate(ids, pixels, mask, **generate_kwargs)
    one_each = pixels if len(pixels) == len(questions) else pixels.expand(len(questions), -1, -1, -1)
    limit = {} if {"max_new_tokens", "max_length", "generation_config"} & set(generate_kwargs) else LIMIT
    assert cut(actual) == cut(answer_eagerly(tiny, questions, one_each, **limit, **generate_kwargs))


@pytest.mark.parametrize("length", range(1, Q + 1))
def test_greedy_answers_equal_eager_for_every_length_of_a_question(compiled, tiny, length):
    assert_answers(compiled, tiny, make_questions([length]), make_pixels(1, seed=length))


def test_ragged_questions_about_different_images(compiled, tiny):
    assert_answers(compiled, tiny, make_questions([2, 9, 5, 1, 7, 10]), make_pixels(6))


def test_several_questions_about_one_image(compiled, tiny):
    assert_answers(compiled, tiny, make_questions([2, 9, 5, 1, 7, 10]), make_pixels(1))


def test_several_questions_about_some_images(compiled, tiny):
    a, b = make_pixels(2).split(1)
    assert_answers(compiled, tiny, make_questions([3, 4, 5, 6, 7, 8]), torch.cat([a, b, b, a, b, a]))


def test_one_question_about_different_images(compiled, tiny):
    assert_answers(compiled, tiny, make_questions([4]) * 5, make_pixels(5))


def test_every_image_is_encoded_once(compiled):
    a, b = make_pixels(2).split(1)
    seen = []
    handle = compiled.vision_model.graph.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    ids, mask = pad(make_questions([3, 4, 5, 6]))
    compiled.generate(ids, torch.cat([a, b, b, a]), mask)
    handle.remove()
    assert torch.equal(torch.cat(seen), torch.cat([a, b]))


@pytest.mark.parametrize("num_beams", [2, 3, 4])
@pytest.mark.parametrize("settings", [{}, {"length_penalty": 2.0}, {"early_stopping": True}], ids=str)
def test_beams_equal_eager(compiled, tiny, num_beams, settings):
    count = R // num_beams
    questions, pixels = make_questions([6, 2, 9][:count]), make_pixels(count)
    assert_answers(compiled, tiny, questions, pixels, num_beams=num_beams, **settings)


@pytest.mark.parametrize(("num_beams", "num_return_sequences"), [(2, 2), (3, 2), (3, 3), (6, 4)])
def test_returned_sequences_equal_eager(compiled, tiny, num_beams, num_return_sequences):
    count = R // num_beams
    questions, pixels = make_questions([6, 2, 9][:count]), make_pixels(count)
    assert_answers(compiled, tiny, questions, pixels, num_beams=num_beams, num_return_sequences=num_return_sequences)


@pytest.mark.parametrize(
    "settings",
    [{"min_new_tokens": 6}, {"repetition_penalty": 1.7}, {"no_repeat_ngram_size": 1}, {"use_cache": True}],
    ids=str,
)
def test_other_settings_of_hugging_face_equal_eager(compiled, tiny, settings):
    assert_answers(compiled, tiny, make_questions([6, 2, 9]), make_pixels(3), **settings)


def test_sampling_draws_what_eager_draws(compiled, tiny):
    """Hugging Face's loop sees real rows only: the same seed gives the same tokens."""
    (question,), pixels = make_questions([6]), make_pixels(1)
    torch.manual_seed(3)
    expected = tiny.generate(
        question, pixels, torch.ones_like(question), do_sample=True, num_return_sequences=4, **LIMIT
    )
    torch.manual_seed(3)
    actual = compiled.generate(question, pixels, do_sample=True, num_return_sequences=4)
    assert actual.tolist() == expected.tolist()


@given(st.data())
def test_any_batch_equals_eager(compiled, tiny, data):
    lengths = data.draw(st.lists(st.integers(1, Q), min_size=1, max_size=R))
    questions = make_questions(lengths, seed=data.draw(st.integers(0, 1000)))
    images = make_pixels(3, seed=data.draw(st.integers(0, 1000)))
    chosen = data.draw(st.lists(st.integers(0, 2), min_size=len(lengths), max_size=len(lengths)))
    ids, mask = pad(questions, data.draw(st.integers(max(lengths), Q)), value=data.draw(st.integers(0, len(WORDS) - 1)))
    beams = data.draw(st.integers(1, R // len(lengths)))
    actual = compiled.generate(ids, images[chosen], mask, num_beams=beams)
    assert cut(actual) == cut(answer_eagerly(tiny, questions, images[chosen], num_beams=beams, **LIMIT))


def test_logits_of_a_padded_question_equal_eager(compiled, tiny):
    details = {"return_dict_in_generate": True, "output_logits": True, "min_new_tokens": A - 1, **LIMIT}
    for seed, length in enumerate([1, 4, 8, Q]):
        (question,), pixels = make_questions([length], seed), make_pixels(1, seed)
        expected = tiny.generate(question, pixels, torch.ones_like(question), **details)
        actual = compiled.generate(question, pixels, torch.ones_like(question), **details)
        assert len(actual.logits) == len(expected.logits) == A - 1
        for a, b in zip(actual.logits, expected.logits, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-4)


def test_an_answer_depends_on_no_earlier_call(compiled):
    (question,), (other,), pixels = make_questions([6]), make_questions([9], seed=1), make_pixels(2)
    first = compiled.generate(question, pixels[:1])
    compiled.generate(other, torch.full_like(pixels[1:], float("nan")))
    assert torch.equal(compiled.generate(question, pixels[:1]), first)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.enable_grad], ids=["inference_mode", "grad"])
def test_generate_works_in_every_mode(compiled, mode):
    (question,), pixels = make_questions([6]), make_pixels(1)
    expected = compiled.generate(question, pixels)
    with mode():
        assert torch.equal(compiled.generate(question.clone(), pixels.clone()), expected)


def test_no_mask_means_no_padding(compiled, tiny):
    (question,), pixels = make_questions([5]), make_pixels(1)
    actual = compiled.generate(question, pixels)
    assert cut(actual) == cut(answer_eagerly(tiny, [question], pixels, **LIMIT))


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.float32])
def test_the_mask_may_have_any_dtype(compiled, dtype):
    (ids, mask), pixels = pad(make_questions([5, 3])), make_pixels(2)
    assert torch.equal(compiled.generate(ids, pixels, mask.to(dtype)), compiled.generate(ids, pixels, mask))


# Limits of generate()


def test_without_a_limit_an_answer_has_one_token_less_than_traced(compiled, tiny):
    questions, pixels = make_questions([6]), make_pixels(1)
    actual = compiled.generate(questions[0], pixels, min_new_tokens=A - 1)
    assert actual.shape == (1, A)
    assert actual.tolist() == answer_eagerly(tiny, questions, pixels, min_new_tokens=A - 1, **LIMIT)


@pytest.mark.parametrize(
    "limit",
    [
        {"max_new_tokens": 1},
        {"max_new_tokens": A - 2},
        {"max_new_tokens": A - 1},
        {"max_length": 2},
        {"max_length": A},
        {"generation_config": GenerationConfig(max_new_tokens=A - 1)},
        {"generation_config": GenerationConfig(max_new_tokens=3, num_beams=2)},
        {"generation_config": GenerationConfig(max_length=A)},
        {"max_new_tokens": 4, "generation_config": GenerationConfig(max_new_tokens=A + 9)},
    ],
    ids=lambda limit: "-".join(limit),
)
def test_a_limit_up_to_the_traced_one_equals_eager(compiled, tiny, limit):
    assert_answers(compiled, tiny, make_questions([6, 2]), make_pixels(2), **limit)


@pytest.mark.parametrize(
    "limit",
    [
        {"max_new_tokens": A},
        {"max_new_tokens": 1000},
        {"max_length": A + 1},
        {"generation_config": GenerationConfig(max_new_tokens=A)},
        {"generation_config": GenerationConfig(max_length=A + 1)},
    ],
    ids=lambda limit: "-".join(limit),
)
def test_a_limit_above_the_traced_one_is_a_value_error(compiled, limit):
    config = limit.get("generation_config")
    new = limit.get("max_new_tokens") or getattr(config, "max_new_tokens", None) or A
    # The tiny model has 32 positions: no trace could be longer.
    remedy = f", or trace it with answer_length >= {new + 1}" if new < 32 else f"max_new_tokens <= {A - 1}$"
    with pytest.raises(ValueError, match=f"{new} new tokens.*traced for {A - 1}.*{remedy}"):
        compiled.generate(make_questions([6])[0], make_pixels(1), **limit)


def test_the_shortest_traced_answer(tiny):
    shapes = BlipShapes(question_length=4, answer_length=2)
    graphs = {name: module for name, (module, _) in parts_to_trace(tiny, shapes, "padded").items()}
    short = NeuronBlipForQuestionAnswering(tiny.config, graphs, shapes, tiny.text_decoder.generation_config)
    questions, pixels = make_questions([4]), make_pixels(1)
    assert short.generate(questions[0], pixels).tolist() == answer_eagerly(tiny, questions, pixels, max_new_tokens=1)


@pytest.mark.parametrize(
    ("questions", "settings", "needed"),
    [
        (R + 1, {}, R + 1),
        (2, {"num_beams": 4}, 8),
        (1, {"num_beams": R + 1}, R + 1),
        (1, {"do_sample": True, "num_return_sequences": R + 1}, R + 1),
        (2, {"generation_config": GenerationConfig(num_beams=4)}, 8),
    ],
)
def test_too_many_rows_are_a_value_error(compiled, questions, settings, needed):
    ids, mask = pad(make_questions([4] * questions))
    with pytest.raises(ValueError, match=f"{needed} rows.*traced for {R}.*batch_size \\* num_beams >= {needed}"):
        compiled.generate(ids, make_pixels(1), mask, **settings)


def test_beams_of_the_models_own_generation_config_count_as_rows(tiny):
    config = GenerationConfig(num_beams=4, pad_token_id=0)
    graphs = {name: module for name, (module, _) in parts_to_trace(tiny, BlipShapes(1, 3, Q, A), "padded").items()}
    model = NeuronBlipForQuestionAnswering(tiny.config, graphs, BlipShapes(1, 3, Q, A), config)
    with pytest.raises(ValueError, match=r"4 rows.*traced for 3"):
        model.generate(make_questions([4])[0], make_pixels(1))


# Bad input to generate()


@contextmanager
def refused(match):
    with pytest.raises(ValueError, match=match) as caught:
        yield
    assert "/" not in str(caught.value)


@pytest.mark.parametrize("length", [Q + 1, 3 * Q])
def test_a_question_that_is_too_long_is_a_value_error(compiled, length):
    with refused(f"question has {length} tokens; this model was traced for {Q}: .*question_length >= {length}"):
        compiled.generate(make_questions([length])[0], make_pixels(1))


@pytest.mark.parametrize("token", [-1, len(WORDS), 10**6])
@pytest.mark.parametrize("at", [0, 3])
def test_a_token_outside_the_vocabulary_is_a_value_error(compiled, token, at):
    (question,) = make_questions([4])
    question[0, at] = token
    with refused(f"input_ids has .*{token}.*{len(WORDS) - 1}"):
        compiled.generate(question, make_pixels(1))


def test_a_question_without_a_token_is_a_value_error(compiled):
    ids, mask = pad(make_questions([4, 4]))
    mask[1] = 0
    with refused("empty"):
        compiled.generate(ids, make_pixels(1), mask)
    with refused("empty"):
        compiled.generate(ids[:, :0], make_pixels(1))


@pytest.mark.parametrize(
    "ids", [None, "what", [[2, 8, 3]], np.ones((1, 3)), torch.ones(3).long(), torch.zeros(0, 4).long()], ids=repr
)
def test_token_ids_that_are_no_batch_are_a_value_error(compiled, ids):
    with refused("input_ids is "):
        compiled.generate(ids, make_pixels(1))


def test_a_mask_of_another_shape_is_a_value_error(compiled):
    ids, mask = pad(make_questions([4, 4]))
    for wrong in (mask[:1], mask[:, :3], mask[0], mask[None]):
        with refused("input_ids is int64 \\[2, 4\\] and attention_mask "):
            compiled.generate(ids, make_pixels(1), wrong)


def test_token_ids_of_another_dtype_are_a_value_error(compiled):
    (question,) = make_questions([4])
    for wrong in (question.int(), question.float()):
        with refused("input_ids is (int32|float32)"):
            compiled.generate(wrong, make_pixels(1))


@pytest.mark.parametrize("images", [2, 4])
def test_another_number_of_images_is_a_value_error(compiled, images):
    ids, mask = pad(make_questions([4, 5, 6]))
    with refused(f"{images}.* for 3 questions"):
        compiled.generate(ids, make_pixels(images), mask)


@pytest.mark.parametrize("shape", [(0, 3, SIZE, SIZE), (3, SIZE, SIZE), (1, 1, 3, SIZE, SIZE)], ids=str)
def test_pixels_of_other_dimensions_are_a_value_error(compiled, shape):
    with refused("pixel_values is float32 "):
        compiled.generate(make_questions([4])[0], torch.zeros(shape))


@pytest.mark.parametrize(
    "pixels",
    [make_pixels(1).double(), make_pixels(1).half(), torch.zeros(1, 1, SIZE, SIZE), torch.zeros(1, 3, 2 * SIZE, SIZE)],
    ids=lambda pixels: f"{pixels.dtype} {list(pixels.shape)}",
)
def test_an_image_of_another_size_or_dtype_is_a_value_error(compiled, pixels):
    with refused(r"pixel_values is .*traced for float32"):
        compiled.generate(make_questions([4])[0], pixels)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_several_images_of_another_dtype_are_a_value_error(compiled, dtype):
    ids, mask = pad(make_questions([4, 4]))
    with refused("pixel_values is .*traced for float32"):
        compiled.generate(ids, make_pixels(2).to(dtype), mask)


@pytest.mark.parametrize("pixels", [np.zeros((1, 3, SIZE, SIZE)), [[0.0]]], ids=["numpy", "list"])
def test_pixels_that_are_no_tensor_are_a_value_error(compiled, pixels):
    with refused("pixel_values is a"):
        compiled.generate(make_questions([4])[0], pixels)


def test_interpolation_is_a_value_error(compiled):
    with refused("interpolate_pos_encoding is True"):
        compiled.generate(make_questions([4])[0], make_pixels(1), interpolate_pos_encoding=True)


def test_an_argument_that_nobody_knows_is_a_value_error(compiled):
    with refused("max_tokens"):
        compiled.generate(make_questions([4])[0], make_pixels(1), max_tokens=3)


@given(st.data())
def test_padding_on_either_side_changes_no_answer(compiled, tiny, data):
    lengths = data.draw(st.lists(st.integers(1, Q), min_size=1, max_size=R))
    questions, pixels = make_questions(lengths, seed=1), make_pixels(len(lengths))
    width = max(lengths) + data.draw(st.integers(0, 40))
    rows = []
    for question in questions:
        left = data.draw(st.integers(0, width - question.shape[1]))
        padding = (left, width - question.shape[1] - left)
        rows.append([nn.functional.pad(t, padding) for t in (question, torch.ones_like(question))])
    ids, mask = (torch.cat(part) for part in zip(*rows, strict=True))
    assert cut(compiled.generate(ids, pixels, mask)) == cut(answer_eagerly(tiny, questions, pixels, **LIMIT))


def test_a_mask_inside_a_question_is_a_value_error(compiled):
    ids, mask = pad(make_questions([6, 4]))
    mask[0, 2] = 0
    with refused("0 between two 1s"):
        compiled.generate(ids, make_pixels(2), mask)


@pytest.mark.parametrize("question", ["what \ud83d", "\udfff", "is this \ud800\ud800 ?"], ids=ascii)
@pytest.mark.parametrize("which", ["assembled", "tiny"])
def test_half_a_character_is_a_value_error(request, processor, question, which):
    with refused("half of a character"):
        infer(request.getfixturevalue(which), processor, question, noise(), **LIMIT)


@pytest.mark.parametrize("whole", [np.int64, np.int32, torch.tensor], ids=["int64", "int32", "tensor"])
def test_a_whole_number_may_be_anybodys(compiled, tiny, whole):
    settings = {"max_new_tokens": whole(5), "num_beams": whole(2), "num_return_sequences": whole(1)}
    assert_answers(compiled, tiny, make_questions([4, 7]), make_pixels(2), **settings)
    shapes = BlipShapes(whole(3), whole(2), (whole(4), whole(9)), answer_length=whole(8))
    assert shapes == BlipShapes(3, 2, (4, 9), answer_length=8)
    assert all(type(n) is int for n in (shapes.batch_size, shapes.answer_length, *shapes.question_length))


@pytest.mark.parametrize(
    "number", [2.0, "2", True, np.bool_(True), torch.tensor(True), torch.tensor([2]), np.array([2])]
)
def test_what_is_no_whole_number_is_a_value_error(compiled, number):
    with refused("num_beams is .*: give a whole number"):
        compiled.generate(make_questions([4])[0], make_pixels(1), num_beams=number)
    with refused("batch_size is .*: give a whole number"):
        BlipShapes(batch_size=number)


def test_a_default_device_changes_no_answer(compiled):
    (question,), pixels = make_questions([6]), make_pixels(1)
    expected = compiled.generate(question, pixels)
    with torch.device("meta"):
        assert torch.equal(compiled.generate(question, pixels), expected)
        image = compiled.encode_image(pixels)
    assert torch.equal(compiled.generate(question, image=image), expected)
    with refused("input_ids is on meta"):
        compiled.generate(question.to("meta"), pixels)


def test_the_assembled_model_is_in_eval_mode(compiled):
    assert not compiled.training


# infer()


def noise(mode="RGB", size=(40, 30), seed=0):
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(values).convert(mode)


def ask_eagerly(tiny, processor, question, image, **generate_kwargs):
    """What the model card does."""
    inputs = processor(images=image, text=question, return_tensors="pt")
    return processor.decode(tiny.generate(**inputs, **(LIMIT | generate_kwargs))[0], skip_special_tokens=True)


QUESTIONS = [
    "what is this ?",
    "how many red dots are there ?",
    "where",
    "is the blue line left of the dot",
    "a b c",
    "d",
] * 2


def test_a_question_gives_a_str_and_a_list_a_list(compiled, tiny, processor):
    image = noise()
    expected = ask_eagerly(tiny, processor, QUESTIONS[0], image)
    assert infer(compiled, processor, QUESTIONS[0], image) == expected
    assert infer(compiled, processor, QUESTIONS[:1], image) == [expected]
    assert infer(compiled, processor, tuple(QUESTIONS[:1]), (image,)) == [expected]
    assert infer(compiled, processor, [], image) == []


@pytest.mark.parametrize("count", [1, R - 1, R, R + 1, 2 * R])
def test_a_list_of_any_length_is_split_to_fit(compiled, tiny, processor, count):
    image = noise()
    expected = [ask_eagerly(tiny, processor, question, image) for question in QUESTIONS[:count]]
    assert infer(compiled, processor, QUESTIONS[:count], image) == expected
    assert len(set(expected)) > 1 or count == 1


def test_an_image_a_question(compiled, tiny, processor):
    images = [noise(seed=i % 3) for i in range(len(QUESTIONS))]
    expected = [ask_eagerly(tiny, processor, *pair) for pair in zip(QUESTIONS, images, strict=True)]
    assert infer(compiled, processor, QUESTIONS, images) == expected


@pytest.mark.parametrize("count", [R, 2 * R])
def test_a_picture_is_processed_once(compiled, processor, monkeypatch, count):
    seen, process = [], type(processor.image_processor).__call__

    def record(self, image, **kwargs):
        seen.append(image)
        return process(self, image, **kwargs)

    monkeypatch.setattr(type(processor.image_processor), "__call__", record)
    image = noise()
    infer(compiled, processor, QUESTIONS[:count], image)
    assert seen == [image]


def test_beams_take_rows_from_questions(compiled, tiny, processor):
    image = noise()
    expected = [ask_eagerly(tiny, processor, question, image, num_beams=4) for question in QUESTIONS[:3]]
    assert infer(compiled, processor, QUESTIONS[:3], image, num_beams=4) == expected


@given(st.lists(st.tuples(st.sampled_from(QUESTIONS), st.integers(0, 2)), min_size=1, max_size=2 * R))
def test_any_list_equals_eager(compiled, tiny, processor, asked):
    images = [noise(seed=i) for i in range(3)]
    expected = [ask_eagerly(tiny, processor, question, images[i]) for question, i in asked]
    assert infer(compiled, processor, [q for q, _ in asked], [images[i] for _, i in asked]) == expected


def test_the_eager_model_can_be_asked_the_same_way(tiny, processor):
    image = noise()
    expected = [ask_eagerly(tiny, processor, question, image) for question in QUESTIONS[:3]]
    assert infer(tiny, processor, QUESTIONS[:3], image, **LIMIT) == expected


def test_the_padding_side_of_the_tokenizer_does_not_matter(compiled, tiny, processor, monkeypatch):
    image = noise()
    expected = [ask_eagerly(tiny, processor, question, image) for question in QUESTIONS[:R]]
    monkeypatch.setattr(processor.tokenizer, "padding_side", "left")
    assert infer(compiled, processor, QUESTIONS[:R], image) == expected


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1", "LA", "I;16", "I", "F", "YCbCr"])
def test_images_of_any_mode_are_taken_as_the_processor_takes_them(compiled, tiny, processor, mode):
    image = Image.fromarray(np.arange(1200, dtype=np.uint16).reshape(30, 40) * 50) if mode == "I;16" else noise(mode)
    assert image.mode == mode
    assert infer(compiled, processor, QUESTIONS[0], image) == ask_eagerly(tiny, processor, QUESTIONS[0], image)


def test_transparency_is_taken_as_the_processor_takes_it(compiled, tiny, processor):
    palette = noise("P")
    palette.info["transparency"] = 3
    transparent = noise("RGBA")
    transparent.putalpha(noise("L", seed=1))
    for image in (palette, transparent):
        assert infer(compiled, processor, QUESTIONS[0], image) == ask_eagerly(tiny, processor, QUESTIONS[0], image)


@pytest.mark.parametrize("size", [(1, 1), (4000, 3000), (1, 500), (500, 1)])
def test_images_of_any_size_are_taken_as_the_processor_takes_them(compiled, tiny, processor, size):
    image = Image.linear_gradient("L").resize(size).convert("RGB")
    assert infer(compiled, processor, QUESTIONS[0], image) == ask_eagerly(tiny, processor, QUESTIONS[0], image)


def test_arrays_are_taken_as_the_processor_takes_them(compiled, tiny, processor):
    array = np.array(noise())
    expected = ask_eagerly(tiny, processor, QUESTIONS[0], noise())
    for image in (array, array.transpose(2, 0, 1), torch.tensor(array)):
        assert infer(compiled, processor, QUESTIONS[0], image) == expected


class Truncated:
    """A picture whose file ends too early, which Pillow notices when its pixels are read."""

    @staticmethod
    def open():
        file = io.BytesIO()
        noise(size=(300, 300)).save(file, "JPEG")
        return Image.open(io.BytesIO(file.getvalue()[:2000]))


NO_PICTURES = {
    "None": None,
    "path": "cat.jpg",
    "bytes": b"\x89PNG",
    "int": 5,
    "dict": {},
    "class": Image.Image,
    "1-d array": np.ones(5),
    "0-d array": np.array(5),
    "empty array": np.ones((0, 3)),
    "array of objects": np.array([None]),
    "two channels": np.ones((30, 40, 2)),
    "not a number": np.full((30, 40, 3), np.nan),
    "several pictures": np.stack([np.array(noise()), np.array(noise(seed=1))]),
}


@pytest.mark.parametrize("picture", NO_PICTURES.values(), ids=NO_PICTURES)
@pytest.mark.parametrize("which", ["assembled", "tiny"])
def test_what_is_no_picture_is_a_value_error(request, processor, picture, which):
    model = request.getfixturevalue(which)
    with pytest.raises(ValueError, match="image"):
        infer(model, processor, QUESTIONS[0], picture, **LIMIT)
    with pytest.raises(ValueError, match="image"):
        infer(model, processor, QUESTIONS[:2], [noise(), picture], **LIMIT)


def test_a_truncated_file_is_a_value_error(compiled, processor):
    with pytest.raises(ValueError, match=r"image.*truncated"):
        infer(compiled, processor, QUESTIONS[0], Truncated.open())


@pytest.mark.parametrize("question", ["", " ", "\n\t ", "\u200b"])
def test_an_empty_question_is_a_value_error(compiled, processor, question):
    with refused("is empty"):
        infer(compiled, processor, question, noise())
    with refused("is empty"):
        infer(compiled, processor, [QUESTIONS[0], question], noise())


@pytest.mark.parametrize("words", [Q - 1, 31, 400])
def test_a_question_above_the_traced_length_is_a_value_error(compiled, processor, words):
    question = " ".join(["what"] * words)
    remedy = f"question_length >= {words + 2}" if words + 2 <= 32 else "shorten it$"
    with refused(f"question has {words + 2} tokens; this model was traced for {Q}: .*{remedy}"):
        infer(compiled, processor, question, noise())
    with refused(f"{words + 2} tokens"):
        infer(compiled, processor, [*QUESTIONS[:8], question], noise())


def test_the_longest_question_is_answered(compiled, tiny, processor):
    question = " ".join(["what"] * (Q - 2))
    assert infer(compiled, processor, question, noise()) == ask_eagerly(tiny, processor, question, noise())


@pytest.mark.parametrize("question", [None, 5, b"what", ["what", None], ["what", 5], [["what"]]], ids=str)
def test_a_question_that_is_no_str_is_a_value_error(compiled, processor, question):
    with refused("question"):
        infer(compiled, processor, question, noise())


@pytest.mark.parametrize(("questions", "images"), [(3, 2), (2, 3), (1, 2), (2, 1), (1, 0)])
def test_another_number_of_images_than_questions_is_a_value_error(compiled, processor, questions, images):
    with refused(f"{images} images for {questions} questions"):
        infer(compiled, processor, QUESTIONS[:questions], [noise()] * images)


def test_an_answer_limit_above_the_traced_one_is_a_value_error(compiled, processor):
    with refused(f"{A} new tokens; this model was traced for {A - 1}: .*answer_length >= {A + 1}"):
        infer(compiled, processor, QUESTIONS[0], noise(), max_new_tokens=A)


def test_beams_that_do_not_fit_are_a_value_error(compiled, processor):
    with refused(f"traced for {R}: .*batch_size \\* num_beams >= {R + 1}"):
        infer(compiled, processor, QUESTIONS[0], noise(), num_beams=R + 1)


def test_infer_gives_one_answer_a_question(compiled, processor):
    with refused("num_return_sequences"):
        infer(compiled, processor, QUESTIONS[0], noise(), num_beams=2, num_return_sequences=2)


def test_sampling_is_not_split(compiled, processor):
    assert len(infer(compiled, processor, QUESTIONS[:R], noise(), do_sample=True)) == R
    with refused(f"{R + 1} questions .* the {R} that fit"):
        infer(compiled, processor, QUESTIONS[: R + 1], noise(), do_sample=True)


def test_nothing_is_answered_before_every_question_was_checked(compiled, processor, monkeypatch):
    monkeypatch.setattr(type(compiled), "generate", lambda *args, **kwargs: pytest.fail("asked already"))
    with refused("is empty"):
        infer(compiled, processor, [*QUESTIONS, ""], noise())


# verify()


class Asked:
    def __init__(self, question, seed):
        self.question, self.image = question, noise(seed=seed)


ASKED = [Asked(question, seed) for seed, question in enumerate(QUESTIONS[:5])]


def test_verify_compares_answers_and_logits(compiled, tiny, processor):
    checked = list(verify(compiled, tiny, processor, ASKED))
    assert [v.example for v in checked] == ASKED
    assert all(v.actual == v.expected and v.difference < 1e-4 for v in checked)
    texts = [processor.decode(v.actual, skip_special_tokens=True) for v in checked]
    assert texts == [ask_eagerly(tiny, processor, asked.question, asked.image) for asked in ASKED]


def test_verify_compares_beams_too(compiled, tiny, processor):
    asked = [Asked(question, seed) for seed in range(3) for question in QUESTIONS[:6]]
    checked = list(verify(compiled, tiny, processor, asked, num_beams=2))
    assert all(v.actual == v.expected for v in checked)
    texts = [processor.decode(v.actual, skip_special_tokens=True) for v in checked]
    assert texts == [ask_eagerly(tiny, processor, a.question, a.image, num_beams=2) for a in asked]


@pytest.mark.parametrize("settings", [{}, {"num_beams": 2}, {"num_return_sequences": 3}], ids=str)
def test_verify_draws_the_same_random_numbers(compiled, tiny, processor, settings):
    settings = {"do_sample": True, "temperature": 3.0, **settings}
    torch.manual_seed(1)
    checked = list(verify(compiled, tiny, processor, ASKED, **settings))
    left = torch.get_rng_state()
    assert all(v.actual == v.expected and v.difference < 1e-4 for v in checked)
    torch.manual_seed(1)
    for v in checked:
        inputs = processor(images=v.example.image, text=v.example.question, return_tensors="pt")
        answers = tiny.generate(**inputs, **LIMIT, **settings)
        assert cut(answers) == (v.expected if "num_return_sequences" in settings else [v.expected])
    assert torch.equal(torch.get_rng_state(), left)
    other = list(verify(compiled, tiny, processor, ASKED, **settings))
    assert [v.expected for v in other] != [v.expected for v in checked]


def test_verify_takes_what_infer_takes(compiled, tiny, processor, monkeypatch):
    monkeypatch.setattr(processor.tokenizer, "padding_side", "left")
    checked = list(verify(compiled, tiny, processor, ASKED, max_length=4))
    assert all(v.actual == v.expected and len(v.actual) <= 4 for v in checked)
    with refused("is empty"):
        list(verify(compiled, tiny, processor, [Asked(" ", 0)]))


def test_verify_says_which_answers_the_trace_cut(compiled, tiny, processor):
    asked = [Asked(question, seed) for seed in range(2) for question in QUESTIONS[:6]]
    for settings in ({}, {"num_beams": 2}, {"num_beams": 2, "num_return_sequences": 2}):
        for v in verify(compiled, tiny, processor, asked, **settings):
            answers = v.actual if "num_return_sequences" in settings else [v.actual]
            assert v.cut == any(len(a) == A and WORDS.index("[SEP]") not in a for a in answers)
        assert len({v.cut for v in verify(compiled, tiny, processor, asked, **settings)}) == 2
    assert not any(v.cut for v in verify(compiled, tiny, processor, asked, max_new_tokens=A - 1))
    assert not any(
        v.cut for v in verify(compiled, tiny, processor, asked, generation_config=GenerationConfig(max_length=A))
    )


def test_infer_warns_once_of_an_answer_that_the_trace_cut(tiny, processor, tmp_path):
    model = trace(tiny, tmp_path, BlipShapes(question_length=Q, answer_length=3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        infer(model, processor, QUESTIONS, noise(), max_new_tokens=2)
    with pytest.warns(UserWarning, match=r"cut after 2 new tokens.*answer_length >= 4") as caught:
        infer(model, processor, QUESTIONS, noise())
        infer(model, processor, QUESTIONS, noise())
    assert [w.filename for w in caught if "cut after" in str(w.message)] == [__file__]


def test_verify_sees_another_model(compiled, processor):
    other = make_tiny_blip()
    other.text_decoder.cls.predictions.bias += torch.linspace(-1, 1, len(WORDS))
    checked = list(verify(compiled, other, processor, ASKED))
    assert all(v.difference > 0.5 for v in checked)
    assert any(v.actual != v.expected for v in checked)


def test_verify_sees_what_is_no_number(assembled, tiny, processor, monkeypatch):
    """A NaN that leaves the largest logit largest is still no equal answer."""

    def one_nan(logits):
        logits[:, :, WORDS.index("[MASK]")] = float("nan")
        return logits

    forward = PaddedDecoder.forward
    monkeypatch.setattr(PaddedDecoder, "forward", lambda *args: one_nan(forward(*args)))
    (checked,) = verify(assembled, tiny, processor, ASKED[:1])
    assert not checked.difference < 1e-4
