"""The pure functions as losses: options, taps, trained adapters, and where the target stands in a batch."""

from kd_classic.losses.features import AB, AT, BYOT, MGD, NST, OFD, VID, FitNets, ReviewKD, SimKD
from kd_classic.losses.logits import (
    DIST,
    DKD,
    KD,
    LSR,
    WSLD,
    CrossEntropy,
    DeiT,
    MultiTeacher,
    TfKDReg,
)
from kd_classic.losses.maps import CWD, PairWise, PixelWise
from kd_classic.losses.relations import CRD, PKT, RKD, SP

__all__ = [
    "AB", "AT", "BYOT", "CRD", "CWD", "DIST", "DKD", "KD", "LSR", "MGD", "NST", "OFD", "PKT", "RKD", "SP", "VID",
    "WSLD", "CrossEntropy", "DeiT", "FitNets", "MultiTeacher", "PairWise", "PixelWise", "ReviewKD", "SimKD",
    "TfKDReg",
]  # fmt: skip
