"""mlx-lm's server: model directories on Apple's chips, and on other processors with `mlx[cpu]`."""

from __future__ import annotations

from typing import ClassVar

from lighten.evaluate.serving.program import HOST, Installed, Job, Program, Start


class Mlx(Program):
    """`mlx_lm server`. It gives no log-probabilities of a prompt."""

    name: ClassVar[str] = "mlx"
    modules: ClassVar[tuple[str, ...]] = ("mlx_lm", "mlx")
    packages: ClassVar[tuple[str, ...]] = ("mlx", "transformers")
    install: ClassVar[str] = "mlx-lm ('mlx[cpu]' too without an Apple chip)"

    def start(self, job: Job, installed: Installed) -> Start:
        """See `Program`. It lists a model by its place."""
        command = [*installed.python, "-m", "mlx_lm", "server", "--model", str(job.place)]
        return Start([*command, "--host", HOST, "--port", str(job.port)], str(job.place.resolve()), {})
