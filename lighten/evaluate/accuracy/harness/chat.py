"""A model's own chat template, as lm-eval's tasks are asked through it."""

from __future__ import annotations

from lighten.errors import Failure
from lighten.evaluate.runtimes.words import Turns, Words


class Chat:
    """The chat template of a model.

    Attributes:
        ends: ids that end a turn or a text.
        dropped: whether a task's description was left out, because the template takes no system text.
    """

    def __init__(self, words: Words, system: str | None) -> None:
        """Takes a model's words, and the system text that the person asked for.

        Raises:
            Failure: the model has no chat template.
        """
        if not words.render:
            raise Failure(
                "the model has no chat template: leave out `chat`, or put its chat_template.jinja beside the tokenizer"
            )
        self.ends = words.ends
        self.dropped = False
        self._write = next(iter(words.render.values()))
        self._system = system

    def render(self, turns: Turns, begun: bool = False) -> str:
        """Returns a chat as text.

        Args:
            turns: the turns, `role` and `content` each.
            begun: whether the last turn is the beginning of the answer, instead of the question.

        Raises:
            Failure: the template takes no such chat.
        """
        asked, start = (turns[:-1], turns[-1]["content"]) if begun else (turns, "")
        try:
            return self._write(asked) + start
        except Exception as error:  # a template may fail in any way that Python has
            opened = bool(asked) and asked[0]["role"] == "system"
            if self._system is not None or not opened:
                advice = "leave out `system`" if opened else "leave out `chat`"
                raise Failure(f"the chat template does not take the turns of the task ({error}): {advice}") from error
        self.dropped = True
        return self.render(turns[1:], begun)
