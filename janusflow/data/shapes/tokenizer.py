"""The bundled model's tokenizer: byte-level BPE over the shapes world's sentences.

It can spell any text, and every word of the shapes world is one token.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from janusflow.data.shapes.language import ask, describe
from janusflow.data.shapes.scene import sample_scene
from janusflow.files import atomic_folder, write_json
from janusflow.processing.tokenizer import BOS_TOKEN, EOS_TOKEN, PAD_TOKEN, SPECIAL_TOKENS


def write_tokenizer(folder: Path, vocab_size: int) -> None:
    """Trains the tokenizer and writes it as the published models have theirs on disk."""
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    counts = Counter(
        word for sentence in _sentences() for word, _ in words.pre_tokenize_str(sentence)
    )
    vocab, merges = _train(counts, [*SPECIAL_TOKENS, *sorted(words.alphabet())], vocab_size)
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    tokenizer.add_special_tokens(
        [AddedToken(tag, special=True, normalized=False) for tag in SPECIAL_TOKENS]
    )
    tokenizer.pre_tokenizer = words
    tokenizer.decoder = decoders.ByteLevel()
    with atomic_folder(folder) as scratch:
        tokenizer.save(str(scratch / "tokenizer.json"))
        names = {"bos_token": BOS_TOKEN, "eos_token": EOS_TOKEN, "pad_token": PAD_TOKEN}
        write_json(
            scratch / "tokenizer_config.json", {"tokenizer_class": "LlamaTokenizerFast", **names}
        )
        write_json(scratch / "special_tokens_map.json", names)


def _train(
    words: Counter[str], first_tokens: Sequence[str], vocab_size: int
) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Ids of the tokens, and the merges: the most frequent pair of neighbors, again and again.

    Byte pair encoding (arXiv 1508.07909). Of pairs as frequent, that of the lowest ids comes first;
    the trainer of `tokenizers` leaves some of that to chance, by which no run could be made again.
    """
    vocab = {token: number for number, token in enumerate(first_tokens)}
    parts = {word: list(word) for word in words}
    merges: list[tuple[str, str]] = []
    while len(vocab) < vocab_size:
        counts: Counter[tuple[str, str]] = Counter()
        for word, count in words.items():
            for pair in pairwise(parts[word]):
                counts[pair] += count
        if not counts:
            break
        best = min(counts, key=lambda pair: (-counts[pair], vocab[pair[0]], vocab[pair[1]]))
        merges.append(best)
        vocab.setdefault("".join(best), len(vocab))
        parts = {word: _merge(tokens, best) for word, tokens in parts.items()}
    return vocab, merges


def _merge(tokens: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    rest = iter(range(len(tokens)))
    for index in rest:
        if tuple(tokens[index : index + 2]) == pair:
            merged.append("".join(pair))
            next(rest)
        else:
            merged.append(tokens[index])
    return merged


def _sentences() -> Iterator[str]:
    rng = np.random.default_rng(0)
    for _ in range(5000):
        scene = sample_scene(rng)
        yield f"User: {describe(scene, rng).text}\n\nAssistant:"
        for question in ask(scene, rng):
            yield f"User: {question.text}\n\nAssistant: {question.answer}"
