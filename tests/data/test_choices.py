import json
from collections import Counter
from pathlib import Path

import pytest

from lighten.data.choices import clean, digest, load_choices, parse
from lighten.errors import Failure, RequestError


def test_builtin_tasks_are_many_balanced_and_distinct() -> None:
    tasks = load_choices("builtin")
    assert len(tasks) >= 200
    assert len({task.context for task in tasks}) == len(tasks)
    assert all(len(set(task.endings)) == 4 for task in tasks)
    labels = Counter(task.label for task in tasks)
    assert max(labels.values()) - min(labels.values()) < 0.1 * len(tasks)


def test_the_right_ending_is_not_told_by_its_length() -> None:
    tasks = load_choices("builtin")
    longest = sum(max(range(4), key=lambda i, t=task: len(t.endings[i])) == task.label for task in tasks)
    shortest = sum(min(range(4), key=lambda i, t=task: len(t.endings[i])) == task.label for task in tasks)
    assert longest / len(tasks) < 0.35
    assert shortest / len(tasks) < 0.35


def test_limit_takes_the_first_and_the_files_take_turns() -> None:
    assert load_choices("builtin", 7) == load_choices("builtin")[:7]
    assert digest(load_choices("builtin", 7)) != digest(load_choices("builtin", 8))


def test_a_record_becomes_the_prompt_of_lm_eval() -> None:
    task = parse({"activity_label": "Roof", "ctx": "A man sits. he", "endings": ["a", "b", "c", "d"], "label": "2"})
    assert (task.context, task.label) == ("Roof: A man sits. he", 2)
    parts = {"ctx_a": "A man sits.", "ctx_b": "he", "ctx": "A man sits. he"}
    task = parse({"activity_label": "Roof", **parts, "endings": ["a", "b"], "label": 0})
    assert task.context == "Roof: A man sits. He"
    assert clean("[[a] b]\n[c\nd] [e] [f") == " b]\n[c\nd] [f"
    assert clean("How to sit [title] Find a chair. [step] Sit  down.") == "How to sit. Find a chair. Sit down."


def test_files(tmp_path: Path) -> None:
    record = {"activity_label": "a", "ctx": "b", "endings": ["c", "d", "e", "f"], "label": 3}
    path = tmp_path / "tasks.jsonl"
    path.write_text(json.dumps(record) + "\n")
    assert load_choices(str(path))[0].endings == ("c", "d", "e", "f")
    path.write_text(json.dumps(record) + "\n" + json.dumps({**record, "label": 4}) + "\n")
    with pytest.raises(Failure, match=r"tasks\.jsonl:2: .*label 4"):
        load_choices(str(path))
    path.write_text("")
    with pytest.raises(RequestError, match="empty"):
        load_choices(str(path))
    with pytest.raises(RequestError, match="missing"):
        load_choices(str(tmp_path / "missing.jsonl"))
