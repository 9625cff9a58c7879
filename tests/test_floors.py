"""Who may import whom: every import of the tree, lazy ones included, against the floors of CONTRIBUTING.md."""

import ast
import re
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
SCRIPTS = ("train_rice", "eval_rice", "rice_cli")


def floors() -> dict[str, int]:
    """Package -> its floor, as the table of CONTRIBUTING.md lists them from the ground."""
    text = (REPOSITORY / "CONTRIBUTING.md").read_text(encoding="utf-8").partition("## Who may import whom")[2]
    rows = re.findall(r"^\| (\d+) \| ([^|]+) \|", text, re.M)
    return {name: int(floor) for floor, names in rows for name in re.findall(r"`(\w+)(?:\.py)?`", names)}


def imports(path: Path) -> list[tuple[int, str]]:
    """Line and first name of every absolute import of a file, wherever it stands."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name.split(".")[0]) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.append((node.lineno, node.module.split(".")[0]))
    return found


def sources(name: str) -> list[Path]:
    return [REPOSITORY / f"{name}.py"] if name in SCRIPTS else sorted((REPOSITORY / name).rglob("*.py"))


def test_every_package_and_script_has_a_floor():
    packages = {path.parent.name for path in REPOSITORY.glob("*_rice/__init__.py")}
    assert set(floors()) == packages | set(SCRIPTS)


def test_no_import_runs_upwards_or_sideways():
    floor = floors()
    wrong = [
        f"{path.relative_to(REPOSITORY)}:{line} imports {name}"
        for package in floor
        for path in sources(package)
        for line, name in imports(path)
        if name in floor and name != package and floor[name] >= floor[package]
    ]
    assert not wrong, "\n".join(wrong)


def test_hub_files_are_flat_and_import_siblings_alone():
    wrong = []
    for package in ("modeling_rice", "processing_rice"):
        assert not [path for path in (REPOSITORY / package).iterdir() if path.is_dir() and path.name != "__pycache__"]
        for path in sources(package):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.ImportFrom) and node.level and (node.level > 1 or not node.module):
                    wrong.append(f"{path.relative_to(REPOSITORY)}:{node.lineno}")
    assert not wrong, wrong


def test_every_exported_name_exists():
    wrong = []
    for path in (path for name in floors() for path in sources(name)):
        bound, exported = set(), []
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                bound |= {alias.asname or alias.name for alias in node.names}
            elif isinstance(node, (ast.Assign, ast.AnnAssign)):
                bound |= {name.id for name in ast.walk(node) if isinstance(name, ast.Name)}
                exported = ast.literal_eval(node.value) if ast.unparse(node).startswith("__all__ =") else exported
            else:
                bound.add(getattr(node, "name", None))
        wrong += [f"{path.relative_to(REPOSITORY)} exports {name}" for name in exported if name not in bound]
    assert not wrong, wrong


def test_no_file_is_longer_than_600_lines():
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for name in floors() for path in sources(name)}
    assert not {path.name: count for path, count in lines.items() if count > 600}
