"""Kinds of damage to a file, from a seed: cut, flipped, foreign, hostile."""

import io
import json
import os
import zipfile

import torch

DEEP = 1000
ODD = [
    *(None, True, 0, -1, 7, 10**400, 2**63, 1.5, -0.0, 1e308, float("inf"), float("nan")),
    *(
        "",
        "x",
        "1",
        "\ud800",
        "\x1b[2J\x07",
        "a\nb",
        "../..",
        "-h",
        "--help",
        "[/bold]",
        "z" * 5000,
    ),
    *([], {}, [[]], [1, 2], [None], {"a": {"b": []}}, ["--download"], [["x", 1.0]]),
]


def flipped(content, random):
    """Flip one bit."""
    if not content:
        return b"\0"
    spoilt = bytearray(content)
    spoilt[random.randrange(len(spoilt))] ^= 1 << random.randrange(8)
    return bytes(spoilt)


def overwritten(content, random):
    """Overwrite a stretch with other bytes."""
    start, length = random.randrange(len(content) + 1), random.randrange(1, 40)
    return content[:start] + random.randbytes(length) + content[start + length :]


def cut(content, random):
    return content[: random.randrange(len(content) + 1)]


def inserted(content, random):
    place = random.randrange(len(content) + 1)
    more = random.choice([b"\xff\xfe", b"\0", b"\n", b"\r", b"[" * 50, b"\xc3", b"9" * 30])
    return content[:place] + more + content[place:]


def shuffled(content, random):
    third = max(1, len(content) // 3)
    parts = [content[:third], content[third : 2 * third], content[2 * third :]]
    random.shuffle(parts)
    return b"".join(parts)


BYTES = (flipped, flipped, flipped, overwritten, overwritten, cut, cut, inserted, shuffled)
FOREIGN = (
    *(
        b"",
        b"\0",
        b"\n",
        b"null",
        b"5",
        b'"x"',
        b"true",
        b"NaN",
        b"[]",
        b"{}",
        b"[[[]]]",
        b"\xff\xfe",
    ),
    *(b"[" * DEEP, b"[" * 20 + b"]" * 20, b"[" * DEEP + b"]" * DEEP, b"[" * 200_000),
    *(b'{"a":' * DEEP + b"1" + b"}" * DEEP, b"\xef\xbb\xbf{}", b"PK\x05\x06" + bytes(18)),
    *('{"a": 1}'.encode("utf-16"), b"9" * 5000, b"1e999", b'"' + b"\\ud800" * 9 + b'"'),
    *(b"\x80\x04N.", b"PK\x03\x04", b"\x1b]0;title\x07\n"),
)


def damaged_json(text, random):
    """Return JSON in which one value is replaced, removed or renamed."""
    found = json.loads(text)
    places = [(found, key) for key in _keys(found)]
    for whole, key in places:
        if isinstance(whole[key], dict | list):
            places += [(whole[key], inner) for inner in _keys(whole[key])[:40]]
    if not places:
        return b"{"
    whole, key = random.choice(places)
    kind = random.randrange(5)
    if kind == 0:
        del whole[key]
    elif kind == 1 and isinstance(whole, dict):
        whole[random.choice(["", "help", "h", "x y", "\x1b[0m", "step", "é"])] = whole.pop(key)
    else:
        whole[key] = random.choice(ODD)
    return json.dumps(found).encode()


def _keys(whole):
    if isinstance(whole, dict):
        return list(whole)
    return list(range(len(whole))) if isinstance(whole, list) else []


def damaged_lines(text, random):
    """Return lines of JSON, one of them damaged."""
    lines = text.splitlines()
    place = random.randrange(len(lines))
    lines[place] = damaged_json(lines[place], random).decode()
    return ("\n".join(lines) + "\n").encode()


def damaged_tensors(content, random):
    """Return tensors by name, one of them changed."""
    flat = torch.load(io.BytesIO(content), weights_only=True)
    if not flat:
        return content
    name = random.choice(list(flat))
    tensor = flat.pop(name)
    others = [
        lambda: {},
        lambda: {f"{name}x": tensor, "": tensor},
        lambda: {name: tensor.double().unsqueeze(0)},
        lambda: {name: tensor.flatten()[:1].expand(10**9)},
        lambda: {name: tensor.to(torch.complex64)},
        lambda: {name: torch.zeros(3).to_sparse()},
        lambda: {name: torch.empty(tensor.shape, device="meta")},
        lambda: {name: tensor.float() * float("nan")},
        lambda: {name: [tensor]},
        lambda: {name: torch.nn.Parameter(tensor.float())},
        lambda: {name: tensor > 0},
        lambda: {name: tensor.to(torch.int8)},
        lambda: {name: torch.empty(0)},
    ]
    flat |= random.choice(others)()
    buffer = io.BytesIO()
    torch.save(flat, buffer)
    return buffer.getvalue()


def damaged_zip(content, random):
    """Return a zip archive with one entry changed, or packed in another way."""
    kind = random.randrange(6)
    packed = io.BytesIO()
    how = random.choice([zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
    with (
        zipfile.ZipFile(io.BytesIO(content)) as old,
        zipfile.ZipFile(packed, "w", how if kind == 0 else zipfile.ZIP_STORED) as new,
    ):
        names = old.namelist()
        chosen = random.choice(names)
        for name in names:
            inside = old.read(name)
            if name == chosen and kind == 1:
                continue
            if name == chosen and kind == 2:
                inside = old.read(random.choice(names))
            if name == chosen and kind == 3 and name.endswith(".pt"):
                inside = damaged_tensors(inside, random)
            if name == chosen and kind == 4:
                step = "9" * random.choice([1, 30, 5000])
                name = random.choice(["", "../x", f"1-step-{step}-epoch-1..2.pt", "\x1b[2J"])
                name = name or f"00000-step-{step}-epoch-1.pt"
            if name == chosen and kind == 5:
                inside = random.choice(FOREIGN)
            new.writestr(name, inside)
    return packed.getvalue()


def replaced(path, random):
    """Replace a file by something that is not a file."""
    path.unlink()
    kind = random.choice(["nothing", "folder", "full folder", "pipe", "loop", "dangling", "sparse"])
    if kind == "folder":
        path.mkdir()
    elif kind == "full folder":
        path.mkdir()
        (path / "x").touch()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "loop":
        path.symlink_to(path.name)
    elif kind == "dangling":
        path.symlink_to("nowhere")
    elif kind == "sparse":
        with path.open("wb") as file:
            file.truncate(2**31 + 1)


def damage(path, random):
    """Damage a file in some way."""
    kind = random.randrange(10)
    if kind == 0:
        replaced(path, random)
        return
    content = path.read_bytes()
    if kind <= 3:
        content = random.choice(BYTES)(content, random)
    elif kind == 4:
        content = random.choice(FOREIGN)
    elif path.suffix == ".json":
        content = damaged_json(content, random)
    elif path.suffix == ".jsonl":
        content = damaged_lines(content.decode(), random)
    elif path.suffix == ".pt":
        content = damaged_tensors(content, random)
    elif path.suffix == ".zip":
        content = damaged_zip(content, random)
    else:
        content = random.choice(BYTES)(content, random)
    path.write_bytes(content)
