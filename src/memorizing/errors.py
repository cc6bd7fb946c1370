"""The exceptions users meet. Each message says what was seen, what is allowed and what to do.

    MemorizingError
    ├── ConfigError              (also ValueError)  a setting, recipe or key that cannot work
    ├── CorpusError              (also ValueError)  documents that are missing, empty or unreadable
    ├── TokenizerError           (also ValueError)  a tokenizer that is missing or does not fit
    ├── CheckpointError          a checkpoint that is truncated, altered or of another model
    ├── MemoryFolderError        a memory on disk that is missing, altered or of another model
    ├── RunFolderError           a run folder that exists, or is not one
    ├── StateError               (also RuntimeError) a model state used out of order
    │   └── NonFiniteQueryError  (also ArithmeticError) a query of a memory is NaN or infinite
    ├── IndexUnavailableError    (also ImportError) an optional package that is not installed
    ├── ResourceError            (also OSError)     not enough memory or disk for what was asked
    ├── NonFiniteLossError       (also ArithmeticError) the loss is NaN or infinite: stopped
    └── RankError                (also RuntimeError) another process of the run is gone, or differs

The command line prints the message of a `MemorizingError` on one line and exits with status 2.
"""


class MemorizingError(Exception):
    """Base class of every error that this library raises on purpose."""


class ConfigError(MemorizingError, ValueError):
    """A setting, recipe or key is unknown or out of range."""


class CorpusError(MemorizingError, ValueError):
    """A corpus is unknown, missing, empty or unreadable."""


class TokenizerError(MemorizingError, ValueError):
    """A tokenizer is missing or does not fit the model."""


class CheckpointError(MemorizingError):
    """A checkpoint is truncated, altered, or belongs to another model."""


class MemoryFolderError(MemorizingError):
    """A memory on disk is missing, altered, being written, or belongs to another model."""


class RunFolderError(MemorizingError):
    """A run folder exists already, or a folder is not a run."""


class StateError(MemorizingError, RuntimeError):
    """A model state is used out of order, such as crossing a segment boundary uncommitted."""


class NonFiniteQueryError(StateError, ArithmeticError):
    """A query of a memory is NaN or infinite: no key is nearest to it."""


class IndexUnavailableError(MemorizingError, ImportError):
    """An optional package is not installed. The message holds the install command."""


class ResourceError(MemorizingError, OSError):
    """The machine has too little memory or disk for what was asked."""


class NonFiniteLossError(MemorizingError, ArithmeticError):
    """The training loss is NaN or infinite. The state before the bad step is saved."""


class RankError(MemorizingError, RuntimeError):
    """Another process of the same run is gone, failed, or does something else."""
