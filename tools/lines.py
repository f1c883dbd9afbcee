"""Lines of code of `nanovllm/`, by file, of its core and in all. Blank lines, comments and docstrings are not counted.

The core is what a plain request on one device enters: everything but `extras/` and `parallel/`.
"""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "nanovllm"
NOT_CORE = ("extras", "parallel")


def count_lines(source: str) -> int:
    """The lines of a Python file that hold code."""
    skipped: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and ast.get_docstring(
            node
        ):
            skipped.update(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    lines = enumerate(source.splitlines(), 1)
    return sum(1 for i, line in lines if line.strip() and not line.strip().startswith("#") and i not in skipped)


def lines_by_file() -> dict[str, int]:
    """The lines of code of each file, by its path in the package."""
    files = sorted(PACKAGE.rglob("*.py"))
    return {file.relative_to(PACKAGE).as_posix(): count_lines(file.read_text(encoding="utf-8")) for file in files}


def core_of(lines: dict[str, int]) -> dict[str, int]:
    """Those files of `lines_by_file` that are the core's."""
    return {file: num for file, num in lines.items() if not file.startswith(NOT_CORE)}


def main() -> None:
    lines = lines_by_file()
    for file, num in lines.items():
        print(f"{num:5}  {file}")
    print(f"{sum(core_of(lines).values()):5}  the core\n{sum(lines.values()):5}  in all")


if __name__ == "__main__":
    main()
