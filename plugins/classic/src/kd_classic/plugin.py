"""Hooks of kd-classic."""

from __future__ import annotations

from typing import Literal, NamedTuple

from kdcore import Component, Paper, hookimpl


class Entry(NamedTuple):
    """A loss, a method, or both under one name: classes of that name in `losses` and `methods`."""

    cls: str
    summary: str
    tags: tuple[str, ...]
    paper: Paper | None = None
    kinds: tuple[Literal["loss", "method"], ...] = ("loss", "method")


_LOGITS, _MAPS, _VECTORS = ("logits", "any"), ("features", "any"), ("relations", "any")
_PIXELS = ("segmentation", "image")
_LIU = Paper("Structured Knowledge Distillation for Semantic Segmentation", "Yifan Liu, Ke Chen, Chris Liu, Zengchang "
             "Qin, Zhenbo Luo, Jingdong Wang", "CVPR", 2019, "1903.04197")  # fmt: skip
_YUAN = Paper("Revisiting Knowledge Distillation via Label Smoothing Regularization", "Li Yuan, Francis E. H. Tay, "
              "Guilin Li, Tao Wang, Jiashi Feng", "CVPR", 2020, "1909.11723")  # fmt: skip

ENTRIES = {
    "cross-entropy": Entry("CrossEntropy", "cross-entropy with the labels", ("labels", "any"), kinds=("loss",)),
    "supervised": Entry("Supervised", "the labels alone: a student without a teacher", ("labels", "any"),
                        kinds=("method",)),
    "distill": Entry("WithLosses", "any list of losses, any teachers", ("generic", "any"), kinds=("method",)),
    "kd": Entry("KD", "soft targets: KL divergence of tempered logits", _LOGITS, Paper(
        "Distilling the Knowledge in a Neural Network", "Geoffrey Hinton, Oriol Vinyals, Jeff Dean",
        "NIPS Deep Learning Workshop", 2014, "1503.02531")),
    "dkd": Entry("DKD", "KD decoupled into target class and other classes", _LOGITS, Paper(
        "Decoupled Knowledge Distillation", "Borui Zhao, Quan Cui, Renjie Song, Yiyu Qiu, Jiajun Liang", "CVPR", 2022,
        "2203.08679")),
    "dist": Entry("DIST", "correlation of predictions between and within classes", _LOGITS, Paper(
        "Knowledge Distillation from A Stronger Teacher", "Tao Huang, Shan You, Fei Wang, Chen Qian, Chang Xu",
        "NeurIPS", 2022, "2205.10536")),
    "wsld": Entry("WSLD", "soft labels weighted by who is right", _LOGITS, Paper(
        "Rethinking Soft Labels for Knowledge Distillation: A Bias-Variance Tradeoff Perspective", "Helong Zhou, "
        "Liangchen Song, Jiajie Chen, Ye Zhou, Guoli Wang, Junsong Yuan, Qian Zhang", "ICLR", 2021, "2102.00650")),
    "deit": Entry("DeiT", "a distillation token beside the class token of a transformer", ("logits", "image"), Paper(
        "Training data-efficient image transformers & distillation through attention", "Hugo Touvron, Matthieu Cord, "
        "Matthijs Douze, Francisco Massa, Alexandre Sablayrolles, Hervé Jégou", "ICML", 2021, "2012.12877")),
    "multi-teacher": Entry("MultiTeacher", "KD from several teachers: average, confidence or a learned gate", _LOGITS,
                           Paper("Confidence-Aware Multi-Teacher Knowledge Distillation", "Hailin Zhang, Defang Chen, "
                                 "Can Wang", "ICASSP", 2022, "2201.00007")),
    "fitnets": Entry("FitNets", "hints: regress intermediate features of the teacher", _MAPS, Paper(
        "FitNets: Hints for Thin Deep Nets", "Adriana Romero, Nicolas Ballas, Samira Ebrahimi Kahou, Antoine Chassang, "
        "Carlo Gatta, Yoshua Bengio", "ICLR", 2015, "1412.6550")),
    "at": Entry("AT", "attention transfer between layers", _MAPS, Paper(
        "Paying More Attention to Attention: Improving the Performance of Convolutional Neural Networks via Attention "
        "Transfer", "Sergey Zagoruyko, Nikos Komodakis", "ICLR", 2017, "1612.03928")),
    "nst": Entry("NST", "neuron selectivity: MMD between the channels of layers", _MAPS, Paper(
        "Like What You Like: Knowledge Distill via Neuron Selectivity Transfer", "Zehao Huang, Naiyan Wang", "arXiv",
        2017, "1707.01219")),
    "vid": Entry("VID", "variational bound on the information shared by layers", _MAPS, Paper(
        "Variational Information Distillation for Knowledge Transfer", "Sungsoo Ahn, Shell Xu Hu, Andreas Damianou, "
        "Neil D. Lawrence, Zhenwen Dai", "CVPR", 2019, "1904.05835")),
    "ab": Entry("AB", "activation boundaries: the signs of pre-activations", _MAPS, Paper(
        "Knowledge Transfer via Distillation of Activation Boundaries Formed by Hidden Neurons", "Byeongho Heo, Minsik "
        "Lee, Sangdoo Yun, Jin Young Choi", "AAAI", 2019, "1811.03233")),
    "ofd": Entry("OFD", "overhauled feature distillation: partial L2 before activations", ("features", "image"), Paper(
        "A Comprehensive Overhaul of Feature Distillation", "Byeongho Heo, Jeesoo Kim, Sangdoo Yun, Hyojin Park, Nojun "
        "Kwak, Jin Young Choi", "ICCV", 2019, "1904.01866")),
    "reviewkd": Entry("ReviewKD", "knowledge review: levels fused from the deepest down", ("features", "image"), Paper(
        "Distilling Knowledge via Knowledge Review", "Pengguang Chen, Shu Liu, Hengshuang Zhao, Jiaya Jia", "CVPR",
        2021, "2104.09044")),
    "mgd": Entry("MGD", "masked generative: the teacher's features from part of the student's", _MAPS, Paper(
        "Masked Generative Distillation", "Zhendong Yang, Zhe Li, Mingqi Shao, Dachuan Shi, Zehuan Yuan, Chun Yuan",
        "ECCV", 2022, "2205.01529")),
    "simkd": Entry("SimKD", "the teacher's classifier reused on projected features", ("features", "image"), Paper(
        "Knowledge Distillation with the Reused Teacher Classifier", "Defang Chen, Jian-Ping Mei, Hailin Zhang, Can "
        "Wang, Yan Feng, Chun Chen", "CVPR", 2022, "2203.14001")),
    "sp": Entry("SP", "similarities between samples preserved", _VECTORS, Paper(
        "Similarity-Preserving Knowledge Distillation", "Frederick Tung, Greg Mori", "ICCV", 2019, "1907.09682")),
    "rkd": Entry("RKD", "distances and angles between samples", _VECTORS, Paper(
        "Relational Knowledge Distillation", "Wonpyo Park, Dongju Kim, Yan Lu, Minsu Cho", "CVPR", 2019,
        "1904.05068")),
    "pkt": Entry("PKT", "probabilities of being neighbours", _VECTORS, Paper(
        "Learning Deep Representations with Probabilistic Knowledge Transfer", "Nikolaos Passalis, Anastasios Tefas",
        "ECCV", 2018, "1803.10837")),
    "crd": Entry("CRD", "contrastive representations with memory banks", _VECTORS, Paper(
        "Contrastive Representation Distillation", "Yonglong Tian, Dilip Krishnan, Phillip Isola", "ICLR", 2020,
        "1910.10699")),
    "cwd": Entry("CWD", "channel-wise: where each channel looks", _PIXELS, Paper(
        "Channel-wise Knowledge Distillation for Dense Prediction", "Changyong Shu, Yifan Liu, Jianfei Gao, Zheng Yan, "
        "Chunhua Shen", "ICCV", 2021, "2011.13256")),
    "skd": Entry("SKD", "structured: pixel-wise, pair-wise and holistic", _PIXELS, _LIU, ("method",)),
    "skd-pixelwise": Entry("PixelWise", "pixel-wise soft cross-entropy", _PIXELS, _LIU, ("loss",)),
    "skd-pairwise": Entry("PairWise", "pair-wise similarities of regions", _PIXELS, _LIU, ("loss",)),
    "tfkd": Entry("TfKD", "no teacher but a made-up one, or the student's earlier self", _LOGITS, _YUAN, ("method",)),
    "tfkd-reg": Entry("TfKDReg", "a made-up teacher, almost uniform", _LOGITS, _YUAN, ("loss",)),
    "lsr": Entry("LSR", "label smoothing over the other classes", ("labels", "any"), _YUAN, ("loss",)),
    "dml": Entry("DML", "students that teach each other", ("logits", "online", "any"), Paper(
        "Deep Mutual Learning", "Ying Zhang, Tao Xiang, Timothy M. Hospedales, Huchuan Lu", "CVPR", 2018,
        "1706.00384"), ("method",)),
    "byot": Entry("BYOT", "self-distillation from the deepest exit into shallow ones", ("features", "image"), Paper(
        "Be Your Own Teacher: Improve the Performance of Convolutional Neural Networks via Self Distillation",
        "Linfeng Zhang, Jiebo Song, Anni Gao, Jingwei Chen, Chenglong Bao, Kaisheng Ma", "ICCV", 2019, "1905.08094")),
    "takd": Entry("TAKD", "a chain of teacher assistants", ("logits", "any"), Paper(
        "Improved Knowledge Distillation via Teacher Assistant", "Seyed Iman Mirzadeh, Mehrdad Farajtabar, Ang Li, Nir "
        "Levine, Akihiro Matsukawa, Hassan Ghasemzadeh", "AAAI", 2020, "1902.03393"), ("method",)),
    "born-again": Entry("BornAgain", "generations of one architecture", ("logits", "any"), Paper(
        "Born-Again Neural Networks", "Tommaso Furlanello, Zachary C. Lipton, Michael Tschannen, Laurent Itti, Anima "
        "Anandkumar", "ICML", 2018, "1805.04770"), ("method",)),
}  # fmt: skip
"""What the plugin offers, by name."""


@hookimpl
def kd_register_losses() -> list[Component]:
    """Cross-entropy and the distillation losses."""
    return [_component("loss", name) for name, entry in ENTRIES.items() if "loss" in entry.kinds]


@hookimpl
def kd_register_methods() -> list[Component]:
    """The generic method and each baseline."""
    return [_component("method", name) for name, entry in ENTRIES.items() if "method" in entry.kinds]


def _component(kind: Literal["loss", "method"], name: str) -> Component:
    entry = ENTRIES[name]
    module, suffix = ("losses", "Options") if kind == "loss" else ("methods", "MethodOptions")
    shared = kind == "method" and entry.cls in ("WSLD", "DeiT", "BYOT", "SimKD")  # the loss is the whole method
    options = (
        None
        if name in ("distill", "supervised")
        else f"kd_classic.options:{entry.cls}{'Options' if shared else suffix}"
    )
    return Component(kind, name, f"kd_classic.{module}:{entry.cls}", options, entry.summary, entry.tags, entry.paper,
                     f"recipes/{name}")  # fmt: skip
