"""Technique: one way to make a model smaller (or to recover what that lost)."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, Self

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


@dataclass(frozen=True)
class Technique(ABC):
    """One step of a recipe: the subclass says what it is, its fields are its options.

    Class variables declare what validation, planning and scheduling need to know without running it:
    `accepts` are the forms of linears that it can work on, `leaves` the forms that it brings in. From
    these alone follows which technique may come after which. `by_block` are the options that may differ by
    block, `by_linear` by linear as well: their value may be a text of several numbers (`jobs.knobs.profile`).
    `highest_stage`: of ZeRO (`jobs.training.engine.Training`), where it trains.
    """

    kind: ClassVar[Kind]
    paper: ClassVar[str]
    version: ClassVar[int] = 1
    needs: ClassVar[frozenset[Need]] = frozenset()
    accepts: ClassVar[frozenset[Form]] = frozenset({"dense"})
    produces: ClassVar[frozenset[Form]] = frozenset()
    by_block: ClassVar[frozenset[str]] = frozenset()
    by_linear: ClassVar[frozenset[str]] = frozenset()
    highest_stage: ClassVar[int] = HIGHEST_STAGE

    def __post_init__(self) -> None:
        for name, domain in self.domains().items():
            object.__setattr__(self, name, self._valid(name, domain))
        for name, value in self.ignored_options().items():
            object.__setattr__(self, name, value)

    @classmethod
    def name(cls) -> str:
        """The technique's name everywhere: that of its file."""
        return cls.__module__.rpartition(".")[2]

    @classmethod
    def domains(cls) -> dict[str, Domain]:
        """The valid domain of each option, in the order of the fields."""
        return {field.name: field.metadata["domain"] for field in dataclasses.fields(cls)}

    @classmethod
    def of(cls, options: dict[str, Value]) -> Self:
        """The technique with these options; TypeError for unknown ones, ValueError for values out of range."""
        return cls(**options)

    def ignored_options(self) -> dict[str, Value]:
        """The options that have no effect beside the others, with the value that they are then given: settings
        that do the same must not make two recipes."""
        return {}

    def for_linears(self, layout: Layout) -> dict[str, Self]:
        """The step as it treats each linear of a model, by its full name: one whose options are the same everywhere.
        ValueError where an option has more values than the model linears."""
        return dict(zip(layout.linears, self._spread(len(layout.linears), "linears"), strict=True))

    def for_blocks(self, layout: Layout) -> list[Self]:
        """The step as it treats each block, likewise."""
        return self._spread(layout.depth, "blocks")

    def options(self) -> dict[str, Value]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @classmethod
    def refusal(cls, family: Family, task: Task) -> str | None:
        """Why models of this family, for this task, cannot be treated; None where they can."""
        return None

    @classmethod
    def recovers(cls) -> bool:
        """Whether all it does is to bring back, from the original, what earlier steps lost."""
        return cls.kind == "recovery" and "teacher" in cls.needs

    @classmethod
    def trains(cls) -> bool:
        """Whether weights are trained: such a step may be spread over several ranks."""
        return bool(cls.needs & {"teacher", "training"})

    @property
    def exact(self) -> bool:
        """Whether `outline` tells the layout itself. Where the data decide what each layer gets, it tells
        one of the same names and of at least as many bytes."""
        return True

    @property
    def updates(self) -> int:
        """How many updates of the weights it trains for, 0 where it trains none: what it takes grows with them."""
        return int(getattr(self, "steps", 0))

    @property
    def is_noop(self) -> bool:
        """Whether these options change nothing (a ratio of 0, no steps): such a step is left out of a recipe."""
        return False

    @abstractmethod
    def output_layout(self, layout: Layout) -> Layout:
        """The layout of the model after this step, from shapes alone (see `exact`).

        Raises ValueError where the step cannot be applied to a model of this layout, naming technique,
        layer, value and range.
        """

    @abstractmethod
    def compress(self, model: Model, context: Context) -> Model:
        """Carry the step out. Changes `model` in place and returns it; its layout is then `outline`'s."""

    def check_forms(self, layout: Layout) -> None:
        """Refuse, with a ValueError, a layout of a family, or with linears of a form, that this technique
        does not do."""
        reason = self.refusal(layout.family, layout.task)
        if reason is not None:
            raise ValueError(f"{self.name()} does not do {layout.family.name} ({layout.task}): {reason}")
        if layout.forms() <= self.accepts:
            return
        for name in layout.linears:
            for form in sorted(layout.forms_of(name) - self.accepts):
                raise ValueError(
                    f"{self} cannot be applied: {name} is {form}, it works on "
                    f"{' or '.join(sorted(self.accepts))} linears"
                )

    def _valid(self, name: str, domain: Domain) -> Value:
        """The value of an option in its one spelling."""
        value: Value = getattr(self, name)
        if name in self.by_block and isinstance(value, str) and value.split():
            try:
                return profile(profile_values(value, domain))
            except ValueError as error:
                raise ValueError(f"{self.name()}.{name}={value!r}: {error}") from None
        if value not in domain:
            raise ValueError(f"{self.name()}.{name}={value!r} is outside {domain}")
        return domain.normal(value)

    def _spread(self, count: int, what: str) -> list[Self]:
        """The step as it treats each of so many parts, from the first to the last."""
        own: dict[str, tuple[Value, ...]] = {}
        for name in sorted(self.by_block):
            value = getattr(self, name)
            if isinstance(value, str):
                own[name] = profile_values(value, self.domains()[name])
                if len(own[name]) > count:
                    raise ValueError(
                        f"{self.name()}.{name} has {len(own[name])} values, the model {count} {what}"
                    )
        if not own:
            return [self] * count
        columns = ([values[at * len(values) // count] for at in range(count)] for values in own.values())
        taken = list(zip(*columns, strict=True))
        steps = {one: dataclasses.replace(self, **dict(zip(own, one, strict=True))) for one in set(taken)}
        return [steps[one] for one in taken]

    def __str__(self) -> str:
        """The name, the first option, and all others that are not at their defaults."""
        fields = dataclasses.fields(self)
        options = [(field.name, getattr(self, field.name), field.default) for field in fields]
        shown = [
            f"{name}={value}"
            for position, (name, value, default) in enumerate(options)
            if position == 0 or value != default
        ]
        return f"{self.name()}({', '.join(shown)})"


def check_order(steps: Sequence[type[Technique]]) -> None:
    """Refuse a senseless order of techniques with a ValueError that tells the reason."""
    forms: set[Form] = {"dense"}
    brought_by: dict[Form, str] = {}
    for position, step in enumerate(steps):
        for form in sorted(forms - step.accepts):
            raise ValueError(
                f"{step.name()} cannot follow {brought_by[form]}: it works on "
                f"{' or '.join(sorted(step.accepts))} linears, and {brought_by[form]} leaves {form} ones; "
                f"put {step.name()} before {brought_by[form]}"
            )
        if step.recovers() and position == 0:
            raise ValueError(
                f"{step.name()} cannot come first: it recovers what earlier steps lost, and nothing is lost "
                f"yet; put it after a step that prunes or factorizes"
            )
        for form in step.produces:
            forms.add(form)
            brought_by.setdefault(form, step.name())
