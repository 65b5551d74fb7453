"""How many requests may be under way: the next one is refused at once, while it has cost nothing."""

import contextlib

from service.bodies import Refusal


class Overloaded(Refusal):
    """Refused for now: `retry_after` seconds are a good time to wait."""

    retry_after = 1

    def __init__(self, most):
        super().__init__(503, f"{most} requests are under way, as many as may be: try again in {self.retry_after} s")


class Admission:
    """At most `most` requests at a time; for one event loop, whose tasks do not interrupt each other.

    A place is free again when its request ends in any way, a client that leaves among them.
    """

    def __init__(self, most):
        self.most, self.inside = most, 0

    @contextlib.contextmanager
    def __call__(self):
        if self.inside >= self.most:
            raise Overloaded(self.most)
        self.inside += 1
        try:
            yield
        finally:
            self.inside -= 1
