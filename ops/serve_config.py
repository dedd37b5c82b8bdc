"""Reading ray-config.yaml: Ray Serve's own schema around our ``args``, with the command line's options on top.

Serve drops keys that it does not know without a word; here they are refused.
"""

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from cluster.errors import ConfigError

IMPORT_PATH = "deployments.app:build_app"

_TOP_KEYS = ("proxy_location", "http_options", "logging_config", "applications")
_HTTP_KEYS = ("host", "port", "request_timeout_s", "keep_alive_timeout_s", "root_path", "ssl_certfile", "ssl_keyfile")
# haproxy listens and ends TLS here, so Serve is not told of these.
_OWN_HTTP_KEYS = ("host", "port", "ssl_certfile", "ssl_keyfile")
_APP_KEYS = ("name", "route_prefix", "import_path", "args", "runtime_env", "deployments", "external_scaler_enabled")


@dataclass(frozen=True)
class ServeConfig:
    """What `switchyard serve` takes from the file: where to listen, and the application's settings."""

    host: str = "127.0.0.1"
    port: int = 8000
    tls_cert: str | None = None
    tls_key: str | None = None
    http_options: Mapping[str, Any] = field(default_factory=dict)
    proxy_location: str = "HeadOnly"
    app_name: str = "switchyard"
    route_prefix: str = "/"
    args: Mapping[str, Any] = field(default_factory=lambda: {"model": "demo"})


def read_serve_config(path: Path) -> ServeConfig:
    """Raises ConfigError when the file cannot be read or has something that nobody would read."""
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from None
    try:
        return parse_serve_config(document)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def parse_serve_config(document: Any) -> ServeConfig:
    """The parsed YAML document as a ServeConfig. Raises ConfigError."""
    top = _section(document, "the file", _TOP_KEYS)
    http = _section(top.get("http_options") or {}, "http_options", _HTTP_KEYS)
    applications = top.get("applications")
    if not isinstance(applications, list) or len(applications) != 1:
        raise ConfigError("applications: must be a list with one application.")
    app = _section(applications[0], "applications[0]", _APP_KEYS)
    if app.get("import_path") != IMPORT_PATH:
        raise ConfigError(f"applications[0].import_path: must be {IMPORT_PATH}, not {app.get('import_path')}.")
    for key in ("deployments", "runtime_env"):
        if app.get(key):
            raise ConfigError(f"applications[0].{key}: only `serve run` reads it; `switchyard serve` does not.")
    if not isinstance(app.get("args"), Mapping):
        raise ConfigError("applications[0].args: must be a mapping of settings.")
    return ServeConfig(
        host=_host(http.get("host", ServeConfig.host)),
        port=_port(http.get("port", ServeConfig.port)),
        http_options={key: value for key, value in http.items() if key not in _OWN_HTTP_KEYS},
        tls_cert=_file(http, "ssl_certfile"),
        tls_key=_file(http, "ssl_keyfile"),
        proxy_location=top.get("proxy_location", ServeConfig.proxy_location),
        app_name=app.get("name", ServeConfig.app_name),
        route_prefix=app.get("route_prefix", ServeConfig.route_prefix),
        args=app["args"],
    )


def _section(value: Any, name: str, keys: Iterable[str]) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{name}: must be a mapping of settings.")
    for key in value:
        if key not in keys:
            near = difflib.get_close_matches(str(key), keys, n=1, cutoff=0.0)[0]
            raise ConfigError(f"{name}: there is no setting {key}. The nearest is {near}.")
    return value


def _port(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 65536:
        raise ConfigError(f"http_options.port: must be a port number from 1 to 65535, not {value!r}.")
    return value


def _file(http: Mapping[str, Any], key: str) -> str | None:
    value = http.get(key)
    if value is not None and not isinstance(value, str):
        raise ConfigError(f"http_options.{key}: must be the path of a PEM file, not {value!r}.")
    return value


def _host(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ConfigError(f"http_options.host: must be an address, not {value!r}.")
    return value
