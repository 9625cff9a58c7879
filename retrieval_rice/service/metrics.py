"""Metrics of the service for Prometheus."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
STEPS = ("read", "wait", "encode", "search")
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """Metrics of one service; several services in one process are separate."""

    def __init__(self):
        self.registry = CollectorRegistry()
        here = {"registry": self.registry}
        self.requests = Counter("rice_requests", "Requests answered.", ("route", "status"), **here)
        self.seconds = Histogram(
            "rice_request_seconds", "Time from a request's head to its answer.", ("route",), buckets=_SECONDS, **here
        )
        self.steps = Histogram(
            "rice_step_seconds", "Steps of recognising a clip; encode and search are for its batch.", ("step",),
            buckets=_SECONDS, **here,
        )  # fmt: skip
        self.queue = Gauge("rice_queue", "Requests with a body in progress.", **here)
        self.batch = Histogram(
            "rice_batch_clips", "Clips encoded together.", buckets=(1, 2, 4, 8, 16, 32), **here
        )  # fmt: skip
        self.answers = Counter("rice_answers", "Clips answered.", ("outcome",), **here)
        self.segments = Counter("rice_segments", "Segments of streams.", ("outcome",), **here)
        self.streams = Gauge("rice_streams", "Running streams.", **here)
        self.images = Gauge("rice_index_images", "Images in the index.", **here)
        self.version = Gauge("rice_index_version", "Version of the index that is searched.", **here)

    def answered(self, no_product: bool, timings: dict[str, float], batch_size: int) -> None:
        """Counts a clip's answer, with milliseconds of its steps."""
        self.answers.labels("no_product" if no_product else "product").inc()
        self.batch.observe(batch_size)
        for step in STEPS:
            self.steps.labels(step).observe(timings[f"{step}_ms"] / 1000)

    def text(self) -> bytes:
        """The metrics in the text format of Prometheus."""
        return generate_latest(self.registry)
