"""The step level: prefill a cache, feed tokens of your own choice, read the logits, draw with your own sampler.

python examples/step_by_hand.py
"""

import jax
import jax.numpy as jnp

import kvpr_jax

model, tokenizer = kvpr_jax.load()
decoder = kvpr_jax.Decoder(model)
prompts = tokenizer(["The with statement is used to", "Return"])["input_ids"]  # of different lengths

plan = decoder.plan(prompts, new_tokens=40, request=kvpr_jax.Request(split="4", recompute="absorb"))
cache, logits = decoder.prefill(prompts, plan)  # logits: (B, V) float32, after the last token of each prompt

# Feed a text that is known, and read how likely the model found it.
text = tokenizer(" the object", add_special_tokens=False)["input_ids"]
for token in text:
    likely = jax.nn.log_softmax(logits)[:, token]
    print(f"{tokenizer.decode([token])!r}: log-probability {likely[0]:.2f} and {likely[1]:.2f}")
    logits = decoder.step(cache, jnp.full(len(prompts), token, jnp.int32))

# Then a sampler of one's own: the most likely token that has not been said yet.
said = jnp.zeros(logits.shape, bool)
for _ in range(20):
    tokens = jnp.where(said, -jnp.inf, logits).argmax(-1).astype(jnp.int32)
    said = said.at[jnp.arange(len(prompts)), tokens].set(True)
    print(repr(tokenizer.decode([int(tokens[0])])), end=" ", flush=True)
    logits = decoder.step(cache, tokens)
print(f"\n{cache.length} tokens in the cache: {cache.tokens()}")
