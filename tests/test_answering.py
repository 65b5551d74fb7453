"""A batch on a core: grouped by picture and settings, equal to eager, and every error a value of its own row."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
from conftest import SIZE
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from blip_helpers import BlipShapes, SeenPictures, infer, trace
from blip_inputs import question_tokens
from blip_one_call import Pixels
from service import faults
from service.answering import Answering, Ask, Failure, Settings, failure_of, pixels_of
from service.artifacts import Serving, known_answer, load_known
from service.faults import CoreLost, on_the_core, status_of

QUESTIONS = (
    "how many dots are there ?",
    "where is the line ?",
    "what colour is the shape ?",
    "is this a red dot ?",
    "a",
)
PICTURES = tuple(
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)) for seed in range(3)
)
MOST = {"max_new_tokens": 7}  # what was traced: the limit of a call without one


@pytest.fixture(scope="module")
def answering(traced_directory, processor):
    return Answering.load(traced_directory, processor)


@pytest.fixture(scope="module")
def eager(tiny, processor):
    """The original's answer, with its probability, remembered."""
    known = {}

    def answer(picture, question, limit=None):
        key = picture, question, limit
        if key not in known:
            kwargs = MOST if limit is None else {"max_new_tokens": limit}
            known[key] = infer(tiny, processor, QUESTIONS[question], PICTURES[picture], return_scores=True, **kwargs)
        return known[key]

    return answer


@pytest.fixture
def ask(processor):
    def make(picture=0, questions=(0,), how=Settings()):  # noqa: B008 (frozen)
        tokens = tuple(tuple(question_tokens(processor, QUESTIONS[question])) for question in questions)
        return Ask(pixels_of(processor, PICTURES[picture]), tokens, how)

    return make


@pytest.fixture
def calls(answering, monkeypatch):
    """What the model was asked for: questions and images of each call, and how many pictures were encoded."""
    generate, encode = answering.compiled.generate, answering.compiled.encode_image
    made_of = {"generate": [], "encoded": 0}

    def counted_generate(input_ids, image, **kwargs):
        made_of["generate"].append((len(input_ids), len(image.last_hidden_state), kwargs.get("num_beams", 1)))
        return generate(input_ids, image=image, **kwargs)

    def counted_encode(pixels):
        made_of["encoded"] += len(pixels)
        return encode(pixels)

    monkeypatch.setattr(answering.compiled, "generate", counted_generate)
    monkeypatch.setattr(answering.compiled, "encode_image", counted_encode)
    monkeypatch.setattr(answering, "seen", SeenPictures(2**20))
    return made_of


asked = st.lists(
    st.tuples(
        st.integers(0, len(PICTURES) - 1),
        st.lists(st.integers(0, len(QUESTIONS) - 1), min_size=1, max_size=8),
        st.sampled_from([None, 1, 3]),
    ),
    min_size=1,
    max_size=8,
)


@given(asked)
@settings(max_examples=25)
def test_every_answer_of_any_batch_is_the_original_s(answering, processor, eager, asked):
    asks = [
        Ask(
            pixels_of(processor, PICTURES[picture]),
            tuple(tuple(question_tokens(processor, QUESTIONS[question])) for question in questions),
            Settings(max_new_tokens=limit),
        )
        for picture, questions, limit in asked
    ]
    results, batch = answering.answer(asks)
    assert batch.questions == sum(len(questions) for _, questions, _ in asked)
    for (picture, questions, limit), result in zip(asked, results, strict=True):
        expected = [eager(picture, question, limit) for question in questions]
        assert [row[0].text for row in result] == [text for text, _ in expected]
        assert [row[0].score for row in result] == pytest.approx([score for _, score in expected], abs=1e-4)


def test_each_picture_of_a_batch_is_encoded_once_and_rows_are_filled(answering, ask, calls):
    _, batch = answering.answer([ask(0), ask(1), ask(0), ask(1), ask(0), ask(1)])
    assert calls["encoded"] == 2
    assert calls["generate"] == [(6, 6, 1)]
    assert (batch.rows, batch.rows_in_all) == (6, 6)


def test_questions_about_one_picture_share_its_features(answering, ask, calls):
    answering.answer([ask(2, (0, 1)), ask(2, (2,))])
    assert calls["generate"] == [(3, 1, 1)]


def test_a_picture_that_was_seen_before_is_not_encoded(answering, ask, calls):
    answering.answer([ask(0)])
    _, batch = answering.answer([ask(0, (1,))])
    assert calls["encoded"] == 1
    assert (batch.seen, batch.new) == (1, 0)


def test_more_questions_than_rows_are_several_calls(answering, ask, calls):
    results, _ = answering.answer([ask(0, (0, 1, 2, 3, 4, 0, 1, 2))])
    assert [count for count, _, _ in calls["generate"]] == [6, 2]
    assert len(results[0]) == 8


def test_settings_are_never_mixed(answering, ask, calls):
    answering.answer([ask(0), ask(0, how=Settings(top_k=2)), ask(0), ask(0, how=Settings(max_new_tokens=2))])
    assert calls["generate"] == [(2, 1, 1), (1, 1, 2), (1, 1, 1)]


def test_top_k_gives_the_beams_of_the_original_the_likeliest_first(answering, ask, tiny, processor):
    ((answers,),), _ = answering.answer([ask(0, how=Settings(top_k=3))])
    inputs = processor(images=PICTURES[0], text=QUESTIONS[0], return_tensors="pt")
    beams = {"num_beams": 3, "num_return_sequences": 3}
    expected = processor.batch_decode(tiny.generate(**inputs, **beams, **MOST), skip_special_tokens=True)
    assert sorted(answer.text for answer in answers) == sorted(expected)
    assert [answer.score for answer in answers] == sorted((answer.score for answer in answers), reverse=True)


@pytest.mark.parametrize("limit", [1, 2, 4, 7])
def test_an_answer_without_its_end_is_cut(answering, ask, tiny, processor, limit):
    all_of_them = tuple(range(len(QUESTIONS)))
    (answers,), _ = answering.answer([ask(0, all_of_them, Settings(max_new_tokens=limit))])
    ends = []
    for question in QUESTIONS:
        inputs = processor(images=PICTURES[0], text=question, return_tensors="pt")
        ends.append(tiny.config.text_config.sep_token_id in tiny.generate(**inputs, max_new_tokens=limit)[0, 1:])
    assert [not answer[0].cut for answer in answers] == ends


@pytest.mark.parametrize(
    ("tokens", "how", "sentence"),
    [
        (11, Settings(), "question has 11 tokens; this model was traced for 10: trace it with question_length >= 11"),
        (3, Settings(max_new_tokens=8), "the answer may have 8 new tokens; this model was traced for 7"),
        (3, Settings(top_k=7), "top_k is 7; this model was traced for 6 rows: ask for at most that"),
    ],
)
def test_what_was_not_traced_is_refused_and_harms_no_other(answering, ask, eager, tokens, how, sentence):
    bad = Ask(ask().pixels, ((5,) * tokens,), how)
    results, _ = answering.answer([ask(0), bad, ask(1)])
    assert results[1][0].status == 422
    assert sentence in results[1][0].sentence
    assert [results[0][0][0].text, results[2][0][0].text] == [eager(0, 0)[0], eager(1, 0)[0]]


def test_one_bad_question_of_a_request_harms_no_other(answering, ask, eager):
    good = ask(0, (0, 1))
    bad = Ask(good.pixels, (good.questions[0], (5,) * 11, good.questions[1]))
    ((first, second, third),), _ = answering.answer([bad])
    assert isinstance(second, Failure)
    assert [first[0].text, third[0].text] == [eager(0, 0)[0], eager(0, 1)[0]]


def failing(answering, monkeypatch, fails, error):
    """Let the call of every batch that has a question for which ``fails(token ids)`` fail."""
    generate = answering.compiled.generate

    def sometimes(input_ids, **kwargs):
        if any(fails(tuple(ids.tolist())) for ids in input_ids):
            raise error
        return generate(input_ids=input_ids, **kwargs)

    monkeypatch.setattr(answering.compiled, "generate", sometimes)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (RuntimeError('nrt_execute: status=1003, error message="Numerical errors"'), 500),
        (RuntimeError('nrt_execute: status=1002, error message="Invalid inputs"'), 422),
        (ValueError("something is not as it should be"), 422),
        (RuntimeError("something else"), 500),
    ],
)
def test_an_error_in_a_batch_is_that_of_one_row(answering, ask, eager, monkeypatch, error, status):
    bad = ask(0, (3,))
    failing(answering, monkeypatch, lambda ids: ids[: len(bad.questions[0])] == bad.questions[0], error)
    results, _ = answering.answer([ask(0), bad, ask(1)])
    assert results[1][0].status == status
    assert [results[0][0][0].text, results[2][0][0].text] == [eager(0, 0)[0], eager(1, 0)[0]]


def test_a_picture_that_cannot_be_encoded_fails_alone(answering, ask, eager, monkeypatch):
    encode = answering.compiled.encode_image
    bad = ask(1)

    def sometimes(pixels):
        if torch.equal(pixels, pixels_normalised):
            raise RuntimeError("nrt_execute: status=1003")
        return encode(pixels)

    pixels_normalised = Pixels.of(answering.processor).normalise(bad.pixels)
    monkeypatch.setattr(answering.compiled, "encode_image", sometimes)
    monkeypatch.setattr(answering, "seen", SeenPictures(2**20))
    results, _ = answering.answer([ask(0), bad])
    assert results[0][0][0].text == eager(0, 0)[0]
    assert results[1][0].status == 500
    assert "status 1003" in results[1][0].sentence


def test_nan_in_the_features_of_a_picture_is_that_request_s_failure(answering, ask, eager, monkeypatch):
    poisoned = Ask(torch.full((1, 3, SIZE, SIZE), float("nan")), ask().questions)
    results, _ = answering.answer([ask(0), poisoned])
    assert results[0][0][0].text == eager(0, 0)[0]
    assert results[1][0].status == 500
    assert "NaN" in results[1][0].sentence


@pytest.mark.parametrize("status", sorted(faults.FATAL))
def test_a_fatal_status_of_the_core_is_no_row_s_failure(answering, ask, monkeypatch, status):
    failing(answering, monkeypatch, lambda ids: True, RuntimeError(f"nrt_execute: status={status}"))
    with pytest.raises(CoreLost, match=str(status)):
        answering.answer([ask(0), ask(1)])


# Statuses of the runtime.


@pytest.mark.parametrize(
    ("said", "status"),
    [
        ('nrt_execute: status=1004, error message="Execution was completed with other errors"', 1004),
        ("NRT:nrt_infodump  nrt_execute failed with status code 1202", 1202),
        ("NRTD response code 'NERR_RESOURCE' (7)", 7),
        ("nrt_execute err: 5", 5),
        ("RuntimeError: expected 1202 elements", None),
        ("a picture of status=1202", None),
        ("", None),
    ],
)
def test_the_status_in_a_message(said, status):
    assert status_of(RuntimeError(said)) == status


def test_a_full_queue_is_tried_again_later_each_time():
    waits, left = [], [RuntimeError("nrt_execute: status=7")] * 3

    def call():
        if left:
            raise left.pop()
        return "answered"

    assert on_the_core(call, waits.append) == "answered"
    assert waits == [faults.FIRST_WAIT, 2 * faults.FIRST_WAIT, 4 * faults.FIRST_WAIT]


def test_a_queue_that_stays_full_is_given_up():
    waits = []

    def call():
        raise RuntimeError("nrt_execute: status=7")

    with pytest.raises(RuntimeError, match="status=7"):
        on_the_core(call, waits.append)
    assert len(waits) == faults.TRIES - 1


@pytest.mark.parametrize("status", [1002, 1003, 1006])
def test_what_no_second_try_changes_is_tried_once(status):
    waits = []

    def call():
        raise RuntimeError(f"nrt_execute: status={status}")

    with pytest.raises(RuntimeError):
        on_the_core(call, waits.append)
    assert waits == []


@pytest.fixture
def known(artifact, tiny, processor):
    return known_answer(artifact, tiny, processor)[1]


def test_an_artifact_that_gives_the_known_answer_may_serve(artifact, processor, known):
    assert isinstance(load_known(artifact, processor, 2**20, known), Answering)


def test_an_artifact_that_was_changed_meanwhile_does_not_serve(artifact, processor, known):
    manifest = artifact / "manifest.json"
    manifest.write_text(manifest.read_text() + "\n")
    with pytest.raises(ValueError, match=f"not {known.artifact}: it was changed meanwhile"):
        load_known(artifact, processor, 2**20, known)


def test_an_artifact_for_another_processor_does_not_serve(artifact, processor, known):
    processor = copy.deepcopy(processor)
    processor.image_processor.image_mean = [0.5, 0.5, 0.5]
    with pytest.raises(ValueError, match=r"makes other pixels or tokens than this service's: start it anew"):
        load_known(artifact, processor, 2**20, known)


def test_a_damaged_artifact_is_named_before_anything_starts(artifact, tiny, processor):
    with open(artifact / "text_decoder.pt", "ab") as file:
        file.write(b"damage")
    with pytest.raises(ValueError, match=r"text_decoder.pt was changed after its trace"):
        known_answer(artifact, tiny, processor)


def test_an_artifact_too_short_for_the_known_question_is_named(tiny, processor, tmp_path):
    trace(tiny, tmp_path / "short", BlipShapes(question_length=4, answer_length=8))
    with pytest.raises(ValueError, match=r"has \d+ tokens; .* was traced for 4: trace it for as many"):
        known_answer(tmp_path / "short", tiny, processor)


def test_what_is_served_is_what_was_named_last(tmp_path, known):
    serving, other = Serving(tmp_path / "serving.json", "first", known), dataclasses.replace(known, artifact="other")
    serving.forget()
    assert serving.named() == ("first", known)
    serving.name(tmp_path / "second", other)
    assert serving.named() == (str(tmp_path / "second"), other)
    serving.check(other)
    with pytest.raises(RuntimeError, match=f"this replica has artifact {known.artifact}, and other is served"):
        serving.check(known)
    serving.forget()
    serving.check(known)


def test_an_artifact_that_answers_otherwise_does_not_serve(artifact, processor, known):
    with pytest.raises(RuntimeError, match=r"the known question .* is answered .*, not 'another answer'"):
        load_known(artifact, processor, 2**20, dataclasses.replace(known, answer="another answer"))


@pytest.mark.parametrize(("error", "status"), [(ValueError(), 422), (RuntimeError(), 500), (ValueError("\n"), 422)])
def test_an_exception_without_a_word_is_a_failure_of_its_question_alone(error, status):
    assert failure_of(error).status == status
    assert failure_of(error).sentence
