"""Ways to damage a file: its bytes, and through h5py its groups, attributes and datasets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from damage.subject import CHANNEL, FINISHED, MAIN, N_POSITIONS, PARTIAL, Subject

Random = np.random.Generator
MASK, STATUS = "completed_positions", "position_status"


@dataclass
class Harm:
    """What was done to a file.

    Attributes
    ----------
    text : str
        In words.
    spans : list of (int, int)
        The bytes that were changed, where that is known.
    parent : bool
        The group that holds the results, or the file as a whole, was hit.
    values : bool
        Stored results, or both bytes that mark a position, were hit: nothing promises that this is noticed.
    """

    text: str
    spans: list[tuple[int, int]] = field(default_factory=list)
    parent: bool = False
    values: bool = False


def harm_bytes(path: Path, subject: Subject, random: Random) -> Harm:
    """Damage some bytes of the results."""
    kind = random.choice(list(BYTES))
    data = bytearray(subject.content)
    spans = BYTES[kind](data, subject, random)
    path.write_bytes(data)
    if len(data) < len(subject.content):
        spans = [(len(data), len(subject.content))]
    changed = [
        (start, stop) for start, stop in spans if data[start:stop] != subject.content[start:stop] or stop > len(data)
    ]
    hit = {name.rpartition("/")[2] for name, place in subject.raw.items() if _meet(changed, place)}
    values = bool(hit - {MASK, STATUS}) or hit == {MASK, STATUS}
    parent = any(start < subject.n_before or stop > len(data) for start, stop in changed)
    return Harm(f"{kind} at {changed}", changed, parent, values)


def harm_marks(path: Path, subject: Subject, random: Random) -> Harm:
    """Damage bytes of the status mask and of the richer status, of each position at most one of the two."""
    data = bytearray(subject.content)
    spans = []
    for group in (FINISHED, PARTIAL):
        positions = random.permutation(N_POSITIONS)[: int(random.choice([0, 1, 1, 2, 5, N_POSITIONS]))]
        for position in positions.tolist():
            start, _ = subject.raw[f"{CHANNEL}/{group}/{random.choice([MASK, STATUS])}".lstrip("/")]
            place = start + position
            if random.random() < 0.9:
                data[place] ^= 1  # done where it is not, and the other way round
            else:
                data[place] = int(random.integers(256))
            spans.append((place, place + 1))
    path.write_bytes(data)
    return Harm(f"marks at {spans}", spans)


def _meet(spans: list[tuple[int, int]], place: tuple[int, int]) -> bool:
    return any(start < place[1] and stop > place[0] for start, stop in spans)


def _place(subject: Subject, random: Random) -> int:
    """Choose a byte of the results that is none of their values; near the head of a structure half of the time."""
    if random.random() < 0.5:
        return min(int(random.choice(subject.objects)) + int(random.integers(0, 96)), len(subject.content) - 1)
    pieces = subject.metadata()
    sizes = np.array([stop - start for start, stop in pieces], float)
    start, stop = pieces[random.choice(len(pieces), p=sizes / sizes.sum())]
    return int(random.integers(start, stop))


def _flip_bits(data: bytearray, subject: Subject, random: Random) -> list[tuple[int, int]]:
    places = [_place(subject, random) for _ in range(random.choice([1, 1, 1, 2, 4, 8]))]
    for place in places:
        data[place] ^= 1 << int(random.integers(8))
    return [(place, place + 1) for place in places]


def _other_bytes(data: bytearray, subject: Subject, random: Random) -> list[tuple[int, int]]:
    place, count = _place(subject, random), int(random.choice([1, 2, 4, 8, 16]))
    data[place : place + count] = random.bytes(len(data[place : place + count]))
    return [(place, place + count)]


def _extremes(data: bytearray, subject: Subject, random: Random) -> list[tuple[int, int]]:
    place, count = _place(subject, random), int(random.choice([1, 2, 4, 8]))
    what = int(random.choice([0, 255, 127, 128]))
    data[place : place + count] = bytes([what]) * len(data[place : place + count])
    return [(place, place + count)]


def _sector(data: bytearray, subject: Subject, random: Random) -> list[tuple[int, int]]:
    start = max(_place(subject, random) // 512 * 512, 0)
    stop = min(start + 512, len(data))
    data[start:stop] = bytes(stop - start) if random.random() < 0.6 else random.bytes(stop - start)
    return [(start, stop)]


def _misplaced(data: bytearray, subject: Subject, random: Random) -> list[tuple[int, int]]:
    count = int(random.choice([8, 16, 64, 512]))
    here, there = _place(subject, random), _place(subject, random)
    piece = bytes(data[there : there + count])[: len(data) - here]
    data[here : here + len(piece)] = piece
    return [(here, here + len(piece))]


def _address(data: bytearray, subject: Subject, random: Random) -> list[tuple[int, int]]:
    """Let an address that leads into the file lead to somewhere else: a dataset over another one's values."""
    known = [start for start, _ in (*subject.raw.values(), *subject.kept.values())] + subject.objects
    wanted = int(random.choice(known)).to_bytes(8, "little")
    places = [place for place in _all_of(data, wanted) if place >= subject.n_before]
    if not places:
        return _flip_bits(data, subject, random)
    place = int(random.choice(places))
    data[place : place + 8] = int(random.choice(known)).to_bytes(8, "little")
    return [(place, place + 8)]


def _all_of(data: bytearray, what: bytes) -> list[int]:
    found, place = [], data.find(what)
    while place >= 0:
        found.append(place)
        place = data.find(what, place + 1)
    return found


def _truncated(data: bytearray, subject: Subject, random: Random) -> list[tuple[int, int]]:
    if random.random() < 0.3:
        del data[int(random.integers(0, len(data))) :]
    else:
        del data[int(random.integers(subject.n_before, len(data))) :]
    return []


def _values(data: bytearray, subject: Subject, random: Random) -> list[tuple[int, int]]:
    start, stop = subject.raw[str(random.choice(list(subject.raw)))]
    place = int(random.integers(start, stop))
    count = min(int(random.choice([1, 4, 16])), stop - place)
    data[place : place + count] = random.bytes(count)
    return [(place, place + count)]


def _parent(data: bytearray, subject: Subject, random: Random) -> list[tuple[int, int]]:
    start, stop = subject.inner[random.integers(len(subject.inner))]
    place = int(random.integers(start, stop))
    data[place] ^= 1 << int(random.integers(8))
    return [(place, place + 1)]


BYTES: dict[str, Callable[[bytearray, Subject, Random], list[tuple[int, int]]]] = {
    "bits": _flip_bits,
    "bytes": _other_bytes,
    "extremes": _extremes,
    "sector": _sector,
    "misplaced": _misplaced,
    "address": _address,
    "truncated": _truncated,
    "values": _values,
    "parent": _parent,
}


# -- through h5py ------------------------------------------------------------------------------------------------------


def harm_objects(path: Path, subject: Subject, random: Random) -> Harm:
    """Damage groups, attributes or datasets of the results as another program might."""
    path.write_bytes(subject.content)
    with h5py.File(path, "r+") as file:
        group = file[CHANNEL][str(random.choice([FINISHED, PARTIAL]))]
        kind = random.choice(list(OBJECTS), p=_WEIGHTS)
        text = OBJECTS[kind](group, random)
    data = path.read_bytes()
    # HDF5 puts what is written again into the place that was freed: then nothing but the values has changed.
    values = any(data[start:stop] != subject.content[start:stop] for start, stop in subject.raw.values())
    return Harm(f"{kind}: {text}", values=values)


STRANGE: dict[str, Callable[[h5py.Group, Random], Any]] = {
    "int": lambda group, random: int(random.integers(-(2**62), 2**62)),
    "negative": lambda group, random: -1,
    "float": lambda group, random: float(random.choice([np.nan, np.inf, -np.inf, 1e308, 0.5])),
    "empty text": lambda group, random: "",
    "text": lambda group, random: "nonsense",
    "long text": lambda group, random: "x" * 60000,
    "not UTF-8": lambda group, random: np.bytes_(b"\xff\xfe\x80abc"),
    "surrogates": lambda group, random: h5py.Empty(h5py.string_dtype()),
    "null": lambda group, random: h5py.Empty("f4"),
    "array": lambda group, random: np.arange(12.0).reshape(3, 4),
    "no elements": lambda group, random: np.empty((0,), "i4"),
    "texts": lambda group, random: ["a", "b", "c"],
    "compound": lambda group, random: np.zeros(2, [("a", "f4"), ("b", "S3")]),
    "null reference": lambda group, random: h5py.Reference(),
    "reference": lambda group, random: group.file[MAIN].ref,
    "reference to group": lambda group, random: group.ref,
    "region": lambda group, random: group.file[MAIN].regionref[0:2],
    "dangling": lambda group, random: _dangling(group),
    "JSON null": lambda group, random: "null",
    "JSON list": lambda group, random: "[1, 2, 3]",
    "JSON number": lambda group, random: "17",
    "JSON NaN": lambda group, random: '{"seconds_per_position": NaN, "temporary_bytes": -Infinity}',
    "JSON probe": lambda group, random: _probe(random),
    "JSON deep": lambda group, random: "[" * 50000,
    "JSON cut": lambda group, random: '{"power": "int", "lab',
    "JSON kinds": lambda group, random: '{"power": "complex", "label": "array:<f8", "table": "no such kind"}',
    "JSON keys": lambda group, random: '{"a/b": "int", "../power": "int", "": "str"}',
    "bool": lambda group, random: True,
    "enum": lambda group, random: np.bool_(False),
    "opaque": lambda group, random: np.void(b"\x00\x01\x02\xff"),
    "vlen": lambda group, random: _vlen(),
    "huge int": lambda group, random: np.uint64(2**64 - 1),
    "date": lambda group, random: np.array([b"2020"], "S4"),
}


def _vlen() -> Any:
    array = np.empty(2, h5py.vlen_dtype("i4"))
    array[0], array[1] = np.arange(3), np.arange(5)
    return array


def _probe(random: Random) -> str:
    values = [str(random.choice(["NaN", "-1", "1e400", "0", '"a"', "null", "[]", "1e-300", "1e300"])) for _ in range(4)]
    names = ("seconds_per_position", "temporary_bytes", "fixed_bytes", "thread_gain")
    return "{" + ", ".join(f'"{name}": {value}' for name, value in zip(names, values, strict=True)) + "}"


def _dangling(group: h5py.Group) -> h5py.Reference:
    gone = group.create_dataset("gone", data=np.arange(3))
    reference = gone.ref
    del group["gone"]
    return reference


def _owner(group: h5py.Group, random: Random) -> Any:
    """Choose the group or something in it."""
    names = [name for name in group if group.get(name, getlink=True).__class__ is h5py.HardLink]
    return group if random.random() < 0.6 else group[str(random.choice(names))]


def _attribute(group: h5py.Group, random: Random) -> str:
    owner = _owner(group, random)
    name = str(random.choice(list(owner.attrs))) if len(owner.attrs) else "units"
    what = str(random.choice(list(STRANGE)))
    value = STRANGE[what](group, random)
    if name in owner.attrs:
        del owner.attrs[name]
    owner.attrs[name] = value
    return f"{owner.name}@{name} = {what}"


def _no_attribute(group: h5py.Group, random: Random) -> str:
    owner = _owner(group, random)
    if not len(owner.attrs):
        return "nothing"
    name = str(random.choice(list(owner.attrs)))
    del owner.attrs[name]
    return f"{owner.name}@{name} deleted"


def _more_attributes(group: h5py.Group, random: Random) -> str:
    names = ["", "a/b", ".", "é", "x" * 300, "lazyproc_", "tool2"]
    name = str(random.choice(names[1:]))
    what = str(random.choice(list(STRANGE)))
    group.attrs[name] = STRANGE[what](group, random)
    return f"{group.name}@{name} = {what}, added"


def _name(group: h5py.Group, random: Random) -> str:
    return str(random.choice([*group, "Height", "Fit", MASK]))


def _no_member(group: h5py.Group, random: Random) -> str:
    name = _name(group, random)
    del group[name]
    return f"{group.name}/{name} deleted"


def _other_member(group: h5py.Group, random: Random) -> str:
    name = _name(group, random)
    what = str(random.choice(list(MEMBERS)))
    del group[name]
    MEMBERS[what](group, name, random)
    return f"{group.name}/{name} = {what}"


def _data(shape: Any, dtype: Any, value: Any = 1, **how: Any) -> Callable[[h5py.Group, str, Random], Any]:
    return lambda group, name, random: group.create_dataset(name, shape, dtype, np.full(shape, value, dtype), **how)


MEMBERS: dict[str, Callable[[h5py.Group, str, Random], Any]] = {
    "a group": lambda group, name, random: group.create_group(name),
    "an empty dataset": lambda group, name, random: group.create_dataset(name, data=h5py.Empty("f4")),
    "a scalar": lambda group, name, random: group.create_dataset(name, data=3),
    "a text": lambda group, name, random: group.create_dataset(name, data="text"),
    "a type": lambda group, name, random: group.__setitem__(name, np.dtype("f8")),
    "a soft link to nothing": lambda group, name, random: group.__setitem__(name, h5py.SoftLink("/nothing/here")),
    "a soft link to itself": lambda group, name, random: group.__setitem__(name, h5py.SoftLink(f"{group.name}/{name}")),
    "a soft link to the source": lambda group, name, random: group.__setitem__(name, h5py.SoftLink(MAIN)),
    "the source": lambda group, name, random: group.__setitem__(name, group.file[MAIN]),
    "another's dataset": lambda group, name, random: group.__setitem__(name, group.file[f"{CHANNEL}/Other"]),
    "the same of the other group": lambda group, name, random: _of_other(group, name),
    "a link to a missing file": lambda group, name, random: group.__setitem__(name, h5py.ExternalLink("gone.h5", "/a")),
    "a link to its own file": lambda group, name, random: group.__setitem__(
        name, h5py.ExternalLink(str(group.file.filename), f"{group.name}/{name}")
    ),
    "its own group": lambda group, name, random: group.__setitem__(name, group),
    "the parent": lambda group, name, random: group.__setitem__(name, group.parent),
    "the root": lambda group, name, random: group.__setitem__(name, group.file["/"]),
    "too short": _data((N_POSITIONS - 1,), "u1"),
    "too long": _data((N_POSITIONS + 1,), "u1"),
    "all done": _data((N_POSITIONS,), "u1"),
    "two dimensions": _data((N_POSITIONS, 1), "u1"),
    "chunked": _data((N_POSITIONS,), "u1", chunks=(4,)),
    "compressed": _data((N_POSITIONS,), "u1", compression="gzip"),
    "resizable": _data((N_POSITIONS,), "u1", maxshape=(None,)),
    "bools": _data((N_POSITIONS,), "?"),
    "signed": _data((N_POSITIONS,), "i1", -1),
    "wide": _data((N_POSITIONS,), "i8", 2**40),
    "floats": _data((N_POSITIONS,), "f8", np.nan),
    "twos": _data((N_POSITIONS,), "u1", 2),
    "heights": _data((N_POSITIONS, 1), "f8", 1e9),
    "other end first": _data((N_POSITIONS, 1), ">f8", 1e9),
    "fits": _data((N_POSITIONS, 3), "f4", 1e9),
    "huge": lambda group, name, random: group.create_dataset(name, (2**40,), "u1", chunks=(2**20,)),
    "huge in two": lambda group, name, random: group.create_dataset(name, (2**31, 2**31), "f8", chunks=(1, 1024)),
}


def _of_other(group: h5py.Group, name: str) -> None:
    other = FINISHED if str(group.name).endswith(PARTIAL) else PARTIAL
    group[name] = group.parent[other].get(name, group.parent[other][MASK])


def _mask(group: h5py.Group, random: Random) -> str:
    place, value = int(random.integers(N_POSITIONS)), int(random.integers(2, 256))
    group[MASK][place] = value
    return f"{group.name}/{MASK}[{place}] = {value}"


def _bits_of_attribute(group: h5py.Group, random: Random) -> str:
    """Change a character of a text."""
    owner = _owner(group, random)
    names = [name for name in owner.attrs if isinstance(owner.attrs[name], str) and owner.attrs[name].strip()]
    if not names:
        return "nothing"
    name = str(random.choice(names))
    text = list(owner.attrs[name])
    place = int(random.integers(len(text)))
    text[place] = chr(ord(text[place]) ^ (1 << int(random.integers(6))) or 33)
    owner.attrs[name] = "".join(text).replace("\0", "?")
    return f"{owner.name}@{name}[{place}]"


def _neighbours(group: h5py.Group, random: Random) -> str:
    """Put strange things under the names of results groups."""
    parent = group.parent
    name = f"Raw_Data-Peaks_{random.choice(['002', '9' * 40, '0', '-1'])}"
    what = str(random.choice([*MEMBERS]))
    MEMBERS[what](parent, name, random) if what != "the same of the other group" else parent.create_group(name)
    return f"{parent.name}/{name} = {what}"


def _status_name(group: h5py.Group, random: Random) -> str:
    name = str(random.choice(["", "/", ".", "..", "../Raw_Data", "Height", "nothing", "a\nb", MAIN, "Fit/x"]))
    group.attrs["lazyproc_status_mask"] = name
    return f"{group.name}@lazyproc_status_mask = {name!r}"


def _moved(group: h5py.Group, random: Random) -> str:
    """Write one of the datasets again, with other values, under its old name and with its old attributes."""
    name = str(random.choice(["Height", "Fit", MASK]))
    old = group[name]
    attrs = dict(old.attrs)
    values = np.ones_like(old[()]) if name == MASK else old[()] + 1
    del group[name]
    new = group.create_dataset(name, data=values)
    for key, value in attrs.items():
        new.attrs[key] = value
    return f"{group.name}/{name} written again with other values"


OBJECTS: dict[str, Callable[[h5py.Group, Random], Any]] = {
    "attribute": _attribute,
    "attribute deleted": _no_attribute,
    "attribute added": _more_attributes,
    "text changed": _bits_of_attribute,
    "member deleted": _no_member,
    "member": _other_member,
    "mask value": _mask,
    "neighbour": _neighbours,
    "status name": _status_name,
    "moved": _moved,
}
_SHARES = np.array([6, 3, 1, 3, 1, 6, 1, 2, 1, 2], float)
_WEIGHTS = _SHARES / _SHARES.sum()
