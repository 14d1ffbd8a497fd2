"""Repositories of the Hugging Face Hub, whether anything may be downloaded, and whether it can be reached.

That is known at once, where the downloads themselves may try for long.
"""

from __future__ import annotations

import os
import queue
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError

from dit_moe.config import NotThere
from dit_moe.formatting import tell

PATIENCE = 5  # seconds that a server has to answer
FILES = ("*.safetensors", "*.json", "*.yaml", "README.md")  # of a repository of weights: no code, and no pickles


class NotDownloaded(NotThere):
    """What is yet to be downloaded, within `no_downloads`."""


@contextmanager
def no_downloads() -> Iterator[None]:
    """Within it, and within functions that it decorates, what would be downloaded raises `NotDownloaded`."""
    global _forbidden
    before, _forbidden = _forbidden, True
    try:
        yield
    finally:
        _forbidden = before


_forbidden = False


def require_allowed(option: str, problem: str, package: str, source: str, remedy: str) -> None:
    """NotDownloaded, within `no_downloads`.

    Args:
        option: of the config, that names what is to be downloaded.
        problem: its value, and what is not there.
        package: whose code downloads it.
        source: from where.
        remedy: how to name a copy of one's own.
    """
    if _forbidden:
        raise NotDownloaded(option, f"{problem}; {package} will download it from {source}, or {remedy}")


@contextmanager
def missing_downloads_told() -> Iterator[None]:
    """Within it `NotDownloaded` ends what is done, and is a note on stderr."""
    try:
        yield
    except NotDownloaded as missing:
        tell(f"note: {missing}")


def may_be_repository(name: str) -> bool:
    """Whether it may be the name of a repository of the Hub."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def fetch_repository(name: str) -> Path:
    """The folder, in the Hub's cache, of a repository of weights.

    It is brought up to date if the Hub can be reached. ValueError if there is none.
    """
    from huggingface_hub import constants, snapshot_download

    try:
        require_reachable(constants.ENDPOINT)
        return Path(snapshot_download(name, allow_patterns=list(FILES)))
    except Exception as error:  # of many kinds, from the network to the disk
        reason = (str(error).splitlines() or [type(error).__name__])[0]
    try:
        return Path(snapshot_download(name, allow_patterns=list(FILES), local_files_only=True))
    except Exception:
        raise ValueError(
            f"{name} cannot be had from the Hugging Face Hub ({reason}); name a folder or a file"
        ) from None


@contextmanager
def opening(name: str) -> Iterator[None]:
    """Within it a package opens the folder `name`, or what is called so on the Hub.

    It finds only what the Hub's cache has within `no_downloads` and where the Hub does not answer, which it would ask
    for half a minute. Then OSError says so if it finds nothing.
    """
    from huggingface_hub import constants

    before, problem = constants.HF_HUB_OFFLINE, ""
    if not (before or _forbidden or os.path.exists(name)) and may_be_repository(name):
        try:
            require_reachable(constants.ENDPOINT)
        except OSError as error:
            problem = f"the Hugging Face Hub does not answer: {error}"
    constants.HF_HUB_OFFLINE = before or _forbidden or bool(problem)
    try:
        yield
    except OSError as error:
        if not problem:
            raise
        raise OSError(problem) from error
    finally:
        constants.HF_HUB_OFFLINE = before


def require_reachable(url: str) -> None:
    """OSError unless something answers within `PATIENCE`: downloads themselves may try for most of a minute.

    Of a URL that did not answer, a process asks no second time.
    """
    if url not in _unanswered:
        problems: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        # in a thread that may be left behind: looking up a name heeds no timeout, and every address has one of its own
        threading.Thread(target=lambda: problems.put(_problem_with(url)), daemon=True).start()
        try:
            problem = problems.get(timeout=PATIENCE)
        except queue.Empty:
            problem = f"no answer within {PATIENCE} seconds"
        if problem is None:
            return
        _unanswered[url] = problem
    raise OSError(_unanswered[url])


_unanswered: dict[str, str] = {}  # why not, by URL


def _problem_with(url: str) -> str | None:
    try:
        urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=PATIENCE).close()
    except HTTPError:  # an answer, too
        return None
    except (OSError, HTTPException, ValueError) as error:
        cause = getattr(error, "reason", error)  # of urllib's own, which are named after it
        return str(getattr(cause, "strerror", None) or cause) or type(error).__name__
    return None
