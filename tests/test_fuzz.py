"""Whatever a file or a command line holds: it is accepted and usable, or refused with `RaystarError`. Nothing else.

Thousands of inputs by hypothesis, the same in every run and under a minute in all. To search longer, with new inputs
each time, name how many times as many:

    RAYSTAR_FUZZ=100 python -m pytest tests/test_fuzz.py
"""

from __future__ import annotations

import io
import itertools
import json
import os
import pickle
import resource
import shutil
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from raystar import export
from raystar.base import torch_file as pt
from raystar.base.errors import RaystarError
from raystar.config import load as configs
from raystar.config import schema, strict_yaml
from raystar.config.assignment import parse_assignment
from raystar.config.load import from_mapping, get_value, load_config, override, signature, to_mapping, to_yaml
from raystar.config.schema import Config, known_keys
from raystar.data import bank as dataset
from raystar.data.bank import open_bank, reopen_bank
from raystar.data.latent import read_latent
from raystar.exported import model as model_module
from raystar.model import checkpoint as checkpoints
from raystar.model.networks import NAMES
from raystar.ruler import ruler
from raystar.search.distributions import KINDS
from raystar.search.space import Space, load_space
from raystar.search.space import from_mapping as space_from_mapping
from raystar.training import resume
from raystar.training.compile import SPEED_KEYS
from raystar.training.state import TrainState
from tests.kit.support import ROOT, tiny_config, write_latents
from tests.model.test_checkpoint import Trap, trained

TIMES = int(os.environ.get("RAYSTAR_FUZZ", "1"))
CPU = torch.device("cpu")
AB = ("a", "b")
MOST_MEMORY = 400 * 2**20
MOST_WORDS = 4000
T = TypeVar("T")

pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy's, of numbers that are refused right after
    pytest.mark.filterwarnings("ignore::UserWarning"),  # torch's, of tensors of rare kinds
]


def examples(count: int) -> Callable[[T], T]:
    """So many inputs, none of which may take longer than ten seconds on a busy machine."""
    return settings(
        max_examples=count * TIMES,
        derandomize=TIMES == 1,
        deadline=10_000,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


@pytest.fixture(autouse=True)
def bounded() -> Iterator[None]:
    """No input makes the process grow by more than `MOST_MEMORY`, and none that tries takes the machine with it."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + 8 * 2**30, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, limits)
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < MOST_MEMORY


def accepted(attempt: Callable[[], T]) -> T | None:
    """What `attempt` returns; None if it is refused in words. Any other exception is a failure of the test."""
    try:
        return attempt()
    except RaystarError as error:
        words = str(error)
        assert words.strip()
        assert len(words) < MOST_WORDS
        return None


# -- how inputs are made ---------------------------------------------------------------------------

SPLICES = [
    ".nan", ".inf", "-.inf", "-0.0", "1e400", "1e-400", "0x" + "f" * 5000, "9" * 5000, "-1", "1_0", "0o17", "1:30",
    "2.5", "!!python/object/apply:os.mkdir [ran]", "!!python/name:os.system", "!!timestamp x", "!!int ''", "!!bool x",
    "!!float x", "!!binary x", "!!set {a}", "!!omap [a: 1]", "!!str 1", "! x", "2001-99-99", "2001-01-01", "&a ", "*a",
    "&a [*a, *a]", "<<: *a", "<<: {w_cyc: 2}", "{<<: [1]}", "{<<: 1}", "<<", "=", "[" * 40, "{a: " * 40, "- " * 40,
    "? ", "[a, b]", "{}", "[]", "null", "~", "true", "off", "'", '"', '"\\ud83d"', '"\\0"', "#", ": ", ":", "- ",
    "---\n", "...\n", "%YAML 2.0\n", "\t", "\n", "\n\n  ", " ", "\0", "\x85", "\ufeff", "\u2028", "\U0001f600",
    "\\", "@", "`", "|", ">", "|2\n x", ",", "]", "}", "/", "..",
]  # fmt: skip
places = st.integers(0, 2**20)


@st.composite
def edited_text(draw: st.DrawFn, originals: list[str]) -> str:
    """A real file in which something was lost, written twice, moved, or replaced."""
    text = draw(st.sampled_from(originals))
    for _ in range(draw(st.integers(1, 4))):
        lines = text.split("\n")
        at, other = (draw(places) % len(lines) for _ in range(2))
        how = draw(
            st.sampled_from(["value", "value", "value", "insert", "lose", "twice", "swap", "indent", "cut", "letter"])
        )
        if how == "value" and ":" in lines[at]:
            lines[at] = lines[at].partition(":")[0] + ": " + draw(st.sampled_from(SPLICES) | st.text(max_size=8))
        elif how == "insert":
            column = draw(places) % (len(lines[at]) + 1)
            lines[at] = lines[at][:column] + draw(st.sampled_from(SPLICES)) + lines[at][column:]
        elif how == "lose":
            del lines[at]
        elif how == "twice":
            lines.insert(other, lines[at])
        elif how == "swap":
            lines[at], lines[other] = lines[other], lines[at]
        elif how == "indent":
            lines[at] = draw(st.sampled_from(["", "  ", "    ", "\t"])) + lines[at].strip()
        elif how == "letter" and lines[at]:
            column = draw(places) % len(lines[at])
            lines[at] = lines[at][:column] + draw(st.characters()) + lines[at][column + 1 :]
        text = "\n".join(lines[:at] if how == "cut" else lines) if lines else ""
    return text


numbers = (
    st.integers(-3, 40)
    | st.floats(0, 10)
    | st.sampled_from([0, 1, 0.5, 1e-4, "1e-4", "2", 2**31, 2**63, 10**400, -(10**4000), 1e308, 5e-324, -0.0])
    | st.sampled_from([float("nan"), float("inf"), -float("inf"), "nan", "inf", "1e400", "٣", "1_0", " 7 ", "0x10"])
)
texts = st.sampled_from(
    ["auto", "off", "bf16", "a", "", "\0", "\ud83d", "x/y", "..", "~nobody/x", "a" * 600]
) | st.text(max_size=6)
plain = st.none() | st.booleans() | numbers | texts | st.binary(max_size=3)
nested = st.recursive(
    plain,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(plain, inner, max_size=3) | st.tuples(inner, inner),
    max_leaves=8,
)
keys = st.sampled_from(known_keys())
values = numbers | st.lists(st.sampled_from(["a", "b", "ü", "a b", "\n", "-", "null"]) | texts, max_size=4) | nested


def damaged(original: bytes, early: int = 200) -> st.SearchStrategy[bytes]:
    """`original` truncated, with bits flipped, bytes replaced, lost or added; half of it within its first bytes."""
    at = st.integers(0, len(original) - 1) | st.integers(0, min(early, len(original)) - 1)
    piece = st.binary(max_size=4) | st.sampled_from([b"\xff" * 4, b"\0" * 8, b"\x7f" * 8, b".", b"(", b"R", b"9" * 20])

    def apply(edits: list[tuple[str, int, int, bytes]]) -> bytes:
        content = bytearray(original)
        for how, place, bit, new in edits:
            if how == "cut":
                del content[place:]
            elif how == "flip" and place < len(content):
                content[place] ^= 1 << bit
            elif how == "replace":
                content[place : place + len(new)] = new
            elif how == "lose":
                del content[place : place + len(new)]
            elif how == "add":
                content[place:place] = new
        return bytes(content)

    hows = st.sampled_from(["flip", "flip", "flip", "replace", "replace", "cut", "lose", "add"])
    return st.lists(st.tuples(hows, at, st.integers(0, 7), piece), min_size=1, max_size=3).map(apply)


# -- configurations --------------------------------------------------------------------------------

FILES = [path.read_text() for path in sorted((ROOT / "configs").glob("*.yaml"))]
# Most of their lines are remarks, and parsing is what takes the time.
SHORT = ["\n".join(line.partition(" #")[0] for line in FILES[0].split("\n") if not line.startswith("#"))]
SHORT += [
    to_yaml(from_mapping({}, "defaults"))[:600],
    "base: &a {w_cyc: 2}\nloss: {<<: *a, w_id: 1}\n",
    "loss: {w_cyc: 1}",
]


def assert_round_trip(config: Config, folder: Path) -> None:
    again = from_mapping(to_mapping(config), "again")
    assert again == config
    assert signature(again) == signature(config)
    (folder / "again.yaml").write_text(to_yaml(config), encoding="utf-8")
    (folder / "again.json").write_text(json.dumps(to_mapping(config)))
    assert load_config(folder / "again.yaml") == config == load_config(folder / "again.json")
    for key in known_keys():
        assert override(config, {key: configs.get_value(config, key)}) == config


@examples(15)
@given(text=edited_text(FILES))
def test_whole_configuration_files(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    check_configuration(tmp_path_factory.getbasetemp(), "c.yaml", text.encode("utf-8", "surrogatepass"))


@examples(400)
@given(text=edited_text(SHORT))
def test_configuration_files(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    check_configuration(tmp_path_factory.getbasetemp(), "c.yaml", text.encode("utf-8", "surrogatepass"))


@examples(120)
@given(content=damaged(SHORT[0].encode()))
def test_configuration_files_of_damaged_bytes(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    check_configuration(tmp_path_factory.getbasetemp(), "c.yaml", content)


@examples(250)
@given(text=edited_text([json.dumps(to_mapping(Config()), indent=1), '{"loss": {"w_cyc": 2, "w_id": 1}}']))
def test_json_configuration_files(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    check_configuration(tmp_path_factory.getbasetemp(), "c.json", text.encode("utf-8", "surrogatepass"))


def check_configuration(folder: Path, name: str, content: bytes) -> None:
    (folder / name).write_bytes(content)
    config = accepted(lambda: load_config(folder / name))
    if config is not None and config != Config():
        assert_round_trip(config, folder)


@examples(500)
@given(mapping=st.dictionaries(keys, values, min_size=1, max_size=3))
def test_values_of_keys(tmp_path_factory: pytest.TempPathFactory, mapping: dict[str, Any]) -> None:
    config = accepted(lambda: override(Config(), mapping))
    if config is not None:
        again = from_mapping(to_mapping(config), "again")
        assert again == config
        assert signature(again) == signature(config)
        assert load_text(tmp_path_factory, to_yaml(config)) == config


def load_text(tmp_path_factory: pytest.TempPathFactory, text: str) -> Config:
    path = tmp_path_factory.getbasetemp() / "text.yaml"
    path.write_text(text, encoding="utf-8")
    return load_config(path)


sections = st.sampled_from([*schema.SECTIONS, "los"]) | plain
names = st.sampled_from([f.name for cls in schema.SECTIONS.values() for f in fields(cls)]) | plain


@examples(400)
@given(mapping=st.dictionaries(sections, st.dictionaries(names, values, max_size=3) | values, max_size=3) | nested)
def test_mappings(mapping: Any) -> None:
    if isinstance(mapping, dict):
        config = accepted(lambda: from_mapping(mapping, "fuzz"))
        assert config is None or from_mapping(to_mapping(config), "again") == config


written = numbers.map(lambda n: n if isinstance(n, str) else f"{n:.17g}" if isinstance(n, float) else f"{n:#x}")
assignments = st.tuples(
    keys | texts, st.sampled_from(["=", "==", " = ", ""]), st.sampled_from(SPLICES) | texts | written
)


@examples(500)
@given(texts=st.lists(assignments, max_size=3))
def test_assignments(texts: list[tuple[str, str, str]]) -> None:
    arguments = ["".join(parts) for parts in texts]
    config = accepted(lambda: configs.request_config(ROOT / "configs/none.yaml", [], arguments))
    assert config is None
    pairs = accepted(lambda: dict(parse_assignment(argument) for argument in arguments))
    if pairs is not None:
        config = accepted(lambda: override(Config(), pairs, "--set"))
        assert config is None or from_mapping(to_mapping(config), "again") == config


@examples(200)
@given(name=texts | st.text(max_size=300))
def test_names_of_files(name: str) -> None:
    """None of them is a configuration; none is created or breaks anything."""
    missing = f"no such folder/{name}"
    for attempt in (
        lambda: load_config(strict_yaml.find_shipped(missing)),
        lambda: checkpoints.load(missing),
        lambda: model_module.load(missing),
        lambda: open_bank(override(Config(), {"data.data_root": missing}), "unused"),
    ):
        assert accepted(attempt) is None
    assert not Path("unused").exists()


def _bomb(levels: int, item: str) -> str:
    lines = [f"a0: &a0 {item}"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, levels)]
    return "loss:\n" + "".join(f"  {line}\n" for line in lines) + f"  w_cyc: *a{levels - 1}\n"


def _merges(levels: int) -> str:
    return "a0: &a0 {k: 1}\n" + "".join(f"a{i}: &a{i} {{<<: [*a{i - 1}, *a{i - 1}]}}\n" for i in range(1, levels))


WIDE = "[" + ", ".join("x" for _ in range(9_000)) + "]"
LARGE: dict[str, tuple[str, str, str]] = {
    "aliases of aliases": ("yaml", _bomb(12, "x"), r"\*a0: aliases are not read; write the value out"),
    "merges of merges": ("yaml", _merges(40), r"\*a0: aliases are not read"),
    "a merge of itself": ("yaml", "loss: &a {<<: *a}", r"\*a: aliases are not read"),
    "itself": ("yaml", "&a [*a]", r"\*a: aliases are not read"),
    "many values": ("yaml", "- 1\n" * 11_000, "more than 10000 values"),
    "as many values as there may be": ("yaml", f"loss: {{a: {'x' * 9000}, w_cyc: {WIDE}}}", "unknown key 'loss.a'"),
    "brackets": ("yaml", "[" * 900_000, "nested deeper than 32 levels"),
    "mappings": ("yaml", "{a: " * 200_000, "nested deeper than 32 levels"),
    "keys of keys": ("yaml", "? " * 400_000, "nested deeper than 32 levels"),
    "dashes": ("yaml", "- " * 400_000, "nested deeper than 32 levels"),
    "a number to the base 60": ("yaml", "loss: {w_cyc: 1" + ":59" * 100_000 + "}", "over 10000 characters"),
    "a long text": ("yaml", "data: {data_root: " + "x y" * 50_000 + "}", "over 10000 characters"),
    "JSON brackets": ("json", "[" * 900_000, "nested too deeply"),
    "JSON objects": ("json", '{"a":' * 150_000, "nested too deeply"),
    "JSON digits": ("json", '{"loss": {"w_cyc": ' + "9" * 900_000 + "}}", "not readable as JSON"),
}


@pytest.mark.parametrize("kind", LARGE)
def test_small_files_that_claim_much(tmp_path: Path, kind: str) -> None:
    suffix, text, words = LARGE[kind]
    path = tmp_path / f"c.{suffix}"
    path.write_text(text)
    with pytest.raises(RaystarError, match=words) as caught:
        load_config(path)
    assert len(str(caught.value)) < MOST_WORDS


# -- spaces ----------------------------------------------------------------------------------------

SPACES = [path.read_text() for path in sorted((ROOT / "search_spaces").glob("*.yaml"))]
SPACES.append("trials: 3\nsearch: grid\nspace:\n  loss.w_id: {choice: [0, 1]}\n  model.d_layers: {choice: [1, 2]}\n")
BASE = override(Config(), {"training.epoch_size": 64})


def assert_usable(space: Space, trials: int = 300) -> None:
    """Every point is a configuration that lies within the ranges; there are as many as can be asked for."""
    points = accepted(lambda: space.points(BASE, CPU))
    if points is None:
        return
    known = len(space.known(BASE, CPU))
    assert 1 <= len(points) <= max(space.trials, 1) + len(space.experiments)
    assert len({tuple(point.values()) for point in points[known:]}) == len(points[known:])
    for number, point in enumerate(points[:trials]):
        config = override(BASE, point)
        assert from_mapping(to_mapping(config), "again") == config
        if number >= known:
            for key, drawn in point.items():
                if key not in space.space:
                    assert drawn == get_value(BASE, key)
                    continue
                low, high = space.space[key].values[0], space.space[key].values[-1]
                if space.space[key].kind == "choice":
                    assert drawn in space.space[key].values or not space.purpose.models
                else:
                    assert low <= drawn <= high


@examples(250)
@given(text=edited_text(SPACES))
def test_space_files(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.getbasetemp() / "s.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    space = accepted(lambda: load_space(path, BASE))
    if space is not None:
        assert_usable(space, 3)


searched = st.sampled_from([key for key in known_keys() if key.partition(".")[0] in ("loss", "training", "model")])
ranges = st.builds(
    lambda kind, content: {kind: content},
    st.sampled_from(list(KINDS)),
    st.lists(numbers | st.booleans() | st.sampled_from(["bf16", "default"]), min_size=2, max_size=2) | nested,
)
good_ranges = st.fixed_dictionaries({}, optional={
    "loss.w_cyc": st.builds(lambda a, b: {"uniform": [a, a + b]}, st.floats(0, 1e300), st.floats(0, 1e300)),
    "loss.w_id": st.builds(lambda a, b: {"loguniform": [a, a * b]}, st.floats(0, 1e10), st.floats(1, 1e290)),
    "loss.r1_interval": st.builds(lambda a, b: {"randint": [a, b]}, st.integers(0, 9), st.integers(1, 2**31)),
    "training.batch_size": st.lists(st.integers(1, 100), min_size=1, max_size=40).map(lambda c: {"choice": c}),
    "training.use_amp": st.lists(st.booleans(), min_size=1, max_size=3).map(lambda c: {"choice": c}),
    "training.lr_g": st.lists(st.sampled_from([1e-4, "1e-4", 1e-3]), min_size=1).map(lambda c: {"choice": c}),
})  # fmt: skip
speed_ranges = st.dictionaries(
    st.sampled_from(SPEED_KEYS), st.just({"choice": [False, True]}) | st.just({"choice": ["bf16", "fp16"]}), max_size=3
)
experiments = st.dictionaries(
    st.sampled_from(["a", "b.c", "baseline", "t00"]) | texts,
    st.dictionaries(searched | texts, numbers | st.booleans() | nested, max_size=3) | nested,
    max_size=3,
)
a_space = st.fixed_dictionaries(
    {"space": good_ranges | st.dictionaries(searched | texts, ranges | nested, max_size=3) | speed_ranges},
    optional={
        "trials": st.integers(1, 12) | numbers,
        "search": st.sampled_from(["random", "grid", "tpe"]) | nested,
        "purpose": st.sampled_from(["quality", "speed"]) | nested,
        "baseline": st.booleans() | nested,
        "seed": st.integers(0, 99) | numbers,
        "metric": st.sampled_from(["score", "style", "speedup"]) | nested,
        "mode": st.sampled_from(["min", "max"]) | nested,
        "description": nested,
        "scheduler": nested
        | st.dictionaries(
            st.sampled_from(["type", "max_epochs", "grace_epochs", "reduction_factor"]),
            st.sampled_from(["asha", "none"]) | numbers,
        ),
        "resources": nested
        | st.dictionaries(st.sampled_from(["gpus", "cpus", "workers"]), st.sampled_from(["auto", 1, 0, 0.5]) | numbers),
        "experiments": experiments
        | st.lists(st.fixed_dictionaries({"name": texts | numbers}, optional={"overrides": nested}) | nested),
        "spase": nested,
    },
)


@examples(500)
@given(mapping=a_space)
def test_spaces(mapping: dict[str, Any]) -> None:
    space = accepted(lambda: space_from_mapping(mapping, BASE, "fuzz"))
    if space is not None:
        assert_usable(space)


@pytest.mark.parametrize("purpose", ["quality", "speed"])
def test_spaces_without_end(purpose: str) -> None:
    switches = {
        key: {"choice": [False, True] * 200} for key in SPEED_KEYS if key.partition("compile_")[2] not in ("", "mode")
    }
    with pytest.raises(RaystarError, match=r"at most 10000 combinations, found \d{6,}"):
        space_from_mapping({"purpose": purpose, "search": "grid", "space": switches}, BASE, "s.yaml")
    with pytest.raises(RaystarError, match="trials: expected at most 10000"):
        space_from_mapping({"purpose": purpose, "trials": 10**9, "space": switches}, BASE, "s.yaml")
    # Two combinations, and two million draws that find no third.
    space = space_from_mapping({"trials": 10_000, "space": {"loss.w_id": {"choice": [0, 1]}}}, BASE, "s.yaml")
    assert len(space.points(BASE, CPU) or ()) == 2


# -- latents ---------------------------------------------------------------------------------------

X = torch.arange(4 * 8 * 8).reshape(4, 8, 8).float() / 8


def saved(value: Any, **form: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file, **form)
    return file.getvalue()


def saved_npy(value: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, value)
    return file.getvalue()


def archive(original: bytes, content: bytes, method: int = zipfile.ZIP_STORED) -> bytes:
    """The `.pt` archive `original` around another pickle."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(original)) as old, zipfile.ZipFile(file, "w", method) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, content if entry.filename.endswith("data.pkl") else old.read(entry))
    return file.getvalue()


def pickle_of(original: bytes) -> bytes:
    with zipfile.ZipFile(io.BytesIO(original)) as file:
        return file.read(next(name for name in file.namelist() if name.endswith("data.pkl")))


TENSOR = saved(X)
NPY = [saved_npy(X.numpy()), saved_npy(X.numpy().astype(">f2")), saved_npy(np.array([{}, None], dtype=object))]
PT = [TENSOR, saved({"latent": X.half(), "path": "a.png"}), saved(X, _use_new_zipfile_serialization=False)]
PICKLES = [pickle_of(content) for content in PT[:2]] + [pickle_of(saved([X, X.to_sparse(), torch.nn.Parameter(X)]))]
descriptions = st.sampled_from(
    ["<f4", "<f2", ">f8", "<f16", "|O", "<i4", "|V0", "|S0", "<U9", "f4,f4", "<c8", "", "(9,9)f4", "m8[s]"]
)
sizes = st.sampled_from([0, 1, 3, 4, 8, 16, -1, 2**31, 2**62, 2**64, 10**30, True, 4.0, "4"])
headers = st.builds(
    lambda descr, order, shape: repr({"descr": descr, "fortran_order": order, "shape": tuple(shape)}),
    descriptions | nested, st.booleans() | nested, st.lists(sizes, max_size=5),
) | st.sampled_from(
    ["{" * 500, "-" * 9000 + "1", "(" * 9000, "[" * 9000, "1" * 9000, "'" * 3, "x" * 9990, "{'descr': '<f4'}"]
)  # fmt: skip


def an_npy(header: str, length: int, version: bytes) -> bytes:
    text = header.encode("utf-8", "surrogatepass")[: 2**16 - 1]
    return b"\x93NUMPY" + version + (len(text)).to_bytes(2, "little") + text + b"\x3c" * length


lengths = st.sampled_from([0, 2 * 4 * 64, 4 * 4 * 64])
versions = st.sampled_from([b"\1\0", b"\2\0", b"\3\0", b"\7\0"])
npy_bytes = st.one_of(*map(damaged, NPY), st.builds(an_npy, headers, lengths, versions), st.binary(max_size=40))
pt_bytes = st.one_of(
    *map(damaged, PT),
    *(damaged(content, len(content)).map(lambda new: archive(TENSOR, new)) for content in PICKLES),
    *(damaged(content, len(content)) for content in PICKLES),
    st.binary(max_size=40),
)


def read_or_reason(path: Path) -> Any:
    """The latent, or the reason why not, which `open_bank` puts behind the file's name."""
    try:
        return read_latent(str(path), 4)
    except ValueError as error:
        return str(error)


def check_latent_file(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    found = read_or_reason(path)
    if isinstance(found, str):
        assert 0 < len(found) < 400
        assert "\n" not in found
        return
    assert found.shape[0] == 4
    assert found.dtype in (np.float16, np.float32)
    assert found.nbytes <= 2 * len(content)  # big-endian float16 becomes float32
    assert np.isfinite(found).all()


@examples(500)
@given(content=npy_bytes)
def test_npy_files(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    check_latent_file(tmp_path_factory.getbasetemp() / "x.npy", content)


@examples(700)
@given(content=pt_bytes)
def test_pt_files(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    check_latent_file(tmp_path_factory.getbasetemp() / "x.pt", content)


def _expanded(*size: int) -> bytes:
    return saved(torch.ones(1).expand(*size))


def _deflated() -> bytes:
    zeros = saved(torch.zeros(4, 1024, 1024))
    return archive(zeros, pickle_of(zeros), zipfile.ZIP_DEFLATED)


HEX = b"c_codecs\nencode\n(c_codecs\nencode\n(X\1\0\0\0aX\6\0\0\0latin1tRX\3\0\0\0hextR."


def _twice(level: int) -> bytes:
    """Opcodes of a list that holds the list of the level below two times."""
    return b"](h%ch%ceq%c" % (level, level, level + 1)


BOMBS: dict[str, Callable[[], bytes]] = {
    "one number, four thousand million times": lambda: _expanded(4, 32768, 32768),
    "the same in a dictionary": lambda: saved({"latent": torch.ones(4, 1, 1).expand(4, 2**14, 2**14)}),
    "compressed": _deflated,
    "bytearray": lambda: archive(TENSOR, b"\x80\2cbuiltins\nbytearray\n(J\0\0\0\x7ftR."),
    "bytearray of Python 2": lambda: archive(TENSOR, b"\x80\2c__builtin__\nbytearray\n(J\0\0\0\x7ftR."),
    "bytearray without an archive": lambda: b"\x80\2cbuiltins\nbytearray\n(J\0\0\0\x7ftR.",
    "codecs": lambda: archive(TENSOR, b"\x80\2" + HEX),
    "a tensor of a length": lambda: archive(TENSOR, b"\x80\2ctorch\nFloatTensor\n(J\0\0\0\x7ftR."),
    "code": lambda: pickle.dumps(Trap(Path("ran")), protocol=4),
    "itself": lambda: archive(TENSOR, b"\x80\2]q\0h\0a."),
    "lists of lists": lambda: archive(TENSOR, b"\x80\2]q\0" + b"".join(map(_twice, range(200))) + b"."),
}  # fmt: skip


@pytest.mark.parametrize("kind", BOMBS)
def test_small_tensors_that_claim_much(tmp_path: Path, kind: str) -> None:
    check_latent_file(tmp_path / "x.pt", BOMBS[kind]())
    assert accepted(lambda: checkpoints.load(tmp_path / "x.pt")) is None
    with pytest.raises(ValueError, match=r"could run code|truncated or damaged|claim to hold|without end"):
        pt.read(tmp_path / "x.pt")
    assert not Path("ran").exists()


def test_a_compressed_archive_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    (tmp_path / "x.pt").write_bytes(_deflated())
    with pytest.raises(ValueError, match="a compressed archive, which torch"):
        pt.read(tmp_path / "x.pt")


def test_what_torch_itself_would_do_with_them(tmp_path: Path) -> None:
    """The bombs are live: without `torch_file.read`, `torch.load(weights_only=True)` opens them."""
    for kind in ("compressed", "bytearray", "itself", "one number, four thousand million times"):
        (tmp_path / "x.pt").write_bytes(BOMBS[kind]().replace(b"J\0\0\0\x7f", b"J\0\1\0\0"))
        torch.load(tmp_path / "x.pt", weights_only=True)


PLACES: dict[str, Callable[[Path], object]] = {
    "folder": lambda path: path.mkdir(),
    "link to itself": lambda path: path.symlink_to(path.name),
    "dangling link": lambda path: path.symlink_to("nowhere"),
    "pipe": os.mkfifo,
    "device without end": lambda path: path.symlink_to("/dev/zero"),
    "empty": lambda path: path.touch(),
}


@pytest.mark.parametrize("suffix", [".npy", ".pt"])
@pytest.mark.parametrize("kind", PLACES)
def test_what_is_no_file(tmp_path: Path, kind: str, suffix: str) -> None:
    root = write_latents(tmp_path / "data", AB, count=4, size=8)
    path = root / "a" / f"odd{suffix}"
    PLACES[kind](path)
    with pytest.raises(RaystarError, match=rf"odd\{suffix}: "):
        open_bank(tiny_config(root, AB), tmp_path / "cache")
    for read in (load_config, checkpoints.load):
        assert accepted(lambda read=read: read(path)) is None
    (path.parent / "b").mkdir()
    odd = override(tiny_config(root, AB), {"data.data_root": str(path)})
    assert accepted(lambda: open_bank(odd, tmp_path / "cache")) is None


file_names = st.binary(min_size=1, max_size=60).map(lambda name: name.replace(b"/", b"_").replace(b"\0", b"_"))


@examples(60)
@given(odd=st.lists(file_names, min_size=1, max_size=4, unique=True), suffix=st.sampled_from([b".npy", b".pt"]))
def test_names_of_latents(tmp_path_factory: pytest.TempPathFactory, odd: list[bytes], suffix: bytes) -> None:
    """Whatever the file system takes as a name is a latent like any other."""
    folder = tmp_path_factory.mktemp("named")
    root = write_latents(folder / "data", AB, count=3, size=8)
    written = set()
    for name in odd:
        with open(os.path.join(os.fsencode(root / "a"), name + suffix), "wb") as file:
            file.write(NPY[0] if suffix == b".npy" else TENSOR)
        if not name.startswith(b"."):
            written.add(os.fsdecode(name + suffix))
    config = tiny_config(root, AB)
    bank = open_bank(config, folder / "cache")
    assert {name.partition("/")[2] for name in bank.names if name.startswith("a/")} >= written
    assert len(bank.names) == 6 + len(written)
    assert reopen_bank(config, folder / "cache", bank.key).names == bank.names
    shutil.rmtree(folder)


PACKED = save({name: torch.stack([X + i for i in range(5)]).half() for name in AB})
claimed_shapes = st.lists(st.sampled_from([0, 1, 4, 8, 5, 2**31, 2**63 - 1]), max_size=5)


def a_packed(a: list[int], b: list[int], kind: str, length: int) -> bytes:
    header: dict[str, Any] = {}
    for name, shape in (("a", a), ("b", b)):
        header[name] = {
            "dtype": kind,
            "shape": shape,
            "data_offsets": [0 if name == "a" else length, length * (1 + (name == "b"))],
        }
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + b"\x3c" * (2 * length)


packed_bytes = damaged(PACKED) | st.builds(
    a_packed,
    claimed_shapes,
    claimed_shapes,
    st.sampled_from(["F16", "F32", "BF16", "F8_E4M3", "F4", "I8", "BOOL", "C64", "U16", "F99"]),
    st.sampled_from([0, 4 * 64 * 5, 2 * 4 * 64 * 5, 4 * 4 * 64 * 5]),
)


@examples(300)
@given(content=packed_bytes)
def test_packed_files(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    folder = tmp_path_factory.getbasetemp() / "packed"
    folder.mkdir(exist_ok=True)
    path = folder / "x.safetensors"
    path.write_bytes(content)
    config = tiny_config(path, AB)
    bank = accepted(lambda: open_bank(config, folder / "cache"))
    if bank is not None:
        assert bank.latents.nbytes <= 2 * len(content)  # bfloat16 as float32
        assert bool(bank.latents.isfinite().all())
    shutil.rmtree(folder)


def test_rows_that_take_no_room(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(a_packed([2**40, 4, 0, 8], [5, 4, 8, 8], "F16", 0))
    (tmp_path / "y.safetensors").write_bytes(save({"a": torch.zeros(10**9, 0, 8, 8), "b": X[None]}))
    for name in "xy":
        assert (
            accepted(lambda name=name: open_bank(tiny_config(tmp_path / f"{name}.safetensors", AB), tmp_path / "c"))
            is None
        )


# -- caches ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, Path, dataset.Bank, bytes, bytes]:
    folder = tmp_path_factory.mktemp("packed bank")
    config = tiny_config(write_latents(folder / "data", AB, count=6, size=8), AB)
    bank = open_bank(config, folder / "cache")
    contents = [(folder / "cache" / f"latents-{bank.key}.{end}").read_bytes() for end in ("json", "npy")]
    return config, folder / "cache", bank, contents[0], contents[1]


def _replaced(tree: Any, place: int, new: Any) -> Any:
    """`tree` with one of its values, at any depth, replaced."""
    count = itertools.count()

    def walk(value: Any) -> Any:
        if next(count) == place:
            return new
        if isinstance(value, dict):
            return {key: walk(content) for key, content in value.items()}
        if isinstance(value, list | tuple):
            return [walk(content) for content in value]
        return value

    found = walk(tree)
    return found if next(count) > place else _replaced(tree, place % (next(count) - 1), new)


json_values = (
    st.none() | st.booleans() | st.integers(-2, 10**12) | st.text(max_size=3) | st.lists(st.integers(0, 9), max_size=3)
)


@examples(80)
@given(data=st.data())
def test_damaged_packs_are_made_again(
    packed: tuple[Config, Path, dataset.Bank, bytes, bytes], data: st.DataObject
) -> None:
    """Either file damaged: the bank opens, whole. Latents' own bytes apart, which nobody reads again to check them."""
    config, cache, bank, index, array = packed
    paths = [cache / f"latents-{bank.key}.{end}" for end in ("json", "npy")]
    structure = st.builds(_replaced, st.just(json.loads(index)), st.integers(0, 60), json_values)
    contents = [
        data.draw(st.just(index) | damaged(index) | structure.map(lambda tree: json.dumps(tree).encode())),
        data.draw(st.just(array) | damaged(array[:128]).map(lambda head: head + array[128:]) | damaged(array, 128)),
    ]
    for path, content in zip(paths, contents, strict=True):
        path.unlink()  # the older one is still mapped
        path.write_bytes(content)
    reopened = accepted(lambda: reopen_bank(config, cache, bank.key))
    opened = open_bank(config, cache)
    for found in (opened, reopened) if reopened is not None else (opened,):
        assert found.latents.shape == bank.latents.shape
        for domain in (0, 1):
            rows = sorted([*found.train[domain], *found.held[domain]])
            assert rows == list(range(6 * domain, 6 * domain + 6))
        if contents[1] == array:
            assert torch.equal(found.latents, bank.latents)


Kept = tuple[dataset.Bank, Config, Path, bytes, dict[str, torch.Tensor]]


def kept(found: ruler.Ruler) -> dict[str, torch.Tensor]:
    """All that a ruler's file holds."""
    each = {f"{name}.{y}": x for name in ("target_features",) for y, x in enumerate(getattr(found, name))}
    return found.features.state_dict() | {name: getattr(found, name) for name in ruler._KEPT} | each


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Kept:
    folder = tmp_path_factory.mktemp("ruler")
    config = tiny_config(write_latents(folder / "data", AB, count=16, size=16), AB)
    bank = open_bank(config, folder / "cache")
    ruler.Ruler.build(bank, config, folder / "ruler")
    (path,) = (folder / "ruler").glob("*.safetensors")
    found = ruler._read(path, bank, config)
    assert found is not None
    return bank, config, path, path.read_bytes(), kept(found)


@examples(120)
@given(data=st.data())
def test_damaged_rulers_measure_nothing(seen: Kept, data: st.DataObject) -> None:
    bank, config, path, content, wanted = seen
    path.write_bytes(data.draw(damaged(content, 1000)))
    found = ruler._read(path, bank, config)
    if found is not None:
        assert all(torch.equal(value, wanted[key]) for key, value in kept(found).items())
        assert found.references["nothing"]["eval/score"] == pytest.approx(1.1, abs=1e-5)
    path.write_bytes(content)
    assert ruler._read(path, bank, config) is not None


# -- checkpoints and exports -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes, dict[str, Any]]:
    path = tmp_path_factory.mktemp("checkpoint") / "c.pt"
    checkpoints.save(path, resume.snapshot(trained(1), 1, {"eval/score": 1.5}))
    return path, path.read_bytes(), checkpoints.load(path)


def same(left: Any, right: Any) -> bool:
    return checkpoints.digest(left) == checkpoints.digest(right)


@examples(120)
@given(data=st.data())
def test_damaged_checkpoints(checkpoint: tuple[Path, bytes, dict[str, Any]], data: st.DataObject) -> None:
    """Refused, or the damage is where nothing stands."""
    path, whole, wanted = checkpoint
    content = pickle_of(whole)
    path.write_bytes(data.draw(damaged(whole) | damaged(content, len(content)).map(lambda new: archive(whole, new))))
    found = accepted(lambda: checkpoints.load(path))
    # A digest that is lost with its key cannot be missed: users' own checkpoints have none.
    assert found is None or same(found, wanted) or b"digest" not in pickle_of(path.read_bytes())


leaf = st.sampled_from([
    None, True, -1, 2**70, float("nan"), "x", [], {}, [1], {"a": 1}, {1: 2}, {1: X}, (1, 2), torch.zeros(0),
    torch.zeros(3), torch.tensor(1), torch.zeros(2, 2, dtype=torch.complex64), torch.zeros(3).to_sparse(),
    torch.zeros(3, device="meta"), torch.zeros(1).expand(7), X.bool(), torch.nn.Parameter(X),
])  # fmt: skip


@examples(50)
@given(data=st.data(), place=st.integers(0, 400) | st.integers(0, 10), new=leaf, sealed=st.booleans())
def test_odd_checkpoints(
    checkpoint: tuple[Path, bytes, dict[str, Any]], data: st.DataObject, place: int, new: Any, sealed: bool
) -> None:
    """Readable files whose content is not what a trainer saves: loaded, restored and exported, or refused."""
    path, _, wanted = checkpoint
    top = data.draw(st.sampled_from([*wanted, "nothing"]))
    odd = dict(wanted)
    if data.draw(st.booleans()):
        odd[top] = new
    elif top in odd:
        odd[top] = _replaced(odd[top], place, new)
    torch.save(odd | {"digest": "0" * 64} if sealed else odd, path)
    found = accepted(lambda: checkpoints.load(path))
    assert not (sealed and found)
    if found is not None:
        state = TrainState.create(tiny_config("unused"), "cpu")
        accepted(lambda: resume.restore(state, found, "c.pt"))
        out = path.parent / "out"
        if accepted(lambda: export.main(["--checkpoint", str(path), "--out", str(out)])) == 0:
            assert model_module.load(out, "cpu").domains
        shutil.rmtree(out, ignore_errors=True)


@pytest.fixture(scope="module")
def exported(
    tmp_path_factory: pytest.TempPathFactory, checkpoint: tuple[Path, bytes, dict[str, Any]]
) -> tuple[Path, dict[str, bytes]]:
    folder = tmp_path_factory.mktemp("export") / "best"
    model_module.write(folder, checkpoint[2], {"trial": "t", "epoch": 1, "metrics": {}, "params": {}}, {})
    return folder, {path.name: path.read_bytes() for path in folder.iterdir()}


def load_with(exported: tuple[Path, dict[str, bytes]], **changed: bytes) -> model_module.Translator | None:
    """The export with some of its files changed, if it is accepted."""
    folder, whole = exported
    names = {"weights": model_module.WEIGHTS, "config": model_module.CONFIG, "metrics": model_module.METRICS}
    for name, content in (whole | {names[name]: content for name, content in changed.items()}).items():
        (folder / name).write_bytes(content)
    return accepted(lambda: model_module.load(folder, "cpu"))


@examples(80)
@given(data=st.data())
def test_damaged_exports(exported: tuple[Path, dict[str, bytes]], data: st.DataObject) -> None:
    whole = exported[1]
    changed = {"metrics": data.draw(st.binary(max_size=9))}
    if data.draw(st.booleans()):
        changed["weights"] = data.draw(damaged(whole[model_module.WEIGHTS], 4000))
    if len(changed) == 1 or data.draw(st.booleans()):
        changed["config"] = data.draw(damaged(whole[model_module.CONFIG]))
    model = load_with(exported, **changed)
    if model is not None:
        assert model.config.num_domains == 3
        assert sum(p.numel() for _, net in model.nets.items() for p in net.parameters()) < 10**6


model_sizes = st.sampled_from([f"model.{f.name}" for f in fields(schema.ModelConfig)])
some_sizes = st.integers(1, 9) | st.sampled_from([1000, 10**5, 10**6, 2**31 - 1])


@examples(60)
@given(values=st.dictionaries(model_sizes, some_sizes, min_size=1))
def test_exports_of_other_sizes(exported: tuple[Path, dict[str, bytes]], values: dict[str, int]) -> None:
    """However large the networks that a configuration asks for, none is made for weights that do not fill it."""
    before = from_mapping(yaml.safe_load(exported[1][model_module.CONFIG]), "before")
    config = accepted(lambda: override(before, values))
    if config is not None:
        model = load_with(exported, config=to_yaml(config).encode())
        assert (model is not None) == (canonical_sizes(config) == canonical_sizes(before))


def canonical_sizes(config: Config) -> Config:
    """A discriminator of one layer is one of two."""
    return override(config, {"model.num_domains": 3, "model.d_layers": max(2, config.model.d_layers)})


@pytest.mark.parametrize("count", [2, 4, 9_000])
def test_exports_of_other_domains(exported: tuple[Path, dict[str, bytes]], count: int) -> None:
    mapping = yaml.safe_load(exported[1][model_module.CONFIG])
    mapping["data"]["domains"] = [f"d{i}" for i in range(count)]
    assert load_with(exported, config=yaml.safe_dump(mapping).encode()) is None


def test_exports_of_a_rare_type(exported: tuple[Path, dict[str, bytes]]) -> None:
    tensors = {f"{name}.x": torch.zeros(1).to(torch.float8_e4m3fn) for name in NAMES}
    assert load_with(exported, weights=save(tensors)) is None
    assert load_with(exported) is not None


def test_what_yaml_would_run(tmp_path: Path) -> None:
    """Refused and not run; and the trap is live."""
    text = f"loss: {{w_cyc: !!python/object/apply:os.mkdir ['{tmp_path / 'ran'}']}}"
    (tmp_path / "c.yaml").write_text(text)
    assert accepted(lambda: load_config(tmp_path / "c.yaml")) is None
    assert accepted(lambda: parse_assignment(f"loss.w_cyc={text}")) is None
    assert not (tmp_path / "ran").exists()
    yaml.load(text, Loader=yaml.UnsafeLoader)
    assert (tmp_path / "ran").exists()
