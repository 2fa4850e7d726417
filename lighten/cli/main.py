"""The command line: the commands, and how an error ends one. Nothing here imports torch."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from lighten import screen
from lighten.cli.compare import compare
from lighten.cli.doctor import doctor
from lighten.cli.evaluate import evaluate
from lighten.cli.fit import fit
from lighten.cli.inspect import inspect
from lighten.cli.objects import gc, list_versions, verify
from lighten.cli.recommend import recommend
from lighten.cli.report import report
from lighten.cli.run import plan, run
from lighten.cli.step import add_verb
from lighten.errors import LightenError, check_names, disk_full, unexpected

VERBS = {
    "prune": "Prune a model: one step, no recipe.",
    "distill": "Train a model on what its teacher says: one step, no recipe.",
    "quantize": "Quantize a model: one step, no recipe.",
    "polish": "Train the scales of a quantized model on its source: one step, no recipe.",
    "export": "Export a model to another runtime's format: one step, no recipe.",
}
app = typer.Typer(
    name="lighten",
    help="Compress a causal language model in one pass over the calibration data, and measure what you ship.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode=None,
)


def _version(asked: bool) -> None:
    if asked:
        from lighten import __version__

        print(f"lighten {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_version, help="Print the version and exit.")
    ] = False,
) -> None:
    """Compress a causal language model in one pass over the calibration data, and measure what you ship."""


def main() -> None:
    """Runs the command line: exit code 0 done, 1 something failed, 2 the request was wrong, 130 interrupted."""
    try:
        check_names(sys.argv[1:])
        app(standalone_mode=True)
    except LightenError as error:
        _stop(str(error), error.exit_code)
    except OSError as error:
        if full := disk_full(error):
            _stop(str(full), full.exit_code)
        _stop(f"{error.strerror or error}{': ' + str(error.filename) if error.filename else ''}", 1)
    except Exception as error:
        _stop(unexpected(error), 1)


def _stop(message: str, code: int) -> None:
    screen.console(stderr=True, highlight=False, soft_wrap=True).print("lighten:", message, markup=False)
    sys.exit(code)


app.command("run")(run)
app.command("plan")(plan)
for _kind in VERBS:
    if sys.argv[1:2] == [_kind]:
        add_verb(app, _kind, VERBS[_kind])
    else:  # only listed: the settings' classes are imported for the verb that is asked for, so that help is quick
        app.command(_kind, help=VERBS[_kind])(lambda: None)
app.command("evaluate")(evaluate)
app.command("report")(report)
app.command("compare")(compare)
app.command("recommend")(recommend)
app.command("fit")(fit)
app.command("inspect")(inspect)
app.command("ls")(list_versions)
app.command("verify")(verify)
app.command("gc")(gc)
app.command("doctor")(doctor)
