"""A tokenizer that is not that of the server is refused, and so are counts of tokens that differ."""

from pathlib import Path

import pytest

from lighten.errors import Failure, RequestError
from lighten.evaluate.runtimes.choose import open_runtime, open_tokenizer
from lighten.evaluate.runtimes.measurable import find_all
from lighten.evaluate.runtimes.runtime import Question, Runtime, Tokenizer
from lighten.step import silent
from tests.command import lighten
from tests.evaluate.conftest import Tiny
from tests.evaluate.runtimes.api_server import Manners, serving


def test_another_tokenizer_than_the_servers_is_refused(llama: str, tiny: Tiny, tmp_path: Path) -> None:
    other = tiny("llama", "spm")
    with pytest.raises(RequestError, match=r"is not that of .* it makes \d+ tokens of a text of which"):
        find_all([f"{llama}#tokenizer={other}"], lambda _: None)
    done = lighten("evaluate", llama, "--tokenizer", other, cwd=tmp_path)
    assert done.returncode == 2 and "--tokenizer" in done.stderr and done.stderr.count("lighten:") == 1
    for manners in (Manners(), Manners(streams=False)):
        with (
            serving(manners, tokenizer=open_tokenizer(tiny())) as url,
            pytest.raises(RequestError, match="it shows only their number"),
        ):
            open_runtime(f"{url}#tokenizer={other}")
    with serving(Manners()) as url:
        assert open_runtime(f"{url}#tokenizer={other}").detail.endswith("tokens not compared with the server's")


class Unlike:
    """A tokenizer that makes as many tokens of the whole text as another one, and more or less of its parts."""

    def __init__(self, tokenizer: Tokenizer, more: int, of_parts: int) -> None:
        self.tokenizer, self.more, self.of_parts = tokenizer, more, of_parts

    def encode(self, text: str) -> list[int]:
        more = self.more + (self.of_parts if "\n" not in text else 0)
        return [*self.tokenizer.encode(text), *([1] * more)]


@pytest.mark.parametrize(("more", "of_parts", "same"), [(0, 0, True), (1, 0, True), (0, 1, False), (2, 0, False)])
def test_tokenizers_are_compared_by_numbers_of_every_part(tiny: Tiny, more: int, of_parts: int, *, same: bool) -> None:
    with serving(Manners(), tokenizer=Unlike(open_tokenizer(tiny()), more, of_parts)) as url:  # type: ignore[arg-type]
        if same:  # one more is a BOS
            assert "not compared" not in open_runtime(f"{url}#tokenizer={tiny()}").detail
        else:
            with pytest.raises(RequestError, match="it shows only their number"):
                open_runtime(f"{url}#tokenizer={tiny()}")


@pytest.mark.parametrize("form", ["echo", "prompt_logprobs"])
def test_counts_that_differ_are_never_averaged_over(tiny: Tiny, model: Runtime, tmp_path: Path, form: str) -> None:
    manners = Manners(forms={form})
    with serving(manners, model) as url:
        opened = open_runtime(f"{url}#tokenizer={tiny()}")
        manners.extra = 2
        with pytest.raises(Failure, match=r"the server counts \d+ tokens where 4 were sent.*nothing is averaged"):
            opened.choose_many([Question([5, 6], [[7, 8]])], silent)
