"""Data sets: which pictures there are, and each of them read and transformed.

Every picture's augmentation has random numbers of its own, from seed, epoch and picture number, so
that it depends neither on the number of loader processes nor on where a run was interrupted.
"""

from pathlib import Path

from torch.utils.data import Dataset

from util.data.image_io import (
    PIL_MODES,
    find_classes,
    find_images,
    is_array,
    is_image_name,
    list_folder,
    open_image,
    read_image,
)
from util.data.shards import ShardSamples, is_shards, read_shards
from util.data.transforms import (
    FastPretrainTransform,
    build_array_transform,
    build_pretrain_transform,
    build_transform,
)
from util.io.errors import BadImage, UserError
from util.rng import seeded

MAX_ATTEMPTS = 10  # pictures in a row that --skip_bad_images tries


class ImageDataset(Dataset):
    """Pictures with class numbers: item (epoch, i) -> (transformed picture, class number).

    `samples` is a sequence of (path, class number), `classes` the list of class names.
    """

    origin = ""  # where the pictures were found, in words

    def __init__(self, samples, classes: list[str], transform, read, seed: int = 0):
        """
        Args:
            read: path -> what `transform` takes.
        """
        self.samples = samples
        self.classes = classes
        self.transform = transform
        self.read = read
        self.seed = seed

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: tuple[int, int]):
        return self.prepare(key, key[1])

    def prepare(self, key: tuple[int, int], index: int):
        """Picture `index` with the random numbers of item `key`, and its class number."""
        path, label = self.samples[index]
        with seeded(self.seed, *key):
            return self.transform(self.read(path)), label


class TolerantImages(ImageDataset):
    """The same, with the next readable picture in place of one that is not.

    Item (epoch, i) -> (picture, class number, i if it was replaced, else -1).
    """

    def __getitem__(self, key: tuple[int, int]):
        first = key[1]
        for index in range(first, first + MAX_ATTEMPTS):
            try:
                item = self.prepare(key, index % len(self))
            except BadImage as error:
                problem = error
            else:
                return *item, -1 if index == first else first
        raise BadImage(
            f"{MAX_ATTEMPTS} pictures in a row are bad, more than --skip_bad_images passes over. "
            f"{problem}"
        )


class Reader:
    """path -> picture; a class, so that it travels to loader processes however they are started."""

    def __init__(self, read, in_chans: int):
        self.read = read
        self.in_chans = in_chans

    def __call__(self, path: str):
        return self.read(path, self.in_chans)


def build_pretrain_dataset(args) -> ImageDataset:
    """Training pictures of pre-training; see find_pictures for what --data_path may be.

    Raises:
        UserError: there is nothing to train on; the message names the place.
    """
    classes, samples, origin = find_pictures(args.data_path)
    if args.loader == "fast" and not has_arrays(samples, args.in_chans):
        transform, read = FastPretrainTransform(args.input_size), read_image
    else:
        transform, read = build_pretrain_transform(args), open_image
    kind = TolerantImages if getattr(args, "skip_bad_images", False) else ImageDataset
    dataset = kind(samples, classes, transform, Reader(read, args.in_chans), args.seed)
    dataset.origin = origin
    return dataset


def build_dataset(is_train: bool, args) -> ImageDataset:
    """Pictures of fine-tuning or evaluation, DATA/train/CLASS/* or DATA/val/CLASS/*."""
    classes, samples = list_classes(Path(args.data_path, "train" if is_train else "val"))
    reader = Reader(open_image, args.in_chans)
    kind = TolerantImages if is_train and getattr(args, "skip_bad_images", False) else ImageDataset
    if is_train and has_arrays(samples, args.in_chans):
        transform = build_array_transform(args)
    else:
        transform = build_transform(is_train, args)
    return kind(samples, classes, transform, reader, args.seed)


def has_arrays(samples, in_chans: int) -> bool:
    """Whether open_image gives tensors: for arrays, and where Pillow has no such mode."""
    if in_chans not in PIL_MODES:
        return True
    if isinstance(samples, ShardSamples):
        return samples.has_arrays
    return any(is_array(path) for path, _ in samples)


def find_pictures(data_path: str):
    """Pictures to pre-train on: (class names, samples, in words where they were found).

    `data_path` is a folder with train/, or one of what that may hold: class folders, pictures,
    or folders of pictures in any depth; or a text file that lists pictures; or shards. Without
    class folders every class number is 0.

    Raises:
        UserError: there is no such place, or no picture in it.
        UserError: the list or the shards cannot be used.
    """
    has_train = Path(data_path, "train").is_dir()
    if has_train:
        data_path = str(Path(data_path, "train"))
    if is_shards(data_path):
        refuse_mixture(Path(data_path))
        samples = read_shards(data_path)
        return [], samples, f"in {len(samples.paths)} shards of {data_path}"
    folder = Path(data_path)
    if folder.is_file():
        return [], read_list(folder), f"of the list {folder}"
    names = {entry.name for entry in list_folder(folder)}
    if not has_train and "val" in names:
        raise UserError(
            f"There is val/ but no train/ in {folder}; --data_path must name the folder that holds "
            "train/, or one with nothing but training pictures."
        )
    if has_train and not any(is_image_name(name) for name in names):
        classes, samples = list_classes(folder)
        return classes, samples, f"in {len(classes)} class folders of {folder}"
    return find_own_pictures(folder)


def refuse_mixture(place: Path) -> None:
    """Raises UserError if a folder holds both tar files and pictures of its own."""
    picture = next(find_images(place), None) if place.is_dir() else None
    if picture is not None:
        raise UserError(
            f"{place} holds tar files and pictures (such as {picture}); for the shards name "
            f"them (--data_path '{place}/NAME-{{0000..0003}}.tar'), else move the tar files away."
        )


def find_own_pictures(folder: Path):
    """All pictures below a folder, in classes if they lie in its folders and nowhere deeper."""
    paths = list(find_images(folder))
    if not paths:
        raise UserError(
            f"There is no picture in {folder}; --data_path must name a folder of pictures, one "
            "with train/, a list of files, or shards."
        )
    parents = [Path(path).relative_to(folder).parts[:-1] for path in paths]
    depths = {len(parts) for parts in parents}
    if depths != {1}:
        where = "in the flat folder" if depths == {0} else "in the folders below"
        return [], [(path, 0) for path in paths], f"{where} {folder} (without classes)"
    classes = sorted({name for (name,) in parents})
    numbers = {name: number for number, name in enumerate(classes)}
    samples = [(path, numbers[name]) for path, (name,) in zip(paths, parents, strict=True)]
    return classes, samples, f"in {len(classes)} class folders of {folder}"


def read_list(path: Path) -> list[tuple[str, int]]:
    """(picture, 0) for each line of a text file; names are relative to the file's folder.

    Raises:
        UserError: the file is not text, or a line names no kind of picture.
        UserError: there is no line in it.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except UnicodeDecodeError as error:
        raise UserError(
            f"--data_path {path} is neither a folder nor a text file with a picture's path on "
            "each line."
        ) from error
    names = [line for line in lines if line]
    odd = [name for name in names if not is_image_name(name)]
    if odd:
        raise UserError(f"The list {path} holds {odd[0]!r}, which is no picture; remove the line.")
    if not names:
        raise UserError(f"There is no line in the list {path}; add the pictures' paths.")
    return [(str(path.parent / name), 0) for name in names]


def check_same_classes(data_path: str, train: list[str], val: list[str]) -> None:
    """Raises UserError where the class folders of train/ and val/ differ."""
    odd = sorted(set(train) ^ set(val))
    if odd:
        raise UserError(
            f"train/ and val/ of {data_path} have different class folders (such as "
            f"{', '.join(odd[:3])}); both need the same."
        )


def list_classes(folder: Path) -> tuple[list[str], list[tuple[str, int]]]:
    """Class names, and (path, class number) of every picture below folder/CLASS/.

    Raises:
        UserError: there is no such folder, no class folder in it, or one without a picture.
    """
    classes = find_classes(folder)
    samples = []
    for number, name in enumerate(classes):
        before = len(samples)
        samples += [(path, number) for path in find_images(folder / name)]
        if len(samples) == before:
            raise UserError(
                f"There is no picture in the class folder {folder / name}; add some or remove it."
            )
    return classes, samples
