"""Addresses of servers, their models and tokenizers."""

from pathlib import Path

import pytest

from lighten.errors import RequestError
from lighten.evaluate.loaders.programs import loaders
from lighten.evaluate.runtimes.choose import added, find_opener, openers
from lighten.evaluate.runtimes.endpoint.address import Address, addressed
from lighten.evaluate.runtimes.measurable import find_measurable
from tests.command import lighten


def test_an_address_is_one_text_and_back() -> None:
    for address in (
        Address("http://h:8000/v1"),
        Address("https://h/v1", "org/model name&#", Path("/some dir/t"), 12.5),
    ):
        assert Address.parse(str(address)) == address
    assert Address.parse("http://h/v1/").url == Address.parse("http://h").url == "http://h/v1"
    assert Address("http://h:1/v1").root == "http://h:1"
    assert "secret dir" not in Address("http://h/v1", "m", Path("/secret dir")).shown


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("http://me:pass@h/v1", "has a password or a query"),
        ("http://h/v1?key=pass", "has a password or a query"),
        ("http://", "looks like http://HOST"),
        ("http://h:port/v1", "cannot be read"),
        ("http://h/v1#name=x", "there is model, tokenizer, timeout"),
        ("http://h/v1#timeout=soon", "give the seconds"),
    ],
)
def test_what_is_no_address_is_refused_without_its_secrets(text: str, message: str) -> None:
    with pytest.raises(RequestError, match=message) as raised:
        Address.parse(text)
    assert "pass@" not in str(raised.value) and "key=pass" not in str(raised.value)


def test_names_go_to_their_servers() -> None:
    one, two = "http://a/v1", "http://b/v1"
    found = addressed(["dir", one, two], ["m", "n"], [])
    assert [Address.parse(each).model for each in found[1:]] == ["m", "n"] and found[0] == "dir"
    assert [Address.parse(each).model for each in addressed([one, two], ["m"], [])] == ["m", "m"]
    with pytest.raises(RequestError, match="--model is given 2 times for 3 servers"):
        addressed([one, two, one], ["m", "n"], [])
    with pytest.raises(RequestError, match="--tokenizer is about models on servers"):
        addressed(["dir"], [], ["t"])
    with pytest.raises(RequestError, match="needs the files of a model"):
        find_measurable(one)


def test_a_device_and_a_server_are_two_things(tmp_path: Path) -> None:
    done = lighten("evaluate", "http://h/v1", "--target", "ssh://pi", cwd=tmp_path)
    assert done.returncode == 2 and "http://h/v1 is a server: leave out --target" in done.stderr
    done = lighten("evaluate", "some-dir", "--requests", 4, cwd=tmp_path)
    assert done.returncode == 2 and "add --rate or --concurrency" in done.stderr


def test_a_server_is_no_loader_of_files() -> None:
    assert "endpoint" in openers() and "endpoint" not in {each.name for each in (*added(), *loaders())}


def test_any_server_of_the_api_is_recognised() -> None:
    for text in ("http://h/v1", "HTTPS://h:1/v1"):
        assert find_opener(text)[0].name == "endpoint"
    with pytest.raises(RequestError):
        find_opener("ftp://h/v1")
