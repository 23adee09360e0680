"""No file that is read is ever unpickled: a payload that would leave a trace when unpickled leaves none."""

import hashlib
import json
import pickle
import sys
from pathlib import Path

import pytest
import torch

from moe_dist.checkpoint.manifest import read_state
from moe_dist.checkpoint.stored_weights import read_tensors
from moe_dist.config.recipe import InitFrom
from moe_dist.convert.hugging_face import import_folder
from moe_dist.convert.inspection import inspect
from moe_dist.core.errors import UserError
from tests.support.checkpoint_jobs import Job, attempt, run_on_rank
from tests.support.distributed import run_ranks

SEEN: list[str] = []


class Payload:
    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return Path.touch, (self.trace,)


def watch():
    """Every global that any unpickler of this process looks up from now on is kept in SEEN, but for those in what ranks
    send each other: torch.distributed pickles the plans. (A hook stays for ever.)"""

    def note(event, arguments):
        if event == "pickle.find_class":
            frame = sys._getframe(1)
            while frame and frame.f_code.co_name != "_tensor_to_object":
                frame = frame.f_back
            if frame is None:
                SEEN.append(".".join(map(str, arguments)))

    if not SEEN:
        SEEN.append("watching")
        sys.addaudithook(note)
    del SEEN[1:]


def _load_watched(rank, job):
    watch()
    run_on_rank(rank, job)
    found = SEEN[1:]
    pickle.loads(pickle.dumps(Path("the watch works")))
    return found, SEEN[1:]


def test_a_load_reaches_no_unpickler(saved):
    job, _ = saved
    assert {path.suffix for path in Path(job.save).iterdir()} == {".json", ".safetensors"}
    alone = {"world": 1, "expert": 1}
    for load in (job.resumed(**alone), Job(init=InitFrom(checkpoint=job.save), **alone)):
        [(found, afterwards)] = run_ranks(_load_watched, 1, load)
        assert found == [] and afterwards, "the watch sees no pickle at all"


def forge(folder, name, content):
    """Put a file into a checkpoint, and its size and checksum into the manifest, as an attacker would."""
    (folder / name).write_bytes(content)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def pickled(tmp_path, kind):
    payload, file = Payload(tmp_path / "TRACE"), tmp_path / "payload"
    if kind == "torch.save":
        torch.save(payload, file)
        return file.read_bytes()
    return pickle.dumps(payload)


@pytest.mark.parametrize("kind", ["pickle", "torch.save"])
@pytest.mark.parametrize("name", ["rank_00001.safetensors", "weights.pt", "index.json", "state.json", "manifest.json"])
def test_a_planted_payload_is_refused(name, kind, copied, tmp_path):
    folder, job = copied
    content = pickled(tmp_path, kind)
    if name == "manifest.json":
        (folder / name).write_bytes(content)
    else:
        forge(folder, name, content)
    if name == "weights.pt":  # vouched for, and named as the place of a tensor
        index = json.loads((folder / "index.json").read_text())
        index["tensors"]["master/embedding.weight"]["pieces"][0][2] = name
        forge(folder, "index.json", json.dumps(index).encode())
    for sentence in run_ranks(attempt, 2, job):
        assert sentence and name.partition(".")[0] in sentence
    for read in (read_tensors, lambda path: inspect(path, print), read_state):
        try:
            found = read(folder)
            for tensor in found.values() if read is read_tensors else ():
                tensor.read()
        except Exception as error:
            assert isinstance(error, UserError), error
    assert not (tmp_path / "TRACE").exists()


def test_an_index_leads_to_no_file_that_the_manifest_does_not_name(copied):
    folder, job = copied
    (folder / "aside.safetensors").write_bytes((folder / "rank_00000.safetensors").read_bytes())
    index = json.loads((folder / "index.json").read_text())
    index["tensors"]["master/embedding.weight"]["pieces"][0][2] = "aside.safetensors"
    forge(folder, "index.json", json.dumps(index).encode())
    for sentence in run_ranks(attempt, 2, job):
        assert "index.json names the file aside.safetensors, which the manifest does not list" in sentence


def test_a_planted_hugging_face_file_is_refused(tmp_path):
    (tmp_path / "hf").mkdir()
    sizes = dict.fromkeys(
        ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"), 8
    )
    (tmp_path / "hf" / "config.json").write_text(json.dumps({"model_type": "llama", **sizes, "num_attention_heads": 2}))
    content = pickled(tmp_path, "torch.save")
    for name, sentence in (
        ("pytorch_model.bin", "but no .safetensors file, and pickled weights are not read"),
        ("model.safetensors", "not a safetens"),
    ):
        (tmp_path / "hf" / name).write_bytes(content)
        with pytest.raises(UserError, match=sentence):
            import_folder(tmp_path / "hf", tmp_path / "out")
    assert not (tmp_path / "TRACE").exists()


def test_the_payload_would_leave_its_trace(tmp_path):
    pickle.loads(pickled(tmp_path, "pickle"))
    assert (tmp_path / "TRACE").exists()
