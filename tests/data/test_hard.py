from lighten.data.hard import hard_strings, pieces


def test_many_special_tokens_leave_room_for_text() -> None:
    special = tuple(f"<|{n}|>" for n in range(1000))
    found = hard_strings(special=special)
    assert len(found) == 500 and set(pieces()) <= set(found)
    assert sum(text in special for text in found) == 125
    assert any(special[0] in text and text not in special for text in found)


def test_the_same_strings_every_time() -> None:
    assert hard_strings(special=("<s>",)) == hard_strings(special=("<s>",)) != hard_strings(special=("<s>",), seed=1)
