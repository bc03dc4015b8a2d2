"""Data sets to tensors, and augmentation."""

from anode_exp.data.datasets import DATASETS, load
from anode_exp.data.image_data import (
    Augmentation,
    EpochBatches,
    ImageData,
    Normalisation,
    Split,
    balanced_subset,
    evaluation_batches,
)

__all__ = [
    "DATASETS",
    "Augmentation",
    "EpochBatches",
    "ImageData",
    "Normalisation",
    "Split",
    "balanced_subset",
    "evaluation_batches",
    "load",
]
