from __future__ import annotations

from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crosslogic.contracts.inputs import WORKFLOW_INPUTS, Refused, explain, read_input
from crosslogic.contracts.node import NodeProvisioningInput
from crosslogic.contracts.strict import WrongShape, read


class Colour(StrEnum):
    RED = "red"
    BLUE = "blue"


@dataclass(frozen=True)
class Inner:
    name: str
    weight: float = 0.0


@dataclass(frozen=True)
class Outer:
    inner: Inner
    many: list[Inner] = field(default_factory=list[Inner])
    by_name: dict[str, int] = field(default_factory=dict[str, int])
    colour: Colour = Colour.RED
    note: str | None = None


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"inner": {"name": 1}}, "inner.name must be text, not 1"),
    ({"inner": {"name": "a"}, "many": [{"nam": "b"}]}, "many[0] has no field 'nam' (did you mean 'name'?)"),
    ({"inner": {"name": "a"}, "many": [{}]}, "many[0] lacks 'name'"),
    ({"inner": {"name": "a"}, "many": {}}, "many must be a list, not an object"),
    ({"inner": {"name": "a"}, "by_name": {"x": "1"}}, "by_name.x must be a whole number, not '1'"),
    ({"inner": {"name": "a"}, "colour": "green"}, "colour must be one of 'red', 'blue', not 'green'"),
    ({"inner": {"name": "a"}, "note": 3}, "note must be text or null, not 3"),
    ({"inner": "a"}, "inner must be one JSON object with the fields of Inner, not 'a'"),
    ({"inner": {"name": "x" * 500, "weight": "y" * 500}}, "weight must be a number"),
]


class TestRead:
    def test_builds_what_fits(self) -> None:
        value = {
            "inner": {"name": "a", "weight": 2},
            "many": [{"name": "b"}],
            "by_name": {"x": 1},
            "colour": "blue",
            "note": None,
        }
        assert read(Outer, value) == Outer(Inner("a", 2.0), [Inner("b")], {"x": 1}, Colour.BLUE, None)

    @pytest.mark.parametrize(("value", "words"), WRONG)
    def test_says_where_and_what(self, value: dict[str, Any], words: str) -> None:
        with pytest.raises(WrongShape) as caught:
            read(Outer, value)
        assert words in str(caught.value)
        assert len(str(caught.value)) < 300


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
)
FIELDS = st.sampled_from(sorted(NodeProvisioningInput.__dataclass_fields__))


class TestReadInput:
    @given(JSON | st.dictionaries(FIELDS, JSON))
    def test_never_raises_and_never_guesses(self, value: Any) -> None:
        read_value = read_input(NodeProvisioningInput, value)
        if isinstance(read_value, Refused):
            assert read_value.reason
        else:
            # Nothing was converted, dropped or made up.
            assert {name: asdict(read_value)[name] for name in value} == value

    @pytest.mark.parametrize("workflow", WORKFLOW_INPUTS)
    def test_takes_every_example(self, workflow: str) -> None:
        known = WORKFLOW_INPUTS[workflow]
        assert isinstance(read_input(known.type, known.example), known.type)
        assert known.example_json in explain(workflow, "it was wrong")
