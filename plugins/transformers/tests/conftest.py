"""Tiny models, saved as transformers saves them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

VOCABULARY = 40
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
CONFIGS = {
    "bert": {"model_type": "bert", **SMALL, "vocab_size": VOCABULARY},
    "distilbert": {"model_type": "distilbert", "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32,
                   "vocab_size": VOCABULARY},
    "gpt2": {"model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": VOCABULARY, "n_positions": 32,
             "bos_token_id": 2, "eos_token_id": 2},
    "llama": {"model_type": "llama", **SMALL, "vocab_size": VOCABULARY},
    "t5": {"model_type": "t5", "d_model": 16, "num_layers": 2, "num_heads": 2, "d_ff": 32, "d_kv": 8,
           "vocab_size": VOCABULARY},
    "vit": {"model_type": "vit", **SMALL, "image_size": 32, "patch_size": 8},
    "segformer": {"model_type": "segformer", "hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1],
                  "decoder_hidden_size": 16},
}  # fmt: skip
AUTO = {
    "sequence-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "masked-lm": "AutoModelForMaskedLM",
    "causal-lm": "AutoModelForCausalLM",
    "seq2seq": "AutoModelForSeq2SeqLM",
    "image-classification": "AutoModelForImageClassification",
    "semantic-segmentation": "AutoModelForSemanticSegmentation",
    "encoder": "AutoModel",
}


def make_tokenizer(size: int = VOCABULARY, first: str = "word") -> transformers.PreTrainedTokenizerFast:
    words = {"[PAD]": 0, "[UNK]": 1, "[EOS]": 2, **{f"{first}{i}": i for i in range(3, size)}}
    core = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="[PAD]", unk_token="[UNK]", eos_token="[EOS]"
    )


def make_folder(folder: Path, name: str, head: str, tokenizer: bool = False, **changes: object) -> str:
    settings = {**CONFIGS[name], **changes}
    config = transformers.AutoConfig.for_model(settings.pop("model_type"), **settings)
    torch.manual_seed(0)
    getattr(transformers, AUTO[head]).from_config(config).save_pretrained(folder)
    if tokenizer:
        make_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def folder(tmp_path: Path) -> Callable[..., str]:
    """`folder(name, head, tokenizer=False, **config)`: a tiny model with fresh weights, saved."""
    return lambda name, head, **more: make_folder(tmp_path / f"{name}-{head}", name, head, **more)


@pytest.fixture
def texts() -> dict[str, torch.Tensor]:
    """Two texts of 7 and 4 tokens, padded on the right."""
    ids = torch.randint(3, VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    ids[1, 4:], mask[1, 4:] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.fixture
def images() -> dict[str, torch.Tensor]:
    return {"image": torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))}


@pytest.fixture
def config() -> Callable[..., dict[str, object]]:
    """`config(name, **changes)`: the entries of a tiny model's config."""
    return lambda name, **changes: {**CONFIGS[name], **changes}


@pytest.fixture
def tokenizer() -> Callable[..., transformers.PreTrainedTokenizerFast]:
    """`tokenizer(size, first)`: a tokenizer of that many words."""
    return make_tokenizer


@pytest.fixture
def auto() -> dict[str, str]:
    """The class of transformers that loads each head."""
    return AUTO
