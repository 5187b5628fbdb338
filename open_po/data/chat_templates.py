"""Chat templates for tokenizers that bring none, or for training on another."""

from __future__ import annotations

from pathlib import Path

from open_po.errors import UserError

# The format of the Tulu models: plain-text role markers and the tokenizer's own EOS, so no new tokens are needed.
_TULU = """\
{% if bos_token %}{{ bos_token }}{% endif %}\
{% for message in messages %}\
{% if message['role'] in ('system', 'user') %}{{ '<|' + message['role'] + '|>\\n' + message['content'] + '\\n' }}\
{% elif message['role'] == 'assistant' %}\
{{ '<|assistant|>\\n' + message['content'] + eos_token }}{% if not loop.last %}{{ '\\n' }}{% endif %}\
{% else %}{{ raise_exception('the tulu template has no role ' + message['role']) }}{% endif %}\
{% endfor %}\
{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"""

# ChatML, as Qwen and EuroLLM have it. A tokenizer should have its two markers as tokens, and <|im_end|> as EOS.
_CHATML = """\
{% for message in messages %}\
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}\
{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

# The format of Zephyr and of the alignment handbook: every turn ends with EOS.
_ZEPHYR = """\
{% for message in messages %}\
{% if message['role'] not in ('system', 'user', 'assistant') %}\
{{ raise_exception('the zephyr template has no role ' + message['role']) }}{% endif %}\
{{ '<|' + message['role'] + '|>\\n' + message['content'] + eos_token + '\\n' }}\
{% endfor %}\
{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"""

CHAT_TEMPLATES = {"tulu": _TULU, "chatml": _CHATML, "zephyr": _ZEPHYR}


def chat_template(name: str) -> str:
    """The template called `name`, or the text of the file `name`. Raises UserError."""
    if name in CHAT_TEMPLATES:
        return CHAT_TEMPLATES[name]
    try:
        return Path(name).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"chat_template_name {name!r} is none of {', '.join(CHAT_TEMPLATES)}, and no readable file "
            f"({error.strerror if isinstance(error, OSError) else error})"
        ) from error
