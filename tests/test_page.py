"""The page of the service: what it says, and, where a Chromium is installed, what a person meets."""

import asyncio
import shutil
import socket

import pytest

from blip_helpers import infer, load_blip
from models.scenes import examples
from service.answering import Answer, Failure
from service.app import VqaArguments
from service.bodies import Refusal
from service.page import answers, questions_of, times, uploaded_only
from service.running import started

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PARTS = {"picture": 0.004, "queue": 0.002, "batch": 0.0, "device": 0.008, "decoding": 0.002}


def test_lines_become_questions():
    assert questions_of("one?\n\n  two?  \r\n") == ["one?", "two?"]


@pytest.mark.parametrize(("text", "sentence"), [(" \n ", "no question yet"), ("a\n" * 65, "65 questions, and 64")])
def test_no_question_and_too_many_are_refused_with_a_sentence(text, sentence):
    with pytest.raises(Refusal, match=sentence):
        questions_of(text)


def test_the_page_fetches_nothing():
    async def keep(path):
        return path

    keep_file = uploaded_only(keep)
    assert asyncio.run(keep_file("/tmp/picture.png")) == "/tmp/picture.png"
    assert asyncio.run(keep_file(None)) is None
    for address in ("http://example.com/a.png", "https://example.com/a.png", "a.png"):
        with pytest.raises(Exception, match="fetches nothing"):
            asyncio.run(keep_file(address))


def test_whatever_is_shown_is_text_and_no_markup():
    shown = answers(
        ["<b>?", "<script>"],
        [[Answer("<i>", 0.5, True)], Failure(422, "no <script> here")],
        "0123456789ab",
        PARTS,
    )
    assert "&lt;b&gt;?" in shown and "&lt;i&gt; … (cut at the limit)" in shown and "no &lt;script&gt; here" in shown
    assert "<script>" not in shown and "<i>" not in shown
    assert "50.0 %" in shown and "0123456789ab" in shown


def test_the_time_is_drawn_in_proportion():
    shown = times(PARTS)
    assert "flex: 8.000" in shown and "flex: 4.000" in shown and "in the compiled graphs<b>8.0 ms</b>" in shown
    assert times({}) == ""


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    directory = tmp_path_factory.mktemp("page") / "bundled"
    with started(VqaArguments(directory=str(directory)), port=port, page=True) as address:
        yield address


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed")
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser, address):
    page = browser.new_page(viewport={"width": 1100, "height": 900})
    page.asked_for = []
    page.on("request", lambda request: page.asked_for.append(request.url))
    page.goto(address)
    page.wait_for_selector("#ask")
    page.wait_for_selector("#picture img")
    yield page
    page.close()


@pytest.fixture
def example():
    return next(examples("held-out", 1, start=300))


def ask(page, questions, waits_for):
    page.fill("#questions textarea", questions)
    page.click("#ask")
    page.wait_for_selector(f"#result {waits_for}")


def upload(page, path):
    page.click("#picture button[aria-label='Remove Image']")
    page.set_input_files("#picture input[type=file]", path)
    page.wait_for_selector("#picture img")


def test_an_uploaded_picture_gets_the_original_s_answers(page, example, tmp_path):
    example.image.save(tmp_path / "picture.png")
    upload(page, tmp_path / "picture.png")
    questions = [example.question, "how many shapes are there?"]
    ask(page, "\n".join(questions), "td b")
    cells = page.locator("#result td b").all_inner_texts()
    assert cells == infer(*load_blip(), questions, example.image, max_new_tokens=23)
    assert page.locator("#result .bar span").count() == 5
    assert "artifact" in page.inner_text("#result")


def test_a_scene_comes_with_its_question(page):
    page.click("#scenes button >> nth=2")
    page.wait_for_function("document.querySelector('#questions textarea').value != ''")
    page.click("#ask")
    page.wait_for_selector("#result td b")


def test_errors_are_sentences_in_the_page(page, tmp_path):
    ask(page, " ", ".error")
    assert "There is no question yet" in page.inner_text("#result")
    (tmp_path / "no.png").write_bytes(b"no picture")
    page.click("#picture button[aria-label='Remove Image']")
    page.set_input_files("#picture input[type=file]", tmp_path / "no.png")
    page.wait_for_timeout(500)
    ask(page, "what?", ".error >> text=cannot be read as a picture")
    assert "Traceback" not in page.inner_text("body")


def test_the_description_of_the_api_is_a_link_away(page, address):
    response = page.request.get(f"{address}/docs")
    assert response.ok and "swagger" in response.text().lower()


def test_a_narrow_screen_needs_no_scrolling_sideways(page):
    page.set_viewport_size({"width": 390, "height": 844})
    ask(page, "how many shapes are there?\n" + "what " * 30, "td b")
    page.wait_for_timeout(300)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_nothing_is_fetched_from_elsewhere(page, address):
    ask(page, "how many shapes are there?", "td b")
    assert {url.split("/")[2] for url in page.asked_for if url.startswith("http")} == {address.split("/")[2]}
