"""Cached pixels against the files, and cache files against every reason to distrust them."""

import logging
import multiprocessing
import os
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data import cache as module
from data.cache import PixelSource, choose_cache, free_memory, load_pixels
from data.datasets import ImageSource, Sample
from data.images import read_triple
from data.transforms import to_pixels
from utils.errors import UserError
from utils.modalities import MODALITIES

SIZE = (32, 16)


def write_images(folder, count=5, size=SIZE):
    """`count` triples of noise as PNG files; the second is larger and has to be resized."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    samples = []
    for i in range(count):
        height, width = (size[0] + 9, size[1] + 5) if i == 1 else size
        paths = [folder / f"{i}_{m}.png" for m in MODALITIES]
        for path in paths:
            Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path)
        samples.append(Sample(i, 0, -1, tuple(ImageSource(str(path)) for path in paths)))
    return samples


@pytest.fixture
def source(tmp_path):
    return PixelSource("set_test", write_images(tmp_path / "images"), SIZE, Image.Resampling.BICUBIC)


def load(source, tmp_path, disk=True, workers=2):
    (pixels,) = load_pixels([source], workers, folder=tmp_path / "cache" if disk else None, root=tmp_path)
    return pixels


@pytest.mark.parametrize("disk", [False, True])
@pytest.mark.parametrize("resample", [Image.Resampling.BICUBIC, Image.Resampling.BILINEAR])
def test_pixels_are_those_of_the_files(source, tmp_path, disk, resample, monkeypatch):
    monkeypatch.setattr(module, "BATCH", 2)  # several batches, the last one not full
    source = PixelSource(source.name, source.samples, SIZE, resample)
    pixels = load(source, tmp_path, disk)
    assert pixels.dtype == np.uint8 and pixels.shape == (5, 3, 3, *SIZE)
    for i, sample in enumerate(source.samples):
        assert np.array_equal(pixels[i], to_pixels(read_triple(sample), SIZE, resample).numpy())
    if disk:
        assert isinstance(pixels, np.memmap) and not pixels.flags.writeable


def touch(source, tmp_path):
    path = source.samples[3].images[2].path
    os.utime(path, ns=(0, os.stat(path).st_mtime_ns + 1))
    return source


def other_content(source, tmp_path):
    path = source.samples[3].images[2].path
    time_before = os.stat(path).st_mtime_ns
    Image.new("RGB", SIZE[::-1]).save(path)
    os.utime(path, ns=(time_before, time_before))
    return source


def other_size(source, tmp_path):
    header = module._header(source, tmp_path)
    flat = PixelSource(source.name, source.samples, (16, 32), source.resample)
    assert header != module._header(flat, tmp_path)
    return flat


def other_order(source, tmp_path):
    return PixelSource(source.name, source.samples[::-1], SIZE, source.resample)


def other_filter(source, tmp_path):
    return PixelSource(source.name, source.samples, SIZE, Image.Resampling.BILINEAR)


def truncate(source, tmp_path):
    os.truncate(tmp_path / "cache" / "set_test_32x16.pixels", 5000)
    return source


def damage_key(source, tmp_path):
    with open(tmp_path / "cache" / "set_test_32x16.pixels", "r+b") as file:
        file.write(b"something else")
    return source


def empty(source, tmp_path):
    (tmp_path / "cache" / "set_test_32x16.pixels").write_bytes(b"")
    return source


def leftover(source, tmp_path):
    """A build that was killed."""
    (tmp_path / "cache" / "set_test_32x16.pixels").unlink()
    (tmp_path / "cache" / ".set_test_32x16.pixels.tmp").write_bytes(b"half")
    return source


REASONS = (touch, other_content, other_size, other_order, other_filter, truncate, damage_key, empty, leftover)


@pytest.mark.parametrize("change", REASONS)
def test_file_is_made_again_when_it_cannot_be_trusted(source, tmp_path, change, caplog):
    load(source, tmp_path)
    changed = change(source, tmp_path)
    with caplog.at_level(logging.INFO):
        pixels = load(changed, tmp_path)
    assert "decoding 5 triples" in caplog.text
    expected = np.stack([to_pixels(read_triple(s), changed.size, changed.resample).numpy() for s in changed.samples])
    assert np.array_equal(pixels, expected)
    assert not list((tmp_path / "cache").glob(".*.tmp"))


def test_file_is_used_while_nothing_changed(source, tmp_path, monkeypatch):
    first = load(source, tmp_path)
    monkeypatch.setattr(module, "decoded", None)  # any decoding would fail
    assert np.array_equal(load(source, tmp_path), first)
    moved = tmp_path / "elsewhere"  # a data set and its cache may move together
    moved.mkdir()
    shutil.copytree(tmp_path / "images", moved / "images", copy_function=shutil.copy2)
    shutil.copytree(tmp_path / "cache", moved / "cache", copy_function=shutil.copy2)
    samples = [
        Sample(s.pid, 0, -1, tuple(ImageSource(i.path.replace(str(tmp_path), str(moved))) for i in s.images))
        for s in source.samples
    ]
    assert np.array_equal(load(PixelSource(source.name, samples, SIZE, source.resample), moved), first)


def test_one_process_decodes_and_the_others_wait(source, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    results = [None] * 3

    def run(i):  # flock works between open files, so that threads stand for processes here
        results[i] = load(source, tmp_path)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(np.array_equal(results[0], other) for other in results)
    assert caplog.text.count("decoding 5 triples") == 1


@pytest.mark.parametrize("disk", [False, True])
def test_every_broken_file_is_named(source, tmp_path, disk):
    for i, m in ((0, 1), (4, 0), (4, 2)):
        with open(source.samples[i].images[m].path, "r+b") as file:
            file.truncate(100)
    os.unlink(source.samples[2].images[0].path)
    with pytest.raises(UserError, match="4 of 15 image files") as error:
        load(source, tmp_path, disk)
    for name in ("0_NI.png: cannot", "4_RGB.png: cannot", "4_TI.png: cannot", "2_RGB.png: no such file"):
        assert name in str(error.value)
    assert {path.suffix for path in tmp_path.glob("cache/.*")} <= {".lock"}  # nothing half made stays behind
    assert not list(tmp_path.glob("cache/*.pixels"))


def test_folder_that_cannot_be_written(source, tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(UserError, match=r"cache cannot hold.*DATALOADER\.CACHE_DIR.*memory or off"):
        load(source, tmp_path)


def test_a_finished_file_is_used_from_a_folder_that_cannot_be_written(source, tmp_path, monkeypatch):
    first = load(source, tmp_path)
    monkeypatch.setattr(module, "_one_at_a_time", None)  # would write its lock
    assert np.array_equal(load(source, tmp_path), first)


def test_full_disk(source, tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.os, "fsync", full)
    with pytest.raises(UserError, match=r"No space left.*DATALOADER\.CACHE_DIR"):
        load(source, tmp_path)
    assert not list((tmp_path / "cache").glob("*.pixels")) and not list((tmp_path / "cache").glob(".*.tmp"))


GIB = 2**30


@pytest.mark.parametrize(
    "triples, free, processes, chosen",
    [
        (5000, 100 * GIB, 1, "memory"),
        (5000, 5 * GIB, 1, "off"),  # more than a quarter
        (5000, 20 * GIB, 8, "off"),
        (30000, 1000 * GIB, 1, "off"),  # more than 8 GiB
        (5000, None, 1, "off"),
    ],
)
def test_auto_takes_a_bounded_share_of_the_memory(triples, free, processes, chosen, monkeypatch, caplog):
    monkeypatch.setattr(module, "free_memory", lambda: free)
    monkeypatch.setattr(module, "local_world_size", lambda: processes)
    sources = [PixelSource("a", [None] * n, (256, 128), Image.Resampling.BICUBIC) for n in (triples - 800, 800)]
    assert sum(source.nbytes for source in sources) == triples * 9 * 256 * 128
    caplog.set_level(logging.INFO)
    assert choose_cache("auto", sources, cuda=True, train=True) == chosen
    assert choose_cache("auto", sources, cuda=False, train=True) == "off"
    assert choose_cache("auto", sources, cuda=True, train=False) == "off"
    first, second, third = (record.getMessage() for record in caplog.records)
    assert first.startswith(f"DATALOADER.CACHE auto: {chosen} (")
    assert "CUDA" in second and "once" in third
    for asked in ("off", "disk"):
        assert choose_cache(asked, sources, cuda=True, train=True) == asked
    assert len(caplog.records) == 3


def test_memory_that_is_not_there(monkeypatch):
    monkeypatch.setattr(module, "free_memory", lambda: GIB)
    large = [PixelSource("a", [None] * 5000, (256, 128), Image.Resampling.BICUBIC)]
    with pytest.raises(UserError, match=r"1\.4 GiB of decoded images, but 1\.0 GiB.*disk or off"):
        choose_cache("memory", large, cuda=False, train=True)
    monkeypatch.setattr(module, "free_memory", lambda: 2 * GIB)
    assert choose_cache("memory", large, cuda=False, train=True) == "memory"


def test_free_memory_knows_a_containers_limit(tmp_path, monkeypatch):
    if free_memory() is None:
        pytest.skip("no /proc/meminfo")
    files = [tmp_path / name for name in ("max", "current", "stat")]
    monkeypatch.setattr(module, "MEMORY_GROUPS", [tuple(map(str, files))])
    whole = free_memory()
    for path, text in zip(files, ("1000000", "700000", "anon 5\ninactive_file 200000\n"), strict=True):
        path.write_text(text)
    assert free_memory() == 500000
    files[0].write_text("max\n")
    assert free_memory() > whole / 2


def test_no_process_is_left_behind_by_a_file_that_cannot_be_decoded(source, tmp_path):
    Path(source.samples[3].images[1].path).write_bytes(b"no image")
    with pytest.raises(UserError) as kept:  # whoever keeps the error keeps no process with it
        load(source, tmp_path, disk=False)
    assert "cannot be decoded" in str(kept.value) and not multiprocessing.active_children()
