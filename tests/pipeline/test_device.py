import getpass
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from lighten.errors import Failure, LightenError, RequestError
from lighten.export.bundle.settings import Bundle
from lighten.pipeline import device
from lighten.results.results import Results
from lighten.step import Context, silent
from lighten.store.artifact import Artifact

Tiny = Callable[..., Path]
SSHD = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
needs_sshd = pytest.mark.skipif(
    not (SSHD and shutil.which("ssh") and shutil.which("ssh-keygen")), reason="sshd, ssh or ssh-keygen is missing"
)
USER = getpass.getuser()


@pytest.fixture(scope="module")
def bundle(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bundle") / "made"
    out.mkdir()
    step = Bundle.model_validate(
        {"format": "bundle", "target": "rpi5", "type": "F32", "context": 256, "measure": False}
    )
    step.run(Artifact(tiny("llama", num_hidden_layers=6), {"format": "hf", "source": {}}), out, Context())
    return out


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@dataclass
class Server:
    """An sshd of our own on loopback, and where it keeps the copies."""

    folder: Path
    port: int
    process: subprocess.Popen[bytes] | None = None

    @property
    def cache(self) -> Path:
        return self.folder / "cache"

    @property
    def address(self) -> str:
        return f"ssh://{USER}@127.0.0.1:{self.port}"

    def start(self, **environment: str) -> None:
        self.stop()
        folder = self.folder
        given = {"XDG_CACHE_HOME": str(self.cache), **environment}
        (folder / "sshd_config").write_text(
            f"Port {self.port}\nListenAddress 127.0.0.1\nHostKey {folder}/host\n"
            f"AuthorizedKeysFile {folder}/authorized\n"
            f"PidFile {folder}/pid\nUsePAM no\nStrictModes no\nPasswordAuthentication no\nPermitRootLogin yes\n"
            f"KbdInteractiveAuthentication no\nSetEnv {' '.join(f'{key}={value}' for key, value in given.items())}\n"
        )
        assert SSHD
        if os.getuid() == 0:
            Path("/run/sshd").mkdir(exist_ok=True)
        log = folder / "log"
        one = {min(os.sched_getaffinity(0))}  # two threads wait for each other long where others want the cores too
        command = [SSHD, "-D", "-f", str(folder / "sshd_config"), "-E", str(log)]
        self.process = subprocess.Popen(command, preexec_fn=lambda: os.sched_setaffinity(0, one))
        for _ in range(100):
            with socket.socket() as probe:
                if not probe.connect_ex(("127.0.0.1", self.port)):
                    return
            if self.process.poll() is not None:
                pytest.skip(f"sshd does not start here: {log.read_text()[-300:]}")
            time.sleep(0.1)
        pytest.skip("sshd does not listen")

    def stop(self) -> None:
        if self.process:
            self.process.terminate()
            self.process.wait()
            self.process = None

    def left(self) -> list[str]:
        return sorted(path.name for path in self.cache.rglob("*"))


def client(folder: Path, monkeypatch: pytest.MonkeyPatch, **settings: str) -> None:
    """Makes the ssh that lighten calls read a configuration of its own."""
    options = {
        "UserKnownHostsFile": str(folder / "known"),
        "IdentityFile": str(folder / "key"),
        "IdentitiesOnly": "yes",
        "StrictHostKeyChecking": "yes",
        **settings,
    }
    config = folder / "ssh_config"
    config.write_text("".join(f"{name} {value}\n" for name, value in options.items()))
    monkeypatch.setenv("LIGHTEN_SSH", f"ssh -F {config}")


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    pytest.importorskip("llama_cpp", reason="a device runs llama-cpp-python, which is compiled")
    folder = tmp_path / "sshd"
    folder.mkdir()
    for name in ("host", "key", "stranger"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True)
    shutil.copy(folder / "key.pub", folder / "authorized")
    server = Server(folder, free_port())
    know(server, server.port)
    client(folder, monkeypatch)
    yield server
    server.stop()


def know(server: Server, *ports: int) -> None:
    key = " ".join((server.folder / "host.pub").read_text().split()[:2])
    (server.folder / "known").write_text("".join(f"[127.0.0.1]:{port} {key}\n" for port in ports))


class Proxy:
    """Passes connections on to a port; each may carry `limits[i]` bytes to the server before it is cut."""

    def __init__(self, port: int, limits: list[int]) -> None:
        self.to, self.limits, self.carried = port, limits, [0] * 64
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self.listener.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        for number in range(64):
            try:
                near, _ = self.listener.accept()
            except OSError:
                return
            far = socket.create_connection(("127.0.0.1", self.to))
            limit = self.limits[number] if number < len(self.limits) else 1 << 40
            threading.Thread(target=self._pass, args=(near, far, number, limit), daemon=True).start()
            threading.Thread(target=self._pass, args=(far, near, None, 1 << 40), daemon=True).start()

    def _pass(self, source: socket.socket, sink: socket.socket, number: int | None, limit: int) -> None:
        passed = 0
        with suppress(OSError):
            while passed < limit and (data := source.recv(65536)):
                sink.sendall(data)
                passed += len(data)
                if number is not None:
                    self.carried[number] = passed
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


def measure(bundle: Path, address: str, **more: Any) -> dict[str, Any]:
    return device.measure_there([str(bundle)], address, more.pop("report", silent), python=sys.executable, **more)


@pytest.mark.parametrize(
    ("target", "parsed"),
    [
        ("ssh://pi@box.local:2222", ("box.local", "pi", 2222)),
        ("ssh://box", ("box", None, None)),
        ("ssh://pi@MyPi:22", ("MyPi", "pi", 22)),
        ("ssh://[fe80::1]:22/", ("fe80::1", None, 22)),
    ],
)
def test_addresses(target: str, parsed: tuple[str, str | None, int | None]) -> None:
    found = device.parse_target(target)
    assert (found.host, found.user, found.port) == parsed


@pytest.mark.parametrize(
    "target",
    [
        "box",
        "http://box",
        "ssh://",
        "ssh://-oProxyCommand=x",
        "ssh://-l@box",
        "ssh://box/path",
        "ssh://box:x",
        "ssh://a b",
    ],
)
def test_wrong_addresses(target: str) -> None:
    with pytest.raises(RequestError, match="ssh://user@host"):
        device.parse_target(target)


def test_no_passwords() -> None:
    with pytest.raises(RequestError, match="takes no password"):
        device.parse_target("ssh://pi:secret@box")


def test_only_whole_bundles(bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"has no bundle\.json"):
        device.read_bundle(tmp_path)
    with pytest.raises(RequestError, match="is not a bundle"), device.opened(tmp_path / "none.tar.zst"):
        pass
    cut = tmp_path / "cut.tar.zst"
    cut.write_bytes((bundle / "bundle-rpi5-8gb.tar.zst").read_bytes()[:50_000])
    with pytest.raises(Failure, match="is damaged"), device.opened(cut):
        pass
    copy = tmp_path / "copy"
    shutil.copytree(bundle, copy)
    with (copy / "model-F32.gguf").open("r+b") as file:
        file.write(b"x")
    with pytest.raises(Failure, match="is not what SHA256SUMS says"):
        device.read_bundle(copy)
    (copy / "chat.py").unlink()
    with pytest.raises(Failure, match=r"chat\.py' is missing"):
        device.read_bundle(copy)
    sums = (bundle / "SHA256SUMS").read_text()
    (copy / "SHA256SUMS").write_text(sums.replace("chat.py", "$(id)"))
    with pytest.raises(Failure, match="missing"):
        device.read_bundle(copy)


@needs_sshd
def test_measured_on_a_device(bundle: Path, server: Server) -> None:
    server.start()
    notes: list[str] = []
    archive = bundle / "bundle-rpi5-8gb.tar.zst"
    found = device.measure_there(
        [str(bundle), str(archive)],
        server.address,
        lambda done, total, note: notes.append(note),
        python=sys.executable,
    )
    results = Results.model_validate(found)
    assert [row.name for row in results.variants] == ["model-F32", "model-F32-2"]
    assert all(row.speed[0].decode_tok_s and row.perplexity for row in results.variants)
    assert results.machine["packages"] and results.variants[1].path == str(archive)
    assert any(note.startswith("copying") for note in notes) and any("tok/s" in note for note in notes)
    assert server.left() == []


def test_what_a_bundle_does_not_measure_is_refused(bundle: Path) -> None:
    command = [sys.executable, "-m", "lighten", "evaluate", str(bundle), "--target", "ssh://box"]
    for given in (["--data", "x.txt"], ["--limit", "3"], ["--skip", "speed"]):
        done = subprocess.run([*command, *given], capture_output=True, text=True)
        assert done.returncode == 2 and f"leave out {' '.join(given[:1])}" in done.stderr


@needs_sshd
def test_from_the_command_line(bundle: Path, server: Server, tmp_path: Path) -> None:
    server.start()
    command = [sys.executable, "-m", "lighten", "evaluate", str(bundle), "--target", server.address]
    command += ["--python", sys.executable, "--skip", "perplexity", "--json", "-o", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(done.stdout)["variants"]
    assert row["speed"][0]["decode_tok_s"] > 0 and row["perplexity"] is None
    assert (tmp_path / "out/report.md").is_file()


@needs_sshd
def test_a_connection_that_breaks_is_taken_up_again(
    bundle: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.start()
    size = (bundle / "model-F32.gguf").stat().st_size
    assert size > 10_000_000
    # connections: look, small files, model (cut), look, small files, the rest of the model, …
    proxy = Proxy(server.port, [1 << 40, 1 << 40, 6_000_000])
    know(server, server.port, proxy.port)
    found = measure(bundle, f"ssh://{USER}@127.0.0.1:{proxy.port}")
    assert found["variants"][0]["status"] == "ok"
    assert proxy.carried[2] <= 6_100_000
    assert proxy.carried[5] < size - 2_000_000  # not sent again
    assert server.left() == []


@needs_sshd
def test_what_arrived_waits_for_the_next_command(bundle: Path, server: Server) -> None:
    server.start()
    size = (bundle / "model-F32.gguf").stat().st_size
    proxy = Proxy(server.port, [1 << 40, 1 << 40, 6_000_000, *([10] * 9)])
    know(server, server.port, proxy.port)
    with pytest.raises(Failure, match="what has arrived stays there, and the same command goes on from it"):
        measure(bundle, f"ssh://{USER}@127.0.0.1:{proxy.port}")
    (partial,) = server.cache.rglob("*.gguf")
    arrived = partial.stat().st_size
    assert 2_000_000 < arrived < size  # what was under way when it broke is lost
    assert partial.read_bytes() == (bundle / "model-F32.gguf").read_bytes()[:arrived]
    through = Proxy(server.port, [])
    know(server, server.port, through.port)
    measure(bundle, f"ssh://{USER}@127.0.0.1:{through.port}")
    assert through.carried[2] < size - arrived + 100_000
    assert server.left() == []


@needs_sshd
def test_a_damaged_rest_is_noticed(bundle: Path, server: Server) -> None:
    server.start()
    copy = device.read_bundle(bundle)
    there = server.cache / "lighten" / copy.key
    there.mkdir(parents=True)
    (there / "model-F32.gguf").write_bytes(b"?" * 1000)
    with pytest.raises(Failure, match="the copy is damaged and was removed"):
        measure(bundle, server.address)
    assert server.left() == []


def test_a_host_that_does_not_answer(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not shutil.which("ssh"):
        pytest.skip("ssh is missing")
    client(tmp_path, monkeypatch)
    with pytest.raises(Failure, match=r"does not answer \(.*Connection refused") as found:
        measure(bundle, f"ssh://127.0.0.1:{free_port()}")
    assert "\n" not in str(found.value)


def test_without_ssh(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTEN_SSH", "/no/such/ssh")
    with pytest.raises(RequestError, match="there is no ssh here"):
        measure(bundle, "ssh://box")


@needs_sshd
def test_a_refused_key(bundle: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    server.start()
    client(server.folder, monkeypatch, IdentityFile=str(server.folder / "stranger"))
    with pytest.raises(Failure, match="refuses the key"):
        measure(bundle, server.address)
    assert not server.cache.exists()


@needs_sshd
def test_an_unknown_host_key(bundle: Path, server: Server) -> None:
    server.start()
    (server.folder / "known").unlink()
    with pytest.raises(Failure, match=r"host key of .* is not known"):
        measure(bundle, server.address)
    assert not server.cache.exists()


@needs_sshd
def test_no_python_there(bundle: Path, server: Server) -> None:
    server.start()
    with pytest.raises(Failure, match=r"has no /no/python of 3.9 or later"):
        device.measure_there([str(bundle)], server.address, silent, python="/no/python")
    assert not server.cache.exists()


def tools(folder: Path, **scripts: str) -> dict[str, str]:
    """Returns a PATH with other programs in front."""
    folder.mkdir()
    for name, script in scripts.items():
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)
    return {"PATH": f"{folder}:/usr/bin:/bin"}


@needs_sshd
@pytest.mark.parametrize(
    "scripts",
    [
        {"df": "echo head; echo disk 100 99 1000 9% /"},
        {"cat": "exec /bin/cat > /dev/full"},
    ],
    ids=["seen before", "while copying"],
)
def test_a_full_disk(bundle: Path, server: Server, tmp_path: Path, scripts: dict[str, str]) -> None:
    server.start(**tools(tmp_path / "bin", **scripts))
    with pytest.raises(Failure, match="has no room for the bundle") as found:
        measure(bundle, server.address)
    assert "\n" not in str(found.value)
    assert server.left() == []


@needs_sshd
def test_a_bench_that_fails_leaves_nothing(bundle: Path, server: Server, tmp_path: Path) -> None:
    server.start(**tools(tmp_path / "bin", tar="echo 'tar: broken' >&2; exit 2"))
    with pytest.raises(LightenError, match=r"bench\.py failed: tar: broken"):
        measure(bundle, server.address)
    assert server.left() == []
