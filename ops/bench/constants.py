"""The constants of plans and simulations, and the benchmark command that measured them: constants.yaml."""

import functools
from pathlib import Path
from typing import Any

import yaml

from cluster.roofline import CallCost

_FILE = Path(__file__).with_name("constants.yaml")


@functools.cache
def constants() -> dict[str, Any]:
    """The file's content; it explains every field."""
    content: dict[str, Any] = yaml.safe_load(_FILE.read_text(encoding="utf-8"))
    return content


def call_cost() -> CallCost:
    """What a layer call costs beside kernels and wire."""
    return CallCost(constants()["call_us"] / 1e6, constants()["call_token_us"] / 1e6)
