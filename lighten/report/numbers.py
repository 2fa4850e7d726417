"""How numbers are written: significant digits and decimal units (1 MB is 10^6 bytes)."""

from __future__ import annotations

import math
from collections.abc import Iterable

NOT_MEASURED = "–"
MINUS = "−"


def fixed(value: float, decimals: int, *, sign: bool = False) -> str:
    """Returns `value` with that many decimals and thousands separators. Zero has no minus sign."""
    text = f"{abs(value):,.{decimals}f}"
    zero = not text.strip("0.,")
    if value < 0 and not zero:
        return MINUS + text
    return f"+{text}" if sign and not zero else text


def decimals_of(value: float, digits: int) -> int:
    """Returns the decimals that show `value` with that many significant digits (0 if it needs none)."""
    if value == 0:
        return 0
    exponent = int(f"{value:.{digits - 1}e}".partition("e")[2])
    return max(0, digits - 1 - exponent)


def significant(value: float, digits: int, *, decimals: int = 6) -> str:
    """Returns `value` with significant digits, and at most `decimals` digits after the point.

    A positive value that is too small for these decimals reads "<0.0001".
    """
    if value == 0:
        return "0"
    if abs(value) < 0.5 * 10.0**-decimals:
        return f"<{10.0**-decimals:.{decimals}f}"
    places = decimals_of(value, digits)
    if places == 0:
        value = float(f"{value:.{digits - 1}e}")
    return fixed(value, min(places, decimals))


def decimals_for(uncertainty: float, *, most: int = 3) -> int:
    """Returns the decimals that an uncertainty supports: two digits of it if it starts with 1 or 2, else one."""
    if uncertainty <= 0:
        return most
    mantissa, exponent = f"{uncertainty:.1e}".split("e")
    return min(most, max(0, -int(exponent) + (1 if float(mantissa) < 3 else 0)))


def change(value: float, interval: tuple[float, float] | None, *, least: int = 0) -> tuple[str, str]:
    """Returns a signed difference and its interval, both times 100 and without the percent sign.

    The interval determines the decimals; there are at least `least`. Without an interval the second text is empty.
    """
    percent = 100 * value
    if interval is None:
        return fixed(percent, max(least, min(2, decimals_of(percent, 2))), sign=True), ""
    low, high = (100 * end for end in interval)
    decimals = max(least, decimals_for((high - low) / 2))
    ends = ", ".join(fixed(end, decimals, sign=True) for end in (low, high))
    return fixed(percent, decimals, sign=True), f"[{ends}]"


def share(value: float) -> str:
    """Returns a fraction as a percentage with one decimal. Only the whole is written as 100."""
    if 0.9995 <= value < 1:
        return ">99.9"
    return fixed(100 * value, 0 if value == 1 else 1)


def ratio(value: float) -> str:
    """Returns a ratio such as "1.9×"."""
    return f"{significant(value, 2, decimals=2)}×"


def byte_unit(sizes: Iterable[int | None]) -> tuple[str, float]:
    """Returns the unit for a column of sizes, and its bytes: GB if MB would need five digits, else MB."""
    known = [size for size in sizes if size is not None]
    large = bool(known) and (max(known) >= 1e10 or min(known) >= 1e9)
    return ("GB", 1e9) if large else ("MB", 1e6)


def byte_count(size: int) -> str:
    """Returns a size with a fitting unit, such as "105 MB"."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{significant(size / scale, 3)} {unit}"
    return f"{size} B"


def duration(seconds: float) -> str:
    """Returns a time such as "0.4 s", "78 s", "4 min 10 s" or "3 h 05 min"."""
    if seconds < 10:
        return f"{significant(seconds, 2, decimals=1)} s"
    whole = round(seconds)
    if whole < 120:
        return f"{whole} s"
    if whole < 7200:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = math.floor(seconds / 60 + 0.5)
    return f"{minutes // 60:,} h {minutes % 60:02d} min"
