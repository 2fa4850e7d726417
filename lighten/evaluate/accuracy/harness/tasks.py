"""Finding and loading lm-eval's tasks: by name, or from a YAML file; data from the hub or from local files."""

from __future__ import annotations

import hashlib
import json
import logging
import random
import re
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lighten.errors import RequestError, nearest
from lighten.evaluate.accuracy.harness.files import DRAWN
from lighten.evaluate.accuracy.tasks import OWN_TASKS, Tasks
from lighten.step import Report

SEED, FEWSHOT_SEED = 0, 1234
"""lm-eval's own defaults."""
READERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
"""Builders of `datasets` that read local files."""
ANSWER = "This is an answer. It has two sentences."
_NLTK = re.compile(r"nltk\.download\('(\w+)'\)")
_NAME = re.compile(rb"^(task|group): *[\"']?([^\s\"'#]+)[\"']? *(?:#.*)?$", re.MULTILINE)


def load(settings: Tasks) -> dict[str, Any]:
    """Returns the arguments of `lm_eval.evaluator.evaluate`: the `tasks` by name, and `groups`.

    Raises:
        RequestError: the task does not exist (the message has the nearest name), or its data or file cannot be loaded.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    path = Path(settings.task).expanduser()
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise RequestError(f"there is no task file {path}: check the path")
        loaded = _loading(settings, path)
    else:
        loaded = _loading(settings, _file_of(settings.task))
    random.seed(SEED)
    for name, task in loaded["tasks"].items():
        fixed = task.get_config("num_fewshot")
        if settings.shots is not None and fixed == 0 != settings.shots:
            raise RequestError(f"the task {name} is always asked without examples: leave out `shots`")
        if settings.shots is not None or fixed is None:
            task.set_config(key="num_fewshot", value=settings.shots or 0)
        task.set_fewshot_seed(seed=FEWSHOT_SEED)
        if settings.chat and task.OUTPUT_TYPE == "loglikelihood_rolling":
            raise RequestError(f"the task {name} reads whole texts and asks nothing: leave out `chat`")
    return loaded


def _loading(settings: Tasks, file: Path | None) -> dict[str, Any]:
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._index import Kind, TaskIndex

    try:
        entry = TaskIndex.entry_from_path(file) if file else None
        alone = entry is not None and entry.kind in (Kind.TASK, Kind.PY_TASK)
        if alone or not file:
            # reading the headers of all its tasks takes seconds
            manager = TaskManager(include_defaults=not alone)
            entry = entry or manager.task_index.get(settings.task)
        else:
            manager = TaskManager(include_path=str(file.parent))
        if entry is None:
            raise RequestError(_unknown(settings.task, manager.all_tasks))
        if settings.local and entry.kind not in (Kind.TASK, Kind.PY_TASK):
            raise RequestError(f"{settings.task} is several tasks: `local` is the data of one, so name one of them")
        changes = _local(settings) if settings.local else _beside(file)
        built = manager._factory.build(entry, overrides=changes or None, registry=manager.task_index)
        found: dict[str, Any] = manager.load(built if isinstance(built, list) else [built])
        return found
    except RequestError:
        raise
    except Exception as error:  # of lm-eval, datasets and the hub's client, which have no base in common
        raise RequestError(_reason(settings, error)) from error


def _file_of(name: str) -> Path | None:
    """Returns the file of one of lm-eval's tasks or groups; None for a name that no line begins with."""
    import lm_eval.tasks

    for file in sorted(Path(lm_eval.tasks.__file__).parent.rglob("*.yaml")):
        if any(found[1] == name.encode() for found in _NAME.findall(file.read_bytes())):
            return file
    return None


def _unknown(name: str, known: list[str]) -> str:
    near = nearest(name, {*OWN_TASKS, *known}, 3)
    hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
    return (
        f"there is no task {name!r}: {hint}Give builtin, hellaswag, a .jsonl file in HellaSwag's format, one of "
        f"lm-eval's {len(known):,} tasks (`lm-eval ls tasks`), or the .yaml file of one"
    )


def _local(settings: Tasks) -> dict[str, Any]:
    """Returns the settings that make a task take its documents from a local file."""
    file = Path(settings.local or "").expanduser().absolute()
    if not file.is_file():
        raise RequestError(f"there is no file {settings.local!r} for the task {settings.task}: check `local`")
    if file.suffix not in READERS:
        raise RequestError(f"`local: {settings.local}` is not one of {', '.join(READERS)}: lm-eval reads these")
    splits = {"test_split": "test", "validation_split": None, "training_split": None}
    return {
        "dataset_path": READERS[file.suffix],
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {"test": str(file)}},
        **splits,
        **({"fewshot_split": "test"} if settings.shots else {}),
    }


def _beside(file: Path | None) -> dict[str, Any]:
    """Returns the data files that a task's file names. Those beside it have their whole path."""
    from lm_eval.tasks._yaml_loader import load_yaml

    given = load_yaml(file, resolve_func=False).get("dataset_kwargs") if file else None
    if not file or not isinstance(given, dict) or "data_files" not in given:
        return {}

    def whole(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: whole(each) for name, each in value.items()}
        if isinstance(value, list):
            return [whole(each) for each in value]
        there = file.resolve().parent / str(value)
        return str(there) if there.is_file() else value

    return {"dataset_kwargs": {**given, "data_files": whole(given["data_files"])}}


def _reason(settings: Tasks, error: Exception) -> str:
    """Returns why a task cannot be loaded, and what to do."""
    first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    names = {kind.__name__ for kind in type(error).__mro__}
    if names & {"ConnectionError", "OfflineModeIsEnabled", "LocalEntryNotFoundError", "ConnectError", "HfHubHTTPError"}:
        return (
            f"the task {settings.task} takes its data from the hub, which cannot be reached ({first}). Run it once "
            "with a network: the data is kept; or give a file with the same fields: "
            f"{{task: {settings.task}, local: FILE.jsonl, scorer: lm-eval}}"
        )
    if names & {"FileNotFoundError", "DatasetNotFoundError"}:
        return f"the data of the task {settings.task} is not there: {first}"
    if names & {"ImportError"}:
        advice = "install it (pip install 'lighten[harness]' brings those of ifeval)"
        return f"the task {settings.task} needs a package that is not installed: {first}; {advice}"
    hint = f": {settings.local} must have the fields of the task's own data set" if settings.local else ""
    return f"lm-eval cannot load the task {settings.task} ({type(error).__name__}: {first}){hint}"


def requests(loaded: dict[str, Any], limit: int | None) -> Iterator[Any]:
    """Yields lm-eval's requests (`Instance`) of every task, as `evaluate` builds them again."""
    from lm_eval.evaluator_utils import get_sample_size

    for name, task in loaded["tasks"].items():
        try:
            task.build_all_requests(limit=get_sample_size(task, limit), rank=0, world_size=1)
        except Exception as error:  # templates and data of other people
            raise RequestError(
                f"the documents of the task {name} do not fit it ({type(error).__name__}: {error}); with `local`, the "
                "file must have the fields of the task's own data set"
            ) from error
        yield from task.instances


def texts(settings: Tasks) -> list[str]:
    """Returns every text of a task: contexts with their endings, or questions."""
    return [
        "".join(part for part in each.args if isinstance(part, str))
        for each in requests(load(settings), settings.limit)
    ]


def describe(payload: dict[str, Any], report: Report) -> dict[str, Any]:
    """Returns `lighten.evaluate.accuracy.harness.Facts` as JSON; a target of `lighten.process.isolate.run_isolated`."""
    settings = Tasks(**payload)
    loaded = load(settings)
    found = hashlib.sha256()
    letters, documents = 0, set()
    contexts: set[str] = set()
    drawn = writes = False
    for request in requests(loaded, settings.limit):
        found.update(json.dumps([request.request_type, request.args, request.doc], default=str).encode())
        documents.add((request.task_name, request.doc_id))
        context, *rest = (part for part in request.args if isinstance(part, str))
        drawn = drawn or _drawn(request)
        writes = writes or request.request_type == "generate_until"
        letters += sum(map(len, rest)) + (0 if context in contexts else len(context))
        contexts.add(context)
    if not documents:
        raise RequestError(f"the task {settings.task} has no documents")
    for name, task in loaded["tasks"].items():
        config = {key: value for key, value in task.dump_config().items() if key not in ("dataset_kwargs", "metadata")}
        found.update(json.dumps([name, task.VERSION, config], default=_stable, sort_keys=True).encode())
    if drawn:
        found.update(DRAWN)
    for task in loaded["tasks"].values():
        _check_scoring(task)
    return {
        "task": name_of(loaded, settings),
        "documents": len(documents),
        "letters": letters,
        "digest": found.hexdigest(),
        "version": version("lm_eval"),
        "writes": writes,
    }


def _drawn(request: Any) -> bool:
    """Returns whether an answer is drawn at random."""
    settings = request.args[1] if request.request_type == "generate_until" else {}
    return settings.get("do_sample") is not False and float(settings.get("temperature") or 0) > 0


def _check_scoring(task: Any) -> None:
    """Reads an answer to every document, to see before any work whether the reading lacks data of nltk.

    Raises:
        RequestError: it does; the message has the command that fetches them.
    """
    if "nltk" not in sys.modules or not callable(task.config.process_results):
        return
    for document in {request.doc_id: request.doc for request in task.instances}.values():
        try:
            task.process_results(document, [ANSWER])
        except LookupError as error:
            if found := _NLTK.search(str(error)):
                raise RequestError(lacks_nltk(task.config.task, found[1])) from error
        except Exception:  # the task may not be able to read such an answer
            continue


def lacks_nltk(task: str, data: str) -> str:
    """Returns what to do if a task lacks data of nltk."""
    advice = f"run `python -m nltk.downloader {data}` once, with a network"
    return f"the task {task} reads answers with data of nltk, which are not here: {advice}"


def _stable(value: Any) -> str:
    return re.sub(r" at 0x[0-9a-f]+", "", str(value))


def name_of(loaded: dict[str, Any], settings: Tasks) -> str:
    """Returns the name of a requested task: its own name, or that of the single task in the file."""
    names = [*loaded.get("groups", {}), *loaded["tasks"]]
    return settings.task if settings.task in names or len(loaded["tasks"]) != 1 else str(names[0])
