"""The comparison of two versions, variants or models."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lighten.compare import difference, limits, protocol, side
from lighten.compare.difference import Difference
from lighten.compare.limits import Limit, Verdict
from lighten.compare.operand import Model, Operand, VariantOf, Version, resolve
from lighten.compare.side import Side
from lighten.errors import RequestError
from lighten.evaluate import paired
from lighten.evaluate.settings import Evaluate
from lighten.pipeline.build import choose_device
from lighten.pipeline.watcher import Silent, Watcher
from lighten.process.isolate import run_isolated
from lighten.store.store import Store


@dataclass(frozen=True)
class Comparison:
    """Everything that was compared, what only one side has, and the verdicts on the limits."""

    differences: tuple[Difference, ...]
    alone: tuple[str, ...] = ()
    verdicts: tuple[Verdict, ...] = ()
    tokens: tuple[dict[str, Any], ...] | None = None
    tokens_missing: str | None = None

    @property
    def failed(self) -> list[Verdict]:
        """Verdicts that say no."""
        return [verdict for verdict in self.verdicts if verdict.failed]

    def json(self) -> dict[str, Any]:
        """Returns everything for a program: fractions, bytes, tokens per second, nats."""
        return {"schema": 1, **asdict(self), "failed": bool(self.failed)}


def compare(
    a: str,
    b: str,
    *,
    artifacts: Path = Path("artifacts"),
    fail_if: Sequence[str] = (),
    tokens: int = 0,
    evaluate: Evaluate | None = None,
    device: str = "auto",
    watcher: Watcher | None = None,
    trust_remote_code: bool = False,
) -> Comparison:
    """Returns what changed from `a` to `b`.

    Args:
        a: NAME, NAME@v1, NAME:VARIANT, a version's directory, a results.json, or a model.
        b: the same; a version is compared with a version only.
        artifacts: directory of objects and versions.
        fail_if: limits such as "ppl > +2%".
        tokens: how many of the tokens to name where the two disagree most.
        evaluate: what to measure where both are models; a model beside a variant is measured as its version was.
        device: where models are run.
        watcher: is told what is measured.
        trust_remote_code: lets the code run that lies beside models that are measured, and beside variants that
            `tokens` has to run.

    Raises:
        RequestError: nothing of that name, other protocols, a limit that cannot be read or judged.
        Failure: a measurement that is damaged, or a model that cannot be measured.
    """
    asked = [limits.parse(text) for text in fail_if]
    first, second = resolve(a, artifacts), resolve(b, artifacts)
    watcher = watcher or Silent()
    chosen = choose_device(device, watcher).name
    if isinstance(first, Version) or isinstance(second, Version):
        if not (isinstance(first, Version) and isinstance(second, Version)):
            whole, other = (a, b) if isinstance(first, Version) else (b, a)
            raise RequestError(f"{whole} is a version and {other} is not: name a variant of it, such as {whole}:NAME")
        if tokens:
            raise RequestError("--tokens is for two variants or models: name a variant of each, such as NAME:VARIANT")
        return _versions(first, second, asked)
    with contextlib.ExitStack() as kept:
        one, other_one = _sides(first, second, artifacts, evaluate, chosen, watcher, kept, trust_remote_code)
        protocol.check(one, other_one)
        found = difference.compare(one, other_one)
        verdicts = tuple(verdict for limit in asked for verdict in limits.judge(limit, found))
        places, missing = None, None
        if tokens:
            places, missing = _tokens(one, other_one, tokens, chosen, watcher, trust_remote_code)
    return Comparison((found,), (), verdicts, places, missing)


def _versions(a: Version, b: Version, asked: list[Limit]) -> Comparison:
    ours, theirs = ({row.name: row for row in version.results.variants} for version in (a, b))
    found, alone, verdicts = [], [], []
    for name in dict.fromkeys([*ours, *theirs]):
        missing = next((version.text for version, rows in ((a, ours), (b, theirs)) if name not in rows), None)
        broken = [version.text for version, rows in ((a, ours), (b, theirs)) if name in rows and rows[name].failed]
        if missing:
            alone.append(f"{name} is not in {missing}")
        elif broken:
            alone.append(f"{name} failed in {' and '.join(broken)}")
            if asked and broken == [b.text]:
                sentence = f"FAILED: {name} failed in {b.text} and not in {a.text}: {theirs[name].error}"
                verdicts.append(Verdict(name, True, None, sentence))
        else:
            one, two = (
                side.of_variant(VariantOf(f"{version.text}:{name}", version, rows[name]))
                for version, rows in ((a, ours), (b, theirs))
            )
            protocol.check(one, two)
            found.append(difference.compare(one, two))
    if not found and not verdicts:
        raise RequestError(f"{a.text} and {b.text} have no variant in common: {'; '.join(alone)}")
    verdicts += [verdict for each in found for limit in asked for verdict in limits.judge(limit, each)]
    return Comparison(tuple(found), tuple(alone), tuple(verdicts))


def _sides(
    first: Operand,
    second: Operand,
    artifacts: Path,
    evaluate: Evaluate | None,
    device: str,
    watcher: Watcher,
    kept: contextlib.ExitStack,
    trusted: bool,
) -> tuple[Side, Side]:
    variants = [each for each in (first, second) if isinstance(each, VariantOf)]
    if variants and evaluate:
        raise RequestError("a model beside a variant is measured as its version was: leave out flags such as --data")
    tokenizer: Path | None = None
    store = Store(artifacts)
    wanted = evaluate
    if len(variants) == 1:
        wanted, tokenizer = side.protocol_of(variants[0].version)
        store = variants[0].version.store or store
    sides: list[Side] = []
    for each in (first, second):
        if isinstance(each, VariantOf):
            sides.append(side.of_variant(each))
        elif isinstance(each, Model):
            assert wanted is not None
            made = side.of_model(
                each.text,
                wanted,
                tokenizer,
                store=store,
                device=device,
                watcher=watcher,
                kept=kept,
                trust_remote_code=trusted,
            )
            tokenizer = tokenizer or made.model  # the first model's tokenizer gives the ids, as in `evaluate`
            sides.append(made)
    return sides[0], sides[1]


def _tokens(
    a: Side, b: Side, count: int, device: str, watcher: Watcher, trusted: bool
) -> tuple[tuple[dict[str, Any], ...] | None, str | None]:
    """Returns the places where the two sides disagree most, or why they are not known."""
    if not (a.perplexity and b.perplexity and b.row.perplexity):
        return None, "the perplexity measurements of both are needed, and the store does not have them"
    if b.tokenizer is None:
        return None, "the model whose tokenizer was used is not in the store any more"
    given, said = b.perplexity.manifest["config"], b.row.perplexity.protocol
    if not isinstance(said.get("data"), str):
        return None, f"the results of {b.text} do not name the text that perplexity was measured on"
    payload: dict[str, Any] = {
        "tokenizer": str(b.tokenizer),
        "config": {
            "data": said["data"],
            "length": given["length"],
            "samples": given.get("samples"),
            "within": given.get("within"),
            "protocol": given.get("protocol", "lighten"),
        },
        "ids_sha256": said.get("ids_sha256"),
        "count": count,
    }
    against = b.perplexity.manifest["parents"][1:2]
    if a.row.key and against == [a.row.key] and "kl" in paired.values(b.perplexity.path):
        payload["stored"] = str(b.perplexity.path)
    elif a.model and b.model:
        models = [str(a.model), str(b.model)]
        payload |= {"models": models, "device": device, "trust_remote_code": trusted}
        watcher.say(f"divergence of {b.text} from {a.text}, token by token")
    else:
        gone = a.text if a.model is None else b.text
        return None, f"{gone} is not in the store any more, so it cannot be run"
    found = run_isolated("lighten.evaluate.perplexity.tokens:largest", payload).value
    return tuple(found), None
