"""Thousands of broken recipes, made of those that plugins ship: each gives a plan, or an error that names the key."""

from __future__ import annotations

import contextlib
import copy
import reprlib
import signal
import socket
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, Phase, given, reject, seed, settings
from hypothesis import strategies as st

import kdcore
from kdcore.errors import UserError

KeyPath = tuple[Any, ...]

MANAGER = kdcore.PluginManager()
RECIPES = {f"{component.name}/{name}": Path(str(file)) for _, component in MANAGER.components("method")
           for name, file in component.recipe_files().items()}  # fmt: skip

FILES, MAPPINGS, OVERRIDES, TEXTS = 9, 7, 6, 3
"""Mutants of each recipe: in a file, as a Python mapping, by overrides, in a file whose text is damaged."""
AT_LEAST = 2_000

SECONDS = 1.0
"""Of the processor that a mutant may take."""
PATIENCE = 10.0
"""Seconds on the clock after which it hangs."""
LONGEST = 10_000
"""Characters of a message that somebody still reads."""

WORDS = ["", " ", "\t", "null", "~", "on", "-1", "..", "../..", "/", "a/b", "a.b", "a:b", "%s", "{}", "{{ x }}",
         "${", "${nope}", "${method}", "${oc.env:HOME}", "${oc.env:API_KEY}", "${.}", "${oc.decode:'['}", "*", "&",
         "!!python/object/apply:os.system ['true']", "\x00", "a\x00b", "\ud800", "\udcff", "\u202eesrever", "שלום",
         "e\u0301\u0301\u0301", "🦊", "\ufeff", "\u2028", "\uffff", "\x1b[31mred", "hf-hub:", "local-dir:",
         "given:given", "file:///etc/passwd", "https://127.0.0.1:1/x"]  # fmt: skip
NUMBERS = [0, 1, -1, 2**31, 2**63, 2**64, -(2**63), 10**400, 0.0, -0.0, 0.5, 1e308, 5e-324, float("nan"), float("inf"),
           float("-inf"), True, False, "1e999"]  # fmt: skip
NESTS = [None, [], {}, [None], [[]], {"use": None}, {"use": {}}, [{"use": "kd"}], {"": ""}, {"a": {"b": {"c": 1}}}]
KEYS = [*WORDS, 0, -1, 1.5, True, False, "use", "name", "train", "teacher", "teachers", "checkpoint"]
SNIPPETS = [":", "- ", "{", "}", "[", "]", "'", '"', "#", "&a ", "*a", "!!binary x", "!!python/name:os.system", "---\n",
            "...\n", "%YAML 9.9\n", "\t", "\x00", "\ufeff", "\ud800", "? ", "| ", "> ", "<<: *a\n", "@", "`", "\r",
            "\u2028", "a: &x [*x]\n", "9" * 5000]  # fmt: skip


class Mutant:
    """A recipe or overrides that were changed.

    Args:
        value: what became of it.
        changes: what was done, for people.
        path: where, if it was done at one place.
    """

    def __init__(self, value: Any, changes: list[str], path: KeyPath = ()) -> None:
        self.value, self.changes, self.path = value, changes, path

    def __repr__(self) -> str:
        return "; ".join(self.changes)


def paths(value: Any, at: KeyPath = ()) -> list[KeyPath]:
    """All key paths of nested data, in their order."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path for key, part in items for path in ((*at, key), *paths(part, (*at, key)))]


def brief(value: Any) -> str:
    with contextlib.suppress(ValueError):
        return reprlib.repr(value)
    return "a number of more digits than Python writes"


def nested(value: Any, levels: int) -> Any:
    for _ in range(levels):
        value = [value]
    return value


def exploding(levels: int) -> Any:
    """A list that is small, and huge once its references are written out."""
    value: Any = ["x"]
    for _ in range(levels):
        value = [value] * 4
    return value


def retyped(old: Any) -> st.SearchStrategy[Any]:
    """Anything else than what stands there."""
    word = old if isinstance(old, str) else "x"
    simple = st.one_of(st.sampled_from(WORDS), st.sampled_from(NUMBERS), st.sampled_from(NESTS).map(copy.deepcopy),
                       st.text(max_size=20), st.integers(), st.floats())  # fmt: skip
    wrapped = st.sampled_from([[old], {"use": old}, {"name": old}, [old, old], nested(old, 5), nested(old, 60)])
    huge = st.sampled_from([word * 300, word * 5_000, "x" * 200_000, "é" * 600_000, 10**5_000, list(range(30_000)),
                            dict.fromkeys(map(str, range(3_000)), 1), exploding(3), exploding(30)])  # fmt: skip
    return st.one_of(simple, simple, wrapped, huge)


def read(recipe: str) -> dict[str, Any]:
    """A recipe as plain data."""
    data = yaml.safe_load(RECIPES[recipe].read_text())
    if True in data.get("eval", {}):
        rename(data["eval"], True, "on")  # YAML 1.1 reads it so
    return dict(data)


@st.composite
def misspelt(draw: st.DrawFn, word: Any) -> str:
    """A word with one mistake."""
    word = str(word)
    at, other = draw(st.integers(0, max(len(word) - 1, 0))), draw(st.sampled_from("aeiou_-. é\u202e"))
    return draw(st.sampled_from([word[:at] + word[at + 1 :], word[:at] + other + word[at + 1 :], word.upper(),
                                 word[:at] + other + word[at:], word[::-1], f" {word} ", f"kd:{word}"]))  # fmt: skip


def rename(mapping: dict[Any, Any], old: Any, new: Any) -> None:
    """Give an entry another key."""
    entries = [(new if key == old else key, value) for key, value in mapping.items()]
    mapping.clear()
    mapping.update(entries)


@st.composite
def change(draw: st.DrawFn, tree: dict[str, Any], path: KeyPath) -> tuple[str, KeyPath]:
    """Change a recipe at a key path; how, and where the change is seen."""
    holder: Any = tree
    last = path[-1]
    try:
        for part in path[:-1]:
            holder = holder[part]
        old = holder[last]
    except (KeyError, IndexError, TypeError):
        return "", path  # another change took it away
    ways = ["retype", "retype", "delete", "cycle", "add"]
    ways += ["rename", "misspell key"] if isinstance(holder, dict) else []
    ways += ["misspell"] if isinstance(old, str) else []
    way = draw(st.sampled_from(ways))
    if way == "retype":
        holder[last] = draw(retyped(old))
    elif way == "delete":
        del holder[last]
    elif way == "cycle":
        holder[last] = draw(st.sampled_from([tree, holder, [holder]]))
    elif way == "misspell":
        holder[last] = draw(misspelt(old))
    elif way == "add" and isinstance(holder, list):
        holder.insert(last, draw(retyped("x")))
    else:
        last = draw(misspelt(last) if way == "misspell key" else st.sampled_from(KEYS))
        if way == "add":
            holder[last] = draw(retyped("x"))
        else:
            lost = last in holder  # two of a name: in a mapping the first is gone
            rename(holder, path[-1], last)
            last = path[-1] if lost else last
    now = holder.get(last) if isinstance(holder, dict) else holder
    return f"{way} {path}: {last!r} is {brief(now)}", (*path[:-1], last)


@st.composite
def mutated(draw: st.DrawFn, recipe: dict[str, Any]) -> Mutant:
    """A recipe with one change, or some more."""
    tree, all_paths = copy.deepcopy(recipe), paths(recipe)
    number = draw(st.sampled_from([1, 1, 1, 2, 4]))
    places = draw(st.lists(st.sampled_from(range(len(all_paths))), min_size=number, max_size=number, unique=True))
    done = [draw(change(tree, all_paths[i])) for i in sorted(places, reverse=True)]  # so that earlier ones stay valid
    return Mutant(tree, [what for what, _ in done], done[0][1] if number == 1 else ())


@st.composite
def overrides(draw: st.DrawFn, recipe: dict[str, Any]) -> Mutant:
    """One to three `key=value` of which something is wrong."""
    lines = []
    for _ in range(draw(st.sampled_from([1, 1, 3]))):
        path = draw(st.sampled_from(paths(recipe)))
        key = ".".join(map(str, path))
        key = draw(st.one_of(st.just(key), st.just(key), misspelt(key), st.sampled_from(KEYS).map(str)))
        value, text = draw(retyped("x")), "9" * 5_000
        with contextlib.suppress(ValueError):  # a number of more digits than Python writes
            text = value if isinstance(value, str) else yaml.safe_dump(value, default_flow_style=True, width=10**9)
        lines.append(draw(st.sampled_from([f"{key}={text}", f"{key}={text}", key, f"{key}=[{text}", f"{key}=&a [*a]"])))
    return Mutant(lines, list(map(brief, lines)))


@st.composite
def damaged(draw: st.DrawFn, text: str) -> Mutant:
    """A text that was cut, pasted and typed into."""
    changes = []
    for _ in range(draw(st.sampled_from([1, 2, 4]))):
        at = draw(st.integers(0, max(len(text) - 1, 0)))
        lines = text.splitlines(keepends=True)
        line = draw(st.sampled_from(lines or [""]))
        way, text = draw(st.sampled_from([
            ("cut", text[:at]), ("hole", text[:at] + text[at + 9 :]), ("twice", text + line), ("moved", line + text),
            *((f"{snippet[:20]!r} at {at}", text[:at] + snippet + text[at:]) for snippet in SNIPPETS),
        ]))  # fmt: skip
        changes.append(way)
    return Mutant(text, changes)


@contextlib.contextmanager
def in_time() -> Iterator[None]:
    """Inside, what takes too long fails."""

    def hangs(number: int, frame: Any) -> None:
        raise AssertionError(f"no plan and no error after {PATIENCE:g} s")

    old = signal.signal(signal.SIGALRM, hangs)
    signal.setitimer(signal.ITIMER_REAL, PATIENCE)
    started = time.thread_time()
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)
    took = time.thread_time() - started
    if took >= SECONDS:
        raise SlowError(f"{took:.1f} s")


class SlowError(AssertionError):
    """A mutant took too long."""


def refused(source: Any, lines: list[str]) -> str | None:
    """Why there is no plan, if there is none. What seems slow is tried again: other programs slow it down, too."""
    try:
        return refused_in_time(source, lines)
    except SlowError:
        return refused_in_time(source, lines)


def refused_in_time(source: Any, lines: list[str]) -> str | None:
    """The same, once."""
    with in_time():
        try:
            assert kdcore.plan(source, lines, plugins=MANAGER).resolved.options
            return None
        except UserError as error:
            said = str(error)
    assert 0 < len(said) <= LONGEST, f"{len(said)} characters: {said[:200]}"
    return said


def names(said: str, path: KeyPath) -> bool:
    """Whether a message names a key path or the section that it is in, all keys on the way, or what is in the file."""
    written_out = (f"{path[0]}s", *path) if path[0] in ("teacher", "student") else path
    keys = [".".join(map(str, part))[:200] for full in (path, written_out) for part in (full[:4], full[:-1]) if part]
    all_keys = all(key in said for key in path if isinstance(key, str))
    return all_keys or any(key in said for key in keys) or ", line " in said or "larger than a recipe" in said


@pytest.fixture(scope="module", autouse=True)
def warm() -> None:
    """Everything is imported before time counts."""
    for file in RECIPES.values():
        kdcore.plan(file, plugins=MANAGER)


@pytest.fixture(autouse=True)
def nothing_is_fetched_or_built(warm: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*arguments: Any, **more: Any) -> None:
        raise OSError("there is no network here")

    made = torch.nn.Module.__init__

    def builds(self: torch.nn.Module, *arguments: Any, **more: Any) -> None:
        assert torch.get_default_device().type == "meta", f"a plan built a {type(self).__name__}"
        made(self, *arguments, **more)

    monkeypatch.setattr(socket.socket, "connect", offline)
    monkeypatch.setattr(socket, "getaddrinfo", offline)
    monkeypatch.setattr(torch.nn.Module, "__init__", builds)


def check(
    recipe: str, way: str, mutants: st.SearchStrategy[Mutant], number: int, one: Callable[[Mutant], None]
) -> None:
    """Try so many mutants, the same in every run."""
    given_one = given(mutants)(one)
    settled = settings(max_examples=number, deadline=None, database=None, phases=[Phase.generate],
                       suppress_health_check=list(HealthCheck))  # fmt: skip
    seed(zlib.crc32(f"{recipe} {way}".encode()))(settled(given_one))()


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_changed_file_is_a_plan_or_an_error_that_names_the_key(recipe: str, tmp_path: Path):
    path = tmp_path / "mutant.yaml"

    def one(mutant: Mutant) -> None:
        try:
            text = yaml.safe_dump(mutant.value, sort_keys=False)
        except ValueError:  # a number of more digits than Python writes
            reject()
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        said = refused(path, [])
        assert said is None or not mutant.path or names(said, mutant.path), said

    check(recipe, "file", mutated(read(recipe)), FILES, one)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_changed_mapping_is_a_plan_or_an_error_that_names_the_key(recipe: str):
    def one(mutant: Mutant) -> None:
        said = refused(mutant.value, [])
        assert said is None or not mutant.path or names(said, mutant.path), said

    check(recipe, "mapping", mutated(read(recipe)), MAPPINGS, one)


@pytest.mark.parametrize("recipe", RECIPES)
def test_wrong_overrides_are_a_plan_or_an_error(recipe: str):
    def one(mutant: Mutant) -> None:
        refused(RECIPES[recipe], mutant.value)

    check(recipe, "overrides", overrides(read(recipe)), OVERRIDES, one)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_damaged_text_is_a_plan_or_an_error_that_names_the_file(recipe: str, tmp_path: Path):
    path = tmp_path / "mutant.yaml"

    def one(mutant: Mutant) -> None:
        path.write_bytes(mutant.value.encode("utf-8", "surrogatepass"))
        said = refused(path, [])
        assert said is None or "mutant.yaml" in said or "the recipe names" in said, said

    check(recipe, "text", damaged(RECIPES[recipe].read_text()), TEXTS, one)


def test_there_are_enough_mutants():
    assert len(RECIPES) * (FILES + MAPPINGS + OVERRIDES + TEXTS) >= AT_LEAST
