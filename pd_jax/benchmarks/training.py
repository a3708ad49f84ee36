"""A training step, forward and backward, of a small model against transformers and torch."""

from functools import partial

from pd_jax.benchmarks.models import equal_branches, in_transformers, shape_of
from pd_jax.benchmarks.timing import Contender, compiled, fastest, import_torch, table
from pd_jax.config import Backend


def time_training(repeat: int) -> None:
    """Forward and backward of a 29M Qwen3 over 2 x 256 tokens, the same weights and loss in both libraries;
    and as a finetuning does it, where the targets outside of the answers have weight 0."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from pd_jax.columns import column_mask
    from pd_jax.loss import weighted_nll
    from pd_jax.model import forward, head
    from pd_jax.params import init_params

    torch = import_torch()
    if torch is None:
        print("\ntraining: torch is not installed, nothing to compare with")
        return
    config = shape_of("29m")
    params = init_params(config, jax.random.key(0, impl="rbg"))
    reference = in_transformers(config, params, "float32", "cpu")
    coordinates = equal_branches(256, 16, 2)
    tokens, targets = np.random.default_rng(0).integers(config.vocab_size, size=(2, 2, 256))
    weights = jnp.ones((2, 256), jnp.float32) / 512
    answers = jnp.where(jnp.arange(256) % 64 < 4, weights, 0) * 16  # 4 of 64 tokens

    def loss(backend: Backend, params, tokens, targets, weights):
        hidden = forward(params, config, tokens, coordinates, backend=backend)
        return weighted_nll(hidden, head(params), targets, weights)

    mask = np.where(np.asarray(column_mask(coordinates, coordinates)), 0, np.finfo(np.float32).min)[:, None]
    inputs = {
        "input_ids": torch.tensor(tokens),
        "attention_mask": torch.tensor(mask.astype(np.float32)),
        "position_ids": torch.tensor(np.asarray(coordinates.column, np.int64)),
        "use_cache": False,
    }
    labels = torch.tensor(targets).flatten()

    def torch_step() -> float:
        reference.zero_grad()
        nll = torch.nn.functional.cross_entropy(reference(**inputs).logits.flatten(0, 1).float(), labels)
        nll.backward()
        return nll.item()

    ours = float(jax.jit(partial(loss, "auto"))(params, tokens, targets, weights))
    print(f"\nloss: {ours:.6f} here, {torch_step():.6f} in torch")
    contenders = {"torch": Contender(torch_step)}
    for backend in ("dense", "chunked"):
        step = jax.value_and_grad(partial(loss, backend))
        contenders[backend] = compiled(step, params, tokens, targets, weights)
        contenders[f"{backend}, 6 % of targets"] = compiled(step, params, tokens, targets, answers)
    table("29M model, 2 x 256 tokens", contenders, fastest(contenders, repeat, cpu_time=True), "torch")
