"""What the commands of this folder share: options, and errors of one sentence."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

from ar_jax.config import UsageError, nearest


def parse(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options, by a parser made with exit_on_error=False.

    Raises:
      UsageError: an unknown option, or one that is missing or has a wrong value.
    """
    try:
        options, unknown = parser.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        raise UsageError(f"{error}.") from error
    if unknown:
        known = sorted(flag for action in parser._actions for flag in action.option_strings if flag.startswith("--"))
        raise UsageError(f"{unknown[0]} is not an option.{nearest(unknown[0], known)} Known: {', '.join(known)}.")
    return options


def exit_code(command: Callable[[Sequence[str] | None], int], arguments: Sequence[str] | None) -> int:
    """What the command returns; for what the user can mend, one sentence on standard error and 2."""
    try:
        return command(arguments)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
