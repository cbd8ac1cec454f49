"""Token embeddings: rows of the model's table, scaled and padded; damaged and foreign folders are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from starflow.conditioning import load_conditioner
from starflow.conditioning.base import ConditionerSpec
from starflow.conditioning.text import TokenEmbeddings, read_embedding_table
from starflow.errors import UserError
from starflow.io.files import write_tensors
from tests.conditioning.conftest import WORDS, save_tokenizer

WIDTH, SIZE = 16, 6


def save(folder: Path, rows: int = len(WORDS), dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A folder with a tokenizer and a random table, which is returned."""
    save_tokenizer(folder)
    (folder / "config.json").write_text("{}")
    table = torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(0)).to(dtype)
    write_tensors(folder / "model.safetensors", {"model.embed_tokens.weight": table, "model.norm": torch.ones(1)})
    return table


def test_the_condition_is_the_scaled_rows_of_the_tokens(tmp_path: Path) -> None:
    table = save(tmp_path)
    conditioner = TokenEmbeddings.from_pretrained(str(tmp_path), SIZE)
    states = conditioner.encode(["a red apple", "tree", ""])
    assert states.shape == (3, SIZE, WIDTH)
    ids = [WORDS.index(word) for word in ("a", "red", "apple", "</s>")]
    torch.testing.assert_close(states[0, :4], 4 * table[ids])  # sqrt(16)
    assert torch.count_nonzero(states[0, 4:]) == 0, "padding is zero"
    assert torch.equal(states[1], conditioner.encode(["tree"])[0]), "the same in any batch"
    for empty in (states[2], conditioner.null(2)[1], conditioner.encode(["  \n"])[0]):
        torch.testing.assert_close(empty[0], 4 * table[WORDS.index("</s>")])
        assert torch.count_nonzero(empty[1:]) == 0


def test_a_long_prompt_is_cut(tmp_path: Path) -> None:
    save(tmp_path)
    conditioner = TokenEmbeddings.from_pretrained(str(tmp_path), SIZE)
    with pytest.warns(UserWarning, match="1 of 1 prompts over the limit of 6 tokens"):
        states = conditioner.encode(["a red apple on the table with eyes"])
    assert states.shape == (1, SIZE, WIDTH)
    assert torch.count_nonzero(states.abs().sum(-1)) == SIZE


def test_the_scale_is_rounded_to_the_tables_precision(tmp_path: Path) -> None:
    """sqrt(16) is exact; of a width whose root is not, bfloat16 rounds the factor first, as Gemma does."""
    table = torch.randn(3, 2304, dtype=torch.bfloat16)
    write_tensors(tmp_path / "model.safetensors", {"embed_tokens.weight": table})
    found = read_embedding_table(tmp_path)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, table * 48)
    table = torch.randn(3, 3072, dtype=torch.bfloat16)
    write_tensors(tmp_path / "model.safetensors", {"embed_tokens.weight": table})
    assert torch.equal(read_embedding_table(tmp_path), table * 55.5), "55.43 in bfloat16"


def test_the_spec_builds_it_again(tmp_path: Path) -> None:
    save(tmp_path)
    spec = ConditionerSpec("embeddings", SIZE, WIDTH, str(tmp_path))
    assert load_conditioner(spec).spec == spec
    with pytest.raises(UserError, match=f"gives 6 tokens of width {WIDTH}, the model expects 6 of width 17"):
        load_conditioner(ConditionerSpec("embeddings", SIZE, 17, str(tmp_path)))


def test_folders_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    save(tmp_path, rows=len(WORDS) - 1)
    with pytest.raises(UserError, match=f"has {len(WORDS)} tokens and {len(WORDS) - 1} embeddings: fetch it again"):
        TokenEmbeddings.from_pretrained(str(tmp_path), SIZE)
    write_tensors(tmp_path / "model.safetensors", {"lm_head.weight": torch.zeros(2, 2)})
    with pytest.raises(UserError, match="holds no token embeddings"):
        TokenEmbeddings.from_pretrained(str(tmp_path), SIZE)
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match="is not a whole safetensors file"):
        read_embedding_table(tmp_path)
