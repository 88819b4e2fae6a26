"""config.json: the published ones give the presets, anything else is refused by name and never executed."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from qwen_ref import QwenConfig
from qwen_ref.config import LARGEST_JSON, InputError, shown

# What the four published files hold, in the columns of the model card's table.
COLUMNS = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size"),
    *("seq_length", "rotary_emb_base", "use_dynamic_ntk", "use_logn_attn"),
)
SIZES = {
    "1.8b": (2048, 24, 16, 11008, 151936, 8192, 10000, True, True),
    "7b": (4096, 32, 32, 22016, 151936, 8192, 10000, True, True),
    "14b": (5120, 40, 40, 27392, 152064, 2048, 10000, True, True),
    "72b": (8192, 80, 64, 49152, 152064, 32768, 1000000, False, False),
}
MLP_WIDTHS = {"1.8b": 5504, "7b": 11008, "14b": 13696, "72b": 24576}
SAME_EVERYWHERE = {
    "architectures": ["QWenLMHeadModel"],
    "auto_map": {
        "AutoConfig": "configuration_qwen.QWenConfig",
        "AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel",
    },
    "attn_dropout_prob": 0.0,
    "bf16": False,
    "emb_dropout_prob": 0.0,
    "fp16": False,
    "fp32": False,
    "initializer_range": 0.02,
    "kv_channels": 128,
    "layer_norm_epsilon": 1e-06,
    "model_type": "qwen",
    "no_bias": True,
    "onnx_safe": None,
    "rotary_pct": 1.0,
    "scale_attn_weights": True,
    "softmax_in_fp32": False,
    "tie_word_embeddings": False,
    "tokenizer_class": "QWenTokenizer",
    "transformers_version": "4.32.0",
    "use_cache": True,
    "use_cache_kernel": False,
    "use_cache_quantization": False,
    "use_flash_attn": "auto",
}
# An early revision of the 7B: the old spellings, and vocab_size without the padding rows.
EARLY_7B = {
    "activation": "swiglu",
    "apply_residual_connection_post_layernorm": False,
    "architectures": ["QWenLMHeadModel"],
    "attn_pdrop": 0.0,
    "bias_dropout_fusion": True,
    "embd_pdrop": 0.0,
    "ffn_hidden_size": 22016,
    "kv_channels": 128,
    "layer_norm_epsilon": 1e-06,
    "model_type": "qwen",
    "n_embd": 4096,
    "n_head": 32,
    "n_layer": 32,
    "n_positions": 8192,
    "no_bias": True,
    "padded_vocab_size": 151936,
    "params_dtype": "torch.bfloat16",
    "pos_emb": "rotary",
    "rotary_emb_base": 10000,
    "rotary_pct": 1.0,
    "scale_attn_weights": True,
    "seq_length": 8192,
    "tie_word_embeddings": False,
    "use_dynamic_ntk": True,
    "use_logn_attn": True,
    "vocab_size": 151851,
}
FIELDS = tuple(asdict(QwenConfig.preset("7b")))


def published(size: str = "7b", **changes: object) -> dict:
    return SAME_EVERYWHERE | dict(zip(COLUMNS, SIZES[size], strict=True)) | changes


def with_literal(field: str, literal: str) -> str:
    """A file with this text as a value."""
    return json.dumps(published(**{field: "HERE"})).replace('"HERE"', literal)


def read(folder: Path, content: dict | str | bytes) -> QwenConfig:
    """from_json of a file with this content; a dict may hold NaN and infinity, as Python writes them."""
    path = folder / "config.json"
    if isinstance(content, dict):
        content = json.dumps(content)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return QwenConfig.from_json(path)


def refusal(folder: Path, content: dict | str | bytes) -> str:
    """The message with which the content is refused: an InputError that names the file and is short."""
    with pytest.raises(ValueError, match=r"config\.json: ") as caught:
        read(folder, content)
    assert type(caught.value) is InputError
    assert str(folder) in str(caught.value)
    assert len(str(caught.value)) < 1000 + len(str(folder))
    return str(caught.value)


# The published files


@pytest.mark.parametrize("size", SIZES)
def test_a_published_config_is_the_preset(size: str, tmp_path: Path):
    config = read(tmp_path, published(size))
    assert config == QwenConfig.preset(size)
    assert config.mlp_width == MLP_WIDTHS[size]


@pytest.mark.parametrize("size", SIZES)
def test_a_preset_holds_the_published_values(size: str):
    assert {name: getattr(QwenConfig.preset(size), name) for name in COLUMNS} == dict(
        zip(COLUMNS, SIZES[size], strict=True)
    )


def test_early_spellings_of_the_7b_are_read_and_the_padded_vocabulary_counts(tmp_path: Path):
    assert read(tmp_path, EARLY_7B) == QwenConfig.preset("7b")


def test_old_and_new_spellings_may_stand_side_by_side_when_they_agree(tmp_path: Path):
    assert read(tmp_path, published("7b") | EARLY_7B) == QwenConfig.preset("7b")


def test_epsilon_base_and_sequence_length_are_read_not_assumed(tmp_path: Path):
    config = read(tmp_path, published("72b", layer_norm_epsilon=1e-5, rotary_emb_base=5e5, seq_length=8192))
    assert (config.layer_norm_epsilon, config.rotary_emb_base, config.seq_length) == (1e-5, 5e5, 8192)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_any_encoding_of_json_is_read(encoding: str, tmp_path: Path):
    assert read(tmp_path, json.dumps(published()).encode(encoding)) == QwenConfig.preset("7b")


def test_keys_that_do_not_change_the_computation_are_ignored(tmp_path: Path):
    extra = {"bf16": True, "torch_dtype": "float16", "use_flash_attn": True, "of_tomorrow": {"a": [1, 2]}}
    assert read(tmp_path, published(**extra)) == QwenConfig.preset("7b")


@pytest.mark.parametrize("key", ["model_type", "no_bias", "tie_word_embeddings", "rotary_pct"])
def test_a_file_that_lacks_a_fixed_key_means_its_published_value(key: str, tmp_path: Path):
    config = published()
    del config[key]
    assert read(tmp_path, config) == QwenConfig.preset("7b")


def test_fixed_keys_may_be_null_or_name_all_heads(tmp_path: Path):
    config = published("7b", rope_scaling=None, quantization_config=None, num_key_value_heads=32)
    assert read(tmp_path, config) == QwenConfig.preset("7b")


# Nothing is executed


def test_auto_map_is_never_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    module = tmp_path / "configuration_qwen.py"
    module.write_text(
        "import pathlib; pathlib.Path(__file__).with_name('executed').touch(); raise SystemExit"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    before = set(sys.modules)
    for value in ({"AutoConfig": "configuration_qwen.QWenConfig"}, "configuration_qwen", 7, None):
        assert read(tmp_path, published(auto_map=value)) == QwenConfig.preset("7b")
    assert not (tmp_path / "executed").exists()
    assert "configuration_qwen" not in set(sys.modules) - before


# What is not computed is refused by name


@pytest.mark.parametrize("model_type", ["qwen2", "llama", "Qwen", "", None, 1, ["qwen"]])
def test_another_model_type_is_named(model_type: object, tmp_path: Path):
    message = refusal(tmp_path, published(model_type=model_type))
    assert f"model_type is {model_type!r}" in message
    assert "first-generation Qwen" in message


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("no_bias", False),
        ("no_bias", None),
        ("tie_word_embeddings", True),
        ("rotary_pct", 0.5),
        ("rotary_pct", float("nan")),
        ("rotary_pct", "1.0"),
        ("rotary_pct", True),
        ("no_bias", 1),
        ("tie_word_embeddings", 0),
        ("scale_attn_weights", False),
        ("apply_residual_connection_post_layernorm", True),
        ("activation", "gelu"),
        ("hidden_act", "gelu"),
        ("pos_emb", "learned"),
        ("rope_scaling", {"factor": 4.0, "type": "linear"}),
        ("sliding_window", 4096),
        ("num_key_value_heads", 8),
        ("num_key_value_heads", "32"),
    ],
)
def test_what_is_not_computed_is_refused_by_name(key: str, value: object, tmp_path: Path):
    assert f"{key}={value!r} is not supported" in refusal(tmp_path, published("7b", **{key: value}))


def test_grouped_queries_are_refused_under_the_early_spelling_too(tmp_path: Path):
    assert "num_key_value_heads=8" in refusal(tmp_path, EARLY_7B | {"num_key_value_heads": 8})


# Keys and values


@pytest.mark.parametrize("field", FIELDS)
def test_a_missing_key_is_named(field: str, tmp_path: Path):
    config = published()
    del config[field]
    assert refusal(tmp_path, config).endswith(f"config.json: missing {field}")


def test_all_missing_keys_are_listed_at_once(tmp_path: Path):
    message = refusal(tmp_path, {})
    assert [field for field in FIELDS if field not in message] == []


WHOLE = [
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "kv_channels", "intermediate_size"),
    *("vocab_size", "seq_length"),
]
REAL = ["rotary_emb_base", "layer_norm_epsilon"]
SWITCHES = ["use_dynamic_ntk", "use_logn_attn"]
NO_NUMBER = ["128", "", True, False, None, [128], {}, float("nan"), float("inf"), float("-inf"), 0, -128]


@pytest.mark.parametrize("value", [*NO_NUMBER, 128.0, 1.5, 2**31, 2**63, 10**30], ids=repr)
@pytest.mark.parametrize("field", WHOLE)
def test_a_size_is_a_whole_number_within_reason(field: str, value: object, tmp_path: Path):
    message = refusal(tmp_path, published(**{field: value}))
    assert f"{field}={value!r} must be a whole number from 1 to " in message


@pytest.mark.parametrize("value", [*NO_NUMBER, 1e300, 10**300], ids=lambda value: repr(value)[:10])
@pytest.mark.parametrize("field", REAL)
def test_base_and_epsilon_are_finite_positive_numbers(field: str, value: object, tmp_path: Path):
    message = refusal(tmp_path, published(**{field: value}))
    assert f"{field}={repr(value)[:10]}" in message
    assert "must be a number above " in message


@pytest.mark.parametrize("value", ["true", 0, 1, 1.0, None, []], ids=repr)
@pytest.mark.parametrize("field", SWITCHES)
def test_a_switch_is_true_or_false(field: str, value: object, tmp_path: Path):
    message = refusal(tmp_path, published(**{field: value}))
    assert f"{field}={value!r} must be true or false" in message


@pytest.mark.parametrize("literal", ["NaN", "Infinity", "-Infinity", "1e999", "-1e999"])
@pytest.mark.parametrize("field", [*WHOLE, *REAL])
def test_numbers_that_python_reads_beyond_json_are_refused(field: str, literal: str, tmp_path: Path):
    assert f"{field}={float(literal)!r} must be" in refusal(tmp_path, with_literal(field, literal))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"num_attention_heads": 31},
            "num_attention_heads=31 times kv_channels=128 must be hidden_size=4096",
        ),
        ({"kv_channels": 64}, "num_attention_heads=32 times kv_channels=64 must be hidden_size=4096"),
        ({"hidden_size": 4097}, "must be hidden_size=4097"),
        ({"intermediate_size": 22017}, "intermediate_size=22017 must be even"),
        ({"kv_channels": 127, "hidden_size": 127 * 32}, "kv_channels=127 must be even"),
        ({"kv_channels": 2, "hidden_size": 64}, "kv_channels=2 is too small for use_dynamic_ntk"),
        ({"seq_length": 1}, "seq_length=1 is too small for use_logn_attn"),
    ],
)
def test_sizes_that_contradict_each_other_are_refused(changes: dict, expected: str, tmp_path: Path):
    assert expected in refusal(tmp_path, published("7b", **changes))


def test_what_only_ntk_or_logn_needs_is_not_asked_of_the_72b(tmp_path: Path):
    read(tmp_path, published("72b", kv_channels=2, hidden_size=128))
    read(tmp_path, published("72b", seq_length=1))


@pytest.mark.parametrize(
    ("early", "name", "value"),
    [
        ("n_embd", "hidden_size", 2048),
        ("n_layer", "num_hidden_layers", 24),
        ("n_head", "num_attention_heads", 16),
        ("ffn_hidden_size", "intermediate_size", 11008),
    ],
)
def test_spellings_that_disagree_are_refused(early: str, name: str, value: int, tmp_path: Path):
    message = refusal(tmp_path, published("7b", **{early: value}))
    assert f"{early}={value} disagree" in message
    assert f"{name}={published('7b')[name]}" in message


# Everything at once


WIDTH = "hidden_size='4096' must be"


@pytest.mark.parametrize(
    ("changes", "missing", "parts"),
    [
        (
            {"no_bias": False, "rotary_pct": 0.5, "num_key_value_heads": 8, "n_layer": 31},
            ["kv_channels", "seq_length"],
            ["no_bias=", "rotary_pct=", "num_key_value_heads=", "n_layer=31", "kv_channels, seq_length"],
        ),
        (
            {"hidden_size": "4096", "vocab_size": -1, "use_logn_attn": 1, "rotary_emb_base": 0},
            [],
            [WIDTH, "vocab_size=-1 must be", "use_logn_attn=1 must be", "rotary_emb_base=0 must be"],
        ),
        (
            {"kv_channels": 127, "intermediate_size": 3},
            [],
            ["must be hidden_size=4096", "kv_channels=127 must be even", "intermediate_size=3 must be"],
        ),
        (
            {"no_bias": False, "hidden_size": "4096"},
            ["kv_channels"],
            ["no_bias=False", "missing kv_channels", WIDTH],
        ),
    ],
    ids=["unsupported and missing", "wrong", "contradictions", "unsupported, missing and wrong"],
)
def test_everything_is_in_one_message(changes: dict, missing: list[str], parts: list[str], tmp_path: Path):
    config = {name: value for name, value in published(**changes).items() if name not in missing}
    message = refusal(tmp_path, config)
    assert [part for part in parts if part not in message] == []


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_size", [0] * 100_000),
        ("hidden_size", 10**4000),
        ("vocab_size", "9" * 100_000),
        ("model_type", "x" * 100_000),
        ("rope_scaling", {str(i): i for i in range(10_000)}),
        ("num_key_value_heads", [[1] * 1000] * 1000),
        ("n_embd", "x" * 100_000),
    ],
    ids=lambda value: value if isinstance(value, str) and len(value) < 30 else type(value).__name__,
)
def test_a_message_stays_short_however_long_the_value(key: str, value: object, tmp_path: Path):
    named = {"n_embd": "n_embd", "model_type": "model_type"}.get(key, f"{key}=")
    assert named in refusal(tmp_path, published(**{key: value}))  # which bounds the length


# Files that hold no configuration


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"{} {}", "not valid JSON"),
        (b"hello", "not valid JSON"),
        (b"\x80\x02}q\x00.", "not valid JSON"),
        (bytes(range(256)), "not valid JSON"),
        (b'{"hidden_size": \xff}', "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"a":' * 100_000, "not valid JSON"),
        (b'{"hidden_size": ' + b"9" * 10_000 + b"}", "hidden_size=inf must be a whole number"),
        (b"null", "holds a JSON NoneType, not an object"),
        (b"[]", "holds a JSON list, not an object"),
        (b'"qwen"', "holds a JSON str, not an object"),
        (b"1", "holds a JSON int, not an object"),
    ],
    ids=lambda value: repr(value[:12]),
)
def test_a_file_without_a_json_object_is_refused(content: bytes, expected: str, tmp_path: Path):
    assert expected in refusal(tmp_path, content)


@pytest.mark.parametrize("depth", range(900, 1000, 7))
def test_nesting_near_the_recursion_limit_is_refused_like_any_wrong_value(depth: int, tmp_path: Path):
    nested = "[" * depth + "]" * depth
    refusal(tmp_path, with_literal("rope_scaling", nested))


@pytest.mark.parametrize("digits", [309, 5000, 10**6])
@pytest.mark.parametrize("sign", ["", "-"])
def test_an_integer_that_no_float_can_hold_is_an_infinity(digits: int, sign: str, tmp_path: Path):
    for field in ("hidden_size", "rotary_emb_base", "use_logn_attn"):
        assert f"{field}={sign}inf must be" in refusal(tmp_path, with_literal(field, sign + "9" * digits))
    assert read(tmp_path, with_literal("of_tomorrow", sign + "9" * digits)) == QwenConfig.preset("7b")


def test_a_key_with_two_values_is_refused_and_with_one_twice_is_read(tmp_path: Path):
    text = json.dumps(published())
    assert "'kv_channels' is given twice" in refusal(tmp_path, text[:-1] + ', "kv_channels": 64}')
    nested = text[:-1] + ', "of_tomorrow": {"a": 1, "b": 2, "a": 3}}'
    assert "'a' is given twice" in refusal(tmp_path, nested)
    assert read(tmp_path, text[:-1] + ', "kv_channels": 128}') == QwenConfig.preset("7b")


def test_only_regular_files_are_read(special: tuple[Path, str], tmp_path: Path):
    path, kind = special
    for name in (path, tmp_path / "link.json"):
        if name != path:
            name.symlink_to(path)
        with pytest.raises(InputError, match=f"{name}: cannot be read: it is {kind}, not a file"):
            QwenConfig.from_json(name)


def test_a_file_is_read_up_to_a_bound_however_large_it_is(tmp_path: Path):
    path = tmp_path / "config.json"
    whole = json.dumps(published()).encode()
    path.write_bytes(whole.ljust(LARGEST_JSON))
    assert QwenConfig.from_json(path) == QwenConfig.preset("7b")
    path.write_bytes(whole.ljust(LARGEST_JSON + 1))
    with pytest.raises(InputError, match=r"config\.json: larger than 16 MiB"):
        QwenConfig.from_json(path)
    os.truncate(path, 2**36)  # of which nothing is on the disk
    with pytest.raises(InputError, match=r"config\.json: larger than 16 MiB"):
        QwenConfig.from_json(path)


def test_a_loop_of_links_cannot_be_read(tmp_path: Path):
    (tmp_path / "loop").symlink_to("loop")
    for path in (tmp_path / "loop", tmp_path / "loop" / "config.json"):
        with pytest.raises(InputError, match="cannot be read: Too many levels of symbolic links"):
            QwenConfig.from_json(path)


@pytest.mark.parametrize("value", [10**5000, [10**5000], "a\nb", torch.ones(3, 3)], ids=range(4))
def test_whatever_is_shown_is_one_short_line(value: object):
    assert len(shown(value)) < 200
    assert "\n" not in shown(value)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nowhere.json", r"nowhere\.json: cannot be read: No such file"),
        (".", "cannot be read: it is a folder, not a file"),
        *((path, "cannot be read") for path in ("a\0b", "a\ud800b", "a" * 5000, "")),
    ],
    ids=["missing", "folder", "NUL", "surrogate", "long", "empty"],
)
def test_a_path_of_no_file_cannot_be_read(path: str, message: str):
    with pytest.raises(ValueError, match=message) as caught:
        QwenConfig.from_json(path)
    assert type(caught.value) is InputError


def test_a_path_may_be_a_string_or_a_link(tmp_path: Path):
    config = read(tmp_path, published())
    (tmp_path / "link.json").symlink_to("config.json")
    assert QwenConfig.from_json(str(tmp_path / "link.json")) == config


# Presets and the constructor


@pytest.mark.parametrize("size", ["72B", "0.5b", "", None, 7])
def test_an_unknown_preset_is_refused_with_those_that_exist(size: object):
    with pytest.raises(ValueError, match=r"no preset .*; use one of 1\.8b, 7b, 14b, 72b") as caught:
        QwenConfig.preset(size)
    assert repr(size) in str(caught.value)


def test_the_constructor_checks_as_from_json_does():
    values = asdict(QwenConfig.preset("7b"))
    with pytest.raises(ValueError, match="hidden_size='4096' must be a whole number"):
        QwenConfig(**values | {"hidden_size": "4096"})


def test_a_configuration_cannot_be_changed_behind_its_checks():
    with pytest.raises(AttributeError):
        QwenConfig.preset("7b").hidden_size = 1
