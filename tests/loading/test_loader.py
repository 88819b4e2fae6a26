"""A folder that is no checkpoint is refused before any weight is read, with every fault named at once."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import GOLDEN, change_json
from golden_folders import INDEX, SHARDS, SINGLE, change, change_map, stored_tensors, tensors_of
from safetensors.torch import save_file

from qwen_ref import QwenConfig, checkpoint
from qwen_ref.config import InputError
from qwen_ref.loading.loader import load_model, own_device

DTYPES = ["bfloat16", "float16", "float32", "float64"]
MAP_NOTHING = (None, [], {}, "x.safetensors", 1, [["a", "b"]])
MAPS = '"weight_map" must be an object of tensor names and file names'


def refusal(folder: Path | str, **arguments: str) -> str:
    """The message with which a folder is refused: one plain ValueError, of bounded length, naming the folder.

    Nothing has been loaded by then, and nothing is left in the folder or beside it.
    """
    started = []
    around = folder.parent if isinstance(folder, Path) else None
    before = around and sorted(around.rglob("*"))
    with pytest.raises(ValueError, match=r"\w") as caught:
        load_model(folder, progress=lambda done, total: started.append(done), **arguments)
    message = str(caught.value)
    assert type(caught.value) is InputError
    assert message.startswith(f"{folder}: ")
    assert len(message.replace(str(folder), "")) < 4000
    assert (around and sorted(around.rglob("*"))) == before
    assert started == []
    return message.removeprefix(f"{folder}: ")


# Folders and files that are not there


def test_a_missing_folder_is_named(tmp_path: Path):
    assert "not a folder" in refusal(tmp_path / "nowhere")


@pytest.mark.parametrize("name", [SINGLE, "config.json"])
def test_a_file_is_no_folder_and_the_folder_is_named(name: str, single: Path):
    assert refusal(single / name) == f"not a folder; give the folder that it is in, {single}"


def test_an_empty_path_is_not_the_current_folder(single: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(single)
    with pytest.raises(InputError, match="'': not a folder"):
        load_model("")
    load_model(".")


def test_an_empty_folder_lacks_both_configuration_and_weights(tmp_path: Path):
    (tmp_path / "empty").mkdir()
    message = refusal(tmp_path / "empty")
    assert "config.json: cannot be read: No such file" in message
    assert f"neither {SINGLE} nor {INDEX} is in the folder" in message


@pytest.mark.parametrize("path", ["a\0b", "a\ud800b", "a" * 5000], ids=["NUL", "surrogate", "long"])
def test_a_path_that_no_folder_can_have_is_refused(path: str):
    assert "folder" in refusal(path)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
@pytest.mark.parametrize("mode", [0o000, 0o600])
def test_a_folder_without_permission_is_refused(mode: int, single: Path):
    single.chmod(mode)
    try:
        with pytest.raises(ValueError, match="Permission denied"):
            load_model(single, "auto")
    finally:
        single.chmod(0o700)


@pytest.mark.parametrize("layout", ["single", "sharded"])
def test_a_missing_configuration_is_named(layout: str, request: pytest.FixtureRequest):
    folder = request.getfixturevalue(layout)
    (folder / "config.json").unlink()
    assert "config.json: cannot be read: No such file" in refusal(folder)


def test_missing_weights_are_named(single: Path):
    (single / SINGLE).unlink()
    assert refusal(single) == f"neither {SINGLE} nor {INDEX} is in the folder: fetch the weights"


def test_every_missing_shard_is_named_and_its_tensors_are_not(sharded: Path):
    (sharded / SHARDS[0]).unlink()
    (sharded / SHARDS[2]).unlink()
    message = refusal(sharded)
    assert f"{SHARDS[0]}: cannot be read: No such file or directory; fetch it" in message
    assert f"{SHARDS[2]}: cannot be read: No such file" in message
    assert "lm_head" not in message


@pytest.mark.parametrize("name", ["config.json", SINGLE])
def test_a_folder_in_the_place_of_a_file_is_named(name: str, single: Path):
    (single / name).unlink()
    (single / name).mkdir()
    assert f"{name}: cannot be read: it is a folder, not a file" in refusal(single)


@pytest.mark.parametrize("name", ["config.json", "quantize_config.json", SINGLE, INDEX, SHARDS[1]])
def test_only_regular_files_are_read(name: str, special: tuple[Path, str], request: pytest.FixtureRequest):
    folder = request.getfixturevalue("sharded" if name in (INDEX, *SHARDS) else "single")
    path, kind = special
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(path)
    assert f"{name}: cannot be read: it is {kind}, not a file" in refusal(folder)


@pytest.mark.parametrize("target", ["../blobs/gone", SINGLE], ids=["to nothing", "to itself"])
def test_a_broken_link_is_named_as_what_it_is(target: str, single: Path):
    (single / SINGLE).unlink()
    (single / SINGLE).symlink_to(target)
    assert f"{SINGLE}: cannot be read: " in refusal(single)


def test_an_index_beside_a_single_file_is_ambiguous(sharded: Path):
    other = {name: torch.zeros_like(tensor) for name, tensor in stored_tensors(sharded).items()}
    save_file(other, sharded / SINGLE)
    message = refusal(sharded)
    assert f"both {SINGLE} and {INDEX}" in message


# Files that are not what they should be


def test_a_git_lfs_pointer_is_recognised(single: Path):
    (single / SINGLE).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 369208\n")
    message = refusal(single)
    assert f"{SINGLE}: a Git LFS pointer" in message
    assert "git lfs pull" in message


def cut_at(length: int) -> Callable[[bytes], bytes]:
    return lambda raw: raw[:length]


def with_header_length(length: int) -> Callable[[bytes], bytes]:
    return lambda raw: struct.pack("<Q", length) + raw[8:]


def with_header(header: str) -> Callable[[bytes], bytes]:
    return lambda raw: struct.pack("<Q", len(header)) + header.encode()


def replacing(old: bytes, new: bytes) -> Callable[[bytes], bytes]:
    def replaced(raw: bytes) -> bytes:
        assert old in raw
        return raw.replace(old, new, 1)

    return replaced


@pytest.mark.parametrize(
    "damage",
    [
        *(cut_at(length) for length in (0, 1, 7, 8, 9, 1000, 2615, 2616, 2617, 200_000, -1)),
        lambda raw: raw + b"\0",
        lambda raw: b"<!DOCTYPE html><html><body>401: sign in</body></html>",
        lambda raw: bytes(len(raw)),
        *(with_header_length(length) for length in (0, 1, 2000, 100_000, 2**27, 2**40, 2**63, 2**64 - 1)),
        *(with_header(header) for header in ("", "x", "[]", "null", "[" * 10_000, '{"a": {}}', '{"a": 1}')),
        replacing(b'"BF16"', b'"F99"'),
        replacing(b"[320,64]", b"[-20,64]"),
        replacing(b"[320,64]", b"[320,65]"),
        replacing(b"[320,64]", b'["0",64]'),
        replacing(b"[0,40960]", b"[9,40960]"),
        replacing(b"[0,40960]", b"[0,99999]"),
        replacing(b'"format":"pt"', b'"format":1234'),
    ],
)
def test_a_truncated_or_damaged_file_is_refused(damage: Callable[[bytes], bytes], single: Path):
    (single / SINGLE).write_bytes(damage((GOLDEN / "ntk_logn" / SINGLE).read_bytes()))
    message = refusal(single)
    assert f"{SINGLE}: not a complete safetensors file" in message
    assert "fetch it again" in message


def test_every_damaged_shard_is_named(sharded: Path):
    (sharded / SHARDS[0]).write_bytes(b"")
    (sharded / SHARDS[1]).write_text("version https://git-lfs.github.com/spec/v1\n")
    (sharded / SHARDS[2]).unlink()
    message = refusal(sharded)
    assert message.startswith("3 problems: ")
    assert all(f"{shard}: " in message for shard in SHARDS)


# Tensors that are not what they should be


def test_a_missing_tensor_is_named(single: Path):
    change(single / SINGLE, transformer__h__1__ln_2__weight=None)
    assert refusal(single) == "missing tensors: transformer.h.1.ln_2.weight"


def test_a_tensor_without_a_place_is_named(single: Path):
    change(single / SINGLE, transformer__h__3__ln_1__weight=torch.ones(64, dtype=torch.bfloat16))
    message = refusal(single)
    assert "transformer.h.3.ln_1.weight" in message
    assert "the configuration has no place" in message


@pytest.mark.parametrize("shape", [(64, 320), (319, 64), (20480,), (1, 320, 64), (), (0,)], ids=str)
def test_a_shape_that_contradicts_the_configuration_is_named_with_both(shape: tuple, single: Path):
    change(single / SINGLE, lm_head__weight=torch.zeros(shape, dtype=torch.bfloat16))
    assert f"lm_head.weight is {list(shape)}, should be [320, 64]" in refusal(single)


@pytest.mark.parametrize(
    ("dtype", "name"),
    [
        (torch.int32, "I32"),
        (torch.int8, "I8"),
        (torch.uint8, "U8"),
        (torch.bool, "BOOL"),
        (torch.float8_e4m3fn, "F8_E4M3"),
        (torch.float8_e5m2, "F8_E5M2"),
    ],
    ids=str,
)
def test_a_dtype_that_no_weight_has_is_named(dtype: torch.dtype, name: str, single: Path):
    change(single / SINGLE, lm_head__weight=torch.zeros(320, 64).to(dtype))
    for wanted in ("auto", "float32"):
        message = refusal(single, dtype=wanted)
        assert f"lm_head.weight is {name}" in message
        assert "BF16, F16, F32, F64" in message
        with pytest.raises(InputError, match=r"not those of config\.json: lm_head\.weight$"):
            checkpoint.load_model(single, wanted)


def test_all_faults_of_tensors_are_in_one_message(sharded: Path):
    change_map(sharded, lm_head__weight=...)  # the index does not say which of the two it is
    change(
        sharded / SHARDS[0],
        lm_head__weight=tensors_of(sharded / SHARDS[2])["lm_head.weight"],  # twice
        transformer__h__0__ln_1__weight=None,  # missing, and listed in the index
        transformer__h__0__ln_2__weight=torch.ones(63, dtype=torch.bfloat16),
        transformer__h__0__attn__c_attn__bias=torch.ones(192, dtype=torch.int32),
        transformer__h__0__mlp__w1__weight=torch.ones(160, 64).to(torch.float8_e4m3fn),
        transformer__h__0__mlp__w3__weight=torch.ones(160, 64, dtype=torch.bfloat16),
    )
    change_map(sharded, transformer__h__0__mlp__w3__weight=SHARDS[0])
    change(sharded / SHARDS[1], transformer__h__1__ln_1__weight=None)  # missing, and in no index
    change_map(sharded, transformer__h__1__ln_1__weight=...)
    message = refusal(sharded)
    for part in (
        f"lm_head.weight ({SHARDS[0]} and {SHARDS[2]})",
        f"transformer.h.0.ln_1.weight (not in {SHARDS[0]})",
        "missing tensors: transformer.h.0.ln_1.weight, transformer.h.1.ln_1.weight",
        "transformer.h.0.mlp.w3.weight",
        "transformer.h.0.ln_2.weight is [63], should be [64]",
        "transformer.h.0.attn.c_attn.bias is I32",
        "transformer.h.0.mlp.w1.weight is F8_E4M3",
    ):
        assert part in message


def test_faults_of_the_configuration_and_of_the_files_are_in_one_message(sharded: Path):
    change_json(sharded / "config.json", rotary_pct=0.5)
    (sharded / SHARDS[1]).unlink()
    message = refusal(sharded)
    assert message.startswith("2 problems: ")
    assert "rotary_pct=0.5" in message
    assert SHARDS[1] in message


def test_weights_of_another_size_are_refused_by_every_shape(single: Path):
    change_json(single / "config.json", intermediate_size=322)
    message = refusal(single)
    assert "transformer.h.0.mlp.w1.weight is [160, 64], should be [161, 64]" in message
    assert "transformer.h.1.mlp.c_proj.weight is [64, 160], should be [64, 161]" in message
    assert "lm_head" not in message


def test_643_missing_tensors_make_a_short_message(single: Path):
    large = QwenConfig.preset("72b")
    change_json(single / "config.json", **vars(large))
    save_file({}, single / SINGLE)
    message = refusal(single)
    assert message.startswith("missing tensors: transformer.wte.weight, transformer.h.0.ln_1.weight, ")
    assert message.endswith(" and 623 more")
    assert len(message) < 1000


def test_thousands_of_missing_shards_make_a_short_message(sharded: Path):
    names = {f"tensor{i}": f"{i}.safetensors" for i in range(5000)}
    (sharded / INDEX).write_text(json.dumps({"weight_map": names}))
    assert "cannot be read: No such file" in refusal(sharded)  # which bounds the length


def test_a_tensor_name_of_a_megabyte_makes_a_short_message(single: Path):
    change(single / SINGLE, **{"x" * 1_000_000: torch.ones(1)})
    assert "no place for: xxx" in refusal(single)


def test_matrices_of_several_dtypes_need_a_named_one(single: Path):
    head = tensors_of(single / SINGLE)["lm_head.weight"]
    change(single / SINGLE, lm_head__weight=head.float())
    with pytest.raises(ValueError, match=r"^matrices are stored in BF16 and F32; name the dtype"):
        load_model(single, "auto")
    for dtype in DTYPES:
        model = load_model(single, dtype=dtype)
        assert {parameter.dtype for parameter in model.parameters()} == {getattr(torch, dtype)}
        assert torch.equal(model.lm_head.weight, head.to(getattr(torch, dtype)))


# The index


@pytest.mark.parametrize(
    ("content", "said"),
    [
        *((content, "not valid JSON") for content in ("", "{", "[" * 100_000, "\x00\x01")),
        *((json.dumps(content), "not an object") for content in ([], None, 1, "text")),
        *((json.dumps({"weight_map": value}), MAPS) for value in MAP_NOTHING),
        ("{}", MAPS),
    ],
    ids=lambda text: repr(text[:30]),
)
def test_an_index_that_is_none_is_named(content: str, said: str, sharded: Path):
    (sharded / INDEX).write_text(content)
    message = refusal(sharded)
    assert f"{INDEX}: " in message
    assert said in message


@pytest.mark.parametrize("value", [None, 1, 1.5, True, [SHARDS[2]], {"file": SHARDS[2]}], ids=repr)
def test_a_weight_map_names_files_by_strings(value: object, sharded: Path):
    change_map(sharded, lm_head__weight=value)
    assert f"weight_map may name only .safetensors files in the folder itself, not {value!r}" in refusal(
        sharded
    )


@pytest.mark.parametrize(
    "name",
    [
        "../outside.safetensors",
        "./../outside.safetensors",
        "..\\outside.safetensors",
        "HERE/outside.safetensors",  # absolute
        "a/b.safetensors",
        "./model-00003-of-00003.safetensors",
        "a\\b.safetensors",
        "C:x.safetensors",
        "C:\\x.safetensors",
        "\\\\server\\share.safetensors",
        "file:x.safetensors",
        "x\0.safetensors",
        "x\n.safetensors",
        "x\ud800.safetensors",
        "x.safetensors\0",
        "x.bin",
        "x.safetensors.bin",
        "..",
        "",
    ],
    ids=ascii,
)
def test_a_weight_map_cannot_leave_the_folder_or_the_format(name: str, sharded: Path, tmp_path: Path):
    shutil.copyfile(sharded / SHARDS[2], tmp_path / "outside.safetensors")  # which would load
    name = name.replace("HERE", str(tmp_path))
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"] |= {key: name for key, file in index["weight_map"].items() if file == SHARDS[2]}
    (sharded / INDEX).write_text(json.dumps(index))
    message = refusal(sharded)
    assert f"weight_map may name only .safetensors files in the folder itself, not {name!r}" in message


def test_a_weight_map_that_names_the_wrong_file_is_refused(sharded: Path):
    change_map(sharded, lm_head__weight=SHARDS[0])
    assert f"lm_head.weight (not in {SHARDS[0]})" in refusal(sharded)


def test_a_weight_map_may_not_invent_a_tensor(sharded: Path):
    change_map(sharded, transformer__h__9__ln_1__weight=SHARDS[1])
    assert f"transformer.h.9.ln_1.weight (not in {SHARDS[1]})" in refusal(sharded)


@pytest.mark.parametrize(
    "value", ["x" * 100_000, [0] * 100_000, [[[0] * 500] * 500]], ids=["text", "list", "deep"]
)
def test_a_weight_map_with_a_huge_entry_makes_a_short_message(value: object, sharded: Path):
    change_map(sharded, lm_head__weight=value)
    assert "weight_map may name only" in refusal(sharded)  # which bounds the length


# Pickles


class Trap:
    """Unpickling it writes a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple:
        return Path.touch, (self.file,)


@pytest.mark.parametrize("with_index", [False, True])
@pytest.mark.parametrize(
    "names",
    [
        ["pytorch_model.bin"],
        ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"],
        ["model.pt"],
        ["consolidated.00.pth"],
        ["last.ckpt"],
        ["weights.pkl"],
    ],
    ids=lambda names: names[0],
)
def test_pickled_checkpoints_are_named_and_never_opened(
    names: list[str], with_index: bool, single: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (single / SINGLE).unlink()
    for name in names:
        (single / name).write_bytes(pickle.dumps(Trap(tmp_path / "executed")))
    if with_index:
        (single / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"a": names[0]}}))
    opened, really_open = [], open
    for module in ("builtins", "io"):
        monkeypatch.setattr(
            f"{module}.open", lambda file, *a, **k: opened.append(file) or really_open(file, *a, **k)
        )
    with pytest.raises(ValueError, match="pickled checkpoints are not read") as caught:
        load_model(single, "auto")
    monkeypatch.undo()
    assert all(name in str(caught.value) for name in names)
    assert "safetensors" in str(caught.value)
    assert {Path(file).name for file in opened} == {"config.json"}
    assert not (tmp_path / "executed").exists()
    pickle.loads((single / names[0]).read_bytes())
    assert (tmp_path / "executed").exists()  # the trap works


# dtype and device


@pytest.mark.parametrize("dtype", ["bf16", "int8", "float8_e4m3fn", "torch.float32", "", None, torch.float32])
def test_an_unknown_dtype_is_refused_with_those_that_exist(dtype: object):
    with pytest.raises(
        ValueError, match="is unknown; use auto, bfloat16, float16, float32, float64"
    ) as caught:
        load_model(GOLDEN / "ntk_logn", dtype=dtype)
    assert f"dtype {dtype!r}" in str(caught.value)


WITHOUT_CUDA = [] if torch.cuda.is_available() else ["cuda", "cuda:0"]
OTHER_MAKES = ["xla", "hpu", "privateuseone", "vulkan"]


@pytest.mark.parametrize(
    "device", ["gpu", "CPU", "cpu:x", "cpu:-1", "cuda:99", "cuda:", "", *WITHOUT_CUDA, *OTHER_MAKES]
)
def test_a_device_that_cannot_be_used_is_refused_with_the_reason(device: str):
    with pytest.raises(ValueError, match=r"cannot be used: .{8}") as caught:
        load_model(GOLDEN / "ntk_logn", "auto", device=device)
    message = str(caught.value)
    assert message.startswith(f"device {device!r} cannot be used")
    assert "\n" not in message
    assert len(message) < 500


def test_the_meta_device_is_refused_since_it_would_drop_every_weight():
    with pytest.raises(ValueError, match="device 'meta' cannot be used"):
        load_model(GOLDEN / "ntk_logn", "auto", device="meta")


@pytest.mark.parametrize(
    ("devices", "local_rank", "variables", "device"),
    [
        (4, 3, {}, "cuda:3"),
        (1, 3, {}, "cuda:0"),  # SLURM: each process sees its own
        (1, 1, {"LOCAL_WORLD_SIZE": "2", "CUDA_VISIBLE_DEVICES": "1"}, "cuda:0"),
        (1, 0, {"LOCAL_WORLD_SIZE": "2"}, "cuda:0"),
        (1, 1, {"LOCAL_WORLD_SIZE": "2"}, "this is rank 1 on its machine, which has 1 CUDA devices"),
        (2, 3, {}, "this is rank 3 on its machine, which has 2 CUDA devices; start at most as many"),
    ],
)
def test_a_rank_takes_the_device_of_its_own(
    devices: int, local_rank: int, variables: dict, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("LOCAL_WORLD_SIZE", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    variables = {"RANK": "5", "WORLD_SIZE": "8", "MASTER_ADDR": "a", "MASTER_PORT": "1", **variables}
    for name, value in {**variables, "LOCAL_RANK": str(local_rank)}.items():
        monkeypatch.setenv(name, value)
    taken = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: devices)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    if device.startswith("cuda"):
        assert own_device("cuda", 8) == device
        assert taken == [int(device[-1])]
    else:
        with pytest.raises(ValueError, match=device):
            own_device("cuda", 8)
