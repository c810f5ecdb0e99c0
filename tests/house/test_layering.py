"""Who may include or import whom, and that one name finds an operator in every file."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from eaft_ext import Gate
from eaft_ext._library import has_kernel

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
PACKAGE = ROOT / "eaft_ext"

CPP_FILES = sorted(
    str(path.relative_to(CSRC))
    for pattern in ("*.h", "*.cpp", "*.cuh", "*.cu")
    for path in CSRC.rglob(pattern)
)
PYTHON_FILES = sorted(str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py"))

TESTS = ROOT / "tests"
TEST_FILES = sorted(str(path.relative_to(TESTS)) for path in TESTS.rglob("*.py"))

MAX_LINES = 500

STANDARD = r"[a-z_]+"
CUDA = (
    rf"{STANDARD}|cuda[a-z0-9_]*\.h|(cub|cuda|cooperative_groups|thrust)/.+|cooperative_groups\.h"
)
TORCH = rf"{STANDARD}|torch/(csrc/stable|headeronly)/.+"

# For the files of the first column (the first that matches): the headers of others, and our own,
# that they may include. Own headers are named from csrc/.
INCLUDES = [
    (r"core/.*", STANDARD, r"core/.*"),
    (r"cpu/(ops_cpu\.cpp|tensors\.h)", STANDARD, r"(core|cpu)/.*|[^/]+\.h"),
    (r"cpu/.*", STANDARD, r"core/.*|cpu/(?!tensors\.h).*"),
    (r"cuda/(ops_cuda\.cpp|tensors\.h)", STANDARD, r"core/.*|cuda/.*\.h|[^/]+\.h"),
    (r"cuda/.*\.(cu|cuh)", CUDA, r"core/.*|cuda/(?!tensors\.h).*"),
    (r"cuda/.*\.h", CUDA, r"core/.*|cuda/(?!tensors\.h).*\.h"),
    (r"ops\.cpp", r"torch/csrc/stable/library\.h", r"(?!)"),
    (r"module\.cpp", rf"{STANDARD}|pybind11/.+", r"core/.*"),
    (r"(stable_torch|sentence)\.h", TORCH, r"sentence\.h"),
    (r"[^/]+\.h", STANDARD, r"core/.*|[^/]+\.h"),
]

# What a module, or all of a package, may import of ours. "" is the package's own face, __init__.py.
BOTTOM = {
    "reference",
    "gates",
    "_library",
    "_registration",
    "_scalar_loss",
    "_checks",
    "_options",
    "_dispatch",
    "_conflicts",
    "_landscape",
}
IMPORTS = {
    "reference": set[str](),
    "gates": set[str](),
    "_library": {"_C"},
    "_registration": {"_library", "reference"},
    "_scalar_loss": {"_library", "_options", "_registration"},
    "_checks": {"_dispatch"},
    "_options": {"_checks", "_library", "gates", "reference"},
    "_dispatch": {"_library"},
    "_conflicts": set[str](),
    "_landscape": {"_conflicts"},
    "parallel": BOTTOM,
    "functional": BOTTOM | {"parallel"},
    "linear": BOTTOM | {"parallel"},
    "nn": {"_options", "reference", "functional"},
    "": BOTTOM | {"functional", "linear", "parallel", "nn"},
    "integrations": {"", "_checks", "_conflicts", "_landscape", "_options", "reference"},
    "plugins": {"", "integrations"},
    "cli": {"", "reference", "gates", "_conflicts", "_landscape", "_library", "integrations"},
}


@pytest.mark.parametrize("file", CPP_FILES)
def test_includes(file: str) -> None:
    rule = next((rule for rule in INCLUDES if re.fullmatch(rule[0], file)), None)
    assert rule, f"csrc/{file} has no place in the layering"
    text = (CSRC / file).read_text()
    for header in re.findall(r"^\s*#\s*include\s*<(.+?)>", text, re.MULTILINE):
        assert re.fullmatch(rule[1], header), f"csrc/{file} may not include <{header}>"
    for header in re.findall(r'^\s*#\s*include\s*"(.+?)"', text, re.MULTILINE):
        path = ((CSRC / file).parent / header).resolve()
        if not path.is_file():  # the build has csrc/ among its include folders
            path = (CSRC / header).resolve()
        assert path.is_file(), f"csrc/{file} includes {header}, which is not there"
        own = str(path.relative_to(CSRC))
        assert re.fullmatch(rule[2], own), f"csrc/{file} may not include {own}"


@pytest.mark.parametrize(
    "file", [file for file in CPP_FILES if re.match(r"core/|cuda/.*\.cu", file)]
)
def test_no_torch_in_device_code(file: str) -> None:
    """Not by name either: these files compile without it."""
    text = re.sub(r"//.*", "", (CSRC / file).read_text())
    assert not re.search(r"\b(torch|at|c10)::|TORCH_|AT_DISPATCH", text)


def _imported(file: str, source: str) -> Iterator[str]:
    """Our own modules that the source of a file imports, named from the package."""
    modules = {
        ".".join(Path(path).with_suffix("").parts).removesuffix("__init__").rstrip(".")
        for path in PYTHON_FILES
    } | {"_C"}
    folder = list(Path(file).parent.parts)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "eaft_ext":
                    yield alias.name.removeprefix("eaft_ext").lstrip(".")
        elif isinstance(node, ast.ImportFrom):
            base = (node.module or "").split(".") if node.module else []
            if node.level:
                base = folder[: len(folder) - node.level + 1] + base
            elif base[:1] == ["eaft_ext"]:
                base = base[1:]
            else:
                continue
            for alias in node.names:
                name = ".".join([*base, alias.name])
                yield name if name in modules else ".".join(base)


@pytest.mark.parametrize("file", PYTHON_FILES)
def test_imports(file: str) -> None:
    """cli sees integrations, both see the face and what is below it; nothing below sees them."""
    own = "" if file == "__init__.py" else Path(file).with_suffix("").parts[0]
    assert own in IMPORTS, f"eaft_ext/{file} has no place in the layering"
    for module in _imported(file, (PACKAGE / file).read_text()):
        other = module.split(".")[0]
        assert other == own or other in IMPORTS[own], f"eaft_ext/{file} may not import {module!r}"


@pytest.mark.parametrize(
    ("file", "source", "imported"),
    [
        ("functional.py", "from eaft_ext import reference, gated_ce", ["reference", ""]),
        ("functional.py", "def f():\n    from eaft_ext._library import ops", ["_library"]),
        ("functional.py", "import eaft_ext.cli.info, eaft_ext, torch", ["cli.info", ""]),
        ("functional.py", "from . import nn, topk\nfrom .gates import Gate", ["nn", "", "gates"]),
        ("cli/demo/training.py", "from .losses import LossOf", ["cli.demo.losses"]),
        ("cli/demo/corpus.py", "from ...nn import x\nfrom .. import info", ["nn", "cli.info"]),
        ("cli/__init__.py", "from . import main\nimport eaft_extra", ["cli.main"]),
    ],
)
def test_the_reading_of_imports(file: str, source: str, imported: list[str]) -> None:
    """That the rules above judge what is there."""
    assert list(_imported(file, source)) == imported


# The files and folders of the rooms of tests, each with its room.
IN_ROOMS = sorted(
    {Path(file).parts[:2] for file in TEST_FILES if "/" in file and "conftest.py" not in file}
)
ROOM_OF = {Path(name).stem: room for room, name in IN_ROOMS}


@pytest.mark.parametrize("file", TEST_FILES)
def test_rooms_of_tests(file: str) -> None:
    """A room of tests sees itself and tests/support, which sees no room."""
    nodes = list(ast.walk(ast.parse((TESTS / file).read_text())))
    named = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    named |= {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
    rooms = {ROOM_OF[first] for name in named if (first := name.split(".")[0]) in ROOM_OF}
    assert rooms <= {Path(file).parts[0], "support"}, f"tests/{file} imports from {rooms}"


def test_every_room_of_tests_is_found(pytestconfig: pytest.Config) -> None:
    """All but conftest.py is in one, and imported by its own name, which no two may share."""
    assert {path.name for path in pytestconfig.getini("pythonpath")} == set(ROOM_OF.values())
    assert len(ROOM_OF) == len(IN_ROOMS)
    assert [file for file in TEST_FILES if "/" not in file] == ["conftest.py"]


@pytest.mark.parametrize(
    "file",
    [f"csrc/{file}" for file in CPP_FILES]
    + [f"eaft_ext/{file}" for file in PYTHON_FILES]
    + [f"tests/{file}" for file in TEST_FILES],
)
def test_length(file: str) -> None:
    assert len((ROOT / file).read_text().splitlines()) <= MAX_LINES


def _schemas() -> list[str]:
    return re.findall(r'm\.def\(\s*"(\w+)\(', (CSRC / "ops.cpp").read_text())


def _implementations(device: str) -> dict[str, str]:
    """Schema names and the functions registered for them."""
    path = CSRC / device / f"ops_{device}.cpp"
    if not path.exists():
        return {}
    return dict(re.findall(r'm\.impl\("(\w+)",\s*TORCH_BOX\(&(\w+)\)\)', path.read_text()))


MOST_PARAMETERS = 8
"""Of a function beneath the public ones and the operators: options travel as one thing."""


def _parameters_in_python(path: Path) -> Iterator[tuple[str, int]]:
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.FunctionDef) or node.name == "_":  # an operator's
            continue
        decorators = {ast.unparse(decorator) for decorator in node.decorator_list}
        if decorators & {"overload", "with_keywords"}:  # public
            continue
        given = node.args
        names = [a.arg for a in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
        yield node.name, len([name for name in names if name not in ("self", "cls", "ctx")])


def _parameters_in_cpp(path: Path) -> Iterator[tuple[str, int]]:
    text = re.sub(r"//[^\n]*", "", path.read_text())
    for name, given in re.findall(r"\b(\w+)\(((?:[^()]|\([^()]*\))*)\)\s*(?:const\s*)?\{", text):
        is_operator = re.fullmatch(r"\w+_(cpu|cuda)_?", name)
        if not is_operator and name not in ("if", "for", "while", "switch"):
            plain = re.sub(r"<[^<>]*>|\([^()]*\)|\{[^{}]*\}", "", given)
            yield name, plain.count(",") + 1


@pytest.mark.parametrize(
    "path",
    [
        # But for where the keywords have their home, with the defaults of each.
        *(
            f"eaft_ext/{file}"
            for file in PYTHON_FILES
            if not file.startswith(("cli/", "reference", "_options"))
        ),
        *(f"csrc/{file}" for file in CPP_FILES),
    ],
)
def test_number_of_parameters(path: str) -> None:
    found = _parameters_in_python if path.endswith(".py") else _parameters_in_cpp
    for name, count in found(ROOT / path):
        assert count <= MOST_PARAMETERS, f"{name} of {path} takes {count}"


def test_every_operator_is_complete() -> None:
    schemas = _schemas()
    assert len(schemas) == len(set(schemas)) >= 6
    registration = (PACKAGE / "_registration.py").read_text()
    fakes = re.findall(r'register_fake\(\s*"eaft_ext::(\w+)"', registration)
    assert sorted(fakes) == sorted(schemas)
    assert sorted(_implementations("cpu")) == sorted(schemas)
    for name in schemas:
        assert has_kernel(name, "cpu"), f"{name} is not in the compiled part; build it again"


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_function_is_named_after_its_schema(device: str) -> None:
    """gated_ce_forward is gated_ce_forward_cpu; gated_ce_backward_ is gated_ce_backward_cpu_."""
    for name, function in _implementations(device).items():
        assert name in _schemas()
        in_place = "_" if name.endswith("_") else ""
        assert function == f"{name.removesuffix('_')}_{device}{in_place}"


def test_gates_have_the_same_names_on_both_sides() -> None:
    known = re.findall(r'name == "(\w+)"', (CSRC / "gate_from_name.h").read_text())
    built_in = [gate for gate in Gate.__subclasses__() if gate.__module__ == "eaft_ext.gates"]
    assert sorted(gate.name for gate in built_in) == sorted(known)
    kinds = re.search(r"enum class GateKind[^{]*\{([^}]*)\}", (CSRC / "core/gates.h").read_text())
    assert kinds is not None
    assert sorted(re.findall(r"\bk(\w+)", kinds[1].replace(" ", "\n"))) == sorted(
        name.capitalize() for name in known
    )
