"""The constants of plans and simulations, and the benchmark command that measured them: constants.yaml."""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from cluster.roofline import CallCost
from cluster.simulation import Costs

_FILE = Path(__file__).with_name("constants.yaml")


@functools.cache
def constants() -> dict[str, Any]:
    """The file's content; it explains every field."""
    content: dict[str, Any] = yaml.safe_load(_FILE.read_text(encoding="utf-8"))
    return content


def call_cost() -> CallCost:
    """What a layer call costs beside kernels and wire."""
    return CallCost(constants()["call_us"] / 1e6, constants()["call_token_us"] / 1e6)


def costs_of(values: Mapping[str, Any]) -> Costs:
    """What the simulation needs beside rooflines, from the fields of constants.yaml. Raises KeyError."""
    return Costs(
        call=CallCost(values["call_us"] / 1e6, values["call_token_us"] / 1e6),
        step_s=values["step_us"] / 1e6,
        step_request_s=values["step_request_us"] / 1e6,
        message_s=values["message_us"] / 1e6,
        read_efficiency=values["read_efficiency"],
        arithmetic_efficiency=values["arithmetic_efficiency"],
        notice_s=values["notice_s"],
    )
