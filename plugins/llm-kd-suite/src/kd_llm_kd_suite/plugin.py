"""Hooks of kd-llm-kd-suite."""

from __future__ import annotations

from kdcore import Component, Paper, hookimpl

SURVEY = Paper(
    "A Survey on Knowledge Distillation of Large Language Models",
    "Xiaohan Xu, Ming Li, Chongyang Tao, Tao Shen, Reynold Cheng, Jinyang Li, Can Xu, Dacheng Tao, Tianyi Zhou",
    "arXiv",
    2024,
    "2402.13116",
    "https://github.com/Tebmer/Awesome-Knowledge-Distillation-of-LLMs",
)
GKD = Paper(
    "On-Policy Distillation of Language Models: Learning from Self-Generated Mistakes",
    "Rishabh Agarwal, Nino Vieillard, Yongchao Zhou, Piotr Stanczyk, Sabela Ramos, Matthieu Geist, Olivier Bachem",
    "ICLR",
    2024,
    "2306.13649",
)
DISTILLM = Paper(
    "DistiLLM: Towards Streamlined Distillation for Large Language Models",
    "Jongwoo Ko, Sungnyun Kim, Tianyi Chen, Se-Young Yun",
    "ICML",
    2024,
    "2402.03898",
    "https://github.com/jongwooko/distillm",
)
MINILLM = Paper(
    "MiniLLM: Knowledge Distillation of Large Language Models",
    "Yuxian Gu, Li Dong, Furu Wei, Minlie Huang",
    "ICLR",
    2024,
    "2306.08543",
    "https://github.com/microsoft/LMOps",
)
ULD = Paper(
    "Towards Cross-Tokenizer Distillation: the Universal Logit Distillation Loss for LLMs",
    "Nicolas Boizard, Kevin El Haddad, Céline Hudelot, Pierre Colombo",
    "TMLR",
    2025,
    "2402.12030",
)
LOSSES: dict[str, tuple[str, str | None, str, Paper | None, tuple[str, ...]]] = {
    "next-token": ("NextToken", None, "cross-entropy of the next token", None, ()),
    "fkl": ("forward_kl", "Temperature", "forward KL of next-token distributions", SURVEY, ()),
    "rkl": ("reverse_kl", "Temperature", "reverse KL of next-token distributions", MINILLM, ()),
    "symmetric-kl": ("symmetric_kl", "Symmetric", "forward and reverse KL, weighted", SURVEY, ()),
    "jsd": ("jsd", "JSD", "generalised Jensen-Shannon divergence", GKD, ()),
    "tvd": ("total_variation", "Temperature", "total variation distance", SURVEY, ()),
    "sfkl": ("skewed_forward_kl", "Skew", "skewed forward KL", DISTILLM, ()),
    "srkl": ("skewed_reverse_kl", "Skew", "skewed reverse KL", DISTILLM, ()),
    "hidden-states": ("HiddenStates", "Hidden", "projected hidden states of evenly spread layers", SURVEY, ()),
    "attention-maps": ("AttentionMaps", "Attention", "attention maps of evenly spread layers", SURVEY, ()),
    "uld": (
        "ULD",
        "ULD",
        "sorted probabilities; with two tokenizers see method llm-kd-suite",
        ULD,
        ("two-tokenizers",),
    ),
}


@hookimpl
def kd_register_losses() -> list[Component]:
    return [
        Component("loss", name, f"kd_llm_kd_suite.losses:{target}",
                  f"kd_llm_kd_suite.options:{options}Options" if options else None, summary,
                  ("text", "causal-lm", "language-model", *tags), paper)
        for name, (target, options, summary, paper, tags) in LOSSES.items()
    ]  # fmt: skip


@hookimpl
def kd_register_methods() -> list[Component]:
    return [
        Component(
            "method",
            "llm-kd-suite",
            "kd_llm_kd_suite.method:Suite",
            "kd_llm_kd_suite.options:SuiteOptions",
            "a language model distilled by one of nineteen algorithms, on texts of data, teacher or student",
            ("text", "causal-lm", "language-model", "on-policy"),
            SURVEY,
            recipes="recipes",
        )
    ]
