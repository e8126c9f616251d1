"""The house's shape: one import direction, no circles, short files, Pallas in its room.

Each rule is a function that lists what breaks it in a source tree; it is run on
`ds4jax/` and, to show that it can fail, on a tree with the fault planted.
"""

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = (
    ("ds4jax",),
    ("config", "errors", "files", "iq2_grid", "xla_flags"),
    ("schema", "quant", "quantize", "assets", "synthetic"),
    ("gguf", "hf", "tokenizer", "pallas", "imatrix"),
    ("model",),
    ("decode",),
    ("train",),
    ("experiments",),
    ("cli",),
    ("__main__",),
)
"""Rooms from the ground up; a room imports from its own floor and from those below."""
MAX_LINES = 400
VAGUE = {"utils", "util", "helpers", "helper", "common", "misc"}


def sources(root: Path) -> dict[str, Path]:
    """Return the path of every module below `root/ds4jax`, by dotted name."""
    found = {}
    for path in sorted(root.glob("ds4jax/**/*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(path: Path) -> Iterator[str]:
    """Yield every dotted name that a file imports, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute here"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def edges(root: Path) -> dict[str, set[str]]:
    """Return the modules of ds4jax that each of them imports."""
    modules = sources(root)
    graph = {name: set() for name in modules}
    for name, path in modules.items():
        for target in imported(path):
            if target not in modules:  # a name inside a module
                target = target.rpartition(".")[0]
            if target in modules and target != name:
                graph[name].add(target)
    return graph


def floor(module: str) -> int:
    room = (module + ".").split(".")[1] or module
    for number, rooms in enumerate(FLOORS):
        if room in rooms:
            return number
    raise AssertionError(f"{module}: give the room {room} a floor in this test")


def climbs(root: Path) -> list[str]:
    return [
        f"{name} imports {target} from a floor above"
        for name, targets in edges(root).items()
        for target in targets
        if floor(target) > floor(name)
    ]


def circles(root: Path) -> list[str]:
    try:
        graphlib.TopologicalSorter(edges(root)).prepare()
    except graphlib.CycleError as error:
        return [" imports ".join(reversed(error.args[1]))]
    return []


def stray_pallas(root: Path) -> list[str]:
    return [
        f"{name} imports Pallas outside ds4jax/pallas"
        for name, path in sources(root).items()
        if not name.startswith("ds4jax.pallas")
        and any(f"{t}.".startswith("jax.experimental.pallas.") for t in imported(path))
    ]


def long_files(root: Path) -> list[str]:
    counts = {
        name: len(path.read_text().splitlines()) for name, path in sources(root).items()
    }
    return [
        f"{name} has {n} lines: two ideas?" for name, n in counts.items()
        if n > MAX_LINES
    ]  # fmt: skip


def vague_names(root: Path) -> list[str]:
    return [
        f"{name}: name what it does"
        for name in sources(root)
        if VAGUE & set(name.split("."))
    ]


RULES = (climbs, circles, stray_pallas, long_files, vague_names)


@pytest.mark.parametrize("rule", RULES)
def test_the_house_keeps(rule):
    assert sources(ROOT)
    assert rule(ROOT) == []


@pytest.mark.parametrize(
    "rule, files",
    [
        (climbs, {"quant": "from ds4jax.gguf import read", "gguf": "read = 1"}),
        (climbs, {"quant": "from ds4jax import gguf", "gguf": ""}),
        (climbs, {"quant": "def f():\n  import ds4jax.gguf", "gguf": ""}),
        (climbs, {"__init__": "import ds4jax.config", "config": ""}),
        (climbs, {"model/a": "import ds4jax.decode.b", "decode/b": ""}),
        (circles, {"gguf": "import ds4jax.hf", "hf": "import ds4jax.gguf"}),
        (stray_pallas, {"model/moe": "import jax.experimental.pallas as pl"}),
        (stray_pallas, {"model/moe": "from jax.experimental import pallas as pl"}),
        (stray_pallas, {"quant": "from jax.experimental.pallas.ops import gpu"}),
        (long_files, {"gguf": "\n" * (MAX_LINES + 1)}),
        (vague_names, {"model/utils": ""}),
        (vague_names, {"common/__init__": ""}),
    ],
)
def test_a_planted_fault_is_found(rule, files, tmp_path):
    for name, text in files.items():
        path = tmp_path / "ds4jax" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert len(rule(tmp_path)) == 1


def test_an_unknown_room_is_found(tmp_path):
    (tmp_path / "ds4jax").mkdir()
    (tmp_path / "ds4jax/attic.py").write_text("import ds4jax.config")
    (tmp_path / "ds4jax/config.py").write_text("")
    with pytest.raises(AssertionError, match="give the room attic a floor"):
        climbs(tmp_path)
