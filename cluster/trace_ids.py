"""How a trace goes through vLLM, which forgets a request's headers before the forward pass but not its id.

The HTTP side puts the request's span into its id (X-Request-Id); the process that makes layer calls finds it there.
Sizes as in https://www.w3.org/TR/trace-context/: 16 bytes of trace, 8 bytes of span.
"""

import re

_MARK = "-trace-"
_PATTERN = re.compile(_MARK + r"([0-9a-f]{32})([0-9a-f]{16})")


def with_span(request_id: str, trace_id: int, span_id: int) -> str:
    """The request's id from now on; `request_id` is what it had, which may be empty."""
    return f"{request_id}{_MARK}{trace_id:032x}{span_id:016x}"


def span_in(request_id: str) -> tuple[int, int] | None:
    """(trace id, span id) of the request; None when it is not traced."""
    found = _PATTERN.search(request_id)
    return (int(found[1], 16), int(found[2], 16)) if found else None
