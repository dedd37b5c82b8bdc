"""The command line's end of the ops API. Imports nothing heavy: `switchyard status` shall answer at once."""

import argparse
import contextlib
import http.client
import json
import urllib.parse
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from typing import Any

from cluster.errors import ConfigError, SwitchyardError
from ops.runs import find_run

_TIMEOUT_S = 60.0
_ACTION_TIMEOUT_S = 3600.0


class RequestFailed(SwitchyardError):
    """The cluster did not do what it was asked for; the message has its words."""


class ApiClient:
    """One cluster's ops API at `url`. Raises ConfigError for the caller's mistakes, RequestFailed for the rest."""

    def __init__(self, url: str, token: str) -> None:
        self._url = urllib.parse.urlsplit(url)
        if self._url.scheme != "http" or not self._url.hostname:
            raise ConfigError(f"{url} is not the address of an ops API, for example http://127.0.0.1:8100")
        self._token = token

    def get(self, path: str) -> Any:
        """The JSON behind a path."""
        return json.loads(self._request("GET", path, None, _TIMEOUT_S).read())

    def post(self, path: str, body: Mapping[str, Any]) -> Any:
        """The JSON that answers a request."""
        return json.loads(self._request("POST", path, body, _TIMEOUT_S).read())

    def stream(self, path: str) -> Generator[bytes, None, None]:
        """The lines behind a path, as they come; close it to stop."""
        with contextlib.closing(self._request("GET", path, None, _TIMEOUT_S)) as response:
            yield from response

    def act(self, path: str, body: Mapping[str, Any], say: Callable[[str], None]) -> None:
        """Have something done; `say` is called with every word about it. Returns when it is done."""
        for line in self._request("POST", path, body, _ACTION_TIMEOUT_S):
            message = json.loads(line)
            if "say" in message:
                say(message["say"])
            elif "done" in message:
                return
            else:
                raise (ConfigError if message["status"] < 500 else RequestFailed)(message["error"])
        raise RequestFailed("the cluster has broken off; `switchyard status` shows whether it still runs")

    def _request(
        self, method: str, path: str, body: Mapping[str, Any] | None, timeout_s: float
    ) -> http.client.HTTPResponse:
        connection = http.client.HTTPConnection(self._url.hostname or "", self._url.port, timeout=timeout_s)
        data = json.dumps(body).encode() if body is not None else None
        try:
            connection.request(method, path, data, {"Authorization": f"Bearer {self._token}"})
            response = connection.getresponse()
        except OSError as error:
            raise RequestFailed(f"{self._url.netloc} does not answer: {error}") from None
        if response.status != 200:
            text = json.loads(response.read())["error"]
            raise (ConfigError if response.status < 500 else RequestFailed)(text)
        return response


def add_cluster_arguments(parser: argparse.ArgumentParser) -> None:
    """How to say which cluster is meant."""
    parser.add_argument("--port", type=int, help="port of the cluster's HTTP API, where several run on this machine")
    parser.add_argument("--url", metavar="URL", help="address of an ops API that runs elsewhere, with --token-file")
    parser.add_argument("--token-file", type=Path, metavar="FILE", help="file with the token for --url")


def connect(arguments: argparse.Namespace) -> ApiClient:
    """The cluster that the arguments mean. Raises ConfigError when that is none, or not clear."""
    if arguments.url is None:
        run = find_run(arguments.port)
        return ApiClient(run.ops, run.token)
    if arguments.token_file is None:
        raise ConfigError("--url needs --token-file")
    try:
        token = arguments.token_file.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--token-file: cannot read {arguments.token_file}: {error}") from None
    return ApiClient(arguments.url, token)
