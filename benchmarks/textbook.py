"""Time a textbook decoder of our own models: eager PyTorch, one token at a time.

What one writes from the paper: a cache of keys and values, allocated once, that every token extends; keys as the linear
layer gives them, so that the whole cache is rotated at each token; the condition first, in one pass; condition and null
condition as one batch in the blocks that see it. No packed weights, nothing compiled, no graph. It draws the pictures
that `starflow.sample` draws, which a test checks.

    python benchmarks/textbook.py        # seconds of a batch of 4 of the model that `starflow bench sample` times

Shapes: B pictures, R rows (twice B with guidance), T tokens, L positions of the cache, H head width, C token channels.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from starflow.bench.limits import Baseline, DrawTask
from starflow.flow import block as affine
from starflow.flow.block import AutoregressiveBlock
from starflow.flow.model import Flow
from starflow.flow.tokens import in_order
from starflow.nn.attention import Attention, Layer
from starflow.nn.layers import rotate
from starflow.sampling import guidance as rules


def baselines(task: DrawTask) -> list[Baseline]:
    """The same batch, by this file."""
    note = "eager, one token at a time, the whole key cache rotated at each token; the same pictures"
    return [Baseline("textbook decoder", lambda: decode(task), 1.0, note)]


@torch.no_grad()
def decode(task: DrawTask) -> Tensor:
    """Noise to latents (B, C, H, W), block after block."""
    model = task.model
    tokens, grid = model.to_tokens(task.noise)
    rotary, prior = model.rotary(grid), model.prior_log_std()
    if prior is not None:
        tokens = tokens * prior.exp()
    for number, block in reversed(list(enumerate(model.iter_blocks()))):
        guided = task.guidance > 0 and model.guided_blocks[number]
        noise = in_order(tokens, backwards=block.spec.backwards)
        x = _decode_block(model, block, noise, rotary, task, guided=guided)
        tokens = in_order(x, backwards=block.spec.backwards)
    return model.from_tokens(tokens, grid)


def _decode_block(
    model: Flow, block: AutoregressiveBlock, noise: Tensor, rotary: Tensor | None, task: DrawTask, *, guided: bool
) -> Tensor:
    """x_n = mu_n + sigma_n z_n, for n = 0, 1, .."""
    condition = model.check_condition(task.condition, len(noise))
    if guided and condition is not None:
        null = model.check_condition(task.null_condition, len(noise))
        assert null is not None
        condition = torch.cat((condition, null))
    rows = len(noise) * (2 if guided else 1)
    decoder = Decoder.of(block, rows, noise.shape[1], model.block_rotary(block, rotary), condition)
    x = noise.clone()
    start = noise[:1, :1] if block.sos_embed is None else block.sos_embed  # of a predicted first token
    for token in range(block.first_predicted, noise.shape[1]):
        before = x[:, token - 1 : token] if token else start.expand(len(x), -1, -1)
        outputs = decoder.step(before.repeat(2, 1, 1) if guided else before, token - block.first_predicted)
        if guided:
            branches = (*block.gaussian(outputs[: len(x)]), *block.gaussian(outputs[len(x) :]))
            mu, log_sigma = rules.gaussian(*branches, torch.tensor(task.guidance))
        else:
            mu, log_sigma = block.gaussian(outputs)
        x[:, token : token + 1] = affine.inverse(noise[:, token : token + 1], mu, log_sigma)
    return x


@dataclass
class Decoder:
    """One block with its cache."""

    block: AutoregressiveBlock
    rotary: Tensor | None
    class_vector: Tensor | None
    keys: list[Tensor]
    """(R, heads, L, H) a layer, unrotated."""
    values: list[Tensor]
    filled: int = 0

    @staticmethod
    def of(
        block: AutoregressiveBlock, rows: int, tokens: int, rotary: Tensor | None, condition: Tensor | None
    ) -> Decoder:
        """With the condition's keys and values in the cache."""
        prefix = block.prefix(condition)
        length = tokens - block.first_predicted + (0 if prefix is None else prefix.shape[1])
        layer, weight = block.spec.layer, block.proj_in.weight
        shape = (rows, layer.kv_heads, length, layer.head_dim)
        keys, values = ([weight.new_zeros(shape) for _ in block.attn_blocks] for _ in range(2))
        class_vector = None if block.class_embed is None else block.class_vector(condition)
        decoder = Decoder(block, rotary, class_vector, keys, values)
        if prefix is not None:
            decoder.layers(prefix)
        return decoder

    def step(self, before: Tensor, index: int) -> Tensor:
        """Outputs (R, 1, 2C) of input number `index`, (R, 1, C)."""
        hidden = self.block.embed(before, index)
        if self.class_vector is not None:
            hidden = hidden + self.class_vector
        return self.block.outputs(self.layers(hidden))

    def layers(self, hidden: Tensor) -> Tensor:
        """Hidden states (R, T, D) of the next T positions through every layer."""
        stop = self.filled + hidden.shape[1]
        for number, layer in enumerate(self.block.attn_blocks):
            assert isinstance(layer, Layer)
            hidden = hidden + self.attend(layer.attention, hidden, number, stop)
            hidden = hidden + layer.mlp(hidden)
        self.filled = stop
        return hidden

    def attend(self, attention: Attention, hidden: Tensor, number: int, stop: int) -> Tensor:
        heads = attention.qkv(attention.norm(hidden)).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
        queries, keys, values = heads.split((attention.heads, attention.kv_heads, attention.kv_heads), dim=1)
        if attention.query_norm is not None and attention.key_norm is not None:
            queries, keys = attention.query_norm(queries), attention.key_norm(keys)
        self.keys[number][:, :, self.filled : stop] = keys
        self.values[number][:, :, self.filled : stop] = values
        queries = self.rotated(queries, self.filled, stop, half_split=attention.half_split_rope)
        keys = self.rotated(self.keys[number][:, :, :stop], 0, stop, half_split=attention.half_split_rope)
        out = F.scaled_dot_product_attention(
            queries,
            keys,
            self.values[number][:, :, :stop],
            is_causal=self.filled == 0,
            enable_gqa=attention.heads != attention.kv_heads,
        )
        through: Tensor = attention.post_norm(attention.proj(out.transpose(1, 2).flatten(2)))
        return through

    def rotated(self, x: Tensor, start: int, stop: int, *, half_split: bool) -> Tensor:
        """(R, heads, T, H), turned by the angles of positions start..stop-1."""
        if self.rotary is None:
            return x
        return rotate(x, self.rotary[start:stop, 0], half_split=half_split)


def main() -> None:
    from starflow.bench.sample import load_model

    task = load_model("57m", torch.device("cpu"), torch.float32).task(4, 3.0)
    for _ in range(2):
        started = time.perf_counter()
        decode(task)
        print(f"{time.perf_counter() - started:.3f} s")


if __name__ == "__main__":
    main()
