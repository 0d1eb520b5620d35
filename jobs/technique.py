"""Technique: one step of a recipe, which makes a model smaller or recovers lost quality."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol, Self

from jobs.knobs import Domain, Value, profile, profile_values
from jobs.models.layout import Form
from jobs.parallel import HIGHEST_STAGE

if TYPE_CHECKING:
    from jobs.context import Context
    from jobs.models.families import Family, Task
    from jobs.models.layout import Layout
    from jobs.models.model import Model

Kind = Literal["depth", "width", "sparsity", "rank", "bits", "recovery"]
Need = Literal["calibration", "teacher", "gradients", "training"]


class LayoutChange(Protocol):
    """The effect of a technique's options on a layout: sparsity, factorization or quantization."""

    @property
    def is_noop(self) -> bool:
        """Whether model and layout stay the same."""

    @property
    def exact(self) -> bool:
        """Whether `apply` returns the layout itself; otherwise it returns an upper bound (see `Technique.exact`)."""

    def apply(self, layout: Layout, technique: str) -> Layout:
        """Return the changed layout.

        Raises ValueError, which names `technique`, where the change cannot be applied to this layout.
        """


@dataclass(frozen=True)
class SameLayout:
    """The layout change of techniques that change values alone, such as training."""

    @property
    def is_noop(self) -> bool:
        return False

    @property
    def exact(self) -> bool:
        return True

    def apply(self, layout: Layout, technique: str) -> Layout:
        return layout


@dataclass(frozen=True)
class Technique(ABC):
    """One step of a recipe. The fields of a subclass are the options of the technique.

    Class variables declare the properties that validation, planning and scheduling use before the step runs.
    The valid orders of techniques follow from `accepts` and `produces` alone (see `check_order`).
    """

    kind: ClassVar[Kind]
    paper: ClassVar[str]
    version: ClassVar[int] = 1
    """Part of the recipe's id: increase it when the technique's numbers change."""
    needs: ClassVar[frozenset[Need]] = frozenset()
    """The parts of a `Context` that the technique reads."""
    accepts: ClassVar[frozenset[Form]] = frozenset({"dense"})
    """The forms of linears that the technique can be applied to."""
    produces: ClassVar[frozenset[Form]] = frozenset()
    """The forms of linears that the technique creates."""
    by_block: ClassVar[frozenset[str]] = frozenset()
    """Options that may differ by block: their value may be a text of several values (`jobs.knobs.profile`)."""
    by_linear: ClassVar[frozenset[str]] = frozenset()
    """Options that may differ by linear too; a subset of `by_block`."""
    highest_stage: ClassVar[int] = HIGHEST_STAGE
    """The highest ZeRO stage that the technique can train with (`jobs.training.settings.Training`)."""

    def __post_init__(self) -> None:
        for name, domain in self.domains().items():
            object.__setattr__(self, name, self._valid(name, domain))
        for name, value in self.ignored_options().items():
            object.__setattr__(self, name, value)

    @classmethod
    def name(cls) -> str:
        """Return the name of the technique, which is the name of its file."""
        return cls.__module__.rpartition(".")[2]

    @classmethod
    def domains(cls) -> dict[str, Domain]:
        """Return the valid domain of each option, in the order of the fields."""
        return {field.name: field.metadata["domain"] for field in dataclasses.fields(cls)}

    @classmethod
    def of(cls, options: dict[str, Value]) -> Self:
        """Return the technique with these options.

        Raises TypeError for unknown options and ValueError for values outside their domain.
        """
        return cls(**options)

    @classmethod
    def refusal(cls, family: Family, task: Task) -> str | None:
        """Return the reason why models of this family and task are not supported; None if they are."""
        return None

    @classmethod
    def recovers(cls) -> bool:
        """Whether the technique only recovers lost quality, with the original as teacher."""
        return cls.kind == "recovery" and "teacher" in cls.needs

    @classmethod
    def trains(cls) -> bool:
        """Whether the technique trains weights; such a step may run on several ranks."""
        return bool(cls.needs & {"teacher", "training"})

    @property
    def layout_change(self) -> LayoutChange:
        """The change of the layout that these options cause."""
        return SameLayout()

    @property
    def is_noop(self) -> bool:
        """Whether these options change nothing (a ratio of 0, no steps). A recipe omits such a step."""
        return self.layout_change.is_noop

    @property
    def exact(self) -> bool:
        """Whether `output_layout` is the layout of the compressed model itself.

        If the data decide the share of each layer, it is an upper bound: it has the same tensor names and at
        least as many bytes.
        """
        return self.layout_change.exact

    @property
    def updates(self) -> int:
        """The number of weight updates, which the duration grows with; 0 without training."""
        return int(getattr(self, "steps", 0))

    def options(self) -> dict[str, Value]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def ignored_options(self) -> dict[str, Value]:
        """Return a fixed value for each option without effect, so that equal settings have equal recipe ids."""
        return {}

    def for_linears(self, layout: Layout) -> dict[str, Self]:
        """Return, by full name of linear, the step with the options that hold for this linear.

        Raises ValueError if an option has more values than the model has linears.
        """
        return dict(zip(layout.linears, self._spread(len(layout.linears), "linears"), strict=True))

    def for_blocks(self, layout: Layout) -> list[Self]:
        """Return, for each block, the step with the options that hold for this block.

        Raises ValueError if an option has more values than the model has blocks.
        """
        return self._spread(layout.depth, "blocks")

    def output_layout(self, layout: Layout) -> Layout:
        """Return the layout of the model after this step, computed from shapes alone (see `exact`).

        Raises ValueError, with technique, layer, value and range, if the step cannot be applied to a model of
        this layout.
        """
        self.check_forms(layout)
        return self.layout_change.apply(layout, self.name())

    @abstractmethod
    def compress(self, model: Model, context: Context) -> Model:
        """Apply the step: modify `model` in place and return it, with the layout that `output_layout` predicts."""

    def check_forms(self, layout: Layout) -> None:
        """Raise ValueError if the model's family, or the form of one of its linears, is not supported."""
        reason = self.refusal(layout.family, layout.task)
        if reason is not None:
            raise ValueError(f"{self.name()} does not support {layout.family.name} ({layout.task}): {reason}")
        if layout.forms() <= self.accepts:
            return
        for name in layout.linears:
            for form in sorted(layout.forms_of(name) - self.accepts):
                raise ValueError(
                    f"{self} cannot be applied: {name} is {form}, the technique accepts "
                    f"{' or '.join(sorted(self.accepts))} linears"
                )

    def _valid(self, name: str, domain: Domain) -> Value:
        """Return the canonical value of an option; ValueError if it is outside its domain."""
        value: Value = getattr(self, name)
        if name in self.by_block and isinstance(value, str) and value.split():
            try:
                return profile(profile_values(value, domain))
            except ValueError as error:
                raise ValueError(f"{self.name()}.{name}={value!r}: {error}") from None
        if value not in domain:
            raise ValueError(f"{self.name()}.{name}={value!r} is outside {domain}")
        return domain.normal(value)

    def _spread(self, count: int, parts: str) -> list[Self]:
        """Return the step for each of `count` parts; `parts` ("blocks" or "linears") is for error messages."""
        values_of: dict[str, tuple[Value, ...]] = {}
        for name in sorted(self.by_block):
            value = getattr(self, name)
            if isinstance(value, str):
                values_of[name] = profile_values(value, self.domains()[name])
                if len(values_of[name]) > count:
                    raise ValueError(
                        f"{self.name()}.{name} has {len(values_of[name])} values, but the model has {count} {parts}"
                    )
        if not values_of:
            return [self] * count
        steps: list[Self] = []
        distinct: dict[tuple[Value, ...], Self] = {}
        for part in range(count):
            selected = tuple(values[part * len(values) // count] for values in values_of.values())
            if selected not in distinct:
                options = dict(zip(values_of, selected, strict=True))
                distinct[selected] = dataclasses.replace(self, **options)
            steps.append(distinct[selected])
        return steps

    def __str__(self) -> str:
        """Return the name, the first option, and each other option that differs from its default."""
        texts = []
        for position, field in enumerate(dataclasses.fields(self)):
            value = getattr(self, field.name)
            if position == 0 or value != field.default:
                texts.append(f"{field.name}={value}")
        return f"{self.name()}({', '.join(texts)})"


def check_order(steps: Sequence[type[Technique]]) -> None:
    """Raise ValueError, with the reason, if the techniques cannot be applied in this order."""
    forms: set[Form] = {"dense"}
    producer: dict[Form, str] = {}
    for position, step in enumerate(steps):
        for form in sorted(forms - step.accepts):
            raise ValueError(
                f"{step.name()} cannot follow {producer[form]}: it accepts "
                f"{' or '.join(sorted(step.accepts))} linears, and {producer[form]} produces {form} linears; "
                f"put {step.name()} before {producer[form]}"
            )
        if step.recovers() and position == 0:
            raise ValueError(
                f"{step.name()} cannot come first: it recovers the quality lost in earlier steps, and nothing is "
                f"lost yet; put it after a step that prunes or factorizes"
            )
        for form in step.produces:
            forms.add(form)
            producer.setdefault(form, step.name())
