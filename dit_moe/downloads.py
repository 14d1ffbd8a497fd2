"""Repositories of the Hugging Face Hub, and whether what is to be downloaded can be reached.

That is known at once, where the downloads themselves may try for long.
"""

from __future__ import annotations

import queue
import threading
import urllib.request
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError

PATIENCE = 5  # seconds that a server has to answer
FILES = ("*.safetensors", "*.json", "*.yaml", "README.md")  # of a repository of weights: no code, and no pickles


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
