"""Small Hugging Face tokenizers with chat templates, and conversations, for tests of instruction data."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<|endoftext|>", "<|begin|>", "<|im_start|>", "<|im_end|>"]
WORDS = "user assistant system hello there what is the colour of a small red bear on the hill it is green 1 2 3 : . ?"

# Each marks its answers with {% generation %}, for transformers' own mask.
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content + '<|im_end|>\\n' }}{% endgeneration %}"
    "{% else %}{{ m.content + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LLAMA3 = (  # begins with BOS and trims the messages
    "{{ bos_token }}{% for m in messages %}{{ '<|im_start|>' + m['role'] + '<|im_start|>\\n\\n' }}"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] | trim + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ m['content'] | trim + '<|im_end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_start|>\\n\\n' }}{% endif %}"
)
LLAMA2 = (  # each answer ends with EOS; the roles must alternate
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{% generation %}{{ ' ' + m.content + eos_token }}{% endgeneration %}{% endif %}{% endfor %}"
)
VICUNA = (  # writes no special token at all
    "{% for m in messages %}{% if m.role == 'assistant' %}"
    "{{ 'ASSISTANT:' }}{% generation %}{{ ' ' + m.content + '\\n' }}{% endgeneration %}"
    "{% else %}{{ m.role | upper + ': ' + m.content + '\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
QWEN3 = (  # the last answer, and no other, begins with empty thoughts
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}{% if m.role == 'assistant' %}"
    "{% generation %}{% if loop.last %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}"
    "{{ m.content + '<|im_end|>\\n' }}{% endgeneration %}"
    "{% else %}{{ m.content + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
TEMPLATES = {"chatml": CHATML, "llama3": LLAMA3, "llama2": LLAMA2, "vicuna": VICUNA, "qwen3": QWEN3}


def save_chat_tokenizer(folder: Path, template: str | None = CHATML, *, bos: bool = True) -> Path:
    """Write a byte-level tokenizer with a chat template to a folder. bos: whether it has a BOS token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([WORDS] * 4, trainer)
    named = {"eos_token": "<|endoftext|>"} | ({"bos_token": "<|begin|>"} if bos else {})
    theirs = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named)
    theirs.chat_template = template
    for old in folder.glob("*template*"):
        old.unlink()
    theirs.save_pretrained(folder)
    return folder


def conversation(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    """Return messages of user and assistant in turn, after a system message if it is given."""
    first = [] if system is None else [{"role": "system", "content": system}]
    return first + [
        {"role": "assistant" if i % 2 else "user", "content": content} for i, content in enumerate(contents)
    ]


def write_lines(path: Path, records: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path
