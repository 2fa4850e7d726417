"""A `Runtime` as a model of lm-eval's: log-likelihoods, rolling log-likelihoods and text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs

from lighten.errors import Failure
from lighten.evaluate.accuracy.harness.chat import Chat
from lighten.evaluate.accuracy.harness.generation import write
from lighten.evaluate.perplexity.rolling import loglikelihoods
from lighten.evaluate.runtimes.runtime import Question, Runtime, Tokenizer
from lighten.evaluate.runtimes.wanted import Sampling, Wanted
from lighten.step import Report

CONTEXT = 2048
"""Positions of a model that does not say how many it takes; lm-eval's own default."""
ENDINGS = 32
"""Maximum number of endings of one context that are computed together."""
WRITTEN = 256
"""Maximum number of tokens to write if a task does not say; lm-eval's own default."""


class RuntimeLM(TemplateLM):  # type: ignore[misc]
    """What lm-eval asks of a model, answered by a runtime. Text becomes ids as lm-eval's `hf` model has it.

    Attributes:
        truncated: requests whose context was cut from the left because the model takes fewer positions.
    """

    def __init__(self, runtime: Runtime, tokenizer: Tokenizer, report: Report, chat: Chat | None = None) -> None:
        """Takes the chat template of the model, if it is asked in chats. Then every end of a turn ends an answer."""
        super().__init__()
        if tokenizer.prefix is None:
            raise Failure("the tokenizer has no beginning and no end of text: lm-eval needs one of them")
        self.runtime, self.text, self.report = runtime, tokenizer, report
        self.max_length = runtime.context or CONTEXT
        self.truncated = 0
        self._prefix: int = tokenizer.prefix
        self._opening = tokenizer.decode([self._prefix], special=True)
        self._ids = lru_cache(maxsize=64)(tokenizer.encode)
        self._chat = chat

    @property
    def tokenizer_name(self) -> str:
        """Name under which lm-eval would keep requests. None are kept."""
        return ""

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Returns a chat as the model's own template writes it, ready for the model's answer or for the rest of one."""
        assert self._chat
        return self._chat.render(chat_history, begun=not add_generation_prompt)

    @property
    def eot_token_id(self) -> int:
        """Id of the end of text."""
        return self._prefix if self.text.eos is None else self.text.eos

    @property
    def prefix_token_id(self) -> int:
        """Id that stands for an empty context."""
        return self._prefix

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Returns the ids of a text. BOS comes first if the tokenizer adds it and the text does not begin with it."""
        ids = list(self._ids(string))
        if add_special_tokens is None:
            begun = ids[:1] == [self.text.bos] or (self._opening and string.startswith(self._opening))
            add_special_tokens = not begun
        return [self.text.bos, *ids] if add_special_tokens and self.text.bos is not None else ids

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        """Returns log-likelihood and whether it is what greedy decoding gives; a context is computed once for all."""
        shared: dict[tuple[int, ...], list[int]] = {}
        for number, (_text, context, ending) in enumerate(requests):
            shared.setdefault(tuple(self._fitting(context, ending)), []).append(number)
        questions: list[Question] = []
        owners: list[list[int]] = []
        for start, numbers in shared.items():
            for first in range(0, len(numbers), ENDINGS):
                some = numbers[first : first + ENDINGS]
                owners.append(some)
                questions.append(Question(list(start), [requests[number][2] for number in some]))
        answers: list[tuple[float, bool]] = [(math.nan, False)] * len(requests)
        for some, scores in zip(owners, self.runtime.choose_many(questions, self.report), strict=True):
            for number, score in zip(some, scores, strict=True):
                answers[number] = (score.logprob, score.greedy)
        if not all(math.isfinite(answer[0]) for answer in answers):
            raise Failure(
                "the model gives logits that are not finite numbers: it is broken, or its arithmetic overflows"
            )
        return answers

    def _fitting(self, context: list[int], ending: list[int]) -> list[int]:
        """Returns a context, cut from the left to the length that the model takes.

        Raises:
            Failure: the ending is missing, or is longer than that by itself.
        """
        if not ending:
            raise Failure("the task asks for the likelihood of an empty text: its endings must have tokens")
        if len(ending) > self.max_length:
            raise Failure(
                f"the task asks for the likelihood of a text of {len(ending)} tokens, and the model takes "
                f"{self.max_length}: that cannot be cut; choose another task, or a model of larger context"
            )
        over = len(context) + len(ending) - (self.max_length + 1)
        self.truncated += over > 0
        return context[over:] if over > 0 else context

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Returns the log-likelihood of every document, in windows of all that the model takes."""
        documents = [self.tok_encode(request.args[0]) for request in requests]
        return loglikelihoods(self.runtime, documents, self._prefix, self.max_length, self.report)

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Returns what the model writes after every context, up to the task's stop sequences."""
        end = None if self.text.eos is None else self.text.decode([self.text.eos], special=True)
        asked = []
        for request in requests:
            context, settings = request.args
            wanted = dict(normalize_gen_kwargs(settings, WRITTEN))
            stops = handle_stop_sequences(wanted.get("until"), eos=end)
            most = int(wanted["max_gen_toks"])
            if most >= self.max_length:
                raise Failure(f"the task lets the model write {most} tokens, and it takes {self.max_length} in all")
            ids = self.tok_encode(context) or [self._prefix]
            self.truncated += len(ids) > self.max_length - most
            ids = ids[-(self.max_length - most) :]
            sampling = Sampling(
                float(wanted.get("temperature") or 0) if wanted.get("do_sample") else 0.0,
                int(wanted.get("top_k") or 0),
                float(wanted.get("top_p") or 1),
            )
            asked.append(Wanted(ids, most, tuple(stops), sampling))
        named = (self.text.eos, *(self._chat.ends if self._chat else ()))
        ends = {each for each in named if each is not None}
        return write(self.runtime, self.text, ends, asked, self.report)
