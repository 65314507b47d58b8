"""A model folder in the published layout, with a small byte-level tokenizer made on the fly."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing

from janusflow.processing.processor import JanusFlowProcessor
from janusflow.processing.tokenizer import SPECIAL_TOKENS

CORPUS = [
    "User: a red circle above a blue square\n\nAssistant: yes, the circle is above.",
    "What colour is the square? How many circles are there? Where is the blue one?",
    "You are a helpful language and vision assistant.",
] * 4


def write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def make_backend(specials: tuple[str, ...] = SPECIAL_TOKENS) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[AddedToken(tag, special=True, normalized=True) for tag in specials],
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    # The published file adds the begin-of-sentence token by itself; ours must not come twice.
    bos = specials[0]
    tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    return tokenizer


def write_model_folder(folder: Path, backend: Tokenizer) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "LlamaTokenizerFast",
            "add_bos_token": True,
            "bos_token": {"__type": "AddedToken", "content": SPECIAL_TOKENS[0]},
            "model_max_length": 16384,
            "legacy": True,
        },
    )
    write_json(
        folder / "special_tokens_map.json",
        {
            "bos_token": SPECIAL_TOKENS[0],
            "eos_token": SPECIAL_TOKENS[1],
            "pad_token": SPECIAL_TOKENS[2],
            "additional_special_tokens": ["<image_placeholder>"],
        },
    )
    write_json(
        folder / "processor_config.json",
        {
            "processor_class": "VLChatProcessor",
            "sft_format": "deepseek",
            "image_tag": "<image_placeholder>",
            "image_start_tag": "<begin_of_image>",
            "image_end_tag": "<end_of_image>",
            "num_image_tokens": 4,
            "add_special_token": False,
            "ignore_id": -100,
            "mask_prompt": True,
        },
    )
    write_json(
        folder / "preprocessor_config.json",
        {
            "processor_class": "VLChatProcessor",
            "image_processor_type": "VLMImageProcessor",
            "image_size": 32,
            "min_size": 14,
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
            "rescale_factor": 0.00392156862745098,
            "do_normalize": True,
            "background_color": [127, 127, 127],
        },
    )
    write_json(folder / "config.json", {"model_type": "multi_modality"})
    return folder


@pytest.fixture(scope="session")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Not to be changed: `folder` is a copy that may be."""
    return write_model_folder(tmp_path_factory.mktemp("published"), make_backend())


@pytest.fixture
def folder(published: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(published, tmp_path / "model"))


@pytest.fixture(scope="session")
def processor(published: Path) -> JanusFlowProcessor:
    return JanusFlowProcessor.from_pretrained(published)


@pytest.fixture
def write_folder(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes a folder whose tokenizer has just these special tokens."""

    def write(specials: tuple[str, ...], name: str = "other") -> Path:
        return write_model_folder(tmp_path / name, make_backend(specials))

    return write


@pytest.fixture
def edit_json() -> Callable[..., None]:
    """Return a function that sets keys of a JSON file; None removes one."""

    def edit(path: Path, **changes: object) -> None:
        content = json.loads(path.read_text(encoding="utf-8")) | changes
        write_json(path, {key: value for key, value in content.items() if value is not None})

    return edit
