"""Forms of instruction records, each compared with a rendering written out by hand."""

import pytest

from moe_dist.core.errors import UserError
from moe_dist.data.tasks.instructions import Message
from moe_dist.data.tasks.records import BadRecord, form_of, to_instruction

ALPACA_PROMPT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n### Instruction:\nName a fruit.\n\n### Response:"
)
ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\nSum {up}.\n\n### Input:\n1 {2} 3\n\n### Response:"
)
LLAVA = {
    "id": "000000033471",
    "image": "000000033471.jpg",
    "conversations": [
        {"from": "human", "value": "<image>\nWhat colour is it?"},
        {"from": "gpt", "value": "It is red."},
        {"from": "human", "value": "Why?"},
        {"from": "gpt", "value": "It is a bus."},
        {"from": "human", "value": "Really?"},
    ],
}
TALK = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Hi"}]


def read(record):
    return to_instruction(record, "shard a, sample 's'")


@pytest.mark.parametrize(
    ("record", "prompt", "answer"),
    [
        ({"instruction": "Name a fruit.", "input": "", "output": "Plum"}, ALPACA_PROMPT, " Plum"),
        ({"instruction": "Name a fruit.", "output": "Plum"}, ALPACA_PROMPT, " Plum"),
        ({"instruction": "Sum {up}.", "input": "1 {2} 3", "output": "6", "text": "unused"}, ALPACA_INPUT, " 6"),
        ({"prompt": "p:", "answer": " a"}, "p:", " a"),
        ({"prompt": "p:", "answer": " a", "messages": [], "instruction": "i", "output": "o"}, "p:", " a"),
    ],
)
def test_a_prompt_and_its_answer(record, prompt, answer):
    made = read(record)
    assert (made.prompt, made.answer, made.domain, made.messages) == (prompt, answer, "instructions", ())
    assert made.texts == (prompt + answer,)
    assert read({**record, "domain": "sums"}).domain == "sums"


def test_messages_up_to_the_last_answer():
    made = read({"prompt": "unused", "messages": [*TALK, {"role": "assistant", "content": "Ho"}, TALK[1]]})
    assert made.messages == (("system", "Be short."), ("user", "Hi"), ("assistant", "Ho"))
    assert (made.prompt, made.answer, made.picture) == ("Be short.\nHi", "Ho", False)
    parts = [{"type": "text", "text": "H"}, {"type": "image"}, {"type": "text", "text": "i"}]
    made = read({"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "Ho"}]})
    assert (made.prompt, made.picture) == ("Hi", True)


@pytest.mark.parametrize("named", [{"image": "a.png"}, {"images": ["a.png"]}, {"image": ["a.png"], "images": []}])
def test_messages_may_name_a_picture(named):
    messages = [{"role": "user", "content": "<image>\nHi"}, {"role": "assistant", "content": "Ho"}]
    assert read({"messages": messages, **named}).messages == (("user", "Hi"), ("assistant", "Ho"))
    assert read({"messages": messages, **named}).picture
    plain = read({"messages": messages})
    assert plain.prompt == "<image>\nHi" and not plain.picture, "without a picture's name it is text"


def test_conversations_of_llava():
    made = read(LLAVA)
    asked, answered = ("What colour is it?", "Why?"), ("It is red.", "It is a bus.")
    expected = [m for q, a in zip(asked, answered, strict=True) for m in (Message("user", q), Message("assistant", a))]
    assert list(made.messages) == expected and made.picture and made.prompt == asked[0]
    roles = {"conversations": [{"from": "human", "value": "a <image>"}, {"role": "assistant", "content": "b"}]}
    assert read(roles).picture and read(roles).prompt.strip() == "a"


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"messages": TALK}, "conversation without an answer"),
        ({"messages": []}, "conversation without an answer"),
        ({"messages": [{"role": "assistant", "content": "Ho"}]}, "conversation without a prompt"),
        ({"messages": [*TALK, {"role": "assistant", "content": None}]}, "conversation with an empty answer"),
        ({"messages": [*TALK, {"role": "assistant", "tool_calls": [{}]}]}, "message with tool_calls"),
        ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "message part of type audio"),
        ({"conversations": [{"from": "narrator", "value": "a"}]}, "conversation with the unknown speaker 'narrator'"),
        ({"instruction": "a", "output": " "}, "empty output"),
        (LLAVA | {"image": ["a", "b"]}, "conversation with several pictures"),
        ({"conversations": [{"from": "human", "value": "<image><image>"}]}, "conversation with several pictures"),
    ],
)
def test_records_without_anything_to_learn_are_bad(record, reason):
    with pytest.raises(BadRecord, match=f"^{reason}"):
        read(record)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (
            {"messages": [{"role": 3, "content": "a"}]},
            r"key 'messages\.0\.role': input should be a valid string, got 3",
        ),
        ({"messages": ["a"]}, r"key 'messages\.0': "),
        ({"messages": [{"content": "a"}]}, r"key 'messages\.0\.role' is missing"),
        ({"conversations": [{"from": "human"}]}, r"key 'conversations\.0\.value' is missing"),
        ({"conversations": [{"value": "a"}]}, r"key 'conversations\.0\.from' is missing"),
        ({"instruction": "", "output": "a"}, r"key 'instruction': is empty"),
        ({"instruction": "a", "output": 3}, r"key 'output': input should be a valid string, got 3"),
        ({"prompt": "a"}, r"key 'answer' is missing"),
        ({"prompt": "a", "answer": "b", "domain": 3}, r"key 'domain': "),
    ],
)
def test_a_wrong_field_is_named(record, message):
    with pytest.raises(UserError, match=rf"^shard a, sample 's': {message}") as error:
        read(record)
    assert "\n" not in str(error.value)


def test_records_of_no_form():
    for record in ({}, {"text": "a"}, {"instruction": "a"}, {"output": "a"}, {"messages": "a"}, {"conversations": 3}):
        assert form_of(record) is None
