"""The columns of the comparison, described once for the terminal, Markdown and HTML."""

from __future__ import annotations

from dataclasses import dataclass, replace

from lighten.numerics.steady import UNSTEADY
from lighten.report import claims
from lighten.report.accuracy import accuracy_columns
from lighten.report.calibration import overlaps
from lighten.report.cell import Cell, Column, plain
from lighten.report.numbers import byte_unit, change, decimals_of, fixed, ratio, share, significant
from lighten.report.serving import doubts
from lighten.results.measured import Speed
from lighten.results.results import Results, Variant


@dataclass(frozen=True)
class Row:
    """One variant; a failed one has no cells but a reason."""

    variant: Variant
    cells: tuple[Cell, ...] = ()
    baseline: bool = False
    reason: str = ""


@dataclass(frozen=True)
class Table:
    """The baseline's row first, then the others as the recipe names them, failed ones last."""

    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    missing: tuple[str, ...]
    """Titles of the columns nothing was measured for; they are left out."""
    notes: tuple[str, ...] = ()
    """What casts doubt on the numbers; stands directly under them."""


def table(results: Results) -> Table:
    """Returns the comparison of all variants; the best value of a column is marked among the non-baseline ones."""
    base = results.baseline
    order = [*([base] if base else []), *(v for v in results.measured if v is not base)]
    everything = columns(results)
    grid = [[column.cell(variant) for column in everything] for variant in order]
    used = [i for i, column in enumerate(everything) if _used(column, [cells[i] for cells in grid])]
    for i in used:
        _mark_best(everything[i], grid, i, start=1 if base else 0)
    rows = [
        Row(variant, tuple(cells[i] for i in used), baseline=variant is base)
        for variant, cells in zip(order, grid, strict=True)
    ]
    failed = [Row(v, baseline=v.name == "baseline", reason=v.error or "") for v in results.variants if v.failed]
    missing = tuple(column.title for i, column in enumerate(everything) if i not in used)
    return Table(
        tuple(everything[i] for i in used),
        (*rows, *failed),
        missing,
        (*overlaps(results), *claims.doubts(results), *doubts(results)),
    )


def _used(column: Column, cells: list[Cell]) -> bool:
    return column.name == "variant" or any(cell.value is not None for cell in cells)


def _mark_best(column: Column, grid: list[list[Cell]], i: int, *, start: int) -> None:
    """Marks the best cell of a column and those that are as good; if that is all of them, none is marked."""
    cells = [row[i] for row in grid[start:]]
    known = [(cell.value, cell) for cell in cells if isinstance(cell.value, float)]
    if not column.better or len(known) < 2:
        return
    value, best = (min if column.better == "lower" else max)(known, key=lambda pair: pair[0])
    if not best.holds:  # who is the best is not known
        return
    as_good = [
        cell
        for v, cell in known
        if cell.holds and (cell.text == best.text or abs(v - value) <= best.margin + cell.margin)
    ]
    if len(as_good) < len(known):
        for row in grid[start:]:
            if any(row[i] is cell for cell in as_good):
                row[i] = replace(row[i], best=True)


def columns(results: Results) -> list[Column]:
    """Returns every column that results can fill, in the order they are read."""
    size_unit, size_scale = byte_unit(v.size_bytes for v in results.measured)
    memory_unit, memory_scale = byte_unit(_peak(v)[0] for v in results.measured)
    setting = _speed_setting(results)
    counts = {v.params for v in results.measured if v.params}
    weights = [
        Column(
            "params",
            "Weights",
            "M",
            "lower",
            9,
            "How many numbers the model consists of, in millions.",
            lambda v: Cell() if v.params is None else Cell(significant(v.params / 1e6, 4), (), float(v.params)),
        )
    ]

    def size(v: Variant) -> Cell:
        if v.size_bytes is None:
            return Cell()
        part = results.size_ratio(v)
        details = () if part is None else (f"{fixed(100 * part, 0)} %",)
        return Cell(significant(v.size_bytes / size_scale, 3), details, float(v.size_bytes))

    def memory(v: Variant) -> Cell:
        peak, where = _peak(v)
        return Cell() if peak is None else Cell(significant(peak / memory_scale, 3), (where,), float(peak))

    def decode(v: Variant) -> Cell:
        part = claims.decode_ratio(results, v)
        first = v.speed[0] if v.speed else None
        span = claims.ends(first) if first else None
        cell = replace(_rate(first, v.decode_tok_s), details=() if part is None else (ratio(part),))
        return replace(cell, margin=(span[1] - span[0]) / 2 if span else 0.0)

    def prefill(v: Variant) -> Cell:
        return _rate(v.speed[0], v.speed[0].prefill_tok_s) if v.speed else Cell()

    def first_token(v: Variant) -> Cell:
        first = v.speed[0] if v.speed else None
        return _rate(first, first.ttft_ms.p50) if first and first.ttft_ms else Cell()

    return [
        Column("variant", "Variant", "", "", 0, "Its name in the recipe.", lambda v: Cell(v.name, (), v.name)),
        Column("format", "Format", "", "", 7, "File format of the artifact.", lambda v: _word(v.format)),
        Column("runtime", "Runtime", "", "", 9, "What ran it for these measurements, and on which device.", _runtime),
        *(weights if len(counts) > 1 else []),
        Column("size", "Size", size_unit, "lower", 1, "All files of the artifact; 1 MB is 10⁶ bytes.", size),
        Column(
            "bits",
            "Bits/weight",
            "",
            "lower",
            8,
            "Bits that a weight takes on average, over all weights. The source mostly has 16.",
            lambda v: plain(v.bits_per_weight, 3),
        ),
        *_perplexity_columns(results),
        Column(
            "kl",
            "KL",
            "nats",
            "lower",
            10,
            "Kullback–Leibler divergence: how far the probabilities of the next token moved from the baseline's, on "
            "average. 0 is the same model.",
            lambda v: (
                Cell()
                if v.divergence is None
                else Cell(significant(v.divergence.kl_mean, 3, decimals=4), (), v.divergence.kl_mean)
            ),
        ),
        Column(
            "top1",
            "Top-1",
            "%",
            "higher",
            13,
            "How often the token it finds likeliest is the one that the baseline finds likeliest.",
            lambda v: (
                Cell()
                if v.divergence is None or v.divergence.top1_agreement is None
                else Cell(share(v.divergence.top1_agreement), (), v.divergence.top1_agreement)
            ),
        ),
        *accuracy_columns(results),
        Column(
            "prefill",
            "Prefill",
            "tok/s",
            "higher",
            12,
            f"Tokens of the prompt that are read per second{setting}.",
            prefill,
        ),
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
            first_token,
        ),
        Column(
            "memory",
            "Peak memory",
            memory_unit,
            "lower",
            6,
            "The most memory the measuring process took: of the GPU if it used one, else of the machine (RSS).",
            memory,
        ),
    ]


def _rate(speed: Speed | None, value: float | None) -> Cell:
    """Returns the cell of a number of a speed measurement, marked where its repeats differ too much."""
    cell = plain(value, 3)
    if cell.value is None or not claims.noisy(speed):
        return cell
    return replace(cell, text=f"≈{cell.text}", holds=False)


def _perplexity_columns(results: Results) -> list[Column]:
    """Returns two columns per protocol, its perplexity and the change of that; without names where there is one."""
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
    """Says at which batch and lengths the speed columns were measured, if it is the same for all."""
    settings = {(v.speed[0].batch, v.speed[0].prompt, v.speed[0].generate) for v in results.measured if v.speed}
    if len(settings) != 1:
        return ""
    batch, prompt, generate = settings.pop()
    return f" at batch {batch}, {prompt:,} prompt and {generate:,} generated tokens"


def first_line(reason: str) -> str:
    """Returns the first line of a reason, for places that have room for one."""
    return next((line.strip() for line in reason.splitlines() if line.strip()), "")
