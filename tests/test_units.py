"""Time limits, memory sizes and patterns."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core import patterns
from core.units import MAX_MEMORY, MAX_TIME_LIMIT, format_time_limit, parse_memory, parse_time_limit


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (1, 60),
        (0.5, 30),
        (1.1, 66),
        (0.0001, 1),
        (0, None),
        ("0", None),
        ("0:00", None),
        ("unlimited", None),
        ("INFINITE", None),
        ("30", 1800),
        ("1:30", 90),
        ("0:01:30", 90),
        ("2:00:00", 7200),
        ("1-2", 93_600),
        ("1-02:30", 95_400),
        ("1-02:00:30", 93_630),
    ],
)
def test_time_limits(value: int | float | str, seconds: int | None) -> None:
    assert parse_time_limit(value) == seconds


@pytest.mark.parametrize(
    "value",
    [-1, -0.1, math.nan, math.inf, 10**30, 1e300, True, None, "", " 5", "5 ", "-1", "1:2:3:4", "1-", "-",
     "1.5", "٣", "1-2-3", "9" * 13, "9" * 5000, "999999999999", "3651-0", [5]],
)  # fmt: skip
def test_time_limits_refused(value: object) -> None:
    with pytest.raises(ValueError, match="time limit"):
        parse_time_limit(value)  # type: ignore[arg-type]


@given(st.none() | st.integers(1, MAX_TIME_LIMIT))
def test_a_shown_time_limit_can_be_posted_again(seconds: int | None) -> None:
    assert parse_time_limit(format_time_limit(seconds)) == seconds


@given(st.floats(min_value=1e-6, max_value=MAX_TIME_LIMIT / 60))
def test_minutes_are_rounded_up(minutes: float) -> None:
    seconds = parse_time_limit(minutes)
    assert seconds is not None
    assert minutes * 60 * (1 - 1e-12) <= seconds < minutes * 60 * (1 + 1e-12) + 1


@given(st.text(max_size=20))
def test_no_text_gets_another_error_than_valueerror(text: str) -> None:
    for parse in (parse_time_limit, parse_memory):
        try:
            parse(text)
        except ValueError:
            continue


def test_shown_time_limits() -> None:
    assert [format_time_limit(s) for s in (90, 93_600, None)] == ["0:01:30", "1-02:00:00", "UNLIMITED"]


@pytest.mark.parametrize(
    ("value", "mebibytes"),
    [(512, 512), ("512", 512), ("512M", 512), ("4G", 4096), ("4GB", 4096), ("2g", 2048),
     ("1T", 2**20), ("1K", 1), ("1025k", 2), ("1024T", MAX_MEMORY)],
)  # fmt: skip
def test_memory(value: int | str, mebibytes: int) -> None:
    assert parse_memory(value) == mebibytes


@pytest.mark.parametrize("value", [0, -1, True, 1.5, None, "", "0", "-1", "1.5G", "4P", "G", "1025T", "4 G", "9" * 40])
def test_memory_refused(value: object) -> None:
    with pytest.raises(ValueError, match="memory"):
        parse_memory(value)  # type: ignore[arg-type]


@given(st.integers(1, MAX_MEMORY))
def test_memory_in_mebibytes_is_itself(mebibytes: int) -> None:
    assert parse_memory(mebibytes) == parse_memory(f"{mebibytes}M") == mebibytes


def expanded(pattern: str, name: str = "train", **more: int) -> str:
    return patterns.expand(pattern, job_id=42, name=name, user="ada", node="n1.example.org", restart_cnt=2, **more)


@pytest.mark.parametrize(
    ("pattern", "path"),
    [
        (patterns.DEFAULT, "slurm-42.out"),
        ("%%j %J-%A-%a-%r", "%j 42-42-0-2"),
        ("%x/%u@%N.%n%t.%s", "train/ada@n1.00.batch"),
        ("%4j_%3r_%2n_%9x", "0042_002_00_train"),
        ("%99999999999999999999j", "0000000042"),
        ("%z%", "%z%"),
    ],
)
def test_patterns(pattern: str, path: str) -> None:
    assert expanded(pattern) == path


def test_arrays() -> None:
    assert expanded("%A_%a_%3a", array_job_id=40, array_task_id=7) == "40_7_007"


@pytest.mark.parametrize(
    ("pattern", "name", "path"),
    [
        ("%x", "a/../../b", "a_.._.._b"),
        ("%x/out", "..", "__/out"),
        (".%x/out", ".", "__/out"),
        ("%x", ".", "_"),
        ("%x", "/etc/passwd", "_etc_passwd"),
        ("%x", "a\0b", "a_b"),
        ("%x/out", "", "_/out"),
        ("%x", "%j", "%j"),
    ],
)
def test_a_name_makes_no_folder(pattern: str, name: str, path: str) -> None:
    assert expanded(pattern, name) == path


@given(st.text(alphabet="%xj4u/.a", max_size=12), st.text(alphabet="./\0a%", max_size=5))
def test_names_never_change_the_folders(pattern: str, name: str) -> None:
    path = expanded(pattern, name)
    assert path.count("/") == pattern.count("/")
    assert path.split("/").count("..") == pattern.split("/").count("..")
    assert "\0" not in path


@pytest.mark.parametrize("pattern", ["slurm-%j.out", "/data/%x/%4j", "a/./b", "é" * 127, "/dev/null", "..a"])
def test_valid_patterns(pattern: str) -> None:
    patterns.validate(pattern)


@pytest.mark.parametrize(
    "pattern",
    [
        "",
        "a\0b",
        "a\nb",
        "a\x7f",
        "a\x85",
        "../a",
        "a/../b",
        "..",
        ".",
        "a/",
        "a/.",
        "é" * 128,
        "a/" * 2000 + "b",
        "\ud800",
    ],
)
def test_invalid_patterns(pattern: str) -> None:
    with pytest.raises(ValueError, match=r"file|path"):
        patterns.validate(pattern)
