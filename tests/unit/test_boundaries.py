"""The house's import rules, on the source (AST) and by importing the data plane where Ray and vLLM are blocked."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# package -> top-level modules it must never import
FORBIDDEN = {
    "cluster": {"vllm", "model", "deployments", "ops"},
    "model": {"ray", "deployments", "ops"},
    "deployments": {"ops"},
    "ops": {"model"},
}
# modules of cluster/ that ask Ray for nodes and placement; everything else in cluster/ is data plane or pure decision
CLUSTER_MODULES_WITH_RAY: set[str] = set()


def imported_modules(path: Path) -> set[str]:
    """Top-level names of every import in the file, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(), filename=str(path))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("package", sorted(FORBIDDEN))
def test_imports_point_one_way(package: str) -> None:
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    broken = {
        str(path.relative_to(ROOT)): sorted(hits)
        for path in files
        if (hits := imported_modules(path) & forbidden_in(package, path))
    }
    assert not broken


def forbidden_in(package: str, path: Path) -> set[str]:
    if package == "cluster" and path.stem not in CLUSTER_MODULES_WITH_RAY:
        return FORBIDDEN[package] | {"ray"}
    return FORBIDDEN[package]


def test_data_plane_imports_without_ray_and_vllm() -> None:
    modules = [f"cluster.{path.stem}" for path in sorted((ROOT / "cluster").glob("*.py")) if path.stem != "__init__"]
    script = f"""
import importlib, sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in ('ray', 'vllm'):
            raise ImportError('blocked: ' + name)
sys.meta_path.insert(0, Block())
for name in {modules!r}:
    importlib.import_module(name)
print(len(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_every_folder_says_what_lives_there() -> None:
    for package in FORBIDDEN:
        assert ast.get_docstring(ast.parse((ROOT / package / "__init__.py").read_text())), package
