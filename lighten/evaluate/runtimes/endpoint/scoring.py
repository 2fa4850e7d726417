"""Log-probabilities of the tokens of a prompt, in the forms in which servers give them."""

from __future__ import annotations

import math
import queue
from dataclasses import dataclass
from typing import Any, Protocol

from lighten.errors import Failure
from lighten.evaluate.runtimes.endpoint.connection import Declined, Http
from lighten.evaluate.runtimes.runtime import Question, Score

TOGETHER = 8
"""Number of texts that are asked for at the same time. The server decides what it computes together."""
PULL = 1e6
"""Bias that forces the choice of a token."""
LEAST = -1e30
"""Log-probability (nats) below which a server means that the probability was too small for its numbers."""
FEW = 64
"""Number of likeliest tokens among which a token is looked for at first. Then it is that many times as many."""
SAME = 1e-3
"""Allowed error of a log-probability (nats), such as between two answers to the same prompt."""


class Senseless(Failure):
    """The error that a server gives numbers that cannot be those of the text that it was sent."""


class Scorer(Protocol):
    """A form in which a server gives log-probabilities of a prompt."""

    title: str
    """What is asked for, in a word or two."""
    parallel: int
    """Number of questions that are asked at the same time."""
    writes: int
    """Number of positions that a text must leave free, because the server writes something behind it."""

    def __call__(self, question: Question) -> list[Score]:
        """Returns the score of each ending.

        Raises:
            Declined: the server does not give them.
            Senseless: it counts other tokens than were sent, or a probability is no number.
        """


class Echo:
    """`echo` with `logprobs`, as in OpenAI's first completions: the answer repeats the prompt."""

    title = "echo and logprobs"
    parallel = TOGETHER
    writes = 1

    def __init__(self, http: Http, model: str) -> None:
        self._http, self._model = http, model

    def __call__(self, question: Question) -> list[Score]:
        """See `Scorer`."""
        return [self._ending(question.context, ending) for ending in question.endings]

    def _ending(self, context: list[int], ending: list[int]) -> Score:
        ids = context + ending
        body = {"model": self._model, "prompt": ids, "max_tokens": 1, "temperature": 0, "echo": True, "logprobs": 1}
        choice = first(self._http.post(f"{self._http.address.url}/completions", body))
        found = choice.get("logprobs") or {}
        values, tops = found.get("token_logprobs"), found.get("top_logprobs")
        if not (isinstance(values, list) and isinstance(tops, list) and len(values) == len(tops) > 1):
            raise Declined(200, "it does not repeat the prompt with its log-probabilities")
        if len(values) not in (len(ids), len(ids) + 1):  # the last one may have been written
            raise miscounted(len(ids), len(values) - 1)
        scored = range(len(context), len(ids))
        numbers = [_number(values[at]) for at in scored]
        greedy = [
            bool(tops[at]) and number >= max(tops[at].values()) for at, number in zip(scored, numbers, strict=True)
        ]
        return Score(sum(numbers), all(greedy))


class PromptLogprobs:
    """`prompt_logprobs`, as in vLLM: for every token of the prompt, its own and the likeliest one by id."""

    title = "prompt_logprobs"
    parallel = TOGETHER
    writes = 1

    def __init__(self, http: Http, model: str) -> None:
        self._http, self._model = http, model

    def __call__(self, question: Question) -> list[Score]:
        """See `Scorer`."""
        return [self._ending(question.context, ending) for ending in question.endings]

    def _ending(self, context: list[int], ending: list[int]) -> Score:
        ids = context + ending
        body = {"model": self._model, "prompt": ids, "max_tokens": 1, "temperature": 0, "prompt_logprobs": 1}
        found = self._http.post(f"{self._http.address.url}/completions", body)
        rows = first(found).get("prompt_logprobs") or found.get("prompt_logprobs")
        if not isinstance(rows, list):
            raise Declined(200, "it ignores prompt_logprobs")
        if len(rows) != len(ids):
            raise miscounted(len(ids), len(rows))
        total, greedy = 0.0, True
        for at in range(len(context), len(ids)):
            row = {int(token): each for token, each in (rows[at] or {}).items()}
            if ids[at] not in row:
                raise Senseless(f"{self._http.address.host} read another token than the id {ids[at]} that was sent")
            own = _number(row[ids[at]].get("logprob"))
            total += own
            greedy = greedy and own >= max(each["logprob"] for each in row.values())
        return Score(total, greedy)


@dataclass(frozen=True)
class Place:
    """What a server says about the token after a text, in log-probabilities (nats) of the model itself."""

    chosen: int
    logprob: float
    """That of the chosen token."""
    likeliest: list[tuple[int, float]]
    """Some tokens with theirs, the likeliest first."""


class Forced:
    """llama.cpp's own `/completion`: each token of an ending is forced by a bias, and comes with its log-probability.

    The log-probability is that before the bias. A request computes one token, because a slot of the server keeps what
    it has read. It takes as many requests as there are tokens to score. About a token that is no whole character the
    server says nothing: then a whole one is forced, and the token is looked for among the likeliest.
    """

    title = "one forced token after the other"
    writes = 0

    def __init__(self, http: Http, model: str, slots: int, whole: int) -> None:
        """Takes the number of texts that the server keeps, its slots, and a token that is a whole character or more."""
        self._http, self._model, self._whole, self.parallel = http, model, whole, slots
        self._free: queue.SimpleQueue[int] = queue.SimpleQueue()
        for slot in range(slots):
            self._free.put(slot)

    def __call__(self, question: Question) -> list[Score]:
        """See `Scorer`."""
        slot = self._free.get()
        try:
            return [self._ending(question.context, ending, slot) for ending in question.endings]
        finally:
            self._free.put(slot)

    def _ending(self, context: list[int], ending: list[int], slot: int) -> Score:
        text, total, greedy = [*context], 0.0, True
        for token in ending:
            place = self.place(text, token, slot)
            own = place.logprob if place else None
            most = FEW
            while own is None:
                place = self.place(text, self._whole, slot, most)
                if place is None:
                    raise Declined(200, "it does not give the probabilities of what it writes")
                own = dict(place.likeliest).get(token)
                if own is None and len(place.likeliest) < most:
                    raise Senseless(f"{self._http.address.host} knows no token {token}")
                most *= FEW
            assert place
            total, greedy = total + own, greedy and place.likeliest[0][0] == token
            text.append(token)
        return Score(total, greedy)

    def place(self, text: list[int], token: int, slot: int, most: int = 1) -> Place | None:
        """Returns what the server says where it is forced to write a token after a text; None if it says nothing.

        Raises:
            Declined: it does not write that token, or not with probabilities as llama.cpp spells them.
            Senseless: it counts other tokens than were sent.
        """
        body = {
            "model": self._model,
            "prompt": text,
            "n_predict": 1,
            "n_probs": most,
            "temperature": 0,
            "logit_bias": [[token, PULL]],
            "cache_prompt": True,
            "id_slot": slot,
        }
        found = self._http.post(f"{self._http.address.root}/completion", body)
        try:
            count, places = found["tokens_evaluated"], found.get("completion_probabilities") or [None]
            if count != len(text):
                raise miscounted(len(text), count)
            if places[0] is None:
                return None
            tops = [(int(each["id"]), _number(each["logprob"])) for each in places[0]["top_logprobs"]]
            place = Place(int(places[0]["id"]), _number(places[0]["logprob"]), tops)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise Declined(200, "it does not give the probabilities of what it writes") from error
        if place.chosen != token or not tops:
            raise Declined(200, "it does not write the token that a bias asks for")
        return place


def find_scorer(http: Http, model: str, ids: list[int], slots: int | None) -> tuple[Scorer | None, str]:
    """Returns the first form that a server answers for a short text, and what it said to the others.

    Args:
        http: the server.
        model: name on the server.
        ids: a text of a few tokens, all different.
        slots: texts that the server keeps, if it says so.
    """
    question = Question(ids[:1], [ids[1:]])
    said: dict[str, None] = {}
    tried: list[Scorer] = [PromptLogprobs(http, model), Echo(http, model)]
    for scorer in tried:
        try:
            scorer(question)
        except Declined as error:
            said[f"{scorer.title}: {error.reason}"] = None
        except Senseless as error:
            said[f"{scorer.title}: {error}"] = None
        else:
            return scorer, ""
    forced = Forced(http, model, slots or 1, ids[0])
    try:
        _check_forced(forced, ids)
    except Declined as error:
        said[f"/completion: {error.reason}"] = None
    except Senseless as error:
        said[f"/completion: {error}"] = None
    else:
        return forced, ""
    return None, "; ".join(said)


def _check_forced(forced: Forced, ids: list[int]) -> None:
    """Checks that two forced tokens leave one distribution as it is, and that neither is made certain by the bias.

    Raises:
        Declined: they do not.
    """
    *text, last = ids
    both = [forced.place(text, token, 0, 2) for token in (last, text[0])]
    ours, theirs = both
    if ours is None or theirs is None:
        raise Declined(200, "it does not give the probabilities of what it writes")
    pairs = zip(ours.likeliest, theirs.likeliest, strict=True)
    moved = any(abs(first[1] - second[1]) > SAME for first, second in pairs)
    if moved or math.exp(ours.logprob) + math.exp(theirs.logprob) > 1 + SAME:
        raise Declined(200, "the bias that forces a token changes its log-probability")


def first(answer: Any) -> dict[str, Any]:
    """Returns the first choice in an answer.

    Raises:
        Declined: there is none.
    """
    choices = answer.get("choices") if isinstance(answer, dict) else None
    if not (isinstance(choices, list) and choices and isinstance(choices[0], dict)):
        raise Declined(200, "its answer has no choices")
    found: dict[str, Any] = choices[0]
    return found


def miscounted(sent: int, counted: int) -> Senseless:
    """Returns the error for a server that counts other tokens than were sent."""
    return Senseless(
        f"the server counts {counted} tokens where {sent} were sent: it adds or drops some, so nothing is averaged; "
        "--tokenizer names the tokenizer of the served model"
    )


def _number(value: Any) -> float:
    if not isinstance(value, int | float) or math.isnan(value) or value > SAME:
        raise Senseless(f"the server gives {value!r} for a log-probability")
    if value < LEAST:
        raise Senseless("the server gives no log-probability for a token: it is less likely than its numbers can say")
    return float(value)
