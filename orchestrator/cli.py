"""What the command lines share: exit statuses, argument types, how warnings and errors look."""

from __future__ import annotations

import argparse
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import optuna
from rich.console import Console

from results.objects import canonical, is_remote
from results.schema import DataWarning, UsageError
from results.store import DEFAULT_RESULTS_DIR

DONE, FAILED, WRONG_USAGE, INTERRUPTED = 0, 1, 2, 130
DEFAULT_DATA_DIR = "data"


class Interrupted(BaseException):
    """SIGINT or SIGTERM arrived."""


class Interrupts:
    """SIGINT and SIGTERM: raised where they arrive, or, while deferred, where `check` is called.

    An exception out of a signal handler tears what it hits: a record half written, or Ray's compiled code, which
    then ends in a SystemError. A second signal changes nothing; SIGKILL is always safe.
    """

    def __init__(self) -> None:
        self._arrived = False
        self._deferred = False

    def listen(self) -> None:
        """Handle both signals from now on; one that has arrived stays so."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        first, self._arrived = not self._arrived, True
        if first and not self._deferred:
            raise Interrupted

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Within the block signals are only noted, for `check`."""
        before, self._deferred = self._deferred, True
        try:
            yield
        finally:
            self._deferred = before

    @property
    def arrived(self) -> bool:
        """Whether a signal has arrived."""
        return self._arrived

    def check(self) -> None:
        """Raise Interrupted if a signal has arrived."""
        if self._arrived:
            raise Interrupted


INTERRUPTS = Interrupts()


def run(main: Callable[[], int]) -> None:
    """Exit with `main`'s status; UsageErrors as one line and status 2."""
    INTERRUPTS.listen()
    warnings.filterwarnings("always", category=DataWarning)
    warnings.showwarning = _show_warning  # type: ignore[assignment]  # the fields it does not use
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        status = main()
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        status = WRONG_USAGE
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        status = FAILED
    except Interrupted:
        print("interrupted", file=sys.stderr)
        status = INTERRUPTED
    sys.stdout.flush()
    sys.exit(status)


def _show_warning(message: Warning | str, category: type[Warning], *_: object) -> None:
    if issubclass(category, DataWarning):
        print(f"warning: {message}", file=sys.stderr)


def make_console() -> Console:
    """Standard output: a live display in a terminal, unwrapped plain lines elsewhere."""
    console = Console()
    return console if console.is_terminal else Console(width=200, highlight=False)


def count(text: str) -> int:
    """An argument type: a whole number, 1 or more."""
    return _whole(text, least=1)


def count_or_zero(text: str) -> int:
    """An argument type: a whole number, 0 or more."""
    return _whole(text, least=0)


def _whole(text: str, *, least: int) -> int:
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if value < least:
        raise argparse.ArgumentTypeError(f"{text!r}: wanted a whole number, {least} or more")
    return value


def range_of_counts(text: str) -> tuple[int, int]:
    """An argument type: MIN:MAX, whole numbers from 1 on, the first one not above the second."""
    least, _, most = text.partition(":")
    if not (least.isdigit() and most.isdigit() and 1 <= int(least) <= int(most)):
        raise argparse.ArgumentTypeError(f"{text!r}: wanted MIN:MAX, such as 1:8")
    return int(least), int(most)


def fraction_or_zero(text: str) -> float:
    """An argument type: a fraction in [0, 1]."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r}: wanted a fraction in [0, 1]")
    return value


def fraction(text: str) -> float:
    """An argument type: a fraction in (0, 1]."""
    return _above_zero(text, most=1.0, wanted="a fraction in (0, 1]")


def positive(text: str) -> float:
    """An argument type: a finite number above 0."""
    return _above_zero(text, most=sys.float_info.max, wanted="a number above 0")


def _above_zero(text: str, *, most: float, wanted: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= most:
        raise argparse.ArgumentTypeError(f"{text!r}: wanted {wanted}")
    return value


def results_dir(text: str) -> str:
    """An argument type: a local folder for results, or the URI of a place in an object store."""
    if is_remote(text):
        try:
            canonical(text)
        except UsageError as error:
            raise argparse.ArgumentTypeError(str(error)) from error
    return text


def add_results_dir(parser: argparse.ArgumentParser) -> None:
    """Add `--results-dir`."""
    parser.add_argument(
        "--results-dir",
        type=results_dir,
        default=DEFAULT_RESULTS_DIR,
        help="where experiments lie: a folder, or s3://BUCKET/PREFIX (default: %(default)s)",
    )


def add_threads(parser: argparse.ArgumentParser) -> None:
    """Add `--threads`."""
    parser.add_argument("--threads", type=count, help="of a CPU (default: as many as there are cores to use)")
