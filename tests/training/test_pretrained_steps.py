"""Steps of SGD from a folder of every family, over two ranks and all ZeRO stages, equal those of the reference."""

import pytest
import torch

from moe_dist.core.batch import Batch
from tests.convert.test_families import CASES, step
from tests.data.tokenizers.test_hugging_face_text import save as save_tokenizer
from tests.support.distributed import run_ranks
from tests.support.family_models import save_model
from tests.support.hugging_face_models import as_documents, random_documents
from tests.support.toy_model import objective
from tests.training.test_pretrained_start import recipe, started_engine

RATE = 0.02  # as in `step`
STEPS = 4
RUNS = {  # case: ZeRO stage, expert-parallel ranks, trainable parameters (their names in the reference)
    "llama, biases, llama3, tied": (3, 1, ""),
    "mistral, window": (1, 1, ""),
    "qwen2, windows above": (2, 1, ""),
    "qwen3, windows": (3, 1, ""),
    "mixtral": (1, 2, ""),
    "olmoe, biases, tied": (3, 2, ""),
    "olmoe, clipped, renormalised": (2, 1, ".mlp.gate."),
    "qwen3_moe, window, a dense layer": (2, 2, ""),
    "qwen2_moe": (3, 2, ""),
    "qwen2_moe, windows, dense layers": (1, 2, ".mlp.gate."),
    "deepseek": (3, 2, ""),
}


def batch_of(documents):
    """Pack documents into a micro-batch whose predictions are all tokens but the first of each document."""
    tokens_T, info = as_documents(documents)
    last_T = torch.cat([torch.arange(len(ids)) == len(ids) - 1 for ids in documents])
    return Batch(
        tokens_T=tokens_T,
        targets_T=tokens_T.roll(-1),
        loss_mask_T=~last_T,
        target_modality_T=torch.zeros_like(tokens_T),
        info=info,
    )


def losses_on_rank(rank, config):
    """Take steps on this rank's share of the documents. Return the loss before each."""
    engine, layout, _ = started_engine(config)
    losses = []
    for seed in range(STEPS):
        documents = [ids for ids in random_documents(seed=seed) if len(ids) > 1]
        result = engine.train_step([batch_of(documents[layout.rank :: layout.world])], objective, RATE)
        losses.append(result.loss_sums["loss"] / result.counts["loss"])
    return losses


@pytest.mark.parametrize(("case", "run"), RUNS.items(), ids=RUNS)
def test_losses_equal_those_of_the_references_own_loop(case, run, tmp_path):
    (kind, changes), (stage, expert, trained) = CASES[case], run
    theirs = save_model(kind, tmp_path / "hf", vocab_size=304, **changes)
    save_tokenizer(tmp_path / "hf", bos_token="<|start|>", eos_token="<|end|>")
    section = {
        "optimizer": {"type": "SGD", "params": {}},
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
    }
    patterns = {"trainable": ["*.router.*"]} if trained else {}
    train = {"steps": STEPS, "global_batch_groups": 2}
    config = recipe(tmp_path / "hf", expert=expert, deepspeed=section, train=train, **patterns)
    chosen = [parameter for name, parameter in theirs.named_parameters() if trained in name]
    expected = [step(theirs, chosen, seed) for seed in range(STEPS)]
    for losses in run_ranks(losses_on_rank, 2, config):
        assert losses == pytest.approx(expected, abs=1e-5)
    assert abs(expected[0] - expected[-1]) > 1e-2
