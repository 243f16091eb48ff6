"""Changes to a sound input that know how it is built: each keeps most of it whole, so that what reads it goes far before it stops.

`mutate` takes a folder's files, picks some and changes each by its kind: a safetensors header keeps its length field, a pickle stays a
sequence of opcodes in a sound zip, a distributed chunk keeps its place. The same random numbers give the same change.
"""

from __future__ import annotations

import io
import json
import pickletools
import struct
import zipfile
from collections.abc import Callable
from random import Random
from typing import Any

from torture.corpus import Files

MOST = 1 << 22  # bytes of an input; what is larger is cut
NUMBERS = (
    0, 1, 2, 3, 7, 8, 63, 64, 65, 127, 128, 255, 256, 4095, 1 << 15, 1 << 16, 1 << 20, 1 << 24, (1 << 27) + 1, (1 << 31) - 1, 1 << 31,
    (1 << 32) - 1, 1 << 32, 1 << 40, 1 << 48, (1 << 53) + 1, 1 << 60, (1 << 63) - 1, 1 << 63, (1 << 64) - 1, -1, -2, -8, -(1 << 31), -(1 << 63),
)  # fmt: skip
TEXTS = (
    "", ".", "..", "../outside/secret.safetensors", "/etc/passwd", "a/b", "a\\b", "\x00", "\ud800", "\x1b[2J", "é" * 50, "x" * 5000,
    "model.layers.0.mlp.up_proj.weight", "model.layers.99999999999.mlp.up_proj.weight", "base_model.model.", "NaN", "1e999", "__proto__",
    "(a+)+$", "(" * 300, "%s%n", "model.safetensors", "config.json", "9" * 400, "F32", "BF16", "F4", "torch.float32", "\u202e",
)  # fmt: skip
LITERALS = (
    "NaN",
    "Infinity",
    "-Infinity",
    "1e999",
    "-0",
    "1" * 5000,
    "0.1e-400",
    '"\\ud800"',
    "[" * 3000,
    '{"a":' * 3000,
    "\x00",
    "nul",
    "",
)
NAMES = (
    "os system", "builtins eval", "builtins bytearray", "collections OrderedDict", "torch Size", "torch FloatStorage", "torch float32",
    "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_tensor_v3", "torch._utils _rebuild_parameter", "torch._utils _rebuild_sparse_tensor",
    "torch._utils _rebuild_wrapper_subclass", "torch._tensor _rebuild_from_type_v2", "torch.nn.parameter Parameter", "_codecs encode",
    "torch.distributed.tensor DTensor", "torch.distributed.device_mesh DeviceMesh", "torch.distributed.tensor.placement_types Shard",
    "torch.distributed.checkpoint.metadata TensorStorageMetadata", "torch.storage UntypedStorage", "torch bfloat16", "torch complex64",
)  # fmt: skip


def mutate(draw: Random, files: Files, others: list[Files]) -> Files:
    """One to four changes of a folder; `others` are sound inputs of the same family, of which parts are taken."""
    files = dict(files)
    for _ in range(draw.choice((1, 1, 1, 1, 2, 2, 3, 4))):
        if not files:
            break
        if draw.random() < 0.06:
            _folder(draw, files, others)
            continue
        # An index, a header or a configuration steers the reading: small files count as much as large ones.
        path = draw.choice(list(files))
        change = _change_of(path, files[path])
        if draw.random() < 0.15:
            change = in_bytes
        try:
            files[path] = change(draw, files[path])[:MOST]
        except Exception:
            files[path] = in_bytes(draw, files[path])  # an earlier change left it without its form
    return files


def _change_of(path: str, content: bytes) -> Callable[[Random, bytes], bytes]:
    name = path.rpartition("/")[2]
    if name.endswith(".safetensors"):
        return in_safetensors
    if name.endswith(".jsonl"):
        return in_lines
    if name.endswith(".json"):
        return in_json
    if name == ".metadata":
        return in_pickle
    if name.endswith(".distcp"):
        return in_chunks
    if name.endswith(".gguf"):
        return in_gguf
    if name.endswith(".parquet"):
        return in_parquet
    return in_torch_file if content.startswith(b"PK") else in_bytes


def _folder(draw: Random, files: Files, others: list[Files]) -> None:
    """A file goes, takes the name or the content of another, is empty, or comes from another input."""
    path, other = draw.choice(sorted(files)), draw.choice(sorted(files))
    foreign = draw.choice(others)
    kind = draw.randrange(6)
    if kind == 0:
        del files[path]
    elif kind == 1:
        files[path] = files[other]
    elif kind == 2:
        files[other] = files.pop(path)
    elif kind == 3:
        files[path] = b""
    elif kind == 4:
        files[path] = foreign[draw.choice(sorted(foreign))]
    else:
        name = draw.choice(sorted(foreign))
        files[name] = foreign[name]


# Bytes ----------------------------------------------------------------------------------------------------------


def in_bytes(draw: Random, content: bytes) -> bytes:
    data = bytearray(content)
    if not data:
        return bytes(draw.randrange(256) for _ in range(draw.randrange(1, 40)))
    # Half of the changes are near the ends, where headers and directories stand.
    at = draw.choice(
        (draw.randrange(len(data)), draw.randrange(min(len(data), 300)), max(0, len(data) - 1 - draw.randrange(300)))
    )
    kind, length = draw.randrange(9), draw.choice((1, 2, 4, 8, 16, 100))
    if kind == 0:
        data[at] ^= 1 << draw.randrange(8)
    elif kind == 1:
        data[at] = draw.randrange(256)
    elif kind == 2:
        size = draw.choice((1, 2, 4, 8))
        data[at : at + size] = (draw.choice(NUMBERS) % (1 << 8 * size)).to_bytes(size, draw.choice(("little", "big")))
    elif kind == 3:
        del data[at:]
    elif kind == 4:
        del data[at : at + length]
    elif kind == 5:
        data[at:at] = data[at : at + length] or b"\0"
    elif kind == 6:
        data[at:at] = bytes(draw.randrange(256) for _ in range(length))
    elif kind == 7:
        data[at : at + length] = bytes([draw.choice((0, 255))]) * length
    else:
        start = draw.randrange(len(data))
        data[at : at + length] = data[start : start + length]
    return bytes(data)


# JSON -----------------------------------------------------------------------------------------------------------


def in_json(draw: Random, content: bytes) -> bytes:
    return text_of(draw, changed_json(draw, json.loads(content)))


def text_of(draw: Random, value: Any) -> bytes:
    """JSON, now and then with a literal that is none, or with an entry twice."""
    text = json.dumps(value)
    kind = draw.randrange(12)
    if kind == 0 and ":" in text:  # another literal where a value stands
        places = [i for i, c in enumerate(text) if c in ":,["]
        at = draw.choice(places)
        text = text[: at + 1] + draw.choice(LITERALS) + text[at + 1 + draw.randrange(12) :]
    elif kind == 1 and text.startswith("{") and len(text) > 2:
        text = "{" + text[1:-1] + "," + text[1:]
    return text.encode(errors="surrogatepass")


def changed_json(draw: Random, value: Any) -> Any:
    """One node of a JSON value is replaced, removed, copied, renamed or put where another is."""
    places: list[tuple[Any, Any]] = []
    level = [value]
    while level:
        here = level.pop()
        keys = here.keys() if isinstance(here, dict) else range(len(here)) if isinstance(here, list) else ()
        for key in keys:
            places.append((here, key))
            if isinstance(here[key], (dict, list)) and len(places) < 20_000:
                level.append(here[key])
    if not places or draw.random() < 0.02:
        return draw.choice((None, [], {}, 7, "x", [value], {"a": value}, True))
    holder, key = draw.choice(places)
    kind = draw.randrange(7)
    if kind <= 2:
        holder[key] = other_value(draw, holder[key])
    elif kind == 3:
        del holder[key]
    elif kind == 4:
        holder[key] = json.loads(json.dumps(draw.choice(places)[0]))
        holder[key] = (
            draw.choice(list(holder[key].values()) if isinstance(holder[key], dict) else holder[key])
            if holder[key]
            else None
        )
    elif kind == 5:
        if isinstance(holder, dict):
            holder[draw.choice((*TEXTS, *map(str, list(holder)[:20])))] = holder.pop(key)
        else:
            holder.insert(key, other_value(draw, holder[key]))
    else:
        to, where = draw.choice(places)
        to[where], holder[key] = holder[key], to[where]
        json.dumps(value)  # a node inside of itself is no JSON
    return value


def other_value(draw: Random, value: Any) -> Any:
    if type(value) is int and draw.random() < 0.6:
        return draw.choice(
            (value + 1, value - 1, -value, value * 2, value // 2, draw.choice(NUMBERS), float(value), str(value))
        )
    if isinstance(value, list) and draw.random() < 0.5:
        return draw.choice(
            (
                value * 2,
                value[:-1],
                value[::-1],
                [*value, 0],
                [draw.choice(NUMBERS), *value[1:]],
                [draw.choice(NUMBERS) for _ in value],
            )
        )
    if isinstance(value, dict) and draw.random() < 0.3:
        return draw.choice((list(value), list(value.values()), {}))
    deep: Any = []
    for _ in range(draw.choice((2, 50, 150))):
        deep = draw.choice(([deep], {"a": deep}))
    return draw.choice((
        None, True, False, draw.choice(NUMBERS), draw.choice(TEXTS), draw.choice((0.5, -1.5, 1e300, 1e-320, float("nan"), float("inf"))),
        [], {}, [value], {"a": value}, [1] * 70, deep,
    ))  # fmt: skip


def in_lines(draw: Random, content: bytes) -> bytes:
    """JSON, one object a line."""
    lines = content.splitlines(keepends=True)
    at = draw.randrange(len(lines))
    kind = draw.randrange(8)
    if kind < 5:
        lines[at] = in_json(draw, lines[at]) + b"\n"
    elif kind == 5:
        lines[at] = in_bytes(draw, lines[at])
    elif kind == 6:
        lines[at:at] = [lines[draw.randrange(len(lines))]]
    else:
        del lines[at]
    return b"".join(lines)


# safetensors ----------------------------------------------------------------------------------------------------


def in_safetensors(draw: Random, content: bytes) -> bytes:
    (length,) = struct.unpack_from("<Q", content)
    header, data = content[8 : 8 + length], content[8 + length :]
    kind = draw.randrange(10)
    if kind < 6:
        listed = json.loads(header)
        entries = [e for e in listed.values() if isinstance(e, dict) and "shape" in e]
        if entries and draw.random() < 0.4:  # so that header and data agree, and a reader goes on
            entry = draw.choice(entries)
            what = draw.randrange(5)
            if what == 0:
                entry["shape"] = entry["shape"][::-1]
            elif what == 1:
                entry["shape"] = draw.choice(
                    ([1, *entry["shape"]], [*entry["shape"], 1], [n for n in entry["shape"] if n != 1])
                )
            elif what == 2:
                entry["dtype"] = draw.choice(
                    (
                        "F32",
                        "I32",
                        "U32",
                        "F16",
                        "BF16",
                        "I8",
                        "F8_E4M3",
                        "F8_E5M2",
                        "F8_E8M0",
                        "U8",
                        "F64",
                        "C64",
                        "F4",
                        "BOOL",
                    )
                )
            elif what == 3:
                names = list(listed)
                one, two = draw.choice(names), draw.choice(names)
                listed[one], listed[two] = listed[two], listed[one]
            else:
                name = draw.choice([n for n in listed if listed[n] is entry])
                listed[draw.choice((*TEXTS, f"{name}_scale", f"{name}_scale_inv", f"{name}_blocks", name + "x"))] = (
                    listed.pop(name)
                )
            header = json.dumps(listed).encode(errors="surrogatepass")
        else:
            header = text_of(draw, changed_json(draw, listed))
        length = len(header) if draw.random() < 0.95 else draw.choice(NUMBERS) % (1 << 64)
    elif kind == 6:
        length = draw.choice(NUMBERS) % (1 << 64)
    elif kind == 7:
        header += b" " * draw.randrange(20)
        length = len(header)
    elif kind == 8:
        data = _numbers(draw, data)
    else:
        data = in_bytes(draw, data)
    return struct.pack("<Q", length) + header + data


def _numbers(draw: Random, data: bytes) -> bytes:
    """Values at the edges of what floats are."""
    found = bytearray(data)
    if len(found) < 16:
        return data
    for _ in range(draw.choice((1, 1, 4, 50))):
        at = 4 * draw.randrange(len(found) // 4)
        found[at : at + 4] = draw.choice((
            b"\0\0\xc0\x7f", b"\0\0\x80\x7f", b"\0\0\x80\xff", b"\1\0\0\0", b"\0\0\0\x80", b"\xff\xff\x7f\x7f", b"\0\0\x7f\x7f", b"\0\0\0\0", b"\xff\xff\xff\xff",
        ))  # fmt: skip
    return bytes(found)


# Pickles, zips of torch, distributed chunks ---------------------------------------------------------------------


def in_pickle(draw: Random, data: bytes) -> bytes:
    """A sequence of opcodes with some of them changed, doubled, removed or moved."""
    places = [(code, argument, at) for code, argument, at in pickletools.genops(data)]
    ends = [at for *_, at in places[1:]] + [len(data)]
    pieces = [data[at:end] for (_, _, at), end in zip(places, ends, strict=True)]
    for _ in range(draw.choice((1, 1, 2, 5))):
        i = draw.randrange(len(pieces))
        kind = draw.randrange(9)
        if kind <= 3:  # of the numbers and names, which are few beside the rest
            wanted = [j for j, (code, argument, _) in enumerate(places) if j < len(pieces) and (
                (isinstance(argument, int) and code.name.startswith(("BININT", "LONG"))) or code.name in ("GLOBAL", "BINUNICODE", "SHORT_BINUNICODE"))]  # fmt: skip
            if not wanted:
                continue
            i = draw.choice(wanted)
            code, argument, _ = places[i]
            if code.name == "GLOBAL":
                module, name = draw.choice(NAMES).split()
                pieces[i] = b"c" + module.encode() + b"\n" + name.encode() + b"\n"
            elif isinstance(argument, str):
                texts = [a for _, a, _ in places if isinstance(a, str)]
                text = draw.choice((draw.choice(TEXTS), draw.choice(texts), argument + "x")).encode(
                    errors="surrogatepass"
                )
                pieces[i] = b"X" + struct.pack("<I", len(text)) + text
            else:
                number = draw.choice((draw.choice(NUMBERS), argument + 1, argument - 1, argument * 2, 0))
                size = number.bit_length() // 8 + 1
                pieces[i] = b"\x8a" + bytes([size]) + number.to_bytes(size, "little", signed=True)
        elif kind == 4:
            pieces[i] = b""
        elif kind == 5:
            pieces[i] += pieces[draw.randrange(len(pieces))]
        elif kind == 6:
            j = draw.randrange(len(pieces))
            pieces[i], pieces[j] = pieces[j], pieces[i]
        elif kind == 7:
            pieces[i] += draw.choice((
                b"(", b"0", b"1", b"2", b")", b"]", b"}", b"t", b"l", b"d", b"R", b"b", b"\x81", b"Q", b"a", b"e", b"s", b"u", b"N", b"\x88",
                b"K\0", b"h\0", b"h\1", b"\x94", b"\x85", b"\x86", b"\x87", b"\x8f", b"\x91", b"cos\nsystem\n", b"\x93", b"j\xff\xff\xff\x7f",
                b"r\1\0\0\x08", b"\x96" + struct.pack("<Q", 1 << 40), b"q\0h\0\x86" * 40, b"." , b"\x92", b"P0\n", b"\x97", b"F1e999\n",
            ))  # fmt: skip
        else:
            pieces[i] = in_bytes(draw, pieces[i] or b".")
    return b"".join(pieces)


def in_torch_file(draw: Random, content: bytes) -> bytes:
    """The zip of `torch.save` with another pickle, another entry, or other bytes of its directory."""
    kind = draw.randrange(10)
    if kind == 0:
        return in_bytes(draw, content)
    if kind == 1:  # the directory at the end
        at = max(content.rfind(b"PK\5\6") - draw.randrange(400), 0)
        return content[:at] + in_bytes(draw, content[at:])
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    where = next(n for n in entries if n.endswith("data.pkl"))
    storages = [n for n in entries if "/data/" in n]
    pressed = zipfile.ZIP_STORED
    if kind <= 6:
        entries[where] = in_pickle(draw, entries[where])
    elif kind == 7:
        name = draw.choice(sorted(entries))
        entries[name] = in_bytes(draw, entries[name])
    elif kind == 8:
        name = draw.choice(sorted(entries))
        change = draw.randrange(4)
        if change == 0:
            del entries[name]
        elif change == 1:
            entries[draw.choice((*TEXTS[1:8], where.replace("data.pkl", "data/0"))).replace("\ud800", "u")] = (
                entries.pop(name)
            )
        elif change == 2:
            entries[where.replace("data.pkl", "byteorder")] = draw.choice(
                (b"big", b"little", b"", b"middle", b"big" * 100)
            )
        else:
            pressed = zipfile.ZIP_DEFLATED
    elif storages:
        name = draw.choice(storages)
        entries[name] = (
            _numbers(draw, entries[name])
            if draw.random() < 0.6
            else entries[name][: draw.randrange(len(entries[name]) + 1)]
        )
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", pressed) as archive:
        for name, data in entries.items():
            archive.writestr(zipfile.ZipInfo(name), data, pressed)
    return out.getvalue()


def in_chunks(draw: Random, content: bytes) -> bytes:
    """One of the torch files that stand one behind another is changed, and filled up to its length where it is shorter."""
    chunks, at = [], 0
    while at < len(content):
        end = content.find(b"PK\5\6", at)
        end = len(content) if end < 0 else end + 22
        chunks.append(content[at:end])
        at = end
    i = draw.randrange(len(chunks))
    changed = in_torch_file(draw, chunks[i])
    spare = len(chunks[i]) - len(changed)
    if spare > 0 and changed[-22:-18] == b"PK\5\6" and spare < 1 << 16:
        changed = changed[:-2] + struct.pack("<H", spare) + bytes(spare)  # a comment of the zip
    chunks[i] = changed
    return b"".join(chunks)


# GGUF, parquet --------------------------------------------------------------------------------------------------


def in_gguf(draw: Random, content: bytes) -> bytes:
    """A number of its header is another: a count, a length, a kind, an axis, an offset."""
    spans = _gguf_spans(content)
    if draw.random() < 0.15 or not spans:
        return in_bytes(draw, content)
    data = bytearray(content)
    order = "big" if content[4:6] == b"\0\0" else "little"
    for _ in range(draw.choice((1, 1, 2))):
        at, size = draw.choice(spans)
        old = int.from_bytes(data[at : at + size], order)
        number = draw.choice(
            (draw.choice(NUMBERS), draw.choice(NUMBERS), old + 1, old - 1, old * 2, old // 2, draw.randrange(40))
        )
        data[at : at + size] = (number % (1 << 8 * size)).to_bytes(size, order)
    return bytes(data)


def _gguf_spans(content: bytes) -> list[tuple[int, int]]:
    """Where the numbers of a sound GGUF header stand: offset and size."""
    order = ">" if content[4:6] == b"\0\0" else "<"
    spans: list[tuple[int, int]] = []
    at = 4

    def number(size: int) -> int:
        nonlocal at
        spans.append((at, size))
        (value,) = struct.unpack_from(order + {1: "B", 2: "H", 4: "I", 8: "Q"}[size], content, at)
        at += size
        return int(value)

    def text() -> None:
        nonlocal at
        length = number(8)
        spans.extend((at + i, 1) for i in range(min(length, 40)))
        at += length

    def value(kind: int) -> None:
        sizes = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
        if kind == 8:
            text()
        elif kind == 9:
            inner, count = number(4), number(8)
            for _ in range(count):
                value(inner)
        else:
            number(sizes[kind])

    try:
        number(4)
        tensors, fields = number(8), number(8)
        for _ in range(fields):
            text()
            value(number(4))
        for _ in range(tensors):
            text()
            for _ in range(number(4)):
                number(8)
            number(4)
            number(8)
    except (struct.error, KeyError):
        return spans
    return spans


def in_parquet(draw: Random, content: bytes) -> bytes:
    """A table with other columns, types or values, or with other bytes in the footer that describes them."""
    if draw.random() < 0.5:
        return in_bytes(draw, content)
    import polars as pl

    try:
        table = pl.read_parquet(io.BytesIO(content))
    except BaseException as error:  # polars' panics are no exceptions
        raise ValueError from error
    column = draw.choice(table.columns)
    kind = draw.randrange(8)
    if kind == 0:
        table = table.drop(column)
    elif kind == 1:
        table = table.rename({column: draw.choice(("x", "", "other", "value"))}) if column != "value" else table
    elif kind == 2:
        table = table.with_columns(pl.lit(draw.choice((None, 7, "x", 1.5, True))).alias(column))
    elif kind == 3:
        table = table[: draw.randrange(table.height + 1)]
    elif kind == 4:
        table = table.sample(fraction=1.0, shuffle=True, seed=draw.randrange(99))
    elif kind == 5 and table.schema[column] == pl.String:
        text = draw.choice([t for t in TEXTS if "\ud800" not in t])
        table = table.with_columns(
            pl.when(pl.int_range(pl.len()) % 3 == 0).then(pl.lit(text)).otherwise(pl.col(column)).alias(column)
        )
    elif kind == 6 and table.schema[column].is_numeric():
        odd = draw.choice((float("nan"), float("inf"), -1.0, 0.0, 1e300, None))
        to = table.schema[column]
        if not to.is_float() and odd is not None and abs(odd) != 1.0:
            odd = 0.0
        table = table.with_columns(
            pl.when(pl.int_range(pl.len()) % 3 == 0).then(pl.lit(odd).cast(to)).otherwise(pl.col(column)).alias(column)
        )
    else:
        table = pl.concat([table, table[: draw.randrange(table.height + 1)]])
    out = io.BytesIO()
    table.write_parquet(out)
    return out.getvalue()
