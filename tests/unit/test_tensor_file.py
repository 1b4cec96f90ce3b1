"""Our writer of pieces makes what safetensors itself reads back, tensors joined and aligned."""

import json
import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from eagle.tensor_file import DTYPE_CODES, write_pieces


def pieces(dtype: torch.dtype, *lengths: int, width: int | None = None) -> list[torch.Tensor]:
    shape = () if width is None else (width,)
    return [torch.arange(100, 100 + n * (width or 1)).reshape(n, *shape).to(dtype) for n in lengths]


@pytest.mark.parametrize("lengths", [(3, 5, 1), (7,), (2, 0, 4), (0,)])
def test_reads_back_joined(tmp_path, lengths):
    tensors = {f"{i}_{code}": pieces(dtype, *lengths, width=3) for i, (dtype, code) in enumerate(DTYPE_CODES.items())}
    tensors["flat"] = pieces(torch.int64, *lengths)
    write_pieces(tmp_path / "file", tensors, {"who": "“wir”"})
    found = load_file(tmp_path / "file")
    assert found.keys() == tensors.keys()
    for name, parts in tensors.items():
        expected = torch.cat([part.view(torch.uint8) for part in parts]).view(parts[0].dtype)
        assert found[name].dtype == expected.dtype and found[name].shape == expected.shape
        assert torch.equal(found[name].view(torch.uint8), expected.view(torch.uint8))
    with safe_open(tmp_path / "file", framework="pt") as file:
        assert file.metadata() == {"who": "“wir”"}


def test_pieces_that_do_not_lie_in_one_stretch(tmp_path):
    whole = torch.arange(24, dtype=torch.int32).reshape(4, 6)
    write_pieces(tmp_path / "file", {"x": [whole[:, ::2], whole[::2, 3:]]}, {})
    assert torch.equal(load_file(tmp_path / "file")["x"], torch.cat([whole[:, ::2], whole[::2, 3:]]))


def test_every_tensor_is_aligned(tmp_path):
    """Odd counts of the narrow dtypes must not push the wide ones off their boundaries."""
    tensors = {"a": pieces(torch.uint8, 3), "b": pieces(torch.int64, 1), "c": pieces(torch.float16, 5)}
    write_pieces(tmp_path / "file", tensors, {})
    content = (tmp_path / "file").read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    for name, size in (("a", 1), ("b", 8), ("c", 2)):
        assert (start + header[name]["data_offsets"][0]) % size == 0
    save_file({name: torch.cat(parts) for name, parts in tensors.items()}, tmp_path / "theirs")
    assert content[start:] == (tmp_path / "theirs").read_bytes()[-(len(content) - start) :]


@pytest.mark.skipif(os.name != "posix", reason="modes")
def test_readable_by_whom_new_files_are(tmp_path):
    (tmp_path / "new").touch()
    write_pieces(tmp_path / "file", {"x": pieces(torch.int8, 1)}, {})
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "new").stat().st_mode
