"""Denoisers and a pipeline small enough for tests, with random weights."""

import json
from pathlib import Path
from typing import Any

import diffusers
import torch
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

SD3 = {"sample_size": 8, "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 3, "attention_head_dim": 8,
       "num_attention_heads": 2, "joint_attention_dim": 32, "caption_projection_dim": 16, "pooled_projection_dim": 32,
       "pos_embed_max_size": 8}  # fmt: skip
UNET = {"sample_size": 8, "in_channels": 4, "out_channels": 4, "block_out_channels": (8, 16), "norm_num_groups": 4,
        "layers_per_block": 1}  # fmt: skip
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "SD3Transformer2DModel": SD3,
    "FluxTransformer2DModel": {"in_channels": 16, "num_layers": 1, "num_single_layers": 2, "attention_head_dim": 8,
                               "num_attention_heads": 2, "joint_attention_dim": 32, "pooled_projection_dim": 32,
                               "axes_dims_rope": (4, 2, 2), "guidance_embeds": True},
    "UNet2DModel": {**UNET, "attention_head_dim": 4, "num_class_embeds": 4, "down_block_types": ("DownBlock2D",) * 2,
                    "up_block_types": ("UpBlock2D",) * 2},
    "UNet2DConditionModel": {**UNET, "cross_attention_dim": 32, "attention_head_dim": 4,
                             "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
                             "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D")},
    "DiTTransformer2DModel": {"sample_size": 8, "in_channels": 4, "out_channels": 8, "num_layers": 2,
                              "attention_head_dim": 8, "num_attention_heads": 2, "num_embeds_ada_norm": 4},
    "PixArtTransformer2DModel": {"sample_size": 8, "num_layers": 2, "attention_head_dim": 8, "num_attention_heads": 2,
                                 "in_channels": 4, "out_channels": 8, "cross_attention_dim": 16, "caption_channels": 32,
                                 "use_additional_conditions": False},
    "SanaTransformer2DModel": {"in_channels": 4, "out_channels": 4, "num_layers": 1, "num_attention_heads": 2,
                               "attention_head_dim": 8, "num_cross_attention_heads": 2, "cross_attention_head_dim": 8,
                               "cross_attention_dim": 16, "caption_channels": 32, "sample_size": 8, "patch_size": 1},
}  # fmt: skip


def batch(size: int = 3) -> dict[str, Any]:
    """Latents with every condition that any of the denoisers reads."""
    generator = torch.Generator().manual_seed(5)
    return {
        "latents": torch.randn(size, 4, 8, 8, generator=generator),
        "label": torch.arange(size) % 4,
        "prompt_embeds": torch.randn(size, 6, 32, generator=generator),
        "pooled_prompt_embeds": torch.randn(size, 32, generator=generator),
        "prompt_attention_mask": torch.ones(size, 6),
        "index": torch.arange(10, 10 + size),
    }


def tokenizer(folder: Path) -> CLIPTokenizer:
    """A tokenizer of single letters."""
    folder.mkdir(parents=True, exist_ok=True)
    letters = [chr(c) for c in range(97, 123)]
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{c}</w>" for c in letters)]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=12)


def sd3_pipeline(folder: Path, **changes: Any) -> diffusers.StableDiffusion3Pipeline:
    """A Stable Diffusion 3 pipeline with two text encoders and a VAE, saved into the folder."""
    torch.manual_seed(0)
    text = CLIPTextConfig(vocab_size=54, hidden_size=16, intermediate_size=16, num_hidden_layers=2, bos_token_id=0,
                          num_attention_heads=2, max_position_embeddings=12, projection_dim=16, eos_token_id=1,
                          pad_token_id=1)  # fmt: skip
    vae = diffusers.AutoencoderKL(block_out_channels=(8, 8), latent_channels=4, norm_num_groups=4, shift_factor=0.1,
                                  down_block_types=("DownEncoderBlock2D",) * 2, scaling_factor=1.5,
                                  up_block_types=("UpDecoderBlock2D",) * 2, use_quant_conv=False,
                                  use_post_quant_conv=False)  # fmt: skip
    pipe = diffusers.StableDiffusion3Pipeline(
        transformer=diffusers.SD3Transformer2DModel(**SD3, **changes),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=CLIPTextModelWithProjection(text),
        tokenizer=tokenizer(folder / "letters"),
        text_encoder_2=CLIPTextModelWithProjection(text),
        tokenizer_2=tokenizer(folder / "letters"),
        text_encoder_3=None,
        tokenizer_3=None,
    )
    pipe.save_pretrained(folder)
    return pipe
