"""The table of settings: each row says what it is and what it may be, and its default is that."""

from __future__ import annotations

from math import inf, nan
from typing import Any

import pytest

from jaxsft import allowed, config
from jaxsft.allowed import Allowed, above, at_least, from_to, from_to_below, names_of, none_or, one_of
from jaxsft.keys import KEYS, Key


def test_every_key_has_a_meaning() -> None:
    assert [key.name for key in KEYS if len(key.meaning) < 8] == []


def test_every_key_says_what_it_may_be() -> None:
    assert [key.name for key in KEYS if not config.wanted(key.name)] == []


@pytest.mark.parametrize("key", KEYS, ids=lambda key: key.name)
def test_a_default_is_allowed(key: Key) -> None:
    assert key.allowed.admits(key.default)
    assert key.allowed.unknown(key.default) == []


def test_the_config_has_every_key_once() -> None:
    names = [key.name for key in KEYS]
    assert len(set(names)) == len(names)
    assert sorted(names) == list(config.kinds()) == list(config.flatten(config.default().to_dict()))
    assert config.kinds()["train.steps"] == (int, True)
    assert config.kinds()["train.epochs"] == (float, False)
    values = config.default()
    assert [key.name for key in KEYS if config.get(values, key.name) != key.default] == []


def test_two_configs_share_nothing() -> None:
    first = config.default()
    first.train.steps, first.optim.lr = 7, 0.5
    assert (config.default().train.steps, config.default().optim.lr) == (None, 0.01)


def test_a_key_of_whole_numbers_takes_no_text_though_it_is_none() -> None:
    with pytest.raises(TypeError):
        config.default().train.steps = "7"


def test_the_keys_that_a_resumed_run_may_change_exist() -> None:
    assert [name for name in config.FREE if not any(key.name.startswith(name) for key in KEYS)] == []


# what is allowed, its words, values that are, values that are not
CASES: tuple[tuple[Allowed, str, tuple[Any, ...], tuple[Any, ...]], ...] = (
    (one_of("a", "b"), "'a' or 'b'", ("a", "b"), ("", "c")),
    (one_of("a", "b", "c"), "'a', 'b' or 'c'", ("a", "b", "c"), ("d",)),
    (at_least(1), "1 or more", (1, 10**9), (0, -1, inf, nan, "1")),
    (above(0), "above 0", (1e-9, 1e9), (0, -1, inf, nan)),
    (above(0, at_most=1), "above 0, at most 1", (0.1, 1), (0, 1.1, nan)),
    (above(0, below=1), "above 0, below 1", (0.1, 0.9), (0, 1, nan)),
    (from_to(32, 64), "32 to 64", (32, 64), (31, 65, nan)),
    (from_to_below(0, 1), "0 to below 1", (0, 0.9), (-0.1, 1, nan)),
    (none_or(at_least(1)), "None or 1 and more", (None, 1), (0, "None")),
    (none_or(from_to(0, 2)), "None or 0 to 2", (None, 0, 2), (-1, 3)),
    (names_of(lambda: ("a", "b")), "a tuple of names", ((), ("a", "b", "a"), ("c",)), ((1,), (("a",),), None)),
    (allowed.SEED, "0 to 2**63 - 1", (0, 2**63 - 1), (-1, 2**63)),
    (allowed.RESIZE, "None or image_size to 4096", (None, 4096), (4097,)),
    (allowed.RGB_ABOVE_0, "three numbers above 0", ((1, 2, 3),), ((1, 2), (1, 2, 0), (1, 2, inf), (1, 2, "3"))),
)


@pytest.mark.parametrize(("rule", "text", "good", "bad"), CASES, ids=[rule.text for rule, *_ in CASES])
def test_what_is_allowed(rule: Allowed, text: str, good: tuple[Any, ...], bad: tuple[Any, ...]) -> None:
    assert rule.text == text
    assert [value for value in good if not rule.admits(value)] == []
    assert [value for value in bad if rule.admits(value)] == []


def test_names_that_there_are_not() -> None:
    assert names_of(lambda: ("a", "b")).unknown(("a", "c", "b", "d")) == ["c", "d"]
    assert allowed.name_of(lambda: ("a", "b")).unknown("ab") == ["ab"]
    assert one_of("a", "b").unknown("c") == []  # the test has said it
