"""Cross-entropy over target tokens."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def token_cross_entropy(
    logits: Float[Array, "B T V"], labels: Int[Array, "B T"], mask: Bool[Array, "B T"]
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Mean of -log softmax(logits)[label] over all masked-in tokens of the batch, in fp32, with the metrics of `Method.loss`.

    A target is predicted correctly if no other token has a larger logit. A batch without targets has loss 0.
    """
    log_probs, right = log_probabilities(logits, labels)
    return mean_over_targets(-log_probs, mask, right)


def log_probabilities(
    logits: Float[Array, "B T V"], labels: Int[Array, "B T"]
) -> tuple[Float[Array, "B T"], Bool[Array, "B T"]]:
    """log softmax(logits)[label] in fp32, and whether no other token has a larger logit."""
    logits = logits.astype(jnp.float32)
    # A masked sum and not an index: its gradient is part of the softmax's pass, where an index would scatter into zeros.
    is_label = jnp.arange(logits.shape[-1]) == labels[..., None]
    # Relative to the largest logit, so that a small loss is not the difference of two large numbers.
    logits = logits - jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    chosen = jnp.sum(jnp.where(is_label, logits, 0.0), axis=-1)
    return chosen - jnp.log(jnp.sum(jnp.exp(logits), axis=-1)), chosen >= 0.0


def mean_over_targets(
    losses: Float[Array, "*B"], mask: Bool[Array, "*B"], right: Bool[Array, "*B"]
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """The mean of `losses` where `mask`, and the metrics of `Method.loss`; `right` marks correctly predicted targets."""
    targets = mask.sum().astype(jnp.float32)
    count = jnp.maximum(targets, 1.0)
    loss = jnp.where(mask, losses, 0.0).sum() / count
    accuracy = (mask & right).sum() / count
    return loss, {"loss": loss, "token_accuracy": accuracy, "targets": targets}
