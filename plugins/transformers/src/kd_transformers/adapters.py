"""Low-rank adapters (LoRA, Hu et al. 2022, arXiv:2106.09685) by peft: put into a network, saved, and loaded again."""

from __future__ import annotations

import copy
import json
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from safetensors.torch import load_file
from torch import Tensor, nn

from kd_transformers.heads import Head
from kd_transformers.options import LoraOptions
from kd_transformers.quantized import is_quantized
from kd_transformers.source import Source, explained
from kdcore.errors import ModelError, did_you_mean

NAME = "default"
"""The adapter's name within peft."""

BASE = "base"
"""The folder beside saved adapters for the config of their model: transformers takes a folder with a config at its top
for a whole model."""

TASK_TYPES = {
    "sequence-classification": "SEQ_CLS", "token-classification": "TOKEN_CLS", "causal-lm": "CAUSAL_LM",
    "seq2seq": "SEQ_2_SEQ_LM", "encoder": "FEATURE_EXTRACTION",
}  # fmt: skip
"""How peft calls the heads; it has no word for the others, and needs none."""


@dataclass(frozen=True)
class Adapter:
    """Adapters that were saved without the weights they stand beside.

    Args:
        source: where they lie.
        base: where the weights lie.
        config: the folder of adapter_config.json.
        weights: the file of the adapters.
        settings: what adapter_config.json says.
    """

    source: Source
    base: Source
    config: Path
    weights: Path
    settings: Mapping[str, Any]

    @property
    def described(self) -> Source:
        """Where the model's config lies: with the adapters, if kd saved them, or else with the weights."""
        path = self.source.file(f"{BASE}/config.json")
        return Source(str(path.parent), None, self.source.trust) if path else self.base

    @property
    def saved(self) -> tuple[str, ...]:
        """Modules that were saved whole."""
        return tuple(self.settings.get("modules_to_save") or ())

    def holds(self, key: str) -> bool:
        """Whether a weight of the base model, by its name, is in one of them."""
        return any(f".{name}." in f".{key}" for name in self.saved)


def find_adapter(source: Source | None) -> Adapter | None:
    """The adapters that lie at a source in the place of a whole model.

    Raises:
        ModelError: if they are of another kind than LoRA, their base model cannot be had, or they are not in
            safetensors.
    """
    if source is None:
        return None
    with explained(repr(source.where)):
        config = source.file("adapter_config.json")
        settings = json.loads(config.read_text(encoding="utf-8")) if config else {}
        weights = source.file("adapter_model.safetensors") if config else None
    if config is None:
        return None
    where = settings.get("base_model_name_or_path")
    if settings.get("peft_type") != "LORA" or not where:
        raise ModelError(f"{source.where}: adapter_config.json says peft_type {settings.get('peft_type')!r} and "
                         f"base_model_name_or_path {where!r}: only LORA with a base model can be loaded. Merge it with "
                         "peft, and give the merged model")  # fmt: skip
    if weights is None:
        raise ModelError(f"{source.where}: there is no adapter_model.safetensors; only safetensors weights are read")
    base = Source(where, settings.get("revision"), source.trust)
    with explained(f"the base model {where!r} of the adapters in {source.where!r}"):
        if base.file("config.json") is None:
            raise OSError("there is no config.json")
    return Adapter(source, base, config.parent, weights, settings)


@dataclass
class Adapted:
    """A network with adapters in it, as what is saved of it.

    Args:
        tuned: peft's wrapper around the network.
        merge: whether a plain model is saved.
        base: where the frozen weights lie, for adapters that are saved alone.
    """

    tuned: Any
    merge: bool
    base: Source | None

    def save_pretrained(self, folder: Path) -> None:
        """Write the merged model, or the adapters with the config; the network itself stays as it is."""
        module = self.tuned.get_base_model()
        if self.merge or self.base is None:
            module.save_pretrained(folder, state_dict=merged_state(module))
            return
        where = Path(self.base.where)
        settings = self.tuned.peft_config[NAME]
        settings.base_model_name_or_path = str(where.resolve()) if where.is_dir() else self.base.where
        settings.revision = self.base.revision
        self.tuned.save_pretrained(str(folder), save_embedding_layers=False)
        config = copy.deepcopy(module.config)
        config.architectures = [type(module).__name__]
        if is_quantized(module) and not module.hf_quantizer.pre_quantized:
            del config.quantization_config  # of how the base was held, not of how it lies on disk
        config.save_pretrained(folder / BASE)


def adapt(module: Any, head: Head, options: LoraOptions, fresh: Iterable[str], base: Source | None,
          adapter: Adapter | None) -> Adapted:  # fmt: skip
    """Freeze a network and put adapters into it, in place.

    Trained whole, and saved so, are the classification head and every module with fresh weights.

    Args:
        module: the network.
        head: what it predicts.
        options: of the adapters.
        fresh: names of weights that the checkpoint did not hold.
        base: where the loaded weights lie.
        adapter: adapters to begin with, or fresh ones, which change nothing at first.

    Raises:
        ModelError: if peft is not installed, a name matches no module, a layer can take no adapter, those of
            `adapter` are not what the options describe, or they are to be merged into quantised weights.
    """
    peft = _peft()
    for key in ("target_modules", "modules_to_save"):
        _check_names(module, f"lora.{key}", getattr(options, key))
    saved = adapter.saved if adapter else _saved(module, head, options, fresh)
    if is_quantized(module):
        if options.merge:
            raise ModelError("lora.merge: adapters cannot be added into the quantised weights without loss: set "
                             "`merge: false`")  # fmt: skip
        module = peft.prepare_model_for_kbit_training(module, use_gradient_checkpointing=False)
    targets = list(options.target_modules) if isinstance(options.target_modules, tuple) else options.target_modules
    settings = peft.LoraConfig(
        task_type=TASK_TYPES.get(head.name), r=options.r, lora_alpha=options.alpha, lora_dropout=options.dropout,
        target_modules=targets, use_rslora=options.rslora, bias=options.bias, modules_to_save=list(saved) or None,
        exclude_modules=rf"(?:{'|'.join(map(re.escape, saved))})(?:\..*)?" if saved else None,
    )  # fmt: skip
    tuned = _inject(peft, module, settings)
    if adapter:
        same = {"r": options.r, "lora_alpha": options.alpha, "use_rslora": options.rslora}
        for key, value in same.items():
            if adapter.settings.get(key, value) != value:
                raise ModelError(f"the adapters in {adapter.source.where} have {key}={adapter.settings[key]}, `lora` "
                                 f"says {value}: give them the same")  # fmt: skip
        _load(peft, tuned, adapter)
    return Adapted(tuned, options.merge, base)


def with_adapter(module: Any, adapter: Adapter) -> Any:
    """A network with saved adapters added into its weights; beside them, if those are quantised.

    Raises:
        ModelError: if peft is not installed, or the adapters do not fit.
    """
    peft = _peft()
    with explained(f"the adapters in {adapter.source.where!r}"):
        settings = peft.LoraConfig.from_pretrained(str(adapter.config))
    tuned = _inject(peft, module, settings)
    _load(peft, tuned, adapter)
    return tuned.get_base_model() if is_quantized(module) else tuned.merge_and_unload()


def merged_state(module: nn.Module) -> dict[str, Tensor]:
    """The state of the plain network, every adapter added into the weight it stands beside; the network itself is only
    read. Weights without an adapter are the network's own tensors."""
    from peft.tuners.lora import LoraLayer
    from peft.utils import ModulesToSaveWrapper

    inside: list[str] = []
    merged: dict[str, Tensor] = {}
    for name, layer in module.named_modules():
        if isinstance(layer, ModulesToSaveWrapper):
            state = layer.modules_to_save[NAME].state_dict()
        elif isinstance(layer, LoraLayer):
            state = layer.get_base_layer().state_dict()
            delta, weight = layer.get_delta_weight(NAME).detach(), state["weight"]
            state["weight"] = (weight.to(delta.dtype) + delta).to(weight.dtype)
        else:
            continue
        inside.append(f"{name}.")
        merged |= {f"{name}.{key}": value for key, value in state.items()}
    return {**{k: v for k, v in module.state_dict().items() if not k.startswith(tuple(inside))}, **merged}


def _peft() -> ModuleType:
    try:
        import peft
    except ImportError as error:
        raise ModelError("LoRA adapters need peft: pip install 'kd-transformers[peft]', or leave `lora` out and give "
                         "a whole model as the checkpoint") from error  # fmt: skip
    return peft  # type: ignore[no-any-return]


def _inject(peft: ModuleType, module: Any, settings: Any) -> Any:
    """Peft's wrapper around a network that has the adapters in it now. Raises `ModelError` if a layer takes none."""
    tied = {name for pair in (getattr(module, "all_tied_weights_keys", None) or {}).items() for name in pair}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what it warns of is settled here, or refused below
            tuned = peft.get_peft_model(module, settings)
    except (ValueError, TypeError, NotImplementedError) as error:
        said = " ".join(str(error).split("\n")[0].split())
        raise ModelError(f"lora.target_modules: peft refuses {settings.target_modules or 'its default'} for a "
                         f"{type(module).__name__}: {said}. Name linear layers, such as "
                         f"{', '.join(_linear(module)[:6])}; or set all-linear") from error  # fmt: skip
    for name, layer in module.named_modules():
        adapted = isinstance(layer, peft.tuners.lora.LoraLayer)
        if not adapted and not isinstance(layer, peft.utils.ModulesToSaveWrapper):
            continue
        if f"{name}.weight" in tied:
            raise ModelError(f"lora: {name!r} shares its weight with another layer, so it can neither take an adapter "
                             "nor be trained whole: leave it out")  # fmt: skip
        if adapted and not hasattr(layer.get_base_layer(), "weight"):
            raise ModelError(f"lora.target_modules: {name!r} is no layer with one weight: leave it out")
    return tuned


def _load(peft: ModuleType, tuned: Any, adapter: Adapter) -> None:
    """Fill the adapters of a network. Raises `ModelError` if those saved are others."""
    with explained(f"the adapters in {adapter.source.where!r}"):
        weights = load_file(adapter.weights)
        wanted = peft.get_peft_model_state_dict(tuned, save_embedding_layers=False)
        if differing := sorted(weights.keys() ^ wanted.keys()):
            where = "the network" if differing[0] in wanted else adapter.weights.name
            raise ModelError(f"the adapters in {adapter.source.where} are not those that are asked for: only {where} "
                             f"has {differing[0]!r}. Give `lora` the options they were made with")  # fmt: skip
        peft.set_peft_model_state_dict(tuned, weights)


def _saved(module: Any, head: Head, options: LoraOptions, fresh: Iterable[str]) -> tuple[str, ...]:
    """Paths of the modules that are trained whole, none of them inside another."""
    chosen = {name for name, _ in module.named_modules()
              if name and any(name == end or name.endswith(f".{end}") for end in options.modules_to_save)}  # fmt: skip
    chosen |= {owner for key in fresh if (owner := key.rpartition(".")[0])}
    if head.classes:
        parts = ((name, part) for name, part in module.named_children() if name != module.base_model_prefix)
        chosen |= {name for name, part in parts if any(True for _ in part.parameters())}
    return tuple(sorted(name for name in chosen if not any(name.startswith(f"{other}.") for other in chosen)))


def _check_names(module: nn.Module, key: str, wanted: Any) -> None:
    names = [name for name, _ in module.named_modules() if name]
    for end in wanted if isinstance(wanted, tuple) else ():
        if not any(name == end or name.endswith(f".{end}") for name in names):
            raise ModelError(f"{key}: {type(module).__name__} has no module {end!r}; "
                             f"{did_you_mean(end, _linear(module), 'linear layers')}")  # fmt: skip


def _linear(module: nn.Module) -> list[str]:
    """Last parts of the names of the layers with a weight matrix, each once."""
    found = [name.rpartition(".")[2] for name, layer in module.named_modules()
             if getattr(getattr(layer, "weight", None), "ndim", 0) >= 2]  # fmt: skip
    return list(dict.fromkeys(found))
