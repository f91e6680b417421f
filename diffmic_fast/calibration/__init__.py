"""Probabilities that fit validation images, prediction sets, and measures of confidence.

`inference.calibrate` fits a `Calibration`, which a checkpoint holds; `confidence` measures how sure a prediction is.
"""

from diffmic_fast.calibration.calibration import Calibration, fit_calibration
from diffmic_fast.calibration.confidence import Confidence, confidence
from diffmic_fast.calibration.conformal import prediction_sets
from diffmic_fast.calibration.novelty import NoveltyDetector, fit_novelty, image_statistics
from diffmic_fast.calibration.scaling import Scaling, fit_scaling

__all__ = [
    "Calibration",
    "Confidence",
    "NoveltyDetector",
    "Scaling",
    "confidence",
    "fit_calibration",
    "fit_novelty",
    "fit_scaling",
    "image_statistics",
    "prediction_sets",
]
