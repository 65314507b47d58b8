"""What stands around `generate` for answers: drawing a row's tokens, and streaming text.

Axes: B rows, V vocabulary. Knows ids, logits and a tokenizer that decodes; nothing of
conversations or pictures.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
)
from transformers.generation.logits_process import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from janusflow.errors import SettingsError

# In the order in which `generate` applies them.
_WARPERS: dict[str, Callable[[Any], LogitsProcessor]] = {
    "temperature": TemperatureLogitsWarper,
    "top_k": TopKLogitsWarper,
    "top_p": TopPLogitsWarper,
    "min_p": MinPLogitsWarper,
    "typical_p": TypicalLogitsWarper,
    "epsilon_cutoff": EpsilonLogitsWarper,
    "eta_cutoff": EtaLogitsWarper,
}
SAMPLING_OPTIONS = tuple(_WARPERS)


class RowSampler(LogitsProcessor):
    """Turns greedy search into sampling, every row by a generator of its own.

    Adding Gumbel noise to the logits and taking the largest is a draw from their softmax. Done
    here rather than by `generate(do_sample=True)`, which draws for all rows from the global
    generator: there an answer would depend on its neighbours, and a thread that streams would
    disturb everybody else's random numbers.
    """

    def __init__(self, generators: Sequence[torch.Generator]) -> None:
        self.generators = generators

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Logits with noise, (B, V)."""
        noise = torch.stack(
            [torch.empty(scores.shape[1]).exponential_(generator=g) for g in self.generators]
        )
        return scores.float() - noise.log().to(scores.device)


def sampling_processors(
    options: dict[str, Any], generators: Sequence[torch.Generator]
) -> LogitsProcessorList:
    """What makes greedy search sample: the options of `SAMPLING_OPTIONS`, then the draw.

    Raises:
        SettingsError: If an option is out of its range.
    """
    processors = LogitsProcessorList()
    for name, make in _WARPERS.items():
        value = options.get(name)
        if value is None:
            continue
        try:
            if isinstance(value, bool) or not math.isfinite(value):
                raise ValueError(f"{value!r} is not a finite number")
            processors.append(make(value if name == "top_k" else float(value)))
        except (TypeError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise SettingsError(f"{name}={value!r} is out of range: {reason}") from error
    processors.append(RowSampler(generators))
    return processors


class _StopWhen(StoppingCriteria):
    def __init__(self, event: threading.Event) -> None:
        self.event = event

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        return torch.full((len(input_ids),), self.event.is_set(), device=input_ids.device)


def stream_text(generate: Callable[..., object], tokenizer: Any) -> Iterator[str]:
    """Yields the text of one row while a thread generates it; joined, it is the stripped answer.

    Leaving the iterator, by an exception or `close()`, stops the generation. What the thread
    raises is raised here.

    Args:
        generate: Called in the thread with `streamer=` and `stopping_criteria=`.
        tokenizer: Decodes ids.
    """
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    stop = threading.Event()
    failures: list[BaseException] = []

    def work() -> None:
        try:
            criteria = StoppingCriteriaList([_StopWhen(stop)])
            generate(streamer=streamer, stopping_criteria=criteria)
        except BaseException as error:
            failures.append(error)
            streamer.text_queue.put(streamer.stop_signal)

    thread = threading.Thread(target=work, name="janusflow-answer", daemon=True)
    thread.start()
    held = ""  # white space that is dropped when nothing follows it
    begun = False
    try:
        for piece in streamer:
            text = held + piece
            text = text if begun else text.lstrip()
            shown = text.rstrip()
            held = text[len(shown) :]
            if shown:
                begun = True
                yield shown
    finally:
        stop.set()
        thread.join()
    if failures:
        raise failures[0]
