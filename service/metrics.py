"""What the service counts, for Prometheus: Ray exports each with the prefix ``ray_``."""

from ray.util.metrics import Counter, Histogram

SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)
PARTS = ("queue", "batch", "picture", "device", "decoding")


class IngressMetrics:
    """Counted where requests come in. Outcomes are answered, refused, overloaded, left and failed."""

    def __init__(self):
        self.requests = Counter("blip_requests", "Requests by their outcome", ("outcome",))
        self.seconds = Histogram("blip_seconds", "Seconds of a request, by part", SECONDS, ("part",))

    def request(self, outcome):
        self.requests.inc(tags={"outcome": outcome})

    def split(self, seconds):
        for part, spent in seconds.items():
            self.seconds.observe(max(spent, 0), tags={"part": part})


class AnswererMetrics:
    """Counted where questions are answered."""

    def __init__(self):
        self.questions = Counter("blip_questions", "Questions that were computed")
        self.pictures = Counter("blip_pictures", "Pictures that came to a core, by whether it had seen them", ("seen",))
        self.batch_questions = Histogram("blip_batch_questions", "Questions in a batch", (1, 2, 4, 8, 16, 32, 64), ())
        self.batch_fill = Histogram(
            "blip_batch_fill", "Share of the graphs' rows that held a question", tuple(i / 8 for i in range(1, 9)), ()
        )

    def batch(self, batch):
        """Of a `service.answering.Batch`."""
        self.questions.inc(batch.questions)
        for seen, count in (("yes", batch.seen), ("no", batch.new)):
            if count:
                self.pictures.inc(count, tags={"seen": seen})
        self.batch_questions.observe(batch.questions)
        if batch.rows_in_all:
            self.batch_fill.observe(batch.rows / batch.rows_in_all)
