"""Scores of answers are those of Hugging Face's eager model; candidates are ranked as BLIP's authors rank them."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY_SHAPES, make_pixels, make_questions, make_tiny_blip, pad
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from blip_helpers import (
    MODELS,
    NeuronBlipForQuestionAnswering,
    infer,
    load_blip,
    parts_to_trace,
    probabilities,
    rank_answers,
)
from models.scenes import examples

Q, A, R = TINY_SHAPES.question_length, TINY_SHAPES.answer_length, TINY_SHAPES.rows
LIMIT = {"max_new_tokens": A - 1}
SCORES = {"return_dict_in_generate": True, "output_scores": True}
QUESTIONS = ["what is this ?", "how many red dots are there ?", "where", "is the line left", "a b c", "d"]


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def picture(seed=0):
    bands = [Image.effect_noise((40, 30), 90).point(lambda v, i=i: (v * (seed + 2) + 60 * i) % 256) for i in range(3)]
    return Image.merge("RGB", bands)


PICTURES = [picture(seed) for seed in range(6)]


def assert_scored(actual, expected):
    """Lists of (text, probability): the same texts, nearly the same logarithms, which are sums over tokens."""
    assert [text for text, _ in actual] == [text for text, _ in expected]
    worst = max(abs(math.log(a / e)) for (_, a), (_, e) in zip(actual, expected, strict=True))
    assert worst < 1e-3


# Of generated answers


def score_eagerly(tiny, processor, question, image, **settings):
    """One question, with what Hugging Face documents: the sum of transition scores."""
    inputs = processor(images=image, text=question, return_tensors="pt")
    output = tiny.generate(**inputs, **(LIMIT | settings), **SCORES)
    scores = tiny.text_decoder.compute_transition_scores(
        output.sequences, output.scores, getattr(output, "beam_indices", None), normalize_logits=True
    )
    return processor.decode(output.sequences[0], skip_special_tokens=True), scores[0].sum().exp().item()


@pytest.mark.parametrize(
    "settings",
    [{}, {"max_new_tokens": 2}, {"repetition_penalty": 1.7}, {"min_new_tokens": 3}, {"num_beams": 2}, {"num_beams": 6}],
    ids=str,
)
def test_scores_of_a_ragged_batch_equal_eager(compiled, tiny, processor, settings):
    images = [PICTURES[i] for i in (0, 1, 1, 2, 3, 4)]
    expected = [score_eagerly(tiny, processor, *pair, **settings) for pair in zip(QUESTIONS, images, strict=True)]
    for model in (compiled, tiny):
        assert_scored(infer(model, processor, QUESTIONS, images, return_scores=True, **(LIMIT | settings)), expected)
    if not settings:
        assert len({len(text.split()) for text, _ in expected}) > 1  # ragged
    assert all(0 < p < 1 for _, p in expected)


def test_a_question_gives_a_pair(compiled, tiny, processor):
    expected = score_eagerly(tiny, processor, QUESTIONS[0], PICTURES[0])
    answered = infer(compiled, processor, QUESTIONS[0], PICTURES[0], return_scores=True)
    assert isinstance(answered, tuple)
    assert_scored([answered], [expected])
    assert infer(compiled, processor, [], PICTURES[0], return_scores=True) == []


def test_scores_of_drawn_answers_equal_eager(compiled, tiny, processor):
    drawn = {**LIMIT, "do_sample": True, "temperature": 2.0, "top_k": 9}
    torch.manual_seed(4)
    expected = score_eagerly(tiny, processor, QUESTIONS[1], PICTURES[1], **drawn)
    torch.manual_seed(4)
    assert_scored([infer(compiled, processor, QUESTIONS[1], PICTURES[1], return_scores=True, **drawn)], [expected])


@pytest.mark.parametrize("settings", [{"num_beams": 3}, {"do_sample": True}], ids=str)
def test_each_returned_sequence_has_its_score(compiled, tiny, settings):
    ids, mask = pad(make_questions([6, 9]))
    settings = {"num_return_sequences": 3, **settings, **SCORES, **LIMIT}
    torch.manual_seed(5)
    expected = probabilities(tiny, tiny.generate(ids[1:], make_pixels(2)[1:], mask[1:], **settings))
    torch.manual_seed(5)
    actual = probabilities(compiled, compiled.generate(ids[1:], make_pixels(2)[1:], mask[1:], **settings))
    assert len(actual) == 3
    assert torch.allclose(torch.tensor(actual), torch.tensor(expected), rtol=1e-3, atol=0)
    both = probabilities(compiled, compiled.generate(ids, make_pixels(2), mask, **settings))
    assert "do_sample" in settings or torch.allclose(torch.tensor(both[3:]), torch.tensor(expected), rtol=1e-3, atol=0)


# Of given ones

CANDIDATES = [
    *("yes", "no", "red dot", "a b c d", "two green dots", "nothing", "left of the red line", "e f", "red", "red line"),
    *("no picture", "yes yes yes yes yes yes"),
]


def rank_as_the_authors(model, processor, question, image, candidates, k):
    """``rank_answer`` of salesforce/BLIP's models/blip_vqa.py, line for line on Hugging Face's modules, for one
    question; the authors keep the best alone."""
    inputs = processor(images=image, text=question, return_tensors="pt")
    image_embeds = model.vision_model(inputs.pixel_values)[0]
    states = model.text_encoder(inputs.input_ids, inputs.attention_mask, encoder_hidden_states=image_embeds)[0]
    answers = processor.tokenizer(candidates, padding="longest", return_tensors="pt")
    answers.input_ids[:, 0] = processor.tokenizer.bos_token_id
    start = answers.input_ids[:1, :1]
    logits = model.text_decoder(start, encoder_hidden_states=states).logits[:, 0]
    first = F.softmax(logits, dim=1).index_select(1, answers.input_ids[:, 1])
    ids = first.sort(descending=True, stable=True).indices[:, :k]  # theirs is topk, which may take any of equal ones
    input_ids, attention_mask = answers.input_ids[ids[0]], answers.attention_mask[ids[0]]
    output = model.text_decoder(
        input_ids,
        attention_mask=attention_mask,
        encoder_hidden_states=states.repeat(k, 1, 1),
        encoder_attention_mask=torch.ones(k, states.shape[1]),
        labels=input_ids.masked_fill(input_ids == processor.tokenizer.pad_token_id, -100),
        reduction="none",
    )
    ranked = zip([candidates[i] for i in ids[0]], (-output.loss).double().exp().tolist(), strict=True)
    return sorted(ranked, key=lambda pair: -pair[1])


@pytest.mark.parametrize("k", [1, 3, R, R + 1, len(CANDIDATES)])
def test_candidates_are_ranked_as_the_authors_do(compiled, tiny, processor, k):
    assert len(CANDIDATES) > R
    for question, image in zip(QUESTIONS[:3], PICTURES, strict=False):
        expected = rank_as_the_authors(tiny, processor, question, image, CANDIDATES, k)
        assert len(expected) == k
        for model in (compiled, tiny):
            assert_scored(rank_answers(model, processor, question, image, CANDIDATES, k), expected)


def test_another_question_or_picture_gives_another_ranking(tiny, processor):
    """With a model that always ranks the same the other tests would prove nothing."""
    ranked = rank_answers(tiny, processor, QUESTIONS, PICTURES, CANDIDATES)
    assert len({best for (best, _), *_ in ranked}) > 1
    assert len({tuple(text for text, _ in each) for each in ranked}) == len(QUESTIONS)


def test_the_first_token_chooses_and_all_tokens_rank(tiny, processor):
    """The likeliest candidate of all may be left out when k is small: the authors' way, for speed."""
    of_all = [rank_answers(tiny, processor, q, i, CANDIDATES) for q, i in zip(QUESTIONS, PICTURES, strict=True)]
    of_one = [rank_answers(tiny, processor, q, i, CANDIDATES, 1) for q, i in zip(QUESTIONS, PICTURES, strict=True)]
    assert any(all_[0] != one[0] for all_, one in zip(of_all, of_one, strict=True))
    assert all(one[0][0] in dict(all_) for all_, one in zip(of_all, of_one, strict=True))


def test_questions_are_ranked_one_by_one(compiled, processor):
    alone = [rank_answers(compiled, processor, q, i, CANDIDATES) for q, i in zip(QUESTIONS, PICTURES, strict=True)]
    assert rank_answers(compiled, processor, QUESTIONS, PICTURES, CANDIDATES) == alone
    one_picture = [rank_answers(compiled, processor, q, PICTURES[0], CANDIDATES) for q in QUESTIONS]
    assert rank_answers(compiled, processor, QUESTIONS, PICTURES[0], CANDIDATES) == one_picture
    assert rank_answers(compiled, processor, [], PICTURES[0], CANDIDATES) == []


def test_an_encoded_picture_is_ranked_as_the_picture(compiled, processor):
    encoded = compiled.encode_image(processor.image_processor(PICTURES[0], return_tensors="pt").pixel_values)
    expected = rank_answers(compiled, processor, QUESTIONS[0], PICTURES[0], CANDIDATES)
    assert rank_answers(compiled, processor, QUESTIONS[0], encoded, CANDIDATES) == expected


def test_ranking_changes_no_later_answer(compiled, processor):
    expected = infer(compiled, processor, QUESTIONS, PICTURES, **LIMIT)
    rank_answers(compiled, processor, QUESTIONS[0], PICTURES[1], CANDIDATES)
    assert infer(compiled, processor, QUESTIONS, PICTURES, **LIMIT) == expected


@settings(max_examples=5)
@given(st.lists(st.sampled_from(CANDIDATES), min_size=1, max_size=2 * R), st.integers(1, 200), st.integers(0, 5))
def test_any_list_of_candidates_is_ranked_as_eager_does(compiled, tiny, processor, candidates, k, asked):
    """The same one twice as well: of equal ones the first."""
    given_ = (processor, QUESTIONS[asked], PICTURES[asked], candidates, k)
    actual = rank_answers(compiled, *given_)
    assert len(actual) == min(k, len(candidates))
    assert_scored(actual, rank_answers(tiny, *given_))


def test_smoothed_losses_are_ranked_as_the_authors_do(processor):
    """They trained and ranked with a label smoothing of 0.1, which the configuration says."""
    model = make_tiny_blip(label_smoothing=0.1)
    graphs = {name: module for name, (module, _) in parts_to_trace(model, TINY_SHAPES, "padded").items()}
    compiled = NeuronBlipForQuestionAnswering(model.config, graphs, TINY_SHAPES, model.text_decoder.generation_config)
    expected = rank_as_the_authors(model, processor, QUESTIONS[0], PICTURES[0], CANDIDATES, 7)
    for each in (model, compiled):
        assert_scored(rank_answers(each, processor, QUESTIONS[0], PICTURES[0], CANDIDATES, 7), expected)


def test_a_generated_answer_has_the_same_score_in_a_ranking():
    """The trained model's: of all answers it knows, none is likelier than what it generates."""
    model, processor = load_blip(MODELS / "tiny-blip-vqa")
    asked = list(examples("held-out", 7))
    known = sorted({example.answer for example in examples("train", 150)} | {example.answer for example in asked})
    for example in asked:
        answer, p = infer(model, processor, example.question, example.image, return_scores=True, max_new_tokens=20)
        ranked = rank_answers(model, processor, example.question, example.image, [*known, answer], k=len(known) + 1)
        assert_scored(ranked[:1], [(answer, p)])


# What is refused


@pytest.mark.parametrize("which", ["assembled", "tiny"])
def test_what_is_no_list_of_candidates_is_a_value_error(request, processor, which):
    model = request.getfixturevalue(which)
    for wrong in ("yes", [], (), None, {"yes", "no"}, 5):
        with pytest.raises(ValueError, match=r"candidates is .*: pass a list of one str or more"):
            rank_answers(model, processor, QUESTIONS[0], PICTURES[0], wrong)
    for wrong in (None, 5, ["yes"], b"yes"):
        with pytest.raises(ValueError, match=f"candidate is a {type(wrong).__name__}: pass a str"):
            rank_answers(model, processor, QUESTIONS[0], PICTURES[0], ["yes", wrong])
    for empty in ("", " ", "\u200b"):
        with pytest.raises(ValueError, match=r"candidate '.*' is empty: leave it out"):
            rank_answers(model, processor, QUESTIONS[0], PICTURES[0], ["yes", empty])
    for k in (0, -1, True, 2.5, "2", None):
        with pytest.raises(ValueError, match=r"k is .*: give a whole number of at least 1"):
            rank_answers(model, processor, QUESTIONS[0], PICTURES[0], CANDIDATES, k)


def test_a_candidate_that_is_too_long_is_a_value_error(compiled, tiny, processor):
    def refused(model, words, match):
        with pytest.raises(ValueError, match=match):
            rank_answers(model, processor, QUESTIONS[0], PICTURES[0], ["yes", " ".join(["no"] * words)])

    refused(compiled, A - 1, f"has {A + 1} tokens; this model takes {A}: trace it with answer_length >= {A + 1}")
    refused(compiled, 31, f"has 33 tokens; this model takes {A}: shorten it")  # the checkpoint has 32 positions
    refused(tiny, 31, "has 33 tokens; this model takes 32: shorten it")
    rank_answers(tiny, processor, QUESTIONS[0], PICTURES[0], ["yes", " ".join(["no"] * 30)])


def test_questions_and_pictures_are_checked_as_in_infer(compiled, processor):
    for question, image, match in [
        ("", PICTURES[0], "question '' is empty: ask something"),
        (" ".join(["what"] * Q), PICTURES[0], f"question has {Q + 2} tokens.*question_length >= {Q + 2}"),
        (QUESTIONS[0], None, "image is a NoneType"),
        (QUESTIONS[:2], PICTURES[:1] * 3, "3 images for 2 questions"),
    ]:
        with pytest.raises(ValueError, match=match):
            rank_answers(compiled, processor, question, image, CANDIDATES)
