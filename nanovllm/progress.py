"""Progress bars on stderr."""

import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from tqdm import tqdm


class Stderr:
    """sys.stderr as a file. If nobody reads it any more (`script.py 2>&1 | head`), what is written to it is lost."""

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.stderr, name)

    def write(self, text: str) -> None:
        with suppress(OSError):
            sys.stderr.write(text)

    def flush(self) -> None:
        with suppress(OSError):
            sys.stderr.flush()


def progress_bar(use_tqdm: bool | Callable[..., tqdm], **options: Any) -> tqdm:
    """A bar with tqdm's options, shown or not; or the one that `use_tqdm` makes."""
    return use_tqdm(**options) if callable(use_tqdm) else tqdm(file=Stderr(), disable=not use_tqdm, **options)
