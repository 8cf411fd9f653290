"""What a server counts and measures."""


class Metrics:
    """What `/metrics` tells, in Prometheus' text format."""

    def __init__(self):
        import prometheus_client as prometheus

        self.registry = prometheus.CollectorRegistry()
        prometheus.ProcessCollector(registry=self.registry)  # memory, CPU time, open files
        registry = dict(namespace="vit_jax", registry=self.registry)
        self.responses = prometheus.Counter(
            "responses", "Responses to /classify, by status", ["status"], **registry
        )
        self.images = prometheus.Counter("images", "Images classified", **registry)
        self.in_flight = prometheus.Gauge(
            "requests_in_flight", "Requests being answered", **registry
        )
        sizes = [2**exponent for exponent in range(11)]
        self.batch_size = prometheus.Histogram(
            "batch_size", "Images computed together", buckets=sizes, **registry
        )
        self.seconds = prometheus.Histogram(
            "request_seconds", "Time to answer an accepted request", **registry
        )
