"""Sources: what they read, and what they say about files that are missing, broken or hostile."""

from __future__ import annotations

import gc
import gzip
import hashlib
import io
import pickle
import shutil
import struct
import tarfile
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits

from robustkit.data import cache
from robustkit.data.fingerprint import fingerprint
from robustkit.data.load import load_dataset
from robustkit.data.split import Dataset
from robustkit.errors import DataError
from robustkit.recipe.spec import Use

IDX = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
RANDOM = np.random.default_rng(0)


def load(name: str, **parameters: object) -> Dataset:
    return load_dataset(Use(name=name, parameters=parameters, label=name))


def idx(array: NDArray[np.uint8]) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


@pytest.fixture
def idx_folder(tmp_path: Path) -> Path:
    """A small MNIST: 40 + 20 images of 6x5 pixels in four plain files."""
    for name, count in (("train", 40), ("t10k", 20)):
        images = RANDOM.integers(0, 256, (count, 6, 5), dtype=np.uint8)
        (tmp_path / f"{name}-images-idx3-ubyte").write_bytes(idx(images))
        (tmp_path / f"{name}-labels-idx1-ubyte").write_bytes(idx(np.arange(count, dtype=np.uint8) % 10))
    return tmp_path


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """Two classes, noisy PNGs of 9x7 pixels in train/ and test/."""
    root = tmp_path / "images"
    for split, count in (("train", 12), ("test", 4)):
        for name in ("cat", "dog"):
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = RANDOM.integers(0, 256, (7, 9, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")
    return root


def test_digits_are_the_whole_set_in_three_disjoint_splits() -> None:
    data = load("digits")
    assert data.shape == (1, 8, 8)
    assert len(data.train) + len(data.validation) + len(data.test) == 1797
    everything = torch.cat([part.images for part in (data.train, data.validation, data.test)])
    original = np.rint(load_digits().images * (255 / 16)).astype(np.uint8)
    assert sorted(one.tobytes() for one in everything.numpy()) == sorted(one.tobytes() for one in original)
    assert int(data.train.images.max()) == 255
    counts = torch.bincount(data.validation.labels, minlength=10)
    assert int(counts.min()) > 0
    assert int(counts.max() - counts.min()) <= 1


def test_the_validation_split_is_stratified_and_fixed() -> None:
    first, second = load("digits"), load("digits")
    assert torch.equal(first.validation.index, second.validation.index)
    for label in range(10):
        whole = int((first.train.labels == label).sum() + (first.validation.labels == label).sum())
        assert int((first.validation.labels == label).sum()) == pytest.approx(0.1 * whole, abs=1)
    wide = load_dataset(Use(name="digits", label="digits"), validation=0.4)
    assert torch.equal(wide.test.images, first.test.images)


def test_size_and_limit() -> None:
    data = load("digits", size=28, limit=200)
    assert data.shape == (1, 28, 28)
    assert len(data.train) + len(data.validation) == 200
    assert len(data.test) == 200
    assert set(data.test.labels.tolist()) == set(range(10))
    assert fingerprint(Use(name="digits", label="d")) != fingerprint(
        Use(name="digits", parameters={"size": 28}, label="d")
    )


def test_a_limit_that_leaves_nothing_to_validate_on_is_an_error() -> None:
    with pytest.raises(DataError, match=r"2 training images, no two of one class.*raise `limit`"):
        load("digits", limit=2)
    assert len(load("digits", limit=12).validation) == 2


def test_channel_statistics_are_those_of_the_training_images() -> None:
    data = load("digits")
    pixels = data.train.images.double() / 255
    assert data.mean[0] == pytest.approx(float(pixels.mean()), abs=1e-6)
    assert data.std[0] == pytest.approx(float(pixels.std(correction=0)), abs=1e-6)


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
def test_the_four_idx_files_gzipped_or_not(name: str, zipped: bool, idx_folder: Path) -> None:
    expected = np.frombuffer((idx_folder / IDX[2]).read_bytes()[16:], dtype=np.uint8).reshape(20, 1, 6, 5)
    if zipped:
        for file in IDX:
            path = idx_folder / file
            (idx_folder / f"{file}.gz").write_bytes(gzip.compress(path.read_bytes()))
            path.unlink()
    data = load(name, root=str(idx_folder))
    assert np.array_equal(data.test.images.numpy(), expected)
    assert len(data.classes) == 10


def test_two_sources_of_the_same_files_keep_their_own_class_names(idx_folder: Path) -> None:
    fashion, digits = load("fashion_mnist", root=str(idx_folder)), load("mnist", root=str(idx_folder))
    assert fashion.classes[0] == "T-shirt/top"
    assert digits.classes[0] == "0"
    assert fashion.fingerprint != digits.fingerprint


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        (IDX[0], lambda raw: raw[:-7], "header says"),
        (IDX[0], lambda raw: raw[:9], "not an IDX file"),
        (IDX[0], lambda raw: b"\x89PNG" + raw, "not an IDX file"),
        (IDX[1], lambda raw: raw[:7] + bytes([39]) + raw[8:-1], "39 labels for 40 images"),
        (IDX[3], lambda raw: raw[:-1] + bytes([200]), "labels lie in"),
        (IDX[0], lambda raw: raw[:4] + b"\xff" * 12 + raw[16:], "header says"),
        (IDX[2], None, "missing"),
    ],
)
def test_broken_idx_files_are_named(file: str, change: object, message: str, idx_folder: Path) -> None:
    path = idx_folder / file
    if change is None:
        path.unlink()
    else:
        path.write_bytes(change(path.read_bytes()))  # type: ignore[operator]
    with pytest.raises(DataError, match=message) as caught:
        load("mnist", root=str(idx_folder))
    assert (str(idx_folder) if message == "labels lie in" else file) in str(caught.value)


def test_a_truncated_gzip_is_named(idx_folder: Path) -> None:
    path = idx_folder / IDX[0]
    (idx_folder / f"{IDX[0]}.gz").write_bytes(gzip.compress(path.read_bytes())[:-20])
    path.unlink()
    with pytest.raises(DataError, match=rf"{IDX[0]}\.gz"):
        load("mnist", root=str(idx_folder))


def test_a_missing_folder_says_what_to_set(tmp_path: Path) -> None:
    for name in ("mnist", "fashion_mnist", "cifar10", "cifar100", "svhn", "image_folder"):
        with pytest.raises(DataError, match="nowhere"):
            load(name, root=str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match=r"nowhere\.npz"):
        load("npz", path=str(tmp_path / "nowhere.npz"))


def test_image_folder_with_train_and_test(image_folder: Path) -> None:
    data = load("image_folder", root=str(image_folder))
    assert data.classes == ("cat", "dog")
    assert data.shape == (3, 7, 9)
    assert (len(data.train) + len(data.validation), len(data.test)) == (24, 8)
    with Image.open(image_folder / "test" / "cat" / "0.png") as image:
        expected = np.asarray(image).transpose(2, 0, 1)
    assert any(np.array_equal(one, expected) for one in data.test.images.numpy())
    assert load("image_folder", root=str(image_folder), size=5).shape == (3, 5, 5)
    assert load("image_folder", root=str(image_folder), channels="gray").shape == (1, 7, 9)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("train",), "has train/ but no test/; add test/"),
        (("test",), "has test/ but no train/; add train/"),
        (("train", "val"), "has train/ and val/ but no test/; rename val/ to test/"),
        (("train", "other"), "has train/ but no test/"),
    ],
)
def test_half_a_layout_is_no_pair_of_classes(names: tuple[str, ...], message: str, image_folder: Path) -> None:
    root = image_folder.with_name("half")
    for name in names:
        shutil.copytree(image_folder / "train", root / name)
    with pytest.raises(DataError, match=message) as caught:
        load("image_folder", root=str(root))
    assert str(root) in str(caught.value)


def test_a_class_may_be_called_train(image_folder: Path) -> None:
    (image_folder / "train" / "cat").rename(image_folder / "train" / "train")
    assert load("image_folder", root=str(image_folder / "train")).classes == ("dog", "train")


def test_one_folder_is_split_by_content(image_folder: Path, tmp_path: Path) -> None:
    """Renaming and moving images moves none from one split to the other."""

    def images(root: Path) -> tuple[set[bytes], set[bytes]]:
        data = load("image_folder", root=str(root), test=0.25)
        train = {one.tobytes() for part in (data.train, data.validation) for one in part.images.numpy()}
        return train, {one.tobytes() for one in data.test.images.numpy()}

    first = image_folder / "train"
    second = tmp_path / "renamed"
    for number, path in enumerate(sorted(first.rglob("*.png"), key=lambda path: path.stat().st_size)):
        target = second / path.parent.name / "deeper" / f"x{number}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    train, test = images(first)
    assert images(second) == (train, test)
    assert len(test) == 6
    assert not train & test


def test_equal_images_never_lie_on_both_sides(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for number in range(12):
            pixels = np.full((4, 4), (number // 3) * 40 + (name == "b") * 7, dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / f"{number}.png")
    data = load("image_folder", root=str(tmp_path), test=0.4)
    train = {one.tobytes() for part in (data.train, data.validation) for one in part.images.numpy()}
    assert not train & {one.tobytes() for one in data.test.images.numpy()}


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:60])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def text(path: Path) -> None:
    path.write_text("this is no image")


def gray(path: Path) -> None:
    Image.fromarray(np.zeros((7, 9), dtype=np.uint8)).save(path)


def larger(path: Path) -> None:
    Image.fromarray(np.zeros((8, 9, 3), dtype=np.uint8)).save(path)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [(truncate, "broken"), (empty, "not an image"), (text, "not an image"), (gray, "channels"), (larger, "size")],
)
def test_a_spoilt_image_is_named(spoil: object, message: str, image_folder: Path) -> None:
    path = image_folder / "train" / "dog" / "5.png"
    spoil(path)  # type: ignore[operator]
    with pytest.raises(DataError, match=message) as caught:
        load("image_folder", root=str(image_folder))
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize("channels", ["auto", "gray", "rgb"])
def test_16_bit_gray_images_are_scaled(channels: str, suffix: str, tmp_path: Path) -> None:
    values = np.array([[0, 257, 1000, 32768, 65278, 65535]] * 2, dtype=np.uint16)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for number in range(4):
            pixels = values + np.uint16(number)
            pixels[values == 65535] = 65535
            Image.fromarray(pixels).save(tmp_path / name / f"{number}.{suffix}")
    data = load("image_folder", root=str(tmp_path), test=0.5, channels=channels)
    assert data.shape[0] == (3 if channels == "rgb" else 1)
    for image in (*data.train.images, *data.test.images):
        assert image[0, 0].tolist() == [0, 1, 4, 128, 254, 255]


@pytest.mark.parametrize(("kind", "message"), [(np.int32, "32-bit"), (np.float32, "floats")])
def test_images_without_a_known_range_are_refused(kind: type, message: str, image_folder: Path) -> None:
    path = image_folder / "train" / "dog" / "5.tif"
    Image.fromarray(np.zeros((7, 9), dtype=kind)).save(path)
    with pytest.raises(DataError, match=message) as caught:
        load("image_folder", root=str(image_folder))
    assert str(path) in str(caught.value)


def test_a_truncated_jpeg_is_named(image_folder: Path) -> None:
    path = image_folder / "test" / "cat" / "9.jpg"
    Image.fromarray(RANDOM.integers(0, 256, (7, 9, 3), dtype=np.uint8)).save(path, quality=95)
    path.write_bytes(path.read_bytes()[:-120])
    with pytest.raises(DataError, match=r"9\.jpg"):
        load("image_folder", root=str(image_folder))


def test_a_decompression_bomb_is_refused(image_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40)
    with pytest.raises(DataError, match=r"\.png"):
        load("image_folder", root=str(image_folder))


def test_folders_without_images_or_with_other_classes_are_named(image_folder: Path) -> None:
    (image_folder / "train" / "fox").mkdir()
    with pytest.raises(DataError, match="fox"):
        load("image_folder", root=str(image_folder))
    shutil.rmtree(image_folder / "train" / "fox")
    shutil.rmtree(image_folder / "test" / "dog")
    with pytest.raises(DataError, match="different classes: dog"):
        load("image_folder", root=str(image_folder))


def arrays(**changes: object) -> dict[str, object]:
    images = RANDOM.integers(0, 256, (30, 6, 6, 3), dtype=np.uint8)
    labels = np.arange(30) % 3
    return {"x_train": images, "y_train": labels, "x_test": images[:9], "y_test": labels[:9], **changes}


def test_npz(tmp_path: Path) -> None:
    path = tmp_path / "data.npz"
    np.savez(path, **arrays())  # type: ignore[arg-type]
    data = load("npz", path=str(path))
    assert data.shape == (3, 6, 6)
    assert data.classes == ("0", "1", "2")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"y_test": np.arange(8) % 3}, "9 test images but 8 labels"),
        ({"x_train": np.zeros((30, 6, 6, 3))}, "uint8"),
        ({"y_train": np.full(30, -1)}, "labels"),
        ({"y_train": np.array(["a"] * 30)}, "whole numbers"),
        ({"x_test": np.zeros((9, 5, 5, 3), dtype=np.uint8)}, "train images are"),
        ({"x_test": np.zeros((9, 4), dtype=np.uint8)}, "shape"),
        ({"y_train": np.array([print] * 30, dtype=object)}, "plain arrays"),
        ({"y_train": np.arange(29) % 3}, "30 train images but 29 labels"),
        ({"x_test": np.zeros((0, 6, 6, 3), dtype=np.uint8), "y_test": np.zeros(0, dtype=int)}, "no test images"),
        ({"y_train": np.zeros(30, dtype=int), "y_test": np.zeros(9, dtype=int)}, "1 class"),
    ],
)
def test_an_npz_that_makes_no_sense_is_named(changes: dict[str, object], message: str, tmp_path: Path) -> None:
    path = tmp_path / "data.npz"
    np.savez(path, **arrays(**changes))  # type: ignore[arg-type]
    with pytest.raises(DataError, match=message) as caught:
        load("npz", path=str(path))
    assert str(path) in str(caught.value)


class Evil:
    """Touches a file when it is unpickled."""

    def __init__(self, mark: str) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (self.mark, "w")


@pytest.mark.parametrize("raw", [b"", b"PK\x03\x04broken", b"\x00" * 100])
def test_broken_npz_files_are_named(raw: bytes, tmp_path: Path) -> None:
    path = tmp_path / "data.npz"
    path.write_bytes(raw)
    with pytest.raises(DataError, match=r"data\.npz"):
        load("npz", path=str(path))


def test_no_pickle_is_ever_run(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    path = tmp_path / "data.npz"
    path.write_bytes(pickle.dumps(Evil(str(mark))))
    with pytest.raises(DataError):
        load("npz", path=str(path))
    np.savez(path, **arrays(y_train=np.array([Evil(str(mark))] * 30, dtype=object)))  # type: ignore[arg-type]
    with pytest.raises(DataError):
        load("npz", path=str(path))
    assert not mark.exists()


def test_the_cache_is_used_and_survives_damage(image_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    save = cache._save
    monkeypatch.setattr(cache, "_save", lambda place, arrays: (calls.append(place.name), save(place, arrays))[1])
    first = load("image_folder", root=str(image_folder))
    again = load("image_folder", root=str(image_folder))
    assert len(calls) == 1
    assert torch.equal(first.train.images, again.train.images)
    place = cache.cache_folder() / "decoded" / calls[0]
    for damage in (truncate, empty):
        damage(place / "train_images.npy")
        repaired = load("image_folder", root=str(image_folder))
        assert torch.equal(first.train.images, repaired.train.images)
    assert len(calls) == 3


def test_equal_content_has_an_equal_fingerprint_wherever_it_lies(image_folder: Path, tmp_path: Path) -> None:
    def key(root: Path) -> str:
        return fingerprint(Use(name="image_folder", parameters={"root": str(root)}, label="d"))

    copy = tmp_path / "elsewhere"
    shutil.copytree(image_folder, copy)
    assert key(copy) == key(image_folder)
    path = copy / "train" / "cat" / "1.png"
    Image.fromarray(np.zeros((7, 9, 3), dtype=np.uint8)).save(path)
    assert key(copy) != key(image_folder)


@pytest.mark.parametrize("layout", ["", "train"])
def test_a_second_look_at_the_same_files_reads_none_of_them(
    layout: str, image_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use = Use(name="image_folder", parameters={"root": str(image_folder / layout)}, label="d")
    read: list[str] = []
    digest = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda file, kind: (read.append(file.name), digest(file, kind))[1])
    first = fingerprint(use)
    assert len(read) == len(set(read)) == (24 if layout else 32), "each file is read once"
    assert fingerprint(use) == first
    assert len(read) == len(set(read))
    path = image_folder / "train" / "cat" / "1.png"
    path.write_bytes((image_folder / "train" / "dog" / "1.png").read_bytes())
    assert fingerprint(use) != first


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    folder = tmp_path / "served"
    folder.mkdir()
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(folder))) as one:
        thread = threading.Thread(target=one.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{one.server_port}/", folder
        one.shutdown()
        thread.join()


def cifar_archive(name: str, batches: list[str], label: bytes, meta: tuple[str, dict[str, list[str]]]) -> bytes:
    """What the CIFAR archive holds, with five random images a batch."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as archive:

        def add(file: str, content: object) -> None:
            raw = pickle.dumps(content)
            info = tarfile.TarInfo(f"{name}/{file}")
            info.size = len(raw)
            archive.addfile(info, io.BytesIO(raw))

        for file in batches:
            pixels = RANDOM.integers(0, 256, (20, 3072), dtype=np.uint8)
            add(file, {"data": pixels, label.decode(): [number % 10 for number in range(20)]})
        add(*meta)
    return stream.getvalue()


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_is_downloaded_once_and_read(
    name: str, server: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hashlib import md5

    from torchvision import datasets

    url, served = server
    kind = datasets.CIFAR10 if name == "cifar10" else datasets.CIFAR100
    batches = [file for file, _ in (*kind.train_list, *kind.test_list)]
    labels = {"label_names" if name == "cifar10" else "fine_label_names": [f"class {number}" for number in range(10)]}
    raw = cifar_archive(
        kind.base_folder, batches, b"labels" if name == "cifar10" else b"fine_labels", (kind.meta["filename"], labels)
    )
    (served / kind.filename).write_bytes(raw)
    digest = {}
    with tarfile.open(fileobj=io.BytesIO(raw)) as archive:
        for member in archive.getmembers():
            held = archive.extractfile(member)
            assert held is not None
            digest[Path(member.name).name] = md5(held.read(), usedforsecurity=False).hexdigest()
    monkeypatch.setattr(kind, "url", url + kind.filename)
    monkeypatch.setattr(kind, "tgz_md5", md5(raw, usedforsecurity=False).hexdigest())
    monkeypatch.setattr(kind, "train_list", [[file, digest[file]] for file, _ in kind.train_list])
    monkeypatch.setattr(kind, "test_list", [[file, digest[file]] for file, _ in kind.test_list])
    monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": digest[kind.meta["filename"]]})
    root = tmp_path / "root"
    with pytest.raises(DataError, match="download: true"):
        load(name, root=str(root))
    data = load(name, root=str(root), download=True)
    assert data.shape == (3, 32, 32)
    assert len(data.train) + len(data.validation) == 20 * len(kind.train_list)
    assert data.classes[0] == "class 0"
    (served / kind.filename).unlink()
    assert torch.equal(load(name, root=str(root)).test.images, data.test.images)
    (root / kind.base_folder / batches[0]).write_bytes(pickle.dumps(Evil(str(tmp_path / "ran"))))
    with pytest.raises(DataError, match=str(root)):
        load(name, root=str(root))
    assert not (tmp_path / "ran").exists(), "torchvision's checksum comes before its pickle"


@pytest.mark.filterwarnings("ignore:Exception ignored:pytest.PytestUnraisableExceptionWarning")
def test_a_download_that_fails_says_so(
    server: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchvision import datasets

    monkeypatch.setattr(datasets.FashionMNIST, "mirrors", [server[0]])
    with pytest.raises(DataError, match="could not be downloaded"):
        load("fashion_mnist", root=str(tmp_path / "root"), download=True)
    gc.collect()  # torchvision leaves the answer of the server open; its warning belongs to this test


def test_svhn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hashlib import md5

    from scipy.io import savemat
    from torchvision import datasets

    lists = {}
    for split, count in (("train", 40), ("test", 20)):
        pixels = RANDOM.integers(0, 256, (32, 32, 3, count), dtype=np.uint8)
        labels = np.arange(1, count + 1, dtype=np.uint8)[:, None] % 10 + 1
        file = f"{split}_32x32.mat"
        savemat(tmp_path / file, {"X": pixels, "y": labels})
        digest = md5((tmp_path / file).read_bytes(), usedforsecurity=False).hexdigest()
        lists[split] = ["", file, digest]
        if split == "test":
            expected = pixels
    monkeypatch.setattr(datasets.SVHN, "split_list", lists)
    data = load("svhn", root=str(tmp_path))
    assert np.array_equal(data.test.images.numpy(), expected.transpose(3, 2, 0, 1))
    assert set(data.test.labels.tolist()) == set(range(10)), "ten stands for zero"


def test_fashion_mnist_as_debian_lays_it(fashion_mnist_root: Path) -> None:
    data = load("fashion_mnist", root=str(fashion_mnist_root))
    assert data.shape == (1, 28, 28)
    assert (len(data.train), len(data.validation), len(data.test)) == (54_000, 6_000, 10_000)
    assert data.classes[0] == "T-shirt/top"
    assert torch.equal(torch.bincount(data.test.labels), torch.full((10,), 1000))
    assert data.mean[0] == pytest.approx(0.286, abs=0.001)


def test_cifar10_as_a_folder_of_jpegs(cifar10_root: Path) -> None:
    data = load("image_folder", root=str(cifar10_root), limit=500)
    assert data.shape == (3, 32, 32)
    assert len(data.classes) == 10
    assert (len(data.train) + len(data.validation), len(data.test)) == (500, 500)
    assert all(0.2 < value < 0.6 for value in data.mean)
