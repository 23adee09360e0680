"""Small tasks of lm_eval on the emoji of the fixtures, and a run's parts to answer them, in Hugging Face's form too."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer

from moe_dist.checkpoint.checkpoint import read_state
from moe_dist.checkpoint.stored_weights import fill_model
from moe_dist.config.recipe import ModelConfig
from moe_dist.convert.hugging_face import export_folder, import_folder
from moe_dist.core.strict import validate
from moe_dist.corpora.choice_corpus import MultipleChoice, balanced, with_wrong_options
from moe_dist.corpora.choice_tasks import emoji_questions
from moe_dist.data.shards.tars import write_shards
from moe_dist.data.tasks.task_files import TaskFilesRecipe, write_task_files
from moe_dist.data.tokenizers.text_tokenizer import load_text_tokenizer
from moe_dist.data.tokenizers.vocabulary import Vocabulary
from moe_dist.harness.answering import AnsweringModel
from moe_dist.harness.task_suite import Results, TaskSettings, TaskSuite
from moe_dist.model.transformer import Transformer
from moe_dist.parallel.layout import Layout, make_layout
from tests.support.corpus import EMOJI

CONTEXT = 96  # shorter than a question with its examples
CHAT = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
ASK = {"dataset_path": "json", "test_split": "test", "fewshot_split": "test", "target_delimiter": " "}
MEAN = {"aggregation": "mean", "higher_is_better": True}
OTHER_TASKS = {  # every kind of request
    "rolling": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{prompt}}",
        "metric_list": [{"metric": "bits_per_byte"}],
    },
    "continued": {
        "output_type": "generate_until",
        "doc_to_text": "prompt",
        "doc_to_target": "{{options[correct]}}",
        "generation_kwargs": {"until": ["\n", " a"], "max_gen_toks": 12},
        "metric_list": [{"metric": "exact_match", **MEAN}],
    },
    "without_context": {
        "output_type": "multiple_choice",
        "doc_to_text": "",
        "doc_to_choice": "options",
        "doc_to_target": "correct",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc", **MEAN}],
    },
}


def write_choice_shards(folder: Path, answer: str = "letter") -> Path:
    """Write the emoji questions of the fixtures as shards: 51 train, 12 validation, 12 test."""
    captions = json.loads((EMOJI / "captions.json").read_text())
    parts = {code: re.fullmatch(r"(.*?)\. (.*)\. \((.*): (.*)\)", caption) for code, caption in captions.items()}
    emoji = {
        code: {"label": found[1], "keywords": found[2].split(", "), "group": found[3]}
        for code, found in parts.items()
        if found
    }
    corpus = MultipleChoice(answer=answer)
    write_shards([corpus.sample(e) for e in balanced(with_wrong_options([*emoji_questions(emoji)]), None)], folder)
    return folder


def write_tasks(folder: Path) -> list[str]:
    """Write tasks of every kind of request. Returns their YAML files."""
    for answer in ("letter", "text"):
        shards = write_choice_shards(folder / f"{answer}_shards", answer)
        write_task_files(TaskFilesRecipe(shards=str(shards), out=str(folder / answer), split="train"))
    for name, task in OTHER_TASKS.items():
        files = {"test": str(folder / "text" / "emoji.jsonl")}
        content = ASK | {"task": name, "dataset_kwargs": {"data_files": files}} | task
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(content))
    own = [folder / answer / f"{answer}.yaml" for answer in ("letter", "text")]
    return [str(file) for file in (*own, *(folder / f"{name}.yaml" for name in OTHER_TASKS))]


def save_tokenizer(folder: Path, texts: list[str]) -> int:
    """Write a byte-level tokenizer that begins texts with BOS and has a chat template. Returns its size."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<pad>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": CHAT, "padding_side": "left"}
    names = {f"{name}_token": token for name, token in zip(("bos", "eos", "pad"), special)}
    (folder / "tokenizer_config.json").write_text(json.dumps(config | names))
    return tokenizer.get_vocab_size()


def save_family(save, folder: Path) -> Path:
    """Write a random model with a tokenizer as a Hugging Face folder. save: save_llama or save_mixtral."""
    captions = list(json.loads((EMOJI / "captions.json").read_text()).values())
    size = save_tokenizer(folder, captions)
    save(folder, vocab_size=size, bos_token_id=0, eos_token_id=1)
    return folder


def import_and_export(folder: Path, out: Path) -> tuple[Path, Path]:
    """Return the checkpoint of a Hugging Face folder, and the checkpoint's own export."""
    import_folder(folder, out / "checkpoint")
    export_folder(out / "checkpoint", out / "exported")
    return out / "checkpoint", out / "exported"


def answering_model(checkpoint: Path, layout: Layout, **changes) -> AnsweringModel:
    vocabulary = Vocabulary(load_text_tokenizer(checkpoint / "tokenizer"))
    section = validate(ModelConfig, read_state(checkpoint)["config"]["model"], "test")
    model = Transformer(section, vocabulary.size, layout, seed=99).eval()
    fill_model(model, checkpoint, layout)
    settings = {"context": CONTEXT, "budget": 3 * CONTEXT} | changes
    return AnsweringModel(model=model, vocabulary=vocabulary, layout=layout, **settings)


def our_results(rank: int, checkpoint: Path, settings: TaskSettings) -> Results:
    """Evaluate our model. With rank -1 in one process, otherwise on all ranks, which together hold the experts."""
    layout = Layout() if rank < 0 else make_layout(expert=2, device=torch.device("cpu"))
    suite = TaskSuite.load(settings, is_main=layout.is_main)
    results = suite.evaluate(answering_model(checkpoint, layout), str(checkpoint / "tokenizer"))
    return {key: results[key] for key in ("results", "samples") if key in results}


def reference_results(exported: Path, settings: TaskSettings) -> Results:
    """Evaluate the exported model with lm_eval's own model of Hugging Face folders."""
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    model = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(exported)
    # With larger batches, HFLM's text of a document that ends early goes on until the whole batch has ended.
    theirs = HFLM(pretrained=model, tokenizer=tokenizer, max_length=CONTEXT, batch_size=1)
    loaded = TaskSuite.load(settings, is_main=True).loaded
    chat = {"apply_chat_template": settings.chat, "fewshot_as_multiturn": settings.chat}
    return evaluate(theirs, loaded, limit=settings.limit, **chat)


def compare_answers(ours: Results, theirs: Results) -> dict[str, int]:
    """Compare every answer. Returns the numbers of compared answers and of those with a margin below 2e-4.

    Log-likelihoods must be equal to 1e-4, or to four roundings of the reference's sum in float32. A choice must be the
    same if the reference's best two options differ by more than 2e-4.
    """
    counts = {"log-likelihoods": 0, "texts": 0, "choices": 0, "close choices": 0}
    assert ours["samples"].keys() == theirs["samples"].keys()
    for task, expected in theirs["samples"].items():
        for mine, other in zip(ours["samples"][task], expected, strict=True):
            assert mine["arguments"] == other["arguments"]
            answers = list(zip(_flat(mine["resps"]), _flat(other["resps"]), strict=True))
            for one, two in answers:
                if isinstance(two, str):
                    counts["texts"] += 1
                    assert one == two, f"{task}: {one!r} instead of {two!r}"
                    continue
                counts["log-likelihoods"] += 1
                (one, *greedy), (two, *greedy_too) = (a if isinstance(a, tuple) else (a,) for a in (one, two))
                assert abs(one - two) <= max(1e-4, 2**-21 * abs(two)), f"{task}: {one} instead of {two}"
                assert greedy == greedy_too, task
            if "acc" in other:
                best = sorted((two[0] for _, two in answers), reverse=True)
                close = best[0] - best[1] <= 2e-4
                counts["close choices" if close else "choices"] += 1
                assert close or mine["acc"] == other["acc"], task
    return counts


def _flat(responses):
    return [answer for repeated in responses for answer in repeated]
