"""The byte-level tokenizer of a model folder, and ids for text of which some is a stranger's.

Special tokens are looked up by name: their numbers differ between checkpoints. Nothing here knows
of prompt templates or pictures.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerFast

from janusflow.errors import CheckpointError
from janusflow.processing.conversations import IMAGE_TAG, Segment

BOS_TOKEN = "<｜begin▁of▁sentence｜>"
EOS_TOKEN = "<｜end▁of▁sentence｜>"
PAD_TOKEN = "<｜▁pad▁｜>"
BEGIN_OF_IMAGE = "<begin_of_image>"
END_OF_IMAGE = "<end_of_image>"
GENERATION_TAG = "<｜begin▁of▁generation｜>"

SPECIAL_TOKENS = (
    BOS_TOKEN,
    EOS_TOKEN,
    PAD_TOKEN,
    IMAGE_TAG,
    BEGIN_OF_IMAGE,
    END_OF_IMAGE,
    GENERATION_TAG,
)

logger = logging.getLogger(__name__)


def load_tokenizer(
    folder: str | Path, *, tags: Iterable[str] = SPECIAL_TOKENS
) -> PreTrainedTokenizerFast:
    """Load the tokenizer of a model folder as its tokenizer.json describes it.

    The class named in tokenizer_config.json is not consulted: transformers 5 rebuilds a "Llama"
    tokenizer as a SentencePiece one, which a byte-level file is not. Rows are padded on the left.

    Args:
        folder: holds tokenizer.json and, where there are any, tokenizer_config.json and
            special_tokens_map.json.
        tags: must be single special tokens. One that the file does not know is added to the end
            of the vocabulary, and reported by a warning of this module's logger.

    Raises:
        CheckpointError: tokenizer.json is missing, or one of the files is broken.
    """
    folder = Path(folder)
    backend = _read_backend(folder / "tokenizer.json")
    config = read_json(folder / "tokenizer_config.json")
    declared = _declared_tokens(config, read_json(folder / "special_tokens_map.json"))
    tags = list(dict.fromkeys([*tags, BOS_TOKEN, EOS_TOKEN, PAD_TOKEN]))
    missing = [tag for tag in tags if backend.token_to_id(tag) is None]
    # A tag may be in the vocabulary without being special (text would never reach it): adding it
    # keeps its number.
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    new = [token for token in [*declared, *tags] if token not in known]
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in new])
    not_special = {t.content for t in backend.get_added_tokens_decoder().values() if not t.special}
    if not_special & set(tags):
        backend = _made_special(backend, not_special & set(tags))
    backend.no_truncation()
    backend.no_padding()
    if missing:
        logger.warning(
            "%s knows no %s: added at the end of the vocabulary (now %d tokens)",
            folder / "tokenizer.json",
            ", ".join(missing),
            backend.get_vocab_size(),
        )
    # No name_or_path: with one, transformers may exchange the pre-tokenizer for Mistral's.
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=BOS_TOKEN,
        eos_token=EOS_TOKEN,
        pad_token=PAD_TOKEN,
        padding_side="left",
        model_max_length=config.get("model_max_length", 10**30),
        clean_up_tokenization_spaces=False,
    )


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; {} when there is no such file.

    Raises:
        CheckpointError: the file is not one.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:  # ValueError: no JSON, or no UTF-8
        raise CheckpointError(f"{path} cannot be read: {error}; download it again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold a JSON object, got {type(content).__name__}")
    return content


def _read_backend(path: Path) -> Tokenizer:
    if not path.is_file():
        raise CheckpointError(
            f"{path.parent} has no {path.name}; a model folder needs its fast tokenizer"
        )
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise CheckpointError(f"{path} is no tokenizer: {error}; download it again") from error


def _declared_tokens(config: dict[str, Any], names: dict[str, Any]) -> list[str]:
    """Special tokens that stand beside tokenizer.json, by the numbers they are given there."""
    listed = config.get("added_tokens_decoder") or {}
    numbered = sorted(listed.items(), key=lambda item: int(item[0]))
    tokens = [entry["content"] for _, entry in numbered if entry.get("special")]
    for source in (names, config):
        extra = source.get("additional_special_tokens") or []
        tokens += [one if isinstance(one, str) else one["content"] for one in extra]
    return list(dict.fromkeys(tokens))


def _made_special(backend: Tokenizer, tags: set[str]) -> Tokenizer:
    """Mark added tokens as special; the library does not change one that it has."""
    content = json.loads(backend.to_str())
    for token in content["added_tokens"]:
        if token["content"] in tags:
            token["special"] = True
    return Tokenizer.from_str(json.dumps(content))


class SegmentEncoder:
    """Ids of a prompt in which only the template's tags count as special tokens.

    Ordinary text gets the ids that the whole prompt has in one piece, merges over the seams
    included. Only where somebody typed what is a special token, the prompt is cut at the
    template's own tags and the rest is encoded with special tokens switched off.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        """Take over the tokenizer's vocabulary as it stands."""
        self._backend = tokenizer.backend_tokenizer
        self._plain: Tokenizer | None = None
        added = self._backend.get_added_tokens_decoder().values()
        specials = sorted((t.content for t in added if t.special), key=len, reverse=True)
        self._specials = re.compile("|".join(map(re.escape, specials)) or r"(?!)")

    def __getstate__(self) -> dict[str, Any]:
        """Leave the plain copy behind: the library forgets its switch on the way."""
        return {**vars(self), "_plain": None}

    def __call__(self, segments: Sequence[Segment]) -> list[int]:
        """Return the ids, without a begin-of-sentence token."""
        text = "".join(segment.text for segment in segments)
        cuts = list(self._template_tags(segments))
        if [match.span() for match in self._specials.finditer(text)] == cuts:
            # Not by the tokenizer's own post-processor: what it adds depends on the file.
            return self._backend.encode(text, add_special_tokens=False).ids
        ids: list[int] = []
        start = 0
        for cut, end in cuts:
            ids += self._encode_plain(text[start:cut])
            ids.append(self._backend.token_to_id(text[cut:end]))
            start = end
        return ids + self._encode_plain(text[start:])

    def _template_tags(self, segments: Sequence[Segment]) -> Iterable[tuple[int, int]]:
        """Where in the joined text the template has special tokens."""
        offset = 0
        for segment in segments:
            if segment.template:
                for match in self._specials.finditer(segment.text):
                    yield offset + match.start(), offset + match.end()
            offset += len(segment.text)

    def _encode_plain(self, text: str) -> list[int]:
        if self._plain is None:
            # A copy, made when it is first needed: the switch would be seen by other threads.
            plain = Tokenizer.from_str(self._backend.to_str())
            plain.encode_special_tokens = True
            self._plain = plain
        return self._plain.encode(text, add_special_tokens=False).ids if text else []
