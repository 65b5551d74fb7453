"""Clients of a service, for `benchmarks/serve.py`: ``locust -f benchmarks/load.py --headless ...``

Each request of ``--bodies``, lines of JSON, has a path, a body, and the answers that are right; None means that it is
hostile, and should be refused with a sentence. With ``--each-second`` a client asks once a second, whatever the others
do: N clients are N requests a second, as long as an answer takes less. Without it a client asks as soon as it was
answered. A row for each request goes to ``--rows``: when, seconds, status, what became of it, and the time split.
"""

import json
import random
import re
import time
from pathlib import Path

import gevent
from locust import FastHttpUser, constant, constant_throughput, events, task

BODIES, ROWS = [], []
HEADERS = {"Content-Type": "application/json"}


@events.init_command_line_parser.add_listener
def arguments(parser):
    parser.add_argument("--bodies")
    parser.add_argument("--rows")
    parser.add_argument("--each-second", action="store_true")
    parser.add_argument("--retries", type=int, default=0)


@events.init.add_listener
def read(environment, **_):
    BODIES.extend(map(json.loads, Path(environment.parsed_options.bodies).read_text().splitlines()))


@events.quitting.add_listener
def write(environment, **_):
    Path(environment.parsed_options.rows).write_text(json.dumps(ROWS))


def what_became_of(response, right):
    """answered, wrong, refused (503), sentence (what a hostile request should get), or failed"""
    try:
        said = response.json()
        if right is None:
            return "sentence" if 400 <= response.status_code < 500 and said["error"] else "failed"
        if response.status_code == 200:
            answers = said["answers"] if isinstance(said, dict) else [said]
            return "answered" if [answer[0]["answer"] for answer in answers] == right else "wrong"
    except (ValueError, KeyError, TypeError):
        pass
    return "refused" if response.status_code == 503 else "failed"


class Client(FastHttpUser):
    connection_timeout = network_timeout = 60.0

    def wait_time(self):
        each_second = self.environment.parsed_options.each_second
        return (constant_throughput(1) if each_second else constant(0))(self)

    def on_start(self):
        if self.environment.parsed_options.each_second:
            gevent.sleep(random.random())

    @task
    def ask(self):
        asked = random.choice(BODIES)
        retries = self.environment.parsed_options.retries
        body, started = asked["body"].encode(), time.time()
        while True:
            with self.client.post(asked["path"], data=body, headers=HEADERS, catch_response=True) as response:
                became = what_became_of(response, asked["right"])
                response.success() if became in ("answered", "sentence") else response.failure(became)
                parts = re.findall(r"(\w+);dur=([\d.]+)", (response.headers or {}).get("Server-Timing", ""))
            if became != "failed" or not retries:
                break
            retries -= 1
        parts = {part: float(milliseconds) for part, milliseconds in parts}
        ROWS.append((started, time.time() - started, response.status_code, became, len(asked["right"] or "1"), parts))
