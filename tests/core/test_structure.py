"""The structure of src and integrations: no import circle, no private name of another module, no class name twice.

The layers are contracts of import-linter, in pyproject.toml. A finding that is known is in `KNOWN`; an entry of `KNOWN`
that is found no longer fails as well.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]

KNOWN = {
    "private": {
        "safe_sched_hf.audit.model imports safe_sched_hf.measure.row_losses._device",
        "safe_sched_hf.audit.model imports safe_sched_hf.measure.row_losses._load",
        "safe_sched_hf.audit.model imports safe_sched_hf.measure.row_losses._quiet",
        "safe_sched_hf.audit.scorer imports safe_sched_hf.measure.features._hidden_features",
        "safe_sched_hf.audit.scorer imports safe_sched_hf.measure.row_losses._device",
        "safe_sched_hf.audit.scorer imports safe_sched_hf.safety._tokenize",
    },
    "homonyms": {
        "Probe: safe_sched.needs, safe_sched_hf.audit",
    },
}


@dataclass(frozen=True)
class Module:
    """A module that was read and not imported."""

    name: str
    tree: ast.Module
    is_package: bool


@dataclass(frozen=True)
class Import:
    """One name that an import statement binds. ``member`` is None where the module itself is bound."""

    module: str
    member: str | None
    bound: str
    at_file_level: bool


def modules_of(*folders: Path) -> dict[str, Module]:
    """All modules below the folders, by their dotted names."""
    found = {}
    for folder in folders:
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            is_package = parts[-1] == "__init__"
            name = ".".join(parts[:-1] if is_package else parts)
            found[name] = Module(name, ast.parse(path.read_text(encoding="utf-8")), is_package)
    return found


def ancestors(name: str) -> Iterator[str]:
    """The packages around a module, the innermost first."""
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


def imports_of(module: Module, known: dict[str, Module]) -> list[Import]:
    """The imports of our own modules. Those in a function or below ``if TYPE_CHECKING`` are not at file level."""
    found: list[Import] = []

    def visit(node: ast.AST, at_file_level: bool) -> None:
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name in known:
                    bound = alias.asname or alias.name
                    found.append(Import(alias.name, None, bound, at_file_level))
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = [module.name, *ancestors(module.name)][node.level - module.is_package]
                base = f"{package}.{base}".rstrip(".")
            for alias in node.names:
                bound = alias.asname or alias.name
                if f"{base}.{alias.name}" in known:
                    found.append(Import(f"{base}.{alias.name}", None, bound, at_file_level))
                elif base in known:
                    found.append(Import(base, alias.name, bound, at_file_level))
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            at_file_level = False
        elif isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            for child in node.body:
                visit(child, False)
            for child in node.orelse:
                visit(child, at_file_level)
            return
        for child in ast.iter_child_nodes(node):
            visit(child, at_file_level)

    visit(module.tree, True)
    return found


def circles(modules: dict[str, Module]) -> set[str]:
    """Groups of modules that import one another at file level.

    A module is loaded after the packages around it, so these are imported as well, unless they are around the importer.
    """
    reached: dict[str, set[str]] = {}
    for name, module in modules.items():
        targets = {one.module for one in imports_of(module, modules) if one.at_file_level}
        around = {name, *ancestors(name)}
        reached[name] = targets | {outer for target in targets for outer in ancestors(target) if outer not in around}
    growing = True
    while growing:
        growing = False
        for name, targets in reached.items():
            further = targets.union(*(reached.get(target, ()) for target in targets))
            growing |= len(further) > len(targets)
            reached[name] = further
    return {
        ", ".join(sorted({name} | {other for other in targets if name in reached.get(other, ())}))
        for name, targets in reached.items()
        if name in targets
    }


def private_names(modules: dict[str, Module]) -> set[str]:
    """Names with a leading underscore that a module takes from another one."""

    def is_private(name: str) -> bool:
        return name.startswith("_") and not name.startswith("__")

    found = set()
    for name, module in modules.items():
        imported = imports_of(module, modules)
        bound = {one.bound: one.module for one in imported if one.member is None}
        for one in imported:
            member = one.module.rpartition(".")[2] if one.member is None else one.member
            if is_private(member):
                found.add(f"{name} imports {one.module}{'' if one.member is None else '.' + member}")
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Attribute) and is_private(node.attr):
                owner = ast.unparse(node.value)
                if owner in bound:
                    found.add(f"{name} imports {bound[owner]}.{node.attr}")
    return found


def homonyms(modules: dict[str, Module]) -> set[str]:
    """Public classes of one name in several modules."""
    owners: dict[str, set[str]] = defaultdict(set)
    for name, module in modules.items():
        for node in module.tree.body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                owners[node.name].add(name)
    return {f"{name}: {', '.join(sorted(where))}" for name, where in owners.items() if len(where) > 1}


OURS = modules_of(ROOT / "src", ROOT / "integrations")


def written(folder: Path, **files: str) -> dict[str, Module]:
    """The modules of a package ``p`` with these files, and of its package ``p.sub``, which imports ``p.f``."""
    inner = folder / "p" / "sub"
    inner.mkdir(parents=True)
    (folder / "p" / "__init__.py").touch()
    (inner / "__init__.py").write_text("import p.f")
    (inner / "inner.py").touch()
    for name, text in files.items():
        (folder / "p" / f"{name}.py").write_text(text)
    return modules_of(folder)


def test_all_modules_are_read() -> None:
    assert {"safe_sched", "safe_sched.training.session", "safe_sched_hf.callback", "safe_sched_axolotl"} <= set(OURS)
    assert sum(len(imports_of(module, OURS)) for module in OURS.values()) > 500


def test_no_modules_import_one_another() -> None:
    assert circles(OURS) == set()


def test_no_module_uses_a_private_name_of_another_one() -> None:
    assert private_names(OURS) == KNOWN["private"]


def test_no_two_public_classes_have_one_name() -> None:
    assert homonyms(OURS) == KNOWN["homonyms"]


def test_circles_are_found(tmp_path: Path) -> None:
    """Control: one of three modules, and one through the package around a module. Lazy and typing imports are none."""
    found = written(
        tmp_path,
        a="from p import b",
        b="from p.c import x",
        c="try:\n  from . import a\nexcept ImportError: pass",
        d="from p.e import x",
        e="from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n  from p import d\ndef f():\n  import p.d",
        f="import p.sub.inner",
    )
    assert circles(found) == {"p.a, p.b, p.c", "p.f, p.sub"}


def test_private_names_are_found(tmp_path: Path) -> None:
    """Control: imported, also lazily, relatively and as a module, and read from a module. Dunder names are public."""
    found = written(
        tmp_path,
        a="_x = y = 1",
        _b="",
        c="from .a import _x, y, __doc__\nfrom p import _b",
        d="def f():\n  from p import a as other\n  return other._x, other.y, other.__name__",
        e="import p.a\nclass C:\n  def f(self):\n    return self._own, p.a._x",
    )
    assert private_names(found) == {
        "p.c imports p.a._x",
        "p.c imports p._b",
        "p.d imports p.a._x",
        "p.e imports p.a._x",
    }


def test_homonyms_are_found(tmp_path: Path) -> None:
    """Control: public classes at file level only."""
    found = written(
        tmp_path,
        a="class A: ...\nclass _B: ...\nclass C: ...",
        b="class A: ...\nclass _B: ...\ndef f():\n  class C: ...",
    )
    assert homonyms(found) == {"A: p.a, p.b"}
