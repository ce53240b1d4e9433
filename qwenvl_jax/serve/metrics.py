"""What a server counts, under the names that vLLM's dashboards read."""

import prometheus_client as prometheus

from qwenvl_jax.infer.scheduler import Scheduler

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250)


class Metrics:
  """Counters of one server, in a registry of their own."""

  def __init__(self, model: str, scheduler: Scheduler):
    """Makes all counters."""
    self.registry = registry = prometheus.CollectorRegistry()

    def make(kind, name, text, labels=(), **settings):
      names = ('model_name', *labels)
      made = kind(f'vllm:{name}', text, names, registry=registry, **settings)
      return made if labels else made.labels(model)

    def gauge(name, text, value):
      make(prometheus.Gauge, name, text).set_function(value)

    load = lambda: scheduler.load  # noqa: E731
    total = scheduler.engine.slots * scheduler.engine.max_len
    gauge('num_requests_running', 'Being answered.', lambda: load().running)
    gauge('num_requests_waiting', 'In the queue.', lambda: load().waiting)
    gauge(
      'kv_cache_usage_perc',
      'Share of the cache that is filled.',
      lambda: load().tokens / total,
    )
    counter, histogram = prometheus.Counter, prometheus.Histogram
    self.prompt_tokens = make(counter, 'prompt_tokens', 'Tokens read.')
    self.generation_tokens = make(
      counter, 'generation_tokens', 'Tokens generated.'
    )
    self.first_token = make(
      histogram,
      'time_to_first_token_seconds',
      'From the request to its first token.',
      buckets=_SECONDS,
    )
    self.inter_token = make(
      histogram,
      'inter_token_latency_seconds',
      'Between two tokens of an answer, on average.',
      buckets=_SECONDS,
    )
    self.latency = make(
      histogram,
      'e2e_request_latency_seconds',
      'From the request to the end of its answer.',
      buckets=_SECONDS,
    )
    success = make(
      counter, 'request_success', 'Answers that ended.', ('finished_reason',)
    )
    self.success = lambda reason: success.labels(model, reason)
    for reason in ('stop', 'length'):  # There, at 0, before the first one.
      self.success(reason)

  def text(self) -> bytes:
    """All of them, in Prometheus' format."""
    return prometheus.generate_latest(self.registry)
