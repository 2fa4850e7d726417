"""What a recipe or a task file may run: nothing, unless the person allows it on the command line or as an argument.

A file can ask for trust; it can never grant it. Four other places decide about trust too:

- `refuse_code` in `lighten/model/config_checks.py` refuses a model that needs its own code without trust.
- `lighten/pipeline/plan.py` passes trust to the models that the recipe names, and refuses a stage that opens a trusted
  model beside one that is not trusted.
- A server that a recipe names is started by its name alone. A program or arguments for it, or a key for
  the host of one that runs, need `trust_servers`.
- `lighten/pipeline/verbs.py` does one step or one measurement without a recipe: its arguments grant trust.
"""

from __future__ import annotations

from collections.abc import Iterable

from lighten.errors import RequestError
from lighten.evaluate.accuracy.settings import Accuracy
from lighten.evaluate.serving.settings import Serve
from lighten.pipeline.recipe import Recipe
from lighten.pipeline.served import addresses, goes_with_key, started


def check(recipe: Recipe, *, trust_remote_code: bool, trust_tasks: bool, trust_servers: bool = False) -> None:
    """Checks that the person granted what the recipe asks for, before anything is fetched or run.

    Args:
        recipe: the recipe that asks.
        trust_remote_code: whether the person trusts the code of the models that the recipe names.
        trust_tasks: whether the person trusts lm-eval's task files.
        trust_servers: whether the person trusts the servers that the recipe names.

    Raises:
        RequestError: trust that the recipe asks for and that was not granted, or the reverse.
    """
    asked = recipe.trusted
    if asked and not trust_remote_code:
        names = " and ".join(asked)
        raise RequestError(
            f"the recipe {recipe.name} asks to run the Python code that comes with {names}: read that code, and if you "
            "trust it, say so with --trust-remote-code (trust_remote_code=True in Python)"
        )
    if trust_remote_code and not asked:
        raise RequestError(
            f"--trust-remote-code: the recipe {recipe.name} does not say whose code it needs: add the line "
            f"`trust_remote_code: {recipe.model}` to it, or leave the flag out"
        )
    check_tasks(recipe.evaluate.accuracy, trust_tasks)
    check_servers(recipe, trust_servers)


def check_tasks(tasks: Iterable[Accuracy], granted: bool) -> None:
    """Checks that no task is a file that may run code, unless the person granted that.

    Raises:
        RequestError: it was not granted.
    """
    files = [str(task.task_file) for task in tasks if task.task_file]
    if files and not granted:
        raise RequestError(
            f"the task file {files[0]} is code to lm-eval (its functions and templates run): read it, and if you trust "
            "it, say so with --trust-tasks (trust_tasks=True in Python)"
        )


def check_servers(recipe: Recipe, granted: bool) -> None:
    """Checks that a recipe names no program, no arguments and no stranger for a key, unless the person granted that.

    The name of a server alone needs no trust: its package is installed here, and lighten chooses the arguments.

    Raises:
        RequestError: it was not granted.
    """
    if granted:
        return
    asked = [f"starts {_command(serve)} (evaluate.serve.{name})" for name, serve in started(recipe)]
    asked += [f"sends the key in the environment to {url}" for url in addresses(recipe) if goes_with_key(url)]
    if asked:
        raise RequestError(
            f"the recipe {recipe.name} {asked[0]}: if these are your words, or you have read them, say so with "
            "--trust-servers (trust_servers=True in Python)"
        )


def _command(serve: Serve) -> str:
    return " ".join([str(serve.python)] if serve.python else [serve.program, *serve.args])
