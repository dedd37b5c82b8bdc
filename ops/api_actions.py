"""What people can have done: a table, from which the ops API checks requests and the console makes its buttons."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from cluster.errors import ConfigError

Say = Callable[[str], None]


class Control(Protocol):
    """deployments.control.Control."""

    def status(self) -> dict[str, Any]: ...
    def pulse(self, known: int, wait_s: float) -> int: ...
    def nodes(self) -> list[dict[str, Any]]: ...
    def expert_load(self) -> list[list[int]]: ...
    def drain(self, worker: str, *, replace: bool, say: Say) -> None: ...
    def scale(self, shard: int, replicas: int, *, say: Say) -> None: ...
    def restart(self, workers: list[str], *, say: Say) -> None: ...
    def rotate_secret(self, *, say: Say) -> None: ...
    def check_integrity(self) -> list[dict[str, Any]]: ...


@dataclass(frozen=True)
class Field:
    """A field of an action's body. One without a label is what the action is done to, which the console knows."""

    kind: type
    label: str = ""
    required: bool = True


@dataclass(frozen=True)
class Action:
    """`offered`: the console's button for each kind of target ("worker", "shard", "cluster"); `explain` goes before."""

    offered: Mapping[str, str]
    explain: str
    fields: Mapping[str, Field]
    run: Callable[[Control, Mapping[str, Any], Say], None]


ACTIONS: Mapping[str, Action] = {
    "drain": Action(
        {"worker": "Drain"},
        "It finishes what it has taken, takes nothing new, and leaves. No request fails or waits.",
        {"worker": Field(str), "replace": Field(bool, "Start another first: the shard keeps its replicas", False)},
        lambda control, body, say: control.drain(body["worker"], replace=body.get("replace", False), say=say),
    ),
    "scale": Action(
        {"shard": "Scale"},
        "New replicas take calls as soon as they are ready; those too many finish what they have taken, and leave.",
        {"shard": Field(int), "replicas": Field(int, "Replicas")},
        lambda control, body, say: control.scale(body["shard"], body["replicas"], say=say),
    ),
    "restart": Action(
        {"worker": "Restart", "cluster": "Restart all workers"},
        "Each worker is replaced, one after the other; it leaves when its successor is ready.",
        {"workers": Field(list)},
        lambda control, body, say: control.restart(body["workers"], say=say),
    ),
    "rotate-secret": Action(
        {"cluster": "Change the secret"},
        "Engines and workers prove another secret to each other from then on. No request fails or waits.",
        {},
        lambda control, _body, say: control.rotate_secret(say=say),
    ),
}  # fmt: skip


def checked(name: str, body: Mapping[str, Any]) -> Action:
    """The action of that name, when the body is one that it takes. Raises KeyError, and ConfigError for the body."""
    action = ACTIONS[name]
    known = all(field in action.fields and _is_a(body[field], action.fields[field].kind) for field in body)
    if not known or any(field.required and field_name not in body for field_name, field in action.fields.items()):
        raise ConfigError(f"{name} does not take {str(dict(body))[:200]}")
    return action


def _is_a(value: Any, kind: type) -> bool:
    if kind is list:
        return isinstance(value, list) and all(isinstance(each, str) for each in value)
    return type(value) is kind


def to_json() -> dict[str, Any]:
    """The table as the console gets it."""
    return {
        name: {
            "offered": dict(action.offered),
            "explain": action.explain,
            "fields": {
                key: {"kind": field.kind.__name__, "label": field.label} for key, field in action.fields.items()
            },
        }
        for name, action in ACTIONS.items()
    }
