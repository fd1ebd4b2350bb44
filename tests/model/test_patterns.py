"""Regular expressions of a configuration are matched as `re` matches them, and never for long."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lorafa_kernels import LoRAFAConfig
from lorafa_kernels.model import patterns
from lorafa_kernels.model.patterns import check_expression, compiled

ATOMS = [
    "a",
    "b",
    "ab",
    ".",
    "[ab]",
    "[^b]",
    r"\d",
    r"\w",
    r"\.",
    r"\b",
    "^",
    "$",
    "(?=a)",
    "(?!b)",
    "(?<=a)",
    "(?<!b)",
    "",
]


def expressions():
    def grow(inner):
        return st.one_of(
            st.tuples(inner, inner).map("".join),
            st.tuples(inner, inner).map(lambda two: f"(?:{two[0]}|{two[1]})"),
            st.tuples(
                inner, st.sampled_from(["*", "+", "?", "*?", "+?", "??", "{2}", "{1,3}", "{0,2}?"])
            ).map(lambda two: f"(?:{two[0]}){two[1]}"),
            inner.map(lambda one: f"(?i:{one})"),
            inner.map(lambda one: f"(?!{one})"),
        )

    return st.recursive(st.sampled_from(ATOMS), grow, max_leaves=6)


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(expressions(), st.text("abA1.", max_size=6))
def test_the_bounded_way_is_that_of_re(source, name):
    source = f"(?P<found>{source}).*"
    expected = re.fullmatch(source, name)
    expression = compiled(source)
    program = expression._compile()
    got = patterns._Run(name).groups(program, expression._tree.state.groupdict)
    assert (got is not None) == (expected is not None)
    # The last round of a repeat may be an empty one in `re`; where a group is in none, they agree.
    assert got is None or got == expected.groupdict()


NEVER_ENDING = {
    "repeats within repeats": r"(a+)+b",
    "alternatives in a repeat": r"(a|a|aa)*b",
    "optional items": "a?" * 40 + "a" * 40 + "b",
    "a power": ".*" * 12 + "b",
    "within a lookahead": r"(?=(a+)+b)a*",
    "counted": r"((a{0,9}){0,9}){0,9}b",
}
NAME = "a" * 60


@pytest.mark.parametrize("source", NEVER_ENDING.values(), ids=NEVER_ENDING)
def test_what_never_ends_in_re_ends_here(source):
    began = time.thread_time()
    check_expression("target_modules", source)
    assert not compiled(source).matches(NAME)
    assert time.thread_time() - began < 2


@pytest.mark.parametrize(
    "source",
    [r"((a+)+)\1", r"(?:(a)|b)*(?(1)c|d)", "(((a|bc){1000}){1000}){1000}"],
    ids=["reference", "conditional", "count"],
)
def test_what_cannot_be_bounded_is_refused(source):
    with pytest.raises(ValueError, match=r"rank_pattern.*for ever"):
        LoRAFAConfig(target_modules=["q"], rank_pattern={source: 2})


NOT_EXPRESSIONS = {
    "not closed": "(q",
    "count too large": "a{9999999999}",
    "too deep": "(" * 5000 + ")" * 5000,
    "two halves": "a)|(b",
    "too long": "a" * 1_000_001,
}


@pytest.mark.parametrize(
    "field",
    [
        "target_modules",
        "exclude_modules",
        "rank_pattern",
        "alpha_pattern",
        "layers_pattern",
        "modules_to_save",
    ],
)
@pytest.mark.parametrize("case", NOT_EXPRESSIONS)
def test_what_is_no_expression_names_its_field(field, case):
    source = NOT_EXPRESSIONS[case]
    value = {"rank_pattern": {source: 2}, "alpha_pattern": {source: 2}, "modules_to_save": [source]}.get(
        field, source
    )
    fields = {
        "target_modules": ["q"],
        "layers_to_transform": 1 if field == "layers_pattern" else None,
        field: value,
    }
    with pytest.raises(ValueError, match=field):
        LoRAFAConfig(**fields)


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern", "layers_pattern", "modules_to_save"])
def test_flags_for_all_are_refused_where_the_expression_is_a_part(field):
    """PEFT puts it in the middle of another one, which Python refuses."""
    value = {"rank_pattern": {"(?i)q": 2}, "alpha_pattern": {"(?i)q": 2}}.get(field, ["(?i)q"])
    with pytest.raises(ValueError, match=rf"{field}.*\(\?i:"):
        LoRAFAConfig(**{"target_modules": ["q"], "layers_to_transform": 1, field: value})
    LoRAFAConfig(target_modules="(?i)q", rank_pattern={"(?i:q)": 2})


def test_matching_has_a_limit_for_all_names_together(monkeypatch):
    monkeypatch.setattr(patterns, "_SECONDS", 0.0)
    with patterns.limited(), pytest.raises(ValueError, match=r"matching names takes more than 0 s"):
        for _ in range(1000):
            compiled(r"(a+)+b").matches(NAME)
    compiled(r"(a+)+b").matches(NAME)


def test_usual_expressions_are_matched_by_re():
    """The bounded way is slower, and private to this library."""
    for source in (
        r".*\.(q_proj|k_proj|v_proj|o_proj)",
        r"(.*\.)?(model\.layers\.\d+\.self_attn\.(q|v)_proj)",
        r"(?!.*experts).*up",
    ):
        assert compiled(source)._worst(len("model.layers.31.self_attn.q_proj")) <= patterns._MANY_STEPS
