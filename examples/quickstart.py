"""Generate text from several prompts with a cache on the host, half of it held as activations.

python examples/quickstart.py
"""

import kvpr_jax

model, tokenizer = kvpr_jax.load()  # or a directory, or a hub id such as "facebook/opt-1.3b"

prompts = ["Open a file and", "Create an event loop"]
stream = kvpr_jax.stream(
    model, tokenizer, prompts, max_new_tokens=60, temperature=0.6, top_p=0.9, offload="all", split="50%"
)
for piece in stream:
    if piece.index == 0:  # show the first as it is made
        print(piece.text, end="", flush=True)
print("\n---")
print(stream.outputs[1].text)
print("---")
print(f"{stream.statistics.link_bytes / 1e6:.1f} MB crossed the link in {stream.statistics.decode_steps} steps")
