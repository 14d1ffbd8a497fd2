"""Files of images for tests that read them."""

from pathlib import Path

import numpy as np

from dit_moe.data.npz import image_writer


def write_images(path: Path, images_NHWC: np.ndarray, labels_N: np.ndarray | None = None) -> None:
    with image_writer(path, len(images_NHWC), labels_N) as add:
        add(images_NHWC)
