"""What was measured: the sections of a row in results.json."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue

Interval = Annotated[tuple[float, float], Field(strict=False)]
"""95 % interval, as [low, high]."""


Free = dict[str, JsonValue]
"""Facts with free names."""


class Section(BaseModel):
    """A part of results.json. Unknown names, wrong types, NaN and infinity are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Levels(Section):
    """Perplexity of the same log-likelihood by word, byte and token, and bits per byte."""

    word: float
    byte: float
    token: float
    bits_per_byte: float


class Unavailable(Section):
    """A measurement that was asked for, and that the runtime of the artifact cannot do."""

    measurement: str
    reason: str


class Perplexity(Section):
    """Perplexity and its standard error, per token or per unit of `protocol`.

    `protocol` also says on what text and how it was measured. `bits_per_byte` is the same log-likelihood by byte of
    text, which models of different vocabularies can be compared by.
    """

    value: float
    stderr: float | None = None
    tokens: int | None = None
    bits_per_byte: float | None = None
    levels: Levels | None = None
    protocol: Free = {}

    @property
    def by(self) -> str:
        """Name of the protocol."""
        return str(self.protocol.get("name", "lighten"))

    @property
    def unit(self) -> str:
        """Unit that perplexity is counted by."""
        return str(self.protocol.get("unit", "token"))

    def comparable(self, other: Perplexity) -> bool:
        """Whether both were measured by one protocol, in chunks of one length, on one text.

        The tokens must be the same too: perplexity per token of another vocabulary is another quantity.
        """
        names = ("length", "data_sha256", "ids_sha256")
        both = [(self.protocol.get(name), other.protocol.get(name)) for name in names]
        return self.by == other.by and all(ours == theirs for ours, theirs in both if None not in (ours, theirs))


class Divergence(Section):
    """Distance of the next-token distribution from the baseline's in nats, and how often the top token agrees."""

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
    """Fraction of `n` tasks that are answered rightly, plain and normalised by length.

    `scorer` built the requests and read the answers: lighten or lm-eval. `metric` is lm-eval's name of the number in
    `acc`. `truncated` counts the requests that were longer than the model's context. `chat` says that the model was
    asked in its own chat template, after the text in `system` if there is one.
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
    chat: bool = False
    system: str | None = None


class Translation(Section):
    """How near translations come to references: BLEU and chrF of `n` texts, from 0 to 100, by sacrebleu.

    `ci95` is the interval of BLEU, from texts that are drawn again and again. `exact` is the share of translations that
    are the reference. The signatures say how sacrebleu counted.
    """

    bleu: float
    chrf: float
    n: int
    ci95: Interval | None = None
    exact: float | None = None
    data: str | None = None
    signatures: list[str] = []


class Similarity(Section):
    """Cosine of the embeddings of `n` sentences with the baseline's: mean, 5th percentile and least."""

    mean: float
    p05: float
    least: float
    n: int


class Masked(Section):
    """Share of `n` hidden tokens that are found, with its 95 % interval; `loss` is in nats per hidden token."""

    acc: float
    n: int
    ci95: Interval | None = None
    loss: float | None = None


class Percentiles(Section):
    """Percentiles of a latency in milliseconds."""

    p50: float
    p95: float
    p99: float


class Speed(Section):
    """Speed at one prompt length and batch size, over `repeats` runs.

    Three numbers describe the decode speeds. `spread` is (max − min) / median. `error` is half of the 95 % interval of
    the median, relative to the median. `drift` is the relative change from the first runs to the last, 0 if it may be
    scatter. `attention`, `compile` and `cache` are the options of transformers; null for another runtime.
    `prefill_dtype` is the arithmetic of the prefill; null if only one arithmetic, `dtype`, was measured.
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
        """Arithmetic of both phases, in words."""
        other = self.prefill_dtype and self.prefill_dtype != self.dtype
        return f"{self.dtype}, prefill {self.prefill_dtype}" if other else self.dtype

    @property
    def how(self) -> tuple[str | None, str | None, str | None]:
        """Options of transformers."""
        return self.attention, self.compile, self.cache


class SentenceSpeed(Section):
    """Speed of whole sentences, from text to text or vector, `batch` at once.

    `latency_ms` is the time of a batch, and `sentences_s` the number of sentences in a second.
    """

    batch: int
    n: int
    latency_ms: Percentiles
    sentences_s: float
    repeats: int | None = None
    dtype: str | None = None


class ServedLoad(Section):
    """Requests that arrived at `rate` a second on average, and how the completed requests were served.

    If `rate` is null, they came from `concurrency` users instead, each of whom sent the next one when the last one was
    answered. `ttft_ms` counts from a request's arrival, `token_ms` between its tokens. `throughput_tok_s` is that of
    all requests together. `errors` counts the requests that were not completed, by what the server said.
    """

    rate: float | None = None
    concurrency: int | None = None
    requests: int
    completed: int
    throughput_tok_s: float
    ttft_ms: Percentiles
    token_ms: Percentiles | None = None
    errors: dict[str, int] = {}
    server: str


class ChangedText(Section):
    """A text that a draft changed: the first token that differs, and the gap of the first two logits there."""

    text: int
    position: int
    gap: float


class Speculative(Section):
    """Greedy decoding with a draft model that proposes `tokens` at a time; the share `acceptance` stays.

    `identical` says whether every text is, token by token, the text without a draft. `parted` has the texts that are
    not.
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
    parted: list[ChangedText] = []


class Memory(Section):
    """Peak memory of the measuring process."""

    peak_rss_bytes: int | None = None
    peak_vram_bytes: int | None = None
    dtype: str | None = None


class Energy(Section):
    """Energy per generated token, or a note on why it is not known."""

    joules_per_token: float | None = None
    note: str | None = None


class RooflinePoint(Section):
    """A speed under the machine's roofline: operations and bytes of a token, what was reached, and what limits it.

    `bandwidth_gb_s` is the bandwidth for so many bytes, from memory or a cache. `share` is the reached share of the
    roof.
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


class Roofline(RooflinePoint):
    """The place of decoding at the first measured shape, and the place of its prefill."""

    batch: int | None = None
    context: int | None = None
    dtype: str | None = None
    prefill: RooflinePoint | None = None


class TokenCost(Section):
    """A price of a million tokens."""

    prefill: float | None = None
    decode: float | None = None


class Price(Section):
    """Price of tokens on a machine that costs `price_per_hour` and does nothing else."""

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
    """Difference from the baseline on the same text and tasks. Ratios are variant / baseline."""

    perplexity: PerplexityDelta | None = None
    other_perplexity: list[PerplexityDelta] = []
    accuracy: list[AccuracyDelta] = []
    decode_speed_ratio: float | None = None
    size_ratio: float | None = None


class LossPoint(Section):
    """A point of a loss curve: means over the steps since the last point, in nats per token."""

    step: int
    loss: float
    ce: float | None = None
    kl: float | None = None


class Validation(Section):
    """Perplexity on the held-out text after a step of training, or what it is judged by instead.

    That is the cosine of embeddings to the teacher's, or the divergence from the teacher in nats per token.
    """

    step: int
    perplexity: float | None = None
    cosine: float | None = None
    kl: float | None = None


class Training(Section):
    """The course of a distillation."""

    curve: list[LossPoint] = []
    validation: list[Validation] = []


class Load(Section):
    """One loader's attempt to open the artifact; "other" if the loader is not for such a format."""

    loader: str
    version: str | None = None
    status: Literal["ok", "failed", "absent", "other"]
    seconds: float | None = None
    error: str | None = None
