"""The exception classes of lmd3: one class per cause, each naming the file, the row and the remedy."""

from __future__ import annotations

from typing import Any


class Lmd3Error(Exception):
    """Base of all errors of lmd3.

    Attributes:
        message: what went wrong, in one sentence.
        file: the file concerned, or None.
        row: the row (or line) concerned, counted from 0, or None.
        remedy: what the user can do, or None.
    """

    #: Whether the command line exits with 2 (refused before work) instead of 1 (failed at work).
    refused = True

    def __init__(
        self, message: str, *, file: str | None = None, row: int | None = None, remedy: str | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.file = None if file is None else str(file)
        self.row = row
        self.remedy = remedy

    @property
    def kind(self) -> str:
        """Name of the cause as scripts see it: the class name."""
        return type(self).__name__

    def to_dict(self) -> dict[str, Any]:
        """The error as the JSON object that `--json` prints."""
        return {
            "kind": self.kind,
            "message": self.message,
            "file": self.file,
            "row": self.row,
            "remedy": self.remedy,
        }

    def __str__(self) -> str:
        place = "" if self.file is None else f"{self.file}: "
        place += "" if self.row is None else f"row {self.row}: "
        return f"{place}{self.message}" + ("" if self.remedy is None else f" ({self.remedy})")


class InputError(Lmd3Error, ValueError):
    """Input that is refused before work starts."""


class FileMissingError(InputError):
    """A file or folder that should be there is not."""


class FormatError(InputError):
    """Bytes that are not what the name or header promises: junk, truncated, another version."""


class ShapeError(InputError):
    """A matrix of the wrong shape, or an empty one."""


class DtypeError(InputError):
    """An element type that is not supported where it was given."""


class NotFiniteError(InputError):
    """NaN or infinity in data that must be finite."""


class DuplicateIdError(InputError):
    """An id that occurs more than once."""


class TextFormatError(InputError):
    """A text file that can't be parsed: broken JSON line, bytes that are not UTF-8, uneven CSV."""


class ColumnError(InputError):
    """A named column that does not exist or holds the wrong type."""


class JoinError(InputError):
    """Tables whose ids do not join."""


class ParameterError(InputError):
    """A parameter outside its range or of an unknown name."""


class ModelError(InputError):
    """A model that can't be loaded, or does not fit the store."""


class StaleIndexError(InputError):
    """An index that belongs to other rows than the store holds now."""


class MissingDependencyError(Lmd3Error, ImportError):
    """An optional package that this feature needs is not installed."""


class OutputError(InputError):
    """An output that exists already or can't be written."""


class OtherJobError(OutputError):
    """An output that holds the unfinished work of another configuration."""


class VerificationError(Lmd3Error):
    """A stored checksum or fact does not hold any more."""

    refused = False


class WorkError(Lmd3Error):
    """A failure during the work itself (a full disk, a damaged file met on the way)."""

    refused = False
