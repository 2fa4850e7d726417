"""English phrases about numbers, dates, times and prices with their German translation, made by rules.

They stand in for a corpus: a small translation model learns them in minutes, without a network. Numbers in words turn
their parts around ("forty-two", "zweiundvierzig"), so that copying is not enough.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from itertools import islice
from typing import Literal, NamedTuple

VERSION = 1
"""Raised whenever other phrases come out."""
Split = Literal["train", "test"]
TEST = 16
"""One English phrase in so many is kept for the test: a phrase is in one of the two sets only, by its digest."""

_ONES = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen"
ONES = [*_ONES.split(), "seventeen", "eighteen", "nineteen"]
TENS = ["", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
_EINER = "null eins zwei drei vier fünf sechs sieben acht neun zehn elf zwölf dreizehn vierzehn fünfzehn sechzehn"
EINER = [*_EINER.split(), "siebzehn", "achtzehn", "neunzehn"]
ZEHNER = ["", "", "zwanzig", "dreißig", "vierzig", "fünfzig", "sechzig", "siebzig", "achtzig", "neunzig"]
MONTHS = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
]
MONATE = [
    "Januar",
    "Februar",
    "März",
    "April",
    "Mai",
    "Juni",
    "Juli",
    "August",
    "September",
    "Oktober",
    "November",
    "Dezember",
]
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
TAGE = ["Montag", "Dienstag", "Mittwoch", "Donnerstag", "Freitag", "Samstag", "Sonntag"]
THINGS = [
    ("tickets", "Karten"),
    ("books", "Bücher"),
    ("houses", "Häuser"),
    ("apples", "Äpfel"),
    ("letters", "Briefe"),
    ("chairs", "Stühle"),
    ("bicycles", "Fahrräder"),
    ("bottles", "Flaschen"),
    ("trees", "Bäume"),
    ("coins", "Münzen"),
]
DEEDS = [("sold", "verkauft"), ("counted", "gezählt"), ("ordered", "bestellt"), ("found", "gefunden")]
EVENTS = [
    ("meeting", "Die Sitzung"),
    ("concert", "Das Konzert"),
    ("lecture", "Der Vortrag"),
    ("journey", "Die Reise"),
    ("course", "Der Kurs"),
]


class Pair(NamedTuple):
    """A text and its translation."""

    source: str
    target: str


def english(number: int) -> str:
    """Returns a number below a million in English words."""
    if number < 20:
        return ONES[number]
    if number < 100:
        return TENS[number // 10] + (f"-{ONES[number % 10]}" if number % 10 else "")
    if number < 1000:
        return f"{ONES[number // 100]} hundred" + (f" and {english(number % 100)}" if number % 100 else "")
    rest = number % 1000
    joint = " and " if 0 < rest < 100 else " " if rest else ""
    return f"{english(number // 1000)} thousand{joint}{english(rest) if rest else ''}"


def german(number: int, *, last: bool = True) -> str:
    """Returns a number below a million in German words; `last` says whether nothing follows in its word."""
    if number == 1:
        return "eins" if last else "ein"
    if number < 20:
        return EINER[number]
    if number < 100:
        unit = f"{german(number % 10, last=False)}und" if number % 10 else ""
        return unit + ZEHNER[number // 10]
    if number < 1000:
        return f"{german(number // 100, last=False)}hundert{german(number % 100, last=last) if number % 100 else ''}"
    rest = german(number % 1000, last=last) if number % 1000 else ""
    return f"{german(number // 1000, last=False)}tausend{rest}"


def _ordinal(day: int) -> str:
    ending = "th" if 10 < day < 14 else {1: "st", 2: "nd", 3: "rd"}.get(day % 10, "th")
    return f"{day}{ending}"


def _date(chance: random.Random) -> Pair:
    """Returns a date as it stands after "on" and "am"."""
    day, month, year = chance.randint(1, 28), chance.randrange(12), chance.randint(1800, 2099)
    then = f"{day}. {MONATE[month]} {year}"
    form = chance.randrange(3)
    if form == 0:
        return Pair(f"the {_ordinal(day)} of {MONTHS[month]} {year}", then)
    if form == 1:
        return Pair(f"{MONTHS[month]} {day}, {year}", then)
    week = chance.randrange(7)
    return Pair(f"{DAYS[week]}, {day} {MONTHS[month]} {year}", f"{TAGE[week]}, dem {then}")


def _time(chance: random.Random) -> Pair:
    """Returns a time as it stands after "at" and "um"."""
    hour = chance.randint(1, 11)
    form = chance.randrange(4)
    if form == 0:
        return Pair(f"half past {ONES[hour]}", f"halb {EINER[hour + 1]}")
    if form == 1:
        return Pair(f"a quarter to {ONES[hour]}", f"Viertel vor {EINER[hour]}")
    if form == 2:
        return Pair(f"a quarter past {ONES[hour]}", f"Viertel nach {EINER[hour]}")
    minute = chance.randint(1, 59)
    return Pair(f"{hour}:{minute:02} p.m.", f"{hour + 12}.{minute:02} Uhr")


def _count(chance: random.Random) -> int:
    return chance.randint(2, 10 ** chance.randint(2, 6) - 1)


def _price(chance: random.Random) -> Pair:
    whole, cents = chance.randint(1, 9999), chance.randint(1, 99)
    return Pair(f"€{whole:,}.{cents:02}", f"{whole:,}".replace(",", ".") + f",{cents:02} €")


def _phrase(chance: random.Random) -> Pair:
    form = chance.randrange(5)
    if form == 0:
        number = _count(chance)
        thing, ding = chance.choice(THINGS)
        return Pair(f"{english(number)} {thing}", f"{german(number)} {ding}")
    if form == 1:
        number, (thing, ding), (deed, tat), date = (
            _count(chance),
            chance.choice(THINGS),
            chance.choice(DEEDS),
            _date(chance),
        )
        return Pair(
            f"On {date.source}, {english(number)} {thing} were {deed}.",
            f"Am {date.target} wurden {german(number)} {ding} {tat}.",
        )
    (event, ereignis), date, time = chance.choice(EVENTS), _date(chance), _time(chance)
    if form == 2:
        return Pair(
            f"The {event} begins on {date.source} at {time.source}.",
            f"{ereignis} beginnt am {date.target} um {time.target}.",
        )
    price = _price(chance)
    if form == 3:
        return Pair(f"The {event} costs {price.source}.", f"{ereignis} kostet {price.target}.")
    (thing, ding), number = chance.choice(THINGS), _count(chance)
    return Pair(f"{english(number)} {thing} for {price.source}", f"{german(number)} {ding} für {price.target}")


def phrases(split: Split, seed: int = 0) -> Iterator[Pair]:
    """Yields pairs without end. No phrase of one split is in the other."""
    chance = random.Random(f"{VERSION} {split} {seed}")
    while True:
        pair = _phrase(chance)
        kept = hashlib.sha256(pair.source.encode()).digest()[0] % TEST == 0
        if kept == (split == "test"):
            yield pair


def some(split: Split, count: int, seed: int = 0) -> list[Pair]:
    """Returns the first pairs of a split."""
    return list(islice(phrases(split, seed), count))
