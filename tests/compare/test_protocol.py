from dataclasses import replace
from typing import Any

import pytest

from lighten.compare.protocol import check, same_machine
from lighten.compare.side import Side
from lighten.errors import RequestError
from lighten.results.measured import Accuracy, Perplexity
from lighten.results.results import Variant

PROTOCOL: dict[str, Any] = {
    "data": "builtin", "data_sha256": "d", "ids_sha256": "i", "length": 512, "stride": 512, "bos": False,
    "dtype": "float32", "chunks": 41, "method": "exp of the mean", "tokenizer": "own",
}  # fmt: skip


def side(
    name: str, runtime: str = "torch", tasks: tuple[tuple[str, int], ...] = (("builtin", 10),), **protocol: Any
) -> Side:
    row = Variant(
        name=name,
        status="ok",
        runtime=runtime,
        device="cpu",
        perplexity=Perplexity(value=20.0, protocol={**PROTOCOL, **protocol}),
        accuracy=[Accuracy(task=task, acc=0.5, n=n) for task, n in tasks],
    )
    return Side(name, row, {"cpu": "x", "cores": 2, "gpus": []})


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"length": 256, "stride": 256, "ids_sha256": "j"}, ["length is 512 in A and 256 in B", "stride"]),
        ({"data": "wiki.txt", "data_sha256": "e", "ids_sha256": "j"}, ["text is builtin in A and wiki.txt in B"]),
        (
            {"method": "second half of each chunk"},
            ["method is exp of the mean in A and second half of each chunk in B"],
        ),
        ({"ids_sha256": "j"}, ["another tokenizer"]),
        ({"dtype": "bfloat16"}, ["arithmetic is float32 in A and bfloat16 in B"]),
        ({"tasks": (("builtin", 20),)}, ["builtin has 10 tasks in A and 20 in B"]),
        ({"tasks": (("hellaswag", 10),)}, ["tasks are builtin in A and hellaswag in B"]),
        ({"protocol": "llama.cpp"}, ["protocol is not given in A and llama.cpp in B"]),
    ],
)
def test_other_protocols_are_refused_by_name(other: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(RequestError) as refused:
        check(side("a"), side("b", **other))
    for word in (*words, "a and b were not measured alike"):
        assert word in str(refused.value)


def test_chats_and_plain_texts_are_not_compared() -> None:
    def asked(name: str, **more: Any) -> Side:
        made = side(name)
        score = made.row.accuracy[0].model_copy(update=more)
        return replace(made, row=made.row.model_copy(update={"accuracy": [score]}))

    with pytest.raises(RequestError, match="builtin is asked as plain text in A and in chats in B"):
        check(asked("a"), asked("b", chat=True))
    with pytest.raises(RequestError, match=r"in chats with the system text 'Be brief\.' in A and in chats in B"):
        check(asked("a", chat=True, system="Be brief."), asked("b", chat=True))
    check(asked("a", chat=True), asked("b", chat=True))


def test_how_the_artifact_is_stored_may_differ() -> None:
    check(side("a"), side("b", runtime="llama.cpp", dtype="Q4_K - Medium", tokenizer="the baseline's"))
    check(side("a"), side("b", data="a copy", tasks=(("builtin", 10), ("more", 3))))
    check(side("a"), side("b", tasks=()))


def test_speeds_are_of_one_machine_or_not_compared() -> None:
    a, b = side("a"), side("b")
    assert same_machine(a, b)
    assert not same_machine(a, Side("b", b.row, {"cpu": "y", "cores": 2, "gpus": []}))
    assert not same_machine(a, Side("b", b.row.model_copy(update={"device": "cuda"}), a.machine))
