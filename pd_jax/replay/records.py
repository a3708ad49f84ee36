"""What a replay shows of one sample: its tokens with coordinates, whom each of them saw, and where its attention went.

Nothing of it is worked out in the page: who sees whom is `columns.column_mask` over the finished layout, attention is
that of a forward over it, which equals the decoding that made it.
"""

from base64 import b64encode
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from pd_jax.columns import Coordinates, column_mask
from pd_jax.data.text import pieces, tokenise_samples
from pd_jax.decoding import ParallelDecoder, Program, Result, encode
from pd_jax.errors import InputError
from pd_jax.layout import Sample, TokenSample
from pd_jax.params import Params
from pd_jax.watching.sight import watching

MOST_TOKENS = 4096  # of a sample: the page holds a bit for each pair of them
MOST_SHARES = 2**24  # bytes of a sample's attention by layer; beyond that only the average is kept


@partial(jax.jit, static_argnames=("program",))
def token_attention(weights: Params, tokens: Array, coordinates: Coordinates, *, program: Program) -> Array:
    """The attention of every token of a row on every other, averaged over heads, float32 [S, L, T, T]; for
    `ParallelDecoder.on_rows`."""
    attend, seen = watching(coordinates, program.visibility, keep=lambda weights: weights.mean((1, 2)))
    encode(weights, program, tokens, coordinates, attend)
    return jnp.stack(seen, axis=1)


def record(
    decoder: ParallelDecoder, sample: Sample | TokenSample, result: Result, *, title: str = "", attention: bool = False
) -> dict[str, Any]:
    """What a replay of `sample` shows, whose answers by `decoder` are `result`; JSON.

    Tokens stand in column-major order: text (what each adds to the text; "" for a part of a character that is not the
    last), branch, column, kind (0 background, 1 prompt, 2 answer). ends: why every branch ended. sees: T x T bits, row
    i the tokens that token i sees, each row padded to bytes. attention, if asked for: see `_shares`.

    Raises `InputError` for a sample of more than MOST_TOKENS tokens.
    """
    (asked,) = tokenise_samples([sample], decoder.tokenizer, decoder.config.vocab_size)
    branches = [replace(b, answer=r.token_ids) for b, r in zip(asked.branches, result.branches, strict=True)]
    said = replace(asked, branches=branches, visibility=asked.visibility or decoder.visibility)
    n = len(said)
    if n > MOST_TOKENS:
        raise InputError(
            f"a replay shows at most {MOST_TOKENS} tokens, {title or 'the sample'} has {n}; shorten the background, or "
            "leave --html out"
        )
    layout = decoder.layout([said])
    coordinates = Coordinates.of(layout)
    sees = np.asarray(column_mask(coordinates, coordinates, said.visibility or "columns"))[0]
    branch, column = layout.branch[0], layout.column[0]
    text = np.empty(n, object)
    for b in range(len(branches) + 1):
        text[branch == b] = pieces(decoder.tokenizer, layout.tokens[0][branch == b].tolist())
    kind = np.where(branch == 0, 0, np.where(layout.prompt[0], 1, 2))
    shares = decoder.on_rows(token_attention, layout)[0, :, :n, :n] if attention else None
    return {
        "title": title,
        "visibility": said.visibility,
        "align": decoder.align,
        "text": text.tolist(),
        "branch": branch.tolist(),
        "column": column.tolist(),
        "kind": kind.tolist(),
        "ends": [r.finish_reason for r in result.branches],
        "sees": b64encode(np.packbits(sees, axis=1).tobytes()).decode(),
        "attention": None if shares is None else _shares(shares),
    }


def _shares(attention: np.ndarray) -> list[dict[str, Any]]:
    """Attention [L, T, T] as the page takes it: of the average over layers, then of every layer, its name, the largest
    share of every token, and T x T bytes, row i the shares of token i in 255ths of its largest."""
    names = ["average of all layers", *(f"layer {layer + 1}" for layer in range(len(attention)))]
    parts = [attention.mean(axis=0), *(attention if attention.size <= MOST_SHARES else ())]
    out = []
    for name, part in zip(names, parts, strict=False):
        most = part.max(axis=-1, keepdims=True)
        scaled = np.round(255 * part / most).astype(np.uint8)
        out.append({"name": name, "most": most[:, 0].round(5).tolist(), "shares": b64encode(scaled.tobytes()).decode()})
    return out
