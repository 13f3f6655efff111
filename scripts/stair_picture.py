"""Draw the rooms of the package as one stair, with a dot for every room that a room really imports.

Reads the order of the rooms (`ROOMS` of tests/test_rooms.py), the first sentence of each room's docstring, and the
imports of every module, from source: nothing is imported. Writes docs/assets/stair.svg. `scripts/docs.sh` runs it.

    python scripts/stair_picture.py
"""

import ast
from collections.abc import Sequence
from html import escape
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "lit_puzzle"
CELL, LEFT, TOP, TEXT = 26, 122, 10, 620  # pixels: a cell of the grid, the names, the margin, the longest sentence
STYLE = """
text { font: 13px system-ui, sans-serif; fill: #333 } .room { font-weight: 600; text-anchor: end }
.step { fill: #1b6ca8 } .import { fill: #e07b39 } line { stroke: #ddd }
"""


def ordered_rooms(test: Path) -> list[str]:
    """Return the rooms, ground floor first, from the assignment of `ROOMS` in a test's source."""
    for node in ast.parse(test.read_text()).body:
        if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == ["ROOMS"]:
            return [str(leaf.value) for leaf in ast.walk(node.value) if isinstance(leaf, ast.Constant)]
    raise ValueError(f"{test} does not assign ROOMS")


def room_sources(package: Path, room: str) -> list[Path]:
    """Return the modules of a room, which is a file or a folder of the package."""
    file = package / f"{room}.py"
    return [file] if file.is_file() else sorted((package / room).rglob("*.py"))


def imported_rooms(source: str, package: str) -> set[str]:
    """Return the rooms that a source text imports from, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name.split(".")[1] for name in names if name.startswith(f"{package}.")}


def purpose(package: Path, room: str) -> str:
    """Return the first sentence of a room's docstring."""
    folder = package / room / "__init__.py"
    text = ast.get_docstring(ast.parse((folder if folder.is_file() else package / f"{room}.py").read_text())) or ""
    return " ".join(text.split("\n\n")[0].split()).split(". ")[0].rstrip(".").replace("`", "")


def draw(rooms: Sequence[str], imports: dict[str, set[str]], purposes: dict[str, str]) -> str:
    """Return the picture as SVG: one row and one column per room, its step on the diagonal, its imports to the left."""
    width, height = LEFT + len(rooms) * CELL + TEXT, 2 * TOP + len(rooms) * CELL
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img">']
    parts += [f"<style>{STYLE}</style>", f'<rect width="{width}" height="{height}" fill="#fff"/>']
    for row, room in enumerate(rooms):
        top, step = TOP + row * CELL, LEFT + row * CELL
        middle = top + CELL // 2
        parts.append(f'<text class="room" x="{LEFT - 10}" y="{middle + 5}">{escape(room)}</text>')
        parts.append(f'<line x1="{LEFT}" y1="{top + CELL}" x2="{step + CELL}" y2="{top + CELL}"/>')
        parts.append(f'<rect class="step" x="{step}" y="{top}" width="{CELL}" height="{CELL}"/>')
        for column in sorted(rooms.index(other) for other in imports[room] - {room}):
            parts.append(f'<circle class="import" cx="{LEFT + column * CELL + CELL // 2}" cy="{middle}" r="5"/>')
        parts.append(f'<text x="{step + CELL + 8}" y="{middle + 5}">{escape(purposes[room])}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def main() -> None:
    """Draw the stair of this checkout."""
    rooms = ordered_rooms(ROOT / "tests" / "test_rooms.py")
    imports: dict[str, set[str]] = {}
    for room in rooms:
        sources = [path.read_text() for path in room_sources(PACKAGE, room)]
        imports[room] = set().union(*(imported_rooms(source, PACKAGE.name) for source in sources)) & set(rooms)
    target = ROOT / "docs" / "assets" / "stair.svg"
    target.write_text(draw(rooms, imports, {room: purpose(PACKAGE, room) for room in rooms}))
    print(target.relative_to(ROOT))


if __name__ == "__main__":
    main()
