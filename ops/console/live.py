"""Looks at the cluster all the time, often while somebody watches, and hands on what it sees as it changes."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ops.action_log import in_words
from ops.api_actions import Control
from ops.console.heat import Heat
from ops.console.history import History
from ops.console.incidents import incidents

# Something that happens is shown at once, but no more often than this; loads that only vary every SAMPLE_S.
LOOK_S = 0.1
SAMPLE_S = 2.0
_SHOWN_INCIDENTS = 60


class Live:
    """Of one cluster. A view is everything the console shows, in plain JSON types; views are numbered."""

    def __init__(self, control: Control, actions: Callable[[], list[dict[str, Any]]]) -> None:
        self._control = control
        self._actions = actions
        self._history = History()
        self._heat = Heat()
        self._nodes: list[dict[str, Any]] = []
        self._lock = threading.Lock()
        self._news = threading.Condition()
        self._stop = threading.Event()
        self._hurry = threading.Event()
        self._watchers = 0
        self._sampled_s = float("-inf")
        self._pulse = 0
        self._publishing = threading.Lock()
        self._view: dict[str, Any] = {}
        self._number = 0
        self._thread = threading.Thread(target=self._run, name="ops-live", daemon=True)
        self._thread.start()

    def changed(self) -> None:
        """An action has begun, gone on or ended: tell now."""
        if self._view:
            self._publish(time.time(), {**self._view["status"], "events": self._view["events"]}, self._view["trouble"])

    def close(self) -> None:
        self._stop.set()
        self._hurry.set()
        self._thread.join(2 * SAMPLE_S)

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Meanwhile it looks whenever something happens."""
        with self._lock:
            self._watchers += 1
        self._hurry.set()
        try:
            yield
        finally:
            with self._lock:
                self._watchers -= 1

    def wait(self, known: int, timeout_s: float) -> dict[str, Any]:
        """The view as soon as its "number" is above `known`; what there is after `timeout_s`, {} before the first."""
        with self._news:
            self._news.wait_for(lambda: self._number > known, timeout_s)
            return self._view

    def heat(self, window_s: float) -> dict[str, Any]:
        """Heat.over()."""
        with self._lock:
            return self._heat.over(window_s)

    def _run(self) -> None:
        while not self._stop.is_set():
            self._hurry.clear()
            self._look(time.time())
            if not self._stop.wait(LOOK_S):
                self._await_news()

    def _await_news(self) -> None:
        if not self._watchers:
            self._hurry.wait(SAMPLE_S)
            return
        try:
            self._pulse = self._control.pulse(self._pulse, SAMPLE_S)
        # Looking again says what is wrong.
        except Exception:
            self._stop.wait(LOOK_S)

    def _look(self, now_s: float) -> None:
        try:
            status = self._control.status()
            self._publish(now_s, status, "")  # before whatever else takes time
            if now_s - self._sampled_s >= SAMPLE_S:
                self._sample(now_s, status)
                self._publish(now_s, status, "", is_sample=True)
        # Ray raises many kinds while the router restarts; people shall see that, and what was known last.
        except Exception as error:
            self._publish(now_s, self._view.get("status", {}), in_words(error))

    def _sample(self, now_s: float, status: Mapping[str, Any]) -> None:
        total, self._nodes = self._control.expert_load(), self._control.nodes()
        with self._lock:
            self._history.add(now_s, status)
            self._heat.add(now_s, total)
        self._sampled_s = now_s

    def _publish(self, now_s: float, status: Mapping[str, Any], trouble: str, *, is_sample: bool = False) -> None:
        with self._publishing:
            self._publish_alone(now_s, status, trouble, is_sample)

    def _publish_alone(self, now_s: float, status: Mapping[str, Any], trouble: str, is_sample: bool) -> None:
        events = status.get("events", self._view.get("events", []))
        view = {
            "number": self._number + 1,
            "time_s": now_s,
            "trouble": trouble,
            "status": {key: value for key, value in status.items() if key != "events"},
            "nodes": self._nodes,
            "events": events,
            "incidents": incidents(events)[-_SHOWN_INCIDENTS:],
            "actions": self._actions(),
            "samples": list(self._history.samples),
        }
        if is_sample or _what_happened(view) != _what_happened(self._view):
            with self._news:
                self._view, self._number = view, self._number + 1
                self._news.notify_all()


def _what_happened(view: Mapping[str, Any]) -> Any:
    """What is news at once, unlike loads and ages."""
    if not view:
        return None
    status = view["status"]
    states = [(each["id"], each["state"]) for each in (*status.get("engines", ()), *status.get("spares", ()))]
    wanted = [shard["wanted"] for shard in status.get("shards", ())]
    last = view["events"][-1]["time_s"] if view["events"] else 0.0
    return (status.get("epoch"), states, wanted, status.get("progress"), last, view["actions"], view["trouble"])


def news_since(view: Mapping[str, Any], events_after_s: float, samples_after_s: float) -> dict[str, Any]:
    """The view with only those events and samples that are newer."""
    return {
        **view,
        "events": [event for event in view["events"] if event["time_s"] > events_after_s],
        "samples": [sample for sample in view["samples"] if sample["time_s"] > samples_after_s],
    }
