"""What crosses between the grader and the child process: tensors, numbers, text, and records made of them.

Everything is loaded with torch's weights-only loader, so bytes from a learner's process cannot run code in the grader.
"""

import dataclasses
import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass
class Record:
    """A learner's NamedTuple or dataclass: its type's name and its fields, readable as attributes or in order."""

    type_name: str
    fields: dict[str, Any]

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["fields"][name]
        except KeyError:
            raise AttributeError(name) from None

    def __iter__(self) -> Any:
        return iter(self.fields.values())

    def __len__(self) -> int:
        return len(self.fields)

    def __getitem__(self, index: int) -> Any:
        return list(self.fields.values())[index]


@dataclass
class Foreign:
    """Stands for a value of a type that checks do not take, such as a numpy array."""

    type_name: str


def has_storage(tensor: Tensor) -> bool:
    """False for sparse tensors and those on the meta device, which no check takes."""
    return tensor.layout == torch.strided and tensor.device.type != "meta"


def pack(value: Any) -> Any:
    """`value` as plain containers of tensors, numbers and text."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Tensor) and not has_storage(value):
        return pack(Foreign(f"{value.layout if value.layout != torch.strided else 'meta'} tensor"))
    if isinstance(value, Tensor):
        plain = value.as_subclass(Tensor).detach()
        return plain.cpu() if plain.device.type != "cpu" else plain
    if isinstance(value, Record):
        return {"!": "record", "type": value.type_name, "fields": {k: pack(v) for k, v in value.fields.items()}}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return pack(Record(type(value).__name__, value._asdict()))
    if dataclasses.is_dataclass(value) and not isinstance(value, type | Foreign):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        return pack(Record(type(value).__name__, fields))
    if isinstance(value, list | tuple | range):
        return {"!": "list" if isinstance(value, list) else "tuple", "items": [pack(v) for v in value]}
    if isinstance(value, dict):
        return {"!": "dict", "keys": [pack(k) for k in value], "values": [pack(v) for v in value.values()]}
    if isinstance(value, torch.dtype):
        return {"!": "dtype", "name": str(value).removeprefix("torch.")}
    if type(value).__module__ == "numpy" and hasattr(value, "item") and getattr(value, "ndim", 1) == 0:
        return value.item()
    name = value.type_name if isinstance(value, Foreign) else f"{type(value).__module__}.{type(value).__qualname__}"
    return {"!": "foreign", "type": name.removeprefix("builtins.")}


def unpack(value: Any, make_record: Callable[[Record], Any] = lambda record: record) -> Any:
    """The inverse of pack; records come as Record unless `make_record` builds something else of them."""
    if not isinstance(value, dict):
        return value
    kind = value["!"]
    if kind in ("list", "tuple"):
        items = [unpack(v, make_record) for v in value["items"]]
        return items if kind == "list" else tuple(items)
    if kind == "dict":
        keys = (unpack(k, make_record) for k in value["keys"])
        return dict(zip(keys, (unpack(v, make_record) for v in value["values"]), strict=True))
    if kind == "record":
        fields = {k: unpack(v, make_record) for k, v in value["fields"].items()}
        return make_record(Record(value["type"], fields))
    if kind == "dtype":
        return getattr(torch, value["name"])
    return Foreign(value["type"])


def to_bytes(value: Any) -> bytes:
    """Serialise a packed value; views keep their strides and the buffer that they look into."""
    buffer = io.BytesIO()
    torch.save(pack(value), buffer)
    return buffer.getvalue()


def from_bytes(data: bytes, make_record: Callable[[Record], Any] = lambda record: record) -> Any:
    """The inverse of to_bytes."""
    return unpack(torch.load(io.BytesIO(data), weights_only=True), make_record)


def to_device(value: Any, device: str) -> Any:
    """Move a tensor to `device` together with the whole buffer it looks into, so that strides and padding survive."""
    if not isinstance(value, Tensor) or device == "cpu":
        return value
    buffer = torch.empty(0, dtype=value.dtype).set_(value.untyped_storage()).to(device)
    return buffer.as_strided(value.shape, value.stride(), value.storage_offset())
