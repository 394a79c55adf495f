"""The light description of everything a plugin offers. Importing this module imports no torch and no pydantic."""

from __future__ import annotations

import importlib
import importlib.resources
import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources.abc import Traversable
from typing import Any, Literal, get_args

from kdcore.errors import ComponentError

Kind = Literal["teacher", "student", "loss", "data", "method"]
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True)
class Paper:
    """Where a method comes from.

    Args:
        title, venue, year: as they stand in the paper's own citation.
        authors: their names, separated by commas; `et al.` at the end for those left out.
        arxiv: the arXiv number, if there is one.
        url: any further address, such as that of the official code.
    """

    title: str
    authors: str
    venue: str
    year: int
    arxiv: str = ""
    url: str = ""

    @property
    def citation(self) -> str:
        """The paper as one line of text."""
        where = f", arXiv:{self.arxiv}" if self.arxiv else ""
        return f"{self.authors}. {self.title}. {self.venue}, {self.year}{where}."

    @property
    def first_author(self) -> str:
        """The first author's family name."""
        return re.split(r",| and | et al", self.authors)[0].split()[-1]

    @property
    def bibtex(self) -> str:
        """The paper as a BibTeX entry."""
        word = re.findall(r"[a-z0-9]+", self.title.lower())[0]
        fields = {
            "title": self.title,
            "author": " and ".join(self.authors.replace(" et al.", ", others").split(", ")),
            "booktitle": self.venue,
            "year": str(self.year),
        }
        fields |= {"eprint": self.arxiv, "archivePrefix": "arXiv"} if self.arxiv else {}
        body = ",\n".join(f"  {key} = {{{value}}}" for key, value in fields.items())
        return f"@inproceedings{{{self.first_author.lower()}{self.year}{word},\n{body}\n}}"


@dataclass(frozen=True)
class Component:
    """One teacher, student, loss, data set or method that a plugin offers.

    Args:
        kind: one of `KINDS`.
        name: unique within the kind; lower case letters, digits, `.`, `_` and `-`.
        target: import string `package.module:attribute`, or the object itself. Called as `target(options, task)` for
            teachers and students, `target(options)` for losses, data and methods.
        options: import string or class of the `kdcore.options.Options` that describe it; its module must import
            neither torch nor anything heavy. `None` for a component without options.
        summary: one line for lists.
        tags: words to filter by, such as `image`, `segmentation`, `logits`.
        paper: the paper a method or loss implements.
        recipes: folder of the target's top-level package that holds a method's recipes.

    Raises:
        ComponentError: if the kind is unknown or the name malformed.
    """

    kind: Kind
    name: str
    target: str | Callable[..., Any]
    options: str | type[Any] | None = None
    summary: str = ""
    tags: tuple[str, ...] = ()
    paper: Paper | None = None
    recipes: str = "recipes"

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ComponentError(f"component {self.name!r}: unknown kind {self.kind!r}; kinds: {', '.join(KINDS)}")
        if not re.fullmatch(r"[a-z0-9][a-z0-9._-]*", self.name):
            raise ComponentError(f"component name {self.name!r}: use lower case letters, digits, '.', '_' and '-'")

    def load_target(self) -> Callable[..., Any]:
        """The factory behind the component.

        Raises:
            ComponentError: if its module cannot be imported or has no such attribute.
        """
        target: Callable[..., Any] = self._resolve(self.target)
        return target

    def load_options(self) -> type[Any] | None:
        """The options model, or `None`. Raises `ComponentError` like `load_target`."""
        return None if self.options is None else self._resolve(self.options)

    def recipe_files(self) -> dict[str, Traversable]:
        """Recipes shipped with a method: name without suffix -> file."""
        if self.kind != "method" or not isinstance(self.target, str):
            return {}
        folder = importlib.resources.files(self.target.partition(":")[0].partition(".")[0]) / self.recipes
        if not folder.is_dir():
            return {}
        return {f.name.removesuffix(".yaml"): f for f in sorted(folder.iterdir(), key=lambda f: f.name)
                if f.name.endswith(".yaml")}  # fmt: skip

    def _resolve(self, reference: Any) -> Any:
        if not isinstance(reference, str):
            return reference
        module, _, attribute = reference.partition(":")
        try:
            return getattr(importlib.import_module(module), attribute)
        except Exception as error:
            raise ComponentError(
                f"{self.kind} '{self.name}': cannot load {reference}: {type(error).__name__}: {error}"
            ) from error
