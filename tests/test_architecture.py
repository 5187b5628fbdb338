"""The structure of the package, as docs/architecture.md draws it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from tests import cli

PACKAGE = cli.REPOSITORY / "open_po"
# A room imports from those before it and from itself. The last ones start things.
ROOMS = [
    *(
        "errors",
        "losses",
        "optimizers",
        "config",
        "output",
        "memory_plan",
        "watch",
        "report",
        "hub",
        "distributed",
        "model_files",
        "data",
        "packing",
    ),
    *("packing", "model", "reference", "evaluation", "training", "commands", "quickstart", "__main__"),
]


def modules() -> Iterator[tuple[Path, ast.Module]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        yield path, ast.parse(path.read_text())


def imported(tree: ast.Module) -> Iterator[str]:
    """The project's modules that a module imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "open_po":
            for alias in node.names:
                inner = PACKAGE.parent.joinpath(*str(node.module).split("."), alias.name)
                is_module = inner.is_dir() or inner.with_suffix(".py").is_file()
                yield f"{node.module}.{alias.name}" if is_module else str(node.module)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("open_po."))


def test_rooms_import_one_way() -> None:
    for path, tree in modules():
        here = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if here == "__init__":
            continue
        assert here in ROOMS, f"{path} is in no room: name it in this test and in docs/architecture.md"
        for name in imported(tree):
            there = name.split(".")[1:2]  # none: the package's version
            if there:
                assert ROOMS.index(there[0]) <= ROOMS.index(here), f"{path} imports {name}"


def test_modules_import_without_a_circle() -> None:
    graph = {}
    for path, tree in modules():
        name = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
        graph[name] = {module for module in imported(tree) if module != name}
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, " -> ".join([*above[above.index(name) :], name])
        if name not in done:
            for module in sorted(graph.get(name, ())):
                visit(module, (*above, name))
            done.add(name)

    for name in sorted(graph):
        visit(name, ())


def test_ranks_talk_to_one_another_in_distributed_alone() -> None:
    for path, tree in modules():
        if path.parent.name == "distributed":
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom | ast.Import):
                names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
                assert not any(name.split(".")[0] == "accelerate" for name in names), path
            if isinstance(node, ast.Attribute):
                assert node.attr != "accelerator", f"{path}, line {node.lineno}"
                assert not (node.attr == "distributed" and ast.unparse(node.value) == "torch"), path


def test_files_and_functions_fit_on_a_screen_or_two() -> None:
    for path, tree in modules():
        lines = len(path.read_text().splitlines())
        assert lines <= 350, f"{path} has {lines} lines: split it along its concepts"
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and node.end_lineno is not None:
                length = node.end_lineno - node.lineno + 1
                assert length <= 50, f"{path}: {node.name} has {length} lines"
