"""Reading a recipe: YAML without objects, references or sizes that could harm, overrides, interpolation."""

from __future__ import annotations

import contextlib
import io
import os
import re
import typing
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from kdcore.errors import RecipeError, shown

MAX_DEPTH, MAX_NODES, MAX_BYTES, MAX_BITS = 40, 20_000, 1_000_000, 10_000
"""Limits of a recipe, its references written out: far beyond what anybody writes."""

ALLOW_ENV = "KD_ALLOW_ENV"
"""The environment variables that a recipe may read, separated by commas."""

_SECRET = re.compile(r"key|token|secret|passw|credential", re.IGNORECASE)


def load(source: str | Path | Mapping[str, Any], overrides: Iterable[str] = ()) -> dict[str, Any]:
    """Read a recipe file (or take a mapping), apply `key=value` overrides and resolve interpolations.

    Raises:
        RecipeError: if the file is missing, a folder, empty, not YAML, not a mapping, too large or too deep, refers to
            itself or to an environment variable that is not allowed, or an override is malformed.
    """
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    name = "the recipe" if isinstance(source, Mapping) else str(source)
    try:
        return _loaded(source, overrides, name)
    except IsADirectoryError:
        raise RecipeError(f"{name}: this is a folder; name the recipe file in it") from None
    except FileNotFoundError:
        raise RecipeError(f"{name}: there is no such file") from None
    except UnicodeDecodeError:
        raise RecipeError(f"{name}: not a YAML file: it is not text") from None
    except OSError as error:
        if not getattr(error, "strerror", None):  # OmegaConf's own, for a scalar at the top
            raise RecipeError(f"{name}: a recipe is a mapping of keys such as 'method:'") from None
        raise RecipeError(f"{name}: cannot be read: {error.strerror}") from None
    except OmegaConfBaseException as error:
        said = str(error).strip().splitlines()[0].removeprefix("RecipeError raised while resolving interpolation: ")
        at = f"{error.full_key}: " if getattr(error, "full_key", None) else ""
        raise RecipeError(f"{name}: {at}{said}") from None
    except RecursionError:
        raise RecipeError(f"{name}: something in it refers to itself, or is nested too deeply") from None
    except (YAMLError, ValueError, OverflowError, TypeError, AttributeError) as error:  # also numbers that are none
        raise RecipeError(f"{name}: not valid YAML: {' '.join(str(error).split())}") from None


def _loaded(source: str | Path | Mapping[str, Any], overrides: Iterable[str], name: str) -> dict[str, Any]:
    from omegaconf import DictConfig, OmegaConf

    if isinstance(source, Mapping):
        _check_size(source, name)
    config: Any = OmegaConf.create(dict(source)) if isinstance(source, Mapping) else _parsed(Path(source))
    if not isinstance(config, DictConfig):
        what = "list" if type(config).__name__ == "ListConfig" else type(config).__name__
        raise RecipeError(f"{name}: a recipe is a mapping of keys such as 'method:', not a {what}")
    if not config:
        raise RecipeError(f"{name}: the recipe is empty; `kd cp METHOD/quickstart` gives one to start from")
    with _environment_guarded():
        _spell_out(config)
        for override in overrides:
            key, equals, value = override.partition("=")
            if not equals or not key.strip():
                raise RecipeError(f"override {override!r}: write key=value, such as train.epochs=3")
            OmegaConf.update(
                config,
                re.sub(r"^(teacher|student)\b", r"\1s.\1", key.strip()),
                OmegaConf.create(f"v: {value}" if value else "v: ''").v,
                merge=True,
            )
        found = typing.cast(dict[str, Any], OmegaConf.to_container(config, resolve=True))
    _check_size(found, name)
    return found


def _spell_out(config: Any) -> None:
    """Replace the short forms of a recipe, so that overrides find what they change."""
    from omegaconf import OmegaConf

    def plain(section: Any, key: Any) -> Any:  # what is interpolated is resolved later, where an error has its key
        return None if OmegaConf.is_interpolation(section, key) else section.get(key)

    for key in ("teacher", "student"):
        if key in config and f"{key}s" not in config:
            config[f"{key}s"] = {key: config.pop(key)}
    sections = [config, *(found for k in ("teachers", "students") if hasattr(found := plain(config, k), "items"))]
    for section in sections:
        for key in ("method", "data") if section is config else list(section):
            if isinstance(found := plain(section, key), str):
                section[key] = {"use": found}
    if hasattr(plain(config, "eval"), "items") and True in config["eval"]:
        config["eval"]["on"] = config["eval"].pop(True)  # YAML 1.1 reads an unquoted `on` as true


def _parsed(source: Path) -> Any:
    """The configuration in a file that is neither too large nor refers to itself."""
    import yaml
    from omegaconf import OmegaConf

    with open(source, encoding="utf-8") as file:
        text = file.read(MAX_BYTES + 1)
    if len(text) > MAX_BYTES:
        raise RecipeError(f"{source}: larger than a recipe can be ({MAX_BYTES} characters)")
    loader, depth = getattr(yaml, "CSafeLoader", yaml.SafeLoader), 0
    for event in yaml.parse(text, Loader=loader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            line = event.start_mark.line + 1 if event.start_mark else "?"
            raise RecipeError(f"{source}, line {line}: nested deeper than {MAX_DEPTH} levels")
    _measure(yaml.compose(text, Loader=loader), str(source), [], {})
    return OmegaConf.load(io.StringIO(text))


def _measure(node: Any, source: str, above: list[int], sizes: dict[int, int]) -> int:
    """The number of nodes with all references written out."""
    if id(node) in sizes:
        return sizes[id(node)]
    where = f"{source}, line {node.start_mark.line + 1}" if node is not None else source
    if id(node) in above:
        raise RecipeError(f"{where}: a reference (`*name`) leads back to itself")
    value = getattr(node, "value", None)
    parts = [part for pair in value for part in (pair if isinstance(pair, tuple) else (pair,))] if isinstance(
        value, list) else []  # fmt: skip
    size = 1 + sum(_measure(part, source, [*above, id(node)], sizes) for part in parts)
    if size > MAX_NODES:
        raise RecipeError(f"{where}: more than {MAX_NODES} entries, references written out")
    sizes[id(node)] = size
    return size


def _check_size(value: Any, source: str, path: tuple[Any, ...] = (), size: int = 0) -> int:
    """Refuse what is too deep, too large or no text; the number of nodes so far, references written out."""
    where = f"{source}: {'.'.join(map(shown, path[:4]))}{'…' if path[4:] else ''}"
    if len(path) > MAX_DEPTH:
        raise RecipeError(f"{where}: nested deeper than {MAX_DEPTH} levels")
    if (size := size + 1) > MAX_NODES:
        raise RecipeError(f"{where}: more than {MAX_NODES} entries, references written out")
    if isinstance(value, int) and value.bit_length() > MAX_BITS:
        raise RecipeError(f"{where}: a number of more than {MAX_BITS} bits")
    if isinstance(value, Mapping | list | tuple):
        for key, part in value.items() if isinstance(value, Mapping) else enumerate(value):
            size = _check_size(part, source, (*path, key), size)
    return size


@contextlib.contextmanager
def _environment_guarded() -> Iterator[None]:
    """Inside, `${oc.env:NAME}` reads what `KD_ALLOW_ENV` names, and nothing else."""
    from omegaconf import OmegaConf
    from omegaconf.resolvers import oc

    allowed = {name.strip() for name in os.environ.get(ALLOW_ENV, "").split(",")}

    def read(name: str, *default: Any) -> Any:
        if _SECRET.search(name):
            raise RecipeError(f"{name} looks like a secret, and a recipe is kept in the run folder: leave it out; "
                              "components that need one take the name of its variable")  # fmt: skip
        if name not in allowed:
            raise RecipeError(f"the recipe reads the environment variable {name}; allow it by {ALLOW_ENV}={name}")
        return oc.env(name, *default)

    OmegaConf.register_resolver("oc.env", read, replace=True)
    try:
        yield
    finally:
        OmegaConf.register_resolver("oc.env", oc.env, replace=True)
