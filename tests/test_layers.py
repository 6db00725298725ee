"""What imports what: no layer of the package knows of one above it. The layers are those of the page on its design."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "hift_lightning"
MADE_WHEN_CALLED = {("strategies.blockwise", "planner")}


def layers() -> list[set[str]]:
    """Modules and packages of each layer, the highest first: a line with a description begins one."""
    _, _, rest = (ROOT / "docs" / "design.md").read_text().partition("\nhift_lightning/\n")
    found: list[set[str]] = []
    for line in rest.splitlines():
        if not line.startswith("  "):
            break
        members, described = line[:30], bool(line[30:].strip())
        if described:
            found.append(set())
        parts = (part.strip().removesuffix("/").removesuffix(".py") for part in members.split(","))
        found[-1].update(part.replace("/", ".") for part in parts if part)
    return found


LAYERS = layers()


def names() -> list[str]:
    files = (path.relative_to(PACKAGE).with_suffix("") for path in PACKAGE.rglob("*.py"))
    return sorted(".".join(path.parts) for path in files if path.name != "__init__")


def depth_of(name: str) -> int:
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        for depth, members in enumerate(LAYERS):
            if ".".join(parts[:end]) in members:
                return depth
    raise LookupError(f"`{name}` is in no layer; put it into one in docs/design.md")


def imported(node: ast.AST) -> Iterator[str]:
    """What is imported of the package anywhere below a node."""
    for each in ast.walk(node):
        if isinstance(each, ast.ImportFrom) and each.module == "hift_lightning":
            yield from (alias.name for alias in each.names)
        elif isinstance(each, (ast.Import, ast.ImportFrom)):
            modules = [each.module or ""] if isinstance(each, ast.ImportFrom) else [alias.name for alias in each.names]
            yield from (name.removeprefix("hift_lightning.") for name in modules if name.startswith("hift_lightning."))


@pytest.mark.parametrize("name", names())
def test_nothing_above_its_layer_is_imported(name: str) -> None:
    module = ast.parse((PACKAGE / f"{name.replace('.', '/')}.py").read_text())
    above = {each for each in imported(module) if depth_of(each) < depth_of(name)}
    assert {(name, each) for each in above} <= MADE_WHEN_CALLED
    functions = [node for node in ast.walk(module) if isinstance(node, ast.FunctionDef)]
    assert above <= {each for function in functions for each in imported(function)}


def test_the_page_tells_of_no_module_that_is_not_there() -> None:
    assert len(LAYERS) == 5
    for name in set().union(*LAYERS):
        path = PACKAGE / name.replace(".", "/")
        assert path.is_dir() or path.with_suffix(".py").is_file(), name
