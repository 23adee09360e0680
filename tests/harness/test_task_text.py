"""Chat templates of tasks that fail: one sentence, whatever the template raises."""

import json

import pytest

from moe_dist.core.errors import UserError
from moe_dist.harness.task_text import HuggingFaceTaskText
from tests.data.tokenizers.test_hugging_face_text import save as save_tokenizer

MESSAGES = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "a bear"}]
FAILING = {
    "{{ raise_exception('roles must alternate') }}": "fails: roles must alternate",
    "{% for m in %}": "fails: Expected an expression",
    "{{ messages[9].content }}": "fails: list object has no element 9",
    "{{ messages[0].content + 3 }}": "fails: can only concatenate str",
    None: "has no chat template",
}


def text_with(folder, template):
    save_tokenizer(folder, bos_token="<|start|>", eos_token="<|end|>")
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | ({"chat_template": template} if template else {})))
    return HuggingFaceTaskText(str(folder))


@pytest.mark.parametrize(("template", "sentence"), FAILING.items(), ids=FAILING.values())
def test_a_template_that_fails_is_one_sentence(template, sentence, tmp_path):
    text = text_with(tmp_path, template)
    with pytest.raises(UserError, match=sentence) as error:
        text.chat(MESSAGES, prompt=True)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_a_system_message_that_the_template_refuses_is_left_out(tmp_path):
    refuses = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    text = text_with(tmp_path, refuses + "{% for m in messages %}[{{ m.content }}]{% endfor %}")
    assert text.chat(MESSAGES, prompt=True) == "[a bear]"
