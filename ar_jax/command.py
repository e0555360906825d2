"""What the commands share: flags, and errors of one sentence."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from ar_jax.config import UsageError
from ar_jax.training.loop import TrainingStopped

EXIT_USAGE = 2


def run(main: Callable[[Any], None], config: Callable[[], ConfigDict] | None = None) -> None:
    """Parses the flags and calls main with the config; what the user can mend is one line on standard error and exit code 2.

    Options of parts that the config does not mention can be set too: --config.model.mixer.window=8.

    Args:
      main: the command.
      config: gives the config that --config.section.key=value override, once the other flags are parsed; without it the
        flag --config=FILE.py[:variant] names it.
    """
    open_ended = {"lock_config": False, "accept_new_attributes": True}
    try:
        if config is None:
            holder = config_flags.DEFINE_config_file("config", None, "the config file, with a variant behind a colon", **open_ended)
            flags.mark_flag_as_required("config")
        else:
            flags.FLAGS([a for a in sys.argv if not a.startswith("--config.")])
            holder = config_flags.DEFINE_config_dict("config", config(), **open_ended)
            flags.FLAGS.unparse_flags()
        left = flags.FLAGS(sys.argv)[1:]
        if left:
            raise UsageError(f"{left[0]!r} is not a flag; write --config.section.key=value.")
        main(holder.value)
    except TrainingStopped as error:
        fail(error, 1)
    except (UsageError, flags.Error) as error:
        fail(error, EXIT_USAGE)


def fail(error: Exception, code: int) -> None:
    """Prints the sentence and exits."""
    print("error: " + " ".join(str(error).split()), file=sys.stderr)
    sys.exit(code)
