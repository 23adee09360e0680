"""Who may import whom, read from the source: an import hidden in a function or under TYPE_CHECKING counts as well."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# A unit (the longest prefix below that fits a module's name) -> the units it may import; itself and errors always.
LEAVES = {"batch", "config", "fused", "moe.plan", "strict"}
ALLOWED = {
    "errors": set(),
    "fused": set(),
    "batch": set(),
    "strict": set(),
    "config": {"strict"},
    "moe.plan": set(),
    "parallel": {"config"},
    "data": {"config", "batch", "strict"},
    "moe": {*LEAVES, "parallel"},
    "model": {*LEAVES, "parallel", "moe"},
    "losses": {*LEAVES, "parallel"},
    "telemetry": {*LEAVES, "parallel"},
    "engine": {*LEAVES, "parallel"},
    "alignment": {*LEAVES, "data"},
    "convert": {*LEAVES, "parallel", "moe", "model", "engine", "data"},
    "evaluate": {*LEAVES, "parallel", "data", "model", "losses"},
    "generation": {*LEAVES, "parallel", "data", "model", "moe"},
}
FOREIGN = {"megatron": "model/mcore.py", "deepspeed": "engine/"}  # package -> the only place that may import it


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


def unit_of(name):
    """The unit of a module name below moe_dist; None for what has no rule (train, parts, the package itself)."""
    return max((unit for unit in ALLOWED if f"{name}.".startswith(f"{unit}.")), key=len, default=None)


def violations(path, source):
    """Forbidden imports of one file; `path` is relative to the repository, such as moe_dist/data/tokenizers/text_tokenizer.py."""
    module = path.removesuffix(".py").replace("/", ".").removesuffix(".__init__")
    module += ".__init__" if path.endswith("__init__.py") else ""
    unit = unit_of(module.removeprefix("moe_dist.")) if module.startswith("moe_dist.") else None
    for name in imported_modules(source, module):
        top = name.split(".")[0]
        if top == "launch":
            yield f"{path} imports {name}: nothing imports launch"
        if top in FOREIGN and not path.startswith(f"moe_dist/{FOREIGN[top]}"):
            yield f"{path} imports {name}: only moe_dist/{FOREIGN[top]} may"
        if top == "moe_dist" and unit:
            target = unit_of(name.removeprefix("moe_dist."))
            if target not in ALLOWED[unit] | {unit, "errors"}:
                yield f"{path} imports {name}: {unit} may import {sorted(ALLOWED[unit])} only"


def test_every_file_keeps_the_directions():
    files = [path for folder in ("moe_dist", "launch") for path in sorted((ROOT / folder).rglob("*.py"))]
    assert len(files) > 10
    found = [line for file in files for line in violations(str(file.relative_to(ROOT)), file.read_text())]
    assert not found, "\n".join(found)


def test_every_module_has_a_rule():
    modules = {path.stem if path.is_file() else path.name for path in (ROOT / "moe_dist").iterdir()}
    assert modules - {"__init__", "__pycache__", "parts", "train"} <= {unit.split(".")[0] for unit in ALLOWED}


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("moe_dist/config/recipe.py", "from moe_dist.core.batch import Batch"),
        ("moe_dist/core/batch.py", "import moe_dist.config.recipe"),
        ("moe_dist/core/routing_plan.py", "from moe_dist import batch"),
        ("moe_dist/model/moe/router.py", "def f():\n    from moe_dist.model.block import Block"),
        ("moe_dist/losses/balance.py", "from moe_dist.model.moe.router import Router"),
        ("moe_dist/corpora/emoji.py", "from ...telemetry import sinks"),
        ("moe_dist/telemetry/__init__.py", "from ..engine.zero import Engine"),
        ("moe_dist/training/deepspeed.py", "if TYPE_CHECKING:\n    import moe_dist.model.transformer"),
        ("moe_dist/parallel/layout.py", "from moe_dist import train"),
        ("moe_dist/model/block.py", "from megatron.core.transformer import TransformerConfig"),
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
        ("moe_dist/model/mcore.py", "from megatron.core import parallel_state\nfrom moe_dist.core.errors import UserError"),
        ("moe_dist/training/deepspeed.py", "import deepspeed\nfrom ..parallel.layout import Layout"),
        ("moe_dist/losses/balance.py", "from moe_dist.core.routing_plan import RoutingRecord\nfrom .language import x"),
        ("moe_dist/training/run.py", "from moe_dist.training.deepspeed import make_engine"),
        ("launch/train.py", "from moe_dist.training.run import train\nimport deepspeedometer"),
    ],
)
def test_an_allowed_import_passes(path, source):
    assert not list(violations(path, source))
