"""Tasks that only one side answers rightly, with their text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from lighten.data.choices import digest, load_choices
from lighten.errors import LightenError
from lighten.evaluate.accuracy.settings import Accuracy
from lighten.store.artifact import Artifact


@dataclass(frozen=True)
class Flip:
    """A task that only one side answers rightly, by log-probability per character."""

    number: int
    way: Literal["gained", "lost"]
    context: str | None = None
    """Context of the task. This and all fields below are None if the text of the tasks no longer exists."""
    right: str | None = None
    chosen_a: str | None = None
    chosen_b: str | None = None


def flips(measurement: Artifact, before: Mapping[str, Any], after: Mapping[str, Any]) -> tuple[list[Flip], str | None]:
    """Returns the tasks that flipped, the lost ones first, and why their text is missing, if it is.

    Args:
        measurement: measurement of either side; it says which tasks they were.
        before: `choice_norm` and `label` `[tasks]` of the first side.
        after: `choice_norm` and `label` `[tasks]` of the second side.
    """
    was, now = before["choice_norm"] == before["label"], after["choice_norm"] == after["label"]
    places = [int(at) for at in (was & ~now).nonzero()[0]] + [int(at) for at in (~was & now).nonzero()[0]]
    config = measurement.manifest["config"]
    why = None
    try:
        asked = Accuracy.model_validate({name: config[name] for name in Accuracy.model_fields if name in config})
        tasks = load_choices(asked.local or asked.task, asked.most) if places else []
        if places and digest(tasks) != config.get("data"):
            why = "they have changed since they were measured"
    except LightenError as error:
        why = str(error)
    found = []
    for at in places:
        way: Literal["gained", "lost"] = "lost" if was[at] else "gained"
        if why:
            found.append(Flip(at, way))
            continue
        task = tasks[at]
        chosen = [task.endings[int(side["choice_norm"][at])] for side in (before, after)]
        found.append(Flip(at, way, task.context, task.endings[task.label], *chosen))
    return found, why
