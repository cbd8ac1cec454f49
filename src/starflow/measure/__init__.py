"""All measures of a pipeline on a set of pictures, in one report."""

from starflow.measure.pictures import Pictures, concept_of, open_pictures
from starflow.measure.plan import Plan, Report
from starflow.measure.report import measure

__all__ = ["Pictures", "Plan", "Report", "concept_of", "measure", "open_pictures"]
