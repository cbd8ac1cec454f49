"""Measures on pictures, features and likelihoods: distances, scores, retrieval, sheets. They never see the model.

All measures of a pipeline on a set of pictures, in one report.
"""

from __future__ import annotations

from starflow.evaluate.dataset import EvaluationSet, concept_of, gather_rows, is_first, open_evaluation_set, own_rows
from starflow.evaluate.distances import (
    Distance,
    Fidelity,
    InceptionScore,
    Moments,
    fidelity,
    frechet_distance,
    frechet_of_moments,
    inception_score,
    kernel_distance,
    load_moments,
    moments,
    save_moments,
)
from starflow.evaluate.features import (
    Extracted,
    Extractor,
    MobileNetV2,
    extract,
    extract_features,
    load_extractor,
    load_mobilenet,
)
from starflow.evaluate.likelihood import BitsPerDim, bits, log_likelihoods
from starflow.evaluate.render import heatmap, save_heatmap, save_sheet
from starflow.evaluate.report import measure
from starflow.evaluate.samples import Reconstruction, measure_reconstruction, psnr, through_noise
from starflow.evaluate.scores import (
    Classification,
    Outliers,
    Retrieval,
    auroc,
    classify,
    nearest,
    outliers,
    retrieval_score,
)
from starflow.evaluate.settings import EvaluationReport, EvaluationSettings

__all__ = [
    "BitsPerDim",
    "Classification",
    "Distance",
    "EvaluationReport",
    "EvaluationSet",
    "EvaluationSettings",
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
    "concept_of",
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
    "measure",
    "measure_reconstruction",
    "moments",
    "nearest",
    "open_evaluation_set",
    "outliers",
    "own_rows",
    "psnr",
    "retrieval_score",
    "save_heatmap",
    "save_moments",
    "save_sheet",
    "through_noise",
]
