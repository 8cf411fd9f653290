"""The flags that the scripts share."""

from absl import flags
from ml_collections import ConfigDict, config_flags

from vit_jax.logs import profile
from vit_jax.parallel import distributed

WORKDIR = flags.DEFINE_string(
    "workdir", None, "The run's folder. Default for train.py: runs/<config name>."
)
COORDINATOR = flags.DEFINE_string(
    "coordinator_address",
    None,
    "host:port of process 0; required only without a cluster manager that JAX recognizes.",
)
NUM_PROCESSES = flags.DEFINE_integer(
    "num_processes", None, "The number of processes; requires --coordinator_address."
)
PROCESS_ID = flags.DEFINE_integer(
    "process_id", None, "The index of this process, from 0; requires --coordinator_address."
)
DISTRIBUTED = flags.DEFINE_enum(
    "distributed",
    "auto",
    distributed.MODES,
    "Whether to join other processes: 'auto' does if JAX recognizes a cluster manager, or "
    "--coordinator_address is given; 'on' must; 'off' never does.",
)
HEARTBEAT = flags.DEFINE_integer(
    "heartbeat_seconds", 100, "How long a process may be silent before the others stop."
)
HANG = flags.DEFINE_float(
    "hang_seconds",
    1800,
    "For train.py: how long a step may take before the stacks of all threads are logged; 0: never.",
    lower_bound=0,
)
COMPILE_FOR = flags.DEFINE_string(
    "compile_for",
    None,
    "Only compiles train.py's steps for a TPU slice, such as v5e:16x16, or GPUs, such as h100:8, "
    "and reports their memory and speed: for TPUs an estimate, for GPUs a bound.",
)
RECOVER_CONFIG = flags.DEFINE_bool(
    "recover_config",
    False,
    "For train.py: writes the run's config.json anew from --config, if it is missing or corrupt.",
)
ALLOW_CHANGES = flags.DEFINE_list(
    "allow_changes",
    [],
    "For train.py: fields, or groups of them, that may differ though the run that resumes computes "
    "something else from then on, separated by commas. The run's changes.json records them.",
)


class StepsParser(flags.ArgumentParser):
    """Reads FIRST:LAST as a range of steps."""

    syntactic_help = "FIRST:LAST"

    def parse(self, argument):
        return profile.parse_steps(argument)


PROFILE = flags.DEFINE(
    StepsParser(),
    "profile",
    None,
    "For train.py: writes a trace of these steps, such as 10:15, to <workdir>/profile.",
)
JSON = flags.DEFINE_bool("json", False, "Prints JSON; for evaluate.py and predict.py.")
CONFIG = config_flags.DEFINE_config_file(
    "config",
    help_string="The configuration: configs/vit_b16.py, or with an argument, "
    "configs/vit_b16.py:quick. --config.a.b=value overrides a field.",
)

IS_GROUP = "it is a group of fields"


class GroupParser(flags.ArgumentParser):
    """Refuses a value for a group of fields, which would drop the other fields."""

    def parse(self, argument):
        if isinstance(argument, ConfigDict):  # the preset's
            return argument
        raise ValueError(IS_GROUP)


config_flags.register_flag_parser_for_type(ConfigDict, GroupParser())
