"""The errors that users meet."""

from torch._dynamo.exc import ShortenTraceback


# Dynamo passes ShortenTraceback through as it is, and wraps every other error of a backend in pages of its
# own; deriving from it is what lets one clear line reach the user.
class MMCompileError(ShortenTraceback):
    """Base of the package's errors."""

    def __init__(self, message: str) -> None:
        super().__init__(message, first_useful_frame=None)


class OptionError(MMCompileError, ValueError):
    """An unknown option, or a value out of range."""


class BoundaryError(MMCompileError, ValueError):
    """Modality boundaries that are malformed or do not fit the call's batch."""


class UnsupportedSitesError(MMCompileError, RuntimeError):
    """With strict=True: an attention that had to stay dense."""


class TableError(MMCompileError, ValueError):
    """A pattern table that cannot be read or written, or is for another model."""


class ExportError(MMCompileError, RuntimeError):
    """A model or a program that cannot be exported or packaged; the text says what can."""
