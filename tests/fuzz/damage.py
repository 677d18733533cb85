"""Ways to damage a sound file: its bytes, the JSON value in it, the protocol buffer in it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from hypothesis import strategies as st

Draw = st.DrawFn
EXTREMES = (0, 1, -1, 2**31 - 1, 2**31, 2**32, 2**40, 2**62, 2**63 - 1, 2**63, -(2**63), 2**64 - 1)
TEXTS = (
    "", ".", "..", "/", "../outside", "/etc/hosts", "a/../../b", "sub/x", "a\\b", "c:x", "a\0b",
    "\n", "\u202e", "\ud800", "é" * 200, "a" * 300, "a/" * 3000, "x" * 70_000, "nan", "1e999",
    "guard.safetensors", "decoder.onnx", "MANIFEST.JSON", "guardbake", "logits", "0" * 64,
)  # fmt: skip
_RANGES = {
    FieldDescriptor.CPPTYPE_INT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.CPPTYPE_INT64: (-(2**63), 2**63 - 1),
    FieldDescriptor.CPPTYPE_UINT32: (0, 2**32 - 1),
    FieldDescriptor.CPPTYPE_UINT64: (0, 2**64 - 1),
    FieldDescriptor.CPPTYPE_BOOL: (0, 1),
}
LEAVES = (
    st.none()
    | st.booleans()
    | st.sampled_from(EXTREMES)
    | st.sampled_from((0.0, -0.0, 1e308, -1e308, 5e-324))
    | st.sampled_from(TEXTS)
    | st.text(max_size=8)
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(("site", "kind", "name", "x")), inner, max_size=3)
    ),
    max_leaves=6,
)


@st.composite
def damaged_bytes(draw: Draw, data: bytes) -> bytes:
    """Bytes changed, cut out, repeated, put in, and numbers of eight bytes put to extremes."""
    out = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, max(len(out) - 1, 0)))
        size = draw(st.sampled_from((1, 1, 1, 8, 64, 1 << 30)))
        how = draw(st.sampled_from(("change", "cut", "repeat", "insert", "number")))
        if how == "change":
            out[place : place + 1] = draw(st.binary(min_size=1, max_size=1))
        elif how == "cut":
            del out[place : place + size]
        elif how == "repeat":
            out[place:place] = out[place : place + min(size, 64)]
        elif how == "insert":
            out[place:place] = draw(st.binary(max_size=16))
        else:
            number = draw(st.sampled_from(EXTREMES)) % 2**64
            out[place : place + 8] = number.to_bytes(8, "little")
    return bytes(out)


@st.composite
def damaged_json(draw: Draw, document: Any) -> Any:
    """Values replaced, taken out, doubled and put in, anywhere in the document."""
    root = [copy.deepcopy(document)]
    for _ in range(draw(st.integers(1, 3))):
        holder, key = draw(st.sampled_from(list(_places(root))))
        how = draw(st.sampled_from(("replace", "replace", "remove", "add", "deepen")))
        if how == "replace" or holder is root:
            holder[key] = draw(VALUES)
        elif how == "remove":
            del holder[key]
        elif how == "deepen":
            for _ in range(draw(st.sampled_from((1, 40, 400)))):
                holder[key] = [holder[key]]
        elif isinstance(holder, dict):
            holder[draw(st.sampled_from((*TEXTS[:8], "note", "files")))] = draw(VALUES)
        else:
            holder.append(copy.deepcopy(holder[key]))
    return root[0]


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) below `value`, whose nesting may be deep."""
    stack = [value]
    while stack:
        holder = stack.pop()
        keys = holder.keys() if isinstance(holder, dict) else range(len(holder))
        for key in keys:
            yield holder, key
            if isinstance(holder[key], dict | list):
                stack.append(holder[key])


@st.composite
def damaged_message(draw: Draw, message: Message, kind: str = "") -> bytes:
    """Fields of some messages set to extremes, emptied, doubled, dropped and exchanged.

    kind: damage only messages of this type, by its short name; empty for all.
    """
    out = type(message)()
    out.CopyFrom(message)
    for _ in range(draw(st.integers(1, 4))):
        every = [m for m in _messages(out) if not kind or m.DESCRIPTOR.name == kind]
        if not every:
            break
        chosen = draw(st.sampled_from(every))
        field = draw(st.sampled_from(list(chosen.DESCRIPTOR.fields)))
        if field.is_repeated:
            _damage_repeated(draw, chosen, field)
        elif field.message_type is not None:
            chosen.ClearField(field.name)
        else:
            setattr(chosen, field.name, _scalar(draw, field, out))
    return bytes(out.SerializePartialToString())


def _messages(message: Message) -> Iterator[Message]:
    stack = [message]
    while stack:
        current = stack.pop()
        yield current
        for field, value in current.ListFields():
            if field.message_type is not None:
                stack += list(value) if field.is_repeated else [value]


def _damage_repeated(draw: Draw, message: Message, field: FieldDescriptor) -> None:
    values = getattr(message, field.name)
    if len(values) == 0 or draw(st.booleans()):
        if field.message_type is not None:
            values.add()
        else:
            values.append(_scalar(draw, field, message))
        return
    place = draw(st.integers(0, len(values) - 1))
    how = draw(st.sampled_from(("drop", "double", "change")))
    if how == "drop":
        del values[place]
    elif how == "double" and field.message_type is not None:
        values.add().CopyFrom(values[place])
    elif field.message_type is None:
        values[place] = _scalar(draw, field, message)
    else:
        values[place].Clear()


def _scalar(draw: Draw, field: FieldDescriptor, root: Message) -> Any:
    if field.type == FieldDescriptor.TYPE_STRING:
        names = [n for m in _messages(root) if (n := getattr(m, "name", "")) and len(n) < 300]
        plain = [text for text in TEXTS if "\ud800" not in text]
        return draw(st.sampled_from([*plain, "-1", str(2**63), *names[:40]]))
    if field.type == FieldDescriptor.TYPE_BYTES:
        return draw(st.binary(max_size=9))
    if field.type in (FieldDescriptor.TYPE_FLOAT, FieldDescriptor.TYPE_DOUBLE):
        return draw(st.floats(width=32))
    if field.type == FieldDescriptor.TYPE_ENUM:
        return draw(st.sampled_from(sorted(field.enum_type.values_by_number)))
    low, high = _RANGES[field.cpp_type]
    return max(low, min(high, draw(st.sampled_from(EXTREMES) | st.integers(-9, 99))))
