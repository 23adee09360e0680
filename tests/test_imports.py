"""Who may import whom, read from the source (an import in a function or under TYPE_CHECKING counts as well); sizes."""

import ast
import statistics

import pytest

from tests.support import ROOT

# The rooms in order, and what each may import besides itself: rooms above it alone.
ALLOWED = {
    "core": set(),
    "config": {"core"},
    "parallel": {"core"},
    "data": {"core", "config"},
    "corpora": {"core", "data"},
    "model": {"core", "config", "parallel"},
    "losses": {"core", "config", "parallel"},
    "checkpoint": {"core", "config", "parallel"},
    "metrics": {"core", "config", "parallel"},
    "health": {"core", "config", "parallel", "metrics"},
    "evaluate": {"core", "config", "parallel", "data", "losses"},
    "generate": {"core", "parallel", "data", "model"},
    "harness": {"core", "config", "parallel", "data", "model", "evaluate", "generate"},
    "alignment": {"core", "config", "data"},
    "convert": {"core", "config", "parallel", "data", "corpora", "model", "checkpoint"},
    "training": {
        "core",
        "config",
        "parallel",
        "data",
        "model",
        "losses",
        "checkpoint",
        "metrics",
        "health",
        "evaluate",
        "convert",
        "harness",
    },
}
# package -> the only file that may import it
FOREIGN = {"megatron": "model/mcore.py", "deepspeed": "training/deepspeed.py"}


def imported_modules(source, module):
    """Full names of the modules that the source of `module` (a dotted name) imports, `from a import b` as a.b."""
    package = module.split(".")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            prefix = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{prefix}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("importlib.import_module", "__import__"):
            yield from (argument.value for argument in node.args[:1] if isinstance(argument, ast.Constant))


def room_of(name):
    """The room of a module name below moe_dist; None for the package itself."""
    return name.split(".")[0] if name.split(".")[0] in ALLOWED else None


def violations(path, source):
    """Forbidden imports of one file; `path` is relative to the repository, such as moe_dist/core/batch.py."""
    module = path.removesuffix(".py").replace("/", ".").removesuffix(".__init__")
    module += ".__init__" if path.endswith("__init__.py") else ""
    room = room_of(module.removeprefix("moe_dist.")) if module.startswith("moe_dist.") else None
    for name in imported_modules(source, module):
        top = name.split(".")[0]
        if top == "launch":
            yield f"{path} imports {name}: nothing imports launch"
        if top in FOREIGN and not path.startswith(f"moe_dist/{FOREIGN[top]}"):
            yield f"{path} imports {name}: only moe_dist/{FOREIGN[top]} may"
        if top == "moe_dist" and room and room_of(name.removeprefix("moe_dist.")) not in ALLOWED[room] | {room}:
            yield f"{path} imports {name}: {room} may import {sorted(ALLOWED[room])} only"


def test_every_file_keeps_the_directions():
    files = [path for folder in ("moe_dist", "launch") for path in sorted((ROOT / folder).rglob("*.py"))]
    assert len(files) > 10
    found = [line for file in files for line in violations(str(file.relative_to(ROOT)), file.read_text())]
    assert not found, "\n".join(found)


def test_every_module_is_in_a_room():
    modules = {path.stem if path.is_file() else path.name for path in (ROOT / "moe_dist").iterdir()}
    assert modules - {"__init__", "__pycache__"} == set(ALLOWED)


def test_a_room_imports_only_rooms_above_it():
    rooms = list(ALLOWED)
    for place, room in enumerate(rooms):
        assert ALLOWED[room] <= set(rooms[:place]), room


def test_every_room_says_what_lives_there():
    for folder in sorted((ROOT / "moe_dist").rglob("__init__.py")):
        assert ast.get_docstring(ast.parse(folder.read_text())), folder


def test_no_two_modules_share_a_name():
    names = [path.stem for path in (ROOT / "moe_dist").rglob("*.py") if path.stem != "__init__"]
    assert len(names) == len(set(names)), sorted(name for name in set(names) if names.count(name) > 1)


def test_no_public_name_has_two_meanings():
    """Classes, functions and constants of modules; `main` is what a module does when it is run."""
    places: dict[str, list[str]] = {}
    for path in (ROOT / "moe_dist").rglob("*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef):
                names = [node.name]
            elif isinstance(node, ast.Assign):
                names = [name.id for target in node.targets for name in ast.walk(target) if isinstance(name, ast.Name)]
            else:
                names = []
            for name in names:
                places.setdefault(name, []).append(path.name)
    assert len(places) > 400
    doubled = {name: where for name, where in places.items() if len(where) > 1 and not name.startswith("_")}
    assert set(doubled) <= {"main"}, doubled


def test_files_and_functions_stay_short():
    """At most 300 lines a file and 50 a function, and fewer than 8 in the median one."""
    files = [path for folder in ("moe_dist", "launch") for path in (ROOT / folder).rglob("*.py")]
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in files}
    assert not {name: length for name, length in lengths.items() if length > 300}
    functions = {
        f"{path.relative_to(ROOT)}:{node.lineno} {node.name}": node.end_lineno - node.lineno + 1
        for path in files
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    assert not {name: length for name, length in functions.items() if length > 50}
    assert statistics.median(functions.values()) < 8


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("moe_dist/config/recipe.py", "from moe_dist.parallel.layout import Layout"),
        ("moe_dist/core/batch.py", "import moe_dist.config.recipe"),
        ("moe_dist/core/routing_plan.py", "from moe_dist import model"),
        ("moe_dist/model/moe/router.py", "def f():\n    from moe_dist.losses.term import Term"),
        ("moe_dist/losses/balance.py", "from moe_dist.model.moe.router import Router"),
        ("moe_dist/data/stream/loader.py", "from ...corpora import emoji"),
        ("moe_dist/metrics/__init__.py", "from ..training.deepspeed import Engine"),
        ("moe_dist/checkpoint/saver.py", "if TYPE_CHECKING:\n    import moe_dist.model.transformer"),
        ("moe_dist/parallel/layout.py", "from moe_dist import training"),
        ("moe_dist/model/block.py", "from megatron.core.transformer import TransformerConfig"),
        ("moe_dist/training/deepspeed_config.py", "import deepspeed"),
        ("moe_dist/training/run.py", "import deepspeed"),
        ("moe_dist/training/run.py", "import importlib\nimportlib.import_module('deepspeed.comm')"),
        ("launch/train.py", "import megatron.core as mcore"),
        ("moe_dist/training/run.py", "from launch import train"),
    ],
)
def test_a_planted_import_is_found(path, source):
    assert len(list(violations(path, source))) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("moe_dist/model/mcore.py", "from megatron.core import parallel_state\nfrom moe_dist.core import errors"),
        ("moe_dist/training/deepspeed.py", "import deepspeed\nfrom ..parallel.layout import Layout"),
        ("moe_dist/losses/balance.py", "from moe_dist.core.routing_plan import RoutingRecord\nfrom .language import x"),
        ("moe_dist/training/run.py", "from moe_dist.training.deepspeed import make_engine"),
        ("launch/train.py", "from moe_dist.training.run import train\nimport deepspeedometer"),
    ],
)
def test_an_allowed_import_passes(path, source):
    assert not list(violations(path, source))
