"""Imports go downward only and in no circle, and a command's --help does not import PyTorch.

Imports inside functions count; those under `if TYPE_CHECKING` do not.
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# package -> the packages that it may import (CONTRIBUTING.md's layout)
ALLOWED = {
    "minillama": set(),
    "kernels": set(),
    "corpora": {"minillama"},
    "train": {"corpora", "kernels", "minillama"},
    "decode": {"corpora", "kernels", "minillama"},
    "eval": {"decode", "train", "corpora", "kernels", "minillama"},
    "benchmarks": {"eval", "decode", "train", "corpora", "kernels", "minillama"},
}
# Within decode, the commands import anything; the other folders only those that are named here.
ALLOWED_IN_DECODE = {
    "model": set(),
    "engine": {"model"},
    "pipeline": {"engine", "model"},
    "explain": {"engine", "model", "pipeline"},
    "fitting": {"engine", "model", "pipeline"},
}


class ImportVisitor(ast.NodeVisitor):
    """Collects (module, name) of every `from module import name`, and (module, "") of `import module`."""

    def __init__(self) -> None:
        self.found: set[tuple[str, str]] = set()

    def visit_If(self, node: ast.If) -> None:
        if "TYPE_CHECKING" in ast.unparse(node.test):
            node.body = []
        self.generic_visit(node)

    def visit_Import(self, node: ast.Import) -> None:
        self.found |= {(alias.name, "") for alias in node.names}

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        assert node.level == 0, "relative imports are not used here"
        self.found |= {(node.module, alias.name) for alias in node.names}


@pytest.fixture(scope="module")
def imports() -> dict[str, set[str]]:
    """Module of ours -> those that it imports. That `a.b` also runs the package `a` is not counted."""
    paths = [path for package in ALLOWED for path in sorted((ROOT / package).rglob("*.py"))]
    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in paths}
    found = {}
    for name, path in modules.items():
        visitor = ImportVisitor()
        visitor.visit(ast.parse(path.read_text(encoding="utf-8")))
        others = {f"{module}.{inner}" if f"{module}.{inner}" in modules else module for module, inner in visitor.found}
        found[name] = others & modules.keys()
    return found


def test_no_import_circle(imports):
    remaining = dict(imports)
    while ends := [name for name, others in remaining.items() if not others & remaining.keys()]:
        for name in ends:  # imports no remaining module
            del remaining[name]
    while starts := remaining.keys() - set().union(*remaining.values()):
        for name in starts:  # imported by no remaining module
            del remaining[name]
    assert {name: sorted(others & remaining.keys()) for name, others in remaining.items()} == {}


def test_no_upward_import(imports):
    upward = []
    for name, others in imports.items():
        package, *inner = name.split(".")
        for other in sorted(others):
            target, *target_inner = other.split(".")
            if target != package and target not in ALLOWED[package]:
                upward.append(f"{name} imports {other}")
            if target == package == "decode" and inner and inner[0] in ALLOWED_IN_DECODE:
                folder = target_inner[0] if target_inner else ""
                if folder != inner[0] and folder not in ALLOWED_IN_DECODE[inner[0]]:
                    upward.append(f"{name} imports {other}")
    assert not upward, "\n".join(upward)


@pytest.mark.parametrize("command", ["eval.score", "decode.collab", "decode.tune", "train.sft"])
def test_help_does_not_import_torch(command):
    program = f"""
import runpy, sys
sys.argv = ["{command}", "--help"]
try:
    runpy.run_module("{command}", run_name="__main__")
except SystemExit as end:
    assert not end.code, end.code
assert "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-500:]
    assert "usage" in done.stdout
