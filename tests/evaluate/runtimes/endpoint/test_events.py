"""Events of a stream, however its bytes arrive."""

from hypothesis import given
from hypothesis import strategies as st

from lighten.evaluate.runtimes.endpoint.events import Events


@given(st.lists(st.text(st.characters(blacklist_characters="\r", blacklist_categories=("Cs",)), min_size=1)), st.data())
def test_events_are_the_same_wherever_their_bytes_are_cut(texts: list[str], data: st.DataObject) -> None:
    ends = data.draw(st.lists(st.sampled_from(["\n", "\r\n", "\r"]), min_size=1))
    lines = [
        each for text in texts for each in (": ping", *(f"data: {part}" for part in text.split("\n")), "id: 7", "")
    ]
    if texts and data.draw(st.booleans()):
        lines.pop()  # a server that leaves out the last empty line
    end = ends[0] if "\r" in ends else None  # "\r" and "\n" of different lines would be one end
    spelled = "".join(line + (end or ends[at % len(ends)]) for at, line in enumerate(lines))
    bytes_ = data.draw(st.sampled_from([b"", b"\xef\xbb\xbf"])) + spelled.encode()
    cuts = sorted(data.draw(st.lists(st.integers(0, len(bytes_)), max_size=20)))
    events = Events()
    found = [each for a, b in zip([0, *cuts], [*cuts, len(bytes_)], strict=True) for each in events.feed(bytes_[a:b])]
    assert found + events.end() == texts


def test_lines_of_one_event_are_one_text() -> None:
    events = Events()
    assert events.feed(b"data: a\r") + events.feed(b"\ndata: b\r\n\r") + events.feed(b"\n") == ["a\nb"]
    assert events.feed(b'data: {"a":\ndata:1}\n\nevent: x\n\ndata\n\n') == ['{"a":\n1}', ""]
