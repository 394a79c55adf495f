"""The encoders as students: their own transformer, or VideoMAE of the transformers library."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kd_discovr import vit
from kd_discovr.options import VideoMAEOptions, VideoViTOptions, geometry
from kdcore.api import student_folder
from kdcore.data import Task
from kdcore.errors import DataError, ModelError
from kdcore.models import Batch, Model, Outputs

CLS = "cls_token.safetensors"


def video_vit(options: VideoViTOptions, task: Task) -> Model:
    """The transformer of `kd_discovr.vit`, fresh or from a folder. Raises `ModelError` where the folder holds none."""
    if options.checkpoint is None:
        return as_model(vit.VideoViT(**geometry(options)))
    try:
        return as_model(vit.load(student_folder(Path(options.checkpoint))))
    except Exception as error:  # safetensors and torch have no common class for a damaged or foreign file
        raise ModelError(f"checkpoint {options.checkpoint} cannot be loaded: {error}") from error


def videomae(options: VideoMAEOptions, task: Task) -> Model:
    """A VideoMAE encoder, published, fresh or from a folder.

    Raises:
        ModelError: if the transformers library is not installed, or the model cannot be had.
    """
    try:
        return as_model(VideoMAE.make(options))
    except ImportError as error:
        raise ModelError("use: videomae needs the transformers library: pip install 'kd-discovr[videomae]'") from error
    except Exception as error:  # the libraries beneath have no common class for a damaged or foreign file
        where = options.checkpoint or options.model
        raise ModelError(f"the VideoMAE model {where!r} cannot be had: {' '.join(str(error).split())}") from error


def as_model(net: Any) -> Model:
    """An encoder behind the uniform call: its embedding is the class token of the whole clip."""
    save = net.save if isinstance(net, VideoMAE) else functools.partial(vit.save, net)
    return Model(net, call, save=save)


def call(net: Any, batch: Batch) -> Outputs:
    """The embedding `[B, D]` of a batch of clips. Raises `ModelError` where the encoder cannot read them."""
    try:
        return Outputs(embedding=net(video_of(batch))["embedding"])
    except ValueError as error:
        raise ModelError(str(error)) from error


def video_of(batch: Batch) -> Tensor:
    """The clips of a batch. Raises `DataError` where there are none."""
    video = batch.get("video")
    if not isinstance(video, Tensor):
        raise DataError(f"a video encoder reads `video` [B, T, C, H, W], but the batch has: {', '.join(batch)}")
    return video


class VideoMAE(nn.Module):
    """transformers' `VideoMAEModel` with a class token before its blocks; the methods are those of `vit.VideoViT`.

    Args:
        body: the model.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, body: Any) -> None:
        super().__init__()
        config = body.config
        if config.use_mean_pooling:
            raise ValueError("the config says use_mean_pooling: such a model has no norm after its blocks")
        self.body = body
        self.width, self.heads = config.hidden_size, config.num_attention_heads
        self.patch, self.tubelet = config.patch_size, config.tubelet_size
        self.cls_token = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, 1, self.width), std=0.02))
        for name, values in zip(("mean", "std"), vit.IMAGENET, strict=True):
            self.register_buffer(name, torch.tensor(values)[:, None, None], persistent=False)

    @classmethod
    def make(cls, options: VideoMAEOptions) -> VideoMAE:
        """The model that the options name.

        Raises:
            ImportError: if the transformers library is not installed. What else can fail depends on the files.
        """
        from safetensors.torch import load_file
        from transformers import VideoMAEConfig, VideoMAEModel

        if options.checkpoint is not None:
            folder = student_folder(Path(options.checkpoint))
            net = cls(VideoMAEModel.from_pretrained(folder, use_safetensors=True))
            net.cls_token.data.copy_(load_file(folder / CLS)["cls_token"])
            return net
        config = VideoMAEConfig.from_pretrained(options.model)
        config.update({"use_mean_pooling": False, "num_frames": options.frames or config.num_frames,
                       "image_size": options.size or config.image_size})  # fmt: skip
        made = (
            VideoMAEModel.from_pretrained(options.model, config=config, use_safetensors=True)
            if options.pretrained
            else None
        )
        return cls(VideoMAEModel(config) if made is None else made)

    def embed(self, video: Tensor) -> Tensor:
        """Every token `[B, N, width]` of clips `[B, T, C, H, W]` in [0, 1] with its position.

        Raises:
            ValueError: if the clips are not of the config's length and size.
        """
        config = self.body.config
        vit.grid(video.shape, self.tubelet, self.patch, config.num_channels)
        if video.shape[1] != config.num_frames or video.shape[-1] != config.image_size:
            raise ValueError(f"the clips have {video.shape[1]} frames of {video.shape[-2]}x{video.shape[-1]} pixels, "
                             f"this VideoMAE reads {config.num_frames} of {config.image_size}x{config.image_size}; set "
                             "the student's `frames` and `size`")  # fmt: skip
        tokens: Tensor = self.body.embeddings((video - self.mean) / self.std, None)
        return tokens

    def encode(self, tokens: Tensor) -> Tensor:
        """As `vit.VideoViT.encode`."""
        hidden = torch.cat([self.cls_token.expand(len(tokens), -1, -1), tokens], 1)
        out: Tensor = self.body.layernorm(self.body.encoder(hidden).last_hidden_state)
        return out

    def forward(self, video: Tensor) -> dict[str, Tensor | None]:
        """As `vit.VideoViT.forward`."""
        return {"logits": None, "embedding": self.encode(self.embed(video))[:, 0]}

    def frame_encoder(self) -> VideoMAE:
        """As `vit.VideoViT.frame_encoder`."""
        config = type(self.body.config)(**{**self.body.config.to_dict(), "num_frames": 1, "tubelet_size": 1})
        return VideoMAE(type(self.body)(config))

    def save(self, folder: Path) -> None:
        """Write the model as `save_pretrained` does, and the class token beside it."""
        from safetensors.torch import save_file

        self.body.save_pretrained(folder)
        save_file({"cls_token": self.cls_token.detach().cpu().contiguous()}, folder / CLS)
