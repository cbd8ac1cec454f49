"""Measures on pictures, features and likelihoods: distances, scores, retrieval, sheets. They never see the model."""

from starflow.evaluate.extractor import Extracted, Extractor, extract, load_extractor
from starflow.evaluate.gather import gather_rows, is_first, own_rows
from starflow.evaluate.heatmap import heatmap, save_heatmap
from starflow.evaluate.likelihood import Bits, bits, log_likelihoods
from starflow.evaluate.mobilenet import MobileNetV2, extract_features, load_mobilenet
from starflow.evaluate.neighbours import Fidelity, fidelity
from starflow.evaluate.reconstruction import Reconstruction, measure_reconstruction, psnr, through_noise
from starflow.evaluate.retrieval import Retrieval, nearest, retrieval_score
from starflow.evaluate.scores import Classification, Outliers, auroc, classify, outliers
from starflow.evaluate.sheet import save_sheet
from starflow.evaluate.statistics import (
    Distance,
    InceptionScore,
    Moments,
    frechet_distance,
    frechet_of_moments,
    inception_score,
    kernel_distance,
    load_moments,
    moments,
    save_moments,
)

__all__ = [
    "Bits",
    "Classification",
    "Distance",
    "Extracted",
    "Extractor",
    "Fidelity",
    "InceptionScore",
    "MobileNetV2",
    "Moments",
    "Outliers",
    "Reconstruction",
    "Retrieval",
    "auroc",
    "bits",
    "classify",
    "extract",
    "extract_features",
    "fidelity",
    "frechet_distance",
    "frechet_of_moments",
    "gather_rows",
    "heatmap",
    "inception_score",
    "is_first",
    "kernel_distance",
    "load_extractor",
    "load_mobilenet",
    "load_moments",
    "log_likelihoods",
    "measure_reconstruction",
    "moments",
    "nearest",
    "outliers",
    "own_rows",
    "psnr",
    "retrieval_score",
    "save_heatmap",
    "save_moments",
    "save_sheet",
    "through_noise",
]
