"""Variants that are measured over HTTP: in a server that lighten starts, or on one that somebody else started."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from lighten.errors import RequestError
from lighten.evaluate.runtimes.choose import find_opener
from lighten.evaluate.runtimes.endpoint.address import Address
from lighten.evaluate.runtimes.endpoint.connection import LOOPBACK, api_key
from lighten.evaluate.runtimes.endpoint.opener import served
from lighten.evaluate.runtimes.endpoint.step import Endpoint
from lighten.evaluate.runtimes.measurable import Served as OnServer
from lighten.evaluate.serving.host import Wanted, checked, positions, program_of
from lighten.evaluate.serving.settings import Serve
from lighten.evaluate.settings import Evaluate
from lighten.model.source import Found
from lighten.pipeline.checks import check_measurable
from lighten.pipeline.recipe import BASELINE, Recipe
from lighten.pipeline.stage import At, Stage
from lighten.step import Estimate
from lighten.store.files import stage_key


def remote(recipe: Recipe, name: str) -> Endpoint | None:
    """Returns the settings of a variant that is a model on a server; None for any other."""
    steps = recipe.steps(name) if name in recipe.variants else []
    return steps[0] if steps and isinstance(steps[0], Endpoint) else None


class Served:
    """Finds out where each variant of a recipe is measured, by asking servers and environments."""

    def __init__(self, recipe: Recipe, tokenizer: Path) -> None:
        """Prepares for a recipe; servers without a tokenizer of their own read with that of the model at a path."""
        self._recipe, self._tokenizer = recipe, tokenizer
        self._moment = secrets.token_hex(16)  # the server may have another model tomorrow
        self._found: dict[str, At] = {}

    def stage(self, name: str, step: Endpoint) -> Stage:
        """Returns the stage of a variant that is a model on a server.

        Raises:
            RequestError: there is no such model, or it cannot be measured so.
            Failure: the server does not answer.
        """
        address, facts, _ = served(str(step.address(self._tokenizer)), lambda line: None)
        check_measurable(facts, _over_http(self._recipe.evaluate), name)
        self._found[name] = At(address=str(address), key={"address": address.shown, "asked": self._moment})
        config = {"address": address.shown, "asked": self._moment}
        made = step.model_copy(update={"model": address.model})
        key = stage_key(step.kind, step.version, config, [])
        return Stage(f"server {address.host}", step.kind, step.version, key, config, [], Estimate(), made, facts=facts)

    def at(self, name: str, stage: Stage) -> At | None:
        """Returns where a variant is measured; None if in its own runtime on this machine.

        Raises:
            RequestError: the server that a recipe asks for cannot serve it, or is not installed.
            Failure: a server that should run does not answer.
        """
        evaluate, where = self._recipe.evaluate, f"evaluate.serve: {name}"
        serve = evaluate.serve_of(name)
        own = remote(self._recipe, name)
        if own and serve:
            raise RequestError(f"{where} is on a server already: give it `{name}: null`")
        if own and name == BASELINE:
            address, facts, _ = served(str(own.address(self._tokenizer)), lambda line: None)
            check_measurable(facts, _over_http(evaluate), name)
            return At(address=str(address), key={"address": address.shown, "asked": self._moment})
        if own or serve is None:
            return self._found.get(name)
        assert stage.step and stage.facts
        if stage.facts.task != "causal":
            raise RequestError(f"{where} is no causal language model: leave it out")
        program_of(serve).refuse(stage.step.runtime, where)
        longest = max((each.longest(stage.facts.context) for each in evaluate.asked), default=0)
        packages = checked(serve).packages
        key = {"with": serve.program, "args": [*serve.args], "packages": packages}
        return At(serve=serve, positions=positions(stage.facts.context, longest), key=key)


def wanted(at: At, place: Path, name: str, device: str) -> Wanted:
    """Returns what a server is to be started for.

    Args:
        at: where a variant is measured; it has a server to start.
        place: the artifact.
        name: name of the variant.
        device: "cpu", "cuda" or "cuda:N".
    """
    assert at.serve
    return Wanted(find_opener(place)[1], name, at.serve, at.positions, device)


def _over_http(evaluate: Evaluate) -> Evaluate:
    """Returns what can be measured on a server of all that is asked for."""
    others = [each.name for each in evaluate.asked if not each.over_http]
    emptied: dict[str, Any] = {name: False if name == "loaders" else None for name in others}
    return evaluate.model_copy(update=emptied)


def started(recipe: Recipe) -> list[tuple[str, Serve]]:
    """Returns the servers that a recipe names with a program or arguments, each with the pattern of its variants."""
    return [(name, each) for name, each in recipe.evaluate.serve.items() if each and each.runs_what_it_names]


def addresses(recipe: Recipe) -> list[str]:
    """Returns the addresses of the variants that are models on servers."""
    return [step.endpoint for name in recipe.variants if (step := remote(recipe, name))]


def goes_with_key(url: str) -> bool:
    """Returns whether a key in the environment would be sent to an address, beyond this machine."""
    address = Address.parse(url)
    return urlsplit(address.url).hostname not in LOOPBACK and api_key(address.url) is not None


def without_servers(recipe: Recipe) -> Recipe:
    """Returns a recipe that is measured on this machine only, without the variants that are on servers."""
    kept = {name: steps for name, steps in recipe.variants.items() if not remote(recipe, name)}
    evaluate = recipe.evaluate.model_copy(update={"serve": {}})
    return recipe.model_copy(update={"variants": kept, "evaluate": evaluate})


def in_servers(found: list[Found | OnServer], serves: list[Serve]) -> list[tuple[Found | OnServer, Serve | None]]:
    """Returns models as they are to be measured: each as it is, and then in every server that serves its files.

    Raises:
        RequestError: a server serves none of them, or is not installed.
    """
    openers = [find_opener(source.path)[0].name for source in found]
    fitting = [isinstance(source, Found) and source.facts.task == "causal" for source in found]
    for serve in serves:
        program = program_of(serve)
        if not any(fits and name in program.serves for fits, name in zip(fitting, openers, strict=True)):
            if other := next((name for name in openers if name not in program.serves), None):
                program.refuse(other, "--serve")
            raise RequestError(f"--serve: {program.name} serves causal language models, and none is given")
        checked(serve)
    rows: list[tuple[Found | OnServer, Serve | None]] = []
    for source, fits, name in zip(found, fitting, openers, strict=True):
        rows.append((source, None))
        rows += [(source, serve) for serve in serves if fits and name in program_of(serve).serves]
    return rows
