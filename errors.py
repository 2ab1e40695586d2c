"""Errors every part of cinetok raises. Bad arguments raise plain `ValueError`/`TypeError`."""


class CinetokError(Exception):
    """Base of every cinetok-specific error."""


class CheckpointError(CinetokError, ValueError):
    """A checkpoint cannot be read, does not fit its configuration, or must not be loaded (names the file and the fix)."""


class VideoReadError(CinetokError, ValueError):
    """A video cannot be read, or delivered fewer frames than asked for (names the file, the request and the result)."""


class TokenFileError(CinetokError, ValueError):
    """A file of tokens cannot be read or was made by another model (names the file and the mismatch)."""
