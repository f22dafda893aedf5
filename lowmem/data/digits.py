"""`data.name: digits`: 1,797 real handwritten digits of 8 x 8 pixels, scikit-learn's copy.

The split into 1,437 training and 360 test images is fixed and stratified by class.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Literal

import numpy as np

from lowmem.data.datasets import ArrayBatch
from lowmem.data.identity import Fingerprint
from lowmem.data.image_source import PixelSource
from lowmem.data.images import ImageSet, Part
from lowmem.data.packages import imported
from lowmem.errors import DataError
from lowmem.units import MIB

WHAT = "data.name: 'digits'"
NUM_TRAIN, NUM_TEST = 1437, 360
SPLIT_SEED = 0  # the split belongs to the data set, so the run's seed does not change it
LEVEL = 255 / 16  # the data set's pixels are 0 to 16; they are kept as bytes 0 to 255
# Measured: the import of scikit-learn, which imports pandas, and that pyarrow, where they are installed. The
# digits themselves are 0.1 MiB.
HELD_BYTES = {"sklearn": 45 * MIB, "pandas": 41 * MIB}


class DigitsData(PixelSource):
    name: Literal["digits"]

    @property
    def packages(self) -> tuple[str, ...]:
        return ("sklearn",)

    def _open(self) -> ImageSet:
        held = sum(size for package, size in HELD_BYTES.items() if find_spec(package) is not None)
        return ImageSet((1, 8, 8), 10, _load, _mark, held, num_test=NUM_TEST)

    def to_floats(self, batch: ArrayBatch) -> ArrayBatch:
        """Bytes 0 to 255 -> the data set's own 17 levels -> float32 from -1 to 1."""
        levels = np.rint(batch["image"] / LEVEL).astype(np.float32)
        return {**batch, "image": levels / np.float32(8) - np.float32(1)}


def _mark(mark: Fingerprint) -> None:
    for part, arrays in zip(("train", "test"), _load(), strict=True):
        for name, rows in arrays.items():
            mark.array(f"{part}_{name}", rows[:])
        mark.num_items += len(arrays["label"])


def _load() -> tuple[Part, Part]:
    """Raises DataError when scikit-learn is not installed or its copy has changed."""
    load_digits = imported("sklearn.datasets", WHAT).load_digits
    train_test_split = imported("sklearn.model_selection", WHAT).train_test_split
    pixels, labels = load_digits(return_X_y=True)
    images = np.rint(pixels.reshape(-1, 1, 8, 8) * LEVEL).astype(np.uint8)
    if len(images) != NUM_TRAIN + NUM_TEST:
        raise DataError(
            f"data.name: 'digits' has {len(images)} images; expected {NUM_TRAIN + NUM_TEST}; "
            "scikit-learn's copy has changed"
        )
    rows = train_test_split(
        np.arange(len(images)), test_size=NUM_TEST, stratify=labels, random_state=SPLIT_SEED
    )
    train, test = ({"image": images[part], "label": labels[part].astype(np.int64)} for part in rows)
    return train, test
