"""The campaign, short: a few kills, a full disk, two runs and gc at once, and a store that cannot be written."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from .__main__ import disk, prepare
from .disturb import Campaign, Room, Undisturbed, short_files
from .subject import steps


def short(model: Path) -> dict[str, Any]:
    whole = steps(model)
    variants = {"int4": whole["variants"]["int4"], "rtn": [{"quantize": {"method": "rtn", "group_size": 32}}]}
    return {**whole, "name": "short", "variants": variants, "evaluate": {}}


@pytest.fixture(scope="module")
def peace(tmp_path_factory: pytest.TempPathFactory) -> tuple[Campaign, Undisturbed]:
    folder = tmp_path_factory.mktemp("campaign")
    before, (whole,) = prepare(folder, [short])
    return Campaign(folder, 0, before, print), whole


@pytest.fixture(scope="module")
def room() -> Room:
    return disk(again=False)[1]


def test_a_full_disk_and_kills_at_random_moments(peace: tuple[Campaign, Undisturbed], room: Room) -> None:
    it, whole = peace
    it.fill(whole, room, kills=2)
    assert it.tally.full.total() == 1
    assert it.killed > 0
    assert it.tally.faults == []


def test_kills_of_gc(peace: tuple[Campaign, Undisturbed]) -> None:
    it, whole = peace
    it.kill_gc(whole, it.folder / "peace-0", 5)
    assert it.tally.checks >= 5
    assert it.tally.faults == []


def test_two_runs_and_gc_at_once(peace: tuple[Campaign, Undisturbed]) -> None:
    it, whole = peace
    it.together(whole)
    assert it.tally.gc_beside > 0
    assert it.tally.faults == []


def test_a_read_only_store(peace: tuple[Campaign, Undisturbed], room: Room) -> None:
    if room is short_files and os.geteuid() == 0:
        pytest.skip("root may write everywhere, and may not mount here")
    it, whole = peace
    it.read_only(whole, it.folder / "peace-0", room)
    assert it.tally.read_only > 5
    assert it.tally.faults == []
