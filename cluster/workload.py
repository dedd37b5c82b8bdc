"""What a simulated cluster is asked to do, as a load file says it:

duration_s: 30            # simulated; the first warm_up_s of it are not counted
warm_up_s: 5
streams: 64               # each sends its next request when the last one is complete; or requests_per_s: 20
prompt_tokens: 128
output_tokens: 64
expert_skew: 0.0          # 0: even; s: the n-th most wanted expert of a layer is chosen as often as 1 / n^s says
losses:                   # nodes that vanish with everything on them
  - {at_s: 10, node: big, back_after_s: 15}       # without back_after_s it stays away
seed: 0
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cluster.errors import ConfigError


@dataclass(frozen=True)
class Loss:
    """A node that vanishes, with everything on it."""

    at_s: float
    node: str
    back_after_s: float = math.inf


@dataclass(frozen=True)
class Workload:
    """One load; either streams or requests_per_s is above 0."""

    duration_s: float
    warm_up_s: float = 0.0
    streams: int = 0
    requests_per_s: float = 0.0
    prompt_tokens: int = 128
    output_tokens: int = 64
    expert_skew: float = 0.0
    losses: tuple[Loss, ...] = ()
    seed: int = 0


def parse_workload(document: Any) -> Workload:
    """The parsed YAML document as a Workload. Raises ConfigError that names the key."""
    fields = _fields(document, Workload, "the load")
    losses = fields.pop("losses", ())
    if not isinstance(losses, list | tuple):
        raise ConfigError("losses: must be a list.")
    parsed = tuple(Loss(**_fields(entry, Loss, f"losses[{place}]")) for place, entry in enumerate(losses))
    load = Workload(**fields, losses=parsed)
    if (load.streams > 0) == (load.requests_per_s > 0):
        raise ConfigError("the load: give either streams or requests_per_s.")
    if not load.warm_up_s < load.duration_s:
        raise ConfigError(f"warm_up_s: is {load.warm_up_s:g}, must be less than duration_s ({load.duration_s:g}).")
    if min(load.prompt_tokens, load.output_tokens) < 1:
        raise ConfigError("prompt_tokens, output_tokens: must be 1 or more.")
    return load


def _fields(document: Any, cls: type, path: str) -> dict[str, Any]:
    """The mapping's values, checked: numbers of the fields' kinds, not negative; text for a node."""
    kinds = {field.name: field for field in dataclasses.fields(cls)}
    if not isinstance(document, Mapping):
        raise ConfigError(f"{path}: must be a mapping of {', '.join(kinds)}.")
    for key in document:
        if key not in kinds:
            near = difflib.get_close_matches(str(key), kinds, n=1, cutoff=0.0)[0]
            raise ConfigError(f"{path}: there is no {key}. The nearest is {near}.")
    for name, field in kinds.items():
        if field.default is dataclasses.MISSING and name not in document:
            raise ConfigError(f"{path}: {name} is missing.")
    return {key: _value(value, str(kinds[key].type), f"{path}: {key}") for key, value in document.items()}


def _value(value: Any, kind: str, path: str) -> Any:
    if kind == "str":
        return str(value)
    if kind not in ("int", "float"):
        return value
    is_number = isinstance(value, int if kind == "int" else int | float) and not isinstance(value, bool)
    if not is_number or not 0 <= value < math.inf:
        raise ConfigError(f"{path} must be a {'whole ' if kind == 'int' else ''}number, 0 or more, not {value!r}.")
    return value
