"""A llama-server, the model behind the small server of the tests, and the key that they ask with."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from lighten.evaluate import machine
from lighten.evaluate.runtimes.choose import open_runtime
from lighten.evaluate.runtimes.endpoint import connection
from lighten.evaluate.runtimes.runtime import Runtime
from lighten.evaluate.speed.server import LlamaServer
from tests.evaluate.conftest import Tiny
from tests.evaluate.runtimes.endpoint.measured import KEY


@pytest.fixture(scope="module", autouse=True)
def key() -> Iterator[None]:
    """Gives all tests a key, because a process with another environment takes seconds to start."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv(connection.KEY, raising=False)
        patch.setenv(connection.OTHER_KEY, KEY)
        yield


@pytest.fixture(scope="package")
def llama(tiny_gguf: Path) -> Iterator[str]:
    """The URL of the API of a llama-server, which has one thread: the model is tiny."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(machine, "cores", lambda: 1)
        server = LlamaServer(tiny_gguf, 512, "cpu")
    with server:
        yield f"http://127.0.0.1:{server.port}/v1"


@pytest.fixture(scope="package")
def model(tiny: Tiny) -> Iterator[Runtime]:
    """The model behind the test's own server."""
    opened = open_runtime(tiny())
    yield opened
    opened.close()
