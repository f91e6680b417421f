"""The denoiser, the guidance model, their image encoders, and DiffMIC, which joins them."""

from diffmic_fast.models.denoiser import ConditionalLinear, ConditionalModel, Noising
from diffmic_fast.models.diffmic import DiffMIC, DiffMICConfig, DiffMICLoss, Prediction
from diffmic_fast.models.encoders import ImageEncoder, Trunk
from diffmic_fast.models.guidance import DCG, Guidance, GuidanceDetail

__all__ = [
    "DCG",
    "ConditionalLinear",
    "ConditionalModel",
    "DiffMIC",
    "DiffMICConfig",
    "DiffMICLoss",
    "Guidance",
    "GuidanceDetail",
    "ImageEncoder",
    "Noising",
    "Prediction",
    "Trunk",
]
