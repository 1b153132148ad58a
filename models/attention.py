"""Attention of new tokens over a cache in segments, each held as activations or as keys and values.

Every segment gives float32 scores and, once the weights are known, its share of the output. One maximum and one sum
run over the scores of all segments, and the shares are added up: nothing is ever concatenated along the tokens.

A segment of activations x gives its scores and its share in one of two ways, equal in real arithmetic:

    project  K = x·W_K + b_K and V = x·W_V + b_V are formed again, as in KVPR (arXiv 2411.17089, section 3.2);
             4·D·K·d FLOPs a token.
    absorb   the projections move to the query's side of the products, and K and V are never formed:
                 score(t) = (W_K·q)·x_t + q·b_K          share = W_Vᵀ·(Σ_t p_t·x_t) + b_V·Σ_t p_t
             4·H·D FLOPs a token, d times fewer. What stands between W_K and the dot product stands in the way: those
             dimensions of a head's key that are rotated are projected (all of them, in most rotary models), and so
             are keys that are normalised. Values are absorbed in any case.
"""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from kvpr_jax.config import ModelConfig
from kvpr_jax.models.layers import linear
from kvpr_jax.models.positions import Rope
from kvpr_jax.segments import Activations, KeysValues, Place, Segment

Recompute = Literal["project", "absorb"]
Scores = Float[Array, "B K G Q _"]  # the last axis is a segment's T, different for each
Share = Float[Array, "B K G Q d"]  # this order is what the products give; CPUs refuse some others in bfloat16

TINY = 1e-30  # stands in for the mass of a segment of which nothing is seen
MASKED = -1e30  # finite: a row with nothing to see stays a number, and exp(MASKED - max) is exactly 0 elsewhere


def visible(
    queries: Int[Array, " Q"], keys: Int[Array, " T"], start: Int[Array, " B"] | None, window: int | None
) -> Bool[Array, "#B Q T"]:
    """Which of the slots `keys` the slots `queries` may attend to.

    Not the future, not the padding below `start`, and not further back than a sliding `window` of tokens. With start
    (2,) and no window, slot 4 sees slots 2, 3 and 4.
    """
    seen = keys[None, None, :] <= queries[None, :, None]
    if start is not None:
        seen = seen & (keys[None, None, :] >= start[:, None, None])
    if window is not None:
        seen = seen & (queries[None, :, None] - keys[None, None, :] < window)
    return seen


def attend(parts: list[tuple[Scores, Callable[[Scores], Share]]]) -> Share:
    """One softmax over the scores of all parts; each part turns its own weights into its share of the output."""
    top = jnp.stack([scores.max(-1) for scores, _ in parts]).max(0)[..., None]
    weights = [jnp.exp(scores - top) for scores, _ in parts]
    total = jnp.stack([weight.sum(-1) for weight in weights]).sum(0)
    share = jnp.stack([part(weight) for weight, (_, part) in zip(weights, parts, strict=True)]).sum(0)
    return share / total[..., None]


def fused(dtype: jnp.dtype, head_dim: int) -> bool:
    """Whether a prompt's attention runs in cuDNN's fused kernel, which never forms the scores."""
    if jax.default_backend() != "gpu" or not fusible(dtype, head_dim):
        return False
    return float(getattr(jax.local_devices()[0], "compute_capability", 0)) >= 8.0


def fusible(dtype: jnp.dtype, head_dim: int) -> bool:
    """Whether that kernel takes such heads, on a GPU from Ampere on."""
    return dtype in (jnp.bfloat16, jnp.float16) and head_dim % 8 == 0 and head_dim <= 128


def linear_biases(
    slopes: tuple[float, ...], queries: Int[Array, " Q"], keys: Int[Array, " T"]
) -> Float[Array, "H Q T"]:
    """What ALiBi adds to the scores: minus each head's slope times how far the key is behind the query."""
    distance = (keys[None, :] - queries[:, None]).astype(jnp.float32)
    return np.array(slopes, np.float32)[:, None, None] * distance[None]


def causal_attention(
    queries: Float[Array, "B Q K G d"],
    own: KeysValues,
    place: Place,
    window: int | None,
    slopes: tuple[float, ...] | None,
) -> Float[Array, "B Q K G d"]:
    """Fused attention of a prompt's tokens over the prompt: cuDNN's where the backend has it, XLA's elsewhere."""
    heads = queries.reshape(*queries.shape[:2], -1, queries.shape[-1])
    whole = place.start is None and window is None and queries.shape[1] == own.tokens
    # CPUs have no float16 products that sum in float32.
    dtype = jnp.float32 if jax.default_backend() == "cpu" and heads.dtype == jnp.float16 else heads.dtype
    cudnn = fused(heads.dtype, heads.shape[-1])
    bias = None
    if slopes is not None:
        bias = linear_biases(slopes, place.slots, own.slots)[None].astype(dtype if cudnn else jnp.float32)
    out = jax.nn.dot_product_attention(
        heads.astype(dtype),
        own.keys.astype(dtype),
        own.values.astype(dtype),
        bias=bias,
        mask=None if whole else visible(place.slots, own.slots, place.start, window)[:, None],
        is_causal=whole,
        scale=1.0,
        implementation="cudnn" if cudnn else "xla",
    )
    return out.reshape(queries.shape).astype(queries.dtype)


class Attention(nnx.Module):
    """Multi-head or grouped-query attention.

    Args:
        config: shapes.
        scale: what queries are multiplied by; d^(-1/2) by default.
        bias: whether the query, key and value projections have one.
        out_bias: whether the output projection has one.
        rope: rotation of queries and keys, or None.
        slopes: (H,) of ALiBi, or None.
        window: sliding window in tokens, or None.
        norm: makes the norms of queries and keys from their width: d, a norm of each head, or H·d and K·d, one norm
            of all heads together; None: no such norms.
        norm_heads: whether each head is normalised by itself.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        bias: bool,
        out_bias: bool,
        scale: float | None = None,
        rope: Rope | None = None,
        slopes: tuple[float, ...] | None = None,
        window: int | None = None,
        norm: Callable[[int], nnx.RMSNorm] | None = None,
        norm_heads: bool = True,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ) -> None:
        self.groups = config.num_heads // config.num_kv_heads
        self.kv_heads, self.head_dim = config.num_kv_heads, config.head_dim
        self.scale = config.head_dim**-0.5 if scale is None else scale
        self.rope, self.slopes, self.window = rope, slopes, window
        q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q = linear(config.hidden_size, q_size, bias=bias, dtype=dtype, rngs=rngs)
        self.k = linear(config.hidden_size, kv_size, bias=bias, dtype=dtype, rngs=rngs)
        self.v = linear(config.hidden_size, kv_size, bias=bias, dtype=dtype, rngs=rngs)
        self.o = linear(q_size, config.hidden_size, bias=out_bias, dtype=dtype, rngs=rngs)
        self.q_norm = None if norm is None else norm(config.head_dim if norm_heads else q_size)
        self.k_norm = None if norm is None else norm(config.head_dim if norm_heads else kv_size)

    @property
    def projected_dims(self) -> int:
        """Dimensions of a head's keys, its first ones, that must be projected even where the others are absorbed."""
        if self.k_norm is not None:
            return self.head_dim
        return 0 if self.rope is None else self.rope.width

    def queries(self, x: Float[Array, "B Q D"], positions: Int[Array, "#B Q"]) -> Float[Array, "B Q K G d"]:
        q = self._turned(self._normed(self.q(x), self.q_norm), positions)
        return (q * self.scale).reshape(*x.shape[:2], self.kv_heads, self.groups, self.head_dim)

    def keys(
        self, x: Float[Array, "B T D"], positions: Int[Array, "#B T"], dims: int | None = None
    ) -> Float[Array, "B T K dims"]:
        """Keys of activations; only the first `dims` dimensions of each head if given."""
        if dims in (None, self.head_dim):
            return self._turned(self._normed(self.k(x), self.k_norm), positions)
        kernel, bias = self._heads(self.k)
        k = jnp.einsum("BTD,DKd->BTKd", x, kernel[..., :dims])
        if bias is not None:
            k = k + bias[None, None, :, :dims]
        return self._turned(k, positions)

    def values(self, x: Float[Array, "B T D"]) -> Float[Array, "B T K d"]:
        return self.v(x).reshape(*x.shape[:2], self.kv_heads, self.head_dim)

    def _normed(self, y: Float[Array, "B T _"], norm: nnx.RMSNorm | None) -> Float[Array, "B T heads d"]:
        """Projected queries or keys by heads, normalised by themselves or together."""
        if norm is not None:
            y = norm(y.reshape(*y.shape[:2], -1, norm.num_features))
        return y.reshape(*y.shape[:2], -1, self.head_dim)

    def _turned(self, y: Float[Array, "B T heads _"], positions: Int[Array, "#B T"]) -> Float[Array, "B T heads _"]:
        return y if self.rope is None else self.rope.rotate(y, positions)

    def _heads(self, projection: nnx.Linear) -> tuple[Float[Array, "D K d"], Float[Array, "K d"] | None]:
        """Kernel and bias of the key or value projection, by heads."""
        kernel = projection.kernel[...].reshape(-1, self.kv_heads, self.head_dim)
        bias = None if projection.bias is None else projection.bias[...].reshape(self.kv_heads, self.head_dim)
        return kernel, bias

    def remember(self, x: Float[Array, "B T D"], place: Place) -> KeysValues:
        """Keys and values of activations: of a new token, or of one that is projected."""
        return KeysValues(self.keys(x, place.positions(place.slots)), self.values(x), place.slots)

    @jax.named_scope("attention")
    def __call__(
        self, x: Float[Array, "B Q D"], segments: tuple[Segment, ...], place: Place, recompute: Recompute
    ) -> Float[Array, "B Q D"]:
        """Attention of the tokens `x` at `place` over `segments`, which hold these tokens too.

        Only what `visible` allows counts: slots behind a token's own may stand for anything finite.
        """
        q = jnp.moveaxis(self.queries(x, place.positions(place.slots)), 1, 3)
        out = attend([self._part(q, segment, place, recompute) for segment in segments]).astype(x.dtype)
        return self._output(jnp.moveaxis(out, 3, 1))

    @jax.named_scope("attention")
    def over_prompt(self, x: Float[Array, "B Q D"], prompt: KeysValues, place: Place) -> Float[Array, "B Q D"]:
        """Attention of the tokens `x` at `place`, all of a prompt's or a chunk of them, over the whole prompt."""
        q = self.queries(x, place.positions(place.slots))
        return self._output(causal_attention(q, prompt, place, self.window, self.slopes))

    def _output(self, out: Float[Array, "B Q K G d"]) -> Float[Array, "B Q D"]:
        return self.o(out.reshape(*out.shape[:2], -1))

    def _part(
        self, q: Share, segment: Segment, place: Place, recompute: Recompute
    ) -> tuple[Scores, Callable[[Scores], Share]]:
        """Masked scores of `q` over a segment, and the function from weights to its share of the output."""
        if isinstance(segment, KeysValues):
            scores, share = self._keys_scores(q, segment.keys), self._values_share(segment.values)
        elif recompute == "project":
            with jax.named_scope("recompute"):
                own = self.remember(segment.x, Place(segment.slots, place.start))
            scores, share = self._keys_scores(q, own.keys), self._values_share(own.values)
        else:
            with jax.named_scope("recompute"):
                scores = self._absorbed_scores(q, segment.x, place.positions(segment.slots))
            share = self._absorbed_share(segment.x)
        if self.slopes is not None:
            biases = linear_biases(self.slopes, place.slots, segment.slots)
            scores = scores + biases.reshape(1, self.kv_heads, self.groups, *biases.shape[1:])
        seen = visible(place.slots, segment.slots, place.start, self.window)
        return jnp.where(seen[:, None, None], scores, MASKED), share

    @staticmethod
    def _keys_scores(q: Share, keys: Float[Array, "B T K d"]) -> Scores:
        return jnp.einsum("BKGQd,BTKd->BKGQT", q, keys, preferred_element_type=jnp.float32)

    @staticmethod
    def _values_share(values: Float[Array, "B T K d"]) -> Callable[[Scores], Share]:
        return lambda weights: jnp.einsum(
            "BKGQT,BTKd->BKGQd", weights.astype(values.dtype), values, preferred_element_type=jnp.float32
        )

    def _absorbed_scores(self, q: Share, x: Float[Array, "B T D"], positions: Int[Array, "#B T"]) -> Scores:
        dims = self.projected_dims
        projected = self._keys_scores(q[..., :dims], self.keys(x, positions, dims)) if dims else None
        if projected is not None and dims == self.head_dim:
            return projected
        kernel, bias = self._heads(self.k)
        q, kernel = q[..., dims:], kernel[..., dims:]
        absorbed = jnp.einsum("BKGQd,DKd->BKGQD", q, kernel, preferred_element_type=jnp.float32).astype(x.dtype)
        scores = jnp.einsum("BKGQD,BTD->BKGQT", absorbed, x, preferred_element_type=jnp.float32)
        if bias is not None:
            # The same for every token of this segment, but the keys of other segments contain it.
            offset = jnp.einsum("BKGQd,Kd->BKGQ", q, bias[:, dims:], preferred_element_type=jnp.float32)
            scores = scores + offset[..., None]
        return scores if projected is None else scores + projected

    def _absorbed_share(self, x: Float[Array, "B T D"]) -> Callable[[Scores], Share]:
        kernel, bias = self._heads(self.v)

        @jax.named_scope("recompute")
        def share(weights: Scores) -> Share:
            # Over the segment's own mass, the mean of x fits its dtype: in float16 the plain sum might not.
            mass = jnp.maximum(weights.sum(-1), TINY)[..., None]
            mean = jnp.einsum("BKGQT,BTD->BKGQD", weights.astype(x.dtype), x, preferred_element_type=jnp.float32)
            mean = (mean / mass).astype(x.dtype)
            out = jnp.einsum("BKGQD,DKd->BKGQd", mean, kernel, preferred_element_type=jnp.float32)
            if bias is not None:
                out = out + bias[None, :, None, None, :].astype(jnp.float32)
            return out * mass

        return share


def kept(x: Float[Array, "B Q D"], own: KeysValues, split: int) -> tuple[Activations | None, KeysValues | None]:
    """What the cache keeps of a call's tokens: the first `split` as activations, the others as keys and values."""
    tokens = own.tokens
    if not 0 <= split <= tokens:
        raise ValueError(f"split {split} is outside 0..{tokens}, the tokens of this call")
    activations = Activations(x, own.slots)
    return (activations[:split] if split else None), (own[split:] if split < tokens else None)
