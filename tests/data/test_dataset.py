"""Latents on disk: what is read, what is refused and how it is said, who sees what, and what a step draws."""

from __future__ import annotations

import json
import os
import pickle
import re
import resource
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_torch_file

from raystar.base.errors import RaystarError
from raystar.config.load import override
from raystar.config.schema import Config
from raystar.data import listing
from raystar.data.bank import Bank, open_bank, reopen_bank
from raystar.data.batches import LatentDataset, check_epoch, drawn, epoch_samples
from raystar.data.listing import DEMO_ROOT
from raystar.demo import DOMAINS as DEMO_DOMAINS
from tests.kit.support import ROOT, SHARED, tiny_config, write_latents

CPU = torch.device("cpu")
AB = ("a", "b")


def latent(seed: int = 0, size: int = 16) -> NDArray[np.float32]:
    """[4,size,size] in eighths below 16: fp16 and bf16 hold it exactly."""
    return (np.random.default_rng(seed).integers(-127, 128, (4, size, size)) / 8).astype(np.float32)


def write_named(folder: Path, names: list[str], size: int = 8) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names):
        np.save(folder / f"{name}.npy", latent(number, size).astype(np.float16))


def stored(bank: Bank, name: str) -> torch.Tensor:
    return bank.rows(np.array([bank.names.index(name)]))[0]


class Trap:
    """Unpickling makes a folder: the proof that code ran."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.marker),)


# -- what is read ----------------------------------------------------------------------------------

X = latent(1)
FORMS: dict[str, tuple[str, Any]] = {
    "fp16": (".npy", X.astype(np.float16)),
    "fp32": (".npy", X),
    "fp64": (".npy", X.astype(np.float64)),
    "big-endian": (".npy", X.astype(">f2")),
    "column-major": (".npy", np.asfortranarray(X)),
    "npy with a batch axis": (".npy", X[None]),
    "tensor": (".pt", torch.from_numpy(X)),
    "half": (".pt", torch.from_numpy(X).half()),
    "bfloat16": (".pt", torch.from_numpy(X).bfloat16()),
    "tensor with a batch axis": (".pt", torch.from_numpy(X)[None]),
    "strided": (".pt", torch.from_numpy(X).transpose(1, 2).contiguous().transpose(1, 2)),
    "parameter": (".pt", torch.nn.Parameter(torch.from_numpy(X))),
    "latent": (".pt", {"latent": torch.from_numpy(X), "path": "a.png"}),
    "x": (".pt", {"x": torch.from_numpy(X)[None]}),
    "latent before x": (".pt", {"x": torch.zeros(4, 16, 16), "latent": torch.from_numpy(X)}),
    "x among others": (".pt", {"z": torch.zeros(4, 16, 16), "x": torch.from_numpy(X), "mean": torch.zeros(4)}),
    "any key": (
        ".pt",
        {"image_path": "a.png", "size": [128, 128], "moments": torch.from_numpy(X), "seed": 3, "ok": True},
    ),
    "a key that is no text": (".pt", {0: torch.from_numpy(X)}),
    "a number under x": (".pt", {"x": 16, "y": 32, "crop": torch.from_numpy(X)}),
    "list": (".pt", [torch.from_numpy(X)]),
    "tuple beside plain values": (".pt", (torch.from_numpy(X)[None], "a.png", 3)),
    "list under a key": (".pt", {"latent": [torch.from_numpy(X)]}),
    "lists of numbers": (".pt", X.tolist()),
    "lists of numbers under a key": (".pt", {"latent": X[None].tolist()}),
}
WHOLE = np.random.default_rng(2).integers(-20, 21, (4, 16, 16))
FORMS_OF_WHOLE_NUMBERS: dict[str, tuple[str, Any]] = {
    "int64": (".pt", torch.from_numpy(WHOLE)),
    "int8": (".pt", {"codes": torch.from_numpy(WHOLE).to(torch.int8)}),
    "int32 array": (".npy", WHOLE.astype(np.int32)),
    "lists": (".pt", WHOLE.tolist()),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_the_same_latent(tmp_path: Path, form: str) -> None:
    root = write_latents(tmp_path / "data", AB, count=4)
    suffix, value = FORMS[form]
    if suffix == ".npy":
        np.save(root / "a" / "it.npy", value)
    else:
        torch.save(value, root / "a" / "it.pt")
    bank = open_bank(tiny_config(root, AB), tmp_path / "cache")
    assert torch.equal(stored(bank, f"a/it{suffix}"), torch.from_numpy(X))
    assert bank.shape == (4, 16, 16)
    assert len(bank.names) == 9
    narrow = getattr(value, "dtype", None) in (np.float16, torch.float16)
    assert bank.latents.dtype == (torch.float16 if narrow and form != "big-endian" else torch.float32)


@pytest.mark.parametrize("form", FORMS_OF_WHOLE_NUMBERS)
def test_whole_numbers_are_the_same_numbers_in_float32(tmp_path: Path, form: str) -> None:
    root = write_latents(tmp_path / "data", AB, count=4)
    suffix, value = FORMS_OF_WHOLE_NUMBERS[form]
    if suffix == ".npy":
        np.save(root / "a" / "it.npy", value)
    else:
        torch.save(value, root / "a" / "it.pt")
    bank = open_bank(tiny_config(root, AB), tmp_path / "cache")
    assert bank.latents.dtype == torch.float32
    assert torch.equal(stored(bank, f"a/it{suffix}"), torch.from_numpy(WHOLE).float())


def test_other_files_are_left_alone_and_counted_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = write_latents(tmp_path / "data", AB, count=4)
    (root / "a" / "previews").mkdir()
    (root / "a" / ".trash").mkdir()
    for name in (
        "notes.txt",
        ".hidden.npy",
        "previews/1.png",
        "previews/2.PNG",
        ".trash/old.npy",
        "LICENSE",
        "x.\udcff",
    ):
        (root / "a" / name).write_bytes(b"no latent")
    (root / "b" / "only.json").write_bytes(b"{}")
    config = tiny_config(root, AB)
    caplog.set_level("INFO", "raystar")
    assert len(open_bank(config, tmp_path / "cache").names) == 8
    said = [record.getMessage() for record in caplog.records]
    assert said == [
        f"{root / 'a'}: passed over 5 files that are no latents: .png 2, .txt 1, others 1, without suffix 1",
        f"{root / 'b'}: passed over 1 file that is no latent: .json 1",
    ]
    caplog.clear()
    open_bank(config, tmp_path / "cache", verbose=False)
    assert not caplog.records


def test_latents_lie_in_folders_at_any_depth_and_suffixes_in_any_case(tmp_path: Path) -> None:
    root = write_latents(tmp_path / "data", AB, count=4)
    places = ["B.NPY", "m.PT", "set one/x.npy", "set one/deeper/y.pt", "set two/x.npy", "set two/old/er/still/z.Npy"]
    for number, place in enumerate(places):
        path = root / "a" / place
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            if place.lower().endswith("npy"):
                np.save(file, latent(number))
            else:
                torch.save(torch.from_numpy(latent(number)), file)
    bank = open_bank(tiny_config(root, AB), tmp_path / "cache")
    assert list(bank.names[:10]) == sorted([*(f"a/picture{i:02d}x.npy" for i in range(4)), *(f"a/{p}" for p in places)])
    for number, place in enumerate(places):
        assert torch.equal(stored(bank, f"a/{place}"), torch.from_numpy(latent(number)))
    assert sorted(np.concatenate([bank.train[0], bank.held[0]])) == list(range(10))


def test_links_are_followed_and_no_folder_is_entered_twice(tmp_path: Path) -> None:
    root, elsewhere = write_latents(tmp_path / "data", AB, count=4), tmp_path / "elsewhere"
    for place in (root / "a" / "z", elsewhere):
        write_named(place, ["one", "two"], 16)
    (root / "a" / "again").symlink_to(root / "a" / "z")  # by its own path, though that comes later
    (root / "a" / "z" / "up").symlink_to(root / "a")
    (root / "a" / "z" / "self").symlink_to(root / "a" / "z" / "self")
    (root / "b" / "linked").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(root / "b")
    bank = open_bank(tiny_config(root, AB), tmp_path / "cache")
    assert [n for n in bank.names if "picture" not in n] == [
        "a/z/one.npy", "a/z/two.npy", "b/linked/one.npy", "b/linked/two.npy"
    ]  # fmt: skip


def test_crops_are_of_one_picture_within_a_folder_alone(tmp_path: Path) -> None:
    for folder in range(12):
        write_named(tmp_path / "data/a" / f"film{folder}", [f"{scene}_{crop}" for scene in "xy" for crop in range(3)])
    write_named(tmp_path / "data/b", [f"x{i}" for i in range(20)])
    bank = open_bank(tiny_config(tmp_path / "data", AB, data__holdout=0.25), tmp_path / "cache")
    pictures = [{bank.names[row].rsplit("_", 1)[0] for row in rows} for rows in (bank.train[0], bank.held[0])]
    assert not pictures[0] & pictures[1]
    assert [len(found) for found in pictures] == [18, 6]
    assert [len(rows) for rows in (bank.train[0], bank.held[0])] == [54, 18]


def test_scaled_latents_are_noticed_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for domain in AB:
        (tmp_path / "data" / domain).mkdir(parents=True)
        for i in range(3):
            np.save(tmp_path / "data" / domain / f"{i}.npy", latent(i) * 0.18215 / 1.4)
    open_bank(tiny_config(tmp_path / "data", AB), tmp_path / "silent", verbose=False)
    assert capsys.readouterr().err == ""
    open_bank(tiny_config(tmp_path / "data", AB), tmp_path / "cache")
    shown = capsys.readouterr().err
    assert "training.latent_scale=1.0" in shown
    assert len(shown.splitlines()) == 1
    open_bank(tiny_config(write_latents(tmp_path / "unscaled", AB), AB), tmp_path / "cache")
    assert capsys.readouterr().err == ""


# -- the packed cache ------------------------------------------------------------------------------


def cached(cache: Path) -> list[str]:
    return sorted(p.name for p in cache.iterdir()) if cache.is_dir() else []


def assert_whole(cache: Path, packs: int) -> None:
    """So many packs, each an array and its index, and nothing else, hidden or not."""
    names = cached(cache)
    assert len(names) == 2 * packs, names
    for name in names:
        assert re.fullmatch(r"latents-[0-9a-f]{16}\.(npy|json)", name), name


def test_a_second_open_does_not_read_the_files_again(tmp_path: Path) -> None:
    root, cache = write_latents(tmp_path / "data", AB, count=4), tmp_path / "cache"
    config = tiny_config(root, AB)
    first = open_bank(config, cache)
    assert_whole(cache, 1)
    path = root / "a" / "picture00x.npy"
    before = path.stat()
    changed = -np.load(path)
    np.save(path, changed)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # as if nothing had happened
    second = open_bank(config, cache)
    assert torch.equal(second.latents, first.latents)
    assert second.digest == first.digest
    assert_whole(cache, 1)

    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    third = open_bank(config, cache)
    assert torch.equal(stored(third, "a/picture00x.npy"), torch.from_numpy(changed).float())
    assert third.digest != first.digest
    assert_whole(cache, 2)


def test_an_added_and_a_removed_file_make_new_packs(tmp_path: Path) -> None:
    root, cache = write_latents(tmp_path / "data", AB, count=4), tmp_path / "cache"
    config = tiny_config(root, AB)
    first = open_bank(config, cache)
    np.save(root / "b" / "more.npy", X)
    assert len(open_bank(config, cache).names) == 9
    assert_whole(cache, 2)
    (root / "b" / "more.npy").unlink()
    assert open_bank(config, cache).digest == first.digest
    assert_whole(cache, 2)


def test_an_array_without_its_index_is_packed_again(tmp_path: Path) -> None:
    """What a process that died between the two renames leaves."""
    root, cache = write_latents(tmp_path / "data", AB, count=4), tmp_path / "cache"
    wanted = open_bank(tiny_config(root, AB), cache).latents.clone()
    (index,) = cache.glob("*.json")
    (array,) = cache.glob("*.npy")
    index.unlink()
    array.unlink()  # it is mapped: another file takes its name
    array.write_bytes(b"half")
    assert torch.equal(open_bank(tiny_config(root, AB), cache).latents, wanted)
    assert_whole(cache, 1)


@pytest.mark.parametrize("damage", ["array gone", "array truncated", "index emptied"])
def test_a_damaged_cache_is_packed_again(tmp_path: Path, damage: str) -> None:
    root, cache = write_latents(tmp_path / "data", AB, count=4), tmp_path / "cache"
    wanted = open_bank(tiny_config(root, AB), cache).latents.clone()
    (index,) = cache.glob("*.json")
    (array,) = cache.glob("*.npy")
    if damage == "array gone":
        array.unlink()
    elif damage == "array truncated":
        array.unlink()
        array.write_bytes(b"\x93NUMPY")
    else:
        index.write_text("")
    assert torch.equal(open_bank(tiny_config(root, AB), cache).latents, wanted)
    assert_whole(cache, 1)


def test_bad_files_leave_nothing_in_the_cache(tmp_path: Path) -> None:
    root, cache = write_latents(tmp_path / "data", AB, count=4), tmp_path / "cache"
    np.save(root / "a" / "bad.npy", X[:3])
    with pytest.raises(RaystarError):
        open_bank(tiny_config(root, AB), cache)
    assert cached(cache) == []


@pytest.mark.parametrize(("limit", "kind"), [(50, RaystarError), (5000, OSError)], ids=["seen before", "in the midst"])
def test_a_full_disk_leaves_no_half_written_file(tmp_path: Path, limit: int, kind: type[Exception]) -> None:
    """A limit on the size of files stands for the disk: the write that does not fit fails in the same way."""
    root, cache = write_latents(tmp_path / "data", AB, count=4), tmp_path / "cache"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(kind, match="File too large"):
            open_bank(tiny_config(root, AB), cache)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert cached(cache) == []
    assert len(open_bank(tiny_config(root, AB), cache).names) == 8


def test_what_a_killed_process_left_is_removed_and_what_another_writes_is_not(tmp_path: Path) -> None:
    root, cache = write_latents(tmp_path / "data", AB, count=4), tmp_path / "cache"
    cache.mkdir()
    for name, age in ((".latents-7-dead.npy", 2 * 3600), (".latents-8-live.npy", 10), ("ruler.pt", 2 * 3600)):
        (cache / name).write_bytes(b"half")
        os.utime(cache / name, (time.time() - age, time.time() - age))
    open_bank(tiny_config(root, AB), cache)
    assert {".latents-8-live.npy", "ruler.pt"} == {name for name in cached(cache) if not name.startswith("latents-")}


OPEN_AT_ONCE = """
import sys, time, torch
from pathlib import Path
from raystar.config.load import from_mapping
from raystar.data.bank import open_bank
config = from_mapping({"data": {"data_root": sys.argv[1], "domains": ["a", "b"]}}, "test")
Path(sys.argv[3]).touch()
while not Path(sys.argv[4]).exists():
    time.sleep(0.001)
bank = open_bank(config, sys.argv[2])
print(bank.digest, float(bank.latents.double().sum()))
"""


def test_two_processes_that_open_at_once_both_get_the_bank(tmp_path: Path) -> None:
    root, cache, go = write_latents(tmp_path / "data", AB, count=300), tmp_path / "cache", tmp_path / "go"
    ready = [tmp_path / f"ready{i}" for i in range(2)]
    command = [sys.executable, "-c", OPEN_AT_ONCE, str(root), str(cache)]
    both = [
        subprocess.Popen([*command, str(path), str(go)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for path in ready
    ]
    deadline = time.monotonic() + 60
    while not all(path.exists() for path in ready) and time.monotonic() < deadline:
        time.sleep(0.01)
    go.touch()
    said = [process.communicate(timeout=60) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    wanted = open_bank(tiny_config(root, AB, data__holdout=0.1), cache)
    digest = f"{wanted.digest} {float(wanted.latents.double().sum())}"
    assert [out.decode().strip() for out, _ in said] == [digest, digest]
    assert_whole(cache, 1)


def _rewritten(path: Path, stat: os.stat_result) -> None:
    np.save(path, -np.load(path))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))


def _resized(path: Path, stat: os.stat_result) -> None:
    np.save(path, np.load(path).astype(np.float32))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def _relinked(path: Path, stat: os.stat_result) -> None:
    np.save(path.with_name("elsewhere"), -np.load(path))
    path.unlink()
    path.symlink_to(path.with_name("elsewhere.npy"))


def _moved(path: Path, stat: os.stat_result) -> None:
    (path.parent / "further").mkdir()
    path.rename(path.parent / "further" / path.name)


CHANGES: dict[str, Callable[[Path, os.stat_result], object]] = {
    "added": lambda path, stat: shutil.copy2(path, path.with_name("added.npy")),
    "removed": lambda path, stat: path.unlink(),
    "renamed": lambda path, stat: path.rename(path.with_name("renamed.npy")),
    "moved into another folder": _moved,
    "rewritten": _rewritten,
    "resized, with its old time": _resized,
    "replaced by a link": _relinked,
}


@pytest.mark.parametrize("system", ["statx", "other"])
@pytest.mark.parametrize("place", ["picture02x.npy", "sub/deeper/nested.npy"])
@pytest.mark.parametrize("change", CHANGES)
def test_every_change_of_a_file_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str, place: str, system: str
) -> None:
    if system == "other":
        monkeypatch.setattr(listing, "_statx", lambda: None)
    elif listing._statx() is None:
        pytest.skip("this system has no statx")
    root, cache = write_latents(tmp_path / "data", AB, count=4), tmp_path / "cache"
    write_named(root / "b/sub/deeper", ["nested", "other"], 16)
    config = tiny_config(root, AB)
    before = open_bank(config, cache)
    path = root / "b" / place
    CHANGES[change](path, path.stat())
    after = open_bank(config, cache)
    assert_whole(cache, 2)
    now = {str(p.relative_to(root)): torch.from_numpy(np.load(p)).float() for p in root.rglob("*.npy")}
    assert set(after.names) == set(now)
    assert all(torch.equal(stored(after, name), latent) for name, latent in now.items())
    assert open_bank(config, cache).digest == after.digest
    assert after.digest != before.digest


def test_both_ways_of_asking_for_size_and_time_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if listing._statx() is None:
        pytest.skip("this system has no statx")
    names = [os.fsencode(name) for name in ("one", "tw\u00f6", "dangling", "gone", "link", "old")]
    for number, name in enumerate(("one", "tw\u00f6", "old")):
        (tmp_path / name).write_bytes(b"x" * (number + 1))
    os.utime(tmp_path / "old", ns=(0, -1_500_000_000))  # before 1970
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "link").symlink_to("one")
    fast = listing._stats(tmp_path, names)
    monkeypatch.setattr(listing, "_statx", lambda: None)
    assert listing._stats(tmp_path, names).tolist() == fast.tolist()
    one = (tmp_path / "one").stat()
    assert fast[0].tolist() == fast[4].tolist() == [1, *divmod(one.st_mtime_ns, 10**9)]
    assert fast[3].tolist() == [-1, -1, -1]
    assert fast[5].tolist() == [3, -2, 500_000_000]


def test_one_late_float32_widens_the_bank(tmp_path: Path) -> None:
    root = write_latents(tmp_path / "data", AB, count=4)
    fine = latent(5) / 3  # fp16 cannot hold it
    np.save(root / "b" / "z.npy", fine)
    bank = open_bank(tiny_config(root, AB), tmp_path / "cache")
    assert bank.latents.dtype == torch.float32
    assert torch.equal(stored(bank, "b/z.npy"), torch.from_numpy(fine))
    for name in bank.names[:-1]:
        assert torch.equal(stored(bank, name), torch.from_numpy(np.load(root / name)).float())
    assert_whole(tmp_path / "cache", 1)
    np.save(root / "a" / "a first one of float32.npy", latent(6))
    again = open_bank(tiny_config(root, AB), tmp_path / "cache")
    assert again.latents.dtype == torch.float32
    assert torch.equal(again.latents[1:], bank.latents)


def test_writing_to_a_bank_never_reaches_the_cache(tmp_path: Path) -> None:
    root, cache = write_latents(tmp_path / "data", AB, count=4), tmp_path / "cache"
    bank = open_bank(tiny_config(root, AB), cache)
    before = bank.latents.clone()
    bank.latents.zero_()
    assert torch.equal(open_bank(tiny_config(root, AB), cache).latents, before)


def test_a_folder_of_files_alone_keeps_its_name_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What earlier versions have packed is found again: the key of flat folders is of the same bytes."""
    monkeypatch.chdir(tmp_path)
    for domain in AB:
        write_named(Path("data") / domain, ["one", "two", "three"])
        for path in Path("data").rglob("*.npy"):
            os.utime(path, ns=(0, 1_700_000_000_123_456_789))
    assert listing.stat_digest(listing.list_parts("data", AB, "key", held=False), AB, 4) == "8827a8227c5dc59c"


def test_latents_of_the_same_numbers_and_another_shape_are_others(tmp_path: Path) -> None:
    """The ruler's file is named by the digest: one of 8x12 must not measure 12x8."""
    digests = set()
    for name, shape in (("wide", (4, 8, 12)), ("high", (4, 12, 8))):
        for domain in AB:
            (tmp_path / name / domain).mkdir(parents=True)
            for i in range(8):
                np.save(tmp_path / name / domain / f"{i}x.npy", np.random.default_rng(i).standard_normal(shape) * 5)
        bank = open_bank(tiny_config(tmp_path / name, AB), tmp_path / "cache")
        assert bank.shape == shape
        digests.add(bank.digest)
    assert len(digests) == 2


def test_the_digest_is_that_of_content_and_split(tmp_path: Path) -> None:
    root = write_latents(tmp_path / "data", AB)
    shutil.copytree(root, tmp_path / "copy")
    digest = open_bank(tiny_config(root, AB), tmp_path / "cache").digest
    assert open_bank(tiny_config(tmp_path / "copy", AB), tmp_path / "elsewhere").digest == digest
    assert open_bank(tiny_config(root, AB, data__holdout=0.1), tmp_path / "cache").digest != digest
    np.save(tmp_path / "copy/a/picture00x.npy", X)
    assert open_bank(tiny_config(tmp_path / "copy", AB), tmp_path / "elsewhere").digest != digest


# -- what is refused -------------------------------------------------------------------------------


def _changed(index: tuple[int, ...], value: float) -> NDArray[np.float32]:
    array = X.copy()
    array[index] = value
    return array


def _npy(value: Any) -> Callable[[Path, Path], None]:
    return lambda path, marker: np.save(path, value)


def _pt(value: Any) -> Callable[[Path, Path], None]:
    return lambda path, marker: torch.save(value, path)


def _raw(content: bytes) -> Callable[[Path, Path], None]:
    return lambda path, marker: path.write_bytes(content) and None


def _truncated(write: Callable[[Path, Path], None]) -> Callable[[Path, Path], None]:
    def half(path: Path, marker: Path) -> None:
        write(path, marker)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    return half


def _npy_trap(path: Path, marker: Path) -> None:
    np.save(path, np.array([Trap(marker)], dtype=object), allow_pickle=True)


def _pt_trap(path: Path, marker: Path) -> None:
    torch.save({"latent": torch.from_numpy(X), "extra": Trap(marker)}, path)


def _pickle_trap(path: Path, marker: Path) -> None:
    path.write_bytes(pickle.dumps(Trap(marker), protocol=2))


T = torch.from_numpy(X)
BAD: dict[str, tuple[str, Callable[[Path, Path], None], str]] = {
    "channels": (".npy", _npy(X[:3]), r"expected shape \[4,H,W\], found \[3, 16, 16\]"),
    "batch of two": (".pt", _pt(torch.stack([T, T])), r"expected shape \[4,H,W\], found \[2, 4, 16, 16\]"),
    "other size": (".npy", _npy(latent(2, 24)), r"expected \[4, 16, 16\] like most of the others, found \[4, 24, 24\]"),
    "odd size": (".npy", _npy(latent(2, 18)), r"divisible by 4, found \[4, 18, 18\]"),
    "nan": (".npy", _npy(_changed((1, 2, 3), np.nan)), "NaN or infinite"),
    "inf": (".npy", _npy(_changed((3, 15, 15), -np.inf).astype(np.float16)), "NaN or infinite"),
    "nan in a tensor": (".pt", _pt(torch.full((4, 16, 16), torch.nan)), "NaN or infinite"),
    "truncated": (".npy", _truncated(_npy(X)), "truncated or damaged"),
    "truncated tensor": (".pt", _truncated(_pt(T)), "truncated or damaged"),
    "objects": (".npy", _npy_trap, "pickled objects.*not opened"),
    "code": (".pt", _pt_trap, "could run code"),
    "plain pickle": (".pt", _pickle_trap, "could run code"),
    "true and false": (".npy", _npy(X > 0), "an array of numbers, found bool"),
    "tensor of true and false": (".pt", _pt(T > 0), "an array of numbers, found bool"),
    "complex": (".npy", _npy(X.astype(np.complex64)), "an array of numbers, found complex64"),
    "text": (".pt", _pt("a latent"), "an array of numbers, found str"),
    "empty": (".npy", _raw(b""), "truncated or damaged"),
    "empty tensor file": (".pt", _raw(b""), "truncated or damaged"),
    "no latents": (".npy", _npy(np.zeros((4, 0, 16), np.float32)), r"found \[4, 0, 16\]"),
    "no tensor": (
        ".pt",
        _pt({"path": "a.png", "size": 3}),
        "'latent' or 'x'.*found none under the keys 'path', 'size'",
    ),
    "no keys": (".pt", _pt({}), "expected one tensor.*found no keys"),
    "two tensors": (".pt", _pt({"a": T, "n": 1, "b": T}), "'latent' or 'x' among several; found tensors 'a', 'b'$"),
    "list of two": (".pt", _pt([T, T]), "expected one tensor, found a list of 2"),
    "empty list": (".pt", _pt([]), r"found \[0\]"),
    "list of text": (".pt", _pt([[1.0, "2"]]), "found a list that holds str"),
    "list of true and false": (".pt", _pt((X > 0).tolist()), "found a list that holds bool"),
    "list of dictionaries": (".pt", _pt([{"latent": T}]), "found a list that holds dict"),
    "ragged lists": (".pt", _pt([[[1.0, 2.0], [3.0]]]), "rows of different lengths"),
    "whole numbers beyond measure": (".pt", _pt([[[10**30]]]), "an array of numbers, found object"),
    "sparse": (".pt", _pt(T.to_sparse()), "dense tensor"),
    "beyond float32": (".npy", _npy(X.astype(np.float64) * 1e300), "beyond float32"),
}


@pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning")
@pytest.mark.parametrize("kind", BAD)
def test_a_bad_file_is_named_with_its_reason(tmp_path: Path, kind: str) -> None:
    root, marker = write_latents(tmp_path / "data", AB, count=4), tmp_path / "code ran"
    suffix, write, reason = BAD[kind]
    path = root / "a" / f"bad{suffix}"
    write(path, marker)
    with pytest.raises(RaystarError, match=rf"1 of 9 latents.*\n  {re.escape(str(path))}: [^\n]*{reason}[^\n]*$"):
        open_bank(tiny_config(root, AB), tmp_path / "cache")
    assert not marker.exists()


@pytest.mark.parametrize("kind", ["objects", "code", "plain pickle"])
def test_the_traps_are_live(tmp_path: Path, kind: str) -> None:
    """Opened carelessly, the three files above do run their code; so the test above can fail."""
    suffix, write, _ = BAD[kind]
    path, marker = tmp_path / f"bad{suffix}", tmp_path / "code ran"
    write(path, marker)
    if kind == "objects":
        np.load(path, allow_pickle=True)
    elif kind == "code":
        torch.load(path, weights_only=False)
    else:
        pickle.loads(path.read_bytes())
    assert marker.exists()


RARE: dict[str, Callable[[Path, Path], None]] = {
    "float8": _pt(torch.zeros(4, 16, 16).to(torch.float8_e4m3fn)),
    "no storage": _pt(torch.zeros(4, 16, 16, device="meta")),
    "compressed rows": lambda path, marker: torch.save(torch.eye(16).to_sparse_csr(), path),
    "damaged pickle": _raw(b"\x80\x02J\x01"),
    "dangling link": lambda path, marker: path.symlink_to(marker),
    "folder": lambda path, marker: path.mkdir(),
}
CUT_HEADER = b"\x93NUMPY\x01\x00\x40\x00{'descr': '<f2', 'fortran_order': False, 'shape': (4, 16, 16), \n"
HUGE_HEADER = (
    b"\x93NUMPY\x01\x00\x60\x00{'descr': '<f2', 'fortran_order': False, 'shape': (4, 1000000000, 1000000000), }"
)


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.parametrize("kind", RARE)
def test_rare_bad_files_are_named_too(tmp_path: Path, kind: str) -> None:
    root = write_latents(tmp_path / "data", AB, count=4)
    path = root / "a" / "bad.pt"
    RARE[kind](path, tmp_path / "nowhere")
    with pytest.raises(RaystarError, match=re.escape(str(path))):
        open_bank(tiny_config(root, AB), tmp_path / "cache")


@pytest.mark.parametrize("header", [CUT_HEADER, HUGE_HEADER], ids=["cut", "huge"])
def test_a_damaged_header_is_named_too(tmp_path: Path, header: bytes) -> None:
    """The first makes numpy's parser give up, the second asks for more memory than there is."""
    root = write_latents(tmp_path / "data", AB, count=4)
    (root / "a" / "bad.npy").write_bytes(header.ljust(200))
    with pytest.raises(RaystarError, match=r"bad\.npy: truncated or damaged"):
        open_bank(tiny_config(root, AB), tmp_path / "cache")


def _write_bad(root: Path, kinds: list[str], marker: Path) -> list[Path]:
    paths = []
    for number, kind in enumerate(kinds):
        suffix, write, _ = BAD[kind]
        paths.append(root / AB[number % 2] / f"bad {kind}{suffix}")
        write(paths[-1], marker)
    return paths


def test_all_bad_files_are_named_together(tmp_path: Path) -> None:
    root = write_latents(tmp_path / "data", AB, count=6)
    kinds = ["channels", "other size", "nan", "inf", "truncated", "truncated tensor", "objects", "code", "empty"]
    kinds += ["no tensor"]
    paths = _write_bad(root, kinds, tmp_path / "code ran")
    with pytest.raises(RaystarError) as caught:
        open_bank(tiny_config(root, AB), tmp_path / "cache")
    first, *lines = str(caught.value).splitlines()
    assert "10 of 22 latents" in first
    assert len(lines) == 10
    for kind, path in zip(kinds, paths, strict=True):
        (line,) = [line for line in lines if f"{path}: " in line]
        assert re.search(BAD[kind][2], line), line
    assert not (tmp_path / "code ran").exists()


def test_a_long_list_is_cut_and_counted(tmp_path: Path) -> None:
    root = write_latents(tmp_path / "data", AB, count=6)
    for i in range(13):
        np.save(root / "b" / f"bad{i:02d}.npy", X[:2])
    with pytest.raises(RaystarError, match="13 of 25 latents") as caught:
        open_bank(tiny_config(root, AB), tmp_path / "cache")
    lines = str(caught.value).splitlines()
    assert len(lines) == 12
    assert lines[-1].strip() == "... and 3 more"


def test_a_missing_folder_is_answered_with_the_nearest(tmp_path: Path) -> None:
    root = write_latents(tmp_path / "data", ("photo", "vangogh"), count=3)
    with pytest.raises(RaystarError) as caught:
        open_bank(tiny_config(root, ("photo", "vangog")), tmp_path / "cache")
    for words in ("data.data_root", str(root), "'vangog'", "did you mean 'vangogh'", "photo, vangogh"):
        assert words in str(caught.value)
    with pytest.raises(RaystarError, match=r"'cubism'.*photo, vangogh"):
        open_bank(tiny_config(root, ("photo", "cubism")), tmp_path / "cache")


def test_an_empty_folder_and_a_missing_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_latents(tmp_path / "data", AB, count=3)
    (root / "c").mkdir()
    (root / "c" / "notes.txt").write_text("no latents")
    with pytest.raises(RaystarError, match=r"/c: expected latents .*found none; passed over 1 file .*: \.txt 1$"):
        open_bank(tiny_config(root), tmp_path / "cache")
    with pytest.raises(RaystarError, match=r"data\.data_root: .*nowhere: expected a folder.*a, b.*found nothing"):
        open_bank(tiny_config(tmp_path / "nowhere", AB), tmp_path / "cache")
    with pytest.raises(RaystarError, match=r"data\.eval_data_root: .*nowhere"):
        open_bank(tiny_config(root, AB, data__eval_data_root=str(tmp_path / "nowhere")), tmp_path / "cache")
    meant = rf"found nothing; looked for {re.escape(str(tmp_path.parent / 'gone'))}, since relative paths start at the"
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RaystarError, match=rf"data\.data_root: \.\./gone: expected .* {meant} folder of the command"):
        open_bank(tiny_config("../gone", AB), tmp_path / "cache")
    with pytest.raises(RaystarError, match=rf"data\.eval_data_root: \.\./gone: .* {meant}"):
        open_bank(tiny_config(root, AB, data__eval_data_root="../gone"), tmp_path / "cache")
    (tmp_path / "data.zip").write_bytes(b"PK")
    with pytest.raises(RaystarError, match=r"data\.zip: expected a folder of domains or a packed \.safetensors"):
        open_bank(tiny_config(tmp_path / "data.zip", AB), tmp_path / "cache")


# -- a packed file ---------------------------------------------------------------------------------


def packed_file(path: Path, **changed: NDArray[Any]) -> Path:
    rows = {d: np.stack([latent(10 * k + i) for i in range(12)]).astype(np.float16) for k, d in enumerate(AB)}
    save_file(rows | changed, path)
    return path


def test_a_packed_file_opens_like_a_folder(tmp_path: Path) -> None:
    path = packed_file(tmp_path / "data.safetensors", spare=np.zeros((2, 3), np.float32))
    bank = open_bank(tiny_config(path, ("b", "a")), tmp_path / "cache")
    assert bank.domains == ("b", "a")
    assert torch.equal(stored(bank, "a/003"), torch.from_numpy(latent(3)))
    assert torch.equal(stored(bank, "b/011"), torch.from_numpy(latent(21)))
    assert [len(t) + len(h) for t, h in zip(bank.train, bank.held, strict=True)] == [12, 12]
    assert bank.latents.dtype == torch.float16
    assert_whole(tmp_path / "cache", 1)


def test_a_packed_file_without_the_domain_and_damaged_ones(tmp_path: Path) -> None:
    path = packed_file(tmp_path / "data.safetensors", vangogh=np.zeros((2, 4, 16, 16), np.float16))
    with pytest.raises(RaystarError, match=r"no domain 'vangog' \(did you mean 'vangogh'\?\).*a, b, vangogh"):
        open_bank(tiny_config(path, ("a", "vangog")), tmp_path / "cache")
    empty = packed_file(tmp_path / "none.safetensors", b=np.zeros((0, 4, 16, 16), np.float16))
    with pytest.raises(RaystarError, match="no domain 'b'"):
        open_bank(tiny_config(empty, AB), tmp_path / "cache")
    whole = path.read_bytes()
    for number, content in enumerate([whole[: len(whole) // 2], whole[:20], b"", b"not safetensors at all"]):
        damaged = tmp_path / f"damaged{number}.safetensors"
        damaged.write_bytes(content)
        with pytest.raises(RaystarError, match=rf"{damaged.name}: not a readable packed file"):
            open_bank(tiny_config(damaged, AB), tmp_path / "cache")
    assert cached(tmp_path / "cache") == []


def test_a_packed_file_of_whole_numbers_with_a_suffix_in_capitals(tmp_path: Path) -> None:
    rows = np.random.default_rng(1).integers(-9, 10, (6, 4, 8, 8))
    save_file({"a": rows, "b": -rows}, tmp_path / "DATA.SAFETENSORS")
    bank = open_bank(tiny_config(tmp_path / "DATA.SAFETENSORS", AB), tmp_path / "cache")
    assert torch.equal(stored(bank, "b/005"), -torch.from_numpy(rows[5]).float())


def test_bad_rows_of_a_packed_file_are_named(tmp_path: Path) -> None:
    rows = np.stack([latent(i) for i in range(12)])
    rows[7, 0, 0, 0] = np.inf
    path = packed_file(tmp_path / "data.safetensors", b=rows)
    with pytest.raises(RaystarError, match=r"1 of 24 latents.*\n.*data\.safetensors\[b/007\]: holds NaN or infinite"):
        open_bank(tiny_config(path, AB), tmp_path / "cache")
    flat = packed_file(tmp_path / "flat.safetensors", b=np.zeros((12, 64), np.float32))
    with pytest.raises(RaystarError, match=r"12 of 24 latents.*\n.*\[b/000\]: expected shape \[4,H,W\], found \[64\]"):
        open_bank(tiny_config(flat, AB), tmp_path / "cache")


def test_a_packed_file_of_bfloat16_opens_like_a_tensor_of_it(tmp_path: Path) -> None:
    rows = torch.from_numpy(np.stack([latent(i) for i in range(8)])).bfloat16()
    save_torch_file({"a": rows, "b": rows.clone()}, tmp_path / "data.safetensors")
    bank = open_bank(tiny_config(tmp_path / "data.safetensors", AB), tmp_path / "cache")
    assert torch.equal(stored(bank, "b/005"), torch.from_numpy(latent(5)))


def test_the_demo_opens(tmp_path: Path) -> None:
    bank = open_bank(tiny_config(DEMO_ROOT, DEMO_DOMAINS, data__holdout=0.25), tmp_path)
    assert len(bank.domains) == 5
    assert bank.shape == (4, 32, 32)
    assert [len(rows) for rows in bank.train] == [72] * 5
    assert [len(rows) for rows in bank.held] == [24] * 5
    assert 2.5 < bank.latents.float().std().item() < 9


# -- held out --------------------------------------------------------------------------------------


def names_of(bank: Bank, rows: NDArray[np.int64]) -> set[str]:
    return {Path(bank.names[row]).stem for row in rows}


@pytest.mark.parametrize("share", [0.0, 0.1, 0.25, 0.5])
def test_held_out_rows_are_a_share_that_training_never_sees(tmp_path: Path, share: float) -> None:
    root = write_latents(tmp_path / "data", AB, count=40, size=8)
    bank = open_bank(tiny_config(root, AB, data__holdout=share), tmp_path / "cache")
    for number, (train, held) in enumerate(zip(bank.train, bank.held, strict=True)):
        assert len(held) == round(40 * share)
        assert not set(train) & set(held)
        assert sorted([*train, *held]) == list(range(40 * number, 40 * (number + 1)))


def test_crops_of_a_picture_stay_together(tmp_path: Path) -> None:
    write_named(tmp_path / "data/a", [f"scene{i:02d}_{k}" for i in range(30) for k in range(3)])
    write_named(tmp_path / "data/b", [f"x{i}_y_{i % 2}" for i in range(20)])
    bank = open_bank(tiny_config(tmp_path / "data", AB, data__holdout=0.2), tmp_path / "cache")
    train, held = names_of(bank, bank.train[0]), names_of(bank, bank.held[0])
    assert not {n.rsplit("_", 1)[0] for n in train} & {n.rsplit("_", 1)[0] for n in held}
    assert all(count == 3 for count in Counter(n.rsplit("_", 1)[0] for n in held).values())
    assert len(held) == 18  # of 90, six scenes
    assert len(bank.held[1]) == 4


def test_numbered_files_are_pictures_of_their_own(tmp_path: Path) -> None:
    write_named(tmp_path / "data/a", [f"photo_{i:03d}" for i in range(1, 41)])
    write_named(tmp_path / "data/b", [f"{kind}_{i}" for kind in ("sea", "wood") for i in range(20)])
    bank = open_bank(tiny_config(tmp_path / "data", AB, data__holdout=0.1), tmp_path / "cache")
    assert [len(held) for held in bank.held] == [4, 4]
    assert [len(train) for train in bank.train] == [36, 36]


def test_the_split_depends_on_names_alone(tmp_path: Path) -> None:
    root = write_latents(tmp_path / "data", AB, count=40, size=8)
    config = tiny_config(root, AB, data__holdout=0.2)
    first = open_bank(config, tmp_path / "cache")
    for seed in (1, 2):
        other = open_bank(override(config, {"training.seed": seed}), tmp_path / "cache")
        assert [h.tolist() for h in other.held] == [h.tolist() for h in first.held]
        assert other.digest == first.digest
    # Not the first or last of the list, nor the same numbers in every domain.
    held = [names_of(first, rows) for rows in first.held]
    assert held[0] != held[1]
    assert held[0] != {f"picture{i:02d}x" for i in range(8)}
    # One more file moves at most the last of the chosen.
    np.save(root / "a" / "another.npy", latent(3, 8))
    more = open_bank(config, tmp_path / "cache")
    assert len(names_of(more, more.held[0]) ^ held[0]) <= 2
    assert names_of(more, more.held[1]) == held[1]


def test_the_last_picture_stays_for_training(tmp_path: Path) -> None:
    write_named(tmp_path / "data/a", ["only"])
    write_named(tmp_path / "data/b", ["scene_0", "scene_1"])
    bank = open_bank(tiny_config(tmp_path / "data", AB, data__holdout=0.5), tmp_path / "cache")
    assert [len(train) for train in bank.train] == [1, 2]
    assert [len(held) for held in bank.held] == [0, 0]


def test_eval_data_root_is_held_out_whole(tmp_path: Path) -> None:
    root = write_latents(tmp_path / "data", AB, count=6)
    write_named(tmp_path / "eval/a", ["one", "two"], 16)
    write_named(tmp_path / "eval/b", ["three"], 16)
    config = tiny_config(root, AB, data__eval_data_root=str(tmp_path / "eval"), data__holdout=0.5)
    bank = open_bank(config, tmp_path / "cache")
    assert [names_of(bank, held) for held in bank.held] == [{"one", "two"}, {"three"}]
    assert [len(train) for train in bank.train] == [6, 6]
    assert torch.equal(bank.rows(bank.held[0])[1], torch.from_numpy(latent(1)))


def test_held_out_latents_must_not_lie_among_those_to_train_on(tmp_path: Path) -> None:
    root = write_latents(tmp_path / "data", AB, count=6)
    write_latents(root / "a" / "kept", AB, count=4)
    config = tiny_config(root, AB, data__eval_data_root=str(root / "a" / "kept"))
    with pytest.raises(RaystarError, match=r"data\.eval_data_root: .*kept lies in the folder of domain 'a'"):
        open_bank(config, tmp_path / "cache")
    with pytest.raises(RaystarError, match=r"data\.eval_data_root: is data\.data_root itself"):
        open_bank(override(config, {"data.eval_data_root": str(root / "a" / "..")}), tmp_path / "cache")
    (root / "a" / "kept").rename(root / "kept")
    bank = open_bank(override(config, {"data.eval_data_root": str(root / "kept")}), tmp_path / "cache")
    assert [len(rows) for rows in bank.held] == [4, 4]


def write_paintings(root: Path) -> Path:
    """Crops of paintings and of scenes, from one to five of each, named as people's collections are."""
    rng = np.random.default_rng(1)
    write_named(root / "vangogh", [f"a_{i}_{k}" for i in range(100) for k in range(rng.integers(1, 5))])
    scenes = [f"{film}_{i}" for film in ("v1_", "v3") for i in range(36)]
    write_named(root / "hayao", [f"{scene}_{k}" for scene in scenes for k in range(rng.integers(2, 6))])
    return root


@pytest.mark.parametrize("paintings", ["named alike", pytest.param("real", marks=pytest.mark.shared("data/latents"))])
def test_paintings_are_split_by_picture(tmp_path: Path, paintings: str) -> None:
    domains = ("vangogh", "hayao")
    root = SHARED / "data/latents" if paintings == "real" else write_paintings(tmp_path / "data")
    bank = open_bank(tiny_config(root, domains, data__holdout=0.1), tmp_path / "cache")
    counts = [len(list((root / domain).iterdir())) for domain in domains]
    assert paintings != "real" or counts == [287, 280]
    for train, held, count in zip(bank.train, bank.held, counts, strict=True):
        assert len(train) + len(held) == count
        assert 0.08 < len(held) / count < 0.16
        sides = [{re.sub(r"_\d+$", "", name) for name in names_of(bank, rows)} for rows in (train, held)]
        assert not sides[0] & sides[1]
        assert sum(map(len, sides)) < count / 2  # most have several crops


# -- what a step draws -----------------------------------------------------------------------------

COUNTS = (8, 20, 13)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("uneven") / "data"
    for number, (domain, count) in enumerate(zip("abc", COUNTS, strict=True)):
        (root / domain).mkdir(parents=True)
        for i in range(count):
            np.save(root / domain / f"{i:02d}.npy", latent(100 * number + i, 8).astype(np.float16))
    return root


@pytest.fixture
def config(root: Path) -> Config:
    return tiny_config(root, training__epoch_size=6000, training__batch_size=600)


@pytest.fixture
def bank(config: Config, root: Path) -> Bank:
    return open_bank(config, root.parent / "cache")


def rows_of(bank: Bank, latents: torch.Tensor) -> NDArray[np.int64]:
    """The row of the bank that each latent is; all latents of these banks differ."""
    known = {row.float().numpy().tobytes(): number for number, row in enumerate(bank.latents)}
    assert len(known) == len(bank.latents)
    return np.array([known[latent.numpy().tobytes()] for latent in latents])


def assert_equal(left: tuple[torch.Tensor, ...], right: tuple[torch.Tensor, ...]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def test_a_batch_is_a_pure_function_of_seed_epoch_and_step(config: Config, bank: Bank) -> None:
    wandering, straight = LatentDataset(bank, config, CPU), LatentDataset(bank, config, CPU)
    for epoch in (1, 5, 2, 3):
        wandering.set_epoch(epoch)
        wandering.batch(7)
    torch.manual_seed(9)
    np.random.seed(9)
    straight.set_epoch(3)
    for step in (2, 10, 1):
        assert_equal(wandering.batch(step), straight.batch(step))
    assert_equal(straight.batch(1), straight.batch(1))
    assert_equal(next(iter(straight.batches())), straight.batch(1))


def test_seeds_epochs_and_steps_differ(config: Config, bank: Bank) -> None:
    data = LatentDataset(bank, config, CPU)
    first, second_step = data.batch(1), data.batch(2)
    data.set_epoch(2)
    second_epoch = data.batch(1)
    other_seed = LatentDataset(bank, override(config, {"training.seed": 1}), CPU).batch(1)
    for other in (second_step, second_epoch, other_seed):
        for name in first._fields:
            assert not torch.equal(getattr(first, name), getattr(other, name)), name
    for name in ("z_1", "z_2"):
        assert not torch.equal(first.z_trg, getattr(first, name))
    assert not torch.equal(first.z_1, first.z_2)


def assert_uniform(counts: NDArray[np.int64]) -> None:
    """Pearson's statistic within five deviations of its mean under uniformity; fixed seeds make it repeatable."""
    expected = counts.sum() / counts.size
    statistic = ((counts - expected) ** 2 / expected).sum()
    freedom = counts.size - 1
    assert statistic < freedom + 5 * np.sqrt(2 * freedom), counts


def test_both_stages_are_uniform(config: Config, bank: Bank) -> None:
    """Domains first, whatever their sizes, then latents within; each latent of a small domain comes oftener."""
    batches = list(LatentDataset(bank, config, CPU).batches())
    y_src, y_trg = (torch.cat([getattr(b, name) for b in batches]).numpy() for name in ("y_src", "y_trg"))
    assert len(y_src) == 6000
    assert not (y_src == y_trg).any()
    assert_uniform(np.bincount(y_src, minlength=3))
    for source in range(3):
        onward = np.bincount(y_trg[y_src == source], minlength=3)
        assert_uniform(np.delete(onward, source))
    for name, domains in (("content", y_src), ("x_ref", y_trg)):
        rows = np.concatenate([rows_of(bank, getattr(b, name)) for b in batches])
        for domain in range(3):
            drawn = rows[domains == domain]
            # Only training rows, all of them, and of the domain that the batch claims.
            assert set(drawn) == set(bank.train[domain])
            assert_uniform(np.bincount(drawn)[bank.train[domain]])
            assert not set(drawn) & set(bank.held[domain])


def test_content_and_reference_are_drawn_apart(config: Config, bank: Bank) -> None:
    """The place within its domain of a content says nothing about that of its reference."""
    batch = LatentDataset(bank, override(config, {"training.batch_size": 6000}), CPU).batch(1)
    places = []
    for latents, domains in ((batch.content, batch.y_src), (batch.x_ref, batch.y_trg)):
        rows = rows_of(bank, latents)
        pairs = [(bank.train[y], row) for y, row in zip(domains, rows, strict=True)]
        places.append([np.searchsorted(domain, row) / len(domain) for domain, row in pairs])
    assert abs(np.corrcoef(*places)[0, 1]) < 0.05


def test_the_noise_is_standard_normal(config: Config, bank: Bank) -> None:
    batches = list(LatentDataset(bank, config, CPU).batches())
    for name in ("z_trg", "z_1", "z_2"):
        z = torch.cat([getattr(b, name) for b in batches])
        assert z.shape == (6000, config.model.latent_dim)
        assert z.mean().abs().item() < 0.03
        assert z.std().item() == pytest.approx(1, abs=0.03)
        assert len(z.unique(dim=0)) == 6000  # new in every step


@pytest.mark.parametrize(
    ("size", "drop", "lengths"),
    [(10, True, [4, 4]), (10, False, [4, 4, 2]), (8, True, [4, 4]), (8, False, [4, 4]), (3, False, [3])],
)
def test_the_incomplete_last_batch(config: Config, bank: Bank, size: int, drop: bool, lengths: list[int]) -> None:
    keys = {"training.epoch_size": size, "training.batch_size": 4, "training.drop_last": drop}
    data = LatentDataset(bank, override(config, keys), CPU)
    assert len(data) == size
    assert data.steps == len(lengths)
    assert [len(batch.content) for batch in data.batches()] == lengths
    for batch in data.batches():
        assert {len(tensor) for tensor in batch} == {len(batch.content)}


def test_an_epoch_is_the_largest_domain_times_the_domains(config: Config, bank: Bank) -> None:
    data = LatentDataset(bank, override(config, {"training.epoch_size": None}), CPU)
    assert [len(rows) for rows in bank.train] == [6, 15, 10]
    assert len(data) == 45


def seen_by(data: LatentDataset, bank: Bank) -> list[set[int]]:
    """Rows of each domain that an epoch shows, as contents or as references."""
    rows = [(batch.y_src, batch.content) for batch in data.batches()]
    rows += [(batch.y_trg, batch.x_ref) for batch in data.batches()]
    domains = np.concatenate([y.numpy() for y, _ in rows])
    found = np.concatenate([rows_of(bank, latents) for _, latents in rows])
    return [set(found[domains == y].tolist()) for y in range(len(bank.domains))]


def test_few_latents_are_drawn_from_and_the_fewer_are_among_the_more(config: Config, bank: Bank) -> None:
    before: list[set[int]] = [set(), set(), set()]
    for limit in (1, 2, 5, 9, 10_000):
        few = override(config, {"data.max_samples": limit})
        found = seen_by(LatentDataset(bank, few, CPU), bank)
        assert [len(rows) for rows in found] == [min(limit, count) for count in (6, 15, 10)]
        assert found == [set(rows.tolist()) for rows in drawn(bank, few)]
        assert all(less < more or less == set(all_) for less, more, all_ in zip(before, found, bank.train, strict=True))
        assert found == seen_by(LatentDataset(bank, override(few, {"training.seed": 9}), CPU), bank)
        before = found
    each = override(config, {"data.max_samples": [3, 15, 4]})
    assert [len(rows) for rows in seen_by(LatentDataset(bank, each, CPU), bank)] == [3, 15, 4]
    whole, same = LatentDataset(bank, config, CPU), LatentDataset(bank, override(each, {"data.max_samples": 15}), CPU)
    assert_equal(whole.batch(3), same.batch(3))


def test_an_epoch_of_few_is_the_largest_number_times_the_domains(config: Config, bank: Bank) -> None:
    config = override(config, {"training.epoch_size": None, "training.batch_size": 10})
    for limit, size in ((2, 6), (8, 24), (10_000, 45), ([2, 3, 9], 27)):
        few = override(config, {"data.max_samples": limit})
        assert len(LatentDataset(bank, few, CPU)) == epoch_samples(bank, few) == size
        if size < 10:
            with pytest.raises(RaystarError, match=r"batch_size 10 is more than an epoch's 6 samples"):
                check_epoch(bank, few)
            few = override(few, {"training.drop_last": False})
        check_epoch(bank, few)
        assert len(LatentDataset(bank, override(few, {"training.epoch_size": 100}), CPU)) == 100


def test_few_latents_are_chosen_picture_by_picture_and_leave_the_bank_as_it_is(tmp_path: Path) -> None:
    write_named(tmp_path / "data/a", [f"scene{i:02d}_{k}" for i in range(30) for k in range(3)])
    write_named(tmp_path / "data/b", [f"x{i}" for i in range(40)])
    config = tiny_config(tmp_path / "data", AB, data__holdout=0.2)
    bank = open_bank(config, tmp_path / "cache")
    few = override(config, {"data.max_samples": 14})
    again = open_bank(few, tmp_path / "cache")
    assert (again.digest, again.key) == (bank.digest, bank.key)
    assert all(
        np.array_equal(a, b) for a, b in zip((*bank.train, *bank.held), (*again.train, *again.held), strict=True)
    )
    rows = drawn(bank, few)[0]
    assert set(rows) < set(bank.train[0])
    counts = Counter(bank.names[row].rsplit("_", 1)[0] for row in rows)
    assert sorted(counts.values()) == [2, 3, 3, 3, 3]
    # One more file moves few: the others keep their places in the order of names' hashes.
    np.save(tmp_path / "data/b/another.npy", latent(3, 8))
    more = open_bank(few, tmp_path / "cache")
    names = [{bank_.names[row] for row in drawn(bank_, few)[1]} for bank_ in (bank, more)]
    assert len(names[0] ^ names[1]) <= 4


def test_single_samples_are_the_rows_of_the_batches(config: Config, bank: Bank) -> None:
    data = LatentDataset(bank, override(config, {"training.epoch_size": 10, "training.batch_size": 4}), CPU)
    data.set_epoch(4)
    batch = data.batch(2)
    for row, index in enumerate(range(4, 8)):
        sample = data[index]
        assert set(sample) == {"content", "target_style", "target_style_id", "source_style_id"}
        assert torch.equal(sample["content"], batch.content[row])
        assert torch.equal(sample["target_style"], batch.x_ref[row])
        assert (sample["target_style_id"], sample["source_style_id"]) == (batch.y_trg[row], batch.y_src[row])
    assert batch.content.dtype == batch.x_ref.dtype == batch.z_trg.dtype == torch.float32
    assert batch.y_src.dtype == batch.y_trg.dtype == torch.int64
    with pytest.raises(IndexError):
        data[10]


def test_the_index_of_a_pack_names_its_content(tmp_path: Path) -> None:
    """The digest in the cache is over the packed numbers, so two caches of the same latents agree."""
    root = write_latents(tmp_path / "data", AB, count=4)
    for name in ("one", "two"):
        open_bank(tiny_config(root, AB), tmp_path / name)
    one, two = (json.loads(next((tmp_path / name).glob("*.json")).read_text())["digest"] for name in ("one", "two"))
    assert one == two
    assert len(one) == 64


def test_a_bank_is_reopened_as_it_was_whatever_happens_to_its_files(tmp_path: Path) -> None:
    root, cache = write_latents(tmp_path / "latents"), tmp_path / "cache"
    config = tiny_config(root)
    bank = open_bank(config, cache)
    np.save(root / "a" / "new.npy", np.ones((4, 16, 16), np.float16))
    (root / "b" / "picture00x.npy").unlink()
    again = reopen_bank(config, cache, bank.key)
    assert (again.names, again.digest) == (bank.names, bank.digest)
    assert torch.equal(again.latents, bank.latents)
    for one, other in zip((*bank.train, *bank.held), (*again.train, *again.held), strict=True):
        assert one.tolist() == other.tolist()
    assert open_bank(config, cache).key != bank.key
    (cache / f"latents-{bank.key}.npy").unlink()
    with pytest.raises(RaystarError, match="the packed latents are gone or damaged"):
        reopen_bank(config, cache, bank.key)


def test_an_epochs_noise_sent_at_once_is_that_of_its_steps(config: Config, bank: Bank) -> None:
    """As on a GPU: all batches are the same, the incomplete last one and a worker's share among them."""
    config = override(config, {"training.epoch_size": 14, "training.batch_size": 4, "training.drop_last": False})
    for rank, workers in ((0, 1), (1, 2)):
        each, sent = (LatentDataset(bank, config, torch.device("cpu"), rank, workers) for _ in range(2))
        for epoch in (2, 3):
            each.set_epoch(epoch)
            sent.set_epoch(epoch)
            sent.send_noise()
            for step in range(1, each.steps + 1):
                for one, other in zip(each.batch(step), sent.batch(step), strict=True):
                    assert torch.equal(one, other)
