"""What other machines reach: HTTP listens for them with API keys, or when it was said that it shall; and HTTPS."""

import dataclasses
import ssl
from pathlib import Path

from cluster.addresses import is_loopback
from cluster.api_keys import read_ring
from cluster.config import parse_settings
from cluster.errors import ConfigError
from ops.keys import default_file
from ops.serve_config import ServeConfig


def with_checked_exposure(config: ServeConfig) -> ServeConfig:
    """The configuration with the file of keys that it needs, as an absolute path. Raises ConfigError without one."""
    settings = parse_settings(config.args)
    file = settings.api_keys
    if file is None and not is_loopback(config.host) and not settings.allow_anonymous:
        file = str(default_file())
        if not default_file().exists():
            raise ConfigError(f"{_everybody(config.host)} Make a key with `switchyard keys add NAME`, {_OR_NOT}")
    if file is None:
        return config
    path = Path(file).expanduser().absolute()
    if not read_ring(path).has_valid_keys:
        raise ConfigError(f"{path} has no valid API key. Make one with `switchyard keys add NAME --file {path}`.")
    return dataclasses.replace(config, args={**config.args, "api_keys": str(path)})


def checked_pem(config: ServeConfig) -> bytes | None:
    """Certificate and key for HTTPS as haproxy reads them, in one PEM; None for plain HTTP. Raises ConfigError."""
    if config.tls_cert is None and config.tls_key is None:
        return None
    if config.tls_cert is None or config.tls_key is None:
        raise ConfigError("HTTPS needs a certificate and its key: --tls-cert and --tls-key.")
    try:
        # An empty password: one that is asked for on the terminal would stop the start.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(config.tls_cert, config.tls_key, password=b"")
        return Path(config.tls_cert).read_bytes().rstrip() + b"\n" + Path(config.tls_key).read_bytes()
    except (OSError, ValueError) as error:
        why = f"cannot use {config.tls_cert} with {config.tls_key}: {error}"
        raise ConfigError(f"{why}. Both must be PEM files that belong together, the key without a password.") from None


_OR_NOT = "or say --allow-anonymous if everybody who can reach that address may use the model."


def _everybody(host: str) -> str:
    return f"on {host} other machines can reach the HTTP API, and there are no API keys."
