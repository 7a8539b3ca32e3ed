"""Everything that bakeoff raises on purpose.

```
BakeoffError
├── UsageError            a call that can't be meant as it is
│   ├── RecipeError       a recipe that doesn't parse or names something unknown
│   └── InputError        a prompt, latents, a size… that the pipeline can't take
├── SourceError           a model that isn't there or isn't what it should be
│   └── PickleError       weights only as pickles, which are never opened
├── ArtifactError         a folder that isn't an artifact
│   └── CorruptError      an artifact whose files aren't the ones that were written
├── UnavailableError      a backend or device that can't be used here
├── LoweringError         a part that a backend couldn't take
├── ParityError           an artifact that doesn't compute what its source computes
├── ResourceError         too little memory or disk
└── Cancelled             the caller stopped the work
```
"""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from collections.abc import Iterable


class BakeoffError(Exception):
    """Base of all errors; `fix` is what to do or type about it, `exit_code` what the command line returns."""

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, fix: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.fix = fix

    def __str__(self) -> str:
        return self.message if self.fix is None else f"{self.message}\nhint: {self.fix}"


class UsageError(BakeoffError):
    exit_code = 2


class RecipeError(UsageError):
    pass


class InputError(UsageError):
    pass


class SourceError(BakeoffError):
    exit_code = 3


class PickleError(SourceError):
    pass


class ArtifactError(BakeoffError):
    exit_code = 4


class CorruptError(ArtifactError):
    pass


class UnavailableError(BakeoffError):
    exit_code = 5


class LoweringError(BakeoffError):
    exit_code = 6


class ParityError(BakeoffError):
    exit_code = 7


class ResourceError(BakeoffError):
    exit_code = 8


class Cancelled(BakeoffError):  # noqa: N818 - stopping on request is no error of anybody's
    exit_code = 130


def unknown(kind: str, got: str, known: Iterable[str]) -> str:
    """Word a message for an unknown name: what was got, the nearest known one, and all of them."""
    names = sorted(known)
    near = difflib.get_close_matches(got, names, n=1)
    meant = f" Did you mean {near[0]!r}?" if near else ""
    return f"unknown {kind} {got!r}.{meant} Known: {', '.join(names) or 'none'}"
