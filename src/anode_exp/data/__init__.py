"""Data sets as tensors, and augmentation."""

from anode_exp.data.datasets import DATASETS, load
from anode_exp.data.densities import DENSITIES, DensityData, load_density
from anode_exp.data.image_data import (
    Augmentation,
    EpochBatches,
    ImageData,
    Normalisation,
    Split,
    balanced_subset,
    evaluation_batches,
)
from anode_exp.data.part import WHOLE, Part
from anode_exp.data.trajectories import TRAJECTORIES, TrajectoryData, load_trajectory

DataSet = ImageData | TrajectoryData | DensityData
"""A loaded data set. All have ``device``, ``nbytes`` and ``train``, whose length is the number of samples."""

__all__ = [
    "DATASETS",
    "DENSITIES",
    "TRAJECTORIES",
    "WHOLE",
    "Augmentation",
    "DataSet",
    "DensityData",
    "EpochBatches",
    "ImageData",
    "Normalisation",
    "Part",
    "Split",
    "TrajectoryData",
    "balanced_subset",
    "evaluation_batches",
    "load",
    "load_density",
    "load_trajectory",
]
