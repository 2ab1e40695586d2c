"""What all configurations of cinetok share."""

import functools

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError


def strict_config(cls):
    """Class decorator: `huggingface_hub`'s `@strict` with plain errors.

    Fields are checked against their annotations whenever they are set, and all `validate_*` methods run after
    construction and before saving. `@strict` alone wraps what a check raises in an error that is neither a ValueError
    nor a TypeError; here a value of another type is a TypeError and a contradictory one a ValueError, also where it lies
    in a sub-configuration.
    """
    cls = strict(cls)
    for name in ("__init__", "__setattr__", "validate"):
        setattr(cls, name, _plain_errors(getattr(cls, name), cls.__name__))
    return cls


def _plain_errors(method, owner):
    @functools.wraps(method)
    def wrapped(self, *args, **kwargs):
        try:
            return method(self, *args, **kwargs)
        except StrictDataclassError as error:
            cause = error.__cause__
            if isinstance(cause, TypeError):
                raise TypeError(f"{owner}: {cause}") from error
            raise ValueError(str(error if cause is None else cause)) from error

    return wrapped


__all__ = ["strict_config"]
