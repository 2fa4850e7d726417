import time

from hypothesis import given
from hypothesis import strategies as st

from lighten.data.choices import load_choices
from lighten.data.overlap import SHOWN_WORDS, overlap, words
from lighten.data.text import builtin_text

TEXTS = st.lists(st.sampled_from(["a", "b", "c"]), max_size=30).map(" ".join)


def brute(calibration: str, evaluation: list[str], ngram: int) -> tuple[int, int]:
    """Counts by looking for every run at every place."""
    known, found, count = calibration.split(), 0, 0
    for text in evaluation:
        own = text.split()
        size = min(ngram, len(own))
        for start in range(len(own) - size + 1 if own else 0):
            run = own[start : start + size]
            count += 1
            found += any(known[at : at + size] == run for at in range(len(known) - size + 1))
    return found, count


@given(TEXTS, st.lists(TEXTS, max_size=4), st.integers(1, 6))
def test_it_counts_what_a_search_of_every_place_finds(calibration: str, evaluation: list[str], ngram: int) -> None:
    found, count = brute(calibration, evaluation, ngram)
    made = overlap(calibration, evaluation, ngram)
    assert (made.runs, made.share) == (count, found / count if count else 0.0)
    assert bool(made.examples) == bool(found)
    assert len(made.examples) <= 3
    for example in made.examples:
        assert brute(calibration, [example.removesuffix(" …")], ngram) in [(n, n) for n in range(1, 30)]


def test_case_punctuation_and_line_breaks_do_not_hide_an_overlap() -> None:
    sentence = "One two, three four; five six seven eight nine ten eleven twelve thirteen."
    made = overlap(f"Before it. {sentence} After it.", [sentence.upper().replace(" ", "\n")])
    assert (made.share, made.runs) == (1.0, 1)
    assert made.examples == ("one two three four five six seven eight nine ten eleven twelve thirteen",)


def test_the_examples_are_the_longest_passages_cut_to_a_line() -> None:
    known = " ".join(f"w{i}" for i in range(200))
    made = overlap(known, [" ".join(f"w{i}" for i in range(start, start + length)) for start, length in
                           [(0, 14), (50, 13), (70, 40), (150, 20)]])  # fmt: skip
    assert [example.split()[0] for example in made.examples] == ["w70", "w150", "w0"]
    assert len(made.examples[0].split()) == SHOWN_WORDS + 1


def test_scripts_without_spaces_are_read_by_the_character() -> None:
    assert words("日本語 the テスト2") == ["日", "本", "語", "the", "テ", "ス", "ト", "2"]


def test_nothing_overlaps_nothing() -> None:
    assert overlap("", ["a b c"]).share == overlap("a b c", []).share == overlap("a", ["", "…"]).share == 0.0


def test_the_builtin_sets_do_not_overlap() -> None:
    tasks = [f"{task.context} {ending}" for task in load_choices("builtin") for ending in task.endings]
    for evaluation in ([builtin_text("perplexity")], tasks):
        made = overlap(builtin_text("calibration"), evaluation)
        assert made.runs > 1000
        assert (made.share, made.examples) == (0.0, ())


def test_megabytes_take_less_than_a_second() -> None:
    text = " ".join(f"{i * 7919 % 30011:x}" for i in range(200_000))
    assert len(text) > 900_000
    start = time.process_time()
    assert overlap(text, [text]).share == 1.0
    assert time.process_time() - start < 2.0  # a third of a second on an idle core
