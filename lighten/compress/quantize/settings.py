"""The common settings of all quantization methods, and the properties that a method declares."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, get_args, get_origin

from pydantic import BeforeValidator, Field, model_validator

from lighten.compress.quantize.methods import METHODS
from lighten.errors import RequestError
from lighten.facts import TASKS, ModelFacts, Task
from lighten.model.formats import FORMATS
from lighten.step import Estimate, Step, beside_the_source


def number(value: Any) -> Any:
    """Returns the number that a text of digits means, because the command line has text only."""
    return int(value) if isinstance(value, str) and value.removeprefix("-").isdecimal() else value


GroupSize = Annotated[
    Literal[-1, 32, 64, 128],
    BeforeValidator(number),
    Field(description="inputs that share a scale; -1 for all of them, tensor for the whole matrix (default: 128)"),
]
Ignore = Annotated[tuple[str, ...], Field(description="modules to leave alone: patterns such as *.0.mlp.* or re:REGEX")]
Head = Annotated[
    Literal["keep", 8],
    Field(description="the output head: keep it, or 8 bits where it is not tied to the embedding (default: keep)"),
]


class Quantize(Step):
    """Weights with fewer bits, in a format that the ecosystem's loaders open.

    A method is a subclass with a row in `METHODS`. It has the settings `method`, `bits` and `ignore`, and settings of
    its own. It names the functions that do the work, and says how the result is stored.
    """

    kind: ClassVar[str] = "quantize"
    work: ClassVar[str] = "lighten.compress.quantize.step:run"
    version: ClassVar[int] = 2
    tasks: ClassVar[tuple[Task, ...]] = TASKS

    rounds: ClassVar[str]
    """The function that rounds, "module:function": called with the settings and the `Linears` that read one input; it
    returns a `Stored` for each of them."""
    rounds_head: ClassVar[str] = ""
    """The function that rounds the output head, for methods with the setting `head`: there are no Grams of it."""
    scales: ClassVar[str] = ""
    """The function that returns a scale `[in]` for the inputs of linears, which the norm or linear before them makes
    good: called with the settings, their weights `[out, in]`, the `Gram` of the inputs, how many heads repeat each
    channel, and the channels of a head."""
    allocates: ClassVar[str] = ""
    """The function that chooses the bits of every linear where `needs_sensitivity` is true."""
    swept: ClassVar[bool] = False
    """Whether the method reads Grams."""
    gathers: ClassVar[str] = "lighten.compress.quantize.stacked:gathered"
    """The function that makes the tensors of a layer from those of its linears where `experts_only` is true: called
    with the `Layer` and the tensors of each linear by name."""
    stored_as: ClassVar[str]
    """Format of the stored model: a row of `lighten.model.formats`."""
    scales_train: ClassVar[bool] = False
    """Whether it writes integer codes with a scale for each group and nothing else, so that the scales can be trained
    afterwards."""

    if TYPE_CHECKING:  # every method declares these, with the values that it takes
        method: str = ""
        bits: int | None = None
        ignore: tuple[str, ...] = ()

    @model_validator(mode="before")
    @classmethod
    def _of_the_method(cls, given: Any) -> Any:
        """Refuses settings and values of another method, and names that method."""
        if not isinstance(given, dict):
            return given
        given = {name: value for name, value in given.items() if value is not None}
        own = [name for name in cls.model_fields if name != "method"]
        name = cls.model_fields["method"].default
        for key, value in given.items():
            choices = _choices(cls, key)
            value = number(value) if choices else value
            if (
                key != "method"
                and key not in own
                and any(key in other.model_fields for other in METHODS.usable().values())
            ):
                raise ValueError(f"{name} has no setting {key}; it has {', '.join(own)}")
            if key != "method" and choices and value not in choices:
                able = [other for other, settings in METHODS.usable().items() if value in _choices(settings, key)]
                if able:  # what no method takes is refused by the field itself
                    hint = f"{value} is for {', '.join(able)}"
                    raise ValueError(f"{name} takes {key} {either(choices)}, not {value!r}; {hint}")
        return cls.completed(given)

    @classmethod
    def completed(cls, given: dict[str, Any]) -> dict[str, Any]:
        """Returns the given settings, none of them None, with what follows from them.

        Raises:
            ValueError: two of them contradict each other.
        """
        return given

    @property
    def format(self) -> str:
        """Format of the stored model."""
        return self.stored_as

    @property
    def writes(self) -> str:
        """Format of its output, as in its manifest."""
        return self.format

    def config(self, widths: Mapping[str, int], left: Collection[str]) -> dict[str, Any]:
        """Returns the `quantization_config` of config.json.

        Args:
            widths: bits of every linear that was quantized, by name.
            left: names of the modules that were left alone.
        """
        raise NotImplementedError

    @property
    def config_file(self) -> str | None:
        """Name of a file beside config.json from which tools read the configuration; None if there is none."""
        return None

    @property
    def scales_inputs(self) -> str:
        """The function of `scales`, if these settings ask for it."""
        return self.scales

    @property
    def quantizes_head(self) -> bool:
        """Whether the output head is rounded too, by `rounds_head`."""
        return False

    @property
    def propagates(self) -> bool:
        """Whether each layer is rounded against what the quantized layers before it give. Only if `swept` is true."""
        return False

    @property
    def experts_only(self) -> bool:
        """Whether the format holds the matrices of experts and nothing else, all those of a layer in one tensor."""
        return False

    @property
    def reads_largest(self) -> bool:
        """Whether the method reads the largest input of every linear. Only if `needs_sweep` is true."""
        return False

    def why_left(self, shape: tuple[int, int]) -> str | None:
        """Returns why a linear `[out, in]` cannot be stored in this format; None if it can be."""
        return None

    def key_config(self) -> dict[str, Any]:
        """Returns the settings of this method that are given."""
        return {name: value for name, value in self.model_dump(mode="json").items() if value not in (None, [], "keep")}

    def needs_sweep(self) -> bool:
        """Whether the method reads Grams."""
        return self.swept

    def requires(self) -> list[tuple[str, str]]:
        """Packages that write the format, and packages that read it."""
        return list(FORMATS[self.format].written_with) if self.format in FORMATS else []

    def check_source(self, form: str, facts: ModelFacts) -> None:
        """Refuses everything except plain weights."""
        if form != "hf":
            raise RequestError(f"this model is {form} already: quantize the one that it was made from")

    def cost(self, facts: ModelFacts) -> tuple[float, float]:
        """Returns the float32 operations, and the seconds of passes over the weights, on such a model."""
        return 0.0, 2e-8 * facts.layers * facts.layer_linear_params

    def stored_bits(self, facts: ModelFacts) -> float:
        """Returns about the bits of a weight with its share of scales and zero points."""
        return (self.bits or 4) + 20 / 64

    def predict(self, facts: ModelFacts, calibration_tokens: int) -> Estimate:
        """Returns the products and rank updates in float32, the passes over the weights, and one layer of memory.

        If layers are rounded one after the other, also the two forwards and the sums over what they read.
        """
        linears = facts.layers * facts.layer_linear_params
        flops, seconds = self.cost(facts)
        alone = Estimate(
            float32_flops=flops,
            seconds=seconds,
            peak_bytes=500_000_000 + self.bytes_of_a_layer(facts),
            disk_bytes=int(linears * self.stored_bits(facts) / 8) + 2 * facts.embedding_params,
        )
        return beside_the_source(alone, facts, calibration_tokens) if self.propagates else alone

    def bytes_of_a_layer(self, facts: ModelFacts) -> int:
        """Returns about how much memory one layer takes."""
        grams = facts.gram_elements * 2 if self.needs_sweep() else 0
        return 4 * (3 * grams + 3 * facts.layer_linear_params)


def check_head(head: Literal["keep", 8], facts: ModelFacts) -> None:
    """Raises RequestError if the head is to be quantized and is also the embedding."""
    if head == 8 and facts.tied:
        raise RequestError(
            "the head of this model is tied to its embedding, which no loader expects quantized: leave out head, "
            "or export it (export: {format: gguf, budget: …} chooses a type for the two)"
        )


def check_groups(size: int | Literal["tensor"], facts: ModelFacts) -> None:
    """Raises RequestError if a group does not divide the inputs of a linear."""
    widths = input_widths(facts)
    for name, width in widths.items():
        if isinstance(size, int) and size != -1 and width % size:
            fits = [each for each in (128, 64, 32) if not any(w % each for w in widths.values())]
            raise RequestError(
                f"group_size {size} does not divide the {name} {width} of this model; use {either((*fits, -1))}"
            )


def input_widths(facts: ModelFacts) -> dict[str, int]:
    """Returns the number of inputs of the linears of a layer, by what determines it."""
    attention = facts.heads * facts.head_dim
    return {"hidden_size": facts.hidden, "attention width": attention, "intermediate_size": facts.intermediate}


def output_widths(facts: ModelFacts) -> dict[str, int]:
    """Returns the number of outputs of the linears of a layer, by what determines it."""
    return {**input_widths(facts), "key/value width": facts.kv_heads * facts.head_dim}


def grouped_bits(bits: int | None, size: int | Literal["tensor"], facts: ModelFacts) -> float:
    """Returns about the bits of a weight whose group has a scale and a zero point of 20 bits."""
    group = 64 if size == "tensor" else facts.hidden if size == -1 else size
    return (bits or 4) + 20 / group


def _choices(settings: type[Quantize], key: str) -> tuple[Any, ...]:
    """Returns the values that a setting takes; () if there is no list of them."""
    field = settings.model_fields.get(key)
    kinds = [field.annotation, *get_args(field.annotation)] if field else []
    return next((get_args(kind) for kind in kinds if get_origin(kind) is Literal), ())


def either(values: Collection[Any]) -> str:
    """Returns "a, b or c"."""
    *most, last = map(str, values)
    return f"{', '.join(most)} or {last}" if most else last
