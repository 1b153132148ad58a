"""The text API: texts are the decoded tokens, piece by piece and whole; samples depend on seed and prompt alone."""

import dataclasses
import functools
import importlib
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from helpers import OPT, greedy, random_model
from kvpr_jax import Decoder, Request, Stream, checkpoint, generate, stream
from kvpr_jax import cache as cache_module
from kvpr_jax.generate import encode
from kvpr_jax.sampling import Sampling

api = importlib.import_module("kvpr_jax.generate")  # the package's attribute of this name is the function

PROMPTS = ["The with statement", "x", "Raise an error if the file"]
NEW = 24


@pytest.fixture(scope="module")
def tokenizer():
    return checkpoint.load_tokenizer(checkpoint.BUNDLED)


@pytest.fixture(scope="module")
def model(tokenizer):
    """Random weights, for the vocabulary of the bundled tokenizer."""
    return random_model(
        dataclasses.replace(OPT, num_layers=2, vocab_size=len(tokenizer), eos_token_ids=(tokenizer.eos_token_id,))
    )


@pytest.fixture(scope="module")
def outputs(model, tokenizer):
    """Greedy, all prompts in one batch."""
    return generate(model, tokenizer, PROMPTS, max_new_tokens=NEW, ignore_eos=True)


def tokens_of_bytes(tokenizer) -> list[int]:
    """The token of each byte: a byte-level tokenizer writes byte b as one printable character."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    characters = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    tokens = tokenizer.convert_tokens_to_ids([characters[byte] for byte in range(256)])
    assert len(set(tokens)) == 256
    return tokens


class Scripted(Decoder):
    """A decoder whose model says what it is told: `script` holds a row of tokens for each sequence."""

    def __init__(self, model, script: tuple[list[int], ...]) -> None:
        super().__init__(model)
        self.script, self.steps = script, 0

    def _logits(self) -> jax.Array:
        said = [row[min(self.steps, len(row) - 1)] for row in self.script]
        return jax.nn.one_hot(jnp.asarray(said), self.config.vocab_size)

    def prefill(self, prompts, plan, progress=None):
        cache, _ = super().prefill(prompts, plan, progress)
        return cache, self._logits()

    def step(self, cache, tokens):
        self.steps += 1
        return self._logits()


@pytest.fixture(scope="module")
def tell(model):
    """A stream that says rows of tokens: tell(tokenizer, *rows, **options of stream)."""

    def begin(tokenizer, *rows: list[int], **options) -> Stream:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(api, "Decoder", functools.partial(Scripted, script=rows))
            return stream(model, tokenizer, ["x"] * len(rows), **{"max_new_tokens": NEW} | options)

    return begin


@pytest.fixture(scope="module")
def say(tell):
    """The outputs of such a stream; checks that nothing it showed was taken back."""

    def run(*args, **options) -> list[api.Output]:
        running = tell(*args, **options)
        texts = [""] * len(running.outputs)
        for piece in running:
            texts[piece.index] += piece.text
        assert texts == [output.text for output in running.outputs]
        return running.outputs

    return run


# Whole texts


def test_texts_are_what_stepping_by_hand_gives(model, tokenizer, outputs):
    ids = encode(tokenizer, PROMPTS)
    tokens, _, _, _ = greedy(Decoder(model), ids, NEW, Request())
    for output, prompt, prompt_ids, row in zip(outputs, PROMPTS, ids, tokens.tolist(), strict=True):
        assert (output.prompt, output.prompt_tokens, output.finish_reason) == (prompt, len(prompt_ids), "length")
        assert output.token_ids == row
        assert output.text == tokenizer.decode(row, skip_special_tokens=True)
    assert len({len(prompt_ids) for prompt_ids in ids}) > 1  # ragged


def test_prompts_carry_the_tokenizers_special_tokens(tokenizer):
    assert encode(tokenizer, ["x"])[0] == tokenizer("x")["input_ids"] != tokenizer.encode("x", add_special_tokens=False)


def test_one_prompt_may_be_a_string(model, tokenizer):
    options = {"max_new_tokens": 6, "ignore_eos": True}
    (one,) = generate(model, tokenizer, PROMPTS[0], **options)
    assert one == generate(model, tokenizer, [PROMPTS[0]], **options)[0] and one.prompt == PROMPTS[0]


@pytest.mark.parametrize("placement", [
    {"offload": "all"},
    {"split": "0"},
    {"split": "50%", "recompute": "project"},
    {"split": "100%", "recompute": "absorb", "engine": "sequential"},
], ids=str)  # fmt: skip
def test_where_the_cache_lies_does_not_change_the_text(model, tokenizer, outputs, placement):
    assert generate(model, tokenizer, PROMPTS, max_new_tokens=NEW, ignore_eos=True, **placement) == outputs


def test_chat_makes_a_users_turn_of_the_prompt(model):
    tokenizer = checkpoint.load_tokenizer(checkpoint.BUNDLED)
    with pytest.raises(ValueError, match="no chat template"):
        encode(tokenizer, ["Hello"], chat=True)
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<says>{% endif %}"
    )
    expected = tokenizer.encode("<user>Hello<says>", add_special_tokens=False)
    assert encode(tokenizer, ["Hello"], chat=True) == [expected]
    (output,) = generate(model, tokenizer, "Hello", chat=True, max_new_tokens=2, ignore_eos=True)
    assert (output.prompt, output.prompt_tokens) == ("Hello", len(expected))


# Pieces


def test_pieces_make_up_the_outputs(model, tokenizer, outputs):
    running = stream(model, tokenizer, PROMPTS, max_new_tokens=NEW, ignore_eos=True)
    pieces = list(running)
    assert running.outputs == outputs
    for index, output in enumerate(outputs):
        own = [piece for piece in pieces if piece.index == index]
        assert "".join(piece.text for piece in own) == output.text
        assert [piece.token_id for piece in own] == output.token_ids
        assert [piece.finish_reason for piece in own] == [None] * (NEW - 1) + ["length"]
    assert [piece.index for piece in pieces] == [0, 1, 2] * NEW  # a token of each, step by step


@pytest.mark.parametrize("ahead_s, engine, expected", [
    (0.0, "overlapped", [0, 1, 2, 3, 4, 5, 6]),
    (1.0, "overlapped", [0, 2, 3, 3, 5, 6, 6]),  # behind the third step comes a flush
    (1.0, "sequential", [0, 1, 2, 3, 4, 5, 6]),
])  # fmt: skip
def test_a_token_is_handed_out_as_soon_as_it_is_known(ahead_s, engine, expected, model, tokenizer, monkeypatch):
    """Or as soon as the next step is issued, where steps are short; by either the same tokens."""
    monkeypatch.setattr(cache_module, "AHEAD_S", ahead_s)
    dispatched: list[int] = []
    step = Decoder.step

    def counting(self, cache, tokens):
        dispatched.append(1)
        return step(self, cache, tokens)

    monkeypatch.setattr(Decoder, "step", counting)
    options = {"offload": "all", "engine": engine, "tail_tokens": 3, "split": "0"}
    running = stream(model, tokenizer, "x", max_new_tokens=7, ignore_eos=True, **options)
    assert [len(dispatched) for _ in running] == expected
    by_hand, _, _, _ = greedy(Decoder(model), encode(tokenizer, ["x"]), 7, Request())
    assert running.outputs[0].token_ids == by_hand[0].tolist()
    prompt, token_bytes = running.plan.cached_tokens, 4 * model.config.num_layers * model.config.kv_width
    assert running.statistics.link_bytes == token_bytes * (3 * prompt + 3 * (prompt + 3))  # a flush between


def test_statistics_count_what_happened(model, tokenizer):
    running = stream(model, tokenizer, PROMPTS, max_new_tokens=NEW, ignore_eos=True, split="50%")
    assert (running.statistics.new_tokens, running.statistics.prefill_s) == (0, 0.0)
    for _ in running:
        pass
    statistics = running.statistics
    assert statistics.sequences == len(PROMPTS)
    assert statistics.prompt_tokens == sum(output.prompt_tokens for output in running.outputs)
    assert (statistics.new_tokens, statistics.decode_steps) == (len(PROMPTS) * NEW, NEW - 1)
    assert statistics.link_bytes == (NEW - 1) * running.plan.host_bytes_per_step > 0  # no tail was flushed
    assert statistics.prefill_s > 0 and statistics.decode_s > 0 and statistics.peak_host_bytes > 2**20
    assert statistics.prompt_tokens_per_s == pytest.approx(statistics.prompt_tokens / statistics.prefill_s)
    assert statistics.new_tokens_per_s == pytest.approx(len(PROMPTS) * (NEW - 1) / statistics.decode_s)
    assert statistics.link_gb_per_s == pytest.approx(statistics.link_bytes / statistics.decode_s / 1e9)
    assert 0 <= statistics.compile_s < statistics.prefill_s + statistics.decode_s
    stored = json.loads(json.dumps(statistics.as_dict()))
    assert stored["new_tokens_per_s"] == statistics.new_tokens_per_s and stored["link_bytes"] == statistics.link_bytes


def test_nothing_crosses_the_link_where_the_device_holds_the_cache(model, tokenizer):
    running = stream(model, tokenizer, PROMPTS, max_new_tokens=NEW, ignore_eos=True, offload="none")
    assert len(list(running)) == len(PROMPTS) * NEW and running.statistics.link_bytes == 0


@pytest.mark.parametrize("taken", [0, 1, 4, 3 * NEW - 1])
def test_a_stream_that_is_broken_off_has_true_outputs(model, tokenizer, outputs, taken):
    running = stream(model, tokenizer, PROMPTS, max_new_tokens=NEW, ignore_eos=True)
    pieces = list(itertools.islice(running, taken))
    assert running.statistics.new_tokens == len(pieces) == taken
    for index, (output, whole) in enumerate(zip(running.outputs, outputs, strict=True)):
        own = [piece for piece in pieces if piece.index == index]
        assert output.token_ids == whole.token_ids[: len(own)] == [piece.token_id for piece in own]
        assert output.text == "".join(piece.text for piece in own) and whole.text.startswith(output.text)
        assert output.finish_reason == ("length" if len(own) == NEW else None)


def test_the_time_to_compile_is_that_of_the_run(model, tokenizer):
    """Shapes that no other test has: the first run compiles for them, the second one does not."""
    taken = []
    for _ in range(2):
        running = stream(model, tokenizer, [4 * PROMPTS[0]] * 5, max_new_tokens=12, offload="all")
        list(running)
        taken.append(running.statistics.compile_s)
    assert taken[0] > 0.05 and taken[1] == 0.0


def test_statistics_of_a_stream_that_is_broken_off_agree_with_each_other(model, tokenizer):
    """The step that is under way beside the last token handed out is not among `decode_steps`, nor are its bytes."""
    running = stream(model, tokenizer, PROMPTS, max_new_tokens=NEW, ignore_eos=True, split="50%")
    for piece in running:
        if len(running.outputs[piece.index].token_ids) == 5:
            break
    assert running.statistics.decode_steps == 4
    assert running.statistics.link_bytes == 4 * running.plan.host_bytes_per_step


def test_progress_counts_the_layers_of_prefill(model, tokenizer):
    seen: list[tuple[int, int]] = []
    options = {"max_new_tokens": NEW, "ignore_eos": True, "progress": lambda *now: seen.append(now)}
    next(iter(stream(model, tokenizer, PROMPTS, **options)))
    assert seen == [(1, 2), (2, 2)]


# Characters and spaces


@pytest.mark.parametrize("text", ["naïve café", "日本語のテキスト", "a😀b👩‍👩‍👧🇫🇷", "\u2028\x85\r\n\tz", "é" * 12])
def test_characters_of_several_tokens_come_whole(tell, tokenizer, text):
    """Every byte is a token of its own here."""
    script = [tokens_of_bytes(tokenizer)[byte] for byte in text.encode()]
    running = tell(tokenizer, script, max_new_tokens=len(script), ignore_eos=True)
    shown = ""
    for count, piece in enumerate(running, start=1):
        shown += piece.text
        assert shown == text.encode()[:count].decode(errors="ignore")  # no character late, none in half
        assert shown == running.outputs[0].text
    assert shown == text


def test_half_a_character_at_the_end_is_shown_as_such(say, tokenizer):
    script = [tokens_of_bytes(tokenizer)[byte] for byte in "né".encode()[:-1]]
    (output,) = say(tokenizer, script, max_new_tokens=2)
    assert output.text == "n\ufffd" == tokenizer.decode(script)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_pieces_of_any_tokens_make_up_their_decoding(say, tokenizer, data):
    """Of bytes that are no characters and of special tokens too."""
    few = tokens_of_bytes(tokenizer)
    token = st.one_of(
        st.sampled_from([few[byte] for byte in "aé😀 ".encode()]),
        st.sampled_from(tokenizer.all_special_ids),
        st.integers(0, len(tokenizer) - 1),
    )
    script = data.draw(st.lists(token, min_size=NEW, max_size=NEW))
    (output,) = say(tokenizer, script, ignore_eos=True)
    assert output.token_ids == script
    assert output.text == tokenizer.decode(script, skip_special_tokens=True)


@settings(max_examples=30, deadline=None)
@given(text=st.text(min_size=1, max_size=12))
def test_pieces_of_any_text_make_up_the_text(say, tokenizer, text):
    script = tokenizer.encode(text, add_special_tokens=False)[:NEW]
    (output,) = say(tokenizer, [*script, tokenizer.eos_token_id])
    assert output.text == tokenizer.decode(script)


def test_spaces_that_depend_on_neighbours_are_kept():
    """A tokenizer of Llama's kind writes a space with the word, and drops it at the beginning of a text."""
    words = ["<s>", "</s>", "▁one", "▁two", "word", "▁"]
    plain = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<s>"))
    plain.decoder = decoders.Metaspace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=plain, bos_token="<s>", eos_token="</s>")
    script = [2, 3, 4, 2, 5, 5, 3, 2]
    output = api.Output("", 0)
    writer = api._Writer(tokenizer, output, api.Until(len(script)))
    pieces = [writer.write(token) for token in script]
    assert output.text == "".join(pieces) == tokenizer.decode(script) == "one twoword one   two one"
    assert pieces[:3] == ["one", " two", "word"]


@pytest.mark.parametrize("sampling, choice", [
    (Sampling(), "greedy"), (Sampling(0.0, top_k=3, top_p=0.5), "greedy"), (Sampling(1e-39), "greedy"),
    (Sampling(0.7), "unlimited"),
    (Sampling(0.7, top_k=1), "limited"), (Sampling(0.7, top_p=0.99), "limited"), (Sampling(0.7, min_p=0.01), "limited"),
])  # fmt: skip
def test_what_sampling_computes_is_told_from_its_values(sampling, choice):
    assert sampling.choice == choice


# Ends


def test_the_end_of_sequence_ends_one_sequence_and_not_its_neighbours(say, tokenizer):
    eos = tokenizer.eos_token_id
    a, b = tokens_of_bytes(tokenizer)[ord("a")], tokens_of_bytes(tokenizer)[ord("b")]
    first, second = say(tokenizer, [a, a, eos, b], [b, b, b, b, eos], max_new_tokens=9)
    assert (first.text, first.token_ids, first.finish_reason) == ("aa", [a, a, eos], "stop")
    assert (second.text, second.token_ids, second.finish_reason) == ("bbbb", [b, b, b, b, eos], "stop")


def test_the_end_of_sequence_at_once_gives_no_text(say, tokenizer):
    (output,) = say(tokenizer, [tokenizer.eos_token_id])
    assert (output.text, output.token_ids, output.finish_reason) == ("", [tokenizer.eos_token_id], "stop")


def test_the_end_of_sequence_may_be_ignored(say, tokenizer):
    eos, a = tokenizer.eos_token_id, tokens_of_bytes(tokenizer)[ord("a")]
    (output,) = say(tokenizer, [a, eos, a, eos], ignore_eos=True, max_new_tokens=4)
    assert (output.text, output.token_ids, output.finish_reason) == ("aa", [a, eos, a, eos], "length")


def test_every_end_of_sequence_token_of_the_config_ends(say, model, tokenizer, monkeypatch):
    a, b = tokens_of_bytes(tokenizer)[ord("a")], tokens_of_bytes(tokenizer)[ord("b")]
    monkeypatch.setattr(model, "config", dataclasses.replace(model.config, eos_token_ids=(tokenizer.eos_token_id, b)))
    first, second = say(tokenizer, [a, b, a], [a, a, tokenizer.eos_token_id], max_new_tokens=5)
    assert (first.token_ids, first.finish_reason) == ([a, b], "stop")
    assert (second.text, second.finish_reason) == ("aa", "stop")


@pytest.mark.parametrize("ahead_s, in_vain", [(0.0, 0), (1.0, 1)])
def test_work_ends_with_the_last_sequence(ahead_s, in_vain, say, tokenizer, monkeypatch):
    """No step runs for tokens that nobody will see, but for the one that may be issued ahead."""
    monkeypatch.setattr(cache_module, "AHEAD_S", ahead_s)
    steps: list[int] = []
    step = Scripted.step
    monkeypatch.setattr(Scripted, "step", lambda self, *a: steps.append(1) or step(self, *a))
    eos, a = tokenizer.eos_token_id, tokens_of_bytes(tokenizer)[ord("a")]
    say(tokenizer, [a, eos], [a, a, a, eos], max_new_tokens=50)
    assert len(steps) == 3 + in_vain


@pytest.mark.parametrize("text, stop, expected", [
    ("one. two", [". "], "one"),
    ("one. two", ["two", ". "], "one"),  # the first in the text, not in the list
    ("one. two", ["x", "one"], ""),
    ("abab!", ["abb", "ba"], "a"),
    ("aaab!", ["aab"], "a"),  # what looked like the beginning of a stop string was text
    ("aaa", ["aab"], "aaa"),  # and is not lost at the end
    ("né日!", ["日"], "né"),
    ("né日!", ["é日!"], "n"),
    ("ab\n\ncd", ["\n\n"], "ab"),
    ("abcabd", ["abd", "bca"], "a"),
])  # fmt: skip
def test_a_stop_string_ends_the_text_before_it(say, tokenizer, text, stop, expected):
    """Letter by letter, so that every stop string spans tokens; `say` checks that none of it was shown."""
    script = [tokens_of_bytes(tokenizer)[byte] for byte in text.encode()]
    (output,) = say(tokenizer, script, stop=stop, max_new_tokens=len(script))
    assert output.text == expected
    found = any(string in text for string in stop)
    assert output.finish_reason == ("stop" if found else "length")
    assert output.token_ids == script[: len(output.token_ids)] and (found or len(output.token_ids) == len(script))


def test_a_stop_string_within_one_token_ends_the_text(say, tokenizer):
    token = max(range(len(tokenizer)), key=lambda t: len(tokenizer.decode([t]).strip()))
    word = tokenizer.decode([token])
    (output,) = say(tokenizer, [token] * 3, stop=[word[2:4]], max_new_tokens=3)
    assert (output.text, output.token_ids, output.finish_reason) == (word[: word.index(word[2:4])], [token], "stop")


def test_a_stop_string_ends_its_own_sequence_only(say, tokenizer):
    letters = {letter: tokens_of_bytes(tokenizer)[ord(letter)] for letter in "abc"}
    first, second = say(tokenizer, [letters[x] for x in "abca"], [letters[x] for x in "aaaa"], stop=["b"])
    assert (first.text, len(first.token_ids), first.finish_reason) == ("a", 2, "stop")
    assert (second.text, len(second.token_ids), second.finish_reason) == ("a" * NEW, NEW, "length")


@settings(max_examples=60, deadline=None)
@given(text=st.text("abé", min_size=1, max_size=10), stop=st.lists(st.text("abé", min_size=1, max_size=4), max_size=3))
def test_stop_strings_end_the_text_at_the_first_of_them(say, tokenizer, text, stop):
    script = [tokens_of_bytes(tokenizer)[byte] for byte in text.encode()]
    (output,) = say(tokenizer, [*script, tokenizer.eos_token_id], stop=stop)
    read = next((text[:end] for end in range(len(text) + 1) if any(s in text[:end] for s in stop)), text)
    expected = min((read[: read.index(s)] for s in stop if s in read), key=len, default=text)
    assert (output.text, output.finish_reason) == (expected, "stop")


def test_a_stop_string_may_be_given_as_a_string(say, tokenizer):
    """As a prompt may: its letters are not stop strings of their own."""
    script = [tokens_of_bytes(tokenizer)[byte] for byte in b"a Eb ND END z"]
    (output,) = say(tokenizer, script, stop="END", max_new_tokens=len(script))
    assert output.text == "a Eb ND "


# Sampling

SAMPLED = {"temperature": 1.0, "max_new_tokens": NEW, "ignore_eos": True}


@pytest.fixture(scope="module")
def samples(model, tokenizer):
    """Each prompt's sample with seed 5, of a run of its own."""
    return {prompt: generate(model, tokenizer, prompt, seed=5, **SAMPLED)[0] for prompt in PROMPTS}


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 1, 2)], ids=str)
def test_a_sample_does_not_depend_on_neighbours_or_their_order(model, tokenizer, samples, order):
    prompts = [PROMPTS[i] for i in order]
    assert generate(model, tokenizer, prompts, seed=5, **SAMPLED) == [samples[prompt] for prompt in prompts]


@pytest.mark.parametrize("placement", [
    {"split": "0%"},
    {"split": "3", "recompute": "project"},
    {"split": "100%", "recompute": "absorb", "engine": "sequential"},
    {"offload": "none"},
    {"split": "50%", "tail_tokens": 13},
], ids=str)  # fmt: skip
def test_a_sample_does_not_depend_on_where_the_cache_lies(model, tokenizer, samples, placement):
    assert generate(model, tokenizer, PROMPTS, seed=5, **SAMPLED, **placement) == list(samples.values())


def test_a_sample_depends_on_the_seed_and_the_prompt(model, tokenizer, samples):
    for seed in (0, 6, -5, 5 + 2**32, 10**40):
        for output in generate(model, tokenizer, PROMPTS, seed=seed, **SAMPLED):
            assert output.token_ids != samples[output.prompt].token_ids
    assert len({tuple(output.token_ids) for output in samples.values()}) == len(PROMPTS)


def test_draws_of_different_prompts_are_independent(model, tokenizer):
    """At this temperature all tokens are equally likely, so the tokens show the draws."""
    longest = max(PROMPTS, key=lambda prompt: len(tokenizer(prompt)["input_ids"]))
    prompts = ["x", "y", longest]
    assert len({len(ids) for ids in encode(tokenizer, prompts[:2])}) == 1
    x, y, _ = generate(model, tokenizer, prompts, seed=5, **SAMPLED | {"temperature": 1e9})
    assert sum(a == b for a, b in zip(x.token_ids, y.token_ids, strict=True)) <= 1
    assert len(set(x.token_ids)) > NEW // 2  # nor are the draws of one prompt the same at each step


def test_a_longer_sample_begins_like_a_shorter_one(model, tokenizer, samples):
    (longer,) = generate(model, tokenizer, PROMPTS[1], seed=5, **SAMPLED | {"max_new_tokens": NEW + 6})
    assert longer.token_ids[:NEW] == samples[PROMPTS[1]].token_ids


@pytest.mark.parametrize("only_one", [
    {"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1.0}, {"top_k": 2**31 - 1, "top_p": 1e-9}, {"temperature": 1e-30},
], ids=str)  # fmt: skip
def test_a_sample_from_one_token_is_greedy(model, tokenizer, outputs, only_one):
    assert generate(model, tokenizer, PROMPTS, **SAMPLED | only_one) == outputs


def test_a_sample_from_few_tokens_differs_from_greedy_and_from_all(model, tokenizer, outputs, samples):
    limited = generate(model, tokenizer, PROMPTS, seed=5, top_k=3, **SAMPLED)
    assert all(a.token_ids != b.token_ids for a, b in zip(limited, outputs, strict=True))
    assert all(output.token_ids != samples[output.prompt].token_ids for output in limited)


# What is refused


@pytest.mark.parametrize("prompts, options, message", [
    ([], {}, "no prompts"),
    ("", {}, "prompt 1 of 1 is empty"),
    (["x", ""], {}, "prompt 2 of 2 is empty"),
    ("x", {"max_new_tokens": 0}, "max-new-tokens 0"),
    ("x", {"max_new_tokens": -1}, "max-new-tokens -1"),
    ("x", {"max_new_tokens": 113}, "113 new tokens are more than the model's 113 positions"),
    ("x", {"temperature": -0.1}, "temperature -0.1"),
    ("x", {"temperature": float("nan")}, "temperature nan"),
    ("x", {"top_k": -1}, "top-k -1"),
    ("x", {"top_k": 2**31}, "top-k 2147483648"),
    ("x", {"top_p": 0.0}, "top-p 0.0"),
    ("x", {"top_p": 1.5}, "top-p 1.5"),
    ("x", {"min_p": -0.5}, "min-p -0.5"),
    ("x", {"stop": ["a", ""]}, "stop '' is empty"),
    ("x", {"split": "x"}, "split 'x'"),
    ("x", {"split": "99"}, "split 99 is more than the prompt's 2 tokens"),
    ("x", {"split": "1", "offload": "none"}, "split 1 .* offload none"),
    ("x", {"tail_tokens": 0}, "tail_tokens 0"),
    ("x", {"device_cache_gib": -1.0}, "device-cache-gib -1.0"),
], ids=str)  # fmt: skip
def test_options_out_of_range_are_named_before_anything_runs(model, tokenizer, prompts, options, message, monkeypatch):
    monkeypatch.setattr(Decoder, "prefill", None)
    with pytest.raises(ValueError, match=message):
        stream(model, tokenizer, prompts, **{"max_new_tokens": 4} | options)


def test_an_option_that_does_not_exist_is_named(model, tokenizer):
    with pytest.raises(TypeError, match="temprature"):
        generate(model, tokenizer, "x", temprature=1.0)


def test_positions_may_be_used_up_to_the_last(model, tokenizer):
    (output,) = generate(model, tokenizer, "x", max_new_tokens=113 - 2, ignore_eos=True)
    assert len(output.token_ids) == 113 - 2


def test_too_little_memory_is_an_error_with_both_figures(model, tokenizer, monkeypatch):
    monkeypatch.setattr(api.memory, "free_host_bytes", lambda: 1024)
    monkeypatch.setattr(Decoder, "prefill", None)
    with pytest.raises(MemoryError, match=r"host memory.* GiB and 0\.00000095 GiB"):
        stream(model, tokenizer, PROMPTS, max_new_tokens=NEW, offload="all")


def test_no_output_is_a_number_that_json_cannot_hold(model, tokenizer, outputs):
    stored = json.loads(json.dumps([dataclasses.asdict(output) for output in outputs]))
    assert stored[0]["token_ids"] == outputs[0].token_ids
    assert all(type(token) is int for token in outputs[0].token_ids) and not isinstance(outputs[0].text, np.str_)
