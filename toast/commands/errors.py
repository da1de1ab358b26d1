"""How every command ends where it cannot go on: with a message in the place of a traceback, and a code."""

from __future__ import annotations

import errno
import os
import re
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import requires
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from toast.commands.noise import silence

silence()  # here, for scripts import what imports PEFT right after this

#: Errors of what a user gave or of the machine; any other is a fault of the program and keeps its traceback.
_OF_THE_USER = (ValueError, OSError, ImportError, EOFError, MemoryError)
#: Likewise, by name: their libraries take long to import, and a command may not need them.
_BY_NAME = ("OutOfMemoryError", "SafetensorError")
_PACKAGE = str(Path(__file__).parents[1])
_HOME = re.compile(r"^(--[\w-]+=)(~[\w.-]*(?:/.*)?)$", re.DOTALL)
#: Libraries whose modules have another name.
_LIBRARIES = {"PIL": "pillow", "yaml": "pyyaml"}
#: Set to any text, it shows tracebacks as `--debug` does.
DEBUG = "TOAST_DEBUG"


@contextmanager
def reported(debug: bool = False) -> Iterator[None]:
    """Ends the command with a message: 2 for a fault, 128 + n for a signal.

    Args:
        debug: Let errors through, for the traceback.
    """
    try:
        yield
    except KeyboardInterrupt:
        typer.secho("toast: stopped", err=True, fg="yellow")
        raise typer.Exit(130) from None
    except Exception as error:
        number = getattr(error, "signal_number", None)
        if number is not None:
            typer.secho(f"toast: {error}", err=True, fg="yellow")
            raise typer.Exit(128 + number) from None
        known = isinstance(error, _OF_THE_USER) or type(error).__name__ in _BY_NAME
        if debug and isinstance(error, EOFError):  # of which click makes "Aborted."
            raise RuntimeError("the end of a file came too early") from error
        if debug or not known or getattr(error, "errno", None) == errno.EPIPE:  # the reader has gone: typer's
            raise
        typer.secho(f"toast: {message(error)}", err=True, fg="red")
        raise typer.Exit(2) from None


def message(error: BaseException) -> str:
    """Returns what an error says; of one that another library raised, how to see where, too."""
    text = str(error).strip() or type(error).__name__
    if isinstance(error, ModuleNotFoundError) and (extras := extras_with(error.name or "")):
        return f"this needs {error.name}: pip install 'toast-steering[{extras[0]}]'"
    frames = traceback.extract_tb(error.__traceback__)
    if frames and frames[-1].filename.startswith(_PACKAGE):
        return text
    plain = isinstance(error, (ValueError, OSError, ImportError)) or text == type(error).__name__
    kind = "" if plain else f"{type(error).__name__}: "
    return f"{kind}{text}\n(toast --debug COMMAND shows where this arose.)"


def extras_with(module: str) -> list[str]:
    """Returns the extras of this package that hold a module's library, as its metadata list them."""
    library = _LIBRARIES.get(root := module.partition(".")[0], root.replace("_", "-"))
    needed = [re.match(r"([\w.-]+).*extra == \W(\S+)\W", line) for line in requires("toast-steering") or ()]
    return [found[2] for found in needed if found is not None and found[1] == library]


def _filled(option: re.Match[str]) -> str:
    return option[1] + os.path.expanduser(option[2])  # noqa: PTH111 - a slash at the end may matter


def is_debugging(context: Any) -> bool:
    """Whether tracebacks are wanted."""
    return bool(context.find_root().params.get("debug") or os.environ.get(DEBUG))


class Commands(TyperGroup):
    """All commands, whose errors are reported in one way."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Fills the home folder into `--option=~/…`, which shells leave as it is."""
        return super().parse_args(ctx, [_HOME.sub(_filled, arg) for arg in args])

    def invoke(self, ctx: Any) -> Any:
        """Runs the command."""
        with reported(is_debugging(ctx)):
            return super().invoke(ctx)


class Command(TyperCommand):
    """A command by itself, as a script is."""

    def invoke(self, ctx: Any) -> Any:
        """Runs the command."""
        with reported(is_debugging(ctx)):
            return super().invoke(ctx)


def run_script(command: Callable[..., None], arguments: Sequence[str] | None = None) -> None:
    """Runs a function as the command line of a script, with errors reported as the commands' are.

    Args:
        command: What typer makes the command line of.
        arguments: What was given; None is what the process was started with.
    """
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command(cls=Command)(command)
    app(arguments)
