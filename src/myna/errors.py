"""The exceptions of myna, one tree, and the exit code that the command line gives each.

    MynaError                 1   anything of ours that has no better class
    ├── ConfigError           2   configuration or environment: a key, a path, a missing package
    ├── DataError             3   rows, files, templates: what was to be trained
    ├── StorageError          4   disk full, unreadable or unwritable files of a run
    ├── OutOfMemoryError      5   neither a smaller micro-batch nor recomputation fits
    ├── NonFiniteError        6   loss or gradient norm is NaN or infinite; the weights did not move
    ├── RunLockedError        7   another process holds the run directory
    └── Interrupted          75   stopped by a signal; the same command resumes

Owns names and codes only. A message names the place, the finding, what was expected and how to mend
it; the command line prints it without a traceback. Any other exception is a bug of ours (exit 1).
"""


class MynaError(Exception):
    """An error that a person can act on; its text is the whole message."""

    exit_code = 1


class ConfigError(MynaError):
    """A setting, a path or the environment is wrong (exit 2)."""

    exit_code = 2


class DataError(MynaError):
    """Rows, data files or templates are wrong (exit 3)."""

    exit_code = 3


class StorageError(MynaError):
    """The run directory could not be read or written (exit 4)."""

    exit_code = 4


class OutOfMemoryError(MynaError):
    """Memory ran out and nothing smaller is left to try (exit 5)."""

    exit_code = 5


class NonFiniteError(MynaError):
    """Loss or gradient norm is NaN or infinite (exit 6)."""

    exit_code = 6


class RunLockedError(MynaError):
    """Another process holds the run directory (exit 7)."""

    exit_code = 7


class Interrupted(MynaError):
    """Stopped by a signal; the run is resumable (exit 75)."""

    exit_code = 75
