"""What is in a folder, to be compared with what was there before or is in another one."""

import hashlib
from pathlib import Path


def contents(folder: Path) -> dict[str, str]:
    """sha256 of every file below a folder, by its path in it."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
