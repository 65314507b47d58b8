"""The bundled model's tokenizer: byte-level BPE over the shapes world's sentences.

It can spell any text, and nearly every word of the shapes world is one token.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from janusflow.data.shapes.language import ask, describe
from janusflow.data.shapes.scene import sample_scene
from janusflow.files import atomic_folder, write_json
from janusflow.processing.tokenizer import BOS_TOKEN, EOS_TOKEN, PAD_TOKEN, SPECIAL_TOKENS


def write_tokenizer(folder: Path, vocab_size: int) -> None:
    """Trains the tokenizer and writes it as the published models have theirs on disk."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=[AddedToken(tag, special=True, normalized=False) for tag in SPECIAL_TOKENS],
        show_progress=False,
    )
    tokenizer.train_from_iterator(_sentences(), trainer)
    with atomic_folder(folder) as scratch:
        tokenizer.save(str(scratch / "tokenizer.json"))
        names = {"bos_token": BOS_TOKEN, "eos_token": EOS_TOKEN, "pad_token": PAD_TOKEN}
        write_json(
            scratch / "tokenizer_config.json", {"tokenizer_class": "LlamaTokenizerFast", **names}
        )
        write_json(scratch / "special_tokens_map.json", names)


def _sentences() -> Iterator[str]:
    rng = np.random.default_rng(0)
    for _ in range(5000):
        scene = sample_scene(rng)
        yield f"User: {describe(scene, rng).text}\n\nAssistant:"
        for question in ask(scene, rng):
            yield f"User: {question.text}\n\nAssistant: {question.answer}"
