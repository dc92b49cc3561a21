"""All methods. A new one is a file here and its line in this table."""

from visionpeft.adapter import Method
from visionpeft.methods.binary import BinaryAdaptFormer, BinaryLoRA
from visionpeft.methods.block_lora import BlockLoRA
from visionpeft.methods.bottleneck import AdaptFormer, Houlsby, Pfeiffer
from visionpeft.methods.compacter import Compacter
from visionpeft.methods.convpass import Convpass
from visionpeft.methods.dapt import DAPT
from visionpeft.methods.difffit import DiffFit
from visionpeft.methods.fact import FacTTK, FacTTT
from visionpeft.methods.hydra import Hydra
from visionpeft.methods.idpt import IDPT
from visionpeft.methods.in_place import BitFit, FullFineTuning, LinearProbe, LNTuning
from visionpeft.methods.krona import KronA
from visionpeft.methods.linear_adapter import LinearAdapter
from visionpeft.methods.lora import LoRA
from visionpeft.methods.mosa import MoSA
from visionpeft.methods.noah import NOAH
from visionpeft.methods.orthogonal import OrthogonalAdaptation
from visionpeft.methods.parallel import ParallelAdapter
from visionpeft.methods.point_peft import PointPEFT
from visionpeft.methods.pointgst import PointGST
from visionpeft.methods.ppt import PPT
from visionpeft.methods.prefix import PrefixTuning
from visionpeft.methods.rein import Rein
from visionpeft.methods.repadapter import RepAdapter
from visionpeft.methods.shira import SHiRA
from visionpeft.methods.spt import SPT
from visionpeft.methods.ssf import SSF
from visionpeft.methods.svfit import SVFit
from visionpeft.methods.textual_inversion import TextualInversion
from visionpeft.methods.vpt import VPT

METHODS: dict[str, type[Method]] = {
    method.key: method
    for method in (
        LoRA,
        SSF,
        BitFit,
        LNTuning,
        AdaptFormer,
        Houlsby,
        Pfeiffer,
        VPT,
        FacTTT,
        FacTTK,
        Convpass,
        ParallelAdapter,
        RepAdapter,
        Hydra,
        PrefixTuning,
        Compacter,
        MoSA,
        Rein,
        NOAH,
        BinaryAdaptFormer,
        BinaryLoRA,
        BlockLoRA,
        LinearAdapter,
        LinearProbe,
        FullFineTuning,
        KronA,
        DiffFit,
        OrthogonalAdaptation,
        SVFit,
        SHiRA,
        TextualInversion,
        PointGST,
        IDPT,
        DAPT,
        PPT,
        PointPEFT,
    )
}

# Made by a function for one model: not to be had by name, but to be loaded.
ALLOCATED: dict[str, type[Method]] = {SPT.key: SPT}

__all__ = ["ALLOCATED", "METHODS", "SPT", *sorted(method.__name__ for method in METHODS.values())]
