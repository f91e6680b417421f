"""The denoiser, the guidance model, their image encoders, and DiffMIC, which joins them."""

from diffmic_fast.config.model import DiffMICConfig
from diffmic_fast.config.preprocessing import Preprocessing
from diffmic_fast.models.denoiser import BranchForward, ConditionalLinear, ConditionalModel
from diffmic_fast.models.diffmic import DiffMIC
from diffmic_fast.models.encoders import ImageEncoder, Trunk
from diffmic_fast.models.guidance import DCG, Guidance, GuidanceDetail
from diffmic_fast.models.loss import DiffMICLoss
from diffmic_fast.models.prediction import Prediction

__all__ = [
    "DCG",
    "BranchForward",
    "ConditionalLinear",
    "ConditionalModel",
    "DiffMIC",
    "DiffMICConfig",
    "DiffMICLoss",
    "Guidance",
    "GuidanceDetail",
    "ImageEncoder",
    "Prediction",
    "Preprocessing",
    "Trunk",
]
