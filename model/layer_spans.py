"""OpenTelemetry spans of layer calls, for the requests of a forward step that are traced (cluster/trace_ids.py).

A span per layer of every step would bury the rest: a request has them for its first step, which is its prompt's, and
then for one step in sixteen.
"""

import time
from collections import OrderedDict
from collections.abc import Callable, Sequence

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags

from cluster.calls import Counters
from cluster.trace_ids import span_in

_EVERY_STEPS = 16
_REMEMBERED = 4096  # requests whose first step has been seen
_MOST_REQUESTS = 8  # of one step
_TIMES = ("gather_ns", "send_ns", "wait_ns", "queue_ns", "compute_ns", "combine_ns")
_COUNTS = ("messages", "resent", "hedged", "lost")


class LayerSpans:
    """begin() before a layer call, end() after it, on the step's thread; layer 0 begins a step.

    `request_ids` returns the ids of the requests in the step that is computed now.
    """

    def __init__(self, request_ids: Callable[[], Sequence[str]], tracer: trace.Tracer | None = None) -> None:
        self._request_ids = request_ids
        self._tracer = tracer or trace.get_tracer("switchyard.layer_calls")
        self._seen: OrderedDict[tuple[int, int], None] = OrderedDict()
        self._parents: list[Context] = []
        self._steps = 0
        self._layer = self._tokens = self._begin_ns = 0
        self._before: dict[str, int] = {}

    def begin(self, layer: int, tokens: int, counters: Counters) -> None:
        if layer == 0:
            self._begin_step()
        if self._parents:
            self._layer, self._tokens, self._before = layer, tokens, _snapshot(counters)
            self._begin_ns = time.time_ns()

    def end(self, counters: Counters) -> None:
        if not self._parents:
            return
        now_ns, after = time.time_ns(), _snapshot(counters)
        spent = {name: after[name] - self._before[name] for name in after}
        attributes = {
            "switchyard.layer": self._layer,
            "switchyard.tokens": self._tokens,
            "switchyard.requests": len(self._request_ids()),
            **{f"switchyard.{name.removesuffix('_ns')}_us": spent[name] // 1000 for name in _TIMES},
            **{f"switchyard.{name}": spent[name] for name in _COUNTS},
        }
        for parent in self._parents:
            span = self._tracer.start_span(
                "layer call", context=parent, start_time=self._begin_ns, attributes=attributes
            )
            span.end(end_time=now_ns)

    def _begin_step(self) -> None:
        self._steps += 1
        self._parents = []
        is_regular = self._steps % _EVERY_STEPS == 0
        for request_id in self._request_ids():
            span = span_in(request_id)
            if span is None or len(self._parents) == _MOST_REQUESTS:
                continue
            is_first = span not in self._seen
            if is_first:
                self._seen[span] = None
                if len(self._seen) > _REMEMBERED:
                    self._seen.popitem(last=False)
            if is_first or is_regular:
                parent = SpanContext(*span, is_remote=True, trace_flags=TraceFlags(TraceFlags.SAMPLED))
                self._parents.append(trace.set_span_in_context(NonRecordingSpan(parent)))


def _snapshot(counters: Counters) -> dict[str, int]:
    return {name: getattr(counters, name) for name in (*_TIMES, *_COUNTS)}
