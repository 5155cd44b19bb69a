"""The block ``safe_sched:`` of a configuration file: the same keys for TRL's command line and for Axolotl.

It says what a script says with `safe_sched_hf.SafeSchedCallback` and `safe_sched.mixing.mix.mix`::

    safe_sched:
      method: bds                    # or {name: antibody, anchor: start}
      safety_data: core              # or a file
      mix: {share: 0.1}              # safety rows between the rows of the training set, too

Every key is checked when the file is read: an unknown one, or a value that is not allowed, is an error that names the
key's path.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PrivateAttr, ValidationError, field_validator

from safe_sched.errors import OptionError, unknown_name
from safe_sched.scheduler import Scheduler
from safe_sched.training.session import Normalizer
from safe_sched_hf.methods import at, method_names, part_from, scheduler_of

if TYPE_CHECKING:
    from safe_sched_hf.callback import SafeSchedCallback

_WHERE = "safe_sched"


def _no_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("a number is needed, not yes or no")
    return value


_Number = Annotated[float, BeforeValidator(_no_bool)]
_Whole = Annotated[int, BeforeValidator(_no_bool)]


class Mix(BaseModel):
    """What `safe_sched.mixing.mix.mix` is to do with the training set.

    Attributes:
        share: Safety rows / all rows of the result, at least 0 and below 1.
        mimic: Whether safety rows take the format that the training rows have.
        blend: With ``mimic``, the share of safety rows whose request stands among words of the task, in [0, 1].
        seed: Of places, orders and the format.
        rows_schema: In the file ``schema``: that of the training rows, a name in `safe_sched.mixing.SCHEMAS`; None to
            detect it.
        safety_data: What to mix in; None: the block's ``safety_data``.
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, populate_by_name=True)

    share: Annotated[_Number, Field(ge=0, lt=1)] = 0.1
    mimic: bool = True
    blend: Annotated[_Number, Field(ge=0, le=1)] = 1.0
    seed: Annotated[_Whole, Field(ge=0)] = 0
    rows_schema: str | None = Field(default=None, alias="schema")
    safety_data: Any = None


class Settings(BaseModel):
    """The block, checked. The keys are the arguments of `safe_sched_hf.SafeSchedCallback` unless said otherwise.

    Attributes:
        method: The scheduler: a name, or ``{name: ..., option: value, ...}`` with the options of its class; see
            `scheduler_of`.
        safety_data: ``"core"``, a path, or rows.
        safety_batch_size: Safety rows per optimiser step, >= 1; None: the trainer's batch size.
        safety_weight: Factor of the safety loss, >= 0.
        normalizer: ``"token"`` or ``"row"``.
        model_temperature: Of Langevin noise on the model's parameters, >= 0.
        act: ``"weight"`` or ``"sample"``.
        parts: What else takes part: names, or ``{name: lisa, safe_steps: 2}`` with options; see `part_from`.
        seed: None: the trainer's.
        mix: Safety rows between the rows of the training set; None or false: none, true: with its defaults.
        report: What is written beside the manifest: ``"table"``, the final weight of every row, or ``"none"``.
        prior: The column of the training set that says how likely every row is harmful; not with ``mix``.

    Example:
        >>> settings = read_settings({"method": {"name": "bds", "prior_share": 0.05}, "safety_data": "core"})
        >>> settings.scheduler().prior_share
        0.05
        >>> read_settings({"mix": {"share": 1.5}})
        Traceback (most recent call last):
        ...
        safe_sched.errors.OptionError: safe_sched.mix.share: 1.5; Input should be less than 1
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    method: str | dict[str, Any] = "bds"
    safety_data: Any = None
    safety_batch_size: Annotated[_Whole, Field(ge=1)] | None = None
    safety_weight: Annotated[_Number, Field(ge=0)] = 1.0
    normalizer: Normalizer = "token"
    model_temperature: Annotated[_Number, Field(ge=0)] = 0.0
    act: Literal["weight", "sample"] = "weight"
    parts: list[str | dict[str, Any]] = Field(default_factory=list)
    seed: Annotated[_Whole, Field(ge=0)] | None = None
    mix: Mix | None = None
    report: Literal["none", "table"] = "table"
    prior: str | None = None

    _where: str = PrivateAttr(default=_WHERE)

    @field_validator("method")
    @classmethod
    def _known_method(cls, method: Any) -> Any:
        scheduler_of(method)
        return method

    @field_validator("parts")
    @classmethod
    def _known_parts(cls, parts: list[Any]) -> list[Any]:
        for number, part in enumerate(parts):
            part_from(part, f"{_WHERE}.parts.{number}")
        return parts

    @field_validator("mix", mode="before")
    @classmethod
    def _mix_or_not(cls, mix: Any) -> Any:
        return ({} if mix else None) if isinstance(mix, bool) else mix

    def scheduler(self) -> Scheduler[Any]:
        """The scheduler that ``method`` describes, a new one each time."""
        return scheduler_of(self.method, f"{self._where}.method")

    def weight_column(self) -> str | None:
        """The column of the training set that ``{name: fixed, column: ...}`` reads."""
        return getattr(self.scheduler(), "column", None)

    def callback(self, safety_data: Any = None) -> SafeSchedCallback:
        """The callback that does what the block says.

        Args:
            safety_data: The safety set where a front end has read it already; None: what the block names.

        Raises:
            OptionError: The options do not go together.
        """
        from safe_sched_hf.callback import SafeSchedCallback

        try:
            return SafeSchedCallback(
                self.scheduler(),
                safety_data=self.safety_data if safety_data is None else safety_data,
                safety_batch_size=self.safety_batch_size,
                safety_weight=self.safety_weight,
                normalizer=self.normalizer,
                model_temperature=self.model_temperature,
                act=self.act,
                parts=[part_from(part, f"{self._where}.parts.{i}") for i, part in enumerate(self.parts)],
                seed=self.seed,
                report=self.report,
                prior=self.prior,
            )
        except OptionError as error:
            raise at(self._where, error) from error

    def mixed(self, train_dataset: Any, *, safety_data: Any = None, tokenizer: Any = None) -> Any:
        """The training set with safety rows between its rows, or as it is where ``mix`` is None.

        Args:
            train_dataset: Of any kind that `safe_sched.mixing.mix.mix` takes.
            safety_data: The safety set where a front end has read it already; None: what the block names.
            tokenizer: For rows that are tokens.

        Raises:
            OptionError: There is nothing to mix in.
            DataError: The rows do not fit.
        """
        if self.mix is None:
            return train_dataset
        from safe_sched.mixing import mix

        named = self.mix.safety_data if self.mix.safety_data is not None else safety_data
        safety = self.safety_data if named is None else named
        if safety is None:
            raise OptionError(
                f"{self._where}.mix: there is nothing to mix in; name it, {self._where}.safety_data: core, or a file"
            )
        return mix(
            train_dataset,
            safety,
            share=self.mix.share,
            mimic=self.mix.mimic,
            blend=self.mix.blend,
            seed=self.mix.seed,
            schema=self.mix.rows_schema,
            tokenizer=tokenizer,
        )


def read_settings(block: Any, *, where: str = _WHERE) -> Settings:
    """Check a block that was read from a file.

    Args:
        block: Keys and values, as a YAML or JSON reader gives them.
        where: The block's own key, for messages.

    Raises:
        OptionError: Naming the key's path, what was seen there, and what is allowed.

    Example:
        >>> read_settings({"saftey_data": "core"})
        Traceback (most recent call last):
        ...
        safe_sched.errors.OptionError: safe_sched.saftey_data: unknown key 'saftey_data' (did you mean ...
        >>> read_settings({"method": {"name": "antibody", "anchr": "start"}})
        Traceback (most recent call last):
        ...
        safe_sched.errors.OptionError: safe_sched.method.anchr: unknown option of 'antibody' 'anchr' (did you mean ...
    """
    if not isinstance(block, Mapping):
        raise OptionError(
            f"{where}: {block!r}; allowed: keys with values, at least `safety_data: core`. Keys: "
            f"{', '.join(Settings.model_fields)}"
        )
    _require_known(block, Settings, where)
    if isinstance(block.get("mix"), Mapping):
        _require_known(block["mix"], Mix, f"{where}.mix")
    if "method" in block:  # here, for the sake of the key's path
        scheduler_of(block["method"], f"{where}.method")
    for number, part in enumerate(block["parts"] if isinstance(block.get("parts"), list) else ()):
        part_from(part, f"{where}.parts.{number}")
    try:
        settings = Settings.model_validate(dict(block))
    except ValidationError as error:
        first = error.errors()[0]
        path = ".".join([where, *(str(part) for part in first["loc"] if not str(part).startswith("function-"))])
        raise OptionError(f"{path}: {first['input']!r}; {first['msg'].removeprefix('Value error, ')}") from None
    settings._where = where
    columns = {"prior": settings.prior, "method.column": settings.weight_column()}
    for key, column in columns.items() if settings.mix is not None else ():
        if column is not None:
            raise OptionError(
                f"{where}.{key}: {column!r}; safety rows that {where}.mix puts between the rows have no such "
                "number. Leave one of them out, or mix into the file before: safe-sched mix"
            )
    return settings


def json_schema() -> dict[str, Any]:
    """The block as a JSON schema, for editors that complete and check YAML.

    Example:
        >>> json_schema()["properties"]["act"]["enum"]
        ['weight', 'sample']
    """
    schema = Settings.model_json_schema()
    named = method_names()
    schema["properties"]["method"] = {
        "default": "bds",
        "anyOf": [
            {"enum": named},
            {"type": "object", "properties": {"name": {"enum": named}}, "required": ["name"]},
        ],
    }
    return json.loads(json.dumps(schema))


def _require_known(block: Mapping[Any, Any], model: type[BaseModel], where: str) -> None:
    keys = [field.alias or name for name, field in model.model_fields.items()]
    for key in block:
        if key not in keys:
            raise at(f"{where}.{key}", unknown_name("key", str(key), keys))
