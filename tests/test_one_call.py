"""`decoder="unrolled"`: one call for a plain request, the cached decoder for any other; the answers are eager's."""

import copy
import json
import threading
from dataclasses import replace

import pytest
import torch
from conftest import TINY_SHAPES, answer_eagerly, cut, make_pixels, make_questions, make_tiny_blip, pad
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers import GenerationConfig

from blip_helpers import NeuronBlipForQuestionAnswering, infer, parts_to_trace, trace, verify
from blip_one_call import Pixels
from models.scenes import Example

A, B, Q = TINY_SHAPES.answer_length, TINY_SHAPES.batch_size, TINY_SHAPES.question_length
LENGTHS = [1, 7, 3, Q, 5, 2]  # as many as rows: twice what a call of the one-call graphs takes
LIMIT = {"max_new_tokens": A - 1}


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def of_steps(tiny, directory, steps):
    return trace(tiny, directory, replace(TINY_SHAPES, unrolled_steps=steps), decoder="unrolled")


@pytest.fixture(scope="module", params=[1, 3, A - 1], ids="K={}".format)
def compiled(request, tiny, tmp_path_factory):
    """K of one token, shorter than some answers, and as long as any."""
    return of_steps(tiny, tmp_path_factory.mktemp("unrolled"), request.param)


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    return of_steps(tiny, tmp_path_factory.mktemp("whole"), A - 1)


@pytest.fixture
def calls(monkeypatch):
    """Which graphs are called, by their names, in order."""
    made = []

    def listen(model):
        graphs = {
            "image": model.vision_model.graph,
            "question": model.text_encoder.graph,
            "step": model.text_decoder.decoder.decoder,
            "features": model.one_call.of_features,
            "picture": model.one_call.of_picture,
        }
        for name, graph in graphs.items():
            forward = graph.forward
            monkeypatch.setattr(graph, "forward", lambda *a, name=name, f=forward: (made.append(name), f(*a))[1])
        return made

    return listen


def some_bytes(count, seed=0):
    return torch.randint(
        256, make_pixels(count).shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8
    )


# Answers


@pytest.mark.parametrize("limit", range(1, A))
def test_a_ragged_batch_equals_eager_for_every_limit(compiled, tiny, limit):
    questions, pixels = make_questions(LENGTHS, seed=1), make_pixels(len(LENGTHS), seed=2)
    ids, mask = pad(questions)
    answers = compiled.generate(ids, pixels, mask, max_new_tokens=limit)
    expected = answer_eagerly(tiny, questions, pixels, max_new_tokens=limit)
    assert cut(answers) == cut(expected)
    assert answers.shape[1] == max(map(len, expected)) and answers.dtype == torch.int64
    padding = [row[len(answer) :] for row, answer in zip(answers.tolist(), cut(expected), strict=True)]
    assert not any(map(any, padding))  # [PAD] is 0


@given(lengths=st.lists(st.integers(1, Q), min_size=1, max_size=6), seed=st.integers(0, 10**6), one=st.booleans())
def test_any_batch_equals_eager(compiled, tiny, lengths, seed, one):
    questions, pixels = make_questions(lengths, seed), make_pixels(1 if one else len(lengths), seed)
    ids, mask = pad(questions)
    with torch.no_grad():
        for_each = pixels.expand(len(lengths), -1, -1, -1)
        expected = cut(answer_eagerly(tiny, questions, for_each, **LIMIT))
        assert cut(compiled.generate(ids, pixels, mask)) == expected
        assert cut(compiled.generate(ids, attention_mask=mask, image=compiled.encode_image(pixels))) == expected


def test_bytes_are_answered_as_what_the_processor_makes_of_them(compiled, tiny):
    questions, pixels = make_questions(LENGTHS, seed=4), some_bytes(len(LENGTHS))
    ids, mask = pad(questions)
    for some in (pixels, pixels[:1]):
        normalised = Pixels().normalise(some)
        expected = cut(answer_eagerly(tiny, questions, normalised.expand(len(questions), -1, -1, -1), **LIMIT))
        assert cut(compiled.generate(ids, some, mask)) == expected
        features = compiled.encode_image(some)
        assert torch.equal(features.last_hidden_state, compiled.encode_image(normalised).last_hidden_state)
        assert cut(compiled.generate(ids, some, mask, max_time=100.0)) == expected  # with the cached decoder
    beams = compiled.generate(ids[:2], pixels[:2], mask[:2], num_beams=2)
    assert torch.equal(beams, compiled.generate(ids[:2], Pixels().normalise(pixels[:2]), mask[:2], num_beams=2))


def test_the_constants_are_those_of_the_processor(processor):
    picture = Image.effect_noise((32, 32), 90).convert("RGB")
    made = processor.image_processor(picture, return_tensors="pt").pixel_values
    raw = processor.image_processor(picture, return_tensors="pt", do_rescale=False, do_normalize=False).pixel_values
    assert raw.dtype == torch.uint8
    assert torch.allclose(Pixels.of(processor).normalise(raw), made, rtol=0, atol=1e-6)


# Calls


def test_one_picture_and_its_questions_take_one_call(whole, calls):
    made = calls(whole)
    ids, mask = pad(make_questions(LENGTHS[:B]))
    whole.generate(ids, some_bytes(1), mask)
    assert made == ["picture"]


def test_encoded_pictures_and_fp32_pixels_take_no_question_graph_and_no_step(whole, calls):
    made = calls(whole)
    ids, mask = pad(make_questions(LENGTHS))  # two calls of B questions
    features = whole.encode_image(make_pixels(1))
    whole.generate(ids, attention_mask=mask, image=features)
    whole.generate(ids, make_pixels(1), mask)
    whole.generate(ids, some_bytes(1), mask)
    assert made == ["image", "features", "features"] * 3


def test_an_answer_longer_than_k_goes_on_and_is_counted(tiny, tmp_path, calls):
    model = of_steps(tiny, tmp_path, 3)
    made = calls(model)
    questions, pixels = make_questions(LENGTHS, seed=1), make_pixels(len(LENGTHS), seed=2)
    expected = cut(answer_eagerly(tiny, questions, pixels, **LIMIT))
    ids, mask = pad(questions)
    assert cut(model.generate(ids, pixels, mask)) == expected
    longer = [answer for answer in expected if len(answer) > 4]  # the start token among them
    assert 0 < len(longer) < len(expected)
    assert (model.one_call.answers, model.one_call.longer) == (len(LENGTHS), len(longer))
    assert made.count("question") == len(longer)  # an image each; nobody else is asked again
    made.clear()
    model.generate(ids, pixels, mask, max_new_tokens=3)
    assert "step" not in made and model.one_call.longer == len(longer)


NOT_PLAIN = [
    {"do_sample": True},
    {"num_beams": 2},
    {"repetition_penalty": 1.2},
    {"min_new_tokens": 3},
    {"output_scores": True, "return_dict_in_generate": True},
    {"return_dict_in_generate": True},
    {"num_return_sequences": 2, "do_sample": True},
    {"bad_words_ids": [[5]]},
    {"generation_config": GenerationConfig(min_new_tokens=3)},
    {"max_time": 100.0},
]


@pytest.mark.parametrize("settings", NOT_PLAIN, ids=str)
def test_any_other_request_is_one_for_the_cached_decoder(whole, tiny, calls, settings):
    made = calls(whole)
    ids, mask = pad(make_questions([6], seed=3))
    torch.manual_seed(1)
    answer = whole.generate(ids, make_pixels(1), mask, **settings)
    torch.manual_seed(1)
    expected = tiny.generate(ids, make_pixels(1), mask, **LIMIT, **settings)
    assert {"features", "picture"}.isdisjoint(made) and "step" in made
    assert torch.equal(getattr(answer, "sequences", answer), getattr(expected, "sequences", expected))


def test_a_setting_of_the_model_s_own_counts_when_it_is_made(tmp_path, calls):
    model = make_tiny_blip()
    compiled = of_steps(model, tmp_path, A - 1)
    made = calls(compiled)
    ids, mask = pad(make_questions([6, 4], seed=5))
    for name, value in {"min_new_tokens": 4, "repetition_penalty": 1.5, "suppress_tokens": [7]}.items():
        for each in (model, compiled):
            setattr(each.text_decoder.generation_config, name, value)
        made.clear()
        answer = cut(compiled.generate(ids, make_pixels(2), mask))
        assert "step" in made and "features" not in made
        assert answer == cut(answer_eagerly(model, make_questions([6, 4], seed=5), make_pixels(2), **LIMIT))
        setattr(compiled.text_decoder.generation_config, name, getattr(GenerationConfig(), name))
        setattr(model.text_decoder.generation_config, name, getattr(GenerationConfig(), name))
    made.clear()
    compiled.generate(ids, make_pixels(2), mask)
    assert "step" not in made


def test_threads_share_it(whole, tiny):
    questions, pixels = make_questions(LENGTHS, seed=8), make_pixels(len(LENGTHS), seed=9)
    ids, mask = pad(questions)
    expected, answers, before = cut(answer_eagerly(tiny, questions, pixels, **LIMIT)), [], whole.one_call.answers

    def ask():
        with torch.no_grad():
            answers.extend(cut(whole.generate(ids, pixels, mask)) for _ in range(5))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [expected] * 20 and whole.one_call.answers - before == 20 * len(LENGTHS)


# infer() and verify()


def test_infer_sends_bytes_and_takes_one_call(whole, tiny, processor, calls):
    made = calls(whole)
    picture, texts = Image.effect_noise((50, 40), 90).convert("RGB"), ["what is this ?", "where", "a b c"]
    assert infer(whole, processor, texts, picture) == infer(tiny, processor, texts, picture, **LIMIT)
    assert made == ["picture"] * len(made) and len(made) == -(-len(texts) // B)


def test_a_processor_with_other_constants_is_answered_in_two_calls(whole, tiny, processor, calls):
    other, made = copy.deepcopy(processor), calls(whole)
    other.image_processor.image_mean = [0.1, 0.2, 0.3]
    picture = Image.effect_noise((50, 40), 90).convert("RGB")
    assert infer(whole, other, "where", picture) == infer(tiny, other, "where", picture, **LIMIT)
    assert made == ["image", "features"]


def test_verify_compares_what_one_call_answers(compiled, tiny, processor, monkeypatch):
    pictures = [Image.effect_noise((50, 40), 40 + 9 * i).convert("RGB") for i in range(5)]
    texts = ["what is this ?", "where", "a b c", "is the line left", "d"]
    asked = [Example(image, text, "", "") for image, text in zip(pictures, texts, strict=True)]
    verified = list(verify(compiled, tiny, processor, asked))
    assert all(row.actual == row.expected and row.difference < 1e-4 for row in verified)
    monkeypatch.setattr(compiled.one_call, "forward", lambda ids, *args: [[compiled.one_call.end]] * len(ids))
    assert not all(row.actual == row.expected for row in verify(compiled, tiny, processor, asked))


# The artifact


def test_it_loads_and_keeps_its_constants(tiny, tmp_path, processor, capsys):
    shapes = replace(TINY_SHAPES, unrolled_steps=3)
    processor.image_processor.image_mean, before = [0.1, 0.2, 0.3], processor.image_processor.image_mean
    try:
        trace(tiny, tmp_path, shapes, decoder="unrolled", processor=processor)
        trace(tiny, tmp_path, shapes, decoder="unrolled", processor=processor)
        assert capsys.readouterr().out.count("kept") == 5
        loaded = NeuronBlipForQuestionAnswering.from_pretrained(tmp_path)
        assert loaded.one_call.pixels == Pixels.of(processor)
        assert json.loads((tmp_path / "manifest.json").read_text())["pixels"]["image_mean"] == [0.1, 0.2, 0.3]
        ids, mask = pad(make_questions([5]))
        own = Pixels.of(processor).normalise(some_bytes(1))
        assert cut(loaded.generate(ids, some_bytes(1), mask)) == cut(loaded.generate(ids, own, mask))
    finally:
        processor.image_processor.image_mean = before
    trace(tiny, tmp_path, shapes, decoder="unrolled")
    said = capsys.readouterr().out
    assert "picture_answer   traced: the weights are others" in said and said.count("kept") == 4


def test_other_steps_are_traced_again_and_the_rest_is_kept(tiny, tmp_path, capsys):
    of_steps(tiny, tmp_path, 3)
    capsys.readouterr()
    assert of_steps(tiny, tmp_path, 4).one_call.steps == 4
    said = capsys.readouterr().out
    assert said.count("kept") == 3 and said.count("the model answers probe inputs otherwise") == 2


def test_a_cached_artifact_becomes_an_unrolled_one(tiny, tmp_path, capsys):
    trace(tiny, tmp_path, TINY_SHAPES)
    capsys.readouterr()
    assert trace(tiny, tmp_path, TINY_SHAPES, decoder="unrolled").one_call is not None
    assert capsys.readouterr().out.count("kept") == 3


# What is refused


def test_more_steps_than_an_answer_has_tokens_are_a_value_error(tiny, tmp_path):
    with pytest.raises(ValueError, match=f"unrolled_steps is {A}; answer_length={A} allows {A - 1} new tokens"):
        of_steps(tiny, tmp_path / "new", A)
    assert not (tmp_path / "new").exists()


def test_a_processor_that_does_not_normalise_is_a_value_error(tiny, tmp_path, processor):
    other = copy.deepcopy(processor)
    other.image_processor.do_normalize = False
    with pytest.raises(ValueError, match="do_normalize of the image processor is False"):
        trace(tiny, tmp_path / "new", TINY_SHAPES, decoder="unrolled", processor=other)


def test_bytes_need_a_graph_that_takes_them(tiny):
    graphs = {name: module for name, (module, _) in parts_to_trace(tiny, TINY_SHAPES, "padded").items()}
    padded = NeuronBlipForQuestionAnswering(tiny.config, graphs, TINY_SHAPES, tiny.text_decoder.generation_config)
    for ask in (
        lambda: padded.encode_image(some_bytes(1)),
        lambda: padded.generate(*make_questions([4]), some_bytes(1)),
    ):
        with pytest.raises(ValueError, match=r"pixel_values is uint8 .*float32"):
            ask()
