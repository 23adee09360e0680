"""Files and folders appear complete or not at all, a reader of JSON or safetensors is told what is wrong, no torch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from moe_dist.core import files
from moe_dist.core.errors import UserError, did_you_mean
from moe_dist.core.files import new_file, new_folder, partial_path, put_in_place, read_json, write_file, write_json
from moe_dist.core.tensor_files import read_safetensors
from tests.support import ROOT
from tests.support.permissions import unprivileged


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("shared", [False, True])
def test_a_file_is_replaced_as_a_whole(shared, tmp_path):
    path = tmp_path / "status.json"
    for content in ("first", "señor", b"\x00\xff"):
        write_file(path, content, shared=shared)
        assert path.read_bytes() == (content if isinstance(content, bytes) else content.encode())
        assert names(tmp_path) == ["status.json"]
    with pytest.raises(ZeroDivisionError), new_file(path, shared=shared) as partial:
        partial.write_text("half a fi")
        assert names(tmp_path) == sorted([partial.name, "status.json"])
        print(1 / 0)
    assert names(tmp_path) == ["status.json"] and path.read_bytes() == b"\x00\xff"


@pytest.mark.parametrize("shared", [False, True])
def test_a_folder_appears_when_it_is_complete(shared, tmp_path):
    path = tmp_path / "deep" / "corpus"
    with pytest.raises(KeyboardInterrupt), new_folder(path, shared=shared) as partial:
        (partial / "a").write_text("a")
        raise KeyboardInterrupt
    assert names(tmp_path / "deep") == []
    partial_path(path, shared=shared).mkdir()
    (partial_path(path, shared=shared) / "left by a killed writer").write_text("")
    path.mkdir()  # an empty folder may be in the place
    with new_folder(path, shared=shared) as partial:
        (partial / "inner").mkdir()
        (partial / "inner" / "b").write_text("b")
        assert names(path) == []
    assert names(path) == ["inner"] and names(tmp_path / "deep") == ["corpus"]
    with pytest.raises(OSError, match="not empty"), new_folder(path, shared=shared):
        pass
    assert names(path) == ["inner"] and names(tmp_path / "deep") == ["corpus"]


def test_processes_that_share_a_path_write_apart(tmp_path):
    mine = partial_path(tmp_path / "shard", shared=True)
    assert str(os.getpid()) in mine.name and mine.name.startswith(".shard.")
    assert partial_path(tmp_path / "step_00000003") == tmp_path / "step_00000003.tmp"


def test_the_disk_has_everything_before_the_rename_and_the_rename_after_it(tmp_path, monkeypatch):
    events = []
    rename, sync = Path.rename, files._sync
    monkeypatch.setattr(files, "_sync", lambda path: (events.append(path.name), sync(path)))
    monkeypatch.setattr(Path, "rename", lambda path, target: (events.append("rename"), rename(path, target)))
    with new_folder(tmp_path / "out") as partial:
        (partial / "a").write_text("a")
    assert events == ["a", "out.tmp", "rename", tmp_path.name]
    events.clear()
    write_file(tmp_path / "b", "b")
    assert events == ["b.tmp", "rename", tmp_path.name]
    events.clear()
    (tmp_path / "c.tmp").mkdir()
    put_in_place(tmp_path / "c.tmp", tmp_path / "c")
    assert events == ["c.tmp", "rename", tmp_path.name]


def test_json_that_cannot_be_read_is_one_sentence(tmp_path):
    path = tmp_path / "config.json"
    stored = write_json(path, {"a": "ü"})
    assert read_json(path) == {"a": "ü"} and stored.size == path.stat().st_size
    for content in (b"{", b"\xff", b""):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"config\.json is missing or is not JSON$"):
            read_json(path)
    path.write_text("[1]")
    with pytest.raises(UserError, match=r"config\.json holds no JSON mapping"):
        read_json(path)
    for nowhere in (tmp_path / "none.json", path / "below a file"):
        with pytest.raises(UserError, match="is missing or is not JSON"):
            read_json(nowhere)
    with pytest.raises(UserError, match="cannot be read: Is a directory"):
        read_json(tmp_path)
    path.chmod(0)
    with unprivileged(), pytest.raises(UserError, match=r"config\.json cannot be read: Permission denied"):
        read_json(path)


def test_safetensors_that_cannot_be_read_are_one_sentence(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"vqmodel.a": torch.ones(2), "b": torch.zeros(1)}, path)
    assert read_safetensors(path).keys() == {"vqmodel.a", "b"}
    only = read_safetensors(path, after="vqmodel.")
    assert only.keys() == {"a"} and only["a"].tolist() == [1, 1]
    path.write_bytes(path.read_bytes()[:-1])
    for bad in (path, tmp_path / "none.safetensors"):
        with pytest.raises(UserError, match=rf"{bad.name} is missing, damaged or not a safetensors file: ."):
            read_safetensors(bad)


def test_a_misspelt_name_gets_a_hint():
    assert did_you_mean("stpes", ["steps", "warmup"]) == " (did you mean 'steps'?)"
    assert did_you_mean("x", {"steps": 1}) == did_you_mean("steps", ()) == ""


def test_what_runs_before_the_ranks_imports_no_torch():
    code = "import sys, launch.job; assert 'torch' not in sys.modules; print('lean')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout == "lean\n", done.stderr
