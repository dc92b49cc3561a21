"""visionpeft: any parameter-efficient fine-tuning method on any vision backbone.

tuner = visionpeft.attach(model, visionpeft.LoRA(rank=8), train="head")
"""

from visionpeft import formats, methods
from visionpeft.activation import activate, tuners
from visionpeft.attaching import attach
from visionpeft.attention import set_attention
from visionpeft.errors import DeadAdapterError, VisionPEFTError
from visionpeft.methods import METHODS
from visionpeft.methods.bottleneck import AdaptFormer
from visionpeft.methods.difffit import DiffFit
from visionpeft.methods.krona import KronA
from visionpeft.methods.lora import LoRA
from visionpeft.methods.pointgst import PointGST
from visionpeft.methods.ssf import SSF
from visionpeft.sites import Site, inspect
from visionpeft.state import load
from visionpeft.tuner import Tuner

__version__ = "0.1.0"
__all__ = [
    "METHODS",
    "SSF",
    "AdaptFormer",
    "DeadAdapterError",
    "DiffFit",
    "KronA",
    "LoRA",
    "PointGST",
    "Site",
    "Tuner",
    "VisionPEFTError",
    "activate",
    "attach",
    "formats",
    "inspect",
    "load",
    "methods",
    "set_attention",
    "tuners",
]
