"""Measures on pictures and features: distances, reconstruction, retrieval, sheets. They never see the model."""

from starflow.evaluate.mobilenet import MobileNetV2, extract_features, load_mobilenet
from starflow.evaluate.reconstruction import Reconstruction, measure_reconstruction, psnr, through_noise
from starflow.evaluate.retrieval import Retrieval, nearest, retrieval_score
from starflow.evaluate.sheet import save_sheet
from starflow.evaluate.statistics import Distance, frechet_distance, kernel_distance

__all__ = [
    "Distance",
    "MobileNetV2",
    "Reconstruction",
    "Retrieval",
    "extract_features",
    "frechet_distance",
    "kernel_distance",
    "load_mobilenet",
    "measure_reconstruction",
    "nearest",
    "psnr",
    "retrieval_score",
    "save_sheet",
    "through_noise",
]
