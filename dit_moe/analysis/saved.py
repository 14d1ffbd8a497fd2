"""A run's routing statistics as files: all arrays in routing.npz, the small ones and the facts in routing.json."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dit_moe.analysis.stats import RoutingStats
from dit_moe.files import write_atomically

JSON, NPZ = "routing.json", "routing.npz"
SMALL = 50_000  # numbers of an array that goes into the JSON
DIGITS = 6  # significant ones, there


def write_stats(stats: RoutingStats, folder: Path, pictures: Sequence[str] = ()) -> None:
    """Write both files. Arrays keep their names, those of a part behind its own: ``examples.active_MTLS``.

    The JSON lists `pictures`, files in the same folder. Those that an earlier one lists, and this one does not, go.
    """
    arrays: dict[str, np.ndarray] = {}
    body = _plain(stats, "", arrays)
    body |= {"active": _rounded(stats.active), "balance_L": _rounded(stats.balance_L.tolist())}
    body[f"only in {NPZ}"] = [name for name, array in arrays.items() if not _goes_into_json(array)]
    body["pictures"] = list(pictures)
    text = json.dumps(body, allow_nan=False, ensure_ascii=False) + "\n"
    for name in set(_listed_pictures(folder / JSON)) - set(pictures):
        (folder / name).unlink(missing_ok=True)
    write_atomically(folder / NPZ, lambda file: np.savez_compressed(file, **arrays))  # type: ignore[arg-type]
    write_atomically(folder / JSON, text)


def _listed_pictures(path: Path) -> list[str]:
    """Of an earlier report; nothing but names of PNGs in the same folder, whatever became of the file."""
    try:
        names = json.loads(path.read_text(encoding="utf-8"))["pictures"]
        return [name for name in names if Path(name).name == name and name.endswith(".png")]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _plain(part: Any, path: str, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    """Ready for JSON, without large arrays and pictures; all arrays are added to `arrays`."""
    plain = {}
    for field in dataclasses.fields(part):
        value, name = getattr(part, field.name), path + field.name
        if isinstance(value, np.ndarray):
            arrays[name] = value
            if _goes_into_json(value):
                plain[field.name] = _rounded(value.tolist())
        else:
            plain[field.name] = _plain(value, f"{name}.", arrays) if dataclasses.is_dataclass(value) else value
    return plain


def _goes_into_json(array: np.ndarray) -> bool:
    return array.size <= SMALL and array.dtype != np.uint8


def _rounded(value: Any) -> Any:
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value
