"""Column attention. One entry, `make_attention`, over backends that all equal `dense`.

dense     the reference: an explicit mask, float32 softmax
chunked   linear memory on any platform
splash    TPU: jax's splash kernel, the mask computed inside it
nvidia    tokamax (Hopper and Blackwell; needs the package tokamax) and cudnn (other NVIDIA GPUs)
"""

from pd_jax.attention.dense import attention_weights, dense_attention, sibling_scores
from pd_jax.attention.select import Attention, Call, check_backend, make_attention

__all__ = ["Attention", "Call", "attention_weights", "check_backend", "dense_attention", "make_attention"]
__all__ += ["sibling_scores"]
