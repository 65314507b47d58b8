"""Training the bundled model's tokenizer."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from janusflow.data.shapes.tokenizer import _train, write_tokenizer
from janusflow.processing.tokenizer import load_tokenizer


def test_it_is_trained_as_by_the_library_where_no_pairs_are_as_frequent() -> None:
    words = Counter({"lowest": 7, "newer": 10, "wider": 4, "bananas": 19, "aaaa": 31})
    alphabet = sorted(set("".join(words)))
    theirs = Tokenizer(models.BPE())
    theirs.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.BpeTrainer(vocab_size=20, initial_alphabet=alphabet, show_progress=False)
    theirs.train_from_iterator([" ".join([word] * num) for word, num in words.items()], trainer)
    vocab, merges = _train(words, alphabet, 20)
    assert len(vocab) == 20
    assert vocab == theirs.get_vocab()
    ours = Tokenizer(models.BPE(vocab, merges))
    for word in (*words, "aaa", "lower", "winner"):
        assert ours.encode(word).tokens == theirs.encode(word).tokens


@pytest.mark.parametrize("words", [{"ab": 2, "cd": 2}, {"cd": 2, "ab": 2}])
def test_of_pairs_as_frequent_that_of_the_lowest_ids_is_merged_first(words: dict[str, int]) -> None:
    vocab, merges = _train(Counter(words), "dcba", 100)
    assert merges == [("c", "d"), ("a", "b")]
    assert vocab == {"d": 0, "c": 1, "b": 2, "a": 3, "cd": 4, "ab": 5}


def test_words_of_the_shapes_world_are_one_token_and_others_are_spelled(tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "tokenizer", 512)
    tokenizer = load_tokenizer(tmp_path / "tokenizer")
    sentence = "User: two purple triangles on a gray background\n\nAssistant: yes"
    words = "User : Ġtwo Ġpurple Ġtriangles Ġon Ġa Ġgray Ġbackground Ċ Ċ Assistant : Ġyes"
    assert tokenizer.tokenize(sentence) == words.split()
    for text in (sentence, "Añ日 zebra"):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids) == text
