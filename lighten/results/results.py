"""results.json, schema 1: what a run measured, as strict models.

Fractions are fractions (0.01 is one percent), sizes are bytes, times are seconds unless the name says `ms`,
divergences are nats. A section that was not measured is null, or an empty list.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, model_validator

from lighten.data.reading import Refused, parse_json
from lighten.errors import Failure, RequestError
from lighten.screen import deep
from lighten.store.names import is_elsewhere, is_name
from lighten.store.store import write_json

SCHEMA = 1
BASELINE = "baseline"
FILE = "results.json"

Interval = Annotated[tuple[float, float], Field(strict=False)]
"""[low, high] of a 95 % interval."""

Free = dict[str, JsonValue]
"""Facts whose names are up to whoever writes them."""


class Section(BaseModel):
    """A part of results.json: unknown names and wrong types are errors, and so are NaN and infinity."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Source(Section):
    """The model everything was made from, and whatever else is known of it (licence, architecture, …)."""

    model_config = ConfigDict(extra="allow")

    model: str
    params: int | None = None


class Levels(Section):
    """Perplexity of the same log-likelihood by word, byte and token, and bits per byte."""

    word: float
    byte: float
    token: float
    bits_per_byte: float


class Perplexity(Section):
    """Perplexity and its standard error, per token or what `protocol` says; that also says on what and how.

    `bits_per_byte` is the same log-likelihood by byte of text, which also models of different vocabularies share.
    """

    value: float
    stderr: float | None = None
    tokens: int | None = None
    bits_per_byte: float | None = None
    levels: Levels | None = None
    protocol: Free = {}

    @property
    def by(self) -> str:
        """The name of the protocol."""
        return str(self.protocol.get("name", "lighten"))

    @property
    def unit(self) -> str:
        """What it is counted by."""
        return str(self.protocol.get("unit", "token"))

    def comparable(self, other: Perplexity) -> bool:
        """Whether both were measured by one protocol, in chunks of one length, on one text, as far as they say.

        Also on the same tokens: per token of another vocabulary is per something else.
        """
        names = ("length", "data_sha256", "ids_sha256")
        both = [(self.protocol.get(name), other.protocol.get(name)) for name in names]
        return self.by == other.by and all(ours == theirs for ours, theirs in both if None not in (ours, theirs))


class Divergence(Section):
    """How far the next-token distribution moved from the baseline's, in nats, and how often the top token agrees."""

    kl_mean: float
    kl_p99: float | None = None
    top1_agreement: float | None = None


class Metric(Section):
    """A number that lm-eval reports for a task, or for one in a group of tasks."""

    task: str
    metric: str
    filter: str
    value: float
    higher_is_better: bool | None = None


class Accuracy(Section):
    """Fraction of `n` tasks answered rightly, plain and normalised by length.

    `scorer` is who built the requests and read the answers, lighten or lm-eval; `metric` is lm-eval's name of what
    stands in `acc`. `truncated` counts the requests that were longer than the model's context.
    """

    task: str
    acc: float | None = None
    acc_norm: float | None = None
    n: int
    ci95: Interval | None = None
    ci95_norm: Interval | None = None
    scorer: str | None = None
    version: str | None = None
    metric: str | None = None
    metrics: list[Metric] = []
    truncated: int | None = None


class Percentiles(Section):
    """Percentiles of a latency in milliseconds."""

    p50: float
    p95: float
    p99: float


class Speed(Section):
    """Speed at one prompt length and batch size, over `repeats` runs.

    Of the decode speeds, `spread` is (max − min) / median, `error` half of the 95 % interval of the median relative to
    it, and `drift` the relative change from the first to the last runs, 0 if it may be scatter. `attention`, `compile`
    and `cache` are what transformers ran with; null where another runtime did. `prefill_dtype` is the arithmetic of the
    prefill; null where only one, `dtype`, was measured.
    """

    batch: int
    prompt: int
    generate: int
    prefill_tok_s: float | None = None
    decode_tok_s: float | None = None
    ttft_ms: Percentiles | None = None
    token_ms: Percentiles | None = None
    repeats: int | None = None
    spread: float | None = None
    error: float | None = None
    drift: float | None = None
    dtype: str | None = None
    prefill_dtype: str | None = None
    attention: str | None = None
    compile: str | None = None
    cache: str | None = None

    @property
    def arithmetic(self) -> str | None:
        """In words, the arithmetic of both phases."""
        other = self.prefill_dtype and self.prefill_dtype != self.dtype
        return f"{self.dtype}, prefill {self.prefill_dtype}" if other else self.dtype

    @property
    def how(self) -> tuple[str | None, str | None, str | None]:
        """The options of transformers."""
        return self.attention, self.compile, self.cache


class Served(Section):
    """Requests that arrived `rate` a second on average, and how those that were completed were served.

    `ttft_ms` is from a request's arrival, `token_ms` between its tokens; `throughput_tok_s` is of all together.
    """

    rate: float
    requests: int
    completed: int
    throughput_tok_s: float
    ttft_ms: Percentiles
    token_ms: Percentiles | None = None
    server: str


class Parted(Section):
    """A text that a draft changed: from which token on, and by how much the first logit was above the second there."""

    text: int
    position: int
    gap: float


class Speculative(Section):
    """Greedy decoding with a draft that proposes `tokens` at a time, of which the share `acceptance` stays.

    `identical` is whether every text is, token by token, what is written without it; `parted` has those that are not.
    """

    draft: str
    tokens: int
    acceptance: float
    decode_tok_s: float
    plain_tok_s: float
    speedup: float
    identical: bool
    proposed: int | None = None
    texts: int | None = None
    generate: int | None = None
    dtype: str | None = None
    parted: list[Parted] = []


class Memory(Section):
    """Peak memory of the measuring process."""

    peak_rss_bytes: int | None = None
    peak_vram_bytes: int | None = None
    dtype: str | None = None


class Energy(Section):
    """Energy per generated token, or a note on why it is not known."""

    joules_per_token: float | None = None
    note: str | None = None


class Place(Section):
    """A speed under the machine's roof: operations and bytes of a token, what was reached, and what bounds it.

    `bandwidth_gb_s` is what so many bytes are read at, from memory or a cache; `share` is what was reached of the roof.
    """

    flops_per_token: float
    bytes_per_token: float
    intensity: float
    gflop_s: float
    gb_s: float
    bandwidth_gb_s: float | None = None
    roof_gflop_s: float
    share: float
    bound: Literal["memory", "cache", "compute"]
    note: str | None = None


class Roofline(Place):
    """The place of decoding at the first measured shape, and that of its prefill."""

    batch: int | None = None
    context: int | None = None
    dtype: str | None = None
    prefill: Place | None = None


class TokenCost(Section):
    """A price of a million tokens."""

    prefill: float | None = None
    decode: float | None = None


class Price(Section):
    """What tokens cost on a machine that costs `price_per_hour`, when it does nothing else."""

    per_million_tokens: TokenCost
    price_per_hour: float
    currency: str
    note: str | None = None


class PerplexityDelta(Section):
    """Paired change against the baseline by the same protocol; `ci95` is the interval of `relative`."""

    protocol: str | None = None
    relative: float
    ci95: Interval | None = None
    absolute: float | None = None


class AccuracyDelta(Section):
    """Paired change of one task: `gained` tasks are right only here, `lost` ones only in the baseline."""

    task: str
    acc: float | None = None
    acc_ci95: Interval | None = None
    acc_norm: float | None = None
    acc_norm_ci95: Interval | None = None
    gained: int | None = None
    lost: int | None = None


class Delta(Section):
    """Comparison with the baseline on the same text and tasks; ratios are variant / baseline."""

    perplexity: PerplexityDelta | None = None
    other_perplexity: list[PerplexityDelta] = []
    accuracy: list[AccuracyDelta] = []
    decode_speed_ratio: float | None = None
    size_ratio: float | None = None


class Lesson(Section):
    """A point of a loss curve: means over the steps since the last point, in nats per token."""

    step: int
    loss: float
    ce: float | None = None
    kl: float | None = None


class Look(Section):
    """Perplexity on the text that was held out from training, after a step."""

    step: int
    perplexity: float


class Training(Section):
    """How a distillation went."""

    curve: list[Lesson] = []
    validation: list[Look] = []


class Load(Section):
    """One loader's attempt to open the artifact; "other" if it is no loader of such a format."""

    loader: str
    version: str | None = None
    status: Literal["ok", "failed", "absent", "other"]
    seconds: float | None = None
    error: str | None = None


class Variant(Section):
    """One artifact and everything measured on it."""

    name: str
    path: str | None = None
    key: str | None = None
    status: Literal["ok", "failed"]
    error: str | None = None
    format: str | None = None
    runtime: str | None = None
    device: str | None = None
    size_bytes: int | None = None
    bits_per_weight: float | None = None
    params: int | None = None
    training: Training | None = None
    perplexity: Perplexity | None = None
    other_perplexity: list[Perplexity] = []
    """By further protocols, where several were asked for; never compared with the first."""
    vocabulary: str | None = None
    """How its vocabulary differs from the baseline's; its tokens are its own then. Null where both are the same."""
    divergence: Divergence | None = None
    accuracy: list[Accuracy] = []
    speed: list[Speed] = []
    load: list[Served] = []
    speculative: Speculative | None = None
    memory: Memory | None = None
    energy: Energy | None = None
    roofline: Roofline | None = None
    cost: Price | None = None
    delta: Delta | None = None
    loads: list[Load] = []
    facts: Free = {}
    steps: list[Free] = []
    notes: list[str] = []

    @model_validator(mode="after")
    def _is_a_name(self) -> Self:
        """A name becomes that of a directory: it has to be one."""
        if not (is_name(self.name) or (self.elsewhere and is_elsewhere(self.name))):
            raise ValueError(f"the variant name {self.name!r} may hold letters, digits, '.', '_' and '-' only")
        return self

    @model_validator(mode="after")
    def _failed_says_why(self) -> Self:
        if self.status == "failed" and not (self.error or "").strip():
            raise ValueError(f"variant {self.name!r} failed but its error is empty")
        return self

    @property
    def failed(self) -> bool:
        """True if there is nothing but `error` to show."""
        return self.status == "failed"

    @property
    def perplexities(self) -> list[Perplexity]:
        """Its perplexities by every protocol."""
        return [*([self.perplexity] if self.perplexity else []), *self.other_perplexity]

    @property
    def bits_per_byte(self) -> float | None:
        """Bits that a byte of text takes by the first protocol."""
        found = self.perplexity
        return None if found is None else found.levels.bits_per_byte if found.levels else found.bits_per_byte

    @property
    def elsewhere(self) -> bool:
        """True for a row that was measured on another machine than the others, and merged."""
        return "machine" in self.facts

    @property
    def decode_tok_s(self) -> float | None:
        """Decode speed of the first speed measurement."""
        return self.speed[0].decode_tok_s if self.speed else None


class Cost(Section):
    """What a stage takes."""

    seconds: float | None = None
    peak_bytes: int | None = None
    disk_bytes: int | None = None


class StageCost(Section):
    """One stage: what it was predicted to take and what it took, in an earlier run if it was cached."""

    name: str
    kind: str
    key: str
    variants: list[str] = []
    cached: bool
    predicted: Cost | None = None
    actual: Cost | None = None


class Overlap(Section):
    """Share of an evaluation set's runs of `ngram` words that stand in the calibration text, and some of them."""

    model_config = ConfigDict(serialize_by_alias=True, validate_by_name=True, validate_by_alias=True)

    with_: str = Field(alias="with")
    ngram: int
    share: float
    runs: int | None = None
    examples: list[str] = []


class Calibration(Section):
    """The calibration text as it was used: `samples` of `asked`, `distinct` tokens of a `vocabulary`."""

    data: str
    asked: int | None = None
    samples: int
    length: int
    tokens: int
    distinct: int | None = None
    vocabulary: int | None = None
    overlap: list[Overlap] = []


class Results(Section):
    """results.json of one version of a recipe."""

    model_config = ConfigDict(serialize_by_alias=True)

    schema_: Literal[1] = Field(default=1, alias="schema")
    recipe: str
    version: str
    created: str
    machine: Free
    source: Source
    variants: list[Variant]
    calibration: Calibration | None = None
    """Null if no variant used the calibration text."""
    stages: list[StageCost] = []
    recipe_yaml: str = ""
    warnings: list[str] = []

    @model_validator(mode="before")
    @classmethod
    def _shown_as_text(cls, value: Any) -> Any:
        """What others wrote is printed and put into pages: no control character of it is kept."""
        return deep(value) if isinstance(value, dict) else value

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        names = [variant.name for variant in self.variants]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"two variants are named {twice[0]!r}")
        return self

    @property
    def title(self) -> str:
        """Recipe and version, such as "quickstart v3"."""
        return f"{self.recipe} {self.version}".strip()

    @property
    def measured(self) -> list[Variant]:
        """Variants that did not fail, baseline included."""
        return [variant for variant in self.variants if not variant.failed]

    @property
    def baseline(self) -> Variant | None:
        """The variant everything is compared with, unless it is missing or failed."""
        return next((variant for variant in self.measured if variant.name == BASELINE), None)

    def perplexity_change(self, variant: Variant, protocol: str | None = None) -> PerplexityDelta | None:
        """Returns the paired change by a protocol, the first unless one is named.

        The plain change, without interval, where no paired one was measured; None between protocols, lengths or texts.
        """
        base = self.baseline
        if base is None or variant is base or variant.vocabulary:
            return None
        ours = next((each for each in variant.perplexities if protocol in (None, each.by)), None)
        first = ours is None or ours is variant.perplexity
        deltas = variant.delta.other_perplexity if variant.delta else []
        paired = variant.delta.perplexity if variant.delta and first else None
        paired = paired if first else next((each for each in deltas if each.protocol == protocol), None)
        if paired:
            return paired
        for theirs in base.perplexities:
            if ours and ours.comparable(theirs):
                absolute = ours.value - theirs.value
                return PerplexityDelta(relative=absolute / theirs.value, absolute=absolute)
        return None

    def size_ratio(self, variant: Variant) -> float | None:
        """Returns the variant's size / the baseline's."""
        base = self.baseline
        if base is None or variant is base:
            return None
        if variant.delta and variant.delta.size_ratio is not None:
            return variant.delta.size_ratio
        return variant.size_bytes / base.size_bytes if variant.size_bytes and base.size_bytes else None


def load(path: Path) -> Results:
    """Returns the results in a results.json, or in the version directory that holds one.

    Raises:
        RequestError: no such file, or one of a schema this version does not read.
        Failure: the file is damaged or is not results.json.
    """
    file = path / FILE if path.is_dir() else path
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise Failure(f"{file} is not text ({error.reason}): give a results.json that lighten wrote") from error
    except OSError as error:
        raise RequestError(
            f"cannot read {file}: {error.strerror}; give a version directory or its {FILE} ('lighten ls' lists them)"
        ) from error
    try:
        raw = parse_json(text)
    except Refused as error:
        raise Failure(f"{file} is not JSON ({error}): restore it, or run the recipe again") from error
    schema = raw.get("schema") if isinstance(raw, dict) else None
    if schema is None:
        raise Failure(f'{file} has no "schema": it is not lighten\'s {FILE}')
    if schema != SCHEMA:
        raise RequestError(
            f"{file} has schema {schema!r}, this lighten reads schema {SCHEMA}: use the version that wrote it"
        )
    try:
        return Results.model_validate(raw)
    except ValidationError as error:
        problems = error.errors(include_url=False, include_context=False)
        lines = [f"  {'.'.join(map(str, problem['loc'])) or 'file'}: {problem['msg']}" for problem in problems[:5]]
        more = [f"  … and {len(problems) - 5} more"] if len(problems) > 5 else []
        raise Failure("\n".join([f"{file} does not follow schema {SCHEMA}:", *lines, *more])) from error


def save(results: Results, path: Path) -> None:
    """Writes results.json; `load` reads the same back."""
    write_json(path, results.model_dump(mode="json", by_alias=True))
