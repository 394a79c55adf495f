"""What the documentation says is true: its commands, recipes, snippets, signatures and generated tables."""

import importlib.util
import inspect
import os
import re
import shlex
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from types import ModuleType

import pytest
import typer
import yaml

from kd_cli.main import app, make_manager
from kdcore import PluginManager, hookspecs
from kdcore.api import find_recipe
from kdcore.recipe import LossSpec, ModelSpec, Recipe, load, resolve
from kdcore.runner import check_roles

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted([*DOCS.glob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"])
FENCE = re.compile(r"^```(?P<language>[a-z]+)\n(?P<text>.*?)^```$", re.DOTALL | re.MULTILINE)
FILE = re.compile(r"# file: (\S+)\n")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a language, those that are files of a tutorial excepted."""
    found = [m["text"] for m in FENCE.finditer(page.read_text()) if m["language"] == language]
    return [text for text in found if not FILE.match(text)]


def files(page: Path) -> dict[str, str]:
    """The fenced blocks that name a file, by that name."""
    texts = [m["text"] for m in FENCE.finditer(page.read_text())]
    return {match[1]: text[match.end() :] for text in texts if (match := FILE.match(text))}


def load_script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"docs_{name}", DOCS / f"{name}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(command: str, cwd: Path, **environment: str) -> str:
    done = subprocess.run([sys.executable, *shlex.split(command)], cwd=cwd, capture_output=True, text=True, check=False,
                          env={**ENVIRONMENT, **environment})  # fmt: skip
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


# -- pages ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", [p for p in sorted(DOCS.glob("*.md")) if blocks(p, "python")], ids=lambda p: p.stem)
def test_python_snippets_run_in_order(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "snippet"}
    for text in blocks(page, "python"):
        exec(compile(text, str(page), "exec"), namespace)
    if page.stem == "get-started":
        (readme,) = blocks(ROOT / "README.md", "python")
        (tmp_path / "readme").mkdir()
        monkeypatch.chdir(tmp_path / "readme")
        exec(compile(readme, "README.md", "exec"), namespace)
        assert (namespace["result"].path / "student" / "model.safetensors").is_file()  # type: ignore[attr-defined]
    if page.stem == "hooks":
        assert len(namespace["manager"].plugins()) > 1  # type: ignore[attr-defined]


RECIPES = [(page, text) for page in PAGES for text in blocks(page, "yaml") if "distributed_type" not in text]


@pytest.mark.parametrize(("page", "text"), RECIPES, ids=[f"{p.stem}-{i}" for i, (p, _) in enumerate(RECIPES)])
def test_recipes_are_valid(page: Path, text: str) -> None:
    whole = {"method": "kd", "teacher": "demo-cnn", "student": "demo-cnn", "data": "digits"}
    given = yaml.safe_load(text)
    for one, many in (("teacher", "teachers"), ("student", "students")):
        if many in given:
            del whole[one]
    manager = PluginManager()
    resolved = resolve(load({**whole, **given}), manager, page.name)
    method = manager.get("method", resolved.recipe.method.use).load_target()(resolved.options["method"])
    check_roles(method, resolved.recipe, {})


def commands(page: Path) -> list[str]:
    """Calls of `kd`, however they are started."""
    lines = [line.partition(" #")[0].strip() for text in blocks(page, "sh") for line in text.splitlines()]
    starts = r"^(?:[A-Z_]+=\S+ )*(?:kd|torchrun .*-m kd_cli|accelerate launch .*-m kd_cli) "
    return [re.sub(starts, "", line) for line in lines if re.match(starts, line)]


COMMANDS = sorted({(page, command) for page in PAGES for command in commands(page)})


@pytest.mark.parametrize(("page", "command"), COMMANDS, ids=[f"{p.stem}: {c}" for p, c in COMMANDS])
def test_commands_are_valid(page: Path, command: str) -> None:
    words = shlex.split(command)
    group = typer.main.get_command(app)
    with group.make_context("kd", words) as context:
        name, found, rest = group.resolve_command(context, [*context._protected_args, *context.args])
        arguments = found.make_context(name, list(rest), parent=context).params
    if name not in ("run", "cp", "show") or "mimic" in words:
        return
    manager = make_manager()
    if name == "show":
        assert [c for _, c in manager.components() if c.name == arguments["name"]]
    elif arguments["recipe"] == "mine.yaml":
        whole = yaml.safe_load(blocks(DOCS / "recipes.md", "yaml")[0])
        resolve(load(whole, arguments.get("overrides") or ()), manager)
    else:
        source, _ = find_recipe(arguments["recipe"], manager)
        resolve(load(source, arguments.get("overrides") or ()), manager)


def test_links_between_pages_lead_somewhere() -> None:
    for page in PAGES:
        prose = FENCE.sub("", page.read_text())
        for target in re.findall(r"\]\(((?!https?:)[^)#]+)(?:#[^)]*)?\)", prose):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


# -- generated parts -----------------------------------------------------------------------------------------------


def test_generated_tables_are_current() -> None:
    catalogue = load_script("catalogue")
    stale = [page.name for page in catalogue.PAGES if catalogue.render(page) != page.read_text()]
    assert not stale, f"{', '.join(stale)}: run `python docs/catalogue.py`"


def test_hook_reference_gives_the_exact_signature_and_place_of_every_hook() -> None:
    text = (DOCS / "hooks.md").read_text()
    hooks = {name: f for name, f in inspect.getmembers(hookspecs, inspect.isfunction) if name.startswith("kd_")}
    assert hooks
    for name, function in hooks.items():
        signature = re.search(r"def kd_\w+\(.*?\) -> .+?(?=:\s)", inspect.getsource(function), re.DOTALL)
        assert signature
        assert f"{signature[0]}\n" in text
        assert f"`{name}`" in text.partition("## When each is called")[2]


def test_hand_written_tables_of_recipe_keys_are_complete() -> None:
    text = (DOCS / "recipes.md").read_text()
    for model in (Recipe, ModelSpec, LossSpec):
        for key in model.model_fields:
            assert f"| `{key}` |" in text, f"{model.__name__}.{key} is missing in recipes.md"


def test_every_demand_of_the_architecture_page_has_an_answer() -> None:
    table = (DOCS / "architecture.md").read_text().partition("| demand | interface |")[2]
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line.startswith("| ")
    ]
    assert len(rows) > 50
    assert not [demand for demand, interface in rows if not interface and not demand.startswith("**")]


def test_pictures_are_well_formed() -> None:
    for name in ("floors.svg", "quickstart.svg"):
        assert ElementTree.parse(DOCS / name).getroot().tag.endswith("svg")


def test_picture_shows_the_rows_of_a_run() -> None:
    facts = {
        "rows": [{"model": "a<b", "accuracy %": "50.0 ± 1.0", "parameters": 1234}],
        "method": "quickstart", "seed": 0, "hardware": {"threads": 2, "machine": "m", "device": "cpu"},
        "versions": {"kdcore": "1", "torch": "2"},
    }  # fmt: skip
    picture = load_script("picture")
    root = ElementTree.fromstring(picture.draw(facts))
    texts = {element.text for element in root.iter("{http://www.w3.org/2000/svg}text")}
    assert {"a<b", "accuracy %", "50.0 ± 1.0", "parameters", "1,234"} <= texts
    widths = [float(rect.get("width", 0)) for rect in root.iter("{http://www.w3.org/2000/svg}rect")]
    assert picture.BARS / 2 in widths


# -- programs ------------------------------------------------------------------------------------------------------


def test_example_without_a_framework_shows_the_gain(tmp_path: Path) -> None:
    script = ROOT / "examples" / "distill_in_60_lines.py"
    assert len(script.read_text().splitlines()) <= 60
    assert "kdcore" not in script.read_text()
    printed = run(str(script), tmp_path)
    _, alone, distilled = (float(value) for value in re.findall(r"([\d.]+)%", printed))
    assert distilled > alone + 2


@pytest.fixture(scope="module")
def tutorial(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """The tutorial's plugin, written file by file and installed beside the environment; its folder and variables."""
    where = tmp_path_factory.mktemp("tutorial")
    folder, site = where / "kd-mimic", where / "site"
    for name, text in files(DOCS / "write-a-plugin.md").items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    run(f"-m uv pip install --quiet --no-deps --no-build-isolation --target {shlex.quote(str(site))} .", folder)
    return folder, {"PYTHONPATH": str(site)}


def test_tutorial_names_every_file_it_lists(tutorial: tuple[Path, dict[str, str]]) -> None:
    tree = (DOCS / "write-a-plugin.md").read_text().partition("    kd-mimic/\n")[2].partition("```")[0]
    listed = set(re.findall(r"[\w/]+\.(?:py|toml|yaml)", tree))
    written = {str(p.relative_to(tutorial[0])) for p in tutorial[0].rglob("*") if p.is_file()}
    assert listed
    for name in listed:
        assert any(path.endswith(name) for path in written), name


def test_tutorial_plugin_is_listed_shown_and_runs(tutorial: tuple[Path, dict[str, str]]) -> None:
    folder, variables = tutorial
    assert "kd-mimic 0.1.0" in run("-m kd_cli list methods", folder, **variables)
    assert "weight of the mimic loss" in run("-m kd_cli show mimic", folder, **variables)
    printed = run("-m kd_cli run mimic train.steps=5 teacher.train.steps=5", folder, **variables)
    assert "val/accuracy" in printed
    assert (folder / "runs" / "mimic-quickstart" / "student" / "model.safetensors").is_file()


def test_tutorial_plugin_passes_its_tests(tutorial: tuple[Path, dict[str, str]]) -> None:
    folder, variables = tutorial
    printed = run("-m pytest -q -p no:cacheprovider -k 'not effect and not two_processes'", folder, **variables)
    assert "passed" in printed
    assert "skipped" not in printed


def test_tutorial_golden_vectors_agree(tutorial: tuple[Path, dict[str, str]]) -> None:
    folder, variables = tutorial
    run("tests/make_golden.py", folder, **variables)
    assert "1 agree" in run("-m kdcore.testing.golden golden --plugins ..", folder, **variables)
