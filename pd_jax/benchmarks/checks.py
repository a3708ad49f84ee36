"""Is what this machine computes right? Attention, decoding and a training step against references, as relative errors.

The references are float32, on a CPU where there is one: `dense` for attention, one forward over the finished rows for
decoding, the same step for training. Whatever is in float32 multiplies in full precision.
"""

from dataclasses import replace
from functools import partial
from typing import Any

from pd_jax.config import Align, Backend, Dtype, ModelConfig, Visibility
from pd_jax.layout import Branch, Layout, TokenSample, build_layout, unanswered

# The largest error that counts as right, in float32 and in bfloat16. Backends that are right stay below a third of it;
# one key too many among hundreds is beyond it (tests/benchmarks/test_doctor.py).
ALLOWED = {
    "out": (1e-4, 1e-2),
    "dv": (1e-4, 1e-2),
    "dq": (1e-4, 4e-2),
    "dk": (1e-4, 4e-2),
    "dbias": (1e-4, 4e-2),
    "logits": (1e-4, 0.1),
    "loss": (1e-4, 1e-2),
    "gradients": (1e-4, 5e-2),
}
# By its name: the visibility, and whether there is a learned bias.
CASES: dict[str, tuple[Visibility, bool]] = {
    "columns": ("columns", False),
    "isolated": ("isolated", False),
    "prompts": ("prompts", False),
    "sibling_bias": ("columns", True),
}


def samples(tokens: int, rng: Any, vocabulary: int = 2) -> list[TokenSample]:
    """Two samples that fit into a row of `tokens` together: one with a background and ragged branches, one without."""

    def ids(share: int) -> list[int]:
        return rng.integers(vocabulary, size=max(tokens // share, 1)).tolist()

    ragged = TokenSample(ids(6), [Branch(ids(p), ids(a)) for p, a in ((48, 24), (32, 48), (24, 16))])
    return [ragged, TokenSample([], [Branch(ids(40), ids(40)) for _ in range(7)])]


def rows(tokens: int) -> Any:
    """Coordinates of two packed rows, answers aligned, and of a ragged one; all with PAD behind them."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from pd_jax.columns import Coordinates

    one, other = samples(tokens, np.random.default_rng(0))
    parts = [build_layout([[one, other], [other, one]], tokens), build_layout([[one]], tokens, "ragged")]
    return jax.tree.map(lambda *x: jnp.concatenate(x), *(Coordinates.of(part) for part in parts))


def reference_device() -> Any:
    """The CPU, where jax has it beside an accelerator."""
    import jax

    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return jax.local_devices()[0]


def wrong(errors: dict[str, float], dtype: Dtype) -> list[str]:
    """The names of what is beyond `ALLOWED`."""
    return [name for name, error in errors.items() if not error <= ALLOWED[name][dtype == "bfloat16"]]


def precise(dtype: Dtype) -> Any:
    """Full precision for products of float32, which GPUs and TPUs round; kernels of bfloat16 may refuse to be told."""
    import jax

    return jax.default_matmul_precision("highest" if dtype == "float32" else None)


def distance(got: Any, expected: Any, axes: tuple[int, ...]) -> float:
    """The largest error of a vector along `axes`, relative to its length and the mean length; infinity for NaN."""
    import numpy as np

    got, expected = (np.asarray(x, np.float32) for x in (got, expected))
    length = np.linalg.norm(expected, axis=axes)
    error = np.linalg.norm(got - expected, axis=axes) / (length + length.mean() + 1e-30)
    return float(np.max(error)) if np.isfinite(error).all() else float("inf")


def attention_errors(backend: Backend, case: str, dtype: Dtype, tokens: int, head_dim: int) -> dict[str, float]:
    """Of out, dq, dk and dv (and of the bias' gradient) of `backend` on this machine's device, by name.

    Raises `InputError` when the backend cannot serve this.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np

    from pd_jax.attention import make_attention

    coordinates, (visibility, biased) = rows(tokens), CASES[case]
    rng, size = np.random.default_rng(1), coordinates.column.shape
    exact = [jnp.asarray(rng.standard_normal((*size, n, head_dim)), dtype) for n in (4, 2, 2, 4)]
    bias = {"dbias": jnp.array([-8.0, -1.0, 0.0, 1.5])} if biased else {}

    def run(backend: Backend, q: Any, k: Any, v: Any, cotangent: Any) -> dict[str, Any]:
        def attend(q, k, v, bias):
            return make_attention(coordinates, visibility, backend)(q, k, v, *bias.values())

        out, pullback = jax.vjp(attend, q, k, v, bias)
        dq, dk, dv, d_bias = pullback(cotangent)
        return {"out": out, "dq": dq, "dk": dk, "dv": dv} | d_bias

    with precise(dtype):
        got = jax.jit(partial(run, backend))(*exact)
    with precise("float32"), jax.default_device(reference_device()):
        wide = [np.asarray(x, np.float32) for x in exact]
        expected = jax.jit(partial(run, "dense"))(*wide)
    return {name: distance(got[name], expected[name], (-1,)) for name in expected}


def small_model(head_dim: int, sibling_bias: bool) -> tuple[ModelConfig, Any]:
    """Two layers of random weights; a bias is drawn too."""
    import jax

    from pd_jax.params import init_params

    config = ModelConfig(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=head_dim,
        rope_theta=1e4,
        tie_word_embeddings=True,
        pair_indices=(2, 4, 6),
        sibling_bias=sibling_bias,
    )
    with jax.default_device(reference_device()):
        params = init_params(config, jax.random.key(0, impl="rbg"))
        if sibling_bias:
            shape = params["layers"]["sibling_bias"].shape
            params["layers"]["sibling_bias"] = jax.random.normal(jax.random.key(1, impl="rbg"), shape)
    return config, jax.tree.map(lambda x: jax.device_get(x), params)


def decoding_errors(
    case: str, align: Align, dtype: Dtype, tokens: int, head_dim: int, columns: int = 6
) -> dict[str, float]:
    """Of the logits, column by column, against one forward over the finished row, relative to their deviation."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from pd_jax.benchmarks.models import tokens_only
    from pd_jax.decoding import BLOCK, Method, ParallelDecoder, Program, SamplingParams, feed, make_prompt, start

    visibility, biased = CASES[case]
    config, params = small_model(head_dim, biased)
    decoder = ParallelDecoder(
        config, params, tokens_only(config.vocab_size), (), dtype=dtype, visibility=visibility, align=align
    )
    sample, _ = samples(tokens, np.random.default_rng(2), config.vocab_size)
    sample = replace(sample, branches=[replace(b, answer=b.answer[:columns]) for b in sample.branches])
    program, limits = Program(config, visibility, Method()), [[columns] * len(sample.branches)]
    begin, step = jax.jit(start, static_argnums=(1, 4)), jax.jit(feed, static_argnums=1)
    errors = []
    with precise(dtype):
        layout = decoder.layout([sample])
        full = decoder.logits(layout)[0]
        prompt = make_prompt([unanswered(sample)], limits, align, visibility)
        controls = SamplingParams().controls((), jnp.ones(config.vocab_size, bool), 1, 1)
        state, logits = begin(decoder.weights, program, controls, prompt, BLOCK)
        for column in range(columns + 1):
            fed, live = np.zeros(prompt.last.shape, np.int32), np.zeros(prompt.last.shape, bool)
            for b, branch in enumerate(sample.branches):
                if column > len(branch.answer):
                    continue
                place = np.flatnonzero(layout.branch[0] == b + 1)[len(branch.prompt) + column - 1]
                error = np.abs(np.asarray(logits[0, b]) - full[place]).max() / full[layout.valid[0]].std()
                errors.append(float(error) if np.isfinite(error) else float("inf"))
                if column < len(branch.answer):
                    fed[0, b], live[0, b] = branch.answer[column], True
            if live.any():
                state = replace(state, token=fed, live=live, count=np.int32(column + 1))
                state, logits = step(decoder.weights, program, state)
    return {"logits": max(errors)}


def step_errors(case: str, dtype: Dtype, tokens: int, head_dim: int) -> dict[str, float]:
    """A training step on this machine's device against one with `dense` attention in float32 on the CPU: of the loss,
    and of the gradients of every kind of weight the worst, relative to their length."""
    import jax
    import numpy as np
    import optax

    from pd_jax.mesh import make_mesh, place_batch
    from pd_jax.training import Optimisation, StepSettings, make_optimizer, make_step

    visibility, biased = CASES[case]
    config, params = small_model(head_dim, biased)
    config = replace(config, visibility=visibility)
    optimizer, _ = make_optimizer(Optimisation(), 100)
    one, other = samples(tokens, np.random.default_rng(3), config.vocab_size)
    layout: Layout = build_layout([[one, other], [other, one]], tokens, objective="all")
    batch = {name: layout[name] for name in layout}

    def run(device: Any, settings: StepSettings) -> tuple[float, Any]:
        mesh = make_mesh(1, 1, 1, devices=[device])
        step, _ = make_step(config, optimizer, settings)
        with jax.set_mesh(mesh), precise(settings.dtype):
            here = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
            trained = jax.device_put(params, here)
            state = {"trained": trained, "opt": optimizer.init(trained), "step": np.int32(0)}
            state, metrics = jax.jit(step)(state, {}, place_batch(mesh, 1, batch))
            return float(metrics["loss"]), jax.device_get(optax.tree_utils.tree_get(state["opt"], "mu"))

    loss, moments = run(jax.local_devices()[0], StepSettings(dtype))
    expected_loss, expected = run(reference_device(), StepSettings("float32", attention="dense"))
    error = jax.tree.map(lambda a, b: distance(a.reshape(-1), b.reshape(-1), (0,)), moments, expected)
    return {"loss": abs(loss - expected_loss) / abs(expected_loss), "gradients": max(jax.tree.leaves(error))}
