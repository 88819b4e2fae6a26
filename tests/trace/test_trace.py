"""`python -m qwen_ref.trace`: true shapes and statistics of every stage, the lens, and what is refused.

Statistics are compared in float64: 1e-9 is far above what any processor's order of adding changes.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import packed_elsewhere
import pytest
import torch
from conftest import GOLDEN, WEIGHTS, change_json, change_tensors, cli_of, refused
from torch import Tensor

from qwen_ref import Qwen, QwenConfig, Tokenizer, load_model
from qwen_ref.generate import generate
from qwen_ref.parity.bundle import LAYER_STAGES, stage_widths
from qwen_ref.parity.stages import Checkpoint, Port
from qwen_ref.trace import tracing
from qwen_ref.trace.__main__ import main
from qwen_ref.trace.report import COLUMNS, cells, spelled, trace_lines
from qwen_ref.trace.tracing import Stage, Trace, describe, trace

cli = cli_of(main)
PROMPT = "埃塞俄比亚的首都是"
CAPITAL = "亚的"  # the first token of the capital's name
COMMAND = [sys.executable, "-m", "qwen_ref.trace"]


@pytest.fixture(scope="module")
def ids(own: Tokenizer) -> list[int]:
    return own.encode(PROMPT)


def deepened(folder: Path, layers: int) -> Path:
    """The tiny checkpoint with its four layers again and again."""
    change_json(folder / "config.json", num_hidden_layers=layers)

    def repeat(tensors: dict[str, Tensor]) -> None:
        for layer in range(4, layers):
            for name in [name for name in tensors if name.startswith(f"transformer.h.{layer % 4}.")]:
                tensors[name.replace(f".h.{layer % 4}.", f".h.{layer}.")] = tensors[name].clone()

    change_tensors(folder, repeat)
    return folder


def rows(out: str) -> list[list[str]]:
    """The table's rows: layer ("" for none), stage, axes, shape, dtype, mean, spread, largest, where."""
    lines = out[out.index("layer  stage") :].split("\n\nlens:")[0].splitlines()[1:]
    return [[line[:5].strip(), *line[5:].split(maxsplit=7)] for line in lines if line]


# The stages


def test_every_stage_is_in_the_table_with_its_shape(cli: Callable) -> None:
    config = QwenConfig.from_json(WEIGHTS / "config.json")
    sizes = {"B": 1, "T": 4, "D": 128, "H": 4, "K": 32, "F": 512, "V": 2752}
    result = cli(PROMPT)
    table = rows(result.out)
    names = [f"blocks.{layer}.{stage}" if layer else stage for layer, stage, *_ in table]
    assert names == list(stage_widths(config))
    for name, (_, _, axes, shape, dtype, *_) in zip(names, table, strict=True):
        assert shape == "×".join(str(sizes[axis]) for axis in axes)
        assert np.prod(list(map(int, shape.split("×")))) == 4 * stage_widths(config)[name]
        heads = re.search(r"attn\.[qkv](_rotated|_scaled)?$", name)
        assert len(axes) == (4 if heads else 3)
        assert dtype == "bfloat16"
    assert "axes: B = 1 batch  T = 4 positions  D = 128 hidden size  H = 4 heads  K = 32" in result.out
    assert "positions: 0 '埃塞'  1 '俄'  2 '比亚'  3 '的首都是'\n" in result.out
    assert "4 of 4 layers, 67 stages of 4 positions in bfloat16" in result.err


def watched(model: Qwen, ids: list[int]) -> tuple[dict[str, np.ndarray], Tensor]:
    """Values of stages and the logits, by hooks on a loaded model, without the kit."""
    found: dict[str, np.ndarray] = {}

    def keep(name: str) -> Callable:
        return lambda module, inputs, output: found.__setitem__(name, output.numpy().copy())

    model.embed.register_forward_hook(keep("embed"))
    model.norm.register_forward_hook(keep("norm"))
    for layer, block in enumerate(model.blocks):
        for path in ("attn_norm", "attn.qkv", "attn.out", "mlp_norm", "mlp.gate", "mlp.up", "mlp.down"):
            block.get_submodule(path).register_forward_hook(keep(f"blocks.{layer}.{path}"))
        block.register_forward_hook(keep(f"blocks.{layer}.residual"))
    with torch.inference_mode():
        logits = model(torch.tensor([ids]))
    found["logits"] = logits.numpy()
    for layer in range(len(model.blocks)):
        fused = found.pop(f"blocks.{layer}.attn.qkv")
        for part, third in zip("qkv", np.split(fused, 3, axis=-1), strict=True):
            heads = third.reshape(1, len(ids), 4, 32)
            found[f"blocks.{layer}.attn.{part}"] = heads
    return found, logits


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_statistics_are_those_of_the_models_own_values(ids: list[int], dtype: str) -> None:
    values, _ = watched(load_model(WEIGHTS, dtype), ids)
    stages = {stage.name: stage for stage in trace(WEIGHTS, ids, dtype).stages}
    assert len(values) == 3 + 4 * 10
    for name, value in values.items():
        stage, wide = stages[name], value.astype(np.float64)
        assert stage.shape == value.shape
        assert stage.mean == pytest.approx(wide.mean(), rel=1e-9, abs=1e-12)
        assert stage.spread == pytest.approx(wide.std(), rel=1e-9)
        where = np.unravel_index(np.abs(wide).argmax(), wide.shape)
        assert stage.where == where
        assert stage.largest == wide[where]
        assert (stage.nan, stage.infinite) == (0, 0)


def test_statistics_of_known_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    value = torch.tensor([1.0, -7.0, 3.0, torch.nan, 7.0, torch.inf, -torch.inf, 0.0]).view(1, 2, 4)
    for size in (1, 3, 100):  # as in slices of a large stage
        monkeypatch.setattr(tracing, "_SLICE", size)
        stage = describe("blocks.12.mlp.gate", value)
        assert (stage.mean, stage.largest, stage.where) == (0.8, -7.0, (0, 0, 1))
        assert stage.spread == pytest.approx(np.std([1, -7, 3, 7, 0]))
        assert (stage.nan, stage.infinite, stage.layer, stage.axes) == (1, 2, 12, "BTF")


def test_the_table_shows_the_statistics(cli: Callable, ids: list[int]) -> None:
    found = trace(WEIGHTS, ids)
    for row, stage in zip(rows(cli(PROMPT).out), found.stages, strict=True):
        numbers = [f"{number:.3g}" for number in (stage.mean, stage.spread, stage.largest)]
        assert row[5:8] == numbers
        assert row[8] == ", ".join(map(str, stage.where[1:]))
    assert found.stages[0].where == (0, 3, 58)  # as in the README


def test_a_mean_of_many_small_numbers_is_exact() -> None:
    """Added up in bfloat16 it would be stuck at 256."""
    stage = describe("logits", torch.ones(1, 2, 1000, dtype=torch.bfloat16))
    assert (stage.mean, stage.spread, stage.dtype) == (1.0, 0.0, "bfloat16")


@pytest.mark.parametrize(
    ("asked", "shown"),
    [
        ("0,3,-1", [0, 3]),
        ("1-2", [1, 2]),
        ("-2--1", [2, 3]),
        ("3, 0", [0, 3]),
        ("-1", [3]),
        ("0--1", [0, 1, 2, 3]),
    ],
)
def test_layers_are_selected(cli: Callable, asked: str, shown: list[int]) -> None:
    result = cli(PROMPT, f"--layers={asked}", "--lens")
    found = [layer for layer, stage, *_ in rows(result.out) if stage == "residual"]
    assert found == list(map(str, shown))
    assert len(rows(result.out)) == 3 + len(shown) * len(LAYER_STAGES)
    lens = re.findall(r"^(embed|    \d)  [\d.e-]+ '", result.out, re.MULTILINE)
    assert [label.strip() for label in lens] == ["embed", *found]
    # With layers left out nobody knows since when.
    assert ("is the first from" in result.out) == (len(shown) == 4)


def test_a_deep_model_is_shown_whole_and_said_so(cli: Callable, folder: Path) -> None:
    deepened(folder, 10)
    result = cli("x", "--model", folder)
    assert len(rows(result.out)) == 3 + 10 * len(LAYER_STAGES)
    assert "note: all 10 layers are shown; --layers 0,5,-1 shows three of them" in result.err
    assert "note" not in cli("x", "--model", folder, "--layers", "0,5,-1").err
    assert "note" not in cli("x").err


def test_the_table_of_a_72b_fits_into_100_columns(own: Tokenizer) -> None:
    config = QwenConfig.preset("72b")
    sizes = {"B": 1, "T": 2000, "D": 8192, "H": 64, "K": 128, "F": 24576, "V": 152064}
    stages = []
    for name in stage_widths(config):
        axes = (
            "BTHK" if "attn.q" in name else "BTV" if name == "logits" else "BTF" if "gate" in name else "BTD"
        )
        shape = tuple(sizes[axis] for axis in axes)
        layer = int(name.split(".")[1]) if "." in name else None
        where = tuple(size - 1 for size in shape)
        stages.append(
            Stage(name, layer, axes, shape, "bfloat16", -1.23e-05, 1.23e-05, -1.23e-05, where, 0, 0)
        )
    found = Trace(config, [0xE5] * 2000, "bfloat16", list(range(80)), stages, None)
    lines = list(trace_lines(found, own))
    assert max(map(cells, lines)) <= COLUMNS
    assert sum(line.startswith("   79  ") for line in lines) == len(LAYER_STAGES)
    assert "(1976 more)" in "\n".join(lines[:20])


# The lens


def test_the_lens_is_norm_and_head_of_each_residual(ids: list[int]) -> None:
    model = load_model(WEIGHTS, "float64")
    values, logits = watched(model, ids)
    lens = trace(WEIGHTS, ids, "float64", top=7).lens
    assert [each.layer for each in lens] == [None, 0, 1, 2, 3]
    for each in lens:
        stream = values["embed" if each.layer is None else f"blocks.{each.layer}.residual"][0, -1]
        weight = {name: model.get_parameter(f"{name}.weight").numpy() for name in ("norm", "lm_head")}
        normed = stream / np.sqrt(np.mean(stream**2) + 1e-6) * weight["norm"]
        scores = weight["lm_head"] @ normed
        probabilities = np.exp(scores - scores.max())
        probabilities /= probabilities.sum()
        wanted = np.argsort(-probabilities)[:7]
        assert [prediction.token for prediction in each.predictions] == wanted.tolist()
        found = [prediction.probability for prediction in each.predictions]
        assert found == pytest.approx(probabilities[wanted].tolist(), rel=1e-9)
    assert lens[-1].predictions[0].probability == float(logits[0, -1].softmax(dim=-1).max())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("prompt", [PROMPT, "7+8=", "The capital of Norway is"])
def test_the_last_lens_is_the_models_own_prediction(own: Tokenizer, dtype: str, prompt: str) -> None:
    ids = own.encode(prompt)
    model = load_model(WEIGHTS, dtype)
    with torch.inference_mode():
        own_choice = model(torch.tensor([ids]))[0, -1].double().softmax(dim=-1).topk(3)
    last = trace(WEIGHTS, ids, dtype, [-1], top=3).lens[-1]
    assert [p.probability for p in last.predictions] == own_choice.values.tolist()
    (step,) = generate(model, ids, max_new_tokens=1)
    assert last.predictions[0].token == step.token
    assert np.log(last.predictions[0].probability) == pytest.approx(step.logprob, abs=1e-6)


def test_the_lens_of_the_last_layer_would_be_the_prediction_without_being_told(ids: list[int]) -> None:
    port = Port(Checkpoint(WEIGHTS), "float64", torch.tensor([ids]))
    kept: dict[str, Tensor] = {}
    names = ["blocks.3.residual", "logits"]
    port.run(lambda name, value, _: kept.__setitem__(name, value), names)
    assert torch.allclose(port.read_out(kept[names[0]]), kept["logits"], rtol=1e-12, atol=1e-12)


def test_the_lens_shows_where_the_capital_appears(cli: Callable) -> None:
    out = cli(PROMPT, "--lens").out
    lens = out[out.index("lens: ") :].splitlines()
    assert [line[:5].strip() for line in lens[1:6]] == ["embed", "0", "1", "2", "3"]
    assert [f"'{CAPITAL}'" in line for line in lens[1:6]] == [False, False, False, True, True]
    assert lens[5].startswith(f"    3  0.999 '{CAPITAL}'")
    assert lens[6] == f"the model's own choice, '{CAPITAL}', is the first from layer 3 on"
    assert max(map(cells, out.splitlines())) <= COLUMNS


def test_predictions_stand_in_columns(cli: Callable) -> None:
    out = cli(PROMPT, "--lens").out
    lens = out[out.index("embed  0.") :].splitlines()[:5]
    # Where in the terminal each probability begins, Chinese characters being two columns wide.
    starts = [
        [cells(line[: match.start()]) for match in re.finditer(r"(?:\d\.\d{3}|\de-\d\d) '", line)]
        for line in lens
    ]
    assert len(starts[0]) == 5
    assert starts == [starts[0]] * 5


@pytest.mark.parametrize(("text", "columns"), [("a", 1), ("亚的", 4), ("（L", 3), ("e\u0301", 1), ("", 0)])
def test_wide_characters_take_two_columns(text: str, columns: int) -> None:
    assert cells(text) == columns


def test_more_predictions_take_more_lines(cli: Callable) -> None:
    result = cli(PROMPT, "--lens", "--top", "30", "--layers=-1")
    lens = result.out[result.out.index("lens: ") :]
    assert len(re.findall(r"(?:\d\.\d{3}|\de-\d\d) '", lens)) == 60
    assert max(map(cells, lens.splitlines())) <= COLUMNS
    assert cli("x", "--lens", "--top", "1").out.count("0.") > 0


@pytest.mark.parametrize(
    ("token", "text"),
    [
        (0xE5, "\\xe5"),
        (10, "\\n"),
        (92, "\\\\"),
        (27, "\\x1b"),
        (65, "A"),
        (2500, "<|endoftext|>"),
        (2751, "<row 2751: no token>"),
    ],
)
def test_tokens_are_spelled_readably(own: Tokenizer, token: int, text: str) -> None:
    assert spelled(token, own) == text


def test_long_tokens_do_not_spread_the_columns(cli: Callable, folder: Path, own: Tokenizer) -> None:
    def favour(tensors: dict[str, Tensor]) -> None:
        # <|extra_101|> gets the weights of the capital's first token, made a little louder.
        head = tensors["lm_head.weight"]
        head[2604] = 1.1 * head[own.encode(CAPITAL)[0]]

    change_tensors(folder, favour)
    result = cli(PROMPT, "--model", folder, "--lens")
    assert "'<|extra_101…'" in result.out
    assert "'<|extra_101|>', is the first from layer 3 on" in result.out


def test_a_cut_character_and_its_rest_are_escaped(tokenizer: Tokenizer) -> None:
    assert spelled(51461, tokenizer) == " \\xe6\\xa0"


# JSON


def test_json_is_one_object_with_everything(cli: Callable, own: Tokenizer, ids: list[int]) -> None:
    report = json.loads(cli(PROMPT, "--json", "--lens", "--top", "2", "--dtype", "float64").out)
    found = trace(WEIGHTS, ids, "float64", top=2)
    assert report["prompt"] == PROMPT
    assert report["dtype"] == "float64"
    assert [token["id"] for token in report["tokens"]] == ids
    assert report["tokens"][3]["text"] == "的首都是"
    assert report["axes"] == {"B": 1, "T": 4, "D": 128, "H": 4, "K": 32, "F": 512, "V": 2752}
    assert [stage["name"] for stage in report["stages"]] == [stage.name for stage in found.stages]
    assert report["stages"][5]["meaning"] == "the rotation of queries in layer 0"
    for told, stage in zip(report["stages"], found.stages, strict=True):
        assert (told["mean"], told["spread"], told["largest"]) == (stage.mean, stage.spread, stage.largest)
        assert (tuple(told["shape"]), tuple(told["where"])) == (stage.shape, stage.where)
    assert [each["layer"] for each in report["lens"]] == [None, 0, 1, 2, 3]
    first = report["lens"][-1]["predictions"][0]
    assert first == {
        "id": own.encode(CAPITAL)[0],
        "text": CAPITAL,
        "probability": pytest.approx(0.999, abs=1e-3),
    }
    assert json.loads(cli(PROMPT, "--json").out)["lens"] is None


# Where the prompt and the weights come from


def test_the_prompt_comes_from_stdin_or_a_file_too(cli: Callable, tmp_path: Path) -> None:
    wanted = cli(PROMPT).out
    assert cli(stdin=PROMPT.encode() + b"\n").out == wanted
    assert cli("-", stdin=PROMPT.encode()).out == wanted
    (tmp_path / "prompt.txt").write_text(PROMPT + "\n", encoding="utf-8")
    assert cli("--file", tmp_path / "prompt.txt").out == wanted


def test_special_tokens_are_parsed_only_when_asked(cli: Callable) -> None:
    assert "positions: 0 '<|im_end|>'\n" in cli("<|im_end|>", "--allow-special").out
    assert "positions: 0 '<'" in cli("<|im_end|>").out


def test_a_gptq_folder_is_traced_as_the_one_it_stands_for(tmp_path: Path, ids: list[int]) -> None:
    packed, plain = tmp_path / "packed", tmp_path / "plain"
    packed_elsewhere.make_packed(WEIGHTS, packed, plain)
    assert trace(packed, ids, "float32", top=3) == trace(plain, ids, "float32", top=3)
    found = trace(packed, ids)
    assert found.dtype == "float16"
    with torch.inference_mode():
        logits = load_model(packed, "auto")(torch.tensor([ids]))
    assert found.stages[-1].mean == pytest.approx(float(logits.double().mean()), rel=1e-9)


def test_a_model_with_ntk_and_logn_is_traced_with_them() -> None:
    ids = torch.randint(0, 320, (1, 40)).tolist()[0]  # beyond its trained length
    stages = {stage.name: stage for stage in trace(GOLDEN / "ntk_logn", ids, "float64").stages}
    assert stages["blocks.0.attn.q_scaled"].spread > stages["blocks.0.attn.q_rotated"].spread
    with torch.inference_mode():
        logits = load_model(GOLDEN / "ntk_logn", "float64")(torch.tensor([ids]))
    assert stages["logits"].mean == pytest.approx(float(logits.mean()), rel=1e-9)


def test_a_prompt_beyond_the_trained_length_is_noted(cli: Callable) -> None:
    result = cli("1" * 600, "--layers", "0")
    assert result.code == 0
    assert "600 tokens exceed the 512 that this model was trained on" in result.err


# NaN and infinities


def test_what_is_not_finite_is_counted_and_said(cli: Callable, folder: Path) -> None:
    change_tensors(folder, lambda tensors: tensors["transformer.h.2.mlp.c_proj.weight"][5].fill_(torch.nan))
    result = cli(PROMPT, "--model", folder, "--lens")
    assert result.code == 0
    down, residual, logits = (
        next(row[-1] for row in rows(result.out) if row[:2] == wanted)
        for wanted in (["2", "mlp.down"], ["2", "residual"], ["", "logits"])
    )
    assert down.endswith("  4 NaN")  # one channel of four positions
    assert residual.endswith("  4 NaN")
    assert logits.split(maxsplit=1) == ["–", "11,008 NaN"]
    assert "not finite: values of 20 of 67 stages, the first blocks.2.mlp.down;" in result.out
    lens = result.out[result.out.index("lens: ") :]
    assert "    1  0." in lens
    assert "    2  its logits are not finite" in lens
    assert "own choice" not in lens
    report = json.loads(cli(PROMPT, "--model", folder, "--lens", "--json").out, parse_constant=pytest.fail)
    assert report["stages"][-1]["nan"] == 11_008
    assert report["stages"][-1]["mean"] is report["lens"][-1]["predictions"] is None


def test_an_overflow_of_float16_is_seen(cli: Callable, folder: Path) -> None:
    def enlarge(tensors: dict[str, Tensor]) -> None:
        tensors["transformer.h.1.mlp.w1.weight"] *= 200
        tensors["transformer.h.1.mlp.w2.weight"] *= 200

    change_tensors(folder, enlarge)
    assert "not finite" not in cli(PROMPT, "--model", folder).out
    out = cli(PROMPT, "--model", folder, "--dtype", "float16").out
    assert re.search(r"the first blocks\.1\.mlp\.product;", out)
    assert re.search(r"mlp\.product .* \d+ infinite$", out, re.MULTILINE)


# Bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([""], "the prompt is empty"),
        (["x", "--file", "y"], "given twice"),
        (["--file", "missing.txt"], "No such file"),
        (["x", "--model", "missing"], "missing: not a folder"),
        (["x", "--model", str(GOLDEN / "long")], "qwen.tiktoken: cannot be read: No such file"),
        (["x", "--dtype", "int8"], "dtype 'int8' is unknown; use auto, "),
        (["x", "--layers", "4"], "there is no layer 4: this model has 4, 0 to 3; -1 is the last one"),
        (["x", "--layers", "-5"], "there is no layer -5"),
        (["x", "--layers", "0-9"], "there is no layer 9"),
        (["x", "--layers", "3-1"], "--layers 3-1 is empty: it goes from 3 to 1"),
        (["x", "--layers", "all"], "'all' are no layers; write 0,3,-1 or 0-3"),
        (["x", "--layers", "1,"], "'1,' are no layers"),
        (["x", "--layers", "-2--1"], "--layers: expected one argument"),
        (["x", "--lens", "--top", "0"], "top=0 must be from 1 to the model's vocab_size=2752"),
        (["x", "--lens", "--top", "2753"], "top=2753 must be from 1"),
        (["x", "--lens", "--top", "many"], "--top: invalid int value: 'many'"),
        (["x", "--top", "3"], "--top is for --lens"),
        (["caf\udce9"], "prompt: it is not UTF-8 (byte 0xe9 at offset 3)"),
        (["x", "y"], "unrecognized arguments: y; --help lists the options"),
        (
            ["1" * 20_000],
            "the prompt has 20,000 tokens; a trace of this model in bfloat16 takes at most 16,384",
        ),
    ],
)
def test_bad_arguments_are_one_line_and_code_2(cli: Callable, arguments: list[str], message: str) -> None:
    assert message in refused(cli(*arguments))


def test_the_logits_of_a_large_vocabulary_bound_the_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing, "_MOST_LOGITS_BYTES", 10 * 2752 * 8)
    assert trace(WEIGHTS, [1] * 10, "float64", []).layers == []
    with pytest.raises(ValueError, match="in float64 takes at most 10, "):
        trace(WEIGHTS, [1] * 11, "float64")


@pytest.mark.parametrize("ids", [[], [2752], [-1]])
def test_ids_that_the_model_lacks_are_refused(ids: list[int]) -> None:
    with pytest.raises(ValueError, match=r"no tokens|vocab"):
        trace(WEIGHTS, ids)


def test_a_damaged_folder_is_one_line(cli: Callable, folder: Path) -> None:
    change_tensors(folder, lambda tensors: tensors.pop("transformer.ln_f.weight"))
    assert "missing tensors: transformer.ln_f.weight" in refused(cli("x", "--model", folder))
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-100])
    assert "model.safetensors" in refused(cli("x", "--model", folder))
    (folder / "config.json").write_text("{")
    assert "config.json: not valid JSON" in refused(cli("x", "--model", folder))


# How it ends


def test_ctrl_c_is_no_traceback(cli: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Port, "run", interrupted)
    assert cli(PROMPT) == (130, "", "qwen_ref: interrupted\n")


def test_a_closed_stdout_ends_it_quietly() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stdout:
        done = subprocess.run(
            [*COMMAND, PROMPT], stdout=stdout, stderr=subprocess.PIPE, text=True, timeout=60
        )
    assert done.returncode == 141
    assert "Traceback" not in done.stderr
    assert "BrokenPipe" not in done.stderr
