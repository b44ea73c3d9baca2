"""Small USID files for tests, written with plain h5py: what an instrument would leave behind."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from numpy.typing import DTypeLike, NDArray

DATA_VARIABLE = "LAZYPROC_TEST_DATA"
CHANNEL = "/Measurement_000/Channel_000"
Dim = tuple[str, str, Any]
"""Label, units, and the values along a dimension or their number."""


def real_file(name: str) -> Path:
    """Return the path of a published measurement, or skip the test. Copy the file before writing into it."""
    default = Path(__file__).resolve().parents[1].parent / "shared" / "data"
    path = Path(os.environ.get(DATA_VARIABLE, default)) / name
    if not path.is_file():
        pytest.skip(f"{path} is not there: set {DATA_VARIABLE} to the folder of the published measurements")
    return path


def names_of_mains(group: h5py.Group) -> list[str]:
    """Return the full names of all main datasets below a group; soft and external links are not followed."""
    from lazyproc.hdf5.damage import walk  # here: programs that must not load lazyproc make files with this module, too
    from lazyproc.hdf5.usid import is_main

    return [name for name, item in walk(group) if is_main(item)]


def random_data(shape: tuple[int, ...], dtype: DTypeLike, seed: int = 0) -> NDArray[Any]:
    """Return the same random values every time, for any dtype that HDF5 stores, compound types included."""
    dtype = np.dtype(dtype)
    random = np.random.default_rng(seed)
    if dtype.fields is not None:
        result = np.zeros(shape, dtype)
        for number, field in enumerate(dtype.names or ()):
            result[field] = random_data(result[field].shape, result[field].dtype, seed + number + 1)
        return result
    if dtype.kind in "fc":
        values = random.standard_normal(shape)
        return (values + 1j * random.standard_normal(shape) if dtype.kind == "c" else values).astype(dtype)
    if dtype.kind in "SV":
        return random.integers(97, 123, (*shape, dtype.itemsize), dtype=np.uint8).view(dtype).reshape(shape)
    return random.integers(0, 2 if dtype.kind == "b" else 100, shape).astype(dtype)


def grid_points(dims: Sequence[Dim], speed: Sequence[int]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return indices and values `(n_points, n_dims)` of a full grid.

    `speed` holds the numbers of the dimensions from the slowest to the fastest; the columns stay as in `dims`.
    """
    values = [np.arange(v, dtype=float) if isinstance(v, int) else np.asarray(v, float) for _, _, v in dims]
    counters = np.indices([len(values[dim]) for dim in speed]).reshape(len(dims), -1)
    indices = np.empty((counters.shape[1], len(dims)), np.uint32)
    for counter, dim in zip(counters, speed, strict=True):
        indices[:, dim] = counter
    return indices, np.stack([column[indices[:, dim]] for dim, column in enumerate(values)], axis=1)


def write_ancillary(
    group: h5py.Group,
    base: str,
    indices: NDArray[Any],
    values: NDArray[Any],
    labels: Sequence[str],
    units: Sequence[str],
    text: str = "bytes",
) -> tuple[h5py.Dataset, h5py.Dataset]:
    """Write `<base>_Indices` and `<base>_Values` as they are given, with labels and units as bytes or as str."""
    pair = []
    for name, data in ((f"{base}_Indices", indices), (f"{base}_Values", np.asarray(values, np.float32))):
        dataset = group.create_dataset(name, data=data)
        for key, texts in (("labels", labels), ("units", units)):
            dataset.attrs[key] = np.array([t.encode() for t in texts]) if text == "bytes" else list(texts)
        pair.append(dataset)
    return pair[0], pair[1]


def write_main(
    group: h5py.Group,
    name: str,
    data: NDArray[Any],
    positions: tuple[h5py.Dataset, h5py.Dataset],
    spectroscopic: tuple[h5py.Dataset, h5py.Dataset],
    *,
    quantity: str = "Current",
    units: str = "nA",
    **storage: Any,
) -> h5py.Dataset:
    """Write a main dataset that refers to ancillary datasets of the same file."""
    dataset = group.create_dataset(name, data=data, **storage)
    dataset.attrs["quantity"] = quantity
    dataset.attrs["units"] = units
    for base, pair in (("Position", positions), ("Spectroscopic", spectroscopic)):
        for what, ancillary in zip(("Indices", "Values"), pair, strict=True):
            dataset.attrs[f"{base}_{what}"] = ancillary.ref
    return dataset


def make_usid_file(
    path: str | os.PathLike[str],
    *,
    n_rows: int = 4,
    n_cols: int = 5,
    n_spectral: int = 6,
    dtype: DTypeLike = "f4",
    data: NDArray[Any] | None = None,
    chunks: tuple[int, int] | bool | None = None,
    compression: str | None = None,
    name: str = "Raw_Data",
    n_channels: int = 1,
    ancillary_level: int = 0,
    order: str = "XY",
    fastest: str = "X",
    spectral: Sequence[Dim] | None = None,
    keep: Sequence[int] | NDArray[Any] | None = None,
    text: str = "bytes",
    libver: str | None = None,
    seed: int = 0,
) -> tuple[str, str]:
    """Write a file with `Measurement_000/Channel_000/<name>` and return its path and the dataset's.

    Parameters
    ----------
    path : path-like
        The file, made anew.
    n_rows, n_cols : int
        Size of the scan along Y and X.
    n_spectral : int
        Columns, along one dimension "Bias"; ignored with `spectral`.
    dtype : dtype-like
        Of the main dataset; compound types, too.
    data : ndarray, optional
        The values `(n_positions, n_spectral)`. Default: random, the same for the same `seed`.
    chunks, compression
        Storage of the main dataset, as h5py takes them.
    name : str
        Name of the main dataset.
    n_channels : int
        So many channels (Channel_000, Channel_001 …) with other data each and with shared ancillary datasets.
    ancillary_level : int
        0: the ancillary datasets lie in the channel; 1: one group up. More channels than one always share one up.
    order : str
        Columns of the position datasets from left to right.
    fastest : str
        The dimension that varies fastest from one position to the next.
    spectral : sequence of (label, units, values or number), optional
        Spectroscopic dimensions from the slowest to the fastest, which is also their order in the file.
    keep : sequence of int, optional
        Only these points of the full scan, in this order: sparse or disordered positions.
    text : str
        Labels and units as "bytes" (as pyUSID writes them) or as "str".
    libver : str, optional
        As h5py takes it.
    seed : int
        Of the random values.
    """
    scan = {"X": ("X", "nm", np.linspace(0, 1, n_cols)), "Y": ("Y", "µm", np.linspace(-1, 1, n_rows))}
    slowest = "Y" if fastest == "X" else "X"
    pos_dims = [scan[label] for label in order]
    points, values = grid_points(pos_dims, [order.index(slowest), order.index(fastest)])
    if keep is not None:
        points, values = points[np.asarray(keep)], values[np.asarray(keep)]
    spec_dims = spectral or [("Bias", "V", np.linspace(-2, 2, n_spectral))]
    spec_points, spec_values = grid_points(spec_dims, range(len(spec_dims)))
    with h5py.File(path, "w", libver=libver) as file:
        measurement = file.create_group("Measurement_000")
        channels = [measurement.create_group(f"Channel_{number:03d}") for number in range(n_channels)]
        home = measurement if ancillary_level or n_channels > 1 else channels[0]
        pos = write_ancillary(home, "Position", points, values, *_texts(pos_dims), text)
        spec = write_ancillary(home, "Spectroscopic", spec_points.T, spec_values.T, *_texts(spec_dims), text)
        for number, channel in enumerate(channels):
            shape = (len(points), len(spec_points))
            matrix = random_data(shape, dtype, seed + number) if data is None else data
            write_main(channel, name, matrix, pos, spec, chunks=chunks, compression=compression)
    return os.fspath(path), f"{CHANNEL}/{name}"


def make_sparse_file(path: str | os.PathLike[str], n_positions: int = 9, **options: Any) -> tuple[str, str]:
    """Write a scan of which only some positions were sampled, in no order; options as for `make_usid_file`."""
    n_points = options.get("n_rows", 4) * options.get("n_cols", 5)
    keep = np.random.default_rng(7).permutation(n_points)[:n_positions]
    return make_usid_file(path, keep=keep, **options)


def make_4d_file(path: str | os.PathLike[str], n_cycles: int = 3, n_bias: int = 4, **options: Any) -> tuple[str, str]:
    """Write a scan with two position and two spectroscopic dimensions; options as for `make_usid_file`."""
    spectral = [("Cycle", "", n_cycles), ("Bias", "V", np.linspace(-2, 2, n_bias))]
    return make_usid_file(path, spectral=spectral, **options)


def make_compound_file(path: str | os.PathLike[str], **options: Any) -> tuple[str, str]:
    """Write a scan with several numbers a point; options as for `make_usid_file`."""
    return make_usid_file(path, dtype=[("Amplitude", "f4"), ("Phase", "f8"), ("Count", "i2")], **options)


def make_shared_file(path: str | os.PathLike[str], n_channels: int = 3, **options: Any) -> tuple[str, str]:
    """Write several channels that share their ancillary datasets; options as for `make_usid_file`."""
    return make_usid_file(path, n_channels=n_channels, **options)


def _texts(dims: Sequence[Dim]) -> tuple[list[str], list[str]]:
    return [label for label, _, _ in dims], [units for _, units, _ in dims]
