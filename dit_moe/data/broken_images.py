"""Which images of a source cannot be used: all are decoded once, before anything else is done with them."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

from dit_moe.distributed import cores
from dit_moe.progress import images_bar

AT_A_TIME = 1000  # images that are looked at before the progress is shown

_found: dict[tuple[Any, ...], dict[int, str]] = {}  # in this process, so that a command looks once


class Source(Protocol):
    """What `broken_images` needs of an `ImageSource`."""

    place: str
    fingerprint: str
    config: Any
    labels_N: Any

    def problem(self, image: int) -> str | None: ...

    def stamps(self) -> Iterable[tuple[int, int]]: ...


def broken_images(source: Source) -> dict[int, str]:
    """Images that cannot be used, in rising order, and what is wrong with each, naming it. Works on all cores.

    In a process that has looked at the same files before, none of which changed since, it looks no second time.
    """
    limits, count, stamps = source.config, len(source.labels_N), hash(tuple(source.stamps()))
    key = (source.place, source.fingerprint, stamps, limits.size, limits.min_side, limits.max_megapixels)
    if key not in _found:
        problems: list[str | None] = []
        doing = f"looking for broken images in {source.place}"
        with images_bar(doing, count) as advance, ThreadPoolExecutor(cores()) as threads:
            for start in range(0, count, AT_A_TIME):
                problems += threads.map(source.problem, range(start, min(start + AT_A_TIME, count)))
                advance(len(problems) - start)
        _found[key] = {image: problem for image, problem in enumerate(problems) if problem is not None}
    return _found[key]
