"""What the commands share: flags, and errors of one sentence."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence

from absl import flags
from ml_collections import ConfigDict, config_flags

from ar_jax.config import UsageError, get_config
from ar_jax.training import hosts
from ar_jax.training.loop import TrainingStopped

EXIT_USAGE = 2
_OVERRIDE = re.compile(r"--?(no)?config\.")

Main = Callable[[ConfigDict, str], None]
ReadConfig = Callable[[str], ConfigDict]


def run(main: Main, read_config: ReadConfig | None = None) -> None:
    """Calls main(config, workdir) as the flags say; what the user can mend is one line on standard error and exit code 2.

    Args:
      main: the command; its module's docstring is what --help prints.
      read_config: gives the config of a workdir; without it the flag --config=FILE.py[:variant] names one.
    """
    _guarded(lambda arguments: main(*parse(arguments, read_config)), sys.modules[main.__module__].__doc__)


def call(main: Callable[[Sequence[str]], None]) -> None:
    """Calls main(sys.argv), a command with flags of its own; errors and --help are as in `run`."""
    _guarded(main, sys.modules[main.__module__].__doc__)


def _guarded(main: Callable[[Sequence[str]], None], help_text: str | None) -> None:
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(help_text)
        return
    try:
        main(sys.argv)
    except TrainingStopped as error:
        fail(error, 1)
    except (UsageError, flags.Error) as error:
        fail(error, EXIT_USAGE)


def parse(arguments: Sequence[str], read_config: ReadConfig | None = None) -> tuple[ConfigDict, str]:
    """The config, with its overrides, and the workdir.

    Options of parts that the config does not mention can be set too: --config.model.mixer.window=8.

    Raises:
      UsageError: see `get_config`; or an override that does not fit; or an argument that is not a flag.
      flags.Error: an unknown flag, or one that is missing.
    """
    values = flags.FlagValues()
    flags.DEFINE_string("workdir", None, "the directory of the run", flag_values=values, required=True)
    flags.DEFINE_string("coordinator", "", "HOST:PORT of the first of several processes", flag_values=values)
    flags.DEFINE_integer("processes", 0, "how many there are", flag_values=values)
    flags.DEFINE_integer("process", -1, "which of them this one is, from 0", flag_values=values)
    if read_config is None:
        flags.DEFINE_integer("profile", 0, "trace so many steps: config.train.profile_steps", flag_values=values)
        flags.DEFINE_string("config", None, "FILE.py[:variant]", flag_values=values, required=True)
    left = values([a for a in arguments if not _OVERRIDE.match(a)])[1:]
    if left:
        raise UsageError(f"{left[0]!r} is not a flag; write --config.section.key=value.")
    hosts.join(values.coordinator, values.processes, values.process)
    config = get_config(values.config) if read_config is None else read_config(values.workdir)
    if read_config is None and values.profile:
        config.train.profile_steps = values.profile
    return override(config, [a for a in arguments if _OVERRIDE.match(a)]), values.workdir


def override(config: ConfigDict, arguments: Sequence[str]) -> ConfigDict:
    """The config with values replaced by arguments such as --config.section.key=value."""
    values, argv = flags.FlagValues(), ["command", *arguments]
    options = {"lock_config": False, "accept_new_attributes": True, "flag_values": values, "sys_argv": argv}
    for argument in arguments:
        _add_sections(config, argument.partition("config.")[2].partition("=")[0].split(".")[:-1])
    try:
        holder = config_flags.DEFINE_config_dict("config", config, **options)
        values(argv)
    except (flags.Error, TypeError, KeyError, AttributeError, ValueError) as error:
        raise UsageError(f"{' '.join(arguments)} does not fit the config ({error}).") from error
    return holder.value


def _add_sections(config: ConfigDict, names: Sequence[str]) -> None:
    """Adds the sections on the way to a key: a config need not mention what has defaults."""
    for name in names:
        if not isinstance(config, ConfigDict):
            return
        if name not in config:
            config[name] = ConfigDict()
        config = config[name]


def fail(error: Exception, code: int) -> None:
    """Prints the sentence and exits."""
    sentence = " ".join(str(error).split())
    print(f"error: {sentence}" + "." * (sentence[-1:] not in (".", "?")), file=sys.stderr)
    sys.exit(code)
