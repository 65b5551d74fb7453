"""The service as its clients meet it: on Ray Serve, with declared cores, and nothing left when it ends."""

import base64
import dataclasses
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
import ray
import requests
from huggingface_hub import InferenceClient
from huggingface_hub.errors import HfHubHTTPError
from PIL import Image
from pydantic import ValidationError
from ray import serve

from blip_helpers import BlipShapes, infer, load_blip, trace
from models.scenes import examples
from service.app import VqaArguments
from service.artifacts import artifact_hash, known_answer
from service.reloading import change_over, uninterrupted
from service.running import check_port, start_serve, started

ROOT = Path(__file__).parents[1]
ASKED = list(examples("held-out", 24, start=100))
MOST = {"max_new_tokens": 23}


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def png(image):
    image.save(content := io.BytesIO(), "png")
    return content.getvalue()


@pytest.fixture(scope="module")
def bundled():
    return load_blip()


@pytest.fixture(scope="module")
def expected(bundled):
    """What the original answers, with probabilities."""
    return [infer(*bundled, asked.question, asked.image, return_scores=True, **MOST) for asked in ASKED]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("service") / "bundled"


@pytest.fixture(scope="module")
def metrics_port():
    return free_port()


@pytest.fixture(scope="module")
def address(directory, metrics_port):
    arguments = VqaArguments(directory=str(directory), replicas=2)
    before = set(psutil.Process().children(recursive=True))  # another file's, such as the process that lowers
    with started(arguments, port=free_port(), metrics_port=metrics_port) as address:
        yield address
        family = set(psutil.Process().children(recursive=True))  # afterwards what was left would be nobody's child
    _, alive = psutil.wait_procs(family - before, timeout=20)
    assert [process.cmdline() for process in alive if process.status() != psutil.STATUS_ZOMBIE] == []


@pytest.fixture(scope="module")
def client(address):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)  # which conftest.py sets: this is no hub
        yield InferenceClient(f"{address}/vqa")


def post(address, path="/vqa", **how):
    return requests.post(address + path, timeout=60, **how)


def body(number=0, **more):
    picture = base64.b64encode(png(ASKED[number].image)).decode()
    return {"inputs": picture, "question": ASKED[number].question, "parameters": {}, "image": picture, **more}


def running_replicas():
    """How many replicas answer, as Serve says."""
    states = serve.status().applications["vqa"].deployments["Answerer"].replica_states
    return states.get("RUNNING", 0)


def replicas():
    """The processes that hold a core."""
    processes = psutil.Process().children(recursive=True)
    return [
        p for p in processes if p.is_running() and p.name().startswith("ray::") and "Answerer" in " ".join(p.cmdline())
    ]


def test_hugging_face_s_client_gets_the_original_s_answers(client, expected):
    def ask(asked):
        return client.visual_question_answering(image=png(asked.image), question=asked.question)

    with ThreadPoolExecutor(8) as clients:
        answers = list(clients.map(ask, ASKED))
    assert [answer[0].answer for answer in answers] == [text for text, _ in expected]
    assert [answer[0].score for answer in answers] == pytest.approx([score for _, score in expected], abs=1e-4)
    assert {len(answer[0].artifact) for answer in answers} == {12}
    assert {answer[0].cut for answer in answers} == {False}


def test_top_k_of_the_client(client):
    answers = client.visual_question_answering(image=png(ASKED[0].image), question=ASKED[0].question, top_k=3)
    assert len({answer.answer for answer in answers}) == 3
    assert [answer.score for answer in answers] == sorted((answer.score for answer in answers), reverse=True)


def test_the_client_hears_the_sentence_of_a_refusal(client):
    with pytest.raises(HfHubHTTPError, match="question has 42 tokens; this model was traced for 16"):
        client.visual_question_answering(image=png(ASKED[0].image), question="what " * 40)


def test_many_questions_about_one_picture(address, bundled):
    questions = ["how many shapes?", "", "is there a red circle?", "what " * 40]
    picture = body()["inputs"]
    response = post(address, "/vqa/questions", json={"image": picture, "questions": questions})
    first, empty, third, long = response.json()["answers"]
    assert [first[0]["answer"], third[0]["answer"]] == [
        infer(*bundled, question, ASKED[0].image, **MOST) for question in (questions[0], questions[2])
    ]
    assert empty["error"] == "question '' is empty: ask something"
    assert "42 tokens" in long["error"]


def test_where_the_time_went_is_said(address):
    timing = post(address, json=body()).headers["Server-Timing"]
    assert re.findall(r"(\w+);dur=\d+\.\d\d", timing) == ["picture", "queue", "batch", "device", "decoding"]


def truncated():
    Image.effect_noise((300, 300), 50).save(content := io.BytesIO(), "jpeg")
    return base64.b64encode(content.getvalue()[:2000]).decode()


HOSTILE = {
    "no JSON": ({"data": b"{", "headers": {"content-type": "application/json"}}, 400),
    "a form": ({"data": {"a": "b"}}, 415),
    "too large": ({"data": b" " * (33 * 2**20), "headers": {"content-type": "application/json"}}, 413),
    "no picture": ({"json": body(inputs="YWJj", image="YWJj")}, 422),
    "a truncated picture": ({"json": {"inputs": truncated(), "question": "what?"}}, 422),
    "a URL": ({"json": body(inputs="http://127.0.0.1/", image=None)}, 422),
    "an empty question": ({"json": body(question=" ")}, 422),
    "half a character": ({"json": body(question="\ud83d")}, 422),
    "an unknown parameter": ({"json": body(parameters={"temperature": 1})}, 422),
    "too many beams": ({"json": body(parameters={"top_k": 9})}, 422),
    "a question of a megabyte": ({"json": body(question="what " * 200_000)}, 422),
    "no such address": ({"path": "/vqa/nothing", "json": {}}, 404),
    "too many tokens": ({"json": body(parameters={"max_new_tokens": 24})}, 422),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_request_gets_a_sentence_and_harms_no_other(address, expected, case):
    how, status = HOSTILE[case]
    with ThreadPoolExecutor(3) as clients:
        before, hostile, after = (
            clients.submit(post, address, **each) for each in ({"json": body(1)}, how, {"json": body(2)})
        )
    assert hostile.result().status_code == status
    assert 10 < len(hostile.result().json()["error"]) < 410
    assert before.result().json()[0]["answer"] == expected[1][0]
    assert after.result().json()[0]["answer"] == expected[2][0]


def test_overload_is_refused_at_once_and_what_is_taken_is_answered(address, expected):
    with ThreadPoolExecutor(150) as clients:
        responses = list(clients.map(lambda i: post(address, json=body(i % len(ASKED))), range(600)))
    refused = [response for response in responses if response.status_code == 503]
    assert refused
    assert {response.headers["Retry-After"] for response in refused} == {"1"}
    assert {"try again in 1 s" in response.json()["error"] for response in refused} == {True}
    for i, response in enumerate(responses):
        if response.status_code != 503:
            assert response.json()[0]["answer"] == expected[i % len(ASKED)][0]


def test_a_client_that_leaves_frees_its_place(address):
    host, port = address.removeprefix("http://").split(":")
    for _ in range(100):  # more than may be under way
        with socket.create_connection((host, int(port))) as left:
            left.sendall(
                b"POST /vqa HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: 9999\r\n\r\n{"
            )
    deadline = time.time() + 10
    while (response := post(address, json=body())).status_code == 503 and time.time() < deadline:
        time.sleep(0.1)
    assert response.status_code == 200


def test_a_schema_and_its_page(address):
    schema = requests.get(f"{address}/vqa/openapi.json", timeout=60).json()
    assert {"/", "/questions", "/health"} <= set(schema["paths"])
    assert {"VisualQuestionAnswering", "Questions", "Parameters"} <= set(schema["components"]["schemas"])
    assert requests.get(f"{address}/vqa/health", timeout=60).json() == {"status": "ok"}


@pytest.fixture(scope="module")
def another(bundled, tmp_path_factory):
    """The same model, traced for other shapes."""
    directory = tmp_path_factory.mktemp("another") / "shapes"
    trace(bundled[0], directory, BlipShapes(batch_size=4, question_length=48))
    return directory


def test_a_damaged_or_foreign_artifact_never_takes_the_place_of_a_working_one(address, another, bundled, tmp_path):
    shutil.copytree(another, tmp_path / "damaged")
    _, known = known_answer(another, *bundled)
    with open(tmp_path / "damaged" / "text_decoder.pt", "r+b") as file:
        file.seek(1000)
        file.write(b"damage")
    with pytest.raises(ValueError, match=r"is not taken, the service goes on as it was: .*text_decoder"):
        change_over(tmp_path / "damaged", known)
    with pytest.raises(ValueError, match=r"makes other pixels or tokens"):
        change_over(another, dataclasses.replace(known, processor="of another model"))
    with pytest.raises(ValueError, match=r"the known question .* is answered"):
        change_over(another, dataclasses.replace(known, answer="another answer"))
    assert post(address, json=body()).json()[0]["artifact"] != known.artifact


def test_a_new_artifact_takes_over_without_a_gap(address, another, bundled, expected):
    _, known = known_answer(another, *bundled)
    stop = []

    def ask_on():
        answers = []
        while not stop:
            answers.append(post(address, json=body(len(answers) % len(ASKED))))
        return answers

    with ThreadPoolExecutor(2) as clients:
        asking = [clients.submit(ask_on) for _ in range(2)]
        try:
            said = change_over(another, known)
        finally:
            stop.append(True)
    assert said == f"2 replicas answer from {another} now (artifact {known.artifact})"
    for responses in (each.result() for each in asking):
        assert [response.json()[0]["answer"] for response in responses] == [
            expected[i % len(ASKED)][0] for i in range(len(responses))
        ]
    assert {post(address, json=body()).json()[0]["artifact"] for _ in range(8)} == {known.artifact}
    assert post(address, json=body(question="what " * 40)).status_code == 200  # which it was traced for


def test_a_replica_that_is_killed_is_replaced_and_serves_what_was_served(address, another, bundled, expected):
    _, known = known_answer(another, *bundled)
    change_over(another, known)
    before = replicas()
    assert len(before) == 2
    before[0].send_signal(signal.SIGKILL)
    for i in range(50):
        response = post(address, json=body(i % len(ASKED)))
        if response.status_code != 200:
            assert "ask again" in response.json()["error"]
            response = post(address, json=body(i % len(ASKED)))
        assert response.json()[0]["answer"] == expected[i % len(ASKED)][0]
    deadline = time.time() + 40
    while len(replicas()) < 2 and time.time() < deadline:
        time.sleep(0.2)
    assert len(replicas()) == 2
    assert {post(address, json=body()).json()[0]["artifact"] for _ in range(20)} == {known.artifact}


def test_the_command_exchanges_the_artifact(address, directory):
    deadline = time.time() + 60  # the one that was killed above may be starting still
    while running_replicas() < 2 and time.time() < deadline:
        time.sleep(0.2)
    as_a_user = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    # Other tests may have a service on this machine meanwhile.
    where = as_a_user | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address, "RAY_AUTH_MODE": "token"}
    command = [sys.executable, "blip.py", "reload", str(directory)]
    done = subprocess.run(command, cwd=ROOT, env=where, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"2 replicas answer from {directory} now" in done.stdout and done.stderr == ""
    artifact = artifact_hash(directory)
    assert {post(address, json=body()).json()[0]["artifact"] for _ in range(8)} == {artifact}


def test_what_the_dashboard_shows_is_counted(address, metrics_port):
    """Ray exports every ten seconds."""
    dashboard = json.loads((ROOT / "deploy" / "grafana.json").read_text())
    expressions = " ".join(target["expr"] for panel in dashboard["panels"] for target in panel["targets"])
    shown = set(re.findall(r"\bray_\w+", expressions))
    assert post(address, json=body()).status_code == 200
    deadline, counted = time.time() + 60, set()
    while not shown <= counted and time.time() < deadline:
        time.sleep(0.5)
        text = requests.get(f"http://127.0.0.1:{metrics_port}/metrics", timeout=10).text
        counted = set(re.findall(r"^(ray_\w+)", text, re.M))
    assert shown and shown <= counted
    for label in set(re.findall(r"by \(([^)]*)\)", expressions)):
        for name in label.split(", "):
            assert f'{name}="' in text, name


def test_the_command_ends_with_ctrl_c_and_leaves_no_process(directory, address):
    port = free_port()
    command = [sys.executable, "blip.py", "serve", str(directory), "--port", str(port)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    said = ""
    try:
        while "to end it" not in said and (line := process.stdout.readline()):
            said += line
        assert "to end it" in said
        assert post(f"http://127.0.0.1:{port}", json=body()).status_code == 200
        family = psutil.Process(process.pid).children(recursive=True)
        assert family
        process.send_signal(signal.SIGINT)
        said += process.communicate(timeout=60)[0]
    finally:
        process.kill()
    assert process.returncode == 0, said
    _, alive = psutil.wait_procs(family, timeout=10)
    assert alive == []


def test_a_service_is_not_started_on_a_damaged_artifact_and_none_is_reloaded(another, tmp_path):
    shutil.copytree(another, tmp_path / "damaged")
    with open(tmp_path / "damaged" / "text_decoder.pt", "ab") as file:
        file.write(b"damage")
    for command in ("serve", "reload"):
        done = subprocess.run(
            [sys.executable, "blip.py", command, str(tmp_path / "damaged")], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 2
        assert "text_decoder.pt was changed after its trace" in done.stderr and "Traceback" not in done.stderr


def test_ctrl_c_does_not_interrupt_a_change_over():
    before = signal.getsignal(signal.SIGINT)
    with uninterrupted():
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
    assert signal.getsignal(signal.SIGINT) is before
    with ThreadPoolExecutor(1) as elsewhere:  # as in a notebook
        assert elsewhere.submit(uninterrupted().__enter__).result() is None


def test_proxies_that_need_more_than_a_minute_are_waited_for(monkeypatch):
    calls = []

    def start(**options):
        calls.append(options["http_options"])
        if len(calls) == 1:
            raise TimeoutError("HTTP proxies not available after 60s.")

    monkeypatch.setattr("service.running.serve.start", start)
    start_serve(http_options={"port": 8000})
    assert calls == [{"port": 8000}] * 2


@pytest.mark.parametrize("port", [1, 65_536])
def test_a_port_that_cannot_be_used_is_named(port, monkeypatch):
    def denied(self, address):
        raise PermissionError(13, "Permission denied")

    if port == 1:  # root may use it
        monkeypatch.setattr(socket.socket, "bind", denied)
    with pytest.raises(
        RuntimeError, match=f"port {port} of 127.0.0.1 cannot be used .*: choose another --metrics-port"
    ):
        check_port("127.0.0.1", port, "--metrics-port")


@pytest.mark.parametrize("name", ["replicas", "ingresses", "seen_bytes"])
def test_a_configuration_with_none_of_what_it_needs_is_refused(name):
    with pytest.raises(ValidationError, match=rf"{name}\n.*greater than 0"):
        VqaArguments(directory="artifact", **{name: 0})


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--replicas", "0"], "0 is no whole number of at least 1"),
        (["--model", "/nowhere/at/all"], "/nowhere/at/all does not exist"),
    ],
)
def test_the_command_says_what_is_wrong(tmp_path, arguments, sentence):
    command = [sys.executable, "blip.py", "serve", str(tmp_path), *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "RAY_ADDRESS": ""})
    assert done.returncode == 2
    assert sentence in done.stderr
