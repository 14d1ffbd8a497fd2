"""The one check that values are finite: NaN and infinity make plausible numbers of most metrics."""

from __future__ import annotations

from torch import Tensor

CHUNK = 1024  # rows whose mask is held at a time


def is_finite(values: Tensor) -> bool:
    """Whether none is NaN or infinite. It takes no memory, as `values.isfinite()` would."""
    return not values.numel() or not values.is_floating_point() or all(end.isfinite() for end in values.aminmax())


def check_rows(rows_ND: Tensor, what: str = "features") -> None:
    """ValueError, naming the first such row, if one holds NaN or infinity."""
    if is_finite(rows_ND):
        return
    for first, part_CD in enumerate(rows_ND.split(CHUNK)):
        if not is_finite(part_CD):
            row = first * CHUNK + int((~part_CD.isfinite()).any(1).nonzero()[0])
            found = f"sample {row} has NaN or infinity among its {what}"
            raise ValueError(f"{found}; check the images and the weights of the --extractor")
