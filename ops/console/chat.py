"""The test chat: passes a question on to the OpenAI API that the cluster serves, and its answer back as it comes."""

import http.client
import json
import urllib.parse
from collections.abc import Iterator, Mapping
from typing import Any

from cluster.errors import SwitchyardError

_TIMEOUT_S = 300.0
_MAX_TOKENS = 4096
_PATHS = {"chat": "/v1/chat/completions", "completion": "/v1/completions"}


class ChatFailed(SwitchyardError):
    """The API did not answer the question; the message has its words."""


def ask(base_url: str, model: str, body: Mapping[str, Any]) -> Iterator[bytes]:
    """The lines of the streamed answer (server-sent events). Raises ChatFailed before the first.

    `body`: {"mode": "chat" or "completion", "messages" or "prompt", "max_tokens", "temperature", "key": API key or ""}.
    """
    mode = body.get("mode", "chat")
    content = {"messages": body.get("messages")} if mode == "chat" else {"prompt": body.get("prompt")}
    question = {
        "model": model,
        "stream": True,
        "stream_options": {"include_usage": True},
        "max_tokens": min(int(body.get("max_tokens", 256)), _MAX_TOKENS),
        "temperature": float(body.get("temperature", 0.7)),
        **content,
    }
    url = urllib.parse.urlsplit(base_url)
    headers = {"Content-Type": "application/json"}
    if body.get("key"):
        headers["Authorization"] = f"Bearer {body['key']}"
    connection = http.client.HTTPConnection(url.hostname or "", url.port, timeout=_TIMEOUT_S)
    try:
        connection.request("POST", _PATHS["chat" if mode == "chat" else "completion"], json.dumps(question), headers)
        response = connection.getresponse()
    except OSError as error:
        connection.close()
        raise ChatFailed(f"{base_url} does not answer: {error}") from None
    if response.status != 200:
        text = _error_text(response)
        connection.close()
        raise ChatFailed(text)
    return _lines(connection, response)


def _lines(connection: http.client.HTTPConnection, response: http.client.HTTPResponse) -> Iterator[bytes]:
    """Closed early, for a reader that has left, it closes the connection: the engine stops computing."""
    try:
        yield from response
    finally:
        connection.close()


def _error_text(response: http.client.HTTPResponse) -> str:
    text = response.read(4096).decode(errors="replace")
    try:
        return f"{response.status}: {json.loads(text)['error']['message']}"
    except (ValueError, KeyError, TypeError):
        return f"{response.status}: {text[:200]}"
