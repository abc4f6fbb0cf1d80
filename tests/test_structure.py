"""The shape of the repository, checked on the source itself: who may import whom, and how large things may grow.

Each check is a function over source text, so that the second half of this file can show it broken source: a check that
cannot fail guards nothing.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
COMPONENTS = ("cluster", "decode_worker", "engine", "kernels", "kvtransfer", "prefill_worker", "router")

# Component -> what it may import besides itself. A module name allows that one module, not its component.
ALLOWED: dict[str, frozenset[str]] = {
    "cluster": frozenset({"router", "prefill_worker", "decode_worker", "engine", "kvtransfer", "kernels"}),
    "router": frozenset({"engine.request", "engine.block_hash"}),
    "prefill_worker": frozenset({"engine", "kvtransfer", "kernels"}),
    "decode_worker": frozenset({"engine", "kvtransfer", "kernels"}),
    "engine": frozenset({"kernels", "kvtransfer.messages"}),
    "kvtransfer": frozenset({"kernels"}),
    "kernels": frozenset(),
}
FORBIDDEN_PACKAGES: dict[str, frozenset[str]] = {
    "cluster": frozenset(),
    "router": frozenset({"torch", "ray", "triton", "ucxx", "transformers"}),
    "prefill_worker": frozenset({"ray", "redis", "ucxx"}),
    "decode_worker": frozenset({"ray", "redis", "ucxx"}),
    "engine": frozenset({"ray", "redis", "ucxx"}),
    "kvtransfer": frozenset({"ray", "redis", "transformers", "triton"}),
    "kernels": frozenset({"ray", "redis", "ucxx", "transformers"}),
}
# No torch at import time in the values that a router or a torch-free process reads.
TORCH_FREE = (
    "engine/request.py",
    "engine/block_hash.py",
    "engine/sequence.py",
    "engine/config.py",
    "kvtransfer/config.py",
)
MAX_FILE_LINES = 420
MAX_FUNCTION_LINES = 60
# Room (a sub-folder of cluster/ or engine/, or the files beside them) -> the rooms of its component that it imports.
# The test wants exactly these: a new arrow is a decision, and one that nobody needs any more goes.
ROOMS: dict[str, frozenset[str]] = {
    "cluster": frozenset({"cluster.bench", "cluster.config", "cluster.launch"}),
    "cluster.bench": frozenset(),
    "cluster.client": frozenset({"cluster.session", "cluster.store"}),
    "cluster.config": frozenset({"cluster.client", "cluster.http"}),
    "cluster.host": frozenset({"cluster.session", "cluster.store"}),
    "cluster.http": frozenset({"cluster.client"}),
    "cluster.ingress": frozenset({"cluster.client", "cluster.config", "cluster.http", "cluster.store"}),
    "cluster.launch": frozenset(
        {"cluster.config", "cluster.host", "cluster.ingress", "cluster.pools", "cluster.store"}
    ),
    "cluster.pools": frozenset({"cluster.config", "cluster.host", "cluster.store"}),
    "cluster.session": frozenset(),
    "cluster.store": frozenset(),
    "engine.kv": frozenset(),
    "engine.model": frozenset(),
    "engine.sampling": frozenset(),
    "engine.text": frozenset(),
}
# What engine's rooms may use of the files beside them: values, below everything else.
ENGINE_GROUND = frozenset(
    {
        "engine.batch",
        "engine.block_hash",
        "engine.config",
        "engine.gguf_file",
        "engine.request",
        "engine.sequence",
    }
)
MAX_PARAMETERS = 8


@dataclass(frozen=True, slots=True)
class Import:
    """One import statement's target as a dotted name, and where it stands."""

    name: str
    line: int


def imports_of(source: str) -> Iterator[Import]:
    """Every import in the file, those inside functions and `if TYPE_CHECKING` too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield Import(module, node.lineno)
            for alias in node.names if module.count(".") < 2 else ():
                yield Import(f"{module}.{alias.name}", node.lineno)


def forbidden_arrows(component: str, source: str) -> list[str]:
    """Imports that point against the arrows of the design, as 'line: name (why)'."""
    found = []
    for item in imports_of(source):
        if item.name.startswith("."):
            found.append(f"{item.line}: {item.name} (relative; write kvbaton.{component}...)")
            continue
        top, _, rest = item.name.partition(".")
        if top in COMPONENTS:
            found.append(f"{item.line}: {item.name} (write kvbaton.{item.name})")
        elif top in FORBIDDEN_PACKAGES[component]:
            found.append(f"{item.line}: {item.name} ({component} does without {top})")
        elif top == "kvbaton" and not _allowed(component, rest):
            found.append(f"{item.line}: {item.name} (no arrow {component} -> {rest})")
    return found


def _allowed(component: str, rest: str) -> bool:
    parts = rest.split(".")
    if parts[0] not in COMPONENTS:
        return True  # kvbaton itself, kvbaton.__version__
    if parts[0] == component or parts[0] in ALLOWED[component]:
        return True
    if len(parts) == 1:  # `from kvbaton.engine import request` is judged with the name that follows
        return any(allowed.startswith(f"{parts[0]}.") for allowed in ALLOWED[component])
    return ".".join(parts[:2]) in ALLOWED[component]


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def room_of(module: str) -> str:
    """`cluster.session` of `cluster.session.wire`; the component of a file beside the rooms."""
    return module.rpartition(".")[0]


def import_graph(sources: dict[str, str]) -> dict[str, frozenset[str]]:
    """Module -> the modules of `sources` that it imports, at its top, in functions, or for type checks."""
    graph = {}
    for module, source in sources.items():
        names = {name.removeprefix("kvbaton.") for name in _imported_names(source)}
        graph[module] = frozenset(name for name in names if name in sources and name != module)
    return graph


def _imported_names(source: str) -> Iterator[str]:
    """What could be a module: `a.b` and `a.b.c` for `from a.b import c`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def import_circles(graph: dict[str, frozenset[str]]) -> list[list[str]]:
    """Groups of modules that import each other, by taking away, again and again, what imports nothing that is left."""
    left = dict(graph)
    while free := [module for module, targets in left.items() if not targets & left.keys()]:
        for module in free:
            del left[module]
    while users := [module for module in left if not any(module in targets for targets in left.values())]:
        for module in users:
            del left[module]
    return [sorted(left)] if left else []


def room_arrows(graph: dict[str, frozenset[str]], component: str) -> dict[str, frozenset[str]]:
    """Room -> the other rooms of its component that its files import."""
    arrows: dict[str, set[str]] = {}
    for module, targets in graph.items():
        if module.startswith(f"{component}."):
            mine = arrows.setdefault(room_of(module), set())
            mine |= {room_of(target) for target in targets if target.startswith(f"{component}.")} - {room_of(module)}
    return {room: frozenset(found) for room, found in arrows.items()}


def ray_actor_lines(source: str) -> list[int]:
    """Lines where `ray.remote` is used, as decorator or call."""
    tree = ast.parse(source)
    named = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module == "ray"
        for alias in node.names
        if alias.name == "remote"
    }
    return sorted(
        node.lineno
        for node in ast.walk(tree)
        if (isinstance(node, ast.Attribute) and node.attr == "remote" and _is_name(node.value, "ray"))
        or (isinstance(node, ast.Name) and node.id in named)
    )


def _is_name(node: ast.expr, name: str) -> bool:
    return isinstance(node, ast.Name) and node.id == name


def functions_of(source: str) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def long_functions(source: str) -> list[str]:
    """Functions past the limit; Triton kernel bodies excepted."""
    return [
        f"{node.lineno}: {node.name} has {lines} lines"
        for node in functions_of(source)
        if (lines := (node.end_lineno or node.lineno) - node.lineno + 1) > MAX_FUNCTION_LINES and not _is_kernel(node)
    ]


def wide_functions(source: str) -> list[str]:
    """Functions with more parameters than a reader can hold; Triton kernels and their launchers' tuples excepted."""
    return [
        f"{node.lineno}: {node.name} takes {count} parameters"
        for node in functions_of(source)
        if (count := _num_parameters(node)) > MAX_PARAMETERS and not _is_kernel(node)
    ]


def _num_parameters(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    names = [arg.arg for arg in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
    return len([name for name in names if name not in ("self", "cls")])


def _is_kernel(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    return any("jit" in ast.unparse(decorator) for decorator in node.decorator_list)


def global_statements(source: str) -> list[int]:
    return [node.lineno for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Global)]


def swallowed_exceptions(source: str) -> list[int]:
    """`except Exception: pass` in any spelling: a failure that nobody hears of."""
    return [
        node.lineno
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.ExceptHandler)
        and (node.type is None or (isinstance(node.type, ast.Name) and node.type.id in ("Exception", "BaseException")))
        and all(isinstance(statement, ast.Pass) for statement in node.body)
    ]


def _files(component: str) -> list[Path]:
    return sorted((ROOT / component).rglob("*.py"))


ALL_FILES = [path for component in COMPONENTS for path in _files(component)]


GRAPH = import_graph({module_name(path): path.read_text() for path in ALL_FILES})


def _per_file(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_every_component_has_files() -> None:
    """Guards the walk itself: an empty list would let every check below pass."""
    assert [component for component in COMPONENTS if not _files(component)] == []


@pytest.mark.parametrize("path", ALL_FILES, ids=_per_file)
def test_imports_follow_the_arrows(path: Path) -> None:
    component = path.relative_to(ROOT).parts[0]
    assert forbidden_arrows(component, path.read_text()) == []


def test_no_file_imports_itself_by_a_detour() -> None:
    """Guards a reading order: of two files that import each other neither can be understood, or tested, first."""
    assert import_circles(GRAPH) == []


def test_rooms_of_cluster_have_just_these_arrows() -> None:
    rooms = {room: targets for room, targets in ROOMS.items() if room.split(".")[0] == "cluster"}
    assert room_arrows(GRAPH, "cluster") == rooms
    assert import_circles(rooms) == [], "two rooms that need each other are one"


def test_rooms_of_engine_stand_on_values_alone() -> None:
    """The files beside engine's rooms are its ground (values) and its top (what computes with all rooms)."""
    arrows = room_arrows(GRAPH, "engine")
    del arrows["engine"]
    wanted = {room: targets for room, targets in ROOMS.items() if room.split(".")[0] == "engine"}
    assert {room: targets - {"engine"} for room, targets in arrows.items()} == wanted
    used = {target for module, targets in GRAPH.items() if room_of(module) in wanted for target in targets}
    assert {target for target in used if room_of(target) == "engine"} <= ENGINE_GROUND
    below = {target for module in ENGINE_GROUND for target in GRAPH[module] if target.startswith("engine.")}
    assert below <= ENGINE_GROUND


def test_a_class_name_exists_once() -> None:
    """Guards a newcomer's search: two classes of one name are one concept written twice, or two that need names."""
    where: dict[str, list[str]] = {}
    for path in ALL_FILES:
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                where.setdefault(node.name, []).append(_per_file(path))
    assert {name: paths for name, paths in where.items() if len(paths) > 1} == {}


@pytest.mark.parametrize("path", ALL_FILES, ids=_per_file)
def test_sizes(path: Path) -> None:
    """Guards against files and functions that nobody can read in one go."""
    source = path.read_text()
    assert len(source.splitlines()) <= MAX_FILE_LINES
    assert long_functions(source) == []
    assert wide_functions(source) == []


@pytest.mark.parametrize("path", ALL_FILES, ids=_per_file)
def test_habits(path: Path) -> None:
    """Guards: state that hides in modules, failures that nobody hears of, files that say nothing about themselves."""
    source = path.read_text()
    assert global_statements(source) == []
    assert swallowed_exceptions(source) == []
    assert ast.get_docstring(ast.parse(source)), f"{path.name} has no module docstring"


def test_only_actors_py_makes_ray_actors() -> None:
    """Guards the thin shell: everything but `cluster/pools/actors.py` must be testable without Ray."""
    users = {_per_file(path) for path in ALL_FILES if ray_actor_lines(path.read_text())}
    assert users == {"cluster/pools/actors.py"}


def test_no_init_in_component_folders() -> None:
    """An `__init__.py` in kernels/ breaks `import transformers` from the repository root (DESIGN, Packaging)."""
    assert [_per_file(path) for component in COMPONENTS for path in (ROOT / component).rglob("__init__.py")] == []
    assert list((ROOT / "tests").rglob("__init__.py")) == []


def test_links_lead_to_the_components() -> None:
    """Guards the src layout: one relative link per component, none missing, none absolute."""
    package = ROOT / "src" / "kvbaton"
    links = {path.name: path.readlink() for path in package.iterdir() if path.is_symlink()}
    assert links == {component: Path("../..") / component for component in COMPONENTS}


def test_settings_stand_below_every_component() -> None:
    """Guards the one module that all of them may import: one arrow out of it would be a circle."""
    source = (ROOT / "src" / "kvbaton" / "settings.py").read_text()
    assert [item.name for item in imports_of(source) if item.name.startswith(("kvbaton", "."))] == []
    assert long_functions(source) + wide_functions(source) == []


@pytest.mark.parametrize("name", TORCH_FREE)
def test_shared_values_do_without_torch(name: str) -> None:
    tops = {item.name.partition(".")[0] for item in imports_of((ROOT / name).read_text())}
    assert tops.isdisjoint({"torch", "triton", "transformers", "numpy"})


def test_test_files_have_unique_names() -> None:
    """pytest's importlib mode copes with equal names, people and reports do not."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))


# ---- the checks themselves, on broken source ----


@pytest.mark.parametrize(
    ("component", "line"),
    [
        ("kernels", "from kvbaton.engine.batch import ScheduledRow"),
        ("kvtransfer", "import kvbaton.engine.request"),
        ("engine", "from kvbaton.kvtransfer.agent import TransferAgent"),
        ("prefill_worker", "from kvbaton.decode_worker.scheduler import DecodeScheduler"),
        ("prefill_worker", "from kvbaton.cluster.host.worker import Worker"),
        ("router", "from kvbaton.engine.sequence import Sequence"),
        ("router", "from kvbaton.engine import batch"),
        ("router", "from kvbaton.kvtransfer.messages import PeerAddress"),
        ("router", "import torch"),
        ("engine", "def f():\n    import ray"),
        ("engine", "import kernels.reference"),
        ("engine", "from . import batch"),
        ("kernels", "from kvbaton import cluster"),
    ],
)
def test_a_wrong_arrow_is_found(component: str, line: str) -> None:
    assert forbidden_arrows(component, line) != []


@pytest.mark.parametrize(
    ("component", "line"),
    [
        ("router", "from kvbaton.engine.request import Request"),
        ("router", "from kvbaton.engine import block_hash"),
        ("cluster", "import ray\nfrom kvbaton.kernels.backend import Backend"),
        ("engine", "import torch\nfrom kvbaton import __version__"),
        ("decode_worker", "from kvbaton.kvtransfer.messages import Offer"),
    ],
)
def test_a_right_arrow_passes(component: str, line: str) -> None:
    assert forbidden_arrows(component, line) == []


def test_a_circle_and_a_room_arrow_are_found() -> None:
    sources = {
        "cluster.a.one": "from kvbaton.cluster.b.two import X",
        "cluster.b.two": "def f():\n    from kvbaton.cluster.a import three",
        "cluster.a.three": "from kvbaton.cluster.a.one import Y",
        "cluster.top": "import kvbaton.cluster.a.one",
    }
    graph = import_graph(sources)
    assert import_circles(graph) == [["cluster.a.one", "cluster.a.three", "cluster.b.two"]]
    rooms = {"cluster": {"cluster.a"}, "cluster.a": {"cluster.b"}, "cluster.b": {"cluster.a"}}
    assert room_arrows(graph, "cluster") == rooms
    assert import_circles(import_graph({**sources, "cluster.a.three": ""})) == []


def test_the_other_checks_can_fail() -> None:
    body = "    x = 1\n" * MAX_FUNCTION_LINES
    assert long_functions(f"def f():\n{body}") == [f"1: f has {MAX_FUNCTION_LINES + 1} lines"]
    assert long_functions(f"@triton.jit\ndef f():\n{body}") == []
    assert wide_functions("class A:\n    def f(self, a, b, c, d, e, f, g, h, *, i): ...") == ["2: f takes 9 parameters"]
    assert ray_actor_lines("import ray\n@ray.remote(num_cpus=1)\nclass A: ...") == [2]
    assert ray_actor_lines("from ray import remote\n@remote\nclass A: ...") == [2]
    assert ray_actor_lines("handle.stop.remote()") == []
    assert global_statements("def f():\n    global x\n    x = 1") == [2]
    assert swallowed_exceptions("try:\n    f()\nexcept Exception:\n    pass") == [3]
    assert swallowed_exceptions("try:\n    f()\nexcept OSError:\n    pass") == []
