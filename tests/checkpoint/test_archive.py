"""Each byte of a checkpoint file is verified: none can be changed, cut off, moved or added without being noticed."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import random
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from trainkit.checkpoint import archive, format, table
from trainkit.errors import CheckpointError

STATE = {
    "state_dict": {"w": torch.arange(8.0), "b": torch.tensor([1.5, -2.5])},
    "optimizer_states": [{"state": {0: {"exp_avg": torch.arange(3.0)}}}],
    "global_step": 3,
}


def written(state: dict[str, Any] = STATE) -> bytes:
    file = io.BytesIO()
    format.write(file, state)
    return file.getvalue()


def refusal(content: bytes | bytearray) -> str:
    """Why a file is refused by everything that reads it; "" if it is not."""
    reasons = set()
    for use in (format.read, format.verify):
        try:
            use(io.BytesIO(content))
        except CheckpointError as error:
            reasons.add(str(error))
        else:
            reasons.add("")
    (reason,) = reasons
    return reason


def test_every_bit_of_every_byte_counts() -> None:
    whole = written()
    assert refusal(whole) == ""
    for position in range(len(whole)):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << position % 8
        assert refusal(damaged), f"the byte {position} of {len(whole)} was changed, and nobody noticed"


def test_a_byte_may_not_become_any_other_byte() -> None:
    whole = written({"w": torch.arange(2.0)})
    for position in range(0, len(whole), 97):
        for mask in range(1, 256):
            damaged = bytearray(whole)
            damaged[position] ^= mask
            assert refusal(damaged)


def test_a_file_that_ends_too_early_or_too_late_is_refused() -> None:
    whole = written()
    for length in range(len(whole)):
        assert refusal(whole[:length])
    for more in (b"\0", b"x" * 22, whole[-22:], whole):
        assert refusal(whole + more)
        assert refusal(more + whole)


def test_a_missing_or_an_added_byte_anywhere_is_noticed() -> None:
    whole = written()
    for position in range(0, len(whole), 7):
        assert refusal(whole[:position] + whole[position + 1 :])
        assert refusal(whole[:position] + b"\0" + whole[position:])


def records_of(content: bytes) -> dict[str, tuple[int, int]]:
    """Where each record's contents begin and end."""
    with zipfile.ZipFile(io.BytesIO(content)) as file:
        found = {}
        for info in file.infolist():
            lengths = content[info.header_offset + 26 : info.header_offset + 30]
            start = info.header_offset + 30 + lengths[0] + (lengths[1] << 8) + lengths[2] + (lengths[3] << 8)
            found[info.filename.removeprefix("archive/")] = (start, start + info.file_size)
        return found


@pytest.mark.parametrize(
    ("record", "tensor"),
    [
        ("data/0", "state_dict/w"),
        ("data/1", "state_dict/b"),
        ("data/2", "optimizer_states/0/state/0/exp_avg"),
        ("data.pkl", ""),
        ("version", ""),
        ("byteorder", ""),
        (".data/serialization_id", ""),
        ("trainkit.json", ""),
    ],
)
def test_the_message_names_the_record_and_the_tensor(record: str, tensor: str, tmp_path: Path) -> None:
    content = bytearray(written())
    content[records_of(bytes(content))[record][1] - 1] ^= 1
    (tmp_path / "x.ckpt").write_bytes(content)
    what = re.escape(record + (f" ({tensor})" if tensor else ""))
    with pytest.raises(
        CheckpointError, match=rf"x\.ckpt is damaged: the record {what} was changed since it was written"
    ):
        format.read(tmp_path / "x.ckpt")


def rewritten(content: bytes, edit: Any) -> bytes:
    """The same records in a new and valid archive, after somebody changed them."""
    records = {name: content[start:stop] for name, (start, stop) in records_of(content).items()}
    file = io.BytesIO()
    writer = archive.Writer(file)
    for name, contents in edit(records):
        writer.add(name, contents)
    writer.close()
    assert zipfile.ZipFile(file).testzip() is None
    return file.getvalue()


@pytest.mark.parametrize(
    "edit",
    [
        lambda records: {**records, "data/0": records["data/2"]}.items(),
        lambda records: {**records, "data/1": bytes(8)}.items(),
        lambda records: [(name, data) for name, data in records.items() if name != "data/1"],
        lambda records: [(name, data) for name, data in records.items() if name != "version"],
        lambda records: [*list(records.items())[:-1], ("data/1", records["data/1"]), list(records.items())[-1]],
        lambda records: [("data/9", b"more"), *records.items()],
        lambda records: [*reversed(list(records.items())[:-1]), list(records.items())[-1]],
        lambda records: [*records.items(), ("more", b"")],
        lambda records: [*records.items(), ("trainkit.json", records["trainkit.json"])],
        lambda records: [list(records.items())[-1], *list(records.items())[:-1]],
    ],
    ids=[
        "swapped",
        "zeroed",
        "missing",
        "no version",
        "doubled",
        "more",
        "order",
        "after",
        "two tables",
        "table first",
    ],
)
def test_records_of_a_valid_archive_can_not_be_swapped_left_out_or_added(edit: Any) -> None:
    whole = written()
    assert refusal(rewritten(whole, lambda records: records.items())) == ""
    assert refusal(rewritten(whole, edit))


def test_the_table_of_another_checkpoint_does_not_fit() -> None:
    one, other = written(), written({**STATE, "state_dict": {"w": torch.arange(8.0) + 1, "b": torch.zeros(2)}})
    start, stop = records_of(other)["trainkit.json"]
    assert "the record data" in refusal(
        rewritten(one, lambda records: {**records, "trainkit.json": other[start:stop]}.items())
    )


def test_a_compressed_archive_with_the_same_records_is_refused(tmp_path: Path) -> None:
    whole = written()
    with zipfile.ZipFile(tmp_path / "x.ckpt", "w", zipfile.ZIP_DEFLATED) as file:
        for name, (start, stop) in records_of(whole).items():
            file.writestr(f"archive/{name}", whole[start:stop])
    assert refusal((tmp_path / "x.ckpt").read_bytes())


def test_what_is_only_in_the_zip_headers_is_refused() -> None:
    """Where zip readers disagree: the directory names other records than the headers do, or one place twice."""
    whole = written()
    directory = whole.index(b"PK\x01\x02")
    swapped = (
        whole[directory:].replace(b"data/0", b"data/@").replace(b"data/1", b"data/0").replace(b"data/@", b"data/1")
    )
    assert refusal(whole[:directory] + swapped)
    entries = [entry.start() for entry in re.finditer(b"PK\x01\x02", whole)]
    overlapping = bytearray(whole)
    overlapping[entries[5] + 42 : entries[5] + 46] = whole[entries[4] + 42 : entries[4] + 46]
    assert refusal(overlapping)


# ---- files made to do harm, with digests that fit
def forged(change: Any, **records: bytes) -> bytes:
    """A file whose trainkit.json says whatever it likes, signed as ours are."""
    found = {name: written()[start:stop] for name, (start, stop) in records_of(written()).items()}
    own = json.loads(found.pop("trainkit.json"))
    found.update({name.replace("__", "."): contents for name, contents in records.items()})
    file = io.BytesIO()
    writer = archive.Writer(file)
    for name, contents in found.items():
        writer.add(name, contents)
    signed = table.compose(json.dumps(own["state"]), writer.records, True, {})
    text = change(signed)
    writer.add(archive.TABLE, resigned(text))
    writer.close()
    return file.getvalue()


def resigned(text: bytes) -> bytes:
    zeroed = text[:11] + b"0" * 64 + text[75:]
    return text[:11] + hashlib.sha256(zeroed).hexdigest().encode() + text[75:]


def replaced(old: str, new: str) -> Any:
    def change(text: bytes) -> bytes:
        changed = text.replace(b'"shape": [8]', b'"shape": [8]').replace(old.encode(), new.encode(), 1)
        assert changed != text, text
        return changed

    return change


def test_the_forger_is_as_good_as_we_are() -> None:
    assert refusal(forged(lambda text: text)) == ""


DEEP = '{"a":' * 5000 + "1" + "}" * 5000


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ('["data/0",', '["../data/0",', "a record of the name '../data/0'"),
        ('["data/0",', '["/etc/passwd",', "a record of the name '/etc/passwd'"),
        ('["data/0",', '["data/00",', "a record of the name"),
        ('["data/0",', '["data/\\u0660",', "a record of the name"),
        ('["data/0",', '["data/0\\u0000",', "a record of the name"),
        ('["data/0",', '["archive.json",', "a record of the name"),
        ('["data/0",', "[7,", "has a list of records"),
        ('["data/0",', '["data/1",', "lists a record twice"),
        ('["data/0",32', '["data/0",-1', "that can't be"),
        ('["data/0",32', '["data/0",4611686018427387904', "that can't be"),
        ('["data/0",32', '["data/0",1099511627776', "it is cut off, or was added to"),
        ('["data/0",32', '["data/0",32.0', "has a list of records"),
        ('["data/0",32', '["data/0",true', "has a list of records"),
        ('"version":1', '"version":2', "has version 2, which a newer trainkit wrote"),
        ('"version":1', '"version":"1"', "no version that trainkit writes"),
        ('"finite":true', '"finite":1', "lacks records, writer, finite or state"),
        ('"global_step": 3', f'"global_step": {DEEP}', "nested too deeply"),
        ('"global_step": 3', '"global_step": ' + "[" * 120 + "]" * 120, "nested deeper than 100 levels"),
        ('"global_step": 3', '"global_step": ' + '{"$tuple":[' * 120 + "]}" * 120, "nested deeper than 100 levels"),
        ('"global_step": 3', '"global_step": NaN', "can't be read, NaN is not JSON"),
        ('"global_step": 3', '"global_step": ' + "9" * 5000, "can't be read"),
        ('"global_step": 3', '"global_step": 3, "global_step": 4', "a key is there twice"),
        ('"global_step": 3', '"global_step": {"$code": "os.system"}', "does not know, '$code'"),
        ('"global_step": 3', '"global_step": {"$float": "zz"}', "a $float can't be read"),
        ('"global_step": 3', '"global_step": {"$int": 7}', "a $int can't be read"),
        ('"global_step": 3', '"global_step": {"$dict": [[1, 2], [1, 3]]}', "a key is there twice"),
        ('"global_step": 3', '"global_step": {"$dict": [[[], 2]]}', "a $dict can't be read"),
        ('"global_step": 3', '"global_step": {"$set": [[]]}', "a $set can't be read"),
        ('"global_step": 3', '"global_step": {"$dtype": "os"}', "a $dtype can't be read"),
        ('"global_step": 3', '"global_step": {"$device": "nowhere:0"}', "a $device can't be read"),
        ('"global_step": 3', '"global_step": {"$size": ["x"]}', "in the place of int values"),
        ('"global_step": 3', '"global_step": {"$bytes": "&&&"}', "a $bytes can't be read"),
        ('"global_step": 3', '"global_step": {"$scalar": ["O", "00"]}', "no numbers of the kind 'O'"),
        ('"global_step": 3', '"global_step": {"$scalar": ["int64", "00"]}', "has 8 bytes"),
        ('"global_step": 3', '"global_step": {"$tuple": [], "$list": []}', "has keys beside it"),
        ('"float32"', '"object"', "a dtype that is not known here, 'object'"),
        ('"float32"', '"__class__"', "a dtype that is not known here"),
        ('"float32"', '"float64"', "reaches beyond its record data/0"),
        ('"float32"', '"qint8"', "a dtype that is not known here"),
        ('"shape": [8]', '"shape": [9]', "reaches beyond its record data/0"),
        ('"shape": [8]', '"shape": [-8]', "shape, stride and offset can't be"),
        ('"shape": [8]', '"shape": [true]', "in the place of int values"),
        ('"shape": [8]', '"shape": [8, 1]', "shape, stride and offset can't be"),
        ('"shape": [8], "stride": [1]', '"shape": [8], "stride": [2]', "reaches beyond"),
        ('"shape": [8], "stride": [1]', '"shape": [8], "stride": [-1]', "shape, stride and offset can't be"),
        ('"shape": [8], "stride": [1]', '"shape": [9223372036854775807], "stride": [0]', "reaches beyond"),
        ('"shape": [8], "stride": [1]', '"shape": [4294967296, 4294967296], "stride": [0, 0]', "reaches beyond"),
        ('"shape": [8], "stride": [1]', '"shape": [2, 2], "stride": [9223372036854775807, 1]', "reaches beyond"),
        ('"offset": 0', '"offset": 1', "reaches beyond"),
        ('"offset": 0', '"offset": -1', "shape, stride and offset can't be"),
        ('"offset": 0', '"offset": 18446744073709551616', "reaches beyond"),
        ('"record": "data/0"', '"record": "data/7"', "which it does not have"),
        ('"record": "data/0"', '"record": "data.pkl"', "which it does not have"),
        ('"record": "data/0"', '"record": 0', "in the place of str values"),
    ],
)
def test_a_forged_table_is_refused_with_the_reason(old: str, new: str, reason: str) -> None:
    with pytest.raises(CheckpointError, match=re.escape(reason)):
        format.read(io.BytesIO(forged(replaced(old, new))))


def test_a_file_in_the_other_byte_order_is_refused() -> None:
    with pytest.raises(CheckpointError, match="it is not in the byte order of this machine"):
        format.read(io.BytesIO(forged(lambda text: text, byteorder=b"big")))


def test_sparse_indices_that_point_outside_are_refused() -> None:
    sparse = {
        "layout": "coo",
        "shape": [2],
        "coalesced": True,
        "indices": {"$tensor": {"record": "data/7", "dtype": "int64", "shape": [1, 1], "stride": [1, 1], "offset": 0}},
        "values": {"$tensor": {"record": "data/0", "dtype": "float32", "shape": [1], "stride": [1], "offset": 0}},
    }
    for index in (1 << 40, -1):
        content = forged(
            replaced('"global_step": 3', f'"s": {json.dumps({"$sparse": sparse})}'),
            **{"data/7": index.to_bytes(8, "little", signed=True)},
        )
        with pytest.raises(CheckpointError, match=r"a \$sparse can't be read"):
            format.read(io.BytesIO(content))


def test_a_table_with_more_values_than_memory_should_hold_is_refused_before_it_is_parsed() -> None:
    many = "[" + "[]," * 2_600_000 + "[]]"
    with pytest.raises(CheckpointError, match="has more than 5,000,000 values"):
        format.read(io.BytesIO(forged(replaced('"global_step": 3', f'"x": {many}'))))


def test_an_oversized_table_is_refused_before_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    content = written()
    monkeypatch.setattr(archive, "MAX_TABLE", 100)
    with pytest.raises(CheckpointError, match=r"is refused: its trainkit.json has .* bytes, more than 100"):
        format.head(io.BytesIO(content))


KINDS = ["$tensor", "$tuple", "$float", "$int", "$complex", "$dict", "$ordered", "$counter", "$set", "$bytes", "$size"]
KINDS += ["$frozenset", "$bytearray", "$dtype", "$device", "$array", "$scalar", "$sparse", "$metadata", "$", "$other"]
WORDS = [None, True, 0, -1, 3, 1 << 62, 1 << 200, 1e308, "", "float32", "data/0", "coo", "csr", "0x12", "cpu", [], {}]


def junk(draw: random.Random, value: Any) -> Any:
    """The same typed JSON with something wrong here and there."""
    if draw.random() < 0.02:
        return draw.choice([*WORDS, [draw.choice(WORDS)], {draw.choice(KINDS): draw.choice(WORDS)}])
    if isinstance(value, list):
        return [junk(draw, item) for item in value]
    if isinstance(value, dict):
        return {draw.choice(KINDS) if draw.random() < 0.02 else key: junk(draw, item) for key, item in value.items()}
    return value


def test_whatever_a_table_says_it_is_read_or_refused_and_nothing_else_happens() -> None:
    state = {**STATE, "array": np.arange(4), "sparse": torch.eye(3).to_sparse(), "pairs": {1: (2.5, 1j), (1,): b"x"}}
    state.update(scalar=np.float32(1), large=1 << 80, inf=float("inf"), kinds=[torch.int8, torch.Size([2]), {3}])
    records = {name: written(state)[start:stop] for name, (start, stop) in records_of(written(state)).items()}
    own, draw, outcomes = json.loads(records.pop("trainkit.json"))["state"], random.Random(0), set()
    for _ in range(1500):
        file = io.BytesIO()
        writer = archive.Writer(file)
        for name, contents in records.items():
            writer.add(name, contents)
        writer.add(archive.TABLE, table.compose(json.dumps(junk(draw, own)), writer.records, True, {}))
        writer.close()
        for use in (format.head, format.read):
            try:
                use(file)
            except CheckpointError as error:
                outcomes.add(str(error).partition(":")[0])
            else:
                outcomes.add("read")
    assert {"read", "the checkpoint is refused"} <= outcomes


def test_data_pkl_is_never_unpickled(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "it_ran"),)

    (tmp_path / "x.ckpt").write_bytes(forged(lambda text: text, data__pkl=pickle.dumps(Evil(), 2)))
    assert format.read(tmp_path / "x.ckpt")["global_step"] == 3
    format.verify(tmp_path / "x.ckpt")
    format.head(tmp_path / "x.ckpt")
    assert not (tmp_path / "it_ran").exists()
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "x.ckpt", weights_only=True)
