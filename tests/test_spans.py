"""Which layers: reading and writing lists, refusals, and the numbering after a cut."""

import pytest

from ghostlayers.errors import SpanError
from ghostlayers.spans import (
    Span,
    check_count,
    check_layers,
    format_layers,
    kept_layers,
    merge_layers,
    parse_layers,
    pruned_boundary,
    removed_layers,
)

WRITTEN = [
    ("0", [0]),
    ("7", [7]),
    ("3-4", [3, 4]),
    ("10-12,14", [10, 11, 12, 14]),
    ("0-1,3,5-6", [0, 1, 3, 5, 6]),
]


@pytest.mark.parametrize(("text", "layers"), WRITTEN)
def test_a_written_list_is_read_and_written_back(text, layers):
    assert parse_layers(text) == layers
    assert format_layers(layers) == text


@pytest.mark.parametrize(
    ("text", "layers"),
    [(" 1 - 3 , 5 ", [1, 2, 3, 5]), ("4-4", [4]), ("5,1-2", [5, 1, 2]), ("003", [3])],
)
def test_spaces_order_and_ranges_of_one_are_accepted(text, layers):
    assert parse_layers(text) == layers


def test_layers_are_written_in_order_whatever_the_order_given():
    assert format_layers([14, 11, 10, 12]) == "10-12,14"


def test_no_layers_are_written_as_none():
    assert format_layers([]) == "none"


def test_a_backwards_range_is_refused_with_the_right_way_round():
    with pytest.raises(SpanError) as caught:
        parse_layers("2,12-10")
    assert str(caught.value) == "range '12-10' runs backwards; write 10-12."


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", ""),
        ("1,,2", ""),
        ("abc", "abc"),
        ("1, x-3", "x-3"),
        ("1-2-3", "1-2-3"),
        ("-1", "-1"),
        ("3-", "3-"),
        ("1.5", "1.5"),
        ("1;2", "1;2"),
        ("²", "²"),  # str.isdigit says yes, int() says no
    ],
)
def test_junk_is_refused_and_quoted(text, part):
    with pytest.raises(SpanError) as caught:
        parse_layers(text)
    assert str(caught.value) == (
        f"cannot read '{part}' in the layers '{text}': expected numbers and inclusive ranges such "
        "as 10-12,14 (layers count from 0)."
    )


def test_layers_named_twice_are_refused():
    with pytest.raises(SpanError) as caught:
        check_layers(parse_layers("1,2-4,3-5"), 8)
    assert str(caught.value) == "layers 3-4 are named twice; name each layer once."


@pytest.mark.parametrize(("layers", "named"), [([6], "6"), ([1, 9, 6, 7], "6-7,9")])
def test_layers_that_do_not_exist_are_refused(layers, named):
    with pytest.raises(SpanError) as caught:
        check_layers(layers, 6)
    assert str(caught.value) == (
        f"layers {named} do not exist: the model has 6 decoder layers, 0 to 5."
    )


def test_negative_layers_do_not_exist_either():
    with pytest.raises(SpanError, match="do not exist: the model has 6 decoder layers, 0 to 5"):
        check_layers([-1], 6)


def test_removing_all_layers_is_refused():
    with pytest.raises(SpanError) as caught:
        check_layers(list(range(6)), 6)
    assert str(caught.value) == "cannot remove 6 of 6 decoder layers; remove between 1 and 5."


def test_removing_no_layer_is_refused():
    with pytest.raises(SpanError) as caught:
        check_layers([], 6)
    assert str(caught.value) == "no layers to remove: name at least one."


@pytest.mark.parametrize("count", [-1, 0, 6, 7])
def test_impossible_counts_are_refused(count):
    with pytest.raises(SpanError, match=f"cannot remove {count} of 6 decoder layers"):
        check_count(count, 6)


@pytest.mark.parametrize("count", [1, 5])
def test_possible_counts_pass(count):
    check_count(count, 6)


def test_all_layers_but_one_may_go():
    assert check_layers([0, 1, 2, 3, 4], 6) == (Span(0, 5),)


@pytest.mark.parametrize(
    ("layers", "spans"),
    [
        ([], ()),
        ([3], (Span(3, 4),)),
        ([1, 2, 3], (Span(1, 4),)),
        ([1, 3], (Span(1, 2), Span(3, 4))),
        ([5, 0, 1], (Span(0, 2), Span(5, 6))),
    ],
)
def test_adjacent_layers_merge(layers, spans):
    assert merge_layers(layers) == spans


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (2, 2), (3, 2)])
def test_empty_and_backwards_spans_cannot_be_made(start, stop):
    with pytest.raises(SpanError) as caught:
        Span(start, stop)
    assert str(caught.value) == f"span [{start}, {stop}) must satisfy 0 <= start < stop."


def test_a_span_is_half_open():
    span = Span(2, 5)
    assert list(span.layers) == [2, 3, 4]
    assert len(span) == 3
    assert str(span) == "[2, 5)"
    assert [layer in span for layer in (1, 2, 4, 5)] == [False, True, True, False]
    assert "2" not in span


def test_spans_sort_by_their_start():
    assert sorted([Span(4, 5), Span(0, 3), Span(0, 2)]) == [Span(0, 2), Span(0, 3), Span(4, 5)]


def test_removed_and_kept_layers_are_complements():
    spans = [Span(4, 6), Span(0, 1)]
    assert removed_layers(spans) == [0, 4, 5]
    assert kept_layers(spans, 8) == [1, 2, 3, 6, 7]


@pytest.mark.parametrize(
    ("spans", "boundaries"),
    [
        ([Span(0, 2)], [0]),
        ([Span(2, 4)], [2]),
        ([Span(6, 8)], [6]),
        ([Span(0, 2), Span(3, 5), Span(7, 8)], [0, 1, 3]),
        ([Span(7, 8), Span(0, 2)], [5, 0]),
        ([Span(1, 3), Span(3, 5)], [1, 1]),
    ],
    ids=["at 0", "in the middle", "at the end", "all three", "in any order", "side by side"],
)
def test_boundaries_after_the_cut_count_the_layers_kept_before(spans, boundaries):
    kept = kept_layers(spans, 8)
    assert [pruned_boundary(span, spans) for span in spans] == boundaries
    assert boundaries == [sum(layer < span.start for layer in kept) for span in spans]
