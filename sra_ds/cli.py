"""What all command lines share: one-line errors, exit codes, JSON on standard output alone."""

import argparse
import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NoReturn

from sra_ds.errors import ConfigError, SraError

Command = Callable[[argparse.Namespace], Any]


class Help(argparse.RawDescriptionHelpFormatter):
    """Names the default of every option that has one worth naming."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text = action.help or ""
        plain = action.default in (None, False, "", [], argparse.SUPPRESS)
        if plain or not action.option_strings or "default" in text:
            return text
        return f"{text} (default: %(default)s)".lstrip()


class Parser(argparse.ArgumentParser):
    """Refuses in one line, as the tools do."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} ({self.prog} --help says more)\n")


def parser(description: str) -> argparse.ArgumentParser:
    """A parser with the options every tool has."""
    result = Parser(description=description, formatter_class=Help)
    _add_common(result)
    return result


def add_action(actions: Any, name: str, text: str) -> argparse.ArgumentParser:
    """A subcommand, behind which the common options may stand, too."""
    result: argparse.ArgumentParser = actions.add_parser(
        name, help=text, description=text, formatter_class=Help
    )
    _add_common(result, argparse.SUPPRESS)
    return result


def _add_common(result: argparse.ArgumentParser, default: Any = False) -> None:
    for option, text in (
        ("--json", "print one JSON object and nothing else"),
        ("--debug", "show the traceback of an error"),
    ):
        result.add_argument(option, action="store_true", default=default, help=text)


def add_recipe(result: argparse.ArgumentParser, default: str | None = "quickstart") -> None:
    """`--recipe` and overrides."""
    result.add_argument(
        "--recipe", default=default, help="name or .yaml file (default: %(default)s)"
    )
    result.add_argument("overrides", nargs="*", metavar="key.path=value", help="recipe overrides")


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The arguments of this process; `given` has the names of those that stand on its command line."""
    arguments = parser.parse_intermixed_args()
    bare = argparse.Namespace(**dict.fromkeys(vars(arguments)))  # where no default is put
    found = vars(parser.parse_intermixed_args(namespace=bare))
    arguments.given = {name for name, value in found.items() if value is not None}
    return arguments


def refuse(arguments: argparse.Namespace, options: Iterable[str], why: str) -> None:
    """Raise `ConfigError` for one of these that was given; `why` it may not be goes on from its name."""
    if idle := sorted(arguments.given.intersection(options)):
        raise ConfigError(f"--{idle[0].replace('_', '-')} {why}; leave it out")


def run(arguments: argparse.Namespace, command: Command, show: Callable[[Any], None]) -> int:
    """Run a tool: its result as JSON or through `show`; errors as one line and their exit code."""
    try:
        with _only_results_on_stdout() if arguments.json else nullcontext():
            result = command(arguments)
    except SraError as error:
        if arguments.debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        if arguments.debug or error.strerror is None:
            raise
        where = f"{error.filename}: " if error.filename else ""
        print(f"error: {where}{error.strerror}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    if result is None:  # stopped early, or not the rank that reports
        return 0
    try:
        if arguments.json:
            print(json.dumps(_finite(result), indent=1, default=_named, allow_nan=False))
        else:
            show(result)
        sys.stdout.flush()
    except BrokenPipeError:  # who reads has seen enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return 0


def _finite(tree: Any) -> Any:
    """The same with null for numbers that JSON does not have."""
    if isinstance(tree, dict):
        return {name: _finite(value) for name, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [_finite(value) for value in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree


def _named(value: Any) -> str:
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"a result has {value!r}, a {type(value).__name__}, which is no JSON")


@contextmanager
def _only_results_on_stdout() -> Iterator[None]:
    """Send what libraries print meanwhile, also from C++, to standard error."""
    sys.stdout.flush()
    results = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(results, 1)
        os.close(results)


def show_tree(tree: dict[str, Any], indent: int = 0, in_bytes: bool = False) -> None:
    """A nested result as aligned lines; what lies under a key with `bytes` in it in readable units, and
    lists only with `--json`."""
    for key, value in tree.items():
        sizes = in_bytes or "bytes" in key
        if isinstance(value, dict):
            print(f"{'':{indent}}{key}")
            show_tree(value, indent + 2, sizes)
        elif key == "notes":
            print("".join(f"{'':{indent}}note: {note}\n" for note in value), end="")
        elif not isinstance(value, list):
            print(f"{'':{indent}}{key:<{max(28 - indent, 1)}} {_readable(value, sizes)}")


def _readable(value: Any, in_bytes: bool) -> Any:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if in_bytes and isinstance(value, int) and value >= 1024:
        return f"{value / 2**30:.2f} GiB" if value >= 2**28 else f"{value / 2**20:.1f} MiB"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else value


def at_least(low: float) -> Callable[[str], float]:
    """Argument type: a number of the same kind as `low`, not below it."""

    def number(text: str) -> float:
        value = type(low)(text)
        if not value >= low:  # also refuses nan
            raise argparse.ArgumentTypeError(f"must be at least {low}, got {text}")
        return value

    return number


def integers(text: str) -> list[int]:
    """Argument type: numbers with commas between them."""
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected numbers such as 0,1,2, got {text}") from None
