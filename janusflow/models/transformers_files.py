"""What stands beside a Janus model for transformers' processor and `generate`.

Made of the published files in the same folder; knows file contents only.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from janusflow.files import write_json
from janusflow.models.configuration import JanusFlowConfig

_TAGS = {
    "image_token": "<image_placeholder>",
    "boi_token": "<begin_of_image>",
    "eoi_token": "<end_of_image>",
}
_CHAT_TEMPLATE = """\
{%- set roles = {'user': '@USER', 'assistant': '@ASSISTANT'} -%}
{%- for message in messages -%}
{%- if message['role'] == 'system' -%}
{%- for part in message['content'] -%}{{ part['text'] }}{%- endfor -%}{{ '\\n\\n' }}
{%- else -%}
{{ roles[message['role']] + ': ' }}
{%- if message['content'] is string -%}{{ message['content'] | trim }}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}{{ '<image_placeholder>\\n' }}
{%- elif part['type'] == 'text' -%}{{ part['text'] | trim }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{ '\\n\\n' if message['role'] == 'user' else '<｜end▁of▁sentence｜>' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ roles['assistant'] + ':' }}{%- endif -%}
"""


def write_transformers_files(folder: Path, config: JanusFlowConfig) -> None:
    """Rewrites the published files of a folder; one without a tokenizer is left as it is."""
    if not (folder / "tokenizer.json").is_file():
        return
    known = _known_tokens(folder)
    vision: Any = config.vision_config
    text: Any = config.text_config
    pictures = _read(folder / "preprocessor_config.json")
    side = pictures.get("image_size", vision.image_size)
    kept = ("image_mean", "image_std", "min_size", "rescale_factor", "do_normalize")
    write_json(
        folder / "preprocessor_config.json",
        {
            "image_processor_type": "JanusImageProcessor",
            "processor_class": "JanusProcessor",
            "size": {"height": side, "width": side},
            "resample": 3,
            "do_resize": True,
            "do_rescale": True,
            "do_pad": True,
            **{key: pictures[key] for key in kept if key in pictures},
        },
    )
    write_json(
        folder / "processor_config.json",
        {
            "processor_class": "JanusProcessor",
            "num_image_tokens": config.num_understanding_tokens,
            "use_default_system_prompt": False,
        },
    )
    tokens = {**_read(folder / "tokenizer_config.json"), **_TAGS, "extra_special_tokens": _TAGS}
    # Not the published "LlamaTokenizer": that class is a SentencePiece one, this file byte-level.
    tokens |= {"tokenizer_class": "PreTrainedTokenizerFast", "processor_class": "JanusProcessor"}
    tokens |= {"pad_token": "<｜▁pad▁｜>", "bos_token": "<｜begin▁of▁sentence｜>"}
    tokens.pop("chat_template", None)
    write_json(folder / "tokenizer_config.json", tokens)
    pro = "<|User|>" in known
    template = _CHAT_TEMPLATE.replace("@USER", "<|User|>" if pro else "User")
    template = template.replace("@ASSISTANT", "<|Assistant|>" if pro else "Assistant")
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    write_json(
        folder / "generation_config.json",
        {
            "bos_token_id": text.bos_token_id,
            "eos_token_id": text.eos_token_id,
            "pad_token_id": config.pad_token_id,
            "guidance_scale": 5,
            "temperature": 1.0,
            "generation_kwargs": {"boi_token_id": known.get(_TAGS["boi_token"])},
        },
    )


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _known_tokens(folder: Path) -> dict[str, int]:
    added = _read(folder / "tokenizer.json").get("added_tokens", [])
    return {token["content"]: token["id"] for token in added}
