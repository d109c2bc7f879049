"""Every data set through its official on-disk format, on tiny files, and damaged files."""

from __future__ import annotations

import stat
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from mi_at.data.base import ImageDataModule
from mi_at.data.cifar import CIFAR10, CIFAR100
from mi_at.data.digits import Digits
from mi_at.data.files import cached_array
from mi_at.data.folder import Folder, class_names
from mi_at.data.mnist import MNIST, FashionMNIST, parse_idx
from mi_at.data.svhn import SVHN
from mi_at.data.tiny_imagenet import TinyImageNet
from tests.data.makers import (
    SmallTinyImageNet,
    TinyCIFAR10,
    TinyCIFAR100,
    TinyFashionMNIST,
    TinyMNIST,
    TinySVHN,
    make_cifar10,
    make_cifar100,
    make_folder,
    make_idx,
    make_svhn,
    make_tiny_imagenet,
)


def fitted(kind: Callable[..., ImageDataModule], root: Path, **options: object) -> ImageDataModule:
    data = kind(root=root, **{"batch_size": 4, **options})
    data.setup("fit")
    return data


def training_images(data: ImageDataModule) -> torch.Tensor:
    """All training images as uint8, in the order of the files."""
    return torch.cat([batch.x for batch in data.train_batches()]).mul(255).round().to(torch.uint8)


# ---------------------------------------------------------------- digits


def test_digits() -> None:
    from sklearn.datasets import load_digits

    official = load_digits()
    data = Digits(batch_size=64, val_size=180)
    data.setup("fit")
    assert (len(data.train_index), len(data.val_index)) == (1257, 180)
    data.setup("test")
    test = list(data.test_dataloader())
    images, labels = torch.cat([b.x for b in test]), torch.cat([b.y for b in test])
    assert len(images) == 360
    expected = np.bincount(official.target) * 360 / 1797
    assert np.abs(labels.bincount().numpy() - expected).max() <= 1
    train = torch.cat([batch.x for batch in data.train_batches()])
    whole = torch.cat((train, torch.cat([batch.x for batch in data.val_dataloader()]), images))  # type: ignore[union-attr]
    rounded = np.rint(official.images * 255 / 16).astype(np.uint8)
    assert sorted(map(bytes, rounded)) == sorted(bytes(x.mul(255).round().byte().numpy()) for x in whole[:, 0])
    assert float(whole.max()) == 1


# ---------------------------------------------------------------- MNIST


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(("kind", "folder"), [(TinyMNIST, "MNIST/raw"), (TinyMNIST, ""), (TinyFashionMNIST, "")])
def test_idx_files(tmp_path: Path, kind: type[MNIST], folder: str, packed: bool) -> None:
    official = make_idx(tmp_path / folder, tmp_path, packed=packed)
    data = fitted(kind, tmp_path)
    assert torch.equal(training_images(data)[:, 0], torch.from_numpy(official))
    assert torch.equal(torch.cat([b.y for b in data.train_batches()]), torch.arange(30) % 10)
    data.setup("test")
    assert sum(len(batch) for batch in data.test_dataloader()) == 20
    assert len(data.classes) == 10


def test_packed_files_are_checked_by_md5(tmp_path: Path) -> None:
    make_idx(tmp_path, tmp_path, packed=True)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"train-images-idx3-ubyte.gz is truncated .*expected md5 \w+, found \w+"):
        fitted(TinyMNIST, tmp_path)


def test_unpacked_files_are_checked_by_header_and_length(tmp_path: Path) -> None:
    class Unknown(TinyMNIST):
        def checksums(self) -> dict[str, str]:
            return {}

    make_idx(tmp_path, tmp_path, packed=False)
    path = tmp_path / "train-images-idx3-ubyte"
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match="truncated: its header states 23,520 values, found 23,420"):
        fitted(Unknown, tmp_path)
    path.write_bytes(b"<html>not found</html>")
    with pytest.raises(ValueError, match=r"no idx file: magic number .*, expected 2051"):
        fitted(Unknown, tmp_path)
    with pytest.raises(ValueError, match="magic number None"):
        parse_idx(b"\0\0", dimensions=3, what="x")


# ---------------------------------------------------------------- CIFAR


def test_cifar10(tmp_path: Path) -> None:
    official = make_cifar10(tmp_path)
    data = fitted(TinyCIFAR10, tmp_path)
    assert torch.equal(training_images(data), torch.from_numpy(official))
    assert torch.equal(torch.cat([b.y for b in data.train_batches()]), torch.arange(100) % 20 % 10)
    assert data.classes[3] == "class 3"
    data.setup("test")
    assert sum(len(batch) for batch in data.test_dataloader()) == 20


def test_cifar10_training_needs_no_test_file(tmp_path: Path) -> None:
    make_cifar10(tmp_path)
    (tmp_path / "cifar-10-batches-py" / "test_batch").unlink()
    data = fitted(TinyCIFAR10, tmp_path)
    with pytest.raises(FileNotFoundError, match="test_batch"):
        data.setup("test")


def test_cifar100(tmp_path: Path) -> None:
    official = make_cifar100(tmp_path)
    data = fitted(TinyCIFAR100, tmp_path)
    assert torch.equal(training_images(data), torch.from_numpy(official))
    assert (len(data.classes), data.num_classes) == (100, 100)


def test_cifar_files_are_checked_before_they_are_unpickled(tmp_path: Path) -> None:
    make_cifar10(tmp_path)
    folder = tmp_path / "cifar-10-batches-py"
    (folder / "data_batch_2").write_bytes(b"cposix\nsystem\n(S'touch " + bytes(tmp_path / "pwned") + b"'\ntR.")
    with pytest.raises(ValueError, match="data_batch_2 is truncated or not the official file: expected md5"):
        fitted(TinyCIFAR10, tmp_path)
    assert not (tmp_path / "pwned").exists()
    with pytest.raises(ValueError, match="expected md5 c99cafc152244af753f735de768cd75f"):
        fitted(CIFAR10, tmp_path)  # the real checksums refuse our tiny files


# ---------------------------------------------------------------- SVHN


@pytest.mark.parametrize("folder", ["", "SVHN"])
def test_svhn(tmp_path: Path, folder: str) -> None:
    official = make_svhn(tmp_path / folder, tmp_path)
    data = fitted(TinySVHN, tmp_path)
    assert torch.equal(training_images(data), torch.from_numpy(official))
    # The files' labels are 1..10, where 10 is the digit 0.
    assert torch.equal(torch.cat([b.y for b in data.train_batches()]), (torch.arange(30) + 1) % 10)
    with pytest.raises(ValueError, match="expected md5 e26dedcc434d2e4c54c9b2d4a06d8373"):
        fitted(SVHN, tmp_path)


# ---------------------------------------------------------------- Tiny-ImageNet


def test_tiny_imagenet(tmp_path: Path) -> None:
    make_tiny_imagenet(tmp_path)
    data = fitted(SmallTinyImageNet, tmp_path)
    assert data.classes == ("n01", "n02", "n03")
    images = training_images(data)
    assert torch.equal(torch.cat([b.y for b in data.train_batches()]), torch.arange(12) // 4)
    # n01 is the second of wnids.txt; its picture 3 is (40, 60, 200), its picture 0 grayscale.
    assert (images[3].float().mean((1, 2)) - torch.tensor([40.0, 60.0, 200.0])).abs().max() < 4
    assert torch.equal(images[0, 0], images[0, 2])
    data.setup("test")
    assert [batch.y.tolist() for batch in data.test_dataloader()] == [[2, 0, 1, 2, 0]]


def test_tiny_imagenet_is_decoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_tiny_imagenet(tmp_path)
    first = SmallTinyImageNet(root=tmp_path, batch_size=4)
    first.prepare_data()
    cache = list((tmp_path / "tiny-imagenet-200").glob("*.npy"))
    assert [path.name.split(".")[0] for path in cache] == ["train"]  # nothing of the test split
    monkeypatch.setattr("mi_at.data.tiny_imagenet.decode_all", lambda *args, **options: pytest.fail("decoded again"))
    for placement in ("auto", "mmap", "memory"):
        fitted(SmallTinyImageNet, tmp_path, placement=placement)
    # A changed file is decoded anew.
    monkeypatch.undo()
    picture = next((tmp_path / "tiny-imagenet-200" / "train" / "n02" / "images").iterdir())
    picture.write_bytes((tmp_path / "tiny-imagenet-200" / "val" / "images" / "val_4.JPEG").read_bytes())
    fitted(SmallTinyImageNet, tmp_path)
    assert len(list((tmp_path / "tiny-imagenet-200").glob("*.npy"))) == 2


def test_tiny_imagenet_that_is_not_whole(tmp_path: Path) -> None:
    make_tiny_imagenet(tmp_path)
    folder = tmp_path / "tiny-imagenet-200"
    with pytest.raises(FileNotFoundError, match="Expected 500 pictures there, found 4"):
        fitted(TinyImageNet, tmp_path, num_classes=3)
    picture = folder / "train" / "n02" / "images" / "n02_1.JPEG"
    whole = picture.read_bytes()
    picture.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"n02_1.JPEG is truncated or no picture"):
        fitted(SmallTinyImageNet, tmp_path)
    assert not list(folder.glob("*.npy"))
    assert not list(folder.glob(".*.part"))
    picture.write_bytes(whole)
    data = fitted(SmallTinyImageNet, tmp_path)
    annotations = folder / "val" / "val_annotations.txt"
    lines = annotations.read_text().splitlines()
    annotations.write_text("\n".join(lines[:3]))
    with pytest.raises(ValueError, match=r"val_annotations.txt is truncated: expected 5 lines, found 3"):
        data.setup("test")
    annotations.write_text("\n".join([*lines[:4], "val_4.JPEG\tn99"]))
    with pytest.raises(ValueError, match="names the class 'n99'"):
        data.setup("test")
    annotations.write_text("\n".join([*lines[:4], "val_9.JPEG\tn01"]))
    with pytest.raises(FileNotFoundError, match=r"val_9.JPEG"):
        data.setup("test")


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    def fill(out: np.ndarray) -> None:
        out[:] = 3

    with pytest.warns(UserWarning, match="cannot be written"):
        assert cached_array(tmp_path / "nowhere" / "x.npy", (2, 2), fill).tolist() == [[3, 3], [3, 3]]
    array = cached_array(tmp_path / "x.npy", (2, 2), fill)
    array[0, 0] = 9  # copy-on-write: the file keeps its values
    assert cached_array(tmp_path / "x.npy", (2, 2), lambda out: None).tolist() == [[3, 3], [3, 3]]


# ---------------------------------------------------------------- one's own pictures


def test_folder_with_one_class(tmp_path: Path) -> None:
    (tmp_path / "cats").mkdir()
    with pytest.raises(ValueError, match=r"holds one class folder, cats: a classifier needs two or more"):
        class_names(tmp_path)


def test_folder_without_a_test_folder(tmp_path: Path) -> None:
    make_folder(tmp_path)
    (tmp_path / "cat" / "notes.txt").write_text("no picture")
    (tmp_path / ".hidden").mkdir()
    assert class_names(tmp_path) == ("cat", "dog")
    data = fitted(Folder, tmp_path, val_size=4)
    data.setup("test")
    test = list(data.test_dataloader())
    val = list(data.val_dataloader())  # type: ignore[arg-type]
    shown = {}
    for name, batches in (("train", list(data.train_batches())), ("val", val), ("test", test)):
        x, y = torch.cat([b.x for b in batches]), torch.cat([b.y for b in batches])
        assert torch.equal(x[:, 0, 16, 16], y * 200 / 255)  # the class is in the red channel
        shown[name] = {(int(c), round(float(v) * 25.5)) for c, v in zip(y, x[:, 1, 16, 16], strict=True)}
    assert {name: len(pictures) for name, pictures in shown.items()} == {"train": 12, "val": 4, "test": 4}
    assert len(set.union(*shown.values())) == 20
    assert (data.num_classes, data.classes) == (2, ("cat", "dog"))
    again = fitted(Folder, tmp_path, split_seed=5)
    again.setup("test")
    assert torch.equal(test[0].x, next(iter(again.test_dataloader())).x)  # the test split has its own fixed seed


def test_folder_with_a_test_folder(tmp_path: Path) -> None:
    make_folder(tmp_path / "train")
    make_folder(tmp_path / "test", count=3)
    assert class_names(str(tmp_path)) == ("cat", "dog")
    data = fitted(Folder, tmp_path, image_size=16, channels=1)
    assert len(data.train_index) == 20
    data.setup("test")
    assert [batch.x.shape for batch in data.test_dataloader()] == [(6, 1, 16, 16)]
    (tmp_path / "test" / "bird").mkdir()
    with pytest.raises(ValueError, match=r"has the classes \['bird'\]"):
        fitted(Folder, tmp_path).setup("test")


def test_folder_resizes_the_shorter_side_and_cuts_the_centre(tmp_path: Path) -> None:
    from PIL import Image

    wide = np.zeros((20, 60, 3), np.uint8)
    wide[:, 20:40] = 255  # only the centre is white
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        for i in range(5):
            Image.fromarray(wide).save(tmp_path / name / f"{i}.png")
    data = fitted(Folder, tmp_path, image_size=10)
    assert training_images(data)[:, :, :, 1:-1].min() == 255


@pytest.mark.parametrize(
    ("options", "message"),
    [({"num_classes": 3}, "dataset.num_classes=3, but the files name 2"), ({"channels": 2}, "expected 1")],
)
def test_folder_options(tmp_path: Path, options: dict, message: str) -> None:
    make_folder(tmp_path)
    with pytest.raises(ValueError, match=message):
        fitted(Folder, tmp_path, **options)


def test_folder_that_is_no_data_set(tmp_path: Path) -> None:
    for root in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(FileNotFoundError, match="Expected folders <class>/ of pictures"):
            class_names(root)
    make_folder(tmp_path, count=2)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="Found no valid file for the classes empty"):
        fitted(Folder, tmp_path)
    (tmp_path / "empty" / "x.png").write_bytes(b"no picture")
    (tmp_path / "empty" / "y.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"[xy].png is truncated or no picture"):
        fitted(Folder, tmp_path)


# ---------------------------------------------------------------- all


@pytest.mark.parametrize("kind", [MNIST, FashionMNIST, CIFAR10, CIFAR100, SVHN, TinyImageNet])
def test_missing_files_say_what_to_do(tmp_path: Path, kind: type[ImageDataModule]) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        fitted(kind, tmp_path)
    message = str(caught.value)
    for part in (kind.NAME, "not found", str(tmp_path), "Expected", "MI_AT_DATA", "dataset.root"):
        assert part in message
    assert ("dataset.download=true" in message) == kind.DOWNLOADABLE


@pytest.mark.parametrize("kind", [TinyImageNet, Digits, Folder])
def test_download_where_torchvision_cannot(kind: type[ImageDataModule]) -> None:
    with pytest.raises(ValueError, match=r"dataset.download=true: torchvision cannot fetch"):
        kind(root="x", download=True)


@pytest.mark.parametrize("kind", [MNIST, FashionMNIST, CIFAR10, CIFAR100, SVHN])
def test_download_is_torchvisions(tmp_path: Path, kind: type[ImageDataModule], monkeypatch: pytest.MonkeyPatch) -> None:
    import torchvision.datasets

    asked: list[tuple[str, bool]] = []
    official = getattr(torchvision.datasets, kind.__name__)
    monkeypatch.setattr(official, "__init__", lambda self, root, download, **rest: asked.append((root, download)))
    kind(root=tmp_path).prepare_data()
    assert not asked
    kind(root=tmp_path, download=True).prepare_data()
    assert set(asked) == {(str(tmp_path), True)}


def test_files_are_left_as_they_are(tmp_path: Path) -> None:
    make_cifar10(tmp_path)
    files = sorted((tmp_path / "cifar-10-batches-py").iterdir())
    for path in files:
        path.chmod(stat.S_IRUSR)
    fitted(TinyCIFAR10, tmp_path)
    assert sorted((tmp_path / "cifar-10-batches-py").iterdir()) == files


# ---------------------------------------------------------------- the real files


@pytest.mark.realdata("mnist")
def test_real_mnist(data_root: Path) -> None:
    data = MNIST(root=data_root, val_size=1000, batch_size=128)
    data.setup("fit")
    assert (len(data.train_index), len(data.val_index), len(data.train_dataloader())) == (59_000, 1000, 461)
    data.setup("test")
    labels = torch.cat([batch.y for batch in data.test_dataloader()])
    assert labels.bincount().tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]


@pytest.mark.realdata("cifar10")
def test_real_cifar10(data_root: Path) -> None:
    from torchvision.datasets import CIFAR10 as OFFICIAL

    data = CIFAR10(root=data_root, val_size=2000, batch_size=128, augment=True)
    data.setup("fit")
    assert len(data.train_dataloader()) == 375
    official = OFFICIAL(str(data_root), train=True)
    batch = next(iter(data.train_batches()))
    for x, y, index in zip(batch.x, batch.y, batch.index, strict=True):
        assert np.array_equal(official.data[index].transpose(2, 0, 1), x.mul(255).round().byte().numpy())
        assert official.targets[index] == y
    assert data.classes == tuple(official.classes)
    data.setup("test")
    assert sum(len(b) for b in data.test_dataloader()) == 10_000


@pytest.mark.realdata("cifar100")
def test_real_cifar100(data_root: Path) -> None:
    data = CIFAR100(root=data_root, val_size=2000, batch_size=128)
    data.setup("fit")
    labels = torch.cat([batch.y for batch in data.val_dataloader()])  # type: ignore[union-attr]
    assert labels.bincount().tolist() == [20] * 100
    assert data.classes[:2] == ("apple", "aquarium_fish")
