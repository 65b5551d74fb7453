"""What a request may hold: everything else is refused with a status and a sentence, before anything is computed."""

import asyncio
import base64
import io
import json
import pickle
import struct
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from service import bodies
from service.admission import Admission, Overloaded
from service.bodies import (
    Questions,
    Refusal,
    VisualQuestionAnswering,
    check_amount,
    check_headers,
    check_picture,
    picture_bytes,
    read_body,
    whole_body,
)


def file_of(size=(8, 8), kind="png", mode="RGB"):
    Image.new(mode, size).save(content := io.BytesIO(), kind)
    return content.getvalue()


def bomb(width, height):
    """A PNG whose header promises many pixels, in 60 bytes."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


PICTURE = base64.b64encode(file_of()).decode()
AS_THE_CLIENT_SENDS_IT = {"inputs": PICTURE, "parameters": {}, "question": "what is it?", "image": PICTURE}


def test_the_body_of_hugging_face_s_client():
    asked = read_body(json.dumps(AS_THE_CLIENT_SENDS_IT).encode(), VisualQuestionAnswering)
    assert asked.picture_and_questions() == (PICTURE, ["what is it?"])
    assert asked.parameters.top_k is None


def test_the_body_of_the_task_s_page():
    given = {"inputs": {"image": PICTURE, "question": "what is it?"}, "parameters": {"top_k": 2}}
    asked = read_body(json.dumps(given).encode(), VisualQuestionAnswering)
    assert asked.picture_and_questions() == (PICTURE, ["what is it?"])
    assert asked.parameters.top_k == 2


REFUSED = {
    "no JSON": (b"{", 400, "the body is no JSON"),
    "no UTF-8": (b"\xff\xfe\x00", 400, "the body is no JSON"),
    "nested too deep": (b"[" * 100_000, 400, "the body is no JSON"),
    "a list": (b"[]", 422, "the body is a list: send an object with inputs"),
    "nothing": (b"{}", 422, "inputs is missing"),
    "a list of inputs": (b'{"inputs": []}', 422, "inputs is a list: send one picture a request"),
    "a number as picture": (b'{"inputs": 3, "question": "a"}', 422, "inputs"),
    "no question": ({"inputs": PICTURE}, 422, "question is missing: ask something"),
    "a question that is a list": ({"inputs": PICTURE, "question": ["a"]}, 422, "question is ['a']"),
    "two pictures": ({"inputs": PICTURE, "question": "a", "image": "other"}, 422, "inputs and image are two pictures"),
    "both forms": ({"inputs": {"image": PICTURE, "question": "a"}, "question": "a"}, 422, "leave question and image"),
    "an unknown field": ({**AS_THE_CLIENT_SENDS_IT, "stream": True}, 422, "stream is unknown: there are inputs"),
    "an unknown parameter": (
        {**AS_THE_CLIENT_SENDS_IT, "parameters": {"temperature": 2}},
        422,
        "parameters.temperature is unknown: there are top_k, max_new_tokens",
    ),
    "top_k 0": ({**AS_THE_CLIENT_SENDS_IT, "parameters": {"top_k": 0}}, 422, "parameters.top_k is 0"),
    "top_k a text": ({**AS_THE_CLIENT_SENDS_IT, "parameters": {"top_k": "2"}}, 422, "parameters.top_k is '2'"),
    "top_k a truth": ({**AS_THE_CLIENT_SENDS_IT, "parameters": {"top_k": True}}, 422, "parameters.top_k is True"),
    "max_new_tokens NaN": (
        json.dumps({**AS_THE_CLIENT_SENDS_IT, "parameters": {"max_new_tokens": float("nan")}}).encode(),
        422,
        "parameters.max_new_tokens is nan",
    ),
    "half a character as a name": (b'{"\\ud800": 1, "inputs": "a"}', 422, r"a name in the body is '\ud800'"),
    "a long name": ({"a" * 10_000: 1, "inputs": "a"}, 422, "a..."),
    "an object without a question": ({"inputs": {"image": "a"}}, 422, "inputs.question is missing"),
    "an object with more": (
        {"inputs": {"image": "a", "question": "b", "text": "c"}},
        422,
        "inputs.text is unknown: there are image, question",
    ),
    "an object with a number": ({"inputs": {"image": "a", "question": 1}}, 422, "inputs.question is 1: input should"),
    "parameters a list": ({**AS_THE_CLIENT_SENDS_IT, "parameters": []}, 422, "parameters is []"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_body_that_is_refused(case):
    body, status, sentence = REFUSED[case]
    with pytest.raises(Refusal) as refused:
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        read_body(body, VisualQuestionAnswering).picture_and_questions()
    assert refused.value.status == status
    assert sentence in str(refused.value)
    assert "\n" not in str(refused.value)
    str(refused.value).encode()
    assert len(str(refused.value)) < 500


@pytest.mark.parametrize(
    ("questions", "sentence"),
    [([], "questions is []"), (["a"] * 65, "at most 64"), ("a", "questions is 'a'"), ([1], "questions.0 is 1")],
)
def test_several_questions_that_are_refused(questions, sentence):
    with pytest.raises(Refusal, match=sentence.replace("[", r"\[")):
        read_body(json.dumps({"image": PICTURE, "questions": questions}).encode(), Questions)


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inside: st.lists(inside, max_size=3) | st.dictionaries(st.text(max_size=5), inside, max_size=3),
    max_leaves=8,
)
fields = st.sampled_from(["inputs", "question", "image", "parameters", "questions", "top_k"])


@given(st.dictionaries(fields, anything, max_size=4), st.sampled_from([VisualQuestionAnswering, Questions]))
def test_any_json_is_read_or_refused_with_a_sentence(body, kind):
    try:
        asked = read_body(json.dumps(body).encode(), kind)
        asked.picture_and_questions()
    except Refusal as refused:
        assert 400 <= refused.status < 500
        assert 0 < len(str(refused).splitlines()[0]) == len(str(refused)) < 400


@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused_with_a_sentence(body):
    with pytest.raises(Refusal):
        read_body(body, VisualQuestionAnswering)


@pytest.mark.parametrize("encoded", ["not base64!", "http://169.254.169.254/", "file:///etc/passwd", "", "data:,x"])
def test_what_is_no_base64_is_refused_and_nothing_is_fetched(encoded):
    with pytest.raises(Refusal) as refused:
        picture_bytes(encoded)
    assert refused.value.status == 422


def test_a_data_url_is_its_bytes():
    assert picture_bytes(f"data:image/png;base64,{PICTURE}") == file_of()


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "gif", "bmp", "tiff"])
def test_pictures_that_are_taken(kind):
    check_picture(file_of(kind=kind))


@pytest.mark.parametrize(
    ("content", "status"),
    [
        (b"abc", 422),
        (file_of()[:20], 422),
        (file_of(kind="eps"), 422),
        (file_of(kind="ppm"), 422),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", 422),
        (bomb(10_000, 10_000), 413),
        (bomb(60_000, 60_000), 413),
        (bomb(2**31 - 1, 2**31 - 1), 413),
    ],
    ids=["text", "truncated", "EPS", "PPM", "SVG", "100 MP", "3,600 MP", "larger than Pillow's limit"],
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_pictures_that_are_refused_before_they_are_decoded(content, status):
    with pytest.raises(Refusal) as refused:
        check_picture(content)
    assert refused.value.status == status
    assert "send" in str(refused.value)


@given(st.binary(max_size=100), st.integers(0, 60))
def test_damaged_files_are_a_refusal(noise, at):
    content = file_of()
    content = content[:at] + noise + content[at + len(noise) :]
    try:
        check_picture(content)
    except Refusal as refused:
        assert refused.status in (413, 422)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"content-type": "text/plain"}, 415),
        ({}, 415),
        ({"content-type": "application/json", "content-length": str(2**40)}, 413),
    ],
)
def test_headers_that_are_refused(headers, status):
    with pytest.raises(Refusal) as refused:
        check_headers(headers)
    assert refused.value.status == status


def test_a_body_without_a_length_is_refused_as_soon_as_it_is_too_large(monkeypatch):
    monkeypatch.setattr(bodies, "MAX_BODY", 10)
    arrived = []

    async def stream():
        for part in (b"12345", b"67890", b"1", b"never read"):
            arrived.append(part)
            yield part

    with pytest.raises(Refusal, match="11 bytes"):
        asyncio.run(whole_body(stream()))
    assert len(arrived) == 3


def test_a_body_that_does_not_arrive_is_refused_and_gives_its_place_back(monkeypatch):
    monkeypatch.setattr(bodies, "SECONDS_TO_ARRIVE", 0.01)

    async def stream():
        yield b"{"
        await asyncio.sleep(60)

    with pytest.raises(Refusal, match="there were 1 bytes of the body") as refused:
        asyncio.run(whole_body(stream()))
    assert refused.value.status == 408


@pytest.mark.parametrize(("questions", "top_k", "taken"), [(64, 1, True), (8, 8, True), (13, 5, False), (64, 8, False)])
def test_answers_of_one_request_are_bounded(questions, top_k, taken):
    if taken:
        check_amount(["what?"] * questions, top_k)
    else:
        with pytest.raises(Refusal, match=f"are {questions * top_k} answers: ask for 64"):
            check_amount(["what?"] * questions, top_k)


def test_places_are_given_back_however_a_request_ends():
    admission = Admission(2)
    with pytest.raises(KeyError), admission():
        raise KeyError
    with admission(), admission():
        with pytest.raises(Overloaded, match="2 requests are under way") as refused, admission():
            pass
        assert refused.value.status == 503
        assert refused.value.retry_after == 1
    assert admission.inside == 0


@pytest.mark.parametrize("refusal", [Refusal(422, "a sentence"), Refusal(413, "long " * 100), Overloaded(16)])
def test_a_refusal_says_the_same_in_another_process(refusal):
    arrived = pickle.loads(pickle.dumps(refusal))
    assert isinstance(arrived, Refusal)
    assert (arrived.status, str(arrived)) == (refusal.status, str(refusal))
