"""The same text from every split, and what each moves over the link.

python examples/compare_splits.py
"""

import kvpr_jax

model, tokenizer = kvpr_jax.load()
prompt = "The with statement is used to wrap the execution of a block with methods defined by a context manager."

print(f"{'split':>6} {'recompute':>9} {'KB a step':>10} {'ms a step':>10}  text")
texts = set()
for split in ("0%", "50%", "100%"):
    for recompute in ("project", "absorb"):
        stream = kvpr_jax.stream(model, tokenizer, prompt, max_new_tokens=48, split=split, recompute=recompute)
        for _ in stream:
            pass
        run, text = stream.statistics, stream.outputs[0].text
        texts.add(text)
        step_ms = 1e3 * run.decode_s / run.decode_steps
        print(
            f"{split:>6} {recompute:>9} {run.link_bytes / run.decode_steps / 1e3:10.1f} {step_ms:10.2f}  {text[:40]!r}"
        )
print("all texts are the same" if len(texts) == 1 else f"{len(texts)} different texts")
