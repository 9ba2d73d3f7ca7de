"""Decoded pixels come from the cache as they were decoded, and only as long as nothing has changed."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from results.files import CACHE_VARIABLE
from results.schema import DataWarning
from trainables.datasets import SplitImages, load_dataset
from trainables.pixel_cache import SWITCH, Decoded, PixelCache, default_folder, warn_of_data


class Decoding:
    """Makes pixels of a folder's files, and counts how often."""

    def __init__(self, root: Path) -> None:
        self.root, self.times = root, 0

    def paths(self) -> list[Path]:
        return list(self.root.rglob("*"))

    def __call__(self) -> Decoded:
        self.times += 1
        warn_of_data("one image was left out", stacklevel=1)
        content = b"".join(path.read_bytes() for path in sorted(self.paths()) if path.is_file())
        pixels = np.frombuffer(content, np.uint8)[: len(content) // 4 * 4].reshape(-1, 1, 2, 2)
        return Decoded(pixels, np.arange(len(pixels)), {"class_names": ["a"], "num_test": 0})


@pytest.fixture
def decoding(tmp_path: Path) -> Decoding:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "one").write_bytes(bytes(range(200)))
    return Decoding(tmp_path / "data")


@pytest.fixture
def cache(tmp_path: Path) -> PixelCache:
    return PixelCache(tmp_path / "cache" / "pixels", least_source_bytes=0)


def get(cache: PixelCache, decoding: Decoding, image_size: int | None = None) -> Decoded:
    with pytest.warns(DataWarning, match="^one image was left out$"):
        return cache.get(decoding.paths, image_size=image_size, decode=decoding)


def test_the_second_time_pixels_labels_and_warnings_come_from_the_cache(cache: PixelCache, decoding: Decoding) -> None:
    first, second = get(cache, decoding), get(cache, decoding)
    assert decoding.times == 1
    assert np.array_equal(first.pixels_NCHW, second.pixels_NCHW)
    assert np.array_equal(first.labels_N, second.labels_N)
    assert second.about["class_names"] == ["a"]


@pytest.mark.parametrize("change", ["content", "time", "replaced", "added", "size"])
def test_whatever_may_change_the_pixels_has_them_decoded_again(
    cache: PixelCache, decoding: Decoding, change: str
) -> None:
    get(cache, decoding)
    path = decoding.root / "one"
    before = path.stat()
    if change == "content":
        path.write_bytes(bytes(range(204)))
    elif change == "time":
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    elif change == "replaced":
        other = path.with_name("other")
        other.write_bytes(path.read_bytes())
        os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
        other.replace(path)
    elif change == "added":
        (decoding.root / "two").write_bytes(b"1234")
    get(cache, decoding, image_size=8 if change == "size" else None)
    assert decoding.times == 2


@pytest.mark.parametrize("name", ["pixels.npy", "labels.npy", "about.json"])
@pytest.mark.parametrize("content", [b"", b"{}", b"\x93NUMPY\x01\x00"])
def test_a_damaged_entry_is_ignored_and_written_again(
    cache: PixelCache, decoding: Decoding, name: str, content: bytes
) -> None:
    wanted = get(cache, decoding)
    assert cache.folder is not None
    (entry,) = cache.folder.iterdir()
    (entry / name).write_bytes(content)
    assert np.array_equal(get(cache, decoding).pixels_NCHW, wanted.pixels_NCHW)
    assert decoding.times == 2
    get(cache, decoding)
    assert decoding.times == 2


def test_where_the_cache_cannot_be_written_there_is_none_and_no_error(tmp_path: Path, decoding: Decoding) -> None:
    (tmp_path / "file").touch()
    for _ in range(2):
        get(PixelCache(tmp_path / "file" / "below", least_source_bytes=0), decoding)
    assert decoding.times == 2


def test_entries_that_were_not_used_for_longest_make_room(tmp_path: Path, decoding: Decoding) -> None:
    cache = PixelCache(tmp_path / "cache", most_bytes=2400, least_source_bytes=0)  # two entries
    for size in (1, 2, 1, 3, 1, 2):
        get(cache, decoding, image_size=size)
    assert decoding.times == 4, "1 and 2 are decoded; 1 is used; 3 takes the place of 2; 2 is decoded again"


def test_what_killed_processes_left_is_removed_after_a_day(cache: PixelCache, decoding: Decoding) -> None:
    assert cache.folder is not None
    left, begun = cache.folder / ".0f.12345678.tmp", cache.folder / ".1e.12345678.tmp"
    for unfinished in (left, begun):
        unfinished.mkdir(parents=True)
    two_days_ago = begun.stat().st_mtime - 2 * 86_400
    os.utime(left, (two_days_ago, two_days_ago))
    get(cache, decoding)
    assert not left.exists()
    assert begun.exists()


def test_what_is_larger_than_the_cache_is_not_kept(tmp_path: Path, decoding: Decoding) -> None:
    get(PixelCache(tmp_path / "cache", most_bytes=100, least_source_bytes=0), decoding)
    assert not list(tmp_path.glob("cache/*"))


def test_small_datasets_are_decoded_every_time(tmp_path: Path, decoding: Decoding) -> None:
    get(PixelCache(tmp_path / "cache"), decoding)
    assert not (tmp_path / "cache").exists()


def test_the_folder_is_the_users(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in (SWITCH, CACHE_VARIABLE, "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/somebody")
    assert default_folder() == Path("/somebody/.cache/hyperparameter-ensembles/pixels")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_folder() == tmp_path / "hyperparameter-ensembles" / "pixels"
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "given"))
    assert default_folder() == tmp_path / "given" / "pixels"
    monkeypatch.setenv(SWITCH, "off")
    assert default_folder() is None


def test_a_folder_of_photographs_is_split_the_same_from_the_cache(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """800 images of noise as BMP are 39 MB."""
    rng = np.random.default_rng(0)
    for index in range(800):
        path = tmp_path / "photos" / "ab"[index % 2] / f"{index}.bmp"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (128, 128, 3), np.uint8)).save(path)
    (tmp_path / "photos" / "a" / "cut.png").write_bytes(b"\x89PNG")

    def load(switch: str) -> tuple[SplitImages, list[str]]:
        monkeypatch.setenv(SWITCH, switch)
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            loaded = load_dataset(f"folder:{tmp_path / 'photos'}", data_dir="unused", image_size=16)
        return loaded, [str(warning.message) for warning in heard]

    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    plain, said = load("off")
    for _ in range(2):
        loaded, said_again = load("on")
        assert loaded.split_hash == plain.split_hash
        assert np.array_equal(loaded.images_NCHW, plain.images_NCHW)
        assert said_again == said
        assert "cut.png" in said[0]
    (entry,) = (tmp_path / "cache" / "pixels").iterdir()
    assert {path.name for path in entry.iterdir()} == {"pixels.npy", "labels.npy", "about.json"}
