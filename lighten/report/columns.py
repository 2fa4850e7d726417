"""The columns of the comparison, in the order in which they are read."""

from __future__ import annotations

from dataclasses import replace

from lighten.numerics.steady import UNSTEADY
from lighten.report import claims
from lighten.report.accuracy import accuracy_columns
from lighten.report.cell import Cell, Column, plain
from lighten.report.numbers import byte_unit, change, decimals_of, fixed, ratio, share, significant
from lighten.report.texts import text_columns
from lighten.results.measured import Speed
from lighten.results.results import Results, Variant


def columns(results: Results) -> list[Column]:
    """Returns every column that results can fill, in the order they are read."""
    return [
        *_name_columns(results),
        *_size_columns(results),
        *_perplexity_columns(results),
        *_DIVERGENCE_COLUMNS,
        *accuracy_columns(results),
        *text_columns(results),
        *_speed_columns(results),
        _memory_column(results),
    ]


def _name_columns(results: Results) -> list[Column]:
    """Returns the name, format and runtime of a variant, and its number of weights if the variants differ in it."""
    found = [
        Column("variant", "Variant", "", "", 0, "Its name in the recipe.", lambda v: Cell(v.name, (), v.name)),
        Column("format", "Format", "", "", 7, "File format of the artifact.", lambda v: _word(v.format)),
        Column("runtime", "Runtime", "", "", 9, "What ran it for these measurements, and on which device.", _runtime),
    ]
    about = "How many numbers the model consists of, in millions."
    if len({v.params for v in results.measured if v.params}) > 1:
        found.append(Column("params", "Weights", "M", "lower", 9, about, _params))
    return found


def _size_columns(results: Results) -> list[Column]:
    """Returns the size of the files, and the bits of a weight."""
    unit, scale = byte_unit(v.size_bytes for v in results.measured)

    def size(v: Variant) -> Cell:
        if v.size_bytes is None:
            return Cell()
        part = results.size_ratio(v)
        details = () if part is None else (f"{fixed(100 * part, 0)} %",)
        return Cell(significant(v.size_bytes / scale, 3), details, float(v.size_bytes))

    return [
        Column("size", "Size", unit, "lower", 1, "All files of the artifact; 1 MB is 10⁶ bytes.", size),
        Column(
            "bits",
            "Bits/weight",
            "",
            "lower",
            8,
            "Bits that a weight takes on average, over all weights. The source mostly has 16.",
            lambda v: plain(v.bits_per_weight, 3),
        ),
    ]


def _perplexity_columns(results: Results) -> list[Column]:
    """Returns two columns for each protocol: perplexity and its change. A single protocol is not named."""
    protocols = list(dict.fromkeys(each.by for variant in results.measured for each in variant.perplexities))
    others = any(variant.vocabulary for variant in results.measured)
    found = []
    for i, by in enumerate(protocols or ["lighten"]):
        named = "" if len(protocols) < 2 and by == "lighten" else f" ({by})"
        units = {each.unit for variant in results.measured for each in variant.perplexities if each.by == by}
        how = "" if not named else f", by the protocol {by}"
        suffix = "" if i == 0 else f"-{i}"
        found += [
            Column(
                f"perplexity{suffix}",
                f"Perplexity{named}",
                "",
                "" if others else "lower",
                3,
                f"Among how many equally likely choices it hesitates, in effect, at each "
                f"{' or '.join(sorted(units)) or 'token'} of a text it was not made with{how}; 1 would be certainty. "
                "± is the standard error.",
                lambda v, by=by: _ppl(results, v, by),  # type: ignore[misc]
            ),
            Column(
                f"change{suffix}",
                f"Δ perplexity{named}",
                "%",
                "lower",
                2 if i == 0 else 13,
                "How much perplexity rose over the baseline's on the same tokens, with its 95 % interval. Being paired "
                "it is much tighter than the two standard errors.",
                lambda v, by=by: _ppl_change(results, v, by),  # type: ignore[misc]
            ),
        ]
    return [*found, _BITS_PER_BYTE] if others else found


_BITS_PER_BYTE = Column(
    "bits-per-byte",
    "Bits/byte",
    "",
    "lower",
    2,
    "How many bits a byte of the text takes as the model sees it. Models of different vocabularies can be compared by "
    "it; their perplexities, which are per token, cannot.",
    lambda v: plain(v.bits_per_byte, 4),
)


def _ppl_change(results: Results, v: Variant, by: str) -> Cell:
    if v is results.baseline:
        return Cell("")
    delta = results.perplexity_change(v, by)
    if delta is None:
        return Cell()
    text, interval = change(delta.relative, delta.ci95)
    margin = (delta.ci95[1] - delta.ci95[0]) / 2 if delta.ci95 else 0.0
    return Cell(text, (interval,) if interval else (), delta.relative, margin, not claims.too_good(results, v))


def _kl(v: Variant) -> Cell:
    if v.divergence is None:
        return Cell()
    return Cell(significant(v.divergence.kl_mean, 3, decimals=4), (), v.divergence.kl_mean)


def _top1(v: Variant) -> Cell:
    if v.divergence is None or v.divergence.top1_agreement is None:
        return Cell()
    return Cell(share(v.divergence.top1_agreement), (), v.divergence.top1_agreement)


_DIVERGENCE_COLUMNS = (
    Column(
        "kl",
        "KL",
        "nats",
        "lower",
        10,
        "Kullback–Leibler divergence: how far the probabilities of the next token moved from the baseline's, on "
        "average. 0 is the same model.",
        _kl,
    ),
    Column(
        "top1",
        "Top-1",
        "%",
        "higher",
        13,
        "How often the token it finds likeliest is the one that the baseline finds likeliest.",
        _top1,
    ),
)


def _speed_columns(results: Results) -> list[Column]:
    """Returns the speeds of the first measured shape, and the arithmetic that they were measured in."""
    setting = _speed_setting(results)

    def decode(v: Variant) -> Cell:
        part = claims.decode_ratio(results, v)
        first = v.speed[0] if v.speed else None
        span = claims.ends(first) if first else None
        cell = replace(_rate(first, v.decode_tok_s), details=() if part is None else (ratio(part),))
        return replace(cell, margin=(span[1] - span[0]) / 2 if span else 0.0)

    prefill_about = f"Tokens of the prompt that are read per second{setting}."
    return [
        Column("prefill", "Prefill", "tok/s", "higher", 12, prefill_about, _prefill),
        Column(
            "decode",
            "Decode",
            "tok/s",
            "higher",
            4,
            f"Tokens written per second{setting}, and × the baseline where the two intervals are apart. ≈: repeats "
            f"differ by more than {UNSTEADY:.0%}, so it is not compared.".replace("%", " %"),
            decode,
        ),
        Column(
            "arithmetic",
            "Arithmetic",
            "",
            "",
            8,
            "The type of numbers that the speeds were measured in: of decoding, and of prefill where that is another. "
            "Of a GGUF file it is how its weights are stored.",
            lambda v: _word(v.speed[0].arithmetic if v.speed else None),
        ),
        Column(
            "ttft",
            "TTFT p50",
            "ms",
            "lower",
            11,
            f"Time to first token: how long one waits for the answer to begin, in half of the runs at most{setting}.",
            _first_token,
        ),
    ]


def _memory_column(results: Results) -> Column:
    unit, scale = byte_unit(_peak(v)[0] for v in results.measured)

    def memory(v: Variant) -> Cell:
        peak, where = _peak(v)
        return Cell() if peak is None else Cell(significant(peak / scale, 3), (where,), float(peak))

    about = "The most memory the measuring process took: of the GPU if it used one, else of the machine (RSS)."
    return Column("memory", "Peak memory", unit, "lower", 6, about, memory)


def _params(v: Variant) -> Cell:
    return Cell() if v.params is None else Cell(significant(v.params / 1e6, 4), (), float(v.params))


def _prefill(v: Variant) -> Cell:
    return _rate(v.speed[0], v.speed[0].prefill_tok_s) if v.speed else Cell()


def _first_token(v: Variant) -> Cell:
    first = v.speed[0] if v.speed else None
    return _rate(first, first.ttft_ms.p50) if first and first.ttft_ms else Cell()


def _rate(speed: Speed | None, value: float | None) -> Cell:
    """Returns the cell of a speed, marked if its repeats differ too much."""
    cell = plain(value, 3)
    if cell.value is None or not claims.noisy(speed):
        return cell
    return replace(cell, text=f"≈{cell.text}", holds=False)


def _word(value: str | None) -> Cell:
    return Cell(value, (), value) if value else Cell()


def _runtime(v: Variant) -> Cell:
    return replace(_word(v.runtime), details=(v.device,) if v.runtime and v.device else ())


def _ppl(results: Results, v: Variant, by: str) -> Cell:
    found = next((each for each in v.perplexities if each.by == by), None)
    if found is None:
        return Cell()
    value, stderr = found.value, found.stderr
    details = () if stderr is None else (f"± {fixed(stderr, max(decimals_of(value, 4), decimals_of(stderr, 1)))}",)
    delta = results.perplexity_change(v, by)
    half = (delta.ci95[1] - delta.ci95[0]) / 2 if delta and delta.ci95 else 0.0
    margin = half * value / (1 + delta.relative) if delta and delta.relative > -1 else 0.0
    return Cell(significant(value, 4), details, value, margin, not claims.too_good(results, v))


def _peak(v: Variant) -> tuple[int | None, str]:
    if v.memory is None:
        return None, ""
    if v.memory.peak_vram_bytes:
        return v.memory.peak_vram_bytes, "GPU"
    return v.memory.peak_rss_bytes, "RSS"


def _speed_setting(results: Results) -> str:
    """Returns the batch and lengths of the speed columns in words, if they are the same for all variants."""
    settings = {(v.speed[0].batch, v.speed[0].prompt, v.speed[0].generate) for v in results.measured if v.speed}
    if len(settings) != 1:
        return ""
    batch, prompt, generate = settings.pop()
    return f" at batch {batch}, {prompt:,} prompt and {generate:,} generated tokens"
