"""The methods: most are cross-entropy plus one loss; the others are procedures of several stages or models."""

from kd_classic.methods.baselines import (
    AT,
    BYOT,
    CRD,
    CWD,
    DIST,
    DKD,
    KD,
    MGD,
    NST,
    OFD,
    PKT,
    RKD,
    SP,
    VID,
    WSLD,
    DeiT,
    MultiTeacher,
    ReviewKD,
    Supervised,
    WithLosses,
)
from kd_classic.methods.chains import TAKD, BornAgain
from kd_classic.methods.mutual import DML
from kd_classic.methods.simkd import SimKD
from kd_classic.methods.staged import AB, FitNets, TfKD
from kd_classic.methods.structural import SKD

__all__ = [
    "AB", "AT", "BYOT", "CRD", "CWD", "DIST", "DKD", "DML", "KD", "MGD", "NST", "OFD", "PKT", "RKD", "SKD", "SP",
    "TAKD", "VID", "WSLD", "BornAgain", "DeiT", "FitNets", "MultiTeacher", "ReviewKD", "SimKD",
    "Supervised", "TfKD", "WithLosses",
]  # fmt: skip
