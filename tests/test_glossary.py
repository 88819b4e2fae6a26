"""The tables of names.md: every name and every source is there."""

from __future__ import annotations

import itertools
import re

import pytest
import torch
from conftest import ROOT, WEIGHTS

from qwen_ref import QwenConfig, load_model
from qwen_ref.checkpoint import tensor_table


def tables(heading: str) -> list[list[list[str]]]:
    """The rows of every table under a heading of names.md, the first one's titles included."""
    text = (ROOT / "examples" / "ports" / "names.md").read_text(encoding="utf-8")
    assert text.count(f"\n## {heading}\n") == 1, heading
    section = text.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    found = []
    for is_table, lines in itertools.groupby(section.splitlines(), key=lambda line: line.startswith("|")):
        if is_table:
            rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
            assert len({len(row) for row in rows}) == 1, rows
            found.append([rows[0], *rows[2:]])
    return found


def names(cell: str) -> list[str]:
    """The names in a cell: `a.{b,c}.d` is two of them, – none."""
    if cell == "–":
        return []
    (name,) = re.fullmatch(r"`([^`]+)`", cell).groups()
    before, choices, after = re.fullmatch(r"([^{]*)(?:\{([^}]*)\})?(.*)", name).groups()
    return [f"{before}{choice}{after}" for choice in (choices or "").split(",")]


def of_layer(name: str, layer: int) -> str:
    return name.replace(".N.", f".{layer}.")


def test_every_tensor_has_one_row() -> None:
    config = QwenConfig.preset("72b")
    kinds = {
        tuple(re.sub(r"\.\d+\.", ".N.", name) for name in (spec.name, spec.published)): None
        for spec in tensor_table(config)
    }
    rows = [(row[0], row[1]) for row in tables("Glossary of names")[0][1:]]
    assert [(names(ours), names(published)) for ours, published in rows] == [([a], [b]) for a, b in kinds]


def test_no_two_tensors_share_a_name() -> None:
    titles, *rows = tables("Glossary of names")[0]
    for column in range(len(titles)):
        found = [name for row in rows for name in names(row[column])]
        assert len(found) == len(set(found)), titles[column]
        assert all(
            ("N" in name) == rows[k][0].startswith("`blocks.")
            for k, row in enumerate(rows)
            for name in names(row[column])
        )


def test_transformers_has_these_names_for_these_values() -> None:
    pytest.importorskip("transformers", reason="an extra: `make parity` installs it")
    from transformers import AutoModelForCausalLM, LlamaConfig

    from qwen_ref.bench.peers import qwen2

    ours = load_model(WEIGHTS, "float32")
    theirs = qwen2(ours).state_dict()
    seen = set()
    for row in tables("Glossary of names")[0][1:]:
        (name,) = names(row[0])
        for layer in range(len(ours.blocks) if ".N." in name else 1):
            parts = [of_layer(part, layer) for part in names(row[2])]
            joined = torch.cat(
                [theirs[part] for part in parts]
            )  # the rows of q, of k and of v, one after another
            assert torch.equal(joined, ours.get_parameter(of_layer(name, layer))), parts
            seen |= set(parts)
    assert seen == set(theirs)

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": len(ours.blocks)}
    llama = AutoModelForCausalLM.from_config(LlamaConfig(**sizes, num_attention_heads=2, vocab_size=64))
    assert set(llama.state_dict()) == {name for name in seen if not name.endswith(".bias")}


def test_settings_are_those_of_the_configuration() -> None:
    _, settings = tables("Glossary of names")
    for row in settings[1:]:
        key = re.match(r"`(\w+)`", row[0]).group(1)
        assert key in QwenConfig.__dataclass_fields__


def test_every_cell_of_the_comparison_names_sources_that_are_listed() -> None:
    comparison, sources = tables("Qwen, Llama, GPT-2, Qwen2")
    known = {key for row in sources[1:] for key in row[0].split(", ")}
    used = set()
    for what, *cells in comparison[1:]:
        for cell in cells:
            cited = [
                source for bracket in re.findall(r"\[([^\]]+)\]", cell) for source in bracket.split(", ")
            ]
            assert cited or cell == "–", (what, cell)
            used |= {source.split()[0] for source in cited if not source.startswith("`")}
    assert used == known


def test_what_the_comparison_says_of_qwen_is_in_the_presets() -> None:
    rows = {row[0]: row[1] for row in tables("Qwen, Llama, GPT-2, Qwen2")[0][1:]}
    presets = {size: QwenConfig.preset(size) for size in ("1.8b", "7b", "14b", "72b")}
    lengths = [presets[size].seq_length for size in ("1.8b", "7b", "14b", "72b")]
    assert lengths == [8192, 8192, 2048, 32768]
    assert rows["trained length"].startswith("8,192; 2,048 in the 14B, 32,768 in the 72B")
    assert {preset.layer_norm_epsilon for preset in presets.values()} == {1e-6}
    assert rows["its epsilon"].startswith("1e-6 ")
    assert [preset.vocab_size for preset in presets.values()] == [151936, 151936, 152064, 152064]
    assert rows["rows of the embedding"].startswith("151,936; 152,064 in the 14B and 72B")
    assert {preset.kv_channels for preset in presets.values()} == {128}
    assert rows["size of a head"].startswith("128 ")
    widths = {size: preset.mlp_width / preset.hidden_size for size, preset in presets.items()}
    assert widths.pop("72b") == 3
    assert all(width == pytest.approx(8 / 3, rel=0.02) for width in widths.values())
