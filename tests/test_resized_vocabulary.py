"""A fine-tune's vocabulary may have any number of rows: it runs on 2, 4 and 8 ranks, the last with fewer."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import resized_worker
import torch
from conftest import GOLDEN, relative_rms
from forked_ranks import run_ranks
from resized_worker import IDS
from safetensors.torch import load_file, save_file

from qwen_ref import QwenConfig, load_model
from qwen_ref.checkpoint import tensor_table
from qwen_ref.fast.layers import fasten
from qwen_ref.generate import generate
from qwen_ref.parallel import Group


def write(folder: Path, vocab_size: int) -> Path:
    """A random checkpoint with eight heads and so many rows."""
    raw = json.loads((GOLDEN / "ntk_logn" / "config.json").read_text())
    raw |= {"vocab_size": vocab_size, "kv_channels": 32, "num_attention_heads": 8, "num_hidden_layers": 1}
    raw |= {"hidden_size": 256, "intermediate_size": 512}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(raw))
    generator = torch.Generator().manual_seed(vocab_size)
    table = tensor_table(QwenConfig.from_json(folder / "config.json"))
    tensors = {
        spec.published: torch.randn(spec.shape, generator=generator) / math.sqrt(spec.shape[-1])
        for spec in table
    }
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize(("vocab_size", "ranks"), [(321, 2), (322, 4), (323, 8), (329, 8)])
def test_any_number_of_rows_gives_what_one_rank_gives(vocab_size: int, ranks: int, tmp_path: Path) -> None:
    folder = write(tmp_path / "model", vocab_size)
    run_ranks(ranks, tmp_path, resized_worker.main, folder, tmp_path)
    alone = load_model(folder, "float64")
    want = alone(IDS)
    steps = [[step.token, step.logprob] for step in generate(alone, IDS[0].tolist(), max_new_tokens=8)]
    int8 = fasten(load_model(folder, "float32"), "int8")(IDS)
    held = []
    for rank in range(ranks):
        found = load_file(tmp_path / f"{rank}.safetensors")
        told = json.loads((tmp_path / f"{rank}.json").read_text())
        assert found["plain"].shape == (1, 8, vocab_size)
        assert relative_rms(found["plain"], want) < 1e-14  # sums of parts: the last bits of float64
        assert relative_rms(found["fast None"], want) < 1e-6
        # Rounded by row, as on one rank; only inputs cut by columns have scales of their own on each rank.
        assert relative_rms(found["fast int8"], int8) < 1e-2
        assert relative_rms(found["fast int4"], want) < 0.2
        assert [token for token, _ in told["steps"]] == [token for token, _ in steps]
        assert told["steps"][0][1] == pytest.approx(steps[0][1], rel=1e-12)
        held.append(told["rows"])
    rows = -(-vocab_size // ranks)
    assert held == [[rows, rows]] * (ranks - 1) + [[vocab_size - (ranks - 1) * rows] * 2]


def test_the_shares_of_all_ranks_are_all_rows() -> None:
    for rows in (7, 320, 321, 151_936, 151_937):
        for size in (1, 2, 4):
            shares = [Group(rank, size).share(rows) for rank in range(size)]
            assert [row for share in shares for row in share] == list(range(rows))
            assert all(len(share) == -(-rows // size) for share in shares[:-1])


@pytest.mark.parametrize("size", ["1.8b", "7b", "14b", "72b"])
def test_published_sizes_with_any_vocabulary_are_cut_for_2_4_and_8_ranks(size: str) -> None:
    values = vars(QwenConfig.preset(size))
    for vocab_size in (151_851, 151_857, 151_937, 200_003):
        for ranks in (2, 4, 8):
            QwenConfig(**{**values, "vocab_size": vocab_size}).check_ranks(ranks)


def test_a_rank_without_any_row_is_refused() -> None:
    values = vars(QwenConfig.preset("72b"))
    config = QwenConfig(**{**values, "vocab_size": 66})
    with pytest.raises(ValueError, match=r"^vocab_size=66 cannot be split over 64 ranks; use 1, 2, 4 or 8$"):
        config.check_ranks(64)
    config.check_ranks(8)
