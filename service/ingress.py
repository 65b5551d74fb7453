"""HTTP: checks, decodes and resizes on the CPU, and hands what is left to a core."""

import asyncio
import functools
import time
from concurrent.futures import ThreadPoolExecutor

import torch
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from ray import serve
from ray.exceptions import RayActorError, RayError
from ray.serve.exceptions import RayServeException
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from blip_inputs import question_tokens
from blip_seen import SeenPictures
from service.admission import Admission, Overloaded
from service.answering import Ask, Failure, Settings, pixels_of
from service.bodies import (
    MAX_QUESTION,
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
from service.metrics import IngressMetrics

QUESTIONS_KEPT = 4096  # token ids of questions: the same ones come again and again

api = FastAPI(
    title="BLIP visual question answering",
    description="Questions about pictures, in the form of Hugging Face's task *visual question answering*. "
    'Errors are `{"error": sentence}`. Where the time went stands in the header `Server-Timing`, in milliseconds.',
    version="1",
)


api_schemas = {}


def body_of(kind):
    """The schema of a body that is read by `service.bodies`, for the documentation."""
    schema = kind.model_json_schema(ref_template="#/components/schemas/{model}")
    api_schemas.update(schema.pop("$defs", {}) | {kind.__name__: schema})
    reference = {"$ref": f"#/components/schemas/{kind.__name__}"}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": reference}}}}


def refused(error):
    headers = {"Retry-After": str(error.retry_after)} if isinstance(error, Overloaded) else None
    return JSONResponse({"error": str(error)}, error.status, headers)


class WithoutRedirect:
    """``POST /vqa`` means ``/vqa/``: without this Starlette would redirect, and the client send the picture twice."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        if scope["type"] == "http" and scope["path"] == scope.get("root_path"):
            scope = {**scope, "path": scope["path"] + "/"}
        await self.app(scope, receive, send)


def openapi(original=api.openapi):
    """FastAPI's own schema, and those of the bodies that it does not read itself."""
    schema = original()
    schema.setdefault("components", {}).setdefault("schemas", {}).update(api_schemas)
    return schema


@api.exception_handler(HTTPException)
def no_such_address(request, error):
    """404 and 405, as a sentence like the others."""
    sentence = f"{request.method} {request.url.path} is {error.detail.lower()}: GET /docs says what there is"
    return refused(Refusal(error.status_code, sentence))


api.add_middleware(WithoutRedirect)
api.openapi = openapi


def too_long(question):
    return Failure(422, f"question has {len(question)} characters; {MAX_QUESTION} are read: ask something shorter")


def what_ray_says(error):
    """What to tell a client of an exception of Ray's."""
    if isinstance(error, RayActorError):
        return f"the replica that had this request ended ({type(error).__name__}): ask again"
    cause = getattr(error, "cause", None) or error
    said = (str(cause).strip().splitlines() or [""])[-1]
    return f"the service failed ({type(cause).__name__}: {said}): ask again"


def described(answer, artifact):
    return {"score": answer.score, "answer": answer.text, "cut": answer.cut, "artifact": artifact}


@serve.deployment(max_ongoing_requests=1000, ray_actor_options={"num_cpus": 1}, graceful_shutdown_timeout_s=20)
@serve.ingress(api)
class Ingress:
    """Where requests come in.

    Parameters
    ----------
    answerer : DeploymentHandle
    processor : BlipProcessor
    most : int
        How many requests may be under way here; more are refused with 503.
    seen_bytes : int
        What the resized pixels of pictures that were seen before may take; those of 384 x 384 have 0.44 MB.
    """

    def __init__(self, answerer, processor, most, seen_bytes):
        torch.set_num_threads(1)
        self._answerer, self._processor = answerer, processor
        self._admission = Admission(most)
        self._pictures = SeenPictures(seen_bytes)
        # Pillow decodes and resizes without Python's lock: two threads, so that a large picture holds up nobody.
        self._decoding = ThreadPoolExecutor(2, thread_name_prefix="decoding")
        self._metrics = IngressMetrics()
        self._tokens = functools.lru_cache(QUESTIONS_KEPT)(self._tokens)

    @api.post("/", openapi_extra=body_of(VisualQuestionAnswering), summary="A question about a picture")
    async def visual_question_answering(self, request: Request):
        """Returns a list of `{"answer", "score", "cut", "artifact"}`, the likeliest first: `score` is the probability
        of the answer, `cut` says whether it ended at a limit of tokens, `artifact` which compiled model gave it."""

        def one(results, artifact):
            (result,) = results
            if isinstance(result, Failure):
                raise Refusal(result.status, result.sentence)
            return [described(answer, artifact) for answer in result]

        return await self._respond(request, VisualQuestionAnswering, one)

    @api.post("/questions", openapi_extra=body_of(Questions), summary="Several questions about one picture")
    async def questions(self, request: Request):
        """Returns `{"answers": [...]}` with, for each question, a list as of one question, or `{"error": sentence}`:
        one question that cannot be answered harms no other."""

        def several(results, artifact):
            return {
                "answers": [
                    {"error": result.sentence}
                    if isinstance(result, Failure)
                    else [described(answer, artifact) for answer in result]
                    for result in results
                ]
            }

        return await self._respond(request, Questions, several)

    @api.get("/health", summary="Whether a core answers")
    async def health(self):
        """Asks the known question of one replica; 503 if it answers otherwise."""
        try:
            await self._answerer.check_health.remote()
        except (RayError, RayServeException) as error:
            return refused(Refusal(503, what_ray_says(error)))
        return {"status": "ok"}

    async def _respond(self, request, kind, response_of):
        """Read a request, answer it, and count what became of it."""
        outcome = "failed"
        try:
            with self._admission():
                check_headers(request.headers)
                asked = read_body(await whole_body(request.stream()), kind)
                encoded, questions = asked.picture_and_questions()
                results, artifact, seconds = await self.ask(picture_bytes(encoded), questions, asked.parameters)
                response = response_of(results, artifact)
            self._metrics.split(seconds)
            outcome = "answered"
            timing = ", ".join(f"{part};dur={1e3 * spent:.2f}" for part, spent in seconds.items())
            return JSONResponse(response, headers={"Server-Timing": timing})
        except Overloaded as error:
            outcome = "overloaded"
            return refused(error)
        except Refusal as error:
            outcome = "refused" if error.status < 500 else "failed"
            return refused(error)
        except (RayError, RayServeException) as error:
            return refused(Refusal(503 if isinstance(error, RayServeException) else 500, what_ray_says(error)))
        except (ClientDisconnect, asyncio.CancelledError):
            outcome = "left"  # or took longer than Serve allows
            raise
        finally:
            self._metrics.request(outcome)

    async def ask(self, content, questions, parameters):
        """Answer questions about the bytes of a picture's file.

        Returns
        -------
        results : list
            For each question a list of `service.answering.Answer`, or a `service.answering.Failure`.
        artifact : str
        seconds : dict of str to float

        Raises
        ------
        Refusal
        """
        settings = Settings(parameters.top_k or 1, parameters.max_new_tokens)
        check_amount(questions, settings.top_k)
        tokens = [
            self._tokens(question) if len(question) <= MAX_QUESTION else too_long(question) for question in questions
        ]
        good = tuple(each for each in tokens if not isinstance(each, Failure))
        if not good:
            return tokens, "", {}
        start = time.perf_counter()
        loop = asyncio.get_running_loop()
        pixels = await loop.run_in_executor(self._decoding, self._pictures.features, content, self._pixels)
        picture = time.perf_counter() - start
        answered, artifact, seconds = await self._answerer.remote(Ask(pixels, good, settings))
        answered = iter(answered)
        results = [each if isinstance(each, Failure) else next(answered) for each in tokens]
        return results, artifact, {"picture": picture, **seconds}

    def _tokens(self, question):
        """The token ids of a question; a `Failure` where it is none."""
        try:
            return tuple(question_tokens(self._processor, question))
        except ValueError as error:
            return Failure(422, str(error))

    def _pixels(self, content):
        check_picture(content)
        try:
            return pixels_of(self._processor, content)
        except ValueError as error:
            raise Refusal(422, str(error)) from None
