"""Measure the service: ``python benchmarks/serve.py`` (after ``pip install -r requirements-bench.txt``).

Everything is on the loopback of one machine: the clients (Locust), the service, and what it is compared with share its
cores. Questions are about pictures of the bundled model's kind, JPEGs of 640 x 480. Every answer is compared with
Hugging Face's own. Where pictures are "different", nothing is kept of those that were seen.

``--parts`` chooses what is measured; `PARTS` below says what each is. Results of parts that were measured before stay
in build/benchmark/serve.json.
"""

import argparse
import base64
import contextlib
import io
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import torch
from compare import BUILD, ROOT, machine
from PIL import Image

from service.running import cluster, free_port, run, started  # isort: skip  (its settings come before Ray)
from host import A_TOKEN, QUESTIONS, Constant
from ray import serve
from transformers import BlipImageProcessorPil, BlipProcessor

from blip_helpers import (
    DECODERS,
    BlipShapes,
    NeuronBlipForQuestionAnswering,
    count_cost,
    infer,
    load_blip,
    parts_to_trace,
    trace,
)
from models.make_base import IMAGE_SIZE, make_model, make_tokenizer
from models.scenes import examples
from service.answerer import Answerer
from service.answering import Answering
from service.app import VqaArguments
from service.artifacts import SHAPES, Known, Serving, known_answer
from service.ingress import Ingress
from service.reloading import change_over

HERE = Path(__file__).parent
PICTURES = 300
MOST = {"max_new_tokens": 23}
SIMULATED, STEPS = BlipShapes(batch_size=4, num_beams=2, question_length=16, answer_length=8), 4
REPLICAS = 2
FEW = 2**16  # bytes of pictures that are kept: the last few. One that all ask about is seen, different ones are not
BECAME = ("answered", "refused", "failed", "wrong")


def jpeg(image, seed):
    """A scene as a camera would have it: 640 x 480 and a little noise."""
    pixels = np.asarray(image.resize((640, 480))) * 0.9
    pixels += np.random.default_rng(seed).integers(0, 24, (480, 640, 1))
    Image.fromarray(pixels.astype("uint8")).save(content := io.BytesIO(), "jpeg", quality=90)
    return content.getvalue()


def single(content, question, right, parameters=None):
    """A request as huggingface_hub sends it."""
    picture = base64.b64encode(content).decode()
    body = {"inputs": picture, "question": question, "parameters": parameters or {}, "image": picture}
    return {"path": "/vqa", "body": json.dumps(body), "right": right}


def several(content, questions, right):
    body = {"image": base64.b64encode(content).decode(), "questions": questions}
    return {"path": "/vqa/questions", "body": json.dumps(body), "right": right}


def hostile(content):
    """A request of each of 23 kinds that should be refused with a sentence."""
    picture = base64.b64encode(content).decode()
    good = {"inputs": picture, "question": "how many shapes?", "parameters": {}}
    bodies = [
        {**good, "inputs": "YWJj"},
        {**good, "inputs": "no base64!"},
        {**good, "inputs": ""},
        {**good, "inputs": picture[: len(picture) // 8 * 4]},
        {**good, "inputs": "http://127.0.0.1/"},
        {**good, "inputs": "file:///etc/passwd"},
        {**good, "inputs": 5},
        {**good, "inputs": [picture]},
        {**good, "question": ""},
        {**good, "question": " \n"},
        {**good, "question": "what " * 100},
        {**good, "question": None},
        {**good, "question": ["a", "b"]},
        {**good, "parameters": {"top_k": 0}},
        {**good, "parameters": {"top_k": 1000}},
        {**good, "parameters": {"max_new_tokens": 10**9}},
        {**good, "parameters": {"temperature": 0.1}},
        {**good, "parameters": []},
        {"question": "what?"},
        {},
    ]
    texts = [json.dumps(body) for body in bodies] + ["{", "[" * 100_000, "null"]
    return [{"path": "/vqa", "body": text, "right": None} for text in texts]


class Bodies:
    """What clients ask, in files, with the answers of Hugging Face's own model."""

    def __init__(self, directory):
        self.directory = Path(directory)
        model, processor = load_blip()
        asked = list(examples("held-out", PICTURES))
        self.contents = [jpeg(example.image, seed) for seed, example in enumerate(asked)]
        questions = [example.question for example in asked]

        def answers(questions, content):
            return infer(model, processor, questions, content, **MOST)

        rights = [answers(question, content) for question, content in zip(questions, self.contents, strict=True)]
        self.asked = list(zip(self.contents, questions, rights, strict=True))
        some = questions[:16]
        of_one = answers(some, self.contents[0])
        self.about_one = [(self.contents[0], question, right) for question, right in zip(some, of_one, strict=True)]
        ways = {
            "different": [single(content, question, [right]) for content, question, right in self.asked],
            "same": [single(self.contents[0], q, [right]) for q, right in zip(some, of_one, strict=True)],
            "hostile": hostile(self.contents[0]),
            "several": [several(content, some, answers(some, content)) for content in self.contents[:60]],
        }
        for name, lines in ways.items():
            self.path(name).write_text("\n".join(map(json.dumps, lines)))

    def path(self, name):
        return self.directory / f"{name}.jsonl"


def load(port, bodies, seconds, clients=None, rate=None, retries=0):
    """Rows of what clients met: so many of them, each asking when it was answered, or a rate of requests a second."""
    users = clients or max(1, round(rate))
    with tempfile.TemporaryDirectory() as directory:
        rows = Path(directory) / "rows.json"
        command = [sys.executable, "-m", "locust", "-f", HERE / "load.py", "--headless", "--only-summary"]
        command += [
            "--host",
            f"http://127.0.0.1:{port}",
            "--users",
            users,
            "--spawn-rate",
            users,
            "--run-time",
            f"{seconds}s",
        ]
        command += [
            "--bodies",
            bodies,
            "--rows",
            rows,
            "--retries",
            retries,
            "--stop-timeout",
            30,
            "--loglevel",
            "ERROR",
        ]
        command += ["--each-second"] if rate else []
        done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
        if not rows.is_file():
            raise RuntimeError(f"Locust measured nothing: {done.stderr.strip()[-500:]}")
        return json.loads(rows.read_text())


def summary(rows, skip=1.0):
    """Of rows, without those of the first second: how many, how fast, and medians of the parts."""
    first = min(row[0] for row in rows) + skip
    rows = [row for row in rows if row[0] >= first]
    span = max(row[0] for row in rows) - first
    became = {
        kind: sum(row[3] == kind for row in rows) for kind in ("answered", "refused", "failed", "wrong", "sentence")
    }
    said = {"a second": became["answered"] / span, **{kind: count for kind, count in became.items() if count}}
    answered = [row for row in rows if row[3] == "answered"]
    if len(answered) >= 2:
        cuts = statistics.quantiles([1e3 * row[1] for row in answered], n=100, method="inclusive")
        said |= {"p50": cuts[49], "p95": cuts[94], "p99": cuts[98]}
        parts = {part for row in answered for part in row[5]}
        said["parts"] = {part: statistics.median(row[5].get(part, 0) for row in answered) for part in sorted(parts)}
    return said


def beside(*arguments, **more):
    """The same while this process does something else: a `Future`."""
    return ThreadPoolExecutor(1).submit(load, *arguments, **more)


@contextlib.contextmanager
def plain(model):
    """The plain FastAPI application, until the ``with`` ends."""
    port = free_port()
    process = subprocess.Popen([sys.executable, HERE / "plain.py", str(model), str(port)])
    try:
        until_answered(port)
        yield port
    finally:
        process.terminate()
        process.wait()


def until_answered(port, seconds=90):
    for _ in range(10 * seconds):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise RuntimeError(f"nothing answers at port {port} after {seconds} s")


@contextlib.contextmanager
def service(directory, **more):
    port = free_port()
    with started(VqaArguments(directory=str(directory), **{"replicas": REPLICAS, **more}), port=port):
        yield port


def direct(directory, asked, seconds):
    """Questions a second of `infer` in a loop, in this process and one thread."""
    _, processor = load_blip()
    compiled = NeuronBlipForQuestionAnswering.from_pretrained(directory)
    torch.set_num_threads(1)
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        content, question, right = asked[count % len(asked)]
        text, _ = infer(compiled, processor, question, content, return_scores=True, **MOST)
        assert text == right, (text, right)
        count += 1
    return {"a second": count / (time.perf_counter() - start)}


def memory(port):
    """Megabytes (PSS) of each process of the service, by name."""
    found = {}
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            name = process.name().partition("ray::")[2] or Path(process.cmdline()[0]).name
            if "Answerer" in name or "Ingress" in name or "haproxy" in name:
                found[f"{name} {process.pid}"] = process.memory_full_info().pss / 1e6
    return found


def replicas():
    """Processes that hold a core."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if process.name().startswith("ray::") and "Answerer" in " ".join(process.cmdline()):
                found.append(process)
    return found


# The parts. Each gets what is given to `main`, and returns what is stored.


def throughput(given):
    """One question about different pictures, and eight clients about the same one: this service, FastAPI with a lock
    around the compiled model, the same around Hugging Face's own, and `infer` in a loop. Three rounds, in turns."""
    rounds = []
    for _ in range(3):
        said = {
            "infer, a loop": {
                "different": direct(given.plain, given.bodies.asked, given.seconds),
                "same": direct(given.plain, given.bodies.about_one, given.seconds),
            }
        }
        for name, model in (("FastAPI and a lock", given.plain), ("FastAPI, a lock, eager", "eager")):
            with plain(model) as port:
                load(port, given.bodies.path("different"), 3, clients=2)
                said[name] = {
                    way: summary(load(port, given.bodies.path(way), given.seconds, clients=8))
                    for way in ("different", "same")
                }
        with service(given.directory, seen_bytes=FEW) as port:
            load(port, given.bodies.path("different"), 4, clients=4)
            ways = {
                way + more: summary(load(port, given.bodies.path(way), given.seconds, clients=clients))
                for way in ("different", "same")
                for more, clients in (("", 8), (", 16 clients", 16))
            }
        said[f"the service, {REPLICAS} replicas"] = ways
        rounds.append(said)
        show({"round": said})
    return rounds


def sweep(given):
    """A rising rate, open loop: how many are answered, how fast, and where the time goes. The knee is the highest rate
    of which 99 % are answered. Then twice the knee for a minute."""
    with service(given.directory, seen_bytes=FEW) as port:
        path = given.bodies.path("different")
        load(port, path, 4, clients=4)
        most = summary(load(port, path, given.seconds, clients=16))["a second"]
        said = {"closed loop, 16 clients": most, "rates": []}
        for share in (0.25, 0.5, 0.625, 0.75, 0.875, 1.0, 1.25):
            rate = round(share * most)
            said["rates"].append({"rate": rate, **summary(load(port, path, given.seconds, rate=rate))})
        good = [row for row in said["rates"] if row.get("answered", 0) >= 0.99 * sum(row.get(k, 0) for k in BECAME)]
        if not good:
            return said
        knee = max(good, key=lambda row: row["rate"])
        before = memory(port)
        twice = summary(load(port, path, given.minute, rate=2 * knee["rate"]))
        after = memory(port)
        said |= {"knee": knee, "twice": {"rate": 2 * knee["rate"], **twice}, "memory": [before, after]}
        said["goodput"] = twice["a second"] / knee["a second"]
        said["p99, times"] = twice["p99"] / knee["p99"]
    return said


def kills(given):
    """Half the knee's rate for a minute, and a replica killed every ten seconds; once more with clients that retry."""
    said = {}
    for retries in (0, 1):
        with service(given.directory, seen_bytes=FEW) as port:
            load(port, given.bodies.path("different"), 4, clients=4)
            killed = []
            asking = beside(port, given.bodies.path("different"), given.minute, rate=given.knee / 2, retries=retries)
            time.sleep(8)
            while not asking.done() and len(killed) < given.minute // 10 - 1:
                victim = random.choice(replicas())
                when = time.time()
                victim.send_signal(signal.SIGKILL)
                while len(found := replicas()) < REPLICAS or victim in found:
                    if time.time() - when > 120:
                        raise RuntimeError("no other process holds the core after 120 s")
                    time.sleep(0.1)
                killed.append((when, time.time() - when))
                time.sleep(max(0, 10 - (time.time() - when)))
            rows = asking.result()
            failed = [row for row in rows if row[3] == "failed"]
            said[f"retries {retries}"] = {
                **summary(rows),
                "killed": len(killed),
                "seconds until another process is there": [spent for _, spent in killed],
                "under way at a kill": [sum(row[0] <= when <= row[0] + row[1] for row in rows) for when, _ in killed],
                "failed within a second of a kill": [
                    sum(abs(row[0] + row[1] - when) < 1 for row in failed) for when, _ in killed
                ],
            }
    return said


def reloads(given):
    """Five times another artifact under load: no request fails."""
    _, processor = model = load_blip()
    other = BUILD / "serve-other"
    trace(model[0], other, BlipShapes(batch_size=2, num_beams=4, question_length=32, answer_length=24))
    known = {path: known_answer(path, model[0], processor)[1] for path in (other, Path(given.directory))}
    with service(given.directory, seen_bytes=FEW) as port:
        load(port, given.bodies.path("different"), 4, clients=4)
        asking = beside(port, given.bodies.path("different"), given.minute, rate=given.knee / 2)
        time.sleep(5)
        spent = []
        for turn in range(5):
            directory = (other, Path(given.directory))[turn % 2]
            start = time.time()
            change_over(directory, known[directory])
            spent.append(time.time() - start)
            time.sleep(3)
        rows = asking.result()
    return {**summary(rows), "seconds of a reload": spent}


def hostile_beside(given):
    """At least 200 hostile requests beside normal load."""
    with service(given.directory, seen_bytes=FEW) as port:
        load(port, given.bodies.path("different"), 4, clients=4)
        asking = {
            name: beside(port, given.bodies.path(name), 30, rate=rate)
            for name, rate in (("different", given.knee / 2), ("hostile", 10))
        }
        rows = {name: each.result() for name, each in asking.items()}
    return {name: summary(found, skip=0) for name, found in rows.items()}


def soak(given):
    """100,000 answers, 16 questions a request, in at most 20 minutes; memory every 20 seconds."""
    answers, said, start = 0, [], time.time()
    with service(given.directory) as port:
        load(port, given.bodies.path("several"), 10, clients=4)
        kinds = dict.fromkeys(BECAME, 0)
        while answers < given.answers and time.time() - start < 1200:
            for row in load(port, given.bodies.path("several"), 20, clients=4):
                kinds[row[3]] += row[4]
                answers += row[4] * (row[3] == "answered")
            said.append({"seconds": time.time() - start, "answers": answers, "MB": memory(port)})
    slopes, half = {}, said[-1]["seconds"] / 2  # until then each process has met all kinds of requests
    for name in said[-1]["MB"]:
        points = [(row["seconds"] / 60, row["MB"][name]) for row in said if name in row["MB"] and row["seconds"] > half]
        slopes[name] = statistics.linear_regression(*zip(*points, strict=True)).slope if len(points) > 2 else None
    return {
        "answers by what became of them": kinds,
        "seconds": time.time() - start,
        "MB a minute in the second half": slopes,
        "memory": said,
    }


class Held(Constant):
    """A graph of full size that returns a constant, and holds its core as long as a NeuronCore would at best: the host
    waits, as for a device."""

    def __init__(self, module, example_inputs, config, times):
        super().__init__(module, example_inputs, config)
        self.seconds = times * count_cost(module, example_inputs).seconds("bf16")

    def forward(self, *inputs):
        time.sleep(self.seconds)
        return self.output


def held_model(times):
    """The cached decoder's graphs of full size, for four questions about a picture and eight rows of answers."""
    with torch.device("meta"):
        model = make_model().eval()
        parts = parts_to_trace(model, SIMULATED, "cached")
    graphs = {name: Held(*part, model.config.text_config, times) for name, part in parts.items()}
    settings = model.text_decoder.generation_config
    return NeuronBlipForQuestionAnswering(model.config, graphs, SIMULATED, settings, DECODERS["cached"][-1])


def simulation(given):
    """Not Inf2: in place of its graphs there are pauses as long as the bound in bf16, times 1 and times 3. The host's
    work is real: HTTP, pictures, batches, ``generate()``. Two replicas, 16 clients, new pictures."""
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    processor = BlipProcessor(BlipImageProcessorPil(size=size), make_tokenizer())
    right = processor.decode([A_TOKEN] * STEPS)
    pictures = [jpeg(example.image, seed) for seed, example in enumerate(examples("held-out", 60))]
    bodies = given.bodies.path("simulation")
    lines = [single(content, QUESTIONS[0], [right], {"max_new_tokens": STEPS}) for content in pictures]
    bodies.write_text("\n".join(map(json.dumps, lines)))
    said = {}
    for times in (1, 3):
        held = {name: module.seconds for name, module in held_model(times).named_modules() if isinstance(module, Held)}

        @serve.deployment(
            num_replicas=REPLICAS,
            max_ongoing_requests=32,
            ray_actor_options={"num_cpus": 1, "resources": {"neuron_cores": 1}},
        )
        class Simulated(Answerer.func_or_class):
            def _load(self, directory, known, times=times):
                return Answering(held_model(times), self._processor, self._seen_bytes)

            async def check_health(self):
                pass

        port = free_port()
        with cluster(REPLICAS, 1, "127.0.0.1", port):
            serving = Serving("/nowhere/serving.json", "/nowhere", Known("", "", "", ""))
            run(Ingress.bind(Simulated.bind(serving, processor, FEW), processor, 64, FEW))
            load(port, bodies, 4, clients=4)
            before = cpu_seconds()
            rows = load(port, bodies, given.seconds, clients=16)
            spent, answered = cpu_seconds() - before, sum(row[3] == "answered" for row in rows)
        found = summary(rows)
        said[f"times {times}"] = {
            **found,
            "seconds of the graphs": held,
            "the host's CPU, ms a question": 1e3 * spent / answered,
        }
    return said


def cpu_seconds():
    """Of all processes of the service together."""
    total = 0.0
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if not any("locust" in word for word in process.cmdline()):
                total += sum(process.cpu_times()[:2])
    return total


PARTS = {
    "throughput": throughput,
    "sweep": sweep,
    "kills": kills,
    "reloads": reloads,
    "hostile": hostile_beside,
    "soak": soak,
    "simulation": simulation,
}
AT_HALF_THE_KNEE = ("kills", "reloads", "hostile")


def show(value):
    def rounded(value):
        if isinstance(value, float):
            return float(f"{value:.4g}")
        if isinstance(value, dict):
            return {key: rounded(each) for key, each in value.items()}
        return [rounded(each) for each in value] if isinstance(value, list) else value

    print(json.dumps(rounded(value), indent=1), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", default=",".join(PARTS), help=f"any of {','.join(PARTS)}")
    parser.add_argument("--seconds", type=int, default=10, help="of a run (10)")
    parser.add_argument("--minute", type=int, default=60, help="of a longer one (60)")
    parser.add_argument("--answers", type=int, default=100_000, help="of the soak (100,000)")
    given = parser.parse_args()
    unknown = set(given.parts.split(",")) - set(PARTS)
    if unknown:
        parser.error(f"--parts has {', '.join(sorted(unknown))}: there are {', '.join(PARTS)}")
    BUILD.mkdir(parents=True, exist_ok=True)
    path = BUILD / "serve.json"
    results = json.loads(path.read_text()) if path.is_file() else {}
    given.directory, given.plain = BUILD / "serve", BUILD / "serve-plain"
    model, _ = load_blip()
    trace(model, given.directory, SHAPES)
    trace(model, given.plain, BlipShapes(question_length=16, answer_length=24))
    with tempfile.TemporaryDirectory() as directory:
        given.bodies = Bodies(directory)
        for name in given.parts.split(","):
            given.knee = results.get("sweep", {}).get("said", {}).get("knee", {}).get("rate", 40)
            print(f"{name}: {PARTS[name].__doc__}", flush=True)
            results[name] = {"date": time.strftime("%Y-%m-%d"), "machine": about(), "said": PARTS[name](given)}
            if name in AT_HALF_THE_KNEE:
                results[name]["asked a second"] = given.knee / 2
            show(results[name]["said"])
            path.write_text(json.dumps(results, indent=1))
    print(f"written: {path.relative_to(ROOT)}")


def about():
    """The machine, and how busy it was before."""
    return {key: value for key, value in machine().items() if key != "tuned"} | {"load before": os.getloadavg()[0]}


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\ninterrupted: what was measured before is in build/benchmark/serve.json")
