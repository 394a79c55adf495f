"""The floors of the core: no import runs upward, no file grows long, nothing heavy is imported by the way."""

from __future__ import annotations

import ast
import importlib.metadata
import io
import json
import subprocess
import sys
import tokenize
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import kdcore

ROOT = Path(__file__).parents[1]
CORE = ROOT / "kdcore" / "src" / "kdcore"
FLOORS = [
    ("errors",),
    ("signals",),
    ("folder",),
    ("processes",),
    ("components",),
    ("hookspecs",),
    ("plugins",),
    ("options",),
    ("reading", "training"),
    ("recipe",),
    ("outputs",),
    ("models",),
    ("text",),
    ("loading", "codecs"),
    ("data",),
    ("adopt", "generation"),
    ("losses", "metrics", "cache"),
    ("stages",),
    ("guards", "evaluation"),
    ("encoding",),
    ("search", "generate", "caching"),
    ("sharding",),
    ("checkpoint",),
    ("engine",),
    ("card",),
    ("runner",),
    ("api",),
    ("leaderboard", "probes", "diagnose"),
    ("testing",),
]
"""From the ground up. A module imports only what stands on a lower floor."""
ON_TOP = (
    "leaderboard",
    "generate",
    "generation",
    "search",
    "probes",
    "diagnose",
    "cache",
    "caching",
    "codecs",
    "encoding",
)
"""What a run does not need: only some methods, or commands, import it."""
FLOOR_OF = {name: number for number, names in enumerate(FLOORS) for name in names}


def sources(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.py"))


def imports(path: Path) -> Iterator[str]:
    """Every name a file imports, in functions too: `package.module`, or `package.module.name`. Not what is imported
    for types alone."""
    nodes: list[ast.AST] = [ast.parse(path.read_text())]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            nodes += node.orelse
            continue
        nodes += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide where they lead"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def module_of(name: str) -> str | None:
    """The module of the core behind an imported name, lazy names of the package included; `None` for its version."""
    first = name.split(".")[1] if "." in name else ""
    return first if first in FLOOR_OF else kdcore._MODULE_OF.get(first)


def code_lines(path: Path) -> int:
    """Lines that hold code: neither blank nor comment nor docstring."""
    strings = [n.value for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Expr)]
    docs = {line for s in strings if isinstance(s, ast.Constant) for line in range(s.lineno, (s.end_lineno or 0) + 1)}
    skipped = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    tokens = tokenize.generate_tokens(io.StringIO(path.read_text()).readline)
    lines = {n for t in tokens if t.type not in skipped for n in range(t.start[0], t.end[0] + 1)}
    return len(lines - docs)


def test_every_module_of_the_core_has_a_floor():
    modules = {path.relative_to(CORE).parts[0].removesuffix(".py") for path in sources(CORE)}
    assert modules - {"__init__"} == set(FLOOR_OF)


@pytest.mark.parametrize("name", FLOOR_OF)
def test_no_import_runs_upward(name):
    files = [CORE / f"{name}.py"] if (CORE / f"{name}.py").exists() else sources(CORE / name)
    upward = [
        f"{path.name}: {imported}"
        for path in files
        for imported in imports(path)
        if imported.partition(".")[0] == "kdcore"
        if (module := module_of(imported)) not in (None, name)
        if FLOOR_OF[module] >= FLOOR_OF[name]
    ]
    assert upward == []


def test_an_import_for_types_alone_is_passed_over_and_one_in_a_function_is_not(tmp_path):
    path = tmp_path / "module.py"
    path.write_text("if TYPE_CHECKING:\n    from kdcore import api\n\n\ndef f():\n    from kdcore import run\n")
    assert list(imports(path)) == ["kdcore.run"]
    assert module_of("kdcore.run") == module_of("kdcore.api") == module_of("kdcore.api.plan") == "api"
    assert module_of("kdcore.__version__") is None


def test_the_core_imports_no_plugin_and_the_command_line_is_imported_by_none():
    outside = [f"{p.name}: {i}" for p in sources(CORE) for i in imports(p) if i.startswith("kd_")]
    plugins = (p for folder in ROOT.glob("plugins/*/src") for p in sources(folder))
    outside += [f"{p.name}: {i}" for p in plugins for i in imports(p) if i.partition(".")[0] == "kd_cli"]
    assert outside == []


@pytest.mark.parametrize("folder", sorted(ROOT.glob("plugins/*/src")), ids=lambda folder: folder.parent.name)
def test_a_plugin_imports_only_plugins_it_depends_on_and_nothing_private_of_them(folder):
    project = tomllib.loads((folder.parent / "pyproject.toml").read_text())["project"]
    own = project["name"].replace("-", "_")
    wanted = {d.split(">")[0].split("[")[0].strip().replace("-", "_") for d in project["dependencies"]}
    for path in sources(folder):
        for imported in imports(path):
            top, *rest = imported.split(".")
            if top.startswith("kd_") and top != own:
                assert top in wanted, f"{path.name} imports {top}, which {project['name']} does not depend on"
                assert not any(part.startswith("_") for part in rest), f"{path.name} imports the private {imported}"


def test_no_file_of_the_core_is_long_and_the_core_is_small():
    lines = {str(path.relative_to(CORE)): len(path.read_text().splitlines()) for path in sources(CORE)}
    on_top = {*(CORE / f"{name}.py" for name in ON_TOP), *sources(CORE / "testing")}
    code = sum(code_lines(path) for path in sources(CORE) if path not in on_top)
    print(f"kdcore: {len(lines)} files, {sum(lines.values())} lines, of which {code} hold code")
    assert {name: count for name, count in lines.items() if count > 400} == {}
    assert code <= 3700, "the core is to stay about 3,600 lines of code"


def test_nothing_light_imports_torch():
    hooks = sorted({entry.module for entry in importlib.metadata.entry_points(group="kd")})
    code = f"""
import importlib, json, sys
found = {{}}
for name in ("kdcore", *{hooks!r}, "kd_cli.main"):
    importlib.import_module(name)
    found[name] = "torch" in sys.modules
from typer.testing import CliRunner
from kd_cli.main import app
for command in (["list"], ["list", "--json"], ["show", "kd"], ["--help"]):
    assert CliRunner().invoke(app, command).exit_code == 0, command
    found[" ".join(command)] = "torch" in sys.modules
print(json.dumps(found))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert "kd_classic.plugin" in found
    assert next((name for name, torch in found.items() if torch), None) is None
