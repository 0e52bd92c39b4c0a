"""The command line. Its commands lie beside this file; heavy modules load inside them, so that --help is fast."""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from typing import Any

import typer

app = typer.Typer(
    name="accaware",
    help="Integer neural networks whose dot products provably fit a narrow accumulator.",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
#: The exit code of an error of our own, as sysexits.h has it.
BROKEN = 70
#: typer brings its own copy of click or uses the installed one; either way this is its class of usage errors
_UsageError: Any = typer.BadParameter.__mro__[1]


def run(arguments: list[str] | None = None) -> int:
    """Run a command and return its exit code; whatever the user can put right becomes one line on stderr.

    Set ACCAWARE_TRACEBACK to see where such an error comes from. An error of our own shows that in any case; its code
    is `BROKEN`, since 1 is an answer.
    """
    warnings.showwarning = _show_warning
    try:
        words = sys.argv[1:] if arguments is None else arguments
        done = app(args=words or ["--help"], standalone_mode=False, prog_name="accaware")
        return done if isinstance(done, int) else 0
    except typer.Exit as stop:
        return stop.exit_code
    except (KeyboardInterrupt, typer.Abort):
        return _say("interrupted", 130)
    except _UsageError as error:
        return _say(error.format_message(), 2)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == "accaware":
            return _broken()
        return _say(f"{error.name} is not installed; pip install 'accaware[all]' brings everything", 2)
    except OSError as error:
        return _say(_os_error(error), 2)
    except (ValueError, TypeError) as error:
        if os.environ.get("ACCAWARE_TRACEBACK"):
            traceback.print_exc()
        return _say(str(error), 2)
    except Exception:
        return _broken()


def _broken() -> int:
    traceback.print_exc()
    return BROKEN


def _os_error(error: OSError) -> str:
    if error.filename is None:
        return str(error)
    return f"{error.filename}: {error.strerror}"


def _say(message: str, code: int) -> int:
    print("accaware:", " ".join(message.split()), file=sys.stderr)
    return code


def _show_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    if category is UserWarning:  # ours; other people's deprecations are not the user's business
        _say(f"warning: {message}", 0)


from accaware.cli import export, files, jobs, sweeps  # noqa: E402, F401 -- the commands register themselves with `app`
