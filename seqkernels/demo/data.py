"""MovieLens-100K: where it comes from, what one may do with it, and reading it.

Two formats are read, both text with tab-separated columns: ``.inter``, whose first line names the
columns (``user_id:token  item_id:token  rating:float  timestamp:float``), and the ``u.data`` of the
original archive, the same four columns without a header.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

TERMS = (
    "The data is MovieLens-100K, collected by the GroupLens Research Project at the University of "
    "Minnesota. It may be used for research. It may not be redistributed without separate "
    "permission, nor used for commercial or revenue-bearing purposes without permission from "
    "GroupLens. No endorsement by the University of Minnesota or GroupLens may be stated or "
    'implied. Publications that use it must cite F. M. Harper and J. A. Konstan, "The MovieLens '
    'Datasets: History and Context", ACM Transactions on Interactive Intelligent Systems 5(4), '
    "article 19, 2015, doi:10.1145/2827872. Full text: "
    "https://files.grouplens.org/datasets/movielens/ml-100k-README.txt"
)

LIKED = 4.0  # a rating from here on is a like
LOVED = 5.0  # and from here on more than that

_PACKAGE = "recbole==1.2.1"  # its wheel holds the ratings as an example
_MEMBER = "recbole/dataset_example/ml-100k/ml-100k.inter"
_COLUMNS = ("user_id", "item_id", "rating", "timestamp")


class DataError(ValueError):
    """The ratings cannot be had or read; the message says what to do."""


@dataclass(frozen=True)
class Ratings:
    """Who rated what, how and when; one entry of each array per rating, in the file's order.

    Attributes
    ----------
    user, item : int64 arrays
        Numbers 0, 1, ... of users and items.
    rating : float64 array
        The ratings as given.
    time : float64 array
        Seconds.
    """

    user: NDArray[np.int64]
    item: NDArray[np.int64]
    rating: NDArray[np.float64]
    time: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.user)

    @property
    def num_users(self) -> int:
        """Number of users."""
        return int(self.user.max(initial=-1)) + 1

    @property
    def num_items(self) -> int:
        """Number of items."""
        return int(self.item.max(initial=-1)) + 1

    @property
    def liked(self) -> NDArray[np.bool_]:
        """The label: whether the rating is at least `LIKED`."""
        return self.rating >= LIKED


def parse(text: str, name: str = "ratings") -> Ratings:
    r"""Read ratings from the text of an ``.inter`` or ``u.data`` file.

    Parameters
    ----------
    text : str
        The whole file.
    name : str
        What to call it in an error.

    Raises
    ------
    DataError
        Names the first line that is not as expected.

    Examples
    --------
    >>> ratings = parse("7\t50\t4\t100\n7\t51\t2\t160\n")
    >>> ratings.item.tolist(), ratings.liked.tolist()
    ([0, 1], [True, False])
    """
    lines = text.splitlines()
    header, first = list(_COLUMNS), 0
    if lines and ":" in lines[0]:
        header, first = [column.partition(":")[0] for column in lines[0].split("\t")], 1
        missing = [column for column in _COLUMNS if column not in header]
        if missing:
            raise DataError(f"{name}: no column {', '.join(missing)} in its header {lines[0]!r}")
    rows = []
    for number, line in enumerate(lines[first:], start=first + 1):
        if not line.strip():
            continue
        row = line.split("\t")
        if len(row) != len(header):
            raise DataError(
                f"{name}: line {number}: expected {len(header)} columns separated by tabs "
                f"({', '.join(header)}), got {line[:80]!r}"
            )
        rows.append(row)
    if not rows:
        raise DataError(f"{name}: no ratings in it")
    columns = dict(zip(header, zip(*rows, strict=True), strict=True))
    numbers = {}
    for column in ("rating", "timestamp"):
        try:
            numbers[column] = np.array(columns[column], dtype=np.float64)
        except ValueError as error:
            raise DataError(f"{name}: column {column}: {error}") from None
        if not np.isfinite(numbers[column]).all():
            raise DataError(f"{name}: column {column}: expected finite numbers")
    return Ratings(
        user=np.unique(np.array(columns["user_id"]), return_inverse=True)[1],
        item=np.unique(np.array(columns["item_id"]), return_inverse=True)[1],
        rating=numbers["rating"],
        time=numbers["timestamp"],
    )


def load(path: Path) -> Ratings:
    """Read the user's own copy.

    Raises
    ------
    DataError
        If it is not there or not in one of the two formats.
    """
    try:
        return parse(path.read_text(encoding="utf-8"), str(path))
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise DataError(f"{path}: expected text, an .inter or u.data file") from None


def cache_folder() -> Path:
    """Where the download is kept: beside torch's own (TORCH_HOME and XDG_CACHE_HOME count)."""
    return Path(torch.hub.get_dir()) / "seqkernels"


def download(folder: Path | None = None) -> Ratings:
    """Read MovieLens-100K out of a wheel from the Python package index, downloaded once.

    The wheel is neither installed nor run.

    Parameters
    ----------
    folder : Path, optional
        Where wheels are kept; `cache_folder` by default.

    Raises
    ------
    DataError
        If it cannot be downloaded.
    """
    folder = cache_folder() if folder is None else folder
    wheel = next(iter(sorted(folder.glob("recbole-1.2.1-*.whl"))), None) or _fetch(folder)
    try:
        with zipfile.ZipFile(wheel) as archive:  # checks the checksum of what it reads
            text = archive.read(_MEMBER).decode()
    except (zipfile.BadZipFile, KeyError) as error:
        raise DataError(f"{wheel}: damaged ({error}); delete it and start again") from None
    return parse(text, f"{wheel}:{_MEMBER}")


def _fetch(folder: Path) -> Path:
    """Let pip download the wheel: it knows the user's index, proxy and certificates."""
    folder.mkdir(parents=True, exist_ok=True)
    # Renamed into place when complete, so that an interrupted download leaves nothing behind.
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--only-binary=:all:", "--dest", temporary, _PACKAGE]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        wheels = list(Path(temporary).glob("*.whl"))
        if done.returncode or not wheels:
            said = (done.stderr or done.stdout).strip().splitlines()
            raise DataError(
                f"`pip download {_PACKAGE}`, whose wheel holds the ratings, failed: "
                f"{said[-1] if said else 'no reason given'}\n"
                "Name your own copy instead: --data FILE (ml-100k.inter, or u.data of "
                "https://grouplens.org/datasets/movielens/100k/)"
            )
        return wheels[0].replace(folder / wheels[0].name)
