"""Measures of a model on a set of pictures: likelihoods, distances of samples, scores, and a report of all of them."""

from __future__ import annotations

from starflow.evaluate.dataset import EvaluationSet, concept_of, gather_rows, is_first, open_evaluation_set, own_rows
from starflow.evaluate.distances import (
    Distance,
    InceptionScore,
    Moments,
    PrecisionRecall,
    frechet_distance,
    frechet_of_moments,
    inception_score,
    kernel_distance,
    load_moments,
    moments,
    precision_recall,
    save_moments,
)
from starflow.evaluate.features import (
    ExtractedFeatures,
    FeatureExtractor,
    MobileNetV2,
    extract_features,
    load_extractor,
    load_mobilenet,
)
from starflow.evaluate.likelihood import (
    BitsPerDim,
    Classification,
    Outliers,
    auroc,
    classify,
    log_likelihoods,
    mean_bits_per_dim,
    nearest_references,
    outliers,
)
from starflow.evaluate.render import heatmap, save_contact_sheet, save_heatmap
from starflow.evaluate.report import EvaluationReport, EvaluationSettings, evaluate_pipeline
from starflow.evaluate.samples import Reconstruction, measure_reconstruction, noisy_reconstruction, psnr

__all__ = [
    "BitsPerDim",
    "Classification",
    "Distance",
    "EvaluationReport",
    "EvaluationSet",
    "EvaluationSettings",
    "ExtractedFeatures",
    "FeatureExtractor",
    "InceptionScore",
    "MobileNetV2",
    "Moments",
    "Outliers",
    "PrecisionRecall",
    "Reconstruction",
    "auroc",
    "classify",
    "concept_of",
    "evaluate_pipeline",
    "extract_features",
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
    "mean_bits_per_dim",
    "measure_reconstruction",
    "moments",
    "nearest_references",
    "noisy_reconstruction",
    "open_evaluation_set",
    "outliers",
    "own_rows",
    "precision_recall",
    "psnr",
    "save_contact_sheet",
    "save_heatmap",
    "save_moments",
]
