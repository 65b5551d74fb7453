"""A page to try the service on, at ``/``: a picture, questions, answers, and where the time went. For one replica."""

import asyncio
import html
import os
import tempfile
from pathlib import Path

import gradio
from fastapi import FastAPI
from fastapi.responses import RedirectResponse
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from models.scenes import examples
from service.answering import Failure
from service.bodies import MAX_BODY, MAX_QUESTIONS, Parameters, Refusal
from service.metrics import PARTS

SCENES = 6
TIMEOUT = 30  # seconds that the service may take
WORDS = {
    "queue": "on the way to a core",
    "batch": "until the core was free",
    "picture": "reading the picture",
    "device": "in the compiled graphs",
    "decoding": "around the graphs",
}
INTRODUCTION = """# Ask a picture
The bundled model is small. It was trained on drawn scenes like the ones below, and knows {kinds}. Of any other picture
it tells you the nearest thing that it knows. [The API](/docs) takes the same questions."""
STYLE = """
:root { --part-0: #4477aa; --part-1: #66ccee; --part-2: #ccbb44; --part-3: #228833; --part-4: #aa3377; }
.gradio-container { max-width: 1000px !important; margin: auto; }
#scenes img, #picture img { image-rendering: pixelated; }
#picture img { width: 100%; height: 100%; object-fit: contain; }
#scenes .grid-wrap { min-height: 0 !important; }
#scenes .grid-container { grid-template-columns: repeat(6, minmax(0, 1fr)) !important; }
#scenes button { aspect-ratio: 1; height: auto !important; min-height: 0; }
.result table { width: 100%; margin: 0; }
.result th, .result td { text-align: left; padding: .4rem .5rem; vertical-align: top; }
.result td:first-child { overflow-wrap: anywhere; }
.result td.number, .result th.number { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
.result .error { border-left: 4px solid #b3261e; padding: .1rem .6rem; margin: 0; }
.result .bar { display: flex; height: 1.1rem; margin: 1rem 0 .6rem; }
.result .bar span { min-width: 1px; }
.result ul { list-style: none; padding: 0; margin: 0; }
.result li { margin: 0; padding: 0; display: flex; align-items: center; }
.result li i { width: .8rem; height: .8rem; margin-right: .5rem; }
.result li b { margin-left: auto; font-weight: normal; font-variant-numeric: tabular-nums; }
.result p.artifact { margin: .8rem 0 0; }
@media (max-width: 700px) {
  #asking { flex-direction: column; }
  #asking > * { min-width: 0 !important; width: 100%; }
}
"""


def file_of(payload):
    """The file as it was uploaded: to decode it, and to refuse it with a sentence, is the service's work."""
    return None if payload is None else payload.path


def uploaded_only(keep):
    """Gradio's way to keep a file, but for addresses, which it would fetch: the page sends none."""

    async def keep_file(path):
        if path is not None and not os.path.isabs(path):
            raise gradio.Error("This service fetches nothing: upload the picture.")
        return await keep(path)

    return keep_file


def questions_of(text):
    """The questions of a text, one a line; a `Refusal` if there is none, or too many."""
    questions = [line.strip() for line in text.splitlines() if line.strip()]
    if not questions:
        raise Refusal(422, "There is no question yet: write one, or several with a line for each.")
    if len(questions) > MAX_QUESTIONS:
        raise Refusal(422, f"There are {len(questions)} questions, and {MAX_QUESTIONS} are answered at once.")
    return questions


def error(sentence):
    return f'<p class="error" role="alert">{html.escape(sentence)}</p>'


def answers(questions, results, artifact, seconds):
    """What was answered, as HTML: a table, a bar of the time, and the artifact."""
    rows = []
    for question, result in zip(questions, results, strict=True):
        asked = f"<td>{html.escape(question)}</td>"
        if isinstance(result, Failure):
            rows.append(f'<tr>{asked}<td colspan="2">{error(result.sentence)}</td></tr>')
            continue
        for answer in result:
            text = html.escape(answer.text) + (" … (cut at the limit)" if answer.cut else "")
            rows.append(f'<tr>{asked}<td><b>{text}</b></td><td class="number">{100 * answer.score:.1f} %</td></tr>')
            asked = "<td></td>"
    head = '<tr><th>question</th><th>answer</th><th class="number">probability</th></tr>'
    table = f"<table><thead>{head}</thead><tbody>{''.join(rows)}</tbody></table>"
    return table + times(seconds) + (f'<p class="artifact">artifact <code>{artifact}</code></p>' if artifact else "")


def times(seconds):
    """A bar whose parts are as long as what they stand for, and what they are."""
    parts = [(number, part, 1e3 * max(seconds[part], 0)) for number, part in enumerate(PARTS) if part in seconds]
    if not parts:
        return ""
    bar = "".join(f'<span style="flex: {spent:.3f}; background: var(--part-{i})"></span>' for i, _, spent in parts)
    legend = "".join(
        f'<li><i style="background: var(--part-{i})"></i>{WORDS[part]}<b>{spent:.1f} ms</b></li>'
        for i, part, spent in parts
    )
    return f'<div class="bar" aria-hidden="true">{bar}</div><ul>{legend}</ul>'


def shown(content):
    return f'<div class="result" aria-live="polite">{content}</div>'


async def ask(path, text, top_k):
    """From a picture's file, lines of questions and a number of answers to HTML; what goes wrong is a sentence."""
    try:
        if path is None:
            raise Refusal(422, "There is no picture yet: choose one below, upload one or paste one.")
        questions = questions_of(text)
        handle = serve.get_deployment_handle("Ingress", "vqa")
        answering = handle.ask.remote(Path(path).read_bytes(), questions, Parameters(top_k=int(top_k)))
        results, artifact, seconds = await asyncio.wait_for(answering, TIMEOUT)
        return shown(answers(questions, results, artifact, seconds))
    except RayError as failure:  # before Refusal: Ray makes one of both, whose text is a traceback
        cause = getattr(failure, "cause", None)
        if not isinstance(cause, Refusal):
            cause = f"The replica that had this question ended ({type(failure).__name__}): ask again."
        return shown(error(str(cause)))
    except Refusal as refusal:
        return shown(error(str(refusal)))
    except TimeoutError:
        return shown(error(f"The service took longer than {TIMEOUT} s: ask again."))
    except (RayServeException, OSError) as failure:
        return shown(error(f"The service cannot be asked ({type(failure).__name__}): is it still running?"))


def blocks():
    """The page, as Gradio has it."""
    scenes = {}
    for scene in examples("held-out", 100):
        scenes.setdefault(scene.kind, scene)  # the first of each kind of question
    scenes = list(scenes.values())[:SCENES]
    temporary = os.environ.get("GRADIO_TEMP_DIR") or tempfile.gettempdir()
    os.makedirs(temporary, exist_ok=True)
    directory = Path(tempfile.mkdtemp(dir=temporary))
    paths = []
    for number, scene in enumerate(scenes):
        scene.image.save(path := directory / f"scene-{number}.png")
        paths.append(str(path))
    with gradio.Blocks(title="Ask a picture", analytics_enabled=False, delete_cache=(600, 3600)) as page:
        gradio.Markdown(INTRODUCTION.format(kinds="shapes, colours, places and numbers"))
        with gradio.Row(elem_id="asking"):
            with gradio.Column():
                picture = gradio.Image(
                    paths[0],
                    type="filepath",
                    sources=["upload", "clipboard"],
                    height=300,
                    label="Picture",
                    elem_id="picture",
                    buttons=[],
                )
                gallery = gradio.Gallery(
                    paths,
                    label="Scenes to choose from",
                    columns=SCENES,
                    show_label=False,
                    allow_preview=False,
                    elem_id="scenes",
                    interactive=False,
                    buttons=[],
                    format="png",
                )
                picture.preprocess = file_of
                picture.async_move_resource_to_block_cache = uploaded_only(picture.async_move_resource_to_block_cache)
            with gradio.Column():
                text = gradio.Textbox(
                    scenes[0].question, lines=4, max_lines=8, label="Questions, a line each", elem_id="questions"
                )
                top_k = gradio.Slider(1, 5, 1, step=1, label="Answers to each question", elem_id="top-k")
                button = gradio.Button("Ask", variant="primary", elem_id="ask")
                result = gradio.HTML(shown(""), elem_id="result")

        def chosen(event: gradio.SelectData):
            return paths[event.index], scenes[event.index].question

        gallery.select(chosen, None, [picture, text], api_visibility="private", show_progress="hidden")
        button.click(ask, [picture, text, top_k], result, api_visibility="private", concurrency_limit=4)
    page.queue(max_size=64)
    return page


def application():
    """The page and a way to the API's description, as an ASGI application."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

    @app.get("/docs")
    def docs():
        return RedirectResponse("/vqa/docs")

    theme = gradio.themes.Base(
        primary_hue="blue", font=("system-ui", "sans-serif"), font_mono=("ui-monospace", "monospace")
    )
    return gradio.mount_gradio_app(
        app, blocks(), "/", theme=theme, css=STYLE, max_file_size=MAX_BODY, footer_links=[], ssr_mode=False, pwa=False
    )


Page = serve.deployment(
    serve.ingress(application)(), name="Page", ray_actor_options={"num_cpus": 0}, max_ongoing_requests=200
)


def page(arguments: dict):
    """The application of the page, which asks the application ``vqa``; `arguments` is empty."""
    return Page.bind()
