"""`--set key=value`: the value as its key's type has it, and spelled so that a shell and raystar read it back."""

from __future__ import annotations

import shlex

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raystar.base.command import command
from raystar.base.errors import RaystarError
from raystar.config.assignment import assignment, parse_assignment
from raystar.config.load import get_value, override, request_config
from raystar.config.schema import Config, known_keys
from raystar.tune import parser

ODD = [
    "0", "no", "null", "2024-06-18", "0x1F", "12:30:45", "1e3", "[x]", "key: value", "a, b", "-dash", "~", "#x", "a #b",
    "1999", "'q'", '"', "it's", "'a' and 'b'", " x ", "{a", "\\", "a\\", "café", "*", "\n", "\x1b[31m", "\u202eback",
    "$HOME", "`id`", "!x", "a;b", "😀", '"a\\', "''",
]  # fmt: skip
names = st.sampled_from(ODD) | st.text(min_size=1, max_size=12).filter(lambda name: "\0" not in name)


@pytest.mark.parametrize(
    ("written", "found"),
    [
        ("data.data_root=/x/Project #3", "/x/Project #3"),
        ("data.data_root=/x/a: b", "/x/a: b"),
        ("data.data_root=1999", "1999"),
        ("data.data_root=null", "null"),  # it may not be null, so this is a folder
        ("data.data_root= a ", " a "),
        ("data.data_root=a=b", "a=b"),
        ("data.data_root='1999'", "1999"),
        ("data.data_root='it''s'", "it's"),
        ("data.data_root='a' and 'b'", "'a' and 'b'"),  # quotes around parts are the text's own
        ('data.data_root="a\\tb\\x41"', "a\tbA"),
        ('data.data_root="\\q"', '"\\q"'),
        ("data.cache_dir=null", None),
        ("data.cache_dir=", None),
        ("data.cache_dir='null'", "null"),
        ("data.cache_dir=~", "~"),
        ("training.progress_style=off", "off"),
        ("training.progress_style='off'", "off"),
        ("model.discriminator_norm=none", "none"),
        ("data.domains=[0, no, 12:30:45, key: value, a #b]", ["0", "no", "12:30:45", "key: value", "a #b"]),
        ("data.domains=[ 'a, b' , \"[x]\",it's,]", ["a, b", "[x]", "it's"]),
        ("data.domains=[]", []),
        ("data.max_samples=[1, 2]", [1, 2]),
        (" loss.w_cyc =2.0", 2.0),
    ],
)
def test_a_value_is_what_its_key_says(written: str, found: object) -> None:
    assert parse_assignment(written) == (written.partition("=")[0].strip(), found)


@pytest.mark.parametrize("written", ["data.domains=[a, b, {]", "data.domains=['a' b, c]", "data.domains=[a,,b]"])
def test_a_list_that_is_none(written: str) -> None:
    with pytest.raises(RaystarError, match=r"cannot be read as a list of names, \[one, two, 'three, with a comma'\]"):
        parse_assignment(written)


@pytest.mark.parametrize("written", ["data.domains=a", "data.domains=[a, [b]]", "data.domains={a: b}"])
def test_what_is_no_list_of_names(written: str) -> None:
    with pytest.raises(RaystarError, match=r"--set: data\.domains: expected a list of names"):
        request_config(None, [], [written])


@pytest.mark.parametrize(
    "written", ["data.data_root=a\udce9", 'data.data_root="a\\udce9"', "data.domains=[a, b\udce9]"]
)
def test_bytes_that_are_no_text_are_refused(written: str) -> None:
    with pytest.raises(RaystarError, match=r"in UTF-8 \(a file or folder whose name holds other bytes must be"):
        request_config(None, [], [written])


def printed(key: str, value: object) -> str:
    """As a command says it."""
    written = command("tune", ("--set", assignment(key, value)))
    assert written.isprintable()
    return written


def read(shell: str) -> Config:
    """What the command's own parser and the configuration make of a line in a shell."""
    words = shlex.split(shell)
    assert words[:3] == ["python", "-m", "raystar.tune"]
    return request_config(None, [], parser().parse_args(words[3:]).set)


@pytest.mark.parametrize("key", known_keys())
def test_every_key_is_spelled_as_it_is_read(key: str) -> None:
    assert read(printed(key, get_value(Config(), key))) == Config()


@settings(max_examples=400, derandomize=True, database=None, deadline=None)
@given(name=names, key=st.sampled_from(["data.data_root", "data.cache_dir", "visualization.vae_model_name_or_path"]))
def test_texts_are_spelled_as_they_are_read(name: str, key: str) -> None:
    config = read(printed(key, name))
    assert get_value(config, key) == name


@settings(max_examples=400, derandomize=True, database=None, deadline=None)
@given(domains=st.lists(names, min_size=2, max_size=5))
def test_names_are_spelled_as_they_are_read(domains: list[str]) -> None:
    try:
        wanted = override(Config(), {"data.domains": domains})
    except RaystarError:  # blank, or twice
        return
    assert read(printed("data.domains", domains)) == wanted


def test_values_that_begin_with_a_dash_belong_to_their_flag() -> None:
    words = shlex.split(command("tune", ("--out", "-x"), ("--name", "a b"), ("--space", "it's")))
    args = parser().parse_args(words[3:])
    assert (str(args.out), args.name, args.space) == ("-x", "a b", "it's")
